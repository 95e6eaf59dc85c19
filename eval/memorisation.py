"""Does the model copy its training images? Nearest training neighbours of generated and of held-out images.

Held-out images come from the same distribution and cannot have been copied, so the distances from them to their
nearest training images say what is usual. Generated images that are nearer than that are suspects, to be looked at.

Two biases to know. A smooth or blurred image is nearer in pixels to every other image than a sharp one, so a ratio
below 1 may be blur; a copy shows in the shares and the pairs. And data sets hold near-copies of their own: a held-out
image that nearly repeats a training image lowers the minimum, so that no generated image falls below it. Held-out
images nearer than `duplicate_distance` are therefore left out and counted.

What tells blur from copying is which real image is the nearest of all. To a model that generalises, training and
held-out images are alike, however it blurs; a model that is drawn to what it saw has held-out images as its nearest
ones too seldom. (Meehan, Chaudhuri and Dasgupta 2020, arXiv 2004.05675, compare the two kinds of distances for it.)
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common import InputError

NUM_PAIRS = 16  # suspects that are listed


class Pair(NamedTuple):
    """A generated image and its nearest training image, by index."""

    generated: int
    training: int
    mirrored: bool  # the training image is nearest when mirrored left to right
    distance: float


class Share(NamedTuple):
    """Of the generated images."""

    value: float
    expected: float  # for a model that generalises perfectly


@dataclass(frozen=True)
class MemorisationReport:
    """Distances to the nearest training image, and what they say of the model.

    They are root mean squares over the pixels in grey levels (0..255) for images, L2 for features.
    """

    distances: np.ndarray  # (N,), of the generated images
    heldout_distances: np.ndarray  # (M,), of the held-out images, near-copies left out
    num_heldout_duplicates: int  # held-out images left out as near-copies of training images
    share_below_minimum: Share  # of the held-out distances
    share_below_percentile: Share  # the first of them
    share_nearest_heldout: Share  # those with a held-out image nearer than any training image
    std_share_nearest_heldout: float | None  # over as many training images in the place of the held-out ones
    pairs: list[Pair]  # the nearest ones, nearest first

    @property
    def heldout_median(self) -> float:
        return float(np.median(self.heldout_distances))

    @property
    def ratio(self) -> float:
        """Of the medians, generated to held-out: about 1 if the model generalises."""
        return float(np.median(self.distances)) / self.heldout_median


def memorisation(
    generated: np.ndarray, heldout: np.ndarray, training: np.ndarray, *, duplicate_distance: float = 0.0
) -> MemorisationReport:
    """Compares how near generated and held-out images come to the training images.

    Mirrored training images count as training images, as training flips them; features cannot be mirrored.

    Args:
        generated: uint8 images, shape (N, C, H, W), or features of them, shape (N, D).
        heldout: images from the distribution of the training images that are not among them, the same kind.
        training: the images that the model was trained on, the same kind.
        duplicate_distance: held-out images nearer to a training image than this are left out, as near-copies in the
            data; in the unit of the report.

    Raises:
        InputError: if all held-out images are near-copies, or most of them are training images.
    """
    distances, indices, mirrored = nearest_training(generated, training)
    is_heldout_nearest = nearest_training(generated, heldout)[0] < distances
    shares = shares_of_groups(indices[~is_heldout_nearest], len(training), len(heldout)) * (~is_heldout_nearest).mean()
    heldout_distances, _, _ = nearest_training(heldout, training)
    if training.ndim == 4:  # L2 -> root mean square over the pixels
        distances, heldout_distances = (d / training[0].size ** 0.5 for d in (distances, heldout_distances))
    is_duplicate = heldout_distances < duplicate_distance
    if is_duplicate.all():
        raise InputError(f"all held-out images are nearer to a training image than {duplicate_distance}; lower that")
    heldout_distances = heldout_distances[~is_duplicate]
    if np.median(heldout_distances) == 0:
        raise InputError("at least half of the held-out images are training images; hold out others")
    suspects = np.argsort(distances, kind="stable")[:NUM_PAIRS].tolist()
    minimum, percentile_1 = heldout_distances.min(), np.percentile(heldout_distances, 1)
    return MemorisationReport(
        distances=distances,
        heldout_distances=heldout_distances,
        num_heldout_duplicates=int(is_duplicate.sum()),
        share_below_minimum=Share(float((distances < minimum).mean()), 1 / (len(heldout_distances) + 1)),
        share_below_percentile=Share(float((distances < percentile_1).mean()), 0.01),
        share_nearest_heldout=Share(float(is_heldout_nearest.mean()), len(heldout) / (len(heldout) + len(training))),
        std_share_nearest_heldout=float(shares.std(ddof=1)) if len(shares) > 1 else None,
        pairs=[Pair(i, int(indices[i]), bool(mirrored[i]), float(distances[i])) for i in suspects],
    )


def shares_of_groups(indices: np.ndarray, num_images: int, group_size: int) -> np.ndarray:
    """Shares of the indices, each below `num_images`, that fall into consecutive groups of images.

    The images that are left over at the end form no group.

    Returns:
        shape (num_images // group_size,).
    """
    num_groups = num_images // group_size
    return np.bincount(indices // group_size, minlength=num_groups)[:num_groups] / max(len(indices), 1)


def nearest_training(queries: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`nearest_distances`, and whether the training image is nearest mirrored: three arrays of shape (N,)."""
    distances, indices = nearest_distances(queries, training)
    mirrored = np.zeros(len(queries), bool)
    if training.ndim == 4:  # images; |query - mirrored reference| = |mirrored query - reference|
        mirrored_distances, mirrored_indices = nearest_distances(queries[..., ::-1], training)
        mirrored = mirrored_distances < distances
        distances = np.where(mirrored, mirrored_distances, distances)
        indices = np.where(mirrored, mirrored_indices, indices)
    return distances, indices, mirrored


def nearest_distances(
    queries: np.ndarray, references: np.ndarray, *, chunk: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """L2 distance of each query to its nearest reference, and the index of that one; the lowest index on a tie.

    Matrix products in float64 find the nearest reference; of pixels they are sums of integers below 2^53 and exact.
    The distance to it is then taken from the difference, so a copy is at exactly 0.

    Args:
        queries: shape (N, ...), uint8 or floating.
        references: shape (M, ...), uint8 or floating; may be mapped from the disk.
        chunk: queries and references compared at once, in 8 bytes x chunk x (chunk + 2 D) of memory.

    Returns:
        Distances, float64, shape (N,), and indices, int64, shape (N,).
    """
    queries, references = queries.reshape(len(queries), -1), references.reshape(len(references), -1)
    distances, indices = np.empty(len(queries)), np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), chunk):
        rows, index = queries[start : start + chunk].astype(np.float64), indices[start : start + chunk]
        best = np.full(len(rows), np.inf)
        for first in range(0, len(references), chunk):
            block = references[first : first + chunk].astype(np.float64)
            squared = np.einsum("md,md->m", block, block) - 2 * rows @ block.T  # |query - reference|^2 - |query|^2
            nearest = squared.argmin(axis=1)
            smallest = squared.min(axis=1)
            is_better = smallest < best
            best[is_better], index[is_better] = smallest[is_better], first + nearest[is_better]
        distances[start : start + chunk] = np.linalg.norm(rows - references[index], axis=1)
    return distances, indices
