"""Damaged model folders from a fixed seed: each gives an image or a one-line error and the documented exit code."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from tiny_network import TINY
from tiny_pipeline import tiny_pipeline

from custom_unet import CustomUNet2DModel
from pipelines import CustomUNetPipeline, export, generate
from pipelines.export import export_pipeline
from training.sde import SDEScheduler

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
UNET, SCHEDULER, MODEL_INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
SHARD, SHARD_INDEX = "unet/diffusion_pytorch_model-00002-of-00007.safetensors", f"{WEIGHTS}.index.json"
IMAGE, FAILED, REFUSED = (0,), (1,), (2,)  # exit codes
ANY = (0, 1, 2)
NAN = float("nan")
BIAS, DEEP = "conv_out.bias", "mid_block.resnets.0.conv1.weight"
NOT_OBJECTS = (b"", b"{", b"[]", b'"text"', b"null", b"42", b"\xff\xfe{\0}\0", b"[" * 100_000)
WRONG = ("text", None, -1, 1.5, [], 10**30)

Change = Callable[[Path], object]  # damages a model folder
Damage = tuple[str, Change, tuple[int, ...]]  # what it does, and the exit codes that it may cause


# ---- Ways to damage files


def edit(path: str, **values) -> Change:
    """Sets keys of a JSON file."""
    return change(path, lambda content: json.dumps(json.loads(content) | values).encode())


def change(path: str, new: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / path).write_bytes(new((folder / path).read_bytes()))


def truncate(path: str, fraction: float) -> Change:
    return change(path, lambda content: content[: int(len(content) * fraction)])


def flip(path: str, seed: int, last: int | None = None) -> Change:
    """Flips a bit of the first `last` bytes."""

    def flipped(content: bytes) -> bytes:
        generator, changed = np.random.default_rng((21, seed)), bytearray(content)
        changed[generator.integers(last or len(content))] ^= 1 << int(generator.integers(8))
        return bytes(changed)

    return change(path, flipped)


def tensors(new: Callable[[dict], dict]) -> Change:
    return lambda folder: save_file(new(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


class MaliciousCode:
    """Code that runs when the pickle is loaded; its SystemExit ends the test."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle was run')",))


def pickle(path: str, **options) -> Change:
    """Replaces the weights by a pickle."""
    return lambda folder: ((folder / WEIGHTS).unlink(), torch.save({BIAS: MaliciousCode()}, folder / path, **options))


# ---- Kinds of damage; the name of a function is that of the model


def files(path: str, broken: tuple[int, ...] = REFUSED) -> Iterator[Damage]:
    """A JSON file that is missing, damaged or not an object."""
    yield "missing", lambda folder: (folder / path).unlink(), broken
    yield "a folder", lambda folder: ((folder / path).unlink(), (folder / path).mkdir()), broken
    yield "a link to itself", lambda folder: ((folder / path).unlink(), (folder / path).symlink_to(path)), broken
    for content in NOT_OBJECTS:
        yield f"{content[:10]!r}", change(path, lambda _, content=content: content), broken
    yield "truncated", truncate(path, 0.9), broken
    for seed in range(5):
        yield f"bit flip {seed}", flip(path, seed), ANY


def values(path: str, table: dict, expected: tuple[int, ...] = REFUSED) -> Iterator[Damage]:
    for key, row in table.items():
        for value in row:
            yield f"{key} is {str(value)[:40]}", edit(path, **{key: value}), expected


def plain() -> Iterator[Damage]:
    yield "empty", lambda folder: (shutil.rmtree(folder), folder.mkdir()), REFUSED
    for name in ("unet", "scheduler"):
        yield f"no {name}", lambda folder, name=name: shutil.rmtree(folder / name), REFUSED
    for fraction in (0, 0.0001, 0.5, 0.99999):
        yield f"weights truncated to {fraction}", truncate(WEIGHTS, fraction), REFUSED
    for seed in range(8):
        yield f"bit flip {seed} in the weights' header", flip(WEIGHTS, seed, last=4000), ANY
    for length in (0, 2**31, 2**64 - 1):
        header = change(WEIGHTS, lambda content, length=length: struct.pack("<Q", length) + content[8:])
        yield f"a header of {length} bytes", header, REFUSED
    yield "a web page as weights", change(WEIGHTS, lambda _: b"<html>404</html>"), REFUSED
    yield "a longer tensor", tensors(lambda state: state | {DEEP: torch.cat([state[DEEP]] * 2)}), REFUSED
    yield "without a tensor", tensors(lambda state: {key: state[key] for key in state.keys() - {DEEP}}), REFUSED
    yield "another tensor", tensors(lambda state: state | {"extra": torch.zeros(3)}), REFUSED
    yield "keys of DDP", tensors(lambda state: {f"module.{k}": v for k, v in state.items()}), REFUSED
    yield "NaN", tensors(lambda state: state | {BIAS: torch.full_like(state[BIAS], NAN)}), FAILED
    for dtype, expected in {torch.float16: IMAGE, torch.float64: IMAGE, torch.int64: ANY}.items():
        yield f"{dtype}", tensors(lambda state, d=dtype: {k: v.to(d) for k, v in state.items()}), expected
    yield "a pickle named .safetensors", pickle(WEIGHTS), REFUSED
    yield "an old pickle named .safetensors", pickle(WEIGHTS, _use_new_zipfile_serialization=False), REFUSED
    for suffix in (".bin", ".pt", ".ckpt"):
        yield f"only a pickle, {suffix}", pickle(WEIGHTS.replace(".safetensors", suffix)), REFUSED


