"""Reads the configuration of a training run from a YAML file and the command line."""

import difflib
import errno
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

from common import InputError
from custom_unet import CustomUNet2DModel
from training.config import LIMITS, TYPES, TrainConfig, shortened, shown

logger = logging.getLogger(__name__)

DEFAULT_CONFIG_PATH = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
FOR_HUB = ("dataset_config_name", "dataset_revision", "streaming")  # keys that describe a data set on the Hub
MOST_PARAMETERS = 10**10  # with gradients, moments and EMA 200 GB per device
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
        raise InputError(shortened(message))


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
            raise InputError(f"argument {number} holds a token{_nearest('token')}, where no log or model can show it")
    parser = _Parser(TrainConfig, allow_abbrev=False, description="Trains a diffusion model of images.")
    parser.add_argument("--config", type=Path, help="YAML file whose keys are the flags below")
    known, unknown = parser.parse_known_args(arguments)
    for token in unknown:  # never print a value: it may be a secret
        if not token.startswith("--"):
            raise InputError(f"argument {arguments.index(token) + 1} belongs to no flag; write --name value")
        name = shortened(token.removeprefix("--").split("=")[0])
        raise InputError(f"unknown flag --{name}{_nearest(name, '--')}")
    path = known.config and known.config.expanduser()
    if path is None:
        path = DEFAULT_CONFIG_PATH
        logger.info("no --config given: using configs/%s", path.name)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"the configuration {path} is not a mapping of keys to values")
    flags_of_file = _flags(path, values)
    given = {token.removeprefix("--").split("=")[0].replace("-", "_") for token in arguments if token.startswith("--")}
    for flag in ("dataset_name", "train_data_dir", "num_epochs", "objective"):
        value = getattr(known, flag)
        displaced = [] if flag not in given or value is None else _displaced(values, flag, value)
        displaced = [key for key in displaced if key == flag or key not in given]
        if displaced:
            logger.info("--%s replaces %s of %s", flag, ", ".join(displaced), path.name)
            flags_of_file = {key: flags for key, flags in flags_of_file.items() if key not in displaced}
    arguments = [*itertools.chain(*flags_of_file.values()), *arguments]
    config, _ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    check_output_dir(config.output_dir)
    check_model(config)
    return config


def _displaced(values: dict, flag: str, value: str) -> list[str]:
    """The keys of the file that a flag for the data, the length or the objective replaces."""
    if flag == "objective":
        return [key for key in values if value not in LIMITS[key].get("only", value).split()]
    if flag == "num_epochs":
        return ["max_train_steps"] if values.get("max_train_steps") is not None else []
    there = [key for key in ("dataset_name", "train_data_dir") if values.get(key) is not None]
    if not there or values.get(flag) == value:
        return []
    of_other_images = [*FOR_HUB, "validation_split"] if flag not in there else FOR_HUB
    return [*there, *(key for key in of_other_images if values.get(key))]


def _flags(path: Path, values: dict) -> dict[str, list[str]]:
    """The entries of a YAML file as command-line arguments, by key."""
    arguments = {}
    for key, value in values.items():
        if key not in TYPES:
            raise InputError(f"unknown key {shown(key)} in {path}{_nearest(shown(key))}")
        if value is None and not _is_optional(TYPES[key]):
            raise InputError(f"{key} is null in {path}; it needs a value")
        annotation = int if key == "resolution" and not isinstance(value, list) else TYPES[key]
        if value is not None and not _suits(value, annotation):
            quotes = "; put it in quotes" if _is_text(TYPES[key]) and isinstance(value, (bool, int, float)) else ""
            kind = TYPES[key].__name__ if isinstance(TYPES[key], type) else TYPES[key]
            raise InputError(f"{key} in {path} is {shown(value)}; it should be {kind}{quotes}")
        if isinstance(value, list):
            arguments[key] = [f"--{key}", *map(str, value)]
        else:  # with "=", a value that begins with a dash is not read as a flag
            arguments[key] = [f"--{key}={'null' if value is None else value}"]
    return arguments


def _suits(value, annotation) -> bool:
    """Whether argparse can convert a value from a YAML file to the type of an option."""
    if typing.get_origin(annotation) is list:
        (kind,) = typing.get_args(annotation)
        # an entry that begins with a dash would be read as a flag
        return isinstance(value, list) and all(type(v) is kind and not str(v).startswith("-") for v in value)
    return isinstance(value, str) or (isinstance(value, (bool, int, float)) and not _is_text(annotation))


def _is_text(annotation) -> bool:
    return typing.get_origin(annotation) is Literal or str in (annotation, *typing.get_args(annotation))


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
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        text = path.read_text(encoding="utf-8")
        token = TOKEN.search(text)
        if token is None:
            return yaml.load(text, _YamlLoader)
        reason = f"line {text[: token.start()].count(chr(10)) + 1} holds a token{TOKEN_HINT}; remove it"
    except OSError as error:
        reason = error.strerror
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = f"line {mark.line + 1 if mark else 1}: {shortened(error.problem)}"
    except RecursionError:
        reason = "it is nested too deep"
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError):  # from PyYAML, as for 2026-99-99
        reason = "it is not YAML in UTF-8, or a value does not fit its type"
    raise InputError(f"cannot read the configuration {shown(str(path))}: {reason}")


def check_model(config: TrainConfig) -> None:
    """Builds the network on the meta device, and the noise process.

    Raises:
        InputError: if either cannot be built, the noise schedule is unusable, or the network is too large.
    """
    try:
        with torch.device("meta"):
            network = CustomUNet2DModel(**config.unet_kwargs())
    except ValueError as error:
        raise InputError(str(error)) from error
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    if num_parameters > MOST_PARAMETERS:
        raise InputError(
            f"the network would have {num_parameters:,} parameters, more than {MOST_PARAMETERS:,}; lower"
            " --block_out_channels or --layers_per_block"
        )
    config.noise_scheduler()


def check_output_dir(output_dir: str) -> None:
    """Raises InputError unless the folder exists or can be created; does not create it."""
    path = Path(output_dir).absolute()
    there = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {shown(output_dir)}: {there} is not a writable folder; choose another one")
