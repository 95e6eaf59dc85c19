"""DDPM models in continuous time, without further training: their noise schedule is interpreted as an SDE.

This works within this repository only. DDPM models are not shipped with this file; elsewhere they sample with
diffusers' schedulers.
"""

import torch
from torch import Tensor

from pipelines.custom_unet_pipeline import Guidance, check_fractional_timesteps
from training.sde import SDE, Denoiser, SDEScheduler


class DiscreteVPSDE(SDE):
    """A DDPM noise schedule interpreted as a VP SDE.

    Time is t = timestep / (T - 1). At the timesteps alpha^2 equals abar; in between, sigma is interpolated linearly,
    as in diffusers' sigma-type schedulers.

    Args:
        alphas_cumprod: abar of the T timesteps, decreasing, in (0, 1); the last one may be 0 and is then replaced by
            2^-24, as in diffusers.
    """

    def __init__(self, alphas_cumprod: Tensor):
        abar = alphas_cumprod.double().cpu().clamp(min=2**-24)
        self.sigmas = ((1 - abar) / abar).sqrt()

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slope of sigma in t, sigma at the segment's start, and the time since that start."""
        sigmas, steps = self.sigmas.to(t), len(self.sigmas) - 1
        index = (t * steps).long().clamp(0, steps - 1)
        return (sigmas[index + 1] - sigmas[index]) * steps, sigmas[index], t - index.to(t) / steps

    def sigma(self, t):
        slope, start, behind = self._segment(t)
        return start + slope * behind

    def signal_scale(self, t):
        return (1 + self.sigma(t).square()).rsqrt()

    def noise_scale(self, t):
        return self.sigma(t) * self.signal_scale(t)

    def drift(self, t):
        slope, _, _ = self._segment(t)  # alpha' / alpha = -sigma sigma' / (1 + sigma^2)
        return -slope * self.sigma(t) * self.signal_scale(t).square()

    def diffusion(self, t):
        return (-2 * self.drift(t)).sqrt()  # variance preserving: beta = g^2 = -2 f

    def time_of(self, sigma):
        sigmas, steps = self.sigmas.to(sigma), len(self.sigmas) - 1
        index = (torch.searchsorted(sigmas, sigma.contiguous(), right=True) - 1).clamp(0, steps - 1)
        return (index + (sigma - sigmas[index]) / (sigmas[index + 1] - sigmas[index])) / steps


class DiscreteVPScheduler(SDEScheduler):
    """The scheduler of a DDPM network as an `SDEScheduler`."""

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str):
        super().__init__(objective="vp", prediction_type=prediction_type)
        self.sde = DiscreteVPSDE(alphas_cumprod)

    def preconditioning(self, times):
        """As for the VP SDE, but c_noise is the fractional timestep."""
        *coefficients, _ = super().preconditioning(times)
        return *coefficients, times * (len(self.sde.sigmas) - 1)


def process_of(scheduler) -> SDEScheduler:
    """The continuous-time process of a diffusers scheduler or an `SDEScheduler`."""
    if hasattr(scheduler, "sde"):
        return scheduler
    return DiscreteVPScheduler(scheduler.alphas_cumprod, scheduler.config.prediction_type)


def denoiser(unet, scheduler) -> Denoiser:
    """The denoiser of a network, called as `unet(sample, timestep).sample`, and the scheduler it was trained with.

    Raises:
        ValueError: for a network that only takes integer timesteps.
    """
    check_fractional_timesteps(unet)
    return process_of(scheduler).denoiser(lambda x, timesteps: Guidance().model_output(unet, x, timesteps))
