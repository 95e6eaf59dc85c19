"""Generates a folder of images: one PNG per seed, a contact sheet, and what is needed to make them again.

    python -m pipelines.generate --pipeline DIR_OR_HUB_ID --num_images N --seed S --scheduler NAME --steps K --out DIR

    DIR/seed-0000123.png   the image of seed 123; it depends on no other image, batch size or number of processes, but
                           of the sampler ode as much as its tolerance allows
    DIR/contact_sheet.png  the first images in order of the seeds, at most 256
    DIR/generate.json      the settings, and every start that generated images: command, versions, device, speed

The same command started again resumes where it stopped, also with more images; other settings are refused. Several
processes (`accelerate launch -m pipelines.generate`, torchrun) share the work. Exit codes: 0 all images are there, 1
failed, 2 bad input, 130 stopped by Ctrl-C; what is there is kept.
"""

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from common import (
    MOST_THREADS,
    InputError,
    Parser,
    check_numbers,
    check_seeds,
    command_line,
    on_main_process,
    run_command,
)
from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.image_folder import fill_folder
from pipelines.loading import DTYPES, check_schedule, find_pipeline, load_pipeline
from training.sde import CONTINUOUS_SAMPLERS

# Settings of the samplers in continuous time, as flags: type and help
SAMPLER_SETTINGS = {
    "snr": (float, "of predictor_corrector: signal-to-noise ratio r of a Langevin step"),
    "corrector_steps": (int, "of predictor_corrector: Langevin steps at each noise level"),
    "tolerance": (float, "of ode: error per step"),
    "churn": (float, "of edm_heun: S_churn, 0 is deterministic"),
    "churn_min": (float, "of edm_heun: S_tmin, the smallest noise level with churn"),
    "churn_max": (float, "of edm_heun: S_tmax, the largest noise level with churn"),
    "noise_factor": (float, "of edm_heun: S_noise, standard deviation of the noise that churn adds"),
}


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
    add("--guidance_scale", type=float, default=1.0, help="of classifier-free guidance (default 1: without)")
    add("--batch_size", type=int, help="images at once, in each process (default %(default)s)")
    dtype = "of the network while sampling (default fp32); bf16 is not faster on every CPU"
    add("--dtype", choices=DTYPES, default="fp32", help=dtype)
    add("--num_cpu_threads", type=int, help="per process on the CPU (default: its share of the cores)")
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


def run(options: argparse.Namespace, arguments: list[str]) -> None:
    """Generates what is missing, on all processes."""
    state = set_up_process(options.num_cpu_threads)
    commit = on_main_process(state, lambda: find_pipeline(options.pipeline, options.revision)[1])
    source, commit = find_pipeline(options.pipeline, commit)
    settings = {name: value for name in SAMPLER_SETTINGS if (value := getattr(options, name)) is not None}
    pipeline = load_pipeline(source, options.dtype, options.scheduler, **settings).to(state.device)
    check_arguments(pipeline, options)
    fill_folder(pipeline, source, commit, options, state, command_line("pipelines.generate", arguments))
    state.destroy_process_group()


def main(arguments: list[str]) -> int:
    stopped = "stopped; the images so far are kept; run the same command to continue"
    return run_command(lambda: run(parse_options(arguments), arguments), stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
