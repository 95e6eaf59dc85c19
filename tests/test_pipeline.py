"""The pipeline compared with diffusers' pipelines."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from tiny_network import TINY
from tiny_pipeline import quiet, tiny_pipeline

from custom_unet import CustomUNet2DModel
from pipelines import CustomUNetPipeline, custom_unet_pipeline
from pipelines.applications import interpolate, invert
from pipelines.custom_unet_pipeline import SAMPLERS
from training.sde import continuous_samplers

# With epsilon prediction the image is (x_t - n eps) / a, where the last a is 1/157: two float32 rounding errors, which
# depend on the CPU and the order of sums, become 4e-5 in the image. Predictions of v and x_0 are not divided.
ROUNDING = 2 * np.finfo(np.float32).eps / DDIMScheduler().alphas_cumprod[-1].sqrt().item()


@pytest.fixture
def pipe() -> CustomUNetPipeline:
    return tiny_pipeline()


@pytest.fixture
def v_pipe(pipe) -> CustomUNetPipeline:
    """Predicts v, so that the images of untrained weights are not saturated."""
    return quiet(CustomUNetPipeline(pipe.unet, DDIMScheduler(prediction_type="v_prediction")))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check_against_stock(pipe: CustomUNetPipeline, stock, scheduler, atol: float, **call) -> np.ndarray:
    """Our images with a scheduler, after checking that diffusers' pipeline gives the same."""
    reference = quiet(stock(UNet2DModel(**TINY).eval(), scheduler))
    reference.unet.load_state_dict(pipe.unet.state_dict())
    call = {"batch_size": 2, "num_inference_steps": 7, "output_type": "np"} | call
    images = quiet(CustomUNetPipeline(pipe.unet, scheduler))(**call, generator=generators(1, 2)).images
    np.testing.assert_allclose(images, reference(**call, generator=generators(1, 2)).images, atol=atol)
    assert images.std() > 0.05
    return images


@pytest.mark.parametrize(("stock", "scheduler"), [(DDIMPipeline, DDIMScheduler), (DDPMPipeline, DDPMScheduler)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_images_match_the_stock_pipeline(pipe, stock, scheduler, prediction_type):
    for clip_sample in (True, False):
        settings = {"prediction_type": prediction_type, "clip_sample": clip_sample}
        check_against_stock(pipe, stock, scheduler(**settings), ROUNDING if prediction_type == "epsilon" else 1e-5)


def test_images_match_the_stock_pipeline_with_thresholding_and_noise(pipe):
    check_against_stock(pipe, DDIMPipeline, DDIMScheduler(thresholding=True, sample_max_value=1.5), ROUNDING)
    plain, noisy = (check_against_stock(pipe, DDIMPipeline, DDIMScheduler(), ROUNDING, eta=eta) for eta in (0, 0.5))
    assert np.abs(plain - noisy).max() > 0.01


# Seeds, generators, latents


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_depend_only_on_their_own_seeds(v_pipe, sampler):
    v_pipe.set_sampler(sampler)
    together = v_pipe(seeds=[5, 6, 7], num_inference_steps=5, output_type="pt").images
    backwards = v_pipe(seeds=[7, 6], num_inference_steps=5, output_type="pt").images
    torch.testing.assert_close(together[1:].flip(0), backwards, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.01
    assert 0.05 < together.std() < 0.4


def test_sampling_starts_from_given_latents(v_pipe):
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=generator) for generator in generators(1, 2)])
    for sampler in ("ddim", "euler"):
        v_pipe.set_sampler(sampler)
        from_latents = v_pipe(latents=noise, num_inference_steps=4, output_type="pt").images
        assert torch.equal(from_latents, v_pipe(seeds=[1, 2], num_inference_steps=4, output_type="pt").images)


# Output, mode, precision


