"""Precision, recall, density and coverage: constructed supports, closed forms and brute force."""

import numpy as np
import pytest

from eval.prdc import expected_coverage, nearest_neighbour_radii, prdc


def gaussian(n: int, d: int, seed: int, mean: float = 0.0) -> np.ndarray:
    return mean + np.random.default_rng(seed).standard_normal((n, d))


def brute_force(real: np.ndarray, generated: np.ndarray, k: int) -> dict[str, float]:
    """As the papers write it, by differences, with sets and loops."""

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


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_agrees_with_brute_force(k, chunk):
    real, generated = gaussian(61, 4, 0), gaussian(43, 4, 1, mean=1.0)
    expected = brute_force(real, generated, k)
    assert all(0 < value < 1 for value in expected.values()), "the case must tell something"
    assert prdc(real, generated, k=k, chunk=chunk) == pytest.approx(expected, abs=1e-12)


def test_disjoint_supports_are_at_zero():
    result = prdc(gaussian(100, 8, 0), gaussian(90, 8, 1, mean=50))
    assert result == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_identical_sets_are_at_one():
    features = gaussian(200, 64, 0).astype(np.float32) + 1000
    result = prdc(features, features.copy(), k=5, chunk=64)
    # The balls are closed: in the ball of a sample are it and its k neighbours, a tie that rounding must not break.
    assert result == {"precision": 1, "recall": 1, "density": 6 / 5, "coverage": 1}


def test_half_of_the_modes_missing_halves_recall_and_coverage():
    modes = np.repeat(np.arange(10) * 100.0, 50)[:, None] * np.ones(6)
    real = modes + gaussian(500, 6, 0) * 0.01
    near = modes[:250] + gaussian(250, 6, 1) * 0.001  # at the centres of the first five modes
    result = prdc(real, near, k=10)
    assert result["precision"] == 1
    assert result["coverage"] <= 0.5
    wide = modes[:250] + gaussian(250, 6, 2) * 0.1  # balls that hold the whole mode
    assert prdc(real, wide, k=10)["recall"] == 0.5
    same = prdc(real, real[:250], k=10)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 0.5, 0.5)


def test_half_of_the_generated_samples_off_the_support_halve_precision_and_density():
    real = gaussian(400, 3, 0)
    good, bad = gaussian(200, 3, 1), gaussian(200, 3, 2, mean=100)
    alone, mixed = prdc(real, good), prdc(real, np.concatenate([good, bad]))
    assert mixed["precision"] == alone["precision"] / 2
    assert mixed["density"] == alone["density"] / 2
    assert mixed["coverage"] == alone["coverage"]


def test_collapse_onto_one_real_sample():
    real = gaussian(300, 2, 0)
    result = prdc(real, np.repeat(real[:1], 50, axis=0), k=5)
    assert result["precision"] == 1
    assert result["recall"] == 1 / 300  # balls of radius 0 hold the copied sample and nothing else
    assert 1 / 300 <= result["coverage"] < 0.1


@pytest.mark.parametrize(("n", "m", "k", "d"), [(60, 40, 5, 2), (30, 90, 3, 16)])
def test_equal_distributions_have_the_expected_density_and_coverage(n, m, k, d):
    """Whatever the distribution; density and coverage are unbiased for 1 and for the closed form."""
    results = [prdc(gaussian(n, d, 2 * i), gaussian(m, d, 2 * i + 1), k=k) for i in range(400)]
    for name, expected in (("density", 1.0), ("coverage", expected_coverage(n, m, k))):
        values = np.array([result[name] for result in results])
        standard_error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - expected) < 4 * standard_error
        assert standard_error < 0.02 * expected


def test_expected_coverage_of_small_cases():
    assert expected_coverage(2, 1, 1) == pytest.approx(1 / 2)  # the fake or the other real one is nearer
    assert expected_coverage(10_000, 10_000, 5) == pytest.approx(1 - 2**-5, abs=1e-4)


def test_ties_count_as_inside():
    real, generated = np.arange(4.0)[:, None], np.array([[4.0], [9.0], [14.0]])
    # k = 1: radii 1 and 5. Real 3 reaches to 4; generated 4 reaches down to -1, 9 down to 4.
    assert prdc(real, generated, k=1) == {"precision": 1 / 3, "recall": 1, "density": 1 / 3, "coverage": 1 / 4}


def test_ties_count_as_inside_despite_rounding():
    generator = np.random.default_rng(0)
    start, step = 100 * generator.standard_normal((50, 30)), generator.standard_normal((50, 30))  # 50 lines
    line = [start + i * step for i in range(4)]
    result = prdc(np.concatenate(line[2:]), np.concatenate(line[:2]), k=1)
    # All radii are one step, so of each line the second generated and the first real point reach each other.
    assert result == {"precision": 0.5, "recall": 0.5, "density": 0.5, "coverage": 0.5}


def test_features_far_from_the_origin_keep_their_distances():
    """By |a|^2 + |b|^2 - 2ab in float32, as features come, the distances would be lost."""
    near = gaussian(80, 16, 0).astype(np.float32)
    features = (near + np.float32(3000)).astype(np.float32)
    exact = ((features[:, None].astype(np.float64) - features[None]) ** 2).sum(-1)
    expected = np.sort(exact, axis=1)[:, 5]
    norms = (features**2).sum(1)
    naive = np.sort(norms[:, None] + norms - 2 * features @ features.T, axis=1)[:, 5]
    assert np.abs(naive / expected - 1).max() > 0.5
    np.testing.assert_allclose(nearest_neighbour_radii(features.astype(np.float64), 5, 32), expected, rtol=1e-6)
    for offset, dtype in ((3000, np.float32), (2**24, np.float64)):
        real, generated = (
            (offset + gaussian(80, 16, 1)).astype(dtype),
            (offset + gaussian(70, 16, 2, 0.5)).astype(dtype),
        )
        expected = brute_force(real.astype(np.float64), generated.astype(np.float64), 5)
        assert prdc(real, generated) == pytest.approx(expected, abs=1e-12)


def test_duplicates_are_neighbours_of_each_other():
    points = np.array([[0.0], [0.0], [0.0], [7.0]])
    np.testing.assert_array_equal(nearest_neighbour_radii(points, 1, 2), [0, 0, 0, 49])
    np.testing.assert_array_equal(nearest_neighbour_radii(points, 3, 2), [49, 49, 49, 49])


@pytest.mark.parametrize(
    ("real", "generated", "k", "message"),
    [
        (gaussian(9, 3, 0), gaussian(9, 4, 1), 5, r"shapes \(9, 3\) and \(9, 4\)"),
        (gaussian(9, 3, 0), np.zeros(9), 5, r"shapes \(9, 3\) and \(9,\)"),
        (gaussian(9, 3, 0), gaussian(9, 3, 1), 0, "k is 0; it must be at least 1"),
        (gaussian(5, 3, 0), gaussian(9, 3, 1), 5, "5 real features have no 5-th nearest neighbour"),
        (gaussian(9, 3, 0), gaussian(1, 3, 1), 5, "1 generated features have no 5-th nearest neighbour"),
        (gaussian(9, 3, 0), np.full((9, 3), np.nan), 5, "some generated features are not finite"),
    ],
)
def test_bad_input_is_refused_in_one_line(real, generated, k, message):
    with pytest.raises(ValueError, match=message) as error:
        prdc(real, generated, k=k)
    assert "\n" not in str(error.value)
