"""`--mixed_precision auto` chooses a precision, keeps it on resume and agrees across processes (injected timings)."""

import os

import pytest
import torch
import yaml
from tiny_training import TINY, assert_same_file, assert_same_tensors, records

from custom_unet import CustomUNet2DModel
from training import precision
from training.checkpoint import read_state
from training.config import TrainConfig

pytest_plugins = ["tiny_training"]

SLOW_BF16, FAST_BF16 = {"no": 0.1, "bf16": 0.2}, {"no": 0.4, "bf16": 0.2}


@pytest.fixture
def timings(monkeypatch):
    """Replaces the result of the timing, which still runs; with None, it must not run."""
    update_seconds = precision.update_seconds

    def inject(seconds: dict[str, float] | None) -> None:
        def injected(*arguments):
            assert seconds is not None, "timed"
            assert update_seconds(*arguments).keys() == seconds.keys()
            return seconds

        monkeypatch.setattr(precision, "update_seconds", injected)

    return inject


AUTO = ("--mixed_precision", "auto")


@pytest.mark.parametrize(
    ("seconds", "chosen", "message"),
    [
        (SLOW_BF16, "no", "70.0 images/s with no against 35.0 images/s with bf16; using no"),
        (FAST_BF16, "bf16", "17.5 images/s with no against 35.0 images/s with bf16; using bf16"),
    ],
)
def test_auto_trains_like_an_explicit_choice_of_the_faster_precision(
    seconds, chosen, message, timings, train, tmp_path
):
    timings(seconds)
    assert f"--mixed_precision auto: {message}\n" in train(tmp_path / "auto", *AUTO, max_train_steps=3)
    assert yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["mixed_precision"] == chosen
    timings(None)
    train(tmp_path / "explicit", "--mixed_precision", chosen, max_train_steps=3)
    assert records(tmp_path / "auto", "loss") == records(tmp_path / "explicit", "loss")
    assert_same_tensors(tmp_path / "auto" / "checkpoint-3", tmp_path / "explicit" / "checkpoint-3")


def test_resuming_keeps_the_choice_and_a_run_from_scratch_is_timed_again(timings, train, tmp_path):
    run = tmp_path / "run"
    timings(FAST_BF16)
    train(run, *AUTO, max_train_steps=3)
    (run / "config.yaml").unlink()  # the checkpoint records it
    timings(None)
    assert "--mixed_precision auto: bf16, as in the checkpoint\n" in train(run, *AUTO, max_train_steps=6)
    assert read_state(run / "checkpoint-6")["mixed_precision"] == "bf16"
    other = ["--resume_from_checkpoint", run / "checkpoint-3"]
    assert "bf16, as in the checkpoint" in train(tmp_path / "other", *AUTO, *other, max_train_steps=6)
    assert_same_file(tmp_path / "other" / "checkpoint-6", run / "checkpoint-6", "unet")
    timings(SLOW_BF16)
    assert "using no" in train(run, *AUTO, "--overwrite_output_dir", max_train_steps=1)


def test_timing_uses_every_precision_and_restores_the_generator():
    config, seen = TrainConfig(**TINY | {"gradient_checkpointing": True, "channels_last": True}), []

    class Watched(CustomUNet2DModel):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.conv_in.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))

    torch.manual_seed(3)
    before = torch.get_rng_state()
    seconds = precision.update_seconds(config, Watched, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert min(seconds.values()) > 0
    number = precision.WARM_UP_UPDATES + precision.TIMED_UPDATES
    assert seen == [torch.float32, torch.bfloat16] * number


def test_old_gpus_are_timed_with_fp16(monkeypatch):
    assert precision.half_precision(torch.device("cpu")) == "bf16"
    for has_bf16, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        assert precision.half_precision(torch.device("cuda")) == expected


def test_float32_that_does_not_fit_is_never_the_faster(monkeypatch):
    def loss(unet, *arguments, **settings):
        if unet.args[1] is torch.float32:
            raise torch.OutOfMemoryError("out of memory")
        return next(unet.args[0].parameters()).sum()

    monkeypatch.setattr(precision, "diffusion_loss", loss)
    seconds = precision.update_seconds(TrainConfig(**TINY), CustomUNet2DModel, torch.device("cpu"))
    assert seconds["no"] == float("inf") > seconds["bf16"]


def different_on_each_process() -> None:
    """Float32 is faster on the main process, bf16 on the other."""
    fast = {"0": "no", "1": "bf16"}[os.environ["RANK"]]
    precision.update_seconds = lambda *_: {name: 0.1 if name == fast else 0.2 for name in ("no", "bf16")}


def test_all_processes_use_the_choice_of_the_main_process(start, tmp_path):
    job = start(tmp_path / "run", *AUTO, "--max_train_steps", "3", num_processes=2, fault=different_on_each_process)
    output = job.finish(0)
    assert output.count("--mixed_precision auto: ") == 1
    assert "using no" in output
    assert read_state(tmp_path / "run" / "checkpoint-3")["mixed_precision"] == "no"
