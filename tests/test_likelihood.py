"""Both likelihoods on Gaussian data with known bits/dim; `planted_faults.yaml` has faults that they must find."""

import math

import numpy as np
import pytest
import torch
from exact_denoiser import ExactDenoiser, Mixture, mixture
from exact_gaussian import CORRELATED, INDEPENDENT, ExactGaussian, draw_images, exact_network, make_scheduler
from exact_sde import exact_sde_network
from scipy.stats import norm
from tiny_pipeline import tiny_pipeline
from torch import Tensor

from common import InputError
from eval import likelihood
from eval.likelihood import BIN_WIDTH, discrete_decoder, log_density, ode_likelihood, variational_bound
from pipelines.continuous import denoiser
from training.data import to_model_range
from training.sde import PREDICTION_TYPES as OBJECTIVES
from training.sde import SDEScheduler

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def bits_per_dim(nats: Tensor, num_dims: int = 3) -> np.ndarray:
    return (nats / (num_dims * math.log(2))).numpy()


def discrete_nats(images: Tensor, data: Mixture) -> Tensor:
    """Negative log probability of the images' bins under independent Gaussians, nats, shape (N,)."""
    centre = to_model_range(images).double().permute(0, 2, 3, 1)
    std = data.covariances[0].diag().sqrt()
    upper, lower = ((centre - data.means + half) / std for half in (BIN_WIDTH / 2, -BIN_WIDTH / 2))
    return -torch.from_numpy(np.log(norm.cdf(upper) - norm.cdf(lower))).sum(dim=(1, 2, 3))


# ---- The variational bound: its parts


@pytest.mark.parametrize("std", [1e-3, 0.0074, 0.3])
@pytest.mark.parametrize("mean", [-1.2, -1.0, 0.1234, 0.999, 1.5])
def test_decoder_probabilities_sum_to_one(mean, std):
    values = torch.arange(256, dtype=torch.uint8)
    log_probabilities = discrete_decoder(values, torch.full((256,), mean).double(), std)
    assert log_probabilities.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_probabilities.isfinite().all()


def test_decoder_is_precise_far_from_the_mean():
    values = torch.tensor([0, 255], dtype=torch.uint8)
    std = 0.01
    found = discrete_decoder(values, torch.tensor([0.5, -0.5]).double(), std)
    expected = norm.logcdf((-1 + BIN_WIDTH / 2 - 0.5) / std)  # of e^-11,000, which is 0 as a float
    np.testing.assert_allclose(found, [expected, expected], rtol=1e-9)


def test_prior_term_matches_the_kl_divergence():
    clean_images = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    for abar in (0.3, 1e-5):
        q = torch.distributions.Normal(math.sqrt(abar) * clean_images, math.sqrt(1 - abar))
        standard = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
        expected = torch.distributions.kl_divergence(q, standard).sum(dim=(1, 2, 3))
        found = likelihood.prior_term(clean_images, torch.tensor(abar).double())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    assert likelihood.prior_term(clean_images, torch.zeros(()).double()).tolist() == [0] * 5


@pytest.mark.parametrize("variance", likelihood.VARIANCES)
def test_variance_of_the_last_reverse_step_is_that_of_the_one_before(variance):
    """As in the authors' code; beta-tilde is 0 at timestep 0, and beta is larger."""
    abar = make_scheduler().alphas_cumprod.double()
    _, posterior_variance, model_variance = likelihood.posterior_of(abar, variance)
    assert model_variance[0] == posterior_variance[1] < 1 - abar[0]


# ---- The variational bound: its terms and their sum


def expected_terms(images: Tensor, data: Mixture, scheduler, variance: str) -> tuple[Tensor, Tensor]:
    """Mean and variance, over the noise, of L_t of each image for t = 1 to T - 1 in nats, shape (N, T - 1).

    For a Gaussian, along each eigenvector of its covariance, x_0 - E[x_0 | x_t] = a - b epsilon.
    """
    variances, directions = torch.linalg.eigh(data.covariances[0])
    centred = (to_model_range(images).double().flatten(1) - data.means) @ directions
    abar = scheduler.alphas_cumprod.double()
    previous, abar = abar[:-1, None], abar[1:, None]
    marginal = abar * variances + 1 - abar
    a = centred[:, None] * (1 - abar) / marginal  # (N, T - 1, 3)
    b = (abar * (1 - abar)).sqrt() * variances / marginal
    beta = 1 - abar / previous
    posterior_variance = beta * (1 - previous) / (1 - abar)
    s2 = {"fixed_small": posterior_variance, "fixed_large": beta}[variance]
    weight = previous * beta**2 / (1 - abar) ** 2 / (2 * s2)
    constant = 3 * ((s2 / posterior_variance).log() - 1 + posterior_variance / s2) / 2
    mean = constant.T + (weight * (a**2 + b**2)).sum(-1)
    return mean, (weight**2 * (4 * a**2 * b**2 + 2 * b**4)).sum(-1)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("prediction_type", "data"), [("epsilon", INDEPENDENT), ("v_prediction", CORRELATED)])