def test_output_types_agree_and_images_may_be_rectangular(pipe):
    as_pt = pipe(2, generators(1, 2), 3, output_type="pt").images
    (as_np,) = pipe(2, generators(1, 2), 3, output_type="np", return_dict=False)
    as_pil = pipe(2, generators(1, 2), 3).images
    latents = pipe(2, generators(1, 2), 3, "latent").images
    torch.testing.assert_close((latents / 2 + 0.5).clamp(0, 1), as_pt)
    assert as_pt.shape == (2, 3, 8, 8)
    assert 0 <= as_pt.min() <= as_pt.max() <= 1
    np.testing.assert_allclose(as_np, as_pt.permute(0, 2, 3, 1), atol=0)
    np.testing.assert_array_equal(np.asarray(as_pil[1]), (as_np[1] * 255).round().astype("uint8"))
    pipe.unet = CustomUNet2DModel(**TINY | {"sample_size": (8, 16)})
    assert pipe(1, generators(1), 2).images[0].size == (16, 8)


def test_sampling_disables_dropout_and_restores_the_mode(pipe):
    pipe.unet.train()
    first, second = (pipe(1, generators(1), 3, output_type="pt").images for _ in range(2))
    assert torch.equal(first, second)
    assert pipe.unet.training


def test_nan_weights_raise_instead_of_giving_black_images(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(ValueError, match="2 of 2 images are not finite"):
        pipe(2, generators(1, 2), 2)
    with pytest.raises(ValueError, match="1 of 1 images are not finite"):
        invert(pipe, torch.zeros(1, 3, 8, 8), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "unipc"])
def test_half_precision_gives_nearly_the_same_images(v_pipe, dtype, sampler):
    v_pipe.set_sampler(sampler)
    expected = v_pipe(seeds=[1], num_inference_steps=5, output_type="pt").images
    images = v_pipe.to(dtype)(seeds=[1], num_inference_steps=5, output_type="pt").images
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, atol=0.05, rtol=0)
    assert not torch.equal(images, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_seeds_give_the_same_images_on_the_gpu(pipe):
    expected = pipe(seeds=[1, 2], num_inference_steps=5, eta=1.0, output_type="pt").images
    images = pipe.to("cuda")(seeds=[1, 2], num_inference_steps=5, eta=1.0, output_type="pt").images
    torch.testing.assert_close(images.cpu(), expected, atol=1e-2, rtol=0)


# Callbacks and class labels


def test_callbacks_see_every_step_and_may_change_it(pipe):
    calls = []

    def watch(pipeline, index, timestep, tensors):
        calls.append((index, int(timestep), set(tensors)))
        assert pipeline is pipe
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 3 else {}

    inputs = {"callback_on_step_end_tensor_inputs": ["latents", "pred_original_sample"]}
    images = pipe(seeds=[1], num_inference_steps=4, output_type="pt", callback_on_step_end=watch, **inputs).images
    assert calls == [(i, t, {"latents", "pred_original_sample"}) for i, t in enumerate([750, 500, 250, 0])]
    assert (images == 0.5).all()
    with pytest.raises(ValueError, match="choose from latents, noisy_images, pred_original_sample"):
        pipe(seeds=[1], callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["noise"])


def test_class_labels_reach_the_network():
    pipe = tiny_pipeline(num_class_embeds=3)
    arguments = {"seeds": [1, 1], "num_inference_steps": 3, "output_type": "pt"}
    first, second = pipe(**arguments, class_labels=[0, 2]).images
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(pipe(**arguments, class_labels=2).images[0], second)
    for labels, message in [
        (None, "has class embeddings: give class_labels"),
        ([0, 1, 2], "3 class_labels for 2 images"),
        ([0, 3], r"class_labels are \[0, 3\]; they must be 0 to 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(**arguments, class_labels=labels)


# Invalid arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 3, "generator": generators(1, 2)}, "2 generators for 3 images"),
        ({"seeds": [1], "generator": generators(1)}, "either seeds or generator"),
        ({"seeds": [1, 2**32]}, "they must be whole numbers from 0 to 4294967295"),
        ({"seeds": [0.7]}, "seeds are 0.7 to 0.7"),
        ({"seeds": []}, "there are 0 images to generate"),
        ({"latents": torch.zeros(2, 3, 8, 8), "seeds": [1]}, r"it must be \(1, 3, 8, 8\)"),
        ({"num_inference_steps": 0}, "1 to 1000"),
        ({"num_inference_steps": 1001}, "1 to 1000"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"output_type": "jpeg"}, "must be pil, np, pt or latent"),
        ({"class_labels": 1}, "no class embeddings"),
    ],
)
def test_bad_arguments_raise_value_errors(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_set_sampler_keeps_the_noise_schedule(pipe):
    pipe = CustomUNetPipeline(pipe.unet, DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction"))
    before = pipe.scheduler.alphas_cumprod
    for name in [*SAMPLERS, "ddim"]:
        pipe.set_sampler(name)
        torch.testing.assert_close(pipe.scheduler.alphas_cumprod, before)
        assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.timestep_spacing == "trailing"  # the samplers in between leave nothing behind
    with pytest.raises(ValueError, match="no sampler 'dim'; choose from ddpm, ddim, dpmsolver"):
        pipe.set_sampler("dim")
    zero_snr = CustomUNetPipeline(pipe.unet, DDIMScheduler(prediction_type="sample", rescale_betas_zero_snr=True))
    for name in zero_snr.samplers:
        zero_snr.set_sampler(name)
        zero_snr.check_inputs(num_inference_steps=5)
    with pytest.raises(ValueError, match="no sampler 'deis'; choose from ddpm"):
        zero_snr.set_sampler("deis")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler does not suit this network; use set_sampler with ddpm"),
        (DDIMScheduler(prediction_type="v_prediction"), "'v_prediction', the network was trained with 'epsilon'"),
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "does not have the noise schedule"),
        (DDIMScheduler(num_train_timesteps=100), "does not have the noise schedule"),
        (EulerDiscreteScheduler.from_config(DDIMScheduler().config, use_karras_sigmas=True), "has use_karras_sigmas"),
        (EulerDiscreteScheduler(interpolation_type="log_linear"), "has interpolation_type log_linear"),
        (
            DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"),
            r"use sde-dpmsolver\+\+",
        ),
    ],
)
def test_unsuitable_schedulers_are_rejected(pipe, scheduler, message):
    pipe.scheduler = scheduler
    with_ddim = [lambda: invert(pipe, torch.zeros(1, 3, 8, 8)), lambda: interpolate(pipe, 0, 1)]
    for call in (lambda: pipe(num_inference_steps=50), *(with_ddim * isinstance(scheduler, DDIMScheduler))):
        with pytest.raises(ValueError, match=message):
            call()


