"""The benchmark: FLOPs against a closed form, the rows, their failures, and one run from end to end."""

import json

import pytest

from experiments import bench
from experiments.bench import Row, flops_per_image, main, measured_apart, training_update
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


def test_flops_are_those_of_the_network(config_path):
    """Multiplications and additions of every convolution and linear layer, by hand."""
    c, pixels, time_channels = 8, 8 * 8, 32
    conv_in_or_out = 3 * c * 9 * pixels
    # (in, out) channels of each residual block: down; two in the bottleneck; up, with skips from down and conv_in
    blocks = [(c, c), (c, c), (c, c), (2 * c, c), (2 * c, c)]
    convolutions = sum((a * b * 9 + b * b * 9 + (a * b if a != b else 0)) * pixels for a, b in blocks)
    linear = c * time_channels + time_channels**2 + len(blocks) * time_channels * c
    forward = 2 * (2 * conv_in_or_out + convolutions + linear)
    # backward: as much again for the weights, and for the inputs but for those of the image and the timestep
    backward = 2 * forward - 2 * conv_in_or_out - 2 * c * time_channels
    for network in bench.NETWORKS:
        assert flops_per_image(config_of(config_path), network) == forward + backward


@pytest.mark.parametrize("name", ["edm32", "ncsnpp32", "flow32"])
def test_the_configured_objective_is_timed(name, monkeypatch):
    """Both networks get the inputs and times of that objective: what comes out is finite."""
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


def test_a_row_that_fails_is_a_row_with_the_reason(config_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--config", str(config_path), "--seconds", "0.01"]
    result = measured_apart(Row("training", batch_size=10**10), arguments, 300)
    assert result["error"].startswith("InputError: --train_batch_size is 10000000000")
    assert measured_apart(Row("training"), arguments, 0.01) == {"error": "took more than 0.01 s"}
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    assert measured_apart(Row("training"), arguments, 300) == {"error": "the process died with exit code 1"}


def test_the_rows_are_measured_written_one_by_one_and_shown(tmp_path, config_path, monkeypatch, capsys):
    out, written = tmp_path / "bench.json", []
    results = iter([{"matmul_flops_per_second": 1e9, "device": "cpu"}, {"error": "Unsupported: a | break"}])

    def measured(row, arguments, limit_seconds):
        written.append(len(json.loads(out.read_text())["results"]) if out.exists() else 0)
        return next(results, {"images_per_second": 8.0, "windows": [8.0], "peak_memory_gib": 1.5})

    monkeypatch.setattr(bench, "measured_apart", measured)
    flags = ["--only", "ours:contiguous", "diffusers:eager:contiguous", "--precisions", "no", "bf16"]
    assert main(["--config", str(config_path), "--out", str(out), *flags]) == 0
    record = json.loads(out.read_text())
    assert [(row["task"], row["network"], row["precision"], row["mode"]) for row in record["results"]] == [
        *(
            (task, network, dtype, "eager")
            for task in bench.TASKS
            for dtype in ("no", "bf16")
            for network in bench.NETWORKS
        ),
        *(("training", "ours", dtype, "compiled") for dtype in ("no", "bf16")),
    ]
    assert written == [0, *range(len(record["results"]))]
    assert {row["batch_size"] for row in record["results"]} == {4}
    assert record["results"][1]["share_of_matmul"] == 8 * record["flops_per_image"]["diffusers"] / 1e9
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[2].startswith("| training | ours | eager | contiguous | no | 4 | Unsupported: a / break |")
    assert lines[3].startswith("| training | diffusers | eager | contiguous | no | 4 | 8 | 1.5 |")


@pytest.mark.parametrize("task", ["training", "sampling"])
@pytest.mark.parametrize("network", ["ours", "diffusers"])
def test_a_row_for_real(config_path, task, network, capsys):
    row = json.dumps({"task": task, "network": network, "precision": "bf16", "batch_size": 2})
    flags = ["--seconds", "0.05", "--sampling_steps", "2", "--row", row]
    assert main(["--config", str(config_path), *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert min(result["windows"]) <= result["images_per_second"] <= max(result["windows"])
    assert result["peak_memory_gib"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seconds", "0"], "--seconds is 0"),
        (["--batch_sizes", "4", "-1"], "--batch_sizes"),
        (["--only", "ours:quick"], "'quick'"),
        (["--out", "nowhere/bench.json"], "nowhere"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--batch_size", "3"], "--batch_size"),
    ],
)
def test_bad_input_is_one_line(capsys, config_path, flags, message):
    assert main(["--config", str(config_path), *flags]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
