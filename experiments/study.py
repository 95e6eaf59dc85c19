"""What is compared in an ablation study: a YAML file.

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
and each trains for as many updates as it makes in so long on a machine that does nothing else. What else the machine
does while they train is then of no consequence.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from common import InputError
from experiments.unet_variants import VARIANTS
from training.yaml_file import read_yaml, shown

KEYS = "config flags minutes evaluation seeds variants".split()
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
# What `experiments.ablation` itself sets: in a study's flags, and in its evaluation
OWN_FLAGS = set("config help dataset_name train_data_dir seed output_dir num_cpu_threads overwrite_output_dir".split())
OWN_OPTIONS = set("help pipeline reference out images_dir num_cpu_threads".split())


@dataclass(frozen=True)
class Variant:
    """What one variant changes: flags of the trainer and of eval.run, and the network."""

    name: str
    flags: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    network: str | None = None  # one of `experiments.unet_variants`


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
    content = _mapping(read_yaml(path), str(path), set(KEYS))
    if not isinstance(content.get("config"), str):
        raise InputError(f"config in {path} is {shown(content.get('config'))}; give a file of configs/")
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds:
        raise InputError(f"seeds in {path} is {shown(seeds)}; give a list of whole numbers")
    for seed in seeds:
        if type(seed) is not int or seed < 0 or seeds.count(seed) > 1:
            raise InputError(f"one of the seeds in {path} is {shown(seed)}; give whole numbers from 0, each once")
    minutes = content.get("minutes")
    if minutes is not None and (type(minutes) not in (int, float) or not 0 < minutes < math.inf):
        raise InputError(f"minutes in {path} is {shown(minutes)}; give a positive number")
    variants = []
    for name, changes in _mapping(content.get("variants"), f"variants in {path}").items():
        if not NAME.fullmatch(name):
            raise InputError(f"a variant in {path} is called {shown(name)}; take letters, digits and . _ + -")
        changes = _mapping(changes, f"{name} in {path}", {"flags", "evaluation", "network"})
        network = changes.get("network")
        if network is not None and network not in VARIANTS:
            raise InputError(f"network of {name} in {path} is {shown(network)}; take one of {', '.join(VARIANTS)}")
        variants.append(Variant(name, **_flags_and_evaluation(changes, f"{name} in {path}"), network=network))
    if len(variants) < 2:
        raise InputError(f"the number of variants in {path} is {len(variants)}; give two or more")
    for where, flags in {str(path): content.get("flags"), **{v.name: v.flags for v in variants}}.items():
        if minutes is not None and "max_train_steps" in (flags or {}):
            raise InputError(f"flags of {where} has max_train_steps, which minutes decides here; remove one")
    shared = _flags_and_evaluation(content, str(path))
    return Study(content["config"], minutes=minutes, seeds=seeds, variants=variants, **shared)


def _flags_and_evaluation(content: dict, where: str) -> dict[str, dict]:
    found = {}
    for kind, own in (("flags", OWN_FLAGS), ("evaluation", OWN_OPTIONS)):
        found[kind] = _mapping(content.get(kind), f"{kind} of {where}")
        for name in found[kind]:
            if name in own:
                raise InputError(f"{kind} of {where} has {name}, which is for the command itself to set; remove it")
    return found


def _mapping(value, what: str, keys: set[str] | None = None) -> dict:
    """The value, or an empty mapping for none."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise InputError(f"{what} is {shown(value)}; it must be a mapping of names to values")
    for key in value:
        if not isinstance(key, str):
            raise InputError(f"{what} has the key {shown(key)}, which is no text; put it in quotes")
        if keys is not None and key not in keys:
            raise InputError(f"unknown key {shown(key)} of {what}; there are {', '.join(sorted(keys))}")
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
