"""The sampling pipeline: an unconditional diffusion model as a `DiffusionPipeline`.

This file is shipped inside every model repository, so it depends on torch and diffusers only.
"""

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


class CustomUNetPipeline(DiffusionPipeline):
    """Draws images by reversing the diffusion of a noise schedule with a U-Net.

    Args:
        unet: network called as `unet(sample, timestep).sample`: a `CustomUNet2DModel` or a `UNet2DModel`.
        scheduler: `DDPMScheduler` (arXiv 2006.11239) or `DDIMScheduler` (arXiv 2010.02502); another one is set by
            `pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)`.
    """

    # The class that `from_pretrained` gives the weights to when it may not run code from the model repository.
    unet_class: type[ModelMixin] = UNet2DModel

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Loads a model repository. Without `trust_remote_code=True` none of its code is run.

        Keyword arguments are those of `ModelMixin.from_pretrained` (`torch_dtype`, `variant`, `revision`, `token`,
        ...), or with `trust_remote_code=True` those of `DiffusionPipeline.from_pretrained`.
        """
        path = pretrained_model_name_or_path
        if kwargs.pop("trust_remote_code", False):
            return super().from_pretrained(path, trust_remote_code=True, **kwargs)
        unet = cls.unet_class.from_pretrained(path, subfolder="unet", **kwargs)
        hub_kwargs = {k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only") if k in kwargs}
        # every scheduler reads the same file, which names the class that wrote it
        config = diffusers.DDIMScheduler.load_config(path, subfolder="scheduler", **hub_kwargs)
        return cls(unet=unet, scheduler=getattr(diffusers, config["_class_name"]).from_config(config))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generates `batch_size` images.

        Args:
            generator: one for the whole batch, or a list with one for each image; with a list an image depends on its
                own generator alone and not on the batch around it.
            num_inference_steps: network evaluations per image, at most the scheduler's `num_train_timesteps`.
            eta: 0 (deterministic) to 1 (DDPM's variance), eq. 16 of DDIM; other samplers do not take it.
            output_type: `pil`, `np` (float32, shape (B, H, W, 3), range [0, 1]) or `pt` (shape (B, 3, H, W), [0, 1]).
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.

        Raises:
            ValueError: for an argument out of range, or if the network's output is not finite.
        """
        self._check_inputs(batch_size, generator, num_inference_steps, eta, output_type)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        device = self._execution_device
        step_kwargs = {"generator": generator}
        if isinstance(self.scheduler, diffusers.DDIMScheduler):
            step_kwargs["eta"] = eta

        was_training = self.unet.training
        self.unet.eval()  # a fresh network is in training mode: without this, dropout in the samples
        try:
            # The sample stays float32 whatever the network's type: a step changes it by little.
            sample = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            for timestep in self.progress_bar(self.scheduler.timesteps):
                model_output = self.unet(sample.to(self.unet.dtype), timestep).sample.float()
                sample = self.scheduler.step(model_output, timestep, sample, **step_kwargs).prev_sample
        finally:
            self.unet.train(was_training)

        if not torch.isfinite(sample).all():
            bad = (~torch.isfinite(sample)).flatten(1).any(dim=1).sum().item()
            raise ValueError(
                f"{bad} of {batch_size} images are not finite; the network's weights or precision are broken"
            )
        images = (sample / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_inputs(self, batch_size, generator, num_inference_steps, eta, output_type):
        num_train_timesteps = self.scheduler.config.num_train_timesteps
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} images; give one for each image")
        if not 1 <= num_inference_steps <= num_train_timesteps:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be 1 to {num_train_timesteps}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
        if eta > 0 and not isinstance(self.scheduler, diffusers.DDIMScheduler):
            raise ValueError(f"eta is {eta}, but {type(self.scheduler).__name__} does not take it; use DDIMScheduler")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}; it must be pil, np or pt")
        if self.unet.config.sample_size is None:
            raise ValueError("the network's sample_size is not set; construct it with the size of its images")
