"""Cost and receptive field of each U-Net level against counts by hand."""

import dataclasses
import json

import pytest

from custom_unet import CustomUNet2DModel
from experiments.architecture import costs, main, receptive_fields
from training.arguments import parse_config

CONFIG = ["--config", "configs/vp32.yaml"]


@pytest.fixture(scope="module")
def config():
    return parse_config(CONFIG)


@pytest.mark.parametrize(("levels", "layers"), [(2, 2), (3, 1)])
def test_receptive_fields_of_the_contracting_path_follow_the_recursion(config, layers, levels):
    """A k-pixel kernel whose taps are j input pixels apart adds (k - 1) j; stride 2 doubles j."""
    blocks = {"down_block_types": ["DownBlock2D"] * levels, "up_block_types": ["UpBlock2D"] * levels}
    blocks |= {"block_out_channels": [32] * levels, "layers_per_block": layers}
    fields = receptive_fields(dataclasses.replace(config, in_channels=1, **blocks))
    field, jump = 3, 1  # conv_in
    for level in range(levels):
        field += 2 * layers * 2 * jump  # two convolutions in each residual block
        if level < levels - 1:
            field += 2 * jump
            jump *= 2
        assert fields[f"contracting, level {level}"] == field
    assert fields["bottleneck"] == field + 2 * 2 * 2 * jump
    assert fields["last convolution"] > fields["bottleneck"]


def test_flop_counts_match_a_count_by_hand(config):
    """Level 0 has no attention; at level 1 its cost is quadratic in the number of pixels."""
    network = {"add_attention": False, "layers_per_block": 1, "block_out_channels": [64, 64, 64]}
    *parts, whole = costs(dataclasses.replace(config, **network))
    rows, c, side, emb = {row["part"]: row for row in parts}, 64, 32, 256
    assert rows["first convolution"]["gflop"] * 1e9 == pytest.approx(2 * 9 * 3 * c * side**2)
    block = 2 * (2 * 9 * c * c * side**2) + 2 * emb * c  # two convolutions, and the time embedding's projection
    downsampling = 2 * 9 * c * c * (side // 2) ** 2
    level_0, level_1 = rows["contracting, level 0"], rows["contracting, level 1"]
    assert level_0["gflop"] * 1e9 == pytest.approx(block + downsampling)
    assert level_0["attention_share"] == 0
    tokens = 16**2
    assert level_1["attention_share"] * level_1["gflop"] * 1e9 == pytest.approx(2 * (2 * tokens**2 * c))
    assert sum(row["share"] for row in parts) == pytest.approx(1, abs=0.01)  # the rest is the time embedding
    assert [row["side"] for row in parts] == [32, 16, 8, 8, 8, 16, 32, 32, 32]
    assert whole["share"] == 1


def test_command_prints_and_writes_the_table(config, tmp_path, capsys):
    assert main([*CONFIG, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "architecture.md").read_text()
    assert text in capsys.readouterr().out
    rows = json.loads((tmp_path / "architecture.json").read_text())["rows"]
    assert len(text.splitlines()) == 2 + len(rows)
    assert rows[-1]["parameters"] == CustomUNet2DModel(**config.unet_kwargs()).num_parameters()
