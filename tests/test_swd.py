"""Sliced Wasserstein distance: pyramid, patches and distance, each compared with an independent reference."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from eval import swd
from eval.swd import laplacian_pyramid, sliced_wasserstein, upsample
from training.synthetic_faces import render_faces

FEW = {"num_patches_per_image": 16, "num_projections": 64}


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    """256 synthetic faces at 32x32, with grey levels compressed to 64..191 so that there is room for shifts."""
    images = render_faces(range(256), 32, seed=5).transpose(0, 3, 1, 2)
    return (64 + images.astype(float) / 2).astype(np.uint8)


def as_uint8(images: np.ndarray) -> np.ndarray:
    return images.round().clip(0, 255).astype(np.uint8)


def blurred(images: np.ndarray) -> np.ndarray:
    return as_uint8(scipy.ndimage.gaussian_filter(images.astype(float), (0, 0, 1, 1)))


def reference_blur(images: np.ndarray) -> np.ndarray:
    """Blurs with scipy; `mirror` reflects at the border without repeating the edge."""
    for axis in (-2, -1):
        images = scipy.ndimage.convolve1d(images, [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16], axis, mode="mirror")
    return images


def reference_pyramid(images: np.ndarray, num_levels: int) -> list[np.ndarray]:
    pyramid = [images.astype(np.float64)]
    for _ in range(num_levels - 1):
        coarse = reference_blur(pyramid[-1])[:, :, ::2, ::2]
        spread = np.zeros_like(pyramid[-1])
        spread[:, :, ::2, ::2] = coarse
        pyramid[-1] = pyramid[-1] - 4 * reference_blur(spread)
        pyramid.append(coarse)
    return pyramid


@pytest.mark.parametrize(("resolution", "num_levels"), [(64, 3), (34, 2), (16, 1)])
def test_pyramid_matches_scipy_and_reconstructs_the_image(resolution, num_levels):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, resolution, resolution)).astype(np.uint8)
    assert len(swd.pyramid_heights(resolution, resolution)) == num_levels
    pyramid = laplacian_pyramid(torch.from_numpy(images).float(), num_levels)
    for level, expected in zip(pyramid, reference_pyramid(images, num_levels), strict=True):
        np.testing.assert_allclose(level.numpy(), expected, atol=1e-4)
    rebuilt = pyramid[-1]
    for level in pyramid[-2::-1]:
        rebuilt = upsample(rebuilt) + level
    np.testing.assert_allclose(rebuilt.numpy(), images, atol=1e-4)


@pytest.mark.parametrize("is_grey_rectangle", [False, True])
def test_distance_matches_a_straightforward_reference(faces, is_grey_rectangle):
    """With the same positions and directions (more than one chunk); the rest uses numpy and scipy in float64."""
    images1, images2 = faces[:20], as_uint8(faces[20:40] * 1.1)
    if is_grey_rectangle:  # (20, 1, 64, 32)
        images1, images2 = (images[:, :2].reshape(20, 1, 64, 32) for images in (images1, images2))
    channels, height, width = images1.shape[1:]
    for level in (0, 1):
        generator = np.random.default_rng((0, height // 2**level))
        corners = generator.integers([height // 2**level - 6, width // 2**level - 6], size=(20, 4, 2))
        directions = generator.standard_normal((20, 49 * channels))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        sets = []
        for images in (images1, images2):
            pixels = reference_pyramid(images, 2)[level]
            patches = np.stack(
                [pixels[i, :, y : y + 7, x : x + 7] for i, of_image in enumerate(corners) for y, x in of_image]
            )
            patches = (patches - patches.mean((0, 2, 3), keepdims=True)) / patches.std((0, 2, 3), keepdims=True)
            sets.append(patches.reshape(80, -1))
        expected = np.mean([scipy.stats.wasserstein_distance(sets[0] @ d, sets[1] @ d) for d in directions])
        distances = sliced_wasserstein(images1, images2, num_patches_per_image=4, num_projections=20)
        assert distances[height // 2**level] == pytest.approx(1000 * expected, rel=1e-4)


def test_distance_does_not_depend_on_the_batch_size(faces, monkeypatch):
    distances = sliced_wasserstein(faces[:100], faces[100:200], **FEW)
    monkeypatch.setattr(swd, "BATCH_SIZE", 7)
    assert sliced_wasserstein(faces[:100], faces[100:200], **FEW) == pytest.approx(distances, rel=1e-5)


def test_distance_of_two_real_sets_falls_with_more_images(faces):
    floor, few = (sliced_wasserstein(faces[128 : 128 + n], faces[:n], **FEW) for n in (128, 16))
    assert all(0 < floor[level] < few[level] for level in (32, 16))
    assert sliced_wasserstein(blurred(faces)[128:], faces[:128], **FEW)[32] > 2 * floor[32]
    assert max(sliced_wasserstein(faces[:1], faces[:1], **FEW).values()) == 0
    black = sliced_wasserstein(np.zeros_like(faces[:128]), faces[:128], **FEW)
    assert all(black[level] > 5 * floor[level] for level in (32, 16))  # and not NaN
