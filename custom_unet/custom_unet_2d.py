r"""A U-Net for diffusion models, written by hand in one file.

From a noisy image and its timestep it predicts an image of the same size (the noise, the clean image or v):

    image --conv_in--> o -------------------- skip connections -------------------> o --conv_out--> prediction
                        \ down_blocks[0]                             up_blocks[-1] /
                         o ------------------------------------------------------ o
                          \ down_blocks[1]                         up_blocks[-2] /
                           o -------------------------------------------------- o
                             contracting path    mid_block     expanding path
                                                (bottleneck)

The U is Ronneberger et al. 2015 (arXiv 1505.04597, figure 1); residual blocks, attention and the time embedding are
those of DDPM (Ho et al. 2020, 2006.11239, appendix B); the Skip blocks, which carry a small copy of the image beside
the features, those of NCSN++ (Song et al. 2021, 2011.13456, appendix H).

Arguments, configuration keys, parameter names and shapes are those of diffusers' `UNet2DModel`, so weights are
interchangeable. In the shape comments B is the batch, C channels, H and W the height and width at a level, E the width
of the time embedding. `config` is the configuration of the whole network, the arguments of `CustomUNet2DModel`.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

ACTIVATIONS = {"silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU, "relu": nn.ReLU}

# Attention weights in checkpoints older than diffusers 0.18 (google/ddpm-*), and their names today.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------------------------------------- time embedding


def emb_channels(config) -> int:
    """The width E of the time embedding."""
    return config.time_embedding_dim or 4 * config.block_out_channels[0]


class PositionalProjection(nn.Module):
    """Timesteps as sines and cosines of geometrically spaced frequencies (DDPM, after Vaswani et al. 1706.03762)."""

    def __init__(self, features: int, flip_sin_to_cos: bool, freq_shift: float):
        super().__init__()
        self.features = features
        self.flip_sin_to_cos = flip_sin_to_cos
        self.freq_shift = freq_shift

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        half = self.features // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        frequencies = torch.exp(-math.log(10000) * exponents / (half - self.freq_shift))
        angles = timesteps[:, None].float() * frequencies  # (B, features // 2)
        waves = (angles.cos(), angles.sin()) if self.flip_sin_to_cos else (angles.sin(), angles.cos())
        return F.pad(torch.cat(waves, dim=1), (0, self.features % 2))  # (B, features)


class FourierProjection(nn.Module):
    """Logarithms of noise levels > 0 as sines and cosines of fixed random frequencies (NCSN++)."""

    def __init__(self, features: int, scale: float = 16.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features) * scale, requires_grad=False)

    def forward(self, noise_levels: torch.Tensor) -> torch.Tensor:
        angles = torch.log(noise_levels)[:, None] * self.weight * (2 * math.pi)  # (B, features)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, 2 * features)


class TimestepEmbedding(nn.Module):
    """Two linear layers from the projected timestep to the embedding that every residual block receives."""

    def __init__(self, features: int, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(features, channels)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, projected: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(projected)))  # (B, E)


# ------------------------------------------------------------------------------------- changing the resolution


class Downsample(nn.Module):
    """Halve the resolution with a strided convolution; padding 0 pads right and bottom only, as DDPM does."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if padding == 0 else nn.Identity()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=padding)

    def forward(self, hidden: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        return self.conv(self.pad(hidden))  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double the resolution by repeating pixels, then smooth with a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class FirResample(nn.Module):
    """Halve or double the resolution with the low-pass filter [1, 3, 3, 1] (StyleGAN2, adopted by NCSN++).

    A convolution of each channel with the same kernel, transposed to go up. Going up, each output pixel receives a
    quarter of the taps, hence the gain of 4. The taps are exact in half precision.
    """

    def __init__(self, up: bool):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.up = up
        self.register_buffer("kernel", torch.outer(taps, taps) * (4 if up else 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        channels = image.shape[1]
        convolve = F.conv_transpose2d if self.up else F.conv2d
        kernel = self.kernel.to(image.dtype).expand(channels, 1, 4, 4)
        return convolve(image, kernel, stride=2, padding=1, groups=channels)  # (B, C, 2H, 2W) or (B, C, H/2, W/2)


# ------------------------------------------------------------------------------------------------------ layers


def group_norm(channels: int, groups: int | None, eps: float) -> nn.GroupNorm:
    """A GroupNorm. With `groups` None, NCSN++'s rule: a quarter of the channels, at most 32."""
    groups = min(channels // 4, 32) if groups is None else groups
    require(
        groups > 0 and channels % groups == 0,
        f"{groups} groups do not divide the {channels} channels of a GroupNorm: change block_out_channels, "
        "norm_num_groups or attn_norm_num_groups (Skip blocks take min(channels // 4, 32), their attention 32)",
    )
    return nn.GroupNorm(groups, channels, eps=eps)


def residual_sum(shortcut: torch.Tensor, branch: torch.Tensor, scale: float) -> torch.Tensor:
    """(shortcut + branch) / scale; a scale of sqrt(2) keeps the variance of two independent summands."""
    return shortcut + branch if scale == 1 else (shortcut + branch) / scale


class CheckpointedLayer(nn.Module):
    """A layer whose activations are computed again in the backward pass once gradient checkpointing is enabled."""

    gradient_checkpointing = False  # ModelMixin sets this, and _gradient_checkpointing_func

    def __call__(self, *inputs):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(super().__call__, *inputs)
        return super().__call__(*inputs)


class ResidualBlock(CheckpointedLayer):
    """Twice norm, activation and convolution, with a shortcut; the time embedding enters between the two.

    It is added before the second norm or, with "scale_shift", modulates its output (Dhariwal and Nichol 2105.05233).
    `resample`, a module without parameters, changes the resolution of both branches. `ncsnpp` lets NCSN++ choose the
    groups and scale the sum; `groups_in` are the groups of the first norm where they differ.
    """

    def __init__(
        self, in_channels, out_channels, config, ncsnpp=False, groups_in=None, output_scale=1.0, resample=None
    ):
        super().__init__()
        groups = None if ncsnpp else config.norm_num_groups
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.output_scale = math.sqrt(2) if ncsnpp else output_scale
        self.act = ACTIVATIONS[config.act_fn]()
        self.resample = resample or nn.Identity()
        self.norm1 = group_norm(in_channels, groups_in or groups, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(emb_channels(config), out_channels * (2 if self.scale_shift else 1))
        self.norm2 = group_norm(out_channels, groups, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.conv_shortcut = nn.Identity()
        if in_channels != out_channels or (ncsnpp and resample):
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        emb = self.time_emb_proj(self.act(emb))[:, :, None, None]  # (B, C_out or 2 * C_out, 1, 1)
        branch = self.resample(self.act(self.norm1(hidden)))  # (B, C_in, H', W'), resampled or not
        branch = self.conv1(branch)  # (B, C_out, H', W')
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)  # (B, C_out, 1, 1) each
            branch = self.norm2(branch) * (1 + scale) + shift
        else:
            branch = self.norm2(branch + emb)
        branch = self.conv2(self.dropout(self.act(branch)))
        shortcut = self.conv_shortcut(self.resample(hidden))  # (B, C_out, H', W')
        return residual_sum(shortcut, branch, self.output_scale)


class SelfAttention(CheckpointedLayer):
    """Every pixel attends to every pixel, beside a shortcut. `groups` None stands for `norm_num_groups`."""

    _from_deprecated_attn_block = True  # ModelMixin.from_pretrained looks for old weight names here

    def __init__(self, channels, config, ncsnpp=False, groups=None, normalize=True, output_scale=1.0):
        super().__init__()
        groups = 32 if ncsnpp else (groups or config.norm_num_groups)
        head_dim = config.attention_head_dim or channels
        self.num_heads = channels // head_dim
        require(
            self.num_heads > 0,
            f"attention_head_dim={head_dim} is more than the {channels} channels of a level with attention: "
            "choose a smaller one, or None for one head",
        )
        inner = self.num_heads * head_dim  # less than `channels` where head_dim does not divide them
        self.output_scale = math.sqrt(2) if ncsnpp else output_scale
        self.group_norm = group_norm(channels, groups, config.norm_eps) if normalize else nn.Identity()
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.Sequential(nn.Linear(inner, channels))
        self.register_load_state_dict_pre_hook(rename_old_attention_weights)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # contiguous(): one copy here instead of one in each projection
        pixels = self.group_norm(hidden).flatten(2).transpose(1, 2).contiguous()  # (B, H*W, C)
        query, key, value = (
            project(pixels).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, H*W, head_dim)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = self.to_out(attended.transpose(1, 2).flatten(2))  # (B, H*W, C)
        attended = attended.transpose(1, 2).unflatten(2, hidden.shape[2:])  # (B, C, H, W)
        return residual_sum(hidden, attended, self.output_scale)


def rename_old_attention_weights(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A hook of `load_state_dict` that gives the weights of OLD_ATTENTION_NAMES the names of today."""
    for old, new in OLD_ATTENTION_NAMES.items():
        for parameter in ("weight", "bias"):
            if f"{prefix}{old}.{parameter}" in state_dict:
                state_dict[f"{prefix}{new}.{parameter}"] = state_dict.pop(f"{prefix}{old}.{parameter}")


# ------------------------------------------------------------------------------------------------------ blocks
# A block is one level of a path. All blocks of a path have the same arguments: Skip blocks process `image` beside the
# features `hidden`, the others pass it on unchanged. Without attention, nn.Identity takes its place. The
# innermost block does not downsample, the outermost one does not upsample.


class DownBlock(nn.Module):
    """A level of the contracting path: residual blocks with or without attention, then half the resolution."""

    def __init__(self, in_channels, out_channels, config, downsample, attention=False, kind=None, ncsnpp=False):
        super().__init__()
        kind = kind or config.downsample_type
        inputs = [in_channels] + [out_channels] * (config.layers_per_block - 1)
        resnets = [ResidualBlock(c, out_channels, config, ncsnpp) for c in inputs]
        self.attentions = nn.ModuleList(
            [SelfAttention(out_channels, config, ncsnpp) if attention else nn.Identity() for _ in inputs]
        )
        self.resnets = nn.ModuleList(resnets)  # after the attention: the order of UNet2DModel's parameters
        self.downsamplers = nn.ModuleList()
        if downsample and kind == "conv":
            self.downsamplers.append(Downsample(out_channels, config.downsample_padding))
        elif downsample:
            self.downsamplers.append(ResidualBlock(out_channels, out_channels, config, resample=nn.AvgPool2d(2)))

    def forward(self, hidden, emb, image):
        skips = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            hidden = attention(resnet(hidden, emb))  # (B, C_out, H, W)
            skips.append(hidden)
        for downsampler in self.downsamplers:
            hidden = downsampler(hidden, emb)  # (B, C_out, H/2, W/2)
            skips.append(hidden)
        return hidden, skips, image


class SkipDownBlock(DownBlock):
    """The same for NCSN++: a downsampled copy of the input image is added to the features at every level."""

    def __init__(self, in_channels, out_channels, config, downsample, attention=False):
        super().__init__(in_channels, out_channels, config, downsample=False, attention=attention, ncsnpp=True)
        self.resnet_down = None
        if downsample:
            fir = FirResample(up=False)
            self.resnet_down = ResidualBlock(out_channels, out_channels, config, ncsnpp=True, resample=fir)
            self.image_downsampler = FirResample(up=False)
            self.skip_conv = nn.Conv2d(3, out_channels, kernel_size=1)

    def forward(self, hidden, emb, image):
        hidden, skips, image = super().forward(hidden, emb, image)
        if self.resnet_down is not None:
            image = self.image_downsampler(image)  # (B, 3, H/2, W/2)
            hidden = self.resnet_down(hidden, emb) + self.skip_conv(image)  # (B, C_out, H/2, W/2)
            skips.append(hidden)
        return hidden, skips, image


class MidBlock(nn.Module):
    """The bottleneck: two residual blocks with optional attention in between."""

    def __init__(self, channels, config):
        super().__init__()
        scale = config.mid_block_scale_factor
        resnets = [ResidualBlock(channels, channels, config, output_scale=scale) for _ in range(2)]
        attention = nn.Identity()
        if config.add_attention:
            groups = config.attn_norm_num_groups
            normalize = groups is not None or config.resnet_time_scale_shift == "default"
            attention = SelfAttention(channels, config, groups=groups, normalize=normalize, output_scale=scale)
        self.attentions = nn.ModuleList([attention])
        self.resnets = nn.ModuleList(resnets)

    def forward(self, hidden, emb):
        hidden = self.resnets[0](hidden, emb)
        hidden = self.attentions[0](hidden)
        return self.resnets[1](hidden, emb)


class UpBlock(nn.Module):
    """A level of the expanding path: each residual block takes in one skip connection; then double the resolution."""

    def __init__(self, in_channels, skip_channels, out_channels, config, upsample, attention=False, kind=None):
        super().__init__()
        kind = kind or config.upsample_type
        inputs = [in_channels] + [out_channels] * config.layers_per_block
        resnets = [
            ResidualBlock(c + skip, out_channels, config) for c, skip in zip(inputs, skip_channels, strict=True)
        ]
        self.attentions = nn.ModuleList(
            [SelfAttention(out_channels, config) if attention else nn.Identity() for _ in inputs]
        )
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers = nn.ModuleList()
        if upsample and kind == "conv":
            self.upsamplers.append(Upsample(out_channels))
        elif upsample:
            nearest = nn.Upsample(scale_factor=2.0, mode="nearest")
            self.upsamplers.append(ResidualBlock(out_channels, out_channels, config, resample=nearest))

    def forward(self, hidden, skips, emb, image):
        for resnet, attention, skip in zip(self.resnets, self.attentions, skips, strict=True):
            hidden = torch.cat([hidden, skip], dim=1)  # (B, C + C_skip, H, W)
            hidden = attention(resnet(hidden, emb))  # (B, C_out, H, W)
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden, emb)  # (B, C_out, 2H, 2W)
        return hidden, image


class SkipUpBlock(nn.Module):
    """The same for NCSN++: every level adds an RGB output skip to the image, which is upsampled alongside.

    Attention, if any, comes once, after the last residual block.
    """

    def __init__(self, in_channels, skip_channels, out_channels, config, upsample, attention=False):
        super().__init__()
        inputs = [in_channels] + [out_channels] * config.layers_per_block
        resnets = []
        for channels, skip in zip(inputs, skip_channels, strict=True):
            # With attention, UNet2DModel lacks parentheses around channels + skip here; its checkpoints depend on it.
            groups_in = min(channels + skip // 4, 32) if attention else None
            resnets.append(ResidualBlock(channels + skip, out_channels, config, ncsnpp=True, groups_in=groups_in))
        self.attentions = nn.ModuleList([SelfAttention(out_channels, config, ncsnpp=True)] if attention else [])
        self.resnets = nn.ModuleList(resnets)
        self.image_upsampler = FirResample(up=True)
        self.resnet_up = None
        if upsample:
            fir = FirResample(up=True)
            self.resnet_up = ResidualBlock(out_channels, out_channels, config, ncsnpp=True, resample=fir)
            self.skip_conv = nn.Conv2d(out_channels, 3, kernel_size=3, padding=1)
            self.skip_norm = group_norm(out_channels, None, config.norm_eps)
            self.act = nn.SiLU()

    def forward(self, hidden, skips, emb, image):
        for resnet, skip in zip(self.resnets, skips, strict=True):
            hidden = torch.cat([hidden, skip], dim=1)  # (B, C + C_skip, H, W)
            hidden = resnet(hidden, emb)  # (B, C_out, H, W)
        for attention in self.attentions:
            hidden = attention(hidden)
        if image is not None:
            image = self.image_upsampler(image)  # (B, 3, H, W)
        if self.resnet_up is not None:
            share = self.skip_conv(self.act(self.skip_norm(hidden)))  # (B, 3, H, W)
            image = share if image is None else image + share
            hidden = self.resnet_up(hidden, emb)  # (B, C_out, 2H, 2W)
        return hidden, image


# `kind` says how a block resamples; without it `downsample_type` and `upsample_type` of the configuration do.
DOWN_BLOCK_TYPES = {
    "DownBlock2D": partial(DownBlock, kind="conv"),
    "AttnDownBlock2D": partial(DownBlock, attention=True),
    "ResnetDownsampleBlock2D": partial(DownBlock, kind="resnet"),
    "SkipDownBlock2D": SkipDownBlock,
    "AttnSkipDownBlock2D": partial(SkipDownBlock, attention=True),
}
UP_BLOCK_TYPES = {
    "UpBlock2D": partial(UpBlock, kind="conv"),
    "AttnUpBlock2D": partial(UpBlock, attention=True),
    "ResnetUpsampleBlock2D": partial(UpBlock, kind="resnet"),
    "SkipUpBlock2D": SkipUpBlock,
    "AttnSkipUpBlock2D": partial(SkipUpBlock, attention=True),
}


# --------------------------------------------------------------------------------------------------- the network


class CustomUNet2DModel(ModelMixin, ConfigMixin):
    """Predict an image from a noisy image and its timestep.

    Args that need more than their name (C_i is `block_out_channels[i]`, L their number):
        sample_size: height and width in pixels (or one number for both), divisible by 2^(L-1). Only recorded: any
            input with such sides is accepted.
        center_input_sample: the input lies in [0, 1] and is stretched to [-1, 1].
        time_embedding_type: "positional" (DDPM), "fourier" (NCSN++: timesteps are noise levels > 0, and the output is
            divided by them) or "learned" (a table of `num_train_timesteps` rows).
        time_embedding_dim: E, the width of the time embedding; None for 4 C_0.
        freq_shift, flip_sin_to_cos: spacing and order of the positional waves; DDPM has 1 and False.
        down_block_types, up_block_types: keys of DOWN_BLOCK_TYPES and UP_BLOCK_TYPES, from the image inwards and
            back. Blocks with "Skip" need 3-channel images.
        mid_block_type, add_attention: "UNetMidBlock2D" or None for no bottleneck; attention in it.
        mid_block_scale_factor: divisor of the bottleneck's residual sums.
        downsample_padding: 1, or 0 to pad right and bottom only (DDPM).
        downsample_type, upsample_type: "conv" or "resnet", how AttnDownBlock2D and AttnUpBlock2D resample.
        act_fn: a key of ACTIVATIONS.
        attention_head_dim: channels of one attention head; None for one head as wide as its level (DDPM).
        norm_num_groups: groups of every GroupNorm but those of the Skip blocks; None only if all are Skip blocks.
        attn_norm_num_groups: those of the bottleneck's attention; None for `norm_num_groups`, or for no
            normalisation there with "scale_shift".
        resnet_time_scale_shift: "default" adds the embedding to the features, "scale_shift" modulates them.
        class_embed_type, num_class_embeds: condition on a class by a table of `num_class_embeds` rows (type None), by
            a number treated like a timestep ("timestep"), or by a vector of width E ("identity").

    Raises:
        ValueError: an option is unknown or the combination cannot work.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ("norm",)

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ):
        super().__init__()
        config = self.config
        check_config(config)
        channels, last_level = block_out_channels[0], len(block_out_channels) - 1

        self.conv_in = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self._build_embeddings(config)

        self.down_blocks = nn.ModuleList()
        skip_channels = [channels]  # a stack: the contracting path pushes, the expanding path pops
        for level, block_type in enumerate(down_block_types):
            width, downsample = block_out_channels[level], level < last_level
            self.down_blocks.append(DOWN_BLOCK_TYPES[block_type](channels, width, config, downsample))
            skip_channels += [width] * (layers_per_block + downsample)
            channels = width

        mid_block = MidBlock(channels, config) if mid_block_type else None

        self.up_blocks = nn.ModuleList()
        for level, block_type in enumerate(up_block_types):
            width, upsample = block_out_channels[last_level - level], level < last_level
            taken = [skip_channels.pop() for _ in range(layers_per_block + 1)]
            self.up_blocks.append(UP_BLOCK_TYPES[block_type](channels, taken, width, config, upsample))
            channels = width
        self.mid_block = mid_block  # registered after `up_blocks`: the order of UNet2DModel's parameters

        self.conv_norm_out = group_norm(channels, norm_num_groups, norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels, out_channels, kernel_size=3, padding=1)

    def _build_embeddings(self, config) -> None:
        """Make `time_proj`, `time_embedding` and `class_embedding`."""
        features, channels = config.block_out_channels[0], emb_channels(config)
        if config.time_embedding_type == "positional":
            self.time_proj = PositionalProjection(features, config.flip_sin_to_cos, config.freq_shift)
        elif config.time_embedding_type == "learned":
            self.time_proj = nn.Embedding(config.num_train_timesteps, features)
        else:
            self.time_proj = FourierProjection(features)
            features = 2 * features
        self.time_embedding = TimestepEmbedding(features, channels)

        self.class_embedding = None
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(features, channels)
        elif config.class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, channels)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Run the network.

        Args:
            sample: noisy images, (B, in_channels, H, W); H and W divisible by 2^(levels - 1).
            timestep: one for each image, (B,), or one for all. Noise levels > 0 with "fourier".
            class_labels: (B,) numbers, or (B, E) vectors with "identity"; only with a class embedding, then required.
            return_dict: False for the plain tuple `(sample,)`.

        Returns:
            The prediction, (B, out_channels, H, W), as `.sample` of a `UNet2DOutput`.

        Raises:
            ValueError: the input has a wrong shape, or class labels are missing or not expected.
        """
        self._check_inputs(sample, class_labels)

        # 0. input in [-1, 1]
        if self.config.center_input_sample:
            sample = 2 * sample - 1

        # 1. time (and class) embedding
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])  # (B,)
        emb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))  # (B, E)
        if self.class_embedding is not None:
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(sample.dtype)  # (B, features)
            emb = emb + self.class_embedding(class_labels).to(emb.dtype)

        # 2. first convolution
        image = sample
        hidden = self.conv_in(sample)  # (B, C_0, H, W)
        skips = [hidden]

        # 3. contracting path: every layer leaves a skip connection
        for block in self.down_blocks:
            hidden, block_skips, image = block(hidden, emb, image)  # (B, C_i, H / 2^i, W / 2^i)
            skips += block_skips

        # 4. bottleneck
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, emb)

        # 5. expanding path: the last skip connection is taken first
        image = None
        for block in self.up_blocks:
            block_skips = [skips.pop() for _ in block.resnets]
            hidden, image = block(hidden, block_skips, emb, image)

        # 6. last convolution
        output = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))  # (B, out_channels, H, W)
        if image is not None:
            output = output + image
        if self.config.time_embedding_type == "fourier":
            output = (output / timesteps[:, None, None, None]).to(output.dtype)

        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _check_inputs(self, sample: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        """Raise a one-line ValueError for inputs that do not fit the configuration."""
        channels, multiple = self.config.in_channels, 2 ** (len(self.config.block_out_channels) - 1)
        shape = tuple(sample.shape)
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(f"sample has shape {shape}: expected (batch, {channels}, height, width)")
        if shape[2] % multiple or shape[3] % multiple:
            raise ValueError(f"sample is {shape[2]}x{shape[3]} pixels: crop or resize to multiples of {multiple}")
        if self.class_embedding is not None and class_labels is None:
            raise ValueError("class_labels is None: this model is conditioned on a class, pass one label per image")
        if self.class_embedding is None and class_labels is not None:
            raise ValueError("class_labels were given, but this model has no class embedding: leave them out")


# ----------------------------------------------------------------------------------------- checking the options

CHOICES = {
    "time_embedding_type": ("positional", "fourier", "learned"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": tuple(ACTIVATIONS),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}
POSITIVE_INTEGERS = ("in_channels", "out_channels", "layers_per_block")
OPTIONAL_POSITIVE_INTEGERS = (
    *("time_embedding_dim", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups"),
    *("num_class_embeds", "num_train_timesteps"),
)


def check_config(config) -> None:
    """Raise a one-line ValueError for options that are unknown or do not work together.

    Groups and head widths that do not divide the channels are found where the layers are made.
    """
    check_values(config)
    check_levels(config)
    check_skip_blocks(config)


def is_positive_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_values(config) -> None:
    """Each option by itself."""
    for name, choices in CHOICES.items():
        known = config[name] in choices and not isinstance(config[name], bool)  # True is 1
        require(known, f"{name}={config[name]!r} is not supported: choose one of {choices}")
    given = [name for name in OPTIONAL_POSITIVE_INTEGERS if config[name] is not None]
    for name in (*POSITIVE_INTEGERS, *given):
        require(is_positive_integer(config[name]), f"{name}={config[name]!r}: must be a positive integer")
    for name in ("mid_block_scale_factor", "norm_eps"):
        require(config[name] > 0, f"{name}={config[name]!r}: must be positive")
    require(0 <= config.dropout < 1, f"dropout={config.dropout!r}: must be at least 0 and less than 1")


def check_levels(config) -> None:
    """The lists with one entry for each level, and what follows from their length and first entry."""
    widths = config.block_out_channels
    valid = len(widths) > 0 and all(is_positive_integer(width) for width in widths)
    require(valid, f"block_out_channels={widths!r}: must be positive integers, one for each level")

    for name, known in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES)):
        for block in config[name]:
            require(block in known, f"{name} has {block!r}, which is not supported: choose from {tuple(known)}")
        valid = len(config[name]) == len(widths)
        require(valid, f"{name} has {len(config[name])} entries, block_out_channels {len(widths)}: match them")

    size, multiple = config.sample_size, 2 ** (len(widths) - 1)
    sides = size if isinstance(size, list | tuple) else (size, size)
    valid = len(sides) == 2 and all(is_positive_integer(side) and side % multiple == 0 for side in sides)
    require(
        valid or size is None, f"sample_size={size!r}: must be one or two multiples of 2^(levels - 1) = {multiple}"
    )

    kind, shift, steps = config.time_embedding_type, config.freq_shift, config.num_train_timesteps
    valid = kind != "positional" or shift < widths[0] // 2
    require(valid, f"freq_shift={shift!r}: must be less than half of block_out_channels[0]={widths[0]}")
    valid = kind != "learned" or steps is not None
    require(valid, f"num_train_timesteps={steps!r}: time_embedding_type='learned' needs the number of timesteps")


def check_skip_blocks(config) -> None:
    """The image that Skip blocks carry has 3 channels and must match the resolution of the features."""
    down = ["Skip" in name for name in config.down_block_types]
    up = ["Skip" in name for name in config.up_block_types]
    valid = down[:-1] == sorted(down[:-1], reverse=True)  # the innermost block leaves the image alone
    require(valid, f"down_block_types={config.down_block_types!r}: put the Skip blocks before all others")
    require(up == sorted(up), f"up_block_types={config.up_block_types!r}: put the Skip blocks after all others")
    for name, blocks in (("in_channels", down[:-1]), ("out_channels", up[:-1])):
        require(not any(blocks) or config[name] == 3, f"{name}={config[name]!r}: must be 3 with Skip blocks")
    valid = config.norm_num_groups is not None or all(down + up)
    require(valid, "norm_num_groups=None: only a network of Skip blocks alone chooses its groups: give a number")
