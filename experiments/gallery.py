"""Pictures of what a model can do, all from generated images: one of each application, and a comparison of samplers.

python -m experiments.gallery --pipeline samples/celeba32_cpu/pipeline --out assets

samplers.png           the same seeds by every sampler at several numbers of steps; ode chooses its own
contact_sheets.png     more seeds by DDPM, DDIM, DPM-Solver++ and UniPC at more numbers of steps
interpolation.png      spherical interpolations, a row for each pair of seeds
denoising.png, .gif    x_t and the predicted x_0 on the way
inversion.png, .json   images, their reconstructions, and the error of these against steps
inpainting.png         masked images, and what was painted under the mask
variations.png         images noised to several levels and denoised again
continuous.png         the same seeds by each sampler of the reverse SDE or the probability-flow ODE
conditional.png        imputations, and grey images with colours
gallery.json           the seeds and settings of each

A model that was trained in continuous time (an SDE) has no contact sheets, inversion, inpainting and variations.
Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C.
"""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from common import InputError, Parser, make_folder, run_command
from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.loading import find_pipeline, load_pipeline

SEEDS = list(range(8))
STEPS = (5, 50)
SHEET_SAMPLERS, SHEET_STEPS, SHEET_SEEDS = ("ddpm", "ddim", "dpmsolver++2m", "unipc"), (5, 10, 20, 50, 250), range(16)
INVERSION_STEPS = (10, 20, 50, 100)
FIXED_POINT_ITERATIONS = (1, 2, 3, 5)
LEVELS = (200, 400, 600, 800)
CONTINUOUS_STEPS = {
    "euler_maruyama": 200,
    "reverse_diffusion": 200,
    "predictor_corrector": 100,
    "edm_heun": 18,
    "ode": 2,
}


