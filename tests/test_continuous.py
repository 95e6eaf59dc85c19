"""The pipeline in continuous time: networks trained with an SDE, and DDPM networks treated as a VP SDE."""

import itertools
import math

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from exact_denoiser import Mixture, mixture
from exact_sde import ExactSDENetwork
from tiny_pipeline import quiet, sde_pipeline, tiny_pipeline

from pipelines import CustomUNetPipeline, custom_unet_pipeline
from pipelines.applications import (
    colorize,
    decode,
    draw_given,
    encode,
    impute,
    inpaint,
    interpolate,
)
from pipelines.custom_unet_pipeline import Guidance
from training.sde import SDEScheduler, continuous_samplers

SCHEDULERS = {
    "vp": SDEScheduler(objective="vp"),  # clips, which makes no difference here
    "vp v": SDEScheduler(objective="vp", prediction_type="v_prediction"),
    "subvp": SDEScheduler(objective="subvp"),
    "subvp x0": SDEScheduler(objective="subvp", prediction_type="sample"),
    "ve": SDEScheduler(objective="ve", prediction_type="score", sigma_max=20.0),
    "edm": SDEScheduler(objective="edm", prediction_type="edm"),
    "flow": SDEScheduler(objective="flow", prediction_type="flow_prediction", clip_sample=False),
    "ddpm": DDPMScheduler(clip_sample=False),
    "ddpm cosine v": DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    ),
    "ddpm zero snr": DDPMScheduler(prediction_type="sample", rescale_betas_zero_snr=True, clip_sample=False),
}
N = 4000
STEPS = {"euler_maruyama": 200, "reverse_diffusion": 200, "ode": 10, "edm_heun": 40, "flow_euler": 80, "flow_heun": 20}
STEPS["dpmpp_2m"] = 40


def exact_pipeline(name: str, size: int = 1) -> CustomUNetPipeline:
    network = ExactSDENetwork(sample_size=size).double().eval().set_data(mixture(), SCHEDULERS[name])
    return quiet(CustomUNetPipeline(network, SCHEDULERS[name]))


def pipeline_of(objective: str, **network) -> CustomUNetPipeline:
    return tiny_pipeline(DDPMScheduler(), **network) if objective == "ddpm" else sde_pipeline(objective, **network)


def last_clean_images(pipe: CustomUNetPipeline, steps: int, num_images: int = N, **call) -> torch.Tensor:
    """The last predicted clean images, not clipped to [0, 1], float64 (N, 3)."""
    seen = {}
    pipe(
        num_inference_steps=steps,
        latents=torch.randn(num_images, 3, 1, 1, generator=torch.Generator().manual_seed(0)),
        generator=torch.Generator().manual_seed(1),
        callback_on_step_end=lambda *args: seen.update(args[-1]),
        callback_on_step_end_tensor_inputs=["pred_original_sample"],
        output_type="pt",
        **call,
    )
    return seen["pred_original_sample"].double().flatten(1)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *itertools.product(SCHEDULERS, ["edm_heun", "dpmpp_2m", "ode"]),
        *itertools.product(["vp", "ve", "edm", "flow", "ddpm cosine v"], ["euler_maruyama", "reverse_diffusion"]),
        *itertools.product(["flow"], ["flow_euler", "flow_heun"]),
    ],
)
def test_samplers_reproduce_the_mixture(name, sampler):
    """With float32 x, the network's own time input and every prediction type."""
    pipe = exact_pipeline(name)
    pipe.set_sampler(sampler)
    errors = mixture().errors(last_clean_images(pipe, STEPS[sampler]))
    assert (errors < torch.tensor([0.04, 0.03, 0.25])).all(), errors


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        *itertools.product(["ddpm", "ve"], [name for name in continuous_samplers("ve") if name != "ode"]),
        ("vp", "ode"),
        *itertools.product(["flow"], ["flow_euler", "flow_heun"]),
    ],
)
def test_image_depends_only_on_its_own_seed(objective, sampler):
    pipe = pipeline_of(objective)
    if sampler == "ode":  # clipped predictions of an untrained network have kinks, where the solver is inaccurate
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_sampler(sampler, **({"tolerance": 1e-5} if sampler == "ode" else {}))
    together = pipe(seeds=[3, 4], num_inference_steps=4, output_type="pt").images
    again = pipe(seeds=[3, 4], num_inference_steps=4, output_type="pt").images
    alone = pipe(seeds=[4], num_inference_steps=4, output_type="pt").images
    assert torch.equal(together, again)
    # the ODE solver chooses its step sizes for the whole batch
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=0.05 if sampler == "ode" else 1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.01)


