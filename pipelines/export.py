"""The model repository: a folder that strangers load with one line, because its code travels with it.

    FOLDER/README.md                     the model card, written from the files below
    FOLDER/model_index.json              names the pipeline class and its components
    FOLDER/custom_unet_pipeline.py       code of the pipeline
    FOLDER/unet/                         weights (safetensors), config.json, custom_unet_2d.py (code of the network)
    FOLDER/scheduler/                    the sampler's configuration; of an SDE, sde.py besides (code of the SDE)
    FOLDER/training.json                 facts of the run
    FOLDER/training_config.yaml          its configuration
    FOLDER/samples.png                   a grid of samples
    FOLDER/results.json                  measurements, once there are any

It loads three ways: `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` anywhere,
`CustomUNetPipeline.from_pretrained(FOLDER)` in this repository, and `UNet2DModel.from_pretrained(FOLDER,
subfolder="unet")` without any code but diffusers', which samples no SDE.

    python -m pipelines.export card --pipeline DIR                    write the card anew
    python -m pipelines.export copy --pipeline DIR --out DIR2 ...     in half precision, in shards, ...
    python -m pipelines.export push --pipeline DIR --repo_id NAME     to the Hub

Exit codes: 0 done; 1 the push failed; 2 bad input.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import torch

from common import Failed, InputError
from pipelines.custom_unet_pipeline import CustomUNetPipeline
from pipelines.hub import model_files, push_to_hub
from pipelines.loading import load_folder
from pipelines.model_card import read_weights, render_card, write_card

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors names them


def export_pipeline(
    pipeline: CustomUNetPipeline,
    folder: Path,
    *,
    facts: dict | None = None,
    training_config: str | None = None,
    sample_grid: Path | None = None,
    results: Path | None = None,
    max_shard_size: int | str | None = None,
    fp16_variant: bool = False,
) -> Path:
    """Writes the model repository; an existing one is replaced, as a whole, only once the new one is complete.

    Args:
        facts: of the run, for `training.json`; see `training/facts.py`.
        training_config: of the run, as YAML.
        sample_grid: picture that becomes `samples.png`.
        results: a `results.json` that was measured on these weights; without it the folder has none.
        max_shard_size: of a weights file, in bytes or as "15MB".
        fp16_variant: half-precision weights beside the others, for `variant="fp16"`.

    Raises:
        OSError: if the folder cannot be written, or holds something else; an existing one is untouched.
    """
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; take another folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists():
        raise FileExistsError(f"{folder} exists and is no model repository; it would be replaced: take another folder")
    temporary, old = (folder.with_name(f".tmp-{prefix}{folder.name}") for prefix in ("", "old-"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        _write_pipeline(pipeline, temporary, max_shard_size, fp16_variant)
        if facts is not None:
            (temporary / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        if training_config is not None:
            (temporary / "training_config.yaml").write_text(training_config)
        for source, target in ((sample_grid, "samples.png"), (results, "results.json")):
            if source is not None:
                shutil.copyfile(source, temporary / target)
        write_card(temporary, folder.resolve().name)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _write_pipeline(
    pipeline: CustomUNetPipeline, folder: Path, max_shard_size: int | str | None, fp16_variant: bool
) -> None:
    """Weights, configurations and code.

    `save_pretrained` alone would name the modules by their dotted path here and ship no code.
    """
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    unet = getattr(pipeline.unet, "_orig_mod", pipeline.unet)  # of torch.compile
    if fp16_variant:
        half = type(unet).from_pretrained(folder / "unet", torch_dtype=torch.float16)
        half.save_pretrained(folder / "unet", variant="fp16", max_shard_size=max_shard_size or "10GB")
    module, name = _ship_code(type(unet), folder / "unet")
    index = {"_class_name": _ship_code(type(pipeline), folder), "unet": [module, name]}
    index["scheduler"] = _ship_code(type(pipeline.scheduler), folder / "scheduler")
    if module != "diffusers":
        index["auto_map"] = {"AutoModel": f"{module}.{name}"}
    _edit_json(folder / "model_index.json", index)
    _edit_json(folder / "unet" / "config.json", {})


def _edit_json(path: Path, changes: dict) -> None:
    """Applies the changes, and drops the path that the weights were loaded from: it tells of the author's machine."""
    values = json.loads(path.read_text()) | changes
    values.pop("_name_or_path", None)
    path.write_text(json.dumps(values, indent=2) + "\n")


