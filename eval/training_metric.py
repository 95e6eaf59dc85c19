"""FID or KID of the EMA network during training, from a few images by a fast sampler, to keep the best step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from tqdm.auto import tqdm

from common import InputError
from eval.distances import frechet_distance, kernel_distance
from eval.features import cached_features, subset
from eval.inception import open_inception
from pipelines import CustomUNetPipeline
from training.config import TrainConfig
from training.data import ImageStore
from training.log import SamplingStopped, recorded, stop_callback

STEPS, HEUN_STEPS = 20, 18
LARGEST_BATCH = 64  # images drawn at once; fewer if the training batches are smaller


class TrainingMetric:
    """FID or KID of n images by the pipeline's network, with seeds 0 to n - 1, against n training images.

    Values are comparable if the `identity` is the same. Raises InputError if Inception's weights are not found, or
    there are too few training images.
    """

    def __init__(self, config: TrainConfig, store: ImageStore, pipeline: CustomUNetPipeline, accelerator: Accelerator):
        if config.preserve_input_precision:
            raise InputError("--metric needs 8-bit images; omit --preserve_input_precision")
        if len(store) < config.metric_images:
            raise InputError(f"{len(store)} training images are fewer than --metric_images {config.metric_images}")
        self.name, self.title, self.accelerator = config.metric, config.metric.upper(), accelerator
        path = config.inception_path and Path(config.inception_path)
        self.extractor = open_inception(path=path, device=accelerator.device)
        if not config.dry_run:
            images = store.images[subset(len(store), config.metric_images)]
            self.training_features = cached_features(images, self.extractor, PartialState())
        sampler, steps = "dpmpp_2m", STEPS
        if config.time_embedding_type == "learned":  # the network takes the timesteps of training only
            sampler, steps = "unipc", min(STEPS, config.ddpm_num_steps)
        if pipeline.is_continuous:
            sampler, steps = pipeline.scheduler.default_sampler.name, HEUN_STEPS
        self.pipeline = CustomUNetPipeline(pipeline.unet, pipeline.scheduler)  # the given pipeline keeps its sampler
        self.pipeline.set_sampler(sampler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.batch_size = min(config.train_batch_size, LARGEST_BATCH)
        self.identity = {
            "name": self.name,
            "num_images": config.metric_images,
            "data": store.fingerprint,
            "features": self.extractor.name,  # implies the published weights
            "sampler": sampler,
            "steps": steps,
        }

    def measure(self, should_stop: Callable[[], bool]) -> float:
        """The value, from images that this process draws.

        Raises SamplingStopped once `should_stop`, called before each batch and after each step, returns True.
        """
        seeds = np.arange(self.identity["num_images"])
        batches = [seeds[start : start + self.batch_size] for start in range(0, len(seeds), self.batch_size)]
        with tqdm(batches, desc=f"images for {self.title}", unit="batch", leave=False) as bar:  # closed on errors, too
            generated = np.concatenate([self.features(batch, should_stop) for batch in bar])
        if self.name == "fid":
            return frechet_distance(self.training_features, generated)
        return kernel_distance(self.training_features, generated, seed=0)["value"]

    def features(self, seeds: np.ndarray, should_stop: Callable[[], bool]) -> np.ndarray:
        """Features of the images from B seeds, float32 (B, D), cycling through the classes."""
        if should_stop():
            raise SamplingStopped("the run is stopping")
        num_classes = (self.pipeline.unet.config.num_class_embeds or 1) - 1  # the last embedding is the null class
        with self.accelerator.autocast():
            images = self.pipeline(
                seeds=seeds.tolist(),
                num_inference_steps=self.identity["steps"],
                output_type="pt",
                class_labels=(seeds % num_classes).tolist() if num_classes else None,
                callback_on_step_end=stop_callback(should_stop),
            ).images
        return self.extractor((images * 255).round().to(torch.uint8)).float().cpu().numpy()

    def keep_best(self, value: float, step: int, folder: Path, write: Callable[[Path, dict], object]) -> str:
        """Writes the network unless the pipeline in the folder has a comparable value that is at least as good.

        `write` takes the folder and the measurement, for `metric` of `training.json`. Returns the values as text.
        """
        best = recorded(folder, "metric") or {}
        is_comparable = self.identity.items() <= best.items()
        if not is_comparable or value < best["value"]:
            best = self.identity | {"value": value, "step": step}
            write(folder, best)
        return f"{value:.4g} (best {best['value']:.4g} at step {best['step']})"
