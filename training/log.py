"""Facts about a run: the records of log.jsonl, and the training.json of its model."""

import json
import platform
import re
from pathlib import Path

import torch

from common import replace_file, unwritable
from training.config import TrainConfig
from training.workers import available_cores


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


# ---- During training


class RunLog:
    """The records of a run, in memory and as a JSON Lines file, each with the `step` it belongs to.

    On opening, records beyond `step` are dropped, since their updates were lost when their process died, and so is an
    incomplete last line.

    Raises:
        OSError: here and in `write`, naming the path, if it cannot be written; its previous content is kept.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.records = [record for record in read_log(path) if record["step"] <= step]
        replace_file(path, "".join(f"{json.dumps(record)}\n" for record in self.records).encode())

    def write(self, step: int, **values) -> None:
        self.records.append({"step": step, **values})
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(self.records[-1]) + "\n")
        except OSError as error:
            raise unwritable(self.path, error) from error

    def newest(self, key: str) -> dict | None:
        """The last record with this key; None if there is none."""
        return next((record for record in reversed(self.records) if key in record), None)


def read_log(path: Path) -> list[dict]:
    """The complete records of a log; empty if the file does not exist."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


# ---- The facts that are shipped with the model, in the training.json of its folder


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
    """An entry of a model repository's `training.json`, such as `step`; None if it is missing or the file damaged."""
    try:
        return json.loads((folder / "training.json").read_text())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def trained_on_celeba(facts: dict) -> bool:
    """Whether a model with these facts, or one that it started from, was trained on CelebA, judged by names."""
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
