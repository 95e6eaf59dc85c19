"""The sampling pipeline: an unconditional diffusion model as a `DiffusionPipeline`.

This file is shipped inside every model repository, so it depends on torch and diffusers only.

Notation (Ho et al. 2020, arXiv 2006.11239): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon, abar: `alphas_cumprod`.
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

# The samplers by name: class and settings. Timesteps are spaced as suits the solver: with leading spacing the
# multistep ones start far from the last timestep when there are many steps; with another one Heun's first step is too
# long, and PNDM's steps from nearly pure noise are ill-conditioned.
LEADING, TRAILING = {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}
SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict]] = {
    "ddpm": (diffusers.DDPMScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": False, "set_alpha_to_one": True} | LEADING),
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
MULTISTEP = (
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.DEISMultistepScheduler,
)


@dataclass
class DenoisingStrip(BaseOutput):
    """What sampling looks like on the way: frames from pure noise to the images.

    Attributes:
        timesteps: of each frame but the last, which is the result.
        noisy_images: x_t of each frame: a list of frames, each a list of B PIL images.
        pred_original_samples: the x_0 that the network predicts from it, in the same form.
    """

    timesteps: list[int]
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
    """

    # The class that `from_pretrained` gives the weights to when it may not run code from the model repository.
    unet_class: type[ModelMixin] = UNet2DModel
    _callback_tensor_inputs = ("latents", "noisy_images", "pred_original_sample")

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        # What the network was trained with: other samplers are made from it, and one that does not fit is noticed
        self._trained_config = scheduler.config
        self._prediction_type = scheduler.config.get("prediction_type")
        self._alphas_cumprod = scheduler.alphas_cumprod.cpu() if hasattr(scheduler, "alphas_cumprod") else None
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
        classes = {cls.__name__: cls for cls in SUITABLE}
        if config["_class_name"] not in classes:
            raise ValueError(f"{path} has a {config['_class_name']}; take one of {', '.join(classes)}")
        return cls(unet=unet, scheduler=classes[config["_class_name"]].from_config(config))

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Leaves out `auto_map`, which is for `AutoModel`: diffusers would warn of it at every load."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def set_sampler(self, name: str) -> None:
        """Replaces the sampler and keeps the noise schedule.

        Raises:
            ValueError: if `SAMPLERS` has no such name.
        """
        if name not in SAMPLERS:
            raise ValueError(f"there is no sampler {name!r}; there are {', '.join(SAMPLERS)}")
        cls, settings = SAMPLERS[name]
        self.scheduler = _scheduler_like(self._trained_config, cls, **settings)

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
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generates images.

        Args:
            batch_size: B, 1 unless seeds, generators or latents tell.
            generator: one for the whole batch, or a list with one for each image.
            num_inference_steps: sampling steps, at most the scheduler's `num_train_timesteps`. One network evaluation
                each; Heun takes 2 but for the last one, PNDM 9 more in all.
            eta: 0 (deterministic) to 1 (DDPM's variance), eq. 16 of DDIM; other samplers do not take it.
            output_type: `pil`, `np` (float32, shape (B, H, W, C), range [0, 1]) or `pt` (shape (B, C, H, W), [0, 1]).
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            seeds: one for each image, instead of generators. With seeds or a list of generators an image depends on
                its own one alone, not on the images beside it, and the same seed gives it on every device.
            latents: x_T to start from instead of random noise, shape (B, C, H, W), of unit variance.
            class_labels: for a network with class embeddings, one for all images or one for each.
            callback_on_step_end: called after each network evaluation as `callback(pipeline, index, timestep,
                tensors)`; it may return a dictionary with new `latents`.
            callback_on_step_end_tensor_inputs: which `tensors` it gets: `latents` (after the step, as the scheduler
                keeps them), `noisy_images` (x_t that the network saw) and `pred_original_sample` (x_0 predicted from
                it), each float32 of shape (B, C, H, W).

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
        class_labels = self._class_labels(class_labels, batch_size)
        device = self._execution_device

        scheduler, step_type = self.scheduler, self._prediction_type
        if isinstance(scheduler, diffusers.PNDMScheduler):
            step_type = "epsilon"  # it averages model outputs of different timesteps, which is right for epsilon alone
        elif step_type == "sample" and isinstance(scheduler, SIGMA_TYPE):
            step_type = "v_prediction"  # two of them do not take x_0
        if step_type != self._prediction_type:
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

        # The latents stay float32 whatever the network's type: a step changes them by little.
        latents = self._noise(batch_size, generator) if latents is None else latents.to(device, torch.float32)
        latents = latents * scheduler.init_noise_sigma
        # abar of every step, read once: asking the device for a number in each step would make it wait
        levels = _levels(scheduler, scheduler.timesteps.tolist())
        with self._evaluation_mode():
            for index, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
                # 1. What the network says of x_t
                noisy_images = scheduler.scale_model_input(latents, timestep)
                model_output = self._model_output(noisy_images, timestep, class_labels)
                signal, sigma = _scales(levels[index])
                clean_images, noise = clean_images_and_noise(
                    self._prediction_type, model_output, noisy_images, signal, sigma
                )
                # 2. The step
                if isinstance(scheduler, diffusers.DDIMScheduler):
                    latents = self._ddim_step(clean_images, noise, levels[index], levels[index + 1], eta, generator)
                else:
                    if step_type != self._prediction_type:
                        model_output = noise if step_type == "epsilon" else signal * noise - sigma * clean_images
                    latents = scheduler.step(model_output, timestep, latents, **step_kwargs).prev_sample
                # 3. The caller's own
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "noisy_images": noisy_images, "pred_original_sample": clean_images}
                    chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, index, timestep, chosen) or {}).get("latents", latents)
        images = self._to_output(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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
            timesteps.append(int(timestep))
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

        Args:
            start, end: a seed, or a latent of shape (1, C, H, W), for example by `invert`.
            num_images: including both ends, at least 2.

        Raises:
            ValueError: as a call, or for fewer images.
        """
        if num_images < 2:
            raise ValueError(f"num_images is {num_images}; it must be at least 2")
        start, end = (self._noise(1, _generators([x])) if isinstance(x, int) else x for x in (start, end))
        latents = slerp(start, end.to(start), torch.linspace(0, 1, num_images))
        ddim = CustomUNetPipeline(self.unet, _scheduler_like(self._trained_config, diffusers.DDIMScheduler))
        ddim._progress_bar_config = getattr(self, "_progress_bar_config", {})
        return ddim(
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
        num_fixed_point_iterations: int = 1,
        class_labels: int | Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """The latents from which DDIM (eta 0, as many steps) draws these images again, up to an error.

        A step of DDIM from t to s < t is run backwards: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon with x_0 =
        (x_s - sqrt(1 - abar_s) epsilon) / sqrt(abar_s), where epsilon is the network's at x_t. As x_t is what is
        looked for, epsilon is first taken at x_s; each further fixed-point iteration takes it at the last x_t found.

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
                next_latents = latents
                for _ in range(num_fixed_point_iterations):
                    _, noise = self._predict(next_latents, timesteps[k - 1], levels[k], class_labels)
                    next_latents = signal_t * (latents - sigma_s * noise) / signal_s + sigma_t * noise
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

    # ---- Steps of DDIM between any two levels

    def _ddim_levels(self, num_inference_steps: int, output_type: str = "pil") -> tuple[list[int], list[float]]:
        """The timesteps of a DDIM sampling, ascending, and abar of each of them after that of the clean image."""
        self.check_inputs(num_inference_steps, output_type=output_type)
        ddim = _scheduler_like(self._trained_config, diffusers.DDIMScheduler)
        ddim.set_timesteps(num_inference_steps)
        timesteps = ddim.timesteps.tolist()
        return timesteps[::-1], _levels(ddim, timesteps)[::-1]

    def _predict(self, latents, timestep, level, class_labels) -> tuple[Tensor, Tensor]:
        """x_0 and epsilon that the network predicts at abar `level`."""
        model_output = self._model_output(latents, torch.tensor(timestep, device=latents.device), class_labels)
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

    def _model_output(self, noisy_images: Tensor, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        labels = {} if class_labels is None else {"class_labels": class_labels}
        return self.unet(noisy_images.to(self.unet.dtype), timestep, **labels).sample.float()

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
        batch_size = len(seeds or (generator if isinstance(generator, list) else clean_images))
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

    def _class_labels(self, class_labels, batch_size: int) -> Tensor | None:
        """int64 (B,), or None for a network without class embeddings."""
        config = self.unet.config
        has_classes = config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None
        if has_classes != (class_labels is not None):
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
        scheduler, config = self.scheduler, self.scheduler.config
        name = type(scheduler).__name__
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
        if known.shape != new.shape or (known - new).abs().max() > 1e-4:  # some bound the last one away from 0
            raise ValueError(
                f"{name} has another noise schedule than the pipeline was made with; `from_config` may lose it:"
                " take set_sampler(name)"
            )
        if str(config.get("variance_type")).startswith("learned"):
            raise ValueError(f"variance_type is {config.variance_type!r}, but the network predicts no variance")
        if config.get("use_flow_sigmas"):
            raise ValueError(f"{name} has use_flow_sigmas, but the network was not trained on straight flows")
        last = config.num_train_timesteps
        if not 1 <= num_inference_steps <= last:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be 1 to {last}")
        if isinstance(scheduler, diffusers.PNDMScheduler):
            if num_inference_steps < 4 or last % num_inference_steps:
                raise ValueError(
                    f"num_inference_steps is {num_inference_steps}; {name} needs at least 4, and a divisor of {last}"
                )
            if config.timestep_spacing != "leading":
                raise ValueError(
                    f"timestep_spacing is {config.timestep_spacing!r}; {name} is well-conditioned with 'leading' alone"
                )
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
        if eta > 0 and not isinstance(scheduler, diffusers.DDIMScheduler):
            raise ValueError(f"eta is {eta}, but {name} does not take it; use DDIMScheduler")
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
    if not all(0 <= seed < 2**32 for seed in seeds):  # torch takes them modulo 2^32
        raise ValueError(f"seeds are {min(seeds)} to {max(seeds)}; they must be 0 to {2**32 - 1}")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


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
