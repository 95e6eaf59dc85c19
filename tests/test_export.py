"""The model repository: loading it in every documented way, also outside this repository, and what is not loaded."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoModel, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.utils import dynamic_modules_utils
from tiny_network import TINY
from tiny_pipeline import SDES, sde_pipeline, tiny_pipeline
from tiny_training import error_line

from common import InputError
from custom_unet import CustomUNet2DModel
from pipelines import CustomUNetPipeline, custom_unet_pipeline, export
from pipelines.export import export_pipeline
from pipelines.hub import model_files
from pipelines.model_card import render_card
from training.sde import SDEScheduler


@pytest.fixture
def pipe() -> CustomUNetPipeline:
    return tiny_pipeline()


CALL = {"seeds": [3, 4], "num_inference_steps": 4, "output_type": "np"}
ELSEWHERE = """
import json, sys
from pathlib import Path
import numpy, torch
from diffusers import AutoModel, DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
models, call, out = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
images = {}
for folder in sorted(models.iterdir()):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe).__name__ == "CustomUNetPipeline" and type(pipe.unet).__name__ == "CustomUNet2DModel"
    auto = AutoModel.from_pretrained(str(folder), subfolder="unet", trust_remote_code=True)
    is_sde = folder.name != "ddim"
    for cls in (type(pipe), type(pipe.unet), type(auto)) + (type(pipe.scheduler),) * is_sde:
        assert cls.__module__.startswith("diffusers_modules.")
    more = {"class_labels": [0, 1], "guidance_scale": 2.0} if folder.name == "edm" else {}
    print("STOCK", file=sys.stderr, flush=True)
    stock = UNet2DModel.from_pretrained(folder, subfolder="unet")
    print("END", file=sys.stderr, flush=True)
    images[folder.name] = pipe(**call, **more).images
    pipe.save_pretrained(f"saved/{folder.name}")
    again = DiffusionPipeline.from_pretrained(f"saved/{folder.name}", trust_remote_code=True)
    images[f"{folder.name}, saved again"] = again(**call, **more).images
    images[f"{folder.name}, AutoModel"] = type(pipe)(auto, pipe.scheduler)(**call, **more).images
    images[f"{folder.name}, stock weights"] = type(pipe)(stock, pipe.scheduler)(**call, **more).images
    if is_sde:
        pipe.set_sampler("predictor_corrector", snr=0.1)
        images[f"{folder.name}, predictor_corrector"] = pipe(**call, **more).images
    else:
        pipe = DDIMPipeline(stock, DDIMScheduler.from_pretrained(folder, subfolder="scheduler"))
        generator = [torch.Generator().manual_seed(seed) for seed in call.pop("seeds")]
        images["ddim, stock pipeline"] = pipe(batch_size=2, generator=generator, **call).images
        call["seeds"] = [3, 4]
assert not {"custom_unet", "pipelines", "training"} & sys.modules.keys()
numpy.savez(out, **images)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of model repositories."""
    models = tmp_path_factory.mktemp("exported") / "models"
    export_pipeline(tiny_pipeline(DDIMScheduler(prediction_type="v_prediction")), models / "ddim")
    for objective in SDES:
        network = {"num_class_embeds": 3} if objective == "edm" else {}
        export_pipeline(sde_pipeline(objective, **network), models / objective)
    return models


@pytest.fixture
def model(models) -> Path:
    return models / "ddim"


def draw(pipe: CustomUNetPipeline) -> np.ndarray:
    has_classes = pipe.unet.config.num_class_embeds is not None
    more = {"class_labels": [0, 1], "guidance_scale": 2.0} if has_classes else {}
    return pipe(**CALL, **more).images


def test_exported_models_load_in_a_fresh_process_elsewhere(models, tmp_path):
    """With their own code, with AutoModel and with only diffusers' classes, without warnings: the images are equal."""
    out = tmp_path / "images.npz"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-W", "error::FutureWarning", "-c", ELSEWHERE, str(models), json.dumps(CALL), str(out)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = np.load(out)
    assert len(images) == 5 * (1 + len(SDES))
    for name in images:
        objective, _, way = name.partition(", ")
        pipe = CustomUNetPipeline.from_pretrained(models / objective)
        if way == "predictor_corrector":
            pipe.set_sampler("predictor_corrector", snr=0.1)
        expected = draw(pipe)
        assert expected.std() > 0.05
        np.testing.assert_allclose(images[name], expected, atol=1e-4 if way == "predictor_corrector" else 1e-5)
    complaints = [part.split("END")[0].strip() for part in done.stderr.split("STOCK")[1:]]
    assert complaints == [""] * (1 + len(SDES))


# Rejected: code without consent


