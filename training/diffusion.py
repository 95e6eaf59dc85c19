"""The mathematics of training: noise schedule, timesteps, targets, loss weights.

Notation (Ho et al. 2020, arXiv 2006.11239; abar is `alphas_cumprod`):

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon            eq. 4, `scheduler.add_noise`
    snr(t) = abar_t / (1 - abar_t)
    v_t = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x_0            Salimans & Ho 2022, arXiv 2202.00512

The scheduler alone owns betas and abar; everything here reads them from it. Images, noise and losses are float32.
"""

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor


def make_noise_scheduler(
    num_train_timesteps: int,
    beta_schedule: str,
    beta_start: float,
    beta_end: float,
    prediction_type: str,
    rescale_betas_zero_snr: bool,
) -> DDPMScheduler:
    """The forward process of the run. Its posterior variance is the small one, beta-tilde of DDPM eq. 7.

    Sampling starts at the last timestep, the only one that is (nearly) pure noise; but for epsilon prediction it keeps
    DDIM's leading spacing, because there x_0 = (x_t - sqrt(1 - abar_t) epsilon) / sqrt(abar_t) is ill-conditioned.

    Raises:
        ValueError: if in float32 a timestep has no noise, or one before a zero-SNR end has no signal.
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
    alphas_cumprod = scheduler.alphas_cumprod
    with_signal = alphas_cumprod[:-1] if rescale_betas_zero_snr else alphas_cumprod
    if not ((alphas_cumprod < 1).all() and (with_signal > 0).all()):
        raise ValueError(
            f"the {beta_schedule} schedule from --beta_start {beta_start} to --beta_end {beta_end} in --ddpm_num_steps"
            f" {num_train_timesteps} has alphas_cumprod from {alphas_cumprod[0]:.3g} to {alphas_cumprod[-1]:.3g};"
            " it must stay inside (0, 1): change one of the three"
        )
    return scheduler


def make_sampling_scheduler(noise_scheduler: DDPMScheduler, sampler: str) -> DDPMScheduler | DDIMScheduler:
    """A sampler for the same forward process; `sampler` is ddpm or ddim."""
    return {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler].from_config(noise_scheduler.config)


def sample_timesteps(how: str, batch_size: int, num_train_timesteps: int, device: torch.device) -> Tensor:
    """Random timesteps for a batch, each marginally uniform on 0..T-1.

    Args:
        how: `uniform`: independent. `stratified`: one from each of B equal strata with a common random shift
            (Kingma et al. 2021, arXiv 2107.00630, appendix I.1), which lowers the variance of the loss.
            `antithetic`: pairs t and T - 1 - t (Song et al. 2021, arXiv 2010.02502, the authors' code).

    Returns:
        int64 timesteps, shape (B,).
    """
    if how == "uniform":
        return torch.randint(num_train_timesteps, (batch_size,), device=device)
    if how == "stratified":
        strata = torch.arange(batch_size, device=device) / batch_size
        position = (torch.rand((), device=device) + strata) % 1.0
        # float32 rounding may bring the position to 1 or, multiplied, to T
        return (position * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
    half = torch.randint(num_train_timesteps, (batch_size // 2 + 1,), device=device)
    return torch.cat([half, num_train_timesteps - 1 - half])[:batch_size]


def signal_and_noise_scale(scheduler, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t) of DDPM eq. 4, float32, shape (B, 1, 1, 1)."""
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps].view(-1, 1, 1, 1)
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def prediction_target(scheduler, clean_images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network should predict, by the scheduler's `prediction_type`; shape of `clean_images`."""
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean_images
    signal, sigma = signal_and_noise_scale(scheduler, timesteps)
    return signal * noise - sigma * clean_images


def predicted_noise(scheduler, model_output: Tensor, noisy_images: Tensor, timesteps: Tensor) -> Tensor:
    """The epsilon that a model output stands for, whatever its parametrisation; shape of `noisy_images`."""
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return model_output
    signal, sigma = signal_and_noise_scale(scheduler, timesteps)
    if prediction_type == "sample":
        return (noisy_images - signal * model_output) / sigma
    return signal * model_output + sigma * noisy_images


def loss_weight(scheduler, timesteps: Tensor, snr_gamma: float | None) -> Tensor:
    """Weight of each image's squared error, shape (B,).

    Without gamma it is 1: for epsilon the simple loss of DDPM eq. 14. With gamma it is min-SNR-gamma (Hang et al.
    2023, arXiv 2303.09556, eq. 8 and section 3.4): min(snr, gamma) for the squared error of x_0, carried over to the
    predicted quantity by ||epsilon error||^2 = snr ||x_0 error||^2 and ||v error||^2 = (snr + 1) ||x_0 error||^2.
    """
    if snr_gamma is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    signal, sigma = signal_and_noise_scale(scheduler, timesteps)
    snr = (signal / sigma).square().flatten()
    weight = snr.clamp(max=snr_gamma)
    return (
        weight
        / {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[scheduler.config.prediction_type]
    )


def per_image_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image in float32: (B, C, H, W), (B, C, H, W) -> (B,)."""
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


def diffusion_loss(unet, scheduler, clean_images: Tensor, timestep_sampling: str, snr_gamma: float | None) -> Tensor:
    """The training objective on one batch, with noise and timesteps from the global random generator.

    Args:
        unet: called as `unet(noisy_images, timesteps).sample`, under the caller's autocast if it sets one up there.
        clean_images: float32 in [-1, 1], shape (B, 3, H, W).

    Returns:
        scalar float32 loss.
    """
    noise = torch.randn_like(clean_images)
    timesteps = sample_timesteps(
        timestep_sampling, len(clean_images), scheduler.config.num_train_timesteps, clean_images.device
    )
    noisy_images = scheduler.add_noise(clean_images, noise, timesteps)
    model_output = unet(noisy_images, timesteps).sample
    target = prediction_target(scheduler, clean_images, noise, timesteps)
    weight = loss_weight(scheduler, timesteps, snr_gamma)
    return (weight * per_image_mse(model_output, target)).mean()


@torch.no_grad()
def heldout_loss(unet, scheduler, clean_images: Tensor, batch_size: int, seed: int = 0) -> dict[str, float]:
    """Mean squared error of the predicted noise on fixed (image, timestep, noise) triples.

    This is the simple loss of DDPM eq. 14 for every parametrisation, so that runs with other prediction types compare.
    Timesteps are the midpoints of as many equal strata as there are images, in a fixed random order.

    Args:
        clean_images: float32 in [-1, 1], shape (N, 3, H, W).
        seed: of the order and the noise.

    Raises:
        ValueError: for fewer than 4 images, which leave a quarter of the timesteps empty.

    Returns:
        `heldout_loss` over all triples and `heldout_loss_q1` (smallest timesteps) to `heldout_loss_q4`.
    """
    num_images, num_train_timesteps = len(clean_images), scheduler.config.num_train_timesteps
    if num_images < 4:
        raise ValueError(
            f"the held-out loss needs at least 4 images, one for each quarter of the timesteps, not {num_images}"
        )
    generator = torch.Generator().manual_seed(seed)
    strata = torch.randperm(num_images, generator=generator)
    timesteps = ((strata + 0.5) * num_train_timesteps / num_images).long()
    noise = torch.randn(clean_images.shape, generator=generator)
    device = next(unet.parameters()).device
    losses = []
    for batch in torch.arange(num_images).split(batch_size):
        t, epsilon = timesteps[batch].to(device), noise[batch].to(device)
        noisy_images = scheduler.add_noise(clean_images[batch].to(device), epsilon, t)
        model_output = unet(noisy_images, t).sample.float()
        losses.append(per_image_mse(predicted_noise(scheduler, model_output, noisy_images, t), epsilon).cpu())
    losses = torch.cat(losses).double()
    quarter = timesteps * 4 // num_train_timesteps
    result = {"heldout_loss": losses.mean().item()}
    return result | {f"heldout_loss_q{q + 1}": losses[quarter == q].mean().item() for q in range(4)}
