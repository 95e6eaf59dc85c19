"""Held-out errors on Gaussian data, whose minimal errors are known."""

import math

import numpy as np
import pytest
import torch
from exact_denoiser import ExactDenoiser
from exact_gaussian import CORRELATED, ExactGaussian, draw_images, exact_network, make_scheduler
from exact_sde import exact_sde_network
from tiny_pipeline import tiny_pipeline

from common import InputError
from eval.heldout import SIGMAS, clean_image_errors, midpoint_timesteps, noise_errors
from training.data import to_model_range
from training.sde import PREDICTION_TYPES as OBJECTIVES
from training.sde import SDEScheduler

VARIANCES = torch.linalg.eigvalsh(CORRELATED.covariances[0]).numpy()
ROUNDING = (1 / 255) ** 2 / 3  # pixel values are rounded, which adds this to their variance
MODELS = {"ddpm": ("epsilon", "v_prediction")} | OBJECTIVES  # and their prediction types


def random_images() -> torch.Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def deviations(errors: np.ndarray, minimal: np.ndarray, rounding: np.ndarray | float = ROUNDING) -> np.ndarray:
    """Distance of the mean error over the images from the minimal one, in standard errors."""
    standard_error = errors.std(axis=1, ddof=1) / math.sqrt(errors.shape[1])
    return np.abs(errors.mean(axis=1) - minimal) / (standard_error + rounding)


# ---- By timestep


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_exact_denoiser_attains_the_minimal_errors_by_timestep(prediction_type):
    """The mean squared error of x_0 is its posterior variance given x_t; that of epsilon is snr times as large."""
    scheduler, images = make_scheduler(prediction_type), to_model_range(draw_images(CORRELATED, 4000))
    timesteps = midpoint_timesteps(scheduler)
    assert timesteps == list(range(25, 1000, 50))
    abar = scheduler.alphas_cumprod.double().numpy()[timesteps]
    minimal = abar * (VARIANCES / (abar[:, None] * VARIANCES + 1 - abar[:, None])).mean(1)
    rounding = abar / (1 - abar) * ROUNDING
    network = exact_network(ExactGaussian, CORRELATED, scheduler)
    errors = noise_errors(network, scheduler, images, timesteps, batch_size=1000)
    assert deviations(errors, minimal, rounding).max() < 4


@pytest.mark.parametrize("levels", [[125, 375, 875], [0.1, 1.0, 10.0]], ids=["timesteps", "noise levels"])
def test_noise_is_fixed_per_image_and_level(levels):
    """It does not depend on the other levels, the batch size or later images."""
    network, images = tiny_pipeline().unet.eval(), random_images()

    def errors_of(images, levels, **settings):
        if isinstance(levels[0], int):
            return noise_errors(network, make_scheduler(), images, levels, **settings)
        return clean_image_errors(network, SDEScheduler(), images, sigmas=levels, **settings)

    errors = errors_of(images, levels)
    again = errors_of(images[:4], levels[1:], batch_size=3)
    np.testing.assert_allclose(again, errors[1:, :4], rtol=1e-4)


def test_error_is_zero_without_signal():
    scheduler = make_scheduler(rescale_betas_zero_snr=True)
    errors = noise_errors(tiny_pipeline().unet.eval(), scheduler, random_images(), [999])
    assert errors.mean() == pytest.approx(0, abs=1e-10)  # x_T is the noise


def test_nan_weights_raise_an_input_error():
    network = tiny_pipeline().unet.eval()
    network.conv_out.weight.data[0] = math.nan
    with pytest.raises(InputError, match="output is not finite"):
        noise_errors(network, make_scheduler(), random_images(), [25])


# ---- By noise level


def exact_errors(model: str, prediction_type: str, num_images: int) -> np.ndarray:
    images = to_model_range(draw_images(CORRELATED, num_images))
    if model == "ddpm":
        scheduler = make_scheduler(prediction_type)
        network = exact_network(ExactDenoiser, CORRELATED, scheduler)
    else:
        scheduler = SDEScheduler(objective=model, prediction_type=prediction_type)
        network = exact_sde_network(CORRELATED, scheduler)
    return clean_image_errors(network, scheduler, images, batch_size=1000)


@pytest.mark.parametrize("model", MODELS)
def test_exact_denoiser_attains_the_minimal_errors_by_noise_level(model):
    sigmas = np.array(SIGMAS)[:, None]
    minimal = (VARIANCES * sigmas**2 / (VARIANCES + sigmas**2)).mean(1)
    assert deviations(exact_errors(model, MODELS[model][0], 2000), minimal).max() < 4


def test_all_models_are_evaluated_on_the_same_noise():
    errors = [exact_errors(model, kind, 40) for model, kinds in MODELS.items() for kind in kinds]
    assert len(errors) == 11
    for other in errors[1:]:
        np.testing.assert_allclose(other, errors[0], rtol=2e-3, atol=1e-6)
