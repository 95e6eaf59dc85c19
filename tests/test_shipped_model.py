"""The model repositories in `samples/`: their cards match their files, and their code matches this repository."""

from pathlib import Path

import pytest

from eval.results import read_results
from pipelines.model_card import render_card

REPOSITORY = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.parametrize("model", sorted(REPOSITORY.glob("samples/*/pipeline")), ids=["32", "64"])


def test_card_matches_its_files(model):
    assert (model / "README.md").read_text() == render_card(model), "run `python -m pipelines.export card`"


@pytest.mark.parametrize(
    ("copy", "original"),
    [
        ("custom_unet_pipeline.py", "pipelines/custom_unet_pipeline.py"),
        ("unet/custom_unet_2d.py", "custom_unet/custom_unet_2d.py"),
    ],
)
def test_shipped_code_matches_the_repository(model, copy, original):
    assert (model / copy).read_bytes() == (REPOSITORY / original).read_bytes()


def test_results_match_the_weights_and_the_evaluation(model):
    evaluation, shipped = (read_results(path / "results.json") for path in (model.parent / "evaluation", model))
    assert shipped["weights_sha256"] == evaluation["weights_sha256"]
    assert shipped["results"] == [entry for entry in evaluation["results"] if entry in shipped["results"]]
    assert any(entry["value"] is not None for entry in shipped["results"])
