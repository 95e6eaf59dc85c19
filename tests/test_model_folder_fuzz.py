"""Damaged model folders from a fixed seed: each gives an image or a one-line error and the documented exit code."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_network import TINY
from tiny_pipeline import tiny_pipeline

from custom_unet import CustomUNet2DModel
from pipelines import CustomUNetPipeline, export, generate
from pipelines.export import export_pipeline
from training.sde import SDEScheduler

SEED = 21
WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")
INDEX = Path("unet/diffusion_pytorch_model.safetensors.index.json")
UNET, SCHEDULER = Path("unet/config.json"), Path("scheduler/scheduler_config.json")
MODEL_INDEX = Path("model_index.json")
IMAGE, FAILED, REFUSED = 0, 1, 2  # exit codes
NAN, INF = float("nan"), float("inf")


class Damage(NamedTuple):
    """One kind of damage to a model folder and the exit codes that it may cause.

    Attributes:
        expected: exit codes, including IMAGE if the damaged model may still work.
        model: the model to damage: plain, sharded, or the objective of an SDE.
        says: text that the error line contains.
    """

    name: str
    apply: Callable[[Path], object]
    expected: tuple[int, ...] = (REFUSED,)
    model: str = "plain"
    says: str = ""


# ---- Ways to damage files


def edit(path: Path, **values) -> Callable[[Path], object]:
    """Sets keys of a JSON file; `...` removes a key."""

    def apply(folder: Path) -> None:
        entries = json.loads((folder / path).read_text()) | values
        (folder / path).write_text(json.dumps({key: value for key, value in entries.items() if value is not ...}))

    return apply


def change(path: Path, new: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(new((folder / path).read_bytes()))


def truncate(path: Path, fraction: float) -> Callable[[Path], object]:
    return change(path, lambda content: content[: int(len(content) * fraction)])


def flip(path: Path, seed: int, number: int = 1, part: str = "all") -> Callable[[Path], object]:
    """Flips bits of a file, or of the header or the data of weights."""

    def flipped(content: bytes) -> bytes:
        changed, header = bytearray(content), 8 + struct.unpack("<Q", content[:8])[0]
        first, last = {"all": (0, len(content)), "header": (0, header), "data": (header, len(content))}[part]
        generator = np.random.default_rng((SEED, seed))
        for position in generator.integers(first, last, number):
            changed[position] ^= 1 << int(generator.integers(8))
        return bytes(changed)

    return change(path, flipped)


def tensors(new: Callable[[dict], dict]) -> Callable[[Path], object]:
    return lambda folder: save_file(new(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return tensors(lambda state: state | {name: make(state[name]).contiguous()})


class MaliciousCode:
    """Code that runs when the pickle is loaded; its SystemExit ends the test."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle was run')",))


def pickle(path: Path, **options) -> Callable[[Path], object]:
    """Replaces the weights by a pickle."""
    return lambda folder: ((folder / WEIGHTS).unlink(), torch.save({BIAS: MaliciousCode()}, folder / path, **options))


# ---- Kinds of damage


BIAS, DEEP = "conv_out.bias", "mid_block.resnets.0.conv1.weight"
NOT_OBJECTS = (b"", b"{", b"[]", b'"text"', b"null", b"42", b"\xff\xfe{\0}\0", b"[" * 100_000)
WRONG = ("text", None, -1, 1.5, [], 10**30)
ANY = (IMAGE, FAILED, REFUSED)


