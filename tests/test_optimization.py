"""Optimizer, learning rate and moving average compared with closed forms, torch and diffusers."""

import math

import pytest
import torch
from diffusers.training_utils import EMAModel
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from training.config import TrainConfig
from training.optimization import build_optimizer, ema_decay, learning_rate_schedule, update_ema


def make_config(**changes) -> TrainConfig:
    return TrainConfig(dataset_name="synthetic-faces", max_train_steps=100, **changes)


def test_cosine_warms_up_and_ends_at_zero():
    learning_rate_at = learning_rate_schedule(make_config(learning_rate=2.0, lr_warmup_steps=10), 100)
    expected = {0: 0, 5: 1, 10: 2, 55: 1, 78: 1 + math.cos(math.pi * 68 / 90), 100: 0}
    assert {step: learning_rate_at(step) for step in expected} == pytest.approx(expected, abs=1e-12)


def test_ema_matches_diffusers():
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
    for ours, theirs in zip(ema_network.parameters(), reference.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert decay == 0.9


@pytest.mark.parametrize(("precision", "matrix_atol"), [("bf16", 1e-6), ("no", 1e-3)])  # torch's Muon computes in bf16
def test_muon_matches_torch_muon_on_matrices_and_adamw_elsewhere(precision, matrix_atol):
    """A convolution kernel is the matrix (out, in * height * width); here one is wide, the other tall."""
    torch.manual_seed(0)
    config = make_config(optimizer="muon", learning_rate=0.02, adam_weight_decay=0.1, mixed_precision=precision)
    network = torch.nn.ModuleDict({"wide": torch.nn.Conv2d(6, 12, 2), "tall": torch.nn.Conv2d(2, 12, 2)})
    network["conv_out"] = torch.nn.Linear(6, 5)
    ours = list(network.parameters())
    theirs = [torch.nn.Parameter(p.detach().clone().flatten(1) if p.ndim == 4 else p.detach().clone()) for p in ours]
    matrices, others = [theirs[0], theirs[2]], [theirs[1], *theirs[3:]]
    settings = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    optimizers = [
        build_optimizer(config, network),
        torch.optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW(others, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, **settings),
    ]
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.view_as(other).clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        atol = matrix_atol if one.ndim == 4 else 1e-6  # five steps add up to 0.1
        torch.testing.assert_close(one.view_as(other), other, atol=atol, rtol=0)


def test_muon_gets_only_the_hidden_matrices_of_the_network():
    network = CustomUNet2DModel(**TINY)
    names = {parameter: name for name, parameter in network.named_parameters()}
    groups = build_optimizer(make_config(optimizer="muon"), network).param_groups
    others, matrices = ({names[parameter] for parameter in group["params"]} for group in groups)
    assert matrices.isdisjoint(others)
    assert matrices | others == set(names.values())
    assert {f"{name}.weight" for name in "conv_in conv_out time_embedding.linear_1 conv_norm_out".split()} <= others
    assert {f"mid_block.resnets.0.{name}.weight" for name in ("conv1", "time_emb_proj")} <= matrices
