"""The main job: trains a diffusion model, unconditional or of classes, and leaves it as a pipeline folder.

    accelerate launch train_unet.py --config configs/quickstart.yaml [--flag value ...]

The same command started again goes on from the newest checkpoint. Exit codes: 0 trained, or the time budget is used
up; 1 the run or its push to the Hub failed; 2 bad configuration or data; 130 and 143 stopped by SIGINT or SIGTERM,
after a checkpoint if the training had begun. `accelerate launch` makes 1 of each of them that is not 0.
"""

import copy
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm.auto import tqdm

from common import Failed, InputError, is_out_of_memory, log_to_terminal, on_main_process, replace_file
from custom_unet import CustomUNet2DModel
from eval.training_metric import TrainingMetric
from pipelines import CustomUNetPipeline
from pipelines.export import export_pipeline
from pipelines.hub import open_repository, push_to_hub
from pipelines.loading import find_pipeline, load_pipeline
from training import checkpoint
from training.config import DEFAULTS, TrainConfig, parse_config
from training.data import ImageStore, ShuffledBatches, make_loader, open_image_store, random_flip, to_model_range
from training.diffusion import diffusion_loss, drop_labels, heldout_loss, make_sampling_scheduler
from training.facts import recorded, run_facts, training_in_all
from training.optimization import build_optimizer, ema_decay, learning_rate_schedule, update_ema
from training.post_hoc_ema import start_averages, update_averages
from training.precision import settle_precision
from training.processes import StoppedEarly, StopSignal, build_accelerator, on_any_process
from training.run_log import Interval, RunLog
from training.samples import SamplingStopped, delete_newer_samples, draw_grid, newest_samples, save_grid
from training.score_matching import check_noise_levels
from training.summary import duration, preflight_summary, speed_report

PROJECT = "unet"  # what the trackers call the run; TensorBoard's folder
SPEED_REPORT_STEPS = 20  # updates after which speed and time left are told in a line of their own
RANGE_IMAGES = 1000  # of the data, by which the noise levels are judged
OBJECTIVE = (  # what the loss and the noise process depend on; older checkpoints do not tell all of it
    "prediction_type ddpm_num_steps ddpm_beta_schedule beta_start beta_end rescale_betas_zero_snr objective"
    " likelihood_weighting sde_beta_min sde_beta_max sigma_min sigma_max sigma_data noise_mean noise_std time_density"
    " label_dropout snr_gamma snr_weighting"
).split()
MEMORY_SAVERS = "set --gradient_checkpointing true or --mixed_precision bf16"


@dataclass
class Progress:
    """How far a run is. Weights, EMA, learning rate and `step` move together; a skipped one moves only `attempts`."""

    step: int = 0  # optimizer updates applied
    attempts: int = 0  # updates tried: the position in the data stream
    train_seconds: float = 0.0  # spent in updates, over all starts


