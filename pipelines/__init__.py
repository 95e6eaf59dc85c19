"""Sampling and sharing: the pipeline, and the model repository that it is loaded from."""

from custom_unet import CustomUNet2DModel
from pipelines.custom_unet_pipeline import CustomUNetPipeline

# Inside this repository the hand-written network is at hand, so loading needs no code from the model repository.
CustomUNetPipeline.unet_class = CustomUNet2DModel

__all__ = ["CustomUNetPipeline"]
