"""Kills a small training again and again and resumes it; in the end nothing of it shows.

    python -m tests.soak --kills 100

Each start is a process of its own (forked from one that has the libraries loaded), which a SIGKILL ends: about half of
them while a checkpoint is written, the others at any moment, the start and the export included. After each kill every
folder named checkpoint-STEP must be complete, and the next start must go on from the newest one. In the end, weights,
EMA, moments and logged losses are those of a run that was never killed, and no temporary file is left. Exit code 0 if
so, 1 with the first difference if not.
"""

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
import yaml
from safetensors.torch import load_file

import train_unet
from tests.test_train_unet import TINY
from training.checkpoint import list_checkpoints, verify_checkpoint
from training.log import read_log

# Steps, kills and the learning rate's schedule must not depend on each other: the last step is chosen at the end
SETTINGS = TINY | {"lr_scheduler": "constant_with_warmup", "checkpointing_steps": 2, "max_train_steps": 10**6}
LAST_STEPS = 5  # after the last kill
PATIENCE_SECONDS = 300  # for one start to reach the moment of its kill
STARTS_AT = re.compile(r"starts at +step (\d+)\n")
KEEP = {"checkpoints_total_limit": 2}


class Difference(AssertionError):
    """What a killed run did that it must not. The message is one line."""