def weights() -> Iterator[Damage]:
    for fraction in (0, 0.0001, 0.05, 0.5, 0.99999):
        yield Damage(f"truncated to {fraction}", truncate(WEIGHTS, fraction))
    for seed in range(8):
        yield Damage(f"bit flip {seed} in the header", flip(WEIGHTS, seed, part="header"), ANY)
    for seed in range(3):  # the folder has no checksum that would reveal it
        yield Damage(f"bit flip {seed} in the data", flip(WEIGHTS, seed, part="data"), (IMAGE, FAILED))
    for length in (0, 2**31, 2**64 - 1):
        header = change(WEIGHTS, lambda content, length=length: struct.pack("<Q", length) + content[8:])
        yield Damage(f"a header of {length} bytes", header)
    yield Damage("a longer tensor", put(DEEP, lambda t: torch.cat([t, t])))
    yield Damage("an empty tensor", put(DEEP, lambda t: t[:0]))
    without = tensors(lambda state: {key: state[key] for key in state.keys() - {DEEP}})
    yield Damage(f"without {DEEP}", without, says=f"its weights lack 1 tensors, {DEEP} for one")
    extra = "its weights have in excess 1 tensors, extra for one"
    yield Damage("an extra tensor", tensors(lambda state: state | {"extra": torch.zeros(3)}), says=extra)
    yield Damage("keys of DDP", tensors(lambda state: {f"module.{k}": v for k, v in state.items()}))
    for value in (NAN, INF, 3e38):
        yield Damage(f"{BIAS} is {value}", put(BIAS, lambda t, v=value: torch.full_like(t, v)), (FAILED,))
    for dtype in (torch.float16, torch.float64, torch.int64, torch.complex64):
        cast = tensors(lambda state, dtype=dtype: {key: value.to(dtype) for key, value in state.items()})
        yield Damage(f"all {dtype}", cast, (IMAGE,) if dtype.is_floating_point else ANY)
    yield Damage("a web page", change(WEIGHTS, lambda _: b"<html>404</html>"))
    yield Damage("a pickle named .safetensors", pickle(WEIGHTS))
    yield Damage("an old pickle named .safetensors", pickle(WEIGHTS, _use_new_zipfile_serialization=False))
    for suffix in (".bin", ".pt", ".ckpt"):
        yield Damage(f"only a pickle, {suffix}", pickle(WEIGHTS.with_suffix(suffix)))


def json_file(path: Path, model: str = "plain", broken: tuple[int, ...] = (REFUSED,), keys=()) -> Iterator[Damage]:
    """A JSON file that is missing, damaged, not an object, or has each of its values replaced by wrong ones."""
    yield Damage("missing", lambda folder: (folder / path).unlink(), broken, model)
    yield Damage("a folder", lambda folder: ((folder / path).unlink(), (folder / path).mkdir()), broken, model)
    for content in NOT_OBJECTS:
        yield Damage(f"{content[:10]!r}", change(path, lambda _, content=content: content), broken, model)
    for fraction in (0.3, 0.9, 0.99):
        yield Damage(f"truncated to {fraction}", truncate(path, fraction), broken, model)
    for seed in range(5):
        yield Damage(f"flip {seed}", flip(path, seed, number=2), ANY, model)
    for key in [*keys, "_class_name"]:
        for value in WRONG:
            yield Damage(f"{key} is {value!r}", edit(path, **{key: value}), ANY, model)
        yield Damage(f"no {key}", edit(path, **{key: ...}), (IMAGE, REFUSED), model)
    yield Damage("an unknown key", edit(path, evil="yes"), (IMAGE, REFUSED), model)


def values(path: Path, table: dict, model: str = "plain", expected: tuple[int, ...] = (REFUSED,)) -> Iterator[Damage]:
    for key, row in table.items():
        for value in row:
            yield Damage(f"{key} is {str(value)[:40]}", edit(path, **{key: value}), expected, model)


def unet_config() -> Iterator[Damage]:
    yield from json_file(UNET, keys=UNET_KEYS)
    wrong = {
        "block_out_channels": ([8], [8, 16, 32], [8, 10**15], [-8, 16], [8, 16.5], [16, 8]),
        "down_block_types": (["DownBlock2D", "Evil"], ["DownBlock2D"] * 2, ["../x", "y"]),
        "sample_size": ([8, 8, 8], [8, "x"], None, 0, "8"),
    }
    yield from values(UNET, wrong)
    other = {"sample_size": (7, 10**12), "_class_name": ("UNet2DModel", "AutoencoderKL", "../evil")}
    yield from values(UNET, other, expected=ANY)


