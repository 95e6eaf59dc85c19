"""The held-out curve against Gaussian data, whose least errors are known."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from exact_gaussian import CORRELATED, ExactGaussian, draw_images, exact_network
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from eval.heldout import HeldoutCurve, heldout_curve
from training.data import to_model_range

CURVES = ("epsilon_mse", "sample_mse", "v_mse")


def make_scheduler(prediction_type: str = "v_prediction", **settings) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, **settings)


def exact_curve(prediction_type: str, timestep_error: int = 0, num_images: int = 4000) -> HeldoutCurve:
    scheduler = make_scheduler(prediction_type)
    network = exact_network(ExactGaussian, CORRELATED, scheduler, timestep_error)
    return heldout_curve(network, scheduler, to_model_range(draw_images(CORRELATED, num_images)), batch_size=1000)


def check_curve(curve: HeldoutCurve) -> None:
    """The mean squared error of x_0 is its variance given x_t; the others follow from it."""
    variances = torch.linalg.eigvalsh(CORRELATED.covariances[0]).numpy()
    abar = make_scheduler().alphas_cumprod.double().numpy()[curve.timesteps]
    least = (variances * (1 - abar[:, None]) / (abar[:, None] * variances + 1 - abar[:, None])).mean(1)
    factors = {"epsilon_mse": abar / (1 - abar), "sample_mse": 1, "v_mse": 1 / (1 - abar)}
    for name, factor in factors.items():
        errors = getattr(curve, name.replace("mse", "standard_error"))
        # pixel values are rounded, which adds (1/255)^2 / 3 to their variance
        deviation = (getattr(curve, name) - factor * least) / (errors + factor * (1 / 255) ** 2 / 3)
        assert np.abs(deviation).max() < 4, f"{name}: {deviation}"


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_errors_of_the_exact_denoiser(prediction_type):
    curve = exact_curve(prediction_type)
    assert curve.timesteps.tolist() == list(range(25, 1000, 50))
    check_curve(curve)


def test_a_network_that_is_told_another_timestep_errs_more():
    with pytest.raises(AssertionError, match="mse"):
        check_curve(exact_curve("epsilon", timestep_error=40))


def test_the_prediction_type_makes_no_difference():
    curves = [exact_curve(name, num_images=50) for name in ("epsilon", "sample", "v_prediction")]
    for name in CURVES:
        for other in curves[1:]:
            np.testing.assert_allclose(getattr(other, name), getattr(curves[0], name), rtol=1e-2)


def test_standard_errors():
    small, large = (exact_curve("v_prediction", num_images=n) for n in (250, 4000))
    np.testing.assert_allclose(small.epsilon_standard_error / large.epsilon_standard_error, math.sqrt(16), rtol=0.3)


def tiny_network() -> CustomUNet2DModel:
    torch.manual_seed(0)
    return CustomUNet2DModel(**TINY).eval()


def random_images() -> torch.Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_triples_are_fixed():
    network, scheduler, images = tiny_network(), make_scheduler(), random_images()
    curve = heldout_curve(network, scheduler, images, timesteps=4)
    again = heldout_curve(network, scheduler, images, timesteps=(375, 875), batch_size=4)
    assert curve.timesteps.tolist() == [125, 375, 625, 875]
    np.testing.assert_allclose(again.epsilon_mse, curve.epsilon_mse[[1, 3]], rtol=1e-5)
    other = heldout_curve(network, scheduler, images, timesteps=4, seed=1)
    assert (np.abs(other.epsilon_mse / curve.epsilon_mse - 1) > 1e-3).all()


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
    assert curve.epsilon_mse[0] == pytest.approx(0, abs=1e-10)  # x_T is the noise
    assert np.isfinite(curve.v_mse).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clean_images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "images are torch.uint8"),
        ({"clean_images": torch.zeros(1, 3, 8, 8)}, r"shape \(1, 3, 8, 8\)"),
        ({"clean_images": torch.full((2, 3, 8, 8), 255.0)}, "values from 255 to 255"),
        ({"unet": CustomUNet2DModel(**TINY)}, "training mode"),
        ({"timesteps": 0}, "0 timesteps are wanted"),
        ({"timesteps": [0, 1000]}, "must lie in 0 to 999"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_input(arguments, message):
    arguments = {"unet": tiny_network(), "scheduler": make_scheduler(), "clean_images": random_images()} | arguments
    with pytest.raises(ValueError, match=message):
        heldout_curve(**arguments)


def test_a_network_with_nan_weights():
    network = tiny_network()
    network.conv_out.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="not finite at timestep 25;"):
        heldout_curve(network, make_scheduler(), random_images())
