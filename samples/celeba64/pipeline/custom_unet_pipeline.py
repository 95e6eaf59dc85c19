"""The sampling pipeline: a diffusion model of images as a `DiffusionPipeline`.

This file is shipped with every model repository, so it depends on torch and diffusers only. The samplers of a model
that was trained in continuous time come with its scheduler (`scheduler/sde.py`).

Notation (Ho et al. 2020, arXiv 2006.11239): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon; abar: `alphas_cumprod`.
"""

import inspect
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

logger = logging.get_logger("diffusers.custom_unet_pipeline")  # obeys diffusers.logging.set_verbosity

# Samplers by name: class and settings. The multistep solvers use trailing spacing, because with leading spacing and
# many steps they start far from the last timestep.
TRAILING = {"timestep_spacing": "trailing"}
SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict]] = {
    "ddpm": (diffusers.DDPMScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {}),
    "dpmsolver++2m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2} | TRAILING),
    "dpmsolver++3m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3} | TRAILING),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_order": 2} | TRAILING),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {"solver_order": 2} | TRAILING),
}
SUITABLE = tuple({cls: None for cls, _ in SAMPLERS.values()})
# These solve for x_t / sqrt(abar_t), whose noise has the scale sigma = sqrt(1 / abar_t - 1); the others solve for x_t
SIGMA_TYPE = (diffusers.EulerDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler)
# Scheduler options that spoil images, since the network gets other timesteps or the step is wrong: their usual values
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
USUAL = dict.fromkeys(SPACINGS, False)
USUAL |= {"interpolation_type": "linear", "timestep_type": "discrete", "predict_x0": True}


@dataclass
class GeneratedImages(ImagePipelineOutput):
    """Images in the format `output_type`, and the number of network evaluations per image."""

    network_evaluations: int | None = None


