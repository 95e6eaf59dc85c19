"""Hundreds of bad configurations from a fixed seed: each exits with code 2 and one line before any data is read."""

import random
import resource
import typing
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from tiny_training import TINY

import train_unet
from eval import run as evaluation
from pipelines import export, generate
from training.config import LIMITS, TYPES

TINY = TINY | {"max_images": 20, "train_batch_size": 4, "gradient_accumulation_steps": 1, "lr_warmup_steps": 0}
TINY |= {"max_train_steps": 1, "eval_batch_size": 1, "ddpm_num_inference_steps": 2, "post_hoc_ema": False}
MEBIBYTES_PER_GROUP = 700
HUGE = 10**30


@dataclass
class Case:
    """A configuration: changes to TINY or a whole file, and flags."""

    changes: dict = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    file: bytes | None = None
    named: tuple[str, ...] = ()  # the error line contains one of these
    may_leave: tuple[str, ...] = ()  # if only the data or a training step reveals the fault


def kind_of(name: str):
    """The kind of an option: int, float, bool, str, "choice" or "list"."""
    annotation = TYPES[name]
    if type(None) in typing.get_args(annotation):
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return {typing.Literal: "choice", list: "list"}.get(typing.get_origin(annotation), annotation)


def flags_of(options: dict) -> list[str]:
    flags = []
    for name, value in options.items():
        flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def by_file_or_flag(rng: random.Random, name: str, value, *named: str) -> Case:
    """A case that sets the option in the file or on the command line."""
    changes = {"changes": {name: value}} if rng.random() < 0.5 else {"flags": flags_of({name: value})}
    return Case(**changes, named=(name, *named))


# ---- Groups of cases


def misspelt_names(rng):
    for _ in range(70):
        name = rng.choice(list(TYPES))
        at = rng.randrange(1, len(name))
        first, rest = name[:at], name[at:]
        typos = [first + rest[1:], first + rest[0] + rest, first, f"{first}\u00fc{rest}", name.upper(), f"x{name}"]
        typo = rng.choice([*typos, f"{name}s", f"no__{name}", name.replace("_", "."), f"{name} "])
        if typo not in TYPES:
            yield by_file_or_flag(rng, typo, 1, "unknown")


def junk_arguments(rng):
    junk = ["-x", "5", "--", "=", "--=", "--=5", "-", "---", "--seed5", "\u00e9", "", " ", "a\nb", "\x1b[31m", "-1"]
    for argument in junk:
        yield Case(flags=[argument], named=("argument", "unknown", "flag"))
        yield Case(flags=["--seed", "5", argument], named=("argument", "unknown", "flag"))
        yield Case(flags=[f"--{'x' * rng.randrange(1000, 100_000)}", argument], named=("unknown", "argument"))
    yield Case(flags=["--hub_model_id", f"hf_{'a1B2' * 9}", "--push_to_hub"], named=("HF_TOKEN",))
    yield Case(changes={"output_dir": f"hf_{'a1B2' * 9}"}, named=("HF_TOKEN",))
    for name in [name for name in TYPES if kind_of(name) is not bool]:
        yield Case(flags=[f"--{name}"], named=(name,))
    for path in ["/", ".", "nowhere.yaml", "", "a\x00b", "x" * 5000, "/dev/zero", "/dev/null", "/dev/urandom", "\n"]:
        yield Case(flags=["--config", path], named=("configuration",))
    yield Case(flags=["--config"], named=("--config",))
    yield Case(flags=["--config=null"], named=("configuration",))


BAD_TEXTS = {  # in a file or on the command line
    int: ["big", "1.5", "1e3", "0x10", "None", "true", "1,000", "\u221e", "8 8", "- 8", "x" * 5000, "9" * 5000, HUGE],
    float: ["fast", "1,5", "1e", "0x1p3", "1.0.0", "\u00bd", "1 2", "true", "nan", "inf", "1e300", "1e-320", HUGE],
    bool: ["maybe", "2", "on off", "-1", "ja"],
    "choice": ["other", "v", "LINEAR", " linear", "x" * 5000, "no\n"],
    str: ["", "\x00", "a\nb", "\x1b[2J", "a\rb", "\x7f", "\u2028", "\x85", "\udcff", "\t", "\x00" * 5000],
    "list": [""],
}
BAD_VALUES = {  # in a file
    int: [[1, 2], {"a": 1}],
    float: [[1, 2], {"a": 1}],
    bool: [[1, 2], {"a": 1}],
    "choice": [5, 1.5, [1, 2], {"a": 1}],
    str: [5, 1.5, False, True, [1, 2], {"a": 1}],
    "list": [5, True, 1.5, [[1]], [{"a": 1}], [None], [True], [""], ["--seed", "5"], [], {"a": 1}],
}


