"""FID and KID during training, with a stand-in for Inception: the value, the best weights, and failures."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stand_in_networks import StandInExtractor
from tiny_training import assert_same_tensors, error_line, records, signal_at

from eval import training_metric
from eval.distances import frechet_distance, kernel_distance
from eval.features import subset
from pipelines import CustomUNetPipeline
from training.log import report_metric

pytest_plugins = ["tiny_training"]
METRIC = ["--metric", "fid", "--metric_images", "20"]


def patch_inception(cache: Path, *faults) -> None:
    """Replaces Inception by the stand-in in a separate process and injects the faults."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    training_metric.open_inception = lambda **_: StandInExtractor()
    for fault in faults:
        fault()


def values_are(*values: float) -> None:
    """Injects the values of the measurements of this process."""
    left = iter(values)
    training_metric.TrainingMetric.measure = lambda self, should_stop: next(left)


def fail_at_batches(*numbers: int) -> None:
    """Makes the given batches of images fail in this process."""
    features, seen = training_metric.TrainingMetric.features, []

    def fail_or_draw(self, seeds, should_stop):
        seen.append(seeds)
        if len(seen) in numbers:
            raise OSError("no\nimages")
        return features(self, seeds, should_stop)

    training_metric.TrainingMetric.features = fail_or_draw


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(training_metric, "open_inception", lambda **_: StandInExtractor())


@pytest.mark.parametrize(
    ("changes", "sampler", "steps"),
    [
        ({"metric": "fid", "rescale_betas_zero_snr": True}, "dpmpp_2m", 20),
        ({"metric": "fid", "ddpm_num_steps": 15, "time_embedding_type": "learned"}, "unipc", 15),
        ({"metric": "kid", "objective": "edm", "label_column": "eye_colour"}, "edm_heun", 18),  # with classes
    ],
)
def test_metric_matches_images_generated_from_the_seeds(changes, sampler, steps, make_trainer, stand_in, capfd):
    trainer, metric = make_trainer(metric_images=20, **changes), changes["metric"]
    for _ in range(3):
        trainer.training_step()
    exported = trainer.pipeline.scheduler
    report_metric(trainer)
    assert trainer.pipeline.scheduler is exported
    pipeline = CustomUNetPipeline(trainer.ema_network, trainer.pipeline.scheduler)
    pipeline.set_sampler(sampler)
    classes = trainer.data.label_names
    labels = {"class_labels": [seed % len(classes) for seed in range(20)]} if "label_column" in changes else {}
    images = pipeline(seeds=range(20), num_inference_steps=steps, **labels).images
    generated = torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in images]))
    chosen = torch.from_numpy(trainer.data.store.images[subset(len(trainer.data.store), 20)])
    real, generated = (StandInExtractor()(images).numpy() for images in (chosen, generated))
    distances = {"fid": frechet_distance(real, generated), "kid": kernel_distance(real, generated, seed=0)["value"]}
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
        "features": StandInExtractor.name,
        "sampler": sampler,
        "steps": steps,
    }
    assert f"the lowest {title} measured during training" in (trainer.best_dir / "README.md").read_text()


def test_stop_interrupts_the_measurement(make_trainer, stand_in, capfd):
    trainer = make_trainer(metric="fid", metric_images=20)
    extract = trainer.metric.extractor
    trainer.metric.extractor = lambda images: setattr(trainer.stop, "number", signal.SIGTERM) or extract(images)
    report_metric(trainer)
    assert "step 0: FID could not be measured: the run is stopping" in "".join(capfd.readouterr())
    assert not trainer.best_dir.exists()


def test_best_weights_survive_a_kill_until_the_measurement_or_run_changes(start, tmp_path):
    """The kill comes after the old folder is moved away and before the new one is in place."""
    run, flags = tmp_path / "run", [*METRIC, "--metric_steps", "2", "--checkpointing_steps", "4"]
    flags += ["--checkpoints_total_limit", "null"]
    patched = partial(patch_inception, tmp_path / "cache")
    kill = partial(signal_at, signal.SIGKILL, "os.rename", "best_pipeline", 3)
    start(run, *flags, fault=partial(patched, partial(values_are, 3.0, 1.0), kill)).finish(-signal.SIGKILL)
    assert not (run / "best_pipeline").exists()
    output = start(run, *flags, fault=partial(patched, partial(values_are, 2.0, 2.5, 1.5))).finish(0)
    assert "step 8: FID 2.5 (best 1 at step 4)" in output
    assert records(run, "fid") == {2: 3.0, 6: 2.0, 8: 2.5, 9: 1.5}
    best = load_file(run / "best_pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    ema = load_file(run / "checkpoint-4" / "ema_unet.safetensors")
    assert all(torch.equal(best[key], ema[key]) for key in ema)

    other = ["--metric_images", "12", "--max_train_steps", "11"]
    output = start(run, *flags, *other, fault=partial(patched, partial(values_are, 7.0, 8.0))).finish(0)
    assert "step 10: FID 7 (best 7 at step 10)" in output
    assert json.loads((run / "best_pipeline" / "training.json").read_text())["metric"]["step"] == 10
    start(run, "--overwrite_output_dir", "--max_train_steps", "1").finish(0)
    assert not (run / "best_pipeline").exists()


def test_metric_does_not_change_the_losses_even_if_it_fails(start, straight, tmp_path):
    run, patched = tmp_path / "run", partial(patch_inception, tmp_path / "cache")
    some_fail = partial(patched, partial(fail_at_batches, 1, 5))
    output = start(run, *METRIC, "--metric_steps", "3", fault=some_fail).finish(0)
    for step in (3, 9):
        assert f"step {step}: FID could not be measured: no images" in output.splitlines()
    assert records(run, "fid").keys() == {6}
    assert records(run, "loss") == records(straight, "loss")
    assert_same_tensors(run / "checkpoint-9", straight / "checkpoint-9")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*METRIC, "--inception_path", "nowhere.pt"], "nowhere.pt is not a file"),
        ([*METRIC, "--inception_path", __file__], "is damaged or not Inception"),
        (["--metric", "kid"], "50 training images are fewer than --metric_images 2048"),
        (["--metric_steps", "9"], "without --metric"),
    ],
)
def test_bad_metric_settings_are_rejected_before_anything_is_written(flags, message, train, tmp_path):
    assert message in error_line(train(tmp_path / "run", *flags, code=2))
    assert not (tmp_path / "run").exists()
