"""Reads the configuration of a training run from a YAML file and the command line."""

import difflib
import functools
import itertools
import logging
import os
import re
import typing
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import HfArgumentParser

from common import InputError, one_line
from custom_unet import CustomUNet2DModel
from training.config import LIMITS, TYPES, TrainConfig, shown

logger = logging.getLogger(__name__)

DEFAULT_CONFIG_PATH = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
# Flags of other scripts, most of them of diffusers' train_unconditional.py, and what to do instead
OF_DIFFUSERS = {
    "batch_size": "pass --train_batch_size",
    "center_crop": "pass --crop center",
    "data_dir": "pass --train_data_dir",
    "enable_xformers_memory_efficient_attention": "leave it out, PyTorch's own efficient attention is always used",
    "local_rank": "leave it out and start with accelerate launch or torchrun",
    "logger": "pass --report_to",
    "lr": "pass --learning_rate",
    "model_config_name_or_path": "pass the network's options, or --pretrained_model_name_or_path for its weights",
    "save_images_epochs": "pass --save_images_steps",
    "save_model_epochs": "pass --checkpointing_steps",
    "use_ema": "leave it out, an EMA is always kept and used",
}
TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")
TOKEN_HINT = "; the Hub's token is read from HF_TOKEN or from `hf auth login`"


class _Parser(HfArgumentParser):
    def add_argument(self, *flags, limits: dict | None = None, **settings):
        if _is_optional(TYPES.get(flags[0].removeprefix("--"))):
            read = settings["type"]
            settings["type"] = functools.wraps(read)(lambda text: None if text == "null" else read(text))
            if "choices" in settings:
                settings["metavar"] = f"{{{','.join(map(str, settings['choices']))},null}}"
                settings["choices"] = [*settings["choices"], None]
        if limits and "only" in limits:
            settings["help"] += f" ({limits['only'].replace(' ', ', ')})"
        return super().add_argument(*flags, **settings)

    def error(self, message):
        """Raises InputError instead of printing the usage and exiting."""
        raise InputError(one_line(message)[:300])


def parse_config(arguments: list[str]) -> TrainConfig:
    """Reads `[--config FILE.yaml] [--flag value ...]`; without `--config`, `configs/quickstart.yaml`.

    `null` stands for no value, in the file and after a flag.

    Each entry of the file becomes the flag of the same name, so that the same rules apply to the file and the command
    line; flags on the command line come later and win. A data set on the command line replaces the one in the file, a
    number of epochs its number of steps, and an objective the options of other objectives.

    Raises:
        InputError: for an unreadable file, an unknown key or flag (naming the nearest known one), a bad value, an
            output folder that cannot be created, or a network or noise schedule that cannot be built.
    """
    for number, argument in enumerate(arguments, 1):
        if TOKEN.search(argument):
            raise InputError(f"argument {number} holds a token{TOKEN_HINT}, where no log or model can show it")
    parser = _Parser(TrainConfig, allow_abbrev=False, description="Trains a diffusion model of images.")
    parser.add_argument("--config", type=Path, help="YAML file whose keys are the flags below")
    known, unknown = parser.parse_known_args(arguments)
    for token in unknown:  # never print a value: it may be a secret
        if not token.startswith("--"):
            raise InputError(f"argument {arguments.index(token) + 1} belongs to no flag; write --name value")
        name = one_line(token.removeprefix("--").split("=")[0])[:100]
        raise InputError(f"unknown flag --{name}{_nearest(name, '--')}")
    path = known.config and known.config.expanduser()
    if path is None:
        path = DEFAULT_CONFIG_PATH
        logger.info("no --config given: using configs/%s", path.name)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"the configuration {path} is not a mapping of keys to values")
    for key in values:
        if key not in TYPES:
            raise InputError(f"unknown key {shown(key)} in {path}{_nearest(shown(key))}")
    given = {token.removeprefix("--").split("=")[0].replace("-", "_") for token in arguments if token.startswith("--")}
    for flag, keys in _replaced(values, known.objective).items():
        replaced = [key for key in keys if values.get(key) is not None and (key == flag or key not in given)]
        if replaced and flag in given and getattr(known, flag) is not None:
            logger.info("--%s replaces %s of %s", flag, ", ".join(replaced), path.name)
            values = {key: value for key, value in values.items() if key not in replaced}
    flags_of_file = itertools.chain(*(_flags(path, key, value) for key, value in values.items()))
    options = vars(parser.parse_args([*flags_of_file, *arguments]))
    del options["config"]
    config = TrainConfig(**options)
    check_output_dir(config.output_dir)
    check_model(config)
    return config


