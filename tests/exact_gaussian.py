"""Images of independent RGB pixels, each drawn from one Gaussian, and their exact denoiser for mixed timesteps."""

from types import SimpleNamespace

import torch
from diffusers import DDPMScheduler
from exact_denoiser import ExactDenoiser, Mixture
from torch import Tensor

from training.data import to_uint8

MEAN = torch.tensor([[0.2, -0.1, 0.0]], dtype=torch.float64)
INDEPENDENT = Mixture(torch.ones(1).double(), MEAN, torch.tensor([[0.1, 0.15, 0.2]]).double().square().diag_embed())
STD = torch.tensor([[0.2, 0.17, 0.1]], dtype=torch.float64)
CORRELATION = torch.tensor([[1.0, 0.8, -0.4], [0.8, 1.0, -0.2], [-0.4, -0.2, 1.0]], dtype=torch.float64)
CORRELATED = Mixture(torch.ones(1).double(), MEAN, (STD.T * CORRELATION * STD)[None])


def make_scheduler(prediction_type: str = "v_prediction", **settings) -> DDPMScheduler:
    return DDPMScheduler(**{"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type} | settings)


def draw_images(data: Mixture, num_images: int, size: int = 1) -> Tensor:
    """Draws uint8 images, shape (N, 3, size, size)."""
    shape = (num_images, size, size, 3)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = data.means[0] + noise @ torch.linalg.cholesky(data.covariances[0]).T
    return to_uint8(x.permute(0, 3, 1, 2))


class ExactGaussian(ExactDenoiser):
    """An exact denoiser called with integer timesteps, one per image."""

    def set_data(self, data: Mixture, alphas_cumprod: Tensor) -> "ExactGaussian":
        self.alphas_cumprod = alphas_cumprod
        self.variances, self.directions = torch.linalg.eigh(data.covariances[0])
        return super().set_data(data, alphas_cumprod)

    def forward(self, noisy_images: Tensor, timesteps: Tensor) -> SimpleNamespace:
        abar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        signal, noise_scale = abar.sqrt(), (1 - abar).sqrt()
        x = noisy_images.double().permute(0, 2, 3, 1)  # (B, H, W, 3)
        gain = signal * self.variances / (signal**2 * self.variances + noise_scale**2)
        clean = self.data.means + (gain * ((x - signal * self.data.means) @ self.directions)) @ self.directions.T
        epsilon = (x - signal * clean) / noise_scale
        output = {"epsilon": epsilon, "sample": clean, "v_prediction": signal * epsilon - noise_scale * clean}
        return SimpleNamespace(sample=output[self.config.prediction_type].permute(0, 3, 1, 2).to(noisy_images))


def exact_network(cls, data: Mixture, scheduler: DDPMScheduler) -> ExactDenoiser:
    """An exact network in float64 and evaluation mode."""
    network = cls(scheduler.config.prediction_type).double().eval()
    return network.set_data(data, scheduler.alphas_cumprod.double())
