"""Sampling from models and sharing them: the pipeline and its model repository."""

from custom_unet import CustomUNet2DModel
from pipelines import custom_unet_pipeline as shipped
from pipelines.continuous import process_of
from training.sde import SDEScheduler, continuous_samplers


class CustomUNetPipeline(shipped.CustomUNetPipeline):
    """The shipped pipeline, for use within this repository.

    `from_pretrained` builds the classes of this repository and needs no code from the model repository. Models with
    discrete timesteps also have the continuous-time samplers.
    """

    unet_class = CustomUNet2DModel
    scheduler_classes = (*shipped.SUITABLE, SDEScheduler)

    @property
    def samplers(self) -> tuple[str, ...]:
        return super().samplers if self.is_continuous else (*shipped.SAMPLERS, *continuous_samplers("ddpm"))

    @property
    def process(self) -> SDEScheduler:
        return super().process or process_of(self._trained)


__all__ = ["CustomUNetPipeline"]
