"""Denoising score matching in continuous time (Song et al. 2021, arXiv 2011.13456, eq. 7; Vincent 2011).

The network F learns (x_0 - c_skip x) / c_out from c_in x at the time c_noise (Karras et al. 2022, arXiv 2206.00364,
eq. 7 and 8); `SDEScheduler` knows the coefficients and the weights. Times and coefficients are float64, on the CPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from training.sde import SDEScheduler, spread

LEAST_SIGMA_MAX, MOST_SIGMA_MIN = 20.0, 0.1  # in units of the root mean square of the pixel values


@dataclass(frozen=True)
class Regression:
    """What a network is to learn from one batch.

    Attributes:
        inputs: of the network, float32 (B, C, H, W).
        times: of the network, (B,): timesteps, or c_noise in float32.
        target: what it should predict, float32, shape of `inputs`.
        loss_weight: of the squared error of each image in the loss, float32 (B,).
        noise_weight: the squared error of epsilon, as a multiple of that of the prediction; float32 (B,).
    """

    inputs: Tensor
    times: Tensor
    target: Tensor
    loss_weight: Tensor
    noise_weight: Tensor


def score_regression(
    scheduler: SDEScheduler, clean_images: Tensor, noise: Tensor, positions: Tensor, likelihood_weighting: bool = False
) -> Regression:
    """What the network of an SDE model is to learn from a batch.

    With x = alpha x_0 + n epsilon the target is (1 - c_skip alpha) / c_out x_0 - c_skip n / c_out epsilon: the
    coefficients cancel in float64, where x_0 - c_skip x would in float32.

    Args:
        positions: of the times in their distribution, float64 (B,), in [0, 1).
        likelihood_weighting: lambda = g^2 (arXiv 2101.09258) instead of n^2.
    """
    times = scheduler.times(positions)
    alpha, n = scheduler.sde.signal_scale(times), scheduler.sde.noise_scale(times)
    c_skip, c_out, c_in, c_noise = scheduler.preconditioning(times)
    clean_share, noise_share = (1 - c_skip * alpha) / c_out, c_skip * n / c_out
    return Regression(
        inputs=spread(c_in, noise) * scheduler.add_noise(clean_images, noise, times),
        times=c_noise.to(noise),
        target=spread(clean_share, noise) * clean_images - spread(noise_share, noise) * noise,
        loss_weight=scheduler.loss_weight(times, likelihood_weighting).to(noise),
        noise_weight=(alpha * c_out / n).square().to(noise),  # epsilon error = -alpha c_out / n (error of F)
    )


def check_noise_levels(scheduler: SDEScheduler, clean_images: Iterable[Tensor]) -> None:
    """Whether noise levels from sigma_min to sigma_max reach from nearly clean images to nearly pure noise.

    The divergence of the last marginal from the prior is at most (rms / sigma_max)^2 / 2 per dimension, 0.00125 here.

    Args:
        scheduler: of the objective ve or edm.
        clean_images: in [-1, 1], any shapes, at least one.

    Raises:
        ValueError: one line, if they do not.
    """
    sde = scheduler.sde
    squares = [image.square().mean().item() for image in clean_images]
    rms = (sum(squares) / len(squares)) ** 0.5
    if sde.sigma_max < LEAST_SIGMA_MAX * rms:
        raise ValueError(
            f"--sigma_max is {sde.sigma_max:g}, too little to hide these images, whose pixel values have the root mean"
            f" square {rms:.3g}; take at least {LEAST_SIGMA_MAX * rms:.3g}"
        )
    if sde.sigma_min > MOST_SIGMA_MIN * rms:
        raise ValueError(
            f"--sigma_min is {sde.sigma_min:g}, visible noise on these images, whose pixel values have the root mean"
            f" square {rms:.3g}; take at most {MOST_SIGMA_MIN * rms:.3g}"
        )