def bad_values(rng):
    for name, limits in LIMITS.items():
        kind, is_optional = kind_of(name), type(None) in typing.get_args(TYPES[name])
        for value in rng.sample(BAD_TEXTS[kind], min(4, len(BAD_TEXTS[kind]))):
            yield by_file_or_flag(rng, name, value, "value", "configuration")
        for value in BAD_VALUES[kind] if kind == "list" else rng.sample(BAD_VALUES[kind], 1):
            yield Case(changes={name: value}, named=(name,))
        if not is_optional:
            yield Case(changes={name: None}, named=(name,))
            if kind not in (str, "list"):  # as text, `null` is an ordinary name
                yield Case(flags=[f"--{name}=null"], named=(name,))
        if limits.get("min") == 1 or "above" in limits:
            yield by_file_or_flag(rng, name, rng.choice([0, -1]))


def absurd_values(rng):
    absurd = {
        "resolution": [10**9, 8193, 7],
        "block_out_channels": [[10**12, 16], [8, 10**9], [65536, 65536], [0, 16], [-8, 16], [8, 8 * 10**5]],
        "layers_per_block": [10**9, 101],
        "time_embedding_dim": [10**12, 2**20],
        "ddpm_num_steps": [10**9, 10**6],
        "train_batch_size": [10**15, 2**21],
        "eval_batch_size": [10**9],
        "dataloader_num_workers": [10**9, 1000],
        "max_train_steps": [10**18],
        "seed": [2**64, -1],
        "beta_end": [1, 1.5, "0.99999999999", 1e-9],
        "beta_start": ["1e-20", 0.5],
        "norm_eps": [0, -1],
        "mid_block_scale_factor": [0, -2],
        "freq_shift": [4, 10**6],
        "attention_head_dim": [0, -8, 10**6],
        "norm_num_groups": [3, 0, 16, 10**6],
    }
    for name, values in absurd.items():
        for value in values:
            yield by_file_or_flag(rng, name, value, "sample_size", "groups", "beta", "parameters")
    for name, value in {"max_images": 3, "train_batch_size": 21, "gradient_accumulation_steps": 10**6}.items():
        yield replace(by_file_or_flag(rng, name, value, "images are fewer"), may_leave=("cache",))


def broken_files(rng):
    deep = 20_000
    bomb = [f"&a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else '1'}]" for i in range(9)]
    documents = [
        "", "5", "text", "- a\n- b", "{}: {}", "a: [b", "a: 'b", "a: b: c", "\ta: 1", "a: *b", "&a [*a]",
        "a: &a {b: *a}", "split: &a [*a]", "? [a, b]\n: 1", "1: 2", "null: 3", "--- 1\n--- 2",
        "%YAML 9.0\n---\nseed: 1", "%TAG ! tag:x,2000:\n---\nseed: !x 1", "seed: 1\nresolution: 8\nseed: 1",
        "split: {a: 1, a: 2}", "seed: !!python/object:os.system [x]",
        "split: !!python/object/apply:os.system ['exit 1']", "split: !unknown x", "seed: !!int ''", "seed: !!int x",
        "learning_rate: !!float x", "compile: !!bool x", "split: !!timestamp x", "split: 2026-99-99",
        "split: 2026-01-01", "split: !!binary '@'", "split: !!binary aGVsbG8=", "split: !!set {a}",
        "down_block_types: !!omap [a: 1]", "down_block_types: !!pairs [a: 1]", "seed: " + "9" * 5000,
        "seed: " + "1:" * 2000 + "1", "a: " + "[" * deep, "{a: " * deep, "a: " + "- " * deep,
        "split: " + "x" * 900_000, "split: |\n  a\n  b", "#" * (2**20 + 1), "seed: @1", "seed: `1`", "<<: 5",
        "<<: [1]", "<<: *x", "seed: .inf", "seed: .nan", "resolution: 8 8", "=: 1", "!!map 5", "!!seq {}", "\ud7ff: 1",
        "\u202eseed: 1", "\ufeff\ufeffseed: 1", "seed: 'a\x01'", "block_out_channels: [8, .nan]",
        "block_out_channels: [8, '16']", "dataset_name: [synthetic-faces]", "dataset_name: yes", "mixed_precision: no",
        "resolution: 8.0", "hub_token: secret", "output_dir: 0123", "x: &x {a: 1}\nsplit: [*x, *x]",
        "block_out_channels: [" + ", ".join(bomb),
    ]  # fmt: skip
    for document in documents:
        yield Case(file=document.encode("utf-8", "surrogatepass"), named=("tiny.yaml", *TYPES))
    good = yaml.safe_dump(TINY).encode()
    for _ in range(15):
        yield Case(file=rng.randbytes(rng.randrange(1, 5000)), named=("tiny.yaml", *TYPES))
        at = rng.randrange(len(good) - 40)
        bad = rng.choice([b"\x00", b"\xff\xfe", b"\x80", b"\n\t\t: [", b"\n'", b"\n}", b"\n%"])
        yield Case(file=good[:at] + bad + good[at:], named=("tiny.yaml", *TYPES))
    yield Case(file="seed: 1".encode("utf-16"), named=("tiny.yaml", *TYPES))


