"""What each level of a U-Net costs and sees: parameters, multiplications and additions, attention, receptive field.

    python -m experiments.architecture --config configs/celeba64.yaml [--out FOLDER]

A row is a level of the contracting path, the bottleneck or a level of the expanding path. Operations are those of one
forward pass of one image, counted by PyTorch on tensors without memory; a multiplication and an addition are two. The
receptive field is that of the convolutions: the side of the square of input pixels on which a pixel of the row's
output depends. It is measured, by the gradient, in a narrow copy of the network without attention and group norm,
which see the whole image. With --out, FOLDER/architecture.md and .json. Exit codes: 0 done, 2 bad input.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import Parser, make_folder, run_command
from custom_unet import CustomUNet2DModel
from custom_unet.custom_unet_2d import SelfAttention
from eval.results import table, write_results
from training.arguments import parse_config
from training.config import TrainConfig

NARROW, NARROW_NCSNPP = 4, 32  # channels; the groups of NCSN++ need more
ATTENTION_OPERATORS = ("bmm", "baddbmm", "scaled_dot_product")
COLUMNS = {
    "part": "part",
    "side": "pixels a side",
    "channels": "channels",
    "parameters": "parameters",
    "gflop": "GFLOP",
    "share": "share",
    "attention_share": "share of it in attention between pixels",
    "receptive_field": "receptive field",
}


def parts_of(network: CustomUNet2DModel) -> Iterator[tuple[str, str, nn.Module]]:
    """Name for a reader, name among the modules, and module of each part, in the order of the forward pass."""
    yield "first convolution", "conv_in", network.conv_in
    for level, block in enumerate(network.down_blocks):
        yield f"contracting, level {level}", f"down_blocks.{level}", block
    if network.mid_block is not None:
        yield "bottleneck", "mid_block", network.mid_block
    for level, block in enumerate(network.up_blocks):
        yield f"expanding, level {len(network.up_blocks) - 1 - level}", f"up_blocks.{level}", block
    yield "last convolution", "conv_out", network.conv_out


def outputs_of(network: CustomUNet2DModel) -> dict[str, torch.Tensor]:
    """Is filled with the output of each part when the network is called."""
    outputs = {}
    for name, _, module in parts_of(network):

        def keep(_module, _inputs, output, name=name):
            outputs[name] = output[0] if isinstance(output, tuple) else output  # of several, the features

        module.register_forward_hook(keep)
    return outputs


def costs(config: TrainConfig) -> list[dict]:
    """Resolution, channels, parameters and operations of each part."""
    with torch.device("meta"):
        network = CustomUNet2DModel(**config.unet_kwargs()).eval()
        image = torch.empty(1, 3, config.resolution, config.resolution)
        outputs = outputs_of(network)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(image, torch.ones(1))
    counts, total = counter.get_flop_counts(), counter.get_total_flops()
    rows = []
    for name, path, module in parts_of(network):
        operators = counts.get(f"{type(network).__name__}.{path}", {})
        flops = sum(operators.values())
        between_pixels = sum(n for op, n in operators.items() if any(key in str(op) for key in ATTENTION_OPERATORS))
        rows.append(
            {
                "part": name,
                "side": outputs[name].shape[-1],
                "channels": outputs[name].shape[1],
                "parameters": sum(parameter.numel() for parameter in module.parameters()),
                "gflop": flops / 1e9,
                "share": flops / total,
                "attention_share": between_pixels / flops,
            }
        )
    everything = {
        "part": "whole, with the time embedding",
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "gflop": total / 1e9,
        "share": 1.0,
    }
    return [*rows, everything]


def receptive_fields(config: TrainConfig) -> dict[str, int]:
    """Side of the receptive field of each part's output in the input's pixels, of the convolutions alone.

    All weights are positive, so that nothing cancels: an input pixel counts if the gradient of the output's central
    pixel is not zero there.
    """
    levels = len(config.block_out_channels)
    has_skip_blocks = any("Skip" in block for block in (*config.down_block_types, *config.up_block_types))
    width = NARROW_NCSNPP if has_skip_blocks else NARROW
    kwargs = config.unet_kwargs() | {"block_out_channels": (width,) * levels, "norm_num_groups": 1}
    kwargs |= {"attention_head_dim": None, "attn_norm_num_groups": 1}
    network = CustomUNet2DModel(**kwargs).double().eval()
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.GroupNorm, SelfAttention)):
                setattr(module, name, nn.Identity())
    for parameter in network.parameters():
        nn.init.constant_(parameter, 1 / max(1, parameter[0].numel()))
    outputs = outputs_of(network)
    side = 16 * 2 ** (levels - 1)
    while True:
        image = torch.ones(1, 3, side, side, dtype=torch.float64, requires_grad=True)
        network(image, torch.ones(1, dtype=torch.float64))
        fields = {}
        for name, output in outputs.items():
            height, width = output.shape[-2:]
            centre = output[0, 0, height // 2, width // 2]
            (gradient,) = torch.autograd.grad(centre, image, retain_graph=True)
            columns = (gradient[0] != 0).any(0).any(0).nonzero()
            fields[name] = int(columns.max() - columns.min() + 1)
        if max(fields.values()) <= side // 2:  # else it may be cut off at the border
            return fields
        side *= 2


def architecture(config: TrainConfig) -> list[dict]:
    """A row for each part: what it costs and what it sees."""
    fields = receptive_fields(config)
    return [row | ({"receptive_field": fields[row["part"]]} if row["part"] in fields else {}) for row in costs(config)]


def run(arguments: list[str]) -> None:
    """Raises InputError for bad arguments."""
    parser = Parser(prog="python -m experiments.architecture", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a training")
    parser.add_argument("--out", type=Path, help="folder for the table and its numbers")
    options = parser.parse_args(arguments)
    data = ["--train_data_dir", "null", "--dataset_name", "synthetic-faces"]  # the images do not matter
    rows = architecture(parse_config(["--config", str(options.config), *data]))
    shares = [{key: f"{value:.1%}" for key, value in row.items() if key.endswith("share")} for row in rows]
    text = table([row | share for row, share in zip(rows, shares, strict=True)], COLUMNS)
    print(text)
    if options.out is not None:
        make_folder(options.out)
        (options.out / "architecture.md").write_text(f"{text}\n")
        record = {"config": options.config.name, "results": [], "rows": rows}
        write_results(options.out / "architecture.json", record)


def main(arguments: list[str]) -> int:
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
