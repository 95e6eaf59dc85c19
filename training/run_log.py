"""The log of a run as JSON lines: what curves and tables are made from."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


class RunLog:
    """Appends records to a file, one JSON object a line, each with the `step` it belongs to.

    Records beyond `step` are dropped first: they tell of updates that were lost with the process that made them. A
    last line that a crash cut short goes with them.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [record for record in read_log(path) if record["step"] <= step]
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
        temporary.replace(path)

    def write(self, step: int, **values) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


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

    def add_time(self, seconds: float) -> None:
        self.attempts += 1
        self.seconds += seconds

    def add_update(self, loss: Tensor, grad_norm: Tensor) -> None:
        self.updates += 1
        self.loss_sum = self.loss_sum + loss
        self.grad_norm = grad_norm
