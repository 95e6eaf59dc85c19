"""Damaged model repositories from a fixed seed: an image as documented, or one line and the documented exit code."""

import json
import shutil
import struct
from collections import Counter
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

from custom_unet import CustomUNet2DModel
from pipelines import CustomUNetPipeline, export, generate
from pipelines.export import export_pipeline
from training.sde import SDEScheduler

SEED = 21
WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")
INDEX = Path("unet/diffusion_pytorch_model.safetensors.index.json")
UNET, SCHEDULER = Path("unet/config.json"), Path("scheduler/scheduler_config.json")
MODEL_INDEX = Path("model_index.json")
IMAGE, REFUSED, FAILED = 0, 2, 1  # exit codes


class Damage(NamedTuple):
    """What is done to a folder, and the exit codes that it may give.

    Attributes:
        kind: which file is damaged.
        expected: exit codes; IMAGE among them where the damage may leave a sound model.
        model: which one is damaged: plain, sharded, or of an SDE by its objective.
    """

    kind: str
    name: str
    spoil: Callable[[Path], object]
    expected: tuple[int, ...] = (REFUSED,)
    model: str = "plain"


# ---- Damages


def edit(path: Path, **values) -> Callable[[Path], object]:
    """Sets keys of a JSON file; `...` takes one out."""

    def spoil(folder: Path) -> None:
        there = json.loads((folder / path).read_text()) | values
        (folder / path).write_text(json.dumps({key: value for key, value in there.items() if value is not ...}))

    return spoil


def write(path: Path, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(content)


def truncate(path: Path, fraction: float) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        content = (folder / path).read_bytes()
        (folder / path).write_bytes(content[: int(len(content) * fraction)])

    return spoil


def flip(path: Path, seed: int, number: int = 1, in_header: bool = False) -> Callable[[Path], object]:
    """Flips bits of a JSON file, or of weights, in their header or their data."""

    def spoil(folder: Path) -> None:
        content = bytearray((folder / path).read_bytes())
        first, last = 0, len(content)
        if path == WEIGHTS:
            header = 8 + struct.unpack("<Q", content[:8])[0]
            first, last = (0, header) if in_header else (header, len(content))
        generator = np.random.default_rng((SEED, seed))
        for position in generator.integers(first, last, number):
            content[position] ^= 1 << int(generator.integers(8))
        (folder / path).write_bytes(content)

    return spoil


def change_tensors(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors) or tensors, folder / WEIGHTS, {"format": "pt"})

    return spoil


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return change_tensors(lambda tensors: tensors | {name: make(tensors[name]).contiguous()})


