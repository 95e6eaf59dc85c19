"""The processes of a run: setting up Accelerate, agreeing across processes, and stopping on signals."""

import ctypes
import importlib.util
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    TorchDynamoPlugin,
    parse_flag_from_env,
)

from common import InputError
from training.config import TrainConfig
from training.workers import available_cores

# Other types shard the network over the processes; here, one process with the whole network writes checkpoints.
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stop:
    """Context in which SIGINT and SIGTERM end the process at once, but during training request a graceful stop.

    Attributes:
        number: the first signal received; None if there was none.
        is_noted_only: set when training begins; from then on, signals are only noted and training polls `is_due`.
        deadline_seconds: `time.monotonic()` at which training stops gracefully.
    """

    def __init__(self):
        self.number: int | None = None
        self.is_noted_only = False
        self.started_at_seconds, self.deadline_seconds = time.monotonic(), math.inf

    def __enter__(self):
        self._before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        # `accelerate launch` forwards no signals, so we request one at its death. Other parents (a shell) may end.
        if sys.platform.startswith("linux") and "ACCELERATE_MIXED_PRECISION" in os.environ:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        """Signal handler. Raises KeyboardInterrupt before training begins."""
        self.number = self.number or number
        if not self.is_noted_only:
            raise KeyboardInterrupt

    def is_due(self) -> bool:
        """Whether this process received a signal or passed the deadline."""
        return self.number is not None or time.monotonic() >= self.deadline_seconds


def set_up_process(num_cpu_threads: int | None) -> PartialState:
    """Connects the processes of a command and, on CPUs, sets the number of threads: by default its share of the cores.

    Without --cpu, `accelerate launch` gives each process only one thread.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu, timeout=timedelta(hours=2))  # the others wait while the main process samples
    if state.device.type == "cpu":
        share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(num_cpu_threads or max(share, 1))
    return state


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Raises InputError if the machine lacks what the configuration asks for, or the launcher contradicts it."""
    check_launcher(config)
    if config.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise InputError("--report_to wandb, but wandb is not installed: pip install wandb")
    output_dir = Path(config.output_dir)
    try:
        set_up_process(config.num_cpu_threads)
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / config.logging_dir)),
            # we accumulate gradients ourselves; Accelerate's environment variable would divide them again
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend="inductor", fullgraph=True) if config.compile else None,
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"Accelerate cannot set up this run: {error}") from error
    if accelerator.distributed_type not in SUPPORTED:
        raise InputError(f"{accelerator.distributed_type.value} is not supported; launch with --multi_gpu or --cpu")
    if accelerator.device.type == "cpu" and config.mixed_precision == "fp16":  # Accelerate would use float32
        raise InputError("--mixed_precision fp16 needs a GPU, but this run is on the CPU; use bf16 or no")
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
                f"accelerate launch asks for {name.lower()} {asked}, the run's configuration for {value}; set only"
                f" {flag} of train_unet.py"
            )


def on_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on at least one process."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item() > 0
