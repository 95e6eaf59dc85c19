"""The sheet of pictures, and the command that draws them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from experiments.gallery import labelled_grid, main, masks
from pipelines import CustomUNetPipeline
from pipelines.export import export_pipeline
from training.sde import SDEScheduler


def test_a_sheet_shows_every_image_in_its_place():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    red, green, blue, grey = (Image.new("RGB", (4, 4), colour) for colour in colours)
    sheet = np.asarray(labelled_grid({"a": [red, green], "longer": [blue, grey]}, ["one", "two"], side=16))
    assert sheet.shape[0] == 20 + 2 * 16
    assert (sheet[20:36, -32:-16] == colours[0]).all()
    assert (sheet[20:36, -16:] == colours[1]).all()
    assert (sheet[36:, -32:-16] == colours[2]).all()
    assert (sheet[36:, -16:] == colours[3]).all()
    assert (sheet[:, :-32] < 128).any()  # the labels


def test_masks_cover_what_they_name():
    assert {name: mask.mean() for name, mask in masks(32).items()} == {"eyes": 0.25, "right half": 0.5, "centre": 0.25}


def test_the_command_draws_and_records(tmp_path):
    torch.manual_seed(0)
    pipe = CustomUNetPipeline(CustomUNet2DModel(**TINY), DDIMScheduler(prediction_type="v_prediction"))
    folder, out = export_pipeline(pipe, tmp_path / "model"), tmp_path / "assets"
    for names in (["interpolation", "variations"], ["denoising"]):
        assert main(["--pipeline", str(folder), "--out", str(out), "--only", *names]) == 0
    files = {path.name for path in out.iterdir()}
    assert files == {"interpolation.png", "variations.png", "denoising.png", "denoising.gif", "gallery.json"}
    assert set(json.loads((out / "gallery.json").read_text())) == {"interpolation", "variations", "denoising"}
    with Image.open(out / "interpolation.png") as sheet:
        assert sheet.height == 4 * 64


def test_a_model_of_an_sde_has_the_pictures_that_need_no_ddim(tmp_path, capsys):
    torch.manual_seed(0)
    pipe = CustomUNetPipeline(CustomUNet2DModel(**TINY), SDEScheduler(objective="edm", prediction_type="edm"))
    folder, out = export_pipeline(pipe, tmp_path / "model"), tmp_path / "assets"
    assert main(["--pipeline", str(folder), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: contact_sheets needs discrete timesteps, but the model has continuous time")
    assert not out.exists()
    names = line.split("--only ")[1].split()
    assert names == ["samplers", "interpolation", "denoising", "continuous", "conditional"]
    assert main(["--pipeline", str(folder), "--out", str(out), "--only", *names]) == 0
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}.png" for name in names),
        "denoising.gif",
        "gallery.json",
    }
    record = json.loads((out / "gallery.json").read_text())
    assert {row.split(",")[0] for row in record["samplers"]["rows"]} == {*pipe.samplers}
    assert record["denoising"]["sampler"] == "edm_heun"


def test_contact_sheets_have_each_sampler_and_number_of_steps_for_the_same_seeds(tmp_path, monkeypatch):
    torch.manual_seed(0)
    pipe = CustomUNetPipeline(CustomUNet2DModel(**TINY), DDIMScheduler(prediction_type="v_prediction"))
    folder = export_pipeline(pipe, tmp_path / "model")
    monkeypatch.setattr("experiments.gallery.SHEET_STEPS", (2, 3))
    assert main(["--pipeline", str(folder), "--out", str(tmp_path), "--only", "contact_sheets"]) == 0
    sheet = np.asarray(Image.open(tmp_path / "contact_sheets.png"))
    assert sheet.shape[0] == 20 + 4 * 2 * 64
    pipe.set_sampler("unipc")
    expected = pipe(seeds=[15], num_inference_steps=3).images[0].resize((64, 64), Image.Resampling.NEAREST)
    assert (sheet[-64:, -64:] == np.asarray(expected)).all()


def test_reconstructions_get_better_with_steps(tmp_path, monkeypatch):
    torch.manual_seed(0)
    pipe = CustomUNetPipeline(CustomUNet2DModel(**TINY), DDIMScheduler(prediction_type="v_prediction"))
    monkeypatch.setattr("experiments.gallery.INVERSION_STEPS", (5, 20))
    folder = export_pipeline(pipe, tmp_path / "model")
    assert main(["--pipeline", str(folder), "--out", str(tmp_path), "--only", "inversion"]) == 0
    record = json.loads((tmp_path / "inversion.json").read_text())["reconstructions"]
    error = {(r["steps"], r["fixed_point_iterations"]): r["rms_error_grey_levels"] for r in record}
    assert error[20, 1] < error[5, 1]
    assert error[20, 5] < error[20, 1]
    assert all(r["network_evaluations_of_the_inversion"] == r["steps"] * r["fixed_point_iterations"] for r in record)


@pytest.mark.parametrize("flags", ["--pipeline nowhere/at/all", "--only beauty", "--outt x", "--pipeline classes"])
def test_bad_input_is_one_line_and_exit_code_2(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export_pipeline(
        CustomUNetPipeline(CustomUNet2DModel(**TINY, num_class_embeds=3), DDIMScheduler()), Path("classes")
    )
    assert main(flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not Path("assets").exists()
