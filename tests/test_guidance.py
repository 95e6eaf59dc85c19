"""The guidance measurement: the meaning of a scale, the judge, the written results, and rejected inputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from experiments import guidance
from experiments.guidance import Judge, class_shares, draw, main, real_sets, swd
from pipelines import CustomUNetPipeline
from pipelines.export import export_pipeline
from training.data import open_image_store

SIZE, NAMES = 16, ["no", "yes"]
FLAGS = "--num_images 9 --num_inference_steps 3 --num_cpu_threads 1"


def tiny_pipeline(**config) -> CustomUNetPipeline:
    torch.manual_seed(0)
    network = CustomUNet2DModel(**TINY | {"sample_size": SIZE} | config)
    pipe = CustomUNetPipeline(network, DDIMScheduler(prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A suitable model, and unsuitable ones."""
    folder = tmp_path_factory.mktemp("models")
    faces = {"source": "synthetic-faces", "label_column": "glasses", "label_names": NAMES}
    for name, num_classes, data in [
        ("conditional", 3, faces),
        ("of_photographs", 3, faces | {"source": "photographs"}),
        ("without_null_class", 2, faces),
    ]:
        export_pipeline(tiny_pipeline(num_class_embeds=num_classes), folder / name)
        (folder / name / "training.json").write_text(json.dumps({"data": data}))
    return folder


@pytest.fixture(autouse=True)
def in_models_folder(models, monkeypatch):
    """Makes the models' folder current, so that commands can name them."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(models / "cache"))
    monkeypatch.setattr(guidance, "SPLITS", ("validation", "validation"))  # the smaller split
    monkeypatch.setattr(guidance, "BATCH_SIZE", 4)


def real_images():
    which = {"label_column": "glasses", "resolution": SIZE, "crop": "none"}
    return open_image_store(dataset_name="synthetic-faces", split="validation", **which)


def test_scale_0_is_the_null_class_and_scale_1_is_unguided():
    pipe, labels = tiny_pipeline(num_class_embeds=3), [0, 1, 0, 1, 0]
    calls = {0.0: {"class_labels": 2}, 1.0: {"class_labels": labels}}
    calls[3.0] = {"class_labels": labels, "guidance_scale": 3.0}
    seen = []
    for scale, call in calls.items():
        images, evaluations = draw(pipe, scale, 5, 3, num_classes=2)
        expected = pipe(seeds=range(5), num_inference_steps=3, output_type="pt", **call)
        expected_images = (255 * expected.images).round().to(torch.uint8).numpy()
        assert np.abs(images.astype(int) - expected_images).max() <= 1  # batches of 4 and of 1
        assert evaluations == expected.network_evaluations == (6 if scale == 3 else 3)
        seen.append(images)
    assert not any(np.array_equal(seen[a], seen[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_judge_is_ridge_regression_and_separates_class_means():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=500)
    images = rng.integers(100, 140, size=(500, 1, 4, 4), dtype=np.uint8)
    images[np.arange(500), 0, labels, labels] += 60
    judge = Judge(images[:300], labels[:300], 3)
    assert (judge(images[300:]) == labels[300:]).mean() > 0.98
    x, y = images[:300].reshape(300, 16) / 127.5 - 1, np.eye(3)[labels[:300]]
    residual = y - y.mean(0) - (x - x.mean(0)) @ judge.weights.numpy()
    # the gradient of |residual|^2 + RIDGE |weights|^2 vanishes at its minimum
    np.testing.assert_allclose((x - x.mean(0)).T @ residual, guidance.RIDGE * judge.weights, atol=1e-9)


def test_class_shares_have_binomial_standard_errors():
    found = np.array([0, 1, 1, 0, 0, 1])
    shares = class_shares(found, np.array([0, 1, 0, 1, 0, 1]), ["dark", "light"])
    assert (shares["value"], shares["n"]) == (4 / 6, 6)
    assert shares["std"] == pytest.approx((4 / 6 * 2 / 6 / 6) ** 0.5)
    assert [(c["name"], c["value"], c["n"]) for c in shares["classes"]] == [("dark", 2 / 3, 3), ("light", 2 / 3, 3)]


def test_real_sets_are_disjoint_with_the_requested_class_counts():
    store = real_images()
    labels_of = {image.tobytes(): label for image, label in zip(store.images, store.labels, strict=True)}
    first, second = real_sets(store, NAMES, [0, 1, 0, 1, 0])
    for images in (first, second):
        assert sorted(labels_of[image.tobytes()] for image in images) == [0, 0, 0, 1, 1]
    assert len({image.tobytes() for image in [*first, *second]}) == 10
    swapped, _ = real_sets(store, ["yes", "no"], [0, 0, 1])  # classes are matched by their names
    assert sorted(labels_of[image.tobytes()] for image in swapped) == [0, 1, 1]


def test_model_is_measured_at_every_scale(models, tmp_path):
    arguments = f"{FLAGS} --pipeline conditional --scales 0 3"
    assert main([*arguments.split(), "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "guidance.json").read_text())
    pipe, store = CustomUNetPipeline.from_pretrained(models / "conditional"), real_images()
    judge, labels = Judge(store.images, store.labels_among(NAMES), 2), [i % 2 for i in range(9)]
    real, others = real_sets(store, NAMES, labels)
    text = (tmp_path / "guidance.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    for row, entry, scale, evaluations in zip(rows, record["results"], (0, 3), (3, 6), strict=True):
        images, _ = draw(pipe, scale, 9, 3, 2)
        expected = class_shares(judge(images), np.array(labels), NAMES)
        assert expected.items() <= entry.items()
        assert entry["swd"] == pytest.approx(swd(images, real), rel=1e-4)
        assert entry["swd_floor"] == pytest.approx(swd(others, real))
        assert (entry["guidance_scale"], entry["network_evaluations"]) == (scale, evaluations)
        shares = [f"{of_class['value']:.4g}" for of_class in entry["classes"]]
        assert row[:1] + row[2:5] == [f"{scale}", *shares, f"{entry['swd']:.4g} ({entry['swd_floor']:.4g})"]
    accuracy = np.mean(judge(store.images) == store.labels_among(NAMES))
    assert record["judge"] == {"accuracy": accuracy, "split": "validation", "num_images": 1000}
    assert f"The judge puts {accuracy:.1%} of 1,000 real images" in text
    assert record["command"] == f"python -m experiments.guidance {arguments} --out {tmp_path.name}"
    assert {path.name for path in tmp_path.iterdir()} == {"guidance.json", "guidance.md", "guidance.png"}


def test_failed_sampling_at_one_scale_keeps_earlier_results(tmp_path, capsys):
    assert main(f"{FLAGS} --pipeline conditional --scales 0 1e38 --out {tmp_path}".split()) == 1
    assert "images are not finite" in capsys.readouterr().err.splitlines()[-1]
    results = json.loads((tmp_path / "guidance.json").read_text())["results"]
    assert [entry["guidance_scale"] for entry in results] == [0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pipeline conditional --num_images 1", "but there are 2 classes"),
        ("--pipeline conditional --num_images 400", "and two sets of 200 are needed; use fewer"),
        ("--pipeline of_photographs", "was not trained on synthetic-faces with --label_column"),
        ("--pipeline without_null_class", "and a null class"),
    ],
)
def test_bad_input_exits_with_one_line_before_drawing(flags, message, tmp_path, capsys):
    assert main([*FLAGS.split(), *flags.split(), "--scales", "1", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after the progress bar of the first decoding
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()
