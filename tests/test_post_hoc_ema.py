"""Averages of any length, reconstructed after training, compared with explicit weighted sums of the trajectory."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import error_line, new_trainer

from pipelines import CustomUNetPipeline
from pipelines.post_hoc_ema import main
from training.post_hoc_ema import (
    LARGEST_SIGMA_REL,
    STORED,
    combine_profiles,
    power_of,
    start_averages,
    update_averages,
)

pytest_plugins = ["tiny_training"]


def profile(step: int, sigma_rel: float) -> np.ndarray:
    """Weights of the updates 1 to `step` in the average, float64 (step,); they sum to 1."""
    borders = (np.arange(step + 1) / step) ** (power_of(sigma_rel) + 1)
    return np.diff(borders)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.1, LARGEST_SIGMA_REL])
def test_sigma_rel_is_the_standard_deviation_of_the_profile(sigma_rel):
    step = 100_000
    weights, positions = profile(step, sigma_rel), (np.arange(step) + 0.5) / step
    mean = weights @ positions
    assert np.sqrt(weights @ (positions - mean) ** 2) == pytest.approx(sigma_rel, rel=1e-5)


def test_updates_reproduce_the_profile_and_skip_frozen_parameters():
    torch.manual_seed(0)
    network = torch.nn.Linear(5, 3).double()
    network.bias.requires_grad_(False)
    averages, trajectory = start_averages(network), []
    for step in range(1, 301):
        with torch.no_grad():
            network.weight.add_(torch.randn_like(network.weight))
        trajectory.append(network.weight.detach().numpy().ravel().copy())
        update_averages(averages, network, step)
    assert averages.keys() == STORED.keys()
    for stem, tensors in averages.items():
        assert tensors.keys() == {"weight"}
        expected = profile(300, STORED[stem]) @ np.array(trajectory)
        np.testing.assert_allclose(tensors["weight"].numpy().ravel(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.1, 0.25])
def test_profile_error_matches_that_of_explicit_weights(sigma_rel):
    """Compared with the weights of single updates, which approach the profile as their number grows."""
    steps = [500, 1000, 1500, 2000]
    factors, error = combine_profiles(steps, 2000, sigma_rel)
    assert factors.sum() == pytest.approx(1, abs=1e-9)
    combined = np.zeros(2000)
    for step, row in zip(steps, factors, strict=True):
        for value, factor in zip(STORED.values(), row, strict=True):
            combined[:step] += factor * profile(step, value)
    target = profile(2000, sigma_rel)
    expected = np.linalg.norm(combined - target) / np.linalg.norm(target)
    assert error == pytest.approx(expected, rel=0.02, abs=1e-6)


# A run and the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir):
    """The output folder of a run of 40 updates and the weights after each update by name, float64 (40, ...)."""
    changes = {"max_train_steps": 40, "checkpointing_steps": 40, "lr_scheduler": "constant_with_warmup"}
    changes |= {"output_dir": str(tmp_path_factory.mktemp("trained") / "run"), "cache_dir": str(cache_dir)}
    trainer = new_trainer(learning_rate=1e-2, **changes)
    trajectory, make_step = [], trainer.training_step

    def recorded_step():
        result = make_step()
        trajectory.append({name: p.detach().double().clone() for name, p in trainer.network.named_parameters()})
        return result

    trainer.training_step = recorded_step
    trainer.train()
    trainer.lock.release()
    return trainer.output_dir, {name: torch.stack([weights[name] for weights in trajectory]) for name in trajectory[0]}


def reconstruct(run, out, *flags) -> int:
    return main([str(part) for part in ("--run", run, "--out", out, *flags)])


@pytest.mark.parametrize(("step", "sigma_rel"), [(None, 0.075), (30, 0.12)])
def test_command_exports_the_average_of_the_trajectory(trained, tmp_path, step, sigma_rel, capsys):
    """From 20 or 15 snapshots in half precision."""
    run, trajectory = trained
    out, end = tmp_path / "averaged", step or 40
    assert reconstruct(run, out, "--sigma_rel", sigma_rel, *(["--step", step] if step else [])) == 0
    assert f"step {end}, sigma_rel {sigma_rel}, from {end // 2} snapshots" in capsys.readouterr().out
    pipeline = CustomUNetPipeline.from_pretrained(out)
    assert len(pipeline(batch_size=2, num_inference_steps=2).images) == 2
    weights = torch.from_numpy(profile(end, sigma_rel))
    distances, errors = [], []
    for name, found in pipeline.unet.named_parameters():
        path = trajectory[name][:end]
        expected = torch.tensordot(weights, path, 1)
        distances.append((path[-1] - expected).square().sum())
        errors.append((found.detach() - expected).square().sum())
    assert (sum(errors) / sum(distances)).sqrt() < 0.02

    facts = json.loads((out / "training.json").read_text())
    assert (facts["step"], facts["images_seen"], facts["heldout"]) == (end, 14 * end, None)
    assert (facts["post_hoc_ema"]["sigma_rel"], facts["post_hoc_ema"]["num_snapshots"]) == (sigma_rel, end // 2)
    card = (out / "README.md").read_text()
    assert f"power function of relative standard deviation {sigma_rel}, chosen after the training" in card
    assert "karras2024analyzing" in card
    assert not (out / "samples.png").exists()


def test_checkpoints_also_serve_as_snapshots(trained, tmp_path, capsys):
    run = shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(run / "ema_snapshots" / "checkpoint-40")
    assert reconstruct(run, tmp_path / "out", "--sigma_rel", "0.05") == 0
    assert "step 40, sigma_rel 0.05, from 20 snapshots" in capsys.readouterr().out
    found = CustomUNetPipeline.from_pretrained(tmp_path / "out").unet.state_dict()
    for name, value in load_file(run / "checkpoint-40" / "ema_sigma_rel_0.05.safetensors").items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sigma_rel", "0.3"], "--sigma_rel is 0.3"),
        (["--sigma_rel", "0.1", "--step", "39"], "--step 39 has no snapshot"),
        (["--sigma_rel", "0.1", "--run", "nowhere"], "no averages to reconstruct from"),
    ],
)
def test_bad_input_exits_with_code_2_and_one_line(trained, tmp_path, flags, message, capsys):
    assert reconstruct(trained[0], tmp_path / "out", *flags) == 2
    assert message in error_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_damaged_snapshot_exits_with_code_1_and_one_line(trained, tmp_path, capsys):
    run = shutil.copytree(trained[0], tmp_path / "run")
    path = run / "ema_snapshots" / "checkpoint-12" / "ema_sigma_rel_0.10.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert reconstruct(run, tmp_path / "out", "--sigma_rel", "0.1") == 1
    assert str(path) in error_line(capsys.readouterr().err)
