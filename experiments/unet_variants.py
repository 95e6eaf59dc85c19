"""The U-Net with one part removed or replaced, to see what that part does. `experiments.ablation` compares them.

    python -m experiments.unet_variants VARIANT train --config configs/quickstart.yaml ...      flags of train_unet.py
    python -m experiments.unet_variants VARIANT evaluate --pipeline DIR --reference DATA ...    flags of eval.run

    plain           the U-Net as it is
    no_skips        no skip connections: the expanding path sees only the bottleneck
    added_skips     skip connections are added to the features (after a 1x1 convolution where the widths differ),
                    not concatenated
    no_time         no time embedding: the network does not know the noise level
    no_group_norm   no normalisation

Other parts are options of the network: attention, levels, width. Exit codes are those of the two commands.
"""

import functools
import sys

import torch
from torch import nn

from custom_unet import CustomUNet2DModel
from custom_unet.custom_unet_2d import UpBlock
from eval.run import main as evaluate
from train_unet import main as train


class UpBlockWithoutSkips(UpBlock):
    """Ignores the skip connections: its residual blocks see only the features."""

    def __init__(self, in_channels, skip_channels, *args):
        super().__init__(in_channels, [0] * len(skip_channels), *args)

    def forward(self, hidden, skips, emb, image):
        return super().forward(hidden, [skip[:, :0] for skip in skips], emb, image)


class AddingUpBlock(UpBlockWithoutSkips):
    """Adds each skip connection to the features, instead of concatenating it."""

    def __init__(self, in_channels, skip_channels, out_channels, config, *args):
        super().__init__(in_channels, skip_channels, out_channels, config, *args)
        inputs = [in_channels] + [out_channels] * config.layers_per_block
        self.projections = nn.ModuleList(
            nn.Identity() if channels == skip else nn.Conv2d(skip, channels, kernel_size=1)
            for channels, skip in zip(inputs, skip_channels, strict=True)
        )

    def forward(self, hidden, skips, emb, image):
        layers = zip(self.resnets, self.attentions, self.projections, skips, strict=True)
        for resnet, attention, project, skip in layers:
            hidden = attention(resnet(hidden + project(skip), emb))  # (B, C_out, H, W)
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden, emb)  # (B, C_out, 2H, 2W)
        return hidden, image


class VariantUNet(CustomUNet2DModel):
    """A network whose parts are replaced after construction; its configuration is that of the whole network."""

    @functools.wraps(CustomUNet2DModel.__init__)  # diffusers reads the options from the signature
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.change()


class WithoutSkips(VariantUNet):
    def change(self):
        replace_up_blocks(self, UpBlockWithoutSkips)


class WithAddedSkips(VariantUNet):
    def change(self):
        replace_up_blocks(self, AddingUpBlock)


class WithoutGroupNorm(VariantUNet):
    def change(self):
        remove_layers(self, nn.GroupNorm)


class WithoutTime(CustomUNet2DModel):
    """Embeds every noise level as timestep 0, which keeps the number of parameters."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return super().forward(sample, torch.zeros_like(torch.as_tensor(timestep)), class_labels, return_dict)


def replace_up_blocks(network: CustomUNet2DModel, block_class: type[UpBlock]) -> None:
    """Rebuilds the expanding path with the same widths; raises ValueError if it has blocks of other kinds."""
    config, channels = network.config, network.config.block_out_channels[-1]
    for index, (block, block_type) in enumerate(zip(network.up_blocks, config.up_block_types, strict=True)):
        if block_type not in ("UpBlock2D", "AttnUpBlock2D"):
            raise ValueError(f"up_block_types has {block_type}; this variant supports UpBlock2D and AttnUpBlock2D")
        width, attention = block.resnets[0].conv2.out_channels, block_type == "AttnUpBlock2D"
        inputs = [channels] + [width] * config.layers_per_block
        skips = [resnet.conv1.in_channels - c for resnet, c in zip(block.resnets, inputs, strict=True)]
        kind = None if attention else "conv"
        network.up_blocks[index] = block_class(channels, skips, width, config, bool(block.upsamplers), attention, kind)
        channels = width


def remove_layers(network: nn.Module, *kinds: type[nn.Module]) -> None:
    """Replaces every layer of these types by the identity."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kinds):
                setattr(module, name, nn.Identity())


VARIANTS = {
    "plain": CustomUNet2DModel,
    "no_skips": WithoutSkips,
    "added_skips": WithAddedSkips,
    "no_time": WithoutTime,
    "no_group_norm": WithoutGroupNorm,
}


def main(arguments: list[str]) -> int:
    match arguments:
        case [variant, ("train" | "evaluate") as task, *flags] if variant in VARIANTS:
            return (train if task == "train" else evaluate)(flags, VARIANTS[variant])
    variants = ",".join(VARIANTS)
    print(f"usage: python -m experiments.unet_variants {{{variants}}} {{train,evaluate}} [flags]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