def impossible_networks(rng):
    down = ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"]
    up = ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"]
    for _ in range(150):
        levels = rng.randrange(1, 4)
        changes = {
            "down_block_types": rng.choices(down[:3] if rng.random() < 0.5 else down, k=levels),
            "up_block_types": rng.choices(up[:3] if rng.random() < 0.5 else up, k=levels),
            "block_out_channels": [rng.choice([4, 8, 8, 16, 32]) for _ in range(levels)],
            "norm_num_groups": rng.choice([1, 2, 4]),
            "attention_head_dim": rng.choice([None, 1, 4]),
            "resolution": rng.choice([4, 8, 16]),
        }
        bad = {
            "down_block_types": [[*changes["down_block_types"], "DownBlock2D"], ["KDownBlock2D"] * levels],
            "up_block_types": [changes["up_block_types"][1:] or ["DownBlock2D"], [""] * levels],
            "block_out_channels": [[1] * levels, [6, 31, 12][:levels]],
            "norm_num_groups": [5, 64],
            "attention_head_dim": [3, 64],
            "resolution": [1, 7, 10],
            "act_fn": ["elu"],
            "resnet_time_scale_shift": ["spatial", "scale_shift"],
            "time_embedding_type": ["learned", "fourier"],
            "downsample_padding": [0, 2],
        }
        for name in rng.sample(list(bad), rng.randrange(3)):
            changes[name] = rng.choice(bad[name])
        yield Case(changes=changes, named=(*changes, "sample_size", "groups", "KDown", "channels", "Skip"))


def sources_and_folders(rng):
    for split in ("test", "Train", "train ", "../train", "train[:5]", "\u8bad\u7ec3", "a" * 300):
        yield by_file_or_flag(rng, "split", split, "synthetic-faces has no split")
        case = by_file_or_flag(rng, "validation_split", split, "synthetic-faces has no split")
        yield replace(case, may_leave=("cache",))
    for name in ("a b", "../x", "a/b/c", "x" * 200, "--x", "a//b", "http://x", "~", "a\\b", ".", "/"):
        yield by_file_or_flag(rng, "dataset_name", name, name, "Hub")
    there = "train_unet.py"
    for path in (there, f"{there}/x", f"{there}/x/y", "/dev/null", "/dev/null/x"):
        yield by_file_or_flag(rng, "output_dir", path)
    for path in (there, f"{there}/x", "/dev/null", "/dev/null/x"):
        yield by_file_or_flag(rng, "cache_dir", path, "cache")
    for folder in ("nowhere", "train_unet.py", "train_unet.py/x", "x" * 300, "/dev/null", "\u0153/\u0153", "http://x"):
        yield Case(flags=["--dataset_name=null", f"--train_data_dir={folder}"], named=("folder", "train_data_dir"))


# The least numbers of refused and of valid cases; only impossible_networks may contain valid ones
GROUPS = {
    misspelt_names: (60, 0),
    junk_arguments: (120, 0),
    bad_values: (500, 0),
    absurd_values: (45, 0),
    broken_files: (90, 0),
    sources_and_folders: (40, 0),
    impossible_networks: (60, 20),
}


