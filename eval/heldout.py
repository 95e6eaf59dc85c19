"""Held-out losses on fixed triples of image, noise level and noise.

`noise_errors` are those against the timestep, for a model with discrete timesteps; `clean_image_errors` those against
the noise level sigma, where models of all kinds compare. The noise is a function of the seed, the timestep or noise
level, and the image's place, so that all models get the same noise, whatever the other timesteps, the batch size and
the noise schedule are, and images appended at the end change no noise.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common import InputError
from eval.likelihood import time_of
from pipelines.custom_unet_pipeline import clean_images_and_noise, denoiser
from training.diffusion import per_image_mse, signal_and_noise_scale

# Known to every model with the usual settings: ve starts at 0.02, a DDPM's schedules end beyond 100
SIGMAS = tuple(float(f"{sigma:.3g}") for sigma in np.geomspace(0.02, 50, 16))
SIGMA_UNIT = 1e-6  # of the noise levels by which the noise is seeded
NUM_TIMESTEPS = 20


def midpoint_timesteps(scheduler) -> list[int]:
    """The midpoints of 20 equal strata of its timesteps."""
    return [int((k + 0.5) * scheduler.config.num_train_timesteps / NUM_TIMESTEPS) for k in range(NUM_TIMESTEPS)]


@torch.no_grad()
def noise_errors(
    unet, scheduler, clean_images: Tensor, timesteps: Sequence[int], *, seed: int = 0, batch_size: int = 64
) -> np.ndarray:
    """The mean squared error of the noise that the network predicts, of each image at each timestep.

    Whatever the network predicts, its output implies epsilon, x_0 and v, and with snr = abar / (1 - abar) the errors
    of one timestep are proportional: that of epsilon is snr times that of x_0 and snr / (snr + 1) times that of v.

    Args:
        unet: called as `unet(noisy_images, timesteps).sample`; in evaluation mode.
        scheduler: the noise schedule it was trained with.
        clean_images: float32 in [-1, 1], shape (N, C, H, W).

    Returns:
        float64, shape (len(timesteps), N).

    Raises:
        InputError: for an output that is not finite.
    """
    device, dtype = next(unet.parameters()).device, next(unet.parameters()).dtype
    errors = np.empty((len(timesteps), len(clean_images)))
    for row, timestep in zip(errors, timesteps, strict=True):
        all_noise = _draw_noise(clean_images, seed, timestep)
        for batch in torch.arange(len(clean_images)).split(batch_size):
            images, noise = clean_images[batch].to(device), all_noise[batch].to(device)
            t = torch.full((len(batch),), timestep, device=device)
            signal, noise_scale = signal_and_noise_scale(scheduler, t)
            noisy_images = signal * images + noise_scale * noise
            model_output = unet(noisy_images.to(dtype), t).sample.float()
            kind = scheduler.config.prediction_type
            _, predicted = clean_images_and_noise(kind, model_output, noisy_images, signal, noise_scale)
            row[batch.numpy()] = per_image_mse(predicted, noise).cpu().double()
        _check_finite(row, f"timestep {timestep}")
    return errors


@torch.no_grad()
def clean_image_errors(
    unet,
    scheduler,
    clean_images: Tensor,
    *,
    sigmas: Sequence[float] = SIGMAS,
    seed: int = 0,
    batch_size: int = 64,
) -> np.ndarray:
    """The mean squared error of the network's x_0, of each image at each noise level.

    The network is given x_0 + sigma epsilon, scaled as it was trained; a DDPM model between two of its timesteps, see
    `DiscreteVPSDE`. The errors of epsilon are these divided by sigma^2.

    Args:
        unet: called as `unet(noisy_images, timestep).sample`, also with fractions of a timestep; in evaluation mode.
        scheduler: what it was trained with, a noise schedule of DDPM or an `SDEScheduler`.
        clean_images: float32 in [-1, 1], shape (N, C, H, W).
        sigmas: noise levels that the network was trained with, see `eval.likelihood.noise_levels`.

    Returns:
        float64, shape (len(sigmas), N).

    Raises:
        InputError: for an output that is not finite.
    """
    sde, clean = denoiser(unet, scheduler)
    device = next(unet.parameters()).device
    errors = np.empty((len(sigmas), len(clean_images)))
    for row, sigma in zip(errors, sigmas, strict=True):
        t = time_of(sde, sigma)
        noise = _draw_noise(clean_images, seed, round(sigma / SIGMA_UNIT))
        noisy_images = sde.signal_scale(t) * (clean_images.double() + sigma * noise)
        for batch in torch.arange(len(clean_images)).split(batch_size):
            predicted = clean(noisy_images[batch].to(device), t).cpu().double()
            row[batch.numpy()] = (predicted - clean_images[batch]).square().mean(dim=(1, 2, 3))
        _check_finite(row, f"sigma {sigma:.4g}")
    return errors


def _draw_noise(images: Tensor, seed: int, level: int) -> Tensor:
    """Standard normal, float32, in the shape of the images."""
    return torch.from_numpy(np.random.default_rng((seed, level)).standard_normal(images.shape, dtype=np.float32))


def _check_finite(errors: np.ndarray, where: str) -> None:
    if not np.isfinite(errors).all():
        raise InputError(f"the network's output is not finite at {where}; look at its weights")
