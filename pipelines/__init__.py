"""Sampling and sharing: the pipeline, and the model repository that it is loaded from."""

from custom_unet import CustomUNet2DModel
from pipelines.custom_unet_pipeline import CustomUNetPipeline
from training.sde import SDEScheduler

# Inside this repository these are at hand, so loading needs no code from the model repository.
CustomUNetPipeline.unet_class = CustomUNet2DModel
CustomUNetPipeline.sde_scheduler_class = SDEScheduler

__all__ = ["CustomUNetPipeline"]
