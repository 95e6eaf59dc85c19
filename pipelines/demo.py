"""A web page for a trained model: generation, denoising, interpolation and inpainting.

    python -m pipelines.demo --pipeline DIR_OR_HUB_ID [--port P] [--share]

Exit codes: 0 stopped by Ctrl-C, 2 if the model cannot be loaded or the port cannot be used.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import gradio as gr
import torch
from PIL import Image, ImageChops, ImageOps

from common import InputError, Parser, check_numbers, run_command
from pipelines import CustomUNetPipeline
from pipelines.applications import denoising_strip, enlarged, impute, inpaint, interpolate
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.loading import find_pipeline, load_pipeline

MAX_IMAGES = 16
MAX_SEED = 2**31 - 1
SHOWN_SIZE, STRIP_SIZE = 512, 128  # approximate longer side of an enlarged image, alone and in a strip, in pixels
FILES_KEPT_SECONDS = 3600
PROGRESS = gr.Progress(track_tqdm=True)  # shows the pipeline's progress bar on the page
error_shown = partial(gr.Error, print_exception=False)  # on the page, without a traceback in the terminal
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "network"}  # one queue for everything that runs the network


def build_demo(pipeline: CustomUNetPipeline, name: str = "An unconditional diffusion model") -> gr.Blocks:
    """Builds the page, with the model's name as its title; call `build_demo(pipeline).launch()`.

    Raises:
        ValueError: if the network has class embeddings, for which the page has no input.
    """
    config = pipeline.unet.config
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise ValueError("the network has class embeddings; the page is for unconditional networks")
    page = Page(pipeline)
    width, height = page.size
    about = f"""# {name}

