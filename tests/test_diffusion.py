"""The mathematics of training against diffusers' schedulers and closed forms."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr

from training import diffusion

KINDS = ["epsilon", "sample", "v_prediction"]
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def scheduler_of(prediction_type="epsilon", beta_schedule="linear", zero_snr=False, num_train_timesteps=1000):
    return diffusion.make_noise_scheduler(num_train_timesteps, beta_schedule, 1e-4, 0.02, prediction_type, zero_snr)


class OracleNetwork(torch.nn.Module):
    """Predicts perfectly, up to a constant error in the noise: it is told the noise."""

    def __init__(self, scheduler, clean_images, noise, noise_error=0.0):
        super().__init__()
        self.scheduler, self.clean_images, self.noise, self.noise_error = scheduler, clean_images, noise, noise_error
        self.device_anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, noisy_images, timesteps, class_labels=None):
        noise = self.noise + self.noise_error
        signal, sigma = diffusion.signal_and_noise_scale(self.scheduler, timesteps)
        clean_images = (noisy_images - sigma * noise) / signal
        output = {"epsilon": noise, "sample": clean_images, "v_prediction": signal * noise - sigma * clean_images}
        return type("Output", (), {"sample": output[self.scheduler.config.prediction_type]})


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", KINDS)
def test_a_perfect_prediction_is_turned_back_into_the_image_by_diffusers(prediction_type, beta_schedule):
    scheduler = scheduler_of(prediction_type, beta_schedule)
    clean_images, noise = torch.randn(2, 3, 4, 4).clamp(-1, 1), torch.randn(2, 3, 4, 4)
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(1000)
    for t in [0, 100, 500, 900]:
        timesteps = torch.tensor([t, t])
        noisy_images = scheduler.add_noise(clean_images, noise, timesteps)
        target = diffusion.prediction_target(scheduler, clean_images, noise, timesteps)
        step = ddim.step(target, t, noisy_images)
        torch.testing.assert_close(step.pred_original_sample, clean_images, atol=2e-3, rtol=0)


def test_velocity_is_diffusers_velocity():
    scheduler = scheduler_of("v_prediction", "squaredcos_cap_v2", zero_snr=True)
    clean_images, noise, timesteps = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    expected = DDPMScheduler.from_config(scheduler.config).get_velocity(clean_images, noise, timesteps)
    torch.testing.assert_close(diffusion.prediction_target(scheduler, clean_images, noise, timesteps), expected)


@pytest.mark.parametrize("prediction_type", KINDS)
def test_min_snr_weight(prediction_type):
    """The published formula per prediction type, with diffusers' own SNR."""
    scheduler = scheduler_of(prediction_type, "squaredcos_cap_v2")
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps)
    capped = torch.minimum(snr, torch.tensor(5.0))
    expected = {"epsilon": capped / snr, "sample": capped, "v_prediction": capped / (snr + 1)}[prediction_type]
    torch.testing.assert_close(diffusion.loss_weight(scheduler, timesteps, 5.0), expected, rtol=1e-4, atol=1e-8)
    assert (diffusion.loss_weight(scheduler, timesteps, None) == 1).all()


@pytest.mark.parametrize("prediction_type", KINDS)
def test_soft_min_snr_weight_and_that_it_tends_to_min_snr_far_from_gamma(prediction_type):
    """The published formula per prediction type, for x_0 1 / (sigma^2 + 1 / gamma), with diffusers' own SNR."""
    scheduler = scheduler_of(prediction_type, "squaredcos_cap_v2")
    timesteps, gamma = torch.arange(1000), 5.0
    snr = compute_snr(scheduler, timesteps)
    of_clean = 1 / (1 / snr + 1 / gamma)
    expected = {"epsilon": of_clean / snr, "sample": of_clean, "v_prediction": of_clean / (snr + 1)}[prediction_type]
    weight = diffusion.loss_weight(scheduler, timesteps, gamma, "soft_min")
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-9)

    ratio = weight / diffusion.loss_weight(scheduler, timesteps, gamma)
    far, at_gamma = (snr < gamma / 200) | (snr > gamma * 200), (snr - gamma).abs().argmin()
    assert min((snr[far] < gamma).sum(), (snr[far] > gamma).sum()) > 10
    assert (ratio[far] > 0.995).all()
    assert (ratio < 1 + 1e-6).all()
    assert ratio.min() == ratio[at_gamma]
    assert ratio[at_gamma].item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("snr_weighting", ["min", "soft_min"])
