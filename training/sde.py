"""Diffusion in continuous time: the stochastic differential equations (SDEs) that turn images into noise and back, the
training times and network inputs, and the samplers.

Models that were trained with an SDE are shipped with a copy of this file, so it depends only on torch and diffusers.

Notation (Song et al. 2021, arXiv 2011.13456; equation numbers are theirs unless another paper is named):

    dx = f(t) x dt + g(t) dw                                            eq. 5 with linear drift, t from 0 to 1
    x_t = alpha(t) x_0 + n(t) epsilon                                   eq. 29, its perturbation kernel
    dx = (f(t) x - g(t)^2 score(x, t)) dt + g(t) dw                     eq. 6, the reverse SDE, t from 1 to 0
    dx = (f(t) x - g(t)^2 score(x, t) / 2) dt                           eq. 13, the probability-flow ODE

DDPM's sqrt(abar_t) is alpha and its sqrt(1 - abar_t) is n. sigma(t) = n(t) / alpha(t) is the noise level of x / alpha.
In this coordinate all SDEs are the same process at different speeds (Karras et al. 2022, arXiv 2206.00364, appendix
B). f and g follow from alpha and n:

    f = alpha' / alpha        g^2 = 2 n^2 (n' / n - alpha' / alpha) = 2 n^2 sigma' / sigma

Times are tensors of any shape; results have the shape and dtype of the time. Use float64 times where nearly equal
numbers are subtracted (VP and sub-VP near 0).

Samplers and likelihoods take the network as a `Denoiser`.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
# Samplers in continuous time, with the defaults of their settings
CONTINUOUS_SAMPLERS: dict[str, dict[str, float]] = {
    "euler_maruyama": {},
    "reverse_diffusion": {},
    # r of the Langevin steps, and the number of steps per noise level
    "predictor_corrector": {"snr": 0.16, "corrector_steps": 1},
    # Maximum error per step: root mean square over the batch, relative to 1 + |x|
    "ode": {"tolerance": 1e-3},
    "edm_heun": {"churn": 0.0},  # S_churn of Karras et al. 2022, algorithm 2
    "dpmpp_2m": {},
    "flow_euler": {},  # flow_euler and flow_heun are for rectified flow only
    "flow_heun": {},
}
SETTING_BOUNDS = {"snr": (1e-6, 1e6), "corrector_steps": (1, 1000), "tolerance": (1e-12, 1e3), "churn": (0, 1e6)}
MOST_STEPS, MOST_EVALUATIONS = 10_000, 100_000

Noise = Callable[[], Tensor]  # draws standard normal noise in the shape of x


class SDE:
    """A diffusion with a linear drift.

    Attributes:
        first_time: time at which sampling and likelihoods end; above 0 if n(0) = 0.
        prior_std: standard deviation of the Gaussian prior, the approximate distribution of x at the last time.
    """

    first_time: float = 0.0
    last_time: float = 1.0
    prior_std: float = 1.0

    def drift(self, t: Tensor) -> Tensor:
        """f(t), the coefficient of x."""

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""

    def signal_scale(self, t: Tensor) -> Tensor:
        """alpha(t): the mean of x_t given x_0 is alpha(t) x_0."""

    def noise_scale(self, t: Tensor) -> Tensor:
        """n(t): the standard deviation of x_t given x_0."""

    def time_of(self, sigma: Tensor) -> Tensor:
        """The time at a noise level n / alpha; the inverse of `sigma`."""

    def sigma(self, t: Tensor) -> Tensor:
        """n(t) / alpha(t)."""
        return self.noise_scale(t) / self.signal_scale(t)

    @property
    def noise_levels(self) -> tuple[float, float]:
        """The lowest and the highest sigma, at the first and the last time."""
        low, high = self.sigma(torch.tensor([self.first_time, self.last_time], dtype=torch.float64)).tolist()
        return low, high


@dataclass(frozen=True)
class _SigmaSDE(SDE):
    """Base class of VE and EDM: alpha = 1, hence f = 0, and noise levels from sigma_min to sigma_max."""

    sigma_min: float
    sigma_max: float

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"sigma_min {self.sigma_min} must be positive and below sigma_max {self.sigma_max}")

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

    At time 0 the images already have noise of level sigma_min, as in the paper (eq. 31)."""

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
    """Base class of VP and sub-VP: beta(t) = beta_min + t (beta_max - beta_min), and f = -beta / 2."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    first_time = 1e-5  # as in the paper: the score diverges as t approaches 0

    def __post_init__(self):
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(f"beta_min {self.beta_min} must be positive and at most beta_max {self.beta_max}")

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def beta_integral(self, t: Tensor) -> Tensor:
        """B(t), the integral of beta from 0 to t."""
        return self.beta_min * t + (self.beta_max - self.beta_min) * t.square() / 2

    def time_of_integral(self, integral: Tensor) -> Tensor:
        """The t with B(t) = integral: the positive root, in the form without cancellation."""
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral).sqrt())

    def drift(self, t):
        return -self.beta(t) / 2

    def signal_scale(self, t):
        return (-self.beta_integral(t) / 2).exp()


@dataclass(frozen=True)
class VPSDE(_BetaSDE):
    """Variance preserving, the limit of DDPM (eq. 11, 32, 33): alpha^2 = exp(-B), n^2 = 1 - exp(-B)."""

    def diffusion(self, t):
        return self.beta(t).sqrt()

    def noise_scale(self, t):
        return (-torch.expm1(-self.beta_integral(t))).sqrt()

    def time_of(self, sigma):
        return self.time_of_integral(sigma.square().log1p())  # exp(B) - 1 = sigma^2


@dataclass(frozen=True)
class SubVPSDE(_BetaSDE):
    """Sub-VP (eq. 12 and 29): the drift of VP with less noise, n = 1 - exp(-B), for better likelihoods."""

    def diffusion(self, t):
        return (self.beta(t) * -torch.expm1(-2 * self.beta_integral(t))).sqrt()

    def noise_scale(self, t):
        return -torch.expm1(-self.beta_integral(t))

    def time_of(self, sigma):
        return self.time_of_integral(2 * (sigma / 2).asinh())  # exp(B / 2) - exp(-B / 2) = sigma


@dataclass(frozen=True)
class EDMSDE(_SigmaSDE):
    """The process of Karras et al. 2022: alpha = 1 and n(t) = t, so that time is the noise level."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def first_time(self):
        return self.sigma_min

    @property
    def last_time(self):
        return self.sigma_max

    def diffusion(self, t):
        return (2 * t).sqrt()

    def noise_scale(self, t):
        return t

    def time_of(self, sigma):
        return sigma


