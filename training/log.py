"""What a run tells of itself: the summary before it starts, the records of log.jsonl, and the facts of its model."""

import json
import math
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from common import replace_file, unwritable
from training.config import TrainConfig
from training.workers import available_cores

LIBRARIES = "torch diffusers accelerate datasets".split()

# ---- Before the start


def preflight_summary(
    config: TrainConfig, network: nn.Module, loss_of: Callable[[Tensor], Tensor], **facts: str | int | None
) -> str:
    """Sizes, length and memory of a training as a table.

    Args:
        loss_of: the loss of the training on images of shape (B, 3, H, W); called with one image to see what its
            backward pass keeps.
        facts: `source`, `num_images`, `num_heldout_images`, `num_classes` (None without labels), `num_processes`,
            `total_steps`, `step`, `device`.
    """
    parameters = list(network.parameters())
    image = torch.zeros(1, 3, config.resolution, config.resolution, device=parameters[0].device)
    state_bytes = sum(p.numel() * p.element_size() for p in parameters) * (7 if config.post_hoc_ema else 5)
    batch_bytes = activation_bytes(lambda: loss_of(image), parameters) * config.train_batch_size
    images_per_update = config.train_batch_size * config.gradient_accumulation_steps * facts["num_processes"]
    length = "no last step"
    if facts["total_steps"]:
        epochs = facts["total_steps"] * images_per_update / facts["num_images"]
        length = f"{facts['total_steps']:,} updates = {epochs:.1f} epochs"
    if config.max_train_minutes:
        length += f", at most {config.max_train_minutes:g} minutes in this start"
    objective = {name: value for name, value in config.objective_settings().items() if value not in (None, False)}
    rows = {
        "network": f"{sum(p.numel() for p in parameters):,} parameters at {config.resolution}x{config.resolution}",
        "objective": ", ".join(str(v) if k == "objective" else f"{k} {v}" for k, v in objective.items()),
        "data": f"{facts['source']}, {config.split}: {facts['num_images']:,} images per epoch",
        "held-out data": f"{facts['num_heldout_images']:,} images",
        "classes": "none" if facts["num_classes"] is None else f"{facts['num_classes']} of {config.label_column}",
        "images per update": f"{images_per_update} = {config.train_batch_size} x"
        f" {config.gradient_accumulation_steps} accumulated x {facts['num_processes']} processes",
        "length": length,
        "memory": f"{state_bytes / 2**20:,.0f} MiB for weights, gradients, optimizer and EMA;"
        f" {batch_bytes / 2**20:,.0f} MiB for the activations of a batch (estimate)",
        "device": f"{facts['device']}, precision {config.mixed_precision}",
        "output": config.output_dir,
        "starts at": f"step {facts['step']}",
    }
    if config.metric is not None:
        rows["metric"] = (
            f"{config.metric.upper()} of {config.metric_images:,} images every {config.metric_steps:,} updates"
        )
    without_time = levels_without_time(config)
    if without_time:
        rows["note"] = (
            f"level {without_time[0]} has one channel per group, so group norm cancels the time embedding; lower"
            " --norm_num_groups or set --resnet_time_scale_shift scale_shift"
        )
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def levels_without_time(config: TrainConfig) -> list[int]:
    """Levels of the network whose residual blocks cannot tell the timestep.

    The embedding is one number for each channel, added before the second norm, and a group of one channel has its mean
    subtracted.
    """
    if config.resnet_time_scale_shift != "default":
        return []
    blocks = zip(config.block_out_channels, config.down_block_types, strict=True)
    return [
        level for level, (width, block) in enumerate(blocks) if "Skip" not in block and width == config.norm_num_groups
    ]


