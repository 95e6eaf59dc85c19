"""Folders of images: the same whatever makes them, resumed, refused, and described well enough to make them again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from filelock import FileLock
from PIL import Image
from tiny_network import TINY

from common import InputError
from custom_unet import CustomUNet2DModel
from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.export import export_pipeline
from pipelines.generate import (
    DTYPES,
    SAMPLER_SETTINGS,
    generate_images,
    image_path,
    image_paths,
    load_pipeline,
    main,
    missing_seeds,
)
from training.sde import CONTINUOUS_SAMPLERS, SDEScheduler

REPOSITORY = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def export_tiny(folder: Path, seed: int, **arguments) -> Path:
    torch.manual_seed(seed)
    return export_pipeline(CustomUNetPipeline(CustomUNet2DModel(**TINY, **arguments), DDIMScheduler()), folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("model") / "tiny", seed=0)


@pytest.fixture(scope="module")
def model_with_classes(tmp_path_factory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("model") / "tiny-classes", seed=1, num_class_embeds=3)


@pytest.fixture(scope="module")
def model_of_an_sde(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    network = CustomUNet2DModel(**TINY, num_class_embeds=4)
    pipeline = CustomUNetPipeline(network, SDEScheduler(objective="edm", prediction_type="edm"))
    return export_pipeline(pipeline, tmp_path_factory.mktemp("model") / "tiny-sde")


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


def assert_same_images(folder: Path, other: Path, seeds) -> None:
    for one, two in zip(image_paths(folder, seeds), image_paths(other, seeds), strict=True):
        assert np.abs(pixels(one) - pixels(two)).max() <= 1, one.name


def identities(paths) -> dict:
    """Changes when a file is written again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def record(folder: Path) -> dict:
    return json.loads((folder / "generate.json").read_text())


# ---- The library


@pytest.mark.parametrize(
    "sampler", ["ddpm", "dpmsolver++2m", "euler_maruyama", "reverse_diffusion", "predictor_corrector", "edm_heun"]
)
def test_an_image_depends_on_neither_batch_size_nor_order(model, tmp_path, sampler):
    pipeline = load_pipeline(model, "fp32", sampler, **({"churn": 5.0} if sampler == "edm_heun" else {}))
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder, seeds, batch_size in ((together, range(5), 4), (alone, [3, 0, 4, 2, 1], 1)):
        folder.mkdir()
        generated = generate_images(pipeline, folder, seeds, batch_size=batch_size, num_inference_steps=6)
        assert generated.num_images == 5
    assert_same_images(together, alone, range(5))
    assert np.abs(pixels(image_path(together, 0)) - pixels(image_path(together, 1))).max() > 10


def test_what_is_there_is_kept_and_what_is_damaged_is_not_taken_for_an_image(model, tmp_path):
    pipeline = load_pipeline(model, "fp32", None)
    arguments = {"batch_size": 4, "num_inference_steps": 2}
    assert generate_images(pipeline, tmp_path, range(3), **arguments).num_images == 3
    whole = image_path(tmp_path, 1).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    # the last four bytes are the checksum of an empty chunk
    for damaged in (*(whole[:length] for length in range(len(whole) - 4)), bytes(flipped)):
        image_path(tmp_path, 1).write_bytes(damaged)
        assert missing_seeds(tmp_path, range(4)) == [1, 3]
    with pytest.raises(FileNotFoundError, match=r"lacks 2 of 4 images, the first being seed-0000001\.png"):
        image_paths(tmp_path, range(4))
    kept = identities([image_path(tmp_path, 0)])
    assert generate_images(pipeline, tmp_path, range(4), **arguments).num_images == 2
    assert identities([image_path(tmp_path, 0)]) == kept
    assert image_path(tmp_path, 1).read_bytes() == whole
    assert [path.name for path in image_paths(tmp_path, [3, 0])] == ["seed-0000003.png", "seed-0000000.png"]


