"""Trains an unconditional or class-conditional diffusion model and saves it as a pipeline folder.

    accelerate launch train_unet.py --config configs/quickstart.yaml [--flag value ...]

Running the same command again resumes from the newest checkpoint. Exit codes: 0 trained, or the time budget is used
up; 1 the run or its push to the Hub failed; 2 bad configuration or data; 130 and 143 stopped by SIGINT or SIGTERM,
after saving a checkpoint if training had begun. `accelerate launch` turns every nonzero code into 1.
"""

import copy
import logging
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from filelock import FileLock
from safetensors import SafetensorError
from tqdm.auto import tqdm

from common import Failed, on_main_process, run_command
from custom_unet import CustomUNet2DModel
from eval.training_metric import TrainingMetric
from pipelines import CustomUNetPipeline
from pipelines.export import check_replaceable, export_pipeline
from pipelines.hub import check_account, push_to_hub
from pipelines.pretrained import open_pretrained, take_weights
from training import log
from training.arguments import parse_config
from training.checkpoint import Progress, save_checkpoint, save_snapshot, saved_state, start_or_resume
from training.config import TrainConfig
from training.diffusion import diffusion_loss
from training.optimization import build_optimizer, ema_decay, learning_rate_schedule, update_ema
from training.post_hoc_ema import start_averages, update_averages
from training.precision import settle_precision
from training.processes import Stop, build_accelerator, on_any_process
from training.training_data import TrainingData

logger = logging.getLogger("training")


