"""What a run reports: levels without the time, the log across kills and resumes, sample grids, the device."""

import json
import os

import numpy as np
import pytest
import torch
from tiny_pipeline import tiny_pipeline
from tiny_training import TINY

from custom_unet import CustomUNet2DModel
from training.config import TrainConfig
from training.log import device_name, draw_grid, levels_without_time, list_grids, read_log, recorded, start_log


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
    path, records = tmp_path / "log.jsonl", [{"step": step, "loss": step / 2} for step in (0, 1, 2, 3)]
    assert read_log(path) == start_log(path, step=0) == []
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records) + '{"step": 4, "lo')
    assert read_log(path) == records
    assert start_log(path, step=2) == read_log(path) == records[:3]
    assert path.read_text().count("\n") == 3
    assert start_log(path, step=0) == read_log(path) == []


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


def test_grid_shows_the_seeds_in_order():
    pipe = tiny_pipeline()
    grid = draw_grid(pipe, 5, lambda: False, num_inference_steps=2)
    assert grid.size == (3 * 8 + 4 * 2, 2 * 8 + 3 * 2)  # 3 columns, 2 rows, lines of 2 pixels
    alone = np.asarray(pipe(1, [torch.Generator().manual_seed(4)], 2).images[0])
    fifth = np.asarray(grid)[12:20, 12:20]  # second row, second column
    assert np.abs(fifth.astype(int) - alone).max() <= 1


def test_list_grids_ignores_files_with_other_names(tmp_path):
    for name in ("step-0000010.png", "step-0000005.png", "step-0000019 (copy).png", "step-best.png"):
        (tmp_path / name).touch()
    assert list_grids(tmp_path) == {step: tmp_path / f"step-{step:07}.png" for step in (5, 10)}
    assert list_grids(tmp_path / "nowhere") == {}
