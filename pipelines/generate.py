"""Generates a folder of images: one PNG a seed, a contact sheet, and what is needed to make them again.

    python -m pipelines.generate --pipeline DIR_OR_HUB_ID --num_images N --seed S --scheduler NAME --steps K --out DIR

    DIR/seed-0000123.png   the image of seed 123; it depends on no other image, batch size or number of processes, but
                           of the sampler ode as much as its tolerance allows
    DIR/contact_sheet.png  the first images in order of the seeds, at most 256
    DIR/generate.json      the settings, and every start that generated images: command, versions, device, speed

The same command started again goes on where it stopped, also with more images; other settings are refused. Several
processes (`accelerate launch -m pipelines.generate`, torchrun) share the work. Exit codes: 0 all images are there, 1
failed, 2 bad input, 130 stopped by Ctrl-C; what is there is kept.
"""

import argparse
import io
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from filelock import FileLock, Timeout
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from common import (
    MOST_THREADS,
    Failed,
    InputError,
    Parser,
    check_numbers,
    check_seeds,
    command_line,
    is_out_of_memory,
    make_folder,
    on_main_process,
    replace_file,
    run_command,
    sha256_of,
    without_folder,
)
from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.loading import DTYPES, check_schedule, find_pipeline, load_pipeline, weight_files
from training.sde import CONTINUOUS_SAMPLERS

RECORD = "generate.json"
CONTACT_SHEET = "contact_sheet.png"
CONTACT_SHEET_IMAGES = 256
# Settings of the samplers in continuous time, as flags: type and help
SAMPLER_SETTINGS = {
    "snr": (float, "of predictor_corrector: signal-to-noise ratio r of a Langevin step"),
    "corrector_steps": (int, "of predictor_corrector: Langevin steps at each noise level"),
    "tolerance": (float, "of ode: error of a step"),
    "churn": (float, "of edm_heun: S_churn, 0 is deterministic"),
    "churn_min": (float, "of edm_heun: S_tmin, the smallest noise level with churn"),
    "churn_max": (float, "of edm_heun: S_tmax, the largest one"),
    "noise_factor": (float, "of edm_heun: S_noise, standard deviation of the noise that churn adds"),
}


# ---- The images of a folder


def image_path(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed:07d}.png"


def image_paths(folder: Path, seeds: Iterable[int]) -> list[Path]:
    """The images of these seeds, in their order.

    Raises:
        FileNotFoundError: naming the first one that is missing or damaged.
    """
    seeds = list(seeds)
    missing = missing_seeds(folder, seeds)
    if missing:
        first = image_path(folder, missing[0]).name
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(seeds)} images, the first being {first}; generate them first"
        )
    return [image_path(folder, seed) for seed in seeds]


def missing_seeds(folder: Path, seeds: Iterable[int]) -> list[int]:
    """Those without an intact image in the folder."""
    return [seed for seed in seeds if not _is_intact(image_path(folder, seed))]


class Generated(NamedTuple):
    """How many images were generated, and how many network evaluations all of them took together."""

    num_images: int
    network_evaluations: int


def generate_images(
    pipeline: CustomUNetPipeline,
    folder: Path,
    seeds: Iterable[int],
    *,
    batch_size: int,
    num_inference_steps: int,
    eta: float = 0.0,
    class_label: Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    show_progress: bool = False,
) -> Generated:
    """Writes the images of these seeds that the folder lacks, in this process, with the pipeline's sampler.

    An image appears under its name only when it is complete. That those in the folder are of the same settings is
    for the caller to know; see `open_record`.

    Args:
        class_label: for a network with class embeddings; of K labels seed s has the label s mod K of them.

    Raises:
        Failed: for arguments that the pipeline refuses, or images that are not finite.
        OSError: if an image cannot be written.
    """
    missing, evaluations = missing_seeds(folder, seeds), 0
    with tqdm(total=len(missing), desc="generating", unit="image", disable=not show_progress) as bar:
        for first in range(0, len(missing), batch_size):
            batch = missing[first : first + batch_size]
            try:
                result = pipeline(
                    seeds=batch,
                    num_inference_steps=num_inference_steps,
                    eta=eta,
                    class_labels=class_label and [class_label[seed % len(class_label)] for seed in batch],
                    guidance_scale=guidance_scale,
                )
            except ValueError as error:
                raise Failed(str(error)) from error
            except (ArithmeticError, RuntimeError) as error:  # a configuration from a stranger may hold any numbers
                if is_out_of_memory(error):
                    raise
                raise Failed(f"the model cannot be run: {error}") from error
            for seed, image in zip(batch, result.images, strict=True):
                _write_png(image_path(folder, seed), image)
            evaluations += result.network_evaluations * len(batch)
            bar.update(len(batch))
    return Generated(len(missing), evaluations)


