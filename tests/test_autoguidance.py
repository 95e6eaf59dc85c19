"""Guidance by a worse model: what it makes of two distributions, what is written, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from exact_denoiser import ExactDenoiser, Mixture
from exact_gaussian import exact_network
from PIL import Image
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from eval.cost import SamplerSetting, sample
from eval.features import subset
from eval.swd import sliced_wasserstein, swd_floor
from experiments.autoguidance import autoguidance, main
from pipelines import CustomUNetPipeline
from pipelines.export import export_pipeline
from training.data import open_image_store
from training.sde import SDEScheduler

BETTER, WORSE = torch.tensor([[0.3, -0.1, 0.0]]).double(), torch.tensor([[0.1, 0.1, 0.05]]).double()
FLAGS = "--pipeline model --worse worse --reference synthetic-faces --split validation"
SMALL = "--num_images 6 --steps 3 --batch_size 4 --num_cpu_threads 1"


def gaussian(mean: torch.Tensor) -> Mixture:
    return Mixture(torch.ones(1).double(), mean, 0.01 * torch.eye(3).double()[None])


def test_two_gaussians_make_a_third_whose_mean_is_extrapolated():
    """Exact networks of N(a, C) and N(b, C) guide to N(b + w (a - b), C): the scores are linear in the mean."""
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    better, worse, expected = (
        exact_network(ExactDenoiser, gaussian(mean), scheduler)
        for mean in (BETTER, WORSE, WORSE + 2.5 * (BETTER - WORSE))
    )
    images = {}
    for name, network in {"guided": better, "expected": expected}.items():
        pipe = CustomUNetPipeline(network, DDIMScheduler.from_config(scheduler.config))
        pipe.set_progress_bar_config(disable=True)
        with autoguidance(better, worse, 2.5):
            images[name] = pipe(seeds=range(8), num_inference_steps=20, output_type="pt").images
    assert images["guided"].std() > 0.02
    torch.testing.assert_close(images["guided"], images["expected"])


def test_scale_one_and_the_end_of_guidance_leave_the_network_as_it_was():
    scheduler = DDPMScheduler(prediction_type="epsilon")
    better, worse = (exact_network(ExactDenoiser, gaussian(mean), scheduler) for mean in (BETTER, WORSE))
    x, t = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    alone, weak = better(x, t).sample, worse(x, t).sample
    with autoguidance(better, worse, 1.0):
        assert better(x, t).sample.equal(alone)
    with autoguidance(better, worse, 0.0):
        torch.testing.assert_close(better(x, t).sample, weak)
        assert not weak.equal(alone)
    assert better(x, t).sample.equal(alone)
    with pytest.raises(KeyboardInterrupt), autoguidance(better, worse, 3.0):
        raise KeyboardInterrupt
    assert better(x, t).sample.equal(alone)


def write_model(folder: Path, seed: int, scheduler=None, images_seen: int | None = None, **config) -> None:
    torch.manual_seed(seed)
    network = CustomUNet2DModel(**TINY | {"sample_size": 16} | config)
    pipe = CustomUNetPipeline(network, scheduler or DDIMScheduler(prediction_type="v_prediction"))
    export_pipeline(pipe, folder)
    if images_seen is not None:
        before = {"images_seen": 30, "train_seconds": 1.0}
        facts = {"data": {"crop": "none"}, "images_seen": images_seen, "train_seconds": 2.0, "pretrained": before}
        (folder / "training.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "model", 0, images_seen=1200)
    write_model(folder / "worse", 1, images_seen=None)
    write_model(folder / "epsilon", 1, DDIMScheduler())
    write_model(folder / "linear", 1, DDIMScheduler(prediction_type="v_prediction", beta_end=0.03))
    write_model(folder / "small", 1, sample_size=8)
    write_model(folder / "classes", 1, num_class_embeds=3, images_seen=1)
    write_model(folder / "edm", 1, SDEScheduler(objective="edm", prediction_type="edm"))
    return folder


@pytest.fixture(autouse=True)
def there(models, monkeypatch):
    """The command names the models as they are called."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(models / "cache"))


