"""What the metrics of an evaluation share: the model, its samplers and images, the real images, and how a result
describes them.
"""

import argparse
import json
import math
import os
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from diffusers import ModelMixin
from torch import Tensor

from common import InputError, on_main_process, sha256_of
from eval.features import ImageSet, images_of_files, subset
from eval.results import unusual_settings
from pipelines import CustomUNetPipeline, generate
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.image_folder import RECORD, fill_folder, image_path
from pipelines.loading import find_pipeline, load_pipeline, weight_files
from training.data import ImageStore, open_image_store
from training.log import recorded, training_in_all
from training.sde import CONTINUOUS_SAMPLERS

COST_SAMPLERS = "unipc:10 unipc:20 dpmsolver++2m:20 ddim:20 ddim:50 ddpm:100".split()
COST_SAMPLERS_IN_CONTINUOUS_TIME = "edm_heun:9 edm_heun:18 predictor_corrector:100 euler_maruyama:100 ode".split()
IMAGES = "images"  # the folder of an evaluation that holds its folders of images


class SamplerSetting(NamedTuple):
    """A sampler; `steps` are None for `ode`, which takes as many as it needs."""

    sampler: str
    steps: int | None
    eta: float = 0.0


def parse_sampler(text: str) -> SamplerSetting:
    """`NAME`, `NAME:STEPS` or `NAME:STEPS:ETA`; the ode takes no steps, the others 50 by default.

    Raises:
        argparse.ArgumentTypeError: if it is none of these.
    """
    name, *numbers = text.split(":")
    try:
        steps, eta = int(numbers[0]) if numbers else 50, float(numbers[1]) if numbers[1:] else 0.0
    except ValueError:
        steps, eta = 0, 0.0
    known = name in {*SAMPLERS, *CONTINUOUS_SAMPLERS} and not (name == "ode" and numbers)
    if not known or numbers[2:] or steps < 1 or not 0 <= eta <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME, NAME:STEPS or NAME:STEPS:ETA of a sampler")
    return SamplerSetting(name, None if name == "ode" else steps, eta)


def images_folder(setting: dict) -> str:
    """The name of the folder of images that were drawn like this; `setting` as in a result."""
    parts = [
        setting["sampler"],
        setting.get("steps"),
        f"eta{setting['eta']:g}" if "eta" in setting else None,
        *(f"{name}{value:g}" for name, value in unusual_settings(setting).items()),
        f"class{'.'.join(map(str, setting['class_label']))}" if "class_label" in setting else None,
        f"guidance{setting['guidance_scale']:g}" if setting.get("guidance_scale", 1) != 1 else None,
        setting["dtype"],
    ]
    return "-".join(str(part) for part in parts if part is not None)


