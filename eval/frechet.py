"""The Frechet distance of two Gaussians and what is made of it: FID in Inception's features, FD-DINOv2 in DINOv2's.

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))        Heusel et al. 2017 (arXiv 1706.08500), equation 6

between Gaussians with the means m and covariances S of the features of two sets of images. It falls as the sets grow,
by about 1/n: compare it only at equal n.
"""

import numpy as np
from scipy import linalg


def frechet_distance(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> float:
    """The squared distance of N(mean1, covariance1) and N(mean2, covariance2), in float64.

    Args:
        mean1, mean2: shape (D,).
        covariance1, covariance2: shape (D, D), symmetric and positive semidefinite; they may be singular.

    Raises:
        ValueError: if the shapes do not suit, a number is not finite, or a covariance is none.
    """
    _check_moments(mean1, covariance1, mean2, covariance2)
    return _distance(mean1, covariance1, _root(covariance1), mean2, covariance2, _root(covariance2))


def frechet_distance_of(features1: np.ndarray, features2: np.ndarray) -> float:
    """The squared distance of the Gaussians of two sets of features, (N, D) and (M, D).

    Raises:
        ValueError: as `mean_and_covariance` and `frechet_distance`.
    """
    return frechet_distance(*mean_and_covariance(features1), *mean_and_covariance(features2))


def mean_and_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64, shapes (D,) and (D, D), the covariance over N - 1.

    Args:
        features: shape (N, D), any real type; N at least 2.

    Raises:
        ValueError: if there are fewer than 2 or they are not finite.
    """
    check_features(features)
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def _root(covariance: np.ndarray) -> np.ndarray:
    """A with A A^T = covariance, shape (D, rank); directions of no variance but rounding are left out."""
    covariance = np.asarray(covariance, np.float64)
    values, vectors = linalg.eigh(covariance)
    rounding = len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    if values.min() < -1e-6 * max(np.abs(values).max(), 1e-300):
        raise ValueError(f"a covariance has the eigenvalue {values.min():.3g}; it must be positive semidefinite")
    kept = values > rounding
    return vectors[:, kept] * np.sqrt(values[kept])


def _distance(mean1, covariance1, root1, mean2, covariance2, root2) -> float:
    """The eigenvalues of S1 S2 are those of (A1^T A2)(A1^T A2)^T, the squared singular values of A1^T A2.

    So the trace of (S1 S2)^(1/2) is their sum: it is real, and no rounding is magnified by a root near 0.
    """
    difference = np.asarray(mean1, np.float64) - np.asarray(mean2, np.float64)
    overlap = root1.T @ root2  # (rank1, rank2)
    trace_of_root = linalg.svdvals(overlap).sum() if overlap.size else 0.0
    squared = difference @ difference + np.trace(covariance1) + np.trace(covariance2) - 2 * trace_of_root
    return max(float(squared), 0.0)  # rounding may take it below


def _check_moments(mean1, covariance1, mean2, covariance2) -> None:
    dimensions = len(mean1) if np.ndim(mean1) == 1 else 0
    wanted = [(dimensions,), (dimensions, dimensions)] * 2
    moments = (mean1, covariance1, mean2, covariance2)
    if not dimensions or [np.shape(moment) for moment in moments] != wanted:
        shapes = ", ".join(str(np.shape(moment)) for moment in moments)
        raise ValueError(f"the means and covariances have shapes {shapes}; they must be (D,), (D, D), (D,), (D, D)")
    if not all(np.isfinite(moment).all() for moment in moments):
        raise ValueError("a mean or covariance is not finite; look at the images that it comes from")


def check_features(*sets: np.ndarray) -> None:
    """Raises ValueError unless each is (N, D) with one D, finite, and N is at least 2."""
    shapes = [np.shape(features) for features in sets]
    if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) != 1:
        raise ValueError(
            f"the features have shapes {', '.join(map(str, shapes))}; they must be (N, D), all with one D"
        )
    for features in sets:
        if len(features) < 2:
            raise ValueError(
                f"there are features of {len(features)} images; a distance of distributions needs 2 or more"
            )
        if not np.isfinite(features).all():
            raise ValueError("some features are not finite; look at the images that they come from")
