"""The processes of a run: setting up Accelerate, agreeing across processes, and stopping on signals."""

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

# Other types shard the network over the processes; checkpoints are written by one process that has all of it.
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StoppedEarly(BaseException):
    """A signal came before training began: there is nothing to save. A BaseException, so that nothing swallows it."""


class StopSignal:
    """SIGINT and SIGTERM: they end the process at once at first; during training they request a graceful stop.

    Attributes:
        number: the first signal received; None if there was none.
        is_noted_only: set when training begins: from then on training polls `number` and stops gracefully. Also set
            when the process ends with an error: if another process failed with the same error first, torchrun would
            stop this one before it could report it.
    """

    def __init__(self):
        self.number: int | None = None
        self.is_noted_only = False

    def listen(self) -> None:
        """Handles both signals; under `accelerate launch`, the death of the launcher also sends a SIGTERM."""
        self._before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        end_with_launcher()

    def leave(self) -> None:
        """Restores the previous handlers of both signals."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        """Signal handler.

        Raises:
            StoppedEarly: before training begins.
        """
        self.number = self.number or number
        if not self.is_noted_only:
            raise StoppedEarly(f"stopped by {signal.Signals(number).name} before the training began")

    def fail(self, error: object, code: int) -> int:
        """Reports the error that ends the process, uninterrupted by signals; returns the exit code."""
        self.is_noted_only = True
        report_error(error)
        return code

    @property
    def exit_code(self) -> int:
        """0, or 128 + signal number, as in a shell."""
        return 0 if self.number is None else 128 + self.number


def end_with_launcher() -> None:
    """On Linux, arranges for a SIGTERM to this process when the `accelerate launch` that started it dies.

    The launcher does not forward signals and would leave its process running unnoticed. Any other parent may end: a
    run started with nohup outlives its shell.
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
    """Whether the command is `accelerate launch`, `accelerate-launch` or `python -m accelerate.commands.launch`."""
    words = [os.path.basename(word) for word in command_line[:4]]
    pairs = [*itertools.pairwise(words)]
    return (
        "accelerate-launch" in words
        or ("accelerate", "launch") in pairs
        or ("-m", "accelerate.commands.launch") in pairs
    )


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Builds the `Accelerator` of this run.

    Raises:
        InputError: if the machine lacks what the configuration asks for, or the launcher's settings contradict it.
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
            # gradients are accumulated by hand; Accelerate's environment variable would divide them once more
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend="inductor", fullgraph=True) if config.compile else None,
            # the other processes wait while the main one samples
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"Accelerate cannot set up this run: {error}") from error
    if accelerator.distributed_type not in SUPPORTED:
        supported = ", ".join(kind.value for kind in SUPPORTED)
        raise InputError(f"the distributed type {accelerator.distributed_type.value} is not one of {supported}")
    if accelerator.device.type == "cpu":
        if config.mixed_precision == "fp16":  # Accelerate would silently use float32
            raise InputError("--mixed_precision fp16 needs a GPU, and this run is on the CPU; take bf16 or no")
        take_cpu_threads(config)
    return accelerator


def check_launcher(config: TrainConfig) -> None:
    """Raises InputError if `accelerate launch` or its configuration file contradicts the run's configuration.

    Both pass their settings through the environment. Default values are ignored, because the file always has them.
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
    """Sets the number of threads: without --cpu, `accelerate launch` gives each process only one."""
    share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(config.num_cpu_threads or max(share, 1))


def check_shared(accelerator: Accelerator, folder: Path, flag: str) -> None:
    """Raises InputError on every process unless all machines of the run see the same folder."""
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
    """Whether the flag is set on at least one process."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item() > 0
