"""The likelihood of images under a model, in bits per dimension (a dimension is one of the C x H x W pixel values).

Two likelihoods for two interpretations of the same network; both are code lengths of 8-bit images, so lower is better:

    variational_bound   of the stochastic sampler, term by term (DDPM: Ho et al. 2020, arXiv 2006.11239)
    ode_likelihood      of the probability-flow ODE (Song et al. 2021, arXiv 2011.13456), for DDPM and SDE models

Notation: abar is `alphas_cumprod`, D = C x H x W, and with alpha = sqrt(abar), n = sqrt(1 - abar), sigma = n / alpha

    x_t = alpha x_0 + n epsilon                              DDPM eq. 4

Timesteps start at 0 as in diffusers: timestep t here is t + 1 in the paper, and abar before timestep 0 is 1. An SDE
model has its own alpha(t) and n(t), see training/sde.py.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from common import InputError
from pipelines.continuous import denoiser
from pipelines.custom_unet_pipeline import clean_images_and_noise
from training.sde import Denoiser

VARIANCES = ("fixed_small", "fixed_large")  # names from diffusers' DDPMScheduler
BIN_WIDTH = 2 / 255  # distance between pixel values in the model's range [-1, 1]


def to_float64_range(images: Tensor) -> Tensor:
    """`to_model_range` in float64, so that the bins of adjacent pixel values meet exactly."""
    return BIN_WIDTH * images.double() - 1


def standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of independent values (N,); None for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def to_bits_per_dim(nats: np.ndarray, num_dims: int) -> np.ndarray:
    return nats / (num_dims * math.log(2))


# ---- The variational bound


class VariationalBound(NamedTuple):
    """Upper bound on the code length of each image; bits/dim, float64."""

    bits_per_dim: np.ndarray  # the bound L_0 + L_1 + ... + L_T (DDPM eq. 5), (N,)
    decoder: np.ndarray  # L_0, the reconstruction from the paper's x_1, (N,)
    prior: np.ndarray  # L_T, the information about the image that remains in x_T, (N,)
    terms: np.ndarray  # L_0 to L_{T-1}, averaged over the images, (T,); NaN where no image was evaluated


def posterior_of(alphas_cumprod: Tensor, variance: str) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7, and the reverse process at every timestep; float64, shape (T,).

    Returns the weight of x_0 in the posterior mean (the model's mean is the same with the predicted x_0); the
    posterior variance beta-tilde_t, 0 at timestep 0; and sigma_t^2 of the reverse process, beta-tilde_t or beta_t by
    `variance`, one of `VARIANCES` (DDPM section 3.2), but beta-tilde_1 at timestep 0, as in the authors' code.
    """
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    beta = 1 - alphas_cumprod / previous
    posterior_variance = (1 - previous) / (1 - alphas_cumprod) * beta
    model_variance = {"fixed_small": posterior_variance, "fixed_large": beta}[variance].clone()
    model_variance[0] = posterior_variance[1]
    return previous.sqrt() * beta / (1 - alphas_cumprod), posterior_variance, model_variance


def discrete_decoder(images: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """Log-probability (nats) of each pixel value of uint8 images under a Gaussian cut into 256 bins, DDPM eq. 13.

    The bins are centred on the pixel values in the model's range; the outermost ones extend to infinity. Mean and
    standard deviation are float64 and broadcastable with the images.
    """
    centre = to_float64_range(images)
    lower = torch.where(images == 0, -math.inf, (centre - mean - BIN_WIDTH / 2) / std)
    upper = torch.where(images == 255, math.inf, (centre - mean + BIN_WIDTH / 2) / std)
    # Phi keeps its relative precision in the lower tail, so intervals in the upper tail are mirrored
    lower, upper = torch.where(lower > 0, -upper, lower), torch.where(lower > 0, -lower, upper)
    log_upper = torch.special.log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper))


def prior_term(clean_images: Tensor, abar: Tensor) -> Tensor:
    """L_T in nats, shape (N,): KL of q(x_T | x_0) = N(sqrt(abar_T) x_0, (1 - abar_T) I) from N(0, I), DDPM eq. 5."""
    return (abar * (clean_images.square() - 1) - torch.log1p(-abar)).sum(dim=(1, 2, 3)) / 2