def test_min_snr_losses_of_the_three_parametrisations_agree(snr_weighting):
    """One and the same prediction costs the same, whichever way it is expressed."""
    torch.manual_seed(0)
    clean_images, noise = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    timesteps, costs = torch.tensor([5, 50, 150, 300, 450, 600, 750, 900]), []
    for prediction_type in KINDS:
        scheduler = scheduler_of(prediction_type)
        network = OracleNetwork(scheduler, clean_images, noise, noise_error=0.1)
        noisy_images = scheduler.add_noise(clean_images, noise, timesteps)
        target = diffusion.prediction_target(scheduler, clean_images, noise, timesteps)
        error = diffusion.per_image_mse(network(noisy_images, timesteps).sample, target)
        costs.append(diffusion.loss_weight(scheduler, timesteps, 5.0, snr_weighting) * error)
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(costs[0], costs[2], rtol=1e-3, atol=0)


def test_zero_terminal_snr():
    assert scheduler_of("v_prediction", zero_snr=True).alphas_cumprod[-1] == 0
    assert scheduler_of("v_prediction", zero_snr=False).alphas_cumprod[-1] > 0


@pytest.mark.parametrize("how", ["uniform", "stratified", "antithetic"])
def test_positions_are_uniform_and_so_are_their_timesteps(how):
    torch.manual_seed(0)
    draws = torch.cat([diffusion.sample_positions(how, 7) for _ in range(6000)])
    assert draws.dtype == torch.float64
    assert 0 < draws.min() < draws.max() < 1
    frequencies = torch.bincount((10 * draws).long(), minlength=10) / len(draws)
    assert len(frequencies) == 10
    torch.testing.assert_close(frequencies, torch.full((10,), 0.1), atol=0.01, rtol=0)
    timesteps = timesteps_of(draws, 10)
    assert timesteps.dtype == torch.int64
    assert torch.equal(timesteps, (10 * draws).floor().long())


def timesteps_of(positions, num_train_timesteps=1000):
    scheduler, images = scheduler_of(num_train_timesteps=num_train_timesteps), torch.zeros(len(positions), 1, 1, 1)
    return diffusion.timestep_regression(scheduler, images, images, positions, None).times


def test_stratified_positions_fill_every_stratum():
    for _ in range(50):
        positions = diffusion.sample_positions("stratified", 8)
        torch.testing.assert_close(positions.sort().values.diff(), torch.full((7,), 1 / 8, dtype=torch.float64))


def test_antithetic_timesteps_come_in_pairs():
    torch.manual_seed(0)
    for _ in range(200):
        timesteps = timesteps_of(diffusion.sample_positions("antithetic", 9))
        assert len(timesteps) == 9
        assert (timesteps[:4] + timesteps[5:] == 999).all()


def test_positions_keep_off_the_borders_of_timesteps(monkeypatch):
    """Where the random number is one of float32's extremes or on a border, pairs still are pairs."""
    extremes = torch.tensor([0.0, 1 - 2**-24, 0.5, 0.125, 0.875])
    monkeypatch.setattr(torch, "rand", lambda count: extremes[:count])
    timesteps = timesteps_of(diffusion.sample_positions("antithetic", 10))
    assert (timesteps[:5] + timesteps[5:] == 999).all()
    assert timesteps[:2].tolist() == [0, 999]


def test_labels_are_dropped_with_their_probability_and_kept_otherwise():
    torch.manual_seed(0)
    labels = torch.arange(4).repeat(5000)
    after = diffusion.drop_labels(labels, 4, 0.3)
    dropped = after == 4
    assert torch.equal(after[~dropped], labels[~dropped])
    for label in range(4):
        assert dropped[labels == label].double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(diffusion.drop_labels(labels, 4, 0.0), labels)


