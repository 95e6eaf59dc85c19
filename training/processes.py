"""The processes of a run: how Accelerate is set up, and how its processes agree."""

import importlib.util
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
    broadcast_object_list,
)

from training.config import ConfigError, TrainConfig

# Others keep a part of the network in each process; a checkpoint is written from one that has it whole.
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate for this run.

    Raises:
        ConfigError: if the machine lacks what the configuration asks for, or Accelerate was told to shard the network.
    """
    if config.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise ConfigError("--report_to wandb, but wandb is not installed: pip install wandb")
    output_dir = Path(config.output_dir)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / config.logging_dir)),
            dynamo_plugin=TorchDynamoPlugin(backend="inductor", fullgraph=True) if config.compile else None,
            # the other processes wait while the main one samples
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
    except ValueError as error:
        raise ConfigError(f"Accelerate cannot set up this run: {error}") from error
    if accelerator.distributed_type not in SUPPORTED:
        supported = ", ".join(kind.value for kind in SUPPORTED)
        raise ConfigError(f"the distributed type {accelerator.distributed_type.value} is not one of {supported}")
    if accelerator.device.type == "cpu":
        # `accelerate launch` without --cpu leaves a process one thread, however many cores there are
        share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(config.num_cpu_threads or max(share, 1))
    return accelerator


def available_cores() -> int:
    """CPU cores that this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )  # macOS has no affinity


def on_main_process(accelerator: Accelerator, action: Callable):
    """Runs an action on the main process alone; its (picklable) result, or its error, reaches every process."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:  # raised again below, on every process
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def on_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is up on at least one process."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item() > 0
