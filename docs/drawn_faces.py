"""Training images for `minimal_ddpm.py`, drawn at random, and a grid of images as a PNG."""

import torch
from PIL import Image


def draw_faces(count: int) -> torch.Tensor:
    """Faces with hair, eyes and a mouth, in random places and colours: float32 (count, 3, 16, 16) in [-1, 1]."""
    r = torch.rand(count, 12, 1, 1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    x, y = x - 0.4 * r[:, 0] + 0.2, y - 0.3 * r[:, 1] + 0.15  # relative to the centre of each face, (count, 16, 16)

    def colour(red, green, blue):
        return torch.stack([red, green, blue], dim=1)  # (count, 3, 1, 1)

    def paint(images, inside, colour):
        mask = (15 * inside).sigmoid()[:, None]  # soft edges where `inside` changes its sign
        return images * (1 - mask) + colour * mask

    pale, fair = r[:, 2], r[:, 3]
    black, lips = colour(*[0 * pale - 0.9] * 3), colour(0 * pale + 0.5, 0 * pale - 0.6, 0 * pale - 0.5)
    images = (1.6 * r[:, 4:7] - 0.8).expand(-1, 3, 16, 16)  # the background
    images = paint(images, 0.8 - x.hypot(0.9 * y + 0.1), colour(1.5 * fair - 0.9, 1.1 * fair - 0.9, 0.5 * fair - 0.9))
    skin = colour(0.8 * pale + 0.1, 0.9 * pale - 0.4, 0.9 * pale - 0.6)
    images = paint(images, 0.6 - x.hypot(y - 0.1) - 0.2 * r[:, 7] * x.abs(), skin)
    for eye in (-0.25, 0.25):
        images = paint(images, 0.12 - (x - eye).hypot(y), black)
    mouth = y - 0.4 + (1.5 * r[:, 8] - 0.3) * x.square()  # smiling or not
    return paint(images, 0.07 - torch.maximum(mouth.abs(), x.abs() - 0.2), lips)


def save_png(images: torch.Tensor, path: str, columns: int = 16, scale: int = 4) -> None:
    """Writes a grid of enlarged images."""
    rows = images.clamp(-1, 1).add(1).mul(127.5).byte().unflatten(0, (-1, columns))  # (rows, columns, 3, 16, 16)
    grid = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (height, width, 3)
    grid = grid.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    Image.fromarray(grid.numpy()).save(path)