@torch.no_grad()
def variational_bound(
    unet,
    scheduler,
    images: Tensor,
    *,
    num_evaluations: int | None = None,
    variance: str = "fixed_small",
    batch_size: int = 64,
) -> VariationalBound:
    """The variational bound of DDPM, eq. 5, in bits/dim.

    For each image, the sum over timesteps is computed in full, with one noise sample per timestep, or estimated
    without bias from a few timesteps, which always include that of L_0.

    Args:
        unet: in evaluation mode.
        scheduler: the noise schedule that it was trained with; only `alphas_cumprod` and `prediction_type` are used.
        images: uint8, shape (N, C, H, W).
        num_evaluations: network evaluations per image; None for all T timesteps.
        variance: of the reverse process, `fixed_small` (beta-tilde) or `fixed_large` (beta).

    Noise and timesteps are fixed and do not depend on the batch size. Raises InputError if the network's output is not
    finite, or it predicts epsilon but the schedule ends at zero signal, where epsilon does not determine x_0.
    """
    alphas_cumprod = scheduler.alphas_cumprod.cpu().double()
    num_images, num_timesteps, num_dims = len(images), len(alphas_cumprod), images[0].numel()
    if scheduler.config.prediction_type == "epsilon" and alphas_cumprod[-1] == 0:
        raise InputError("the schedule ends at zero signal, where the bound of a network for epsilon is infinite")
    rng = np.random.default_rng(0)  # torch's could repeat the noise that generated the images
    timesteps, weights = draw_timesteps(alphas_cumprod, num_images, num_evaluations, rng)  # (N, K) each
    posterior = posterior_of(alphas_cumprod, variance)
    owners = torch.arange(num_images).repeat_interleave(timesteps.shape[1])
    nats = []
    for pairs in torch.arange(timesteps.numel()).split(batch_size):
        noise = torch.from_numpy(rng.standard_normal((len(pairs), *images.shape[1:])))
        t = timesteps.flatten()[pairs]
        nats.append(_terms(unet, scheduler, posterior, images[owners[pairs]].cpu(), noise, t))
    nats = torch.cat(nats).view_as(weights)

    visits = np.bincount(timesteps.flatten(), minlength=num_timesteps)
    sums = np.bincount(timesteps.flatten(), nats.flatten().numpy(), minlength=num_timesteps)
    prior = prior_term(to_float64_range(images.cpu()), alphas_cumprod[-1])
    return VariationalBound(
        bits_per_dim=to_bits_per_dim(((weights * nats).sum(1) + prior).numpy(), num_dims),
        decoder=to_bits_per_dim(nats[:, 0].numpy(), num_dims),
        prior=to_bits_per_dim(prior.numpy(), num_dims),
        terms=to_bits_per_dim(np.divide(sums, visits, np.full(num_timesteps, np.nan), where=visits > 0), num_dims),
    )


