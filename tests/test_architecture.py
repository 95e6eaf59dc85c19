"""What each level of a U-Net costs and sees, against counting by hand."""

import dataclasses
import json

import pytest

from custom_unet import CustomUNet2DModel
from experiments.architecture import costs, main, receptive_fields
from training.arguments import parse_config

CONFIG = ["--config", "configs/quickstart.yaml"]
PLAIN = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}


@pytest.fixture(scope="module")
def config():
    return parse_config(CONFIG)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("levels", [2, 3])
def test_receptive_fields_of_the_contracting_path_follow_the_recursion(config, layers, levels):
    """A kernel of k pixels that are j input pixels apart adds (k - 1) j; stride 2 doubles j."""
    some = {"down_block_types": ["DownBlock2D"] * levels, "up_block_types": ["UpBlock2D"] * levels}
    fields = receptive_fields(
        dataclasses.replace(config, **some, block_out_channels=[32] * levels, layers_per_block=layers)
    )
    field, apart = 3, 1  # conv_in
    for level in range(levels):
        field += 2 * layers * 2 * apart  # two convolutions in each residual block
        if level < levels - 1:
            field += 2 * apart
            apart *= 2
        assert fields[f"contracting, level {level}"] == field
    assert fields["bottleneck"] == field + 2 * 2 * 2 * apart
    assert fields["last convolution"] > fields["bottleneck"]


def test_operations_of_convolutions_are_those_counted_by_hand(config):
    rows = {row["part"]: row for row in costs(dataclasses.replace(config, **PLAIN, layers_per_block=1))}
    c, side, emb = 32, 32, 128
    assert rows["first convolution"]["gflop"] * 1e9 == pytest.approx(2 * 9 * 3 * c * side**2)
    block = 2 * (2 * 9 * c * c * side**2) + 2 * emb * c  # two convolutions, and the time embedding's projection
    downsampling = 2 * 9 * c * c * (side // 2) ** 2
    assert rows["contracting, level 0"]["gflop"] * 1e9 == pytest.approx(block + downsampling)
    assert rows["contracting, level 0"]["attention_share"] == 0


def test_operations_between_pixels_are_quadratic_in_their_number(config):
    alone = {"add_attention": False, "layers_per_block": 1, "block_out_channels": [64, 64, 64]}
    rows = {row["part"]: row for row in costs(dataclasses.replace(config, **alone))}
    tokens = 16**2
    row = rows["contracting, level 1"]  # attention at 16x16, measured before its downsampling
    assert row["attention_share"] * row["gflop"] * 1e9 == pytest.approx(2 * (2 * tokens**2 * 64))


def test_parts_sum_up_to_the_network(config):
    *parts, whole = costs(config)
    assert whole["parameters"] == CustomUNet2DModel(**config.unet_kwargs()).num_parameters()
    assert sum(row["share"] for row in parts) == pytest.approx(1, abs=0.01)  # the rest is the time embedding
    assert [row["side"] for row in parts] == [32, 16, 8, 8, 8, 16, 32, 32, 32]


def test_the_command_prints_and_writes_the_table(tmp_path, capsys):
    assert main([*CONFIG, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "architecture.md").read_text()
    assert text in capsys.readouterr().out
    record = json.loads((tmp_path / "architecture.json").read_text())
    assert len(text.splitlines()) == 2 + len(record["rows"])


@pytest.mark.parametrize("arguments", [[], ["--config", "nowhere.yaml"], [*CONFIG, "--beauty", "1"]])
def test_bad_input_is_one_line_and_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
