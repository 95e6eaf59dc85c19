"""The sampling pipeline: an unconditional diffusion model as a `DiffusionPipeline`.

This file is shipped inside every model repository, so it depends on torch and diffusers only.

Notation (Ho et al. 2020, arXiv 2006.11239): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon, abar: `alphas_cumprod`;
in continuous time (Song et al. 2021, arXiv 2011.13456) x_t = alpha(t) x_0 + n(t) epsilon, dx = f(t) x dt + g(t) dw.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import BaseOutput, make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# The samplers by name: class and settings. The spacing of the timesteps suits the solver: with leading spacing the
# multistep ones start far from the last timestep when there are many steps; with trailing spacing Heun's first step is
# too long.
LEADING, TRAILING = {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}
SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict]] = {
    "ddpm": (diffusers.DDPMScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {}),
    "dpmsolver++2m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2} | TRAILING),
    "dpmsolver++3m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3} | TRAILING),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_order": 2} | TRAILING),
    "heun": (diffusers.HeunDiscreteScheduler, LEADING),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {"solver_order": 2} | TRAILING),
}
SUITABLE = tuple({cls: None for cls, _ in SAMPLERS.values()})
# These follow x_t / sqrt(abar_t), whose noise has the scale sigma = sqrt(1 / abar_t - 1); the others follow x_t
SIGMA_TYPE = (
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.HeunDiscreteScheduler,
)
# These solve the reverse SDE or the probability-flow ODE, of the schedule of a DDPM or of an SDE (`SDEScheduler`)
CONTINUOUS_SAMPLERS: dict[str, tuple[str, ...]] = {  # and their settings, see `ContinuousSampler`
    "euler_maruyama": (),
    "reverse_diffusion": (),
    "predictor_corrector": ("snr", "corrector_steps"),
    "ode": ("tolerance",),
    "edm_heun": ("churn", "churn_min", "churn_max", "noise_factor"),
    "flow_euler": (),  # this and the next for models of rectified flow alone
    "flow_heun": (),
}
MOST_CONTINUOUS_STEPS = 10_000
MULTISTEP = (
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.DEISMultistepScheduler,
)


# Rows: the grey axis, and two axes of colour
GREY_AND_COLOURS = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]]) / torch.tensor([[3.0], [2], [6]]).sqrt()


@dataclass(frozen=True)
class ContinuousSampler:
    """A sampler of `CONTINUOUS_SAMPLERS` and its settings, each of which belongs to one of them.

    Attributes:
        snr, corrector_steps: of `predictor_corrector`: r of the Langevin steps and their number at each noise level.
        tolerance: of `ode`: error of a step, relative to 1 + |x|, as root mean square over the batch.
        churn, churn_min, churn_max, noise_factor: of `edm_heun`: S_churn, S_tmin, S_tmax and S_noise.
    """

    name: str
    snr: float = 0.16
    corrector_steps: int = 1
    tolerance: float = 1e-3
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    noise_factor: float = 1.0

    @property
    def settings(self) -> dict[str, float]:
        """Those that belong to it."""
        return {name: getattr(self, name) for name in CONTINUOUS_SAMPLERS[self.name]}

    def check(self) -> None:
        """Raises ValueError for a setting that makes no sense."""
        for name in ("snr", "tolerance", "noise_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.corrector_steps != int(self.corrector_steps) or not 1 <= self.corrector_steps <= 1000:
            raise ValueError(f"corrector_steps is {self.corrector_steps}; it must be 1 to 1000")
        if not 0 <= self.churn < math.inf:
            raise ValueError(f"churn is {self.churn}; it must not be negative")
        if not 0 <= self.churn_min <= self.churn_max:
            raise ValueError(f"churn_min {self.churn_min} and churn_max {self.churn_max} must rise from 0 on")


@dataclass
class GeneratedImages(ImagePipelineOutput):
    """Images in the form of `output_type`, and how often the network was evaluated for each of them."""

    network_evaluations: int | None = None


@dataclass
class DenoisingStrip(BaseOutput):
    """What sampling looks like on the way: frames from pure noise to the images.

    Attributes:
        timesteps: of each frame but the last, which is the result; times of the SDE in continuous time.
        noisy_images: x_t of each frame: a list of frames, each a list of B PIL images.
        pred_original_samples: the x_0 that the network predicts from it, in the same form.
    """

    timesteps: list[float]
    noisy_images: list
    pred_original_samples: list

    def to_image(self, scale: int = 1):
        """A PIL image with time from left to right and two rows an image: x_t above the predicted x_0."""
        rows = []
        for row in range(len(self.noisy_images[0])):
            rows += [frame[row] for frame in self.noisy_images] + [frame[row] for frame in self.pred_original_samples]
        columns = len(self.noisy_images)
        return _enlarged(make_image_grid(rows, rows=len(rows) // columns, cols=columns), scale)

    def save_gif(self, file, scale: int = 1, frame_milliseconds: int = 100) -> None:
        """Writes an animation to a path or a file: x_t beside the predicted x_0, the last frame for two seconds."""
        pairs = zip(self.noisy_images, self.pred_original_samples, strict=True)
        frames = []
        for noisy, predicted in pairs:
            cells = [image for pair in zip(noisy, predicted, strict=True) for image in pair]
            frames.append(_enlarged(make_image_grid(cells, rows=len(noisy), cols=2), scale))
        durations = [frame_milliseconds] * (len(frames) - 1) + [2000]
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


class CustomUNetPipeline(DiffusionPipeline):
    """Draws images by reversing the diffusion of a noise schedule with a U-Net.

    Args:
        unet: network called as `unet(sample, timestep).sample`: a `CustomUNet2DModel` or a `UNet2DModel`, also as
            `torch.compile` returns it.
        scheduler: the noise schedule that the network was trained with and the sampler: one of the classes in
            `SAMPLERS`. Another sampler of the same noise schedule is set by `set_sampler(name)` or as usual by
            `pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)`.
            Or an `SDEScheduler`, for a network that was trained in continuous time.
    """

    # The classes that `from_pretrained` takes when it may not run code from the model repository.
    unet_class: type[ModelMixin] = UNet2DModel
    sde_scheduler_class: type[SchedulerMixin] | None = None
    _callback_tensor_inputs = ("latents", "noisy_images", "pred_original_sample")

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        # What the network was trained with: other samplers are made from it, and one that does not fit is noticed
        self._trained_config = scheduler.config
        self._prediction_type = scheduler.config.get("prediction_type")
        self._alphas_cumprod = scheduler.alphas_cumprod.cpu() if hasattr(scheduler, "alphas_cumprod") else None
        self._continuous: tuple[ContinuousSampler, SchedulerMixin] | None = None
        color = "do_convert_grayscale" if unet.config.in_channels == 1 else "do_convert_rgb"
        self.image_processor = VaeImageProcessor(do_resize=False, **{color: True})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Loads a model repository. Without `trust_remote_code=True` none of its code is run.

        Keyword arguments are those of `ModelMixin.from_pretrained` (`torch_dtype`, `variant`, `revision`, `token`,
        ...), or with `trust_remote_code=True` those of `DiffusionPipeline.from_pretrained`. Weights are read from
        safetensors only, never from pickles.

        Raises:
            ValueError: if the repository's scheduler is none of those in `SAMPLERS`.
        """
        path = pretrained_model_name_or_path
        kwargs["use_safetensors"] = True
        if kwargs.pop("trust_remote_code", False):
            return super().from_pretrained(path, trust_remote_code=True, **kwargs)
        unet = cls.unet_class.from_pretrained(path, subfolder="unet", **kwargs)
        hub_kwargs = {k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only") if k in kwargs}
        # every scheduler reads the same file, which names the class that wrote it
        config = diffusers.DDIMScheduler.load_config(path, subfolder="scheduler", **hub_kwargs)
        classes = {cls.__name__: cls for cls in SUITABLE} | {"SDEScheduler": cls.sde_scheduler_class}
        if config["_class_name"] not in classes:
            raise ValueError(f"{path} has a {config['_class_name']}; take one of {', '.join(classes)}")
        scheduler_class = classes[config["_class_name"]]
        if scheduler_class is None:
            raise ValueError(f"{path} brings code for its SDEScheduler: load it with trust_remote_code=True")
        return cls(unet=unet, scheduler=scheduler_class.from_config(config))

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Leaves out `auto_map`, which is for `AutoModel`: diffusers would warn of it at every load."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @property
    def is_continuous(self) -> bool:
        """Whether the network was trained in continuous time."""
        return hasattr(self.scheduler, "sde")

    @property
    def samplers(self) -> tuple[str, ...]:
        """The names that `set_sampler` takes for this model."""
        return samplers_for(self.scheduler.config.objective if self.is_continuous else "ddpm")

    @property
    def continuous_sampler(self) -> ContinuousSampler | None:
        """The sampler in continuous time that is set; None if it is the scheduler itself."""
        if self._continuous is not None and self._continuous[1] is self.scheduler:  # not replaced since
            return self._continuous[0]
        return ContinuousSampler("edm_heun", **self.default_settings("edm_heun")) if self.is_continuous else None

    def default_settings(self, name: str) -> dict[str, float]:
        # A network that predicts the score of unscaled x errs at large sigma; without new noise these errors add up
        with_noise = name == "edm_heun" and self.scheduler.config.get("prediction_type") == "score"
        return {"churn": 10.0} if with_noise else {}

    def set_sampler(self, name: str, **settings: float) -> None:
        """Replaces the sampler and keeps the noise schedule.

        Args:
            settings: of one of `CONTINUOUS_SAMPLERS`, see `ContinuousSampler`; the churn of edm_heun is 10 for a model
                of the VE SDE unless it is given.

        Raises:
            ValueError: if there is no such sampler for this model, or no such setting of it.
        """
        if name not in self.samplers:
            why = "; the network was trained in continuous time" if name in SAMPLERS else ""
            raise ValueError(f"there is no sampler {name!r}{why}; there are {', '.join(self.samplers)}")
        known = CONTINUOUS_SAMPLERS.get(name, ())
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise ValueError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}")
        if name in SAMPLERS:
            cls, fixed = SAMPLERS[name]
            self.scheduler, self._continuous = _scheduler_like(self._trained_config, cls, **fixed), None
            return
        sampler = ContinuousSampler(name, **self.default_settings(name) | settings)
        sampler.check()
        denoiser(self.unet, self.scheduler)  # whether the network takes such times
        self._continuous = sampler, self.scheduler

    # ---- Sampling

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        seeds: Sequence[int] | None = None,
        latents: Tensor | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        classifier: Callable | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generates images.

        Args:
            batch_size: B, 1 unless seeds, generators or latents tell.
            generator: one for the whole batch, or a list with one for each image.
            num_inference_steps: sampling steps, at most the scheduler's `num_train_timesteps`. One network evaluation
                each; Heun takes 2 except in the last step. In continuous time N steps take N + 1 evaluations, with c
                corrector steps N + (N - 1) c + 1, with the two of Heun 2 N - 1, with `flow_euler` N; `ode` chooses its
                own.
            eta: 0 (deterministic) to 1 (DDPM's variance), eq. 16 of DDIM; other samplers do not take it.
            output_type: `pil`, `np` (float32, shape (B, H, W, C), range [0, 1]) or `pt` (shape (B, C, H, W), [0, 1]).
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            seeds: one for each image, instead of generators. With seeds or a list of generators an image depends on
                its own one alone, not on the images beside it, and the same seed gives it on every device; but `ode`
                chooses its steps for the batch, on which an image then depends by as much as the tolerance allows.
            latents: x_T to start from instead of random noise, shape (B, C, H, W), of unit variance.
            class_labels: for a network with class embeddings or with a classifier, one for all images or one for each.
            guidance_scale: w. For a network with class embeddings of which the last is the null class, the output is
                null + w (conditional - null) (classifier-free guidance, arXiv 2207.12598); 1 is without guidance. With
                a classifier, the factor of its gradient.
            classifier: p(y | x_t) as logits (B, K) of `classifier(x_t, alpha, n)` with alpha and n of shape (B,), for
                guidance by the gradient of its logarithm (arXiv 2011.13456, eq. 14; 2105.05233, section 4).
            callback_on_step_end: called after each network evaluation as `callback(pipeline, index, timestep,
                tensors)`; it may return a dictionary with new `latents`, but not in continuous time.
            callback_on_step_end_tensor_inputs: which `tensors` it gets: `latents` (after the step, as the scheduler
                keeps them; in continuous time those that the network saw), `noisy_images` (x_t that the network saw)
                and `pred_original_sample` (x_0 predicted from it), each float32 of shape (B, C, H, W).

        Raises:
            ValueError: for an argument out of range, a scheduler that does not suit, or a result that is not finite.
        """
        self.check_inputs(num_inference_steps, eta, output_type)
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"a callback can have {', '.join(self._callback_tensor_inputs)}, not {', '.join(unknown)}"
            )
        batch_size, generator = self._batch_and_generator(batch_size, generator, seeds, latents)
        guidance = self._guidance(class_labels, batch_size, guidance_scale, classifier)
        device = self._execution_device
        # The latents stay float32 whatever the network's type: a step changes them by little.
        latents = self._noise(batch_size, generator) if latents is None else latents.to(device, torch.float32)
        if self.continuous_sampler is not None:
            draw = _ContinuousDraw(self, guidance, callback_on_step_end, callback_on_step_end_tensor_inputs)
            images = draw.run(self.continuous_sampler, latents, num_inference_steps, generator)
            return self._generated(images, output_type, return_dict, guidance.evaluations)

        scheduler, step_type = self.scheduler, self._prediction_type
        if step_type == "sample" and isinstance(scheduler, SIGMA_TYPE):
            step_type = "v_prediction"  # two of them do not take x_0
            scheduler = _scheduler_like(scheduler.config, type(scheduler), prediction_type=step_type)
        scheduler.set_timesteps(num_inference_steps, device=device)
        if isinstance(scheduler, MULTISTEP) and len(scheduler.timesteps.unique()) < num_inference_steps:
            raise ValueError(
                f"{num_inference_steps} steps repeat a timestep with timestep_spacing"
                f" {scheduler.config.timestep_spacing!r}; take fewer steps or 'trailing'"
            )
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        has_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generator} if has_generator else {}

        latents = latents * scheduler.init_noise_sigma
        # abar of every step, read once: asking the device for a number in each step would make it wait
        levels = _levels(scheduler, scheduler.timesteps.tolist())
        with self._evaluation_mode():
            for index, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
                # 1. What the network says of x_t
                noisy_images = scheduler.scale_model_input(latents, timestep)
                signal, sigma = _scales(levels[index])
                model_output = guidance.model_output(self.unet, noisy_images, timestep)
                clean_images, noise = clean_images_and_noise(
                    self._prediction_type, model_output, noisy_images, signal, sigma
                )
                if guidance.classifier is not None:
                    gradient = guidance.gradient(noisy_images, signal, sigma)
                    clean_images, noise = clean_images + sigma**2 / signal * gradient, noise - sigma * gradient
                # 2. The step
                if isinstance(scheduler, diffusers.DDIMScheduler):
                    latents = self._ddim_step(clean_images, noise, levels[index], levels[index + 1], eta, generator)
                else:
                    if step_type != self._prediction_type or guidance.classifier is not None:
                        model_output = {
                            "epsilon": noise,
                            "sample": clean_images,
                            "v_prediction": signal * noise - sigma * clean_images,
                        }[step_type]
                    latents = scheduler.step(model_output, timestep, latents, **step_kwargs).prev_sample
                # 3. The caller's own
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "noisy_images": noisy_images, "pred_original_sample": clean_images}
                    chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, index, timestep, chosen) or {}).get("latents", latents)
        return self._generated(latents, output_type, return_dict, guidance.evaluations)

    # ---- Applications

    @torch.no_grad()
    def denoising_strip(self, num_frames: int = 10, num_inference_steps: int = 50, **kwargs) -> DenoisingStrip:
        """Samples and keeps x_t and the predicted x_0 on the way.

        Args:
            num_frames: at evenly spaced steps, the last one being the result; at least 2.
            kwargs: those of a call (`seeds`, `eta`, `class_labels`, ...).
        """
        if num_frames < 2:
            raise ValueError(f"num_frames is {num_frames}; it must be at least 2")
        timesteps, noisy, predicted = [], [], []

        def keep(pipeline, index, timestep, tensors):
            timesteps.append(timestep.item())
            noisy.append(tensors["noisy_images"].cpu())
            predicted.append(tensors["pred_original_sample"].cpu())

        result = self(
            num_inference_steps=num_inference_steps,
            **kwargs,
            output_type="pil",
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=("noisy_images", "pred_original_sample"),
        ).images
        chosen = torch.linspace(0, len(noisy) - 1, min(num_frames - 1, len(noisy))).round().int().tolist()
        return DenoisingStrip(
            timesteps=[timesteps[i] for i in chosen],
            noisy_images=[self._to_output(noisy[i], "pil") for i in chosen] + [result],
            pred_original_samples=[self._to_output(predicted[i], "pil") for i in chosen] + [result],
        )

    @torch.no_grad()
    def interpolate(
        self,
        start: int | Tensor,
        end: int | Tensor,
        num_images: int = 8,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: int | Sequence[int] | Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Images on the way between two latents, by spherical interpolation and DDIM (arXiv 2010.02502, section 5.3).

        A network that was trained in continuous time takes Heun's method for the probability-flow ODE instead.

        Args:
            start, end: a seed, or a latent of shape (1, C, H, W), for example by `invert`.
            num_images: including both ends, at least 2.

        Raises:
            ValueError: as a call, or for fewer images.
        """
        if num_images < 2:
            raise ValueError(f"num_images is {num_images}; it must be at least 2")
        start, end = (x if isinstance(x, Tensor) else self._noise(1, _generators([x])) for x in (start, end))
        for latents in (start, end):
            if tuple(latents.shape) != (shape := (1, self.unet.config.in_channels, *self._image_size)):
                raise ValueError(f"latents to interpolate have the shape {tuple(latents.shape)}; it must be {shape}")
        latents = slerp(start, end.to(start), torch.linspace(0, 1, num_images))
        scheduler = self.scheduler
        if not self.is_continuous:
            scheduler = _scheduler_like(self._trained_config, diffusers.DDIMScheduler)
        deterministic = CustomUNetPipeline(self.unet, scheduler)  # by DDIM or, in continuous time, EDM's Heun
        if self.is_continuous:
            deterministic.set_sampler("edm_heun", churn=0.0)
        deterministic._progress_bar_config = getattr(self, "_progress_bar_config", {})
        return deterministic(
            latents=latents,
            num_inference_steps=num_inference_steps,
            output_type=output_type,
            return_dict=return_dict,
            class_labels=class_labels,
        )

    @torch.no_grad()
    def invert(
        self,
        image: PipelineImageInput,
        num_inference_steps: int = 50,
        num_fixed_point_iterations: int = 3,
        class_labels: int | Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """The latents from which DDIM (eta 0, as many steps) draws these images again, up to an error.

        A step of DDIM from t to s < t turns x_t in the plane of x_0 and epsilon by an angle phi: x_s = cos(phi) x_t -
        sin(phi) v, where v is the network's at x_t; so x_t = (x_s + sin(phi) v) / cos(phi). As x_t is what is looked
        for, v is first taken at x_s; each further fixed-point iteration takes it at the last x_t found. (With epsilon
        or x_0 in the place of v the iterations do not converge where little is left of the image, or of the noise.)

        Args:
            image: PIL images, or arrays in [0, 1] of shape (B, H, W, C) or tensors of shape (B, C, H, W).
            num_fixed_point_iterations: network evaluations a step; more make the inversion more exact.

        Returns:
            float32 latents of shape (B, C, H, W), for `pipeline(latents=...)` with `DDIMScheduler`. What the sampler
            clips is lost: for a faithful reconstruction set `clip_sample=False` in its configuration.
        """
        if num_fixed_point_iterations < 1:
            raise ValueError(f"num_fixed_point_iterations is {num_fixed_point_iterations}; it must be at least 1")
        timesteps, levels = self._ddim_levels(num_inference_steps)
        latents = self._to_model_range(image)
        class_labels = self._class_labels(class_labels, len(latents))
        with self._evaluation_mode():
            for k in self.progress_bar(range(1, len(levels))):
                signal_s, sigma_s = _scales(levels[k - 1])
                signal_t, sigma_t = _scales(levels[k])
                cosine = signal_s * signal_t + sigma_s * sigma_t
                sine = signal_s * sigma_t - sigma_s * signal_t
                next_latents = latents
                for _ in range(num_fixed_point_iterations):
                    clean, noise = self._predict(next_latents, timesteps[k - 1], levels[k], class_labels)
                    velocity = signal_t * noise - sigma_t * clean
                    next_latents = (latents + sine * velocity) / cosine
                latents = next_latents
        return self._finite(latents)

    @torch.no_grad()
    def variations(
        self,
        image: PipelineImageInput,
        timestep: int,
        num_inference_steps: int = 50,
        eta: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Noises images to a level and denoises them again, as in figure 8 of DDPM: the more noise, the freer.

        Args:
            image: one image for all seeds or one for each, as for `invert`.
            timestep: t of the noise level, the nearest one among the `num_inference_steps` of a whole sampling.
            eta: of the denoising (eq. 16 of DDIM); with 0 only the added noise is random.

        Raises:
            ValueError: as a call, or for images that are not of the network's shape or not in [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
        timesteps, levels = self._ddim_levels(num_inference_steps, output_type)
        if not 0 <= timestep < self.scheduler.config.num_train_timesteps:
            raise ValueError(
                f"timestep is {timestep}; it must be 0 to {self.scheduler.config.num_train_timesteps - 1}"
            )
        clean_images, generator, class_labels = self._batch_of(image, generator, seeds, class_labels)
        start = min(range(1, len(levels)), key=lambda k: abs(timesteps[k - 1] - timestep))
        signal, sigma = _scales(levels[start])
        latents = signal * clean_images + sigma * self._noise(len(clean_images), generator)
        with self._evaluation_mode():
            for k in self.progress_bar(range(start, 0, -1)):
                predicted = self._predict(latents, timesteps[k - 1], levels[k], class_labels)
                latents = self._ddim_step(*predicted, levels[k], levels[k - 1], eta, generator)
        images = self._to_output(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def inpaint(
        self,
        image: PipelineImageInput,
        mask: PipelineImageInput,
        num_inference_steps: int = 50,
        jump_length: int = 1,
        num_resamples: int = 5,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Paints the masked part of images anew: RePaint (Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1).

        Each step denoises (with DDPM's variance) and then puts the noised image where it is known. Going back
        `jump_length` steps by adding noise, `num_resamples` - 1 times from every `jump_length`-th level, lets what is
        painted agree with what is known; it takes about `num_inference_steps` x `num_resamples` network evaluations.

        Args:
            image: one image for all seeds or one for each, as for `invert`.
            mask: PIL image, array (H, W) or tensor (1, 1, H, W): where it is above one half, the image is painted.

        Raises:
            ValueError: as `variations`, or for a mask of another size or that leaves nothing to paint.
        """
        if jump_length < 1 or num_resamples < 1:
            raise ValueError(
                f"jump_length is {jump_length} and num_resamples is {num_resamples}; they must be at least 1"
            )
        timesteps, levels = self._ddim_levels(num_inference_steps, output_type)
        clean_images, generator, class_labels = self._batch_of(image, generator, seeds, class_labels)
        painted = self._mask(mask)
        _check_masks(painted, len(clean_images))
        walk = repaint_walk(num_inference_steps, jump_length, num_resamples)
        latents = self._noise(len(clean_images), generator)
        with self._evaluation_mode():
            for k, next_k in self.progress_bar(list(itertools.pairwise(walk))):
                noise = self._noise(len(clean_images), generator)
                if next_k > k:  # forward: q(x_t | x_s), DDPM eq. 2 over several steps
                    signal, sigma = _scales(levels[next_k] / levels[k])
                    latents = signal * latents + sigma * noise
                else:
                    predicted = self._predict(latents, timesteps[k - 1], levels[k], class_labels)
                    unknown = self._ddim_step(*predicted, levels[k], levels[next_k], 1.0, generator)
                    signal, sigma = _scales(levels[next_k])
                    latents = torch.where(painted, unknown, signal * clean_images + sigma * noise)
        images = self._to_output(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ---- Applications in continuous time

    @torch.no_grad()
    def encode(
        self,
        image: PipelineImageInput,
        tolerance: float = 1e-3,
        class_labels: int | Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """The latents of images by the probability-flow ODE (arXiv 2011.13456, section 4.3); `decode` returns them.

        Args:
            image: as for `invert`.
            tolerance: of the solver, see `ContinuousSampler`.

        Returns:
            float32 latents of unit variance, shape (B, C, H, W), also for `pipeline(latents=...)`.
        """
        clean_images = self._to_model_range(image)
        draw = self._ode(tolerance, class_labels, len(clean_images))
        sde = draw.sde
        x = sde.signal_scale(_time(sde.first_time)) * clean_images
        return self._finite(draw.solve(x, sde.first_time, sde.last_time, tolerance) / sde.prior_std)

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        tolerance: float = 1e-3,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: int | Sequence[int] | Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """The images of latents by the probability-flow ODE, the inverse of `encode`.

        The noise of the first time stays in them; `pipeline(latents=...)` takes it out with a last evaluation.
        """
        _check_output_type(output_type)
        self._batch_and_generator(None, None, None, latents)
        latents = latents.to(self._execution_device, torch.float32)
        draw = self._ode(tolerance, class_labels, len(latents))
        sde = draw.sde
        x = draw.solve(sde.prior_std * latents, sde.last_time, sde.first_time, tolerance)
        images = x / sde.signal_scale(_time(sde.first_time))
        return self._generated(images, output_type, return_dict, draw.guidance.evaluations)

    @torch.no_grad()
    def impute(
        self,
        image: PipelineImageInput,
        mask: PipelineImageInput,
        num_inference_steps: int = 100,
        snr: float = 0.16,
        corrector_steps: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Paints the masked part of images anew by predictor-corrector sampling (arXiv 2011.13456, appendix I.2).

        After each step the known part is put back, with the noise of its time. Unlike `inpaint` it takes networks
        trained in continuous time too, and goes straight on.

        Args:
            image, mask: as for `inpaint`.
            snr, corrector_steps: of the corrector, see `ContinuousSampler`.

        Raises:
            ValueError: as `inpaint`.
        """
        known = ~self._mask(mask)
        options = (num_inference_steps, snr, corrector_steps, output_type, return_dict)
        return self._draw_given(image, None, known, options, generator, seeds, class_labels)

    @torch.no_grad()
    def colorize(
        self,
        image: PipelineImageInput,
        num_inference_steps: int = 100,
        snr: float = 0.16,
        corrector_steps: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Gives grey images colours (arXiv 2011.13456, appendix I.2): `impute` along the grey axis of the colours.

        Args:
            image: one image for all seeds or one for each, as for `invert`; of a coloured one the mean over its three
                channels is taken.

        Raises:
            ValueError: as `impute`, or for a network of other than three channels.
        """
        if self.unet.config.in_channels != 3:
            raise ValueError(f"the network has {self.unet.config.in_channels} channels; colours need 3")
        known = torch.tensor([True, False, False], device=self._execution_device).view(1, 3, 1, 1)
        options = (num_inference_steps, snr, corrector_steps, output_type, return_dict)
        return self._draw_given(image, GREY_AND_COLOURS, known, options, generator, seeds, class_labels)

    def _draw_given(self, image, basis: Tensor | None, known: Tensor, options: tuple, generator, seeds, class_labels):
        """Predictor-corrector sampling, given where `known` the channels of images in an orthonormal basis."""
        num_inference_steps, snr, corrector_steps, output_type, return_dict = options
        sampler = ContinuousSampler("predictor_corrector", snr=snr, corrector_steps=corrector_steps)
        sampler.check()
        _check_continuous(num_inference_steps, output_type)
        clean_images, generator, class_labels = self._batch_of(image, generator, seeds, class_labels)

        def change_basis(x: Tensor, matrix: Tensor | None) -> Tensor:
            return x if matrix is None else torch.einsum("ij,bjhw->bihw", matrix.to(x), x)

        _check_masks(known, len(clean_images))
        given = change_basis(clean_images, basis)

        def impose(x: Tensor, signal: Tensor | float, noise_scale: Tensor | float) -> Tensor:
            noised = signal * given + noise_scale * self._noise(len(given), generator)
            x = torch.where(known, noised, change_basis(x, basis))
            return change_basis(x, None if basis is None else basis.T)

        draw = _ContinuousDraw(self, Guidance(class_labels), impose=impose)
        latents = self._noise(len(clean_images), generator)
        images = impose(draw.run(sampler, latents, num_inference_steps, generator), 1.0, 0.0)
        return self._generated(images, output_type, return_dict, draw.guidance.evaluations)

    def _ode(self, tolerance: float, class_labels, batch_size: int) -> "_ContinuousDraw":
        ContinuousSampler("ode", tolerance=tolerance).check()
        labels = self._class_labels(class_labels, batch_size)
        return _ContinuousDraw(self, Guidance(labels), clip=False)  # what is clipped could not be run backwards

    # ---- Steps of DDIM between any two levels

    def _ddim_levels(self, num_inference_steps: int, output_type: str = "pil") -> tuple[list[int], list[float]]:
        """The timesteps of a DDIM sampling, ascending, and abar of each of them after that of the clean image."""
        if self.is_continuous:
            raise ValueError(
                "this goes by DDIM's steps, but the network was trained in continuous time; there are encode, decode,"
                " impute and colorize"
            )
        self._check_discrete(num_inference_steps, 0.0, output_type)
        ddim = _scheduler_like(self._trained_config, diffusers.DDIMScheduler)
        ddim.set_timesteps(num_inference_steps)
        timesteps = ddim.timesteps.tolist()
        return timesteps[::-1], _levels(ddim, timesteps)[::-1]

    def _predict(self, latents, timestep, level, class_labels) -> tuple[Tensor, Tensor]:
        """x_0 and epsilon that the network predicts at abar `level`."""
        timestep = torch.tensor(timestep, device=latents.device)
        model_output = Guidance(class_labels).model_output(self.unet, latents, timestep)
        return clean_images_and_noise(self._prediction_type, model_output, latents, *_scales(level))

    def _ddim_step(self, clean_images, noise, level, next_level, eta, generator) -> Tensor:
        """Eq. 12 of DDIM with the variance of eq. 16, from abar `level` to the higher `next_level`.

        `DDIMScheduler.step` takes all steps for equally long and so errs where their number does not divide that of
        the timesteps; this is the same where it does.
        """
        config = self.scheduler.config
        if config.get("thresholding"):
            clean_images = self.scheduler._threshold_sample(clean_images)
        elif config.get("clip_sample"):
            clean_images = clean_images.clamp(-config.clip_sample_range, config.clip_sample_range)
        variance = eta**2 * (1 - next_level) / (1 - level) * (1 - level / next_level)
        latents = math.sqrt(next_level) * clean_images + math.sqrt(max(1 - next_level - variance, 0)) * noise
        if variance > 0:
            latents = latents + math.sqrt(variance) * self._noise(len(latents), generator)
        return latents

    # ---- Parts

    def _noise(self, batch_size: int, generator) -> Tensor:
        """Standard normal, float32, shape (B, C, H, W)."""
        shape = (batch_size, self.unet.config.in_channels, *self._image_size)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    @property
    def _image_size(self) -> tuple[int, int]:
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("the network's sample_size is not set; construct it with the size of its images")
        return (size, size) if isinstance(size, int) else tuple(size)

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Without it, dropout in the samples of a fresh network."""
        was_training = self.unet.training
        self.unet.eval()
        try:
            yield
        finally:
            self.unet.train(was_training)

    def _to_model_range(self, image: PipelineImageInput) -> Tensor:
        """Images -> float32 (B, C, H, W) in [-1, 1] on the device."""
        for array in image if isinstance(image, (list, tuple)) else [image]:
            if hasattr(array, "min") and not 0 <= array.min() <= array.max() <= 1:
                raise ValueError(f"image has values from {array.min()} to {array.max()}; they must lie in [0, 1]")
        images = self.image_processor.preprocess(image)
        shape = (self.unet.config.in_channels, *self._image_size)
        if tuple(images.shape[1:]) != shape:
            raise ValueError(f"image has the shape {tuple(images.shape[1:])}; the network's is {shape}")
        return images.to(self._execution_device, torch.float32)

    def _mask(self, mask: PipelineImageInput) -> Tensor:
        """bool (B or 1, 1, H, W), true where the image is painted."""
        processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_grayscale=True)
        painted = processor.preprocess(mask) > 0.5
        if painted.shape[1] != 1 or tuple(painted.shape[2:]) != self._image_size:
            raise ValueError(f"mask has the shape {tuple(painted.shape)}; it must be (1, 1, {self._image_size})")
        if not painted.any():
            raise ValueError("mask is nowhere above one half; there is nothing to paint")
        return painted.to(self._execution_device)

    def _batch_of(self, image, generator, seeds, class_labels) -> tuple[Tensor, list | None, Tensor | None]:
        """The images, one for each seed or generator, with generators and labels."""
        clean_images = self._to_model_range(image)
        given = next((x for x in (seeds, generator) if x is not None and not isinstance(x, torch.Generator)), None)
        batch_size = len(clean_images if given is None else given)
        if len(clean_images) not in (1, batch_size):
            raise ValueError(f"{len(clean_images)} images for {batch_size} seeds; give one for all or one for each")
        batch_size, generator = self._batch_and_generator(batch_size, generator, seeds, None)
        clean_images = clean_images.expand(batch_size, -1, -1, -1)
        return clean_images, generator, self._class_labels(class_labels, batch_size)

    def _batch_and_generator(self, batch_size, generator, seeds, latents):
        if seeds is not None and generator is not None:
            raise ValueError("give either seeds or generator, not both")
        if seeds is not None:
            generator = _generators(seeds)
        if latents is not None and tuple(latents.shape[1:]) != (self.unet.config.in_channels, *self._image_size):
            raise ValueError(
                f"latents have the shape {tuple(latents.shape)}; the network's is"
                f" (batch_size, {self.unet.config.in_channels}, {', '.join(map(str, self._image_size))})"
            )
        if batch_size is None:
            batch_size = len(next((x for x in (generator, latents) if isinstance(x, (list, Tensor))), [None]))
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} images; give one for each image")
        if latents is not None and len(latents) != batch_size:
            raise ValueError(f"{len(latents)} latents for {batch_size} images; give one for each image")
        return batch_size, generator

    def _guidance(self, class_labels, batch_size: int, scale: float, classifier: Callable | None) -> "Guidance":
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale is {scale}; it must be finite")
        if classifier is not None and class_labels is None:
            raise ValueError("a classifier was given, but no class_labels to guide to")
        if classifier is None and class_labels is None and scale != 1:
            raise ValueError(f"guidance_scale is {scale}, but there are no class_labels to guide to")
        null_class = None
        if classifier is None and scale != 1:
            if self.unet.config.get("num_class_embeds") is None:
                raise ValueError(f"guidance_scale is {scale}, but the network has no table of classes with a null one")
            null_class = self.unet.config.num_class_embeds - 1
        labels = self._class_labels(class_labels, batch_size, classifier)
        return Guidance(labels, scale, null_class, classifier)

    def _class_labels(self, class_labels, batch_size: int, classifier: Callable | None = None) -> Tensor | None:
        """int64 (B,), or None for a network without class embeddings."""
        config = self.unet.config
        has_classes = config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None
        if classifier is not None and has_classes:
            raise ValueError("a classifier was given, but the network has class embeddings: take guidance_scale alone")
        if classifier is None and has_classes != (class_labels is not None):
            raise ValueError(
                "the network has class embeddings: give class_labels"
                if has_classes
                else "class_labels were given, but the network has no class embeddings"
            )
        if class_labels is None:
            return None
        labels = torch.as_tensor(class_labels, device=self._execution_device)
        labels = labels.expand(batch_size) if labels.ndim == 0 else labels
        if len(labels) != batch_size:
            raise ValueError(f"{len(labels)} class_labels for {batch_size} images; give one for all or one for each")
        num_classes = config.get("num_class_embeds")
        if num_classes is not None and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(f"class_labels are {labels.tolist()}; they must be 0 to {num_classes - 1}")
        return labels

    def _generated(self, images: Tensor, output_type: str, return_dict: bool, evaluations: int):
        images = self._to_output(images, output_type)
        return GeneratedImages(images=images, network_evaluations=evaluations) if return_dict else (images,)

    def _to_output(self, images: Tensor, output_type: str):
        return self.image_processor.postprocess(self._finite(images), output_type)

    def _finite(self, images: Tensor) -> Tensor:
        bad = (~torch.isfinite(images)).flatten(1).any(dim=1).sum().item()
        if bad:
            raise ValueError(
                f"{bad} of {len(images)} images are not finite; the network's weights or precision are broken"
            )
        return images

    def check_inputs(self, num_inference_steps: int, eta: float = 0.0, output_type: str = "pil") -> None:
        """Whether the scheduler suits the network, and the arguments the scheduler.

        Raises:
            ValueError: one line, if not.
        """
        sampler = self.continuous_sampler
        if sampler is None:
            return self._check_discrete(num_inference_steps, eta, output_type)
        if eta != 0:
            raise ValueError(f"eta is {eta}, but {sampler.name} does not take it; use DDIMScheduler")
        _check_continuous(num_inference_steps, output_type)

    def _check_discrete(self, num_inference_steps: int, eta: float, output_type: str) -> None:
        scheduler, config = self.scheduler, self.scheduler.config
        name = type(scheduler).__name__
        _check_output_type(output_type)
        if not isinstance(scheduler, SUITABLE):
            suitable = ", ".join(cls.__name__ for cls in SUITABLE)
            raise ValueError(f"{name} does not suit a network of discrete timesteps; take one of {suitable}")
        if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"prediction_type is {config.prediction_type!r}; it must be epsilon, sample or v_prediction"
            )
        if config.prediction_type != self._prediction_type:
            raise ValueError(
                f"{name} has prediction_type {config.prediction_type!r}, but the network was trained with"
                f" {self._prediction_type!r}"
            )
        known, new = self._alphas_cumprod, scheduler.alphas_cumprod.cpu()
        if known is None:
            raise ValueError(f"{name} has discrete timesteps, but the network was trained in continuous time")
        if known.shape != new.shape or (known - new).abs().max() > 1e-4:  # some bound the last one away from 0
            raise ValueError(
                f"{name} has another noise schedule than the pipeline was made with; `from_config` may lose it:"
                " take set_sampler(name)"
            )
        if isinstance(scheduler, SIGMA_TYPE) and self.unet.config.get("time_embedding_type") == "learned":
            raise ValueError(f"{name} takes fractions of a timestep, for which a learned time embedding has no rows")
        if str(config.get("variance_type")).startswith("learned"):
            raise ValueError(f"variance_type is {config.variance_type!r}, but the network predicts no variance")
        if config.get("use_flow_sigmas"):
            raise ValueError(f"{name} has use_flow_sigmas, but the network was not trained on straight flows")
        last = config.num_train_timesteps
        if not 1 <= num_inference_steps <= last:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be 1 to {last}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
        if eta > 0 and not isinstance(scheduler, diffusers.DDIMScheduler):
            raise ValueError(f"eta is {eta}, but {name} does not take it; use DDIMScheduler")


def samplers_for(objective: str) -> tuple[str, ...]:
    """The names of the samplers for a model of DDPM (`ddpm`) or of an objective of `SDEScheduler`."""
    continuous = (name for name in CONTINUOUS_SAMPLERS if objective == "flow" or not name.startswith("flow_"))
    return (*(SAMPLERS if objective == "ddpm" else ()), *continuous)


def _check_continuous(num_inference_steps: int, output_type: str) -> None:
    if not 2 <= num_inference_steps <= MOST_CONTINUOUS_STEPS:
        raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be 2 to {MOST_CONTINUOUS_STEPS}")
    _check_output_type(output_type)


def _check_output_type(output_type: str) -> None:
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type is {output_type!r}; it must be pil, np or pt")


def slerp(start: Tensor, end: Tensor, fractions: Tensor) -> Tensor:
    """Spherical linear interpolation (DDIM, eq. 67): noise between two noises has their length.

    Args:
        start, end: shape (1, C, H, W).
        fractions: of the way, shape (N,).

    Returns:
        shape (N, C, H, W).
    """
    cosine = torch.nn.functional.cosine_similarity(start.flatten(), end.flatten(), dim=0).double()
    angle = torch.acos(cosine.clamp(-1, 1))
    fractions = fractions.to(angle.device, torch.float64).view(-1, 1, 1, 1)
    if torch.sin(angle) < 1e-6:  # (anti)parallel: the straight line
        return ((1 - fractions) * start + fractions * end).to(start.dtype)
    weights = (torch.sin((1 - fractions) * angle), torch.sin(fractions * angle))
    return ((weights[0] * start + weights[1] * end) / torch.sin(angle)).to(start.dtype)


def repaint_walk(num_steps: int, jump_length: int, num_resamples: int) -> list[int]:
    """The levels that RePaint visits, from `num_steps` (noise) to 0 (clean); it jumps back before it goes on.

    Between two jumps it goes down one level at a time. From each of the levels 1, 1 + `jump_length`, ... it jumps up
    by `jump_length` (as long as there is such a level), `num_resamples` - 1 times.
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


def _scheduler_like(config, cls: type[SchedulerMixin], **settings) -> SchedulerMixin:
    """A scheduler with the configuration of another one, and so with the same noise schedule.

    `from_config` alone leaves out what were defaults of the other class and takes its own: other betas for Heun.
    """
    return cls.from_config({key: value for key, value in config.items() if key != "_use_default_values"}, **settings)


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """On the CPU, so that a seed means the same image on every device."""
    if not all(0 <= seed < 2**32 and seed == int(seed) for seed in seeds):  # torch takes them modulo 2^32
        raise ValueError(f"seeds are {min(seeds)} to {max(seeds)}; they must be whole numbers from 0 to {2**32 - 1}")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _check_masks(masks: Tensor, batch_size: int) -> None:
    if masks.ndim == 4 and len(masks) not in (1, batch_size):
        raise ValueError(f"{len(masks)} masks for {batch_size} images; give one for all or one for each")


def _scales(alpha_cumprod: float) -> tuple[float, float]:
    """sqrt(abar) and sqrt(1 - abar)."""
    return math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)


def _levels(scheduler: SchedulerMixin, timesteps: list[float]) -> list[float]:
    """abar of what the network sees at descending timesteps, and after them that of the clean image."""
    if isinstance(scheduler, SIGMA_TYPE):  # one sigma for each evaluation, and 0 for the end
        return (1 / (1 + scheduler.sigmas.double() ** 2)).tolist()
    last = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0)).item()
    return [*scheduler.alphas_cumprod[[int(timestep) for timestep in timesteps]].tolist(), last]


def clean_images_and_noise(prediction_type, model_output, noisy_images, signal, sigma) -> tuple[Tensor, Tensor]:
    """x_0 and epsilon that a model output stands for."""
    if prediction_type == "epsilon":
        return (noisy_images - sigma * model_output) / signal, model_output
    if prediction_type == "sample":
        return model_output, (noisy_images - signal * model_output) / sigma
    return signal * noisy_images - sigma * model_output, signal * model_output + sigma * noisy_images


def _enlarged(image, scale: int):
    return image.resize((image.width * scale, image.height * scale), resample=0)  # nearest


# ---- Continuous time


@dataclass
class Guidance:
    """What the network is asked for: labels, the scale of guidance, and how; it counts the evaluations."""

    class_labels: Tensor | None = None
    scale: float = 1.0
    null_class: int | None = None  # classifier-free guidance
    classifier: Callable | None = None
    evaluations: int = 0

    def model_output(self, unet, x: Tensor, timesteps: Tensor) -> Tensor:
        """float32, shape (B, C, H, W); timesteps for all or for each image."""
        x = x.to(unet.dtype)
        if self.class_labels is None or self.classifier is not None:
            self.evaluations += 1
            return unet(x, timesteps).sample.float()
        if self.null_class is None:
            self.evaluations += 1
            return unet(x, timesteps, class_labels=self.class_labels).sample.float()
        self.evaluations += 2
        labels = torch.cat([self.class_labels, torch.full_like(self.class_labels, self.null_class)])
        timesteps = torch.cat([timesteps.expand(len(x))] * 2)
        conditional, null = unet(torch.cat([x, x]), timesteps, class_labels=labels).sample.float().chunk(2)
        return null + self.scale * (conditional - null)

    @torch.enable_grad()
    def gradient(self, x: Tensor, signal: float | Tensor, noise_scale: float | Tensor) -> Tensor:
        """The classifier's scaled gradient of log p(y | x), shape of x (B, C, H, W); scales for all images."""
        x = x.detach().requires_grad_()
        scales = (torch.full((len(x),), float(scale), device=x.device) for scale in (signal, noise_scale))
        log_probabilities = self.classifier(x, *scales).log_softmax(-1)
        chosen = log_probabilities.gather(1, self.class_labels[:, None])
        return self.scale * torch.autograd.grad(chosen.sum(), x)[0]


def denoiser(unet, scheduler, model_output: Callable | None = None) -> tuple:
    """The SDE that a network was trained with, and its prediction of x_0 at any time.

    Args:
        scheduler: of a DDPM, whose noise schedule is read as a `DiscreteVPSDE`, or an `SDEScheduler`.
        model_output: called as `model_output(unet, x, timesteps)`, as `Guidance.model_output`.

    Returns:
        the SDE, and `clean(x, t, class_labels=None)`: x_0 of x (B, C, H, W) at times t, () or (B,), in the type of x;
        differentiable in x.

    Raises:
        ValueError: if the network knows whole timesteps alone.
    """
    process = scheduler
    if not hasattr(scheduler, "preconditioning"):
        process = DiscreteVPSDE(scheduler.alphas_cumprod, scheduler.config.prediction_type)
    if unet.config.get("time_embedding_type") == "learned":
        raise ValueError("the network has a learned time embedding; continuous time needs fractions of a timestep")

    def clean(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        c_skip, c_out, c_in, c_noise = process.preconditioning(torch.as_tensor(t, dtype=torch.float64).cpu())
        ask = model_output or Guidance(class_labels).model_output
        output = ask(unet, _spread(c_in, x) * x, c_noise.to(x.device, torch.float32)).to(x.dtype)
        return _spread(c_skip, x) * x + _spread(c_out, x) * output

    return process.sde, clean


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """() or (B,) -> a shape that multiplies x (B, ...), in its type."""
    return values.to(x).view(-1, *(1,) * (x.ndim - 1))


class _ContinuousDraw:
    """One sampling in continuous time: asks the network, tells progress and the caller.

    Args:
        impose: called as `impose(x, alpha, n)` after each step of the predictor-corrector.

    Where the scheduler has `clip_sample`, the predicted x_0 is clipped to [-1, 1], as DDPM does it: x_0 is an
    expectation of images, so that this takes it nearer to the truth. At large sigma it matters, as a small error of
    epsilon is one of sigma times its size there.
    """

    def __init__(self, pipeline, guidance: Guidance, callback=None, tensor_inputs=(), impose=None, clip=True):
        self.pipeline, self.guidance, self.callback, self.tensor_inputs = pipeline, guidance, callback, tensor_inputs
        self.sde, self.predict = denoiser(pipeline.unet, pipeline.scheduler, guidance.model_output)
        self.impose, self.index = impose, 0
        config = pipeline.scheduler.config  # schedulers hand on what they do not know themselves
        self.bound = config.get("clip_sample_range", 1.0) if clip and config.get("clip_sample") else math.inf

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        """x_0, after guidance by a classifier."""
        images = self.predict(x, t)
        if self.guidance.classifier is not None:
            known = t.clamp(max=self.sde.last_time)  # `straight_flow` starts beyond it, where there is no signal
            signal, noise_scale = self.sde.signal_scale(known), self.sde.noise_scale(known)
            images = images + noise_scale**2 / signal * self.guidance.gradient(x, signal, noise_scale)
        images = images.clamp(-self.bound, self.bound)
        self.bar.update()
        if self.callback is not None:
            tensors = {"latents": x, "noisy_images": x, "pred_original_sample": images}
            chosen = {name: tensors[name].float() for name in self.tensor_inputs}
            if "latents" in (self.callback(self.pipeline, self.index, t, chosen) or {}):
                raise ValueError("a callback cannot change the latents in continuous time")
        self.index += 1
        return images

    def solve(self, x: Tensor, start: float, end: float, tolerance: float) -> Tensor:
        """The probability-flow ODE from one time to another; float32."""
        with self.pipeline._evaluation_mode(), self.pipeline.progress_bar(itertools.count()) as self.bar:
            x, _ = solve_flow(
                lambda x, t: flow(self.sde, self.clean, x, t), x, start, end, rtol=tolerance, atol=tolerance
            )
        return x.float()

    def run(self, sampler: ContinuousSampler, latents: Tensor, num_steps: int, generator) -> Tensor:
        """From latents of unit variance to images, (B, C, H, W) float32."""
        sde, x = self.sde, self.sde.prior_std * latents
        times = sampling_times(sde, num_steps)
        if sampler.name == "ode":
            x = self.solve(x, sde.last_time, sde.first_time, sampler.tolerance)
        corrector_steps = sampler.corrector_steps if sampler.name == "predictor_corrector" else 0
        of_name = {"ode": 1, "flow_euler": num_steps} | dict.fromkeys(("edm_heun", "flow_heun"), 2 * num_steps - 1)
        total = of_name.get(sampler.name, num_steps + 1 + (num_steps - 1) * corrector_steps)

        def noise() -> Tensor:
            return self.pipeline._noise(len(latents), generator)

        def impose(x: Tensor, t: Tensor) -> Tensor:
            return x if self.impose is None else self.impose(x, sde.signal_scale(t), sde.noise_scale(t))

        with self.pipeline._evaluation_mode(), self.pipeline.progress_bar(total=total) as self.bar:
            if sampler.name == "ode":
                return self.clean(x, times[-1])
            if sampler.name == "euler_maruyama":
                return euler_maruyama(sde, self.clean, x, times, noise)
            if sampler.name in ("flow_euler", "flow_heun"):
                return straight_flow(sde, self.clean, latents, num_steps, heun=sampler.name == "flow_heun")
            if sampler.name == "edm_heun":
                low, high = (float(sde.sigma(times[i])) for i in (-1, 0))
                # schedules end at up to 20,000; where sigma is 4 sqrt(D), no image of [-1, 1] is left to see
                high = min(high, 4 * math.sqrt(x[0].numel()))
                sigmas = karras_sigmas(num_steps, max(low, 0.002), high)
                return edm_heun(sde, self.clean, high * latents, sigmas, noise, **sampler.settings)
            return predictor_corrector(
                sde, self.clean, x, times, noise, sampler.snr, corrector_steps, per_image=True, impose=impose
            )


class DiscreteVPSDE:
    """A DDPM noise schedule read as a VP SDE, so that its network samples in continuous time without being retrained.

    Time is t = timestep / (T - 1). Between two timesteps sigma is linear in the timestep, as diffusers' sigma-type
    schedulers have it and as the ODE likelihood of `eval/likelihood.py`; so at the timesteps alpha^2 is exactly abar.

    Its methods are those of the SDEs of `SDEScheduler`: f, g, alpha and n of times of any shape.

    Args:
        alphas_cumprod: abar of the T timesteps, falling, in (0, 1); the last one may be 0 and is then taken for 2^-24,
            as diffusers does.
        prediction_type: what the network predicts.

    Raises:
        ValueError: for another sequence.
    """

    first_time, last_time, prior_std = 0.0, 1.0, 1.0

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon"):
        abar = alphas_cumprod.double().cpu()
        if abar.ndim != 1 or len(abar) < 2 or not (abar[-1] >= 0 and abar[0] < 1 and (abar.diff() < 0).all()):
            raise ValueError("alphas_cumprod must be two or more falling numbers between 0 and 1")
        abar = abar.clamp(min=2**-24)
        self.sigmas = ((1 - abar) / abar).sqrt()
        self.prediction_type = prediction_type

    @property
    def sde(self) -> "DiscreteVPSDE":
        return self

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in and the timestep, with its fraction: x_0 = c_skip x + c_out F(c_in x, timestep)."""
        alpha, n = self.signal_scale(t), self.noise_scale(t)
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        c_skip, c_out = {"epsilon": (1 / alpha, -n / alpha), "sample": (zero, one), "v_prediction": (alpha, -n)}[
            self.prediction_type
        ]
        return c_skip, c_out, one, t * (len(self.sigmas) - 1)

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slope of sigma in t, sigma at the segment's start, and how far behind it t is."""
        sigmas, steps = self.sigmas.to(t), len(self.sigmas) - 1
        index = (t * steps).long().clamp(0, steps - 1)
        return (sigmas[index + 1] - sigmas[index]) * steps, sigmas[index], t - index.to(t) / steps

    def sigma(self, t):
        slope, start, behind = self._segment(t)
        return start + slope * behind

    def signal_scale(self, t):
        return (1 + self.sigma(t).square()).rsqrt()

    def noise_scale(self, t):
        return self.sigma(t) * self.signal_scale(t)

    def drift(self, t):
        slope, _, _ = self._segment(t)  # alpha' / alpha = -sigma sigma' / (1 + sigma^2)
        return -slope * self.sigma(t) * self.signal_scale(t).square()

    def diffusion(self, t):
        return (-2 * self.drift(t)).sqrt()  # variance preserving: beta = g^2 = -2 f

    def time_of(self, sigma):
        sigmas, steps = self.sigmas.to(sigma), len(self.sigmas) - 1
        index = (torch.searchsorted(sigmas, sigma.contiguous(), right=True) - 1).clamp(0, steps - 1)
        return (index + (sigma - sigmas[index]) / (sigmas[index + 1] - sigmas[index])) / steps


# ---- Samplers in continuous time (Song et al. 2021, arXiv 2011.13456; equations are theirs)
#
# `sde` tells `drift`, `diffusion`, `signal_scale` alpha, `noise_scale` n and `time_of` a noise level. `clean(x, t)` is
# the x_0 that the network predicts of x (B, ...) at a time t, one for the batch. `noise()` draws standard normal noise
# of the shape of x. All end with the expectation of x_0 at the first time: without it the noise that is left there
# would stay (appendix G).

Predict = Callable[[Tensor, Tensor], Tensor]


def predicted_score(sde, clean: Predict, x: Tensor, t: Tensor) -> Tensor:
    """(alpha x_0 - x) / n^2 of the predicted x_0."""
    return (sde.signal_scale(t) * clean(x, t) - x) / sde.noise_scale(t) ** 2


def sampling_times(sde, num_steps: int) -> Tensor:
    """From the last time to the first, (num_steps + 1,), float64: even, or `karras_sigmas` if t is sigma."""
    if sde.last_time > 1:
        return karras_sigmas(num_steps + 1, sde.first_time, sde.last_time)[:-1]
    return uniform_times(sde, num_steps)


def uniform_times(sde, num_steps: int) -> Tensor:
    """From the last time to the first, (num_steps + 1,), float64."""
    return torch.linspace(sde.last_time, sde.first_time, num_steps + 1, dtype=torch.float64)


def euler_maruyama(sde, clean: Predict, x: Tensor, times: Tensor, noise: Callable[[], Tensor]) -> Tensor:
    """The reverse SDE (eq. 6) by Euler-Maruyama; the last step is taken without its noise.

    Args:
        x: a draw from the prior.
        times: falling, from the last time to the first.
    """
    for i, (now, later) in enumerate(itertools.pairwise(times)):
        dt = now - later
        g = sde.diffusion(now)
        x = x - (sde.drift(now) * x - g**2 * predicted_score(sde, clean, x, now)) * dt
        if i < len(times) - 2:
            x = x + g * dt.sqrt() * noise()
    return clean(x, times[-1])


def transition(sde, early: Tensor, late: Tensor) -> tuple[Tensor, Tensor]:
    """a and v of x_late = a x_early + sqrt(v) z, the forward process over a step."""
    a = sde.signal_scale(late) / sde.signal_scale(early)
    return a, sde.noise_scale(late) ** 2 - (a * sde.noise_scale(early)) ** 2


def reverse_diffusion_step(sde, clean: Predict, x: Tensor, now, later, noise: Tensor | None) -> Tensor:
    """The reverse of the forward process's own step (eq. 46)."""
    a, v = transition(sde, later, now)
    x = (2 - a) * x + v * predicted_score(sde, clean, x, now)
    return x if noise is None else x + v.sqrt() * noise


def langevin_step(
    sde, clean: Predict, x: Tensor, now, noise: Tensor, snr: float, step_scale: float, per_image: bool = False
) -> Tensor:
    """One step of annealed Langevin dynamics at a noise level (algorithms 4 and 5).

    Args:
        snr: r, which sets the step by the norms of noise and score.
        step_scale: alpha of the algorithm: 1 for VE, alpha_i = 1 - beta_i for VP.
        per_image: takes the norms of each x instead of their means over the batch, so that no image depends on the
            others; for x of many dimensions, where the norm of the noise is nearly the same for all.
    """
    score = predicted_score(sde, clean, x, now)
    norms = [x.flatten(1).norm(dim=1) for x in (noise, score)]
    if not per_image:  # as in the authors' code
        norms = [norm.mean() for norm in norms]
    step = _spread(2 * step_scale * (snr * norms[0] / norms[1]) ** 2, x)
    return x + step * score + (2 * step).sqrt() * noise


def predictor_corrector(
    sde,
    clean: Predict,
    x: Tensor,
    times: Tensor,
    noise: Callable[[], Tensor],
    snr: float,
    corrector_steps: int = 1,
    per_image: bool = False,
    impose: Predict = lambda x, t: x,
) -> Tensor:
    """Reverse diffusion, after each step Langevin steps at the new noise level (algorithms 2 and 3).

    Args:
        snr, per_image: of `langevin_step`.
        impose: puts what is known into x at a time, after each step.
    """
    last = len(times) - 2
    for i, (now, later) in enumerate(itertools.pairwise(times)):
        x = impose(reverse_diffusion_step(sde, clean, x, now, later, noise() if i < last else None), later)
        if i < last:
            for _ in range(corrector_steps):
                step_scale = transition(sde, later, now)[0] ** 2
                x = impose(langevin_step(sde, clean, x, later, noise(), snr, step_scale, per_image), later)
    return clean(x, times[-1])


def flow(sde, clean: Predict, x: Tensor, t: Tensor) -> Tensor:
    """dx/dt of the probability-flow ODE (eq. 13)."""
    return sde.drift(t) * x - sde.diffusion(t) ** 2 * predicted_score(sde, clean, x, t) / 2


def straight_flow(sde, clean: Predict, x: Tensor, num_steps: int, heun: bool = False) -> Tensor:
    """Euler's or Heun's method on the ODE of rectified flow, dx/dt = epsilon - x_0 = (x - x_0) / t (arXiv 2209.03003).

    The times are those of diffusers' `FlowMatchEulerDiscreteScheduler`: even from 1 to the first time, and then 0.

    Args:
        x: pure noise, of unit variance.
    """
    times = torch.linspace(1, sde.first_time, num_steps, dtype=torch.float64)
    for now, later in itertools.pairwise([*times, torch.zeros_like(times[0])]):
        slope = (x - clean(x, now)) / now
        new = x + (later - now) * slope
        if heun and later > 0:
            new = x + (later - now) * (slope + (new - clean(new, later)) / later) / 2
        x = new
    return x


# Dormand & Prince (1980): nodes, stages, 5th-order weights and their difference from the 4th-order ones
_NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_FIFTH = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _time(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def solve_flow(
    rate: Predict, x: Tensor, start: float, end: float, rtol: float, atol: float, max_evaluations: int = 100_000
) -> tuple[Tensor, int]:
    """Dormand-Prince 5(4) with adaptive steps for the whole batch, in float64.

    Args:
        rate: dx/dt of (x, t).
        rtol, atol: of the root mean square over the batch of each step's error, relative to atol + rtol |x|.

    Returns:
        x at the end, and the number of evaluations.

    Raises:
        ValueError: if the step becomes too small, the values are not finite, or it takes too many evaluations.
    """
    x, t, sign = x.double(), start, math.copysign(1.0, end - start)
    first = rate(x, _time(t))
    evaluations = 1
    scale = atol + rtol * x.abs()
    step = 0.01 * rms(x / scale) / max(rms(first / scale), 1e-12)
    step = min(max(step, 1e-6 * abs(end - start)), abs(end - start))  # x may be 0
    while (end - t) * sign > 0:
        step = min(step, abs(end - t))
        slopes = [first]
        for node, stage in zip(_NODES[1:], _STAGES[1:], strict=True):
            inner = x + sign * step * sum(w * s for w, s in zip(stage, slopes, strict=True))
            slopes.append(rate(inner, _time(t + sign * step * node)))
        new = x + sign * step * sum(w * s for w, s in zip(_FIFTH, slopes, strict=True))
        at_end = end if step >= abs(end - t) else t + sign * step
        slopes.append(rate(new, _time(at_end)))
        evaluations += 6
        scale = atol + rtol * torch.maximum(x.abs(), new.abs())
        error = rms(step * sum(w * s for w, s in zip(_ERROR, slopes, strict=True)) / scale)
        if error <= 1:
            x, t, first = new, at_end, slopes[-1]
        if not math.isfinite(error) or step < 1e-12 * abs(end - start) or evaluations > max_evaluations:
            raise ValueError(f"the ODE could not be solved: at time {t:.4g} with steps of {step:.2g}")
        step *= min(10.0, max(0.2, 0.9 * error**-0.2)) if error else 10.0
    return x, evaluations


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels of Karras et al. 2022, eq. 5, and 0 at the end, (num_steps + 1,), float64."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def edm_heun(
    sde,
    clean: Predict,
    y: Tensor,
    sigmas: Tensor,
    noise: Callable[[], Tensor],
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    noise_factor: float = 1.0,
) -> Tensor:
    """Heun's method with churn (Karras et al. 2022, algorithm 2) on y = x / alpha, whose noise level is sigma.

    Args:
        y: noise of the first level.
        sigmas: falling, 0 at the end.
        churn, churn_min, churn_max, noise_factor: S_churn, S_tmin, S_tmax, S_noise.
    """

    def denoise(y: Tensor, sigma: Tensor) -> Tensor:
        t = sde.time_of(sigma)
        return clean(sde.signal_scale(t) * y, t)

    num_steps = len(sigmas) - 1
    for sigma, later in itertools.pairwise(sigmas):
        if churn > 0 and churn_min <= sigma <= churn_max:
            raised = sigma * (1 + min(churn / num_steps, math.sqrt(2) - 1))
            raised = raised.clamp(max=float(sigmas[0]))  # the network knows no more noise than at the start
            y = y + (raised**2 - sigma**2).sqrt() * noise_factor * noise()
            sigma = raised
        slope = (y - denoise(y, sigma)) / sigma
        heun = y + (later - sigma) * slope
        if later > 0:
            heun = y + (later - sigma) * (slope + (heun - denoise(heun, later)) / later) / 2
        y = heun
    return y
