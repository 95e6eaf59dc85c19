"""The facts of a run that travel with its model, from which the model card is written."""

import json
import math
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from training.config import TrainConfig
from training.run_log import read_log
from training.workers import available_cores

LIBRARIES = "torch diffusers accelerate datasets".split()


def run_facts(
    config: TrainConfig,
    network: nn.Module,
    data: dict,
    log_path: Path,
    device: torch.device,
    *,
    step: int,
    pretrained: dict | None = None,
    metric: dict | None = None,
    **numbers: int | float | None,
) -> dict:
    """What `training.json` of the model repository says, JSON-able and without any path of this machine.

    Args:
        data: the description of the image store.
        pretrained: `name` and `training_in_all` of the model that the run started from; None if from fresh weights.
        metric: what the weights were chosen by, see `eval/training_metric.py`; None if they are the newest.
        log_path: the run's log; its newest held-out losses up to `step` are taken.
        numbers: `total_steps` (None without a last step), `images_seen`, `train_seconds`, `num_processes`,
            `num_heldout_images` and `samples_step`, at which the sample grid was drawn (None without a grid).
    """
    heldout = [record for record in read_log(log_path) if "heldout_loss" in record and record["step"] <= step]
    losses = None
    if heldout and config.validation_split is not None:  # a run that goes on may have given them up
        losses = {key: value for key, value in heldout[-1].items() if key == "step" or key.startswith("heldout_loss")}
        losses["split"] = config.validation_split
    return {
        "step": step,
        **numbers,
        **({} if pretrained is None else {"pretrained": pretrained}),
        **({} if metric is None else {"metric": metric}),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "objective": config.objective_settings(),
        "data": {key: value for key, value in data.items() if value is not None},
        "heldout": losses,
        "device": device_name(device),
        "precision": "fp32" if config.mixed_precision == "no" else config.mixed_precision,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "date": datetime.now(UTC).date().isoformat(),
    }


def progress_facts(state: dict) -> dict:
    """`step`, `train_seconds` and `images_seen` of a checkpoint, by its state."""
    progress, identity = state["progress"], state["identity"]
    sizes = [identity[name] for name in ("train_batch_size", "gradient_accumulation_steps", "num_processes")]
    facts = {name: progress[name] for name in ("step", "train_seconds")}
    return facts | {"images_seen": progress["attempts"] * math.prod(sizes)}


def training_in_all(folder: Path) -> dict:
    """`images_seen` and `train_seconds` of a model repository, those of the weights that its training began with too.

    If it tells nothing of its training, the two are None.
    """
    try:
        facts = json.loads((folder / "training.json").read_text())
        before = facts.get("pretrained") or {"images_seen": 0, "train_seconds": 0.0}
        return {key: facts[key] + before[key] for key in ("images_seen", "train_seconds")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return dict.fromkeys(("images_seen", "train_seconds"))


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