def complaint(call, capfd, named: tuple[str, ...], codes=(2,)) -> str | None:
    """None if a call exits with a code of `codes` and one line, "valid" if with 0, otherwise what is wrong."""
    capfd.readouterr()
    try:
        code = call()
    except BaseException as error:  # SystemExit of argparse among them
        return f"{type(error).__name__}: {str(error)[:300]}"
    if code == 0:
        return "valid"
    output = capfd.readouterr().err
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    if code not in codes or len(lines) != 1 or "Traceback" in output:
        return f"code {code}, {output[-500:]!r}"
    if len(lines[0]) > 1200:
        return f"the line has {len(lines[0])} characters: {lines[0][:200]}"
    if not lines[0].isprintable():
        return f"the line has control characters: {lines[0][:200]!r}"
    if "secret" in output:
        return f"the line reveals a secret: {lines[0]}"
    if not any(word in lines[0] for word in named):
        return f"{lines[0][:300]!r} has none of {str(named)[:200]}"
    return None


def outcomes(group, tmp_path: Path, capfd, dry_run: bool = True, codes=(2,)) -> tuple[Counter, list[str]]:
    """Runs a group of cases; returns the numbers of refused, valid and faulty ones, and the faults in words."""
    counts, faults = Counter(), []
    rng = random.Random(group.__name__)
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, case in enumerate(group(rng)):
        folder = tmp_path / str(number)
        folder.mkdir()
        own = {"output_dir": str(folder / "run"), "cache_dir": str(folder / "cache"), "dry_run": dry_run}
        document = case.file if case.file is not None else yaml.safe_dump(TINY | own | case.changes).encode()
        path = folder / "tiny.yaml"
        path.write_bytes(document)
        flags = [] if case.file is None else flags_of(TINY | own)
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = ["--config", str(path), *flags, *case.flags]
        fault = complaint(lambda arguments=arguments: train_unet.main(arguments), capfd, case.named, codes)
        left = {entry.name for entry in folder.iterdir()} - {*case.may_leave}
        if fault is None and left != {"tiny.yaml"}:
            fault = f"left {sorted(left)}"
        kind = "refused" if fault is None else "valid" if fault == "valid" else "fault"
        counts[kind] += 1
        if kind == "fault":
            faults.append(f"{str(case)[:300]}: {fault}")
        elif kind == "valid" and GROUPS.get(group, (0, 1))[1] == 0:
            faults.append(f"{str(case)[:300]}: accepted as valid")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before) / 1024
    if grown > MEBIBYTES_PER_GROUP:
        faults.append(f"the memory grew by {grown:.0f} MiB")
    AcceleratorState._reset_state(reset_partial_state=True)
    with capfd.disabled():
        print(f" {group.__name__}: {dict(counts)}", end="")
    return counts, faults


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_bad_configurations_exit_with_one_line_before_reading_data(group, tmp_path, capfd):
    counts, faults = outcomes(group, tmp_path, capfd)
    assert not faults, "\n".join([f"{len(faults)} faults", *faults])
    least_refused, least_valid = GROUPS[group]
    assert counts["refused"] >= least_refused
    assert counts["valid"] >= least_valid


def few_steps(rng):
    """Values that can fail only in use, and the extremes that the SDEs allow, in runs of one step."""
    for name, values in {
        "logging_dir": ["../../x", "logs\x00", "/dev/null/x"],
        "resume_from_checkpoint": ["", "\x1b"],
        "learning_rate": ["1e9", "nan", 100],
        "ema_inv_gamma": [1e-30, 1e9],
        "adam_beta1": [0, 0.9999999],
        "norm_eps": [1e-30, 1e9],
        "mid_block_scale_factor": [1e-30, 1e9],
        "max_grad_norm": [1e-30, 1e9],
        "snr_gamma": [1e-30, 1e9],
        "ddpm_num_steps": [2, 3, 100_000],
        "label_column": ["nowhere", "x1", "glasses"],
        "beta_end": [1e-4, 0.9],
        "num_epochs": [1e-30],
        "max_train_minutes": [1e-30],
    }.items():
        for value in values:
            case = by_file_or_flag(rng, name, value, "checkpoint", "beta", "gradients", "column")
            yield replace(case, may_leave=("cache", "run")) if name == "mid_block_scale_factor" else case
    sigmas, betas = {"sigma_min": [1e-5, 0.1], "sigma_max": [21, 1e6]}, {"sde_beta_min": [1e-30, 100]}
    ends = {
        "vp": betas | {"sde_beta_max": [12, 100], "likelihood_weighting": [True]},
        "subvp": betas | {"sde_beta_max": [12, 100], "prediction_type": ["sample"]},
        "ve": sigmas | {"likelihood_weighting": [True]},
        "edm": sigmas | {"sigma_data": [1e-3, 1e3], "noise_mean": [-6, 3], "noise_std": [1e-30, 100]},
    }
    for objective, options in ends.items():
        own = {"objective": objective, "time_embedding_type": "fourier" if objective == "ve" else "positional"}
        for _ in range(8):
            changes = own | {name: rng.choice(options[name]) for name in rng.sample(list(options), 2)}
            yield Case(changes=changes, named=("sigma", "sde_beta", "noise_mean"), may_leave=("cache",))


