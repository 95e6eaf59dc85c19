"""The state that the metrics share: the model, its samplers and images, the real images and their descriptions."""

import argparse
import json
import math
import os
import re
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from diffusers import ModelMixin
from torch import Tensor

from common import InputError, on_main_process, sha256_of
from eval.encoders import open_extractor
from eval.features import read_images, subset
from eval.results import sampler_text
from pipelines import CustomUNetPipeline, generate
from pipelines.continuous import denoiser
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.image_folder import RECORD, fill_folder, image_path
from pipelines.loading import find_pipeline, load_pipeline, weight_files
from training.data import ImageStore, open_image_store
from training.images import CHANNELS
from training.log import recorded, training_in_all
from training.sde import CONTINUOUS_SAMPLERS

COST_SAMPLERS = "dpmpp_2m:10 dpmpp_2m:20 unipc:10 unipc:20 ddim:20 ddim:50 ddpm:100".split()
COST_SAMPLERS_IN_CONTINUOUS_TIME = "dpmpp_2m:20 edm_heun:9 edm_heun:18 ode".split()
COST_SAMPLERS_IN_CONTINUOUS_TIME += ["predictor_corrector:100", "euler_maruyama:100"]
IMAGES = "images"  # subfolder of an evaluation, with one folder per sampler setting


class SamplerSetting(NamedTuple):
    """A sampler and its settings; `ode` ignores `steps` and chooses its own number."""

    sampler: str
    steps: int
    eta: float = 0.0


def parse_sampler(text: str) -> SamplerSetting:
    """Parses `NAME`, `NAME:STEPS` or `NAME:STEPS:ETA`; by default 50 steps and eta 0."""
    match = re.fullmatch(r"([^:]+)(?::([1-9]\d*)(?::([\d.]+))?)?", text)
    if match is None or match[1] not in {*SAMPLERS, *CONTINUOUS_SAMPLERS}:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME, NAME:STEPS or NAME:STEPS:ETA of a sampler")
    return SamplerSetting(match[1], int(match[2] or 50), float(match[3] or 0))


def images_folder(setting: dict) -> str:
    """The name of the folder for images drawn with a setting, which is given as in a result."""
    return f"{re.sub('[ ,]+', '-', sampler_text(setting))}-{setting['dtype']}"


