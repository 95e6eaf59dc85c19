"""The held-out curve against Gaussian data, whose least errors are known."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from exact_denoiser import ExactDenoiser
from exact_gaussian import CORRELATED, ExactGaussian, draw_images, exact_network
from exact_sde import OBJECTIVES, exact_sde_network
from tiny_network import TINY

from common import InputError
from custom_unet import CustomUNet2DModel
from eval.heldout import SIGMAS, ErrorCurve, denoising_curve, heldout_curve
from training.data import to_model_range
from training.sde import SDEScheduler


def make_scheduler(prediction_type: str = "v_prediction", **settings) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, **settings)


def exact_curve(prediction_type: str, timestep_error: int = 0, num_images: int = 4000) -> ErrorCurve:
    scheduler = make_scheduler(prediction_type)
    network = exact_network(ExactGaussian, CORRELATED, scheduler, timestep_error)
    return heldout_curve(network, scheduler, to_model_range(draw_images(CORRELATED, num_images)), batch_size=1000)


def check_curve(curve: ErrorCurve) -> None:
    """The mean squared error of x_0 is its variance given x_t; that of epsilon is snr times it."""
    variances = torch.linalg.eigvalsh(CORRELATED.covariances[0]).numpy()
    abar = make_scheduler().alphas_cumprod.double().numpy()[curve.x]
    least = abar * (variances / (abar[:, None] * variances + 1 - abar[:, None])).mean(1)
    # pixel values are rounded, which adds (1/255)^2 / 3 to their variance
    rounding = abar / (1 - abar) * (1 / 255) ** 2 / 3
    deviation = (curve.mse - least) / (curve.mse_standard_error + rounding)
    assert np.abs(deviation).max() < 4, f"mse: {deviation}"


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_errors_of_the_exact_denoiser(prediction_type):
    curve = exact_curve(prediction_type)
    assert curve.x.tolist() == list(range(25, 1000, 50))
    check_curve(curve)


def test_a_network_that_is_told_another_timestep_errs_more():
    with pytest.raises(AssertionError, match="mse"):
        check_curve(exact_curve("epsilon", timestep_error=40))


def test_the_prediction_type_makes_no_difference():
    curves = [exact_curve(name, num_images=50) for name in ("epsilon", "sample", "v_prediction")]
    for other in curves[1:]:
        np.testing.assert_allclose(other.mse, curves[0].mse, rtol=1e-2)


def test_standard_errors():
    small, large = (exact_curve("v_prediction", num_images=n) for n in (250, 4000))
    np.testing.assert_allclose(small.mse_standard_error / large.mse_standard_error, math.sqrt(16), rtol=0.3)


def tiny_network() -> CustomUNet2DModel:
    torch.manual_seed(0)
    return CustomUNet2DModel(**TINY).eval()


def random_images() -> torch.Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_triples_are_fixed():
    network, scheduler, images = tiny_network(), make_scheduler(), random_images()
    curve = heldout_curve(network, scheduler, images, timesteps=[125, 375, 875])
    again = heldout_curve(network, scheduler, images, timesteps=(375, 875), batch_size=4)
    np.testing.assert_allclose(again.mse, curve.mse[1:], rtol=1e-5)
    other = heldout_curve(network, scheduler, images, timesteps=[125, 375, 875], seed=1)
    assert (np.abs(other.mse / curve.mse - 1) > 1e-3).all()


def test_images_added_at_the_end_change_no_noise():
    network, scheduler, images = tiny_network(), make_scheduler(), random_images()
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for num_images in (3, 6):
        heldout_curve(network, scheduler, images[:num_images], timesteps=[300])
    assert torch.equal(seen[0], seen[1][:3])


def test_zero_signal():
    scheduler, images = make_scheduler(rescale_betas_zero_snr=True), random_images()
    curve = heldout_curve(tiny_network(), scheduler, images, timesteps=[999])
    assert curve.mse[0] == pytest.approx(0, abs=1e-10)  # x_T is the noise


def test_a_network_with_nan_weights():
    network = tiny_network()
    network.conv_out.weight.data[0] = math.nan
    with pytest.raises(InputError, match="not finite at timestep 25;"):
        heldout_curve(network, make_scheduler(), random_images())


# ---- Against the noise level

MODELS = {"ddpm": "v_prediction"} | {objective: types[0] for objective, types in OBJECTIVES.items()}


def exact_denoising_curve(model: str, prediction_type: str, num_images: int = 2000, **more) -> ErrorCurve:
    images = to_model_range(draw_images(CORRELATED, num_images))
    if model == "ddpm":
        scheduler = make_scheduler(prediction_type)
        network = exact_network(ExactDenoiser, CORRELATED, scheduler)
    else:
        scheduler = SDEScheduler(objective=model, prediction_type=prediction_type)
        network = exact_sde_network(CORRELATED, scheduler)
    return denoising_curve(network, scheduler, images, batch_size=1000, **more)


@pytest.mark.parametrize("model", MODELS)
def test_errors_of_the_exact_denoiser_by_noise_level(model):
    curve = exact_denoising_curve(model, MODELS[model])
    np.testing.assert_array_equal(curve.x, SIGMAS)
    variances = torch.linalg.eigvalsh(CORRELATED.covariances[0]).numpy()
    least = (variances * curve.x[:, None] ** 2 / (variances + curve.x[:, None] ** 2)).mean(1)
    rounding = (1 / 255) ** 2 / 3
    assert (np.abs(curve.mse - least) / (curve.mse_standard_error + rounding)).max() < 4
    assert curve.mean == pytest.approx(least.mean(), abs=4 * curve.standard_error + rounding)
    assert 0.005 < curve.standard_error / curve.mean < 0.05


def test_all_models_meet_the_same_noise():
    curves = [
        exact_denoising_curve(model, prediction_type, num_images=40)
        for model, types in ({"ddpm": ("epsilon", "v_prediction")} | OBJECTIVES).items()
        for prediction_type in types
    ]
    assert len(curves) == 11
    for other in curves[1:]:
        np.testing.assert_allclose(other.losses, curves[0].losses, rtol=2e-3, atol=1e-6)


def test_the_errors_at_a_timestep_are_those_at_its_noise_level():
    scheduler, images = make_scheduler(), to_model_range(draw_images(CORRELATED, 4000))
    by_timestep = heldout_curve(
        exact_network(ExactGaussian, CORRELATED, scheduler), scheduler, images, timesteps=[400]
    )
    abar = float(scheduler.alphas_cumprod[400])
    network = exact_network(ExactDenoiser, CORRELATED, scheduler)
    curve = denoising_curve(network, scheduler, images, sigmas=[math.sqrt(1 / abar - 1)])
    assert curve.mse[0] * abar / (1 - abar) == pytest.approx(by_timestep.mse[0], rel=0.05)


def test_a_noise_level_is_met_with_the_same_noise_whatever_the_others_are():
    network, scheduler, images = tiny_network(), SDEScheduler(), random_images()
    curve = denoising_curve(network, scheduler, images, sigmas=[0.1, 1.0, 10.0])
    again = denoising_curve(network, scheduler, images[:4], sigmas=[1.0], batch_size=3)
    np.testing.assert_allclose(again.losses[0], curve.losses[1, :4], rtol=1e-4)
    other = denoising_curve(network, scheduler, images, sigmas=[1.0], seed=1)
    assert (np.abs(other.losses[0] / curve.losses[1] - 1) > 1e-4).all()


@pytest.mark.parametrize("sigmas", [[0.01, 1.0], [1.0, 101.0]])
def test_noise_levels_that_the_network_does_not_know(sigmas):
    scheduler = SDEScheduler(objective="ve", prediction_type="score")
    with pytest.raises(ValueError, match=r"sigmas are .*; the model was trained with 0\.02 to 100"):
        denoising_curve(tiny_network(), scheduler, random_images(), sigmas=sigmas)


def test_a_network_with_nan_weights_by_noise_level():
    network = tiny_network()
    network.conv_out.weight.data[0] = math.nan
    with pytest.raises(InputError, match=r"not finite at sigma 0\.02;"):
        denoising_curve(network, SDEScheduler(), random_images())
