"""`docs/minimal_ddpm.py` is exact if the noise is known, and runs as it is."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def ddpm(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "docs")
    import minimal_ddpm

    return minimal_ddpm


def test_loss_and_sampler_are_exact_if_the_noise_is_known(ddpm):
    image = ddpm.draw_faces(1)

    def network(x_t, t):
        abar = ddpm.ALPHAS_CUMPROD[t].view(-1, 1, 1, 1)
        return (x_t - abar.sqrt() * image) / (1 - abar).sqrt()

    assert ddpm.training_loss(network, image.expand(64, -1, -1, -1)) < 1e-8
    torch.testing.assert_close(ddpm.sample(network, 2), image.expand(2, -1, -1, -1), atol=1e-4, rtol=0)


def test_sampler_keeps_the_variance_of_gaussian_data(ddpm):
    def network(x_t, t):  # E[epsilon | x_t] for pixels of variance 1/4
        abar = ddpm.ALPHAS_CUMPROD[t].view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * x_t / (abar / 4 + 1 - abar)

    torch.manual_seed(0)
    assert abs(ddpm.sample(network, 16).std() - 0.5) < 0.01


def test_script_trains_and_saves_a_grid(ddpm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ddpm, "T", 5)
    monkeypatch.setattr(sys, "argv", ["minimal_ddpm.py", "--updates", "2", "--out", str(tmp_path / "faces.png")])
    ddpm.main()
    assert "update 0: loss" in capsys.readouterr().out
    with Image.open(tmp_path / "faces.png") as grid:
        assert (grid.size, grid.mode) == ((16 * 64, 8 * 64), "RGB")
        assert len(grid.getcolors(grid.width * grid.height)) > 1000