def activation_bytes(compute_loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes that autograd keeps for the backward pass, parameters left out; each storage counts once."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        loss = compute_loss()  # held until the end: a freed storage's address could be taken again
    del loss
    return total


def speed_report(images_per_second: float, num_images_left: float, seconds_left: float) -> str:
    """The speed, and the time left until all images are seen or the time is up; either may be infinite."""
    seconds_left = min(seconds_left, num_images_left / images_per_second)
    left = f", {duration(seconds_left)} left" if math.isfinite(seconds_left) else ""
    return f"{images_per_second:.1f} images/s{left}"


def duration(seconds: float) -> str:
    """h:mm:ss, rounded to seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


# ---- During the training


class RunLog:
    """The records of a run, in memory and as lines of JSON in a file, each with the `step` it belongs to.

    Records beyond `step` are dropped first: they tell of updates that were lost with the process that made them, and
    a record of how many takes their place. A last line that a crash cut short goes with them.

    Raises:
        OSError: here and by `write`, naming the path, if it cannot be written; what it held before is still there.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        before = read_log(path)
        self.records = [record for record in before if record["step"] <= step]
        if len(self.records) < len(before):
            self.records.append({"step": step, "lost_steps": max(record["step"] for record in before) - step})
        replace_file(path, "".join(f"{json.dumps(record)}\n" for record in self.records).encode())

    def write(self, step: int, **values) -> None:
        self.records.append({"step": step, **values})
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(self.records[-1]) + "\n")
        except OSError as error:
            raise unwritable(self.path, error) from error

    def newest(self, key: str) -> dict | None:
        """The last record that has such a value."""
        return next((record for record in reversed(self.records) if key in record), None)


def read_log(path: Path) -> list[dict]:
    """The complete records of a log; empty if there is none."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


@dataclass
class Interval:
    """Sums between two log records; what lies on the device stays there until it is read."""

    attempts: int = 0
    seconds: float = 0.0
    updates: int = 0
    loss_sum: Tensor | float = 0.0
    grad_norm: Tensor | float = 0.0  # of the last update
    set_up_seconds: float | None = None  # of the first one: from the start of the process to its first update

    def add_time(self, seconds: float) -> None:
        self.attempts += 1
        self.seconds += seconds

    def add_update(self, loss: Tensor, grad_norm: Tensor) -> None:
        self.updates += 1
        self.loss_sum = self.loss_sum + loss
        self.grad_norm = grad_norm


def heldout_table(records: list[dict]) -> str:
    """The first, the middle and the last held-out loss as a Markdown table, the speed, and what starts and kills cost.

    Raises:
        ValueError: if there is none among the records.
    """
    heldout = [record for record in records if "heldout_loss" in record]
    if not heldout:
        raise ValueError(f"none of the {len(records)} records has a held-out loss; train with --validation_split")
    lines = ["| images seen | held-out loss | q1 (least noise) | q2 | q3 | q4 |", "|---|---|---|---|---|---|"]
    for record in (heldout[0], heldout[len(heldout) // 2], heldout[-1]):
        values = [record["heldout_loss"], *(record[f"heldout_loss_q{q}"] for q in (1, 2, 3, 4))]
        lines.append(f"| {record['images_seen']:,} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    starts = [record["set_up_seconds"] for record in records if "set_up_seconds" in record]
    lost = sum(record.get("lost_steps", 0) for record in records)
    speeds = [record["images_per_second"] for record in records if "images_per_second" in record]
    minutes = max(record.get("train_seconds", 0) for record in records) / 60
    lines += ["", f"{minutes:.1f} minutes in updates, median {statistics.median(speeds):.1f} images/s"]
    if starts:
        lines.append(
            f"{len(starts)} starts, {statistics.median(starts):.0f} s each until the first update (median);"
            f" {lost} updates lost by kills"
        )
    return "\n".join(lines)


# ---- The facts that travel with the model, in the training.json of its folder


def machine_facts(device: torch.device) -> dict:
    """The device and the versions of the libraries."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
    return {"device": device_name(device), "versions": versions}


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        models = [
            line.split(":", 1)[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        ]
        name = models[0].strip() if models else name
    return f"{name}, {available_cores()} cores"


def recorded(folder: Path, key: str):
    """An entry of a model repository's `training.json`, as its `step`; None if there is none or it is damaged."""
    try:
        return json.loads((folder / "training.json").read_text())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def training_in_all(folder: Path) -> dict:
    """`images_seen` and `train_seconds` of a model repository, those of the weights that its training began with too.

    If it tells nothing of its training, the two are None.
    """
    before = recorded(folder, "pretrained") or {"images_seen": 0, "train_seconds": 0.0}
    try:
        return {key: recorded(folder, key) + before[key] for key in ("images_seen", "train_seconds")}
    except (KeyError, TypeError):
        return dict.fromkeys(("images_seen", "train_seconds"))
