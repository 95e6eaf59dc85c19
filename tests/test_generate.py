"""Image folders: reproducible, resumable, protected from other settings, and with a record to redraw them."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
from diffusers import DDIMScheduler
from filelock import FileLock
from PIL import Image
from tiny_pipeline import tiny_pipeline
from tiny_training import REPOSITORY, torchrun

from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.export import export_pipeline
from pipelines.generate import SAMPLER_SETTINGS, main
from pipelines.image_folder import image_path, missing_seeds
from pipelines.loading import load_pipeline
from training.sde import CONTINUOUS_SAMPLERS, SDEScheduler

SDE = SDEScheduler(objective="edm", prediction_type="edm")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def export_tiny(folder: Path, scheduler, seed: int, **arguments) -> Path:
    return export_pipeline(tiny_pipeline(scheduler, seed, **arguments), folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("model") / "tiny", DDIMScheduler(), seed=0)


@pytest.fixture(scope="module")
def sde_model(tmp_path_factory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("model") / "tiny-sde", SDE, seed=3, num_class_embeds=4)


@pytest.fixture
def generate(model, tmp_path, capfd):
    """Runs the command in this process; returns exit code, standard output and the last line of standard error."""

    def run(*arguments, out=tmp_path / "out", pipeline=model, images=4, steps=3):
        fixed = ["--pipeline", pipeline, "--out", out, "--num_images", images, "--steps", steps]
        fixed += ["--num_cpu_threads", 1]
        capfd.readouterr()
        code = main([str(argument) for argument in [*fixed, *arguments]])
        captured = capfd.readouterr()
        return code, captured.out, (captured.err.strip().splitlines() or [""])[-1]

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def identities(paths) -> dict:
    """Inode and modification time of each file, which change when it is rewritten."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def record(folder: Path) -> dict:
    return json.loads((folder / "generate.json").read_text())


# ---- The images


def test_damaged_files_count_as_missing(tmp_path):
    for seed in range(3):
        Image.effect_noise((8, 8), 50).save(image_path(tmp_path, seed))
    whole = image_path(tmp_path, 1).read_bytes()
    assert missing_seeds(tmp_path, range(4)) == [3]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    # the last four bytes are the checksum of an empty chunk
    for damaged in (*(whole[:length] for length in range(len(whole) - 4)), bytes(flipped)):
        image_path(tmp_path, 1).write_bytes(damaged)
        assert missing_seeds(tmp_path, range(4)) == [1, 3]


# ---- The command, in this process


def test_every_sampler_setting_has_a_flag():
    assert {*SAMPLER_SETTINGS} == {name for names in CONTINUOUS_SAMPLERS.values() for name in names}
    assert not {*SAMPLERS} & {*CONTINUOUS_SAMPLERS}


def redraw_from_record(folder: Path, model: Path, seeds) -> tuple[list[np.ndarray], float]:
    """Images drawn one by one from only the record and the model, and the network evaluations per image."""
    settings = json.loads(json.dumps(record(folder)["settings"], allow_nan=False))
    pipeline = load_pipeline(model, settings["dtype"], None)
    sampler, scheduler, labels = settings.get("continuous_sampler"), settings["scheduler"], settings["class_label"]
    if sampler is None:
        pipeline.scheduler = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    else:
        pipeline.set_sampler(**sampler)
    results = [
        pipeline(
            seeds=[seed],
            num_inference_steps=settings["num_inference_steps"] or 50,
            eta=settings["eta"],
            class_labels=labels[seed % len(labels)] if isinstance(labels, list) else labels,
            guidance_scale=settings.get("guidance_scale", 1.0),
        )
        for seed in seeds
    ]
    evaluations = sum(result.network_evaluations for result in results) / len(results)
    return [np.asarray(result.images[0]).astype(int) for result in results], evaluations


CLASSES = ["--class_label", "2", "0", "1", "--guidance_scale", "1.5"]  # guidance evaluates the network twice