def test_decode_inverts_encode():
    """Equal data and scores give equal latents up to scale (arXiv 2011.13456, section 4.3)."""
    images, latents = ((mixture().means + 1) / 2).float().view(3, 3, 1, 1), {}
    for name in ("vp", "subvp", "ve", "edm", "flow", "ddpm"):
        pipe = exact_pipeline(name)
        latents[name] = encode(pipe, images, tolerance=1e-5)
        assert 0.01 < latents[name].std() < 3  # unit variance over the data
        back = decode(pipe, latents[name], tolerance=1e-5, output_type="pt")
        torch.testing.assert_close(back, images, rtol=0, atol=1e-3)
    torch.testing.assert_close(latents["vp"], latents["subvp"], rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["vp", "ve", "flow", "ddpm"])
def test_imputation_keeps_known_channels_and_samples_the_conditional(name):
    """Two channels are known; the third is drawn from its conditional distribution, here a Gaussian."""
    data = Mixture(
        torch.ones(1).double(),
        torch.tensor([[0.1, -0.2, 0.0]], dtype=torch.float64),
        torch.tensor([[0.04, 0.03, 0.03], [0.03, 0.04, 0.025], [0.03, 0.025, 0.04]], dtype=torch.float64)[None],
    )
    pipe = exact_pipeline(name, size=8)  # the corrector's norms need an image of many pixels
    pipe.unet.data = data
    known = torch.tensor([True, True, False]).view(1, 3, 1, 1)
    pixel = torch.tensor([0.25, 0.0, 0.3])
    image = ((pixel + 1) / 2).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    drawn = draw_given(pipe, image, lambda x: known * x, 200, output_type="pt", seeds=range(24))
    drawn = drawn.double().permute(0, 2, 3, 1).reshape(-1, 3) * 2 - 1
    torch.testing.assert_close(drawn[:, :2], pixel[:2].double().expand(len(drawn), 2), rtol=0, atol=1e-6)
    a, b, c = data.covariances[0, :2, :2], data.covariances[0, 2, :2], data.covariances[0, 2, 2]
    weights = torch.linalg.solve(a, b)
    mean = data.means[0, 2] + weights @ (pixel[:2].double() - data.means[0, :2])
    std = (c - weights @ b).sqrt()
    # imputation is an approximation, which the corrector improves
    assert abs(drawn[:, 2].mean() - mean) < 0.35 * std
    assert abs(drawn[:, 2].std() - std) < 0.35 * std


def test_impute_and_colorize_keep_the_known_part():
    pipe = pipeline_of("ve")
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    painted = impute(pipe, image, mask, num_inference_steps=4, seeds=[0, 1], output_type="pt")
    torch.testing.assert_close(painted[:, :, :, :4], image[:, :, :, :4].expand(2, -1, -1, -1), rtol=0, atol=1e-5)
    assert not torch.allclose(painted[0, :, :, 4:], painted[1, :, :, 4:], atol=0.01)
    # compare latents, because images are clipped to [0, 1]
    latents = {}
    pipe.unet.register_forward_pre_hook(lambda module, inputs: latents.update(x=inputs[0]))
    colorize(pipe, image, num_inference_steps=50, seeds=[0], output_type="pt")
    grey = latents["x"].mean(1) - (2 * image - 1).mean(1)  # little noise is left at the last time
    assert grey.std() < 0.05


def test_classifier_free_guidance_extrapolates_two_predictions():
    pipe = pipeline_of("vp", num_class_embeds=4, dropout=0.0)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor(300.0), torch.tensor([0, 2])
    guidances = Guidance(labels), Guidance(torch.tensor([3, 3])), Guidance(labels, 2.5, null_class=3)
    conditional, null, guided = (guidance.model_output(pipe.unet.eval(), x, t) for guidance in guidances)
    torch.testing.assert_close(guided, null + 2.5 * (conditional - null), rtol=1e-4, atol=1e-5)


