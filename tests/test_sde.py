"""The SDEs compared with their definition, with each other, and with the processes whose limits they are."""

import pytest
import torch
from diffusers import DDPMScheduler

from pipelines.continuous import DiscreteVPScheduler, DiscreteVPSDE
from training.sde import EDMSDE, VESDE, VPSDE, FlowSDE, SubVPSDE, clean_image_coefficients

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


@pytest.mark.parametrize("name", SDES)
def test_functions_of_an_sde_are_consistent(name):
    """f = alpha' / alpha and g^2 = 2 n^2 sigma' / sigma by autograd (Karras et al. 2022, appendix B), and the rest."""
    sde = SDES[name]
    t = (times(sde, 37)[1:-1] + 1e-5).requires_grad_()
    (growth,) = torch.autograd.grad((sde.signal_scale(t).log() + 0 * t).sum(), t)
    (slope,) = torch.autograd.grad(sde.sigma(t).log().sum(), t)
    torch.testing.assert_close(sde.drift(t), growth)
    torch.testing.assert_close(sde.diffusion(t).square(), 2 * sde.noise_scale(t).square() * slope)
    t = times(sde, 100)
    torch.testing.assert_close(sde.time_of(sde.sigma(t)), t, rtol=1e-6, atol=1e-9)
    assert (sde.sigma(t).diff() > 0).all()
    assert float(sde.noise_scale(t[-1])) == pytest.approx(sde.prior_std, rel=2e-4)


def test_vp_is_the_limit_of_ddpm():
    """beta_i = beta(i / T) / T (appendix B): DDPM's linear schedule from 1e-4 to 0.02 is VP from 0.1 to 20."""
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(VPSDE().signal_scale(t).square(), LINEAR.double(), rtol=0.02, atol=2e-4)


def test_discrete_schedule_is_exact_at_its_timesteps():
    for alphas_cumprod in (LINEAR, COSINE):
        sde = DiscreteVPSDE(alphas_cumprod)
        t = torch.arange(len(alphas_cumprod), dtype=torch.float64) / (len(alphas_cumprod) - 1)
        torch.testing.assert_close(sde.signal_scale(t).square(), alphas_cumprod.double(), rtol=1e-9, atol=1e-12)
        c_noise = DiscreteVPScheduler(alphas_cumprod, "sample").preconditioning(t)[-1]
        torch.testing.assert_close(c_noise, torch.arange(len(t), dtype=torch.float64))


def test_score_gives_the_posterior_mean_of_the_data():
    """For a mixture of two points, with the score computed by autograd."""
    points = torch.tensor([-0.5, 0.8], dtype=torch.float64)
    for sde in (VESDE(), VPSDE(), SubVPSDE(), FlowSDE()):
        t = torch.tensor(0.3, dtype=torch.float64)
        alpha, n = sde.signal_scale(t), sde.noise_scale(t)
        x = torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_()
        exponents = -((x[:, None] - alpha * points) / n).square() / 2
        (score,) = torch.autograd.grad(exponents.logsumexp(1).sum(), x)
        posterior_mean = (exponents.softmax(1) * points).sum(1)
        c_skip, c_out = clean_image_coefficients("score", alpha, n)
        torch.testing.assert_close(c_skip * x + c_out * score, posterior_mean)
