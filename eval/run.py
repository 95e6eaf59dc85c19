"""Evaluates a model: image quality, likelihood of real images, memorisation and sampling cost.

    python -m eval.run --pipeline DIR_OR_HUB_ID --reference DATA --num_images 10000 --out runs/eval/NAME

DATA is a folder, a Hub id or `synthetic-faces`, cropped as in training. OUT/results.json has every value and how it
was measured, OUT/results.md a table, OUT/*.png the figures. A second run reuses the images in OUT/images and the
features in the user's cache. `--write_card` adds the results to the model card; `python -m eval.compare` compares the
results of several models. DDPM and SDE models are measured in the same way; the variational bound and the loss by
timestep are only for models with discrete timesteps.

    swd            sliced Wasserstein distance, with the floor (real against real)        eval/swd.py
    colours        brightness, contrast and saturation                                   eval/colours.py
    features       FID, KID, precision and recall, FD-DINOv2, CMMD                        eval/distances.py
    memorisation   nearest training images of generated and of held-out images            eval/memorisation.py
    likelihood     bits/dim by the variational bound and by the probability-flow ODE      eval/likelihood.py
    heldout        loss by timestep and noise level, held-out and training images         eval/heldout.py
    cost           quality, network evaluations and seconds by sampler and steps          eval/measures.py

Several processes (`accelerate launch -m eval.run`, torchrun) share generation and features. Exit codes: 0 done, 1
failed, 2 bad input, 130 stopped by Ctrl-C; results measured so far are in results.json.
"""

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import ModelMixin

from common import MOST_THREADS, InputError, Parser, check_numbers, check_seeds, command_line, make_folder, run_command
from custom_unet import CustomUNet2DModel
from eval.evaluation import COST_SAMPLERS, COST_SAMPLERS_IN_CONTINUOUS_TIME, Evaluation, parse_sampler
from eval.measures import METRICS, check_metrics
from eval.results import quality_table, read_results, result, write_results
from pipelines import generate
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.model_card import write_card
from training.processes import set_up_process
from training.sde import CONTINUOUS_SAMPLERS

LIBRARIES = "torch diffusers accelerate clean-fid scipy".split()
FEWEST_IMAGES = 2048  # with fewer, the covariance of Inception's 2,048 features is singular
NEED_IMAGES = {"swd", "colours", "features", "memorisation"}
ON_ALL_PROCESSES = {"features", "cost"}  # only the main process measures the other metrics
ON_THE_CARD = {"swd", "features", "memorisation", "likelihood"}
# Two results with the same name and the same values for these keys are the same measurement
IDENTITY = "split sampler steps eta sampler_settings class_label guidance_scale n".split()


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Parses and checks the arguments; raises InputError."""
    parser = Parser(prog="python -m eval.run", description=__doc__.splitlines()[0], allow_abbrev=False)
    generate.add_drawing_flags(parser, num_images=10000, batch_size=64)
    add = parser.add_argument
    samplers = [*SAMPLERS, *CONTINUOUS_SAMPLERS]
    add("--sampler", choices=samplers, help="default: ddim, or the model's own if trained in continuous time")
    add("--reference", required=True, help="real images: a folder, a Hub id or synthetic-faces")
    add("--split", default="train", help="split that the model was trained on (default train)")
    add("--heldout_split", default="validation", help="split that it was not trained on ('' for none)")
    add("--crop", help="name of the crop (default: as in training)")
    add("--reference_resolution", type=int, help="side of the real images; only for features")
    add("--image_column", default="image")
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="default: all")
    add("--out", type=Path, required=True, help="folder for results.json and figures")
    add("--images_dir", type=Path, help="folder for generated images (default OUT/images)")
    add("--allow_few", action="store_true", help=f"allow fewer than {FEWEST_IMAGES} images for FID and the like")
    features = "inception[:legacy_tensorflow], dinov2, clip or a TorchScript file (default: inception)"
    add("--features", nargs="+", default=["inception"], help=features)
    add("--inception_path", type=Path, help="Inception's weights (default: those of `make inception`)")
    add("--k", type=int, default=5, help="nearest neighbours for precision, recall, density and coverage")
    add("--likelihood_images", type=int, default=256, help="images per split for the variational bound")
    add("--bound_evaluations", type=int, default=20, help="network evaluations per image for the bound")
    add("--ode_images", type=int, default=32, help="images per split for the ODE likelihood")
    add("--ode_tolerance", type=float, default=1e-3)
    duplicates = "RMS in grey levels; held-out images nearer than this to a training image are left out as near-copies"
    add("--duplicate_distance", type=float, default=15.0, help=duplicates)
    add("--heldout_images", type=int, default=512, help="images per split for the held-out errors")
    add("--cost_images", type=int, default=FEWEST_IMAGES, help="images per sampler setting for the cost curve")
    usual = f"default: {' '.join(COST_SAMPLERS)}; in continuous time {' '.join(COST_SAMPLERS_IN_CONTINUOUS_TIME)}"
    how = {"nargs": "+", "type": parse_sampler, "metavar": "NAME[:STEPS[:ETA]]", "help": usual}
    add("--cost_samplers", **how)
    add("--write_card", action="store_true", help="copy results.json to the pipeline's folder and update its card")
    options = parser.parse_args(arguments)
    check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raises InputError for invalid options."""
    counts = "num_images batch_size num_cpu_threads k likelihood_images ode_images cost_images steps"
    counts = [*counts.split(), "reference_resolution"]
    least = dict.fromkeys(counts, 1) | {"ode_tolerance": 1e-12, "bound_evaluations": 2, "heldout_images": 2}
    least |= dict.fromkeys(("seed", "eta", "duplicate_distance", *generate.SAMPLER_SETTINGS), 0)
    check_numbers(options, least, {"num_cpu_threads": MOST_THREADS, "eta": 1})
    check_seeds(options)
    for metric, flag in {"features": "num_images", "cost": "cost_images"}.items():
        count = getattr(options, flag)
        if metric in options.metrics and count < 2:
            raise InputError(f"--{flag} is {count}; a distance between distributions needs at least 2")
        if metric in options.metrics and count < FEWEST_IMAGES and not options.allow_few:  # FID falls by about 1/n
            enough = f"use at least {FEWEST_IMAGES} (--{flag}), or pass --allow_few"
            raise InputError(f"{count} images are too few for a comparable value; {enough}")
    if options.reference_resolution and options.metrics != ["features"]:
        raise InputError("with --reference_resolution, only features can be compared; add --metrics features")
    if "features" in options.metrics and options.k >= options.num_images:
        raise InputError(f"--k is {options.k}; it must be below --num_images {options.num_images}")
    if options.write_card and not Path(options.pipeline).is_dir():
        raise InputError(f"--write_card is for a folder, but --pipeline is {options.pipeline}")


