"""The continuous-time samplers on data whose exact score is known, and the ODE solver compared with SciPy's."""

import math

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, ScoreSdeVeScheduler
from exact_denoiser import mixture
from scipy.integrate import solve_ivp
from test_sde import SDES

from training.sde import (
    EDMSDE,
    VESDE,
    Denoiser,
    FlowSDE,
    SDEScheduler,
    dpmpp_2m,
    edm_heun,
    euler_maruyama,
    karras_sigmas,
    langevin_step,
    predictor_corrector,
    reverse_diffusion_step,
    sampling_times,
    solve_ode,
    straight_flow,
)

N = 10000
DATA = mixture()
# upper bound on the sampling errors of weights, means and (relative) covariances with N samples
TOLERANCE = torch.tensor([0.03, 0.02, 0.15], dtype=torch.float64)


def data_errors(name: str, method: str, steps: int) -> torch.Tensor:
    """Errors of the samples' weights, means and covariances."""
    sde, generator = SDES[name], torch.Generator().manual_seed(0)
    denoise = Denoiser(sde, lambda x, t: DATA.clean_images(x, sde.signal_scale(t), sde.noise_scale(t)))

    def noise():
        return torch.randn(N, 3, generator=generator, dtype=torch.float64)

    x, times = sde.prior_std * noise(), sampling_times(sde, steps)
    if method == "euler_maruyama":
        return DATA.errors(euler_maruyama(denoise, x, times, noise))
    if method == "edm_heun with churn":
        low, high = max(0.002, sde.noise_levels[0]), min(10.0, sde.noise_levels[1])
        return DATA.errors(edm_heun(denoise, high * noise(), karras_sigmas(steps, low, high), noise, churn=10.0))
    corrector_steps = {"reverse_diffusion": 0, "predictor_corrector": 1}[method]
    return DATA.errors(predictor_corrector(denoise, x, times, noise, 0.16, corrector_steps))


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("euler_maruyama", (20, 200)),
        ("reverse_diffusion", (20, 200)),
        ("predictor_corrector", (20, 200)),
        ("edm_heun with churn", (10, 40)),
    ],
)
@pytest.mark.parametrize("name", [name for name in SDES if name != "discrete cosine"])
def test_stochastic_samplers_reproduce_the_data(name, method, steps):
    few, many = (data_errors(name, method, n) for n in steps)
    assert (many < TOLERANCE).all(), many
    assert many[2] < max(few[2] / 2, 0.1), "more steps must be better, down to chance"


def test_churn_matches_algorithm_2():
    """By hand for a network that always predicts zeros, so that x is proportional to sigma."""
    start, sigmas = torch.full((2, 3), 5.0, dtype=torch.float64), torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    denoise = Denoiser(SDES["edm"], lambda x, t: torch.zeros_like(x))
    found = edm_heun(denoise, start, sigmas, lambda: torch.ones(2, 3), churn=0.4)
    raised = 2 * (1 + 0.4 / 2)  # the first step starts at the largest noise level, which is not raised
    expected = (5.0 / 2 + math.sqrt(raised**2 - 2**2)) / raised
    torch.testing.assert_close(found, torch.full((2, 3), expected, dtype=torch.float64))


@pytest.mark.parametrize(("method", "order"), [("edm_heun", 2), ("dpmpp_2m", 2), ("flow_heun", 2), ("flow_euler", 1)])
def test_halving_the_step_size_divides_the_error_by_2_to_the_order(method, order):
    """For a Gaussian N(0, 1/4), whose ODE conserves x / std."""
    sde = FlowSDE() if "flow" in method else EDMSDE(0.002, 10.0)

    def clean(x, t):
        alpha, n = sde.signal_scale(t), sde.noise_scale(t)
        return x * alpha * 0.25 / (alpha**2 * 0.25 + n**2)

    x, errors = torch.tensor([[1.5]], dtype=torch.float64), []
    for steps in (40, 80, 160):
        if "flow" not in method:
            start = (Denoiser(sde, clean), 10 * x, karras_sigmas(steps, 0.002, 10.0))
            end = dpmpp_2m(*start) if method == "dpmpp_2m" else edm_heun(*start, lambda: None)
            errors.append(float((end - 10 * x * math.sqrt(0.25 / (0.25 + 100))).abs()))
        else:
            end = straight_flow(Denoiser(sde, clean), x, steps, heun=method == "flow_heun")
            errors.append(float((end - 0.5 * x).abs()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.2)


def test_dpmpp_2m_matches_diffusers_edm_scheduler():
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, lower_order_final=False)
    scheduler.set_timesteps(7)
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = Denoiser(EDMSDE(0.002, 80.0), lambda y, sigma: torch.tanh(2 * y / (1 + sigma**2)))
    theirs = 80 * start
    for sigma, t in zip(scheduler.sigmas.double(), scheduler.timesteps, strict=False):
        c_skip, c_out, *_ = SDEScheduler(objective="edm", prediction_type="edm").preconditioning(sigma)
        theirs = scheduler.step((denoise(theirs, sigma) - c_skip * theirs) / c_out, t, theirs).prev_sample
    ours = dpmpp_2m(denoise, 80 * start, scheduler.sigmas.double())
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5)


def test_ode_solver_matches_scipys_rk45():
    def rate(t, x):
        return [x[1], -x[0] * (1 + t)]

    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    end, evaluations = solve_ode(lambda x, t: torch.stack(rate(t, x)), start, 0.0, 5.0, 1e-8)
    theirs = solve_ivp(rate, (0, 5), [1.0, 0.0], method="RK45", rtol=1e-8, atol=1e-8)
    exact = solve_ivp(rate, (0, 5), [1.0, 0.0], method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(end, exact, atol=2 * np.abs(theirs.y[:, -1] - exact).max() + 1e-9)
    assert evaluations < 1.3 * theirs.nfev


def test_ode_solver_starts_from_zero_and_reports_failure():
    """At x = 0, the size of x gives no scale for the first step."""
    end, _ = solve_ode(lambda x, t: torch.ones_like(x), torch.zeros(3), 0.0, 5.0, 1e-7)
    torch.testing.assert_close(end, torch.full((3,), 5.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="could not be solved"):
        solve_ode(lambda x, t: x**2, torch.ones(1), 0.0, 2.0, 1e-6)


def test_predictor_and_corrector_steps_match_diffusers_ve_scheduler():
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=10, sigma_min=0.01, sigma_max=10.0, snr=0.17)
    scheduler.set_timesteps(10)
    scheduler.set_sigmas(10, 0.01, 10.0)
    index, sde = 6, VESDE(0.01, 10.0)
    now, later = (sde.time_of(scheduler.discrete_sigmas[i].double()) for i in (index, index - 1))
    x, score = torch.randn(2, 5, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = Denoiser(sde, lambda x, t: x + sde.noise_scale(t) ** 2 * score)

    def drawn(dtype):  # the noise that the scheduler draws
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=dtype).double()

    t = scheduler.timesteps[len(scheduler.timesteps) - 1 - index]
    theirs = scheduler.step_pred(score, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
    ours = reverse_diffusion_step(denoise, x, now, later, drawn(torch.float64))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    theirs = scheduler.step_correct(score, x, generator=torch.Generator().manual_seed(1)).prev_sample
    ours = langevin_step(denoise, x, now, drawn(torch.float32), 0.17, 1.0, per_image=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_noise_levels_match_diffusers_edm_scheduler():
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(18)
    torch.testing.assert_close(karras_sigmas(18, 0.002, 80.0).float(), scheduler.sigmas)