def test_bound_terms_match_the_closed_form(prediction_type, data, variance):
    scheduler, images = make_scheduler(prediction_type), draw_images(data, 48)
    network = exact_network(ExactGaussian, data, scheduler)
    found = variational_bound(network, scheduler, images, variance=variance, batch_size=4096)
    mean, spread = expected_terms(images, data, scheduler, variance)
    error = 3 * math.log(2) * torch.from_numpy(found.terms[1:]) - mean.mean(0)
    deviations = error / (spread.sum(0).sqrt() / len(images))
    assert deviations.abs().max() < 5, f"term of timestep {deviations.abs().argmax() + 1}"
    assert (found.terms >= 0).all()
    sums = found.bits_per_dim - found.decoder - found.prior
    np.testing.assert_allclose(sums.mean(), np.sum(found.terms[1:]), rtol=1e-9)
    np.testing.assert_allclose(found.decoder.mean(), found.terms[0], rtol=1e-9)
    total = (sums.mean() - bits_per_dim(mean.sum(1)).mean()) / bits_per_dim(spread.sum().sqrt() / len(images))
    assert abs(total) < 3, f"sum of the terms: {total}"


@pytest.mark.parametrize("num_evaluations", [2, 12])
def test_monte_carlo_estimate_is_unbiased(num_evaluations):
    scheduler, images = make_scheduler(), draw_images(CORRELATED, 3000)
    network = exact_network(ExactGaussian, CORRELATED, scheduler)
    found = variational_bound(network, scheduler, images, num_evaluations=num_evaluations, batch_size=4096)
    expected = bits_per_dim(expected_terms(images, CORRELATED, scheduler, "fixed_small")[0].sum(1))
    errors = found.bits_per_dim - found.decoder - found.prior - expected
    assert abs(errors.mean()) < 3 * likelihood.standard_error(errors)


def test_bound_supports_zero_terminal_snr():
    scheduler, images = make_scheduler(rescale_betas_zero_snr=True), draw_images(INDEPENDENT, 16, size=16)
    network = exact_network(ExactGaussian, INDEPENDENT, scheduler)
    found = variational_bound(network, scheduler, images, variance="fixed_large", batch_size=1000)
    gap = found.bits_per_dim - bits_per_dim(discrete_nats(images, INDEPENDENT), images[0].numel())
    assert -3 * likelihood.standard_error(gap) < gap.mean() < 0.15
    assert found.prior.tolist() == [0] * 16
    with pytest.raises(InputError, match="zero signal"):
        variational_bound(network, make_scheduler("epsilon", rescale_betas_zero_snr=True), images)


# ---- The probability-flow ODE


def smoothed_log_density(data: Mixture, points: Tensor, sigma: float) -> Tensor:
    log_densities, _ = data.at(1.0, sigma).log_densities(points.flatten(1))
    return log_densities.logsumexp(-1) - points[0].numel() * math.log(2 * math.pi) / 2


def exact_probes(points: Tensor) -> Tensor:
    """Unit vectors, for which the trace is exact, (D, B, C, H, W)."""
    unit_vectors = torch.eye(points[0].numel(), dtype=torch.float64).view(-1, 1, *points.shape[1:])
    return unit_vectors.expand(-1, *points.shape)


def typical_points(data: Mixture, num_points: int = 16) -> Tensor:
    """Typical points of the data, (N, 3, 1, pixels)."""
    generator = torch.Generator().manual_seed(1)
    component = torch.arange(num_points) % len(data.weights)
    noise = torch.randn(num_points, data.means.shape[1], 1, generator=generator, dtype=torch.float64)
    x = data.means[component] + (torch.linalg.cholesky(data.covariances)[component] @ noise)[..., 0]
    return x.view(num_points, 3, 1, -1)


@pytest.mark.parametrize("model", [*PREDICTION_TYPES, *OBJECTIVES])
def test_log_density_of_a_mixture_converges_with_the_tolerance(model):
    points = typical_points(mixture())
    if model in OBJECTIVES:
        scheduler = SDEScheduler(objective=model, prediction_type=OBJECTIVES[model][0])
        network = exact_sde_network(mixture(), scheduler)
    else:
        scheduler = make_scheduler(model)
        network = exact_network(ExactDenoiser, mixture(), scheduler)
    expected = smoothed_log_density(mixture(), points, denoiser(network, scheduler).sde.noise_levels[0])
    errors, evaluations = [], []
    for tolerance in (1e-3, 1e-5):
        found, count = log_density(denoiser(network, scheduler), points, exact_probes(points), tolerance)
        errors.append(float((found - expected).abs().max()))
        evaluations.append(count)
    assert errors[0] < 0.3
    assert errors[1] < min(0.02, errors[0] / 5)  # the rest: at the last time, x is not quite the prior
    assert 50 < evaluations[0] < evaluations[1] < 250


