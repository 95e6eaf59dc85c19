"""The optimizer of a run, its learning rate and the moving average of the weights."""

from collections import defaultdict
from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.config import TrainConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of a X + b (X X^T) X + c (X X^T)^2 X
NEWTON_SCHULZ_STEPS = 5
MOMENTUM = 0.95  # of Muon
# Name prefixes of the parameters that do not belong to a hidden layer
OUTER = ("conv_in", "conv_out", "time_proj", "time_embedding", "class_embedding")


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the weight matrices of hidden layers, AdamW for all other parameters.

    Muon orthogonalizes the Nesterov momentum of a matrix, so that all singular values are near 1, and steps along the
    result. A convolution kernel is reshaped to the matrix (out, in * height * width). The step has the usual size of
    an AdamW step (Liu et al. 2025, arXiv 2502.16982, section 2.2), so both share learning rate and weight decay.

    Args:
        matrices: parameters for Muon, with two or more dimensions.
        dtype: the precision in which matrices are orthogonalized.
        adamw: arguments of AdamW.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], dtype: torch.dtype, **adamw):
        super().__init__([{"params": others}, {"params": matrices}], **adamw)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        adamw_group, group = self.param_groups
        self.param_groups = [adamw_group]
        super().step(closure)
        self.param_groups = [adamw_group, group]
        by_shape = defaultdict(list)  # matrices of the same shape are orthogonalized as a batch
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.flatten(1).shape].append(parameter)
        for shape, parameters in by_shape.items():
            directions = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
                directions.append(parameter.grad.lerp(average, MOMENTUM).flatten(1))
            size = group["lr"] * 0.2 * max(shape) ** 0.5
            updates = orthogonalize(torch.stack(directions).to(self.dtype))
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update.view_as(parameter), alpha=size)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Brings all singular values near 1 (0.7 to 1.2) by a Newton-Schulz iteration.

    In bf16 we use the standard iteration X <- P X with P = a + b X X^T + c (X X^T)^2, in which each step corrects the
    rounding errors of the previous one. In other precisions we iterate only on the small Gram matrix X X^T, as
    P X X^T P, and multiply X once by the product of all P, which takes half the time.

    Args:
        matrices: shape (N, rows, columns), at any scale.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if x.dtype == torch.bfloat16:
        for _ in range(NEWTON_SCHULZ_STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    else:
        gram = x @ x.mT
        product = identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        for _ in range(NEWTON_SCHULZ_STEPS):
            factor = a * identity + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            product, gram = factor @ product, factor @ gram @ factor
        x = product @ x
    return x.mT if is_tall else x


def build_optimizer(config: TrainConfig, network: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) or Muon, for the trainable parameters."""
    adamw = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
        "fused": True,
    }
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trainable.values(), **adamw)
    hidden = {name for name, parameter in trainable.items() if parameter.ndim > 1 and not name.startswith(OUTER)}
    matrices = [parameter for name, parameter in trainable.items() if name in hidden]
    others = [parameter for name, parameter in trainable.items() if name not in hidden]
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    return Muon(matrices, others, dtype, **adamw)


def learning_rate_schedule(config: TrainConfig, total_steps: int | None) -> Callable[[int], float]:
    """The learning rate as a function of the number of updates done.

    We use no scheduler object, because it counts its calls: with several processes or gradient accumulation,
    Accelerate calls it several times per update.
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
    """EMA decay at update `step`: min(1 - (1 + step / inv_gamma)^-power, max_decay)."""
    return min(1 - (1 + step / inv_gamma) ** -power, max_decay)


def update_ema(ema_network: nn.Module, network: nn.Module, decay: float) -> None:
    """theta_ema <- decay theta_ema + (1 - decay) theta, in place."""
    get_ema_multi_avg_fn(decay)(list(ema_network.parameters()), list(network.parameters()), None)
