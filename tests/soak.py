"""Kills a small training run again and again and resumes it; the result must be that of an uninterrupted run.

    python -m tests.soak --kills 100

Each start is a separate process (forked from one with the libraries loaded) that ends with a SIGKILL: about half of
them while a checkpoint is being written, the others at any moment, including startup and export. After each kill every
folder named checkpoint-STEP must be complete, and the next start must resume from the newest one. At the end, weights,
EMA, moments and logged losses must equal those of a run that was never killed, with no temporary file left. Exit code
0 if so, 1 with the first difference otherwise.
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

import yaml

import train_unet
from tests.tiny_training import TINY, assert_same_tensors, records
from training.checkpoint import list_checkpoints, verify_checkpoint

# The learning rate must not depend on the number of steps, which is chosen only after the last kill
SETTINGS = TINY | {"lr_scheduler": "constant_with_warmup", "checkpointing_steps": 2, "max_train_steps": 10**6}
LAST_STEPS = 5  # after the last kill
PLACES = {  # prefixes of the temporary files that a kill leaves behind: what it interrupted
    ".tmp-checkpoint-": "while a checkpoint was written",
    ".tmp-deleted-": "while an old checkpoint was deleted",
    ".tmp-": "while the pipeline or another file was written",
}


class Soak:
    def __init__(self, folder: Path, seed: int):
        self.folder, self.random = folder, random.Random(seed)
        self.run_dir = folder / "killed"
        self.kills: Counter[str] = Counter()

    def start(self, output_dir: Path, **changes) -> tuple[int, Path]:
        """A training in a process of its own; its process id and the file of its output."""
        config, output = self.folder / "soak.yaml", self.folder / f"{output_dir.name}.txt"
        config.write_text(yaml.safe_dump(SETTINGS | changes))
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
        assert status == 0, f"a start ended with status {status}: {last_line(output)}"

    def kill_once(self) -> None:
        """One start and its SIGKILL."""
        newest = max(list_checkpoints(self.run_dir), default=0)
        process_id, output = self.start(self.run_dir)
        kind = self.random.choices(["write", "step", "export", "start"], [5, 3, 1, 1])[0]
        seconds = {"write": 0.02, "step": 0.05, "export": 0.15, "start": 1.5}[kind]
        if kind != "start":  # traces of the last kill are cleared by then
            self.wait(process_id, output, lambda: starting_step(output) is not None)
        if kind == "write":
            # the first save of a start would leave no progress to any of them; so often a later one
            wanted = self.run_dir / f".tmp-checkpoint-{newest + 2 * self.random.choice((1, 2, 3))}"
            self.wait(process_id, output, wanted.exists)
        elif kind == "export":
            wanted = self.run_dir / f"checkpoint-{newest + 2 * self.random.choice((1, 2))}"
            self.wait(process_id, output, wanted.exists)
        elif kind == "step":
            step = newest + self.random.choice((1, 2, 3, 4))
            self.wait(process_id, output, lambda: max(records(self.run_dir, "loss"), default=0) >= step)
        time.sleep(self.random.uniform(0, seconds))
        os.kill(process_id, signal.SIGKILL)
        _, status = os.waitpid(process_id, 0)
        assert os.WIFSIGNALED(status), f"a start ended before its kill with status {status}: {last_line(output)}"
        if kind != "start":
            step = starting_step(output)
            assert step == newest, f"a start resumed from step {step}, but the newest checkpoint was of step {newest}"
        names = [path.name for path in self.run_dir.glob(".tmp-*")]
        fell = (place for prefix, place in PLACES.items() if any(name.startswith(prefix) for name in names))
        self.kills[next(fell, "elsewhere")] += 1
        for folder in list_checkpoints(self.run_dir).values():
            verify_checkpoint(folder)

    def wait(self, process_id: int, output: Path, is_ready: Callable[[], object]) -> None:
        """Until it is ready or the process has ended."""
        while not is_ready():
            if os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
            time.sleep(0.0005)


def starting_step(output: Path) -> int | None:
    """That which a start has told."""
    told = re.search(r"starts at +step (\d+)\n", output.read_text(errors="replace") if output.exists() else "")
    return None if told is None else int(told[1])


def last_line(output: Path) -> str:
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def soak(kills: int, seed: int, folder: Path) -> str:
    """Kills, resumes and compares; returns what to tell.

    Raises:
        AssertionError: if the killed run is not as the other one.
        Failed: if a checkpoint is damaged.
    """
    test, straight = Soak(folder, seed), folder / "straight"
    started_at_seconds = time.monotonic()
    for number in range(1, kills + 1):
        test.kill_once()
        if number % 10 == 0:
            print(f"{number} kills, newest checkpoint {max(list_checkpoints(test.run_dir), default=0)}", flush=True)
    step = max(list_checkpoints(test.run_dir), default=0) + LAST_STEPS
    for output_dir in (test.run_dir, straight):
        test.finish(output_dir, max_train_steps=step)
    assert_same_tensors(test.run_dir / f"checkpoint-{step}", straight / f"checkpoint-{step}")
    losses = records(test.run_dir, "loss")
    assert losses == records(straight, "loss"), "the logged losses differ"
    assert len(losses) == step, f"there are {len(losses)} losses of {step} steps"
    left = [path.name for path in test.run_dir.rglob("*") if ".tmp" in path.name]
    assert not left, f"temporary files are left: {', '.join(left)}"
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
        except (AssertionError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
