"""`--mixed_precision auto`: times float32 and half precision on this machine and uses the faster one."""

import logging
import math
import statistics
import time
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from common import is_out_of_memory, on_main_process
from training.checkpoint import saved_state
from training.config import TrainConfig
from training.diffusion import diffusion_loss
from training.processes import set_up_process

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP_UPDATES, TIMED_UPDATES = 2, 5


def settle_precision(config: TrainConfig, network_class: type[nn.Module]) -> TrainConfig:
    """The configuration with `auto` replaced by a precision, which the main process chooses for all processes.

    A resumed run keeps the precision of its checkpoint; a new run uses the faster one. Call this before building the
    `Accelerator`, whose precision cannot be changed. Raises Failed if there are checkpoints but none is intact.
    """
    if config.mixed_precision != "auto":
        return config
    state = set_up_process(config.num_cpu_threads)

    def choose() -> str:
        saved = saved_state(config)
        if saved is not None:
            logger.info("--mixed_precision auto: %s, as in the checkpoint", saved["mixed_precision"])
            return saved["mixed_precision"]
        seconds = update_seconds(config, network_class, state.device)
        fastest = min(seconds, key=seconds.get)
        told = " against ".join(
            f"{config.train_batch_size / value:.1f} images/s with {name}" for name, value in seconds.items()
        )
        logger.info("--mixed_precision auto: %s; using %s", told, fastest)
        return fastest

    return replace(config, mixed_precision=on_main_process(state, choose))


def half_precision(device: torch.device) -> str:
    """bf16, or fp16 on GPUs that only emulate bf16."""
    emulates = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp16" if emulates else "bf16"


def update_seconds(config: TrainConfig, network_class: type[nn.Module], device: torch.device) -> dict[str, float]:
    """Median seconds per forward and backward pass on a batch of noise, for each precision; the precisions alternate.

    Builds its own network, without classes, and restores the random generators.
    """
    seconds = {"no": [], half_precision(device): []}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        network = network_class(**config.unet_kwargs()).train()
        network.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if config.compile:
            network.compile(fullgraph=True)
        shape = (config.train_batch_size, *config.image_shape)
        images, scheduler = torch.rand(shape, device=device).mul_(2).sub_(1), config.noise_scheduler()
        for number in range(WARM_UP_UPDATES + TIMED_UPDATES):
            for name, times in seconds.items():
                started_at_seconds = time.perf_counter()
                unet = partial(under_autocast, network, DTYPES[name])
                try:
                    diffusion_loss(unet, scheduler, images, **config.loss_settings()).backward()
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or name != "no":
                        raise
                    times.append(math.inf)  # half precision may fit
                    continue
                network.zero_grad()
                if device.type != "cpu":
                    torch.accelerator.synchronize()
                if number >= WARM_UP_UPDATES:
                    times.append(time.perf_counter() - started_at_seconds)
    return {name: statistics.median(times) for name, times in seconds.items()}


def under_autocast(network: nn.Module, dtype: torch.dtype, images: torch.Tensor, *arguments):
    """Autocasts the network but not the loss, as Accelerate does."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return network(images, *arguments)
