"""Diffusion in continuous time: the stochastic differential equations that carry images to noise and back.

Notation (Song et al. 2021, arXiv 2011.13456; equation numbers are theirs unless another paper is named):

    dx = f(t) x dt + g(t) dw                                            eq. 5, t from 0 to 1, with a linear drift
    x_t = alpha(t) x_0 + n(t) epsilon                                   eq. 29, its perturbation kernel
    dx = (f(t) x - g(t)^2 score(x, t)) dt + g(t) dw                     eq. 6, the reverse SDE, t from 1 to 0
    dx = (f(t) x - g(t)^2 score(x, t) / 2) dt                           eq. 13, the probability-flow ODE

DDPM's sqrt(abar_t) is alpha, its sqrt(1 - abar_t) is n. sigma(t) = n(t) / alpha(t) is the noise level of x / alpha: in
these coordinates all of them are one process that runs at different speeds (Karras et al. 2022, arXiv 2206.00364,
appendix B), and f and g follow from alpha and n:

    f = alpha' / alpha        g^2 = 2 n^2 (n' / n - alpha' / alpha) = 2 n^2 sigma' / sigma

Times are tensors of any shape; what a function returns has that shape, in the type of the time. Use float64 times
where differences of nearly equal numbers matter (sub-VP and VP near 0).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

PREDICTION_TYPES = {
    "vp": ("epsilon", "sample", "v_prediction"),
    "subvp": ("epsilon", "sample", "v_prediction"),
    "ve": ("score",),
    "edm": ("edm",),
    "flow": ("flow_prediction",),
}
TIME_DENSITIES = ("uniform", "logit_normal")


class SDE(ABC):
    """A diffusion with a linear drift. `first_time` is where sampling and likelihoods end, above 0 where n(0) = 0."""

    first_time: float = 0.0
    last_time: float = 1.0

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """f(t), which multiplies x."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""

    @abstractmethod
    def signal_scale(self, t: Tensor) -> Tensor:
        """alpha(t): the mean of x_t given x_0 is alpha(t) x_0."""

    @abstractmethod
    def noise_scale(self, t: Tensor) -> Tensor:
        """n(t): the standard deviation of x_t given x_0."""

    @abstractmethod
    def time_of(self, sigma: Tensor) -> Tensor:
        """The time of a noise level n / alpha; the inverse of `sigma`."""

    @property
    @abstractmethod
    def prior_std(self) -> float:
        """Standard deviation of the Gaussian that x is taken for at the last time."""

    def sigma(self, t: Tensor) -> Tensor:
        """n(t) / alpha(t)."""
        return self.noise_scale(t) / self.signal_scale(t)


@dataclass(frozen=True)
class _SigmaSDE(SDE):
    """What VE and EDM have in common: alpha = 1, and so f = 0, with noise levels from sigma_min to sigma_max."""

    sigma_min: float
    sigma_max: float

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"sigma_min {self.sigma_min} and sigma_max {self.sigma_max} must be positive and rise")

    def drift(self, t):
        return torch.zeros_like(t)

    def signal_scale(self, t):
        return torch.ones_like(t)

    @property
    def prior_std(self):
        return self.sigma_max


@dataclass(frozen=True)
class VESDE(_SigmaSDE):
    """Variance exploding, the limit of NCSN (eq. 9 and 30): n(t) = sigma_min (sigma_max / sigma_min)^t, alpha = 1.

    At time 0 the images have the noise sigma_min already, as in the paper (eq. 31).

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    @property
    def log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def diffusion(self, t):
        return self.noise_scale(t) * math.sqrt(2 * self.log_ratio)

    def noise_scale(self, t):
        return self.sigma_min * (self.log_ratio * t).exp()

    def time_of(self, sigma):
        return (sigma / self.sigma_min).log() / self.log_ratio


@dataclass(frozen=True)
class _BetaSDE(SDE):
    """What VP and sub-VP have in common: beta(t) = beta_min + t (beta_max - beta_min), and f = -beta / 2."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    first_time: float = 1e-5  # the paper's, below which the score has no bound

    def __post_init__(self):
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(f"beta_min {self.beta_min} and beta_max {self.beta_max} must be positive and not fall")
        if not 0 < self.first_time < self.last_time:
            raise ValueError(f"first_time is {self.first_time}; it must lie between 0 and {self.last_time}")

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def beta_integral(self, t: Tensor) -> Tensor:
        """B(t), the integral of beta from 0 to t."""
        return self.beta_min * t + (self.beta_max - self.beta_min) * t.square() / 2

    def time_of_integral(self, integral: Tensor) -> Tensor:
        """The t with B(t) = integral: the positive root, in the form that does not cancel."""
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral).sqrt())

    def drift(self, t):
        return -self.beta(t) / 2

    def signal_scale(self, t):
        return (-self.beta_integral(t) / 2).exp()

    @property
    def prior_std(self):
        return 1.0


