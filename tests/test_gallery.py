"""The labelled grid of images, and the command that draws the pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from experiments import gallery
from experiments.gallery import labelled_grid, main, masks
from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.export import export_pipeline
from training.sde import SDEScheduler


def test_labelled_grid_places_every_image():
    red, green, blue, grey = (Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue", "grey"))
    sheet = np.asarray(labelled_grid({"a": [red, green], "longer": [blue, grey]}, ["one", "two"], side=16))
    images = [[np.asarray(image.resize((16, 16))) for image in row] for row in ((red, green), (blue, grey))]
    assert (sheet[20:, -32:] == np.block([[[image] for image in row] for row in images])).all()
    assert (sheet[:, :-32] < 128).any()  # the labels


def test_masks_cover_the_named_parts():
    parts = {name: mask.mean() for name, mask in masks(32, 64).items()}
    assert parts == {"eyes": 0.25, "right half": 0.5, "centre": 0.25}


def export(folder: Path, scheduler, **config) -> tuple[CustomUNetPipeline, list[str]]:
    """A tiny model, and the arguments of the command that writes its pictures to FOLDER/out."""
    torch.manual_seed(0)
    pipe = CustomUNetPipeline(CustomUNet2DModel(**TINY, **config), scheduler)
    model = export_pipeline(pipe, folder / "model")
    return pipe, ["--pipeline", str(model), "--out", str(folder / "out")]


@pytest.mark.parametrize(
    ("scheduler", "names"),
    [
        (DDIMScheduler(prediction_type="v_prediction"), {picture.__name__ for picture in gallery.PICTURES}),
        (
            SDEScheduler(objective="edm", prediction_type="edm"),
            {"samplers", "interpolation", "denoising", "continuous", "conditional"},
        ),
    ],
)
def test_command_draws_supported_pictures_and_records_settings(scheduler, names, tmp_path, monkeypatch):
    """Also checks the contact sheets and the record of the inversion, if the model has them."""
    monkeypatch.setattr(gallery, "SHEET_STEPS", (2, 3))
    monkeypatch.setattr(gallery, "INVERSION_STEPS", (5, 20))
    monkeypatch.setattr(gallery, "STEPS", (2, 5))
    monkeypatch.setattr(gallery, "CONTINUOUS_STEPS", {"euler_maruyama": 9, "edm_heun": 5})
    pipe, arguments = export(tmp_path, scheduler)
    out = tmp_path / "out"
    assert main(arguments) == 0
    drawn = {path.name for path in out.iterdir()}
    assert drawn - {"inversion.json"} == {*(f"{name}.png" for name in names), "denoising.gif", "gallery.json"}
    record = json.loads((out / "gallery.json").read_text())
    assert record.keys() == names
    samplers = pipe.samplers if pipe.is_continuous else SAMPLERS
    assert {row.split(",")[0] for row in record["samplers"]["rows"]} == {*samplers}
    if pipe.is_continuous:
        assert record["denoising"]["sampler"] == "edm_heun"
        return

    sheet = np.asarray(Image.open(out / "contact_sheets.png"))
    assert sheet.shape[0] == 20 + 4 * 2 * 64
    pipe.set_sampler("unipc")
    expected = pipe(seeds=[15], num_inference_steps=3).images[0].resize((64, 64), Image.Resampling.NEAREST)
    assert (sheet[-64:, -64:] == np.asarray(expected)).all()
    rows = json.loads((out / "inversion.json").read_text())["reconstructions"]
    error = {(row["steps"], row["fixed_point_iterations"]): row["rms_error_grey_levels"] for row in rows}
    assert error[20, 5] < error[20, 1] < error[5, 1]  # better with more steps, and with more iterations


def test_class_conditional_model_is_refused(tmp_path, capsys):
    _, arguments = export(tmp_path, DDIMScheduler(), num_class_embeds=3)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "class embeddings" in line
    assert not (tmp_path / "out").exists()
