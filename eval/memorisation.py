"""Tests whether the model copies training images, by comparing how near generated and held-out images are to them.

Held-out images come from the same distribution and cannot have been copied, so their distances to the nearest training
images show what is normal. Inspect generated images that are nearer than that: they may be copies.

A blurred image is nearer in pixels to every other image than a sharp one, so a ratio below 1 may come from blur. To
tell blur from copying, look at whether the nearest real image is a training or a held-out image: a model that
generalises treats both alike, however much it blurs (Meehan et al. 2020, arXiv 2004.05675, compare both distances).
Data sets also contain near-copies: a held-out image that almost repeats a training image would lower the minimum, so
that no generated image falls below it. Held-out images nearer than `duplicate_distance` are left out and counted.
"""

from dataclasses import dataclass

import numpy as np

from common import InputError

NUM_PAIRS = 16  # listed as possible copies


@dataclass(frozen=True)
class MemorisationReport:
    """Distances to the nearest training image, and the statistics derived from them.

    For images, distances are root mean squares over the pixels in grey levels (0..255); for features, L2 norms. Shares
    of the generated images, in [0, 1], are pairs: measured, and expected of a model that generalises perfectly.
    """

    distances: np.ndarray  # (N,), of the generated images
    heldout_distances: np.ndarray  # (M,), of the held-out images, near-copies left out
    num_heldout_duplicates: int  # held-out images left out as near-copies of training images
    share_below_minimum: tuple[float, float]  # nearer than the smallest held-out distance
    share_below_percentile: tuple[float, float]  # nearer than the first percentile of the held-out distances
    share_nearest_heldout: tuple[float, float]  # nearer to a held-out image than to any training image
    std_share_nearest_heldout: float | None  # over groups of training images that take the place of the held-out ones
    nearest_pairs: list[dict]  # indices of a generated and a training image, nearest first, and whether it is mirrored

    @property
    def heldout_median(self) -> float:
        return float(np.median(self.heldout_distances))

    @property
    def ratio(self) -> float:
        """Median distance of generated images over that of held-out images: about 1 if the model generalises."""
        return float(np.median(self.distances)) / self.heldout_median


def memorisation(
    generated: np.ndarray, heldout: np.ndarray, training: np.ndarray, *, duplicate_distance: float = 0.0
) -> MemorisationReport:
    """Compares the distances of generated and held-out images to the training images.

    Mirrored training images count as training images, because training flips them; features cannot be mirrored.

    Args:
        generated, heldout, training: uint8 images, shapes (N, C, H, W), or their features, shapes (N, D).
        duplicate_distance: held-out images nearer to a training image than this are left out, as near-copies in the
            data; in the unit of the report.

    Raises InputError if most held-out images are training images, or all are nearer than the distance.
    """
    distances, indices, mirrored = nearest_training(generated, training)
    is_heldout_nearest = nearest_training(generated, heldout)[0] < distances
    # Groups of training images, each as large as the held-out set, take its place; images left over form no group
    num_groups = len(training) // len(heldout)
    groups = np.bincount(indices[~is_heldout_nearest] // len(heldout), minlength=num_groups)[:num_groups]
    shares = groups / len(generated)
    heldout_distances, _, _ = nearest_training(heldout, training)
    if training.ndim == 4:  # L2 -> root mean square over the pixels
        distances, heldout_distances = (d / training[0].size ** 0.5 for d in (distances, heldout_distances))
    is_duplicate = heldout_distances < duplicate_distance
    heldout_distances = heldout_distances[~is_duplicate]
    if len(heldout_distances) == 0 or np.median(heldout_distances) == 0:
        near = f"training images or nearer to one than {duplicate_distance}"
        raise InputError(f"too many held-out images are {near}; use others, or lower --duplicate_distance")
    minimum, percentile_1 = heldout_distances.min(), np.percentile(heldout_distances, 1)
    nearest_pairs = []
    for i in np.argsort(distances, kind="stable")[:NUM_PAIRS].tolist():
        pair = {"generated": i, "training": int(indices[i]), "mirrored": bool(mirrored[i])}
        nearest_pairs.append(pair | {"distance": float(distances[i])})
    return MemorisationReport(
        distances=distances,
        heldout_distances=heldout_distances,
        num_heldout_duplicates=int(is_duplicate.sum()),
        share_below_minimum=(float((distances < minimum).mean()), 1 / (len(heldout_distances) + 1)),
        share_below_percentile=(float((distances < percentile_1).mean()), 0.01),
        share_nearest_heldout=(float(is_heldout_nearest.mean()), len(heldout) / (len(heldout) + len(training))),
        std_share_nearest_heldout=float(shares.std(ddof=1)) if len(shares) > 1 else None,
        nearest_pairs=nearest_pairs,
    )


def nearest_training(queries: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`nearest_distances`, and whether the training image is nearest when mirrored: three arrays of shape (N,)."""
    distances, indices = nearest_distances(queries, training)
    if training.ndim == 2:  # features
        return distances, indices, np.zeros(len(queries), bool)
    # |query - mirrored reference| = |mirrored query - reference|
    mirrored_distances, mirrored_indices = nearest_distances(queries[..., ::-1], training)
    mirrored = mirrored_distances < distances
    return np.minimum(distances, mirrored_distances), np.where(mirrored, mirrored_indices, indices), mirrored


def nearest_distances(
    queries: np.ndarray, references: np.ndarray, *, chunk: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """L2 distance of each query to its nearest reference, and the index of that reference (the lowest if tied).

    Matrix products in float64 find the nearest reference; for pixels they are exact, being sums of integers below
    2^53. The distance is then computed from the difference, so that a copy has a distance of exactly 0.

    Args:
        queries, references: shapes (N, ...) and (M, ...), uint8 or floating; references may be memory-mapped.
        chunk: queries and references compared at once, which takes 8 bytes x chunk x (chunk + 2 D) of memory.

    Returns distances, float64, and indices, int64, both (N,).
    """
    queries, references = queries.reshape(len(queries), -1), references.reshape(len(references), -1)
    distances, indices = np.empty(len(queries)), np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), chunk):
        rows, index = queries[start : start + chunk].astype(np.float64), indices[start : start + chunk]
        best = np.full(len(rows), np.inf)
        for first in range(0, len(references), chunk):
            block = references[first : first + chunk].astype(np.float64)
            squared = np.einsum("md,md->m", block, block) - 2 * rows @ block.T  # |query - reference|^2 - |query|^2
            nearest, smallest = squared.argmin(axis=1), squared.min(axis=1)
            is_better = smallest < best
            best[is_better], index[is_better] = smallest[is_better], first + nearest[is_better]
        distances[start : start + chunk] = np.linalg.norm(rows - references[index], axis=1)
    return distances, indices
