"""Reports of a training run: the summary before it starts, log records, held-out losses, sample grids and facts.

`trainer` is a `train_unet.Trainer`.
"""

import logging
import platform
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from io import BytesIO

import numpy as np
import torch
from tqdm.auto import tqdm

from common import on_main_process, one_line, replace_file
from training.diffusion import heldout_loss
from training.log import device_name, levels_without_time
from training.samples import draw_grid

logger = logging.getLogger(__name__)

LIBRARIES = "torch diffusers accelerate datasets".split()


def preflight_summary(trainer) -> str:
    """A table of the run's sizes, length and memory."""
    config, data = trainer.config, trainer.data
    num_parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
    copies = 7 if config.post_hoc_ema else 5  # weights, gradients, two moments, EMAs
    length = "open-ended"
    if total_steps := trainer.total_steps:
        epochs = total_steps * trainer.images_per_update / len(data.store)
        length = f"{total_steps:,} updates = {epochs:.1f} epochs"
    if config.max_train_minutes:
        length += f", at most {config.max_train_minutes:g} minutes in this start"
    channels, height, width = config.image_shape
    rows = {
        "network": f"{num_parameters:,} parameters at {height}x{width}",
        "data": f"{data.store.description['source']}, {config.split}: {len(data.store):,} images per epoch"
        + (", grey (--in_channels 1)" if channels == 1 else ""),
        "held-out data": f"{data.num_heldout_images:,} images",
        "classes": str(len(data.label_names or [])),
        "images per update": f"{trainer.images_per_update} = {config.train_batch_size} x"
        f" {config.gradient_accumulation_steps} accumulated x {trainer.accelerator.num_processes} processes",
        "length": length,
        "memory": f"{copies * 4 * num_parameters / 2**20:,.0f} MiB for weights, gradients, optimizer and EMA",
        "device": f"{trainer.accelerator.device}, precision {config.mixed_precision}",
        "starts at": f"step {trainer.progress.step}",
    }
    if without_time := levels_without_time(config):
        rows["note"] = (
            f"level {without_time[0]} has one channel per group, so group norm cancels the time embedding; lower"
            " --norm_num_groups or set --resnet_time_scale_shift scale_shift"
        )
    return "\n".join(f"  {name:<17}  {value}" for name, value in rows.items())


def record(trainer, **values: float) -> None:
    """Writes one record to log.jsonl and the trackers."""
    if trainer.accelerator.is_main_process:
        trainer.log.write(trainer.progress.step, images_seen=trainer.images_seen, **values)
        trainer.accelerator.log(values, step=trainer.progress.step)


def record_interval(trainer, grad_norm: torch.Tensor, bar: tqdm) -> None:
    """Logs the means since the last record and shows them in the progress bar."""
    progress, before = trainer.progress, trainer.last_record
    num_images = (progress.attempts - before.attempts) * trainer.images_per_update
    values = {
        "loss": trainer.accelerator.reduce(torch.stack(trainer.losses).mean(), "mean").item(),
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "grad_norm": grad_norm.item(),
        "images_per_second": num_images / (progress.train_seconds - before.train_seconds),
        "skipped_steps": progress.attempts - progress.step,
        "train_seconds": progress.train_seconds,
    }
    record(trainer, **values)
    trainer.losses, trainer.last_record = [], replace(progress)
    shown = {"loss": "loss", "lr": "learning_rate", "grad": "grad_norm", "images/s": "images_per_second"}
    bar.set_postfix({name: f"{values[key]:.3g}" for name, key in shown.items()})


def report_heldout_loss(trainer) -> None:
    """Logs the held-out loss of the EMA network; does nothing without a validation split."""
    data = trainer.data
    if data.heldout_images is None:  # or on a process other than the main one
        return
    with trainer.accelerator.autocast():
        losses = heldout_loss(
            trainer.ema_network,
            trainer.noise_scheduler,
            data.heldout_images,
            trainer.config.train_batch_size,
            class_labels=data.heldout_labels,
        )
    record(trainer, **losses)
    quarters = ", ".join(f"{losses[f'heldout_loss_q{q}']:.4f}" for q in (1, 2, 3, 4))
    logger.info(
        f"step {trainer.progress.step}: held-out loss {losses['heldout_loss']:.4f}"
        f" (by quarter of the times, least noise first: {quarters})"
    )


def save_samples(trainer) -> None:
    """Saves a sample grid from fixed noise, one seed per image, cycling through the classes.

    A failure is logged and does not end the training.
    """
    if not trainer.accelerator.is_main_process:
        return
    config, step, pipeline = trainer.config, trainer.progress.step, trainer.pipeline
    if trainer.data.label_names is not None:
        labels = [number % len(trainer.data.label_names) for number in range(config.eval_batch_size)]
        pipeline = partial(pipeline, class_labels=labels)
    try:
        with trainer.accelerator.autocast():
            grid = draw_grid(
                pipeline,
                config.eval_batch_size,
                config.ddpm_num_inference_steps,
                should_stop=lambda: trainer.stop.number is not None,
            )
        folder, content = trainer.output_dir / "samples", BytesIO()
        folder.mkdir(exist_ok=True)
        grid.save(content, "PNG")
        replace_file(folder / f"step-{step:07d}.png", content.getvalue())
        for tracker in trainer.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, **options)
    except Exception as error:  # training does not depend on samples
        logger.info(f"step {step}: sampling failed: {one_line(error)}")


def report_metric(trainer) -> None:
    """Logs FID or KID of the EMA network and keeps the best weights in a folder of their own.

    A failed measurement is logged and does not end the training. Raises Failed if that folder cannot be written.
    """
    if trainer.metric is not None:
        on_main_process(trainer.accelerator, partial(_measure, trainer))


def _measure(trainer) -> None:
    metric, start = trainer.metric, f"step {trainer.progress.step}: {trainer.metric.title}"
    try:
        value = metric.measure(trainer.stop.is_due)
    except Exception as error:  # training does not depend on the metric
        logger.info(f"{start} could not be measured: {one_line(error)}")
        return
    logger.info(f"{start} {metric.keep_best(value, trainer.progress.step, trainer.best_dir, trainer.write_pipeline)}")
    record(trainer, **{metric.name: value})


def facts(trainer) -> dict:
    """The content of the model repository's `training.json`: JSON-serializable, without paths of this machine."""
    config, progress, store = trainer.config, trainer.progress, trainer.data.store
    heldout = None
    if config.validation_split is not None and (newest := trainer.log.newest("heldout_loss")) is not None:
        heldout = {k: v for k, v in newest.items() if k == "step" or k.startswith("heldout_loss")}
        heldout["split"] = config.validation_split
    values = {
        "step": progress.step,
        "total_steps": trainer.total_steps,
        "images_seen": trainer.images_seen,
        "train_seconds": progress.train_seconds,
        "num_processes": trainer.accelerator.num_processes,
        "num_heldout_images": trainer.data.num_heldout_images,
        "parameters": sum(parameter.numel() for parameter in trainer.network.parameters()),
        "objective": config.objective_settings(),
        "data": {key: value for key, value in store.description.items() if value is not None},
        "heldout": heldout,
        "precision": "fp32" if config.mixed_precision == "no" else config.mixed_precision,
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(trainer.accelerator.device),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }
    if trainer.pretrained_facts is not None:
        values["pretrained"] = trainer.pretrained_facts
    return values
