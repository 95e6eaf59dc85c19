"""The pipeline against diffusers' own, and the model repository loaded the three ways, away from this repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from custom_unet import CustomUNet2DModel
from pipelines import CustomUNetPipeline
from pipelines.export import export_pipeline

TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "dropout": 0.5,
}


@pytest.fixture
def pipe() -> CustomUNetPipeline:
    torch.manual_seed(0)
    pipe = CustomUNetPipeline(CustomUNet2DModel(**TINY), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.mark.parametrize(("stock", "scheduler"), [(DDIMPipeline, DDIMScheduler), (DDPMPipeline, DDPMScheduler)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_same_images_as_the_stock_pipeline(pipe, stock, scheduler, prediction_type):
    pipe.scheduler = scheduler(prediction_type=prediction_type)
    reference = stock(UNet2DModel(**TINY).eval(), scheduler(prediction_type=prediction_type))
    reference.unet.load_state_dict(pipe.unet.state_dict())
    reference.set_progress_bar_config(disable=True)
    arguments = {"batch_size": 2, "num_inference_steps": 7, "output_type": "np"}
    ours = pipe(**arguments, generator=seeds(1, 2)).images
    np.testing.assert_allclose(ours, reference(**arguments, generator=seeds(1, 2)).images, atol=1e-5)
    assert ours.std() > 0.05


def test_eta_adds_noise_as_the_stock_pipeline_does(pipe):
    reference = DDIMPipeline(UNet2DModel(**TINY).eval(), DDIMScheduler())
    reference.unet.load_state_dict(pipe.unet.state_dict())
    reference.set_progress_bar_config(disable=True)
    arguments = {"batch_size": 2, "num_inference_steps": 5, "eta": 1.0, "output_type": "np"}
    ours = pipe(**arguments, generator=seeds(1, 2)).images
    np.testing.assert_allclose(ours, reference(**arguments, generator=seeds(1, 2)).images, atol=1e-5)
    assert np.abs(ours - pipe(**{**arguments, "eta": 0.0}, generator=seeds(1, 2)).images).max() > 0.01


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_an_image_depends_on_its_own_seed_alone(pipe, scheduler):
    pipe.scheduler = scheduler()
    together = pipe(3, seeds(5, 6, 7), 5, output_type="pt").images
    alone = pipe(1, seeds(6), 5, output_type="pt").images
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_output_types(pipe):
    as_pt = pipe(2, seeds(1, 2), 3, output_type="pt").images
    (as_np,) = pipe(2, seeds(1, 2), 3, output_type="np", return_dict=False)
    as_pil = pipe(2, seeds(1, 2), 3).images
    assert as_pt.shape == (2, 3, 8, 8)
    assert as_pt.min() >= 0
    assert as_pt.max() <= 1
    np.testing.assert_allclose(as_np, as_pt.permute(0, 2, 3, 1), atol=0)
    assert as_pil[0].size == (8, 8)
    np.testing.assert_array_equal(np.asarray(as_pil[1]), (as_np[1] * 255).round().astype("uint8"))


def test_rectangular_images(pipe):
    pipe.unet = CustomUNet2DModel(**{**TINY, "sample_size": (8, 16)})
    assert pipe(1, seeds(1), 2).images[0].size == (16, 8)


def test_dropout_is_off_while_sampling_and_the_mode_comes_back(pipe):
    pipe.unet.train()
    first, second = (pipe(1, seeds(1), 3, output_type="pt").images for _ in range(2))
    assert torch.equal(first, second)
    assert pipe.unet.training


def test_broken_weights_raise_instead_of_giving_black_images(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(ValueError, match="2 of 2 images are not finite"):
        pipe(2, seeds(1, 2), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 3, "generator": seeds(1, 2)}, "2 generators for 3 images"),
        ({"num_inference_steps": 0}, "1 to 1000"),
        ({"num_inference_steps": 1001}, "1 to 1000"),
        ({"eta": 1.5}, r"eta is 1.5"),
        ({"output_type": "latent"}, "latent"),
    ],
)
def test_bad_arguments(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_eta_is_refused_where_it_means_nothing(pipe):
    pipe.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="DDPMScheduler does not take it"):
        pipe(eta=0.5)


# The model repository

LOADERS = {
    "remote code": """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
assert type(pipe).__name__ == "CustomUNetPipeline" and type(pipe.unet).__name__ == "CustomUNet2DModel"
assert "diffusers_modules" in type(pipe.unet).__module__
arguments = {"output_type": "np"}
""",
    "in this repository": """
sys.path.insert(0, REPOSITORY)
from pipelines import CustomUNetPipeline
pipe = CustomUNetPipeline.from_pretrained(FOLDER)
assert type(pipe.unet).__module__ == "custom_unet.custom_unet_2d"
arguments = {"output_type": "np"}
""",
    "stock classes": """
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
pipe = DDIMPipeline(
    UNet2DModel.from_pretrained(FOLDER, subfolder="unet"), DDIMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
)
arguments = {"output_type": "np"}
""",
}
GENERATE = """
import numpy, sys, torch
FOLDER, REPOSITORY, OUT = sys.argv[1:]
{load}
generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
numpy.save(OUT, pipe(batch_size=2, generator=generators, num_inference_steps=5, **arguments).images)
"""


@pytest.fixture(scope="module")
def model_repository(tmp_path_factory) -> tuple[Path, np.ndarray]:
    torch.manual_seed(1)
    pipe = CustomUNetPipeline(CustomUNet2DModel(**TINY), DDIMScheduler(prediction_type="v_prediction"))
    folder = export_pipeline(pipe, tmp_path_factory.mktemp("models") / "faces")
    return folder, pipe(2, seeds(3, 4), 5, output_type="np").images


@pytest.mark.parametrize("way", LOADERS)
def test_the_folder_loads_in_a_fresh_process_elsewhere(model_repository, way, tmp_path):
    folder, expected = model_repository
    code, out = GENERATE.format(load=LOADERS[way]), tmp_path / "images.npy"
    repository = str(Path(__file__).resolve().parent.parent)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(
        [sys.executable, "-c", code, str(folder), repository, str(out)], check=True, cwd=tmp_path, env=environment
    )
    np.testing.assert_allclose(np.load(out), expected, atol=1e-5)


def test_remote_code_needs_consent(model_repository, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(model_repository[0])


def test_what_the_folder_holds(model_repository):
    folder, _ = model_repository
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["custom_unet_pipeline", "CustomUNetPipeline"]
    assert index["unet"] == ["custom_unet_2d", "CustomUNet2DModel"]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "custom_unet_pipeline.py",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/custom_unet_2d.py",
        "unet/diffusion_pytorch_model.safetensors",
    }


def test_an_export_of_a_loaded_pipeline_does_not_tell_where_it_was_loaded_from(model_repository, tmp_path):
    folder = export_pipeline(CustomUNetPipeline.from_pretrained(model_repository[0]), tmp_path / "again")
    for path in folder.rglob("*.json"):
        assert str(model_repository[0].parent) not in path.read_text()


def test_exporting_again_replaces_the_folder_and_leaves_nothing_beside_it(pipe, tmp_path):
    export_pipeline(pipe, tmp_path / "faces")
    (tmp_path / "faces" / "stale").touch()
    export_pipeline(pipe, tmp_path / "faces")
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]
    assert not (tmp_path / "faces" / "stale").exists()
