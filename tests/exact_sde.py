"""A perfectly trained "network" of an SDE or DDPM model: its D(x, t) is the expectation of x_0 given x_t."""

from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from exact_denoiser import Mixture
from torch import Tensor

from pipelines.continuous import DiscreteVPSDE, process_of
from training.sde import SDEScheduler


class ExactSDENetwork(ModelMixin, ConfigMixin):
    """Called as networks are, with c_in x and c_noise, one for all images; pixels are independent of each other.

    The data are of one pixel (3 values) or of all values of an image.
    """

    @register_to_config
    def __init__(self, sample_size: int = 1, in_channels: int = 3):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def set_data(self, data: Mixture, scheduler: SDEScheduler | DDPMScheduler) -> "ExactSDENetwork":
        self.data, self.scheduler = data, process_of(scheduler)
        return self

    def forward(self, sample: Tensor, c_noise: Tensor) -> SimpleNamespace:
        scheduler, sde = self.scheduler, self.scheduler.sde
        c_noise = c_noise.double().flatten()[0]
        if isinstance(sde, DiscreteVPSDE):
            t = c_noise / (len(sde.sigmas) - 1)
        else:
            t = {
                "edm": lambda: (4 * c_noise).exp(),
                "ve": lambda: sde.time_of(c_noise),
                "flow": lambda: (c_noise / 1000).clamp(max=1 - 1e-9),  # at alpha 0 the score does not determine x_0
            }.get(scheduler.config.objective, lambda: c_noise / 999)()
        c_skip, c_out, c_in, _ = scheduler.preconditioning(t)
        x = sample.double() / c_in
        output = (self.clean(x, t) - c_skip * x) / c_out
        return SimpleNamespace(sample=output.to(sample))

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        scales = self.scheduler.sde.signal_scale(t), self.scheduler.sde.noise_scale(t)
        if x[0].numel() == self.data.means.shape[1]:
            return self.data.clean_images(x.flatten(1), *scales).view_as(x)
        points = self.data.clean_images(x.permute(0, 2, 3, 1).reshape(-1, 3), *scales)
        return points.view(len(x), *x.shape[2:], 3).permute(0, 3, 1, 2)


def exact_sde_network(data: Mixture, scheduler: SDEScheduler) -> ExactSDENetwork:
    """An exact network in float64 and evaluation mode."""
    return ExactSDENetwork().double().eval().set_data(data, scheduler)
