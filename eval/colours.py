"""Brightness, contrast and saturation of images: a check of their colours that needs no network.

SWD normalises each colour channel, so that it overlooks a tint that a person sees at once. Here each image is three
numbers, and a set of images three distributions.
"""

import numpy as np
from scipy.stats import wasserstein_distance

COLOURS = ("brightness", "contrast", "saturation")
LUMA = (0.299, 0.587, 0.114)  # of R, G and B: ITU-R BT.601
TAILS_PERCENT = 0.5  # of the real images on each side that count as extreme
BLOCK = 512  # images at once


def colour_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """The distributions, each (N,) in grey levels 0..255.

    Args:
        images: uint8, shape (N, 3, H, W).

    Returns:
        by name: `brightness`, the mean luma of an image; `contrast`, the standard deviation of its luma;
        `saturation`, the mean of max(R, G, B) - min(R, G, B).
    """
    parts = [_colour_statistics(images[first : first + BLOCK]) for first in range(0, len(images), BLOCK)]
    return dict(zip(COLOURS, np.concatenate(parts, axis=1), strict=True))


def _colour_statistics(images: np.ndarray) -> np.ndarray:
    """(B, 3, H, W) -> float64 (3, B)."""
    luma = np.einsum("nchw,c->nhw", images, np.asarray(LUMA)).reshape(len(images), -1)
    spread = images.max(axis=1) - images.min(axis=1)  # (B, H, W)
    return np.stack([luma.mean(axis=1), luma.std(axis=1), spread.reshape(len(images), -1).mean(axis=1)])


def colour_distance(values: np.ndarray, real: np.ndarray) -> float:
    """The Wasserstein distance of order 1 between two distributions, in grey levels; (N,) and (M,)."""
    return float(wasserstein_distance(values, real))


def share_of_extremes(values: np.ndarray, real: np.ndarray) -> float:
    """Share of the values outside the central 99 % of the real ones; (N,) and (M,)."""
    low, high = np.percentile(real, [TAILS_PERCENT, 100 - TAILS_PERCENT])
    return float(np.mean((values < low) | (values > high)))
