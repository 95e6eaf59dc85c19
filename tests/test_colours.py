"""Brightness, contrast and saturation of images against known values."""

import numpy as np

from eval.colours import BLOCK, COLOURS, colour_statistics


def test_statistics_match_values_computed_by_hand():
    images = np.zeros((2, 3, 2, 2), np.uint8)
    images[0] = 100  # grey
    images[1, 0, :, 0] = 200  # the left half is red, the right half black
    found = colour_statistics(images)
    assert list(found) == list(COLOURS)
    np.testing.assert_allclose(found["brightness"], [100, 0.299 * 100])
    np.testing.assert_allclose(found["contrast"], [0, 0.299 * 100], atol=1e-9)
    np.testing.assert_allclose(found["saturation"], [0, 100])
    grey = colour_statistics(images[:, :1])  # 100 everywhere; half 200, half 0
    np.testing.assert_allclose([*grey.values()], [[100, 100], [0, 100], [0, 0]], atol=1e-9)


def test_large_sets_are_processed_in_blocks():
    images = np.random.default_rng(0).integers(0, 256, (BLOCK + 3, 3, 4, 4), dtype=np.uint8)
    luma = (images * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(axis=1)
    np.testing.assert_allclose(colour_statistics(images)["contrast"], luma.std(axis=(1, 2)))
