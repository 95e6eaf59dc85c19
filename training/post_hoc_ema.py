"""Post-hoc EMA: moving averages of the weights whose length is chosen after training.

Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3 and appendix C. The average after t updates weights
theta_s, the parameters after update s, by a power of s:

    p(s) = (gamma + 1) s^gamma / t^(gamma + 1)  on [0, t]             its profile
    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))           its length: standard deviation of p over t
    average_t = beta_t average_(t-1) + (1 - beta_t) theta_t,  beta_t = (1 - 1 / t)^(gamma + 1)

Unrolled, theta_s has the weight (s^(gamma + 1) - (s - 1)^(gamma + 1)) / t^(gamma + 1), the integral of p over
[s - 1, s]. Training keeps two such averages and saves snapshots of them. An average of any other length is
approximated by a linear combination of the snapshots.
"""

from functools import cache

import numpy as np
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

STORED = {"ema_sigma_rel_0.05": 0.05, "ema_sigma_rel_0.10": 0.10}  # file stem in a checkpoint -> sigma_rel
LARGEST_SIGMA_REL = 0.28  # beyond 1 / sqrt(12) = 0.289, where gamma is 0, the oldest weights would count most


@cache
def power_of(sigma_rel: float) -> float:
    """The exponent gamma >= 0 of the profile with length `sigma_rel` in (0, LARGEST_SIGMA_REL]."""
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def start_averages(network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Initial averages: file stem -> trainable parameters by name. The first update replaces them."""
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    return {stem: {name: parameter.detach().clone() for name, parameter in trainable.items()} for stem in STORED}


def update_averages(averages: dict[str, dict[str, Tensor]], network: nn.Module, step: int) -> None:
    """Adds the weights after update `step` (the first is 1) to each of the averages, in place."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for stem, average in averages.items():
        decay = (1 - 1 / step) ** (power_of(STORED[stem]) + 1)
        get_ema_multi_avg_fn(decay)(list(average.values()), parameters, None)


def inner_products(steps_a, powers_a, steps_b, powers_b) -> np.ndarray:
    """Integrals of the products of profiles (appendix C.2): (A,), (A,), (B,), (B,) -> float64 (A, B)."""
    t_a, gamma_a = (np.float64(values)[:, None] for values in (steps_a, powers_a))
    t_b, gamma_b = (np.float64(values)[None, :] for values in (steps_b, powers_b))
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / np.maximum(t_a, t_b)


def combine_profiles(steps: list[int], step: int, sigma_rel: float) -> tuple[np.ndarray, float]:
    """Least-squares coefficients that combine stored averages into the one of length `sigma_rel` at `step`.

    Args:
        steps: distinct steps of the snapshots, at most `step` and including it.

    Returns:
        the coefficients, float64 (len(steps), len(STORED)), and the relative error of the combined profile,
        ||combination - target|| / ||target||.
    """
    known = (np.repeat(steps, len(STORED)), np.tile([power_of(value) for value in STORED.values()], len(steps)))
    target = ([step], [power_of(sigma_rel)])
    gram, products = inner_products(*known, *known), inner_products(*known, *target)[:, 0]
    factors = np.linalg.solve(gram, products)
    factors /= factors.sum()  # normalized to a weighted mean, as in EDM2's code
    squared_norm = inner_products(*target, *target).item()
    squared_error = factors @ gram @ factors - 2 * factors @ products + squared_norm
    return factors.reshape(len(steps), len(STORED)), float(np.sqrt(max(squared_error, 0) / squared_norm))