@pytest.mark.parametrize(
    ("flags", "evaluations"),
    [
        (["--scheduler", "ddim", "--eta", "0.5", "--dtype", "bf16"], 5),
        (["--scheduler", "edm_heun"], 9),  # a DDPM model in continuous time
        (["--scheduler", "edm_heun", "--churn", "20", *CLASSES], 18),
        (["--scheduler", "predictor_corrector", "--snr", "0.2", "--corrector_steps", "2", *CLASSES], 28),
        (["--scheduler", "ode", "--tolerance", "0.5", *CLASSES], None),
    ],
)
def test_record_suffices_to_reproduce_the_images(generate, model, sde_model, tmp_path, flags, evaluations):
    out, is_sde, batch_size = tmp_path / "out", "--class_label" in flags, 1 if {"ode", "bf16"} & {*flags} else 3
    source, seeds = sde_model if is_sde else model, range(7, 11)
    code, printed, error = generate(*flags, "--seed", 7, "--batch_size", batch_size, pipeline=source, steps=5)
    assert code == 0, error
    assert "4 images generated" in printed
    again, evaluations_again = redraw_from_record(out, source, seeds)
    for seed, image in zip(seeds, again, strict=True):
        assert np.abs(pixels(image_path(out, seed)) - image).max() <= 1
    made = record(out)
    (start,) = made["starts"]
    assert start["network_evaluations_per_image"] == round(evaluations_again, 3)
    assert evaluations is None or start["network_evaluations_per_image"] == evaluations
    assert made["settings"]["num_inference_steps"] == (None if "ode" in flags else 5)
    assert made["pipeline"] == source.name
    assert (start["first_seed"], start["num_images"], start["generated"]) == (7, 4, 4)
    assert start["command"].startswith(f"python -m pipelines.generate --pipeline {source.name} --out out --num_images")
    assert str(tmp_path.parent) not in json.dumps(made)


def test_folder_can_be_extended_with_more_images(generate, tmp_path):
    assert generate(images=2)[0] == 0
    sheet = pixels(tmp_path / "out" / "contact_sheet.png")
    assert sheet.shape == (24 * 12, 24 * 22, 3)  # images of 8x8 pixels are enlarged 24 times
    np.testing.assert_array_equal(sheet, sheet[::24, ::24].repeat(24, 0).repeat(24, 1))
    assert "2 images generated" in generate(images=4)[1]
    assert "0 images generated" in generate("--batch_size", 1, "--scheduler", "ddim", images=3)[1]  # the model's own
    made = record(tmp_path / "out")
    assert [(start["num_images"], start["generated"]) for start in made["starts"]] == [(2, 2), (4, 2)]
    sheet = pixels(tmp_path / "out" / "contact_sheet.png")[::24, ::24]
    assert sheet.shape == (22, 22, 3)
    np.testing.assert_array_equal(sheet[12:20, 2:10], pixels(tmp_path / "out" / "seed-0000002.png"))


def test_changed_settings_are_rejected(generate, sde_model, tmp_path):
    flags = {"--scheduler": ["edm_heun"], "--churn": [3.0], "--class_label": [0, 1], "--guidance_scale": [2.0]}

    def again(steps=3, pipeline=sde_model, **changed) -> tuple[int, str]:
        chosen = flags | {f"--{name}": values for name, values in changed.items()}
        words = [word for name, values in chosen.items() if values for word in (name, *values)]
        code, _, error = generate(*words, pipeline=pipeline, steps=steps)
        return code, error

    assert again()[0] == again(churn=[3])[0] == 0
    before = identities((tmp_path / "out").iterdir())
    other = export_tiny(tmp_path / "other", SDE, seed=2, num_class_embeds=4)
    for difference, changed in {
        "continuous_sampler churn: 3.0 -> 4.0": {"churn": [4.0]},
        "class_label: [0, 1] -> [1, 0]": {"class_label": [1, 0]},
        "continuous_sampler name: 'edm_heun' -> 'ode'": {"scheduler": ["ode"], "churn": []},
        "num_inference_steps: 3 -> 4": {"steps": 4},
        "dtype: 'fp32' -> 'bf16'": {"dtype": ["bf16"]},
        "weights_sha256 diffusion_pytorch_model.safetensors: ": {"pipeline": other},
    }.items():
        code, error = again(**changed)
        assert code == 2
        assert difference in error
    assert identities((tmp_path / "out").iterdir()) == before


