"""Networks with one part removed or replaced."""

import pytest
import torch
from tiny_network import TINY
from torch import nn

from custom_unet import CustomUNet2DModel
from experiments.unet_variants import VARIANTS, main

NETWORK = TINY | {"sample_size": 16}


def build(name: str, **more) -> CustomUNet2DModel:
    torch.manual_seed(0)
    return VARIANTS[name](**NETWORK | more).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])


@pytest.mark.parametrize(("name", "has_skips"), [("no_skips", False), ("added_skips", True), ("no_time", True)])
def test_only_no_skips_lets_nothing_bypass_the_bottleneck(name, has_skips):
    """The first convolution is detached from the contracting path, so that only its skip connection is left."""
    network = build(name)
    network.down_blocks[0].register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
    output, weight = network(*inputs()).sample, network.conv_in.weight
    (gradient,) = torch.autograd.grad(output.sum(), weight, allow_unused=True)
    assert (gradient is not None and bool(gradient.any())) == has_skips


def test_added_skips_sum_features_and_projected_skips():
    network = build("added_skips")
    block = network.up_blocks[0]
    seen = {}
    block.resnets[0].register_forward_pre_hook(lambda _, args: seen.update(sum=args[0]))
    hidden = torch.randn(2, block.resnets[0].conv1.in_channels, 8, 8)
    emb = torch.randn(2, network.time_embedding.linear_2.out_features)
    skips = []
    for project, resnet in zip(block.projections, block.resnets, strict=True):
        width = project.in_channels if isinstance(project, nn.Conv2d) else resnet.conv1.in_channels
        skips.append(torch.randn(2, width, 8, 8))
    with torch.no_grad():
        block(hidden, skips, emb, None)
        assert torch.equal(seen["sum"], hidden + block.projections[0](skips[0]))


def test_only_no_time_ignores_the_timestep():
    images, _ = inputs()
    with torch.no_grad():
        for name, is_same in (("no_time", True), ("added_skips", False)):
            network = build(name)
            first, second = network(images, torch.tensor([3, 3])).sample, network(images, 700).sample
            assert torch.equal(first, second) == is_same


def test_no_group_norm_removes_only_the_norms():
    network = build("no_group_norm")
    assert not any(isinstance(module, nn.GroupNorm) for module in network.modules())
    plain = CustomUNet2DModel(**NETWORK).state_dict()
    norms = {key for key in plain if ".norm" in key or "group_norm" in key or "conv_norm_out" in key}
    assert network.state_dict().keys() == plain.keys() - norms
    assert norms


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_round_trip_through_save_pretrained(name, tmp_path):
    network = build(name)
    network.save_pretrained(tmp_path)
    loaded = VARIANTS[name].from_pretrained(tmp_path).eval()
    assert loaded.config.block_out_channels == list(NETWORK["block_out_channels"])
    images, timesteps = inputs()
    with torch.no_grad():
        assert torch.equal(loaded(images, timesteps).sample, network(images, timesteps).sample)


def test_skip_variants_reject_ncsnpp_blocks():
    blocks = {"up_block_types": ("SkipUpBlock2D",) * 2, "down_block_types": ("SkipDownBlock2D",) * 2}
    with pytest.raises(ValueError, match="up_block_types has SkipUpBlock2D"):
        build("no_skips", **blocks)


def test_unknown_variants_and_commands_print_the_usage(capsys):
    for arguments in (["no_skips"], ["no_head", "train"], ["no_skips", "push"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("usage: ")
