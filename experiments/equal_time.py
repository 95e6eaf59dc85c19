"""How many updates different trainings make in the same time on this machine."""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from custom_unet import CustomUNet2DModel
from experiments.unet_variants import VARIANTS
from training.config import TrainConfig
from training.diffusion import diffusion_loss
from training.optimization import build_optimizer, update_ema
from training.precision import DTYPES, under_autocast

WARM_UP_UPDATES, TIMED_UPDATES = 2, 9


def measure_speeds(trainings: dict[str, tuple[TrainConfig, str | None]]) -> dict[str, float]:
    """Images/s in training by name: the median over updates that they make by turns, on the CPU with all threads.

    Args:
        trainings: the configuration of each, whose precision is not `auto`, and its network of
            `experiments.unet_variants`.
    """
    updates = {name: _update(config, network) for name, (config, network) in trainings.items()}
    seconds = {name: [] for name in updates}
    for number in range(WARM_UP_UPDATES + TIMED_UPDATES):
        for name, update in updates.items():
            started_at_seconds = time.perf_counter()
            update()
            if number >= WARM_UP_UPDATES:
                seconds[name].append(time.perf_counter() - started_at_seconds)
    return {name: _images(config) / statistics.median(seconds[name]) for name, (config, _) in trainings.items()}


def updates_in(minutes: float, images_per_second: float, config: TrainConfig) -> int:
    """At least one more than the warm-up of the learning rate has."""
    return max(round(minutes * 60 * images_per_second / _images(config)), config.lr_warmup_steps + 1)


def _images(config: TrainConfig) -> int:
    """Of one update."""
    return config.train_batch_size * config.gradient_accumulation_steps


def _update(config: TrainConfig, network: str | None) -> Callable[[], None]:
    """One update of a network and its EMA, on images of noise."""
    unet = (CustomUNet2DModel if network is None else VARIANTS[network])(**config.unet_kwargs()).train()
    unet.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    ema_unet = copy.deepcopy(unet).requires_grad_(False)
    optimizer, scheduler = build_optimizer(config, unet), config.noise_scheduler()
    images = torch.rand(config.train_batch_size, 3, config.resolution, config.resolution).mul_(2).sub_(1)
    called = partial(under_autocast, unet, DTYPES[config.mixed_precision])

    def update() -> None:
        for _ in range(config.gradient_accumulation_steps):
            diffusion_loss(called, scheduler, images, **config.loss_settings()).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema_unet, unet, config.ema_max_decay)

    return update
