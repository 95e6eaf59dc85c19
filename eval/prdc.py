"""Precision and recall, density and coverage of generated images, from features: fidelity and diversity apart.

Each set stands for its support by balls, one around every sample, that reach to its k-th nearest other sample:

    precision  share of generated samples in a ball of a real one          Kynkaanniemi et al. 2019 (arXiv 1904.06991),
    recall     share of real samples in a ball of a generated one          equations 1 and 2; k = 3 there
    density    number of real balls around a generated sample, over k      Naeem et al. 2020 (arXiv 2002.09797),
    coverage   share of real balls with a generated sample in them         section 3; k = 5 there

Balls are closed, as in equation 1 of the first paper. (The package `prdc` takes open ones, which differs only where
distances tie: of two identical sets the density is (k + 1)/k here and 1 there.)
"""

import numpy as np


def prdc(
    real_features: np.ndarray, generated_features: np.ndarray, *, k: int = 5, chunk: int = 1024
) -> dict[str, float]:
    """Precision, recall, density and coverage.

    All but density are in [0, 1]. For equal distributions the expected density is 1 and the expected coverage is
    `expected_coverage`; precision and recall depend on the distribution. All depend on N and M.

    Args:
        real_features: shape (N, D), any real type; N above k.
        generated_features: shape (M, D); M above k.
        chunk: rows whose distances to all others are held at once, as float64. In all the memory is about
            8 bytes x ((N + M) D + 2 chunk max(N, M)).

    Raises:
        ValueError: if the shapes or k do not suit or a feature is not finite.
    """
    _check(real_features, generated_features, k)
    centre = real_features.mean(axis=0, dtype=np.float64)  # far from the origin, differences would drown in rounding
    real, generated = real_features - centre, generated_features - centre
    longest = max(np.einsum("nd,nd->n", x, x).max() for x in (real, generated))
    slack = 4 * (real.shape[1] + 8) * 2.0**-53 * longest  # of two squared distances' rounding: a tie is a tie
    real_radii = nearest_neighbour_radii(real, k, chunk) + slack  # (N,), squared
    generated_radii = nearest_neighbour_radii(generated, k, chunk) + slack  # (M,), squared
    num_precise, num_balls = 0, 0
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for start in range(0, len(generated), chunk):
        rows = slice(start, start + chunk)
        distances = squared_distances(generated[rows], real)  # (chunk, N)
        in_real_ball = distances <= real_radii
        num_precise += int(in_real_ball.any(axis=1).sum())
        num_balls += int(in_real_ball.sum())
        covered |= in_real_ball.any(axis=0)
        recalled |= (distances <= generated_radii[rows, None]).any(axis=0)
    return {
        "precision": num_precise / len(generated),
        "recall": float(recalled.mean()),
        "density": num_balls / (k * len(generated)),
        "coverage": float(covered.mean()),
    }


def expected_coverage(num_real: int, num_generated: int, k: int) -> float:
    """Coverage to expect of equal continuous distributions, whichever they are (Naeem et al. 2020, section 3).

    A real sample is not covered if its k nearest among the N - 1 other real and the M generated samples are all real:
    1 - (N-1)...(N-k) / ((M+N-1)...(M+N-k)).
    """
    i = np.arange(1, k + 1)
    return float(1 - np.prod((num_real - i) / (num_generated + num_real - i)))


def nearest_neighbour_radii(points: np.ndarray, k: int, chunk: int) -> np.ndarray:
    """Squared distance of each point to its k-th nearest other point; (N, D) -> (N,)."""
    radii = []
    for start in range(0, len(points), chunk):
        distances = squared_distances(points[start : start + chunk], points)
        own = np.arange(len(distances))
        distances[own, start + own] = np.inf  # a point is not its own neighbour, but its duplicate is
        distances.partition(k - 1, axis=1)
        radii.append(distances[:, k - 1].copy())
    return np.concatenate(radii)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a|^2 + |b|^2 - 2ab; float64, (N, D) and (M, D) -> (N, M)."""
    distances = a @ (-2 * b.T)
    distances += np.einsum("nd,nd->n", a, a)[:, None]
    distances += np.einsum("md,md->m", b, b)
    return np.maximum(distances, 0, out=distances)


def _check(real: np.ndarray, generated: np.ndarray, k: int) -> None:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"the features have shapes {real.shape} and {generated.shape}; they must be (N, D) and (M, D)"
        )
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= k:
            raise ValueError(f"{len(features)} {name} features have no {k}-th nearest neighbour; give more or lower k")
        if not np.isfinite(features).all():
            raise ValueError(f"some {name} features are not finite; look at the images they come from")
