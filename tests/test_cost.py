"""Samplers' settings, and what sampling with them costs."""

import argparse

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from eval.cost import SamplerSetting, sample
from pipelines import CustomUNetPipeline


@pytest.fixture
def pipe() -> CustomUNetPipeline:
    torch.manual_seed(0)
    pipe = CustomUNetPipeline(CustomUNet2DModel(**TINY), DDIMScheduler(prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ddpm", SamplerSetting("ddpm", 50)),
        ("ddim:10", SamplerSetting("ddim", 10)),
        ("ddim:10:1", SamplerSetting("ddim", 10, 1.0)),
        ("ode", SamplerSetting("ode", None)),
    ],
)
def test_a_setting_is_read_from_its_text(text, expected):
    assert SamplerSetting.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "ddim:x", "ddim:0", "ddim:-1", "euler2:5", "ddim:5:nan", "ddim:5:2", "ddim:5:1:1", "ode:20"]
)
def test_what_is_no_setting_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME, NAME:STEPS or NAME:STEPS:ETA"):
        SamplerSetting.parse(text)


@pytest.mark.parametrize(("sampler", "steps", "evaluations"), [("ddim", 4, 4), ("heun", 4, 7), ("pndm", 5, 14)])
def test_network_evaluations_are_counted(pipe, sampler, steps, evaluations):
    images, counted, seconds = sample(pipe, SamplerSetting(sampler, steps), range(5), batch_size=2)
    assert counted == evaluations
    assert seconds > 0
    assert (images.dtype, images.shape) == (np.uint8, (5, 3, 8, 8))


def test_images_are_those_of_their_seeds(pipe):
    images, _, _ = sample(pipe, SamplerSetting("ddim", 4, eta=1.0), [3, 1, 2], batch_size=2)
    alone = pipe(seeds=[2], num_inference_steps=4, eta=1.0).images[0]
    assert np.abs(images[2].transpose(1, 2, 0).astype(int) - np.asarray(alone)).max() <= 1


def test_a_setting_goes_to_the_samplers_that_take_it():
    settings = {"tolerance": 1e-2, "churn": 20.0}
    found = [str(SamplerSetting.parse(text).with_settings(settings)) for text in ("ode", "edm_heun:5", "ddim:5:1")]
    assert found == ["ode, tolerance 0.01", "edm_heun, 5 steps, churn 20", "ddim, 5 steps, eta 1"]


@pytest.mark.parametrize(
    ("sampler", "evaluations", "settings"),
    [
        ("euler_maruyama", 5, {}),
        ("reverse_diffusion", 5, {}),
        ("predictor_corrector", 11, {"corrector_steps": 2}),
        ("edm_heun", 7, {"churn": 2.0}),
    ],
)
def test_samplers_in_continuous_time(pipe, sampler, evaluations, settings):
    images, counted, _ = sample(pipe, SamplerSetting(sampler, 4, sampler_settings=settings), range(3), batch_size=2)
    assert counted == evaluations
    assert images.shape == (3, 3, 8, 8)


def test_evaluations_of_the_ode_are_the_mean_over_the_images(pipe):
    setting = SamplerSetting("ode", None, sampler_settings={"tolerance": 1e-2})
    setting.set_on(pipe)
    batches = [pipe(seeds=seeds, output_type="pt").network_evaluations for seeds in ([0, 1], [2])]
    _, counted, _ = sample(pipe, setting, range(3), batch_size=2)
    assert counted == pytest.approx((2 * batches[0] + batches[1]) / 3)


def test_what_does_not_suit_is_refused(pipe):
    for setting in (SamplerSetting("ddim", 2000), SamplerSetting("edm_heun", 4, eta=1.0)):
        with pytest.raises(ValueError, match=r"num_inference_steps is 2000|eta is 1\.0"):
            setting.set_on(pipe)
    with pytest.raises(ValueError, match=r"ode .*churn"):
        SamplerSetting("ode", None, sampler_settings={"churn": 1.0}).set_on(pipe)


def test_each_image_has_its_class():
    torch.manual_seed(0)
    network = CustomUNet2DModel(**TINY, num_class_embeds=3)
    pipe = CustomUNetPipeline(network, DDIMScheduler(prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    setting = SamplerSetting("ddim", 3)
    images, _, _ = sample(pipe, setting, [5, 6, 7], 2, class_labels=[1, 0, 1], guidance_scale=2.0)
    alone = pipe(seeds=[7], num_inference_steps=3, class_labels=[1], guidance_scale=2.0).images[0]
    assert np.abs(images[2].transpose(1, 2, 0).astype(int) - np.asarray(alone)).max() <= 1
    other = sample(pipe, setting, [7], 2, class_labels=[0], guidance_scale=2.0)[0]
    assert not np.array_equal(other[0], images[2])
