"""Samplers of score-based models in continuous time (Song et al. 2021, arXiv 2011.13456; equations are theirs).

`sde` tells `drift`, `diffusion`, `signal_scale` alpha, `noise_scale` n and `time_of` a noise level, as the classes of
training/sde.py do. `clean(x, t)` is the x_0 that the network predicts of x (B, ...) at a time t, one for the batch.
`noise()` draws standard normal noise of the shape of x. All end with the expectation of x_0 at the first time: without
it the noise that is left there would stay (appendix G).
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]


def predicted_score(sde, clean: Predict, x: Tensor, t: Tensor) -> Tensor:
    """(alpha x_0 - x) / n^2 of the predicted x_0."""
    return (sde.signal_scale(t) * clean(x, t) - x) / sde.noise_scale(t) ** 2


def uniform_times(sde, num_steps: int) -> Tensor:
    """From the last time to the first, (num_steps + 1,), float64."""
    return torch.linspace(sde.last_time, sde.first_time, num_steps + 1, dtype=torch.float64)


def euler_maruyama(sde, clean: Predict, x: Tensor, times: Tensor, noise: Callable[[], Tensor]) -> Tensor:
    """The reverse SDE (eq. 6) by Euler-Maruyama; the last step is taken without its noise.

    Args:
        x: a draw from the prior.
        times: falling, from the last time to the first.
    """
    for i, (now, later) in enumerate(itertools.pairwise(times)):
        dt = now - later
        g = sde.diffusion(now)
        x = x - (sde.drift(now) * x - g**2 * predicted_score(sde, clean, x, now)) * dt
        if i < len(times) - 2:
            x = x + g * dt.sqrt() * noise()
    return clean(x, times[-1])


def transition(sde, early: Tensor, late: Tensor) -> tuple[Tensor, Tensor]:
    """a and v of x_late = a x_early + sqrt(v) z, the forward process over a step."""
    a = sde.signal_scale(late) / sde.signal_scale(early)
    return a, sde.noise_scale(late) ** 2 - (a * sde.noise_scale(early)) ** 2


def reverse_diffusion_step(sde, clean: Predict, x: Tensor, now, later, noise: Tensor | None) -> Tensor:
    """The reverse of the forward process's own step (eq. 46)."""
    a, v = transition(sde, later, now)
    x = (2 - a) * x + v * predicted_score(sde, clean, x, now)
    return x if noise is None else x + v.sqrt() * noise


def langevin_step(sde, clean: Predict, x: Tensor, now, noise: Tensor, snr: float, step_scale: float) -> Tensor:
    """One step of annealed Langevin dynamics at a noise level (algorithms 4 and 5).

    Args:
        snr: r, which sets the step by the norms of noise and score.
        step_scale: alpha of the algorithm: 1 for VE, alpha_i = 1 - beta_i for VP.
    """
    score = predicted_score(sde, clean, x, now)
    # the batch's mean norms, as in the authors' code
    ratio = snr * noise.flatten(1).norm(dim=1).mean() / score.flatten(1).norm(dim=1).mean()
    step = 2 * step_scale * ratio**2
    return x + step * score + (2 * step).sqrt() * noise


def predictor_corrector(
    sde, clean: Predict, x: Tensor, times: Tensor, noise: Callable[[], Tensor], snr: float, corrector_steps: int = 1
) -> Tensor:
    """Reverse diffusion, after each step Langevin steps at the new noise level (algorithms 2 and 3)."""
    last = len(times) - 2
    for i, (now, later) in enumerate(itertools.pairwise(times)):
        x = reverse_diffusion_step(sde, clean, x, now, later, noise() if i < last else None)
        if i < last:
            for _ in range(corrector_steps):
                step_scale = transition(sde, later, now)[0] ** 2
                x = langevin_step(sde, clean, x, later, noise(), snr, step_scale)
    return clean(x, times[-1])