def run(options: argparse.Namespace, command: str, network_class: type[ModelMixin]) -> None:
    """Measures the requested metrics and writes results.json after each result; see `ON_ALL_PROCESSES`."""
    state = set_up_process(options.num_cpu_threads)
    path = options.out / "results.json"
    evaluation = Evaluation(options, state, command, network_class)
    check_metrics(evaluation)
    record = open_record(evaluation, path)
    if state.is_main_process:
        make_folder(options.out)
    if not NEED_IMAGES.isdisjoint(options.metrics):
        evaluation.generated, starts, _ = evaluation.draw(evaluation.sampler_setting, options.num_images)
        for entry in drawing_time(starts, evaluation.describe_images()):
            keep(record, entry)

    for name in options.metrics:
        if not (state.is_main_process or name in ON_ALL_PROCESSES):
            continue
        started_at_seconds = time.perf_counter()
        for entry in METRICS[name](evaluation):
            keep(record, entry)
            if state.is_main_process:
                write_results(path, record)
        if state.is_main_process:
            print(f"{name}: {time.perf_counter() - started_at_seconds:.0f} s", flush=True)
    state.wait_for_everyone()
    if state.is_main_process:
        (options.out / "results.md").write_text(f"{quality_table(record['results'])}\n")
        print(f"wrote {path}", flush=True)
        if options.write_card:
            results = [entry for entry in record["results"] if entry["family"] in ON_THE_CARD]
            write_results(Path(options.pipeline) / "results.json", record | {"results": results})
            write_card(Path(options.pipeline))


def drawing_time(starts: list[dict], about: dict) -> Iterator[dict]:
    """The time to draw the images, summed over all starts that finished; yields nothing if they drew no image."""
    done = [start for start in starts if "seconds" in start]
    drawn, seconds = sum(start["generated"] for start in done), sum(start["seconds"] for start in done)
    if drawn:
        evaluations = sum(start["generated"] * start["network_evaluations_per_image"] for start in done) / drawn
        more = {"num_processes": done[-1]["num_processes"], "starts": len(done), "network_evaluations": evaluations}
        yield result("time", "drawing images", "seconds_drawing", seconds, n=drawn, **more, **about)


def open_record(evaluation: Evaluation, path: Path) -> dict:
    """The record in the output folder if its weights and real images are the same, otherwise a new one."""
    header = {
        "pipeline": Path(evaluation.options.pipeline).name,
        "revision": evaluation.commit,
        "weights_sha256": evaluation.weights_sha256,
        "reference": evaluation.reference,
    }
    device = evaluation.state.device
    now = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "date": datetime.now(UTC).date().isoformat(),
    }
    results, there = [], read_results(path) if path.exists() else {}
    if all(there.get(key) == value for key, value in header.items()):
        moved = {key: there.get(key) for key in now if there.get(key) != now[key]}  # from another machine or day
        results = [moved | entry for entry in there["results"]]
    elif there:
        print(f"{path} is for other weights or real images and will be replaced", flush=True)
    return header | {"model": evaluation.describe_model()} | now | {"results": results}


def keep(record: dict, entry: dict) -> None:
    """Adds a result, which replaces the same measurement from an earlier start or a "not measured" entry."""

    def is_replaced(old: dict) -> bool:
        same_name = (old["family"], old["name"]) == (entry["family"], entry["name"])
        return same_name and (old["value"] is None or all(old.get(key) == entry.get(key) for key in IDENTITY))

    record["results"] = [old for old in record["results"] if not is_replaced(old)] + [entry]


def main(arguments: list[str], network_class: type[ModelMixin] = CustomUNet2DModel) -> int:
    def evaluate() -> None:
        run(parse_options(arguments), command_line("eval.run", arguments), network_class)
        PartialState().destroy_process_group()

    return run_command(evaluate, "stopped; measured values and images are kept; run the same command to continue")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
