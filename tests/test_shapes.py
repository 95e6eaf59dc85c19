"""Images with 1 to 4 channels or 16 bits, and rectangles: decoding, and the whole way from files to evaluation."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from exact_denoiser import ExactDenoiser
from exact_gaussian import INDEPENDENT, draw_images, exact_network
from PIL import Image, ImageOps
from stand_in_networks import write_features
from test_images import encode
from tiny_pipeline import tiny_pipeline

from eval import run as evaluation
from eval.features import over_white
from eval.likelihood import ode_likelihood
from pipelines import applications, generate
from training.config import TrainConfig
from training.data import open_image_store, to_model_range
from training.images import decode_image

pytest_plugins = ["tiny_training"]

SHAPES = [(3, 12, 20), (3, 20, 8), (1, 12, 20), (1, 16, 16), (2, 12, 20), (4, 16, 8)]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def save(folder: Path, *images: Image.Image) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number:02}.png")
    return folder


def grey_images(count: int) -> list[Image.Image]:
    """Grey images in all modes that a PNG may use for them, including RGB with equal channels."""
    modes = itertools.cycle(("L", "RGB", "LA", "1", "P"))
    return [Image.fromarray(pixels).convert(mode) for pixels, mode in zip(noise(count, 30, 44), modes, strict=False)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(50, 30), (30, 50), (41, 41)])
def test_crop_and_resize_match_pillow(shape, size):
    image, mode = Image.fromarray(noise(*size, 3 + (shape[0] % 2 == 0))), ["L", "LA", "RGB", "RGBA"][shape[0] - 1]
    target = (shape[2], shape[1])
    expected = {
        "center": ImageOps.fit(image.convert(mode), target, Image.Resampling.BICUBIC),
        "none": image.convert(mode).resize(target, Image.Resampling.BICUBIC),
    }
    for crop, pixels in expected.items():
        found = decode_image(encode(image), crop, shape)
        assert found.shape == shape
        np.testing.assert_array_equal(np.moveaxis(found, 0, -1).squeeze(), np.asarray(pixels))


def test_one_channel_is_chosen_if_all_images_are_grey(tmp_path):
    def open_folder(folder: Path, in_channels: int | None, max_images: int | None = None):
        which = {"train_data_dir": str(folder), "resolution": (12, 20), "cache_dir": str(tmp_path / "cache")}
        return open_image_store(**which, in_channels=in_channels, max_images=max_images)

    grey = save(tmp_path / "grey", *grey_images(12))
    chosen, as_rgb = open_folder(grey, None), open_folder(grey, 3)
    assert (chosen.images.shape, as_rgb.images.shape) == ((12, 1, 12, 20), (12, 3, 12, 20))
    np.testing.assert_array_equal(as_rgb.images, np.repeat(chosen.images, 3, axis=1))
    assert open_folder(grey, 1).folder == open_folder(grey, None).folder == chosen.folder

    coloured = save(tmp_path / "coloured", *grey_images(12), Image.fromarray(noise(30, 44, 3)))
    chosen, as_grey = open_folder(coloured, None), open_folder(coloured, 1)
    assert open_folder(coloured, 3).folder == chosen.folder != as_grey.folder
    luma = ImageOps.fit(Image.open(coloured / "12.png").convert("L"), (20, 12), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(as_grey.images[12, 0], np.asarray(luma))
    np.testing.assert_array_equal(as_grey.images[:12, 0], chosen.images[:12, 1])
    assert open_folder(coloured, None, max_images=12).images.shape[1] == 1


def test_synthetic_faces_of_other_shapes_are_cropped_from_squares(tmp_path):
    faces = {"dataset_name": "synthetic-faces", "max_images": 3, "cache_dir": str(tmp_path)}
    square = open_image_store(**faces, resolution=20).images
    np.testing.assert_array_equal(open_image_store(**faces, resolution=(12, 20)).images, square[:, :, 4:16])
    grey = open_image_store(**faces, resolution=20, in_channels=1).images
    np.testing.assert_array_equal(grey[1, 0], Image.fromarray(np.moveaxis(square[1], 0, -1)).convert("L"))


def test_resolution_is_one_number_or_height_and_width():
    settings = {"dataset_name": "synthetic-faces", "max_train_steps": 1, "in_channels": 1}
    for given, found, size in ((16, 16, 16), ([16], 16, 16), ([16, 16], 16, 16), ([16, 32], [16, 32], (16, 32))):
        config = TrainConfig(**settings, resolution=given)
        assert (config.resolution, config.unet_kwargs()["sample_size"]) == (found, size)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--resolution 16 33", "sample_size=(16, 33)"),
        ("--resolution 16 16 16", "--resolution has 3 numbers; give one, or height and width"),
        ("--resolution 16x32", "invalid int value: '16x32'"),
        ("--resolution 8 16 --crop celeba_140", "crop celeba_140 is square, but 8x16 is not"),
        ("--in_channels 5", "invalid choice: '5' (choose from 1, 2, 3, 4, None)"),
    ],
)
def test_unsupported_shapes_exit_with_code_2(train, tmp_path, flags, message):
    (line,) = [line for line in train(tmp_path, *flags.split(), code=2).splitlines() if "error" in line]
    assert message in line


def sixteen_bit_images(count: int) -> list[Image.Image]:
    return [Image.fromarray(pixels.astype(np.uint16) * 200 + 77) for pixels in noise(count, 30, 44)]


def test_preserve_input_precision_keeps_16_bits(tmp_path):
    images = sixteen_bit_images(3)
    folder = save(tmp_path / "data", *images, Image.fromarray(noise(30, 44)))
    which = {"train_data_dir": str(folder), "crop": "none", "cache_dir": str(tmp_path / "cache")}
    kept, rounded = (
        open_image_store(**which, resolution=(30, 44), in_channels=None, preserve_input_precision=keep)
        for keep in (True, False)
    )
    assert (kept.images.dtype, kept.images.shape) == (np.uint16, (4, 1, 30, 44))
    expected = [np.asarray(image) for image in images] + [noise(30, 44) * np.uint16(257)]
    np.testing.assert_array_equal(kept.images[:, 0], expected)
    np.testing.assert_array_equal(rounded.images, np.round(kept.images / 257))
    in_model_range = torch.tensor(expected[0] / 32767.5 - 1, dtype=torch.float32)
    torch.testing.assert_close(to_model_range(torch.tensor(kept.images[0, 0])), in_model_range)
    small = open_image_store(**which, resolution=(15, 22), in_channels=3, preserve_input_precision=True).images
    resized = [Image.fromarray(pixels.astype(np.float32)).resize((22, 15), Image.BICUBIC) for pixels in expected[:3]]
    for channel in range(3):
        np.testing.assert_array_equal(small[:3, channel], [np.asarray(image).round() for image in resized])


@pytest.mark.parametrize(
    ("flags", "images", "dtype", "mode"),
    [
        ("--in_channels 4", [Image.fromarray(pixels) for pixels in noise(16, 20, 24, 4)], "uint8", "RGBA"),
        ("--preserve_input_precision true", sixteen_bit_images(16), "uint16", "L"),
    ],
)
def test_channels_and_16_bits_work_from_training_to_evaluation(
    train, tmp_path, monkeypatch, flags, images, dtype, mode
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, run = save(tmp_path / "data", *images), tmp_path / "run"
    train(run, *flags.split(), dataset_name=None, train_data_dir=str(data), max_train_steps=2)
    about = json.loads((run / "pipeline" / "training.json").read_text())["data"]
    card = (run / "pipeline" / "README.md").read_text()
    assert (" with an alpha channel" in card, " grey " in card) == (mode == "RGBA", mode == "L")
    assert (about.get("dtype", "uint8"), about.get("in_channels")) == (dtype, len(mode))
    features = write_features(tmp_path / "features.pt")
    flags = f"--pipeline {run}/pipeline --reference {data} --num_images 8 --steps 2 --num_cpu_threads 1 --allow_few"
    flags += f" --metrics colours features --crop center --features {features} --heldout_split train"
    assert evaluation.main([*flags.split(), "--out", str(tmp_path / "evaluation")]) == 0
    (folder,) = (tmp_path / "evaluation" / "images").iterdir()
    assert {image.mode for image in map(Image.open, folder.glob("seed-*.png"))} == {mode}


def test_transparent_images_are_evaluated_over_white():
    images = torch.tensor([[200.0, 100, 0], [0, 255, 51]]).to(torch.uint8)[None, :, :, None]  # (1, 2, 3, 1)
    assert over_white(images).flatten().tolist() == [255, 100, 204]
    coloured = torch.cat([images[:, :1].expand(-1, 3, -1, -1), images[:, 1:]], dim=1)
    assert torch.equal(over_white(coloured), over_white(images).expand(-1, 3, -1, -1))
    assert torch.equal(over_white(coloured[:, :3]), coloured[:, :3])


def test_grey_images_work_from_training_to_evaluation(train, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = grey_images(32)
    save(tmp_path / "data" / "train", *images[:24])
    save(tmp_path / "data" / "validation", *images[24:])
    data, run = {"dataset_name": None, "train_data_dir": str(tmp_path / "data"), "crop": "center"}, tmp_path / "run"
    tiny = data | {"max_train_steps": 3, "resolution": [16, 32], "validation_split": "validation"}
    assert "24 images per epoch, grey (--in_channels 1)" in train(run, **tiny)
    assert "resuming from" in train(run, **tiny | {"max_train_steps": 4})
    assert json.loads((run / "pipeline" / "training.json").read_text())["data"]["in_channels"] == 1
    card = (run / "pipeline" / "README.md").read_text()
    assert "generates grey 16x32 images" in card
    assert "colorize" not in card

    model, images = str(run / "pipeline"), tmp_path / "images"
    flags = f"--pipeline {model} --num_cpu_threads 1 --steps 2"
    assert generate.main(f"{flags} --num_images 3 --out {images}".split()) == 0
    assert {(i.mode, i.size) for i in map(Image.open, images.glob("seed-*.png"))} == {("L", (32, 16))}
    unet = UNet2DModel.from_pretrained(model, subfolder="unet")
    assert DDIMPipeline(unet, DDIMScheduler())(num_inference_steps=1).images[0].size == (32, 16)

    features = write_features(tmp_path / "features.pt")
    flags += " --num_images 8 --ode_images 1 --ode_tolerance 0.1 --likelihood_images 2 --bound_evaluations 3"
    flags += " --heldout_images 4 --cost_images 4 --cost_samplers ddim:2 --allow_few --heldout_split validation"
    flags += f" --features {features} --reference {tmp_path}/data --out {tmp_path}/evaluation"
    assert evaluation.main(flags.split()) == 0
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())["results"]
    assert all(entry["value"] is not None for entry in results)
    assert {entry["value"] for entry in results if entry["metric"] == "saturation"} == {0}
    assert "SWD, level 16x32" in {entry["name"] for entry in results}


def test_applications_accept_images_of_any_mode_for_grey_networks():
    pipe = tiny_pipeline(sample_size=(8, 16), in_channels=1, out_channels=1)
    image, mask = Image.fromarray(noise(8, 16, 3)), Image.fromarray(255 * (noise(8, 16) // 128))
    imputed = applications.impute(pipe, image, mask, 2, seeds=[0])[0]  # before any call of the pipeline
    assert (imputed.mode, imputed.size) == ("L", (16, 8))
    painted = [applications.inpaint(pipe, x, mask, 2, seeds=[0])[0] for x in (image, image.convert("L"))]
    np.testing.assert_array_equal(*painted)
    kept = np.asarray(mask) == 0
    np.testing.assert_array_equal(np.asarray(painted[0])[kept], np.asarray(image.convert("L"))[kept])
    with pytest.raises(ValueError, match="the network has 1 channels; colours need 3"):
        applications.colorize(pipe, image)


def test_bits_per_dim_do_not_depend_on_the_pixel_layout():
    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    network, images = exact_network(ExactDenoiser, INDEPENDENT, scheduler), draw_images(INDEPENDENT, 4)
    values = [ode_likelihood(network, scheduler, x)[0] for x in (images, images.view(4, 1, 1, 3))]
    np.testing.assert_allclose(*values, rtol=1e-6)