@dataclass(frozen=True)
class FlowSDE(SDE):
    """The SDE with the marginals of rectified flow: alpha = 1 - t and n = t (Liu et al. 2022, arXiv 2209.03003; Lipman
    et al. 2022, arXiv 2210.02747; time as in Esser et al. 2024, arXiv 2403.03206, 0 for images and 1 for noise).

    The velocity of the straight path from x_0 to epsilon is dx/dt = epsilon - x_0. It is finite at time 1, but f, g
    and sigma are not. Likelihoods and samplers that need them start at sigma = 99, near VE's 100 and EDM's 80.
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


# ---- Network predictions and denoisers


def clean_image_coefficients(
    prediction_type: str, alpha: Tensor, n: Tensor, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of x_0 = c_skip x_t + c_out F for a network prediction F; both have the shape of alpha and n.

    They convert all `PREDICTION_TYPES` to x_0, given x_t = alpha x_0 + n epsilon: epsilon; x_0 itself; v = (alpha
    epsilon - n x_0) / sqrt(alpha^2 + n^2) (Salimans & Ho 2022, arXiv 2202.00512); the velocity epsilon - x_0, if alpha
    + n = 1; the score -epsilon / n (Tweedie's formula; Efron 2011); and EDM's mixture of epsilon and x_0, if alpha =
    1, whose target has unit variance for pixel values of standard deviation `sigma_data`.
    """
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if prediction_type == "epsilon":
        return 1 / alpha, -n / alpha
    if prediction_type == "sample":
        return zero, one
    if prediction_type == "v_prediction":
        return alpha / (alpha**2 + n**2), -n / (alpha**2 + n**2).sqrt()
    if prediction_type == "score":
        return 1 / alpha, n.square() / alpha
    if prediction_type == "flow_prediction":
        return one, -n
    norm = (n.square() + sigma_data**2).sqrt()
    return (sigma_data / norm).square(), n * sigma_data / norm


