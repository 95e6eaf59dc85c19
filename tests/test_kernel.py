"""KID beside clean-fid's function and its expectation, CMMD beside a loop over pairs and a closed form."""

import math

import numpy as np
import pytest
from cleanfid import fid

from eval import kernel
from eval.kernel import cmmd, kernel_distance


def gaussian(count: int, dimensions: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, size=(count, dimensions))


def unit(points: np.ndarray) -> np.ndarray:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize(("count1", "count2", "largest"), [(150, 150, 60), (90, 150, 1000), (70, 70, 1000)])
def test_agrees_with_clean_fid(count1, count2, largest):
    features1, features2 = gaussian(count1, 16, seed=0), gaussian(count2, 16, seed=1, shift=0.2)
    np.random.seed(5)
    expected = fid.kernel_distance(features1, features2, num_subsets=20, max_subset_size=largest)
    measured = kernel_distance(features1, features2, seed=5, num_subsets=20, max_subset_size=largest)
    assert measured.mean == pytest.approx(expected, rel=1e-9)
    assert measured.num_subsets == 20
    assert measured.subset_size == min(count1, count2, largest)


def test_unbiased():
    """Equal distributions: the mean over many seeds is 0 within 3 standard errors, and values of both signs come."""
    values = [
        kernel_distance(gaussian(40, 8, seed=2 * seed), gaussian(40, 8, seed=2 * seed + 1), seed=0, num_subsets=1).mean
        for seed in range(400)
    ]
    standard_error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * standard_error
    assert min(values) < 0 < max(values)
    biased = 2 * (2**3) / 40  # about what k(x, x), twice counted, would add
    assert standard_error < biased / 50


def test_expectation_of_two_points():
    """All x = 0 and all y = 1 in one dimension: 1 + 8 - 2."""
    measured = kernel_distance(np.zeros((5, 1)), np.ones((7, 1)), seed=0, num_subsets=3)
    assert measured.mean == pytest.approx(7)
    assert measured.std == pytest.approx(0)


def test_spread_and_seed():
    features1, features2 = gaussian(100, 4, seed=0), gaussian(100, 4, seed=1)
    first, again, other = (
        kernel_distance(features1, features2, seed=seed, num_subsets=10, max_subset_size=30) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.mean != other.mean
    assert first.std > 0
    assert kernel_distance(features1, features2, seed=0).std is None  # each subset is all of them
    state = np.random.get_state()[1]
    kernel_distance(features1, features2, seed=0, num_subsets=1)
    assert (np.random.get_state()[1] == state).all()


def test_kid_refuses():
    features = gaussian(10, 4, seed=0)
    with pytest.raises(ValueError, match="features of 1 images"):
        kernel_distance(features, features[:1], seed=0)
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(features, features * np.inf, seed=0)
    with pytest.raises(ValueError, match=r"shapes \(10, 4\), \(10, 3\)"):
        kernel_distance(features, features[:, :3], seed=0)
    with pytest.raises(ValueError, match="20 subsets of 1"):
        kernel_distance(features, features, seed=0, num_subsets=20, max_subset_size=1)


def test_cmmd_is_the_mean_over_pairs(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 7)
    x, y = unit(gaussian(23, 6, seed=0)), unit(gaussian(31, 6, seed=1, shift=0.5))

    def mean_kernel(first, second):
        return np.mean([[math.exp(-sum((a - b) ** 2) / 200) for b in second] for a in first])

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(x, y) == pytest.approx(cmmd(y, x), rel=1e-9)
    assert cmmd(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(expected, rel=1e-4)


def test_cmmd_closed_form():
    """All x = e1, all y = -e1: 1000 (2 - 2 exp(-4/200))."""
    x = np.tile([1.0, 0.0], (3, 1))
    assert cmmd(x, -x[:2]) == pytest.approx(2000 * (1 - math.exp(-0.02)))
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_cmmd_refuses():
    x = unit(gaussian(5, 4, seed=0))
    with pytest.raises(ValueError, match=r"length 1, but these have 1 to 2; normalise"):
        cmmd(x, 2 * x)
    with pytest.raises(ValueError, match="features of 1 images"):
        cmmd(x, x[:1])
