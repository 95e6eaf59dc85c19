"""What the metrics of an evaluation have in common: the model, its images, the real ones, how a result names them."""

import argparse
import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from eval.features import ImageSet, images_of_files, images_of_store, subset
from eval.results import result
from pipelines import generate
from pipelines.generate import InputError
from training.data import ImageStore, open_image_store


class Evaluation:
    """What the metrics have in common: options, model, images, and the record that they add to."""

    def __init__(self, options: argparse.Namespace, state: PartialState):
        self.options, self.state = options, state
        self.out: Path = options.out
        source, self.commit = generate.find_pipeline(options.pipeline, options.revision)
        self.source = source
        # images may be drawn in half precision, but likelihoods and losses are of the weights as they are
        self.pipeline = generate.load_pipeline(source, "fp32", options.sampler).to(state.device)
        self.pipeline.unet.eval()
        generate.check_arguments(self.pipeline, options)
        self.weights_sha256 = {path.name: generate.sha256_of(path) for path in generate.weight_files(source)}
        self.earlier: list[dict] = []  # results of an earlier start
        self.training = self.open_store(options.split)
        if options.num_images > len(self.training):
            raise InputError(
                f"--num_images is {options.num_images}, but split {options.split} has {len(self.training)} images, and"
                " equal numbers are compared"
            )
        self.heldout = self.open_store(options.heldout_split) if options.heldout_split else None

    def open_store(self, split: str) -> ImageStore:
        """The reference data of a split, cropped and resized as the model was trained."""
        options, size = self.options, self.pipeline.unet.config.sample_size
        facts = self.source / "training.json"
        trained_on = json.loads(facts.read_text())["data"] if facts.exists() else {}
        crop = options.crop or trained_on.get("crop")
        if crop is None:
            raise InputError(f"{self.source} does not tell what crop it was trained on; give --crop")
        if not isinstance(size, int):
            raise InputError(f"the model draws {size} pixels; the reference data are squares")
        is_folder = os.path.isdir(options.reference)
        where = {"train_data_dir" if is_folder else "dataset_name": options.reference}
        open_it = {**where, "split": split, "crop": crop, "resolution": size, "image_column": options.image_column}
        generate.on_main_process(self.state, lambda: len(open_image_store(**open_it)))
        store = open_image_store(**open_it)
        is_train = split == options.split
        if is_train and trained_on.get("fingerprint") not in (None, store.fingerprint):
            print(f"note: split {split} is not what the model was trained on (other pixels)", flush=True)
        return store

    @property
    def setting(self) -> dict:
        """How the images were drawn, for a result."""
        options = self.options
        last = options.seed + options.num_images - 1
        return {
            "sampler": options.sampler,
            "steps": options.steps,
            "eta": options.eta,
            "seeds": f"{options.seed} to {last}",
            "dtype": options.dtype,
        }

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

    def draw_images(self) -> None:
        """Draws what is missing of the images, on all processes."""
        options = self.options
        name = f"{options.sampler}-{options.steps}-eta{options.eta:g}-{options.dtype}"
        folder = (options.images_dir or self.out / "images") / name
        arguments = ["--pipeline", options.pipeline, "--out", str(folder), "--scheduler", options.sampler]
        for flag in ("revision", "num_images", "seed", "steps", "eta", "batch_size", "dtype", "num_cpu_threads"):
            if getattr(options, flag) is not None:
                arguments += [f"--{flag}", str(getattr(options, flag))]
        generate.run(generate.parse_options(arguments), arguments)
        self.starts = json.loads((folder / generate.RECORD).read_text())["starts"]
        seeds = range(options.seed, options.seed + options.num_images)
        self.generated_set = images_of_files(generate.image_paths(folder, seeds))

    def drawing_time(self) -> list[dict]:
        """How long the drawing took, over all starts that finished."""
        done = [start for start in self.starts if "seconds" in start]
        drawn, seconds = sum(start["generated"] for start in done), sum(start["seconds"] for start in done)
        if not drawn:
            return []
        more = {"num_processes": done[-1]["num_processes"], "starts": len(done)}
        return [result("time", "drawing images", "seconds_drawing", seconds, n=drawn, **more, **self.setting)]

    @cached_property
    def generated(self) -> np.ndarray:
        """uint8 (n, 3, R, R), in order of the seeds."""
        return self.generated_set.read(range(self.generated_set.count))

    def real_set(self, count: int) -> ImageSet:
        """A fixed random subset of the reference."""
        return images_of_store(self.training, count)

    def real(self, count: int) -> np.ndarray:
        """The images of `real_set`, uint8 (count, 3, R, R)."""
        return np.asarray(self.training.images[subset(len(self.training), count)])

    def tensors(self, store: ImageStore, count: int) -> Tensor:
        """The same of a store, as a uint8 tensor; all of it if it has fewer."""
        return store.__getitems__(subset(len(store), min(count, len(store))))

    def measured_before(self, family: str, about: dict) -> dict | None:
        """A result of an earlier start with these settings."""
        for entry in self.earlier:
            if entry["family"] == family and about.items() <= entry.items():
                return entry
        return None