def test_every_setting_of_a_sampler_is_a_flag():
    assert {*SAMPLER_SETTINGS} == {name for names in CONTINUOUS_SAMPLERS.values() for name in names}
    assert not {*SAMPLERS} & {*CONTINUOUS_SAMPLERS}


def test_a_setting_needs_a_sampler_that_has_it(model, model_of_an_sde):
    assert load_pipeline(model_of_an_sde, "fp32", None, churn=2.0).continuous_sampler.settings["churn"] == 2.0
    assert load_pipeline(model_of_an_sde, "fp32", None).continuous_sampler.name == "edm_heun"
    with pytest.raises(InputError, match="--churn is for a sampler in continuous time; name one with --scheduler"):
        load_pipeline(model, "fp32", None, churn=2.0)


# ---- The command, in this process


def test_the_record_suffices_to_make_the_images_again(generate, model, tmp_path):
    arguments = ("--scheduler", "ddim", "--eta", "0.5", "--seed", 7, "--dtype", "bf16", "--batch_size", 3)
    code, out, error = generate(*arguments)
    assert code == 0, error
    assert "4 images generated" in out
    made = record(tmp_path / "out")
    settings, (start,) = made["settings"], made["starts"]
    pipeline = CustomUNetPipeline.from_pretrained(model, torch_dtype=DTYPES[settings["dtype"]])
    pipeline.scheduler = getattr(diffusers, settings["scheduler"]["_class_name"]).from_config(settings["scheduler"])
    (image,) = pipeline(
        seeds=[start["first_seed"] + 3],
        num_inference_steps=settings["num_inference_steps"],
        eta=settings["eta"],
        class_labels=settings["class_label"],
    ).images
    assert np.abs(np.asarray(image).astype(int) - pixels(tmp_path / "out" / "seed-0000010.png")).max() <= 1
    assert made["pipeline"] == "tiny"
    assert settings["image_size"] == [8, 8]
    assert len(settings["weights_sha256"]["diffusion_pytorch_model.safetensors"]) == 64
    assert start["versions"]["torch"] == torch.__version__
    assert (start["num_images"], start["generated"]) == (4, 4)
    assert start["images_per_second"] > 0
    assert start["command"].startswith("python -m pipelines.generate --pipeline tiny --out out --num_images 4")
    assert str(tmp_path.parent) not in json.dumps(made)


@pytest.mark.parametrize(
    ("sampler", "flags", "evaluations"),
    [
        ("edm_heun", ["--churn", "20", "--churn_min", "0.1", "--noise_factor", "1.01"], 9),
        ("predictor_corrector", ["--snr", "0.2", "--corrector_steps", "2"], 14),
        ("euler_maruyama", [], 6),
        ("reverse_diffusion", [], 6),
        ("ode", ["--tolerance", "0.05", "--batch_size", "1"], None),
    ],
)
def test_the_record_of_a_sampler_in_continuous_time_suffices(
    generate, model_of_an_sde, tmp_path, sampler, flags, evaluations
):
    """With several labels, which the seeds take in turn, and guidance, which evaluates the network twice."""
    flags = ["--scheduler", sampler, *flags, "--class_label", 2, 0, 1, "--guidance_scale", 1.5, "--seed", 4]
    code, _, error = generate(*flags, pipeline=model_of_an_sde, steps=5, images=3)
    assert code == 0, error
    made = record(tmp_path / "out")
    settings = json.loads(json.dumps(made["settings"], allow_nan=False))
    pipeline = CustomUNetPipeline.from_pretrained(model_of_an_sde)
    pipeline.set_sampler(**{key: value for key, value in settings["continuous_sampler"].items() if value is not None})
    assert pipeline.continuous_sampler.name == sampler
    assert settings["class_label"] == [2, 0, 1]
    taken = []
    for seed in (4, 5, 6):
        result = pipeline(
            seeds=[seed],
            num_inference_steps=settings["num_inference_steps"] or 50,
            class_labels=settings["class_label"][seed % 3],
            guidance_scale=settings["guidance_scale"],
        )
        taken.append(result.network_evaluations)
        image = pixels(tmp_path / "out" / f"seed-000000{seed}.png")
        assert np.abs(np.asarray(result.images[0]).astype(int) - image).max() <= 1
    assert made["starts"][0]["network_evaluations_per_image"] == round(sum(taken) / 3, 3)
    assert evaluations is None or taken == [2 * evaluations] * 3
    assert settings["num_inference_steps"] == (None if sampler == "ode" else 5)


