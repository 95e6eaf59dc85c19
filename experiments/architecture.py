"""The cost and the reach of each U-Net level: parameters, floating-point operations, attention, receptive field.

    python -m experiments.architecture --config configs/celeba64.yaml --out FOLDER

Each row of FOLDER/architecture.md and .json is a level of the contracting path, the bottleneck or a level of the
expanding path. PyTorch counts the operations of a forward pass for one image on the meta device; a multiplication and
an addition count as two. The receptive field is the side of the square of input pixels on which one output pixel
depends through the convolutions. It is measured by the gradient in a narrow copy of the network without attention and
group norm, both of which see the whole image. Exit codes: 0 done, 2 bad input.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import Parser, make_folder, run_command
from custom_unet import CustomUNet2DModel
from custom_unet.custom_unet_2d import SelfAttention
from eval.results import table, write_results
from experiments.unet_variants import remove_layers
from training.arguments import parse_config
from training.config import TrainConfig

ANY_DATA = ["--train_data_dir", "null", "--dataset_name", "synthetic-faces"]  # overrides the configuration
NARROW, NARROW_NCSNPP = 4, 32  # channels; NCSN++ needs more for its groups
ATTENTION_OPERATORS = ("bmm", "baddbmm", "scaled_dot_product")
COLUMNS = {
    "part": "part",
    "side": "resolution",
    "channels": "channels",
    "parameters": "parameters",
    "gflop": "GFLOP",
    "share": "share",
    "attention_share": "attention's share of it, without projections",
    "receptive_field": "receptive field",
}


def parts_of(network: CustomUNet2DModel) -> dict[str, str]:
    """Names in the table -> names of the modules, in the order of the forward pass."""
    levels = range(len(network.down_blocks))
    parts = {"first convolution": "conv_in"} | {f"contracting, level {i}": f"down_blocks.{i}" for i in levels}
    parts |= {} if network.mid_block is None else {"bottleneck": "mid_block"}
    parts |= {f"expanding, level {i}": f"up_blocks.{len(levels) - 1 - i}" for i in reversed(levels)}
    return parts | {"last convolution": "conv_out"}


def outputs_of(network: CustomUNet2DModel) -> dict[str, torch.Tensor]:
    """A dictionary that each forward pass fills with the output (1, C, side, side) of each part."""
    outputs = {}
    for part, name in parts_of(network).items():

        def keep(_module, _inputs, output, part=part):
            outputs[part] = output[0] if isinstance(output, tuple) else output

        network.get_submodule(name).register_forward_hook(keep)
    return outputs


def costs(config: TrainConfig) -> list[dict]:
    """Resolution, channels, parameters and operations of each part and of the whole network."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = CustomUNet2DModel(**config.unet_kwargs()).eval()
        outputs = outputs_of(network)
        network(torch.empty(1, *config.image_shape), torch.ones(1))
    counts, total, rows = counter.get_flop_counts(), counter.get_total_flops(), []
    for part, name in parts_of(network).items():
        operators = counts.get(f"{type(network).__name__}.{name}", {})
        flops = sum(operators.values())
        between_pixels = sum(n for op, n in operators.items() if any(key in str(op) for key in ATTENTION_OPERATORS))
        _, channels, side, _ = outputs[part].shape
        parameters = sum(parameter.numel() for parameter in network.get_submodule(name).parameters())
        row = {"part": part, "side": side, "channels": channels, "parameters": parameters, "gflop": flops / 1e9}
        rows.append(row | {"share": flops / total, "attention_share": between_pixels / flops})
    whole = {"part": "whole, with the time embedding", "parameters": network.num_parameters()}
    return [*rows, whole | {"gflop": total / 1e9, "share": 1.0}]


def receptive_fields(config: TrainConfig) -> dict[str, int]:
    """Receptive field of each part's output through the convolutions, as the side of a square in input pixels.

    All weights are positive, so that nothing cancels: an input pixel counts if the gradient of the output's central
    pixel with respect to it is not zero.
    """
    levels = len(config.block_out_channels)
    width = NARROW_NCSNPP if any("Skip" in block for block in config.down_block_types) else NARROW
    kwargs = {"block_out_channels": (width,) * levels, "norm_num_groups": 1, "attn_norm_num_groups": 1}
    network = CustomUNet2DModel(**config.unet_kwargs() | kwargs | {"attention_head_dim": None}).double().eval()
    remove_layers(network, nn.GroupNorm, SelfAttention)
    for parameter in network.parameters():
        nn.init.constant_(parameter, 1 / max(1, parameter[0].numel()))
    height = 2 ** (levels - 1)  # the lowest possible: the field's width does not depend on it
    outputs, side = outputs_of(network), 16 * height
    while True:
        image = torch.ones(1, config.image_shape[0], height, side, dtype=torch.float64, requires_grad=True)
        network(image, torch.ones(1, dtype=torch.float64))
        fields = {}
        for part, output in outputs.items():
            centre = output[0, 0, output.shape[-2] // 2, output.shape[-1] // 2]
            (gradient,) = torch.autograd.grad(centre, image, retain_graph=True)
            columns = (gradient[0] != 0).any(0).any(0).nonzero()
            fields[part] = int(columns.max() - columns.min() + 1)
        if max(fields.values()) <= side // 2:  # otherwise the border may cut it off
            return fields
        side *= 2


def write_table(options: Namespace) -> None:
    """Prints and writes the table, and writes its numbers."""
    config = parse_config(["--config", str(options.config), *ANY_DATA])
    make_folder(options.out)
    fields, (*parts, whole) = receptive_fields(config), costs(config)
    rows = [*(row | {"receptive_field": fields[row["part"]]} for row in parts), whole]
    shares = [{key: f"{value:.1%}" for key, value in row.items() if key.endswith("share")} for row in rows]
    text = table([row | share for row, share in zip(rows, shares, strict=True)], COLUMNS)
    print(text)
    (options.out / "architecture.md").write_text(f"{text}\n")
    write_results(options.out / "architecture.json", {"config": options.config.name, "results": [], "rows": rows})


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m experiments.architecture", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a training configuration")
    parser.add_argument("--out", type=Path, required=True, help="folder for the table and its numbers")
    return run_command(lambda: write_table(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
