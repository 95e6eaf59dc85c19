"""The mathematics of training against diffusers' schedulers, closed forms and the formulas of the papers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from training import diffusion
from training.diffusion import diffusion_loss, heldout_loss, sample_positions, score_regression
from training.sde import SDEScheduler

KINDS = ["epsilon", "sample", "v_prediction"]
SDES = [(name, kind) for name in ("vp", "subvp") for kind in KINDS] + [("ve", "score")]
SDES += [("edm", "edm"), ("flow", "flow_prediction")]


def scheduler_of(prediction_type="epsilon", beta_schedule="linear", zero_snr=False, num_train_timesteps=1000):
    return diffusion.make_noise_scheduler(num_train_timesteps, beta_schedule, 1e-4, 0.02, prediction_type, zero_snr)


def alpha_and_n(scheduler, times):
    """Signal and noise scale, (B, 1, 1, 1), of timesteps, or as in Song et al., eq. 29 and appendix C."""
    t = times.view(-1, 1, 1, 1)
    if isinstance(scheduler, DDPMScheduler):
        abar = scheduler.alphas_cumprod.double()[t]
        return abar.sqrt(), (1 - abar).sqrt()
    integral = 0.1 * t + 19.9 * t**2 / 2
    return {
        "vp": lambda: ((-integral / 2).exp(), (1 - (-integral).exp()).sqrt()),
        "subvp": lambda: ((-integral / 2).exp(), 1 - (-integral).exp()),
        "ve": lambda: (torch.ones_like(t), 0.02 * (100 / 0.02) ** t),
        "edm": lambda: (torch.ones_like(t), t),
        "flow": lambda: (1 - t, t),
    }[scheduler.config.objective]()


class OracleNetwork(torch.nn.Module):
    """Knows image and noise, with an error of `noise_error` in epsilon; uses float64 because of the smallest times."""

    def __init__(self, scheduler, clean_images, noise, noise_error):
        super().__init__()
        self.scheduler, self.clean_images, self.noise, self.noise_error = scheduler, clean_images, noise, noise_error
        self.device_anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, inputs, times, class_labels=None):
        time_of = {
            "vp": lambda c: c / 999,
            "subvp": lambda c: c / 999,
            "ve": lambda c: (c / 0.02).log() / math.log(100 / 0.02),
            "edm": lambda c: (4 * c).exp(),
            "flow": lambda c: c / 1000,
        }.get(self.scheduler.config.get("objective"))
        alpha, n = alpha_and_n(self.scheduler, times if time_of is None else time_of(times.double()))
        clean, noise = self.clean_images.double(), self.noise.double()
        x, epsilon = alpha * clean + n * noise, noise + self.noise_error
        predicted = (x - n * epsilon) / alpha
        output = {
            "epsilon": lambda: epsilon,
            "sample": lambda: predicted,
            "v_prediction": lambda: (alpha * epsilon - n * predicted) / (alpha**2 + n**2).sqrt(),
            "score": lambda: -epsilon / n,
            "edm": lambda: (predicted - 0.25 / (n**2 + 0.25) * x) / (n * 0.5 / (n**2 + 0.25).sqrt()),
            "flow_prediction": lambda: epsilon - predicted,
        }[self.scheduler.config.prediction_type]()
        return type("Output", (), {"sample": output.float()})


class Network(torch.nn.Conv2d):
    """An arbitrary function of image and time."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__(3, 3, 1)

    def forward(self, images, times, class_labels=None):
        output = super().forward(images.tanh()) * (1 + times / 1000).view(-1, 1, 1, 1)
        return type("Output", (), {"sample": output})


def loss_and_draws(scheduler, network, clean_images, how="stratified", **options):
    """The loss, and the noise and positions that it drew."""
    torch.manual_seed(5)
    noise, positions = torch.randn_like(clean_images), sample_positions(how, len(clean_images))
    torch.manual_seed(5)
    return diffusion_loss(network, scheduler, clean_images, how, **options), noise, positions


def images(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)


# ---- DDPM