An unconditional diffusion model{", trained in continuous time" if pipeline.is_continuous else ""}: it generates images
of {width}x{height} pixels from pure noise with a network of {pipeline.unet.num_parameters() / 1e6:.1f} million
parameters. The images are not photographs. You may use them as the licence of the model and the terms of its training
data allow: images from a model trained on CelebA are for non-commercial research only."""
    with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(FILES_KEPT_SECONDS, FILES_KEPT_SECONDS)) as demo:
        gr.Markdown(about)
        with gr.Tab("Generate"):
            page.generate_tab()
        with gr.Tab("Denoising"):
            page.denoising_tab()
        with gr.Tab("Interpolation"):
            page.interpolation_tab()
        with gr.Tab("Inpainting"):
            page.inpainting_tab()
    return demo


class Page:
    """The tabs of the page, each with its layout and, below it, the actions of its buttons.

    Visitors share only the weights: every call has its own sampler.
    """

    def __init__(self, pipeline: CustomUNetPipeline):
        self.pipeline, scheduler = pipeline, pipeline.scheduler
        _, height, width = pipeline.image_shape
        self.size = (width, height)
        if pipeline.is_continuous:
            self.own_sampler = pipeline.continuous_sampler.name
        else:
            names = [name for name, (cls, _) in SAMPLERS.items() if type(scheduler) is cls]
            order = scheduler.config.get("solver_order")
            self.own_sampler = min(names, key=lambda name: SAMPLERS[name][1].get("solver_order") != order)
        self.max_steps = scheduler.config.get("num_train_timesteps", 1000)

    # ---- Generate

    def generate_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=280):
                seed = seed_input("Seed of the first image")
                number = gr.Slider(1, MAX_IMAGES, 8, step=1, label="Images", info="Each image uses the next seed.")
                sampler, steps, eta = self.sampler_inputs()
                button = gr.Button("Generate", variant="primary")
            with gr.Column(scale=3):
                gallery = image_gallery("Images")
        button.click(self.generate, [seed, number, sampler, steps, eta], gallery, **ONE_AT_A_TIME)

    def generate(self, seed, number, sampler, steps, eta, progress=PROGRESS) -> list:
        seeds = consecutive_seeds(seed, number)
        eta = eta if sampler == "ddim" else 0.0  # the slider keeps its value while it is hidden
        with self.sampling(sampler) as pipeline:
            images = pipeline(seeds=seeds, num_inference_steps=steps, eta=eta).images
        return self.with_captions(images, [f"seed {seed}" for seed in seeds])

    # ---- Denoising

    def denoising_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=280):
                seed = seed_input("Seed")
                frames = gr.Slider(2, 16, 8, step=1, label="Frames")
                sampler, steps, eta = self.sampler_inputs()
                button = gr.Button("Show", variant="primary")
            with gr.Column(scale=3):
                gr.Markdown("Top: the noisy image x_t. Bottom: the image x_0 that the network predicts from it.")
                look = {"show_label": False, "interactive": False, "buttons": ["download", "fullscreen"]}
                strip = gr.Image(label="Strip", format="png", **look)
                levels = gr.Markdown()
                animation = gr.Image(label="Animation", format="gif", height=300, **look)
        inputs = [seed, frames, sampler, steps, eta]
        button.click(self.denoise, inputs, [strip, levels, animation], **ONE_AT_A_TIME)

    def denoise(self, seed, frames, sampler, steps, eta, progress=PROGRESS) -> Iterator[tuple]:
        seeds, eta = consecutive_seeds(seed, 1), eta if sampler == "ddim" else 0.0
        with self.sampling(sampler) as pipeline:
            result = denoising_strip(pipeline, frames, steps, seeds=seeds, eta=eta)
        times = [f"{time:.3g}" if isinstance(time, float) else str(time) for time in result.timesteps]
        levels = f"From left to right: t = {', '.join(times)}, and the result."
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies the file before it resumes after the yield
            path = f"{folder}/denoising.gif"
            result.save_gif(path, scale=self.factor(SHOWN_SIZE // 2), frame_milliseconds=400)
            yield result.to_image(self.factor(STRIP_SIZE)), levels, path

    # ---- Interpolation

    def interpolation_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=280):
                start, end = seed_input("Seed of the first image", 0), seed_input("Seed of the last image", 1)
                number = gr.Slider(3, MAX_IMAGES, 8, step=1, label="Images")
                steps = self.steps_input()
                button = gr.Button("Interpolate", variant="primary")
            with gr.Column(scale=3):
                solver = "the probability-flow ODE" if self.pipeline.is_continuous else "DDIM"
                gallery = image_gallery(f"From one seed to the other, by {solver}")
        button.click(self.interpolate, [start, end, number, steps], gallery, **ONE_AT_A_TIME)

    def interpolate(self, start, end, number, steps, progress=PROGRESS) -> list:
        (start,), (end,) = consecutive_seeds(start, 1), consecutive_seeds(end, 1)
        with self.sampling() as pipeline:
            images = interpolate(pipeline, start, end, number, steps)
        between = [f"{i / (number - 1):.0%}" for i in range(1, number - 1)]
        return self.with_captions(images, [f"seed {start}", *between, f"seed {end}"])

    # ---- Inpainting

    def inpainting_tab(self) -> None:
        image = gr.State()  # at the network's size; the editor shows it enlarged
        canvas_size = tuple(side * self.factor(SHOWN_SIZE) for side in self.size)
        brush = gr.Brush(default_size=max(canvas_size) // 10, colors=["#ff2d95"], color_mode="fixed")
        with gr.Row():
            with gr.Column(min_width=280):
                image_seed = seed_input("1. Use the image of a seed ...")
                take_button = gr.Button("Use this image")
                sources = ["upload", "clipboard"]
                upload = gr.Image(type="pil", sources=sources, label="... or your own", height=150, buttons=[])
                seed = seed_input("3. Seed of the first result")
                number = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Results")
                steps = self.steps_input()
                info = "More resampling blends the results in better but takes longer."
                is_used = not self.pipeline.is_continuous
                resamples = gr.Slider(1, 20, 5, step=1, label="Resamplings", info=info, visible=is_used)
                button = gr.Button("Repaint", variant="primary")
            with gr.Column(scale=4):
                label, placeholder = "2. Draw over the part to repaint", "First choose an image"
                look = {"type": "pil", "format": "png", "label": label, "placeholder": placeholder, "height": 500}
                tools = {"sources": (), "transforms": (), "layers": False, "brush": brush, "buttons": []}
                editor = gr.ImageEditor(canvas_size=canvas_size, **look, **tools)
            with gr.Column(scale=3):
                gallery = image_gallery("Results", columns=2)
        take_button.click(self.image_of_seed, [image_seed, steps], [image, editor], **ONE_AT_A_TIME)
        upload.input(self.image_of_upload, upload, [image, editor])
        button.click(self.inpaint, [image, editor, seed, number, steps, resamples], gallery, **ONE_AT_A_TIME)

    def image_of_seed(self, seed, steps, progress=PROGRESS) -> tuple:
        seeds = consecutive_seeds(seed, 1)
        with self.sampling() as pipeline:
            (image,) = pipeline(seeds=seeds, num_inference_steps=steps).images
        return image, enlarged(image, self.factor(SHOWN_SIZE))

    def image_of_upload(self, upload) -> tuple:
        """The largest central crop with the network's aspect ratio, resized to its resolution."""
        if upload is None:
            return None, None
        image = ImageOps.fit(upload, self.size, method=Image.Resampling.BICUBIC)
        return image, enlarged(image, self.factor(SHOWN_SIZE))

    def inpaint(self, image, drawing, seed, number, steps, resamples, progress=PROGRESS) -> list:
        if image is None or drawing is None or drawing["background"] is None:  # the last two: the editor was cleared
            raise error_shown("no image yet; generate one from a seed or upload one")
        mask, seeds = self.drawn_mask(drawing), consecutive_seeds(seed, number)
        with self.sampling() as pipeline:
            if pipeline.is_continuous:
                images = impute(pipeline, image, mask, steps, seeds=seeds)
            else:
                images = inpaint(pipeline, image, mask, steps, num_resamples=resamples, seeds=seeds)
        return self.with_captions(images, [f"seed {seed}" for seed in seeds])

    def drawn_mask(self, drawing: dict) -> Image.Image:
        """White where the drawing touches any part of a pixel of the image; raises gr.Error if nothing was drawn."""
        drawn = Image.new("L", self.size)
        for layer in drawing["layers"]:
            touched = layer.getchannel("A").point(lambda alpha: 255 * (alpha > 0))
            drawn = ImageChops.lighter(drawn, touched.resize(self.size, Image.Resampling.BOX))
        if drawn.getbbox() is None:
            raise error_shown("no mask yet; draw over the part to repaint")
        return drawn.point(lambda share: 255 * (share > 0))

    # ---- Parts

    def sampler_inputs(self) -> tuple[gr.Dropdown, gr.Slider, gr.Slider]:
        sampler = gr.Dropdown([*self.pipeline.samplers], value=self.own_sampler, label="Sampler")
        steps = self.steps_input()
        info = "Randomness of DDIM: 0 is none, 1 is that of DDPM."
        eta = gr.Slider(0, 1, 0, step=0.05, label="eta", info=info, visible=self.own_sampler == "ddim")
        sampler.change(lambda name: gr.Slider(visible=name == "ddim"), sampler, eta)
        return sampler, steps, eta

    def steps_input(self) -> gr.Slider:
        least = 2 if self.pipeline.is_continuous else 1
        return gr.Slider(least, self.max_steps, min(50, self.max_steps), step=1, label="Steps")

    @contextmanager
    def sampling(self, sampler: str | None = None) -> Iterator[CustomUNetPipeline]:
        """The same network with a fresh sampler, by default the repository's own; shows errors about its arguments."""
        scheduler = self.pipeline.scheduler
        pipeline = type(self.pipeline)(self.pipeline.unet, type(scheduler).from_config(scheduler.config))
        try:
            if sampler is not None:
                pipeline.set_sampler(sampler)
            yield pipeline
        except ValueError as error:
            raise error_shown(str(error)) from None

    def with_captions(self, images: list[Image.Image], captions: list[str]) -> list[tuple[Image.Image, str]]:
        factor = self.factor(SHOWN_SIZE)
        return [(enlarged(image, factor), caption) for image, caption in zip(images, captions, strict=True)]

    def factor(self, shown_size: int) -> int:
        """The integer factor that enlarges images to about the given size."""
        return max(1, round(shown_size / max(self.size)))


