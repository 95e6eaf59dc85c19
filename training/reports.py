"""What a training shows of itself: lines on the terminal, records, held-out losses, sample grids, a metric, facts."""

import logging
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from common import on_main_process
from training.config import TrainConfig
from training.diffusion import heldout_loss
from training.log import Interval, RunLog, machine_facts, preflight_summary
from training.processes import StopSignal, on_any_process
from training.samples import SamplingStopped, draw_grid, save_grid
from training.training_data import TrainingData

logger = logging.getLogger(__name__)


class Reports:
    """The base of `train_unet.Trainer`, which sets these attributes and has the networks and the optimizer."""

    config: TrainConfig
    accelerator: Accelerator
    data: TrainingData
    pipeline: DiffusionPipeline  # of the averaged network
    log: RunLog  # on the main process
    stop: StopSignal
    output_dir: Path
    images_per_update: int
    total_steps: int | None
    metric: object | None  # `eval.training_metric.TrainingMetric`
    last_metric: dict[str, str]  # for the progress bar

    def tell(self, line: str) -> None:
        if self.accelerator.is_main_process:
            logger.info(line)

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
        if self.data.heldout_images is None or not self.accelerator.is_main_process:
            return
        with self.accelerator.autocast():
            losses = heldout_loss(
                self.ema_network,
                self.noise_scheduler,
                self.data.heldout_images,
                self.config.train_batch_size,
                class_labels=self.data.heldout_labels,
            )
        self.record(**losses)
        quarters = ", ".join(f"{losses[f'heldout_loss_q{q}']:.4f}" for q in (1, 2, 3, 4))
        self.tell(
            f"step {self.progress.step}: held-out loss {losses['heldout_loss']:.4f}"
            f" (by quarter of the times, least noise first: {quarters})"
        )

    def save_samples(self) -> None:
        """A grid from fixed noise, one seed per image, the classes in turn.

        A failure is told and does not end the training.
        """
        if not self.accelerator.is_main_process:
            return
        config, step = self.config, self.progress.step
        pipeline = self.pipeline
        if self.data.label_names is not None:
            labels = [number % len(self.data.label_names) for number in range(config.eval_batch_size)]
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

    def preflight(self) -> str:
        """The table before the start."""
        names, device = self.data.label_names, self.accelerator.device
        label = None if names is None else torch.zeros(1, dtype=torch.int64, device=device)
        return preflight_summary(
            self.config,
            self.network,
            lambda images: self.loss(self.network, images, label),
            num_classes=names and len(names),
            source=self.data.store.description["source"],
            num_images=len(self.data.store),
            num_heldout_images=self.data.num_heldout_images,
            num_processes=self.accelerator.num_processes,
            total_steps=self.total_steps,
            step=self.progress.step,
            device=str(device),
        )

    def facts(self) -> dict:
        """What `training.json` of the model repository says, JSON-able and without any path of this machine."""
        config, heldout = self.config, self.log.newest("heldout_loss")
        if heldout is not None and config.validation_split is not None:  # a resumed run may have given it up
            heldout = {k: v for k, v in heldout.items() if k == "step" or k.startswith("heldout_loss")}
            heldout["split"] = config.validation_split
        facts = {
            "step": self.progress.step,
            "total_steps": self.total_steps,
            "images_seen": self.images_seen,
            "train_seconds": self.progress.train_seconds,
            "num_processes": self.accelerator.num_processes,
            "num_heldout_images": self.data.num_heldout_images,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "objective": config.objective_settings(),
            "data": {key: value for key, value in self.data.store.description.items() if value is not None},
            "heldout": None if config.validation_split is None else heldout,
            "precision": "fp32" if config.mixed_precision == "no" else config.mixed_precision,
            "date": datetime.now(UTC).date().isoformat(),
        }
        facts |= {} if self.pretrained_facts is None else {"pretrained": self.pretrained_facts}
        return facts | machine_facts(self.accelerator.device)

    def measure(self) -> None:
        """FID or KID of the EMA network, unless the run is to stop or the log has it; the best has its own folder.

        A failure is told and does not end the training.

        Raises:
            Failed: if that folder cannot be written.
        """
        step, metric = self.progress.step, self.metric
        if metric is None:
            return
        known = self.log.newest(metric.name) if self.accelerator.is_main_process else None
        is_known = known is not None and known["step"] == step
        if on_any_process(self.accelerator, is_known or self.wants_to_stop()):
            return
        value = metric.measure(step, self.wants_to_stop, self.tell)
        if value is not None:
            keep = partial(metric.keep_best, value, step, self.best_dir, self.write_pipeline)
            self.tell(on_main_process(self.accelerator, keep))
            self.record(**{metric.name: value})
            self.last_metric = {metric.name: f"{value:.3g}"}
