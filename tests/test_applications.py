"""Interpolation, inversion, variations, inpainting and denoising strips against closed forms for Gaussian data."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from exact_denoiser import ExactDenoiser, Mixture
from PIL import Image
from tiny_pipeline import quiet
from torch import Tensor

from pipelines import CustomUNetPipeline
from pipelines.applications import denoising_strip, inpaint, interpolate, invert, repaint_walk, slerp, variations

MEAN, SCALE, CORRELATION = 0.1, 0.2, 0.9


def two_pixels() -> Mixture:
    """Two RGB pixels side by side, the same channel correlated, the three channels independent."""
    block = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]], dtype=torch.float64)
    covariance = SCALE**2 * torch.kron(torch.eye(3, dtype=torch.float64), block)  # (C, H, W) flattened
    return Mixture(torch.ones(1).double(), torch.full((1, 6), MEAN).double(), covariance[None])


def make_pipe(**schedule) -> CustomUNetPipeline:
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, **schedule)
    network = ExactDenoiser("epsilon", sample_size=(1, 2)).set_data(two_pixels(), scheduler.alphas_cumprod.double())
    return quiet(CustomUNetPipeline(network, scheduler))


@pytest.fixture
def pipe() -> CustomUNetPipeline:
    return make_pipe()


def sample_data(pipe: CustomUNetPipeline, num_images: int) -> Tensor:
    """Samples of the data, (N, 3, 1, 2) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(num_images, 6, generator=generator, dtype=torch.float64)
    samples = two_pixels().means + noise @ torch.linalg.cholesky(two_pixels().covariances[0]).T
    return (samples.view(-1, 3, 1, 2) / 2 + 0.5).clamp(0, 1).float()


# Interpolation


