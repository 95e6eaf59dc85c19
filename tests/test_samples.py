"""Sample grids: fixed seeds in order, and the newest one that is not of a step that was lost."""

import numpy as np
import torch
from diffusers import DDIMScheduler

from custom_unet import CustomUNet2DModel
from pipelines import CustomUNetPipeline
from training.samples import delete_newer_samples, draw_grid, grid_name, newest_samples


def test_the_grid_shows_the_seeds_in_order():
    torch.manual_seed(0)
    levels = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = CustomUNet2DModel(sample_size=8, norm_num_groups=4, layers_per_block=1, **levels)
    pipe = CustomUNetPipeline(network, DDIMScheduler())
    grid = draw_grid(pipe, 5, 2)
    assert grid.size == (3 * 8 + 4 * 2, 2 * 8 + 3 * 2)  # 3 columns, 2 rows, lines of 2 pixels
    alone = np.asarray(pipe(1, [torch.Generator().manual_seed(4)], 2).images[0])
    fifth = np.asarray(grid)[12:20, 12:20]  # second row, second column
    assert np.abs(fifth.astype(int) - alone).max() <= 1


def test_the_newest_grid_up_to_a_step(tmp_path):
    assert newest_samples(tmp_path / "samples", 9) == (None, None)
    for step in (5, 10, 20):
        (tmp_path / grid_name(step)).touch()
    assert newest_samples(tmp_path, 19) == (tmp_path / "step-0000010.png", 10)
    assert newest_samples(tmp_path, 4) == (None, None)
    (tmp_path / "step-0000019 (copy).png").touch()
    (tmp_path / "step-best.png").touch()
    assert newest_samples(tmp_path, 19) == (tmp_path / "step-0000010.png", 10)
    delete_newer_samples(tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == {grid_name(5), "step-0000019 (copy).png", "step-best.png"}
