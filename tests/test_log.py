"""Facts about a run: memory and time embedding of the network, the log across kills and resumes, the device."""

import os

import pytest
import torch
from tiny_training import TINY

from custom_unet import CustomUNet2DModel
from training.config import TrainConfig
from training.log import RunLog, device_name, levels_without_time, read_log, recorded


@pytest.mark.parametrize(
    ("groups", "scale_shift", "expected"),
    [(4, "default", []), (16, "default", [1]), (16, "scale_shift", [])],
)
def test_levels_where_group_norm_cancels_the_time_embedding_are_found(groups, scale_shift, expected):
    """Compared with the outputs of the residual blocks for two random time embeddings."""
    config = TrainConfig(
        **TINY | {"norm_num_groups": groups, "resnet_time_scale_shift": scale_shift, "block_out_channels": [32, 16]}
    )
    assert levels_without_time(config) == expected
    network = CustomUNet2DModel(**config.unet_kwargs()).eval()
    for level, block in enumerate(network.down_blocks):
        resnet = block.resnets[-1]
        hidden = torch.randn(2, resnet.conv1.in_channels, 8, 8)
        first, second = (resnet(hidden, torch.randn(2, resnet.time_emb_proj.in_features)) for _ in range(2))
        assert torch.allclose(first, second, atol=1e-4) == (level in expected)


def test_records_after_the_resumed_step_and_partial_lines_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == []
    log = RunLog(path, step=0)
    for step in (1, 2, 3):
        log.write(step, loss=step / 2)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    again = RunLog(path, step=2)
    again.write(3, rate=9.0)
    assert read_log(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "rate": 9.0}]
    assert again.newest("loss") == {"step": 2, "loss": 1.0}
    assert again.newest("heldout_loss") is None


def test_device_name_includes_the_number_of_cores():
    name, cores = device_name(torch.device("cpu")), len(os.sched_getaffinity(0))
    assert name.endswith(", 1 core" if cores == 1 else f", {cores} cores")
    assert len(name.split(",")[0]) > 2
    assert device_name(torch.device("mps")) == "mps"


def test_recorded_reads_the_step_or_none_if_damaged(tmp_path):
    assert recorded(tmp_path, "step") is None
    (tmp_path / "training.json").write_text('{"step": 12}')
    assert recorded(tmp_path, "step") == 12
    for damaged in ('{"step', "[]", "{}"):
        (tmp_path / "training.json").write_text(damaged)
        assert recorded(tmp_path, "step") is None