def labelled_grid(rows: dict[str, list], columns: list[str] | None = None, side: int = 64) -> Image.Image:
    """A sheet of images, each enlarged to `side` pixels, labelled at the left of each row and above each column."""
    font = ImageFont.load_default(size=13)
    margin = 12 + max(int(font.getlength(label)) for label in rows)
    top = 20 if columns else 0
    width = max(len(images) for images in rows.values())
    sheet = Image.new("RGB", (margin + width * side, top + len(rows) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns or []):
        draw.text((margin + (column + 0.5) * side, top / 2), label, "black", font, anchor="mm")
    for row, (label, images) in enumerate(rows.items()):
        draw.text((margin - 6, top + (row + 0.5) * side), label, "black", font, anchor="rm")
        for column, image in enumerate(images):
            sheet.paste(
                image.resize((side, side), Image.Resampling.NEAREST), (margin + column * side, top + row * side)
            )
    return sheet


def draw_samplers(pipe: CustomUNetPipeline, out: Path) -> dict:
    rows = {}
    for name in tqdm(pipe.samplers if pipe.is_continuous else SAMPLERS, desc="samplers"):
        pipe.set_sampler(name)
        for steps in STEPS if name not in ("pndm", "ode") else STEPS[-1:]:
            result = pipe(seeds=SEEDS, num_inference_steps=steps)
            done = f"{steps} steps" if name != "ode" else f"{result.network_evaluations} evaluations"
            rows[f"{name}, {done}"] = result.images
    labelled_grid(rows).save(out / "samplers.png")
    return {"seeds": SEEDS, "rows": list(rows)}


def draw_contact_sheets(pipe: CustomUNetPipeline, out: Path) -> dict:
    rows = {}
    for name in tqdm(SHEET_SAMPLERS, desc="contact sheets"):
        pipe.set_sampler(name)
        for steps in SHEET_STEPS:
            rows[f"{name}, {steps} steps"] = pipe(seeds=SHEET_SEEDS, num_inference_steps=steps).images
    labelled_grid(rows, [f"seed {seed}" for seed in SHEET_SEEDS]).save(out / "contact_sheets.png")
    return {"seeds": [*SHEET_SEEDS], "rows": list(rows), "eta": 0.0}


def draw_interpolation(pipe: CustomUNetPipeline, out: Path) -> dict:
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
    rows = {f"{a} to {b}": pipe.interpolate(a, b, num_images=10).images for a, b in tqdm(pairs, desc="interpolation")}
    labelled_grid(rows).save(out / "interpolation.png")
    return {"seed_pairs": pairs, "num_images": 10, "sampler": default_sampler(pipe), "steps": 50}


def draw_denoising(pipe: CustomUNetPipeline, out: Path) -> dict:
    strip = pipe.denoising_strip(num_frames=10, num_inference_steps=50, seeds=SEEDS[:2])
    times = [f"{time:.3g}" if isinstance(time, float) else str(time) for time in strip.timesteps]
    columns = [f"t = {time}" for time in times] + ["result"]
    rows = {}
    for index, seed in enumerate(SEEDS[:2]):
        rows[f"seed {seed}, x_t"] = [frame[index] for frame in strip.noisy_images]
        rows[f"seed {seed}, predicted x_0"] = [frame[index] for frame in strip.pred_original_samples]
    labelled_grid(rows, columns).save(out / "denoising.png")
    pipe.denoising_strip(num_frames=51, num_inference_steps=50, seeds=SEEDS[:4]).save_gif(
        out / "denoising.gif", scale=3
    )
    return {"seeds": SEEDS[:4], "sampler": default_sampler(pipe), "steps": 50}


def draw_inversion(pipe: CustomUNetPipeline, out: Path) -> dict:
    """Images of another sampler, inverted and drawn again; clipping is off, as it cannot be inverted.

    The picture shows those of three iterations.
    """
    pipe.set_sampler("dpmsolver++2m")
    images = pipe(seeds=SEEDS, num_inference_steps=100, output_type="pt").images
    pipe.set_sampler("ddim")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    rows, errors = {"image": pipe.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())}, []
    for steps in tqdm(INVERSION_STEPS, desc="inversion"):
        for iterations in FIXED_POINT_ITERATIONS:
            latents = pipe.invert(images, steps, iterations)
            again = pipe(latents=latents, num_inference_steps=steps, output_type="pt").images
            rms = (again - images).square().mean().sqrt().item() * 255
            errors.append(
                {
                    "steps": steps,
                    "fixed_point_iterations": iterations,
                    "network_evaluations_of_the_inversion": steps * iterations,
                    "rms_error_grey_levels": round(rms, 3),
                    "latents_mean": round(latents.mean().item(), 4),
                    "latents_std": round(latents.std().item(), 4),
                }
            )
            if iterations == 3:
                rows[f"{steps} steps"] = pipe.numpy_to_pil(again.permute(0, 2, 3, 1).numpy())
    labelled_grid(rows).save(out / "inversion.png")
    facts = {"seeds": SEEDS, "images_by": "dpmsolver++2m, 100 steps"}
    (out / "inversion.json").write_text(json.dumps(facts | {"reconstructions": errors}, indent=1) + "\n")
    pipe.set_sampler("ddim")
    return facts | {"steps": INVERSION_STEPS}