@pytest.mark.parametrize("prediction_type", KINDS)
def test_training_loss_of_a_known_error(prediction_type):
    """With the noise off by 0.1 everywhere the simple epsilon loss is 0.01; the others follow from the SNR."""
    scheduler = scheduler_of(prediction_type)
    torch.manual_seed(3)
    clean_images = torch.randn(4, 3, 4, 4)
    torch.manual_seed(5)
    noise = torch.randn_like(clean_images)
    timesteps = timesteps_of(diffusion.sample_positions("stratified", 4))
    network = OracleNetwork(scheduler, clean_images, noise, noise_error=0.1)
    torch.manual_seed(5)
    loss = diffusion.diffusion_loss(network, scheduler, clean_images, "stratified", None)
    snr = compute_snr(scheduler, timesteps)
    factor = {"epsilon": torch.ones(4), "sample": 1 / snr, "v_prediction": (snr + 1) / snr}[prediction_type]
    assert loss.item() == pytest.approx((0.01 * factor).mean().item(), rel=1e-3)


def test_training_loss_has_the_weight_that_was_asked_for():
    scheduler, losses = scheduler_of("v_prediction"), {}
    torch.manual_seed(3)
    clean_images = torch.randn(4, 3, 4, 4)
    torch.manual_seed(5)
    noise, timesteps = torch.randn_like(clean_images), timesteps_of(diffusion.sample_positions("stratified", 4))
    network = OracleNetwork(scheduler, clean_images, noise, noise_error=0.1)
    for how in ("min", "soft_min"):
        torch.manual_seed(5)
        losses[how] = diffusion.diffusion_loss(network, scheduler, clean_images, "stratified", 5.0, how).item()
    snr = compute_snr(scheduler, timesteps)
    assert losses["min"] == pytest.approx((0.01 * snr.clamp(max=5) / snr).mean().item(), rel=1e-3)
    assert losses["soft_min"] == pytest.approx((0.01 * 5 / (snr + 5)).mean().item(), rel=1e-3)


@pytest.mark.parametrize("prediction_type", KINDS)
def test_heldout_loss_is_the_simple_loss_whatever_the_parametrisation(prediction_type):
    scheduler = scheduler_of(prediction_type)
    clean_images = torch.randn(40, 3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    torch.randperm(40, generator=generator)
    noise = torch.randn(clean_images.shape, generator=generator)
    network = OracleNetwork(scheduler, clean_images, noise, noise_error=0.2)
    losses = diffusion.heldout_loss(network, scheduler, clean_images, batch_size=40)
    assert set(losses) == {"heldout_loss", *(f"heldout_loss_q{q}" for q in (1, 2, 3, 4))}
    for value in losses.values():
        assert value == pytest.approx(0.04, rel=2e-2)


def test_heldout_loss_does_not_depend_on_the_batch_size_or_the_global_generator():
    class Network(torch.nn.Conv2d):
        def forward(self, images, timesteps, class_labels=None):
            return type("Output", (), {"sample": super().forward(images) * timesteps.view(-1, 1, 1, 1) / 1000})

    torch.manual_seed(0)
    network, images, scheduler = Network(3, 3, 1), torch.randn(13, 3, 4, 4), scheduler_of()
    first = diffusion.heldout_loss(network, scheduler, images, batch_size=13)
    assert diffusion.heldout_loss(network, scheduler, images, batch_size=4) == pytest.approx(first, rel=1e-6)
    quarters = [first[f"heldout_loss_q{q}"] for q in (1, 2, 3, 4)]
    assert len({round(value, 4) for value in quarters}) == 4  # a network that uses t differs between the quarters


def test_heldout_loss_refuses_too_few_images():
    with pytest.raises(ValueError, match="at least 4"):
        diffusion.heldout_loss(torch.nn.Linear(1, 1), scheduler_of(), torch.zeros(3, 3, 4, 4), 3)


@pytest.mark.parametrize(("sampler", "cls"), [("ddpm", DDPMScheduler), ("ddim", DDIMScheduler)])
def test_sampling_scheduler_has_the_same_forward_process(sampler, cls):
    scheduler = scheduler_of("v_prediction", "squaredcos_cap_v2", zero_snr=True)
    other = diffusion.make_sampling_scheduler(scheduler, sampler)
    assert type(other) is cls
    assert torch.equal(other.alphas_cumprod, scheduler.alphas_cumprod)
    other.set_timesteps(50)
    assert other.timesteps[0] == 999
    assert math.isclose(other.config.beta_end, 0.02)
