"""The training loss and the held-out loss of all objectives, with DDPM's noise schedule, targets and loss weights.

The scheduler defines the noise process: a diffusers scheduler in discrete timesteps, or an `SDEScheduler` in
continuous time. For both, a batch of images, noise and positions u in [0, 1) becomes a `Regression`: the network's
inputs, targets and weights. A position is a quantile of the time distribution; DDPM's timestep is floor(u T).

Notation (Ho et al. 2020, arXiv 2006.11239; abar is `alphas_cumprod`):

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon            eq. 4, `scheduler.add_noise`
    snr(t) = abar_t / (1 - abar_t)
    v_t = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x_0            Salimans & Ho 2022, arXiv 2202.00512

The scheduler alone owns betas and abar; everything here reads them from it. Images, noise and losses are float32;
the times and coefficients of an SDE are float64 and on the CPU.
"""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from training.sde import SDEScheduler, spread


def make_noise_scheduler(
    num_train_timesteps: int,
    beta_schedule: str,
    beta_start: float,
    beta_end: float,
    prediction_type: str,
    rescale_betas_zero_snr: bool,
) -> DDPMScheduler:
    """The forward process of the run. Its posterior variance is the smaller choice, beta-tilde of DDPM eq. 7.

    Sampling starts at the last timestep, the only one that is (nearly) pure noise. Epsilon prediction keeps DDIM's
    leading spacing instead, because x_0 = (x_t - sqrt(1 - abar_t) epsilon) / sqrt(abar_t) is ill-conditioned there.

    Raises:
        ValueError: if in float32 a timestep has no noise, or a timestep other than a zero-SNR last one has no signal.
    """
    scheduler = DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_schedule=beta_schedule,
        beta_start=beta_start,
        beta_end=beta_end,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=rescale_betas_zero_snr,
        timestep_spacing="leading" if prediction_type == "epsilon" else "trailing",
    )
    abar = scheduler.alphas_cumprod
    with_signal = abar[:-1] if rescale_betas_zero_snr else abar
    if not ((abar < 1).all() and (with_signal > 0).all()):
        raise ValueError(
            f"the {beta_schedule} schedule has alphas_cumprod from {abar[0]:.3g} to {abar[-1]:.3g}; they must lie"
            " inside (0, 1): change --beta_start, --beta_end or --ddpm_num_steps"
        )
    return scheduler