@dataclass(frozen=True)
class Denoiser:
    """A network's prediction of E[x_0 | x_t = x], called with x (B, ...) and one time for the batch.

    It takes the time rather than sigma, which is infinite at time 1 of rectified flow, where its samplers start.
    """

    sde: SDE
    predict: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.predict(x, t)

    def of_noise_level(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x_0 | y] for y = x_0 + sigma epsilon, which is x_t / alpha at some time of every SDE."""
        t = self.sde.time_of(torch.as_tensor(sigma, dtype=torch.float64))
        t = t.clamp(self.sde.first_time, self.sde.last_time)  # rounding may have put it outside
        return self(self.sde.signal_scale(t) * y, t)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """The score (alpha x_0 - x) / n^2, with the predicted x_0."""
        return (self.sde.signal_scale(t) * self(x, t) - x) / self.sde.noise_scale(t) ** 2

    def pf_ode(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE (eq. 13)."""
        return self.sde.drift(t) * x - self.sde.diffusion(t) ** 2 * self.score(x, t) / 2


class ContinuousSampler(NamedTuple):
    name: str  # one of `CONTINUOUS_SAMPLERS`
    settings: dict[str, float]  # including those with default values


def continuous_samplers(objective: str) -> tuple[str, ...]:
    """The names of the continuous-time samplers for an objective: a key of `PREDICTION_TYPES`, or ddpm."""
    return tuple(name for name in CONTINUOUS_SAMPLERS if objective == "flow" or not name.startswith("flow_"))