def test_slerp_matches_closed_form():
    start, end = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    between = slerp(start, end, torch.tensor([0.0, 1 / 3, 0.5, 1.0])).view(4, 2)
    expected = [[1, 0], [math.cos(math.pi / 6), 2 * 0.5], [math.sqrt(0.5), 2 * math.sqrt(0.5)], [0, 2]]
    torch.testing.assert_close(between, torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(slerp(start, start, torch.tensor([0.3])), start)


def test_interpolation_starts_and_ends_at_the_given_seeds_or_latents(pipe):
    pipe.set_sampler("ddpm")  # interpolation uses DDIM whatever sampler is set
    between = interpolate(pipe, 3, 4, num_images=5, num_inference_steps=20, output_type="pt")
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"
    pipe.set_sampler("ddim")
    ends = pipe(seeds=[3, 4], num_inference_steps=20, output_type="pt").images
    torch.testing.assert_close(between[[0, -1]], ends, atol=1e-5, rtol=0)
    distances = (between[1:] - between[:-1]).flatten(1).norm(dim=1)
    assert 0 < distances.min() <= distances.max() < 0.7 * (ends[1] - ends[0]).norm()
    images = sample_data(pipe, 2)
    start, end = invert(pipe, images, 50, 9).split(1)
    between = interpolate(pipe, start, end, num_images=3, num_inference_steps=50, output_type="pt")
    torch.testing.assert_close(between[[0, -1]], images, atol=1e-3, rtol=0)


# Inversion


def reconstruction_error(pipe, images: Tensor, steps: int, iterations: int) -> float:
    latents = invert(pipe, images, steps, iterations)
    again = pipe(latents=latents, num_inference_steps=steps, output_type="pt").images
    return (again - images).abs().max().item()


@pytest.mark.parametrize("schedule", [{}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_inversion_improves_with_steps_and_converges_with_iterations(schedule):
    """The cosine schedule leaves almost no signal at the end, so that more steps alone need not help."""
    pipe = make_pipe(**schedule)
    images = sample_data(pipe, 64)
    by_steps = [reconstruction_error(pipe, images, steps, 1) for steps in (10, 40, 160)]
    assert by_steps[0] > 3 * by_steps[1] > 9 * by_steps[2] or schedule
    by_iterations = [reconstruction_error(pipe, images, 40, iterations) for iterations in (1, 5, 20)]
    assert by_iterations[0] > 5 * by_iterations[1]
    assert by_iterations[2] < 2e-4
    with pytest.raises(ValueError, match="num_fixed_point_iterations is 0"):
        invert(pipe, images, 40, 0)


def test_inversion_follows_the_current_ddim_scheduler(pipe):
    """It then matches the pipeline's sampling; with another sampler set, it uses DDIM as configured for training."""
    images = sample_data(pipe, 4)
    trained = invert(pipe, images, 7)
    pipe.set_sampler("unipc")
    torch.testing.assert_close(invert(pipe, images, 7), trained)
    pipe.scheduler = DDIMScheduler.from_config(pipe._trained.config, timestep_spacing="leading")
    assert not torch.allclose(invert(pipe, images, 7), trained, atol=0.01)
    assert reconstruction_error(pipe, images, 20, 20) < 1e-3


def test_inverted_images_are_standard_normal(pipe):
    """The probability flow maps samples of the data to independent standard normal latents."""
    latents = invert(pipe, sample_data(pipe, 4000), 1000).flatten(1)
    torch.testing.assert_close(latents.mean(0), torch.zeros(6), atol=0.06, rtol=0)
    torch.testing.assert_close(torch.cov(latents.T), torch.eye(6), atol=0.12, rtol=0)


# Variations


@pytest.mark.parametrize("timestep", [150, 400, 999])
def test_variations_follow_the_posterior(pipe, timestep):
    """Denoising x_t of an image x draws from p(x_0 | x_t), a Gaussian around the posterior mean.

    All pixels and channels are independent here, so x_0' = mean + k a (x - mean) + noise with k = a s^2 / (a^2 s^2 +
    b^2), and the mean over the noise is mean + k a (x - mean).
    """
    data = Mixture(torch.ones(1).double(), torch.full((1, 6), MEAN).double(), SCALE**2 * torch.eye(6).double()[None])
    pipe.unet.set_data(data, pipe.scheduler.alphas_cumprod.double())
    image = torch.full((1, 3, 1, 2), 0.7)  # 0.4 in [-1, 1]
    call = {"output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    varied = variations(pipe, image.expand(2000, -1, -1, -1), timestep, num_inference_steps=1000, **call)
    a = pipe.scheduler.alphas_cumprod[timestep].sqrt().item()
    k = a * SCALE**2 / ((a * SCALE) ** 2 + 1 - a**2)
    expected_mean = MEAN + k * a * (0.4 - MEAN)
    expected_variance = SCALE**2 * (1 - k * a) + k**2 * (1 - a**2)
    samples = varied.double() * 2 - 1
    assert samples.mean().item() == pytest.approx(expected_mean, abs=0.01)
    assert samples.var().item() == pytest.approx(expected_variance, rel=0.08)


# Inpainting


def test_repaint_walk():
    assert repaint_walk(4, 2, 1) == [4, 3, 2, 1, 0]
    assert repaint_walk(4, 2, 2) == [4, 3, 2, 1, 3, 2, 1, 0]
    assert repaint_walk(5, 2, 2) == [5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 0]
    walk = repaint_walk(50, 5, 5)
    assert sum(b < a for a, b in itertools.pairwise(walk)) == 50 + 9 * 4 * 5


def test_inpainting_keeps_known_pixels_and_samples_the_conditional(pipe):
    """Resampling brings the inpainted pixel closer to p(right | left) = N(mean + c (left - mean), s^2 (1 - c^2)).

    RePaint is an approximation; the tolerances are for the paper's 250 steps and jumps of 10.
    """
    image = torch.full((1, 3, 1, 2), 0.7)
    image[..., 1] = 0.1  # hidden
    mask = np.array([[0.0, 1.0]], dtype=np.float32)
    errors = []
    for num_resamples in (1, 10):
        call = {"output_type": "pt", "generator": torch.Generator().manual_seed(0)}
        painted = inpaint(pipe, image.expand(1000, -1, -1, -1), mask, 250, 10, num_resamples, **call)
        assert (painted[..., 0] == 0.7).all()
        right = painted[..., 1].double() * 2 - 1
        errors.append(abs(right.mean().item() - (MEAN + CORRELATION * (0.4 - MEAN))))
    assert errors[1] < 0.05
    assert errors[1] < 0.6 * errors[0]
    assert right.std().item() == pytest.approx(SCALE * math.sqrt(1 - CORRELATION**2), rel=0.25)


def test_invalid_arguments_raise_value_errors(pipe):
    images = sample_data(pipe, 2)
    for message, call in {
        r"mask has the shape \(1, 1, 2, 2\)": lambda: inpaint(pipe, images, np.ones((2, 2), np.float32)),
        "2 images for 3 seeds": lambda: variations(pipe, images, 10, seeds=[1, 2, 3]),
        "eta is 2": lambda: variations(pipe, images, 10, eta=2),
        "num_inference_steps is 0": lambda: invert(pipe, images, 0),
        r"image has the shape \(3, 2, 2\); the network's is": lambda: invert(pipe, Image.new("RGB", (2, 2))),
        r"values from -1.0 to 1.0; they must lie in": lambda: invert(
            pipe, torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 2)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_pil_numpy_and_torch_images_give_the_same_latents(pipe):
    pixels = np.array([[[10, 20, 30], [40, 50, 60]]], dtype=np.uint8)  # (H, W, C)
    array, image = (pixels / 255).astype(np.float32), Image.fromarray(pixels)
    expected = invert(pipe, image, 3)
    for form in ([image], array[None], torch.tensor(array.transpose(2, 0, 1)[None])):
        torch.testing.assert_close(invert(pipe, form, 3), expected, atol=1e-5, rtol=0)


# Denoising strips


def test_denoising_strip_ends_with_the_generated_image(pipe, tmp_path):
    strip = denoising_strip(pipe, num_frames=5, num_inference_steps=40, seeds=[1, 2])
    assert strip.timesteps == [999, 674, 349, 24]
    assert len(strip.noisy_images) == len(strip.pred_original_samples) == 5
    result = pipe(seeds=[1, 2], num_inference_steps=40).images
    for frames in (strip.noisy_images, strip.pred_original_samples):
        for image, expected in zip(frames[-1], result, strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    sheet = strip.to_image(scale=3)
    assert sheet.size == (5 * 2 * 3, 4 * 1 * 3)  # two rows per image
    strip.save_gif(tmp_path / "strip.gif", scale=2)
    with Image.open(tmp_path / "strip.gif") as animation:
        assert animation.n_frames == 5
        assert animation.size == (2 * 2 * 2, 2 * 1 * 2)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "unipc"])
def test_callback_receives_network_inputs_and_predicted_images(pipe, sampler):
    """Both on the network's scale, whatever the scheduler's own scale is."""
    pipe.set_sampler(sampler)
    shown, names = [], ("noisy_images", "pred_original_sample")
    callback = {
        "callback_on_step_end": lambda *args: shown.append(args[-1]),
        "callback_on_step_end_tensor_inputs": names,
    }
    pipe(seeds=range(5), num_inference_steps=20, output_type="pt", **callback)
    for tensors, (x, *levels) in zip(shown, pipe.unet.seen, strict=True):
        torch.testing.assert_close(tensors["noisy_images"].flatten(1).double(), x)
        clean_images = two_pixels().clean_images(x, *levels)
        torch.testing.assert_close(
            tensors["pred_original_sample"].flatten(1).double(), clean_images, atol=1e-3, rtol=0
        )