class Soak:
    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.run_dir = folder / "killed"
        self.kills: Counter[str] = Counter()
        self.resumed: list[int] = []  # step of each start

    def start(self, output_dir: Path, **changes) -> tuple[int, Path]:
        """A training in a process of its own; its process id and the file of its output."""
        config = self.folder / "soak.yaml"
        config.write_text(yaml.safe_dump(SETTINGS | KEEP | changes))
        output = self.folder / f"{output_dir.name}.txt"
        output.unlink(missing_ok=True)
        arguments = ["--config", config, "--output_dir", output_dir, "--cache_dir", self.folder / "cache"]
        process_id = os.fork()
        if process_id == 0:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = 99
            try:
                code = train_unet.main([str(argument) for argument in arguments])
                sys.stdout.flush()
            finally:
                os._exit(code)
        return process_id, output

    def finish(self, output_dir: Path, **changes) -> None:
        process_id, output = self.start(output_dir, **changes)
        _, status = os.waitpid(process_id, 0)
        if status != 0:
            raise Difference(f"a start ended with status {status}: {last_line(output)}")
        self.check_start(output_dir, output)

    def kill_once(self) -> None:
        """One start and its SIGKILL."""
        newest = max(list_checkpoints(self.run_dir), default=0)
        process_id, output = self.start(self.run_dir)
        kind = self.random.choices(["write", "step", "export", "start"], [5, 3, 1, 1])[0]
        if kind != "start":  # traces of the last kill are cleared by then
            self.wait(process_id, output, lambda: STARTS_AT.search(text_of(output)))
        if kind == "write":
            # the first save of a start would leave no progress to any of them; so often a later one
            wanted = newest + 2 * self.random.choice((1, 2, 3))
            self.wait(process_id, output, lambda: (self.run_dir / f".tmp-checkpoint-{wanted}").exists())
            time.sleep(self.random.uniform(0, 0.02))
        elif kind == "export":
            wanted = newest + 2 * self.random.choice((1, 2))
            self.wait(process_id, output, lambda: (self.run_dir / f"checkpoint-{wanted}").exists())
            time.sleep(self.random.uniform(0, 0.15))
        elif kind == "step":
            wanted = newest + self.random.choice((1, 2, 3, 4))
            self.wait(process_id, output, lambda: self.last_logged_step() >= wanted)
            time.sleep(self.random.uniform(0, 0.05))
        else:
            time.sleep(self.random.uniform(0, 1.5))
        os.kill(process_id, signal.SIGKILL)
        _, status = os.waitpid(process_id, 0)
        if not os.WIFSIGNALED(status):
            raise Difference(f"a start ended before its kill with status {status}: {last_line(output)}")
        if kind != "start":
            self.check_start(self.run_dir, output, newest)
        self.kills[self.where()] += 1
        for folder in list_checkpoints(self.run_dir).values():
            verify_checkpoint(folder)

    def wait(self, process_id: int, output: Path, ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not ready():
            if os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
            if time.monotonic() > deadline:
                raise Difference(f"a start hangs: {last_line(output)}")
            time.sleep(0.0005)

    def last_logged_step(self) -> int:
        return max((record["step"] for record in read_log(self.run_dir / "log.jsonl")), default=0)

    def where(self) -> str:
        """In what a kill fell, as its traces tell."""
        names = [path.name for path in self.run_dir.glob(".tmp-*")] if self.run_dir.is_dir() else []
        if any(name.startswith(".tmp-checkpoint-") for name in names):
            return "while a checkpoint was written"
        if any(name.startswith(".tmp-deleted-") for name in names):
            return "while an old checkpoint was deleted"
        if any("pipeline" in name for name in names):
            return "while the pipeline was exported"
        return "while something else was written" if names else "elsewhere"

    def check_start(self, output_dir: Path, output: Path, newest: int | None = None) -> None:
        """Whether a start went on from the newest checkpoint."""
        told = STARTS_AT.search(text_of(output))
        if told is None:
            raise Difference(f"a start does not tell its step: {last_line(output)}")
        if newest is not None and int(told[1]) != newest:
            raise Difference(f"a start went on from step {told[1]}, but the newest checkpoint was of step {newest}")
        self.resumed.append(int(told[1]))

    def compare(self, straight_dir: Path, step: int) -> None:
        """Whether the killed run is the one that was not."""
        killed, straight = (folder / f"checkpoint-{step}" for folder in (self.run_dir, straight_dir))
        for path in sorted(straight.glob("*.safetensors")):
            ours, theirs = load_file(killed / path.name), load_file(path)
            if ours.keys() != theirs.keys():
                raise Difference(f"{path.name} has other tensors")
            for name in theirs:
                if not torch.equal(ours[name], theirs[name]):
                    raise Difference(f"{path.name} differs in {name}")
        losses = [
            {record["step"]: record["loss"] for record in read_log(folder / "log.jsonl") if "loss" in record}
            for folder in (self.run_dir, straight_dir)
        ]
        if losses[0] != losses[1] or len(losses[0]) != step:
            raise Difference(f"the logs differ: {len(losses[0])} and {len(losses[1])} losses of {step}")
        left = [path.name for path in self.run_dir.rglob("*") if ".tmp" in path.name]
        if left:
            raise Difference(f"temporary files are left: {', '.join(left)}")


def last_line(output: Path) -> str:
    return next((line for line in reversed(text_of(output).split("\n")) if line.strip()), "no output")


def text_of(output: Path) -> str:
    return output.read_text(errors="replace") if output.exists() else ""


def soak(kills: int, seed: int, folder: Path) -> str:
    """Kills, resumes and compares; returns what to tell.

    Raises:
        Difference: if the killed run is not as the other one.
    """
    test = Soak(folder, seed)
    started_at_seconds = time.monotonic()
    for number in range(1, kills + 1):
        test.kill_once()
        if number % 10 == 0:
            print(f"{number} kills, newest checkpoint {max(list_checkpoints(test.run_dir), default=0)}", flush=True)
    step = max(list_checkpoints(test.run_dir), default=0) + LAST_STEPS
    test.finish(test.run_dir, max_train_steps=step)
    straight = folder / "straight"
    test.finish(straight, max_train_steps=step)
    test.compare(straight, step)
    seconds = time.monotonic() - started_at_seconds
    places = ", ".join(f"{count} {place}" for place, count in test.kills.most_common())
    return (
        f"{kills} kills ({places}) over {step} steps in {seconds:.0f} s: weights, EMA, moments and losses are bit for"
        " bit those of the run that was never killed; every start took the newest complete checkpoint; no temporary"
        " file is left"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            print(soak(options.kills, options.seed, Path(folder)))
        except (Difference, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
