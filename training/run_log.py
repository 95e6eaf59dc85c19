"""The log of a run as JSON lines: what curves and tables are made from.

`python -m training.run_log LOG.jsonl` prints the held-out losses at the start, in the middle and at the end, the
speed, and what starts and kills cost.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common import replace_file, unwritable


class RunLog:
    """Appends records to a file, one JSON object a line, each with the `step` it belongs to.

    Records beyond `step` are dropped first: they tell of updates that were lost with the process that made them, and
    a record of how many takes their place. A last line that a crash cut short goes with them.

    Raises:
        OSError: here and by `write`, naming the path, if it cannot be written; what it held before is still there.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        records = read_log(path)
        kept = [record for record in records if record["step"] <= step]
        if len(kept) < len(records):
            kept.append({"step": step, "lost_steps": max(record["step"] for record in records) - step})
        replace_file(path, "".join(f"{json.dumps(record)}\n" for record in kept).encode())

    def write(self, step: int, **values) -> None:
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise unwritable(self.path, error) from error

    def has(self, step: int, key: str) -> bool:
        """Whether a record of this step has such a value."""
        return any(record["step"] == step and key in record for record in read_log(self.path))


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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m training.run_log LOG.jsonl")
    try:
        print(heldout_table(read_log(Path(sys.argv[1]))))
    except ValueError as error:
        raise SystemExit(f"error: {sys.argv[1]}: {error}") from None
