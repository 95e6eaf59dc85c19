"""A folder of generated images: one PNG per seed, a contact sheet, and a record to reproduce them."""

import argparse
import io
import itertools
import json
import math
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import diffusers
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from common import (
    Failed,
    InputError,
    difference,
    is_out_of_memory,
    make_folder,
    on_main_process,
    one_line,
    replace_file,
    sha256_of,
    without_folder,
)
from pipelines import CustomUNetPipeline
from pipelines.applications import enlarged
from pipelines.loading import weight_files

RECORD = "generate.json"
CONTACT_SHEET_IMAGES, SHOWN_SIZE = 256, 192  # of the contact sheet, whose images are enlarged to about this size


def image_path(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed:07d}.png"


def missing_seeds(folder: Path, seeds: Iterable[int]) -> list[int]:
    """The seeds that have no intact image in the folder."""
    return [seed for seed in seeds if not _is_intact(image_path(folder, seed))]


def _is_intact(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def generate_images(
    pipeline: CustomUNetPipeline, seeds: Sequence[int], options: argparse.Namespace, show_progress: bool
) -> int:
    """Writes the image of each seed and returns the total number of network evaluations.

    With K class labels, seed s gets label number s mod K.
    """
    labels, evaluations = options.class_label, 0
    firsts = range(0, len(seeds), options.batch_size)
    for first in tqdm(firsts, "generating", unit="batch", disable=not show_progress):
        batch = seeds[first : first + options.batch_size]
        try:
            result = pipeline(
                seeds=batch,
                num_inference_steps=options.steps,
                eta=options.eta,
                class_labels=labels and [labels[seed % len(labels)] for seed in batch],
                guidance_scale=options.guidance_scale,
            )
        except Exception as error:  # an untrusted model may contain anything
            if is_out_of_memory(error):
                raise
            raise Failed(f"the model cannot be run: {one_line(error) or type(error).__name__}") from error
        for seed, image in zip(batch, result.images, strict=True):
            _write_png(image_path(options.out, seed), image)
        evaluations += result.network_evaluations * len(batch)
    return evaluations


def draw_contact_sheet(folder: Path) -> None:
    """Draws the contact sheet of the first images in the folder, in order of their seeds."""
    paths = sorted(folder.glob("seed-*.png"), key=lambda path: (len(path.name), path.name))
    paths = itertools.islice(filter(_is_intact, paths), CONTACT_SHEET_IMAGES)
    images = [pil_to_tensor(Image.open(path)) for path in paths]
    grid = make_grid(images, nrow=math.ceil(math.sqrt(len(images))), padding=2, pad_value=255)
    factor = max(1, SHOWN_SIZE // max(images[0].shape))
    _write_png(folder / "contact_sheet.png", enlarged(to_pil_image(grid), factor))


def _write_png(path: Path, image: Image.Image) -> None:
    content = io.BytesIO()
    image.save(content, "PNG")
    replace_file(path, content.getvalue())


def fill_folder(
    pipeline: CustomUNetPipeline,
    source: Path,
    commit: str | None,
    options: argparse.Namespace,
    state: PartialState,
    command: str,
) -> None:
    """Generates the images that are missing in `options.out`, on all processes, and writes the record.

    Args:
        pipeline: pipeline with its sampler set.
        source, commit: results of `find_pipeline`.
        options: the checked flags of `pipelines.generate`.
        command: command line to record.

    Raises:
        InputError: if the folder holds images with other or unknown settings.
        Failed: if the pipeline raises an error, for example for non-finite images.
        OSError: if an image cannot be written, or another process is filling the folder.
    """
    lock = FileLock(options.out / ".lock")
    start = describe_start(options, command, state)

    def begin() -> tuple[dict, list[int]]:
        make_folder(options.out)
        try:
            lock.acquire(timeout=0)  # until this process ends, however it ends
        except Timeout as error:
            raise OSError(
                f"{options.out} is being written by another process; wait until it ends or choose another --out"
            ) from error
        record = open_record(options.out, describe(pipeline, source, options, commit))
        missing = missing_seeds(options.out, range(options.seed, options.seed + options.num_images))
        if missing:
            record["starts"].append(start)
        write_record(options.out, record)
        return record, missing

    record, missing = on_main_process(state, begin)
    started_at_seconds = time.perf_counter()
    own = missing[state.process_index :: state.num_processes]
    evaluations = generate_images(pipeline, own, options, show_progress=state.is_main_process)
    evaluations = sum(gather_object([evaluations]))  # waits for every process
    seconds = time.perf_counter() - started_at_seconds
    if state.is_main_process:
        draw_contact_sheet(options.out)
        if missing:
            speed = len(missing) / seconds
            start |= {"generated": len(missing), "seconds": round(seconds, 3), "images_per_second": round(speed, 3)}
            start["network_evaluations_per_image"] = round(evaluations / len(missing), 3)
            record["starts"][-1] = start
            write_record(options.out, record)
        there = options.num_images - len(missing)
        print(f"{options.out}: {len(missing)} images generated in {seconds:.1f} s, {there} already existed")
    lock.release()


# ---- The record


def describe(pipeline: CustomUNetPipeline, source: Path, options: argparse.Namespace, commit: str | None) -> dict:
    """Everything that determines the images; images in one folder must have the same `settings`."""
    scheduler = json.loads(pipeline.scheduler.to_json_string())
    del scheduler["_diffusers_version"]
    sampler, labels = pipeline.continuous_sampler, options.class_label
    settings = {
        "weights_sha256": {path.name: sha256_of(path) for path in weight_files(source)},
        "scheduler": scheduler,
        "num_inference_steps": None if sampler is not None and sampler.name == "ode" else options.steps,
        "eta": options.eta,
        "dtype": options.dtype,
        "class_label": labels[0] if labels and len(labels) == 1 else labels,
        "image_size": list(pipeline.image_shape[1:]),
    }
    if sampler is not None:
        settings["continuous_sampler"] = {"name": sampler.name} | sampler.settings
    if labels is not None:
        settings["guidance_scale"] = options.guidance_scale
    about = {"pipeline": without_folder(options.pipeline), "revision": commit, "sampler": options.scheduler}
    return about | {"settings": settings}


def describe_start(options: argparse.Namespace, command: str, state: PartialState) -> dict:
    """The options of one start, and the machine and software that run it."""
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return {
        "command": command,
        "first_seed": options.seed,
        "num_images": options.num_images,
        "batch_size": options.batch_size,
        "num_processes": state.num_processes,
        "device": torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type,
        "versions": {"python": platform.python_version()} | versions,
    }


def open_record(folder: Path, description: dict) -> dict:
    """The record in the folder, or a new one; InputError if it holds images with unknown or other settings."""
    if not (folder / RECORD).exists():
        images = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".png")
        if images:
            raise InputError(
                f"{folder} holds {len(images)} PNG files, such as {images[0]}, but no {RECORD} that"
                " records how they were made; choose another --out"
            )
        return description | {"starts": []}
    record = json.loads((folder / RECORD).read_text())
    different = difference(_flat(record["settings"]), _flat(description["settings"]))
    if different:
        raise InputError(f"{folder} holds images with other settings ({different}); choose another --out")
    return record


def _flat(settings: dict) -> dict:
    flat = {}
    for name, value in settings.items():
        flat |= {f"{name} {key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def write_record(folder: Path, record: dict) -> None:
    replace_file(folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())
