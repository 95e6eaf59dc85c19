"""The SDEs against simulation, against each other, and against the limits that the paper takes them for."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.integrate import solve_ivp

from pipelines.custom_unet_pipeline import DiscreteVPSDE
from training.sde import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    FlowSDE,
    SDEScheduler,
    SubVPSDE,
    clean_from_noise,
    clean_from_score,
    clean_from_velocity,
    noise_from_clean,
    noise_from_score,
    score_from_clean,
    score_from_noise,
    velocity,
)

LINEAR = DDPMScheduler(beta_schedule="linear").alphas_cumprod
COSINE = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod[:-10]  # the last ones are nearly 0
SDES = {
    "ve": VESDE(0.01, 10.0),
    "vp": VPSDE(),
    "subvp": SubVPSDE(),
    "edm": EDMSDE(0.002, 10.0),
    "flow": FlowSDE(),
    "discrete linear": DiscreteVPSDE(LINEAR),
    "discrete cosine": DiscreteVPSDE(COSINE),
}


def times(sde, number: int = 9) -> torch.Tensor:
    first = max(sde.first_time, 1e-3)
    return torch.linspace(first, sde.last_time, number, dtype=torch.float64)


@pytest.mark.parametrize("name", ["ve", "vp", "subvp", "edm", "flow"])
def test_drift_and_diffusion_give_mean_and_standard_deviation(name):
    """d alpha / dt = f alpha and d n^2 / dt = 2 f n^2 + g^2, integrated from the first to the last time."""
    sde, t = SDES[name], times(SDES[name])

    def rates(time, state):
        now = torch.tensor(time, dtype=torch.float64)
        f, g = float(sde.drift(now)), float(sde.diffusion(now))
        return [f * state[0], 2 * f * state[1] + g * g]

    start = [float(sde.signal_scale(t[0])), float(sde.noise_scale(t[0])) ** 2]
    solution = solve_ivp(rates, (t[0], t[-1]), start, t_eval=t, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(solution.y[0], sde.signal_scale(t), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.sqrt(solution.y[1]), sde.noise_scale(t), rtol=1e-6)


@pytest.mark.parametrize("name", SDES)
def test_simulated_paths_have_the_marginals(name):
    """Euler-Maruyama paths of eq. 5 from one point."""
    sde, num_paths, num_steps = SDES[name], 20_000, 1000
    generator = torch.Generator().manual_seed(0)
    t = times(sde, num_steps + 1)
    x_0 = 0.7
    x = sde.signal_scale(t[0]) * x_0 + sde.noise_scale(t[0]) * torch.randn(num_paths, generator=generator).double()
    for now, dt in zip(t[:-1], t.diff(), strict=True):
        noise = torch.randn(num_paths, generator=generator).double()
        x = x + sde.drift(now) * x * dt + sde.diffusion(now) * dt.sqrt() * noise
    mean, std = float(sde.signal_scale(t[-1])) * x_0, float(sde.noise_scale(t[-1]))
    assert float(x.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(num_paths))
    assert float(x.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * num_paths) + 0.01)  # and the steps' own error


@pytest.mark.parametrize("name", SDES)
def test_the_last_time_is_nearly_the_prior(name):
    sde = SDES[name]
    last = torch.tensor(sde.last_time, dtype=torch.float64)
    assert float(sde.noise_scale(last)) == pytest.approx(sde.prior_std, rel=2e-4)


@pytest.mark.parametrize("name", SDES)
def test_time_and_noise_level_are_inverse(name):
    sde, t = SDES[name], times(SDES[name], 100)
    torch.testing.assert_close(sde.time_of(sde.sigma(t)), t, rtol=1e-6, atol=1e-9)
    assert (sde.sigma(t).diff() > 0).all()


@pytest.mark.parametrize("name", SDES)
def test_one_process_at_different_speeds(name):
    """g^2 = 2 n^2 sigma' / sigma, with the derivative by autograd (Karras et al. 2022, appendix B)."""
    sde = SDES[name]
    t = (times(sde, 37)[1:-1] + 1e-5).requires_grad_()
    log_sigma = sde.sigma(t).log()
    (slope,) = torch.autograd.grad(log_sigma.sum(), t)
    torch.testing.assert_close(sde.diffusion(t).square(), 2 * sde.noise_scale(t).square() * slope)


def test_vp_is_the_limit_of_ddpm():
    """beta_i = beta(i / T) / T (appendix B): DDPM's linear schedule from 1e-4 to 0.02 is VP from 0.1 to 20."""
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(VPSDE().signal_scale(t).square(), LINEAR.double(), rtol=0.02, atol=2e-4)