def scheduler() -> Iterator[Damage]:
    yield from json_file(SCHEDULER, keys=DDIM_KEYS)
    betas = ([NAN] * 1000, [0.5], [[0.1]], [2.0] * 1000, [1.0] * 1000)
    yield from values(SCHEDULER, {"trained_betas": betas}, expected=(FAILED, REFUSED))
    other = {"beta_end": (2, -0.5), "num_train_timesteps": (1, 2, 10**13), "steps_offset": (999, -5000)}
    classes = ("DDPMScheduler", "EulerDiscreteScheduler", "LCMScheduler", "../evil", "os.system")
    yield from values(SCHEDULER, other | {"_class_name": classes}, expected=ANY)


def sde() -> Iterator[Damage]:
    keys = "objective prediction_type beta_min beta_max sigma_min sigma_max sigma_data noise_mean noise_std".split()
    for model in ("vp", "edm"):
        yield from json_file(SCHEDULER, model, keys=keys)
    wrong = {
        "objective": ("edm", "VP", "../evil", "__class__"),
        "prediction_type": ("score", "edm"),
        "beta_min": (0, 30, INF, "text"),
        "_class_name": ("EDMSDE", "../evil", "DDIMScheduler ", None, []),
    }
    yield from values(SCHEDULER, wrong, "vp")
    yield from values(SCHEDULER, {"sigma_min": (81, -1, "text"), "sigma_data": (0,), "noise_std": (0, "1")}, "edm")
    flow = {"objective": "flow", "prediction_type": "flow_prediction"}
    yield Damage("rectified flow", edit(SCHEDULER, **flow, time_density="logit_normal"), (IMAGE,), "vp")
    yield Damage("no numbers, which have defaults", edit(SCHEDULER, **dict.fromkeys(keys[2:], ...)), (IMAGE,), "edm")


def shards() -> Iterator[Damage]:
    def point(target: object) -> Callable[[Path], object]:
        """Lets the index name another file than the first shard; one outside the folder exists."""

        def apply(folder: Path) -> None:
            index = json.loads((folder / INDEX).read_text())
            first = min(index["weight_map"].values())
            index["weight_map"] = {k: target if v == first else v for k, v in index["weight_map"].items()}
            (folder / INDEX).write_text(json.dumps(index))
            shutil.copy(folder / "unet" / first, folder.parent / "outside.safetensors")

        return apply

    yield from json_file(INDEX, "sharded", (IMAGE, REFUSED), keys=("weight_map", "metadata"))
    for target in ("diffusion_pytorch_model-00009-of-00009.safetensors", 5, "model.bin", "../../outside.safetensors"):
        yield Damage(f"points to {target}", point(target), (IMAGE, REFUSED), "sharded")
    second = "diffusion_pytorch_model-00002-of-*"
    missing = lambda folder: next((folder / "unet").glob(second)).unlink()  # noqa: E731
    yield Damage("a missing shard", missing, (REFUSED,), "sharded")
    shortened = lambda folder: truncate(next((folder / "unet").glob(second)), 0.5)(Path())  # noqa: E731
    yield Damage("a truncated shard", shortened, (REFUSED,), "sharded")


def folder() -> Iterator[Damage]:
    yield Damage("empty", lambda folder: (shutil.rmtree(folder), folder.mkdir()))
    for name in ("unet", "scheduler"):
        yield Damage(f"no {name}", lambda folder, name=name: shutil.rmtree(folder / name))
        replaced = lambda folder, name=name: (shutil.rmtree(folder / name), (folder / name).touch())  # noqa: E731
        yield Damage(f"{name} is a file", replaced)
    for path in (WEIGHTS, UNET, SCHEDULER):
        for target in ("nowhere", path.name, "/dev/null", "."):
            link = lambda f, p=path, target=target: ((f / p).unlink(), (f / p).symlink_to(target))  # noqa: E731
            yield Damage(f"{path.name} is a link to {target}", link)