def test_images_of_each_scale_are_drawn_and_measured(models, tmp_path, capsys):
    assert main([*FLAGS.split(), *SMALL.split(), "--scales", "1", "2", "--seed", "4", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "autoguidance.json").read_text())
    store = open_image_store(dataset_name="synthetic-faces", split="validation", crop="none", resolution=16)
    real = np.asarray(store.images[subset(len(store), 12)])
    pipe, worse = (CustomUNetPipeline.from_pretrained(models / name) for name in ("model", "worse"))
    pipe.set_progress_bar_config(disable=True)
    seen = []
    for entry, scale in zip(record["results"], (1, 2), strict=True):
        with autoguidance(pipe.unet, worse.unet, scale):
            images, _, _ = sample(pipe, SamplerSetting("ddim", 3), range(4, 10), 4)
        levels = sliced_wasserstein(images, real[:6])
        assert entry["levels"] == pytest.approx({str(key): value for key, value in levels.items()}, rel=1e-4)
        assert entry["value"] == pytest.approx(np.mean([*levels.values()]), rel=1e-4)
        assert entry["floor"] == pytest.approx(np.mean([*swd_floor(real).values()]))
        assert (entry["guidance_scale"], entry["network_evaluations"]) == (scale, 3 * scale)
        assert (entry["n"], entry["seeds"], entry["steps"]) == (6, "4 to 9", 3)
        with Image.open(tmp_path / f"scale-{scale}.png") as sheet:
            assert sheet.size == (2 + 6 * 18, 2 + 18)  # six images of 16 pixels, lines of 2
            assert np.array_equal(np.asarray(sheet)[2:18, 20:36], images[1].transpose(1, 2, 0))
        seen.append(images)
    assert not np.array_equal(*seen)
    assert (record["pipeline"]["images_seen"], record["worse"]["images_seen"]) == (1230, None)
    assert str(tmp_path) not in json.dumps(record)
    lines = (tmp_path / "autoguidance.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [
        [f"| {scale}", f"{entry['value']:.4g}"] for scale, entry in zip((1, 2), record["results"], strict=True)
    ]
    assert "6 images of each scale, seeds 4 to 9, ddim, 3 steps" in lines[-1]
    with Image.open(tmp_path / "autoguidance.png") as figure:
        figure.load()
    assert capsys.readouterr().out.count("SWD") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--scales 1 1", "--scales are 1 1; give each once"),
        ("--scales -1", "--scales is -1.0; it must be at least 0"),
        ("--scales 1 --seed 4294967295", "the last seed is 4294967300"),
        ("--scales 1 --num_images 600", "two sets of 600 are compared; take fewer --num_images"),
        ("--scales 1 --worse nowhere", "--worse nowhere is no folder"),
        ("--scales 1 --worse epsilon", "--worse has prediction_type epsilon, --pipeline v_prediction"),
        ("--scales 1 --worse linear", "--worse has beta_end 0.03, --pipeline 0.02"),
        ("--scales 1 --worse small", "--worse has sample_size 8, --pipeline 16"),
        ("--scales 1 --worse classes", "--worse has num_class_embeds 3, --pipeline None"),
        ("--scales 1 --worse edm", "they must agree"),
        ("--scales 1 --pipeline classes", "--pipeline has continuous time or classes"),
        ("--scales 1 --pipeline edm", "--pipeline has continuous time or classes"),
        ("--scales 1 --pipeline worse", "does not tell what crop it was trained on"),
        ("--scales 1 --split nowhere", "has no split 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_drawn(flags, message, tmp_path, capsys):
    assert main([*FLAGS.split(), *SMALL.split(), *flags.split(), "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "images/s]" not in line]  # of a first decoding
    (error,) = filter(None, lines)
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()
