"""The model repositories in `samples/`: their cards match their files, and their code matches this repository."""

from pathlib import Path

import pytest

from eval.results import read_results
from pipelines.model_card import render_card

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / "samples" / "celeba32_cpu" / "pipeline"


def test_card_matches_its_files():
    assert (MODEL / "README.md").read_text() == render_card(MODEL), "run `python -m pipelines.export card`"


@pytest.mark.parametrize(
    ("copy", "original"),
    [
        ("custom_unet_pipeline.py", "pipelines/custom_unet_pipeline.py"),
        ("unet/custom_unet_2d.py", "custom_unet/custom_unet_2d.py"),
    ],
)
def test_shipped_code_matches_the_repository(copy, original):
    assert (MODEL / copy).read_bytes() == (REPOSITORY / original).read_bytes()


def test_results_match_the_weights_and_the_evaluation():
    evaluation, shipped = (read_results(path / "results.json") for path in (MODEL.parent / "evaluation", MODEL))
    assert shipped["weights_sha256"] == evaluation["weights_sha256"]
    assert shipped["results"] == [entry for entry in evaluation["results"] if entry in shipped["results"]]
    assert any(entry["value"] is not None for entry in shipped["results"])
