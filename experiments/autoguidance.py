"""Measures guidance by a worse model of the same kind, such as an earlier checkpoint of the same training.

    python -m experiments.autoguidance --pipeline DIR --worse DIR --reference DATA --scales 1 1.5 2 --out DIR

At every evaluation the network's output F becomes G + w (F - G), G being the worse network's for the same noisy image
(Karras et al. 2024, arXiv 2406.02507): where the two disagree, the image is pushed on in the direction of the better
one. Scale w = 1 is the model alone, at half the cost.

    OUT/autoguidance.json   for each scale: SWD in all and by level, network evaluations, seconds
    OUT/autoguidance.md     the same as a table
    OUT/autoguidance.png    images of the same seeds, a row for each scale
    OUT/scale-W.png         the first 100 images of each scale, row by row

Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from common import (
    MOST_THREADS,
    InputError,
    Parser,
    check_numbers,
    check_seeds,
    command_line,
    make_folder,
    run_command,
    without_folder,
)
from eval.cost import SamplerSetting, sample
from eval.features import subset
from eval.figures import plot_image_rows
from eval.results import number, result, table, write_results
from eval.swd import sliced_wasserstein, swd_floor
from experiments.guidance import LIBRARIES, REFERENCE
from pipelines import CustomUNetPipeline, generate
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.loading import DTYPES, find_pipeline, load_pipeline
from training.data import ImageStore, open_image_store
from training.facts import device_name, training_in_all

NUM_SHOWN = 16  # images of each scale in the figure
SHEET_IMAGES = 100
SHARED = (  # of the two models' configurations
    "prediction_type num_train_timesteps beta_schedule beta_start beta_end rescale_betas_zero_snr in_channels"
    " sample_size num_class_embeds"
).split()


@contextmanager
def autoguidance(unet: torch.nn.Module, worse: torch.nn.Module, scale: float) -> Iterator[None]:
    """While it lasts, `unet(x, t).sample` is extrapolated from that of `worse` by the scale; 1 leaves it as it is."""

    def extrapolate(_, arguments: tuple, output: UNet2DOutput) -> UNet2DOutput:
        start = worse(*arguments).sample
        return UNet2DOutput(sample=start + scale * (output.sample - start))

    if scale == 1:
        yield
        return
    handle = unet.register_forward_hook(extrapolate)
    try:
        yield
    finally:
        handle.remove()


def check_fit(pipeline: CustomUNetPipeline, worse: CustomUNetPipeline) -> None:
    """Whether the outputs of the two networks mean the same.

    Raises:
        InputError: if not.
    """
    if pipeline.is_continuous or pipeline.unet.config.get("num_class_embeds") is not None:
        raise InputError("--pipeline has continuous time or classes; autoguidance is for unconditional DDPM models")
    ours, theirs = ({**pipe.scheduler.config, **pipe.unet.config} for pipe in (pipeline, worse))
    for name in SHARED:
        if ours.get(name) != theirs.get(name):
            raise InputError(f"--worse has {name} {theirs.get(name)}, --pipeline {ours.get(name)}; they must agree")


def open_reference(options: Namespace, source: Path, size: int) -> ImageStore:
    """Real images as the model was trained on them.

    Raises:
        InputError: if they cannot be had, or are too few for two sets.
    """
    facts = json.loads((source / "training.json").read_text()) if (source / "training.json").exists() else {}
    crop = facts.get("data", {}).get("crop")
    if crop is None:
        raise InputError(f"{source} does not tell what crop it was trained on")
    where = {"train_data_dir" if Path(options.reference).is_dir() else "dataset_name": options.reference}
    store = open_image_store(**where, split=options.split, crop=crop, resolution=size)
    if len(store) < 2 * options.num_images:
        raise InputError(
            f"split {options.split} has {len(store)} images, and two sets of {options.num_images} are compared; take"
            " fewer --num_images"
        )
    return store


def summary(record: dict) -> str:
    """Markdown: a row for each scale."""
    results = record["results"]
    levels = {f"level {name}": f"level {name}x{name}" for name in results[0]["levels"]}
    rows = [entry | {f"level {name}": value for name, value in entry["levels"].items()} for entry in results]
    columns = {"guidance_scale": "guidance scale", "value": "SWD, mean"} | levels
    columns |= {"network_evaluations": "network evaluations an image", "seconds_per_image": "seconds an image"}
    first, seen = results[0], {name: number(record[name]["images_seen"]) for name in ("pipeline", "worse")}
    return (
        f"{table(rows, columns)}\n\n{first['n']:,} images of each scale, seeds {first['seeds']}, {first['sampler']},"
        f" {first['steps']} steps; of as many real ones SWD is {number(first['floor'])}. The model had seen"
        f" {seen['pipeline']} images in training, the worse one {seen['worse']}.\n"
    )


def parse_options(arguments: list[str]) -> Namespace:
    """Raises InputError."""
    parser = Parser(prog="python -m experiments.autoguidance", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pipeline", required=True, help="folder of a model repository, or its id on the Hub")
    add("--worse", required=True, help="the same of a model that is worse")
    add("--reference", required=True, help="real images: a folder, a Hub id or synthetic-faces")
    add("--split", default="train", help="of the reference (default train)")
    add("--scales", required=True, nargs="+", type=float, help="w; 1 is the model alone")
    add("--out", required=True, type=Path, help="folder for numbers, table and figure")
    add("--num_images", type=int, default=1024, help="of each scale (default 1024)")
    add("--seed", type=int, default=0, help="of the first image")
    add("--sampler", choices=SAMPLERS, default="ddim")
    add("--steps", type=int, default=20, help="of the sampler (default 20)")
    add("--dtype", choices=DTYPES, default="fp32", help="of the networks")
    add("--batch_size", type=int, default=64)
    add("--num_cpu_threads", type=int)
    options = parser.parse_args(arguments)
    least = dict.fromkeys(("num_images", "steps", "batch_size", "num_cpu_threads"), 1) | {"seed": 0, "scales": 0}
    check_numbers(options, least, {"num_cpu_threads": MOST_THREADS})
    if len(set(options.scales)) < len(options.scales):
        parser.error(f"--scales are {' '.join(f'{scale:g}' for scale in options.scales)}; give each once")
    check_seeds(options)
    return options


def measure(images: np.ndarray, real: np.ndarray) -> dict:
    """`value`, the mean over the levels, and `levels`."""
    levels = sliced_wasserstein(images, real)
    return {"value": float(np.mean([*levels.values()])), "levels": {str(k): v for k, v in levels.items()}}


def run(options: Namespace, arguments: Sequence[str]) -> None:
    """Checks everything, then draws and measures; what was measured is written down after each scale."""
    state = generate.set_up_process(options.num_cpu_threads)
    source, commit = find_pipeline(options.pipeline, None)
    worse_source, worse_commit = find_pipeline(options.worse, None, "--worse")
    pipeline, worse = (load_pipeline(s, options.dtype, None).to(state.device) for s in (source, worse_source))
    check_fit(pipeline, worse)
    store = open_reference(options, source, pipeline.unet.config.sample_size)
    n, setting = options.num_images, SamplerSetting(options.sampler, options.steps)
    chosen = np.asarray(store.images[subset(len(store), 2 * n)])
    try:
        floor = float(np.mean([*swd_floor(chosen).values()]))
    except ValueError as error:
        raise InputError(f"SWD cannot be taken: {error}") from error
    make_folder(options.out)
    names = {"pipeline": (source, commit), "worse": (worse_source, worse_commit)}
    about = {
        key: {"name": without_folder(getattr(options, key)), "revision": revision}
        | {"images_seen": training_in_all(folder)["images_seen"]}
        for key, (folder, revision) in names.items()
    }
    record = about | {
        "command": command_line("experiments.autoguidance", arguments),
        "reference": {key: store.description[key] for key in REFERENCE},
        "versions": {name: version(name) for name in LIBRARIES},
        "device": device_name(state.device),
        "num_cpu_threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        "results": [],
    }
    seeds, rows = range(options.seed, options.seed + n), {}
    for scale in options.scales:
        with autoguidance(pipeline.unet, worse.unet, scale):
            images, evaluations, seconds = sample(pipeline, setting, seeds, options.batch_size)
        cost = {"network_evaluations": evaluations * (1 if scale == 1 else 2), "seconds_per_image": seconds}
        how = {name: getattr(options, name) for name in ("sampler", "steps", "dtype", "batch_size")}
        how |= {"n": n, "n_reference": n, "floor": floor, "seeds": f"{seeds[0]} to {seeds[-1]}"}
        measured = measure(images, chosen[:n])
        record["results"].append(
            result("autoguidance", "SWD, mean", "swd", guidance_scale=scale, **measured, **how, **cost)
        )
        write_results(options.out / "autoguidance.json", record)
        print(f"scale {scale:g}: SWD {measured['value']:.4g}, {seconds * n:.0f} s", flush=True)
        sheet = make_grid(torch.from_numpy(images[:SHEET_IMAGES]), nrow=10, padding=2, pad_value=255)
        to_pil_image(sheet).save(options.out / f"scale-{scale:g}.png")
        rows[f"scale {scale:g}"] = [Image.fromarray(image.transpose(1, 2, 0)) for image in images[:NUM_SHOWN]]
    (options.out / "autoguidance.md").write_text(summary(record))
    plot_image_rows(rows, options.out / "autoguidance.png")
    print(f"wrote {options.out / 'autoguidance.md'}", flush=True)


def main(arguments: list[str]) -> int:
    stopped = "stopped; the scales that were measured are in autoguidance.json"
    return run_command(lambda: run(parse_options(arguments), arguments), stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
