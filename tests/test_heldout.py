"""Held-out errors on Gaussian data, whose minimal errors are known."""

import math

import numpy as np
import pytest
import torch
from exact_denoiser import ExactDenoiser
from exact_gaussian import CORRELATED, draw_images, exact_network, make_scheduler
from exact_sde import exact_sde_network
from tiny_pipeline import tiny_pipeline

from common import InputError
from eval.heldout import SIGMAS, clean_image_errors, midpoint_timesteps
from training.data import to_model_range
from training.sde import PREDICTION_TYPES as OBJECTIVES
from training.sde import SDEScheduler

VARIANCES = torch.linalg.eigvalsh(CORRELATED.covariances[0]).numpy()
ROUNDING = (1 / 255) ** 2 / 3  # pixel values are rounded, which adds this to their variance
MODELS = {"ddpm": ("epsilon", "sample", "v_prediction")} | OBJECTIVES  # and their prediction types


def random_images() -> torch.Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def deviations(errors: np.ndarray, minimal: np.ndarray) -> np.ndarray:
    """Distance of the mean error over the images from the minimal one, in standard errors."""
    standard_error = errors.std(axis=1, ddof=1) / math.sqrt(errors.shape[1])
    return np.abs(errors.mean(axis=1) - minimal) / (standard_error + ROUNDING)


def test_timesteps_are_the_midpoints_of_strata_at_their_noise_levels():
    timesteps, sigmas = midpoint_timesteps(make_scheduler())
    assert timesteps == list(range(25, 1000, 50))
    abar = make_scheduler().alphas_cumprod.double()[timesteps]
    np.testing.assert_allclose(1 / (1 + np.square(sigmas)), abar, rtol=1e-9)


def test_noise_is_fixed_per_image_and_level():
    """It does not depend on the other levels, the batch size or later images."""
    network, images, levels = tiny_pipeline().unet.eval(), random_images(), [0.1, 1.0, 10.0]
    errors = clean_image_errors(network, SDEScheduler(), images, levels)
    again = clean_image_errors(network, SDEScheduler(), images[:4], levels[1:], batch_size=3)
    np.testing.assert_allclose(again, errors[1:, :4], rtol=1e-4)


def test_nan_weights_raise_an_input_error():
    network = tiny_pipeline().unet.eval()
    network.conv_out.weight.data[0] = math.nan
    with pytest.raises(InputError, match="output is not finite"):
        clean_image_errors(network, make_scheduler(), random_images(), [1.0])


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
    assert len(errors) == 12
    for other in errors[1:]:
        np.testing.assert_allclose(other, errors[0], rtol=2e-3, atol=1e-6)
