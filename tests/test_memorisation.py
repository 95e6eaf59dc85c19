"""Memorisation: nearest neighbours compared with brute force, planted copies, and a model that generalises."""

import numpy as np
import pytest

from common import InputError
from eval.memorisation import memorisation, nearest_distances, nearest_training
from training.synthetic_faces import render_faces


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    """1,100 synthetic faces, uint8, (N, 3, 16, 16)."""
    return np.ascontiguousarray(render_faces(range(1100), 16, seed=3).transpose(0, 3, 1, 2))


def brute_force(queries: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flat, queries = references.reshape(len(references), -1), queries.reshape(len(queries), -1).astype(np.float64)
    distances = np.array([np.linalg.norm(flat - query, axis=1) for query in queries])
    return distances.min(axis=1), distances.argmin(axis=1)


def test_copies_have_distance_zero_and_near_ties_are_resolved():
    """With large norms and neighbours that differ in one number, where float32 products alone get both wrong."""
    base = (1000 * np.random.default_rng(0).standard_normal((6, 2048))).astype(np.float32)
    references = np.repeat(base, 20, axis=0)
    references[np.arange(120), np.arange(120)] += np.tile(np.linspace(1, 2, 20, dtype=np.float32), 6)
    queries, nearest = np.concatenate([base, references[[17, 118]]]), [0, 20, 40, 60, 80, 100, 17, 118]
    naive = (queries**2).sum(1)[:, None] + (references**2).sum(1) - 2 * queries @ references.T
    assert (naive.argmin(1) != nearest).any(), "the case must be hard for float32"
    distances, indices = nearest_distances(queries, references, chunk=16)
    assert indices.tolist() == nearest
    assert distances[-2:].tolist() == [0, 0]
    np.testing.assert_allclose(distances, brute_force(queries, references)[0], rtol=1e-12)


def test_planted_copies_are_found_and_counted(faces):
    training, heldout, generated = faces[:800], faces[800:1000], faces[1000:].copy()
    noise = np.random.default_rng(0).normal(0, 2, training[0].shape)
    generated[11] = training[301]
    generated[42] = training[77, :, :, ::-1]
    generated[73] = (training[640] + noise).round().clip(0, 255)
    before = memorisation(faces[1000:], heldout, training)
    report = memorisation(generated, heldout, training)
    assert before.share_below_minimum[0] == 0
    assert report.share_below_minimum[0] == 0.03
    assert report.share_below_percentile[0] >= 0.03
    pairs = [tuple(pair.values()) for pair in report.nearest_pairs]
    assert pairs[:2] == [(11, 301, False, 0.0), (42, 77, True, 0.0)]
    assert pairs[2] == (73, 640, False, pytest.approx(2, abs=0.3))  # grey levels
    distances = [pair["distance"] for pair in report.nearest_pairs]
    assert distances == sorted(distances)
    assert len(distances) == 16


def test_nearest_training_matches_brute_force_with_mirrored_images(faces):
    training, queries = faces[:300], faces[300:340]
    distances, indices, mirrored = nearest_training(queries, training)
    expected, expected_indices = brute_force(queries, np.concatenate([training, training[..., ::-1]]))
    np.testing.assert_allclose(distances, expected, rtol=1e-12)
    np.testing.assert_array_equal(indices + 300 * mirrored, expected_indices)
    assert 0 < mirrored.sum() < 40


def test_symmetric_images_are_not_reported_as_mirrored(faces):
    symmetric = faces[:1] // 2 + faces[:1, :, :, ::-1] // 2
    training = np.concatenate([faces[1:50], symmetric])
    assert [found.item() for found in nearest_training(symmetric, training)] == [0, 49, False]


def test_heldout_near_duplicates_are_excluded_and_counted(faces):
    """Three held-out images are training images with one grey level of noise; unless excluded, they hide a copy."""
    training, heldout, generated = faces[:900], faces[900:1000].copy(), faces[1000:].copy()
    noise = np.random.default_rng(0).integers(-1, 2, (3, *training.shape[1:]))
    heldout[:3] = (training[:3].astype(int) + noise).clip(0, 255)
    generated[7] = (training[50].astype(int) + 2 * noise[0]).clip(0, 255)
    blinded = memorisation(generated, heldout, training)
    assert (blinded.num_heldout_duplicates, blinded.share_below_minimum[0]) == (0, 0)
    report = memorisation(generated, heldout, training, duplicate_distance=2.0)
    assert (report.num_heldout_duplicates, len(report.heldout_distances)) == (3, 97)
    assert report.share_below_minimum[0] >= 1 / 100
    assert report.nearest_pairs[0].items() >= {"generated": 7, "training": 50}.items()
    for images, distance in ((training[:50], 0), (heldout, 999)):
        with pytest.raises(InputError, match=f"training images or nearer to one than {distance}"):
            memorisation(generated, images, training, duplicate_distance=distance)


def test_shares_match_their_expectation_on_average():
    """Samples of one distribution are exchangeable: each held-out or generated one is the nearest equally often."""
    generator = np.random.default_rng(0)
    reports = [memorisation(*(generator.random((n, 2)) for n in (25, 10, 40))) for _ in range(600)]
    for name, expected in (("share_below_minimum", 1 / 11), ("share_nearest_heldout", 1 / 5)):
        shares = np.array([getattr(report, name)[0] for report in reports])
        assert getattr(reports[0], name)[1] == expected
        assert abs(shares.mean() - expected) < 4 * shares.std() / 600**0.5
    stds = np.array([report.std_share_nearest_heldout for report in reports])  # each of four groups
    assert np.mean(stds**2) == pytest.approx(shares.var(), rel=0.25)


def test_shares_are_computed_in_groups_as_large_as_the_heldout_set():
    training, generated = np.arange(7.0)[:, None], np.array([[0.0], [1], [1], [3], [6]])  # image 6 is in no group
    report = memorisation(generated, np.array([[-10.0], [20]]), training)
    assert report.std_share_nearest_heldout == pytest.approx(np.std([0.6, 0.2, 0.0], ddof=1))


def test_features_are_compared_by_l2_distance():
    training = np.array([[0.0, 0.0], [10.0, 0.0]])
    generated, heldout = np.array([[3.0, 4.0], [10.0, 1.0], [0.0, 2.0]]), np.array([[0.0, 2.0], [10.0, 4.0]])
    report = memorisation(generated, heldout, training)
    pairs = [tuple(pair.values()) for pair in report.nearest_pairs]
    assert pairs == [(1, 1, False, 1.0), (2, 0, False, 2.0), (0, 0, False, 5.0)]
    assert (report.distances.tolist(), report.heldout_median, report.ratio) == ([5, 1, 2], 3, 2 / 3)
    assert report.share_below_minimum[0] == 1 / 3  # below the minimum of 2, not at it
