"""FID and KID against closed forms and clean-fid, CMMD against a loop over pairs, PRDC against brute force."""

import math

import numpy as np
import pytest
from cleanfid import fid

from eval import distances
from eval.distances import cmmd, frechet_distance, kernel_distance, prdc


def gaussian(count: int, dimensions: int, seed: int, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, size=(count, dimensions))


def unit(points: np.ndarray) -> np.ndarray:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


# ---- The Frechet distance


def features_with(mean: np.ndarray, root: np.ndarray, seed: int) -> np.ndarray:
    """Features with exactly this mean and the covariance root^T root."""
    white = gaussian(2 * len(mean) + 5, len(root), seed)
    white = np.linalg.qr(white - white.mean(axis=0))[0] * np.sqrt(len(white) - 1)
    return mean + white @ root


def test_frechet_distance_matches_closed_forms():
    """In addition to |m1 - m2|^2: (s1 - s2)^2 along common axes, |u|^2 + |v|^2 - 2 |u.v| for uu^T and vv^T."""
    shift, axes = gaussian(1, 60, 0)[0], np.linalg.qr(gaussian(60, 60, 1))[0]
    stds, (u, v) = np.abs(gaussian(2, 60, 2)), gaussian(2, 60, 3)
    common_axes = [std[:, None] * axes for std in stds], ((stds[0] - stds[1]) ** 2).sum()
    rank_one = [u[None], v[None]], u @ u + v @ v - 2 * abs(u @ v)
    for roots, expected in (common_axes, rank_one):
        features = features_with(np.zeros(60), roots[0], 4), features_with(shift, roots[1], 5)
        assert frechet_distance(*features) == pytest.approx(expected + shift @ shift, rel=1e-9)


def test_frechet_distance_agrees_with_clean_fid():
    generator = np.random.default_rng(0)
    features1 = generator.normal(size=(300, 128)).astype(np.float32)
    features2 = generator.gamma(2, size=(200, 128)).astype(np.float32)
    expected = fid.fid_from_feats(features1.astype(np.float64), features2.astype(np.float64))
    assert frechet_distance(features1, features2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [20, 500])
def test_identical_features_have_zero_distance(count):
    """Also with fewer images than dimensions; the tolerance is relative to the variance of the features."""
    features = (np.random.default_rng(0).normal(size=(count, 200)) + 1e3).astype(np.float32)
    for other in (features, features[::-1]):
        assert 0 <= frechet_distance(features, other) < 1e-9 * features.var(axis=0).sum()


# ---- KID


@pytest.mark.parametrize(("count1", "count2", "largest"), [(150, 150, 60), (90, 150, 1000), (70, 70, 1000)])
def test_kid_agrees_with_clean_fid(count1, count2, largest):
    features1, features2 = gaussian(count1, 16, seed=0), gaussian(count2, 16, seed=1, mean=0.2)
    np.random.seed(5)
    expected = fid.kernel_distance(features1, features2, num_subsets=20, max_subset_size=largest)
    state = np.random.get_state()[1]
    measured = kernel_distance(features1, features2, seed=5, num_subsets=20, max_subset_size=largest)
    assert (np.random.get_state()[1] == state).all()
    assert measured["value"] == pytest.approx(expected, rel=1e-9)
    assert (measured["num_subsets"], measured["subset_size"]) == (20, min(count1, count2, largest))
    assert (measured["std"] is None) == (count1 == count2 < largest)  # each subset is the whole set


# ---- CMMD


def test_cmmd_matches_a_loop_over_pairs(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 7)
    x, y = unit(gaussian(23, 6, seed=0)), unit(gaussian(31, 6, seed=1, mean=0.5))

    def mean_kernel(first, second):
        return np.mean([[math.exp(-sum((a - b) ** 2) / 200) for b in second] for a in first])

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(expected, rel=1e-4)


# ---- Precision and recall, density and coverage


def brute_force(real: np.ndarray, generated: np.ndarray, k: int) -> dict[str, float]:
    """The definitions of the papers, as loops over all pairs."""

    def radii(points):
        return [sorted(np.linalg.norm(np.delete(points, i, axis=0) - p, axis=1))[k - 1] for i, p in enumerate(points)]

    distances = np.linalg.norm(real[:, None] - generated[None], axis=2)  # (N, M)
    real_radii, generated_radii = radii(real), radii(generated)
    n, m = distances.shape
    in_real = [[distances[i, j] <= real_radii[i] for i in range(n)] for j in range(m)]
    in_generated = [[distances[i, j] <= generated_radii[j] for j in range(m)] for i in range(n)]
    return {
        "precision": sum(any(row) for row in in_real) / m,
        "recall": sum(any(row) for row in in_generated) / n,
        "density": sum(sum(row) for row in in_real) / (k * m),
        "coverage": sum(any(in_real[j][i] for j in range(m)) for i in range(n)) / n,
    }


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("case", ["shifted", "half off the support"])
def test_prdc_agrees_with_brute_force(case, k, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 7)
    real, generated = gaussian(61, 4, 0), gaussian(43, 4, 1, mean=1.0)
    if case == "half off the support":
        generated[::2] += 100
    expected = brute_force(real, generated, k)
    assert case != "shifted" or all(0 < value < 1 for value in expected.values()), "the case must tell something"
    assert prdc(real, generated, k=k) == pytest.approx(expected, abs=1e-12)


def test_ties_count_as_inside_despite_rounding(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 64)
    features = gaussian(200, 64, 0).astype(np.float32) + 1000
    # if the sets are identical, the ball of a sample holds the sample and its k neighbours
    expected = {"precision": 1, "recall": 1, "density": 6 / 5, "coverage": 1}
    assert prdc(features, features.copy(), k=5) == expected
    start, step = 100 * gaussian(50, 30, 0), gaussian(50, 30, 1)  # 50 lines
    line = [start + i * step for i in range(4)]
    result = prdc(np.concatenate(line[2:]), np.concatenate(line[:2]), k=1)
    # All radii are one step, so on each line only the second generated and the first real point reach each other.
    assert result == {"precision": 0.5, "recall": 0.5, "density": 0.5, "coverage": 0.5}


def test_prdc_is_accurate_for_features_far_from_the_origin():
    """Computed as |a|^2 + |b|^2 - 2ab in the features' float32, the distances would be lost."""
    real, generated = ((3000 + gaussian(80, 16, seed, 0.5 * seed)).astype(np.float32) for seed in (0, 1))
    expected = brute_force(real.astype(np.float64), generated.astype(np.float64), 5)
    assert prdc(real, generated) == pytest.approx(expected, abs=1e-12)
