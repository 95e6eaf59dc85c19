"""Sampling from models and sharing them: the pipeline and its model repository."""

from diffusers import DDIMScheduler

from custom_unet import CustomUNet2DModel
from pipelines import custom_unet_pipeline as shipped
from pipelines.continuous import process_of
from training.sde import SDEScheduler, continuous_samplers

SCHEDULERS = {cls.__name__: cls for cls in (*shipped.SUITABLE, SDEScheduler)}
KEYWORDS = "cache_dir force_download local_files_only proxies revision token".split()  # of the Hub
KEYWORDS += "device_map dtype low_cpu_mem_usage torch_dtype variant".split()  # of the network


class CustomUNetPipeline(shipped.CustomUNetPipeline):
    """The shipped pipeline, for use within this repository.

    Models with discrete timesteps also have the continuous-time samplers.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, unet=None, scheduler=None, **kwargs):
        """Loads a model repository with the classes of this repository, without running code from it.

        Weights are read from safetensors only, never from pickles.

        Args:
            unet, scheduler: replace those of the repository.
            kwargs: `KEYWORDS`.

        Raises:
            ValueError: for other keyword arguments, which diffusers would take for options of the network, or if the
                repository's scheduler is not in `SCHEDULERS`.
        """
        path, unknown = pretrained_model_name_or_path, sorted(kwargs.keys() - {*KEYWORDS})
        if unknown:
            known = ", ".join(["unet", "scheduler", *KEYWORDS])
            raise ValueError(f"from_pretrained does not accept {', '.join(unknown)}; it accepts {known}")
        if unet is None:
            unet = CustomUNet2DModel.from_pretrained(path, subfolder="unet", use_safetensors=True, **kwargs)
        if scheduler is None:
            # all schedulers use the same file name; the config names the class that wrote it
            config = DDIMScheduler.load_config(path, subfolder="scheduler", **kwargs)
            name = config["_class_name"]
            if name not in SCHEDULERS:
                raise ValueError(f"{path} has a {name}, not one of {', '.join(SCHEDULERS)}")
            scheduler = SCHEDULERS[name].from_config(config)
        return cls(unet, scheduler)

    @property
    def samplers(self) -> tuple[str, ...]:
        return super().samplers if self.is_continuous else (*super().samplers, *continuous_samplers("ddpm"))

    @property
    def process(self) -> SDEScheduler:
        return super().process or process_of(self._trained)


__all__ = ["CustomUNetPipeline"]