def test_a_ddpm_model_is_sampled_in_continuous_time(generate, tmp_path):
    assert generate("--scheduler", "edm_heun", steps=5)[0] == 0
    assert record(tmp_path / "out")["settings"]["scheduler"]["_class_name"] == "DDIMScheduler"
    assert record(tmp_path / "out")["starts"][0]["network_evaluations_per_image"] == 9
    assert generate(out=tmp_path / "ddim", steps=5)[0] == 0
    assert record(tmp_path / "ddim")["starts"][0]["network_evaluations_per_image"] == 5
    difference = pixels(image_path(tmp_path / "out", 0)) - pixels(image_path(tmp_path / "ddim", 0))
    assert np.abs(difference).max() > 1, "another solver"


def test_other_settings_of_a_sampler_and_other_labels_are_refused(generate, model_of_an_sde, tmp_path):
    flags = {"--scheduler": ["edm_heun"], "--churn": [3.0], "--class_label": [0, 1], "--guidance_scale": [2.0]}

    def again(**arguments) -> tuple[int, str]:
        changed = flags | {f"--{name}": values for name, values in arguments.items()}
        words = [word for name, values in changed.items() for word in (name, *values)]
        code, _, error = generate(*words, pipeline=model_of_an_sde)
        return code, error

    assert again()[0] == 0
    before = identities((tmp_path / "out").glob("seed-*.png"))
    for difference, arguments in {
        "continuous_sampler churn is 3.0 there and 4.0 now": {"churn": [4.0]},
        "continuous_sampler churn_max is None there and 9.0 now": {"churn_max": [9.0]},
        "class_label is [0, 1] there and [1, 0] now": {"class_label": [1, 0]},
        "class_label is [0, 1] there and 0 now": {"class_label": [0]},
        "guidance_scale is 2.0 there and 1.0 now": {"guidance_scale": [1.0]},
        "continuous_sampler name is edm_heun there and ode now": {"scheduler": ["ode"], "churn": []},
    }.items():
        if arguments.get("churn") == []:
            del flags["--churn"]
            arguments = {"scheduler": ["ode"]}
        code, error = again(**arguments)
        assert code == 2
        assert difference in error
    assert identities((tmp_path / "out").glob("seed-*.png")) == before


def test_a_folder_can_be_extended(generate, tmp_path):
    assert generate(images=2)[0] == 0
    assert pixels(tmp_path / "out" / "contact_sheet.png").shape == (12, 22, 3)
    assert "2 images generated" in generate(images=4)[1]
    assert "0 images generated" in generate("--batch_size", 1, images=3)[1]
    made = record(tmp_path / "out")
    assert [(start["num_images"], start["generated"]) for start in made["starts"]] == [(2, 2), (4, 2)]
    sheet = pixels(tmp_path / "out" / "contact_sheet.png")
    assert sheet.shape == (22, 22, 3)
    np.testing.assert_array_equal(sheet[12:20, 2:10], pixels(tmp_path / "out" / "seed-0000002.png"))