def flow(sde, clean: Predict, x: Tensor, t: Tensor) -> Tensor:
    """dx/dt of the probability-flow ODE (eq. 13)."""
    return sde.drift(t) * x - sde.diffusion(t) ** 2 * predicted_score(sde, clean, x, t) / 2


# Dormand & Prince (1980): nodes, stages, 5th-order weights and their difference from the 4th-order ones
_NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_FIFTH = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def time(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def solve_flow(
    rate: Predict, x: Tensor, start: float, end: float, rtol: float, atol: float, max_evaluations: int = 100_000
) -> tuple[Tensor, int]:
    """Dormand-Prince 5(4) with adaptive steps for the whole batch, in float64.

    Args:
        rate: dx/dt of (x, t).
        rtol, atol: of the root mean square over the batch of each step's error, relative to atol + rtol |x|.

    Returns:
        x at the end, and the number of evaluations.

    Raises:
        ValueError: if the step becomes too small, the values are not finite, or it takes too many evaluations.
    """
    x, t, sign = x.double(), start, math.copysign(1.0, end - start)
    first = rate(x, time(t))
    evaluations = 1
    scale = atol + rtol * x.abs()
    step = min(0.01 * rms(x / scale) / max(rms(first / scale), 1e-12), abs(end - start))
    while (end - t) * sign > 0:
        step = min(step, abs(end - t))
        slopes = [first]
        for node, stage in zip(_NODES[1:], _STAGES[1:], strict=True):
            inner = x + sign * step * sum(w * s for w, s in zip(stage, slopes, strict=True))
            slopes.append(rate(inner, time(t + sign * step * node)))
        new = x + sign * step * sum(w * s for w, s in zip(_FIFTH, slopes, strict=True))
        at_end = end if step >= abs(end - t) else t + sign * step
        slopes.append(rate(new, time(at_end)))
        evaluations += 6
        scale = atol + rtol * torch.maximum(x.abs(), new.abs())
        error = rms(step * sum(w * s for w, s in zip(_ERROR, slopes, strict=True)) / scale)
        if error <= 1:
            x, t, first = new, at_end, slopes[-1]
        if not math.isfinite(error) or step < 1e-12 * abs(end - start) or evaluations > max_evaluations:
            raise ValueError(f"the ODE could not be solved: at time {t:.4g} with steps of {step:.2g}")
        step *= min(10.0, max(0.2, 0.9 * error**-0.2)) if error else 10.0
    return x, evaluations


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels of Karras et al. 2022, eq. 5, and 0 at the end, (num_steps + 1,), float64."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def edm_heun(
    sde,
    clean: Predict,
    y: Tensor,
    sigmas: Tensor,
    noise: Callable[[], Tensor],
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    noise_factor: float = 1.0,
) -> Tensor:
    """Heun's method with churn (Karras et al. 2022, algorithm 2) on y = x / alpha, whose noise level is sigma.

    Args:
        y: noise of the first level.
        sigmas: falling, 0 at the end.
        churn, churn_min, churn_max, noise_factor: S_churn, S_tmin, S_tmax, S_noise.
    """

    def denoise(y: Tensor, sigma: Tensor) -> Tensor:
        t = sde.time_of(sigma)
        return clean(sde.signal_scale(t) * y, t)

    num_steps = len(sigmas) - 1
    for sigma, later in itertools.pairwise(sigmas):
        if churn > 0 and churn_min <= sigma <= churn_max:
            raised = sigma * (1 + min(churn / num_steps, math.sqrt(2) - 1))
            raised = raised.clamp(max=float(sigmas[0]))  # the network knows no more noise than at the start
            y = y + (raised**2 - sigma**2).sqrt() * noise_factor * noise()
            sigma = raised
        slope = (y - denoise(y, sigma)) / sigma
        heun = y + (later - sigma) * slope
        if later > 0:
            heun = y + (later - sigma) * (slope + (heun - denoise(heun, later)) / later) / 2
        y = heun
    return y
