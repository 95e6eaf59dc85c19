"""Held-out losses on fixed triples of image, noise level and noise.

`heldout_curve` has the errors against the timestep, for a model with discrete timesteps; `denoising_curve` has them
against the noise level sigma, where models of all kinds compare.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common import InputError
from eval.likelihood import noise_levels, standard_error, time_of
from pipelines.custom_unet_pipeline import clean_images_and_noise, denoiser
from training.diffusion import per_image_mse, signal_and_noise_scale

# Known to every model with the usual settings: ve starts at 0.02, a DDPM's schedules end beyond 100
SIGMAS = tuple(float(f"{sigma:.3g}") for sigma in np.geomspace(0.02, 50, 16))
SIGMA_UNIT = 1e-6  # of the noise levels by which the noise is seeded
NUM_TIMESTEPS = 20


@dataclass(frozen=True)
class ErrorCurve:
    """Mean squared errors of each image at each timestep or noise level.

    Attributes:
        x: timesteps, or noise levels, shape (K,).
        losses: float64, shape (K, N).
    """

    x: np.ndarray
    losses: np.ndarray

    @property
    def mse(self) -> np.ndarray:
        """Mean over the images, shape (K,)."""
        return self.losses.mean(1)

    @property
    def mse_standard_error(self) -> np.ndarray:
        """Over the images, shape (K,)."""
        return self.losses.std(1, ddof=1) / math.sqrt(self.losses.shape[1])

    @property
    def mean(self) -> float:
        """Over x; over log x where x is evenly spaced in it."""
        return float(self.losses.mean())

    @property
    def standard_error(self) -> float:
        """Of `mean`, over the images."""
        return standard_error(self.losses.mean(0))


@torch.no_grad()
def heldout_curve(
    unet,
    scheduler,
    clean_images: Tensor,
    *,
    timesteps: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> ErrorCurve:
    """The error of the noise that the network predicts at each timestep, one noise sample per image and timestep.

    Whatever the network predicts, its output implies epsilon, x_0 and v, and with snr = abar / (1 - abar) the errors
    of one timestep are proportional: that of epsilon is snr times that of x_0 and snr / (snr + 1) times that of v.

    The noise is a function of seed, timestep and the image's place, so all networks, noise schedules and choices of
    timesteps and batch size get the same one, and images appended at the end change none.

    Args:
        unet: called as `unet(noisy_images, timesteps).sample`; in evaluation mode.
        scheduler: the noise schedule it was trained with.
        clean_images: float32 in [-1, 1], shape (N, C, H, W), at least 2 for standard errors.
        timesteps: by default the midpoints of 20 equal strata.

    Raises:
        InputError: for an output that is not finite.
    """
    if timesteps is None:
        timesteps = [
            int((k + 0.5) * scheduler.config.num_train_timesteps / NUM_TIMESTEPS) for k in range(NUM_TIMESTEPS)
        ]
    device, dtype = next(unet.parameters()).device, next(unet.parameters()).dtype
    losses = np.empty((len(timesteps), len(clean_images)))
    for row, timestep in zip(losses, timesteps, strict=True):
        rng = np.random.default_rng((seed, timestep))
        all_noise = torch.from_numpy(rng.standard_normal(clean_images.shape, dtype=np.float32))
        for batch in torch.arange(len(clean_images)).split(batch_size):
            images, noise = clean_images[batch].to(device), all_noise[batch].to(device)
            t = torch.full((len(batch),), timestep, device=device)
            signal, noise_scale = signal_and_noise_scale(scheduler, t)
            noisy_images = signal * images + noise_scale * noise
            model_output = unet(noisy_images.to(dtype), t).sample.float()
            kind = scheduler.config.prediction_type
            _, predicted = clean_images_and_noise(kind, model_output, noisy_images, signal, noise_scale)
            row[batch.numpy()] = per_image_mse(predicted, noise).cpu().double()
        if not np.isfinite(row).all():
            raise InputError(f"the network's output is not finite at timestep {timestep}; look at its weights")
    return ErrorCurve(np.array(timesteps), losses)


@torch.no_grad()
def denoising_curve(
    unet,
    scheduler,
    clean_images: Tensor,
    *,
    sigmas: Sequence[float] = SIGMAS,
    seed: int = 0,
    batch_size: int = 64,
) -> ErrorCurve:
    """The error of the network's x_0 at each noise level, one noise sample per image and noise level.

    The network is given x_0 + sigma epsilon, scaled as it was trained; a DDPM model between two of its timesteps, see
    `DiscreteVPSDE`. The noise is a function of seed, sigma and the image's place, so all models get the same one. The
    errors of epsilon are these divided by sigma^2.

    Args:
        unet: called as `unet(noisy_images, timestep).sample`, also with fractions of a timestep; in evaluation mode.
        scheduler: what it was trained with, a noise schedule of DDPM or an `SDEScheduler`.
        clean_images: float32 in [-1, 1], shape (N, C, H, W), at least 2 for standard errors.
        sigmas: noise levels that the network was trained with.

    Raises:
        ValueError: for noise levels that the network was not trained with.
        InputError: for an output that is not finite.
    """
    sde, clean = denoiser(unet, scheduler)
    low, high = noise_levels(sde)
    if not low * (1 - 1e-6) <= min(sigmas) <= max(sigmas) <= high * (1 + 1e-6):
        raise ValueError(
            f"sigmas are {min(sigmas):.4g} to {max(sigmas):.4g}; the model was trained with {low:.4g} to {high:.4g}"
        )
    device = next(unet.parameters()).device
    losses = torch.empty(len(sigmas), len(clean_images), dtype=torch.float64)
    for row, sigma in zip(losses, sigmas, strict=True):
        rng = np.random.default_rng((seed, round(sigma / SIGMA_UNIT)))
        noise = torch.from_numpy(rng.standard_normal(clean_images.shape, dtype=np.float32))
        t = time_of(sde, sigma)
        noisy_images = sde.signal_scale(t) * (clean_images.double() + sigma * noise)
        for batch in torch.arange(len(clean_images)).split(batch_size):
            predicted = clean(noisy_images[batch].to(device), t).cpu().double()
            row[batch] = (predicted - clean_images[batch]).square().mean(dim=(1, 2, 3))
        if not row.isfinite().all():
            raise InputError(f"the network's output is not finite at sigma {sigma:.4g}; look at its weights")
    return ErrorCurve(np.array(sigmas, np.float64), losses.numpy())