class CustomUNetPipeline(DiffusionPipeline):
    """Generates images by reversing a diffusion process with a U-Net.

    Args:
        unet: network called as `unet(sample, timestep).sample`: a `CustomUNet2DModel` or a `UNet2DModel`, optionally
            compiled with `torch.compile`.
        scheduler: the sampler, with the noise schedule that the network was trained with: one of the classes in
            `SAMPLERS`. To change the sampler and keep the noise schedule, call `set_sampler(name)` or, as usual,
            set `pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)`.
            For a network that was trained in continuous time, an `SDEScheduler`.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        if unet.config.sample_size is None:
            raise ValueError("the network's sample_size is None; it must be the height and width of its images")
        self.register_modules(unet=unet, scheduler=scheduler)
        # The scheduler the network was trained with; other samplers are built from its configuration and must match it
        self._trained = scheduler
        self._continuous: tuple | None = None  # continuous-time sampler, and the scheduler that it was set for
        channels = unet.config.in_channels  # with an alpha channel, nothing is converted
        colors = {"do_convert_grayscale": channels == 1, "do_convert_rgb": channels == 3}
        self.image_processor = VaeImageProcessor(do_resize=False, **colors)

    def save_config(self, save_directory, **kwargs) -> None:
        """The last step of `save_pretrained`: writes `model_index.json` and the code that it refers to.

        diffusers alone would write the module paths of this process and not copy the code.
        """
        sampler = self.continuous_sampler
        if sampler != getattr(self.scheduler, "default_sampler", None):
            logger.warning(f"The sampler {sampler.name} is not saved: call set_sampler again after loading.")
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        unet = getattr(self.unet, "_orig_mod", self.unet)  # unwraps torch.compile
        parts = {"unet": unet, "scheduler": self.scheduler}
        index = {name: ship_code(type(part), folder / name) for name, part in parts.items()}
        index["_class_name"] = ship_code(__class__, folder)
        if index["unet"][0] != "diffusers":
            index["auto_map"] = {"AutoModel": ".".join(index["unet"])}
        for name, changes in {"model_index.json": index, "unet/config.json": {}}.items():
            values = json.loads((folder / name).read_text()) | changes
            values.pop("_name_or_path", None)  # a path on the author's machine
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Drops `auto_map`, which is for `AutoModel`; diffusers would warn about it at every load."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @property
    def is_continuous(self) -> bool:
        """Whether the network was trained in continuous time."""
        return hasattr(self._trained, "sde")

    @property
    def process(self):
        """The `SDEScheduler` that the network was trained with; None if it was trained with discrete timesteps."""
        return self._trained if self.is_continuous else None

    @property
    def samplers(self) -> tuple[str, ...]:
        """The names that `set_sampler` accepts for this model."""
        return self.process.samplers if self.is_continuous else discrete_samplers(self._trained.config)

    @property
    def continuous_sampler(self):
        """The current continuous-time sampler, with `name` and `settings`; None if the scheduler is the sampler."""
        if self._continuous is not None and self._continuous[1] is self.scheduler:  # not replaced since
            return self._continuous[0]
        return self.scheduler.default_sampler if hasattr(self.scheduler, "sde") else None

    def set_sampler(self, name: str, **settings: float) -> None:
        """Replaces the sampler and keeps the noise schedule.

        Args:
            name: one of `samplers`.
            settings: settings of a continuous-time sampler, see `CONTINUOUS_SAMPLERS` in the scheduler's file.

        Raises:
            ValueError: if the model has no such sampler, or the sampler no such setting.
        """
        if name not in self.samplers:
            why = "; the network was trained in continuous time" if self.is_continuous and name in SAMPLERS else ""
            raise ValueError(f"there is no sampler {name!r}{why}; choose from {', '.join(self.samplers)}")
        if name not in SAMPLERS:
            if self.is_continuous and not hasattr(self.scheduler, "sde"):
                self.scheduler = self._trained
            self._continuous = self.process.sampler(name, **settings), self.scheduler
            return
        if settings:
            raise ValueError(f"{name} takes no settings, but {', '.join(settings)} was given")
        cls, fixed = SAMPLERS[name]
        self.scheduler, self._continuous = scheduler_like(self._trained.config, cls, **fixed), None

    # ---- Sampling

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        seeds: Sequence[int] | None = None,
        latents: Tensor | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generates images.

        Args:
            batch_size: number of images B; by default that of the seeds, generators or latents, or 1.
            generator: one for the whole batch, or a list with one for each image.
            num_inference_steps: number of sampling steps, at most the scheduler's `num_train_timesteps`, with one
                network evaluation each. In continuous time N steps take N + 1 evaluations; with c corrector steps
                N + (N - 1) c + 1; 2 N - 1 for both Heun samplers; N for `flow_euler`. `ode` chooses its own steps.
            output_type: `pil`, `np` (float32, shape (B, H, W, C), range [0, 1]), `pt` (shape (B, C, H, W), [0, 1]) or
                `latent` (shape (B, C, H, W), the network's range, not clipped).
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            eta: 0 (deterministic) to 1 (DDPM's variance), eq. 16 of DDIM (arXiv 2010.02502); for DDIM only.
            seeds: one for each image, instead of generators. With seeds or a list of generators, an image depends only
                on its own seed, not on the rest of the batch, and is the same on every device. Exception: `ode`
                chooses its steps for the whole batch, so an image depends on the others up to its tolerance.
            latents: x_T to start from instead of random noise, shape (B, C, H, W), of unit variance.
            class_labels: one for all images or one for each, for a network with class embeddings.
            guidance_scale: w. For a network whose last class embedding is the null class, the output is
                null + w (conditional - null) (classifier-free guidance, arXiv 2207.12598); 1 means no guidance.
            callback_on_step_end: called after each network evaluation as `callback(pipeline, index, timestep,
                tensors)`. It may return a dictionary with new `latents`, but not in continuous time.
            callback_on_step_end_tensor_inputs: names of the `tensors` passed to the callback: `latents` (after the
                step, in the scheduler's scaling; in continuous time, the network's input), `noisy_images` (x_t, the
                network's input) and `pred_original_sample` (the x_0 predicted from it), each float32 (B, C, H, W).

        Raises:
            ValueError: for an argument out of range, an unsuitable scheduler, or a result that is not finite.
        """
        self.check_inputs(num_inference_steps, eta, output_type)
        batch_size, generator = self.batch_and_generator(batch_size, generator, seeds, latents)
        guidance = self.guidance(class_labels, batch_size, guidance_scale)
        # The latents stay float32 whatever the network's dtype: each step changes them only a little.
        draw_noise = partial(self.draw_noise, batch_size, generator)
        latents = (draw_noise() if latents is None else latents).to(self._execution_device, torch.float32)
        tell = partial(self._tell, callback_on_step_end, callback_on_step_end_tensor_inputs)
        if self.continuous_sampler is None:
            images = self._reverse_timesteps(latents, num_inference_steps, eta, draw_noise, generator, guidance, tell)
        else:
            process, sampler = self.process, self.continuous_sampler
            total = process.num_evaluations(sampler, num_inference_steps)
            with self.denoising(guidance, total, tell) as denoise:
                images = process.sample(sampler, denoise, latents, num_inference_steps, draw_noise)
        images = self.to_output(images, output_type)
        return GeneratedImages(images=images, network_evaluations=guidance.evaluations) if return_dict else (images,)

    def _tell(self, callback, names, index: int, timestep: Tensor, **tensors: Tensor) -> dict:
        """Calls the caller's callback and returns its result."""
        if callback is None:
            return {}
        if not set(names) <= set(tensors):
            raise ValueError(f"callback_on_step_end_tensor_inputs are {names}; choose from {', '.join(tensors)}")
        return callback(self, index, timestep, {name: tensors[name].float() for name in names}) or {}

    def _reverse_timesteps(self, latents, num_inference_steps, eta, draw_noise, generator, guidance, tell) -> Tensor:
        """Samples with a diffusers scheduler."""
        scheduler, prediction_type = self.scheduler, self._trained.config.prediction_type
        step_type = prediction_type
        if prediction_type == "sample" and isinstance(scheduler, SIGMA_TYPE):
            step_type = "v_prediction"  # not all of these schedulers support x_0 prediction
            scheduler = scheduler_like(scheduler.config, type(scheduler), prediction_type=step_type)
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        if isinstance(scheduler, diffusers.EulerAncestralDiscreteScheduler):
            scheduler.sigmas = scheduler.sigmas.double()  # in float32 it may take the square root of a negative number
        has_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generator} if has_generator else {}

        latents = latents * scheduler.init_noise_sigma
        # abar of every step, read once: reading a number from the device in each step would be a sync
        levels = noise_levels(scheduler, scheduler.timesteps.tolist())
        with self.evaluation_mode():
            for index, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
                # 1. Predict x_0 and epsilon
                noisy_images = scheduler.scale_model_input(latents, timestep)
                signal, sigma = scales(levels[index])
                model_output = guidance.model_output(self.unet, noisy_images, timestep)
                predicted = clean_images_and_noise(prediction_type, model_output, noisy_images, signal, sigma)
                clean_images, noise = predicted
                # 2. Take a step of the sampler
                if isinstance(scheduler, diffusers.DDIMScheduler):
                    pair = levels[index : index + 2]
                    latents = ddim_step(scheduler, clean_images, noise, *pair, draw_noise, eta)
                else:
                    velocity = signal * noise - sigma * clean_images
                    model_output = {"epsilon": noise, "sample": clean_images, "v_prediction": velocity}[step_type]
                    latents = scheduler.step(model_output, timestep, latents, **step_kwargs).prev_sample
                # 3. Call the caller's callback
                seen = {"noisy_images": noisy_images, "pred_original_sample": clean_images}
                latents = tell(index, timestep, latents=latents, **seen).get("latents", latents)
        return latents

    @contextmanager
    def denoising(self, guidance: "Guidance", total: int | None, tell=None, clip: bool = True) -> Iterator:
        """The `Denoiser` for continuous-time samplers, with the network in evaluation mode and a progress bar.

        Args:
            total: number of denoiser evaluations; None if it is not known beforehand.
            tell: called after each evaluation, as in `_reverse_timesteps`.
            clip: whether to clip x_0 if the scheduler's configuration says so.
        """
        check_fractional_timesteps(self.unet)
        config = self.scheduler.config  # schedulers also keep settings that are not their own
        bound = config.get("clip_sample_range", 1.0) if clip and config.get("clip_sample") else math.inf
        indices = itertools.count()
        bar = self.progress_bar(itertools.count()) if total is None else self.progress_bar(total=total)

        def after_each(t: Tensor, x: Tensor, clean_images: Tensor) -> None:
            bar.update()
            tensors = {"latents": x, "noisy_images": x, "pred_original_sample": clean_images}
            if tell is not None and "latents" in tell(next(indices), t, **tensors):
                raise ValueError("a callback cannot change the latents in continuous time")

        with self.evaluation_mode(), bar:
            yield self.process.denoiser(partial(guidance.model_output, self.unet), bound, after_each)

    # ---- Parts

    def draw_noise(self, batch_size: int, generator) -> Tensor:
        """Standard normal, float32, shape (B, C, H, W)."""
        shape = (batch_size, *self.image_shape)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network."""
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Turns off dropout in the network, and restores its mode afterwards."""
        was_training = self.unet.training
        self.unet.eval()
        try:
            yield
        finally:
            self.unet.train(was_training)

    def batch_and_generator(self, batch_size, generator, seeds, latents=None) -> tuple:
        """The number of images, and their generator or list of generators; raises ValueError if they disagree."""
        if seeds is not None:
            if generator is not None:
                raise ValueError("give either seeds or generator, not both")
            generator = generators(seeds)
        if batch_size is None:
            batch_size = len(next((x for x in (generator, latents) if isinstance(x, (list, Tensor))), [None]))
        if batch_size < 1:
            raise ValueError(f"there are {batch_size} images to generate; there must be at least 1")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} images; give one for each image")
        shape = (batch_size, *self.image_shape)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}; it must be {shape}")
        return batch_size, generator

    def guidance(self, class_labels=None, batch_size: int = 1, scale: float = 1.0) -> "Guidance":
        """The `Guidance` of a batch, arguments as in `__call__`; raises ValueError if they do not suit the network."""
        num_classes = self.unet.config.get("num_class_embeds")
        has_classes = num_classes is not None or self.unet.config.get("class_embed_type") is not None
        if scale != 1 and num_classes is None:
            raise ValueError(f"guidance_scale is {scale}, but the network has no table of classes with a null class")
        if has_classes and class_labels is None:
            raise ValueError("the network has class embeddings: give class_labels")
        if not has_classes and class_labels is not None:
            raise ValueError("class_labels were given, but the network has no class embeddings")
        if class_labels is None:
            return Guidance()
        labels = torch.as_tensor(class_labels, device=self._execution_device)
        labels = labels.expand(batch_size) if labels.ndim == 0 else labels
        if len(labels) != batch_size:
            raise ValueError(f"{len(labels)} class_labels for {batch_size} images; give one for all or one for each")
        if num_classes is not None and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(f"class_labels are {labels.tolist()}; they must be 0 to {num_classes - 1}")
        return Guidance(labels, scale, None if scale == 1 else num_classes - 1)

    def to_output(self, images: Tensor, output_type: str):
        """Converts images from the model's range to `output_type`; raises ValueError if they are not finite."""
        return self.image_processor.postprocess(finite(images), output_type)

    def check_inputs(self, num_inference_steps: int, eta: float = 0.0, output_type: str = "pil") -> None:
        """Raises ValueError unless the scheduler suits the network and the arguments suit the scheduler."""
        scheduler, sampler, channels = self.scheduler, self.continuous_sampler, self.unet.config.in_channels
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}; it must be pil, np, pt or latent")
        if self.unet.config.get("out_channels", channels) != channels:
            raise ValueError("the network's out_channels differ from its in_channels; it may predict a variance")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
        if eta > 0 and (sampler is not None or not isinstance(scheduler, diffusers.DDIMScheduler)):
            raise ValueError(f"eta is {eta}; only the sampler ddim takes it")
        if sampler is not None:
            if hasattr(scheduler, "sde") and scheduler.sde != self.process.sde:
                raise ValueError("the scheduler does not have the SDE of the network's training; use from_config")
            self.process.num_evaluations(sampler, num_inference_steps)  # raises ValueError for a number out of range
            return
        self._check_scheduler()
        most = scheduler.config.num_train_timesteps
        if not 1 <= num_inference_steps <= most:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be 1 to {most}")

    def _check_scheduler(self) -> None:
        """Raises ValueError unless the scheduler, of discrete timesteps, matches the network's training."""
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        if self.is_continuous or not isinstance(scheduler, SUITABLE):
            raise ValueError(f"{name} does not suit this network; use set_sampler with {', '.join(self.samplers)}")
        kind, trained_kind = scheduler.config.prediction_type, self._trained.config.prediction_type
        if kind != trained_kind:
            raise ValueError(f"{name} has prediction_type {kind!r}, the network was trained with {trained_kind!r}")
        known, new = self._trained.alphas_cumprod.cpu(), scheduler.alphas_cumprod.cpu()
        # some schedulers keep the last one above 0
        if known.shape != new.shape or not torch.allclose(known, new, rtol=0, atol=1e-4):
            raise ValueError(f"{name} does not have the noise schedule of the network's training; use set_sampler")
        for option, usual in USUAL.items():
            if scheduler.config.get(option, usual) not in (usual, None):
                raise ValueError(f"{name} has {option} {scheduler.config[option]}, which is not supported here")
        if scheduler.config.get("algorithm_type") == "sde-dpmsolver":
            raise ValueError(f"{name} has algorithm_type sde-dpmsolver; use sde-dpmsolver++")
        if isinstance(scheduler, SIGMA_TYPE):
            check_fractional_timesteps(self.unet)


