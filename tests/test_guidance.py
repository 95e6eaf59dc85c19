"""The guidance measurement: the meaning of a scale, the judge, the written results, and rejected inputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_pipeline import tiny_pipeline
from tiny_training import error_line

from experiments import guidance
from experiments.guidance import class_shares, draw, main, real_sets, summary
from pipelines import CustomUNetPipeline
from pipelines.export import export_pipeline
from training.data import open_image_store

SIZE, NAMES = 16, ["no", "yes"]
FLAGS = "--num_images 9 --num_inference_steps 3 --num_cpu_threads 1"


def pipeline_with(num_class_embeds: int) -> CustomUNetPipeline:
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    return tiny_pipeline(scheduler, sample_size=SIZE, num_class_embeds=num_class_embeds)


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
        export_pipeline(pipeline_with(num_classes), folder / name)
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
    pipe, labels = pipeline_with(3), [0, 1, 0, 1, 0]
    calls = {0.0: {"class_labels": 2}, 1.0: {"class_labels": labels}}
    calls[3.0] = {"class_labels": labels, "guidance_scale": 3.0}
    seen = []
    for scale, call in calls.items():
        images, evaluations = draw(pipe, scale, 5, 3)
        expected = pipe(seeds=range(5), num_inference_steps=3, output_type="pt", **call)
        expected_images = (255 * expected.images).round().to(torch.uint8).numpy()
        assert np.abs(images.astype(int) - expected_images).max() <= 1  # batches of 4 and of 1
        assert evaluations == expected.network_evaluations == (6 if scale == 3 else 3)
        seen.append(images)
    assert not any(np.array_equal(seen[a], seen[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


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


def test_model_is_measured_at_every_scale(tmp_path):
    arguments = f"{FLAGS} --pipeline conditional --scales 0 3"
    assert main([*arguments.split(), "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "guidance.json").read_text())
    found = [(entry["guidance_scale"], entry["network_evaluations"], entry["n"]) for entry in record["results"]]
    assert found == [(0, 3, 9), (3, 6, 9)]
    assert record["judge"]["accuracy"] > 0.9
    assert record["command"] == f"python -m experiments.guidance {arguments} --out {tmp_path.name}"
    assert {path.name for path in tmp_path.iterdir()} == {"guidance.json", "guidance.md", "guidance.png"}


def test_committed_table_follows_from_its_numbers():
    folder = Path(__file__).resolve().parent.parent / "samples" / "guidance"
    assert summary(json.loads((folder / "guidance.json").read_text())) == (folder / "guidance.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pipeline conditional --num_images 1", "but there are 2 classes"),
        ("--pipeline conditional --num_images 400", "not 400; lower --num_images"),
        ("--pipeline of_photographs", "was not trained on synthetic-faces with --label_column"),
        ("--pipeline without_null_class", "and a null class"),
    ],
)
def test_bad_input_exits_with_one_line_before_drawing(flags, message, tmp_path, capsys):
    assert main([*FLAGS.split(), *flags.split(), "--scales", "1", "--out", str(tmp_path / "out")]) == 2
    assert message in error_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