class WithoutClass(torch.nn.Module):
    """Makes a class-conditional network unconditional: it always gets the null class, which is its last class."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet, self.config, self.dtype = unet, unet.config, unet.dtype

    def forward(self, noisy_images: Tensor, timesteps: Tensor):
        null_class = self.config.num_class_embeds - 1
        labels = torch.full((len(noisy_images),), null_class, device=noisy_images.device)
        return self.unet(noisy_images, timesteps, class_labels=labels)


class Evaluation:
    """The model, the samplers and the images that the metrics share; `command` is recorded with the images.

    Attributes:
        source, commit: the folder of the model repository and its commit on the Hub.
        pipeline: in fp32, for likelihoods and losses; images may be drawn in half precision.
        network: the network for likelihoods and losses; a class-conditional one predicts without a class.
        no_ode: why the network cannot predict in continuous time; None if it can.
        noise_levels: if it can, the lowest and the highest noise level that it was trained with.
        sampler_setting, cost_settings: the sampler settings of the images and of the cost curve.
        generated: the images, uint8 (n, C, H, W), in seed order; set by `run` if a metric needs them.
        training, heldout: the real images, cropped and resized as in training; `heldout` may be None.
        extractors: of the features, by name; none if no metric needs them.

    Raises InputError if the model, the data or a feature network cannot be loaded, or do not match the options.
    """

    def __init__(
        self, options: argparse.Namespace, state: PartialState, command: str, network_class: type[ModelMixin]
    ):
        self.options, self.state, self.command, self.out = options, state, command, options.out
        self.network_class = network_class
        self.source, self.commit = find_pipeline(options.pipeline, options.revision)
        self.pipeline = load_pipeline(self.source, network_class=network_class).to(state.device)
        unet = self.pipeline.unet.eval()
        self.network = unet if options.class_label is None else WithoutClass(unet).eval()
        self.no_ode = None
        try:
            self.noise_levels = denoiser(self.network, self.pipeline.scheduler).sde.noise_levels
        except ValueError as error:
            self.no_ode = str(error)
        self._choose_samplers()
        self.weights_sha256 = {path.name: sha256_of(path) for path in weight_files(self.source)}
        self.training = self._open_store(options.split)
        if options.num_images > len(self.training):
            there = f"split {options.split} has {len(self.training)} images"
            raise InputError(f"--num_images is {options.num_images}, but {there}; sets of equal size are compared")
        self.heldout = self._open_store(options.heldout_split) if options.heldout_split else None
        names = [] if {"features", "cost"}.isdisjoint(options.metrics) else options.features
        how = {"inception_path": options.inception_path, "device": state.device}
        self.extractors = {name: open_extractor(name, **how) for name in names}

    def _choose_samplers(self) -> None:
        """Sets the samplers; the default is DDIM, or the model's own sampler if it was trained in continuous time."""
        options, pipeline = self.options, self.pipeline
        sampler = options.sampler or (pipeline.continuous_sampler.name if pipeline.is_continuous else "ddim")
        usual = COST_SAMPLERS_IN_CONTINUOUS_TIME if pipeline.is_continuous else COST_SAMPLERS
        self.sampler_setting = SamplerSetting(sampler, options.steps, options.eta)
        self.cost_settings = []
        if "cost" in options.metrics:
            usual = [s for s in map(parse_sampler, usual) if s.sampler in SAMPLERS or self.no_ode is None]
            self.cost_settings = options.cost_samplers or usual
        samplers = dict.fromkeys([sampler, *(setting.sampler for setting in self.cost_settings)])
        taken = {name for sampler in samplers for name in CONTINUOUS_SAMPLERS.get(sampler, ())}
        for name in generate.SAMPLER_SETTINGS:
            value = getattr(options, name)
            if value is not None and name not in taken:
                raise InputError(f"--{name} is {value:g}, but {' and '.join(samplers)} take no {name}; leave it out")
        for setting in (*self.cost_settings, self.sampler_setting):
            try:
                pipeline.set_sampler(setting.sampler, **self._own_settings(setting.sampler))
                pipeline.check_inputs(setting.steps, setting.eta)
            except ValueError as error:
                raise InputError(str(error)) from error
        generate.check_arguments(pipeline, options)

    def _own_settings(self, sampler: str) -> dict[str, float]:
        """The given settings that this sampler accepts."""
        given = {name: getattr(self.options, name) for name in CONTINUOUS_SAMPLERS.get(sampler, ())}
        return {name: value for name, value in given.items() if value is not None}

    def _open_store(self, split: str) -> ImageStore:
        options, (channels, *sides) = self.options, self.pipeline.image_shape
        sides = options.reference_resolution or sides
        trained_on = recorded(self.source, "data") or {}
        crop = options.crop or trained_on.get("crop")
        if crop is None:
            raise InputError(f"{self.source} does not record the crop that it was trained on; give --crop")
        where = "train_data_dir" if os.path.isdir(options.reference) else "dataset_name"
        data = {where: options.reference, "split": split, "crop": crop, "resolution": sides}
        data |= {"image_column": options.image_column, "in_channels": channels}
        on_main_process(self.state, lambda: len(open_image_store(**data)))  # the others then find the decoded images
        store = open_image_store(**data)
        if split == options.split and trained_on.get("fingerprint") not in (None, store.fingerprint):
            print(f"note: the pixels of split {split} differ from those that the model was trained on", flush=True)
        return store

    # ---- How a result describes the model and its images

    def describe_model(self) -> dict:
        """The facts about the model that go into the record."""
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
        """How images are drawn; by default, the images of the evaluation."""
        options, setting = self.options, setting or self.sampler_setting
        seeds = f"{options.seed} to {options.seed + (num_images or options.num_images) - 1}"
        steps = None if setting.sampler == "ode" else setting.steps
        about = {"sampler": setting.sampler, "steps": steps, "seeds": seeds, "dtype": options.dtype}
        if options.class_label is not None:
            about |= {"class_label": options.class_label, "guidance_scale": options.guidance_scale}
        if setting.sampler in CONTINUOUS_SAMPLERS:
            settings = self.pipeline.process.sampler(setting.sampler, **self._own_settings(setting.sampler)).settings
            about["sampler_settings"] = {name: value for name, value in settings.items() if math.isfinite(value)}
        else:
            about["eta"] = setting.eta
        return {name: value for name, value in about.items() if value is not None}

    def about(self, n: int, setting: SamplerSetting | None = None) -> dict:
        """How n images were drawn, by default those of the evaluation, and the n real images to compare with."""
        images = self.describe_images() if setting is None else self.describe_images(setting, n)
        return images | self.reference | {"n": n, "n_reference": n}

    @property
    def reference(self) -> dict:
        """Which real images were used."""
        facts = self.training.description
        keys = ("split", "crop", "resolution", "fingerprint")
        return {"dataset": facts["source"]} | {key: facts[key] for key in keys}

    # ---- Images

    def draw(self, setting: SamplerSetting, num_images: int) -> tuple[np.ndarray, list[dict], CustomUNetPipeline]:
        """Draws the missing images of a setting, on all processes.

        Returns the images, uint8 (n, C, H, W), in seed order, the starts recorded by `pipelines.generate`, and the
        pipeline.
        """
        options = self.options
        folder = (options.images_dir or self.out / IMAGES) / images_folder(self.describe_images(setting, num_images))
        how = (options.dtype, setting.sampler, self.network_class)
        pipeline = load_pipeline(self.source, *how, **self._own_settings(setting.sampler)).to(self.state.device)
        own = {"out": folder, "num_images": num_images, "scheduler": setting.sampler}
        drawing = argparse.Namespace(**vars(options) | own | {"steps": setting.steps, "eta": setting.eta})
        fill_folder(pipeline, self.source, self.commit, drawing, self.state, self.command)
        seeds = range(options.seed, options.seed + num_images)
        starts = json.loads((folder / RECORD).read_text())["starts"]
        mode = CHANNELS[pipeline.image_shape[0]]
        return read_images([image_path(folder, seed) for seed in seeds], mode), starts, pipeline

    def real(self, count: int) -> list[np.ndarray]:
        """Two disjoint random subsets of the training images, or one if there are not enough; uint8 (count, C, H, W).

        They are always the same. The distance between the two is what a perfect model would score.
        """
        parts = (0, 1) if 2 * count <= len(self.training) else (0,)
        return [np.asarray(self.training.images[subset(len(self.training), count, part)]) for part in parts]

    def splits(self, count: int) -> dict[str, tuple[Tensor, dict]]:
        """A fixed random subset of each split, or the whole split if it has fewer images.

        Returns for `training` and `held-out` the images, uint8 (N, C, H, W), and their description for a result.
        """
        found = {}
        for kind, store in {"training": self.training, "held-out": self.heldout}.items():
            if store is not None:
                images = torch.from_numpy(store.images[subset(len(store), min(count, len(store)))])
                about = {key: self.reference[key] for key in ("dataset", "crop", "resolution")}
                found[kind] = images, about | {"split": store.description["split"], "n": len(images)}
        return found
