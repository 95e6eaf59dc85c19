"""Brightness, contrast and saturation of images: a check of their colours that needs no network.

SWD normalises each colour channel, and Inception was trained to look past lighting, so that both overlook a tint that
a person sees at once. Here each image is three numbers, and a set of images three distributions.
"""

import numpy as np
from scipy.stats import wasserstein_distance

LUMA = (0.299, 0.587, 0.114)  # of R, G and B: ITU-R BT.601
TAILS_PERCENT = 0.5  # of the real images on each side that count as extreme


def colour_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """The distributions, each (N,) in grey levels 0..255.

    Args:
        images: uint8, shape (N, 3, H, W).

    Returns:
        by name: `brightness`, the mean luma of an image; `contrast`, the standard deviation of its luma;
        `saturation`, the mean of max(R, G, B) - min(R, G, B).
    """
    luma = np.einsum("nchw,c->nhw", images, np.asarray(LUMA)).reshape(len(images), -1)
    spread = images.max(axis=1) - images.min(axis=1)  # (N, H, W)
    return {
        "brightness": luma.mean(axis=1),
        "contrast": luma.std(axis=1),
        "saturation": spread.reshape(len(images), -1).mean(axis=1),
    }


def colour_distance(values: np.ndarray, real: np.ndarray) -> float:
    """The Wasserstein distance of order 1 between two distributions, in grey levels; (N,) and (M,)."""
    return float(wasserstein_distance(values, real))


def share_of_extremes(values: np.ndarray, real: np.ndarray) -> float:
    """Share of the values that all but 1 % of the real ones are further in than, on either side; (N,) and (M,)."""
    low, high = np.percentile(real, [TAILS_PERCENT, 100 - TAILS_PERCENT])
    return float(np.mean((values < low) | (values > high)))
