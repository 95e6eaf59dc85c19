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

from eval.likelihood import noise_levels, standard_error, time_of
from pipelines.custom_unet_pipeline import clean_images_and_noise, denoiser
from training.diffusion import per_image_mse, signal_and_noise_scale

# Known to every model with the usual settings: ve starts at 0.02, a DDPM's schedules end beyond 100
SIGMAS = tuple(float(f"{sigma:.3g}") for sigma in np.geomspace(0.02, 50, 16))
SIGMA_UNIT = 1e-6  # of the noise levels by which the noise is seeded


@dataclass(frozen=True)
class HeldoutCurve:
    """Mean squared errors by timestep; float64, shape (K,) each, standard errors over the images.

    Whatever the network predicts, its output says epsilon, x_0 and v, and with snr = abar / (1 - abar) the errors of
    one timestep are proportional: epsilon_mse = snr x sample_mse and v_mse = (snr + 1) x sample_mse.
    """

    timesteps: np.ndarray
    epsilon_mse: np.ndarray
    epsilon_standard_error: np.ndarray
    sample_mse: np.ndarray
    sample_standard_error: np.ndarray
    v_mse: np.ndarray
    v_standard_error: np.ndarray


@dataclass(frozen=True)
class DenoisingCurve:
    """Mean squared errors of x_0, of each image at each noise level.

    The errors of one noise level are proportional, as in `HeldoutCurve` with snr = 1 / sigma^2; epsilon is that of
    x_0 + sigma epsilon, v that of the same scaled to unit size.

    Attributes:
        sigmas: shape (K,).
        losses: float64, shape (K, N).
    """

    sigmas: np.ndarray
    losses: np.ndarray

    @property
    def sample_mse(self) -> np.ndarray:
        """Mean over the images, shape (K,), as are the next ones."""
        return self.losses.mean(1)

    @property
    def sample_standard_error(self) -> np.ndarray:
        return self.losses.std(1, ddof=1) / math.sqrt(self.losses.shape[1])

    @property
    def epsilon_mse(self) -> np.ndarray:
        return self.sample_mse / self.sigmas**2

    @property
    def v_mse(self) -> np.ndarray:
        return self.sample_mse * (1 + 1 / self.sigmas**2)

    @property
    def mean(self) -> float:
        """Over the noise levels; over log sigma where these are evenly spaced in it."""
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
    timesteps: int | Sequence[int] = 20,
    seed: int = 0,
    batch_size: int = 64,
) -> HeldoutCurve:
    """What the network's predictions err by at each timestep, every image with one noise sample at each of them.

    The noise is a function of seed, timestep and the image's place, so that all networks, noise schedules and choices
    of timesteps and batch size meet the same one, and images added at the end change none.

    Args:
        unet: called as `unet(noisy_images, timesteps).sample`; in evaluation mode.
        scheduler: the noise schedule it was trained with.
        clean_images: float32 in [-1, 1], shape (N, C, H, W), at least 2 for standard errors.
        timesteps: which ones, or how many: the midpoints of so many equal strata.

    Raises:
        ValueError: for images of another type, shape or range, timesteps out of range, a network in training mode, or
            an output that is not finite.
    """
    num_train_timesteps = scheduler.config.num_train_timesteps
    _check(unet, clean_images, batch_size)
    timesteps = _timesteps(timesteps, num_train_timesteps)
    device = next(unet.parameters()).device
    means, errors = [], []
    for timestep in timesteps:
        rng = np.random.default_rng((seed, timestep))
        noise = torch.from_numpy(rng.standard_normal(clean_images.shape, dtype=np.float32))
        losses = [
            _losses(unet, scheduler, clean_images[batch].to(device), noise[batch].to(device), timestep)
            for batch in torch.arange(len(clean_images)).split(batch_size)
        ]
        losses = torch.cat(losses).double()  # (N, 3)
        if not losses[:, 0].isfinite().all():
            raise ValueError(f"the network's output is not finite at timestep {timestep}; look at its weights")
        means.append(losses.mean(0))
        errors.append(losses.std(0) / math.sqrt(len(losses)))
    epsilon, sample, v = torch.stack(means).T.numpy()
    epsilon_error, sample_error, v_error = torch.stack(errors).T.numpy()
    return HeldoutCurve(np.array(timesteps), epsilon, epsilon_error, sample, sample_error, v, v_error)


