"""Held-out losses on fixed triples of image, noise level and noise.

`noise_errors` measures the loss by timestep, for a model with discrete timesteps; `clean_image_errors` measures it by
noise level sigma, where all kinds of models are comparable. The noise depends only on the timestep or noise level and
on the image's index, so all models get the same noise, and appending images changes no noise.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from common import InputError
from pipelines.continuous import denoiser
from pipelines.custom_unet_pipeline import clean_images_and_noise
from training.diffusion import per_image_mse, signal_and_noise_scale

# Covered by every model with the usual settings: ve starts at 0.02, DDPM schedules end beyond 100
SIGMAS = tuple(float(f"{sigma:.3g}") for sigma in np.geomspace(0.02, 50, 16))
SIGMA_UNIT = 1e-6  # noise is seeded by its noise level as a multiple of this
NUM_TIMESTEPS = 20


def midpoint_timesteps(scheduler) -> list[int]:
    """The midpoints of 20 equal strata of the scheduler's timesteps."""
    return [int((k + 0.5) * scheduler.config.num_train_timesteps / NUM_TIMESTEPS) for k in range(NUM_TIMESTEPS)]


def noise_errors(
    unet, scheduler, clean_images: Tensor, timesteps: Sequence[int], *, batch_size: int = 64
) -> np.ndarray:
    """Mean squared error of the predicted noise for each image at each timestep.

    Whatever the network predicts, its output determines epsilon, x_0 and v. With snr = abar / (1 - abar), their errors
    at a timestep are proportional: the error of epsilon is snr times that of x_0 and snr / (snr + 1) times that of v.

    Args:
        unet: in evaluation mode.
        scheduler: the noise schedule that it was trained with.
        clean_images: float32 in [-1, 1], shape (N, C, H, W).

    Returns float64, shape (len(timesteps), N). Raises InputError if the network's output is not finite.
    """
    parameter, kind = next(unet.parameters()), scheduler.config.prediction_type

    def error_of(images: Tensor, noise: Tensor, timestep: int) -> Tensor:
        t = torch.full((len(images),), timestep, device=parameter.device)
        signal, noise_scale = signal_and_noise_scale(scheduler, t)
        noisy_images = signal * images + noise_scale * noise
        model_output = unet(noisy_images.to(parameter.dtype), t).sample.float()
        _, predicted = clean_images_and_noise(kind, model_output, noisy_images, signal, noise_scale)
        return per_image_mse(predicted, noise)

    return _errors(error_of, clean_images, timesteps, batch_size, parameter.device)


def clean_image_errors(
    unet, scheduler, clean_images: Tensor, *, sigmas: Sequence[float] = SIGMAS, batch_size: int = 64
) -> np.ndarray:
    """Mean squared error of the predicted x_0 for each image at each noise level.

    The network gets x_0 + sigma epsilon, scaled as in training; a DDPM model is evaluated between its timesteps, see
    `DiscreteVPSDE`. Divide by sigma^2 for the errors of epsilon.

    Args:
        unet: in evaluation mode; it must accept fractional timesteps.
        scheduler: the DDPM noise schedule or `SDEScheduler` that it was trained with.
        sigmas: noise levels that the network was trained with, see `SDE.noise_levels`.

    Returns float64, shape (len(sigmas), N). Raises InputError if the network's output is not finite.
    """
    denoise = denoiser(unet, scheduler)

    def error_of(images: Tensor, noise: Tensor, sigma: float) -> Tensor:
        predicted = denoise.of_noise_level(images.double() + sigma * noise, sigma)
        return (predicted.double() - images).square().mean(dim=(1, 2, 3))

    return _errors(error_of, clean_images, sigmas, batch_size, next(unet.parameters()).device)


@torch.no_grad()
def _errors(
    error_of: Callable[[Tensor, Tensor, float], Tensor],
    clean_images: Tensor,
    levels: Sequence[int] | Sequence[float],
    batch_size: int,
    device: torch.device,
) -> np.ndarray:
    """Errors (levels, N), where `error_of` takes B images, their noise and a level, and returns their errors (B,)."""
    errors = np.empty((len(levels), len(clean_images)))
    for row, level in zip(errors, levels, strict=True):
        rng = np.random.default_rng((0, level if isinstance(level, int) else round(level / SIGMA_UNIT)))
        noise = torch.from_numpy(rng.standard_normal(clean_images.shape, dtype=np.float32))
        for batch in torch.arange(len(clean_images)).split(batch_size):
            row[batch.numpy()] = error_of(clean_images[batch].to(device), noise[batch].to(device), level).cpu()
        if not np.isfinite(row).all():
            raise InputError("the network's output is not finite; check its weights")
    return errors
