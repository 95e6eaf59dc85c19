"""The optimizer of a run, its learning rate and the moving average of the weights."""

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.config import TrainConfig


def build_optimizer(config: TrainConfig, network: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over the trainable parameters."""
    return torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )


def learning_rate_schedule(config: TrainConfig, total_steps: int | None) -> Callable[[int], float]:
    """The learning rate of the update after `step` updates.

    A function of the step, not a scheduler object: those count calls, and Accelerate makes several per update
    with several processes or accumulation.
    """
    placeholder = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=config.learning_rate)
    (factor,) = get_scheduler(
        config.lr_scheduler,
        placeholder,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total_steps,
    ).lr_lambdas
    return lambda step: config.learning_rate * factor(step)


def ema_decay(step: int, inv_gamma: float, power: float, max_decay: float) -> float:
    """Decay of the moving average at update `step`: min(1 - (1 + step / inv_gamma)^-power, max_decay)."""
    return min(1 - (1 + step / inv_gamma) ** -power, max_decay)


def update_ema(ema_network: nn.Module, network: nn.Module, decay: float) -> None:
    """theta_ema <- decay theta_ema + (1 - decay) theta, in place."""
    get_ema_multi_avg_fn(decay)(list(ema_network.parameters()), list(network.parameters()), None)