@torch.no_grad()
def denoising_curve(
    unet,
    scheduler,
    clean_images: Tensor,
    *,
    sigmas: Sequence[float] = SIGMAS,
    seed: int = 0,
    batch_size: int = 64,
) -> DenoisingCurve:
    """What the network's x_0 errs by at each noise level, every image with one noise sample at each of them.

    The network is given x_0 + sigma epsilon, scaled as it was trained; a DDPM model between two of its timesteps, see
    `DiscreteVPSDE`. The noise is a function of seed, sigma and the image's place, so that all models meet the same.

    Args:
        unet: called as `unet(noisy_images, timestep).sample`, also with fractions of a timestep; in evaluation mode.
        scheduler: what it was trained with, a noise schedule of DDPM or an `SDEScheduler`.
        clean_images: float32 in [-1, 1], shape (N, C, H, W), at least 2 for standard errors.
        sigmas: rising.

    Raises:
        ValueError: for images of another type, shape or range, noise levels that do not rise or that the network was
            not trained with, a network in training mode, or an output that is not finite.
    """
    _check(unet, clean_images, batch_size)
    sde, clean = denoiser(unet, scheduler)
    sigmas = np.array(sigmas, dtype=np.float64)
    if len(sigmas) == 0 or not (np.diff(sigmas) > 0).all():
        raise ValueError(f"sigmas are {sigmas.tolist()}; give one or more that rise")
    low, high = noise_levels(sde)
    if not low * (1 - 1e-6) <= sigmas[0] <= sigmas[-1] <= high * (1 + 1e-6):
        raise ValueError(
            f"sigmas are {sigmas[0]:.4g} to {sigmas[-1]:.4g}; the model was trained with {low:.4g} to {high:.4g}"
        )
    device = next(unet.parameters()).device
    losses = torch.empty(len(sigmas), len(clean_images), dtype=torch.float64)
    for row, sigma in zip(losses, sigmas.tolist(), strict=True):
        rng = np.random.default_rng((seed, round(sigma / SIGMA_UNIT)))
        noise = torch.from_numpy(rng.standard_normal(clean_images.shape, dtype=np.float32))
        t = time_of(sde, sigma)
        noisy_images = sde.signal_scale(t) * (clean_images.double() + sigma * noise)
        for batch in torch.arange(len(clean_images)).split(batch_size):
            predicted = clean(noisy_images[batch].to(device), t).cpu().double()
            row[batch] = (predicted - clean_images[batch]).square().mean(dim=(1, 2, 3))
        if not row.isfinite().all():
            raise ValueError(f"the network's output is not finite at sigma {sigma:.4g}; look at its weights")
    return DenoisingCurve(sigmas, losses.numpy())


def _timesteps(wanted: int | Sequence[int], num_train_timesteps: int) -> list[int]:
    if isinstance(wanted, int):
        if not 1 <= wanted <= num_train_timesteps:
            raise ValueError(f"{wanted} timesteps are wanted; the schedule has {num_train_timesteps}, take 1 to that")
        return [int((k + 0.5) * num_train_timesteps / wanted) for k in range(wanted)]
    timesteps = [int(t) for t in wanted]
    if not timesteps or min(timesteps) < 0 or max(timesteps) >= num_train_timesteps:
        raise ValueError(f"timesteps are {timesteps}; they must lie in 0 to {num_train_timesteps - 1}")
    return timesteps


def _check(unet, clean_images: Tensor, batch_size: int) -> None:
    shape = tuple(clean_images.shape)
    if clean_images.dtype != torch.float32 or len(shape) != 4 or shape[0] < 2:
        raise ValueError(f"images are {clean_images.dtype} of shape {shape}; give float32 of shape (N >= 2, C, H, W)")
    if clean_images.min() < -1 or clean_images.max() > 1:
        lowest, highest = clean_images.min().item(), clean_images.max().item()
        raise ValueError(f"images have values from {lowest:.4g} to {highest:.4g}; they must lie in [-1, 1]")
    if unet.training:
        raise ValueError("the network is in training mode, where dropout acts; call unet.eval() first")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")


def _losses(unet, scheduler, clean_images: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """Each image's mean squared errors of epsilon, x_0 and v, shape (B, 3)."""
    t = torch.full((len(clean_images),), timestep, device=clean_images.device)
    signal, noise_scale = signal_and_noise_scale(scheduler, t)
    noisy_images = signal * clean_images + noise_scale * noise
    model_output = unet(noisy_images.to(next(unet.parameters()).dtype), t).sample.float()
    sample, epsilon = clean_images_and_noise(
        scheduler.config.prediction_type, model_output, noisy_images, signal, noise_scale
    )
    pairs = [
        (epsilon, noise),
        (sample, clean_images),
        (signal * epsilon - noise_scale * sample, signal * noise - noise_scale * clean_images),
    ]
    return torch.stack([per_image_mse(prediction, target) for prediction, target in pairs], dim=1)
