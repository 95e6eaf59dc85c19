"""Brightness, contrast and saturation of images: a check of their colours that needs no network.

SWD normalises each colour channel and therefore misses a tint that a person sees at once. Here each image is reduced
to three numbers, and a set of images to three distributions.
"""

import numpy as np
import torch

from eval.features import over_white

COLOURS = ("brightness", "contrast", "saturation")
LUMA = (0.299, 0.587, 0.114)  # of R, G and B: ITU-R BT.601
BLOCK = 512  # images processed at once


def colour_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """Computes three numbers per image, each (N,) in grey levels 0..255.

    They are `brightness`, the mean luma; `contrast`, the standard deviation of the luma; and `saturation`, the mean of
    max(R, G, B) - min(R, G, B). Images are uint8, (N, C, H, W), of 1 to 4 channels; transparent ones are composited on
    white.
    """
    blocks = []
    for first in range(0, len(images), BLOCK):
        block = over_white(torch.from_numpy(np.array(images[first : first + BLOCK]))).expand(-1, 3, -1, -1).numpy()
        luma = np.einsum("nchw,c->nhw", block, np.asarray(LUMA))
        spread = block.max(axis=1) - block.min(axis=1)  # (B, H, W)
        blocks.append([luma.mean(axis=(1, 2)), luma.std(axis=(1, 2)), spread.mean(axis=(1, 2))])
    return dict(zip(COLOURS, np.concatenate(blocks, axis=1), strict=True))
