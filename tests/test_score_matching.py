"""The loss in continuous time against the formulas of the papers, written out here with other means."""

import math

import pytest
import torch

from training.diffusion import diffusion_loss, heldout_loss, sample_positions
from training.score_matching import check_noise_levels, score_regression
from training.sde import SDEScheduler

KINDS = ["epsilon", "sample", "v_prediction"]
ALL = [(name, kind) for name in ("vp", "subvp") for kind in KINDS] + [("ve", "score")]
ALL += [("edm", "edm"), ("flow", "flow_prediction")]


class Network(torch.nn.Conv2d):
    """Whatever: a function of image and time that keeps what it was asked."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__(3, 3, 1)

    def forward(self, images, times, class_labels=None):
        self.asked = images, times
        output = super().forward(images.tanh()) * (1 + times / 1000).view(-1, 1, 1, 1)
        return type("Output", (), {"sample": output})


class OracleNetwork(torch.nn.Module):
    """Knows image and noise, and errs in epsilon by `noise_error`; float64 within, as small times need it."""

    def __init__(self, scheduler, clean_images, noise, noise_error):
        super().__init__()
        self.scheduler, self.clean_images, self.noise, self.noise_error = scheduler, clean_images, noise, noise_error
        self.device_anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, inputs, c_noise, class_labels=None):
        objective = self.scheduler.config.objective
        times = {"ve": lambda c: self.scheduler.sde.time_of(c), "edm": lambda c: (4 * c).exp()}.get(
            objective, lambda c: c / (1000 if objective == "flow" else 999)
        )(c_noise.double())
        alpha, n = alpha_and_n(self.scheduler, times)
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


def alpha_and_n(scheduler, times):
    """From the formulas of Song et al., eq. 29 with the betas and sigmas of appendix C; (B, 1, 1, 1)."""
    t = times.view(-1, 1, 1, 1)
    integral = 0.1 * t + 19.9 * t**2 / 2
    return {
        "vp": lambda: ((-integral / 2).exp(), (1 - (-integral).exp()).sqrt()),
        "subvp": lambda: ((-integral / 2).exp(), 1 - (-integral).exp()),
        "ve": lambda: (torch.ones_like(t), 0.02 * (100 / 0.02) ** t),
        "edm": lambda: (torch.ones_like(t), t),
        "flow": lambda: (1 - t, t),
    }[scheduler.config.objective]()


def loss_and_draws(scheduler, network, clean_images, how="stratified", **options):
    """The loss, and the noise and positions that it drew."""
    torch.manual_seed(5)
    noise, positions = torch.randn_like(clean_images), sample_positions(how, len(clean_images))
    torch.manual_seed(5)
    return diffusion_loss(network, scheduler, clean_images, how, **options), noise, positions


def images(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)


@pytest.mark.parametrize("objective", ["vp", "subvp"])
@pytest.mark.parametrize("how", ["uniform", "stratified", "antithetic"])
def test_loss_of_vp_with_epsilon_is_the_mean_squared_error_of_the_noise(objective, how):
    network = Network()
    loss, noise, positions = loss_and_draws(SDEScheduler(objective=objective), network, images(), how)
    times = 1e-5 + (1 - 1e-5) * positions
    alpha, n = alpha_and_n(SDEScheduler(objective=objective), times)
    prediction = network((alpha * images() + n * noise).float(), (999 * times).float()).sample
    torch.testing.assert_close(loss, (prediction - noise).square().mean(), rtol=1e-4, atol=0)


def test_loss_of_ve_is_that_of_sigma_times_the_score():
    network = Network()
    loss, noise, positions = loss_and_draws(SDEScheduler(objective="ve", prediction_type="score"), network, images())
    sigma = 0.02 * (100 / 0.02) ** positions.view(-1, 1, 1, 1)
    score = network((images() + sigma * noise).float(), sigma.flatten().float()).sample
    torch.testing.assert_close(loss, (sigma * score + noise).square().mean().float(), rtol=1e-4, atol=0)


def test_loss_of_edm_is_that_of_karras():
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
def test_loss_of_flow_is_the_mean_squared_error_of_the_velocity(density, how):
    """Liu et al. 2022, eq. 1, with time reversed; logit-normal as in Esser et al. 2024, section 3.1."""
    network = Network()
    scheduler = SDEScheduler(objective="flow", prediction_type="flow_prediction", time_density=density)
    loss, noise, positions = loss_and_draws(scheduler, network, images(), how)
    t = positions.view(-1, 1, 1, 1)
    if density == "logit_normal":
        t = 1 / (1 + (-math.sqrt(2) * torch.erfinv(2 * t - 1)).exp())
    velocity = network(((1 - t) * images() + t * noise).float(), (1000 * t).flatten().float()).sample
    torch.testing.assert_close(loss, (velocity - (noise - images())).square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("objective", "kind"), ALL[:-2])
def test_likelihood_weighting_is_g_squared_times_the_error_of_the_score(objective, kind):
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
    expected = (g_squared * (0.1 / n.flatten()) ** 2).mean().item()  # the score errs by 0.1 / n
    assert loss.item() == pytest.approx(expected, rel=1e-2)
    plain, _, _ = loss_and_draws(scheduler, network, images())
    assert plain.item() == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize(("objective", "kind"), ALL)
def test_heldout_loss_is_the_error_of_the_noise_whatever_the_objective(objective, kind):
    scheduler, clean_images = SDEScheduler(objective=objective, prediction_type=kind), images(40)
    generator = torch.Generator().manual_seed(0)
    torch.randperm(40, generator=generator)
    noise = torch.randn(clean_images.shape, generator=generator)
    losses = heldout_loss(OracleNetwork(scheduler, clean_images, noise, 0.2), scheduler, clean_images, batch_size=40)
    assert set(losses) == {"heldout_loss", *(f"heldout_loss_q{q}" for q in (1, 2, 3, 4))}
    for value in losses.values():
        assert value == pytest.approx(0.04, rel=2e-2)


@pytest.mark.parametrize(("objective", "kind"), ALL)
def test_the_target_is_what_turns_the_noisy_image_into_the_clean_one(objective, kind):
    """c_skip x + c_out F = x_0 with the coefficients of the scheduler, at the ends of the times too."""
    scheduler, clean_images, noise = (
        SDEScheduler(objective=objective, prediction_type=kind),
        images(5).double(),
        images(5).double().flip(0),
    )
    positions = torch.tensor([0.0, 1e-3, 0.3, 0.7, 1 - 2**-25], dtype=torch.float64)
    task = score_regression(scheduler, clean_images, noise, positions)
    times = scheduler.times(positions)
    c_skip, c_out, c_in, c_noise = (value.view(-1, 1, 1, 1) for value in scheduler.preconditioning(times))
    torch.testing.assert_close(c_skip * task.inputs / c_in + c_out * task.target, clean_images, rtol=0, atol=1e-7)
    assert torch.equal(task.times, c_noise.flatten())


@pytest.mark.parametrize(("objective", "kind"), ALL)
def test_noise_images_and_loss_are_float32_and_small_times_are_not_lost(objective, kind):
    scheduler, clean_images, noise = (
        SDEScheduler(objective=objective, prediction_type=kind),
        images(4),
        images(4).flip(0),
    )
    positions = torch.tensor([0.0, 1e-6, 1e-3, 1 - 2**-25], dtype=torch.float64)
    task = score_regression(
        scheduler, clean_images, noise, positions, likelihood_weighting=(objective, kind) in ALL[:-2]
    )
    exact = score_regression(
        scheduler, clean_images.double(), noise.double(), positions, (objective, kind) in ALL[:-2]
    )
    for name in ("inputs", "times", "target", "loss_weight", "noise_weight"):
        value = getattr(task, name)
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
        torch.testing.assert_close(value.double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("objective", "kind"), [("ve", "score"), ("edm", "edm")])
def test_noise_levels_must_reach_from_the_image_to_pure_noise(objective, kind):
    grey = [torch.full((3, 4, 4), -0.3), torch.full((3, 4, 4), 0.5)]  # root mean square 0.412

    def check(**sigmas):
        check_noise_levels(SDEScheduler(objective=objective, prediction_type=kind, **sigmas), grey)

    check()
    check(sigma_min=0.041, sigma_max=8.25)
    with pytest.raises(ValueError, match=r"--sigma_max is 8.2, .* root mean square 0.412; take at least 8.25"):
        check(sigma_max=8.2)
    with pytest.raises(ValueError, match=r"--sigma_min is 0.042, .* root mean square 0.412; take at most 0.0412"):
        check(sigma_min=0.042)