class Trainer:
    """One run: its networks, data, optimizer and output folder, and the loop over them."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        deadline_seconds: float,
        stop: StopSignal,
        network_class: type[CustomUNet2DModel] = CustomUNet2DModel,
    ):
        """Opens the data, then builds the networks.

        Args:
            network_class: an experiment's variant of the network, see `experiments/unet_variants.py`.
            deadline_seconds: on the clock of `time.monotonic`, when the run stops in good order; may be infinite.

        Raises:
            InputError: if the data or the pretrained weights cannot be had, these are of another network,
                the noise levels do not suit the data, the network cannot be built, or the metric cannot be measured.
        """
        self.config, self.accelerator, self.deadline_seconds, self.stop = config, accelerator, deadline_seconds, stop
        self.output_dir = Path(config.output_dir)
        self.pipeline_dir, self.best_dir = self.output_dir / "pipeline", self.output_dir / "best_pipeline"
        self.progress = Progress()
        self.images_per_update = (
            config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        )
        self.noise_scheduler = config.noise_scheduler()
        self.pretrained_facts: dict | None = None
        pretrained = self.open_pretrained() if config.pretrained_model_name_or_path is not None else None
        self.open_data()
        self.build_networks(network_class, pretrained)
        self.metric = None if config.metric is None else TrainingMetric(config, self.store, self.pipeline, accelerator)
        self.last_metric: dict[str, str] = {}  # for the progress bar
        self.total_steps = config.max_train_steps
        if self.total_steps is None and config.num_epochs is not None:
            self.total_steps = math.ceil(config.num_epochs * len(self.store) / self.images_per_update)
        self.learning_rate_at: Callable[[int], float] = learning_rate_schedule(config, self.total_steps)

    # ---- Setting up

    def open_pretrained(self) -> CustomUNetPipeline:
        """The model whose weights the run starts from."""
        name = self.config.pretrained_model_name_or_path
        find = partial(find_pipeline, name, None, "--pretrained_model_name_or_path")
        on_main_process(self.accelerator, find)  # fetches it once, for all processes
        source, _ = find()
        pretrained = load_pipeline(source, "fp32", None)
        ours, theirs = self.noise_scheduler.config, pretrained.scheduler.config
        if ours["prediction_type"] != theirs["prediction_type"]:
            raise InputError(
                f"--pretrained_model_name_or_path {name} predicts {theirs['prediction_type']}, this run"
                f" {ours['prediction_type']}; set --prediction_type or --objective as they were there"
            )
        self.pretrained_facts = {"name": self.config.pretrained_name, **training_in_all(source)}
        return pretrained

    def take_weights(self, pretrained: CustomUNetPipeline) -> None:
        """Copies the weights into the network, if it is the same one but for dropout and resolution."""
        free = ("dropout", "sample_size")
        wanted = {"num_class_embeds": None} | {k: v for k, v in self.unet_kwargs().items() if k not in free}
        wanted = json.loads(json.dumps(wanted))
        found = json.loads(json.dumps({name: pretrained.unet.config.get(name) for name in wanted}))
        difference = checkpoint.difference(found, wanted)
        if difference:
            name = self.config.pretrained_model_name_or_path
            raise InputError(
                f"--pretrained_model_name_or_path {name} is another network ({difference}); take over its settings"
            )
        weights = pretrained.unet.state_dict()
        checkpoint.check_tensors(Path(self.config.pretrained_model_name_or_path), weights, self.network.state_dict())
        self.network.load_state_dict(weights)

    def build_networks(
        self, network_class: type[CustomUNet2DModel], pretrained: CustomUNetPipeline | None = None
    ) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        try:
            self.network = network_class(**self.unet_kwargs())
        except ValueError as error:
            raise InputError(str(error)) from error
        if pretrained is not None:
            self.take_weights(pretrained)
        if config.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.network.to(self.accelerator.device)
        self.ema_network = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.averages = start_averages(self.network) if config.post_hoc_ema else {}
        if config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        # `unet` is `network` under autocast, torch.compile and DistributedDataParallel, where they are asked for
        self.unet, self.optimizer = self.accelerator.prepare(self.network, build_optimizer(config, self.network))
        scheduler = self.noise_scheduler
        if config.objective == "ddpm":
            scheduler = make_sampling_scheduler(scheduler, config.sampler)
        self.pipeline = CustomUNetPipeline(self.ema_network, scheduler)
        self.pipeline.set_progress_bar_config(disable=True)

    def open_data(self) -> None:
        config = self.config
        self.store = self.open_store(config.split, config.max_images)
        if self.images_per_update > len(self.store):
            raise InputError(
                f"{len(self.store)} images are fewer than the {self.images_per_update} of one update"
                f" ({config.train_batch_size} x {config.gradient_accumulation_steps} accumulated x"
                f" {self.accelerator.num_processes} processes); lower --train_batch_size"
            )
        self.label_names: list[str] | None = self.store.description.get("label_names")
        if config.objective in ("ve", "edm"):
            first_images = (self.store[index] for index in range(min(RANGE_IMAGES, len(self.store))))
            try:
                check_noise_levels(self.noise_scheduler, map(to_model_range, first_images))
            except ValueError as error:
                raise InputError(str(error)) from error
        self.heldout_images = self.heldout_labels = None
        if config.validation_split is not None:
            store = self.open_store(config.validation_split, config.validation_images)
            if len(store) < 4:
                raise InputError(
                    f"split {config.validation_split} has {len(store)} held-out images; their loss needs at least 4,"
                    " one for each quarter of the times: raise --validation_images or take another --validation_split"
                )
            self.heldout_images = to_model_range(store.__getitems__(range(len(store))))
            if self.label_names is not None:
                self.heldout_labels = torch.from_numpy(store.labels_among(self.label_names))

    def open_store(self, split: str, max_images: int | None) -> ImageStore:
        """The main process decodes the images, or finds them decoded; the others read the same store."""
        open_it = partial(open_image_store, **self.config.data_source(), split=split, max_images=max_images)

        def find() -> tuple[Path, int | None]:
            store = open_it()
            return store.folder, store.max_images

        return ImageStore(*on_main_process(self.accelerator, find))

    def unet_kwargs(self) -> dict:
        return self.config.unet_kwargs(None if self.label_names is None else len(self.label_names))

    # ---- Checkpoints

    def identity(self) -> dict:
        """What a checkpoint and the run that goes on from it must have in common, as one flat dictionary."""
        config = self.config
        names = "train_batch_size gradient_accumulation_steps random_flip timestep_sampling seed post_hoc_ema".split()
        identity = self.unet_kwargs() | {name: getattr(config, name) for name in [*OBJECTIVE, *names]}
        identity |= {"num_processes": self.accelerator.num_processes, "data_fingerprint": self.store.fingerprint}
        identity |= {"label_column": config.label_column, "label_names": self.label_names}
        return json.loads(json.dumps(identity))  # tuples become lists, as in the file

    def start_or_resume(self) -> None:
        """Takes the output folder and restores the checkpoint to go on from, if any.

        Raises:
            Failed: before anything is changed, if the folder is in use, if a checkpoint that should be there
                is not or is damaged, or if it belongs to another run.
            OSError: if the folder cannot be written.
        """
        folder = on_main_process(self.accelerator, self.take_output_dir)
        if folder is not None:
            self.restore(folder)
        on_main_process(self.accelerator, self.prepare_output_dir)
        self.accelerator.init_trackers(PROJECT, {k: str(v) for k, v in asdict(self.config).items()})

    def take_output_dir(self) -> Path | None:
        """Main process: locks the folder; returns the checkpoint to go on from, if any."""
        config = self.config
        self.lock = checkpoint.lock_output_dir(self.output_dir)
        wanted = config.resume_from_checkpoint
        if config.overwrite_output_dir and wanted == "latest":
            return None
        folder = checkpoint.find_checkpoint(self.output_dir, wanted, print)
        if folder is None:
            return None
        if config.overwrite_output_dir and folder.resolve().parent == self.output_dir.resolve():
            raise Failed(f"--overwrite_output_dir would delete {folder}, which the run is to go on from")
        untold = {name: DEFAULTS[name] for name in [*OBJECTIVE, "post_hoc_ema"]} | {"snr_gamma": config.snr_gamma}
        saved = untold | checkpoint.read_identity(folder)
        difference = checkpoint.difference(saved, self.identity())
        if difference:
            raise Failed(
                f"{folder} belongs to another run ({difference}); restore these settings, take another --output_dir or"
                " start anew with --overwrite_output_dir"
            )
        return folder

    def restore(self, folder: Path) -> None:
        """Takes over a checkpoint, once all of it is read and fits."""
        scaler = self.accelerator.scaler
        tensors, state = checkpoint.load_checkpoint(folder, ["unet", "ema_unet", "optimizer", *self.averages])
        checkpoint.check_progress(folder, state.get("progress"))
        replaced = dict.fromkeys(("unet", "ema_unet"), self.network.state_dict()) | self.averages
        for name, expected in replaced.items():
            checkpoint.check_tensors(folder / f"{name}.safetensors", tensors[name], expected)
        checkpoint.check_optimizer_tensors(folder / "optimizer.safetensors", tensors["optimizer"], self.network)
        if scaler is not None and state.get("grad_scaler") is not None:
            checkpoint.check_numbers(folder, "grad_scaler", state["grad_scaler"], scaler.state_dict())
            scaler.load_state_dict(state["grad_scaler"])
        self.network.load_state_dict(tensors["unet"])
        self.ema_network.load_state_dict(tensors["ema_unet"])
        for name, average in self.averages.items():
            for key, tensor in average.items():
                tensor.copy_(tensors[name][key])
        checkpoint.restore_optimizer(self.optimizer, self.network, tensors["optimizer"])
        self.progress = Progress(**state["progress"])
        self.tell(f"going on from {folder}")

    def prepare_output_dir(self) -> None:
        """Main process: clears away what the run does not go on from, and begins the log and config.yaml."""
        if self.config.overwrite_output_dir:
            checkpoint.delete_all(self.output_dir)
            (self.output_dir / "log.jsonl").unlink(missing_ok=True)
            for folder in (self.output_dir / self.config.logging_dir / PROJECT, self.best_dir):
                if folder.exists():
                    shutil.rmtree(folder)
        checkpoint.set_aside_newer(self.output_dir, self.progress.step)
        delete_newer_samples(self.output_dir / "samples", self.progress.step)
        self.log = RunLog(self.output_dir / "log.jsonl", self.progress.step)
        again = replace(self.config, overwrite_output_dir=False)  # who starts from the file goes on
        replace_file(self.output_dir / "config.yaml", again.to_yaml().encode())

    def save_checkpoint(self) -> None:
        tensors = {"unet": self.network.state_dict(), "ema_unet": self.ema_network.state_dict()} | self.averages
        tensors["optimizer"] = checkpoint.optimizer_tensors(self.optimizer, self.network)
        self.write_checkpoint(self.output_dir, tensors, self.config.checkpoints_total_limit)

    def save_snapshot(self) -> None:
        """The averages of `--post_hoc_ema` in half precision, kept for good."""
        halves = {stem: {name: t.half() for name, t in average.items()} for stem, average in self.averages.items()}
        self.write_checkpoint(self.output_dir / checkpoint.SNAPSHOTS, halves, None)

    def write_checkpoint(self, folder: Path, tensors: dict[str, dict[str, torch.Tensor]], limit: int | None) -> None:
        scaler = self.accelerator.scaler
        state = {
            "progress": asdict(self.progress),
            "identity": self.identity(),
            "grad_scaler": scaler.state_dict() if scaler is not None else None,
            "mixed_precision": self.config.mixed_precision,
        }
        save = partial(checkpoint.save_checkpoint, folder, self.progress.step, tensors, state, limit)
        on_main_process(self.accelerator, save)

    def export(self) -> None:
        """Writes the pipeline folder of the EMA network, with what is known of the run.

        Raises:
            Failed: if it cannot be written; an older one is untouched.
        """
        on_main_process(self.accelerator, partial(self.write_pipeline, self.pipeline_dir))

    def write_pipeline(self, folder: Path, metric: dict | None = None) -> None:
        step = self.progress.step
        sample_grid, samples_step = newest_samples(self.output_dir / "samples", step)
        facts = run_facts(
            self.config,
            self.network,
            self.store.description,
            self.output_dir / "log.jsonl",
            self.accelerator.device,
            step=step,
            total_steps=self.total_steps,
            images_seen=self.images_seen,
            train_seconds=self.progress.train_seconds,
            num_processes=self.accelerator.num_processes,
            num_heldout_images=0 if self.heldout_images is None else len(self.heldout_images),
            samples_step=samples_step,
            pretrained=self.pretrained_facts,
            metric=metric,
        )
        try:
            export_pipeline(
                self.pipeline,
                folder,
                facts=facts,
                training_config=self.config.to_public_yaml(),
                sample_grid=sample_grid,
            )
        except (OSError, SafetensorError) as error:
            raise Failed(
                f"could not write {folder}: {error}; see to the disk and start the same command again, which goes on"
                " from the newest checkpoint"
            ) from error

    def push(self) -> str:
        """Main process: pushes the pipeline folder to the Hub; returns the commit's address."""
        return push_to_hub(self.pipeline_dir, self.config.hub_repo_id, self.config.hub_private_repo)

    # ---- Training

    def training_step(self) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """One optimizer update of the network and its EMA.

        Returns:
            this process's mean loss, the norm of the whole gradient before clipping, and whether the update was
            applied: one whose gradient is not finite is skipped and leaves network, EMA and step as they were.
        """
        config, progress = self.config, self.progress
        # 1. Everything random derives from (seed, attempt, rank), so that a resumed run repeats no and skips no number
        entropy = np.random.SeedSequence((config.seed, progress.attempts, self.accelerator.process_index))
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

        # 2. Gradient of the mean loss, summed over micro-batches; processes average it with the last one
        mean_loss = 0.0
        for micro_batch in range(config.gradient_accumulation_steps):
            clean_images, labels = next(self.batches)
            clean_images = clean_images.to(self.accelerator.device, non_blocking=True)
            if config.random_flip:
                clean_images = random_flip(clean_images)
            clean_images = to_model_range(clean_images)
            if labels is not None:
                labels = labels.to(self.accelerator.device, non_blocking=True)
                labels = drop_labels(labels, len(self.label_names), config.label_dropout)
            if config.channels_last:
                clean_images = clean_images.contiguous(memory_format=torch.channels_last)
            is_last = micro_batch == config.gradient_accumulation_steps - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.unet):
                loss = self.loss(self.unet, clean_images, labels)
                self.accelerator.backward(loss / config.gradient_accumulation_steps)
            mean_loss += loss.detach() / config.gradient_accumulation_steps

        # 3. Update. One NaN would ruin every weight, so each step waits for the norm
        grad_norm = self.accelerator.clip_grad_norm_(self.network.parameters(), config.max_grad_norm)
        applied = bool(torch.isfinite(grad_norm))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate_at(progress.step)
        if applied:
            self.optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # fp16: lowers the scale of the loss
        self.optimizer.zero_grad()
        progress.attempts += 1
        if applied:
            progress.step += 1
            decay = ema_decay(progress.step, config.ema_inv_gamma, config.ema_power, config.ema_max_decay)
            update_ema(self.ema_network, self.network, decay)
            update_averages(self.averages, self.network, progress.step)
        return mean_loss, grad_norm, applied

    def loss(self, unet: torch.nn.Module, clean_images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        settings = self.config.loss_settings()
        return diffusion_loss(unet, self.noise_scheduler, clean_images, **settings, class_labels=labels)

    def train(self) -> None:
        """Trains until the last step, the deadline or a signal, and leaves a checkpoint and the pipeline folder.

        Raises:
            Failed: after too many non-finite gradients in a row.
        """
        config, progress = self.config, self.progress
        self.open_batches()
        if progress.step == 0:
            self.report_heldout_loss()
        self.stop.is_noted_only = True
        if progress.step and progress.step % config.metric_steps == 0 and progress.step != self.total_steps:
            self.measure()  # which a kill or a signal may have cut short
        bar = tqdm(
            desc="training",
            unit="step",
            initial=progress.step,
            total=self.total_steps,
            dynamic_ncols=True,
            disable=not self.accelerator.is_local_main_process,
        )
        self.first_step, skipped_in_a_row = progress.step, 0
        interval = Interval(set_up_seconds=time.time() - psutil.Process().create_time())
        while (self.total_steps is None or progress.step < self.total_steps) and not self.should_stop():
            started_at_seconds = time.perf_counter()
            loss, grad_norm, applied = self.training_step()
            seconds = time.perf_counter() - started_at_seconds
            progress.train_seconds += seconds
            interval.add_time(seconds)
            if not applied:
                skipped_in_a_row += 1
                self.tell(f"step {progress.step + 1}: the gradient's norm is {grad_norm.item()}; update skipped")
                self.record(skipped_steps=self.skipped_steps)
                if skipped_in_a_row == config.max_nonfinite_steps:
                    raise Failed(
                        f"{skipped_in_a_row} gradients in a row were not finite at step {progress.step + 1}; lower"
                        " --learning_rate or look at the data, and go on from a checkpoint whose losses were sound"
                    )
                continue
            skipped_in_a_row = 0
            interval.add_update(loss, grad_norm)
            bar.update()
            if progress.step == self.first_step + SPEED_REPORT_STEPS:
                speed = interval.attempts * self.images_per_update / interval.seconds
                steps_left = math.inf if self.total_steps is None else self.total_steps - progress.step
                seconds_left = self.deadline_seconds - time.monotonic()
                self.tell(speed_report(speed, steps_left * self.images_per_update, seconds_left))
            if progress.step % config.logging_steps == 0 or progress.step == self.total_steps:
                self.record_interval(interval, bar)
                interval = Interval()
            if progress.step % config.validation_steps == 0:
                self.report_heldout_loss()
            if progress.step % config.save_images_steps == 0:
                self.save_samples()
            if config.post_hoc_ema and progress.step % config.post_hoc_ema_steps == 0:
                self.save_snapshot()  # before the checkpoint: a run that resumes from it lacks no snapshot
            if progress.step % config.checkpointing_steps == 0:
                self.save_checkpoint()
                self.export()
            if progress.step % config.metric_steps == 0 and progress.step != self.total_steps:
                self.measure()  # the last step is measured after its checkpoint
        bar.close()
        self.finish()

    def open_batches(self) -> None:
        """An endless stream of batches from the current position in the data: uint8 (B, 3, H, W), and labels (B,)."""
        order = ShuffledBatches(
            len(self.store),
            self.config.train_batch_size,
            self.config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start_batch=self.progress.attempts * self.config.gradient_accumulation_steps,
        )
        pin_memory = self.accelerator.device.type == "cuda"
        self.batches = make_loader(self.store, order, self.config.dataloader_num_workers, pin_memory)
        self.unet.train()

    def dry_run(self) -> None:
        """One update, to see that everything fits; nothing is written."""
        self.open_batches()
        started_at_seconds = time.perf_counter()
        loss, grad_norm, _ = self.training_step()
        seconds = time.perf_counter() - started_at_seconds
        self.accelerator.print(
            f"dry run: loss {loss:.4f}, gradient norm {grad_norm:.4f}, {seconds:.1f} s for one update"
        )

    def should_stop(self) -> bool:
        """Whether a signal came or the deadline passed, on any process."""
        stop = self.stop.number is not None or time.monotonic() >= self.deadline_seconds
        return on_any_process(self.accelerator, stop)

    def finish(self) -> None:
        """Checkpoint, last held-out loss and samples, export, metric; what the last step has done is not repeated."""
        step, config = self.progress.step, self.config
        is_new = step > self.first_step
        if is_new and step % config.checkpointing_steps:
            self.save_checkpoint()
        if is_new and self.stop.number is None and step % config.validation_steps:
            self.report_heldout_loss()
        if is_new and self.stop.number is None and step % config.save_images_steps:
            self.save_samples()
        if step == 0:
            self.tell("stopped before the first update: there is no model to write")
            return
        if is_new or on_main_process(self.accelerator, lambda: recorded(self.pipeline_dir, "step") != step):
            self.export()
        self.measure()
        length = f"{step} of {self.total_steps} steps" if self.total_steps else f"{step} steps"
        self.tell(
            f"{length}, {self.images_seen:,} images in {duration(self.progress.train_seconds)} of training;"
            f" the pipeline is {self.pipeline_dir}"
        )
        if self.metric is not None and (best := self.metric.best_in(self.best_dir)) is not None:
            self.tell(
                f"the best by {self.metric.title} is {self.best_dir}: {best['value']:.4g} at step {best['step']}"
            )

    # ---- What a person sees

    def tell(self, line: str) -> None:
        """Prints a line above the progress bar, once."""
        if self.accelerator.is_main_process:
            tqdm.write(line)

    @property
    def images_seen(self) -> int:
        return self.progress.attempts * self.images_per_update

    @property
    def skipped_steps(self) -> int:
        return self.progress.attempts - self.progress.step

    def record(self, **values: float) -> None:
        """One record in log.jsonl and the trackers."""
        if self.accelerator.is_main_process:
            self.log.write(self.progress.step, images_seen=self.images_seen, **values)
            self.accelerator.log(values, step=self.progress.step)

    def record_interval(self, interval: Interval, bar: tqdm) -> None:
        loss = self.accelerator.reduce(interval.loss_sum / interval.updates, "mean").item()
        values = {
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": interval.grad_norm.item(),
            "images_per_second": interval.attempts * self.images_per_update / interval.seconds,
            "skipped_steps": self.skipped_steps,
            "train_seconds": self.progress.train_seconds,
        }
        if interval.set_up_seconds is not None:
            values["set_up_seconds"] = interval.set_up_seconds
        self.record(**values)
        shown = {"loss": "loss", "lr": "learning_rate", "grad": "grad_norm", "images/s": "images_per_second"}
        bar.set_postfix({name: f"{values[key]:.3g}" for name, key in shown.items()} | self.last_metric)

    def report_heldout_loss(self) -> None:
        if self.heldout_images is None or not self.accelerator.is_main_process:
            return
        with self.accelerator.autocast():
            losses = heldout_loss(
                self.ema_network,
                self.noise_scheduler,
                self.heldout_images,
                self.config.train_batch_size,
                class_labels=self.heldout_labels,
            )
        self.record(**losses)
        quarters = ", ".join(f"{losses[f'heldout_loss_q{q}']:.4f}" for q in (1, 2, 3, 4))
        self.tell(
            f"step {self.progress.step}: held-out loss {losses['heldout_loss']:.4f}"
            f" (by quarter of the times, least noise first: {quarters})"
        )

    def save_samples(self) -> None:
        """A grid from fixed noise, one seed an image, the classes in turn.

        A failure is told and does not end the training.
        """
        if not self.accelerator.is_main_process:
            return
        config, step = self.config, self.progress.step
        pipeline = self.pipeline
        if self.label_names is not None:
            labels = [number % len(self.label_names) for number in range(config.eval_batch_size)]
            pipeline = partial(pipeline, class_labels=labels)
        try:
            with self.accelerator.autocast():
                grid = draw_grid(
                    pipeline,
                    config.eval_batch_size,
                    config.ddpm_num_inference_steps,
                    should_stop=lambda: self.stop.number is not None,
                )
            save_grid(grid, self.output_dir / "samples", step)
            for tracker in self.accelerator.trackers:
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, **options)
        except SamplingStopped:
            self.tell(f"step {step}: sampling given up, the run is to stop")
        except Exception as error:  # whatever it is, the training does not depend on it
            self.tell(f"step {step}: sampling failed, training goes on: {error}")

    def measure(self) -> None:
        """FID or KID of the EMA network, unless the run is to stop or the log has it; the best has its own folder.

        A failure is told and does not end the training.

        Raises:
            Failed: if that folder cannot be written.
        """
        step, metric = self.progress.step, self.metric
        if metric is None:
            return

        def stopped() -> bool:
            return self.stop.number is not None or time.monotonic() >= self.deadline_seconds

        is_known = self.accelerator.is_main_process and self.log.has(step, metric.name)
        if on_any_process(self.accelerator, is_known or stopped()):
            return
        value = metric.measure(step, stopped, self.tell)
        if value is not None:
            keep = partial(metric.keep_best, value, step, self.best_dir, self.write_pipeline)
            self.tell(on_main_process(self.accelerator, keep))
            self.record(**{metric.name: value})
            self.last_metric = {metric.name: f"{value:.3g}"}

    def preflight(self) -> str:
        label = None if self.label_names is None else torch.zeros(1, dtype=torch.int64, device=self.accelerator.device)
        return preflight_summary(
            self.config,
            self.network,
            lambda images: self.loss(self.network, images, label),
            num_classes=self.label_names and len(self.label_names),
            source=self.store.description["source"],
            num_images=len(self.store),
            num_heldout_images=0 if self.heldout_images is None else len(self.heldout_images),
            num_processes=self.accelerator.num_processes,
            total_steps=self.total_steps,
            step=self.progress.step,
            device=str(self.accelerator.device),
        )


