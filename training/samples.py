"""Grids of samples that show how a training progresses."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid


class SamplingStopped(RuntimeError):
    """Sampling was abandoned because the run is stopping."""


def draw_grid(pipeline, num_images: int, num_inference_steps: int, should_stop: Callable[[], bool]) -> Image.Image:
    """A square grid of the images of seeds 0 to `num_images` - 1, always from the same noise.

    Raises SamplingStopped once `should_stop`, called after each sampling step, returns True; and what the pipeline
    raises, for example for non-finite weights.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(num_images)]
    images = pipeline(
        num_images, generators, num_inference_steps, output_type="pt", callback_on_step_end=stop_callback(should_stop)
    ).images
    return to_pil_image(make_grid(images.cpu(), nrow=math.ceil(math.sqrt(num_images)), padding=2, pad_value=1.0))


def stop_callback(should_stop: Callable[[], bool]) -> Callable:
    """A `callback_on_step_end` for pipelines that raises SamplingStopped once `should_stop` returns True."""

    def look_for_stop(pipeline, index, timestep, tensors) -> None:
        if should_stop():
            raise SamplingStopped("the run is stopping")

    return look_for_stop


def list_grids(folder: Path) -> dict[int, Path]:
    """Step -> file of the grids in a folder, in ascending order; other files are ignored."""
    found = {path: re.fullmatch(r"step-(\d{7,})\.png", path.name) for path in folder.glob("step-*.png")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))