def test_remote_code_needs_consent(models, tmp_path, monkeypatch):
    """Also if the index names diffusers' own pipeline and only the scheduler's code is in the repository."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(models / "vp", tmp_path / "faces")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for source in (models / "ddim", models / "vp", folder):
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(source)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(models / "ddim", subfolder="unet")
    assert not (tmp_path / "modules").exists()


# Contents of the folder


def test_folder_has_the_expected_files_and_copies_of_this_repositorys_code(models):
    code = {
        "custom_unet_pipeline.py": custom_unet_pipeline.CustomUNetPipeline,
        "unet/custom_unet_2d.py": CustomUNet2DModel,
        "scheduler/sde.py": SDEScheduler,
    }
    rest = {"README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    rest |= {"unet/diffusion_pytorch_model.safetensors"}
    for folder, names in {models / "ve": {*code}, models / "ddim": {*code} - {"scheduler/sde.py"}}.items():
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert files == rest | names
        assert model_files(folder) == sorted(files)
        for name in names:
            assert (folder / name).read_text() == Path(inspect.getfile(code[name])).read_text()


def test_reexport_replaces_the_folder_but_keeps_edits_of_the_card(pipe, tmp_path):
    folder = export_pipeline(pipe, tmp_path / "faces")
    (folder / "stale").touch()
    thanks = "## Thanks\n\nÀ tous.\n\n## Results".encode("latin-1")  # in any encoding
    card = (folder / "README.md").read_bytes()
    (folder / "README.md").write_bytes(card.replace(b"## Results", thanks))
    wider = tiny_pipeline(block_out_channels=(8, 32))
    export_pipeline(wider, folder)
    assert export.main(["card", "--pipeline", str(folder)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["faces"], "nothing is left beside it"
    assert not (folder / "stale").exists()
    content = (folder / "README.md").read_bytes()
    assert content.count(thanks) == 1
    for pipeline, number in ((pipe, 0), (wider, 1)):
        assert content.count(f"U-Net of {pipeline.unet.num_parameters():,} parameters".encode()) == number


def test_folder_that_is_not_a_model_repository_is_not_replaced(pipe, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").touch()
    with pytest.raises(InputError, match="not a model repository"):
        export_pipeline(pipe, tmp_path / "photos")
    assert (tmp_path / "photos" / "me.png").exists()


def test_compiled_network_is_exported_uncompiled_and_without_its_path(pipe, tmp_path):
    plain = export_pipeline(pipe, tmp_path / "plain")
    pipe = CustomUNetPipeline.from_pretrained(plain)  # which knows its path
    pipe.unet = torch.compile(pipe.unet)  # nothing is compiled before the first call
    compiled = export_pipeline(pipe, tmp_path / "compiled")
    for path in [path for path in plain.rglob("*") if path.is_file() and path.name != "README.md"]:
        assert (compiled / path.relative_to(plain)).read_bytes() == path.read_bytes()


def test_diffusers_network_is_exported_without_code(pipe, tmp_path):
    stock = CustomUNetPipeline(UNet2DModel(**TINY), DDIMScheduler())
    stock.unet.load_state_dict(pipe.unet.state_dict())
    folder = export_pipeline(stock, tmp_path / "faces")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert "auto_map" not in index
    assert not list((folder / "unet").glob("*.py"))
    loaded = CustomUNetPipeline.from_pretrained(folder)
    np.testing.assert_allclose(draw(loaded), draw(pipe), atol=1e-5)


@torch.no_grad()
def test_diffusers_flow_matching_matches_flow_euler(models):
    """With the scheduler loaded from the same folder; both networks receive the same inputs at every step."""
    folder, num_steps = models / "flow", 20
    pipe, received = CustomUNetPipeline.from_pretrained(folder), []
    stock = UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    for network in (pipe.unet, stock):
        network.register_forward_pre_hook(lambda module, inputs: received.append(inputs))
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.set_sampler("flow_euler")
    images = pipe(latents=latents, num_inference_steps=num_steps, output_type="pt").images
    scheduler.set_timesteps(num_steps)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(stock(latents, timestep).sample, timestep, latents).prev_sample
    assert len(received) == 2 * num_steps
    for ours, theirs in zip(received[:num_steps], received[num_steps:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(images, (latents / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    assert images.std() > 0.05


def test_half_precision_variant_loads_beside_the_full_weights(models, tmp_path):
    """As in docs/hub.md; the folder can still be pushed, and its card describes the full weights."""
    folder = shutil.copytree(models / "edm", tmp_path / "faces")
    expected = draw(CustomUNetPipeline.from_pretrained(folder))
    half = CustomUNetPipeline.from_pretrained(folder, dtype=torch.float16)
    half.save_pretrained(folder, variant="fp16")
    assert (folder / "unet" / "config.json").read_text() == (models / "edm" / "unet" / "config.json").read_text()
    np.testing.assert_array_equal(draw(CustomUNetPipeline.from_pretrained(folder)), expected)
    loaded = CustomUNetPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float16)
    np.testing.assert_allclose(draw(loaded), expected, atol=0.05)
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in model_files(folder)
    assert render_card(folder, "edm") == (models / "edm" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("card --pipeline nowhere", "nowhere is not a model repository"),
        ("push --pipeline x", "--repo_id"),
        ("push --pipeline x --repo_id y --token hf_secret", "the Hub's token is read from HF_TOKEN"),
        ("push --pipeline x --repo_id y hf_secret", "the Hub's token is read from HF_TOKEN"),
    ],
)
def test_bad_input_exits_with_code_2_and_one_line(flags, message, capsys):
    assert export.main(flags.split()) == 2
    error = error_line(capsys.readouterr().err)
    assert message in error
    assert "hf_secret" not in error