def draw_timesteps(
    alphas_cumprod: Tensor, num_images: int, num_evaluations: int | None, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draws the timesteps at which each image is evaluated, and the weights of their terms in the sum.

    If `num_evaluations` is None, these are all T timesteps with weight 1. Otherwise they are timestep 0 and K - 1
    others by stratified importance sampling: one from each of K - 1 equal parts of the mass of a proposal p(t), with
    the weight 1 / ((K - 1) p(t)), which is unbiased for any p. For white data of unit variance, L_t is proportional
    to the decrease of log(1 + snr); p mixes it with a uniform one, so that no weight exceeds 2 (T - 1) / (K - 1).

    Returns int64 and float64, shape (N, K); column 0 is timestep 0.
    """
    num_timesteps = len(alphas_cumprod)
    if num_evaluations is None:
        timesteps = torch.arange(num_timesteps).repeat(num_images, 1)
        return timesteps, torch.ones(timesteps.shape, dtype=torch.float64)
    decrease = torch.log1p(-alphas_cumprod).diff()
    proposal = decrease / decrease.sum() / 2 + 1 / (2 * len(decrease))  # (T - 1,), of timesteps 1 to T - 1
    num_strata = num_evaluations - 1
    jitter = torch.from_numpy(rng.random((num_images, num_strata)))
    position = (torch.arange(num_strata) + jitter) / num_strata
    index = torch.searchsorted(proposal.cumsum(0), position, right=True).clamp(max=len(proposal) - 1)
    timesteps = torch.cat([torch.zeros(num_images, 1, dtype=torch.int64), index + 1], dim=1)
    weights = torch.cat([torch.ones(num_images, 1, dtype=torch.float64), 1 / (num_strata * proposal[index])], dim=1)
    return timesteps, weights


def _terms(unet, scheduler, posterior: tuple[Tensor, ...], images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The term of each image (B, C, H, W) at its timestep, nats, shape (B,): L_0 at timestep 0, otherwise L_t.

    L_t is the KL divergence of the posterior N(mu-tilde, beta-tilde I) from the model's Gaussian N(mu, s^2 I):
    (D (log(s^2 / beta-tilde) - 1 + beta-tilde / s^2) + ||mu-tilde - mu||^2 / s^2) / 2, eq. 8 with its constant.
    """
    clean_images = to_float64_range(images)
    abar = scheduler.alphas_cumprod.cpu().double()[timesteps].view(-1, 1, 1, 1)
    signal, noise_scale = abar.sqrt(), (1 - abar).sqrt()
    noisy_images = signal * clean_images + noise_scale * noise
    parameter = next(unet.parameters())
    model_output = unet(noisy_images.to(parameter), timesteps.to(parameter.device)).sample.cpu().double()
    if not model_output.isfinite().all():
        raise InputError("the network's output is not finite; check its weights")
    kind = scheduler.config.prediction_type
    predicted, _ = clean_images_and_noise(kind, model_output, noisy_images, signal, noise_scale)
    clean_weight, variance, s2 = (values[timesteps] for values in posterior)
    ratio = variance / s2
    squared_error = (clean_images - predicted).square().sum(dim=(1, 2, 3))
    mean_term = clean_weight.square() * squared_error / s2
    terms = (clean_images[0].numel() * (ratio - 1 - ratio.log()) + mean_term) / 2  # infinite at timestep 0
    first = timesteps == 0
    std = s2[first].sqrt().view(-1, 1, 1, 1)
    terms[first] = -discrete_decoder(images[first], predicted[first], std).sum(dim=(1, 2, 3))
    return terms


# ---- The probability-flow ODE


def ode_likelihood(
    unet, scheduler, images: Tensor, *, tolerance: float = 1e-3, batch_size: int = 16
) -> tuple[np.ndarray, float]:
    """The code length under the probability-flow ODE in bits/dim, with uniform dequantisation.

    A pixel value k stands for the bin of width w around it: x = to_model_range(k) + w (u - 1/2), u uniform in [0, 1).
    The model's probability of an image is the integral of its density p over D bins,

        P = w^D E_u p(x),   hence   -log2 P / D <= -E_u log2 p(x) / D - log2 w     (Jensen)

    and we estimate the right-hand side. With w = 2/255 its constant is log2(255/2) = 6.994; papers that spread 256
    bins over [-1, 1] use 7. Each image has one draw of u and of a probe for `log_density`, a vector of random signs
    (Skilling-Hutchinson, arXiv 2011.13456 eq. 40), which has a smaller variance than Gaussian noise. The draws are
    fixed, but within the tolerance the result depends on the batch size, because the images of a batch share the
    solver's steps.

    Args:
        unet: in evaluation mode; it must accept fractional timesteps.
        scheduler: the DDPM noise schedule or `SDEScheduler` that it was trained with.
        images: uint8, shape (N, C, H, W).
        tolerance: of the solver, see `log_density`.

    Returns the code length of each image, float64 (N,), and the number of network evaluations, each with a
    vector-Jacobian product, averaged over the images.
    """
    rng, device, denoise = np.random.default_rng(0), next(unet.parameters()).device, denoiser(unet, scheduler)
    nats, evaluations = [], []
    for batch in images.cpu().split(batch_size):
        draws = [(rng.random(image.shape), rng.choice([-1.0, 1.0], image.shape)) for image in batch]
        uniform, probes = (torch.from_numpy(np.stack(values)) for values in zip(*draws, strict=True))
        points = to_float64_range(batch) + BIN_WIDTH * (uniform - 0.5)
        log_densities, num_evaluations = log_density(denoise, points, probes[None].to(device), tolerance)
        nats.append(-log_densities)
        evaluations += [num_evaluations] * len(batch)
    bits_per_dim = to_bits_per_dim(torch.cat(nats).numpy(), images[0].numel()) - math.log2(BIN_WIDTH)
    return bits_per_dim, float(np.mean(evaluations))


def log_density(denoise: Denoiser, points: Tensor, probes: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """Log-density (nats) of points in the model's range, by the instantaneous change of variables.

    With y = x_t / alpha = x_0 + sigma epsilon and the noise level sigma as time, the probability-flow ODE (arXiv
    2011.13456, eq. 13) is the same for every linear SDE: dy/dsigma = epsilon(y, sigma), where the network predicts
    epsilon. It is solved in s = log sigma for x = y / sqrt(1 + sigma^2), which is x_t of a VP SDE and has unit size
    throughout; with n = sigma / sqrt(1 + sigma^2)

        dx/ds = n (epsilon(x, sigma) - n x)        d log p(x)/ds = -div(dx/ds) = -n (div epsilon - n D)     eq. 39

    up to sigma at the SDE's last time, where x_t is assumed Gaussian with the standard deviation that samplers start
    from. Between the timesteps of a DDPM network, sigma is interpolated linearly.

    It starts at sigma_0, the lowest noise level of training (`SDE.noise_levels`: 0.006 for the cosine
    schedule with 1,000 timesteps, 0.010 for the linear one, 0.001 for vp and 0.02 for ve; adjacent pixel values are
    0.008 apart), so the result is the density of x_0 + sigma_0 epsilon: a valid code of a model whose images keep that
    noise, about log2(1 + sigma_0^2 / variance) / 2 bits/dim longer than at sigma 0.

    Args:
        points: float64, shape (B, ...), on the CPU; x_0 + sigma_0 epsilon, not scaled by alpha.
        probes: vectors e whose e^T J e sum to the trace of a matrix J, in expectation or (for the D unit vectors)
            exactly; float64, shape (K, B, ...), on the network's device.
        tolerance: largest local error per step of the solver (Runge-Kutta 5(4)): the root mean square error over all
            pixel values of the batch and of log p / D. For a Gaussian with the spectrum of 32x32 images, 1e-3 takes 50
            network evaluations, with an error of up to 0.002 bits/dim; 1e-5 takes 120, with an error of 0.0001.

    Returns float64 log-densities (B,), and the number of network evaluations. Raises InputError if the network's
    output is not finite or the ODE cannot be solved.
    """
    sde, (first_sigma, last_sigma) = denoise.sde, denoise.sde.noise_levels
    shape, num_dims = points.shape, points[0].numel()

    def flow(log_sigma: float, state: np.ndarray) -> np.ndarray:
        sigma = math.exp(log_sigma)
        noise_scale = sigma / math.sqrt(1 + sigma**2)
        x = torch.from_numpy(state[: points.numel()]).view(shape).to(probes.device)
        noise, divergence = _noise_and_divergence(denoise, x, sigma, probes)
        dx = noise_scale * (noise - noise_scale * x)
        dlogp = -noise_scale * (divergence - noise_scale * num_dims)
        return torch.cat([dx.flatten(), dlogp / math.sqrt(num_dims)]).cpu().numpy()

    first_scale, last_scale = (1 / math.sqrt(1 + sigma**2) for sigma in (first_sigma, last_sigma))
    start = torch.cat([first_scale * points.flatten(), torch.zeros(len(points), dtype=torch.float64)])
    span = (math.log(first_sigma), math.log(last_sigma))
    # absolute errors only, since x has unit size throughout
    solution = solve_ivp(flow, span, start.numpy(), t_eval=span[1:], atol=tolerance, rtol=1e-13)
    if not solution.success:
        raise InputError(f"the ODE could not be solved with --ode_tolerance {tolerance}: {solution.message}")
    end = torch.from_numpy(solution.y[:, -1].copy())
    last, change = end[: points.numel()].view(shape), end[points.numel() :] * math.sqrt(num_dims)
    last_signal = float(sde.signal_scale(torch.tensor(sde.last_time, dtype=torch.float64)))
    std = sde.prior_std * last_scale / last_signal  # of x; 1 for VP
    log_prior = -((last / std).square().flatten(1).sum(1) + num_dims * math.log(2 * math.pi * std**2)) / 2
    # log_prior - change is the log-density of x at sigma_0, and x = scale point: p(point) = p(x) scale^D
    return log_prior - change + num_dims * math.log(first_scale), solution.nfev


def _noise_and_divergence(denoise: Denoiser, x: Tensor, sigma: float, probes: Tensor) -> tuple[Tensor, Tensor]:
    """epsilon (B, ...) at x = y / sqrt(1 + sigma^2), and its divergence in x (B,), estimated with the probes."""
    divergence = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        y = math.sqrt(1 + sigma**2) * x
        noise = (y - denoise.of_noise_level(y, sigma)) / sigma
        if not noise.isfinite().all():
            raise InputError(f"the network's output is not finite (sigma {sigma:.4g}); check its weights")
        for probe in probes:
            (product,) = torch.autograd.grad(noise, x, probe, retain_graph=len(probes) > 1)
            divergence += (product * probe).flatten(1).sum(1)
    return noise.detach(), divergence