@pytest.mark.parametrize("weighting", [None, "min", "soft_min"])
@pytest.mark.parametrize("prediction_type", KINDS)
def test_training_loss_matches_a_known_prediction_error(prediction_type, weighting):
    """The noise has an error of 0.1; the SNR is diffusers'. Unweighted, the errors of the prediction types differ;
    weighted by the error of x_0, the same prediction has the same loss whichever type expresses it."""
    scheduler, gamma = scheduler_of(prediction_type, "squaredcos_cap_v2"), 5.0
    torch.manual_seed(5)
    network = OracleNetwork(scheduler, images(), torch.randn_like(images()), noise_error=0.1)
    options = {} if weighting is None else {"snr_gamma": gamma, "snr_weighting": weighting}
    loss, _, positions = loss_and_draws(scheduler, network, images(), **options)
    snr = compute_snr(scheduler, timesteps_of(positions))
    if weighting is None:
        factor = {"epsilon": torch.ones(16), "sample": 1 / snr, "v_prediction": (snr + 1) / snr}[prediction_type]
    else:
        factor = {"min": snr.clamp(max=gamma), "soft_min": 1 / (1 / snr + 1 / gamma)}[weighting] / snr
    assert loss.item() == pytest.approx((0.01 * factor).mean().item(), rel=1e-3)


@pytest.mark.parametrize("how", ["uniform", "stratified", "antithetic"])
def test_positions_and_timesteps_are_uniform(how):
    torch.manual_seed(0)
    draws = torch.cat([sample_positions(how, 7) for _ in range(6000)])
    assert draws.dtype == torch.float64
    assert 0 < draws.min() < draws.max() < 1
    frequencies = torch.bincount(timesteps_of(draws, 10)) / len(draws)
    torch.testing.assert_close(frequencies, torch.full((10,), 0.1), atol=0.01, rtol=0)


def test_stratified_positions_fill_every_stratum():
    positions = sample_positions("stratified", 8)
    torch.testing.assert_close(positions.sort().values.diff(), torch.full((7,), 1 / 8, dtype=torch.float64))


def test_antithetic_timesteps_come_in_pairs(monkeypatch):
    """Even if the random number is extreme or on the boundary of a timestep."""
    extremes = torch.tensor([0.0, 1 - 2**-24, 0.5, 0.125, 0.875])
    monkeypatch.setattr(torch, "rand", lambda count: extremes[:count])
    timesteps = timesteps_of(sample_positions("antithetic", 10))
    assert (timesteps[:5] + timesteps[5:] == 999).all()
    assert timesteps[:2].tolist() == [0, 999]


def timesteps_of(positions, num_train_timesteps=1000):
    scheduler, blank = scheduler_of(num_train_timesteps=num_train_timesteps), torch.zeros(len(positions), 1, 1, 1)
    return diffusion.ddpm_regression(scheduler, blank, blank, positions).times


# ---- Continuous time