@dataclass(frozen=True)
class VPSDE(_BetaSDE):
    """Variance preserving, the limit of DDPM (eq. 11, 32, 33): alpha^2 = exp(-B), n^2 = 1 - exp(-B).

    Raises:
        ValueError: unless 0 < beta_min <= beta_max and 0 < first_time < 1.
    """

    def diffusion(self, t):
        return self.beta(t).sqrt()

    def noise_scale(self, t):
        return (-torch.expm1(-self.beta_integral(t))).sqrt()

    def time_of(self, sigma):
        return self.time_of_integral(sigma.square().log1p())  # exp(B) - 1 = sigma^2


@dataclass(frozen=True)
class SubVPSDE(_BetaSDE):
    """Sub-VP (eq. 12 and 29): the drift of VP with less noise, n = 1 - exp(-B), so that its likelihoods are better.

    Raises:
        ValueError: unless 0 < beta_min <= beta_max and 0 < first_time < 1.
    """

    def diffusion(self, t):
        return (self.beta(t) * -torch.expm1(-2 * self.beta_integral(t))).sqrt()

    def noise_scale(self, t):
        return -torch.expm1(-self.beta_integral(t))

    def time_of(self, sigma):
        return self.time_of_integral(2 * (sigma / 2).asinh())  # exp(B / 2) - exp(-B / 2) = sigma


