"""Does the model copy its training images? Nearest training neighbours of generated and of held-out images.

Held-out images come from the same distribution and cannot have been copied, so the distances from them to their
nearest training images say what is usual. Generated images that are nearer than that are suspects, to be looked at.

Mind that distances in pixels have a bias: a smooth or blurred image is nearer to every other image than a sharp one.
A ratio below 1 may be blur; a copy shows in the shares and the pairs. And data sets hold near-copies of their own: a
held-out image that is one of a training image brings the minimum down, below which then nothing falls. So held-out
images nearer than `duplicate_distance` are left out and counted.

What tells blur from copying is which real image is the nearest of all. To a model that generalises, training and
held-out images are alike, however it blurs; a model that is drawn to what it saw has held-out images as its nearest
ones too seldom. (Meehan, Chaudhuri and Dasgupta 2020, arXiv 2004.05675, compare the two kinds of distances for it.)
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common import InputError

NUM_PAIRS = 16  # suspects that are listed
NUM_BINS = 50  # of the histograms
PAIRS_AT_ONCE = 2048  # of which the exact distance is taken, in float64


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
    """Distances are root mean squares over the pixels in grey levels (0..255) for images, L2 for features."""

    num_generated: int
    num_heldout: int
    num_training: int
    num_heldout_duplicates: int  # further held-out images, left out as near-copies of training images
    mirror: bool  # whether mirrored training images count as training images
    generated_median: float
    heldout_median: float
    share_below_heldout_minimum: Share
    share_below_heldout_percentile: Share
    share_nearest_heldout: Share  # those with a held-out image nearer than any training image
    std_share_nearest_heldout: float | None  # over as many training images in the place of the held-out ones
    pairs: list[Pair]  # the nearest ones, nearest first
    bin_edges: np.ndarray  # (NUM_BINS + 1,), from 0
    generated_counts: np.ndarray  # (NUM_BINS,)
    heldout_counts: np.ndarray  # (NUM_BINS,)

    @property
    def ratio(self) -> float:
        """About 1 if the model generalises."""
        return self.generated_median / self.heldout_median


def memorisation(
    generated: np.ndarray,
    heldout: np.ndarray,
    training: np.ndarray,
    *,
    duplicate_distance: float = 0.0,
    chunk: int = 2048,
) -> MemorisationReport:
    """Compares how near generated and held-out images come to the training images.

    Mirrored training images count as training images, as training flips them; features cannot be mirrored.

    Args:
        generated: uint8 images, shape (N, C, H, W), or features of them, shape (N, D).
        heldout: images from the distribution of the training images that are not among them, the same kind.
        training: the images that the model was trained on, the same kind.
        duplicate_distance: held-out images nearer to a training image than this are left out, as near-copies in the
            data; in the unit of the report.
        chunk: see `nearest_distances`.

    Raises:
        InputError: if all held-out images are near-copies, or most of them are training images.
    """
    is_images = training.ndim == 4
    distances, indices, mirrored = nearest_training(generated, training, is_images, chunk)
    is_heldout_nearest = nearest_training(generated, heldout, is_images, chunk)[0] < distances
    shares = shares_of_groups(indices[~is_heldout_nearest], len(training), len(heldout)) * (~is_heldout_nearest).mean()
    heldout_distances, _, _ = nearest_training(heldout, training, is_images, chunk)
    if is_images:  # L2 -> root mean square over the pixels
        distances, heldout_distances = (d / training[0].size ** 0.5 for d in (distances, heldout_distances))
    is_duplicate = heldout_distances < duplicate_distance
    if is_duplicate.all():
        raise InputError(f"all held-out images are nearer to a training image than {duplicate_distance}; lower that")
    heldout_distances = heldout_distances[~is_duplicate]
    heldout_median = float(np.median(heldout_distances))
    if heldout_median == 0:
        raise InputError("at least half of the held-out images are training images; hold out others")
    suspects = np.argsort(distances, kind="stable")[:NUM_PAIRS].tolist()
    minimum, percentile_1 = heldout_distances.min(), np.percentile(heldout_distances, 1)
    bin_edges = np.linspace(0, max(distances.max(), heldout_distances.max()), NUM_BINS + 1)
    return MemorisationReport(
        num_generated=len(generated),
        num_heldout=len(heldout_distances),
        num_training=len(training),
        num_heldout_duplicates=int(is_duplicate.sum()),
        mirror=is_images,
        generated_median=float(np.median(distances)),
        heldout_median=heldout_median,
        share_below_heldout_minimum=Share(float((distances < minimum).mean()), 1 / (len(heldout_distances) + 1)),
        share_below_heldout_percentile=Share(float((distances < percentile_1).mean()), 0.01),
        share_nearest_heldout=Share(float(is_heldout_nearest.mean()), len(heldout) / (len(heldout) + len(training))),
        std_share_nearest_heldout=float(shares.std(ddof=1)) if len(shares) > 1 else None,
        pairs=[Pair(i, int(indices[i]), bool(mirrored[i]), float(distances[i])) for i in suspects],
        bin_edges=bin_edges,
        generated_counts=np.histogram(distances, bin_edges)[0],
        heldout_counts=np.histogram(heldout_distances, bin_edges)[0],
    )


def shares_of_groups(indices: np.ndarray, num_images: int, group_size: int) -> np.ndarray:
    """Shares of the indices, each below `num_images`, that fall into consecutive groups of images; a rest is no group.

    Returns:
        shape (num_images // group_size,).
    """
    num_groups = num_images // group_size
    return np.bincount(indices // group_size, minlength=num_groups)[:num_groups] / max(len(indices), 1)


def nearest_training(
    queries: np.ndarray, training: np.ndarray, mirror: bool, chunk: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`nearest_distances`, and whether the training image is nearest mirrored: three arrays of shape (N,)."""
    distances, indices = nearest_distances(queries, training, chunk=chunk)
    mirrored = np.zeros(len(queries), bool)
    if mirror:  # |query - mirrored reference| = |mirrored query - reference|
        mirrored_distances, mirrored_indices = nearest_distances(queries[..., ::-1], training, chunk=chunk)
        mirrored = mirrored_distances < distances
        distances = np.where(mirrored, mirrored_distances, distances)
        indices = np.where(mirrored, mirrored_indices, indices)
    return distances, indices, mirrored


def nearest_distances(
    queries: np.ndarray, references: np.ndarray, *, chunk: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """L2 distance of each query to its nearest reference, and the index of that one; the lowest index on a tie.

    The result is exact: float32 matrix products leave the references that may be nearest given the bound on their
    rounding, usually one or two, and of these the distance is taken in float64. A copy is at exactly 0.

    Args:
        queries: shape (N, ...), uint8 or floating.
        references: shape (M, ...), uint8 or floating; may be mapped from the disk.
        chunk: queries times references handled at once; the memory is about 30 bytes x chunk x (chunk + D).

    Returns:
        Distances, float64, shape (N,), and indices, int64, shape (N,).
    """
    queries, references = queries.reshape(len(queries), -1), references.reshape(len(references), -1)
    centre = references.mean(axis=0, dtype=np.float64).astype(np.float32)
    best = np.full(len(queries), np.inf)  # squared distances
    indices = np.zeros(len(queries), np.int64)
    for first in range(0, len(references), chunk):
        block = references[first : first + chunk]
        centred_block, block_norms = _centred(block, centre)
        for start in range(0, len(queries), chunk):
            rows = slice(start, start + chunk)
            centred_queries, query_norms = _centred(queries[rows], centre)
            # (chunk, chunk), |q|^2 + |r|^2 - 2qr
            approximate = centred_queries @ centred_block.T
            approximate *= -2
            approximate += query_norms.astype(np.float32)[:, None]
            approximate += block_norms.astype(np.float32)
            # D roundings in the product, 8 more around it, each of at most 2^-24 (Higham 2002, section 3.1).
            margin = (len(centre) / 2 + 8) * 2.0**-24 * (query_norms**0.5 + block_norms.max() ** 0.5) ** 2
            limit = np.minimum(best[rows] + margin, approximate.min(axis=1) + 2 * margin)
            pairs = np.nonzero(approximate <= limit.astype(np.float32)[:, None])
            _improve(best[rows], indices[rows], pairs, queries[rows], block, first)
    return np.sqrt(best), indices


def _centred(points: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points around the centre as float32 (N, D), and their squared norms in float64 (N,)."""
    centred = (points - centre).astype(np.float32, copy=False)
    return centred, np.einsum("nd,nd->n", centred, centred, dtype=np.float64)


def _improve(
    best: np.ndarray,
    indices: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    queries: np.ndarray,
    block: np.ndarray,
    first: int,
) -> None:
    """Enters the exact distances of the pairs (query, reference of the block) where they are below the best so far."""
    rows, columns = pairs
    for start in range(0, len(rows), PAIRS_AT_ONCE):
        row, column = rows[start : start + PAIRS_AT_ONCE], columns[start : start + PAIRS_AT_ONCE]
        difference = queries[row].astype(np.float64) - block[column]
        exact = np.einsum("nd,nd->n", difference, difference)
        order = np.lexsort((column, exact, row))
        row, nearest = np.unique(row[order], return_index=True)
        exact, column = exact[order][nearest], column[order][nearest]
        better = exact < best[row]
        best[row[better]], indices[row[better]] = exact[better], first + column[better]