def draw_contact_sheet(folder: Path) -> None:
    paths = sorted(folder.glob("seed-*.png"), key=lambda path: (len(path.name), path.name))
    paths = list(itertools.islice(filter(_is_intact, paths), CONTACT_SHEET_IMAGES))
    images = [pil_to_tensor(Image.open(path)) for path in paths]
    grid = make_grid(images, nrow=math.ceil(math.sqrt(len(images))), padding=2, pad_value=255)
    _write_png(folder / CONTACT_SHEET, to_pil_image(grid))


def _is_intact(path: Path) -> bool:
    """Whether it is a PNG with all of its chunks and the right checksums."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _write_png(path: Path, image: Image.Image) -> None:
    content = io.BytesIO()
    image.save(content, "PNG")
    replace_file(path, content.getvalue())


# ---- The record of a folder


def open_record(folder: Path, description: dict) -> dict:
    """The record in the folder, or a new one.

    Args:
        description: by `describe`.

    Raises:
        InputError: if the folder holds images of other settings, or of unknown ones.
    """
    path = folder / RECORD
    if not path.exists():
        images = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".png")
        if images:
            raise InputError(
                f"{folder} holds {len(images)} PNG files, {images[0]} for one, but no {RECORD} that"
                " tells how they were made; take another --out"
            )
        return description | {"starts": []}
    try:
        record = json.loads(path.read_text())
        there, here = _flat(record["settings"]), _flat(description["settings"])
        record["starts"] = list(record["starts"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged; take another --out, or delete {folder} to start anew") from error
    names = [name for name in here | there if there.get(name) != here.get(name)]
    if names:
        differences = [f"{name} is {there.get(name)!s:.32} there and {here.get(name)!s:.32} now" for name in names[:3]]
        more = f", and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(
            f"{folder} holds images of other settings ({'; '.join(differences)}{more}); take another --out"
        )
    return record


def write_record(folder: Path, record: dict) -> None:
    replace_file(folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())


def describe(pipeline: CustomUNetPipeline, source: Path, options: argparse.Namespace, commit: str | None) -> dict:
    """What makes the images what they are; images of the same `settings` belong in one folder."""
    scheduler = json.loads(pipeline.scheduler.to_json_string())
    del scheduler["_diffusers_version"]
    size, sampler = pipeline.unet.config.sample_size, pipeline.continuous_sampler
    labels, more = options.class_label, {}
    if sampler is not None:
        finite = {name: value if math.isfinite(value) else None for name, value in sampler.settings.items()}
        more["continuous_sampler"] = {"name": sampler.name} | finite
    if labels is not None:
        more["guidance_scale"] = options.guidance_scale
    return {
        "pipeline": without_folder(options.pipeline),
        "revision": commit,
        "sampler": options.scheduler,
        "settings": {
            "weights_sha256": {path.name: sha256_of(path) for path in weight_files(source)},
            "scheduler": scheduler,
            "num_inference_steps": None if sampler is not None and sampler.name == "ode" else options.steps,
            "eta": options.eta,
            "dtype": options.dtype,
            "class_label": labels[0] if labels is not None and len(labels) == 1 else labels,
            "image_size": [size, size] if isinstance(size, int) else list(size),
        }
        | more,
    }


def describe_start(options: argparse.Namespace, command: str, state: PartialState) -> dict:
    """What was asked for, and what draws it."""
    return {
        "command": command,
        "first_seed": options.seed,
        "num_images": options.num_images,
        "batch_size": options.batch_size,
        "num_processes": state.num_processes,
        "device": torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }


def _flat(settings: dict) -> dict:
    flat = {}
    for name, value in settings.items():
        flat |= {f"{name} {key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


# ---- The command


def add_drawing_flags(parser: Parser, **defaults: int) -> None:
    """Adds the flags of all commands that draw images from a model, but for the sampler's name."""
    add = parser.add_argument
    add("--pipeline", required=True, help="folder of a model repository, or its id on the Hub (owner/name)")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--num_images", type=int, help="image i has the seed --seed + i (default %(default)s)")
    add("--seed", type=int, default=0, help="of the first image (default 0)")
    add("--steps", type=int, default=50, help="sampling steps (default 50); ode takes its own")
    add("--eta", type=float, default=0.0, help="of DDIM: 0 is deterministic, 1 as random as DDPM")
    for name, (kind, text) in SAMPLER_SETTINGS.items():
        add(f"--{name}", type=kind, help=text)
    labels = "class of all images, or several that the seeds take in turn; for a network with class embeddings"
    add("--class_label", type=int, nargs="+", help=labels)
    add("--guidance_scale", type=float, default=1.0, help="of classifier-free guidance; 1, the default, is without")
    add("--batch_size", type=int, help="images at once, in each process (default %(default)s)")
    dtype = "of the network while sampling (default fp32); bf16 is not faster on every CPU"
    add("--dtype", choices=DTYPES, default="fp32", help=dtype)
    add("--num_cpu_threads", type=int, help="of a process on the CPU (default: its share of the cores)")
    parser.set_defaults(**defaults)


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Raises InputError."""
    parser = Parser(prog="python -m pipelines.generate", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_drawing_flags(parser, num_images=64, batch_size=16)
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    samplers = [*SAMPLERS, *CONTINUOUS_SAMPLERS]
    parser.add_argument("--scheduler", choices=samplers, help="sampler (default: the repository's own)")
    options = parser.parse_args(arguments)
    least = {"num_images": 1, "batch_size": 1, "seed": 0, "eta": 0, "num_cpu_threads": 1}
    check_numbers(options, least, {"num_cpu_threads": MOST_THREADS, "eta": 1})
    if "\0" in str(options.out):
        parser.error("--out has a NUL character, which no path can have")
    check_seeds(options)
    return options


def check_arguments(pipeline: CustomUNetPipeline, options: argparse.Namespace) -> None:
    """Raises InputError for what the pipeline would refuse."""
    try:
        pipeline.check_inputs(options.steps, options.eta)
        if pipeline.continuous_sampler is None:
            check_schedule(pipeline.scheduler, options.steps)
        pipeline.guidance(options.class_label, len(options.class_label or [0]), options.guidance_scale)
    except ValueError as error:
        raise InputError(str(error)) from error


def set_up_process(num_cpu_threads: int | None) -> PartialState:
    """Accelerate, and threads: `accelerate launch` leaves a process on the CPU one, however many cores there are."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu, timeout=timedelta(hours=2))  # the first process to be ready waits for the last one
    if state.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(num_cpu_threads or max(share, 1))
    return state


