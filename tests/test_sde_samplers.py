"""The samplers in continuous time against data whose exact score is known, and the ODE solver against SciPy's."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, ScoreSdeVeScheduler
from exact_denoiser import Mixture, mixture
from scipy.integrate import solve_ivp

from pipelines.custom_unet_pipeline import (
    DiscreteVPSDE,
    edm_heun,
    euler_maruyama,
    karras_sigmas,
    langevin_step,
    predictor_corrector,
    reverse_diffusion_step,
    sampling_times,
    solve_flow,
    straight_flow,
)
from training.sde import EDMSDE, VESDE, VPSDE, FlowSDE, SubVPSDE

N = 10000
DATA = mixture()
SDES = {
    "ve": VESDE(0.01, 10.0),
    "vp": VPSDE(),
    "subvp": SubVPSDE(),
    "edm": EDMSDE(0.002, 10.0),
    "flow": FlowSDE(),
    "discrete": DiscreteVPSDE(DDPMScheduler().alphas_cumprod),
}
# largest error of weights, means and (relative) covariances that chance leaves of N samples
TOLERANCE = torch.tensor([0.03, 0.02, 0.15], dtype=torch.float64)


def exact_clean(sde):
    def clean(x, t):
        alpha, n = sde.signal_scale(t), sde.noise_scale(t)
        covariances = alpha**2 * DATA.covariances + n**2 * torch.eye(3, dtype=torch.float64)
        log_densities, solved = Mixture(DATA.weights, alpha * DATA.means, covariances).log_densities(x)
        score = -(log_densities.softmax(-1)[..., None] * solved).sum(1)
        return (x + n**2 * score) / alpha

    return clean


def noise_source():
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(N, 3, generator=generator, dtype=torch.float64)


def draw(name: str, method: str, steps: int) -> torch.Tensor:
    """Errors of weights, means and covariances."""
    sde, noise = SDES[name], noise_source()
    clean, x = exact_clean(sde), sde.prior_std * noise()
    if method == "euler_maruyama":
        images = euler_maruyama(sde, clean, x, sampling_times(sde, steps), noise)
    else:
        corrector_steps = {"reverse_diffusion": 0, "predictor_corrector": 1}[method]
        images = predictor_corrector(sde, clean, x, sampling_times(sde, steps), noise, 0.16, corrector_steps)
    return DATA.errors(images)


@pytest.mark.parametrize("method", ["euler_maruyama", "reverse_diffusion", "predictor_corrector"])
@pytest.mark.parametrize("name", SDES)
def test_stochastic_samplers_reproduce_the_data(name, method):
    few, many = draw(name, method, 20), draw(name, method, 200)
    assert (many < TOLERANCE).all(), many
    assert many[2] < max(few[2] / 2, 0.1), "more steps must be better, down to chance"


@pytest.mark.parametrize("name", SDES)
def test_heun_with_churn_reproduces_the_data(name):
    sde, noise = SDES[name], noise_source()
    first, last = (torch.tensor(t, dtype=torch.float64) for t in (sde.first_time, sde.last_time))
    low, high = max(0.002, float(sde.sigma(first))), min(10.0, float(sde.sigma(last)))
    errors = []
    for steps in (10, 40):
        sigmas = karras_sigmas(steps, low, high)
        errors.append(DATA.errors(edm_heun(sde, exact_clean(sde), high * noise(), sigmas, noise, churn=10.0)))
    assert (errors[1] < TOLERANCE).all(), errors[1]
    assert errors[1][2] < max(errors[0][2] / 2, 0.1)


def test_the_noise_of_churn_is_scaled_by_its_factor():
    """Algorithm 2 by hand, for a network that sees a black image in everything, so that y is proportional to sigma."""
    start, sigmas = torch.full((2, 3), 5.0, dtype=torch.float64), torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    found = edm_heun(
        SDES["edm"],
        lambda x, t: torch.zeros_like(x),
        start,
        sigmas,
        lambda: torch.ones(2, 3),
        churn=0.4,
        noise_factor=3,
    )
    raised = 2 * (1 + 0.4 / 2)  # the first step starts at the largest noise level, which is not raised
    expected = (5.0 / 2 + math.sqrt(raised**2 - 2**2) * 3) / raised
    torch.testing.assert_close(found, torch.full((2, 3), expected, dtype=torch.float64))


def test_heun_is_of_second_order():
    """One Gaussian, from the same noise: halving the steps quarters the error."""
    sde = EDMSDE(0.002, 10.0)

    def clean(x, t):  # N(0, 0.5^2)
        return x * 0.25 / (0.25 + t**2)

    y = torch.tensor([[3.0]], dtype=torch.float64)
    exact = y * math.sqrt(0.25 / (0.25 + 100))
    errors = []
    for steps in (40, 80, 160):
        end = edm_heun(sde, clean, y, karras_sigmas(steps, 0.002, 10.0), lambda: None)
        errors.append(float((end - exact).abs()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_orders_of_euler_and_heun_on_a_straight_flow(heun, order):
    """One Gaussian, whose ODE keeps x / std; halving the steps divides the error by 2^order."""
    sde, std = FlowSDE(), 0.5
    x = torch.tensor([[1.5]], dtype=torch.float64)

    def clean(x, t):
        return x * (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)

    errors = [float((straight_flow(sde, clean, x, n, heun) - std * x).abs()) for n in (40, 80, 160)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.2)


def test_the_solver_is_scipys_method():
    def rate(x, t):
        return torch.stack([x[1], -x[0] * (1 + t)])

    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    end, evaluations = solve_flow(rate, start, 0.0, 5.0, 1e-7, 1e-9)
    theirs = solve_ivp(lambda t, x: [x[1], -x[0] * (1 + t)], (0, 5), [1.0, 0.0], method="RK45", rtol=1e-7, atol=1e-9)
    exact = solve_ivp(
        lambda t, x: [x[1], -x[0] * (1 + t)], (0, 5), [1.0, 0.0], method="DOP853", rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(end, exact.y[:, -1], atol=2 * np.abs(theirs.y - exact.y[:, -1:])[:, -1].max() + 1e-9)
    assert evaluations < 1.3 * theirs.nfev


def test_the_solver_starts_from_zero():
    """There the size of x gives no first step."""
    end, _ = solve_flow(lambda x, t: torch.ones_like(x), torch.zeros(3), 0.0, 5.0, 1e-7, 1e-9)
    torch.testing.assert_close(end, torch.full((3,), 5.0, dtype=torch.float64))


def test_a_predictor_and_a_corrector_step_are_those_of_diffusers_ve_scheduler():
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=10, sigma_min=0.01, sigma_max=10.0, snr=0.17)
    scheduler.set_timesteps(10)
    scheduler.set_sigmas(10, 0.01, 10.0)
    index = 6
    now, later = (scheduler.discrete_sigmas[i].double() for i in (index, index - 1))
    sde = VESDE(0.01, 10.0)
    x, score = torch.randn(2, 5, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def clean(x, t):
        return x + sde.noise_scale(t) ** 2 * score

    def drawn(dtype):  # the noise that the scheduler draws
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=dtype).double()

    t = scheduler.timesteps[len(scheduler.timesteps) - 1 - index]
    theirs = scheduler.step_pred(score, t, x, generator=torch.Generator().manual_seed(1))
    ours = reverse_diffusion_step(sde, clean, x, sde.time_of(now), sde.time_of(later), drawn(torch.float64))
    torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-5, atol=1e-5)
    theirs = scheduler.step_correct(score, x, generator=torch.Generator().manual_seed(1)).prev_sample
    ours = langevin_step(sde, clean, x, sde.time_of(now), drawn(torch.float32), 0.17, 1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_noise_levels_are_those_of_diffusers_edm_scheduler():
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(18)
    torch.testing.assert_close(karras_sigmas(18, 0.002, 80.0).float(), scheduler.sigmas)


def test_an_ode_that_cannot_be_solved():
    with pytest.raises(ValueError, match="could not be solved"):
        solve_flow(lambda x, t: x**2, torch.ones(1), 0.0, 2.0, 1e-6, 1e-6)