def test_one_step_runs_with_unusual_values_work_or_exit_with_one_line(tmp_path, capfd):
    counts, faults = outcomes(few_steps, tmp_path, capfd, dry_run=False, codes=(1, 2))
    assert not faults, "\n".join([f"{len(faults)} faults", *faults])
    assert counts["refused"] >= 10
    assert counts["valid"] >= 24


# ---- Command lines of the other commands

PIPELINE = "samples/celeba32_cpu/pipeline"
COMMANDS = {
    "generate": (generate.main, {"--pipeline": "nowhere", "--out": "OUT", "--num_images": "1"}),
    "evaluation": (evaluation.main, {"--pipeline": "nowhere", "--out": "OUT", "--reference": "synthetic-faces"}),
    "push": (export.main, {"push": None, "--pipeline": PIPELINE, "--repo_id": "someone/faces"}),
}
BAD_ARGUMENTS = {  # the bad values of each flag, separated by commas
    "generate": {
        "--num_images": f"0,-1,x,1.5,nan,{'9' * 5000},",
        "--seed": "-1,x,1e3",
        "--steps": "x,1.5,",
        "--eta": "x,,nan,-1,inf",
        "--scheduler": "euler2,,DDIM",
        "--batch_size": "0,-3,x",
        "--dtype": "fp64,float32",
        "--num_cpu_threads": "0,-1,x,1000000000",
        "--class_label": "x,1.5",
    },
    "evaluation": {
        "--num_images": f"0,-1,x,{'9' * 5000}",
        "--metrics": "fid2,",
        "--steps": "x,1.5",
        "--eta": "x,nan,-1",
        "--sampler": "euler2,",
        "--batch_size": "0,x",
        "--k": "0,x",
        "--ode_tolerance": "x,nan,0,-1",
        "--ode_images": "0,-1",
        "--bound_evaluations": "x,0,-1",
        "--cost_samplers": "x,ddim:0,ddim:5:nan",
        "--seed": "x,-1",
        "--num_cpu_threads": "0,-1,x,1000000000",
    },
    "push": {"--private": "maybe"},
}
JUNK = [["--stepz", "5"], ["5"], ["--"], ["--=1"], ["-q"], ["\x1b[2J"], ["a\nb"]]
JUNK += [["--token", "secret"], ["--token=secret"]]
BAD_FOLDERS = [["--out", path, "--pipeline", PIPELINE] for path in ("train_unet.py", "train_unet.py/x")]


def command_lines():
    for command, (main, base) in COMMANDS.items():
        changes = [[flag, value] for flag, values in BAD_ARGUMENTS[command].items() for value in values.split(",")]
        absent = [flag for flag in base if flag not in ("--out", "--num_images")]
        folders = BAD_FOLDERS if command == "generate" else []
        for extra in changes + JUNK + folders + [[flag] for flag in base if flag.startswith("--")]:
            yield command, main, base, extra
        for flag in absent:
            yield command, main, {name: value for name, value in base.items() if name != flag}, []


def test_bad_command_lines_of_other_commands_exit_with_one_line(tmp_path, capfd):
    counts, faults = Counter(), []
    for number, (command, main, base, extra) in enumerate(command_lines()):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = [part for flag, value in base.items() for part in ([flag] if value is None else [flag, value])]
        arguments = [str(folder / "out") if part == "OUT" else part for part in arguments] + extra
        named = (extra[0], "unrecognized arguments") if extra and extra not in JUNK else ("",)
        fault = complaint(lambda main=main, arguments=arguments: main(arguments), capfd, named)
        if fault is None and list(folder.iterdir()):
            fault = "made its folder"
        counts[command] += 1
        if fault:
            faults.append(f"{command} {str(extra or list(base))[:100]}: {fault}")
    with capfd.disabled():
        print(f" command lines: {dict(counts)}", end="")
    assert not faults, "\n".join([f"{len(faults)} faults", *faults])
    assert sum(counts.values()) >= 100
