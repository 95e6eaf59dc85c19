"""What a sampler costs: network evaluations and seconds of a setting."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import CONTINUOUS_SAMPLERS, SAMPLERS


@dataclass(frozen=True)
class SamplerSetting:
    """A sampler with what it is called with.

    Attributes:
        steps: None for `ode`, which takes as many as it needs.
        sampler_settings: of a sampler in continuous time, see `ContinuousSampler`.
    """

    sampler: str
    steps: int | None
    eta: float = 0.0
    sampler_settings: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        own = "".join(f", {name} {value:g}" for name, value in self.sampler_settings.items())
        steps = "" if self.steps is None else f", {self.steps} steps"
        return f"{self.sampler}{steps}" + (f", eta {self.eta:g}" if self.eta else "") + own

    @classmethod
    def parse(cls, text: str) -> "SamplerSetting":
        """`NAME`, `NAME:STEPS` or `NAME:STEPS:ETA`; the ode takes no steps, the others 50 by default.

        Raises:
            argparse.ArgumentTypeError: if it is none of these; steps and eta are checked by `set_on`.
        """
        name, *numbers = text.split(":")
        try:
            steps, eta = int(numbers[0]) if numbers else 50, float(numbers[1]) if numbers[1:] else 0.0
        except ValueError:
            steps, eta = 0, 0.0
        known = name in {*SAMPLERS, *CONTINUOUS_SAMPLERS} and not (name == "ode" and numbers)
        if not known or numbers[2:] or steps < 1 or not 0 <= eta <= 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME, NAME:STEPS or NAME:STEPS:ETA of a sampler")
        return cls(name, None if name == "ode" else steps, eta)

    def with_settings(self, given: dict[str, float]) -> "SamplerSetting":
        """The same with those of the given settings that this sampler takes."""
        own = CONTINUOUS_SAMPLERS.get(self.sampler, ())
        return replace(self, sampler_settings={name: value for name, value in given.items() if name in own})

    def set_on(self, pipeline: CustomUNetPipeline) -> dict:
        """Sets the sampler of a pipeline.

        Returns:
            the arguments of its call.

        Raises:
            ValueError: for a setting that the pipeline refuses.
        """
        pipeline.set_sampler(self.sampler, **self.sampler_settings)
        arguments = {"eta": self.eta} | ({} if self.steps is None else {"num_inference_steps": self.steps})
        pipeline.check_inputs(**{"num_inference_steps": 50} | arguments)
        return arguments


def sample(
    pipeline: CustomUNetPipeline, setting: SamplerSetting, seeds: Sequence[int], batch_size: int, **more
) -> tuple[np.ndarray, float, float]:
    """Images of a setting, and what they cost.

    Args:
        more: arguments of the pipeline's call; `class_labels` has one for each seed.

    Returns:
        uint8 images (N, C, H, W), network evaluations per image, seconds per image.

    Raises:
        ValueError: for a setting that the pipeline refuses.
    """
    arguments = setting.set_on(pipeline) | more
    labels = arguments.pop("class_labels", None)
    images, evaluations = [], 0
    started_at_seconds = time.perf_counter()
    for first in range(0, len(seeds), batch_size):
        batch = slice(first, first + batch_size)
        result = pipeline(
            seeds=seeds[batch], class_labels=None if labels is None else labels[batch], output_type="pt", **arguments
        )
        images.append((result.images * 255).round().to(torch.uint8).cpu().numpy())
        evaluations += result.network_evaluations * len(result.images)
    seconds = time.perf_counter() - started_at_seconds
    per_image = evaluations / len(seeds)  # a whole number but for `ode`, whose batches differ
    return np.concatenate(images), int(per_image) if per_image.is_integer() else per_image, seconds / len(seeds)
