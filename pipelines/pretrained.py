"""Pretrained models as the starting point of a training run."""

import json
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from common import InputError, difference, on_main_process
from pipelines import CustomUNetPipeline
from pipelines.loading import find_pipeline, load_pipeline
from training.log import recorded, trained_on_celeba, training_in_all

FREE = ("dropout", "sample_size")  # options in which the network may differ from the pretrained one


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
    """Copies the pretrained weights. Raises InputError if the networks differ in more than dropout and resolution."""
    wanted = {"num_class_embeds": None} | {key: value for key, value in unet_kwargs.items() if key not in FREE}
    wanted = json.loads(json.dumps(wanted))  # turns tuples into lists
    found = json.loads(json.dumps({key: pretrained.config.get(key) for key in wanted}))
    if differs := difference(found, wanted):
        raise InputError(f"--pretrained_model_name_or_path {name} has another network ({differs}); use its settings")
    network.load_state_dict(pretrained.state_dict())
