"""Pipelines of small random networks."""

import torch
from diffusers import DDIMScheduler
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from pipelines import CustomUNetPipeline
from training.sde import SDEScheduler

# Models trained in continuous time: arguments of the network and of the scheduler
SDES = {
    "vp": ({}, {"beta_max": 15.0}),
    "subvp": ({}, {"prediction_type": "v_prediction"}),
    "ve": ({"time_embedding_type": "fourier"}, {"prediction_type": "score", "sigma_max": 30.0}),
    "edm": ({}, {"prediction_type": "edm", "sigma_data": 0.6, "noise_mean": -1.0}),
    "flow": ({}, {"prediction_type": "flow_prediction", "time_density": "logit_normal", "clip_sample": False}),
}


def quiet(pipe: CustomUNetPipeline) -> CustomUNetPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pipeline(scheduler=None, seed: int = 0, **network) -> CustomUNetPipeline:
    """A pipeline with random weights, by default with DDIM."""
    torch.manual_seed(seed)
    return quiet(CustomUNetPipeline(CustomUNet2DModel(**TINY | network), scheduler or DDIMScheduler()))


def sde_pipeline(objective: str, **network) -> CustomUNetPipeline:
    """A pipeline for one of `SDES`."""
    own, process = SDES[objective]
    return tiny_pipeline(SDEScheduler(objective=objective, **process), **own | network)
