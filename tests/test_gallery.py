"""The labelled grid of images, and the command that draws the pictures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler
from PIL import Image
from tiny_pipeline import tiny_pipeline

from eval.figures import labelled_grid
from experiments import gallery
from experiments.gallery import main
from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.export import export_pipeline
from training.sde import SDEScheduler


def test_labelled_grid_places_every_image():
    red, green, blue, grey = (Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue", "grey"))
    sheet = np.asarray(labelled_grid({"a": [red, green], "longer": [blue, grey]}, ["one", "two"]))
    images = [[np.asarray(image.resize((64, 64))) for image in row] for row in ((red, green), (blue, grey))]
    assert (sheet[20:, -128:] == np.block([[[image] for image in row] for row in images])).all()
    assert (sheet[:, :-128] < 128).any()  # the labels


def arguments_of(folder: Path, scheduler, **config) -> list[str]:
    """The arguments of the command that writes a tiny model's pictures to FOLDER/out."""
    model = export_pipeline(tiny_pipeline(scheduler, **config), folder / "model")
    return ["--pipeline", str(model), "--out", str(folder / "out")]


def test_command_draws_the_pictures_and_records_their_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "SHEET_STEPS", (2, 3))
    monkeypatch.setattr(gallery, "INVERSION_STEPS", (5, 20))
    monkeypatch.setattr(gallery, "STEPS", (2, 5))
    monkeypatch.setattr(gallery, "CONTINUOUS_STEPS", {"euler_maruyama": 9, "edm_heun": 5})
    assert main(arguments_of(tmp_path, DDIMScheduler(prediction_type="v_prediction"))) == 0
    out, names = tmp_path / "out", {picture.__name__ for picture in gallery.PICTURES}
    others = {"inversion.json", "denoising.gif", "gallery.json"}
    assert {path.name for path in out.iterdir()} == {f"{name}.png" for name in names} | others
    record = json.loads((out / "gallery.json").read_text())
    assert record.keys() == names
    assert {row.split(",")[0] for row in record["samplers"]["rows"]} == {*SAMPLERS}
    pipe = CustomUNetPipeline.from_pretrained(tmp_path / "model")
    pipe.set_sampler("dpmpp_2m")
    expected = pipe(seeds=[15], num_inference_steps=3).images[0].resize((64, 64), Image.Resampling.NEAREST)
    assert (np.asarray(Image.open(out / "contact_sheets.png"))[-64:, -64:] == np.asarray(expected)).all()
    rows = json.loads((out / "inversion.json").read_text())["reconstructions"]
    error = {(row["steps"], row["fixed_point_iterations"]): row["rms_error_grey_levels"] for row in rows}
    assert error[20, 5] < error[20, 1] < error[5, 1]  # better with more steps, and with more iterations


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [(DDIMScheduler(), {"num_class_embeds": 3}), (SDEScheduler(objective="edm", prediction_type="edm"), {})],
)
def test_other_models_are_refused(scheduler, config, tmp_path, capsys):
    assert main(arguments_of(tmp_path, scheduler, **config)) == 2
    assert re.fullmatch(".*is not an unconditional DDPM model.*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
