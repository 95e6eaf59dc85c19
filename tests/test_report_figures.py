"""The figures in REPORT.md: the drawn network is the real one, and ratios and weights match the closed forms."""

import numpy as np
import torch

from custom_unet import CustomUNet2DModel
from experiments.report_figures import layers_of, main, signal_to_noise


def test_layers_are_in_forward_order_with_their_skip_connections():
    with torch.device("meta"):
        network = CustomUNet2DModel(
            block_out_channels=(8, 16, 24),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            norm_num_groups=4,
        ).eval()
    layers = layers_of(network, 16)
    kinds = "conv resnet down attention down resnet attention resnet resnet resnet up attention attention up"
    assert [layer.kind for layer in layers] == [*kinds.split(), "resnet", "resnet", "conv"]
    assert [layer.side for layer in layers] == [16, 16, 8, 8, 4, 4, 4, 4, 4, 4, 8, 8, 8, 16, 16, 16, 16]
    taking = [place for place, layer in enumerate(layers) if layer.skip_from is not None]
    assert [layers[place].skip_from for place in taking] == [5, 4, 3, 2, 1, 0]
    convolutions = [resnet.conv1 for block in network.up_blocks for resnet in block.resnets]
    for place, convolution in zip(taking, convolutions, strict=True):
        source = layers[layers[place].skip_from]
        assert convolution.in_channels == layers[place - 1].channels + source.channels


def test_signal_to_noise_matches_the_closed_forms():
    beta = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - beta)
    np.testing.assert_allclose(signal_to_noise("linear"), abar / (1 - abar), rtol=2e-3)  # the scheduler is float32
    t = np.arange(1000)
    ratio = np.cos(((t + 1) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    start = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    abar = (ratio / start)[:990]  # before betas are clipped at 0.999
    np.testing.assert_allclose(signal_to_noise("cosine")[:990], abar / (1 - abar), rtol=5e-3)


def test_command_writes_the_figures(tmp_path):
    assert main(["--out", str(tmp_path)]) == 0
    figures = {f"{name}.png" for name in ("unet", "time_embedding", "forward", "schedules", "weights", "progress")}
    assert {path.name for path in tmp_path.iterdir()} == figures
