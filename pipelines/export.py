"""The model repository: a folder that strangers load with one line, because its code travels with it.

    FOLDER/model_index.json              names the pipeline class and its components
    FOLDER/custom_unet_pipeline.py       code of the pipeline
    FOLDER/unet/                         weights (safetensors), config.json, custom_unet_2d.py (code of the network)
    FOLDER/scheduler/                    the sampler's configuration

It loads three ways: `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` anywhere,
`CustomUNetPipeline.from_pretrained(FOLDER)` in this repository, and `UNet2DModel.from_pretrained(FOLDER,
subfolder="unet")` without any code but diffusers'.
"""

import json
import shutil
import sys
from pathlib import Path

from pipelines.custom_unet_pipeline import CustomUNetPipeline


def export_pipeline(pipeline: CustomUNetPipeline, folder: Path) -> Path:
    """Writes the model repository; an existing one is replaced only once the new one is complete.

    `save_pretrained` alone would name the modules by their dotted path here and ship no code.

    Raises:
        OSError: if the folder cannot be written; an existing one is untouched.
    """
    temporary, old = (folder.with_name(f".tmp-{prefix}{folder.name}") for prefix in ("", "old-"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    code = {
        "_class_name": _ship_code(type(pipeline), temporary),
        "unet": _ship_code(type(pipeline.unet), temporary / "unet"),
    }
    _edit_json(temporary / "model_index.json", code)
    _edit_json(temporary / "unet" / "config.json", {})
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _edit_json(path: Path, changes: dict) -> None:
    """Applies the changes, and drops the path that the weights were loaded from: it tells of the author's machine."""
    values = json.loads(path.read_text()) | changes
    values.pop("_name_or_path", None)
    path.write_text(json.dumps(values, indent=2) + "\n")


def _ship_code(cls: type, folder: Path) -> list[str]:
    """Copies the one file that defines a class; returns [module, class] as `model_index.json` wants it."""
    source = Path(sys.modules[cls.__module__].__file__)
    shutil.copyfile(source, folder / source.name)
    return [source.stem, cls.__name__]