def take_folder(folder: Path, lock: FileLock) -> None:
    """Makes the folder and keeps other starts out of it, until this process ends however it ends."""
    make_folder(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OSError(f"{folder} is in use by another start; wait for it or take another --out") from error


def run(options: argparse.Namespace, arguments: list[str]) -> None:
    """Generates what is missing, on all processes."""
    state = set_up_process(options.num_cpu_threads)
    commit = on_main_process(state, lambda: find_pipeline(options.pipeline, options.revision)[1])
    source, commit = find_pipeline(options.pipeline, commit)
    settings = {name: value for name in SAMPLER_SETTINGS if (value := getattr(options, name)) is not None}
    pipeline = load_pipeline(source, options.dtype, options.scheduler, **settings).to(state.device)
    check_arguments(pipeline, options)
    fill_folder(pipeline, source, commit, options, state, command_line("pipelines.generate", arguments))


def fill_folder(
    pipeline: CustomUNetPipeline,
    source: Path,
    commit: str | None,
    options: argparse.Namespace,
    state: PartialState,
    command: str,
) -> None:
    """Generates the images that the folder `options.out` lacks, on all processes, and writes its record.

    Args:
        pipeline: with its sampler set.
        source, commit: by `find_pipeline`.
        options: as `parse_options` returns them, and checked.
        command: that is recorded.

    Raises:
        InputError: as `open_record`.
        Failed, OSError: as `generate_images`.
    """
    lock = FileLock(options.out / ".lock")
    start = describe_start(options, command, state)

    def begin() -> tuple[dict, list[int]]:
        take_folder(options.out, lock)
        record = open_record(options.out, describe(pipeline, source, options, commit))
        missing = missing_seeds(options.out, range(options.seed, options.seed + options.num_images))
        if missing:
            record["starts"].append(start)
        write_record(options.out, record)
        return record, missing

    record, missing = on_main_process(state, begin)
    started_at_seconds = time.perf_counter()
    generated = generate_images(
        pipeline,
        options.out,
        missing[state.process_index :: state.num_processes],
        batch_size=options.batch_size,
        num_inference_steps=options.steps,
        eta=options.eta,
        class_label=options.class_label,
        guidance_scale=options.guidance_scale,
        show_progress=state.is_main_process,
    )
    evaluations = sum(share.network_evaluations for share in gather_object([generated]))  # waits for every process
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
        print(f"{options.out}: {len(missing)} images generated in {seconds:.1f} s, {there} were there")
    lock.release()


def main(arguments: list[str]) -> int:
    def generate() -> None:
        run(parse_options(arguments), arguments)
        PartialState().destroy_process_group()

    stopped = "stopped; the images so far are kept, and the same command goes on"
    return run_command(generate, stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