def masks(size: int) -> dict[str, np.ndarray]:
    """float32 (size, size), 1 where the image is painted."""
    names = {"eyes": np.s_[size // 4 : size // 2, :], "right half": np.s_[:, size // 2 :]}
    names["centre"] = np.s_[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4]
    result = {name: np.zeros((size, size), np.float32) for name in names}
    for name, region in names.items():
        result[name][region] = 1
    return result


def draw_inpainting(pipe: CustomUNetPipeline, out: Path) -> dict:
    images = pipe(seeds=SEEDS[:3], num_inference_steps=50, output_type="np").images
    rows = {}
    for image, seed, (name, mask) in zip(images, SEEDS, masks(images.shape[1]).items(), strict=False):
        shown = np.where(mask[..., None] > 0, 0.5, image)
        painted = pipe.inpaint(image[None], mask, seeds=range(6)).images
        rows[f"{name} of seed {seed}"] = [*pipe.numpy_to_pil(np.stack([image, shown])), *painted]
    labelled_grid(rows, ["image", "masked", *(f"seed {seed}" for seed in range(6))]).save(out / "inpainting.png")
    return {"image_seeds": SEEDS[:3], "seeds": list(range(6)), "steps": 50, "jump_length": 1, "num_resamples": 5}


def draw_variations(pipe: CustomUNetPipeline, out: Path) -> dict:
    images = pipe(seeds=SEEDS[:2], num_inference_steps=50, output_type="np").images
    rows = {}
    for image, seed in zip(images, SEEDS, strict=False):
        for level in LEVELS:
            varied = pipe.variations(image[None], level, seeds=range(7)).images
            rows[f"seed {seed}, t = {level}"] = [*pipe.numpy_to_pil(image), *varied]
    labelled_grid(rows, ["image", *(f"seed {seed}" for seed in range(7))]).save(out / "variations.png")
    return {"image_seeds": SEEDS[:2], "seeds": list(range(7)), "timesteps": LEVELS, "eta": 1.0, "steps": 50}


def draw_continuous(pipe: CustomUNetPipeline, out: Path) -> dict:
    rows = {}
    for name, steps in tqdm(CONTINUOUS_STEPS.items(), desc="continuous"):
        pipe.set_sampler(name)
        result = pipe(seeds=SEEDS, num_inference_steps=steps)
        rows[f"{name}, {result.network_evaluations} evaluations"] = result.images
    labelled_grid(rows).save(out / "continuous.png")
    return {"seeds": SEEDS, "rows": list(rows)}


def draw_conditional(pipe: CustomUNetPipeline, out: Path) -> dict:
    images = pipe(seeds=SEEDS[:4], num_inference_steps=50, output_type="np").images
    rows = {}
    for image, seed, (name, mask) in zip(images, SEEDS, list(masks(images.shape[1]).items())[1:], strict=False):
        shown = np.where(mask[..., None] > 0, 0.5, image)
        painted = pipe.impute(image[None], mask, seeds=range(6)).images
        rows[f"{name} of seed {seed}"] = [*pipe.numpy_to_pil(np.stack([image, shown])), *painted]
    for image, seed in zip(images[2:], SEEDS[2:], strict=False):
        grey = image.mean(-1, keepdims=True).repeat(3, -1)
        coloured = pipe.colorize(grey[None], seeds=range(6)).images
        rows[f"colours of seed {seed}"] = [*pipe.numpy_to_pil(np.stack([image, grey])), *coloured]
    labelled_grid(rows, ["image", "given", *(f"seed {seed}" for seed in range(6))]).save(out / "conditional.png")
    return {"image_seeds": SEEDS[:4], "seeds": list(range(6)), "steps": 100, "snr": 0.16, "corrector_steps": 1}


PICTURES = {
    "samplers": draw_samplers,
    "contact_sheets": draw_contact_sheets,
    "interpolation": draw_interpolation,
    "denoising": draw_denoising,
    "inversion": draw_inversion,
    "inpainting": draw_inpainting,
    "variations": draw_variations,
    "continuous": draw_continuous,
    "conditional": draw_conditional,
}


NEED_TIMESTEPS = ("contact_sheets", "inversion", "inpainting", "variations")


def default_sampler(pipe: CustomUNetPipeline) -> str:
    return "edm_heun" if pipe.is_continuous else "ddim"


def check_pictures(pipe: CustomUNetPipeline, names: list[str]) -> None:
    """Raises InputError for pictures that the model cannot give."""
    if pipe.unet.config.get("num_class_embeds") is not None or pipe.unet.config.get("class_embed_type") is not None:
        raise InputError("the network has class embeddings; the pictures are of unconditional networks")
    refused = [name for name in names if name in NEED_TIMESTEPS]
    if pipe.is_continuous and refused:
        rest = " ".join(name for name in PICTURES if name not in NEED_TIMESTEPS)
        raise InputError(
            f"{refused[0]} needs discrete timesteps, but the network was trained in continuous time; take --only"
            f" {rest}"
        )


def run(arguments: list[str]) -> None:
    parser = Parser(prog="python -m experiments.gallery", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--pipeline", required=True, help="folder of a model repository, or its id on the Hub")
    parser.add_argument("--out", type=Path, default=Path("assets"))
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    args = parser.parse_args(arguments)
    pipe = load_pipeline(find_pipeline(args.pipeline, None)[0], "fp32", None)
    check_pictures(pipe, args.only)
    make_folder(args.out)
    torch.manual_seed(0)
    record = args.out / "gallery.json"
    settings = json.loads(record.read_text()) if record.exists() else {}
    for name in args.only:
        pipe.set_sampler(default_sampler(pipe))
        settings[name] = PICTURES[name](pipe, args.out)
        record.write_text(json.dumps(settings, indent=1) + "\n")
        print(f"wrote {args.out / name}.png", flush=True)


def main(arguments: list[str]) -> int:
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
