"""Networks with one part removed or replaced."""

import pytest
import torch
from tiny_network import TINY
from torch import nn

from custom_unet import CustomUNet2DModel
from experiments.unet_variants import VARIANTS

NETWORK = TINY | {"sample_size": 16}


def build(name: str, **more) -> CustomUNet2DModel:
    torch.manual_seed(0)
    return VARIANTS[name](**NETWORK | more).eval()


IMAGES, TIMESTEPS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])


@pytest.mark.parametrize(("name", "has_skips"), [("no_skips", False), ("added_skips", True), ("no_time", True)])
def test_only_no_skips_lets_nothing_bypass_the_bottleneck(name, has_skips):
    """The first convolution is detached from the contracting path, so that only its skip connection is left."""
    network = build(name)
    network.down_blocks[0].register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
    output, weight = network(IMAGES, TIMESTEPS).sample, network.conv_in.weight
    (gradient,) = torch.autograd.grad(output.sum(), weight, allow_unused=True)
    assert (gradient is not None and bool(gradient.any())) == has_skips


def test_added_skips_sum_features_and_projected_skips():
    block = build("added_skips").up_blocks[0]
    seen = {}
    block.resnets[0].register_forward_pre_hook(lambda _, args: seen.update(sum=args[0]))
    widths = [resnet.conv1.in_channels for resnet in block.resnets]
    inner = [getattr(project, "in_channels", width) for project, width in zip(block.projections, widths, strict=True)]
    hidden, skips = torch.randn(2, widths[0], 8, 8), [torch.randn(2, width, 8, 8) for width in inner]
    block(hidden, skips, torch.randn(2, block.resnets[0].time_emb_proj.in_features), None)
    torch.testing.assert_close(seen["sum"], hidden + block.projections[0](skips[0]))


def test_no_time_ignores_the_timestep():
    network = build("no_time")
    assert torch.equal(network(IMAGES, TIMESTEPS).sample, network(IMAGES, 500).sample)


def test_no_group_norm_removes_only_the_norms():
    network = build("no_group_norm")
    assert not any(isinstance(module, nn.GroupNorm) for module in network.modules())
    plain = CustomUNet2DModel(**NETWORK).state_dict()
    norms = {key for key in plain if ".norm" in key or "group_norm" in key or "conv_norm_out" in key}
    assert network.state_dict().keys() == plain.keys() - norms
    assert norms


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_round_trip_through_save_pretrained(name, tmp_path):
    network = build(name)
    network.save_pretrained(tmp_path)
    loaded = VARIANTS[name].from_pretrained(tmp_path).eval()
    assert loaded.config.block_out_channels == list(NETWORK["block_out_channels"])
    assert torch.equal(loaded(IMAGES, TIMESTEPS).sample, network(IMAGES, TIMESTEPS).sample)
