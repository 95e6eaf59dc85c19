"""Reads the YAML file that describes an ablation study.

config: configs/celeba32_cpu.yaml    base configuration of all variants, relative to the current folder
flags: {max_train_steps: 500}        further flags of train_unet.py, for all variants
minutes: 30                          instead of max_train_steps: the training time of each variant, see below
evaluation: {num_images: 1024}       flags of eval.run; the default metrics are swd, memorisation and heldout
seeds: [0, 1]                        seeds of the training runs (default [0])
variants:                            the first one is the baseline
  base: {}
  edm: {flags: {objective: edm}, evaluation: {sampler: edm_heun}}
  no_skips: {network: no_skips}      a network of experiments.unet_variants

With `minutes`, all variants get equal time instead of equal images: the speeds of their updates are measured side by
side, and each trains for the number of updates that it makes in that time on an otherwise idle machine. Other load
during training therefore makes no difference.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common import InputError
from experiments.unet_variants import VARIANTS
from training.arguments import read_yaml

# Flags of train_unet.py and eval.run
SET_BY_THE_COMMAND = set("config dataset_name train_data_dir seed output_dir num_cpu_threads".split())
SET_BY_THE_COMMAND |= {"pipeline", "reference", "out", "images_dir"}


@dataclass(frozen=True, eq=False)
class Variant:
    """The changes in one variant: flags of the trainer and of eval.run, and the network."""

    name: str
    flags: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    network: str = "plain"  # a key of `experiments.unet_variants.VARIANTS`


@dataclass(frozen=True)
class Study:
    """The content of a study file."""

    config: str
    variants: list[Variant]  # the first one is the baseline
    seeds: list[int]
    flags: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    minutes: float | None = None  # training time per variant at full speed


def read_study(path: Path) -> Study:
    """Reads a study. Raises InputError if the file cannot be read or does not follow the format above."""
    content = read_yaml(path)
    try:
        variants = [Variant(str(name), **(changes or {})) for name, changes in content["variants"].items()]
        checked = {"config": str(content["config"]), "variants": variants, "seeds": [*content.get("seeds", [0])]}
        study = Study(**content | checked)
        flags = {flag for part in (study, *variants) for flag in {**part.flags, **part.evaluation}}
        if not (variants and study.seeds) or (study.minutes is not None and study.minutes <= 0):
            raise TypeError("it needs variants, seeds and a positive number of minutes")
    except (TypeError, KeyError, AttributeError) as error:  # an unknown or missing key, or a value of the wrong type
        raise InputError(f"{path} does not have the format that experiments/study.py describes: {error}") from error
    for variant in variants:
        if variant.network not in VARIANTS:
            raise InputError(f"{variant.name} has the network {variant.network}; choose from {', '.join(VARIANTS)}")
    set_by_the_command = SET_BY_THE_COMMAND | ({"max_train_steps"} if study.minutes else set())
    if flags & set_by_the_command:
        raise InputError(f"the command itself sets {', '.join(sorted(flags & set_by_the_command))}; remove it")
    return study


def flags_as_arguments(flags: dict) -> list[str]:
    """Formats flags as command-line arguments; None becomes `null`."""
    arguments = []
    for name, value in flags.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is True:
            arguments.append(f"--{name}")
        else:
            arguments.append(f"--{name}={'null' if value is None else value}")
    return arguments