def discrete_samplers(config) -> tuple[str, ...]:
    """The names of the `SAMPLERS` for a scheduler's noise schedule; DEIS does not support zero terminal SNR."""
    return tuple(name for name in SAMPLERS if name != "deis" or not config.get("rescale_betas_zero_snr"))


def check_fractional_timesteps(unet) -> None:
    """Raises ValueError for a network that only takes integer timesteps."""
    if unet.config.get("time_embedding_type") == "learned":
        raise ValueError("the network has a learned time embedding, which has no rows for fractions of a timestep")


def finite(images: Tensor) -> Tensor:
    """The images (B, C, H, W); raises ValueError if a value is not finite."""
    bad = (~torch.isfinite(images)).flatten(1).any(dim=1).sum().item()
    if bad:
        raise ValueError(
            f"{bad} of {len(images)} images are not finite: the weights are broken, the precision is too low, or the"
            " scheduler's options do not suit these steps"
        )
    return images


def scheduler_like(config, cls: type[SchedulerMixin], **settings) -> SchedulerMixin:
    """A scheduler with the configuration, and hence the noise schedule, of another one.

    `from_config` alone would replace values that were defaults of the other class by its own, such as other betas.
    """
    return cls.from_config({key: value for key, value in config.items() if key != "_use_default_values"}, **settings)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """CPU generators, so that a seed gives the same image on every device."""
    if not all(0 <= seed < 2**32 and seed == int(seed) for seed in seeds):  # torch takes seeds modulo 2^32
        raise ValueError(f"seeds are {min(seeds)} to {max(seeds)}; they must be whole numbers from 0 to {2**32 - 1}")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def scales(alpha_cumprod: float) -> tuple[float, float]:
    """sqrt(abar) and sqrt(1 - abar)."""
    return math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)