def unet_config() -> Iterator[Damage]:
    yield from files(UNET)
    yield from values(UNET, dict.fromkeys(CustomUNet2DModel(**TINY).config, WRONG), ANY)
    wrong = {"block_out_channels": ([8], [8, 10**15], [-8, 16]), "down_block_types": (["DownBlock2D", "X"], ["../x"])}
    yield from values(UNET, wrong | {"sample_size": ([8, 8, 8], [8, "x"], None, 0)})
    yield from values(UNET, {"sample_size": (7, 10**12), "_class_name": ("UNet2DModel", "../evil")}, ANY)


def scheduler_config() -> Iterator[Damage]:
    yield from files(SCHEDULER)
    yield from values(SCHEDULER, dict.fromkeys(DDIMScheduler().config, WRONG), ANY)
    yield from values(SCHEDULER, {"trained_betas": ([NAN] * 1000, [0.5], [[0.1]], [2.0] * 1000)}, (1, 2))
    yield from values(SCHEDULER, {"_class_name": ("LCMScheduler", "../evil", "os.system", None, [])})


def sde() -> Iterator[Damage]:
    yield from values(SCHEDULER, dict.fromkeys(("beta_min", "beta_max", "sigma_data", "noise_std"), WRONG), ANY)
    wrong = {"objective": ("edm", "VP", "../evil", None), "prediction_type": ("score", 5), "beta_min": (0, 30, "text")}
    yield from values(SCHEDULER, wrong | {"_class_name": ("EDMSDE", "../evil", None)})


def sharded() -> Iterator[Damage]:
    yield from files(SHARD_INDEX, (0, 2))
    yield "a missing shard", lambda folder: (folder / SHARD).unlink(), REFUSED
    yield "a truncated shard", truncate(SHARD, 0.5), REFUSED
    for target in ("unet/no.safetensors", 5, "model.bin", "../../outside.safetensors"):
        index = {"metadata": {}, "weight_map": {BIAS: target}}
        yield f"points to {target}", change(SHARD_INDEX, lambda _, index=index: json.dumps(index).encode()), REFUSED


def unread_files() -> Iterator[Damage]:
    """Files that are not read: code in the folder, which is never run, and the pipeline's index."""
    for name in ("custom_unet_pipeline.py", "unet/custom_unet_2d.py", "scheduler/sde.py"):
        yield name, change(name, lambda _: b"raise SystemExit('the code was run')\n"), IMAGE
    classes = (["../evil", "X"], ["/etc/passwd", "X"], ["os", "system"], "x", 5)
    yield from values(MODEL_INDEX, dict.fromkeys(("unet", "scheduler", "_class_name"), classes), IMAGE)


KINDS = (plain, unet_config, scheduler_config, sde, sharded, unread_files)


# ---- Outcomes


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> dict[Callable, Path]:
    """A small model, with an SDE or with sharded weights where the kind of damage needs it."""
    root = tmp_path_factory.mktemp("intact")
    pipe = tiny_pipeline()
    models = dict.fromkeys(KINDS, export_pipeline(pipe, root / "plain"))
    models[sharded] = export_pipeline(pipe, root / "sharded")
    (root / "sharded" / WEIGHTS).unlink()
    pipe.unet.save_pretrained(root / "sharded" / "unet", max_shard_size=30_000)
    models[sde] = export_pipeline(CustomUNetPipeline(pipe.unet, SDEScheduler()), root / "sde")
    return models | {unread_files: models[sde]}


@pytest.mark.parametrize("command", ["generate", "card"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_models_work_or_fail_with_one_line(kind, command, intact, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    damages = [("none", lambda folder: None, IMAGE), *kind()]
    for name, damage, expected in damages[:: 1 if command == "generate" else 5]:
        work = tmp_path / "work"
        model, out = shutil.copytree(intact[kind], work / "model"), work / "out"
        damage(model)
        capfd.readouterr()
        if command == "generate":
            flags = ["--out", str(out), "--num_images", "1", "--steps", "2", "--num_cpu_threads", "1"]
            code = generate.main(["--pipeline", str(model), *flags])
            assert code in expected, name
            assert (out / "seed-0000000.png").exists() == (code == 0), name
        else:
            code = export.main(["card", "--pipeline", str(model)])
            assert code in (0, 2), name
        text = capfd.readouterr().err
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in text, name
        assert len(errors) == (code != 0), (name, text)
        assert all(len(error) < 2000 for error in errors)
        shutil.rmtree(work)
