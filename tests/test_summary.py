"""The estimate of the memory against a count by hand."""

import torch

from training.config import TrainConfig
from training.summary import activation_bytes, duration, objective_text


def test_activations_of_two_linear_layers():
    first, second = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 4, bias=False)
    images = torch.randn(32, 8)
    parameters = [first.weight, second.weight]
    # kept: the input (32 x 8), the output of relu (32 x 16) once, what is squared (32 x 4); the weights are parameters
    counted = activation_bytes(lambda: second(first(images).relu()).square().sum(), parameters)
    assert counted == 4 * 32 * (8 + 16 + 4)


def test_gradient_checkpointing_lowers_the_estimate():
    from custom_unet import CustomUNet2DModel

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
    assert text(objective="edm", sigma_max=50) == (
        "edm, sigma from 0.002 to 50, in training ln(sigma) ~ N(-1.2, 1.2^2), sigma_data 0.5"
    )


def test_duration():
    assert duration(3 * 3600 + 5 * 60 + 7.4) == "3:05:07"