def noise_levels(scheduler: SchedulerMixin, timesteps: list[float]) -> list[float]:
    """abar of the network's input at descending timesteps, followed by that of the final image."""
    if isinstance(scheduler, SIGMA_TYPE):  # one sigma per evaluation, and 0 at the end
        return (1 / (1 + scheduler.sigmas.double() ** 2)).tolist()
    last = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0)).item()
    return [*scheduler.alphas_cumprod[[int(timestep) for timestep in timesteps]].tolist(), last]


def clean_images_and_noise(prediction_type, model_output, noisy_images, signal, sigma) -> tuple[Tensor, Tensor]:
    """x_0 and epsilon from a model output."""
    if prediction_type == "epsilon":
        return (noisy_images - sigma * model_output) / signal, model_output
    if prediction_type == "sample":
        return model_output, (noisy_images - signal * model_output) / sigma
    if prediction_type == "v_prediction":
        return signal * noisy_images - sigma * model_output, signal * model_output + sigma * noisy_images
    raise ValueError(f"prediction_type is {prediction_type!r}; it must be epsilon, sample or v_prediction")


def ddim_step(
    scheduler, clean_images: Tensor, noise: Tensor, level: float, next_level: float, draw_noise: Callable, eta: float
) -> Tensor:
    """Eq. 12 of DDIM with the variance of eq. 16, from abar `level` to the higher `next_level`.

    `DDIMScheduler.step` assumes steps of equal length, which is wrong if their number does not divide the number of
    timesteps; otherwise this is the same. x_0 is clipped as the scheduler's configuration says.
    """
    config = scheduler.config
    if config.thresholding:
        clean_images = scheduler._threshold_sample(clean_images)
    elif config.clip_sample:
        clean_images = clean_images.clamp(-config.clip_sample_range, config.clip_sample_range)
    variance = eta**2 * (1 - next_level) / (1 - level) * (1 - level / next_level)
    latents = math.sqrt(next_level) * clean_images + math.sqrt(max(1 - next_level - variance, 0)) * noise
    return latents + math.sqrt(variance) * draw_noise() if variance > 0 else latents