class Trainer:
    """A training run: its networks, data, optimizer and output folder, and the training loop.

    Raises InputError if the data, the pretrained weights or the metric's weights cannot be loaded or do not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        stop: Stop,
        network_class: type[CustomUNet2DModel] = CustomUNet2DModel,
    ):
        self.config, self.accelerator, self.stop = config, accelerator, stop
        self.output_dir = Path(config.output_dir)
        self.pipeline_dir, self.best_dir = self.output_dir / "pipeline", self.output_dir / "best_pipeline"
        self.lock: FileLock | None = None  # of the output folder; the main process holds it
        self.progress = Progress()
        self.records: list[dict] = []  # the lines of log.jsonl
        self.images_per_update = (
            config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        )
        self.noise_scheduler = config.noise_scheduler()
        pretrained, self.pretrained_facts = None, None
        if config.pretrained_model_name_or_path is not None:
            saved = on_main_process(accelerator, partial(saved_state, config))
            if saved is not None and "pretrained" in saved:  # not in an older checkpoint
                in_channels = saved["identity"]["in_channels"]
            else:
                prediction_type = self.noise_scheduler.config["prediction_type"]
                pretrained, history = open_pretrained(
                    config.pretrained_model_name_or_path, prediction_type, accelerator
                )
                self.pretrained_facts = {"name": config.pretrained_name, **history}
                in_channels = pretrained.unet.config.in_channels
            config = replace(config, in_channels=config.in_channels or in_channels)
        self.data = TrainingData(config, accelerator)
        self.config = config = self.data.config  # in_channels is now that of the images
        self.build_networks(network_class, pretrained)
        self.metric = TrainingMetric(config, self.data.store, self.pipeline, accelerator) if config.metric else None
        self.total_steps = config.max_train_steps
        if self.total_steps is None and config.num_epochs is not None:
            self.total_steps = math.ceil(config.num_epochs * len(self.data.store) / self.images_per_update)
        self.learning_rate_at: Callable[[int], float] = learning_rate_schedule(config, self.total_steps)

    # ---- Setting up

    def build_networks(self, network_class: type[CustomUNet2DModel], pretrained: CustomUNetPipeline | None) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.network = network_class(**self.unet_kwargs())
        if pretrained is not None:
            take_weights(config.pretrained_model_name_or_path, pretrained.unet, self.network, self.unet_kwargs())
        if config.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.network.to(self.accelerator.device)
        self.ema_network = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.averages = start_averages(self.network) if config.post_hoc_ema else {}
        if config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        # `unet` wraps `network` in autocast, torch.compile and DistributedDataParallel as configured
        self.unet, self.optimizer = self.accelerator.prepare(self.network, build_optimizer(config, self.network))
        scheduler = self.noise_scheduler
        if config.objective == "ddpm" and config.sampler == "ddim":
            scheduler = DDIMScheduler.from_config(scheduler.config)
        self.pipeline = CustomUNetPipeline(self.ema_network, scheduler)
        self.pipeline.set_progress_bar_config(disable=True)

    def unet_kwargs(self) -> dict:
        return self.config.unet_kwargs(None if self.data.label_names is None else len(self.data.label_names))

    def open_batches(self) -> None:
        """Opens the batch stream at the current position in the data."""
        self.data.open_batches(self.progress.attempts * self.config.gradient_accumulation_steps)
        self.unet.train()

    @property
    def images_seen(self) -> int:
        return self.progress.attempts * self.images_per_update

    # ---- Training

    def training_step(self) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """One optimizer update of the network and its EMA.

        Returns:
            this process's mean loss, the global gradient norm before clipping, and whether the update was applied. An
            update with a non-finite gradient is skipped and leaves network, EMA and step unchanged.
        """
        config, progress = self.config, self.progress
        started_at_seconds = time.perf_counter()
        # 1. All randomness derives from (seed, attempt, rank), so that a resumed run continues the same random stream
        entropy = np.random.SeedSequence((config.seed, progress.attempts, self.accelerator.process_index))
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

        # 2. Gradient of the mean loss, accumulated over micro-batches and averaged over processes at the last one
        mean_loss, settings = 0.0, config.loss_settings()
        for micro_batch in range(config.gradient_accumulation_steps):
            clean_images, labels = self.data.next_batch()
            is_last = micro_batch == config.gradient_accumulation_steps - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.unet):
                loss = diffusion_loss(self.unet, self.noise_scheduler, clean_images, **settings, class_labels=labels)
                self.accelerator.backward(loss / config.gradient_accumulation_steps)
            mean_loss += loss.detach() / config.gradient_accumulation_steps

        # 3. One NaN would ruin every weight. All processes decide alike, from the same averaged gradient
        grad_norm = self.accelerator.clip_grad_norm_(self.network.parameters(), config.max_grad_norm)
        applied = bool(torch.isfinite(grad_norm))

        # 4. Update the network, then its averages
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate_at(progress.step)
        if applied:
            self.optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # fp16: lowers the loss scale
        self.optimizer.zero_grad()
        progress.attempts += 1
        if applied:
            progress.step += 1
            decay = ema_decay(progress.step, config.ema_inv_gamma, config.ema_power, config.ema_max_decay)
            update_ema(self.ema_network, self.network, decay)
            update_averages(self.averages, self.network, progress.step)
        progress.train_seconds += time.perf_counter() - started_at_seconds
        return mean_loss, grad_norm, applied

    def train(self) -> None:
        """Trains until the last step, the deadline or a signal, then saves a checkpoint and the pipeline folder."""
        progress = self.progress
        self.open_batches()
        if progress.step == 0:
            log.report_heldout_loss(self)
        self.stop.is_noted_only = True
        self.first_step, skipped_in_a_row = progress.step, 0
        self.losses, self.last_record = [], replace(progress)  # since the last log record
        hide = not self.accelerator.is_local_main_process
        bar = tqdm(desc="training", initial=progress.step, total=self.total_steps, dynamic_ncols=True, disable=hide)
        while progress.step < (self.total_steps or math.inf) and not on_any_process(
            self.accelerator, self.stop.is_due()
        ):
            loss, grad_norm, applied = self.training_step()
            if applied:
                skipped_in_a_row = 0
                self.losses.append(loss)
                bar.update()
                self.after_update(grad_norm, bar)
            else:
                skipped_in_a_row += 1
                self.report_skipped(grad_norm, skipped_in_a_row)
        bar.close()
        self.finish()

    def after_update(self, grad_norm: torch.Tensor, bar: tqdm) -> None:
        """Logs, samples, saves and measures when each is due."""
        config, step = self.config, self.progress.step
        if step % config.logging_steps == 0 or step == self.total_steps:
            log.record_interval(self, grad_norm, bar)
        if step % config.validation_steps == 0:
            log.report_heldout_loss(self)
        if step % config.save_images_steps == 0:
            log.save_samples(self)
        if config.post_hoc_ema and step % config.post_hoc_ema_steps == 0:
            save_snapshot(self)  # before the checkpoint, so that a run resumed from it has every snapshot
        if step % config.checkpointing_steps == 0:
            save_checkpoint(self)
            self.export()
        if step % config.metric_steps == 0:
            log.report_metric(self)

    def report_skipped(self, grad_norm: torch.Tensor, in_a_row: int) -> None:
        """Logs a skipped update. Raises Failed after `max_nonfinite_steps` in a row."""
        step = self.progress.step + 1
        logger.info(f"step {step}: the gradient's norm is {grad_norm.item()}; update skipped")
        log.record(self, skipped_steps=self.progress.attempts - self.progress.step)
        if in_a_row == self.config.max_nonfinite_steps:
            raise Failed(f"{in_a_row} gradients in a row were not finite at step {step}; lower --learning_rate")

    def finish(self) -> None:
        """Saves, samples, exports and measures one last time, unless the last step already did."""
        step, config = self.progress.step, self.config
        if step == 0:
            logger.info("stopped before the first update: no model was written")
            return
        is_new, is_unsignalled = step > self.first_step, self.stop.number is None
        if is_new and step % config.checkpointing_steps:
            save_checkpoint(self)
        if is_new and is_unsignalled and step % config.validation_steps:
            log.report_heldout_loss(self)
        if is_new and is_unsignalled and step % config.save_images_steps:
            log.save_samples(self)
        if is_new or on_main_process(self.accelerator, lambda: log.recorded(self.pipeline_dir, "step") != step):
            self.export()  # the process may have been killed before exporting
        if is_new and step % config.metric_steps:
            log.report_metric(self)
        total = "" if self.total_steps is None else f" of {self.total_steps}"
        duration = timedelta(seconds=round(self.progress.train_seconds))
        seen = f"{self.images_seen:,} images in {duration} of training"
        logger.info(f"{step}{total} steps, {seen}; the pipeline is {self.pipeline_dir}")

    def dry_run(self) -> None:
        """Runs one update to check that everything fits; writes nothing."""
        self.open_batches()
        loss, grad_norm, _ = self.training_step()
        seconds, num_bytes = self.progress.train_seconds, psutil.Process().memory_info().rss
        if self.accelerator.device.type == "cuda":
            num_bytes = torch.cuda.max_memory_allocated(self.accelerator.device)
        logger.info(
            f"dry run: loss {loss:.4f}, gradient norm {grad_norm:.4f}; one update takes {seconds:.1f} s and"
            f" {num_bytes / 2**20:,.0f} MiB"
        )

    # ---- The model

    def export(self) -> None:
        """Writes the pipeline folder. Raises Failed if it cannot be written; an existing folder is left unchanged."""
        on_main_process(self.accelerator, partial(self.write_pipeline, self.pipeline_dir))

    def write_pipeline(self, folder: Path, metric: dict | None = None) -> None:
        """Writes to any folder, on the main process; `metric` is the measurement that selected the weights, if any."""
        grids = log.list_grids(self.output_dir / "samples")
        newest = max(grids, default=None)
        try:
            export_pipeline(
                self.pipeline,
                folder,
                facts=log.facts(self) | {"samples_step": newest} | ({} if metric is None else {"metric": metric}),
                training_config=self.config.to_public_yaml(),
                sample_grid=grids.get(newest),
            )
        except (OSError, SafetensorError) as error:
            raise Failed(f"could not write {folder}: {error}; check the disk and rerun to resume") from error


def run(config: TrainConfig, stop: Stop, network_class: type[CustomUNet2DModel]) -> None:
    """Trains as configured."""
    check_replaceable(Path(config.output_dir) / "pipeline")
    config = settle_precision(config, network_class)
    accelerator = build_accelerator(config)
    is_pushed = config.push_to_hub and not config.dry_run
    if is_pushed:  # before any long work, so that a bad name or token is reported now rather than at the push
        on_main_process(accelerator, partial(check_account, config.hub_repo_id))
    stop.deadline_seconds = stop.started_at_seconds + 60 * (config.max_train_minutes or math.inf)
    trainer = Trainer(config, accelerator, stop, network_class)
    try:
        if not config.dry_run:
            start_or_resume(trainer)
        accelerator.print(f"{trainer.config.to_yaml()}\n{log.preflight_summary(trainer)}\n", flush=True)
        trainer.dry_run() if config.dry_run else trainer.train()
        if is_pushed and stop.number is None and trainer.progress.step:
            push = partial(push_to_hub, trainer.pipeline_dir, config.hub_repo_id, config.hub_private_repo)
            logger.info(f"pushed: {on_main_process(accelerator, push)}")
    finally:
        with suppress(Exception):  # ending a tracker that never started raises
            accelerator.end_training()
        if trainer.lock is not None:
            trainer.lock.release()


def main(arguments: list[str], network_class: type[CustomUNet2DModel] = CustomUNet2DModel) -> int:
    with Stop() as stop:
        code = run_command(lambda: run(parse_config(arguments), stop, network_class), "stopped before training began")
    return code if stop.number is None or code in (1, 2) else 128 + stop.number  # as in a shell


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
