"""The speed comparison: its arithmetic, and one whole run on a tiny network."""

import json

import pytest

from common import Failed
from experiments.speed import VARIANTS, comparison, main, training_throughput

TINY = """
max_images: 64
resolution: 8
down_block_types: [DownBlock2D, AttnDownBlock2D]
up_block_types: [AttnUpBlock2D, UpBlock2D]
block_out_channels: [8, 16]
layers_per_block: 1
norm_num_groups: 4
train_batch_size: 4
mixed_precision: bf16
max_train_steps: 1000
"""


def test_throughput_leaves_out_the_warm_up():
    records = [
        {"step": 0, "images_seen": 0, "heldout_loss": 1.0},
        {"step": 5, "images_seen": 50, "train_seconds": 100.0},
        {"step": 10, "images_seen": 100, "train_seconds": 101.0},
        {"step": 15, "images_seen": 150, "train_seconds": 104.0},
        {"step": 15, "images_seen": 150, "heldout_loss": 1.0},
    ]
    assert training_throughput(records) == 25.0
    with pytest.raises(Failed, match="1 log records"):
        training_throughput(records[:2])


def test_comparison_is_of_medians():
    result = comparison({"ours": [3.0, 90.0, 4.0], "ours_fp32": [3.0, 1.0], "plain": [2.0, 0.1, 7.0]})
    assert [result["images_per_second"][name]["median"] for name in VARIANTS] == [4.0, 2.0, 2.0]
    assert (result["ratio_as_configured"], result["ratio_fp32"]) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "1"], "--steps is 1"),
        (["--rounds", "many"], "--rounds"),
        (["--out", "nowhere/speed.json"], "nowhere"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--step", "3"], "--step"),
        (["--train_data_dir", "nowhere"], "exactly one"),
        (["--learning_rate", "-1"], "positive"),
        (["--config", "configs/vp32.yaml"], "take --objective ddpm"),
        (["--mixed_precision", "auto"], "auto has no fixed precision"),
        (["--out", "speed.md"], "--out speed.md is no JSON file"),
    ],
)
def test_bad_input_is_one_line(capsys, flags, message):
    try:
        code = main(flags)
    except SystemExit as error:
        code = error.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_whole_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config, out = tmp_path / "tiny.yaml", tmp_path / "speed.json"
    config.write_text(f"{TINY}cache_dir: {tmp_path / 'cache'}\n")
    flags = "--steps 2 --rounds 1 --sampling_batch_size 2 --sampling_steps 2".split()
    code = main(["--config", str(config), *flags, "--out", str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "synthetic-faces" in printed.out  # stands in for the source that is not given
    result = json.loads(out.read_text())
    assert result["config"] == str(config)
    assert (result["steps"], result["rounds"]) == (2, 1)
    assert {"torch", "diffusers", "device", "num_threads", "source", "mixed_precision"} < result.keys()
    for what in ("training", "sampling"):
        speeds = result[what]["images_per_second"]
        assert set(speeds) == set(VARIANTS)
        for name in VARIANTS:
            assert speeds[name]["rounds"] == [speeds[name]["median"]]
            assert speeds[name]["median"] > 0
        assert result[what]["ratio_as_configured"] == speeds["ours"]["median"] / speeds["plain"]["median"]
        assert result[what]["ratio_fp32"] == speeds["ours_fp32"]["median"] / speeds["plain"]["median"]
    rows = out.with_suffix(".md").read_text()
    assert rows in printed.out
    ours = [result[what]["ratio_as_configured"] for what in ("training", "sampling")]
    assert [cell.strip() for cell in rows.splitlines()[2].split("|")[3:6:2]] == [f"{ratio:.2f}" for ratio in ours]
