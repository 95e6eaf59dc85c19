"""DDPM in a hundred lines: a diffusion model of drawn faces, with nothing but torch.

    python docs/minimal_ddpm.py [--updates 2000] [--out faces.png]

It trains a small U-Net for a few minutes on a CPU and writes a grid with two rows of training images above six rows of
generated ones. Equations and algorithms are those of Ho et al. 2020 (arXiv 2006.11239), which REPORT.md derives.
Images are float32 in [-1, 1], of shape (B, 3, 16, 16).
"""

import argparse
import itertools
import math

import torch
import torch.nn.functional as F
from drawn_faces import draw_faces, save_png
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

T = 1000  # timesteps
BETAS = torch.linspace(1e-4, 0.02, T)  # variance of the noise that each timestep adds
ALPHAS = 1 - BETAS
ALPHAS_CUMPROD = ALPHAS.cumprod(0)  # abar_t, the share of the image's variance that is left


class Block(nn.Module):
    """A residual block: a shortcut past two convolutions, between which the time embedding is added."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels_in), nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.time, self.shortcut = nn.Linear(128, channels), nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(emb)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """Predicts the noise in x_t: a path down to 4x4 pixels, a path up, and skip connections between the two."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 64)):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(32, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.conv_in, self.conv_out = nn.Conv2d(3, widths[0], 3, padding=1), nn.Conv2d(widths[0], 3, 3, padding=1)
        pairs = list(itertools.pairwise((widths[0], *widths)))
        self.down = nn.ModuleList(Block(before, after) for before, after in pairs)
        self.middle = Block(widths[-1], widths[-1])
        self.up = nn.ModuleList(Block(2 * after, before) for before, after in reversed(pairs))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(16) / 16)
        emb = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))  # the timestep, (B, 128)
        h, skips = self.conv_in(x), []
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
            h = F.avg_pool2d(h, 2)
        h = self.middle(h, emb)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            h = block(torch.cat([F.interpolate(h, scale_factor=2.0), skip], dim=1), emb)
        return self.conv_out(h)


def training_loss(network: nn.Module, x_0: torch.Tensor) -> torch.Tensor:
    """Algorithm 1: add noise to the images at random timesteps and predict it (eq. 14)."""
    t, epsilon = torch.randint(T, (len(x_0),)), torch.randn_like(x_0)
    abar = ALPHAS_CUMPROD[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * epsilon  # eq. 4
    return F.mse_loss(network(x_t, t), epsilon)


@torch.no_grad()
def sample(network: nn.Module, count: int) -> torch.Tensor:
    """Algorithm 2: start from pure noise and remove some of the predicted noise at every timestep (eq. 11)."""
    x = torch.randn(count, 3, 16, 16)
    for t in reversed(range(T)):
        epsilon = network(x, torch.full((count,), t))
        x = (x - BETAS[t] / (1 - ALPHAS_CUMPROD[t]).sqrt() * epsilon) / ALPHAS[t].sqrt()
        if t > 0:
            x = x + BETAS[t].sqrt() * torch.randn_like(x)
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--out", default="faces.png")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = UNet()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.995))  # samples better than the last weights
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for update in range(options.updates):
        loss = training_loss(network, draw_faces(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(network)
        if update % 100 == 0:
            print(f"update {update}: loss {loss.item():.4f}")
    save_png(torch.cat([draw_faces(32), sample(average, 96)]), options.out)


if __name__ == "__main__":
    main()