def _ship_code(cls: type, folder: Path) -> list[str]:
    """Copies the one file that defines a class; returns [module, class] as `model_index.json` wants it."""
    if cls.__module__.split(".")[0] == "diffusers":
        return ["diffusers", cls.__name__]
    source = Path(sys.modules[cls.__module__].__file__)
    shutil.copyfile(source, folder / source.name)
    return [source.stem, cls.__name__]


def copy_pipeline(
    source: Path, folder: Path, dtype: str | None = None, max_shard_size: str | None = None, fp16_variant: bool = False
) -> Path:
    """Writes a model repository anew with other weights files and the code of today.

    Measurements go along only if the numbers of the weights stay what they are.

    Args:
        dtype: one of `DTYPES`; by default that of the source.

    Raises:
        InputError: if the source is no sound model repository.
        OSError: see `export_pipeline`.
    """
    names = model_files(source)
    render_card(source)  # reads what is copied, and so finds damage before anything is written
    stored = STORED_DTYPES.get(read_weights(source / "unet")["dtype"])
    if stored is None:
        raise InputError(f"the weights of {source} are of none of the types {', '.join(STORED_DTYPES)}")
    wanted = DTYPES[dtype] if dtype else stored
    weights = [source / name for name in names if name.endswith(".safetensors") and ".fp16" not in name]
    pipeline = load_folder(source, weights, wanted)
    same_numbers = wanted in (stored, torch.float32)
    optional = {path.name: path for path in source.iterdir()}
    return export_pipeline(
        pipeline,
        folder,
        facts=json.loads(optional["training.json"].read_text()) if "training.json" in optional else None,
        training_config=optional["training_config.yaml"].read_text() if "training_config.yaml" in optional else None,
        sample_grid=optional.get("samples.png"),
        results=optional.get("results.json") if same_numbers else None,
        max_shard_size=max_shard_size,
        fp16_variant=fp16_variant,
    )


def export_variant(pipeline: CustomUNetPipeline, source: Path, folder: Path, changes: dict) -> Path:
    """Writes a model repository of the same training as `source` with other weights, those of the pipeline.

    What was measured and drawn with the weights of `source` stays behind: held-out losses, samples and results.

    Args:
        changes: to the facts of the run, such as `step`.

    Raises:
        OSError: if a file of `source` is missing, and as `export_pipeline`.
    """
    facts = json.loads((source / "training.json").read_text()) | {"heldout": None, "samples_step": None} | changes
    training_config = (source / "training_config.yaml").read_text()
    return export_pipeline(pipeline, folder, facts=facts, training_config=training_config)


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", text.upper()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 15MB")
    return text.upper()


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m pipelines.export", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    card = commands.add_parser("card", help="write the model card anew", allow_abbrev=False)
    copy_ = commands.add_parser("copy", help="write the folder anew with other weights files", allow_abbrev=False)
    push = commands.add_parser("push", help="push the folder to the Hub", allow_abbrev=False)
    for command in (card, copy_, push):
        command.add_argument("--pipeline", type=Path, required=True, help="the model repository's folder")
    copy_.add_argument("--out", type=Path, required=True, help="the folder to write")
    copy_.add_argument("--dtype", choices=DTYPES, help="type of the weights; by default as they are")
    copy_.add_argument("--fp16_variant", action="store_true", help='add half-precision weights for variant="fp16"')
    copy_.add_argument("--max_shard_size", type=_size, help="largest weights file, as 15MB")
    push.add_argument("--repo_id", required=True, help="name on the Hub, with or without the user's name before it")
    push.add_argument("--private", action="store_true", help="create the repository as a private one")
    push.add_argument("--revision", help="branch to push to, created where there is none; main by default")
    args, unknown = parser.parse_known_args(arguments)
    if unknown:  # a value may be a secret, so none is printed
        flags = [token.split("=")[0] for token in unknown if token.startswith("-")]
        parser.error(f"unknown flag {flags[0]}" if flags else "an argument belongs to no flag")
    return args


def main(arguments: list[str]) -> int:
    try:
        args = parse_arguments(arguments)
        if args.command == "card":
            model_files(args.pipeline)
            write_card(args.pipeline)
            print(f"wrote {args.pipeline / 'README.md'}")
        elif args.command == "copy":
            print(
                f"wrote {copy_pipeline(args.pipeline, args.out, args.dtype, args.max_shard_size, args.fp16_variant)}"
            )
        else:
            print(f"pushed: {push_to_hub(args.pipeline, args.repo_id, args.private, args.revision)}")
    except (Failed, InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, Failed) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