def run(
    config: TrainConfig, started_at_seconds: float, stop: StopSignal, network_class: type[CustomUNet2DModel]
) -> None:
    """Trains as configured."""
    config = settle_precision(config, network_class)
    accelerator = build_accelerator(config)
    if config.push_to_hub and not config.dry_run:
        # before anything that takes long, so that the push does not fail for a name or a token
        on_main_process(accelerator, partial(open_repository, config.hub_repo_id, config.hub_private_repo))
    deadline_seconds = started_at_seconds + 60 * (config.max_train_minutes or math.inf)
    trainer = Trainer(config, accelerator, deadline_seconds, stop, network_class)
    try:
        if not config.dry_run:
            trainer.start_or_resume()
        elif config.resume_from_checkpoint != "latest":
            checkpoint.find_checkpoint(trainer.output_dir, config.resume_from_checkpoint)
        accelerator.print(f"{config.to_yaml()}\n{trainer.preflight()}\n", flush=True)
        trainer.dry_run() if config.dry_run else trainer.train()
        if config.push_to_hub and not config.dry_run and stop.number is None and trainer.progress.step:
            trainer.tell(f"pushed: {on_main_process(accelerator, trainer.push)}")
    except BaseException:
        with suppress(Exception):  # a tracker that could not start cannot end; what ended the run is to be told
            accelerator.end_training()
        raise
    accelerator.end_training()


def main(arguments: list[str], network_class: type[CustomUNet2DModel] = CustomUNet2DModel) -> int:
    started_at_seconds = time.monotonic()
    stop = StopSignal()
    log_to_terminal()
    try:
        stop.listen()
        config = parse_config(arguments, report=print if os.environ.get("RANK", "0") == "0" else lambda line: None)
        run(config, started_at_seconds, stop, network_class)
    except (InputError, Failed, OSError) as error:
        return stop.fail(error, 2 if isinstance(error, InputError) else 1)
    except StoppedEarly as error:
        return stop.fail(error, stop.exit_code)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return stop.fail(f"out of memory; lower --train_batch_size or the network, or {MEMORY_SAVERS}: {error}", 1)
    finally:
        stop.leave()
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
