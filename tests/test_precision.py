"""`--mixed_precision auto` chooses a precision, keeps it on resume and agrees across processes (injected timings)."""

import os

import pytest
import torch
import yaml
from tiny_training import TINY

from custom_unet import CustomUNet2DModel
from training import precision
from training.checkpoint import read_state
from training.config import TrainConfig

pytest_plugins = ["tiny_training"]
SLOW_BF16, FAST_BF16 = {"no": 0.1, "bf16": 0.2}, {"no": 0.4, "bf16": 0.2}


@pytest.mark.parametrize(
    ("seconds", "others", "chosen", "message"),
    [
        (SLOW_BF16, FAST_BF16, "no", "70.0 images/s with no against 35.0 images/s with bf16; using no"),
        (FAST_BF16, SLOW_BF16, "bf16", "17.5 images/s with no against 35.0 images/s with bf16; using bf16"),
    ],
)
def test_auto_takes_the_faster_precision_and_keeps_it(seconds, others, chosen, message, train, tmp_path, monkeypatch):
    run, auto = tmp_path / "run", ["--mixed_precision", "auto"]
    monkeypatch.setattr(precision, "update_seconds", lambda *_: seconds)
    output = train(run, *auto, max_train_steps=3)
    assert f"--mixed_precision auto: {message}\n" in output
    assert f"precision {chosen}\n" in output
    assert yaml.safe_load((run / "config.yaml").read_text())["mixed_precision"] == chosen

    (run / "config.yaml").unlink()  # the checkpoint records it
    monkeypatch.setattr(precision, "update_seconds", lambda *_: others)
    assert f"--mixed_precision auto: {chosen}, as in the checkpoint\n" in train(run, *auto, max_train_steps=6)
    assert read_state(run / "checkpoint-6")["mixed_precision"] == chosen
    output = train(run, *auto, "--overwrite_output_dir", max_train_steps=1)
    assert f"using {min(others, key=others.get)}\n" in output


def test_timing_uses_both_precisions_and_restores_the_generator(monkeypatch):
    config, seen = TrainConfig(**TINY | {"gradient_checkpointing": True, "channels_last": True}), []

    class Watched(CustomUNet2DModel):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.conv_in.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))

    monkeypatch.setattr(precision, "CustomUNet2DModel", Watched)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    seconds = precision.update_seconds(config, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert min(seconds.values()) > 0
    assert seen == [torch.float32, torch.bfloat16] * (precision.WARM_UP_UPDATES + precision.TIMED_UPDATES)


def different_on_each_process() -> None:
    """Float32 is faster on the main process, bf16 on the other."""
    fast = {"0": "no", "1": "bf16"}[os.environ["RANK"]]
    precision.update_seconds = lambda *_: {name: 0.1 if name == fast else 0.2 for name in ("no", "bf16")}


def test_all_processes_use_the_choice_of_the_main_process(start, tmp_path):
    flags = ["--mixed_precision", "auto", "--max_train_steps", "3"]
    output = start(tmp_path / "run", *flags, num_processes=2, fault=different_on_each_process).finish(0)
    assert output.count("--mixed_precision auto: ") == 1
    assert "using no" in output
    assert read_state(tmp_path / "run" / "checkpoint-3")["mixed_precision"] == "no"
