"""What the metrics of an evaluation share: the model, its images, the real ones, and how a result describes them."""

import argparse
import json
import math
import os
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from common import InputError, on_main_process, sha256_of
from eval.features import FeatureExtractor, ImageSet, images_of_files, images_of_store, subset
from eval.results import result
from pipelines import CustomUNetPipeline, generate
from pipelines.custom_unet_pipeline import CONTINUOUS_SAMPLERS, SAMPLERS, ContinuousSampler
from pipelines.loading import find_pipeline, load_pipeline, weight_files
from training.data import ImageStore, open_image_store
from training.log import training_in_all

COST_SAMPLERS = "unipc:10 unipc:20 dpmsolver++2m:20 ddim:20 ddim:50 ddpm:100".split()
COST_SAMPLERS_IN_CONTINUOUS_TIME = "edm_heun:9 edm_heun:18 predictor_corrector:100 euler_maruyama:100 ode".split()
MOVED = {"device", "versions"}  # a result has these if they are not those of the record
IMAGES = "images"  # the folder of an evaluation that holds its folders of images


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


def unusual_settings(setting: dict) -> dict[str, float]:
    """Of a sampler in continuous time, those that are not its defaults."""
    usual = ContinuousSampler(setting["sampler"])
    return {k: value for k, value in setting.get("sampler_settings", {}).items() if value != getattr(usual, k)}


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

    Attributes:
        source, commit: the folder of the model repository, and its commit on the Hub.
        pipeline: with the weights as they are; images may be drawn in half precision, but likelihoods and losses are
            of these.
        network: of which likelihoods and losses are measured; a class-conditional one
            predicts without a class.
        sampler_setting, cost_settings: of the images, and of those of the cost curve.
        training, heldout: the real images, cropped and resized as the model was trained; `heldout` may be None.
        earlier: results of an earlier start.
        extractors: that are open, by name and mode.
    """

    def __init__(self, options: argparse.Namespace, state: PartialState, command: str):
        self.options, self.state, self.command, self.out = options, state, command, options.out
        self.earlier: list[dict] = []
        self.extractors: dict[tuple[str, str], FeatureExtractor] = {}
        self.source, self.commit = find_pipeline(options.pipeline, options.revision)
        training_json = self.source / "training.json"
        self.training_facts = json.loads(training_json.read_text()) if training_json.exists() else {}
        self.pipeline = load_pipeline(self.source, "fp32", None).to(state.device)
        unet = self.pipeline.unet.eval()
        self.network = unet if options.class_label is None else WithoutClass(unet).eval()
        self._set_samplers()
        generate.check_arguments(self.pipeline, options)
        self.weights_sha256 = {path.name: sha256_of(path) for path in weight_files(self.source)}
        self.training = self._open_store(options.split)
        if options.num_images > len(self.training):
            raise InputError(
                f"--num_images is {options.num_images}, but split {options.split} has {len(self.training)} images, and"
                " equal numbers are compared"
            )
        self.heldout = self._open_store(options.heldout_split) if options.heldout_split else None

    def _set_samplers(self) -> None:
        """The default sampler is DDIM, or the model's own if it was trained in continuous time.

        Raises:
            InputError: for a sampler that does not suit the model, or a setting that no sampler takes.
        """
        options, is_continuous = self.options, self.pipeline.is_continuous
        sampler = options.sampler or (self.pipeline.continuous_sampler.name if is_continuous else "ddim")
        usual = COST_SAMPLERS_IN_CONTINUOUS_TIME if is_continuous else COST_SAMPLERS
        cost_samplers = options.cost_samplers or [SamplerSetting.parse(text) for text in usual]
        cost_samplers = cost_samplers if "cost" in options.metrics else []
        samplers = dict.fromkeys([sampler, *(setting.sampler for setting in cost_samplers)])
        given = {name: getattr(options, name) for name in generate.SAMPLER_SETTINGS}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if not any(name in CONTINUOUS_SAMPLERS.get(sampler, ()) for sampler in samplers):
                raise InputError(f"--{name} is {value:g}, but {' and '.join(samplers)} take no {name}; leave it out")
        steps = None if sampler == "ode" else options.steps
        self.sampler_setting = SamplerSetting(sampler, steps, options.eta).with_settings(given)
        self.cost_settings = [setting.with_settings(given) for setting in cost_samplers]
        for setting in (*self.cost_settings, self.sampler_setting):
            try:
                setting.set_on(self.pipeline)
            except ValueError as error:
                raise InputError(str(error)) from error

    def _open_store(self, split: str) -> ImageStore:
        options, size = self.options, self.pipeline.unet.config.sample_size
        trained_on = self.training_facts.get("data", {})
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

    def describe_model(self) -> dict:
        """For the record."""
        config = self.pipeline.scheduler.config
        facts = {
            "objective": config.get("objective", "ddpm"),
            "prediction_type": config.prediction_type,
            "likelihood_weighting": self.training_facts.get("objective", {}).get("likelihood_weighting"),
            "parameters": sum(parameter.numel() for parameter in self.pipeline.unet.parameters()),
        }
        facts |= training_in_all(self.source)
        return {name: value for name, value in facts.items() if value is not None}

    def describe(self, setting: SamplerSetting, num_images: int) -> dict:
        """How images of a setting are drawn, for a result."""
        options = self.options
        seeds = f"{options.seed} to {options.seed + num_images - 1}"
        about = {"sampler": setting.sampler, "steps": setting.steps, "seeds": seeds, "dtype": options.dtype}
        if options.class_label is not None:
            about |= {"class_label": options.class_label, "guidance_scale": options.guidance_scale}
        if setting.sampler in CONTINUOUS_SAMPLERS:
            own = self.pipeline.default_settings(setting.sampler) | setting.sampler_settings
            settings = ContinuousSampler(setting.sampler, **own).settings
            about["sampler_settings"] = {name: value for name, value in settings.items() if math.isfinite(value)}
        else:
            about["eta"] = setting.eta
        return {name: value for name, value in about.items() if value is not None}

    @property
    def setting(self) -> dict:
        """How the images were drawn, for a result."""
        return self.describe(self.sampler_setting, self.options.num_images)

    @property
    def threads(self) -> dict:
        """What a time on a CPU depends on, for a result."""
        return {"num_cpu_threads": torch.get_num_threads()} if self.state.device.type == "cpu" else {}

    @property
    def reference(self) -> dict:
        """Which real images, for a result."""
        facts = self.training.description
        keys = ("split", "crop", "resolution", "fingerprint")
        return {"dataset": facts["source"]} | {key: facts[key] for key in keys}

    def draw_images(self) -> dict | None:
        """Draws the missing images, on all processes; see `generated` and `generated_set`.

        Returns:
            the result of how long it took, over all starts that finished; None if none did.
        """
        self.generated_set, starts = self.draw(self.sampler_setting, self.options.num_images)
        done = [start for start in starts if "seconds" in start]
        drawn, seconds = sum(start["generated"] for start in done), sum(start["seconds"] for start in done)
        if not drawn:
            return None
        more = {"num_processes": done[-1]["num_processes"], "starts": len(done)}
        if all("network_evaluations_per_image" in start for start in done):
            evaluations = sum(start["generated"] * start["network_evaluations_per_image"] for start in done)
            more["network_evaluations"] = evaluations / drawn
        return result("time", "drawing images", "seconds_drawing", seconds, n=drawn, **more, **self.setting)

    def draw(self, setting: SamplerSetting, num_images: int) -> tuple[ImageSet, list[dict]]:
        """Draws the missing images of a setting, on all processes.

        Returns:
            the images in order of their seeds, and the starts that drew them, as `pipelines.generate` records them.
        """
        options = self.options
        folder = (options.images_dir or self.out / IMAGES) / images_folder(self.describe(setting, num_images))
        pipeline = load_pipeline(self.source, options.dtype, setting.sampler, **setting.sampler_settings)
        own = {"out": folder, "num_images": num_images, "scheduler": setting.sampler, "eta": setting.eta}
        own |= {} if setting.steps is None else {"steps": setting.steps}
        drawing = argparse.Namespace(**vars(options) | own)
        pipeline = pipeline.to(self.state.device)
        generate.fill_folder(pipeline, self.source, self.commit, drawing, self.state, self.command)
        seeds = range(options.seed, options.seed + num_images)
        starts = json.loads((folder / generate.RECORD).read_text())["starts"]
        return images_of_files(generate.image_paths(folder, seeds)), starts

    @cached_property
    def generated(self) -> np.ndarray:
        """uint8 (n, 3, R, R), in order of the seeds."""
        return self.generated_set.read(range(self.generated_set.count))

    def real_set(self, count: int, part: int = 0) -> ImageSet:
        """A fixed random subset of the reference; different parts are disjoint."""
        return images_of_store(self.training, count, part)

    def has_floor(self, count: int) -> bool:
        """Whether there are two disjoint subsets of so many images, to compare real images with real ones."""
        return 2 * count <= len(self.training)

    def real(self, count: int, part: int = 0) -> np.ndarray:
        """The images of `real_set`, uint8 (count, 3, R, R)."""
        return np.asarray(self.training.images[subset(len(self.training), count, part)])

    def tensors(self, store: ImageStore, count: int) -> Tensor:
        """A fixed random subset of a store as a uint8 tensor; all of it if it has fewer."""
        return store.__getitems__(subset(len(store), min(count, len(store))))

    def measured_before(self, family: str, about: dict) -> list[dict]:
        """The results of an earlier start with these settings and the same device and versions."""
        return [
            entry
            for entry in self.earlier
            if entry["family"] == family and about.items() <= entry.items() and not MOVED & entry.keys()
        ]