def test_edm_loss_matches_karras_et_al():
    """Karras et al. 2022, eq. 2, 7 and table 1: the mean of lambda(sigma) |D(y + n; sigma) - y|^2."""
    network, data = Network(), 0.5
    loss, noise, positions = loss_and_draws(SDEScheduler(objective="edm", prediction_type="edm"), network, images())
    log_sigma = -1.2 + 1.2 * math.sqrt(2) * torch.erfinv(2 * positions - 1).view(-1, 1, 1, 1)
    sigma = log_sigma.exp()
    x, norm = images() + sigma * noise, (sigma**2 + data**2).sqrt()
    output = network((x / norm).float(), (log_sigma / 4).flatten().float()).sample
    denoised = data**2 / norm**2 * x + sigma * data / norm * output
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    torch.testing.assert_close(loss, (weight * (denoised - images()) ** 2).mean().float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("how", ["uniform", "stratified", "antithetic"])
@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
def test_flow_loss_is_the_mse_of_the_velocity(density, how):
    """Liu et al. 2022, eq. 1, with time reversed; logit-normal as in Esser et al. 2024, section 3.1."""
    network = Network()
    scheduler = SDEScheduler(objective="flow", prediction_type="flow_prediction", time_density=density)
    loss, noise, positions = loss_and_draws(scheduler, network, images(), how)
    t = positions.view(-1, 1, 1, 1)
    if density == "logit_normal":
        t = 1 / (1 + (-math.sqrt(2) * torch.erfinv(2 * t - 1)).exp())
    velocity = network(((1 - t) * images() + t * noise).float(), (1000 * t).flatten().float()).sample
    torch.testing.assert_close(loss, (velocity - (noise - images())).square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("objective", "kind"), SDES[:-2])
def test_likelihood_weighting_is_g_squared_times_the_score_error(objective, kind):
    scheduler = SDEScheduler(objective=objective, prediction_type=kind)
    torch.manual_seed(5)
    noise = torch.randn_like(images())
    network = OracleNetwork(scheduler, images(), noise, noise_error=0.1)
    loss, _, positions = loss_and_draws(scheduler, network, images(), likelihood_weighting=True)
    t = positions if objective == "ve" else 1e-5 + (1 - 1e-5) * positions
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 19.9 * t**2 / 2
    g_squared = {
        "vp": beta,
        "subvp": beta * (1 - (-2 * integral).exp()),
        "ve": (0.02 * (100 / 0.02) ** t) ** 2 * 2 * math.log(100 / 0.02),
    }[objective]
    _, n = alpha_and_n(scheduler, t)
    expected = (g_squared * (0.1 / n.flatten()) ** 2).mean().item()  # the score has an error of 0.1 / n
    assert loss.item() == pytest.approx(expected, rel=1e-2)
    plain, _, _ = loss_and_draws(scheduler, network, images())
    assert plain.item() == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize(("objective", "kind"), SDES)
def test_target_and_noisy_image_combine_to_the_clean_image(objective, kind):
    """c_skip x + c_out F = x_0, also at both ends of the times; in float32 the regression is as accurate."""
    scheduler, is_weighted = SDEScheduler(objective=objective, prediction_type=kind), objective not in ("edm", "flow")
    clean_images, noise = images(5), images(5).flip(0)
    positions = torch.tensor([0.0, 1e-6, 1e-3, 0.3, 1 - 2**-25], dtype=torch.float64)
    exact = score_regression(scheduler, clean_images.double(), noise.double(), positions, is_weighted)
    c_skip, c_out, c_in, _ = (x.view(-1, 1, 1, 1) for x in scheduler.preconditioning(scheduler.times(positions)))
    combined = c_skip * exact.inputs / c_in + c_out * exact.target
    torch.testing.assert_close(combined, clean_images.double(), rtol=0, atol=1e-7)
    task = score_regression(scheduler, clean_images, noise, positions, is_weighted)
    for name in ("inputs", "times", "target", "loss_weight", "noise_weight"):
        value = getattr(task, name)
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
        torch.testing.assert_close(value.double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


# ---- The held-out loss of all objectives


@pytest.mark.parametrize(("objective", "kind"), [("ddpm", kind) for kind in KINDS] + SDES)
def test_heldout_loss_is_the_mse_of_the_noise_for_every_objective(objective, kind):
    scheduler = scheduler_of(kind) if objective == "ddpm" else SDEScheduler(objective=objective, prediction_type=kind)
    generator = torch.Generator().manual_seed(0)
    torch.randperm(40, generator=generator)
    noise = torch.randn(images(40).shape, generator=generator)
    losses = heldout_loss(OracleNetwork(scheduler, images(40), noise, 0.2), scheduler, images(40), batch_size=40)
    assert set(losses) == {"heldout_loss", *(f"heldout_loss_q{q}" for q in (1, 2, 3, 4))}
    for value in losses.values():
        assert value == pytest.approx(0.04, rel=2e-2)


def test_heldout_loss_is_independent_of_batch_size_and_global_generator():
    network, scheduler = Network(), scheduler_of()
    first = heldout_loss(network, scheduler, images(13), batch_size=13)
    assert heldout_loss(network, scheduler, images(13), batch_size=4) == pytest.approx(first, rel=1e-6)
    quarters = [first[f"heldout_loss_q{q}"] for q in (1, 2, 3, 4)]
    assert len({round(value, 4) for value in quarters}) == 4  # a network that uses t has different quarters