def test_other_settings_are_refused(generate, model_with_classes, tmp_path):
    assert generate("--class_label", 2, pipeline=model_with_classes)[0] == 0
    before = identities((tmp_path / "out").iterdir())
    other_weights = export_tiny(tmp_path / "other", seed=2, num_class_embeds=3)
    for difference, arguments in {
        "class_label is 2 there and 1 now": {"flags": ("--class_label", 1)},
        "num_inference_steps is 3 there and 4 now": {"steps": 4},
        "eta is 0.0 there and 0.5 now": {"flags": ("--class_label", 2, "--eta", 0.5)},
        "dtype is fp32 there and bf16 now": {"flags": ("--class_label", 2, "--dtype", "bf16")},
        "_class_name is DDIMScheduler there and DDPMScheduler now": {
            "flags": ("--class_label", 2, "--scheduler", "ddpm")
        },
        "weights_sha256 diffusion_pytorch_model.safetensors is": {"pipeline": other_weights},
    }.items():
        arguments = {"pipeline": model_with_classes} | arguments
        flags = arguments.pop("flags", ("--class_label", 2))
        code, _, error = generate(*flags, **arguments)
        assert code == 2
        assert difference in error
    assert identities((tmp_path / "out").iterdir()) == before
    # the repository's own sampler by its name is no other setting
    assert generate("--class_label", 2, "--scheduler", "ddim", pipeline=model_with_classes)[0] == 0


