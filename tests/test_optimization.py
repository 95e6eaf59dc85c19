"""Optimizer, learning rate and moving average against closed forms and diffusers."""

import math

import pytest
import torch
from diffusers.training_utils import EMAModel

from training.config import TrainConfig
from training.optimization import build_optimizer, ema_decay, learning_rate_schedule, update_ema


def config_of(**changes) -> TrainConfig:
    return TrainConfig(dataset_name="synthetic-faces", max_train_steps=100, **changes)


def test_cosine_warms_up_and_ends_at_zero():
    learning_rate_at = learning_rate_schedule(config_of(learning_rate=2.0, lr_warmup_steps=10), 100)
    assert learning_rate_at(0) == 0
    assert learning_rate_at(5) == pytest.approx(1.0)
    assert learning_rate_at(10) == pytest.approx(2.0)
    assert learning_rate_at(55) == pytest.approx(1.0)
    assert learning_rate_at(78) == pytest.approx(1 + math.cos(math.pi * 68 / 90))
    assert learning_rate_at(100) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("name", "at_50"), [("constant", 2.0), ("constant_with_warmup", 2.0), ("linear", 10 / 9)])
def test_other_schedules(name, at_50):
    config = config_of(learning_rate=2.0, lr_warmup_steps=10, lr_scheduler=name)
    assert learning_rate_schedule(config, 100)(50) == pytest.approx(at_50)


def test_ema_follows_diffusers():
    torch.manual_seed(0)
    network, ema_network = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    ema_network.load_state_dict(network.state_dict())
    reference = EMAModel(network.parameters(), decay=0.9, use_ema_warmup=True, inv_gamma=20.0, power=1.0)
    for step in range(1, 300):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        decay = ema_decay(step - 1, 20.0, 1.0, 0.9)
        assert decay == pytest.approx(reference.get_decay(step))
        reference.step(network.parameters())
        update_ema(ema_network, network, decay)
    for mine, theirs in zip(ema_network.parameters(), reference.shadow_params, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert decay == 0.9


def test_optimizer_takes_the_trainable_parameters_and_every_setting():
    network = torch.nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    config = config_of(adam_beta1=0.8, adam_beta2=0.7, adam_weight_decay=0.6, adam_epsilon=0.5, learning_rate=0.4)
    (group,) = build_optimizer(config, network).param_groups
    assert group["params"] == [network.weight]
    assert (group["betas"], group["weight_decay"], group["eps"], group["lr"]) == ((0.8, 0.7), 0.6, 0.5, 0.4)