class WithoutClass(torch.nn.Module):
    """A class-conditional network, whose last class is the null class, as an unconditional one."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet, self.config, self.dtype = unet, unet.config, unet.dtype

    def forward(self, noisy_images: Tensor, timesteps: Tensor):
        null_class = self.config.num_class_embeds - 1
        labels = torch.full((len(noisy_images),), null_class, device=noisy_images.device)
        return self.unet(noisy_images, timesteps, class_labels=labels)


class Evaluation:
    """What the metrics share.

    Args:
        options: of `eval.run`.
        command: that is recorded beside the images.
        network_class: of the model's network.

    Attributes:
        source, commit: the folder of the model repository, and its commit on the Hub.
        pipeline: in fp32. Images may be drawn in half precision; likelihoods and losses are always of these weights.
        network: of which likelihoods and losses are measured; a class-conditional one predicts without a class.
        sampler_setting, cost_settings: of the images, and of those of the cost curve.
        training, heldout: the real images, cropped and resized as the model was trained; `heldout` may be None.

    Raises:
        InputError: if the model or the data cannot be loaded, or the options do not suit them.
    """

    def __init__(
        self, options: argparse.Namespace, state: PartialState, command: str, network_class: type[ModelMixin]
    ):
        self.options, self.state, self.command, self.out = options, state, command, options.out
        self.network_class = network_class
        self.source, self.commit = find_pipeline(options.pipeline, options.revision)
        self.pipeline = load_pipeline(self.source, "fp32", None, network_class).to(state.device)
        unet = self.pipeline.unet.eval()
        self.network = unet if options.class_label is None else WithoutClass(unet).eval()
        self._choose_samplers()
        self.weights_sha256 = {path.name: sha256_of(path) for path in weight_files(self.source)}
        self.training = self._open_store(options.split)
        if options.num_images > len(self.training):
            raise InputError(
                f"--num_images is {options.num_images}, but split {options.split} has {len(self.training)} images, and"
                " equal numbers are compared"
            )
        self.heldout = self._open_store(options.heldout_split) if options.heldout_split else None

    def _choose_samplers(self) -> None:
        """The default sampler is DDIM, or the model's own if it was trained in continuous time.

        Raises:
            InputError: for a sampler that does not suit the model, or a setting that no sampler takes.
        """
        options, pipeline = self.options, self.pipeline
        sampler = options.sampler or (pipeline.continuous_sampler.name if pipeline.is_continuous else "ddim")
        usual = COST_SAMPLERS_IN_CONTINUOUS_TIME if pipeline.is_continuous else COST_SAMPLERS
        self.sampler_setting = SamplerSetting(sampler, None if sampler == "ode" else options.steps, options.eta)
        self.cost_settings = []
        if "cost" in options.metrics:
            self.cost_settings = options.cost_samplers or [parse_sampler(text) for text in usual]
        samplers = dict.fromkeys([sampler, *(setting.sampler for setting in self.cost_settings)])
        taken = {name for sampler in samplers for name in CONTINUOUS_SAMPLERS.get(sampler, ())}
        for name in generate.SAMPLER_SETTINGS:
            value = getattr(options, name)
            if value is not None and name not in taken:
                raise InputError(f"--{name} is {value:g}, but {' and '.join(samplers)} take no {name}; leave it out")
        for setting in (*self.cost_settings, self.sampler_setting):
            try:
                pipeline.set_sampler(setting.sampler, **self._own_settings(setting.sampler))
                pipeline.check_inputs(setting.steps or 50, setting.eta)
            except ValueError as error:
                raise InputError(str(error)) from error
        generate.check_arguments(pipeline, options)

    def _own_settings(self, sampler: str) -> dict[str, float]:
        """Those of the given settings that this sampler takes."""
        given = {name: getattr(self.options, name) for name in CONTINUOUS_SAMPLERS.get(sampler, ())}
        return {name: value for name, value in given.items() if value is not None}

    def _open_store(self, split: str) -> ImageStore:
        options, size = self.options, self.pipeline.unet.config.sample_size
        trained_on = recorded(self.source, "data") or {}
        crop = options.crop or trained_on.get("crop")
        if crop is None:
            raise InputError(f"{self.source} does not say what crop it was trained on; give --crop")
        if not isinstance(size, int):
            raise InputError(f"the model draws {size} pixels; the reference data are squares")
        where = "train_data_dir" if os.path.isdir(options.reference) else "dataset_name"
        data = {where: options.reference, "split": split, "crop": crop, "resolution": size}
        data["image_column"] = options.image_column
        on_main_process(self.state, lambda: len(open_image_store(**data)))  # it alone decodes the images
        store = open_image_store(**data)
        if split == options.split and trained_on.get("fingerprint") not in (None, store.fingerprint):
            print(f"note: split {split} is not what the model was trained on (other pixels)", flush=True)
        return store

    # ---- How a result describes the model and its images

    def describe_model(self) -> dict:
        """For the record."""
        config = self.pipeline.scheduler.config
        facts = {
            "objective": config.get("objective", "ddpm"),
            "prediction_type": config.prediction_type,
            "likelihood_weighting": (recorded(self.source, "objective") or {}).get("likelihood_weighting"),
            "parameters": sum(parameter.numel() for parameter in self.pipeline.unet.parameters()),
        }
        facts |= training_in_all(self.source)
        return {name: value for name, value in facts.items() if value is not None}

    def describe_images(self, setting: SamplerSetting | None = None, num_images: int | None = None) -> dict:
        """How images are drawn; by default those of the evaluation."""
        options, setting = self.options, setting or self.sampler_setting
        seeds = f"{options.seed} to {options.seed + (num_images or options.num_images) - 1}"
        about = {"sampler": setting.sampler, "steps": setting.steps, "seeds": seeds, "dtype": options.dtype}
        if options.class_label is not None:
            about |= {"class_label": options.class_label, "guidance_scale": options.guidance_scale}
        if setting.sampler in CONTINUOUS_SAMPLERS:
            settings = self.pipeline.process.sampler(setting.sampler, **self._own_settings(setting.sampler)).settings
            about["sampler_settings"] = {name: value for name, value in settings.items() if math.isfinite(value)}
        else:
            about["eta"] = setting.eta
        return {name: value for name, value in about.items() if value is not None}

    @property
    def reference(self) -> dict:
        """Which real images."""
        facts = self.training.description
        keys = ("split", "crop", "resolution", "fingerprint")
        return {"dataset": facts["source"]} | {key: facts[key] for key in keys}

    @property
    def threads(self) -> dict:
        """What a time on a CPU depends on."""
        return {"num_cpu_threads": torch.get_num_threads()} if self.state.device.type == "cpu" else {}

    # ---- Images

    def draw(self, setting: SamplerSetting, num_images: int) -> tuple[ImageSet, list[dict], CustomUNetPipeline]:
        """Draws the missing images of a setting, on all processes.

        Returns:
            the images in order of their seeds, the starts that drew them, as `pipelines.generate` records them, and
            the pipeline with its sampler.
        """
        options = self.options
        folder = (options.images_dir or self.out / IMAGES) / images_folder(self.describe_images(setting, num_images))
        how = (options.dtype, setting.sampler, self.network_class)
        pipeline = load_pipeline(self.source, *how, **self._own_settings(setting.sampler))
        own = {"out": folder, "num_images": num_images, "scheduler": setting.sampler, "eta": setting.eta}
        drawing = argparse.Namespace(**vars(options) | own | {"steps": setting.steps or options.steps})
        pipeline = pipeline.to(self.state.device)
        fill_folder(pipeline, self.source, self.commit, drawing, self.state, self.command)
        seeds = range(options.seed, options.seed + num_images)
        starts = json.loads((folder / RECORD).read_text())["starts"]
        return images_of_files([image_path(folder, seed) for seed in seeds]), starts, pipeline

    @cached_property
    def generated(self) -> np.ndarray:
        """uint8 (n, 3, R, R), in order of the seeds; `generated_set` must be drawn."""
        return self.generated_set.read(range(self.generated_set.count))

    def real(self, count: int, part: int = 0) -> np.ndarray:
        """A fixed random subset of the training images, uint8 (count, 3, R, R); different parts are disjoint."""
        return np.asarray(self.training.images[subset(len(self.training), count, part)])

    def has_floor(self, count: int) -> bool:
        """Whether there are two disjoint subsets of so many images, to compare real images with real ones."""
        return 2 * count <= len(self.training)

    def splits(self, count: int) -> dict[str, tuple[Tensor, dict]]:
        """A fixed random subset of each split, all of it if it has fewer images, and its description for a result.

        Returns:
            by `training` and `held-out`: uint8 (N, 3, R, R), and the description.
        """
        found = {}
        for kind, store in {"training": self.training, "held-out": self.heldout}.items():
            if store is not None:
                images = store.__getitems__(subset(len(store), min(count, len(store))))
                about = {key: self.reference[key] for key in ("dataset", "crop", "resolution")}
                found[kind] = images, about | {"split": store.description["split"], "n": len(images)}
        return found
