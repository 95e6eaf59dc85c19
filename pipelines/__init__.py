"""Sampling and sharing: the pipeline, and the model repository that it is loaded from."""

from custom_unet import CustomUNet2DModel
from pipelines import custom_unet_pipeline as shipped
from pipelines.continuous import DiscreteVPScheduler
from training.sde import SDEScheduler, continuous_samplers


class CustomUNetPipeline(shipped.CustomUNetPipeline):
    """The pipeline that is shipped with a model, where the code of this repository is at hand.

    `from_pretrained` builds the classes of this repository, so it needs no code from the model repository, and a model
    of discrete timesteps has the samplers in continuous time too.
    """

    unet_class = CustomUNet2DModel
    scheduler_classes = (*shipped.SUITABLE, SDEScheduler)

    @property
    def samplers(self) -> tuple[str, ...]:
        return super().samplers if self.is_continuous else (*shipped.SAMPLERS, *continuous_samplers("ddpm"))

    @property
    def process(self) -> SDEScheduler:
        return (
            self.scheduler if self.is_continuous else DiscreteVPScheduler(self._alphas_cumprod, self._prediction_type)
        )


__all__ = ["CustomUNetPipeline"]
