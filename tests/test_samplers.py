"""Every sampler on data whose exact denoiser is known.

The data are "images" of one RGB pixel. If they are a mixture of Gaussians, so is x_t, and E[epsilon | x_t] has a
closed form. With it as the network,

- samplers must draw the mixture, up to an error that shrinks with the number of steps;
- for a single point, they must be exact for any number of steps: at each evaluation, x_t must have the noise level of
  the timestep passed to the network.
"""

import pytest
import torch
from diffusers import DDPMScheduler
from exact_denoiser import ExactDenoiser, Mixture, gaussian, mixture
from scipy.stats import norm, qmc
from tiny_pipeline import quiet
from torch import Tensor

from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import SAMPLERS

STOCHASTIC = ("ddpm", "euler_ancestral", "ddim eta 1")
TRAINED = {  # prediction types with the usual noise schedules
    "epsilon": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "leading"},
    "v_prediction": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
    "sample": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"},
}
NUM_QUASIRANDOM, NUM_RANDOM = 2048, 10000
POINT = gaussian(scale=1e-4)


def make_pipeline(sampler: str, prediction_type: str, data: Mixture) -> CustomUNetPipeline:
    scheduler = DDPMScheduler(prediction_type=prediction_type, **TRAINED[prediction_type])
    network = ExactDenoiser(prediction_type).set_data(data, scheduler.alphas_cumprod.double())
    pipe = quiet(CustomUNetPipeline(network, scheduler))
    pipe.set_sampler(sampler.split()[0])
    return pipe


def quasirandom_noise(num_images: int) -> Tensor:
    """Standard normal noise that fills space evenly, so that a few thousand samples resolve errors of 1e-3."""
    uniform = qmc.Sobol(3, seed=0).random(num_images).clip(1e-6, 1 - 1e-6)
    return torch.tensor(norm.ppf(uniform), dtype=torch.float32).view(-1, 3, 1, 1)


def draw(pipe: CustomUNetPipeline, sampler: str, steps: int) -> Tensor:
    """Samples (N, 3) in [-1, 1]."""
    if sampler in STOCHASTIC:
        start = {"batch_size": NUM_RANDOM, "generator": torch.Generator().manual_seed(0)}
    else:
        start = {"latents": quasirandom_noise(NUM_QUASIRANDOM)}
    eta = 1.0 if sampler == "ddim eta 1" else 0.0
    images = pipe(**start, num_inference_steps=steps, eta=eta, output_type="pt").images
    return images.double().flatten(1) * 2 - 1


def check_mixture(pipe: CustomUNetPipeline, sampler: str, steps: int) -> None:
    """Samples have the mixture's weights, means and covariances, to a tolerance of order 1 / steps."""
    errors = mixture().errors(draw(pipe, sampler, steps))
    slope = 40.0 if sampler in STOCHASTIC else 18.0
    tolerance = torch.tensor([0.8, 1.0, slope]) / steps + torch.tensor([0.01, 0.008, 0.05])
    assert (errors <= tolerance).all(), f"errors {errors.tolist()}, tolerance {tolerance.tolist()}"


@pytest.mark.parametrize("sampler", [*SAMPLERS, "ddim eta 1"])
@pytest.mark.parametrize("prediction_type", TRAINED)
def test_samplers_reproduce_the_mixture(sampler, prediction_type):
    for steps in (25, 200):
        check_mixture(make_pipeline(sampler, prediction_type, mixture()), sampler, steps)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim eta 1", "unipc", "euler"])
def test_step_counts_need_not_divide_the_timesteps(sampler):
    pipe = make_pipeline(sampler, "v_prediction", mixture())
    check_mixture(pipe, sampler, 400)  # DDIMScheduler.step would treat each step as 2 timesteps instead of 2.5


def check_noise_levels(pipe: CustomUNetPipeline, sampler: str, steps: int) -> None:
    """The network's input is signal x mean + noise scale x noise, with constant or with fresh standard noise.

    The samples equal the mean.
    """
    result = draw(pipe, sampler, steps)
    # float32 rounding errors grow where sigma is in the thousands, as at the end of the cosine schedule
    tolerance = 6e-3 if pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2" else 5e-4
    noises = [(x - signal * POINT.means) / scale for x, signal, scale in pipe.unet.seen]
    for noise, (_, _, scale) in zip(noises, pipe.unet.seen, strict=True):
        if sampler in STOCHASTIC:
            covariance_error = (torch.cov(noise.T) - torch.eye(3)).abs().max().item()
            assert covariance_error < 0.06, f"noise at the scale {scale}: {covariance_error}"
        else:
            noise_error = scale * (noise - noises[0]).abs().max().item()
            assert noise_error < tolerance, f"noise at the scale {scale}: {noise_error}"
    left = (result - POINT.means).abs().max().item()
    assert left < (0.06 if sampler == "deis" else tolerance), f"left: {left}"  # DEIS ends at the first timestep


@pytest.mark.parametrize("sampler", [*SAMPLERS, "ddim eta 1"])
@pytest.mark.parametrize("prediction_type", TRAINED)
def test_noise_level_of_the_input_matches_the_timestep(sampler, prediction_type):
    for steps in (5, 40):
        check_noise_levels(make_pipeline(sampler, prediction_type, POINT), sampler, steps)