def sample_positions(how: str, batch_size: int) -> Tensor:
    """Random positions in [0, 1) for a batch, each marginally uniform; float64 (B,) on the CPU.

    Args:
        how: `uniform`: independent. `stratified`: one from each of B equal strata, with a shared random shift
            (Kingma et al. 2021, arXiv 2107.00630, appendix I.1), which lowers the variance of the loss.
            `antithetic`: pairs u and 1 - u (DDPM's t and T - 1 - t; authors' code of Song et al. 2021, arXiv
            2010.02502).
    """
    if how == "stratified":
        return (_uniform(1) + torch.arange(batch_size) / batch_size) % 1.0
    if how == "antithetic":
        half = _uniform((batch_size + 1) // 2)
        return torch.cat([half, 1 - half])[:batch_size]
    return _uniform(batch_size)


def _uniform(count: int) -> Tensor:
    """Random midpoints of 2^24 equal intervals: never 0, symmetric, and never on a timestep boundary."""
    return torch.rand(count).double() + 2**-25


def per_image_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per image in float32: (B, C, H, W), (B, C, H, W) -> (B,)."""
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class Regression:
    """The regression task of one batch; all tensors are float32 except timesteps."""

    inputs: Tensor  # network input, (B, C, H, W)
    times: Tensor  # time input of the network, (B,): timesteps, or c_noise
    target: Tensor  # (B, C, H, W)
    loss_weight: Tensor  # weight of each image's squared error in the loss, (B,)
    noise_weight: Tensor  # squared error of epsilon / squared error of the prediction, (B,)


def ddpm_regression(
    scheduler: DDPMScheduler,
    clean_images: Tensor,
    noise: Tensor,
    positions: Tensor,
    snr_gamma: float | None = None,
    snr_weighting: str = "min",
) -> Regression:
    """Target and weight of a DDPM model, according to the scheduler's `prediction_type`.

    Without `snr_gamma` every weight is 1, which for epsilon is the simple loss of DDPM eq. 14. With it, the squared
    error of x_0 is weighted; ||epsilon error||^2 = snr ||x_0 error||^2 and ||v error||^2 = (snr + 1) ||x_0 error||^2
    convert its weight into the weight of the prediction's error.

    Args:
        positions: quantiles of the timesteps, float64 (B,), in [0, 1).
        snr_weighting: the weight of x_0. `min`: min(snr, gamma), min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556,
            eq. 8 and section 3.4). `soft_min`: snr gamma / (snr + gamma), which has no kink (soft-min-SNR, Crowson
            et al. 2024, arXiv 2401.11605).
    """
    timesteps = (positions * scheduler.config.num_train_timesteps).long().to(clean_images.device)
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    signal, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    snr = (signal / sigma).square().flatten()  # (B,)
    if scheduler.config.prediction_type == "epsilon":
        target, error_ratio, noise_weight = noise, snr, torch.ones_like(snr)
    elif scheduler.config.prediction_type == "sample":
        target, error_ratio, noise_weight = clean_images, torch.ones_like(snr), snr
    else:
        target, error_ratio, noise_weight = signal * noise - sigma * clean_images, snr + 1, signal.square().flatten()
    if snr_gamma is None:
        weight = torch.ones_like(snr)
    elif snr_weighting == "min":
        weight = snr.clamp(max=snr_gamma) / error_ratio
    else:
        weight = snr * (snr_gamma / (snr + snr_gamma)) / error_ratio
    return Regression(scheduler.add_noise(clean_images, noise, timesteps), timesteps, target, weight, noise_weight)


def score_regression(
    scheduler: SDEScheduler, clean_images: Tensor, noise: Tensor, positions: Tensor, likelihood_weighting: bool = False
) -> Regression:
    """Target and weight of an SDE model: denoising score matching (Song et al. 2021, arXiv 2011.13456, eq. 7).

    The network F learns (x_0 - c_skip x) / c_out from c_in x at the time c_noise (Karras et al. 2022, arXiv
    2206.00364, eq. 7 and 8). With x = alpha x_0 + n epsilon the target is
    (1 - c_skip alpha) / c_out x_0 - c_skip n / c_out epsilon. In this form the cancellation happens between the
    float64 coefficients rather than between float32 images.

    Args:
        positions: quantiles of the time distribution, float64 (B,), in [0, 1).
        likelihood_weighting: weight the squared error of the score by lambda(t) = g^2, for which the loss bounds the
            likelihood (Song et al. 2021, arXiv 2101.09258, theorem 1), instead of n^2, the paper's choice. No effect
            on edm and flow, which weight every error of F by 1 (Karras et al., section 5; arXiv 2209.03003, eq. 1).
    """
    times = scheduler.times(positions)
    alpha, n = scheduler.sde.signal_scale(times), scheduler.sde.noise_scale(times)
    c_skip, c_out, c_in, c_noise = scheduler.preconditioning(times)
    clean_share, noise_share = (1 - c_skip * alpha) / c_out, c_skip * n / c_out
    noise_weight = (alpha * c_out / n).square()  # epsilon error = -alpha c_out / n (error of F)
    if scheduler.config.objective in ("edm", "flow"):
        loss_weight = torch.ones_like(times)
    elif likelihood_weighting:
        loss_weight = noise_weight * (scheduler.sde.diffusion(times) / n).square()  # score error = -epsilon error / n
    else:
        loss_weight = noise_weight
    return Regression(
        inputs=spread(c_in, noise) * scheduler.add_noise(clean_images, noise, times),
        times=c_noise.to(noise),
        target=spread(clean_share, noise) * clean_images - spread(noise_share, noise) * noise,
        loss_weight=loss_weight.to(noise),
        noise_weight=noise_weight.to(noise),
    )


def drop_labels(class_labels: Tensor, null_class: int, probability: float) -> Tensor:
    """Replaces each label (B,) by the null class with this probability, using the global random generator.

    One network then learns the conditional and the unconditional model (Ho & Salimans 2022, arXiv 2207.12598, alg. 1).
    """
    dropped = torch.rand(class_labels.shape, device=class_labels.device) < probability
    return class_labels.masked_fill(dropped, null_class)


def diffusion_loss(
    unet,
    scheduler,
    clean_images: Tensor,
    timestep_sampling: str,
    snr_gamma: float | None = None,
    snr_weighting: str = "min",
    likelihood_weighting: bool = False,
    class_labels: Tensor | None = None,
) -> Tensor:
    """The training objective on one batch, a float32 scalar; noise and times come from the global random generator.

    Args:
        unet: called as `unet(inputs, times, class_labels).sample`, under the caller's autocast, if any.
        scheduler: a diffusers scheduler or an `SDEScheduler`.
        clean_images: float32 in [-1, 1], shape (B, C, H, W).
        snr_gamma, snr_weighting: see `ddpm_regression`.
        likelihood_weighting: see `score_regression`.
        class_labels: int64 (B,), for a class-conditional network.
    """
    noise = torch.randn_like(clean_images)
    positions = sample_positions(timestep_sampling, len(clean_images))
    if isinstance(scheduler, SDEScheduler):
        task = score_regression(scheduler, clean_images, noise, positions, likelihood_weighting)
    else:
        task = ddpm_regression(scheduler, clean_images, noise, positions, snr_gamma, snr_weighting)
    model_output = unet(task.inputs, task.times, class_labels).sample
    return (task.loss_weight * per_image_mse(model_output, task.target)).mean()


@torch.no_grad()
def heldout_loss(
    unet, scheduler, clean_images: Tensor, batch_size: int, class_labels: Tensor | None = None
) -> dict[str, float]:
    """Mean squared error of the predicted noise on fixed (image, time, noise) triples.

    This is the simple loss of DDPM eq. 14 for every parametrisation, including SDE models, so runs with different
    prediction types are comparable; runs with different time distributions are not. The N times are the midpoints of
    N equal strata, in a fixed random order.

    Args:
        clean_images: float32 in [-1, 1], shape (N, C, H, W); N is at least 4, one for each quarter of the times.
        class_labels: int64 (N,), for a class-conditional network.

    Returns:
        `heldout_loss` over all triples, and `heldout_loss_q1` (smallest times) to `heldout_loss_q4` by quarter.
    """
    num_images = len(clean_images)
    generator = torch.Generator().manual_seed(0)
    positions = (torch.randperm(num_images, generator=generator) + 0.5).double() / num_images
    noise = torch.randn(clean_images.shape, generator=generator)
    device = next(unet.parameters()).device
    regression = score_regression if isinstance(scheduler, SDEScheduler) else ddpm_regression
    losses = []
    for batch in torch.arange(num_images).split(batch_size):
        task = regression(scheduler, clean_images[batch].to(device), noise[batch].to(device), positions[batch])
        labels = None if class_labels is None else class_labels[batch].to(device)
        model_output = unet(task.inputs, task.times, labels).sample
        losses.append((task.noise_weight * per_image_mse(model_output, task.target)).cpu())
    losses = torch.cat(losses).double()
    quarter = (4 * positions).long()
    result = {"heldout_loss": losses.mean().item()}
    return result | {f"heldout_loss_q{q + 1}": losses[quarter == q].mean().item() for q in range(4)}
