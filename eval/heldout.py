"""Held-out errors on fixed triples of image, noise level sigma and noise, which make all kinds of models comparable.

The noise depends only on the noise level and on the image's index, so all models get the same noise, and appending
images does not change it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common import InputError
from pipelines.continuous import denoiser

# Covered by every model with the usual settings: ve starts at 0.02, DDPM schedules end beyond 100
SIGMAS = tuple(float(f"{sigma:.3g}") for sigma in np.geomspace(0.02, 50, 16))
SIGMA_UNIT = 1e-6  # the seed of the noise is its level in this unit
NUM_TIMESTEPS = 20


def midpoint_timesteps(scheduler) -> tuple[list[int], list[float]]:
    """The midpoints of 20 equal strata of a DDPM scheduler's timesteps, and sigma at each."""
    timesteps = [int((k + 0.5) * scheduler.config.num_train_timesteps / NUM_TIMESTEPS) for k in range(NUM_TIMESTEPS)]
    abar = scheduler.alphas_cumprod[timesteps].double()
    return timesteps, ((1 - abar) / abar).sqrt().tolist()


@torch.no_grad()
def clean_image_errors(
    unet, scheduler, clean_images: Tensor, sigmas: Sequence[float] = SIGMAS, *, batch_size: int = 64
) -> np.ndarray:
    """Mean squared error of the predicted x_0 for each image at each noise level.

    The network gets x_0 + sigma epsilon, scaled as in training; a DDPM model is evaluated between its timesteps, see
    `DiscreteVPSDE`. Whatever a network predicts, its output determines epsilon, x_0 and v, and their errors at a noise
    level are proportional: the error of epsilon is that of x_0 over sigma^2.

    Args:
        unet: in evaluation mode; it must accept fractional timesteps.
        scheduler: the DDPM noise schedule or `SDEScheduler` that it was trained with.
        clean_images: float32 in [-1, 1], shape (N, C, H, W).
        sigmas: noise levels that the network was trained with, see `SDE.noise_levels`.

    Returns float64, shape (len(sigmas), N). Raises InputError if the network's output is not finite.
    """
    denoise, device = denoiser(unet, scheduler), next(unet.parameters()).device
    errors = np.empty((len(sigmas), len(clean_images)))
    for row, sigma in zip(errors, sigmas, strict=True):
        rng = np.random.default_rng((0, round(sigma / SIGMA_UNIT)))
        noise = torch.from_numpy(rng.standard_normal(clean_images.shape, dtype=np.float32))
        for batch in torch.arange(len(clean_images)).split(batch_size):
            images = clean_images[batch].to(device, torch.float64)
            predicted = denoise.of_noise_level(images + sigma * noise[batch].to(device), sigma)
            row[batch.numpy()] = (predicted - images).square().mean(dim=(1, 2, 3)).cpu()
        if not np.isfinite(row).all():
            raise InputError("the network's output is not finite; check its weights")
    return errors
