"""The cost curve: how good images are against what they cost, over samplers, numbers of steps and eta."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipelines import CustomUNetPipeline


@dataclass(frozen=True)
class SamplerSetting:
    sampler: str
    steps: int
    eta: float = 0.0

    def __str__(self) -> str:
        return f"{self.sampler}, {self.steps} steps" + (f", eta {self.eta:g}" if self.eta else "")


def settings_grid(samplers: Sequence[str], steps: Sequence[int], etas: Sequence[float]) -> Iterator[SamplerSetting]:
    """Every sampler with every number of steps; `ddim`, which alone takes it, also with every eta."""
    for sampler in samplers:
        for eta in etas if sampler == "ddim" else (0.0,):
            for number in steps:
                yield SamplerSetting(sampler, number, eta)


class EvaluationCounter:
    """Counts how often a network is called while the context is open."""

    def __init__(self, network: torch.nn.Module):
        self.network, self.calls = network, 0

    def __enter__(self) -> "EvaluationCounter":
        self.handle = self.network.register_forward_hook(self._count)
        return self

    def __exit__(self, *_) -> None:
        self.handle.remove()

    def _count(self, *_) -> None:
        self.calls += 1


def sample(
    pipeline: CustomUNetPipeline, setting: SamplerSetting, seeds: Sequence[int], batch_size: int
) -> tuple[np.ndarray, int, float]:
    """Images of a setting, and what they cost.

    Returns:
        uint8 images (N, C, H, W), network evaluations an image, seconds an image.

    Raises:
        ValueError: for a setting that the pipeline refuses.
    """
    pipeline.set_sampler(setting.sampler)
    images = []
    started_at_seconds = time.perf_counter()
    with EvaluationCounter(pipeline.unet) as counter:
        for first in range(0, len(seeds), batch_size):
            batch = pipeline(
                seeds=seeds[first : first + batch_size],
                num_inference_steps=setting.steps,
                eta=setting.eta,
                output_type="pt",
            ).images
            images.append((batch * 255).round().to(torch.uint8).cpu().numpy())
    seconds = time.perf_counter() - started_at_seconds
    num_batches = -(-len(seeds) // batch_size)
    return np.concatenate(images), counter.calls // num_batches, seconds / len(seeds)