def test_log_density_is_exact_for_linear_and_zero_snr_schedules():
    for settings in ({"beta_schedule": "linear"}, {"rescale_betas_zero_snr": True}):
        scheduler = make_scheduler(**settings)
        network = exact_network(ExactDenoiser, CORRELATED, scheduler)
        abar = scheduler.alphas_cumprod.double().clamp(min=2**-24)  # as diffusers' sigma-type schedulers do
        network.set_data(CORRELATED, abar)
        points = typical_points(CORRELATED)
        found, _ = log_density(denoiser(network, scheduler), points, exact_probes(points), 1e-6)
        expected = smoothed_log_density(CORRELATED, points, network.sigmas[0])
        # x_T is not quite N(0, I): its mean and variance differ by sqrt(abar_T) and abar_T
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 + 2 * float(abar[-1].sqrt()))


@pytest.mark.parametrize("data", [INDEPENDENT, CORRELATED], ids=["independent", "correlated"])
def test_ode_likelihood_matches_the_closed_form(data):
    """Up to the standard error of the draws; the data's known entropy, up to that of images and draws together."""
    images, scheduler = draw_images(data, 250), make_scheduler()
    network = exact_network(ExactDenoiser, data, scheduler)
    bits, _ = ode_likelihood(network, scheduler, images.repeat(4, 1, 1, 1), tolerance=1e-5, batch_size=1000)
    draws = bits.reshape(4, 250)  # of dequantisation noise and probe
    draw_standard_error = math.sqrt(draws.var(0, ddof=1).mean() / draws.size)
    sigma = denoiser(network, scheduler).sde.noise_levels[0]
    precision = torch.linalg.inv(data.covariances[0] + sigma**2 * torch.eye(3).double())
    density = smoothed_log_density(data, to_model_range(images).double(), sigma)
    nats = precision.trace() * (2 / 255) ** 2 / 24 - density
    expected = bits_per_dim(nats - 3 * math.log(2 / 255)).mean()
    assert abs(draws.mean() - expected) < 3 * draw_standard_error + 1e-5
    entropy = data.covariances[0].logdet() / 2 + 1.5 * math.log(2 * math.pi * math.e) - 3 * math.log(2 / 255)
    standard_error = likelihood.standard_error(draws.mean(0))
    assert abs(draws.mean() - float(bits_per_dim(entropy))) < 3 * standard_error + 0.01
    assert draw_standard_error < 0.03 < standard_error < 0.1


def model_log_density(data: Mixture, points: Tensor, sde) -> Tensor:
    """Log-density of a model with a short SDE on Gaussian data, for which the ODE is linear along each eigenvector.

    From sigma_0 to sigma_T, y = x / alpha follows y_T - m = ((C + sigma_T^2) / (C + sigma_0^2))^(1/2) (y_0 - m).
    """
    variances, directions = torch.linalg.eigh(data.covariances[0])
    first, last = sde.noise_levels
    stretch = ((variances + last**2) / (variances + first**2)).sqrt()
    end = data.means + (stretch * ((points.flatten(1) - data.means) @ directions)) @ directions.T
    std = sde.prior_std / float(sde.signal_scale(torch.tensor(sde.last_time).double()))
    prior = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), std)
    return prior.log_prob(end).sum(1) + stretch.log().sum()


@pytest.mark.parametrize(
    ("objective", "prediction_type"), [(o, p) for o, ps in OBJECTIVES.items() for p in ps if o != "flow"]
)
def test_log_density_is_exact_for_sdes_that_end_far_from_their_prior(objective, prediction_type):
    scheduler = SDEScheduler(
        objective=objective, prediction_type=prediction_type, beta_max=2.0, sigma_min=0.01, sigma_max=2.0
    )
    points, network = typical_points(CORRELATED), exact_sde_network(CORRELATED, scheduler)
    expected = model_log_density(CORRELATED, points, scheduler.sde)
    assert (expected - smoothed_log_density(CORRELATED, points, scheduler.sde.noise_levels[0])).abs().max() > 0.01
    found, _ = log_density(denoiser(network, scheduler), points, exact_probes(points), 1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


# ---- Networks, batch sizes, bad input


def random_images(num_images: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (num_images, 3, 8, 8), generator=generator, dtype=torch.uint8)


def test_bound_does_not_depend_on_the_batch_size():
    model = tiny_pipeline().unet.eval(), make_scheduler()
    one, four = (variational_bound(*model, random_images(), num_evaluations=5, batch_size=size) for size in (1, 4))
    np.testing.assert_allclose(four.bits_per_dim, one.bits_per_dim, rtol=1e-4)


def test_ode_likelihood_does_not_depend_on_the_batch_size():
    scheduler, images = make_scheduler(), draw_images(CORRELATED, 6)
    network = exact_network(ExactDenoiser, CORRELATED, scheduler)
    whole, parts = (ode_likelihood(network, scheduler, images, tolerance=1e-5, batch_size=size)[0] for size in (6, 4))
    np.testing.assert_allclose(parts, whole, atol=1e-3)


@pytest.mark.parametrize("function", [variational_bound, ode_likelihood])
def test_nan_weights_raise_input_errors(function):
    network = tiny_pipeline().unet.eval()
    network.conv_out.weight.data[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        function(network, make_scheduler(), random_images())
