"""The estimate of the memory against a count by hand."""

import pytest
import torch

from custom_unet import CustomUNet2DModel
from training.config import TrainConfig
from training.summary import activation_bytes, duration, levels_without_time, objective_text, preflight_summary


def test_activations_of_two_linear_layers():
    first, second = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4, bias=False)
    images = torch.randn(32, 8)
    parameters = [first.weight, second.weight]
    # kept: the input (32 x 8), the output of relu (32 x 16) once, what is squared (32 x 4); the weights are parameters
    counted = activation_bytes(lambda: second(first(images).relu()).square().sum(), parameters)
    assert counted == 4 * 32 * (8 + 16 + 4)


def test_gradient_checkpointing_lowers_the_estimate():
    network = CustomUNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).train()

    def count() -> int:
        return activation_bytes(lambda: network(torch.randn(4, 3, 8, 8), 5).sample.sum(), list(network.parameters()))

    plain = count()
    network.enable_gradient_checkpointing()
    assert count() < 0.6 * plain


def test_the_objective_is_told_with_its_settings():
    def text(**settings) -> str:
        return objective_text(TrainConfig(dataset_name="synthetic-faces", max_train_steps=1, **settings))

    assert text() == "epsilon, linear, 1000 timesteps"
    assert text(objective="vp", likelihood_weighting=True) == (
        "vp SDE, epsilon, beta from 0.1 to 20, likelihood weighting"
    )
    assert text(objective="ve", time_embedding_type="fourier") == "ve SDE, sigma from 0.02 to 100"
    assert text(objective="flow", time_density="logit_normal") == "flow, logit_normal times"
    assert text(objective="edm", sigma_max=50) == (
        "edm, sigma from 0.002 to 50, in training ln(sigma) ~ N(-1.2, 1.2^2), sigma_data 0.5"
    )


@pytest.mark.parametrize(
    ("groups", "how", "deaf"), [(8, "default", [0]), (4, "default", []), (16, "default", [1]), (8, "scale_shift", [])]
)
def test_levels_that_group_norm_makes_deaf_to_the_time_are_found(groups, how, deaf):
    """Against the output of the residual blocks of each level at two times."""
    settings = {"norm_num_groups": groups, "resnet_time_scale_shift": how, "block_out_channels": [8, 16]}
    if groups == 16:
        settings["block_out_channels"] = [32, 16]
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    config = TrainConfig(
        dataset_name="synthetic-faces", max_train_steps=1, resolution=8, add_attention=False, **settings, **blocks
    )
    assert levels_without_time(config) == deaf
    network = CustomUNet2DModel(**config.unet_kwargs())
    for level, block in enumerate(network.down_blocks):
        resnet = block.resnets[-1]
        hidden = torch.randn(2, resnet.conv1.in_channels, 8, 8)
        first, second = (resnet(hidden, torch.randn(2, resnet.time_emb_proj.in_features)) for _ in range(2))
        assert torch.allclose(first, second, atol=1e-4) == (level in deaf)


@pytest.mark.parametrize(("post_hoc_ema", "copies"), [(False, 5), (True, 7)])
def test_precision_and_memory_are_told(post_hoc_ema, copies):
    config = TrainConfig(
        dataset_name="synthetic-faces",
        max_train_steps=1,
        resolution=8,
        mixed_precision="bf16",
        post_hoc_ema=post_hoc_ema,
    )
    network = torch.nn.Conv2d(3, 2**18 // 27, 3, bias=False)  # a mebibyte
    facts = {"source": "synthetic-faces", "num_images": 1, "num_heldout_images": 0, "num_classes": None}
    facts |= {"num_processes": 1, "total_steps": 1, "step": 0, "device": "cpu"}
    text = preflight_summary(config, network, lambda images: network(images).square().sum(), **facts)
    assert "device             cpu, precision bf16" in text
    assert f"memory             {copies} MiB for weights" in text


def test_duration():
    assert duration(3 * 3600 + 5 * 60 + 7.4) == "3:05:07"