def _replaced(values: dict, objective: str) -> dict[str, list[str]]:
    """Flag -> the keys of the file that it replaces."""
    of_hub = ["dataset_name", "dataset_config_name", "dataset_revision", "streaming"]
    return {
        "dataset_name": [*of_hub, "train_data_dir"],
        "train_data_dir": [*of_hub, "validation_split"] if values.get("dataset_name") else [],
        "num_epochs": ["max_train_steps"],
        "objective": [key for key in values if objective not in LIMITS[key].get("only", objective).split()],
    }


def _flags(path: Path, key: str, value) -> list[str]:
    """An entry of a YAML file as command-line arguments."""
    if value is None and not _is_optional(TYPES[key]):
        raise InputError(f"{key} is null in {path}; it needs a value")
    is_text = TYPES[key] in (str, str | None) or typing.get_origin(TYPES[key]) is Literal
    if is_text and not isinstance(value, str | None):  # such as a bare no, which YAML reads as False
        raise InputError(f"{key} in {path} is {shown(value)}; it should be text, put it in quotes")
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={'null' if value is None else value}"]  # with "=", -1 is not read as a flag


def _is_optional(annotation) -> bool:
    return type(None) in typing.get_args(annotation)


def _nearest(name: str, prefix: str = "") -> str:
    if "token" in name.lower():
        return TOKEN_HINT
    name = name.replace("-", "_")
    if name in OF_DIFFUSERS:
        return f"; {OF_DIFFUSERS[name]}"
    matches = difflib.get_close_matches(name, [*TYPES, "config"], n=1, cutoff=0.4)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""


class _YamlLoader(yaml.SafeLoader):
    """Refuses duplicate keys; PyYAML would silently use the last one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in [key for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"]:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, "duplicate key", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path):
    """The content of a YAML file. Messages do not quote it, because a line may hold a secret.

    Raises:
        InputError: if it cannot be read or has a duplicate key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        token = TOKEN.search(text)
        if token is None:
            return yaml.load(text, _YamlLoader)
        reason = f"line {text[: token.start()].count(chr(10)) + 1} holds a token{TOKEN_HINT}; remove it"
    except OSError as error:
        reason = error.strerror
    except yaml.MarkedYAMLError as error:
        reason = f"line {error.problem_mark.line + 1}: {one_line(error.problem)}"
    except (yaml.YAMLError, ValueError):  # ValueError: not UTF-8, or a value like 2026-99-99
        reason = "it is not YAML in UTF-8, or a value does not fit its type"
    raise InputError(f"cannot read the configuration {path}: {reason}")


def check_model(config: TrainConfig) -> None:
    """Raises InputError if the network, which it builds on the meta device, or the noise process is impossible."""
    try:
        with torch.device("meta"):
            CustomUNet2DModel(**config.unet_kwargs())
        config.noise_scheduler()
    except ValueError as error:
        raise InputError(str(error)) from error


def check_output_dir(output_dir: str) -> None:
    """Raises InputError unless the folder exists or can be created; does not create it."""
    path = Path(output_dir).absolute()
    there = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {shown(output_dir)}: {there} is not a writable folder; choose another one")
