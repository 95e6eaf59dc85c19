"""What a training run reports: its summary, log records, held-out losses, sample grids, metric, and its model's facts.

`trainer` is a `train_unet.Trainer`.
"""

import json
import logging
import math
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from common import on_main_process, one_line, replace_file, unwritable
from training.config import TrainConfig
from training.diffusion import heldout_loss
from training.workers import available_cores

logger = logging.getLogger(__name__)

LOG = "log.jsonl"  # in the output folder: one record per line
LIBRARIES = "torch diffusers accelerate datasets".split()


def preflight_summary(trainer) -> str:
    """A table of the run's sizes, length and memory."""
    config, data = trainer.config, trainer.data
    num_parameters = trainer.network.num_parameters()
    copies = 7 if config.post_hoc_ema else 5  # weights, gradients, two moments, EMAs
    length = "open-ended"
    if total_steps := trainer.total_steps:
        epochs = total_steps * trainer.images_per_update / len(data.store)
        length = f"{total_steps:,} updates = {epochs:.1f} epochs"
    if config.max_train_minutes:
        length += f", at most {config.max_train_minutes:g} minutes in this launch"
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


def levels_without_time(config: TrainConfig) -> list[int]:
    """Levels of the network at which group norm with one channel per group cancels the time embedding.

    The embedding adds one number per channel before the second norm, which subtracts the mean of each group.
    """
    if config.resnet_time_scale_shift != "default":
        return []
    blocks = zip(config.block_out_channels, config.down_block_types, strict=True)
    return [
        level for level, (width, block) in enumerate(blocks) if "Skip" not in block and width == config.norm_num_groups
    ]


# ---- The log


def read_log(path: Path) -> list[dict]:
    """The complete records of a log, each with the `step` it belongs to; empty if the file does not exist."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def start_log(path: Path, step: int) -> list[dict]:
    """Drops records beyond `step`, whose updates were lost with their process, and an incomplete last line.

    At step 0, drops all records. Returns the others. Raises OSError, naming the path, if it cannot be written; its
    content is kept.
    """
    records = [record for record in read_log(path) if record["step"] <= step] if step else []
    replace_file(path, "".join(f"{json.dumps(record)}\n" for record in records).encode())
    return records


def record(trainer, **values: float) -> None:
    """Writes one record to log.jsonl and the trackers. Raises OSError, naming the path, if it cannot be written."""
    if not trainer.accelerator.is_main_process:
        return
    path, step = trainer.output_dir / LOG, trainer.progress.step
    trainer.records.append({"step": step, "images_seen": trainer.images_seen, **values})
    try:
        with path.open("a") as file:
            file.write(json.dumps(trainer.records[-1]) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error
    trainer.accelerator.log(values, step=step)


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


# ---- Sample grids


class SamplingStopped(RuntimeError):
    """Sampling was abandoned because the run is stopping."""


def draw_grid(pipeline, num_images: int, should_stop: Callable[[], bool], **settings) -> Image.Image:
    """A square grid of the images of seeds 0 to `num_images` - 1, always from the same noise.

    Args:
        settings: further arguments of the pipeline.

    Raises SamplingStopped once `should_stop`, called after each sampling step, returns True; and whatever the pipeline
    raises, for example for non-finite weights.
    """
    settings |= {"output_type": "pt", "callback_on_step_end": stop_callback(should_stop)}
    images = pipeline(seeds=range(num_images), **settings).images
    return to_pil_image(make_grid(images.cpu(), nrow=math.ceil(math.sqrt(num_images)), padding=2, pad_value=1.0))


def stop_callback(should_stop: Callable[[], bool]) -> Callable:
    """A `callback_on_step_end` for pipelines that raises SamplingStopped once `should_stop` returns True."""

    def look_for_stop(pipeline, index, timestep, tensors) -> None:
        if should_stop():
            raise SamplingStopped("the run is stopping")

    return look_for_stop


def list_grids(folder: Path) -> dict[int, Path]:
    """Maps each step, in ascending order, to its grid in a folder; other files are ignored."""
    found = {path: re.fullmatch(r"step-(\d{7,})\.png", path.name) for path in folder.glob("step-*.png")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def save_samples(trainer) -> None:
    """Saves a sample grid from fixed noise, one seed per image, cycling through the classes.

    A failure is logged and does not end the training.
    """
    if not trainer.accelerator.is_main_process:
        return
    config, step, settings = trainer.config, trainer.progress.step, {}
    if trainer.data.label_names is not None:
        settings["class_labels"] = [number % len(trainer.data.label_names) for number in range(config.eval_batch_size)]
    try:
        with trainer.accelerator.autocast():
            grid = draw_grid(
                trainer.pipeline,
                config.eval_batch_size,
                should_stop=lambda: trainer.stop.number is not None,
                num_inference_steps=config.ddpm_num_inference_steps,
                **settings,
            )
        folder, content = trainer.output_dir / "samples", BytesIO()
        folder.mkdir(exist_ok=True)
        grid.save(content, "PNG")
        replace_file(folder / f"step-{step:07d}.png", content.getvalue())
        for tracker in trainer.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid.convert("RGB"))[None]}, step=step, **options)
    except Exception as error:  # training does not depend on samples
        logger.info(f"step {step}: sampling failed: {one_line(error)}")


def report_metric(trainer) -> None:
    """Logs FID or KID of the EMA network and keeps the best weights in a separate folder.

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


# ---- The facts that are shipped with the model, in the training.json of its folder


def facts(trainer) -> dict:
    """The content of the model repository's `training.json`: JSON-serializable, without paths of this machine."""
    config, progress, store = trainer.config, trainer.progress, trainer.data.store
    heldout, measured = None, [record for record in trainer.records if "heldout_loss" in record]
    if measured and config.validation_split is not None:
        heldout = {k: v for k, v in measured[-1].items() if k == "step" or k.startswith("heldout_loss")}
        heldout["split"] = config.validation_split
    values = {
        "step": progress.step,
        "total_steps": trainer.total_steps,
        "images_seen": trainer.images_seen,
        "train_seconds": progress.train_seconds,
        "num_processes": trainer.accelerator.num_processes,
        "num_heldout_images": trainer.data.num_heldout_images,
        "parameters": trainer.network.num_parameters(),
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


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    cores = available_cores()
    return f"{model[1] if model else platform.machine()}, {cores} core{'s' * (cores > 1)}"


def recorded(folder: Path, key: str):
    """An entry of a model repository's `training.json`, such as `step`; None if it is missing or unreadable."""
    try:
        return json.loads((folder / "training.json").read_text())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def trained_on_celeba(facts: dict) -> bool:
    """Whether a model with these facts, or one that it started from, was trained on CelebA, judging by names."""
    data, before = facts.get("data") or {}, facts.get("pretrained") or {}
    names_celeba = "celeba" in str(data.get("source")).lower() or str(data.get("crop")).startswith("celeba")
    return names_celeba or bool(before.get("celeba"))


def training_in_all(folder: Path) -> dict:
    """`images_seen` and `train_seconds` of a model, including those of the weights that it started from.

    Both are None if the model repository does not record its training.
    """
    before = recorded(folder, "pretrained") or {"images_seen": 0, "train_seconds": 0.0}
    try:
        return {key: recorded(folder, key) + before[key] for key in ("images_seen", "train_seconds")}
    except (KeyError, TypeError):
        return dict.fromkeys(("images_seen", "train_seconds"))