def test_the_discrete_schedule_is_met_at_its_timesteps():
    for alphas_cumprod in (LINEAR, COSINE):
        sde = DiscreteVPSDE(alphas_cumprod)
        t = torch.arange(len(alphas_cumprod), dtype=torch.float64) / (len(alphas_cumprod) - 1)
        torch.testing.assert_close(sde.signal_scale(t).square(), alphas_cumprod.double(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sde.preconditioning(t)[-1], torch.arange(len(t), dtype=torch.float64))


@pytest.mark.parametrize("noise_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SDES)
def test_the_reverse_process_of_a_gaussian_has_its_marginals(name, noise_share):
    """For data N(0, s^2) the score is -x / v with v = alpha^2 s^2 + n^2, and x stays Gaussian: its variance obeys
    dV/dt = 2 a V - lambda^2 g^2 for a drift a x, which v itself must solve."""
    sde, s = SDES[name], 0.4
    t = (times(sde, 37)[1:-1] + 1e-5).requires_grad_()
    variance = sde.signal_scale(t).square() * s**2 + sde.noise_scale(t).square()
    (slope,) = torch.autograd.grad(variance.sum(), t)
    x = torch.ones(len(t), 1, dtype=torch.float64)
    a = SDE.reverse_drift(sde, x, t, -x / variance[:, None], noise_share)[:, 0]
    torch.testing.assert_close(slope, 2 * a * variance - noise_share * sde.diffusion(t).square())


def test_the_four_predictions_are_one():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    for sde in SDES.values():
        t = times(sde, 6)
        alpha, n = (value.view(-1, 1, 1, 1) for value in (sde.signal_scale(t), sde.noise_scale(t)))
        x = alpha * clean + n * noise
        score, v = score_from_noise(noise, n), velocity(clean, noise, alpha, n)
        same = {
            clean_from_score(score, x, alpha, n): clean,
            clean_from_noise(noise, x, alpha, n): clean,
            clean_from_velocity(v, x, alpha, n): clean,
            noise_from_score(score, n): noise,
            noise_from_clean(clean, x, alpha, n): noise,
            score_from_clean(clean, x, alpha, n): score,
        }
        for one, other in same.items():
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_velocity_of_a_flow_tells_the_other_predictions():
    """x_0 = x - t u, epsilon = x + (1 - t) u and score = -(x + (1 - t) u) / t, for u = epsilon - x_0."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    scheduler = SDEScheduler(objective="flow", prediction_type="flow_prediction")
    times = torch.linspace(1e-3, 0.999, 6, dtype=torch.float64)
    t, u = times.view(-1, 1, 1, 1), noise - clean
    x = scheduler.add_noise(clean, noise, times)
    torch.testing.assert_close(x, (1 - t) * clean + t * noise)
    c_skip, c_out, c_in, c_noise = scheduler.preconditioning(times)
    assert (c_in == 1).all()
    torch.testing.assert_close(c_noise, 1000 * times)
    found = c_skip.view(-1, 1, 1, 1) * x + c_out.view(-1, 1, 1, 1) * u
    torch.testing.assert_close(found, x - t * u)
    torch.testing.assert_close(found, clean)
    torch.testing.assert_close(noise_from_clean(found, x, 1 - t, t), x + (1 - t) * u)
    torch.testing.assert_close(score_from_clean(found, x, 1 - t, t), -(x + (1 - t) * u) / t)
    v = ((1 - t) * noise - t * clean) / (t**2 + (1 - t) ** 2).sqrt()
    torch.testing.assert_close(velocity(found, noise_from_clean(found, x, 1 - t, t), 1 - t, t), v)


def test_the_score_is_that_of_the_perturbed_data():
    """Of a mixture of two points: the gradient of the log-density of x_t, by autograd, at the posterior mean."""
    points = torch.tensor([-0.5, 0.8], dtype=torch.float64)
    for sde in (VESDE(), VPSDE(), SubVPSDE(), FlowSDE()):
        t = torch.tensor(0.3, dtype=torch.float64)
        alpha, n = sde.signal_scale(t), sde.noise_scale(t)
        x = torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_()
        exponents = -((x[:, None] - alpha * points) / n).square() / 2
        (expected,) = torch.autograd.grad(exponents.logsumexp(1).sum(), x)
        posterior_mean = (exponents.softmax(1) * points).sum(1)
        torch.testing.assert_close(score_from_clean(posterior_mean, x, alpha, n), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VESDE(0.0, 1.0), "sigma_min 0.0"),
        (lambda: VESDE(2.0, 1.0), "sigma_max 1.0"),
        (lambda: EDMSDE(1.0, math.inf), "sigma_max inf"),
        (lambda: VPSDE(beta_min=3.0, beta_max=2.0), "beta_max 2.0"),
        (lambda: SubVPSDE(first_time=1.0), "first_time is 1.0"),
        (lambda: DiscreteVPSDE(torch.tensor([0.5, 0.6])), "falling"),
        (lambda: DiscreteVPSDE(torch.tensor([1.0, 0.5])), "between 0 and 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
