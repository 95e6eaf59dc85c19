"""The U-Net of the project, in one file that is also shipped with every trained model."""

from custom_unet.custom_unet_2d import CustomUNet2DModel

__all__ = ["CustomUNet2DModel"]
