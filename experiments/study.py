"""What an ablation study compares: a YAML file.

config: configs/celeba32_cpu.yaml    what all variants share, a file of configs/
flags: {max_train_steps: 500}        and flags of train_unet.py beside it
minutes: 30                          instead of max_train_steps: each trains for the images of so long, see below
evaluation: {num_images: 1024}       flags of eval.run; its metrics are swd, memorisation and heldout unless named
seeds: [0, 1]                        of the trainings
variants:                            the first is what the others are compared with
  base: {}
  edm: {flags: {objective: edm}, evaluation: {sampler: edm_heun}}
  no_skips: {network: no_skips}      a network of experiments.unet_variants

With `minutes` all variants get equal time, not equal images: the speeds of their updates are measured side by side,
and each trains for as many updates as it makes in that time on an otherwise idle machine. What else the machine does
while they train is then of no consequence.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from common import InputError
from experiments.unet_variants import VARIANTS
from training.arguments import read_yaml
from training.config import shown

KEYS = "config flags minutes evaluation seeds variants".split()
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
OWN = {  # what `experiments.ablation` itself sets
    "flags": "config help dataset_name train_data_dir seed output_dir num_cpu_threads overwrite_output_dir".split(),
    "evaluation": "help pipeline reference out images_dir num_cpu_threads".split(),
}


@dataclass(frozen=True)
class Variant:
    """What one variant changes: flags of the trainer and of eval.run, and the network."""

    name: str
    flags: dict
    evaluation: dict
    network: str | None  # one of `experiments.unet_variants`


@dataclass(frozen=True)
class Study:
    """A study as its file has it."""

    config: str
    flags: dict
    evaluation: dict
    minutes: float | None  # of training at full speed, for each variant
    seeds: list[int]
    variants: list[Variant]  # the first is what the others are compared with


def read_study(path: Path) -> Study:
    """Reads a study.

    Raises:
        InputError: if it cannot be read or is not as described above.
    """
    content = _mapping(read_yaml(path), str(path), KEYS)
    config, minutes, seeds = content.get("config"), content.get("minutes"), content.get("seeds", [0])
    if not isinstance(config, str):
        raise InputError(f"config in {path} is {shown(config)}; give a file of configs/")
    if minutes is not None and (type(minutes) not in (int, float) or not 0 < minutes < math.inf):
        raise InputError(f"minutes in {path} is {shown(minutes)}; give a positive number")
    numbers = seeds if isinstance(seeds, list) else []
    if not numbers or any(type(seed) is not int or seed < 0 or numbers.count(seed) > 1 for seed in numbers):
        raise InputError(f"seeds in {path} is {seeds!s:.60}; give a list of whole numbers from 0, each once")
    variants = []
    for name, changes in _mapping(content.get("variants"), f"variants in {path}").items():
        if not NAME.fullmatch(name):
            raise InputError(f"a variant in {path} is called {shown(name)}; use letters, digits and . _ + -")
        changes = _mapping(changes, f"{name} in {path}", ["flags", "evaluation", "network"])
        network = changes.get("network")
        if network is not None and network not in VARIANTS:
            raise InputError(f"network of {name} in {path} is {shown(network)}; choose one of {', '.join(VARIANTS)}")
        variants.append(Variant(name, **_flags_and_evaluation(changes, name, minutes), network=network))
    if len(variants) < 2:
        raise InputError(f"the number of variants in {path} is {len(variants)}; give two or more")
    shared = _flags_and_evaluation(content, str(path), minutes)
    return Study(config, minutes=minutes, seeds=seeds, variants=variants, **shared)


def _flags_and_evaluation(content: dict, where: str, minutes: float | None) -> dict[str, dict]:
    found = {kind: _mapping(content.get(kind), f"{kind} of {where}") for kind in OWN}
    for kind, names in found.items():
        for name in names:
            if name in OWN[kind] or (minutes is not None and name == "max_train_steps"):
                by = "minutes decides" if name == "max_train_steps" else "the command itself sets"
                raise InputError(f"{kind} of {where} has {name}, which {by}; remove it")
    return found


def _mapping(value, what: str, keys: list[str] | None = None) -> dict:
    """The value, or an empty mapping for none."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise InputError(f"{what} is {shown(value)}; it must be a mapping of names to values")
    for key in value:
        if not isinstance(key, str):
            raise InputError(f"{what} has the key {shown(key)}, which is not text; put it in quotes")
        if keys is not None and key not in keys:
            raise InputError(f"{what} has the unknown key {shown(key)}; there are {', '.join(sorted(keys))}")
    return value


def flags_as_arguments(flags: dict) -> list[str]:
    """As a command line has them; None is `null`."""
    arguments = []
    for name, value in flags.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is True:
            arguments.append(f"--{name}")
        elif value is None:
            arguments += [f"--{name}", "null"]
        else:
            arguments.append(f"--{name}={value}")
    return arguments
