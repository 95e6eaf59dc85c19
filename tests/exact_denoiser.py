"""Data whose exact denoiser is known: "images" of one RGB pixel or two, distributed as a mixture of Gaussians."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


@dataclass
class Mixture:
    """weights (K,), means (K, D), covariances (K, D, D), all float64; D is 3 for each pixel."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def log_densities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of each weighted component, (N, K), and covariance^-1 (x - mean), (N, K, D)."""
        difference = x[:, None] - self.means
        solved = torch.einsum("kij,nkj->nki", torch.linalg.inv(self.covariances), difference)
        squares = (difference * solved).sum(-1)
        return self.weights.log() - squares / 2 - torch.logdet(self.covariances) / 2, solved

    def at(self, alpha: float | Tensor, n: float | Tensor) -> "Mixture":
        """The distribution of alpha x_0 + n epsilon."""
        unit = torch.eye(self.means.shape[1], dtype=torch.float64)
        return Mixture(self.weights, alpha * self.means, alpha**2 * self.covariances + n**2 * unit)

    def clean_images(self, x: Tensor, alpha: float | Tensor, n: float | Tensor) -> Tensor:
        """E[x_0 | alpha x_0 + n epsilon = x] for x (N, D), by Tweedie's formula."""
        log_densities, solved = self.at(alpha, n).log_densities(x)
        score = -(log_densities.softmax(-1)[..., None] * solved).sum(1)
        return (x + n**2 * score) / alpha

    def errors(self, x: Tensor) -> Tensor:
        """Largest error of weights, of means and (relative) of covariances of samples (N, 3), split by component."""
        component = self.log_densities(x)[0].argmax(-1)
        errors = []
        for k in range(len(self.weights)):
            own = x[component == k]
            assert len(own) > 10, f"component {k} is missing"
            difference = torch.cov(own.T) - self.covariances[k]
            weight, mean = len(own) / len(x) - self.weights[k], own.mean(0) - self.means[k]
            errors.append([weight.abs(), mean.abs().max(), difference.norm() / self.covariances[k].norm()])
        return torch.tensor(errors).amax(0)


def mixture() -> Mixture:
    factors = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Mixture(
        weights=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
        means=torch.tensor([[-0.5, -0.3, 0.2], [0.4, -0.2, -0.4], [0.1, 0.5, 0.3]], dtype=torch.float64),
        covariances=0.002 * (factors @ factors.mT) + 0.005 * torch.eye(3, dtype=torch.float64),
    )


def gaussian(scale: float) -> Mixture:
    mean = torch.tensor([[0.2, -0.1, 0.0]], dtype=torch.float64)
    return Mixture(torch.ones(1).double(), mean, scale**2 * torch.eye(3).double()[None])


class ExactDenoiser(ModelMixin, ConfigMixin):
    """A "network" whose output is optimal: the expectation of what it predicts, given x_t.

    It records its inputs at each evaluation: x_t (N, 3), sqrt(abar_t) and sqrt(1 - abar_t).
    """

    @register_to_config
    def __init__(self, prediction_type: str, sample_size: int = 1, in_channels: int = 3):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def set_data(self, data: Mixture, alphas_cumprod: Tensor) -> "ExactDenoiser":
        self.data, self.seen = data, []
        self.sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().numpy()
        return self

    def forward(self, noisy_images: Tensor, timestep: Tensor) -> SimpleNamespace:
        timesteps = np.arange(len(self.sigmas))  # interpolated linearly, as in the schedulers
        sigma = float(np.interp(float(timestep), timesteps, self.sigmas))
        signal, noise_scale = 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2)
        x = noisy_images.double().flatten(1)
        self.seen.append((x, signal, noise_scale))
        clean = self.data.clean_images(x, signal, noise_scale)
        epsilon = (x - signal * clean) / noise_scale
        output = {"epsilon": epsilon, "sample": clean, "v_prediction": signal * epsilon - noise_scale * clean}
        return SimpleNamespace(sample=output[self.config.prediction_type].view_as(noisy_images).to(noisy_images))