def test_suitable_schedulers_may_be_assigned_directly(v_pipe):
    v_pipe.scheduler = UniPCMultistepScheduler.from_config(v_pipe.scheduler.config, timestep_spacing="trailing")
    assigned = v_pipe(seeds=[1], num_inference_steps=5, output_type="pt").images
    v_pipe.set_sampler("unipc")
    assert torch.equal(v_pipe(seeds=[1], num_inference_steps=5, output_type="pt").images, assigned)


def test_learned_variances_are_rejected(pipe):
    with pytest.raises(ValueError, match="out_channels differ from its in_channels"):
        CustomUNetPipeline(UNet2DModel(**TINY, out_channels=6), pipe.scheduler)(num_inference_steps=2)


def test_euler_ancestral_draws_finite_images_for_every_number_of_steps(v_pipe):
    schedule = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    pipe = quiet(CustomUNetPipeline(v_pipe.unet, DDIMScheduler(**schedule)))
    pipe.set_sampler("euler_ancestral")
    for steps in (1, 2, 3, 4):
        assert pipe(seeds=[0], num_inference_steps=steps, output_type="pt").images.isfinite().all()


# Loading without remote code


def test_from_pretrained_takes_components_and_network_arguments(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    loaded = CustomUNetPipeline.from_pretrained(tmp_path, scheduler=scheduler, dtype=torch.bfloat16)
    assert loaded.scheduler is scheduler
    assert type(loaded.unet) is CustomUNet2DModel
    assert loaded.unet.dtype == torch.bfloat16
    network = UNet2DModel(**TINY)
    assert CustomUNetPipeline.from_pretrained(tmp_path, unet=network).unet is network
    with pytest.raises(ValueError, match="does not accept dropout, use_safetensors; it accepts unet"):
        CustomUNetPipeline.from_pretrained(tmp_path, dropout=0.5, use_safetensors=False)


def test_shipped_pipeline_offers_only_diffusers_samplers(pipe):
    shipped = custom_unet_pipeline.CustomUNetPipeline(pipe.unet, pipe.scheduler)
    assert shipped.samplers == tuple(SAMPLERS)
    assert pipe.samplers == (*SAMPLERS, *continuous_samplers("ddpm"))
