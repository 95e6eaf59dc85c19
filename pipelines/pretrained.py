"""Pretrained models as the starting point of a training run, possibly of a deeper network."""

import json
import re
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common import InputError, difference, on_main_process
from pipelines import CustomUNetPipeline
from pipelines.loading import find_pipeline, load_pipeline
from training.log import recorded, trained_on_celeba, training_in_all

FREE = ("dropout", "sample_size")  # options in which the network may differ from the pretrained one
LAYER = re.compile(r"(?P<start>(?P<path>down|up)_blocks\.\d+\.(resnets|attentions)\.)(?P<index>\d+)\.")


def open_pretrained(name: str, prediction_type: str, accelerator: Accelerator) -> tuple[CustomUNetPipeline, dict]:
    """The pipeline in a folder or on the Hub, its total images seen and training time, and whether it saw CelebA.

    Raises InputError if there is no such model, or its network has another prediction type.
    """

    def find() -> Path:
        return find_pipeline(name, flag="--pretrained_model_name_or_path")[0]

    on_main_process(accelerator, find)  # downloads once for all processes
    folder = find()
    pipeline = load_pipeline(folder)
    theirs = pipeline.scheduler.config["prediction_type"]
    if theirs != prediction_type:
        raise InputError(
            f"--pretrained_model_name_or_path {name} predicts {theirs}, this run {prediction_type}; set"
            " --prediction_type or --objective to match"
        )
    facts = {key: recorded(folder, key) for key in ("data", "pretrained")}
    return pipeline, training_in_all(folder) | {"celeba": trained_on_celeba(facts)}


def take_weights(name: str, pretrained: nn.Module, network: nn.Module, unet_kwargs: dict) -> None:
    """Copies the pretrained weights.

    The network may have more `layers_per_block`, unless it has the skip blocks of NCSN++: it then starts as the same
    function. Raises InputError if it differs in anything else but dropout and resolution.
    """
    wanted = {"num_class_embeds": None} | {key: value for key, value in unet_kwargs.items() if key not in FREE}
    wanted = json.loads(json.dumps(wanted))  # turns tuples into lists
    found = json.loads(json.dumps({key: pretrained.config.get(key) for key in wanted}))
    old, new = found["layers_per_block"], wanted["layers_per_block"]
    if new > old and not any("Skip" in block for block in wanted["down_block_types"] + wanted["up_block_types"]):
        del found["layers_per_block"], wanted["layers_per_block"]
    if differs := difference(found, wanted):
        raise InputError(f"--pretrained_model_name_or_path {name} has another network ({differs}); use its settings")
    network.load_state_dict(deepened(pretrained.state_dict(), network.state_dict(), old, new))


def deepened(
    weights: dict[str, Tensor], initial: dict[str, Tensor], old_layers: int, new_layers: int
) -> dict[str, Tensor]:
    """The weights of a network with more layers (residual blocks, with their attention) per level.

    A new layer is the identity at first, because its last operation is multiplied by zero. In the expanding path its
    shortcut drops the skip connection, and it follows the first layer, so that the others keep their skips.

    Args:
        weights: of the network with `old_layers` per level.
        initial: of the network with `new_layers`, as initialized.
    """
    found, added = {}, new_layers - old_layers
    for name, values in initial.items():
        layer, origin = LAYER.match(name), name
        if layer:
            index = int(layer["index"])
            if index >= old_layers if layer["path"] == "down" else 1 <= index <= added:
                if ".conv2." in name or ".to_out." in name or ".conv_shortcut." in name:
                    values = torch.zeros_like(values)
                if name.endswith("conv_shortcut.weight"):
                    values.diagonal().fill_(1)
                found[name] = values
                continue
            if layer["path"] == "up" and index > added:
                origin = f"{layer['start']}{index - added}.{name[layer.end() :]}"
        found[name] = weights[origin]
    return found
