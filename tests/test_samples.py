"""Sample grids: fixed seeds in order."""

import numpy as np
import torch
from tiny_pipeline import tiny_pipeline

from training.samples import draw_grid, list_grids


def test_grid_shows_the_seeds_in_order():
    pipe = tiny_pipeline()
    grid = draw_grid(pipe, 5, 2, lambda: False)
    assert grid.size == (3 * 8 + 4 * 2, 2 * 8 + 3 * 2)  # 3 columns, 2 rows, lines of 2 pixels
    alone = np.asarray(pipe(1, [torch.Generator().manual_seed(4)], 2).images[0])
    fifth = np.asarray(grid)[12:20, 12:20]  # second row, second column
    assert np.abs(fifth.astype(int) - alone).max() <= 1


def test_list_grids_ignores_files_with_other_names(tmp_path):
    for name in ("step-0000010.png", "step-0000005.png", "step-0000019 (copy).png", "step-best.png"):
        (tmp_path / name).touch()
    assert list_grids(tmp_path) == {step: tmp_path / f"step-{step:07}.png" for step in (5, 10)}
    assert list_grids(tmp_path / "nowhere") == {}
