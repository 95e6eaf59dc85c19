"""Data in one or two dimensions with known densities and scores at all times, and a network that learns the scores."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from eval.swd import projected_distances, random_directions
from training.sde import SDE, Denoiser, clean_image_coefficients, spread

Score = Callable[[Tensor, Tensor], Tensor]  # s(x, t) for points (N, D) and times () or (N,)
BATCH_SIZE = 512  # in `train`


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def noise_source(shape: tuple[int, ...], *seed: int) -> Callable[[], Tensor]:
    source = generator(*seed)
    return lambda: torch.randn(shape, generator=source)


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of isotropic Gaussians with a common standard deviation.

    Args:
        weights: (K,), summing to 1.
        means: (K, D), float64.
        std: with 0, this is the empirical distribution of the means, which has a density only after noise is added.
    """

    weights: Tensor
    means: Tensor
    std: float

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """Draws samples, float64 (number, D)."""
        chosen = torch.multinomial(self.weights, number, replacement=True, generator=generator)
        noise = torch.randn(number, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[chosen] + self.std * noise

    def at(self, sde: SDE, t: Tensor) -> "GaussianMixture":
        """p_t, the distribution of alpha x_0 + n epsilon: again a mixture, since sums of Gaussians are Gaussian."""
        alpha, n = float(sde.signal_scale(t)), float(sde.noise_scale(t))
        return GaussianMixture(self.weights, alpha * self.means, math.hypot(alpha * self.std, n))

    def _log_components(self, x: Tensor) -> Tensor:
        """log(weight x density) of each component without their common terms, (N, K)."""
        means, log_weights = self.means.to(x), self.weights.log().to(x)
        return log_weights + (x @ means.T - means.square().sum(1) / 2) / self.std**2

    def log_density(self, x: Tensor) -> Tensor:
        """Log-density, (N, D) -> (N,)."""
        common = x.square().sum(1) / (2 * self.std**2) + x.shape[1] * math.log(self.std * math.sqrt(2 * math.pi))
        return self._log_components(x).logsumexp(1) - common

    def score(self, x: Tensor) -> Tensor:
        """Gradient of the log-density, (N, D): it points to the posterior mean of the components."""
        return (self._log_components(x).softmax(1) @ self.means.to(x) - x) / self.std**2

    def cdf(self, x: np.ndarray) -> np.ndarray:
        """P(X <= x) in one dimension, (N,) -> (N,)."""
        return (torch.special.ndtr((torch.from_numpy(x)[:, None] - self.means.T) / self.std) @ self.weights).numpy()


TWO_MODES = GaussianMixture(torch.tensor([0.3, 0.7]).double(), torch.tensor([[-1.0], [0.6]]).double(), 0.15)


def eight_modes() -> GaussianMixture:
    """Eight Gaussians on a circle of radius 1; every other one has three times the weight of its neighbours."""
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    weights = torch.tensor([3.0, 1.0] * 4, dtype=torch.float64) / 16
    return GaussianMixture(weights, torch.stack([angles.cos(), angles.sin()], 1), 0.07)


def train(sde: SDE, points: Tensor, num_steps: int) -> Score:
    """Trains a small network for points (N, 2) by denoising score matching (eq. 7).

    The score of x_t given x_0 is -epsilon / n, and its regression on x_t alone gives the score of p_t. The weight
    lambda(t) = n^2 makes all times equally hard. The network predicts epsilon.
    """
    source = generator(4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hidden = [nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()]
        network = nn.Sequential(*hidden, nn.Linear(64, 2))

    def score(x: Tensor, t: Tensor) -> Tensor:
        t = t.expand(len(x))
        inputs = torch.cat([x, sde.sigma(t).log()[:, None].to(x) / 4, t[:, None].to(x)], 1)
        return -network(inputs.float()).to(x) / spread(sde.noise_scale(t), x)

    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        x_0 = points[torch.randint(len(points), (BATCH_SIZE,), generator=source)]
        u = torch.rand(BATCH_SIZE, generator=source, dtype=torch.float64)
        t = sde.first_time + (sde.last_time - sde.first_time) * u
        loss = denoising_loss(sde, score, x_0, t, torch.randn(x_0.shape, generator=source))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.requires_grad_(False)
    return score


def denoising_loss(sde: SDE, score: Score, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean of lambda |s(x_t, t) + epsilon / n|^2 with lambda = n^2, that is |n s + epsilon|^2."""
    alpha, n = sde.signal_scale(t)[..., None], sde.noise_scale(t)[..., None]  # (N, 1), or (1,) for one time
    return (n * score(alpha * x_0 + n * noise, t) + noise).square().sum(1).mean()


def exact_score(data: GaussianMixture, sde: SDE) -> Score:
    return lambda x, t: data.at(sde, t).score(x)


def denoiser_of(sde: SDE, score: Score) -> Denoiser:
    """Converts a score s(x, t) into what our samplers expect: the expectation of x_0."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        c_skip, c_out = clean_image_coefficients("score", sde.signal_scale(t), sde.noise_scale(t))
        return c_skip * x + c_out * score(x, t)

    return Denoiser(sde, predict)


def sliced_wasserstein(one: Tensor, other: Tensor, num_directions: int = 64) -> float:
    """Wasserstein-1 distance between the projections of two sets (N, D) of equal size, averaged over directions."""
    directions = random_directions(num_directions, one.shape[1], np.random.default_rng(0))
    return float(projected_distances(one.float().numpy(), other.float().numpy(), directions).mean())


def mode_weight_error(data: GaussianMixture, x: Tensor) -> float:
    """Total variation between the weights of the modes and the shares of samples nearest to each mode."""
    nearest = torch.cdist(x.double(), data.means).argmin(1)
    shares = torch.bincount(nearest, minlength=len(data.means)) / len(x)
    return float((shares - data.weights).abs().sum() / 2)
