"""A training run that is small enough for tests: its settings, ways to start or break it, and its outputs."""

import itertools
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_unet
from training.checkpoint import SNAPSHOTS, list_checkpoints, start_or_resume
from training.config import TrainConfig
from training.log import read_log
from training.post_hoc_ema import STORED
from training.processes import Stop, build_accelerator

REPOSITORY = Path(__file__).resolve().parent.parent
HANG_SECONDS = 1800  # no machine is this slow: anything that takes longer hangs
TINY = {
    "dataset_name": "synthetic-faces",
    "max_images": 50,
    "crop": "none",
    "resolution": 8,
    "random_flip": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "dropout": 0.3,
    "train_batch_size": 7,
    "gradient_accumulation_steps": 2,
    "lr_warmup_steps": 2,
    "learning_rate": 1e-3,
    "max_train_steps": 9,
    "checkpointing_steps": 3,
    "validation_steps": 100,
    "save_images_steps": 100,
    "logging_steps": 1,
    "eval_batch_size": 4,
    "ddpm_num_inference_steps": 3,
    "report_to": "none",
    "num_cpu_threads": 1,
    "post_hoc_ema": True,
    "post_hoc_ema_steps": 2,
}


# ---- The main job in this process


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def on_cpu(monkeypatch):
    """Resets the state of Accelerate and makes it choose the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def train(tmp_path, cache_dir, on_cpu, capfd):
    """Runs `train_unet.main` with the tiny settings, changes of them and flags; returns stdout and stderr."""

    def train(output_dir: Path, *flags, code: int = 0, **changes) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | changes))
        own = ["--config", tmp_path / "tiny.yaml", "--output_dir", output_dir, "--cache_dir", cache_dir]
        assert train_unet.main([str(part) for part in (*own, *flags)]) == code
        return "".join(capfd.readouterr())

    return train


def new_trainer(**changes) -> train_unet.Trainer:
    """A trainer with the tiny settings but without dropout, and with changes, ready for its first step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = TrainConfig(**TINY | {"dropout": 0.0} | changes)
    trainer = train_unet.Trainer(config, build_accelerator(config), Stop())
    start_or_resume(trainer)
    trainer.open_batches()
    return trainer


@pytest.fixture
def make_trainer(tmp_path, cache_dir, on_cpu):
    trainers = []

    def make(**changes) -> train_unet.Trainer:
        own = {"output_dir": str(tmp_path / f"run{len(trainers)}"), "cache_dir": str(cache_dir)}
        trainers.append(new_trainer(**own | changes))
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.lock.release()


# ---- The main job in separate processes


class Run:
    """The main job in one or more processes, forked from one that has the libraries loaded."""

    def __init__(self, context, arguments: list[str], output: Path, fault, num_processes: int):
        os.mkfifo(output)  # a limit on the size of files does not apply to it
        self.output = os.fdopen(os.open(output, os.O_RDONLY | os.O_NONBLOCK))
        self.processes = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(num_processes):
            torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
            torchrun |= {"LOCAL_WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1"}
            environment = {key: str(value) for key, value in torchrun.items()} if num_processes > 1 else {}
            self.processes.append(context.Process(target=_main, args=(arguments, output, environment, fault)))
            self.processes[-1].start()
        self.process = self.processes[0]

    def finish(self, code: int) -> str:
        """Waits for the end with this exit code (minus a signal's number); returns stdout and stderr."""
        self.process.join(HANG_SECONDS)
        for other in self.processes[1:]:
            if code == -signal.SIGKILL:
                other.kill()
            other.join(HANG_SECONDS)
        text = self.output.read()
        assert {process.exitcode for process in self.processes} == {code}, text[-3000:]
        return text


def _main(arguments: list[str], output: Path, environment: dict[str, str], fault) -> None:
    descriptor = os.open(output, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"ACCELERATE_USE_CPU": "true"} | environment
    # as outside tests; children of a fork server would outlive a training run that is killed
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    if fault is not None:
        fault()
    sys.exit(train_unet.main(arguments))


@pytest.fixture(scope="session")
def start(tmp_path_factory, cache_dir):
    """Starts a `Run` with the tiny settings, flags, and a fault, a function that each of its processes calls first."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_unet"])
    runs = []

    def start(output_dir: Path, *flags, fault=None, num_processes: int = 1) -> Run:
        own = ["--config", folder / "tiny.yaml", "--output_dir", output_dir, "--cache_dir", cache_dir]
        arguments = [str(argument) for argument in (*own, *flags)]
        runs.append(Run(context, arguments, folder / f"{len(runs)}.txt", fault, num_processes))
        return runs[-1]

    yield start
    for process in itertools.chain(*(run.processes for run in runs)):
        process.kill()


@pytest.fixture(scope="session")
def straight(start, tmp_path_factory) -> Path:
    """The output folder of an uninterrupted run, with the checkpoints of steps 3, 6 and 9."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    start(folder, "--checkpoints_total_limit", "null").finish(0)
    return folder


def torchrun(*command: str | Path, **environment: str) -> str:
    """Runs a module with arguments in two processes; returns stdout."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    own = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([*launch, *map(str, command)], cwd=REPOSITORY, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- Faults


def act_at(action, event: str, path_part: str, count: int) -> None:
    """Acts at the count-th operation `event` (of `sys.addaudithook`) on a path that contains `path_part`."""
    seen = 0

    def look(name, arguments):
        nonlocal seen
        if name == event and arguments and path_part in str(arguments[0]):
            seen += 1
            if seen == count:
                action()

    sys.addaudithook(look)


def signal_at(number: int, event: str, path_part: str, count: int) -> None:
    act_at(lambda: os.kill(os.getpid(), number), event, path_part, count)


def full_disk_at(num_bytes: int, event: str, path_part: str) -> None:
    act_at(lambda: full_disk(num_bytes), event, path_part, 1)


def full_disk(num_bytes: int) -> None:
    """Limits the size of files, so that writes fail as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


# ---- What a run leaves behind


def wait_until(is_so: Callable[[], object]) -> None:
    deadline_seconds = time.monotonic() + HANG_SECONDS
    while not is_so():
        assert time.monotonic() < deadline_seconds, "it hangs"
        time.sleep(0.005)


def records(output_dir: Path, key: str) -> dict[int, float]:
    """Step -> value, for the log records that have it."""
    return {record["step"]: record[key] for record in read_log(output_dir / "log.jsonl") if key in record}


def error_line(output: str) -> str:
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert "Traceback" not in output
    return line


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def assert_same_file(one: Path, other: Path, name: str) -> None:
    ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"


def assert_same_tensors(one: Path, other: Path) -> None:
    """Compares two checkpoints and the snapshots of their runs."""
    for name in ("unet", "ema_unet", "optimizer", *STORED):
        assert_same_file(one, other, name)
    steps = [list(list_checkpoints(folder.parent / SNAPSHOTS)) for folder in (one, other)]
    assert steps[0] == steps[1]
    for step, name in itertools.product(steps[0], STORED):
        assert_same_file(*(folder.parent / SNAPSHOTS / f"checkpoint-{step}" for folder in (one, other)), name)
