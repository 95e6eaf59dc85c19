"""Distances between two sets of images, from their features: FID, KID, CMMD, precision and recall.

Features are finite arrays of shape (N, D), see `eval.features`. All of these metrics except KID depend on the number
of images; compare them only at equal n.
"""

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
BLOCK = 1024  # rows of a distance matrix that are in memory at once


def frechet_distance(features1: np.ndarray, features2: np.ndarray) -> float:
    """FID (Inception features) or FD-DINOv2 (DINOv2 features): squared Frechet distance of two Gaussians, in float64.

        d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))        Heusel et al. 2017 (arXiv 1706.08500), equation 6

    with the means m and the covariances S (over N - 1) of the features, (N, D) and (M, D). For S = R^T R, the trace
    of the root is the sum of the singular values of R1 R2^T. R comes from the QR decomposition of the centred
    features: the covariance is never formed and may be singular, and no square root magnifies rounding errors near 0.
    """
    means = [features.mean(axis=0, dtype=np.float64) for features in (features1, features2)]
    roots = []
    for features, mean in zip((features1, features2), means, strict=True):
        roots.append(linalg.qr((features - mean) / np.sqrt(len(features) - 1), mode="r")[0][: len(mean)])
    trace_of_root = linalg.svdvals(roots[0] @ roots[1].T).sum()
    squared = ((means[0] - means[1]) ** 2).sum() + sum((root**2).sum() for root in roots) - 2 * trace_of_root
    return max(float(squared), 0.0)  # rounding can make it negative


def kernel_distance(
    features1: np.ndarray, features2: np.ndarray, *, seed: int, num_subsets: int = 100, max_subset_size: int = 1000
) -> dict:
    """KID (Binkowski et al. 2018, arXiv 1801.01401, section 4), in float64.

    The unbiased estimate of MMD^2 with the kernel k(x, y) = (x^T y / D + 1)^3, averaged over random subsets of size m,
    drawn without replacement as in clean-fid 0.1.35: the value is clean-fid's after `np.random.seed(seed)`.

    Args:
        features1, features2: shapes (N, D) and (M, D); the first is the reference in clean-fid.
        max_subset_size: m is the minimum of this, N and M.

    Returns `value`, the mean over the subsets, which can be negative since the estimate is unbiased; `std` over the
    subsets, as reported in the literature (not the standard error of the mean), None if every subset is the full set;
    `num_subsets` and `subset_size`.
    """
    size = min(len(features1), len(features2), max_subset_size)
    draws, values = np.random.RandomState(seed), []
    for _ in range(num_subsets):
        x = features2[draws.choice(len(features2), size, replace=False)]
        y = features1[draws.choice(len(features1), size, replace=False)]
        values.append(_unbiased_polynomial_mmd(x.astype(np.float64), y.astype(np.float64)))
    varies = size < len(features1) or size < len(features2)
    spread = float(np.std(values)) if varies else None
    return {"value": float(np.mean(values)), "std": spread, "num_subsets": num_subsets, "subset_size": size}


def _unbiased_polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """MMD_u^2 of Gretton et al. 2012 (JMLR 13), equation 3, without comparing an image to itself; both (m, D)."""
    size, dimensions = x.shape
    within = (x @ x.T / dimensions + 1) ** 3 + (y @ y.T / dimensions + 1) ** 3
    between = (x @ y.T / dimensions + 1) ** 3
    return (within.sum() - np.trace(within)) / (size * (size - 1)) - 2 * between.mean()


def cmmd(embeddings1: np.ndarray, embeddings2: np.ndarray) -> float:
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603), in float64.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y) with the kernel exp(-|x - y|^2 / (2 sigma^2)), sigma 10, times 1000,
    for CLIP image embeddings of norm 1, (N, D) and (M, D). Like the paper's code, this is the biased estimate (Gretton
    et al. 2012, equation 5: it counts every pair, including an image with itself): it is never negative, 0 for
    identical sets, and about 1/n above 0 for equal distributions.
    """
    x, y = (torch.from_numpy(np.asarray(embeddings, np.float64)) for embeddings in (embeddings1, embeddings2))

    def mean_kernel(a: Tensor, b: Tensor) -> float:
        sums = [(torch.cdist(rows, b).square() / (-2 * CMMD_SIGMA**2)).exp().sum() for rows in a.split(BLOCK)]
        return float(sum(sums)) / (len(a) * len(b))

    return CMMD_SCALE * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def prdc(real: np.ndarray, generated: np.ndarray, *, k: int = 5) -> dict[str, float]:
    """Precision and recall, density and coverage: they measure fidelity and diversity separately.

    The support of each set is estimated by a ball around every sample that reaches to its k-th nearest other sample:

        precision  share of generated samples in a ball of a real one       Kynkaanniemi et al. 2019
        recall     share of real samples in a ball of a generated one       (arXiv 1904.06991), eq. 1 and 2; k = 3
        density    number of real balls around a generated sample, over k   Naeem et al. 2020
        coverage   share of real balls with a generated sample in them      (arXiv 2002.09797), section 3; k = 5

    All but density are in [0, 1]. For equal distributions the expected density is 1 and the expected coverage
    1 - (N-1)...(N-k) / ((M+N-1)...(M+N-k)); precision and recall depend on the distribution. Balls are closed, as in
    equation 1 of the first paper; the package `prdc` uses open balls, which differs only for tied distances.

    Args:
        real, generated: shapes (N, D) and (M, D), any real type; N, M > k.
    """
    centre = real.mean(axis=0, dtype=np.float64)  # far from the origin, rounding would swamp the differences
    real, generated = (torch.from_numpy(features - centre) for features in (real, generated))
    longest = max(features.square().sum(1).max() for features in (real, generated))
    slack = 4 * (real.shape[1] + 8) * 2.0**-53 * longest  # rounding error of two squared distances; keeps ties
    real_radii = squared_radii(real, k) + slack
    generated_radii = squared_radii(generated, k) + slack
    num_precise, num_balls = 0, 0
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool)
    for points, radii in zip(generated.split(BLOCK), generated_radii.split(BLOCK), strict=True):
        distances = torch.cdist(points, real).square_()  # (BLOCK, N)
        in_real_ball = distances <= real_radii
        num_precise += int(in_real_ball.any(1).sum())
        num_balls += int(in_real_ball.sum())
        covered |= in_real_ball.any(0)
        recalled |= (distances <= radii[:, None]).any(0)
    return {
        "precision": num_precise / len(generated),
        "recall": float(recalled.double().mean()),
        "density": num_balls / (k * len(generated)),
        "coverage": float(covered.double().mean()),
    }


def squared_radii(points: Tensor, k: int) -> Tensor:
    """Squared distance of each point to its k-th nearest other point (the 0-th is itself); (N, D) -> (N,)."""
    distances = (torch.cdist(rows, points) for rows in points.split(BLOCK))
    return torch.cat([rows.kthvalue(k + 1, dim=1).values for rows in distances]).square()
