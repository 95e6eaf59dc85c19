"""Kills a small training run again and again and resumes it; the result must be that of an uninterrupted run.

    python -m tests.soak --kills 100

Each start is a separate process (forked from one with the libraries loaded) that ends with a SIGKILL: about half of
them while a checkpoint is being written, the others at any moment, including startup and export. After each kill every
folder named checkpoint-STEP must be complete, and the next start must resume from the newest one. At the end, weights,
EMA, moments and logged losses must equal those of a run that was never killed, with no temporary file left; otherwise
the command ends with the first difference.
"""

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import yaml

import train_unet
from tests.tiny_training import TINY, assert_same_tensors, records
from training.checkpoint import list_checkpoints, verify_checkpoint

# The learning rate must not depend on the number of steps, which is chosen only after the last kill
SETTINGS = TINY | {"lr_scheduler": "constant_with_warmup", "checkpointing_steps": 2, "max_train_steps": 10**6}
LAST_STEPS = 5  # after the last kill


def start(run: Path, **changes) -> tuple[int, Path]:
    """Starts the training in a separate process; returns its process id and the file of its output."""
    config, output = run.with_suffix(".yaml"), run.with_suffix(".txt")
    config.write_text(yaml.safe_dump(SETTINGS | changes))
    output.write_text("")
    process_id = os.fork()
    if process_id == 0:
        descriptor = os.open(output, os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = 99
        try:
            own = {"--config": config, "--output_dir": run, "--cache_dir": run.with_name("cache")}
            code = train_unet.main([str(part) for pair in own.items() for part in pair])
            sys.stdout.flush()
        finally:
            os._exit(code)
    return process_id, output


def starting_step(output: Path) -> int | None:
    """The step that a start reports; None before it does."""
    told = re.search(r"starts at +step (\d+)\n", output.read_text(errors="replace"))
    return None if told is None else int(told[1])


def kill_once(run: Path, rng: random.Random) -> None:
    """Starts the training and kills it."""
    newest = max(list_checkpoints(run), default=0)
    process_id, output = start(run)

    def wait(is_ready) -> None:
        while not is_ready() and os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.0005)

    if rng.random() < 0.1:
        time.sleep(rng.uniform(0, 1.5))
    else:
        wait(lambda: starting_step(output) is not None)  # it has removed what the last kill left
        # killing every start in its first save would allow no progress, so the save is often a later one
        name = f"checkpoint-{newest + 2 * rng.choice((1, 2, 3))}"
        is_written, seconds = rng.choice([(run / f".tmp-{name}", 0.02), (run / name, 0.15)])
        wait(is_written.exists)
        time.sleep(rng.uniform(0, seconds))
    os.kill(process_id, signal.SIGKILL)
    _, status = os.waitpid(process_id, 0)
    assert os.WIFSIGNALED(status), f"a start ended before its kill with status {status}: {output.read_text()[-500:]}"
    step = starting_step(output)
    assert step in (newest, None), f"a start resumed from step {step}, but the newest checkpoint was of step {newest}"
    for folder in list_checkpoints(run).values():
        verify_checkpoint(folder)


def soak(kills: int, folder: Path) -> str:
    """Kills, resumes and compares; returns a summary. Raises AssertionError or Failed."""
    killed, straight, rng = folder / "killed", folder / "straight", random.Random(0)
    for number in range(1, kills + 1):
        kill_once(killed, rng)
        if number % 10 == 0:
            print(f"{number} kills, newest checkpoint {max(list_checkpoints(killed), default=0)}", flush=True)
    step = max(list_checkpoints(killed), default=0) + LAST_STEPS
    for run in (killed, straight):
        process_id, output = start(run, max_train_steps=step)
        _, status = os.waitpid(process_id, 0)
        assert status == 0, f"a start ended with status {status}: {output.read_text()[-500:]}"
    assert_same_tensors(killed / f"checkpoint-{step}", straight / f"checkpoint-{step}")
    losses = records(killed, "loss")
    assert losses == records(straight, "loss"), "the logged losses differ"
    assert len(losses) == step, f"there are {len(losses)} losses of {step} steps"
    assert not list(killed.rglob(".tmp*")), "temporary files are left"
    return (
        f"{kills} kills over {step} steps: weights, EMA, moments and losses are bit for bit those of the run that was"
        " never killed; every start took the newest complete checkpoint; no temporary file is left"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        print(soak(kills, Path(folder)))


if __name__ == "__main__":
    main()