def unread_files() -> Iterator[Damage]:
    """Files that are not read: code in the folder, which is never run, and the pipeline's index."""
    for name in ("custom_unet_pipeline.py", "unet/custom_unet_2d.py", "scheduler/sde.py"):
        evil = change(Path(name), lambda _: b"raise SystemExit('the code was run')\n")
        yield Damage(f"other code in {name}", evil, (IMAGE,), "vp")
    classes = (["../evil", "X"], ["/etc/passwd", "X"], ["os", "system"], "x", 5)
    yield from values(MODEL_INDEX, dict.fromkeys(("unet", "scheduler", "_class_name"), classes), expected=(IMAGE,))


UNET_KEYS = [key for key in CustomUNet2DModel(**TINY).config if key[0] != "_"]
DDIM_KEYS = [key for key in DDIMScheduler().config if key[0] != "_"]
KINDS = {make.__name__: [*make()] for make in (weights, unet_config, scheduler, sde, shards, folder, unread_files)}


# ---- Outcomes


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> dict[str, Path]:
    """The same small model with a single weights file, with shards, and with SDE schedulers."""
    root = tmp_path_factory.mktemp("intact")
    pipe = tiny_pipeline()
    edm = SDEScheduler(objective="edm", prediction_type="edm")
    return {
        "plain": export_pipeline(pipe, root / "plain"),
        "sharded": export_pipeline(pipe, root / "sharded", max_shard_size=30_000),
        "vp": export_pipeline(CustomUNetPipeline(pipe.unet, SDEScheduler()), root / "vp"),
        "edm": export_pipeline(CustomUNetPipeline(pipe.unet, edm), root / "edm"),
    }


@pytest.fixture
def outcome_of(intact, tmp_path, capfd, monkeypatch):
    """Runs a command on a damaged copy; returns the exit code, the error line, if any, and the generated image."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def outcome_of(damage: Damage, command: str = "generate") -> tuple[int, str, np.ndarray | None]:
        work = tmp_path / "work"
        model, out = shutil.copytree(intact[damage.model], work / "model"), work / "out"
        damage.apply(model)
        capfd.readouterr()
        flags = ["--out", str(out), "--num_images", "1", "--steps", "2", "--num_cpu_threads", "1"]
        if command == "generate":
            code = generate.main(["--pipeline", str(model), *flags])
        else:
            code = export.main([command, "--pipeline", str(model)])
            assert code or (model / "README.md").stat().st_size > 1000
        text = capfd.readouterr().err
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in text, damage.name
        assert len(errors) == (code != 0), (damage.name, text)
        assert all(len(error) < 2000 for error in errors)
        path = out / "seed-0000000.png"
        image = np.asarray(Image.open(path)) if path.exists() else None
        shutil.rmtree(work)
        return code, "".join(errors), image

    return outcome_of


def test_intact_models_generate_images_and_sharding_changes_nothing(outcome_of, intact):
    images = {}
    for model in intact:
        code, error, images[model] = outcome_of(Damage("none", lambda folder: None, model=model))
        assert (code, error) == (IMAGE, "")
        assert images[model].std() > 10
    np.testing.assert_array_equal(images["sharded"], images["plain"])


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_models_generate_an_image_or_fail_with_one_line(kind, outcome_of):
    for damage in KINDS[kind]:
        code, error, image = outcome_of(damage)
        assert code in damage.expected, (damage, error)
        assert damage.says in error
        assert (image is None) == (code != IMAGE), damage.name


@pytest.mark.parametrize("kind", KINDS)
def test_cards_of_damaged_models_are_written_or_fail_with_one_line(kind, outcome_of):
    codes = {outcome_of(damage, "card")[0] for damage in KINDS[kind][:: 3 if kind in ("shards", "weights") else 9]}
    assert codes == {IMAGE, REFUSED}