def test_foreign_images_are_rejected(generate, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "holiday.PNG").touch()
    code, _, error = generate()
    assert code == 2
    assert "holds 1 PNG files, such as holiday.PNG, but no generate.json" in error
    (out / "holiday.PNG").unlink()
    assert generate()[0] == 0
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheduler", "ddim"], "there is no sampler 'ddim'; the network was trained in continuous time"),
        (["--scheduler", "ode", "--tolerance", "0"], "tolerance is 0.0; it must be"),
        (["--eta", "0.5"], "eta is 0.5"),
        (["--class_label", "0", "4"], "class_labels are [0, 4]; they must be 0 to 3"),
        (["DDPM", "--scheduler", "magic"], "'magic' (choose from"),
        (["DDPM", "--churn", "2"], "--churn is for continuous-time samplers; choose one with --scheduler"),
        (["DDPM", "--num_images", "0"], "--num_images is 0; it must be at least 1"),
        (["DDPM", "--batch_size", "-3"], "--batch_size is -3"),
        (["DDPM", "--seed", "-1"], "--seed is -1"),
        (["DDPM", "--eta", "nan"], "--eta is nan"),
        (["DDPM", "--num_cpu_threads", "1000000000"], "--num_cpu_threads is 1000000000"),
        (["DDPM", "--seed", "4294967293"], "the last seed is 4294967296; it must be below 2**32"),
        (["DDPM", "--class_label", "1"], "the network has no class embeddings"),
        (["DDPM", "--pipeline", "nobody/nothing"], "nobody/nothing is not a local folder and could not be downloaded"),
        (["DDPM", "--pipeline", str(REPOSITORY / "tests")], "tests is not a model repository"),
        (["DDPM", "--revision", "main"], "--revision main is for the Hub"),
        (["DDPM", "--out", str(REPOSITORY / "README.md")], "README.md is not a folder"),
    ],
)
def test_bad_input_exits_with_code_2_and_one_line(
    generate, model, sde_model, tmp_path, monkeypatch, arguments, message
):
    """For an SDE model with classes, or a DDPM model without."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if arguments[0] == "DDPM":
        code, out, error = generate(*arguments[1:], pipeline=model)
    else:
        label = [] if "--class_label" in arguments else ["--class_label", 0]
        code, out, error = generate(*label, *arguments, pipeline=sde_model)
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert not out
    assert not (tmp_path / "out").exists()


def test_folder_that_is_in_use_exits_with_code_1(generate, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        code, _, error = generate()
    assert code == 1
    assert "is being written by another process" in error


@pytest.mark.parametrize("is_flat", [False, True])
def test_hub_repository_is_recorded_with_its_commit(generate, model, tmp_path, monkeypatch, is_flat):
    """Loaded offline from the client's cache; the repository has our layout or is flat like google/ddpm-*."""
    assert generate(out=tmp_path / "expected")[0] == 0
    if is_flat:
        for part in CustomUNetPipeline.from_pretrained(model).components.values():
            part.save_pretrained(tmp_path / "flat")
        model = tmp_path / "flat"
    cached = tmp_path / "cache" / "models--me--faces"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / COMMIT).symlink_to(model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, error = generate(pipeline="me/faces")
    assert code == 0, error
    made = record(tmp_path / "out")
    assert (made["pipeline"], made["revision"]) == ("me/faces", COMMIT)
    for image in (tmp_path / "expected").glob("seed-*.png"):
        assert (tmp_path / "out" / image.name).read_bytes() == image.read_bytes()


# ---- Interrupted and finished by several processes


INTERRUPTED = """
import os, signal, sys
from pipelines import CustomUNetPipeline, generate

signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it in its workers
draw, drawn = CustomUNetPipeline.__call__, []

def draw_until_interrupted(*arguments, **keywords):
    drawn.append(keywords["seeds"])
    if len(drawn) == 4:
        os.kill(os.getpid(), int(sys.argv[1]))
    return draw(*arguments, **keywords)

CustomUNetPipeline.__call__ = draw_until_interrupted
sys.exit(generate.main(sys.argv[2:]))
"""


def test_two_processes_finish_an_interrupted_and_killed_run(generate, model, tmp_path):
    """The signals arrive while the fourth image is being drawn."""
    out, seeds = tmp_path / "killed", range(20, 32)
    sampling = ["--seed", "20", "--scheduler", "ddpm"]
    fixed = ["--pipeline", model, "--num_images", len(seeds), "--steps", 20, "--out", out, "--num_cpu_threads", 1]
    flags = [*map(str, fixed), *sampling, "--batch_size", "1"]
    for number, code, kept in ((signal.SIGINT, 130, 3), (signal.SIGKILL, -signal.SIGKILL, 6)):
        command = [sys.executable, "-c", INTERRUPTED, str(int(number)), *flags]
        stopped = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert stopped.returncode == code, stopped.stderr
        assert missing_seeds(out, seeds) == [*seeds[kept:]]
        message = "stopped; the images so far are kept; run the same command to continue\n"
        assert stopped.stderr.endswith(message) == (number == signal.SIGINT)
    before = identities(image_path(out, seed) for seed in seeds[:6])

    assert "6 images generated" in torchrun("pipelines.generate", *flags)
    assert identities(before) == before
    starts = record(out)["starts"]
    assert [start["num_processes"] for start in starts] == [1, 1, 2]
    assert ["generated" in start for start in starts] == [False, False, True]
    assert starts[2]["network_evaluations_per_image"] == 20

    whole = tmp_path / "whole"
    assert generate(*sampling, "--batch_size", 5, out=whole, images=len(seeds), steps=20)[0] == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.glob("*.png"):
        assert np.abs(pixels(out / path.name) - pixels(path)).max() <= 1
    assert record(out)["settings"] == record(whole)["settings"]
