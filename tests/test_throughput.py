"""The throughput of a training step: FLOPs against a closed form, the rows, their failures, and one whole run."""

import json
import os
import time

import pytest
import torch

from common import InputError
from experiments.throughput import Variant, Worker, attempt, flops_per_image, main, read_config, table, variants

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
max_train_steps: 1000
"""


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def out_of_memory(size_gib):
    raise torch.OutOfMemoryError(f"tried to allocate {size_gib} GiB\nand a long explanation")


def no_compilation():
    raise RuntimeError("\nUnsupported: a graph break | here")


def dies():
    os._exit(9)


def never_ends():
    time.sleep(60)


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
    config = read_config(["--config", str(config_path)])
    assert flops_per_image(config, "ours") == forward + backward
    assert flops_per_image(config, "diffusers") == forward + backward


def test_cheap_rows_come_first():
    rows = variants([64, 128], only=[])
    assert len(rows) == len(set(rows)) == 16
    assert [row.mode for row in rows] == ["eager"] * 8 + ["compiled"] * 8
    assert [row.batch_size for row in rows] == ([64] * 4 + [128] * 4) * 2
    assert rows[0] == Variant("ours", "eager", "channels_last", 64)


def test_rows_are_selected_by_words():
    chosen = variants([64], only=["ours:compiled", "contiguous:diffusers:eager"])
    assert [str(row) for row in chosen] == [
        "diffusers:eager:contiguous, batch 64",
        "ours:compiled:channels_last, batch 64",
        "ours:compiled:contiguous, batch 64",
    ]
    with pytest.raises(InputError, match="'fast'"):
        variants([64], only=["ours:fast"])


def test_a_failure_is_a_result_with_the_reason():
    assert attempt(out_of_memory, (90,)) == {"error": "out of memory: tried to allocate 90 GiB"}
    assert attempt(no_compilation, ()) == {"error": "RuntimeError: Unsupported: a graph break | here"}
    assert attempt(dict, ()) == {}


def test_a_lost_process_is_replaced():
    worker = Worker()
    assert worker.run(never_ends, (), 0.2) == {"error": "took more than 0.2 s"}
    assert worker.run(dies, (), 50) == {"error": "the process died with exit code 9"}
    assert worker.process is None
    worker.stop()


def test_table():
    good = {"images_per_second": 1234.56, "peak_memory_gib": 12.34, "model_flops_per_second": 1.5e14}
    rows = [
        {"network": "ours", "mode": "eager", "layout": "contiguous", "batch_size": 64} | good,
        {"network": "ours", "mode": "eager", "layout": "contiguous", "batch_size": 128}
        | good
        | {"peak_memory_gib": None, "share_of_matmul": 0.2},
        {"network": "ours", "mode": "compiled", "layout": "contiguous", "batch_size": 64, "error": "no | luck"},
    ]
    assert table(rows).splitlines()[2:] == [
        "| ours | eager | contiguous | 64 | 1,234.6 | 12.3 | 150 |  |",
        "| ours | eager | contiguous | 128 | 1,234.6 |  | 150 | 20% |",
        "| ours | compiled | contiguous | 64 | no / luck | | | |",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seconds", "0"], "--seconds is 0"),
        (["--batch_sizes", "4", "-1"], "--batch_sizes"),
        (["--only", "ours:quick"], "'quick'"),
        (["--out", "nowhere/speed.json"], "nowhere"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--act_fn", "nothing"], "nothing"),
        (["--batch_size", "3"], "--batch_size"),
    ],
)
def test_bad_input_is_one_line(capsys, config_path, flags, message):
    try:
        code = main(["--config", str(config_path), *flags])
    except SystemExit as error:
        code = error.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_whole_run(tmp_path, config_path, capsys):
    """Two rows, measured; that of a compiled network is left out: it takes a minute."""
    out = tmp_path / "throughput.json"
    only = ["--only", "ours:eager:channels_last", "diffusers:eager:contiguous"]
    code = main(["--config", str(config_path), "--seconds", "0.2", "--out", str(out), *only])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    result = json.loads(out.read_text())
    assert result["device"] == "cpu"
    assert {"torch", "diffusers", "mixed_precision", "matmul_size"} < result.keys()
    assert [(row["network"], row["layout"]) for row in result["rows"]] == [
        ("ours", "channels_last"),
        ("diffusers", "contiguous"),
    ]
    for row in result["rows"]:
        assert row["batch_size"] == 4
        assert row["peak_memory_gib"] is None
        assert min(row["windows_images_per_second"]) <= row["images_per_second"]
        flops = row["images_per_second"] * result["flops_per_image_ours"]
        assert row["model_flops_per_second"] == pytest.approx(flops)
        assert row["share_of_matmul"] == pytest.approx(flops / result["matmul_flops_per_second"])
        assert f"| {row['network']} | eager | {row['layout']} | 4 |" in printed.out


def test_what_the_time_does_not_allow_is_a_row(tmp_path, config_path, capsys):
    out = tmp_path / "throughput.json"
    code = main(["--config", str(config_path), "--total_seconds", "1e-6", "--only", "ours:eager", "--out", str(out)])
    assert code == 1
    rows = json.loads(out.read_text())["rows"]
    assert [row["error"] for row in rows] == ["not begun: --total_seconds 1e-06 are over"] * 2
    assert "not begun" in capsys.readouterr().out
