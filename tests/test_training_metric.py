"""FID and KID during training, with a stand-in for Inception: the value, the best weights, and failures."""

import json
import os
import signal
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_training import TINY, assert_same_tensors, error_line, full_disk_at, records, signal_at
from torch import Tensor

import train_unet
from eval import training_metric
from eval.distances import frechet_distance, kernel_distance
from eval.features import images_of_store
from pipelines import CustomUNetPipeline
from training import training_data
from training.checkpoint import verify_checkpoint
from training.config import TrainConfig
from training.processes import build_accelerator

pytest_plugins = ["tiny_training"]
METRIC = ["--metric", "fid", "--metric_images", "20"]
VALUES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 9: 1.5, 10: 7.0, 11: 8.0}  # by step


class StandIn:
    """A random network of 8 features."""

    name, mode, sha256 = "stand-in", "clean", "0" * 64

    def __init__(self, *, path: Path | None = None, device: torch.device | str = "cpu"):
        self.matrix = torch.randn(3 * 8 * 8, 8, generator=torch.Generator().manual_seed(0)) / 10

    def __call__(self, images: Tensor) -> Tensor:
        return torch.tanh((images.flatten(1) / 128 - 1) @ self.matrix)


def patch_inception(cache: Path, *faults) -> None:
    """Replaces Inception by the stand-in in a separate process and injects the faults."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    training_metric.find_weights = lambda path: None
    training_metric.open_inception = StandIn
    for fault in faults:
        fault()


def values_by_step() -> None:
    training_metric.TrainingMetric.measure = lambda self, step, should_stop, tell: VALUES[step]


def act_at_batch(action, *counts: int) -> None:
    """Performs an action at the given batches of images in this process."""
    features, seen = training_metric.TrainingMetric.features, 0

    def act_or_draw(self, seeds, should_stop):
        nonlocal seen
        seen += 1
        if seen in counts:
            action()
        return features(self, seeds, should_stop)

    training_metric.TrainingMetric.features = act_or_draw


def fail() -> None:
    raise OSError("no\nimages")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(training_metric, "find_weights", lambda path: None)
    monkeypatch.setattr(training_metric, "open_inception", StandIn)


@pytest.mark.parametrize(
    ("changes", "sampler", "steps"),
    [
        ({"metric": "fid"}, "unipc", 20),
        ({"metric": "kid", "objective": "edm", "label_column": "eye_colour"}, "edm_heun", 18),  # with classes
        (
            {"metric": "fid", "ddpm_num_steps": 15, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            "unipc",
            15,
        ),
    ],
)
def test_metric_matches_images_generated_from_the_seeds(changes, sampler, steps, make_trainer, stand_in, capfd):
    trainer, metric = make_trainer(metric_images=20, **changes), changes["metric"]
    for _ in range(3):
        trainer.training_step()
    trainer.first_step = 3
    exported = trainer.pipeline.scheduler
    trainer.measure()
    assert trainer.pipeline.scheduler is exported
    pipeline = CustomUNetPipeline(trainer.ema_network, trainer.pipeline.scheduler)
    pipeline.set_sampler(sampler)
    classes = trainer.data.label_names
    labels = {"class_labels": [seed % len(classes) for seed in range(20)]} if "label_column" in changes else {}
    images = pipeline(seeds=range(20), num_inference_steps=steps, **labels).images
    generated = torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in images]))
    chosen = torch.from_numpy(images_of_store(trainer.data.store, 20).read(range(20)))
    real, generated = (StandIn()(images).numpy() for images in (chosen, generated))
    distances = {"fid": frechet_distance(real, generated), "kid": kernel_distance(real, generated, seed=0).mean}
    value = records(trainer.output_dir, metric)[3]
    assert value == pytest.approx(distances[metric], rel=1e-4)
    title = metric.upper()
    assert f"step 3: {title} {value:.4g} (best {value:.4g} at step 3)" in "".join(capfd.readouterr())
    assert json.loads((trainer.best_dir / "training.json").read_text())["metric"] == {
        "name": metric,
        "value": value,
        "num_images": 20,
        "step": 3,
        "data": trainer.data.store.fingerprint,
        "features": StandIn.name,
        "sampler": sampler,
        "steps": steps,
    }
    assert f"the lowest {title} measured during training" in (trainer.best_dir / "README.md").read_text()


def test_best_weights_survive_a_kill_until_the_measurement_or_run_changes(start, tmp_path):
    """The kill comes after the old folder is moved away and before the new one is in place."""
    run, flags = tmp_path / "run", [*METRIC, "--metric_steps", "2", "--checkpointing_steps", "4"]
    flags += ["--checkpoints_total_limit", "null"]
    patched = partial(patch_inception, tmp_path / "cache", values_by_step)
    kill = partial(signal_at, signal.SIGKILL, "os.rename", "best_pipeline", 3)
    start(run, *flags, fault=partial(patched, kill)).finish(-signal.SIGKILL)
    assert not (run / "best_pipeline").exists()
    output = start(run, *flags, fault=patched).finish(0)
    assert "FID of 20 images every 2 updates" in output
    assert "step 8: FID 2.5 (best 1 at step 4)" in output
    assert f"the best by FID is {run / 'best_pipeline'}: 1 at step 4" in output
    assert records(run, "fid") == {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 9: 1.5}
    best = load_file(run / "best_pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    ema = load_file(run / "checkpoint-4" / "ema_unet.safetensors")
    assert all(torch.equal(best[key], ema[key]) for key in ema)

    other = ["--metric_images", "12", "--max_train_steps", "11"]
    output = start(run, *flags, *other, fault=patched).finish(0)
    (line,) = [line for line in output.splitlines() if "another measurement" in line]
    assert "step 10: FID 7 (best 7 at step 10)" in line
    assert "(num_images: 20 -> 12) and is replaced" in line
    assert json.loads((run / "best_pipeline" / "training.json").read_text())["metric"]["step"] == 10
    start(run, "--overwrite_output_dir", "--max_train_steps", "1").finish(0)
    assert not (run / "best_pipeline").exists()


def test_metric_does_not_change_the_losses_even_if_it_fails(start, tmp_path):
    start(tmp_path / "without").finish(0)
    patched = partial(patch_inception, tmp_path / "cache")
    some_fail = partial(patched, partial(act_at_batch, fail, 1, 5))
    output = start(tmp_path / "with", *METRIC, "--metric_steps", "3", fault=some_fail).finish(0)
    for step in (3, 9):
        assert f"step {step}: FID could not be measured, training goes on: no images" in output.splitlines()
    assert records(tmp_path / "with", "fid").keys() == {6}
    assert records(tmp_path / "with", "loss") == records(tmp_path / "without", "loss")
    assert_same_tensors(tmp_path / "with" / "checkpoint-9", tmp_path / "without" / "checkpoint-9")
    # a measurement that failed in the last step is repeated by the next start
    start(tmp_path / "with", *METRIC, "--metric_steps", "3", fault=patched).finish(0)
    assert records(tmp_path / "with", "fid").keys() == {6, 9}


def test_full_disk_while_saving_the_best_weights_ends_the_run(start, tmp_path):
    run, flags = tmp_path / "run", [*METRIC, "--metric_steps", "3"]
    fault = partial(patch_inception, tmp_path / "cache", partial(full_disk_at, 5000, "os.mkdir", ".tmp-best"))
    assert f"could not write {run / 'best_pipeline'}" in error_line(start(run, *flags, fault=fault).finish(1))
    assert not (run / "best_pipeline").exists()
    verify_checkpoint(run / "checkpoint-3")


def as_process(rank: int, port: int) -> None:
    """Sets the environment in which torchrun starts one of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_two_processes_measure_the_value_of_one_and_agree_on_failures(start, tmp_path, stand_in):
    """Process 1 fails after step 3 and receives SIGTERM in the measurement after step 9."""
    run, flags = tmp_path / "run", [*METRIC, "--metric_steps", "3"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    second = [partial(act_at_batch, fail, 1), partial(act_at_batch, stop, 4)]
    jobs = [
        start(run, *flags, fault=partial(patch_inception, tmp_path / "cache", partial(as_process, rank, port), *more))
        for rank, more in enumerate([[], second])
    ]
    output = jobs[0].finish(0) + jobs[1].finish(128 + signal.SIGTERM)
    assert output.count("step 3: FID could not be measured, training goes on: no images") == 1
    assert output.count("step 9: FID given up, the run is to stop") == 1
    assert records(run, "fid").keys() == {6}

    AcceleratorState._reset_state(reset_partial_state=True)
    config = TrainConfig(**yaml.safe_load((run / "config.yaml").read_text()))
    store = training_data.open_image_store(**config.data_source(), split="train", max_images=config.max_images)
    pipeline = CustomUNetPipeline.from_pretrained(run / "best_pipeline")
    metric = training_metric.TrainingMetric(config, store, pipeline, build_accelerator(config))
    assert metric.measure(6, lambda: False, print) == pytest.approx(records(run, "fid")[6], rel=1e-5)
    asked = []
    assert metric.measure(6, lambda: asked.append(1) or len(asked) == 3, asked.append) is None
    assert asked == [1, 1, 1, "step 6: FID given up, the run is to stop"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*METRIC, "--inception_path", "nowhere.pt"], "--inception_path nowhere.pt is not a file"),
        ([*METRIC, "--inception_path", __file__], "is damaged or not Inception"),
        (["--metric", "kid"], "50 training images are fewer than --metric_images 2048"),
        (["--metric", "fid", "--metric_images", "1"], "--metric_images is 1; it must be at least 2"),
        (["--metric_steps", "9"], "without --metric"),
        (["--metric", "is"], "--metric"),
    ],
)
def test_bad_metric_settings_are_rejected_before_anything_is_written(flags, message, tmp_path, cache_dir, capfd):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    own = ["--config", tmp_path / "tiny.yaml", "--output_dir", tmp_path / "run", "--cache_dir", cache_dir]
    assert train_unet.main([str(part) for part in (*own, *flags)]) == 2
    assert message in error_line(capfd.readouterr().err)
    assert not (tmp_path / "run").exists()
