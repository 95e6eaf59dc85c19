"""Sliced Wasserstein distance between the patches of two sets of images, one number per scale; it needs no network.

Karras et al. 2018, "Progressive Growing of GANs" (arXiv 1710.10196), section 5: each image is decomposed into a
Laplacian pyramid. Random 7x7 patches from every level are normalised by the mean and standard deviation of each
colour channel over all patches of their set, and compared along random directions. Along one direction, the
Wasserstein distance of order 1 between two sets of M patches is the mean |difference| of the sorted projections.

Each set is normalised separately, so a shift or scaling of a colour channel that is common to all its images goes
unnoticed. Even two finite sets from one distribution differ; compare with the distance between two real sets.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PATCH_SIZE = 7
SMALLEST_RESOLUTION = 16  # of a pyramid level
PAPER_SCALE = 1000  # the paper's tables show 1000 times the distance
BATCH_SIZE = 32  # images whose pyramids are computed at once, few enough to fit the cache
DIRECTIONS_AT_ONCE = 16  # limits memory to 4 x 16 x M floats
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def sliced_wasserstein(
    images1: np.ndarray, images2: np.ndarray, *, num_patches_per_image: int = 128, num_projections: int = 512
) -> dict[int, float]:
    """Distance between two sets of images at each level of the pyramid, times 1000 as in the paper.

    The random patch positions and directions are always the same, for both sets. The patches of one level are in
    memory at once: 392 bytes x C x N x num_patches_per_image for both sets.

    Args:
        images1, images2: uint8, shape (N, C, H, W), H and W at least 16. Compare distances only at equal N.
        num_patches_per_image, num_projections: by default as in the paper (128, with 16,384 images) and its code.

    Returns the distance by the level's height, see `pyramid_heights`; the last level is the low-pass image, the others
    are differences.
    """
    distances, (num_images, channels, *sides) = {}, images1.shape
    for level, height in enumerate(pyramid_heights(*sides)):
        generator = np.random.default_rng((0, height))
        num_corners = np.array(sides) // 2**level - PATCH_SIZE + 1  # along y and x
        corners = torch.from_numpy(generator.integers(num_corners, size=(num_images, num_patches_per_image, 2)))
        directions = random_directions(num_projections, channels * PATCH_SIZE**2, generator)
        patches1, patches2 = (normalised_patches(images, level, corners) for images in (images1, images2))
        distances[height] = PAPER_SCALE * float(projected_distances(patches1, patches2, directions).mean())
        del patches1, patches2  # frees memory before the next level
    return distances


def pyramid_heights(height: int, width: int) -> list[int]:
    """The heights of the levels: H, H/2, ... while both sides are whole and at least 16, e.g. 64, 32, 16 for 64x64."""
    heights = [height]
    while height % 2 == width % 2 == 0 and min(height, width) // 2 >= SMALLEST_RESOLUTION:
        height, width = height // 2, width // 2
        heights.append(height)
    return heights


def laplacian_pyramid(images: Tensor, num_levels: int) -> list[Tensor]:
    """Each level holds what the next coarser one lacks; the last is the low-pass image (Burt and Adelson 1983)."""
    pyramid = [images]
    for _ in range(num_levels - 1):
        coarse = _blur(pyramid[-1])[:, :, ::2, ::2]
        pyramid[-1] = pyramid[-1] - upsample(coarse)
        pyramid.append(coarse)
    return pyramid


def upsample(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2H, 2W): zeros between the pixels, blurred, times 4 to keep the mean."""
    spread = images.new_zeros(*images.shape[:2], 2 * images.shape[2], 2 * images.shape[3])
    spread[:, :, ::2, ::2] = images
    return 4 * _blur(spread)


def _blur(images: Tensor) -> Tensor:
    """Convolves with the 5x5 binomial kernel, axis by axis; borders are mirrored without repeating the edge."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    rows = sum(weight * padded[..., i : i + height, :] for i, weight in enumerate(BINOMIAL))
    return sum(weight * rows[..., i : i + width] for i, weight in enumerate(BINOMIAL))


def normalised_patches(images: np.ndarray, level: int, corners: Tensor) -> np.ndarray:
    """Patches (N P, 49 C) from one pyramid level; each channel has mean 0 and standard deviation 1 over all patches.

    A channel with one value in all patches, such as the alpha of opaque images, becomes 0.

    Args:
        corners: shape (N, P, 2), y and x of the patches' upper left corners at this level.
    """
    num_images, num_patches = corners.shape[:2]
    num_levels = min(level + 2, len(pyramid_heights(*images.shape[2:])))
    patches = torch.empty(num_images, num_patches, images.shape[1], PATCH_SIZE, PATCH_SIZE)
    for start in range(0, num_images, BATCH_SIZE):
        batch = torch.from_numpy(np.array(images[start : start + BATCH_SIZE])).float()
        pixels = laplacian_pyramid(batch, num_levels)[level]
        windows = pixels.unfold(2, PATCH_SIZE, 1).unfold(3, PATCH_SIZE, 1)  # (B, C, y, x, 7, 7)
        y, x = corners[start : start + BATCH_SIZE].unbind(-1)  # (B, P) each
        patches[start : start + BATCH_SIZE] = windows[torch.arange(len(batch))[:, None], :, y, x]  # (B, P, C, 7, 7)
    variance, mean = torch.var_mean(patches, dim=(0, 1, 3, 4), correction=0, keepdim=True)
    std = variance.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return patches.sub_(mean).div_(std).reshape(num_images * num_patches, -1).numpy()


def random_directions(count: int, num_dimensions: int, generator: np.random.Generator) -> np.ndarray:
    """Directions drawn uniformly from the unit sphere; float32, shape (count, num_dimensions)."""
    directions = generator.standard_normal((count, num_dimensions))
    return (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)


def projected_distances(points1: np.ndarray, points2: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Wasserstein distance of order 1 between two sets of points (M, D) along unit vectors (K, D); float64, (K,)."""
    distances = []
    for start in range(0, len(directions), DIRECTIONS_AT_ONCE):
        some = directions[start : start + DIRECTIONS_AT_ONCE]
        projections1, projections2 = (np.sort(some @ points.T, axis=1) for points in (points1, points2))  # (K', M)
        distances.append(np.abs(projections1 - projections2).mean(axis=1, dtype=np.float64))
    return np.concatenate(distances)
