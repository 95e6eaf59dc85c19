"""Settings of samplers: their text, and what does not suit a model."""

import argparse

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from eval.evaluation import SamplerSetting
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


def test_a_setting_goes_to_the_samplers_that_take_it():
    settings = {"tolerance": 1e-2, "churn": 20.0}
    found = [str(SamplerSetting.parse(text).with_settings(settings)) for text in ("ode", "edm_heun:5", "ddim:5:1")]
    assert found == ["ode, tolerance 0.01", "edm_heun, 5 steps, churn 20", "ddim, 5 steps, eta 1"]


def test_what_does_not_suit_is_refused(pipe):
    for setting in (SamplerSetting("ddim", 2000), SamplerSetting("edm_heun", 4, eta=1.0)):
        with pytest.raises(ValueError, match=r"num_inference_steps is 2000|eta is 1\.0"):
            setting.set_on(pipe)
    with pytest.raises(ValueError, match=r"ode .*churn"):
        SamplerSetting("ode", None, sampler_settings={"churn": 1.0}).set_on(pipe)
