"""The benchmark: what it times, its rows, and failing rows."""

import itertools

import pytest
import torch

from experiments import bench
from experiments.bench import main, training_update
from training.arguments import parse_config

TINY = """
resolution: 8
down_block_types: [DownBlock2D]
up_block_types: [UpBlock2D]
block_out_channels: [8]
layers_per_block: 1
norm_num_groups: 4
add_attention: false
mixed_precision: bf16
train_batch_size: 4
num_cpu_threads: 1
max_train_steps: 1000
"""


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def config_of(path, *flags):
    return parse_config(["--config", str(path), "--dataset_name", "synthetic-faces", *flags])


@pytest.mark.parametrize("name", ["edm32", "ncsnpp32"])
def test_benchmark_times_the_configured_objective(name, monkeypatch):
    """Both networks receive the inputs and times of that objective, and their losses are finite."""
    config, losses, original = config_of(f"configs/{name}.yaml", "--train_batch_size", "2"), [], bench.diffusion_loss

    def loss(unet, scheduler, images, **settings):
        assert (type(scheduler), settings) == (type(config.noise_scheduler()), config.loss_settings())
        losses.append(original(unet, scheduler, images, **settings))
        return losses[-1]

    monkeypatch.setattr(bench, "diffusion_loss", loss)
    for network in bench.NETWORKS.values():
        training_update(config, network, "cpu")()
    assert len(losses) == 2
    assert all(loss.isfinite() for loss in losses)


def test_measured_row_has_throughput_and_matmul_share(config_path, monkeypatch):
    monkeypatch.setattr(bench, "MEASURED_SECONDS", 0.01)
    for task, network in itertools.product(bench.TASKS, bench.NETWORKS):
        row = {"task": task, "network": network, "mode": "eager", "layout": "contiguous", "precision": "bf16"}
        measured = bench.measure(row, config_of(config_path), torch.device("cpu"))
        assert measured.keys() == {"images/s"} | ({"share of the matmul rate"} if task == "training" else set())
        assert min(measured.values()) > 0


def test_flops_of_the_ddim_paper_network():
    config = config_of("configs/celeba64_ddim.yaml")
    assert bench.flops_per_image(config) == pytest.approx(144e9, rel=0.01)  # counted separately, for UNet2DModel


def test_all_rows_are_measured_and_failures_are_shown_in_the_table(config_path, monkeypatch, capsys):
    measured = []

    def measure(row, config, device):
        measured.append(tuple(row.values()))
        if len(measured) == 1:
            raise RuntimeError("a |\nbreak")
        return {"images/s": 8.0, "peak GiB": 1.5, "share of the matmul rate": 0.25}

    monkeypatch.setattr(bench, "measure", measure)
    flags = ["--only", "ours:contiguous", "diffusers:eager:contiguous", "--precisions", "no", "bf16"]
    assert main(["--config", str(config_path), *flags]) == 0
    eager = itertools.product(bench.TASKS, ("no", "bf16"), bench.NETWORKS)
    expected = [(task, network, "eager", "contiguous", precision) for task, precision, network in eager]
    expected += [("training", "ours", "compiled", "contiguous", precision) for precision in ("no", "bf16")]
    assert measured == expected
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(expected)
    assert lines[2] == "| training | ours | eager | contiguous | no | RuntimeError: a / break |  |  |"
    assert lines[3] == "| training | diffusers | eager | contiguous | no | 8 | 1.5 | 0.25 |"


def test_unknown_row_exits_with_code_2_and_one_line(capsys, config_path):
    assert main(["--config", str(config_path), "--only", "ours:quick"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "'quick'" in error
