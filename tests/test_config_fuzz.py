"""Hundreds of bad configurations from a fixed seed: each exits with code 2 and one line before any data is read."""

import random
import typing

import pytest
import yaml
from accelerate.state import AcceleratorState
from tiny_training import TINY

import train_unet
from training.config import LIMITS, TYPES

TINY = TINY | {"max_images": 20, "train_batch_size": 4, "gradient_accumulation_steps": 1, "lr_warmup_steps": 0}
TINY |= {"max_train_steps": 1, "eval_batch_size": 1, "ddpm_num_inference_steps": 2, "post_hoc_ema": False}


def kind_of(name: str):
    """The kind of an option: int, float, bool, str, "choice" or "list"."""
    annotation = TYPES[name]
    if type(None) in typing.get_args(annotation):
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return {typing.Literal: "choice", list: "list"}.get(typing.get_origin(annotation), annotation)


# ---- Groups of cases: changes of the file TINY or another file, flags, and words of which one is in the error line


BAD_VALUES = {
    int: ["big", "1.5", "1e3", "0x10", "None", "true", "1,000", "9" * 5000],
    float: ["fast", "1,5", "1e", "1.0.0", "1 2", "true", "nan", "inf"],
    bool: ["maybe", "2", "on off", "-1"],
    "choice": ["other", "LINEAR", " linear", "x" * 5000],
    str: [""],
    "list": [""],
}


def bad_values(rng):
    for name, limits in LIMITS.items():
        kind = kind_of(name)
        values = rng.sample(BAD_VALUES[kind], min(3, len(BAD_VALUES[kind])))
        if limits.get("min") == 1 or "above" in limits:
            values += ["0", "-1"]
        if "max" in limits:
            values += [str(2 * limits["max"])]
        for value in values:
            yield {}, [f"--{name}={value}"], [name]
        if kind in (str, "choice") and name != "in_channels":
            yield {name: rng.choice([5, 1.5, False, {"a": 1}])}, [], [name]
        if kind is not bool:
            yield {}, [f"--{name}"], [name]
        if type(None) not in typing.get_args(TYPES[name]):
            yield {name: None}, [], [name]


def broken_files(rng):
    documents = [
        "", "5", "text", "- a\n- b", "{}: {}", "a: [b", "a: 'b", "a: b: c", "\ta: 1", "a: *b", "1: 2", "null: 3",
        "--- 1\n--- 2", "seed: !!python/object:os.system [x]", "split: !!python/object/apply:os.system ['exit 1']",
        "seed: !!int x", "split: 2026-99-99", "split: 2026-01-01", "seed: @1", "seed: .inf", "resolution: 8 8",
        "block_out_channels: [8, .nan]", "dataset_name: [synthetic-faces]", "dataset_name: yes",
        "mixed_precision: no", "resolution: 8.0", "hub_token: secret", "output_dir: 0123",
    ]  # fmt: skip
    good = yaml.safe_dump(TINY)
    for _ in range(15):
        at = rng.randrange(len(good) - 40)
        documents += [good[:at] + rng.choice(["\x00", "\x80", "\n\t\t: [", "\n'", "\n}", "\n%"]) + good[at:]]
    documents = [document.encode() for document in documents]
    documents += [rng.randbytes(rng.randrange(1, 5000)) for _ in range(15)]
    for document in documents:
        yield document, [], ["tiny.yaml", "unknown flag", "HF_TOKEN", *TYPES]
    for path in ("/", "nowhere.yaml", "x" * 5000):
        yield {}, ["--config", path], ["configuration"]


def complaint(call, capfd, words: list[str]) -> str | None:
    """None if a call exits with code 2 and one line, otherwise what is wrong."""
    capfd.readouterr()
    try:
        code = call()
    except BaseException as error:  # SystemExit of argparse among them
        return f"{type(error).__name__}: {str(error)[:300]}"
    output = capfd.readouterr().err
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    if code != 2 or len(lines) != 1 or "Traceback" in output:
        return f"code {code}, {output[-500:]!r}"
    if len(lines[0]) > 6000 or "secret" in output or not any(word in lines[0] for word in words):
        return f"{lines[0][:300]!r} is too long, reveals a secret, or has none of {str(words)[:200]}"
    return None


@pytest.mark.parametrize("group", [bad_values, broken_files])
def test_bad_configurations_exit_with_one_line_before_reading_data(group, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    faults = []
    for number, (file, flags, words) in enumerate(group(random.Random(group.__name__))):
        folder = tmp_path / str(number)
        folder.mkdir()
        own = TINY | {"output_dir": str(folder / "run"), "cache_dir": str(folder / "cache"), "dry_run": True}
        document = yaml.safe_dump(own | file).encode() if isinstance(file, dict) else file
        (folder / "tiny.yaml").write_bytes(document)
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = ["--config", str(folder / "tiny.yaml"), *flags]
        fault = complaint(lambda arguments=arguments: train_unet.main(arguments), capfd, words)
        if fault is None and len(list(folder.iterdir())) > 1:
            fault = "left files"
        if fault:
            faults.append(f"{file}, {flags}: {fault}")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not faults, "\n".join([f"{len(faults)} faults", *faults])
