"""Facts about a run: memory and time embedding of the network, the log across kills and resumes, the device."""

import os

import pytest
import torch
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from training.config import TrainConfig
from training.log import (
    RunLog,
    activation_bytes,
    device_name,
    heldout_table,
    levels_without_time,
    read_log,
    recorded,
)


def test_activation_bytes_count_saved_tensors_once():
    first, second = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4, bias=False)
    images = torch.randn(32, 8)
    parameters = [first.weight, second.weight]
    # saved: the input (32 x 8), the output of relu (32 x 16) once, the input of square (32 x 4); no parameters
    counted = activation_bytes(lambda: second(first(images).relu()).square().sum(), parameters)
    assert counted == 4 * 32 * (8 + 16 + 4)


def test_gradient_checkpointing_lowers_the_memory_estimate():
    network = CustomUNet2DModel(**TINY).train()

    def count() -> int:
        return activation_bytes(lambda: network(torch.randn(4, 3, 8, 8), 5).sample.sum(), list(network.parameters()))

    plain = count()
    network.enable_gradient_checkpointing()
    assert count() < 0.6 * plain


@pytest.mark.parametrize(
    ("groups", "scale_shift", "expected"),
    [(8, "default", [0]), (4, "default", []), (16, "default", [1]), (8, "scale_shift", [])],
)
def test_levels_where_group_norm_cancels_the_time_embedding_are_found(groups, scale_shift, expected):
    """Compared with the outputs of the residual blocks for two random time embeddings."""
    settings = {"norm_num_groups": groups, "resnet_time_scale_shift": scale_shift, "block_out_channels": [8, 16]}
    if groups == 16:
        settings["block_out_channels"] = [32, 16]
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    config = TrainConfig(
        dataset_name="synthetic-faces", max_train_steps=1, resolution=8, add_attention=False, **settings, **blocks
    )
    assert levels_without_time(config) == expected
    network = CustomUNet2DModel(**config.unet_kwargs())
    for level, block in enumerate(network.down_blocks):
        resnet = block.resnets[-1]
        hidden = torch.randn(2, resnet.conv1.in_channels, 8, 8)
        first, second = (resnet(hidden, torch.randn(2, resnet.time_emb_proj.in_features)) for _ in range(2))
        assert torch.allclose(first, second, atol=1e-4) == (level in expected)


def test_records_after_the_resumed_step_and_partial_lines_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, step=0)
    for step in (1, 2, 3):
        log.write(step, loss=step / 2)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    RunLog(path, step=2).write(3, loss=9.0)
    first, second, lost, third = read_log(path)
    assert (first, second) == ({"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0})
    assert (lost, third) == ({"step": 2, "lost_steps": 1}, {"step": 3, "loss": 9.0})


def test_resuming_without_lost_steps_leaves_the_log_unchanged(tmp_path):
    RunLog(tmp_path / "log.jsonl", step=0).write(3, loss=1.0)
    again = RunLog(tmp_path / "log.jsonl", step=3)
    assert again.newest("loss") == {"step": 3, "loss": 1.0}
    assert again.newest("heldout_loss") is None
    assert read_log(tmp_path / "log.jsonl") == [{"step": 3, "loss": 1.0}]


def test_missing_log_reads_as_empty(tmp_path):
    assert read_log(tmp_path / "nowhere.jsonl") == []


def test_heldout_table_shows_losses_speed_and_starts():
    quarters = {f"heldout_loss_q{q}": q / 10 for q in (1, 2, 3, 4)}
    records = [{"step": s, "images_seen": 1000 * s, "heldout_loss": 1 / (1 + s), **quarters} for s in range(5)]
    records += [
        {"step": s, "images_seen": s, "images_per_second": v, "train_seconds": 30 * v} for s, v in [(1, 2), (2, 6)]
    ]
    lines = heldout_table(records).splitlines()
    assert lines[2:5] == [
        f"| {images} | {loss} | 0.1000 | 0.2000 | 0.3000 | 0.4000 |"
        for images, loss in (("0", "1.0000"), ("2,000", "0.3333"), ("4,000", "0.2000"))
    ]
    assert lines[-1] == "3.0 minutes in updates, median 4.0 images/s"
    records += [{"step": 1, "set_up_seconds": s} for s in (9.0, 12.0, 30.0)] + [{"step": 1, "lost_steps": 7}] * 2
    assert heldout_table(records).splitlines()[-1] == (
        "3 starts, 12 s each until the first update (median); 14 updates lost by kills"
    )


def test_device_name_includes_the_number_of_cores():
    name = device_name(torch.device("cpu"))
    assert name.endswith(f", {len(os.sched_getaffinity(0))} cores")
    assert len(name.split(",")[0]) > 2
    assert device_name(torch.device("mps")) == "mps"


def test_recorded_reads_the_step_or_none_if_damaged(tmp_path):
    assert recorded(tmp_path, "step") is None
    (tmp_path / "training.json").write_text('{"step": 12}')
    assert recorded(tmp_path, "step") == 12
    for damaged in ('{"step', "[]", "{}"):
        (tmp_path / "training.json").write_text(damaged)
        assert recorded(tmp_path, "step") is None