def test_unsupported_arguments_raise_one_line_errors():
    vp, ddpm = pipeline_of("vp"), pipeline_of("ddpm")
    learned = pipeline_of("ddpm", time_embedding_type="learned", num_train_timesteps=1000)
    mask, image = torch.ones(1, 1, 8, 8), torch.rand(1, 3, 8, 8)
    for message, call in {
        "no sampler 'flow_euler'; choose from euler_maruyama": lambda: vp.set_sampler("flow_euler"),
        "ddim takes no settings, but churn": lambda: ddpm.set_sampler("ddim", churn=0.1),
        "learned time embedding": lambda: encode(learned, image),
        "num_inference_steps is 1": lambda: vp(num_inference_steps=1),
        "cannot change the latents": lambda: vp(
            num_inference_steps=2, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)}
        ),
        "no table of classes with a null class": lambda: vp(guidance_scale=2.0),
        "trained in continuous time; use encode or": lambda: inpaint(vp, image, mask),
        "snr is 0": lambda: impute(vp, image, mask, snr=0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_clip_sample_clips_every_predicted_image():
    """An untrained network predicts any value; with clipping, every predicted x_0 lies in [-1, 1]."""
    largest, name = {}, "pred_original_sample"
    for clip in (True, False):
        pipe, seen = pipeline_of("vp"), []
        pipe.scheduler = SDEScheduler.from_config(pipe.scheduler.config, clip_sample=clip)
        callback = {"callback_on_step_end": lambda *args, seen=seen: seen.append(args[-1][name])}
        callback["callback_on_step_end_tensor_inputs"] = [name]
        pipe(seeds=[0], num_inference_steps=4, output_type="pt", **callback)
        largest[clip] = torch.cat(seen).abs().max().item()
    assert largest[True] == 1.0
    assert largest[False] > 2.0


@pytest.mark.parametrize(("objective", "name"), [("ve", "edm_heun"), ("vp", "edm_heun"), ("flow", "flow_heun")])
def test_default_sampler_and_interpolation_depend_on_the_objective(objective, name):
    """Heun for the straight paths of rectified flow, otherwise EDM's sampler, with churn for VE SDEs."""
    pipe = pipeline_of(objective)
    assert pipe.continuous_sampler.name == name
    assert pipe.continuous_sampler.settings.get("churn", 0.0) == (10.0 if objective == "ve" else 0.0)
    ends = interpolate(pipe, 0, 1, num_images=2, num_inference_steps=3, output_type="pt")
    pipe.set_sampler(name, **({"churn": 0.0} if objective == "ve" else {}))
    alone = pipe(seeds=[0], num_inference_steps=3, output_type="pt").images
    torch.testing.assert_close(ends[:1], alone, rtol=0, atol=1e-4)  # no noise is added


def test_setting_a_scheduler_or_a_sampler_replaces_the_other():
    pipe = pipeline_of("ddpm")
    pipe.set_sampler("ode")
    assert pipe.continuous_sampler.name == "ode"
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe.continuous_sampler is None
    pipe.set_sampler("ode")
    pipe.set_sampler("ddpm")
    assert pipe.continuous_sampler is None
    pipe = pipeline_of("vp")
    own, pipe.scheduler = pipe.scheduler, diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match=r"DDIMScheduler does not suit .*; use set_sampler with euler_maruyama, "):
        pipe(seeds=[0], num_inference_steps=2)
    pipe.set_sampler("edm_heun")
    assert pipe.scheduler is own
    for other in (pipe, pipeline_of("ddpm"), pipeline_of("flow")):
        other.scheduler = SDEScheduler(objective="vp")
        with pytest.raises(ValueError, match="does not have the SDE of the network's training"):
            other(seeds=[0], num_inference_steps=2)


@pytest.mark.parametrize("objective", ["ddpm", "vp"])
def test_saving_warns_that_the_choice_of_a_continuous_sampler_is_lost(objective, tmp_path, monkeypatch):
    pipe, warnings = pipeline_of(objective), []
    monkeypatch.setattr(custom_unet_pipeline.logger, "warning", warnings.append)
    pipe.save_pretrained(tmp_path)
    assert warnings == []
    pipe.set_sampler("ode")
    pipe.save_pretrained(tmp_path)
    assert warnings == ["The sampler ode is not saved: call set_sampler again after loading."]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "vesde"}, "objective is 'vesde'"),
        ({"objective": "ve"}, "ve takes score"),
        ({"objective": "vp", "prediction_type": "v"}, "vp takes epsilon or sample or v_prediction"),
        ({"beta_min": 30.0}, "beta_max 20.0"),
        ({"objective": "ve", "prediction_type": "score", "sigma_min": 0.0}, "sigma_min 0.0"),
        ({"objective": "edm", "prediction_type": "edm", "sigma_min": 100.0}, "sigma_min 100.0"),
        ({"objective": "edm", "prediction_type": "edm", "sigma_max": math.inf}, "sigma_max inf"),
    ],
)
def test_invalid_sde_scheduler_settings_raise_value_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        SDEScheduler(**settings)