def ship_code(cls: type, folder: Path) -> list[str]:
    """Copies the file that defines a class; returns [module, class] for `model_index.json`."""
    if cls.__module__.split(".")[0] == "diffusers":
        return ["diffusers", cls.__name__]
    source = Path(sys.modules[cls.__module__].__file__)
    shutil.copyfile(source, folder / source.name)
    return [source.stem, cls.__name__]


@dataclass
class Guidance:
    """Class labels and guidance scale of a batch; counts the network evaluations."""

    class_labels: Tensor | None = None
    scale: float = 1.0
    null_class: int | None = None
    evaluations: int = 0

    def model_output(self, unet, x: Tensor, timesteps: Tensor) -> Tensor:
        """The guided network output, float32 (B, C, H, W); one timestep for all images or one for each."""
        x = x.to(unet.dtype)
        if self.null_class is None:
            self.evaluations += 1
            labels = () if self.class_labels is None else (self.class_labels,)
            return unet(x, timesteps, *labels).sample.float()
        self.evaluations += 2
        labels = torch.cat([self.class_labels, torch.full_like(self.class_labels, self.null_class)])
        timesteps = torch.cat([timesteps.expand(len(x))] * 2)
        conditional, null = unet(torch.cat([x, x]), timesteps, labels).sample.float().chunk(2)
        return null + self.scale * (conditional - null)