def fill(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


def leave_out(*names: str) -> Callable[[Path], object]:
    return change_tensors(lambda tensors: {name: value for name, value in tensors.items() if name not in names})


class LeavesAMark:
    """What a pickle may do to whoever reads it."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle was run')",))


BIAS, DEEP = "conv_out.bias", "mid_block.resnets.0.conv1.weight"


def weights_damages() -> Iterator[Damage]:
    for fraction in (0, 0.0001, 0.01, 0.05, 0.5, 0.9, 0.99999):
        yield Damage("weights", f"cut to {fraction}", truncate(WEIGHTS, fraction))
    for seed in range(16):
        yield Damage("weights", f"flip {seed} in the header", flip(WEIGHTS, seed, in_header=True), (IMAGE, REFUSED))
    for seed in range(5):  # without a checksum in the folder nothing tells of it
        yield Damage("weights' data", f"flip {seed}", flip(WEIGHTS, seed), (IMAGE, FAILED))
    for length in (0, 1, 2**31, 2**63, 2**64 - 1):
        spoil = lambda folder, length=length: _overwrite(folder / WEIGHTS, 0, struct.pack("<Q", length))  # noqa: E731
        yield Damage("weights", f"a header of {length} bytes", spoil)
    shapes = {"longer": lambda t: torch.cat([t, t]), "shorter": lambda t: t[:-1], "flat": lambda t: t.flatten()}
    for name, make in (shapes | {"turned": lambda t: t.transpose(0, -1), "empty": lambda t: t[:0]}).items():
        yield Damage("weights", f"{name} tensor", put(DEEP, make))
    for names in ((BIAS,), (DEEP,), ("time_embedding.linear_1.weight", "conv_in.bias")):
        yield Damage("weights", f"without {names[0]}", leave_out(*names))
    yield Damage("weights", "no tensors", change_tensors(lambda tensors: {"x": torch.zeros(1)}))
    yield Damage("weights", "one more tensor", change_tensors(lambda tensors: tensors | {"extra": torch.zeros(3)}))
    prefixed = change_tensors(lambda tensors: {f"module.{name}": value for name, value in tensors.items()})
    yield Damage("weights", "names of DistributedDataParallel", prefixed)
    for value in (float("nan"), float("inf"), -float("inf"), 3e38):
        yield Damage("weights", f"{value} in the last layer", put(BIAS, fill(value)), (FAILED,))
        yield Damage("weights", f"{value} in the middle", put(DEEP, fill(value)), (FAILED,))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = change_tensors(lambda tensors, dtype=dtype: {k: v.to(dtype) for k, v in tensors.items()})
        yield Damage("weights", f"all of {dtype}", cast, (IMAGE,))
    for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64):
        cast = change_tensors(lambda tensors, dtype=dtype: {k: v.to(dtype) for k, v in tensors.items()})
        yield Damage("weights", f"all of {dtype}", cast)
    for name, content in {"text": b"not weights", "html": b"<html>404</html>", "zeros": bytes(10_000)}.items():
        yield Damage("weights", name, write(WEIGHTS, content))
    pickle = lambda folder: torch.save({BIAS: LeavesAMark()}, folder / WEIGHTS)  # noqa: E731
    yield Damage("weights", "a pickle by another name", pickle)
    old = lambda folder: torch.save({BIAS: LeavesAMark()}, folder / WEIGHTS, _use_new_zipfile_serialization=False)  # noqa: E731
    yield Damage("weights", "an old pickle by another name", old)
    for suffix in (".bin", ".pt", ".ckpt"):
        yield Damage("weights", f"a pickle alone, {suffix}", _only_pickle(suffix))


def _overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def _only_pickle(suffix: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save({BIAS: LeavesAMark()}, (folder / WEIGHTS).with_suffix(suffix))

    return spoil


NOT_OBJECTS = (b"", b"{", b"[]", b'"text"', b"null", b"42", b"\xff\xfe{\0}\0", b"[" * 100_000, b'{"a": ' * 5000)
WRONG = ("text", None, -1, 0, 1.5, [], {}, True, 10**30)


def json_damages(kind: str, path: Path, expected: tuple[int, ...] = (REFUSED,)) -> Iterator[Damage]:
    """Of any JSON file: missing, damaged, of another kind."""
    yield Damage(kind, "missing", lambda folder: (folder / path).unlink(), expected)
    yield Damage(kind, "a folder", lambda folder: ((folder / path).unlink(), (folder / path).mkdir()), expected)
    for content in NOT_OBJECTS:
        yield Damage(kind, f"{content[:10]!r}", write(path, content), expected)
    for fraction in (0.3, 0.9, 0.99):
        yield Damage(kind, f"cut to {fraction}", truncate(path, fraction), expected)
    for seed in range(10):
        yield Damage(kind, f"flip {seed}", flip(path, seed, number=2), (IMAGE, FAILED, REFUSED))


def config_damages() -> Iterator[Damage]:
    yield from json_damages("unet config", UNET)
    either = (IMAGE, REFUSED)
    keys = {
        "sample_size in_channels out_channels block_out_channels": (REFUSED,),
        "down_block_types up_block_types layers_per_block norm_num_groups": (REFUSED,),
        "attention_head_dim norm_eps dropout act_fn center_input_sample flip_sin_to_cos freq_shift": either,
        "time_embedding_type mid_block_scale_factor num_class_embeds class_embed_type add_attention": either,
        "resnet_time_scale_shift downsample_padding attn_norm_num_groups num_train_timesteps": either,
    }
    for names, expected in keys.items():
        for key in names.split():
            for value in WRONG:
                if (key, value) != ("downsample_padding", True):  # which convolutions take for a number at first
                    codes = (*expected, FAILED, IMAGE)
                    yield Damage("unet config", f"{key} is {value!r}", edit(UNET, **{key: value}), codes)
            yield Damage("unet config", f"no {key}", edit(UNET, **{key: ...}), (IMAGE, REFUSED))
    for size in (7, 9, 10**5, 10**12, [8, 8, 8], [8, "x"], [10**9, 10**9]):
        yield Damage("unet config", f"sample_size is {size}", edit(UNET, sample_size=size), (REFUSED, FAILED))
    for widths in ([8], [8, 16, 32], [10**6, 10**6], [8, 10**15], [-8, 16], [8, 16.5], [16, 8]):
        yield Damage("unet config", f"block_out_channels is {widths}", edit(UNET, block_out_channels=widths))
    blocks = (["DownBlock2D", "Evil"], ["DownBlock2D"] * 2, ["DownBlock2D"], ["../x", "y"])
    for types in blocks:
        yield Damage("unet config", f"down_block_types is {types}", edit(UNET, down_block_types=types))
    yield Damage("unet config", "an unknown key", edit(UNET, evil="yes"), (IMAGE, REFUSED))
    for name in ("UNet2DModel", "AutoencoderKL", "../evil", None, 5):
        yield Damage("unet config", f"class {name}", edit(UNET, _class_name=name), (IMAGE, REFUSED))
    quantized = edit(UNET, quantization_config={"quant_method": "evil"})
    yield Damage("unet config", "quantized", quantized, (IMAGE, REFUSED))


def scheduler_damages() -> Iterator[Damage]:
    yield from json_damages("scheduler", SCHEDULER)
    keys = (
        "num_train_timesteps beta_start beta_end beta_schedule prediction_type clip_sample clip_sample_range"
        " timestep_spacing steps_offset set_alpha_to_one thresholding dynamic_thresholding_ratio sample_max_value"
        " rescale_betas_zero_snr _class_name trained_betas"
    ).split()
    for key in keys:
        for value in WRONG:
            spoil = edit(SCHEDULER, **{key: value})
            yield Damage("scheduler", f"{key} is {value!r}", spoil, (IMAGE, FAILED, REFUSED))
        yield Damage("scheduler", f"no {key}", edit(SCHEDULER, **{key: ...}), (IMAGE, REFUSED))
    for key in ("beta_start", "beta_end", "clip_sample_range", "dynamic_thresholding_ratio"):
        for value in (float("nan"), float("inf"), 2, -0.5):
            yield Damage("scheduler", f"{key} is {value}", edit(SCHEDULER, **{key: value}), (IMAGE, FAILED, REFUSED))
    for betas in ([float("nan")] * 1000, [0.5], [0.1, 0.2, 0.3], [[0.1]], [2.0] * 1000, [1.0] * 1000, [0.0] * 1000):
        spoil = edit(SCHEDULER, trained_betas=betas)
        yield Damage("scheduler", f"{len(betas)} betas of {betas[0]}", spoil, (FAILED, REFUSED))
    for name in ("DDPMScheduler", "EulerDiscreteScheduler", "LCMScheduler", "../evil", "os.system"):
        yield Damage("scheduler", f"class {name}", edit(SCHEDULER, _class_name=name), (IMAGE, REFUSED))
    for steps in (1, 2, 10**7, 10**9, 10**13):
        spoil = edit(SCHEDULER, num_train_timesteps=steps)
        yield Damage("scheduler", f"num_train_timesteps is {steps}", spoil, (IMAGE, FAILED, REFUSED))
    for offset in (999, 10**6, -5000):
        spoil = edit(SCHEDULER, steps_offset=offset)
        yield Damage("scheduler", f"steps_offset is {offset}", spoil, (IMAGE, FAILED, REFUSED))


def shard_damages() -> Iterator[Damage]:
    def move_outside(folder: Path) -> None:
        shard = next((folder / "unet").glob("*-00001-of-*"))
        shutil.move(shard, folder.parent / "outside.safetensors")

    def point(target: str, move: bool = False) -> Callable[[Path], object]:
        def spoil(folder: Path) -> None:
            index = json.loads((folder / INDEX).read_text())
            first = sorted(set(index["weight_map"].values()))[0]
            index["weight_map"] = {k: target if v == first else v for k, v in index["weight_map"].items()}
            (folder / INDEX).write_text(json.dumps(index))
            if move:
                move_outside(folder)

        return spoil

    for damage in json_damages("shard index", INDEX, (IMAGE, REFUSED)):
        yield damage._replace(model="sharded")
    damages = {
        "nowhere": point("diffusion_pytorch_model-00009-of-00009.safetensors"),
        "outside": point("../../outside.safetensors", move=True),
        "outside, all shards there": point("../../outside.safetensors"),
        "an absolute path": point("/etc/hostname"),
        "a number": point(5),
        "a list": point(["x"]),
        "a pickle": point("model.bin"),
        "a missing shard": lambda folder: next((folder / "unet").glob("*-00002-of-*")).unlink(),
        "a cut shard": lambda folder: truncate(next((folder / "unet").glob("*-00002-of-*")), 0.5)(folder),
        "no map": edit(INDEX, weight_map=...),
        "an empty map": edit(INDEX, weight_map={}),
        "a map of another kind": edit(INDEX, weight_map=["x"]),
        "no metadata": edit(INDEX, metadata=...),
        "metadata of another kind": edit(INDEX, metadata="x"),
    }
    for name, spoil in damages.items():
        yield Damage("shard index", name, spoil, (IMAGE, REFUSED), model="sharded")


def folder_damages() -> Iterator[Damage]:
    def empty(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()

    def into_file(name: str) -> Callable[[Path], object]:
        return lambda folder: (shutil.rmtree(folder / name), (folder / name).write_text("a file"))

    def link(path: Path, target: str) -> Callable[[Path], object]:
        return lambda folder: ((folder / path).unlink(), (folder / path).symlink_to(target))

    yield Damage("folder", "empty", empty)
    for name in ("unet", "scheduler"):
        yield Damage("folder", f"no {name}", lambda folder, name=name: shutil.rmtree(folder / name))
        yield Damage("folder", f"{name} is a file", into_file(name))
    for path in (WEIGHTS, UNET, SCHEDULER):
        for target in ("nowhere", path.name, "/etc/hostname", "/dev/null", "."):
            yield Damage("folder", f"{path.name} is a link to {target}", link(path, target))
    for name in ("custom_unet_pipeline.py", "unet/custom_unet_2d.py"):  # are not run
        yield Damage("folder", f"no {name}", lambda folder, name=name: (folder / name).unlink(), (IMAGE,))
        evil = write(Path(name), b"raise SystemExit('the code was run')\n")
        yield Damage("folder", f"other code in {name}", evil, (IMAGE,))
    for damage in json_damages("model index", MODEL_INDEX, (IMAGE,)):  # is not read
        yield damage._replace(expected=(IMAGE,))
    for value in (["../evil", "X"], ["/etc/passwd", "X"], ["os", "system"], [None, None], "x", 5):
        for component in ("unet", "scheduler", "_class_name"):
            yield Damage("model index", f"{component} is {value}", edit(MODEL_INDEX, **{component: value}), (IMAGE,))


def sde_damages() -> Iterator[Damage]:
    kind = "sde"
    for damage in json_damages(kind, SCHEDULER):
        yield damage._replace(model="edm")
    numbers = "beta_min beta_max sigma_min sigma_max sigma_data noise_mean noise_std"
    broken = (float("nan"), float("inf"), -float("inf"), 1e300, 1e39, 1e-320, -1e-9)
    for model, keys in {"vp": "objective prediction_type beta_min beta_max", "edm": numbers}.items():
        for key in keys.split():
            for value in (*WRONG, *broken):
                spoil = edit(SCHEDULER, **{key: value})
                yield Damage(kind, f"{key} of {model} is {value!r:.40}", spoil, (IMAGE, FAILED, REFUSED), model)
    wrong = [
        ("vp", name, value) for name in ("beta_min", "beta_max") for value in ("text", None, [], True, *broken[:5])
    ]
    wrong += [("vp", "beta_min", 0), ("vp", "beta_min", 30), ("vp", "beta_max", 1e4), ("vp", "beta_max", 10**30)]
    wrong += [("edm", name, value) for name in ("sigma_min", "sigma_max") for value in ("text", [], True, *broken[:5])]
    wrong += [
        ("edm", "sigma_min", 81),
        ("edm", "sigma_max", 0.002),
        ("edm", "sigma_max", 1e300),
        ("edm", "sigma_data", 0),
    ]
    wrong += [
        ("edm", "sigma_min", -1),
        ("edm", "noise_std", 0),
        ("edm", "noise_mean", True),
        ("edm", "noise_std", "1"),
    ]
    wrong += [("vp", "objective", value) for value in ("edm", "ve", "VP", "../evil", "__class__", *WRONG)]
    wrong += [("vp", "prediction_type", value) for value in ("score", "edm", "flow", *WRONG)]
    wrong += [("edm", "_class_name", value) for value in ("SDE", "EDMSDE", "../evil", "DDIMScheduler ", None, 5, [])]
    for model, key, value in wrong:
        yield Damage(kind, f"{key} of {model} must not be {value!r:.40}", edit(SCHEDULER, **{key: value}), model=model)
    flow = {"objective": "flow", "prediction_type": "flow_prediction"}
    yield Damage(kind, "a flow", edit(SCHEDULER, **flow, time_density="logit_normal"), (IMAGE,), "vp")
    for value in ("logit", "", None, 5, ["uniform"], {}):
        spoil = edit(SCHEDULER, **flow, time_density=value)
        yield Damage(kind, f"time_density must not be {value!r}", spoil, model="vp")
    for names in ("sigma_min sigma_max", "beta_min beta_max noise_mean noise_std", "_diffusers_version"):
        left_out = edit(SCHEDULER, **dict.fromkeys(names.split(), ...))
        yield Damage(kind, f"no {names}", left_out, (IMAGE,), "edm")  # they have defaults
    yield Damage(kind, "no objective, which is then vp", edit(SCHEDULER, objective=...), (REFUSED,), "edm")
    yield Damage(kind, "an unknown key", edit(SCHEDULER, evil="yes"), (IMAGE,), "edm")
    for name in ("DDIMScheduler", "DDPMScheduler"):  # then it is no SDE: the prediction type does not suit
        yield Damage(kind, f"class {name}", edit(SCHEDULER, _class_name=name), (REFUSED,), "edm")
    learned = edit(UNET, time_embedding_type="learned", num_train_timesteps=1000)
    yield Damage(kind, "a network of whole timesteps", learned, (REFUSED,), "edm")
    yield Damage(
        kind, "a logarithm of a negative number", edit(UNET, time_embedding_type="fourier"), (REFUSED, FAILED), "edm"
    )
    code = Path("scheduler/sde.py")  # is not run
    yield Damage(kind, "no code of the SDE", lambda folder: (folder / code).unlink(), (IMAGE,), "vp")
    yield Damage(kind, "other code of the SDE", write(code, b"raise SystemExit('the code was run')\n"), (IMAGE,), "vp")


def all_damages() -> list[Damage]:
    makers = (weights_damages, config_damages, scheduler_damages, sde_damages, shard_damages, folder_damages)
    return [damage for make in makers for damage in make()]


# ---- What becomes of them


class Outcome(NamedTuple):
    code: int
    errors: list[str]  # the lines of standard error that begin so
    text: str  # all of standard error
    image: np.ndarray | None


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    """The same small model in one file of weights, in shards, and with SDEs in place of the timesteps."""
    root = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    pipeline = CustomUNetPipeline(CustomUNet2DModel(**TINY), DDIMScheduler())
    return {
        "plain": export_pipeline(pipeline, root / "plain"),
        "sharded": export_pipeline(pipeline, root / "sharded", max_shard_size=30_000),
        "vp": export_pipeline(CustomUNetPipeline(pipeline.unet, SDEScheduler()), root / "vp"),
        "edm": export_pipeline(
            CustomUNetPipeline(pipeline.unet, SDEScheduler(objective="edm", prediction_type="edm")), root / "edm"
        ),
    }


@pytest.fixture
def outcome_of(sound, tmp_path, capfd, monkeypatch) -> Callable[[Damage | None], Outcome]:
    """Draws one image with a damaged copy."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def draw(damage: Damage | None) -> Outcome:
        work = tmp_path / "work"
        folder, out = work / "model", work / "out"
        shutil.copytree(sound["plain" if damage is None else damage.model], folder)
        if damage is not None:
            damage.spoil(folder)
        flags = ["--pipeline", folder, "--out", out, "--num_images", 1, "--steps", 2, "--num_cpu_threads", 1]
        capfd.readouterr()
        code = generate.main([str(flag) for flag in flags])
        text = capfd.readouterr().err
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        path = out / "seed-0000000.png"
        image = np.asarray(Image.open(path)) if path.exists() else None
        shutil.rmtree(work)
        return Outcome(code, errors, text, image)

    return draw


def by_kind() -> dict[str, list[Damage]]:
    kinds: dict[str, list[Damage]] = {}
    for damage in all_damages():
        kinds.setdefault(damage.kind, []).append(damage)
    return kinds


KINDS = by_kind()
# of each kind: how many damages, and how many of them at least must be refused
LEAST = {"weights": (60, 50), "weights' data": (5, 0), "unet config": (280, 200), "scheduler": (210, 110)}
LEAST |= {"sde": (250, 130), "shard index": (38, 30), "folder": (24, 20), "model index": (40, 0)}


def test_the_sound_model_draws_the_same_image_in_shards(outcome_of):
    whole = outcome_of(None)
    assert whole.code == IMAGE, whole.text
    sharded = outcome_of(Damage("none", "none", lambda folder: None, model="sharded"))
    np.testing.assert_array_equal(sharded.image, whole.image)
    assert whole.image.std() > 10
    for model in ("vp", "edm"):
        outcome = outcome_of(Damage("none", "none", lambda folder: None, model=model))
        assert outcome.code == IMAGE, outcome.text
        assert outcome.image.std() > 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_model_draws_an_image_or_says_in_one_line_why_not(kind, outcome_of):
    codes = Counter()
    for damage in KINDS[kind]:
        outcome = outcome_of(damage)
        codes[outcome.code] += 1
        assert outcome.code in damage.expected, (damage.name, outcome)
        assert "Traceback" not in outcome.text, damage.name
        if outcome.code == IMAGE:
            assert not outcome.errors
            assert outcome.image.shape == (8, 8, 3)
        else:
            assert len(outcome.errors) == 1, (damage.name, outcome.text)
            assert len(outcome.errors[0]) < 2000
            assert outcome.image is None
    least_cases, least_refused = LEAST[kind]
    assert sum(codes.values()) >= least_cases
    assert codes[REFUSED] >= least_refused, codes


def test_damage_that_diffusers_only_warns_of_is_refused_by_name(outcome_of):
    found = {damage.name: outcome_of(damage).errors[0] for damage in KINDS["weights"] if damage.expected == (REFUSED,)}
    assert f"its weights lack 1 of the network's tensors, {BIAS} for one" in found[f"without {BIAS}"]
    assert "its weights have 1 tensors that the network does not have, extra for one" in found["one more tensor"]
    assert "are not of floating-point numbers" in found["all of torch.int8"]


def test_code_and_pickles_in_the_folder_are_never_run(outcome_of):
    """They would end this process by SystemExit."""
    evil = [d for kind in KINDS.values() for d in kind if "code" in d.name or "pickle" in d.name]
    assert len(evil) >= 8
    assert {outcome_of(damage).code for damage in evil} == {IMAGE, REFUSED}


def test_a_damaged_model_is_described_or_refused_in_one_line(sound, tmp_path, capfd):
    kept = KINDS["weights"][::3] + KINDS["model index"][::2] + KINDS["shard index"][::3] + KINDS["folder"][::2]
    kept += KINDS["unet config"][::12] + KINDS["scheduler"][::12] + KINDS["sde"][::6]
    codes = Counter()
    for damage in kept:
        folder = tmp_path / "work" / "model"
        shutil.copytree(sound[damage.model], folder)
        damage.spoil(folder)
        capfd.readouterr()
        code = export.main(["card", "--pipeline", str(folder)])
        text = capfd.readouterr().err
        codes[code] += 1
        if code == 0:
            assert "error: " not in text
            assert (folder / "README.md").stat().st_size > 1000
        else:
            assert code == REFUSED, (damage, text)
            assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1, (damage, text)
        shutil.rmtree(tmp_path / "work")
    assert sum(codes.values()) >= 100
    assert codes[REFUSED] >= 35, codes
    assert codes[0] >= 15, codes
