"""Frechet distance beside closed forms and clean-fid's own function."""

import numpy as np
import pytest
from cleanfid import fid

from eval.frechet import frechet_distance, frechet_distance_of, mean_and_covariance


def rotation(dimensions: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dimensions, dimensions)))[0]


def random_moments(dimensions: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(dimensions, dimensions))
    return generator.normal(size=dimensions), factor @ factor.T / dimensions


def test_one_dimension():
    """N(1, 4) and N(-2, 9): 3^2 + (2 - 3)^2."""
    distance = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([-2.0]), np.array([[9.0]]))
    assert distance == pytest.approx(10, rel=1e-12)


def test_commuting_covariances():
    generator = np.random.default_rng(0)
    axes = rotation(50, seed=1)
    values1, values2, shift = generator.random(50), 3 * generator.random(50), generator.normal(size=50)
    covariances = [axes @ np.diag(values) @ axes.T for values in (values1, values2)]
    expected = shift @ shift + ((np.sqrt(values1) - np.sqrt(values2)) ** 2).sum()
    assert frechet_distance(np.zeros(50), covariances[0], shift, covariances[1]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dimensions", [2, 300])
def test_covariances_of_rank_one(dimensions):
    """uu^T and vv^T: |u|^2 + |v|^2 - 2 |u.v|."""
    u, v = np.random.default_rng(0).normal(size=(2, dimensions))
    expected = u @ u + v @ v - 2 * abs(u @ v)
    distance = frechet_distance(np.zeros(dimensions), np.outer(u, u), np.zeros(dimensions), np.outer(v, v))
    assert distance == pytest.approx(expected, rel=1e-8)


def test_singular_covariances_that_share_half_of_their_axes():
    axes = rotation(60, seed=0)
    values1, values2 = np.zeros(60), np.zeros(60)
    values1[:30], values2[15:45] = 2.0, 0.5
    covariances = [axes @ np.diag(values) @ axes.T for values in (values1, values2)]
    expected = ((np.sqrt(values1) - np.sqrt(values2)) ** 2).sum()
    distance = frechet_distance(np.ones(60), covariances[0], np.ones(60), covariances[1])
    assert distance == pytest.approx(expected, rel=1e-10)


def test_no_variance_at_all():
    zeros = np.zeros((3, 3))
    assert frechet_distance(np.zeros(3), zeros, np.ones(3), zeros) == pytest.approx(3)


@pytest.mark.parametrize("dimensions", [2, 8, 128])
def test_agrees_with_clean_fid(dimensions):
    moments = *random_moments(dimensions, seed=0), *random_moments(dimensions, seed=1)
    assert frechet_distance(*moments) == pytest.approx(fid.frechet_distance(*moments), rel=1e-6)


def test_features_agree_with_clean_fid():
    generator = np.random.default_rng(0)
    features1 = generator.normal(size=(300, 40)).astype(np.float32)
    features2 = generator.gamma(2, size=(200, 40)).astype(np.float32)
    expected = fid.fid_from_feats(features1.astype(np.float64), features2.astype(np.float64))
    assert frechet_distance_of(features1, features2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [20, 500])
def test_identical_features_are_at_no_distance(count):
    """With less images than dimensions too; the size of the features sets the scale."""
    features = np.random.default_rng(0).normal(loc=5, scale=3, size=(count, 200))
    total_variance = np.trace(mean_and_covariance(features)[1])
    assert 0 <= frechet_distance_of(features, features) < 1e-9 * total_variance
    assert 0 <= frechet_distance_of(features, features[::-1]) < 1e-9 * total_variance


def test_mean_and_covariance_are_float64():
    features = (np.random.default_rng(0).normal(size=(1000, 3)) + 1e4).astype(np.float32)
    mean, covariance = mean_and_covariance(features)
    assert mean.dtype == covariance.dtype == np.float64
    centred = features.astype(np.float64) - mean
    np.testing.assert_allclose(covariance, centred.T @ centred / 999, rtol=1e-9, atol=1e-12)
    assert mean_and_covariance(features[:, :1])[1].shape == (1, 1)


def test_what_is_refused():
    mean, covariance = random_moments(4, seed=0)
    features = np.random.default_rng(0).normal(size=(30, 4))
    broken = features.copy()
    broken[7, 2] = np.nan
    with pytest.raises(ValueError, match="features of 1 images"):
        frechet_distance_of(features, features[:1])
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance_of(features, broken)
    with pytest.raises(ValueError, match=r"shapes \(4,\), \(4, 4\), \(3,\), \(4, 4\)"):
        frechet_distance(mean, covariance, mean[:3], covariance)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(mean, covariance, mean * np.inf, covariance)
    with pytest.raises(ValueError, match="positive semidefinite"):
        frechet_distance(mean, covariance, mean, -covariance)