class SDEScheduler(SchedulerMixin, ConfigMixin):
    """Scheduler of a model trained in continuous time: the SDE, the training times, the prediction and the samplers.

    Args:
        objective: vp, subvp, ve, edm or flow.
        prediction_type: what the network predicts, see `clean_image_coefficients`: epsilon, sample or v_prediction for
            vp and subvp; score for ve; edm for edm; flow_prediction for flow (named as in diffusers).
        beta_min, beta_max: noise schedule of vp and subvp.
        sigma_min, sigma_max: noise levels of ve and edm, for images in [-1, 1]; by default 0.02 and 100 for ve (twice
            the paper's, which are for [0, 1]), 0.002 and 80 for edm.
        sigma_data: standard deviation of the pixel values, for edm.
        noise_mean, noise_std: mean and standard deviation of ln(sigma) when training edm, P_mean and P_std of the
            paper.
        time_density: density of the training times of flow: uniform, or logit_normal, with ln(t / (1 - t)) ~ N(0, 1)
            (Esser et al. 2024, arXiv 2403.03206, section 3.1).
        clip_sample, clip_sample_range: whether, and at what size, samplers clip the predicted x_0; see DDPMScheduler.

    Raises:
        ValueError: for a noise schedule that defines no SDE, or a prediction type that does not suit the objective.
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
        low, high = (0.02, 100.0) if objective == "ve" else (0.002, 80.0)
        sigmas = (low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max)
        self.sde: SDE = {
            "vp": lambda: VPSDE(beta_min, beta_max),
            "subvp": lambda: SubVPSDE(beta_min, beta_max),
            "ve": lambda: VESDE(*sigmas),
            "edm": lambda: EDMSDE(*sigmas),
            "flow": FlowSDE,
        }[objective]()

    def preconditioning(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in and c_noise, with the shape and dtype of the times.

        With the network F, the prediction of x_0 is c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022, eq. 7).
        c_noise, the time input of the network, is 999 t for vp and subvp and sigma for ve, as in the code of Song et
        al., ln(sigma) / 4 for edm, and 1000 t for flow, as in diffusers.
        """
        alpha, n, config = self.sde.signal_scale(times), self.sde.noise_scale(times), self.config
        c_skip, c_out = clean_image_coefficients(config.prediction_type, alpha, n, config.sigma_data)
        if config.objective == "edm":
            return c_skip, c_out, 1 / (n.square() + config.sigma_data**2).sqrt(), n.log() / 4
        c_noise = n if config.objective == "ve" else (1000 if config.objective == "flow" else 999) * times
        return c_skip, c_out, torch.ones_like(times), c_noise

    # ---- Training

    def times(self, positions: Tensor) -> Tensor:
        """Quantiles of the training times at positions in [0, 1); float64.

        Times are uniform for vp, subvp and ve (eq. 7). For edm, ln(sigma) is normal (Karras et al., table 1), clamped
        to sigma_min and sigma_max. For flow, times have the density `time_density` on (0, 1).
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
        """x_t = alpha x_0 + n epsilon (eq. 29) for times (B,), in the dtype of the images."""
        signal, noise_scale = self.sde.signal_scale(times), self.sde.noise_scale(times)
        return spread(signal, clean_images) * clean_images + spread(noise_scale, noise) * noise

    # ---- Sampling

    @property
    def samplers(self) -> tuple[str, ...]:
        return continuous_samplers(self.config.objective)

    @property
    def default_sampler(self) -> ContinuousSampler:
        return self.sampler("flow_heun" if self.config.objective == "flow" else "edm_heun")

    def sampler(self, name: str, **settings: float) -> ContinuousSampler:
        """One of `samplers`, with settings that replace its defaults.

        `churn` defaults to 10 for a network that predicts the score of unscaled x: it is inaccurate at large sigma,
        and without fresh noise its errors accumulate.

        Raises:
            ValueError: for a setting that is unknown or out of range.
        """
        known = CONTINUOUS_SAMPLERS[name]
        unknown = sorted(settings.keys() - known.keys())
        if unknown:
            raise ValueError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}")
        if name == "edm_heun" and self.config.prediction_type == "score":
            known = {"churn": 10.0}
        settings = known | settings
        for setting, value in settings.items():
            least, most = SETTING_BOUNDS[setting]
            if not least <= value <= most:
                raise ValueError(f"{setting} is {value}; it must be {least} to {most}")
        return ContinuousSampler(name, settings)

    def num_evaluations(self, sampler: ContinuousSampler, num_steps: int) -> int | None:
        """Number of denoiser calls of a sampler; None for `ode`, which chooses its steps by its tolerance.

        Raises:
            ValueError: if the number of steps is out of range.
        """
        if not 2 <= num_steps <= MOST_STEPS:
            raise ValueError(f"num_inference_steps is {num_steps}; it must be 2 to {MOST_STEPS}")
        if sampler.name in ("edm_heun", "flow_heun"):
            return 2 * num_steps - 1
        if sampler.name == "ode":
            return None
        if sampler.name in ("dpmpp_2m", "flow_euler"):
            return num_steps
        return num_steps + 1 + (num_steps - 1) * sampler.settings.get("corrector_steps", 0)

    def denoiser(
        self,
        model_output: Callable[[Tensor, Tensor], Tensor],
        bound: float = math.inf,
        tell: Callable[[Tensor, Tensor, Tensor], None] = lambda t, x, clean_images: None,
    ) -> Denoiser:
        """The denoiser of a network, for times () or (B,); differentiable in x.

        Args:
            model_output: the network, called with x (B, C, H, W) and c_noise, () or (B,).
            bound: x_0 is clipped to [-bound, bound]. The true expectation lies there, so clipping only reduces the
                error. This matters at large sigma: the error of x_0 is sigma times the error of epsilon.
            tell: called after each evaluation with t, x and x_0.
        """

        def predict(x: Tensor, t: Tensor) -> Tensor:
            t = torch.as_tensor(t, dtype=torch.float64).cpu()
            c_skip, c_out, c_in, c_noise = self.preconditioning(t)
            output = model_output(spread(c_in, x) * x, c_noise.to(x.device, torch.float32)).to(x.dtype)
            clean_images = spread(c_skip, x) * x + spread(c_out, x) * output
            if bound < math.inf:
                clean_images = clean_images.clamp(-bound, bound)
            tell(t, x, clean_images)
            return clean_images

        return Denoiser(self.sde, predict)

    def sample(self, sampler: ContinuousSampler, denoise: Denoiser, latents: Tensor, num_steps: int, noise: Noise):
        """Turns latents of unit variance into images, both float32 (B, C, H, W). Raises ValueError if `ode` fails."""
        sde, (name, settings) = self.sde, sampler
        x, times = sde.prior_std * latents, sampling_times(sde, num_steps)
        if name == "ode":
            x, _ = solve_ode(denoise.pf_ode, x, sde.last_time, sde.first_time, **settings)
            return denoise(x.float(), times[-1])
        if name == "euler_maruyama":
            return euler_maruyama(denoise, x, times, noise)
        if name in ("flow_euler", "flow_heun"):
            return straight_flow(denoise, latents, num_steps, heun=name == "flow_heun")
        if name in ("edm_heun", "dpmpp_2m"):
            low, high = sde.noise_levels
            # dpmpp_2m is meant for few steps, and noise levels below 0.03 would take steps from the others
            least = 0.03 if name == "dpmpp_2m" else 0.002
            # schedules reach up to sigma = 20,000; at 4 sqrt(D) an image in [-1, 1] is already invisible
            sigmas = karras_sigmas(num_steps, max(low, least), min(high, 4 * math.sqrt(x[0].numel())))
            y = sigmas[0] * latents
            if name == "dpmpp_2m":
                return dpmpp_2m(denoise, y, sigmas)
            return edm_heun(denoise, y, sigmas, noise, **settings)
        if name == "reverse_diffusion":  # the predictor alone
            settings = {"snr": 0.0, "corrector_steps": 0}
        return predictor_corrector(denoise, x, times, noise, **settings, per_image=True)


def spread(values: Tensor, x: Tensor) -> Tensor:
    """() or (B,) -> a shape that broadcasts with x (B, ...), in the dtype of x."""
    return values.to(x).view(-1, *(1,) * (x.ndim - 1))


# ---- The samplers (equations and algorithms are those of Song et al. 2021 unless another paper is named)
#
# `x` is drawn from the prior, and the times decrease from the SDE's last time to its first. Every sampler returns the
# expectation of x_0 at the first time, which removes the remaining noise (appendix G).


def sampling_times(sde: SDE, num_steps: int) -> Tensor:
    """Times from the last to the first, (num_steps + 1,), float64: evenly spaced, or `karras_sigmas` if t is sigma."""
    if sde.last_time > 1:
        return karras_sigmas(num_steps + 1, sde.first_time, sde.last_time)[:-1]
    return torch.linspace(sde.last_time, sde.first_time, num_steps + 1, dtype=torch.float64)


def euler_maruyama(denoise: Denoiser, x: Tensor, times: Tensor, noise: Noise) -> Tensor:
    """Euler-Maruyama on the reverse SDE (eq. 6); the last step adds no noise."""
    for i, (now, later) in enumerate(itertools.pairwise(times)):
        dt = now - later
        f, g = denoise.sde.drift(now), denoise.sde.diffusion(now)
        x = x - (f * x - g**2 * denoise.score(x, now)) * dt
        if i < len(times) - 2:
            x = x + g * dt.sqrt() * noise()
    return denoise(x, times[-1])


def transition(sde: SDE, early: Tensor, late: Tensor) -> tuple[Tensor, Tensor]:
    """a and v of x_late = a x_early + sqrt(v) z, the forward process over one step."""
    a = sde.signal_scale(late) / sde.signal_scale(early)
    return a, sde.noise_scale(late) ** 2 - (a * sde.noise_scale(early)) ** 2


def reverse_diffusion_step(denoise: Denoiser, x: Tensor, now: Tensor, later: Tensor, noise: Tensor | None) -> Tensor:
    """One step of the reverse diffusion sampler, which is discretized like the forward process (eq. 46)."""
    a, v = transition(denoise.sde, later, now)
    x = (2 - a) * x + v * denoise.score(x, now)
    return x if noise is None else x + v.sqrt() * noise


def langevin_step(
    denoise: Denoiser, x: Tensor, now: Tensor, noise: Tensor, snr: float, step_scale: float, per_image: bool
) -> Tensor:
    """One step of annealed Langevin dynamics at a noise level (algorithms 4 and 5).

    Args:
        snr: r, which sets the step size together with the norms of noise and score.
        step_scale: alpha of the algorithm: 1 for VE, alpha_i = 1 - beta_i for VP.
        per_image: whether to use the norms of each image, so that images do not depend on each other, or their batch
            means, as in the authors' code. In many dimensions the norm of the noise hardly varies.
    """
    score = denoise.score(x, now)
    norms = [values.flatten(1).norm(dim=1) for values in (noise, score)]
    if not per_image:
        norms = [norm.mean() for norm in norms]
    step = spread(2 * step_scale * (snr * norms[0] / norms[1]) ** 2, x)
    return x + step * score + (2 * step).sqrt() * noise


def predictor_corrector(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    snr: float,
    corrector_steps: int = 1,
    per_image: bool = False,
    impose: Callable[[Tensor, Tensor], Tensor] = lambda x, t: x,
) -> Tensor:
    """Reverse diffusion steps, each followed by Langevin steps at the new noise level (algorithms 2 and 3).

    Args:
        snr, per_image: see `langevin_step`.
        impose: called with x and its time after each step; returns x with the known values restored.
    """
    last = len(times) - 2
    for i, (now, later) in enumerate(itertools.pairwise(times)):
        x = impose(reverse_diffusion_step(denoise, x, now, later, noise() if i < last else None), later)
        if i < last:
            for _ in range(corrector_steps):
                step_scale = transition(denoise.sde, later, now)[0] ** 2
                x = impose(langevin_step(denoise, x, later, noise(), snr, step_scale, per_image), later)
    return denoise(x, times[-1])


def straight_flow(denoise: Denoiser, x: Tensor, num_steps: int, heun: bool = False) -> Tensor:
    """Euler's or Heun's method on the ODE of rectified flow, dx/dt = epsilon - x_0 = (x - x_0) / t (arXiv 2209.03003).

    Euler's times are those of diffusers' `FlowMatchEulerDiscreteScheduler`: evenly spaced from 1 to the first time,
    then 0. Heun's are evenly spaced from 1 to 0: near 0, its second slope would divide errors of x_0 by a small time.

    Args:
        x: pure noise of unit variance.
    """
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    if not heun:
        times[:-1] = torch.linspace(1, denoise.sde.first_time, num_steps, dtype=torch.float64)
    for now, later in itertools.pairwise(times):
        slope = (x - denoise(x, now)) / now
        new = x + (later - now) * slope
        if heun and later > 0:
            new = x + (later - now) * (slope + (new - denoise(new, later)) / later) / 2
        x = new
    return x


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Noise levels of Karras et al. 2022, eq. 5 with rho = 7, followed by 0, (num_steps + 1,), float64."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / 7), sigma_max ** (1 / 7)
    return torch.cat([(high + ramp * (low - high)) ** 7, torch.zeros(1, dtype=torch.float64)])


def edm_heun(denoise: Denoiser, y: Tensor, sigmas: Tensor, noise: Noise, churn: float = 0.0) -> Tensor:
    """Heun's method with churn (Karras et al. 2022, algorithm 2) on y = x / alpha, whose noise level is sigma.

    Args:
        y: noise with standard deviation `sigmas[0]`.
        sigmas: decreasing noise levels that end with 0.
        churn: S_churn, at all noise levels (S_tmin 0, S_tmax infinite) and with S_noise 1.
    """
    num_steps = len(sigmas) - 1
    for sigma, later in itertools.pairwise(sigmas):
        if churn > 0:
            raised = sigma * (1 + min(churn / num_steps, math.sqrt(2) - 1))
            raised = raised.clamp(max=float(sigmas[0]))  # never above the initial noise level
            y = y + (raised**2 - sigma**2).sqrt() * noise()
            sigma = raised
        slope = (y - denoise.of_noise_level(y, sigma)) / sigma
        new = y + (later - sigma) * slope
        if later > 0:
            new = y + (later - sigma) * (slope + (new - denoise.of_noise_level(new, later)) / later) / 2
        y = new
    return y


def dpmpp_2m(denoise: Denoiser, y: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) on y = x / alpha, whose noise level is sigma.

    A step is exact if the predicted x_0 is linear in ln(sigma); its slope is that of the last two predictions.

    Args:
        y, sigmas: see `edm_heun`.
    """
    clean_images = denoise.of_noise_level(y, sigmas[0])
    y = clean_images + sigmas[1] / sigmas[0] * (y - clean_images)
    for before, sigma, later in zip(sigmas, sigmas[1:], sigmas[2:], strict=False):
        previous, clean_images = clean_images, denoise.of_noise_level(y, sigma)
        middle = clean_images  # x_0 in the middle of the step
        if later > 0:
            middle = middle + (sigma / later).log() / (before / sigma).log() / 2 * (clean_images - previous)
        y = middle + later / sigma * (y - middle)
    return y


