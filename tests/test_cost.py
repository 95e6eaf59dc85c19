"""The cost curve's settings, and what a sampling costs."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from eval.cost import EvaluationCounter, SamplerSetting, sample, settings_grid
from pipelines import CustomUNetPipeline


@pytest.fixture
def pipe() -> CustomUNetPipeline:
    torch.manual_seed(0)
    pipe = CustomUNetPipeline(CustomUNet2DModel(**TINY), DDIMScheduler(prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_only_ddim_takes_eta():
    grid = [str(setting) for setting in settings_grid(["ddpm", "ddim"], [5, 10], [0.0, 1.0])]
    assert grid == [
        "ddpm, 5 steps",
        "ddpm, 10 steps",
        "ddim, 5 steps",
        "ddim, 10 steps",
        "ddim, 5 steps, eta 1",
        "ddim, 10 steps, eta 1",
    ]


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
    assert not pipe.unet._forward_hooks


def test_the_counter_lets_go_after_an_error(pipe):
    with pytest.raises(RuntimeError, match="stop"), EvaluationCounter(pipe.unet):
        raise RuntimeError("stop")
    assert not pipe.unet._forward_hooks
