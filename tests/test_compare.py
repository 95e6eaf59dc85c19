"""The comparison of several models, from the results in samples/."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_training import error_line

from eval.compare import main
from eval.results import number, read_results, write_results

SAMPLES = Path(__file__).parent.parent / "samples" / "celeba32_cpu"
FILES = {"comparison.md", "comparison.json"}


@pytest.fixture
def runs(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Copies of two evaluations, with four images each."""
    monkeypatch.chdir(tmp_path)
    for name in ("ddim", "ddpm"):
        shutil.copytree(SAMPLES / "samplers" / name, name)
        images = Path(name) / "images" / f"{name}-50-steps-bf16"
        images.mkdir(parents=True)
        (images / "generate.json").touch()
        for seed in range(4):
            Image.new("RGB", (32, 32), (60 * seed, 0, 0)).save(images / f"seed-{seed:07d}.png")
    return Path("ddim"), Path("ddpm")


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_committed_table_follows_from_the_committed_results(tmp_path):
    titles = ["ddim", "ddpm", "ddim-20"]
    folders = [str(SAMPLES / "samplers" / title) for title in titles]
    assert main([*folders, "--titles", *titles, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "comparison.md").read_text() == (SAMPLES / "samplers" / "comparison.md").read_text()
    assert files_in(tmp_path) == FILES  # the images are not committed


def test_model_without_images_and_missing_metrics_are_tabulated(tmp_path):
    folders = [str(SAMPLES / name) for name in ("evaluation", "heldout_control")]
    assert main([*folders, "--titles", "whole", "few", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "comparison.md").read_text()
    heading, _, *rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    first, last = (dict(zip(heading, row, strict=True)) for row in (rows[0], rows[-1]))
    assert (first["model"], first["sampler"]) == ("whole", "unipc, 20 steps")
    results = read_results(SAMPLES / "evaluation" / "results.json")["results"]
    assert first["FID (clean)"] == number(next(entry["value"] for entry in results if entry["name"] == "FID (clean)"))
    assert "±" in first["bits/dim by the ODE, held-out"]
    assert "the least level that the model knows: whole 0.006" in text
    assert (last["model"], last["sampler"], last["FID (clean)"]) == ("few", "not measured", "not measured")
    assert "±" in last["error of x_0, held-out"]
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert record["rows"][0]["swd"] in results
    assert files_in(tmp_path) == FILES | {"comparison_errors.png"}


def test_results_of_other_heldout_images_are_rejected(tmp_path, capsys):
    record = json.loads((SAMPLES / "evaluation" / "results.json").read_text().replace('"validation"', '"test"'))
    write_results(tmp_path / "results.json", record)
    assert main([str(SAMPLES / "heldout_control"), str(tmp_path), "--titles", "a", "b", "--out", str(tmp_path)]) == 2
    assert "the held-out images are from the splits test, validation" in error_line(capsys.readouterr().err)


def test_images_not_drawn_by_a_model_are_not_shown(runs):
    """They may be photographs, which must not be published."""
    for run in runs:
        next(run.glob("images/*/generate.json")).unlink()
    assert main(["ddim", "ddpm", "--titles", "a", "b", "--out", "out"]) == 0
    assert files_in(Path("out")) == FILES


def test_images_of_the_same_seeds_are_shown_unless_one_is_missing_or_damaged(runs):
    command = ["ddim", "ddpm", "--titles", "a", "b", "--out", "out", "--num_images"]
    for num_images, labels in (("4", ["a: ddim, 50 steps", "b: ddpm, 50 steps"]), ("5", None)):
        assert main([*command, num_images]) == 0
        shown = json.loads(Path("out/comparison.json").read_text())["shown"]
        assert shown == (labels and {"seeds": [0, 1, 2, 3], "labels": labels})
    assert files_in(Path("out")) == FILES | {"comparison.png"}
    Path("ddim/images/ddim-50-steps-bf16/seed-0000003.png").write_bytes(b"damaged")
    assert main([*command, "4"]) == 0
    assert json.loads(Path("out/comparison.json").read_text())["shown"]["labels"] == ["b: ddpm, 50 steps"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["ddim", "nowhere", "--out", "out"], "cannot read the results nowhere/results.json"),
        (["ddim", "ddpm", "--out", "out", "--titles", "one"], "there are 1 --titles for 2 folders"),
        (["ddim", "ddpm", "--out", "out", "--titles", "one", "one"], "2 models are called one; distinguish them"),
        (["ddim", "ddpm", "--out", "out", "--titles", "a", "b"], "have fingerprint other, those of a"),
        (["ddim", "--out", "ddim/results.json"], "--out ddim/results.json is not a folder; choose another one"),
    ],
)
def test_bad_input_exits_with_code_2_and_one_line(runs, flags, message, capsys):
    record = read_results(Path("ddpm/results.json"))
    write_results(Path("ddpm/results.json"), record | {"reference": record["reference"] | {"fingerprint": "other"}})
    assert main(flags) == 2
    assert message in error_line(capsys.readouterr().err)
    assert not Path("out").exists()
