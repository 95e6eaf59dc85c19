"""Maximum mean discrepancies, MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y): KID and CMMD."""

from typing import NamedTuple

import numpy as np

from eval.frechet import check_features

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
BLOCK = 1024  # rows of a kernel matrix that are held at once


class KernelDistance(NamedTuple):
    """Attributes:
    mean: KID; unbiased, so it comes out below 0 now and then where the distributions are equal.
    std: standard deviation over the subsets, the spread that the literature gives; of subsets, not of the mean. None
        if every subset is the whole of both sets and nothing varies.
    num_subsets, subset_size: how it was measured.
    """

    mean: float
    std: float | None
    num_subsets: int
    subset_size: int


def kernel_distance(
    features1: np.ndarray,
    features2: np.ndarray,
    *,
    seed: int,
    num_subsets: int = 100,
    max_subset_size: int = 1000,
) -> KernelDistance:
    """KID (Binkowski et al. 2018, arXiv 1801.01401, section 4), in float64.

    The unbiased estimate of MMD^2 with the kernel k(x, y) = (x^T y / D + 1)^3, over random subsets of equal size m
    without replacement. They are drawn as clean-fid 0.1.35 does, so this is its figure after `np.random.seed(seed)`.

    Args:
        features1: shape (N, D), in clean-fid the reference.
        features2: shape (M, D).
        max_subset_size: m is this, or N or M if that is less.

    Raises:
        ValueError: if there are fewer than 2 features in a set, or they do not suit or are not finite.
    """
    check_features(features1, features2)
    size = min(len(features1), len(features2), max_subset_size)
    if size < 2 or num_subsets < 1:
        raise ValueError(f"KID cannot be had from {num_subsets} subsets of {size}; it needs 1 or more of at least 2")
    draws = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        x = features2[draws.choice(len(features2), size, replace=False)]
        y = features1[draws.choice(len(features1), size, replace=False)]
        values.append(_unbiased_polynomial_mmd(x.astype(np.float64), y.astype(np.float64)))
    varies = num_subsets > 1 and (size < len(features1) or size < len(features2))
    return KernelDistance(float(np.mean(values)), float(np.std(values)) if varies else None, num_subsets, size)


def _unbiased_polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """MMD_u^2 of Gretton et al. 2012 (JMLR 13), equation 3: an image is not compared with itself; both (m, D)."""
    size, dimensions = x.shape
    within = (x @ x.T / dimensions + 1) ** 3 + (y @ y.T / dimensions + 1) ** 3
    between = (x @ y.T / dimensions + 1) ** 3
    return (within.sum() - np.trace(within)) / (size * (size - 1)) - 2 * between.mean()


def cmmd(embeddings1: np.ndarray, embeddings2: np.ndarray) -> float:
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603), in float64.

    MMD^2 with the kernel exp(-|x - y|^2 / (2 sigma^2)), sigma 10, times 1000. The paper's code takes the biased
    estimate (Gretton et al. 2012, equation 5: every pair counts, an image with itself too), and so does this: it is
    never negative, 0 on identical sets, and above 0 by about 1/n on equal distributions. Compare it at equal n.

    Args:
        embeddings1: shape (N, D): image embeddings of CLIP, each of length 1.
        embeddings2: shape (M, D).

    Raises:
        ValueError: if there are fewer than 2 in a set, or they do not suit, are not finite or not of length 1.
    """
    check_features(embeddings1, embeddings2)
    x, y = np.asarray(embeddings1, np.float64), np.asarray(embeddings2, np.float64)
    lengths = np.linalg.norm(np.concatenate([x, y]), axis=1)
    if np.abs(lengths - 1).max() > 1e-3:
        raise ValueError(
            f"CMMD is of embeddings of length 1, but these have {lengths.min():.3g} to {lengths.max():.3g}; normalise"
        )
    return CMMD_SCALE * (_mean_gaussian_kernel(x, x) + _mean_gaussian_kernel(y, y) - 2 * _mean_gaussian_kernel(x, y))


def _mean_gaussian_kernel(x: np.ndarray, y: np.ndarray) -> float:
    """Mean of k over all pairs; (N, D) and (M, D), N x M never held at once."""
    total = 0.0
    y_squared = np.einsum("md,md->m", y, y)
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK]
        squared_distances = np.einsum("nd,nd->n", rows, rows)[:, None] + y_squared - 2 * rows @ y.T
        total += np.exp(-squared_distances / (2 * CMMD_SIGMA**2)).sum()
    return total / (len(x) * len(y))
