"""Applications of a trained model beyond sampling, as functions of its pipeline.

With DDIM (Song et al. 2020, arXiv 2010.02502), for models with discrete timesteps: `invert`, `variations`, `inpaint`.
In continuous time (Song et al. 2021, arXiv 2011.13456), for all models: `encode`, `decode`, `impute`, `colorize`. For
all models: `denoising_strip` and `interpolate`.

Input images are PIL images, arrays in [0, 1] of shape (B, H, W, C) or tensors in [0, 1] of shape (B, C, H, W); one for
all seeds or one for each. `call` stands for the pipeline's arguments `seeds` or `generator` and `class_labels`. All
functions raise ValueError for arguments that the pipeline rejects, and for images that do not have the network's shape
or are not in [0, 1].
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.image_processor import PipelineImageInput as Images
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import (
    Guidance,
    clean_images_and_noise,
    ddim_step,
    finite,
    generators,
    noise_levels,
    scales,
    scheduler_like,
)
from training.sde import predictor_corrector, sampling_times, solve_ode

# ---- From noise to an image


@dataclass
class DenoisingStrip:
    """Intermediate steps of sampling: frames from pure noise to the images.

    Attributes:
        timesteps: timestep of each frame except the last, which is the result; SDE times in continuous time.
        noisy_images: x_t of each frame: a list of frames, each a list of B PIL images.
        pred_original_samples: the x_0 predicted from x_t, in the same format.
    """

    timesteps: list[float]
    noisy_images: list[list[Image.Image]]
    pred_original_samples: list[list[Image.Image]]

    def to_image(self, scale: int = 1) -> Image.Image:
        """One picture, time from left to right, with two rows per image: x_t above the predicted x_0."""
        cells, columns = [], len(self.noisy_images)
        for row in range(len(self.noisy_images[0])):
            cells += [frame[row] for frame in self.noisy_images] + [frame[row] for frame in self.pred_original_samples]
        return enlarged(make_image_grid(cells, rows=len(cells) // columns, cols=columns), scale)

    def save_gif(self, file, scale: int = 1, frame_milliseconds: int = 100) -> None:
        """Writes an animation to a path or file: x_t beside the predicted x_0; the last frame lasts two seconds."""
        frames = []
        for noisy, predicted in zip(self.noisy_images, self.pred_original_samples, strict=True):
            cells = [image for pair in zip(noisy, predicted, strict=True) for image in pair]
            frames.append(enlarged(make_image_grid(cells, rows=len(noisy), cols=2), scale))
        durations = [frame_milliseconds] * (len(frames) - 1) + [2000]
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def enlarged(image: Image.Image, factor: int) -> Image.Image:
    """The image with every pixel enlarged to a square of `factor` x `factor` pixels."""
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def denoising_strip(
    pipe: CustomUNetPipeline, num_frames: int = 10, num_inference_steps: int = 50, **call
) -> DenoisingStrip:
    """Samples, and shows x_t and the predicted x_0 at some of the steps.

    Args:
        num_frames: number of frames, at evenly spaced steps; the last one is the result; at least 2.
        call: other arguments of the pipeline's call (`seeds`, `eta`, `class_labels`, ...).
    """
    frames, names = [], ("noisy_images", "pred_original_sample")

    def keep(pipe, index, timestep, tensors) -> None:
        frames.append((timestep.item(), *(pipe.to_output(tensors[name], "pil") for name in names)))

    callback = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": names}
    result = pipe(num_inference_steps=num_inference_steps, **call, **callback).images
    shown = torch.linspace(0, len(frames) - 1, min(num_frames - 1, len(frames))).round().int().tolist()
    timesteps, noisy, predicted = zip(*(frames[index] for index in shown), strict=True)
    return DenoisingStrip([*timesteps], [*noisy, result], [*predicted, result])


# ---- With DDIM


def interpolate(
    pipe: CustomUNetPipeline,
    start: int | Tensor,
    end: int | Tensor,
    num_images: int = 8,
    num_inference_steps=50,
    **call,
):
    """Images between two latents, by spherical interpolation and DDIM (arXiv 2010.02502, section 5.3).

    A network that was trained in continuous time uses Heun's method on its ODE instead.

    Args:
        start, end: a seed, or a latent of shape (1, C, H, W), for example from `invert`.
        num_images: number of images including both ends, at least 2.
    """
    start, end = (x if isinstance(x, Tensor) else pipe.draw_noise(1, generators([x])) for x in (start, end))
    deterministic = _with_scheduler(pipe, pipe.scheduler if pipe.is_continuous else _ddim(pipe))
    if pipe.is_continuous:
        name = pipe.process.default_sampler.name
        deterministic.set_sampler(name, **({"churn": 0.0} if name == "edm_heun" else {}))
    deterministic.progress_bar = pipe.progress_bar
    latents = slerp(start, end.to(start), torch.linspace(0, 1, num_images))
    return deterministic(latents=latents, num_inference_steps=num_inference_steps, **call).images


def slerp(start: Tensor, end: Tensor, fractions: Tensor) -> Tensor:
    """Spherical linear interpolation (DDIM, eq. 67), which preserves the norm of Gaussian noise.

    Args:
        start, end: shape (1, C, H, W).
        fractions: fractions of the way from start to end, shape (N,).

    Returns:
        shape (N, C, H, W).
    """
    cosine = torch.nn.functional.cosine_similarity(start.flatten(), end.flatten(), dim=0).double()
    angle = torch.acos(cosine.clamp(-1, 1))
    fractions = fractions.to(angle.device, torch.float64).view(-1, 1, 1, 1)
    if torch.sin(angle) < 1e-6:  # (anti)parallel: linear interpolation
        return ((1 - fractions) * start + fractions * end).to(start.dtype)
    weights = (torch.sin((1 - fractions) * angle), torch.sin(fractions * angle))
    return ((weights[0] * start + weights[1] * end) / torch.sin(angle)).to(start.dtype)


@torch.no_grad()
def invert(
    pipe: CustomUNetPipeline, image: Images, num_inference_steps=50, num_fixed_point_iterations=3, class_labels=None
) -> Tensor:
    """The latents from which DDIM (eta 0, same number of steps) reconstructs these images approximately.

    A DDIM step from t to s < t rotates x_t in the plane of x_0 and epsilon by an angle phi: x_s = cos(phi) x_t -
    sin(phi) v, where v is predicted at x_t. Hence x_t = (x_s + sin(phi) v) / cos(phi). Since x_t is unknown, v is
    first predicted at x_s; each further fixed-point iteration predicts it at the latest x_t. (With epsilon or x_0
    instead of v, the iterations do not converge when x_t has little signal or little noise.)

    Args:
        num_fixed_point_iterations: network evaluations per step, at least 1; more make the inversion more accurate.

    Returns:
        float32 latents of shape (B, C, H, W), for `pipe(latents=...)` with `DDIMScheduler`. Clipping in the sampler
        loses information: for an accurate reconstruction set `clip_sample=False` in its configuration.
    """
    if num_fixed_point_iterations < 1:
        raise ValueError(f"num_fixed_point_iterations is {num_fixed_point_iterations}; it must be at least 1")
    _, timesteps, levels = _ddim_levels(pipe, num_inference_steps)
    latents = _to_model_range(pipe, image)
    guidance = pipe.guidance(class_labels, len(latents))
    with pipe.evaluation_mode():
        for k in pipe.progress_bar(range(1, len(levels))):
            (signal_s, sigma_s), (signal_t, sigma_t) = scales(levels[k - 1]), scales(levels[k])
            cosine = signal_s * signal_t + sigma_s * sigma_t
            sine = signal_s * sigma_t - sigma_s * signal_t
            next_latents = latents
            for _ in range(num_fixed_point_iterations):
                clean, noise = _predict(pipe, next_latents, timesteps[k - 1], levels[k], guidance)
                velocity = signal_t * noise - sigma_t * clean
                next_latents = (latents + sine * velocity) / cosine
            latents = next_latents
    return finite(latents)


@torch.no_grad()
def variations(
    pipe: CustomUNetPipeline, image: Images, timestep: int, num_inference_steps=50, eta=1.0, output_type="pil", **call
):
    """Adds noise to images and denoises them, as in figure 8 of DDPM: more noise allows larger changes.

    Args:
        timestep: t of the noise level; the nearest of the sampler's `num_inference_steps` timesteps is used.
        eta: eta of the denoising steps (eq. 16 of DDIM); with 0, only the added noise is random.
    """
    scheduler, timesteps, levels = _ddim_levels(pipe, num_inference_steps, eta)
    clean_images, draw_noise, guidance = _batch_of(pipe, image, **call)
    start = min(range(1, len(levels)), key=lambda k: abs(timesteps[k - 1] - timestep))
    signal, sigma = scales(levels[start])
    latents = signal * clean_images + sigma * draw_noise()
    with pipe.evaluation_mode():
        for k in pipe.progress_bar(range(start, 0, -1)):
            predicted = _predict(pipe, latents, timesteps[k - 1], levels[k], guidance)
            latents = ddim_step(scheduler, *predicted, levels[k], levels[k - 1], draw_noise, eta)
    return pipe.to_output(latents, output_type)


@torch.no_grad()
def inpaint(
    pipe: CustomUNetPipeline,
    image: Images,
    mask: Images,
    num_inference_steps=50,
    jump_length=1,
    num_resamples=5,
    output_type="pil",
    **call,
):
    """Repaints the masked part of images with RePaint (Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1).

    Each step denoises (with DDPM's variance) and then replaces the known part by the noised image. To make the painted
    part agree with the known part, it jumps back `jump_length` steps by adding noise, `num_resamples` - 1 times from
    every `jump_length`-th level. This takes about `num_inference_steps` x `num_resamples` network evaluations.

    Args:
        mask: PIL image, array (H, W) or tensor (B or 1, 1, H, W); values above one half mark the part to repaint.
    """
    scheduler, timesteps, levels = _ddim_levels(pipe, num_inference_steps)
    painted = _mask(pipe, mask)
    clean_images, draw_noise, guidance = _batch_of(pipe, image, **call)
    walk = repaint_walk(num_inference_steps, jump_length, num_resamples)
    latents = draw_noise()
    with pipe.evaluation_mode():
        for k, next_k in pipe.progress_bar(list(itertools.pairwise(walk))):
            noise = draw_noise()
            if next_k > k:  # forward: q(x_t | x_s), DDPM eq. 2 over several steps
                signal, sigma = scales(levels[next_k] / levels[k])
                latents = signal * latents + sigma * noise
            else:
                predicted = _predict(pipe, latents, timesteps[k - 1], levels[k], guidance)
                unknown = ddim_step(scheduler, *predicted, levels[k], levels[next_k], draw_noise, 1.0)
                signal, sigma = scales(levels[next_k])
                latents = torch.where(painted, unknown, signal * clean_images + sigma * noise)
    return pipe.to_output(latents, output_type)


def repaint_walk(num_steps: int, jump_length: int, num_resamples: int) -> list[int]:
    """The noise levels that RePaint visits, from `num_steps` (noise) to 0 (clean).

    It goes down one level at a time. From each of the levels 1, 1 + `jump_length`, ... it jumps up by `jump_length`
    levels (if that level exists), `num_resamples` - 1 times, before it continues.
    """
    jumps_left = dict.fromkeys(range(1, num_steps - jump_length + 1, jump_length), num_resamples - 1)
    walk = [num_steps]
    while walk[-1] > 0:
        level = walk[-1] - 1
        walk.append(level)
        if jumps_left.get(level, 0) > 0:
            jumps_left[level] -= 1
            walk.append(level + jump_length)
    return walk


def _ddim(pipe: CustomUNetPipeline) -> DDIMScheduler:
    """A DDIM scheduler configured like the pipeline's scheduler if that is DDIM, else like the training scheduler."""
    own = isinstance(pipe.scheduler, DDIMScheduler)
    return scheduler_like(pipe.scheduler.config if own else pipe._trained.config, DDIMScheduler)


def _with_scheduler(pipe: CustomUNetPipeline, scheduler: SchedulerMixin) -> CustomUNetPipeline:
    """The pipeline with another scheduler, which must suit the training scheduler as always."""
    other = type(pipe)(pipe.unet, pipe._trained)
    other.scheduler = scheduler
    return other


def _ddim_levels(pipe: CustomUNetPipeline, num_inference_steps: int, eta: float = 0.0) -> tuple:
    """DDIM, its timesteps in ascending order, and abar of the clean image followed by abar of each timestep."""
    if pipe.is_continuous:
        raise ValueError("DDIM needs timesteps, but the network was trained in continuous time; use encode or impute")
    ddim = _ddim(pipe)
    _with_scheduler(pipe, ddim).check_inputs(num_inference_steps, eta)
    ddim.set_timesteps(num_inference_steps)
    timesteps = ddim.timesteps.tolist()
    return ddim, timesteps[::-1], noise_levels(ddim, timesteps)[::-1]


def _predict(pipe: CustomUNetPipeline, latents: Tensor, timestep: int, level: float, guidance: Guidance):
    """The network's prediction of x_0 and epsilon at abar `level`."""
    model_output = guidance.model_output(pipe.unet, latents, torch.tensor(timestep, device=latents.device))
    return clean_images_and_noise(pipe._trained.config.prediction_type, model_output, latents, *scales(level))


# ---- In continuous time


@torch.no_grad()
def encode(pipe: CustomUNetPipeline, image: Images, tolerance: float = 1e-3, class_labels=None) -> Tensor:
    """Encodes images into latents by the probability-flow ODE (arXiv 2011.13456, section 4.3), inverse of `decode`.

    Args:
        tolerance: tolerance of the solver, see `solve_ode`.

    Returns:
        float32 latents of unit variance, shape (B, C, H, W), also suitable for `pipe(latents=...)`.
    """
    clean_images, sde = _to_model_range(pipe, image), pipe.process.sde
    x = sde.signal_scale(torch.tensor(sde.first_time, dtype=torch.float64)) * clean_images
    return finite(_solve(pipe, x, sde.first_time, sde.last_time, tolerance, class_labels) / sde.prior_std)


@torch.no_grad()
def decode(
    pipe: CustomUNetPipeline, latents: Tensor, tolerance: float = 1e-3, output_type: str = "pil", class_labels=None
):
    """Decodes latents into images with the probability-flow ODE, the inverse of `encode`.

    The images keep the noise of the first time; `pipe(latents=...)` removes it with one more evaluation.
    """
    latents, sde = latents.to(pipe._execution_device, torch.float32), pipe.process.sde
    x = _solve(pipe, sde.prior_std * latents, sde.last_time, sde.first_time, tolerance, class_labels)
    return pipe.to_output(x / sde.signal_scale(torch.tensor(sde.first_time, dtype=torch.float64)), output_type)


def _solve(pipe: CustomUNetPipeline, x: Tensor, start: float, end: float, tolerance: float, class_labels) -> Tensor:
    pipe.process.sampler("ode", tolerance=tolerance)  # raises ValueError for an invalid tolerance
    guidance = pipe.guidance(class_labels, len(x))
    with pipe.denoising(guidance, total=None, clip=False) as denoise:  # clipping is not invertible
        return solve_ode(denoise.pf_ode, x, start, end, tolerance)[0].float()


def impute(pipe: CustomUNetPipeline, image: Images, mask: Images, num_inference_steps: int = 100, **how):
    """Repaints the masked part of images by predictor-corrector sampling (arXiv 2011.13456, appendix I.2).

    After each step the known part is put back, with the noise of the current time. Unlike `inpaint`, it also supports
    networks trained in continuous time, and does not jump back.

    Args:
        mask: as for `inpaint`.
        how: other arguments of `draw_given`.
    """
    known = ~_mask(pipe, mask)
    return draw_given(pipe, image, lambda x: known * x, num_inference_steps, **how)


def colorize(pipe: CustomUNetPipeline, image: Images, num_inference_steps: int = 100, **how):
    """Colorizes grey images (arXiv 2011.13456, appendix I.2): the mean over the channels is given, as in `impute`.

    Args:
        image: its colours are ignored.
        how: other arguments of `draw_given`.
    """
    if pipe.unet.config.in_channels != 3:
        raise ValueError(f"the network has {pipe.unet.config.in_channels} channels; colours need 3")
    return draw_given(pipe, image, lambda x: x.mean(1, keepdim=True).expand_as(x), num_inference_steps, **how)


@torch.no_grad()
def draw_given(
    pipe: CustomUNetPipeline,
    image: Images,
    known_part: Callable[[Tensor], Tensor],
    num_inference_steps: int,
    snr: float = 0.16,
    corrector_steps: int = 1,
    output_type: str = "pil",
    **call,
):
    """Draws images given a part of them, by predictor-corrector sampling.

    Args:
        known_part: orthogonal projection of x (B, C, H, W) onto the given part.
        snr, corrector_steps: see `predictor_corrector`.
    """
    process, settings = pipe.process, {"snr": snr, "corrector_steps": corrector_steps}
    sde, sampler = process.sde, process.sampler("predictor_corrector", **settings)
    total = process.num_evaluations(sampler, num_inference_steps)
    clean_images, draw_noise, guidance = _batch_of(pipe, image, **call)

    def put_back(x: Tensor, signal: Tensor | float, noise_scale: Tensor | float) -> Tensor:
        return x + known_part(signal * clean_images + noise_scale * draw_noise() - x)

    def impose(x: Tensor, t: Tensor) -> Tensor:
        return put_back(x, sde.signal_scale(t), sde.noise_scale(t))

    x, times = sde.prior_std * draw_noise(), sampling_times(sde, num_inference_steps)
    with pipe.denoising(guidance, total) as denoise:
        x = predictor_corrector(denoise, x, times, draw_noise, **settings, per_image=True, impose=impose)
    return pipe.to_output(put_back(x, 1.0, 0.0), output_type)


# ---- Inputs


def _to_model_range(pipe: CustomUNetPipeline, image: Images) -> Tensor:
    """Images -> float32 (B, C, H, W) in [-1, 1] on the device."""
    for array in image if isinstance(image, (list, tuple)) else [image]:
        if hasattr(array, "min") and not 0 <= array.min() <= array.max() <= 1:
            raise ValueError(f"image has values from {array.min()} to {array.max()}; they must lie in [0, 1]")
    images = pipe.image_processor.preprocess(image)
    if tuple(images.shape[1:]) != pipe.image_shape:
        raise ValueError(f"image has the shape {tuple(images.shape[1:])}; the network's is {pipe.image_shape}")
    return images.to(pipe._execution_device, torch.float32)


def _mask(pipe: CustomUNetPipeline, mask: Images) -> Tensor:
    """bool (B or 1, 1, H, W), True where the image is to be repainted."""
    processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_grayscale=True)
    painted = processor.preprocess(mask) > 0.5
    shape = (1, *pipe.image_shape[1:])
    if tuple(painted.shape[1:]) != shape:
        raise ValueError(f"mask has the shape {tuple(painted.shape)}; it must be {(1, *shape)}")
    return painted.to(pipe._execution_device)


def _batch_of(
    pipe: CustomUNetPipeline, image: Images, *, seeds=None, generator=None, class_labels=None
) -> tuple[Tensor, Callable[[], Tensor], Guidance]:
    """The input images (B, C, H, W), one for each seed or generator, noise in their shape, and the guidance."""
    clean_images = _to_model_range(pipe, image)
    is_one_each = seeds is not None or isinstance(generator, list)
    batch_size, generator = pipe.batch_and_generator(None if is_one_each else len(clean_images), generator, seeds)
    if len(clean_images) not in (1, batch_size):
        raise ValueError(f"{len(clean_images)} images for {batch_size} seeds; give one for all or one for each")
    draw_noise = partial(pipe.draw_noise, batch_size, generator)
    return clean_images.expand(batch_size, -1, -1, -1), draw_noise, pipe.guidance(class_labels, batch_size)
