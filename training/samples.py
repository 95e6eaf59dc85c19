"""Grids of samples that show how a run goes on."""

import math
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid


def draw_grid(pipeline, num_images: int, num_inference_steps: int) -> Image.Image:
    """A square grid of images of the seeds 0 to `num_images` - 1, always the same noise.

    Raises:
        RuntimeError, ValueError: where the pipeline does, as for weights that are not finite.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(num_images)]
    images = pipeline(num_images, generators, num_inference_steps, output_type="pt").images
    return to_pil_image(make_grid(images.cpu(), nrow=math.ceil(math.sqrt(num_images)), padding=2, pad_value=1.0))


def grid_name(step: int) -> str:
    return f"step-{step:07d}.png"


def newest_samples(folder: Path, step: int) -> tuple[Path | None, int | None]:
    """The newest grid `step-NNNNNNN.png` in a folder that is no newer than `step`, and its step; (None, None)."""
    grids = {int(path.stem.removeprefix("step-")): path for path in folder.glob("step-*.png")}
    newest = max((number for number in grids if number <= step), default=None)
    return grids.get(newest), newest