@dataclass(frozen=True)
class EDMSDE(_SigmaSDE):
    """The process of Karras et al. 2022: alpha = 1 and n(t) = t, where time is the noise level itself.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def first_time(self) -> float:
        return self.sigma_min

    @property
    def last_time(self) -> float:
        return self.sigma_max

    def diffusion(self, t):
        return (2 * t).sqrt()

    def noise_scale(self, t):
        return t

    def time_of(self, sigma):
        return sigma


class FlowSDE(SDE):
    """The SDE with the marginals of rectified flow: alpha = 1 - t and n = t (Liu et al. 2022, arXiv 2209.03003; Lipman
    et al. 2022, arXiv 2210.02747; time as in Esser et al. 2024, arXiv 2403.03206, 0 for images and 1 for noise).

    The velocity of the straight path from x_0 to epsilon is dx/dt = epsilon - x_0. It is finite at time 1, where f, g
    and sigma are not: likelihoods and samplers that need them start at sigma = 99, near VE's 100 and EDM's 80.
    """

    first_time, last_time, prior_std = 1e-3, 0.99, 0.99

    def drift(self, t):
        return -1 / (1 - t)

    def diffusion(self, t):
        return (2 * t / (1 - t)).sqrt()

    def signal_scale(self, t):
        return 1 - t

    def noise_scale(self, t):
        return t

    def time_of(self, sigma):
        return sigma / (1 + sigma)


class SDEScheduler(SchedulerMixin, ConfigMixin):
    """What a network was trained with in continuous time: the SDE, its training times, and what the network predicts.

    It is the scheduler of a model repository; the pipeline samples with `sde` and `preconditioning`. With the network
    F, the prediction of x_0 is D(x, t) = c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022, eq. 7).

    Args:
        objective: vp, subvp, ve, edm or flow.
        prediction_type: what F predicts: epsilon, sample or v_prediction for vp and subvp; score for ve; edm for edm,
            where F is a mixture of epsilon and x_0 such that its target has unit variance at every noise level;
            flow_prediction for flow, the velocity epsilon - x_0 (named as in diffusers).
        beta_min, beta_max: of vp and subvp.
        sigma_min, sigma_max: of ve and edm, for images in [-1, 1]; by default 0.02 and 100 for ve (twice the paper's,
            which are for [0, 1]), 0.002 and 80 for edm.
        sigma_data: standard deviation of the pixel values, for edm.
        noise_mean, noise_std: of ln(sigma) in the training of edm, P_mean and P_std of the paper.
        time_density: of the times in the training of flow: uniform, or logit_normal, with ln(t / (1 - t)) ~ N(0, 1)
            (Esser et al. 2024, arXiv 2403.03206, section 3.1).
        clip_sample, clip_sample_range: whether, and to which size, samplers clip the predicted x_0; see DDPMScheduler.

    Raises:
        ValueError: for values that make no SDE, or a prediction type that does not suit the objective.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        *,
        objective: str = "vp",
        prediction_type: str = "epsilon",
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float = 0.5,
        noise_mean: float = -1.2,
        noise_std: float = 1.2,
        time_density: str = "uniform",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
    ):
        if objective not in PREDICTION_TYPES:
            raise ValueError(f"objective is {objective!r}; it must be one of {', '.join(PREDICTION_TYPES)}")
        suitable = PREDICTION_TYPES[objective]
        if prediction_type not in suitable:
            raise ValueError(f"prediction_type is {prediction_type!r}; {objective} takes {' or '.join(suitable)}")
        for name in ("sigma_data", "noise_std"):
            if not 0 < self.config[name] < math.inf:
                raise ValueError(f"{name} is {self.config[name]}; it must be positive")
        if not math.isfinite(noise_mean):
            raise ValueError(f"noise_mean is {noise_mean}; it must be finite")
        if time_density not in TIME_DENSITIES:
            raise ValueError(f"time_density is {time_density!r}; it must be {' or '.join(TIME_DENSITIES)}")
        self.sde: SDE
        if objective in ("vp", "subvp"):
            self.sde = {"vp": VPSDE, "subvp": SubVPSDE}[objective](beta_min, beta_max)
        elif objective == "flow":
            self.sde = FlowSDE()
        else:
            cls, low, high = {"ve": (VESDE, 0.02, 100.0), "edm": (EDMSDE, 0.002, 80.0)}[objective]
            self.sde = cls(low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max)

    def times(self, positions: Tensor) -> Tensor:
        """Quantiles of the times of training, for positions in [0, 1); float64.

        They are uniform for vp, subvp and ve (eq. 7); for edm ln(sigma) is normal (Karras et al., table 1), between
        sigma_min and sigma_max. For flow they have the density `time_density` over the whole of (0, 1).
        """
        positions = positions.double()
        if self.config.objective == "flow":
            if self.config.time_density == "logit_normal":
                positions = torch.special.ndtri(positions).sigmoid()
            return positions.clamp(min=1e-5)  # c_out is 0 at t = 0
        if self.config.objective != "edm":
            return self.sde.first_time + positions * (self.sde.last_time - self.sde.first_time)
        log_sigma = self.config.noise_mean + self.config.noise_std * torch.special.ndtri(positions)
        return log_sigma.exp().clamp(self.sde.sigma_min, self.sde.sigma_max)

    def add_noise(self, clean_images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t = alpha x_0 + n epsilon (eq. 29) for times (B,), in the type of the images."""
        signal, noise_scale = self.sde.signal_scale(times), self.sde.noise_scale(times)
        return spread(signal, clean_images) * clean_images + spread(noise_scale, noise) * noise

    def preconditioning(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in and c_noise at times (B,), in their type.

        c_noise, the network's own measure of time, is 999 t for vp and subvp and sigma for ve as in the code of Song
        et al., ln(sigma) / 4 for edm, and 1000 t for flow as in diffusers.
        """
        alpha, n = self.sde.signal_scale(times), self.sde.noise_scale(times)
        one, zero = torch.ones_like(times), torch.zeros_like(times)
        prediction_type, data = self.config.prediction_type, self.config.sigma_data
        if prediction_type == "edm":
            norm = (n.square() + data**2).sqrt()
            return (data / norm).square(), n * data / norm, 1 / norm, n.log() / 4
        if prediction_type == "score":
            return one, n.square(), one, n
        if prediction_type == "flow_prediction":
            return one, -times, one, 1000 * times  # x_0 = x - t (epsilon - x_0)
        c_skip, c_out = {
            "epsilon": (1 / alpha, -n / alpha),
            "sample": (zero, one),
            "v_prediction": (alpha / (alpha**2 + n**2), -n / (alpha**2 + n**2).sqrt()),
        }[prediction_type]
        return c_skip, c_out, one, 999 * times

    def loss_weight(self, times: Tensor, likelihood_weighting: bool = False) -> Tensor:
        """Weight (B,) of the squared error of F, whose target is (x_0 - c_skip x) / c_out.

        It makes lambda(t) the weight of the squared error of the score (eq. 7): lambda = n^2, the paper's choice, or
        g^2, with which the loss bounds the likelihood (Song et al. 2021, arXiv 2101.09258, theorem 1). For edm and
        flow all weights are 1 (Karras et al., section 5; Liu et al., eq. 1).
        """
        if self.config.objective in ("edm", "flow"):
            return torch.ones_like(times)
        _, c_out, _, _ = self.preconditioning(times)
        alpha, n = self.sde.signal_scale(times), self.sde.noise_scale(times)
        weight = self.sde.diffusion(times) if likelihood_weighting else n
        return (weight * alpha * c_out / n.square()).square()  # score error = alpha c_out (error of F) / n^2


def spread(values: Tensor, x: Tensor) -> Tensor:
    """(B,) or () -> a shape that multiplies x (B, ...)."""
    return values.to(x).view(-1, *(1,) * (x.ndim - 1))


def clean_from_score(score: Tensor, x: Tensor, signal_scale: Tensor, noise_scale: Tensor) -> Tensor:
    """E[x_0 | x_t] = (x_t + n^2 score) / alpha (Tweedie's formula; Efron 2011); all shapes broadcast to that of x."""
    return (x + noise_scale.square() * score) / signal_scale
