"""Generates a folder of images: one PNG per seed, a contact sheet, and a record to reproduce them.

    python -m pipelines.generate --pipeline DIR_OR_HUB_ID --num_images N --seed S --scheduler NAME --steps K --out DIR

    DIR/seed-0000123.png   the image of seed 123, independent of other images, batch size and number of processes
                           (with the sampler ode, only up to its tolerance)
    DIR/contact_sheet.png  the first images in order of their seeds, at most 256
    DIR/generate.json      the settings, and every start that generated images: command, versions, device, speed

Running the same command again resumes where it stopped, even with a larger --num_images; other settings are rejected.
Several processes (`accelerate launch -m pipelines.generate`, torchrun) share the work. Exit codes: 0 all images exist,
1 failed, 2 bad input, 130 stopped by Ctrl-C; finished images are kept.
"""

import argparse
import sys
from pathlib import Path

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
from pipelines.loading import DTYPES, find_pipeline, load_pipeline
from training.processes import set_up_process
from training.sde import CONTINUOUS_SAMPLERS

# Flags for the settings of the continuous-time samplers: type and help
SAMPLER_SETTINGS = {
    "snr": (float, "for predictor_corrector: signal-to-noise ratio r of the Langevin steps"),
    "corrector_steps": (int, "for predictor_corrector: Langevin steps per noise level"),
    "tolerance": (float, "for ode: maximum relative error per step"),
    "churn": (float, "for edm_heun: S_churn; 0 is deterministic"),
}


def add_drawing_flags(parser: Parser, **defaults: int) -> None:
    """Adds the flags shared by all commands that sample from a model, except for the sampler's name."""
    add = parser.add_argument
    add("--pipeline", required=True, help="folder of a model repository, or its id on the Hub (owner/name)")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--num_images", type=int, help="image i has the seed --seed + i (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the first image (default 0)")
    add("--steps", type=int, default=50, help="sampling steps (default 50); ode chooses its own")
    add("--eta", type=float, default=0.0, help="for DDIM: 0 is deterministic, 1 as random as DDPM")
    for name, (kind, text) in SAMPLER_SETTINGS.items():
        add(f"--{name}", type=kind, help=text)
    labels = "class of all images, or several to cycle through; for a network with class embeddings"
    add("--class_label", type=int, nargs="+", help=labels)
    add("--guidance_scale", type=float, default=1.0, help="scale of classifier-free guidance (default 1: no guidance)")
    add("--batch_size", type=int, help="images per batch in each process (default %(default)s)")
    dtype = "precision of the network while sampling (default fp32); bf16 is not faster on every CPU"
    add("--dtype", choices=DTYPES, default="fp32", help=dtype)
    add("--num_cpu_threads", type=int, help="threads per process on the CPU (default: its share of the cores)")
    parser.set_defaults(**defaults)


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m pipelines.generate", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_drawing_flags(parser, num_images=64, batch_size=16)
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    samplers = [*SAMPLERS, *CONTINUOUS_SAMPLERS]
    parser.add_argument("--scheduler", choices=samplers, help="sampler (default: the repository's own)")
    options = parser.parse_args(arguments)
    least = {"num_images": 1, "batch_size": 1, "seed": 0, "eta": 0, "num_cpu_threads": 1}
    check_numbers(options, least, {"num_cpu_threads": MOST_THREADS, "eta": 1})
    check_seeds(options)
    return options


def check_arguments(pipeline: CustomUNetPipeline, options: argparse.Namespace) -> None:
    """Raises InputError for arguments that the pipeline would reject."""
    try:
        pipeline.check_inputs(options.steps, options.eta)
        pipeline.guidance(options.class_label, len(options.class_label or [0]), options.guidance_scale)
    except ValueError as error:
        raise InputError(str(error)) from error


def run(options: argparse.Namespace, arguments: list[str]) -> None:
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