# Dormand & Prince (1980): nodes, stages, 5th-order weights, and their difference from the 4th-order weights
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


def solve_ode(
    rate: Callable[[Tensor, Tensor], Tensor], x: Tensor, start: float, end: float, tolerance: float
) -> tuple[Tensor, int]:
    """Dormand-Prince 5(4) in float64, with adaptive steps shared by the whole batch.

    Args:
        rate: dx/dt as a function of x and t.
        tolerance: maximum error per step: root mean square over the batch, relative to 1 + |x|.

    Returns:
        x at the end, and the number of evaluations.

    Raises:
        ValueError: if the step becomes too small, values are not finite, or too many evaluations are needed.
    """
    x, t, sign = x.double(), start, math.copysign(1.0, end - start)
    first = rate(x, torch.tensor(t, dtype=torch.float64))
    evaluations = 1
    scale = tolerance * (1 + x.abs())
    step = 0.01 * rms(x / scale) / max(rms(first / scale), 1e-12)
    step = min(max(step, 1e-6 * abs(end - start)), abs(end - start))  # x may be 0
    while (end - t) * sign > 0:
        step = min(step, abs(end - t))
        slopes = [first]
        for node, stage in zip(_NODES[1:], _STAGES[1:], strict=True):
            inner = x + sign * step * sum(w * s for w, s in zip(stage, slopes, strict=True))
            slopes.append(rate(inner, torch.tensor(t + sign * step * node, dtype=torch.float64)))
        new = x + sign * step * sum(w * s for w, s in zip(_FIFTH, slopes, strict=True))
        at_end = end if step >= abs(end - t) else t + sign * step
        slopes.append(rate(new, torch.tensor(at_end, dtype=torch.float64)))
        evaluations += 6
        scale = tolerance * (1 + torch.maximum(x.abs(), new.abs()))
        error = rms(step * sum(w * s for w, s in zip(_ERROR, slopes, strict=True)) / scale)
        if error <= 1:
            x, t, first = new, at_end, slopes[-1]
        if not math.isfinite(error) or step < 1e-12 * abs(end - start) or evaluations > MOST_EVALUATIONS:
            raise ValueError(f"the ODE could not be solved: at time {t:.4g} with steps of {step:.2g}")
        step *= min(10.0, max(0.2, 0.9 * error**-0.2)) if error else 10.0
    return x, evaluations


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
