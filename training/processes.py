"""The processes of a run: how Accelerate is set up, how its processes agree, and how they are stopped."""

import ctypes
import importlib.util
import itertools
import os
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
)

from common import InputError, on_main_process, report_error
from training.config import TrainConfig
from training.workers import available_cores

# Others keep a part of the network in each process; a checkpoint is written from one that has it whole.
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StoppedEarly(BaseException):
    """A signal came before the training began, so there is nothing to save. Not an Exception: nothing swallows it."""


class StopSignal:
    """SIGINT and SIGTERM: at first they end the process where it stands, during training they request a graceful stop.

    Attributes:
        number: of the first signal that came; None if none did.
        is_noted_only: set by the training when it begins: from then on it looks at `number` and ends in good order.
            Also set when the process ends with an error: another process that ended with the same error earlier makes
            torchrun stop this one before it has reported it.
    """

    def __init__(self):
        self.number: int | None = None
        self.is_noted_only = False

    def listen(self) -> None:
        """Takes over both signals; under `accelerate launch` also the end of the launcher counts as a SIGTERM."""
        self._before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        end_with_launcher()

    def leave(self) -> None:
        """Gives both signals back to who had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        """Signal handler.

        Raises:
            StoppedEarly: before the training.
        """
        self.number = self.number or number
        if not self.is_noted_only:
            raise StoppedEarly(f"stopped by {signal.Signals(number).name} before the training began")

    def fail(self, error: object, code: int) -> int:
        """Reports what ends the process, during which no signal interrupts it; returns the exit code."""
        self.is_noted_only = True
        report_error(error)
        return code

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number as in a shell."""
        return 0 if self.number is None else 128 + self.number


def end_with_launcher() -> None:
    """On Linux, has SIGTERM sent to this process when the `accelerate launch` that started it dies.

    That launcher passes no signal on, and would leave its process running unseen. Any other parent may end: a run
    started with nohup outlives its shell.
    """
    parent = psutil.Process().parent()
    try:
        if not sys.platform.startswith("linux") or parent is None or not is_accelerate_launch(parent.cmdline()):
            return
    except psutil.Error:  # the parent is gone or hidden
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent.pid:  # it died just before
        os.kill(os.getpid(), signal.SIGTERM)


def is_accelerate_launch(command_line: list[str]) -> bool:
    """Whether this is `accelerate launch`, `accelerate-launch` or `python -m accelerate.commands.launch`."""
    words = [os.path.basename(word) for word in command_line[:4]]
    pairs = [*itertools.pairwise(words)]
    return (
        "accelerate-launch" in words
        or ("accelerate", "launch") in pairs
        or ("-m", "accelerate.commands.launch") in pairs
    )


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate for this run.

    Raises:
        InputError: if the machine lacks what the configuration asks for, or Accelerate was told something else.
    """
    check_launcher(config)
    if config.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise InputError("--report_to wandb, but wandb is not installed: pip install wandb")
    output_dir = Path(config.output_dir)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / config.logging_dir)),
            # accumulated by hand; an environment variable of Accelerate would divide every gradient once more
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend="inductor", fullgraph=True) if config.compile else None,
            # the other processes wait while the main one samples
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
    except ValueError as error:
        raise InputError(f"Accelerate cannot set up this run: {error}") from error
    if accelerator.distributed_type not in SUPPORTED:
        supported = ", ".join(kind.value for kind in SUPPORTED)
        raise InputError(f"the distributed type {accelerator.distributed_type.value} is not one of {supported}")
    if accelerator.device.type == "cpu":
        if config.mixed_precision == "fp16":  # Accelerate would go on in float32
            raise InputError("--mixed_precision fp16 needs a GPU, and this run is on the CPU; take bf16 or no")
        take_cpu_threads(config)
    return accelerator


def check_launcher(config: TrainConfig) -> None:
    """Raises InputError if `accelerate launch` or its file asks for something else than the run's configuration.

    They hand it on in the environment. Their defaults, which a file always has, ask for nothing.
    """
    ours = {
        "MIXED_PRECISION": ("no", config.mixed_precision, "--mixed_precision"),
        "GRADIENT_ACCUMULATION_STEPS": ("1", config.gradient_accumulation_steps, "--gradient_accumulation_steps"),
        "DYNAMO_BACKEND": ("no", "inductor" if config.compile else "no", "--compile"),
    }
    for name, (default, value, flag) in ours.items():
        asked = os.environ.get(f"ACCELERATE_{name}", default).lower()
        if asked not in (default, str(value)):
            raise InputError(
                f"accelerate launch asks for {name.lower()} {asked}, the run's configuration for {value}; set it by"
                f" {flag} of train_unet.py alone"
            )


def take_cpu_threads(config: TrainConfig) -> None:
    """`accelerate launch` without --cpu leaves a process one thread, however many cores there are."""
    share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(config.num_cpu_threads or max(share, 1))


def check_shared(accelerator: Accelerator, folder: Path, flag: str) -> None:
    """Raises InputError on every process if a run on several machines does not see the same folder on all of them."""
    if accelerator.num_processes == int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)):
        return

    def leave_a_file() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".tmp-shared-", dir=folder)
        os.close(descriptor)
        return Path(name)

    path = on_main_process(accelerator, leave_a_file)
    is_missing = on_any_process(accelerator, not (folder / path.name).exists())
    on_main_process(accelerator, path.unlink)
    if is_missing:
        raise InputError(f"{flag} {folder} is not one folder that all machines share; mount one on all of them")


def on_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is up on at least one process."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item() > 0
