"""The model repository: a folder that anyone can load with one line, because it contains its code.

    FOLDER/README.md                     the model card, written from the files below
    FOLDER/model_index.json              names of the pipeline class and its components
    FOLDER/custom_unet_pipeline.py       code of the pipeline
    FOLDER/unet/                         weights (safetensors), config.json, custom_unet_2d.py (code of the network)
    FOLDER/scheduler/                    the sampler's configuration; for an SDE also sde.py, with its samplers
    FOLDER/training.json                 facts of the training run
    FOLDER/training_config.yaml          its configuration
    FOLDER/samples.png                   a grid of samples
    FOLDER/results.json                  measurements, once there are any

docs/hub.md describes the three ways to load it.

    python -m pipelines.export card --pipeline DIR                    regenerate the model card
    python -m pipelines.export push --pipeline DIR --repo_id NAME     push it to the Hub

Exit codes: 0 done, 1 failed, 2 bad input.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from common import InputError, Parser, run_command
from pipelines import CustomUNetPipeline
from pipelines.hub import model_files, push_to_hub
from pipelines.model_card import read_card, write_card


def check_replaceable(folder: Path) -> None:
    """Raises InputError if the folder holds something other than a model repository."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise InputError(f"{folder} is not a model repository and would be replaced; choose another folder")


def export_pipeline(
    pipeline: CustomUNetPipeline,
    folder: Path,
    *,
    facts: dict | None = None,
    training_config: str | None = None,
    sample_grid: Path | None = None,
) -> Path:
    """Writes the model repository; an existing one is replaced only when the new one is complete.

    Manual edits of the existing model card are kept.

    Args:
        facts: facts of the run for `training.json`; see `facts` in `training/log.py`.
        training_config: configuration of the run, as YAML.
        sample_grid: picture to copy to `samples.png`.

    Raises:
        InputError: if the folder holds something other than a model repository.
        OSError: if the folder cannot be written; an existing one is left unchanged.
    """
    check_replaceable(folder)
    temporary, old = (folder.with_name(f".tmp-{prefix}{folder.name}") for prefix in ("", "old-"))
    previous_card = read_card(folder if folder.exists() else old)  # `old` remains if an earlier export was killed
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        pipeline.save_pretrained(temporary)
        if facts is not None:
            (temporary / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        if training_config is not None:
            (temporary / "training_config.yaml").write_text(training_config)
        if sample_grid is not None:
            shutil.copyfile(sample_grid, temporary / "samples.png")
        write_card(temporary, folder.resolve().name, previous_card)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m pipelines.export", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    card = commands.add_parser("card", help="regenerate the model card", allow_abbrev=False)
    push = commands.add_parser("push", help="push the folder to the Hub", allow_abbrev=False)
    for command in (card, push):
        command.add_argument("--pipeline", type=Path, required=True, help="folder of the model repository")
    push.add_argument("--repo_id", required=True, help="name on the Hub, with or without the user's namespace")
    push.add_argument("--private", action="store_true", help="create a private repository")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    if options.command == "card":
        model_files(options.pipeline)
        write_card(options.pipeline)
        print(f"wrote {options.pipeline / 'README.md'}")
    else:
        print(f"pushed: {push_to_hub(options.pipeline, options.repo_id, options.private)}")


def main(arguments: list[str]) -> int:
    return run_command(lambda: run(parse_options(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