def seed_input(label: str, value: int = 0) -> gr.Number:
    """A number field and a button that draws a new number."""
    with gr.Group():
        seed = gr.Number(value, precision=0, minimum=0, maximum=MAX_SEED, label=label)
        gr.Button("Random seed", size="sm").click(lambda: random.randint(0, MAX_SEED), outputs=seed)
    return seed


def image_gallery(label: str, columns: int = 4) -> gr.Gallery:
    look = {"show_label": False, "columns": columns, "object_fit": "contain", "height": "auto"}
    return gr.Gallery(format="png", label=label, buttons=["download", "download_all", "fullscreen"], **look)


def consecutive_seeds(first: int | None, number: int) -> list[int]:
    """Raises gr.Error if the field is empty."""
    if first is None:
        raise error_shown("the seed is empty; type a whole number")
    return list(range(first, first + number))


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m pipelines.demo", description="A web page for a trained model.", allow_abbrev=False)
    parser.add_argument("--pipeline", required=True, help="folder or Hub id of the model")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="create a public link through Gradio, valid for a week")
    options = parser.parse_args(arguments)
    check_numbers(options, {"port": 1}, {"port": 65535})
    return options


def run(options: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C."""
    source, _ = find_pipeline(options.pipeline)
    pipeline = load_pipeline(source).to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        demo = build_demo(pipeline, name=options.pipeline)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        # `_frontend=False`: Gradio would exit if a request to its own page took more than three seconds
        demo.launch(server_port=options.port, share=options.share, _frontend=False)
    except OSError as error:
        raise InputError(f"port {options.port} is not available and may be in use; choose another --port") from error


def main(arguments: list[str]) -> int:
    return run_command(lambda: run(parse_options(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
