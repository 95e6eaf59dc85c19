"""Pictures of what a model can do, all from generated images: one per application, and comparisons of samplers.

python -m experiments.gallery --pipeline samples/celeba64/pipeline --out assets

samplers.png           the same seeds by every sampler at several numbers of steps; ode chooses its own
contact_sheets.png     more seeds by DDPM, DDIM, DPM-Solver++ and UniPC at more numbers of steps
interpolation.png      spherical interpolations, one row per pair of seeds
denoising.png, .gif    x_t and the predicted x_0 during sampling
inversion.png, .json   images, their reconstructions, and the reconstruction error by number of steps
inpainting.png         masked images and their inpaintings
variations.png         images noised to several levels and denoised again
continuous.png         the same seeds by each sampler of the reverse SDE or the probability-flow ODE
conditional.png        imputed and colourised images
gallery.json           the seeds and settings of each picture

The model must be an unconditional DDPM model of RGB images. Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by
Ctrl-C.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from common import InputError, Parser, make_folder, run_command
from eval.figures import labelled_grid
from eval.results import write_results
from pipelines import CustomUNetPipeline, applications
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.loading import find_pipeline, load_pipeline

SEEDS = list(range(8))
STEPS = (5, 50)
SHEET_SAMPLERS, SHEET_STEPS, SHEET_SEEDS = ("ddpm", "ddim", "unipc", "dpmpp_2m"), (5, 10, 20, 50, 250), range(16)
INVERSION_STEPS = (10, 20, 50, 100)
FIXED_POINT_ITERATIONS = (1, 2, 3, 5)
PAINTED_SEEDS = range(6)
LEVELS = (200, 400, 600, 800)
CONTINUOUS_STEPS = {"euler_maruyama": 200, "reverse_diffusion": 200, "predictor_corrector": 100}
CONTINUOUS_STEPS |= {"edm_heun": 18, "dpmpp_2m": 20, "ode": 2}


# Each function below returns a picture: its rows by label, its column labels, and the settings to record
Picture = tuple[dict[str, list], Sequence[str], dict]


def rows_by_sampler(pipe: CustomUNetPipeline, settings: Iterable, seeds: Sequence[int], unit: str = "steps") -> dict:
    """One row per sampler and number of steps, labelled by its steps or by its network evaluations."""
    rows = {}
    for name, steps in tqdm([*settings]):
        pipe.set_sampler(name)
        result = pipe(seeds=seeds, num_inference_steps=steps)
        done = {"steps": steps, "evaluations": result.network_evaluations}[unit]
        rows[f"{name}, {done} {unit}"] = result.images
    return rows


def samplers(pipe: CustomUNetPipeline, out: Path) -> Picture:
    rows = rows_by_sampler(pipe, itertools.product(SAMPLERS, STEPS), SEEDS)
    return rows, (), {"seeds": SEEDS, "rows": list(rows)}


def contact_sheets(pipe: CustomUNetPipeline, out: Path) -> Picture:
    rows = rows_by_sampler(pipe, itertools.product(SHEET_SAMPLERS, SHEET_STEPS), SHEET_SEEDS)
    return rows, seed_labels(SHEET_SEEDS), {"seeds": [*SHEET_SEEDS], "rows": list(rows), "eta": 0.0}


def continuous(pipe: CustomUNetPipeline, out: Path) -> Picture:
    rows = rows_by_sampler(pipe, CONTINUOUS_STEPS.items(), SEEDS, unit="evaluations")
    return rows, (), {"seeds": SEEDS, "rows": list(rows)}


def interpolation(pipe: CustomUNetPipeline, out: Path) -> Picture:
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
    rows = {f"{a} to {b}": applications.interpolate(pipe, a, b, num_images=10) for a, b in tqdm(pairs)}
    return rows, (), {"seed_pairs": pairs, "num_images": 10, "sampler": "ddim", "steps": 50}


def denoising(pipe: CustomUNetPipeline, out: Path) -> Picture:
    strip = applications.denoising_strip(pipe, num_frames=10, num_inference_steps=50, seeds=SEEDS[:2])
    columns = [f"t = {timestep}" for timestep in strip.timesteps]
    rows = {}
    for index, seed in enumerate(SEEDS[:2]):
        rows[f"seed {seed}, x_t"] = [frame[index] for frame in strip.noisy_images]
        rows[f"seed {seed}, predicted x_0"] = [frame[index] for frame in strip.pred_original_samples]
    animated = applications.denoising_strip(pipe, num_frames=26, num_inference_steps=50, seeds=SEEDS[:4])
    animated.save_gif(out / "denoising.gif", scale=2)
    return rows, [*columns, "result"], {"seeds": SEEDS[:4], "sampler": "ddim", "steps": 50}


def inversion(pipe: CustomUNetPipeline, out: Path) -> Picture:
    """Inverts images from another sampler and reconstructs them, without clipping, which is not invertible.

    The picture shows the reconstructions after three iterations.
    """
    pipe.set_sampler("dpmsolver++2m")
    images = pipe(seeds=SEEDS, num_inference_steps=100, output_type="pt").images
    pipe.set_sampler("ddim")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    rows, errors = {"image": pipe.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())}, []
    for steps, iterations in tqdm([*itertools.product(INVERSION_STEPS, FIXED_POINT_ITERATIONS)]):
        latents = applications.invert(pipe, images, steps, iterations)
        again = pipe(latents=latents, num_inference_steps=steps, output_type="pt").images
        measured = {"rms_error_grey_levels": round((again - images).square().mean().sqrt().item() * 255, 3)}
        measured |= {"latents_mean": round(latents.mean().item(), 4), "latents_std": round(latents.std().item(), 4)}
        work = {"fixed_point_iterations": iterations, "network_evaluations_of_the_inversion": steps * iterations}
        errors.append({"steps": steps} | work | measured)
        if iterations == 3:
            rows[f"{steps} steps"] = pipe.numpy_to_pil(again.permute(0, 2, 3, 1).numpy())
    facts = {"seeds": SEEDS, "images_by": "dpmsolver++2m, 100 steps"}
    write_results(out / "inversion.json", facts | {"reconstructions": errors})
    return rows, (), facts | {"steps": INVERSION_STEPS}


def inpainting(pipe: CustomUNetPipeline, out: Path) -> Picture:
    images = pipe(seeds=SEEDS[:3], num_inference_steps=50, output_type="np").images
    rows = {}
    for seed, (name, mask) in enumerate(masks(*images.shape[1:3]).items()):
        rows[f"{name} of seed {seed}"] = painted(pipe, images[seed], mask, applications.inpaint)
    facts = {"image_seeds": SEEDS[:3], "seeds": [*PAINTED_SEEDS], "steps": 50, "jump_length": 1, "num_resamples": 5}
    return rows, ["image", "masked", *seed_labels(PAINTED_SEEDS)], facts


def conditional(pipe: CustomUNetPipeline, out: Path) -> Picture:
    images = pipe(seeds=SEEDS[:4], num_inference_steps=50, output_type="np").images
    rows, all_masks = {}, masks(*images.shape[1:3])
    for seed, name in enumerate(("right half", "centre")):
        rows[f"{name} of seed {seed}"] = painted(pipe, images[seed], all_masks[name], applications.impute)
    for seed in (2, 3):
        grey = images[seed].mean(-1, keepdims=True).repeat(3, -1)
        coloured = applications.colorize(pipe, grey[None], seeds=PAINTED_SEEDS)
        rows[f"colours of seed {seed}"] = [*pipe.numpy_to_pil(np.stack([images[seed], grey])), *coloured]
    facts = {"image_seeds": SEEDS[:4], "seeds": [*PAINTED_SEEDS], "steps": 100, "snr": 0.16, "corrector_steps": 1}
    return rows, ["image", "given", *seed_labels(PAINTED_SEEDS)], facts


def masks(height: int, width: int) -> dict[str, np.ndarray]:
    """Masks by name, float32 (height, width), 1 where the image is to be repainted."""
    regions = {name: np.zeros((height, width), np.float32) for name in ("eyes", "right half", "centre")}
    top, left = height // 4, width // 4
    regions["eyes"][top : 2 * top] = 1
    regions["right half"][:, 2 * left :] = 1
    regions["centre"][top : 3 * top, left : 3 * left] = 1
    return regions


def painted(pipe: CustomUNetPipeline, image: np.ndarray, mask: np.ndarray, paint: Callable) -> list[Image.Image]:
    """The image (H, W, 3), a copy that is grey under the mask, and its versions by PAINTED_SEEDS."""
    masked = np.where(mask[..., None] > 0, 0.5, image)
    return [*pipe.numpy_to_pil(np.stack([image, masked])), *paint(pipe, image[None], mask, seeds=PAINTED_SEEDS)]


def variations(pipe: CustomUNetPipeline, out: Path) -> Picture:
    images = pipe(seeds=SEEDS[:2], num_inference_steps=50, output_type="np").images
    rows, seeds = {}, range(7)
    for (seed, image), level in itertools.product(enumerate(images), LEVELS):
        varied = applications.variations(pipe, image[None], level, seeds=seeds)
        rows[f"seed {seed}, t = {level}"] = [*pipe.numpy_to_pil(image), *varied]
    facts = {"image_seeds": SEEDS[:2], "seeds": [*seeds], "timesteps": LEVELS, "eta": 1.0, "steps": 50}
    return rows, ["image", *seed_labels(seeds)], facts


PICTURES = (samplers, interpolation, denoising, continuous, conditional)
PICTURES += (contact_sheets, inversion, inpainting, variations)


def seed_labels(seeds: Sequence[int]) -> list[str]:
    return [f"seed {seed}" for seed in seeds]


def run(arguments: list[str]) -> None:
    """Draws the pictures; raises InputError for bad arguments or another kind of model."""
    parser = Parser(prog="python -m experiments.gallery", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--pipeline", required=True, help="folder of a model repository, or its id on the Hub")
    parser.add_argument("--out", type=Path, default=Path("assets"))
    options = parser.parse_args(arguments)
    pipe = load_pipeline(find_pipeline(options.pipeline)[0])
    config = pipe.unet.config
    has_classes = config.get("num_class_embeds") or config.get("class_embed_type")
    if pipe.is_continuous or has_classes or config.in_channels != 3:
        raise InputError(f"{options.pipeline} is not an unconditional DDPM model of RGB images")
    make_folder(options.out)
    torch.manual_seed(0)
    settings = {}
    for picture in PICTURES:
        pipe.set_sampler("ddim")
        path = options.out / f"{picture.__name__}.png"
        rows, columns, settings[picture.__name__] = picture(pipe, options.out)
        labelled_grid(rows, columns).save(path)
        write_results(options.out / "gallery.json", settings)
        print(f"wrote {path}", flush=True)


def main(arguments: list[str]) -> int:
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
