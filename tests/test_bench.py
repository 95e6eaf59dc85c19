"""The benchmark: what it times, and its rows."""

from dataclasses import replace

import pytest
import torch

from experiments import bench
from experiments.architecture import ANY_DATA
from experiments.bench import main, training_update
from training.arguments import parse_config

TINY = "--resolution 8 --down_block_types DownBlock2D --up_block_types UpBlock2D --block_out_channels 8"
TINY += " --layers_per_block 1 --norm_num_groups 4 --add_attention false --train_batch_size 4 --num_cpu_threads 1"


def config_of(name: str, *flags: str):
    return parse_config(["--config", f"configs/{name}.yaml", *ANY_DATA, *flags])


@pytest.mark.parametrize("name", ["edm32", "ncsnpp32"])
def test_benchmark_times_the_configured_objective(name, monkeypatch):
    """Both networks receive the inputs and times of that objective, and their losses are finite."""
    config, losses, original = config_of(name, "--train_batch_size", "2"), [], bench.diffusion_loss

    def loss(unet, scheduler, images, **settings):
        assert (type(scheduler), settings) == (type(config.noise_scheduler()), config.loss_settings())
        losses.append(original(unet, scheduler, images, **settings))
        return losses[-1]

    monkeypatch.setattr(bench, "diffusion_loss", loss)
    for network in bench.NETWORKS.values():
        training_update(config, network, torch.device("cpu"))()
    assert len(losses) == 2
    assert all(loss.isfinite() for loss in losses)


def test_flops_of_the_ddim_paper_network():
    assert bench.flops_per_image(config_of("celeba64_ddim")) == pytest.approx(144e9, rel=0.01)  # counted separately


def test_speed_is_the_median_over_interleaved_updates(monkeypatch):
    """A fake clock advances by the cost of each update; one update is slow, as on a busy machine."""
    base = config_of("quickstart")
    runs = {"small": (replace(base, train_batch_size=6), "plain"), "large": (base, "no_skips")}
    costs_seconds = {6: 2.0, 16: 4.0}
    now_seconds, turns = 0.0, []

    def loss(network, scheduler, images, **settings):
        nonlocal now_seconds
        turns.append(len(images))
        now_seconds += costs_seconds[len(images)] + (100 if len(turns) == 9 else 0)
        return next(network.args[0].parameters()).sum()

    monkeypatch.setattr(bench, "diffusion_loss", loss)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now_seconds)
    assert bench.measure_speeds(runs) == {"small": 3.0, "large": 4.0}
    assert turns == [6, 16] * (len(turns) // 2)


def test_command_measures_training_and_sampling_of_both_networks(monkeypatch, capsys):
    monkeypatch.setattr(bench, "MEASURED_SECONDS", 0.01)
    assert main([*TINY.split(), "--mixed_precision", "auto"]) == 0
    lines = [line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    expected = [[task, name] for task in ("training", "sampling") for name in ("ours", "diffusers")]
    assert [line[:2] for line in lines[2:]] == 2 * expected
    assert all(float(line[3].replace(",", "")) > 0 for line in lines[2:])
    assert [line[5] != "" for line in lines[2:]] == 2 * [True, True, False, False]  # share of the matmul rate