def test_folders_of_others(generate, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "holiday.PNG").touch()
    code, _, error = generate()
    assert code == 2
    assert "holds 1 PNG files, holiday.PNG for one, but no generate.json" in error
    (out / "holiday.PNG").unlink()
    assert generate()[0] == 0
    (out / "generate.json").write_text('{"settings"')
    code, _, error = generate()
    assert code == 2
    assert "generate.json is damaged" in error
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheduler", "ddim"], "there is no sampler 'ddim'; the network was trained in continuous time"),
        (["--snr", "0.1"], "edm_heun has no setting 'snr'; it has churn"),
        (["--scheduler", "ode", "--churn", "1"], "ode has no setting 'churn'; it has tolerance"),
        (["--scheduler", "ode", "--tolerance", "0"], "tolerance is 0.0; it must be positive"),
        (["--churn", "nan"], "churn is nan; it must"),
        (["--churn_min", "3", "--churn_max", "2"], "churn_min 3.0 and churn_max 2.0 must rise"),
        (["--scheduler", "predictor_corrector", "--corrector_steps", "0"], "corrector_steps is 0; it must be 1"),
        (["--corrector_steps", "1.5"], "argument --corrector_steps: invalid int value"),
        (["--eta", "0.5"], "eta is 0.5, but edm_heun does not take it"),
        (["--steps", "1"], "num_inference_steps is 1; it must be 2 to"),
        (["--steps", "1000000000000"], "num_inference_steps is 1000000000000; it must be 2 to"),
        (["--class_label", "0", "4"], "class_labels are [0, 4]; they must be 0 to 3"),
        (["--class_label", "0.5"], "argument --class_label: invalid int value"),
        (["--guidance_scale", "inf"], "guidance_scale is inf; it must be finite"),
    ],
)
def test_bad_input_for_a_model_of_an_sde_is_one_line_and_exit_code_2(
    generate, model_of_an_sde, tmp_path, arguments, message
):
    label = [] if "--class_label" in arguments else ["--class_label", 0]
    code, out, error = generate(*label, *arguments, pipeline=model_of_an_sde)
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert not out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheduler", "magic"], "'magic' (choose from"),
        (["--scheduler", "ddim", "--snr", "0.1"], "ddim has no setting 'snr'; it has none"),
        (["--guidance_scale", "2"], "guidance_scale is 2.0, but there are no class_labels"),
        (["--num_images", "0"], "--num_images is 0; it must be at least 1"),
        (["--seed", "4294967293"], "the last seed is 4294967296; it must be below 2**32"),
        (["--steps", "0"], "num_inference_steps is 0; it must be 1 to 1000"),
        (["--steps", "1", "--scheduler", "edm_heun"], "num_inference_steps is 1; it must be 2 to"),
        (["--eta", "0.5", "--scheduler", "unipc"], "eta is 0.5, but UniPCMultistepScheduler does not take it"),
        (["--class_label", "1"], "the network has no class embeddings"),
        (["--pipeline", "runs/no/pipeline"], "runs/no/pipeline is neither a folder nor the id of a Hub repository"),
        (
            ["--pipeline", "nobody/nothing"],
            "--pipeline nobody/nothing is not a local folder and could not be downloaded",
        ),
        (["--pipeline", str(REPOSITORY / "tests")], "tests is not a model repository"),
        (["--revision", "main"], "--revision main is for the Hub"),
        (["--out", str(REPOSITORY / "README.md")], "README.md is not a folder"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(generate, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, error = generate(*arguments)
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert not out
    assert not (tmp_path / "out").exists()


def test_failures_exit_with_1(generate, model, tmp_path):
    pipeline = CustomUNetPipeline.from_pretrained(model)
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = float("nan")
    broken = export_pipeline(pipeline, tmp_path / "broken")
    assert generate(pipeline=broken, out=tmp_path / "nan")[::2] == (
        1,
        "error: 4 of 4 images are not finite; the network's weights or precision are broken",
    )
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        code, _, error = generate()
    assert code == 1
    assert "is in use by another start" in error


def test_damaged_weights_are_bad_input(generate, tmp_path):
    damaged = export_tiny(tmp_path / "damaged", seed=0)
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, error = generate(pipeline=damaged)
    assert code == 2
    assert "damaged could not be loaded" in error


def test_a_repository_of_the_hub_is_recorded_with_its_commit(generate, model, tmp_path, monkeypatch):
    """From the cache, as the Hub's client lays it out, for there is no network."""
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


# ---- Interrupted, and finished by several processes


KILLED = """
import os, signal, sys
from pipelines import CustomUNetPipeline, generate

draw, drawn = CustomUNetPipeline.__call__, []

def be_killed(*arguments, **keywords):
    drawn.append(keywords["seeds"])
    if len(drawn) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(*arguments, **keywords)

CustomUNetPipeline.__call__ = be_killed
generate.main(sys.argv[1:])
"""


def test_ctrl_c_keeps_what_is_there(generate, tmp_path, monkeypatch):
    """It comes while the third image is drawn."""
    draw, drawn = CustomUNetPipeline.__call__, []

    def press_ctrl_c(pipeline, *arguments, **keywords):
        drawn.append(keywords["seeds"])
        if len(drawn) == 3:
            signal.raise_signal(signal.SIGINT)
        return draw(pipeline, *arguments, **keywords)

    monkeypatch.setattr(CustomUNetPipeline, "__call__", press_ctrl_c)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it in its workers
    try:
        code, _, error = generate("--batch_size", 1, images=5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert error == "stopped; the images so far are kept, and the same command goes on"
    assert missing_seeds(tmp_path / "out", range(5)) == [2, 3, 4]


def test_killed_and_finished_by_two_processes(generate, model, tmp_path):
    out, seeds = tmp_path / "killed", range(20, 32)
    sampling = ["--seed", "20", "--scheduler", "ddpm"]
    fixed = ["--pipeline", model, "--num_images", len(seeds), "--steps", 20, "--out", out, "--num_cpu_threads", 1]
    flags = [*map(str, fixed), *sampling, "--batch_size", "1"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *flags], cwd=REPOSITORY)
    assert killed.returncode == -signal.SIGKILL
    killed_at = 3
    assert missing_seeds(out, seeds) == [*seeds[killed_at:]]
    kept = identities(image_paths(out, seeds[:killed_at]))

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "pipelines.generate", *flags],
        cwd=REPOSITORY,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(seeds) - killed_at} images generated" in done.stdout
    assert identities(kept) == kept
    starts = record(out)["starts"]
    assert [start["num_processes"] for start in starts] == [1, 2]
    assert ["generated" in start for start in starts] == [False, True]
    assert starts[1]["network_evaluations_per_image"] == 20

    whole = tmp_path / "whole"
    assert generate(*sampling, "--batch_size", 5, out=whole, images=len(seeds), steps=20)[0] == 0
    assert_same_images(out, whole, seeds)
    assert np.abs(pixels(out / "contact_sheet.png") - pixels(whole / "contact_sheet.png")).max() <= 1
    assert record(out)["settings"] == record(whole)["settings"]
    assert {path.name for path in out.iterdir()} - {path.name for path in whole.iterdir()} == set()
