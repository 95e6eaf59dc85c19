"""The model card: the README.md of a model repository, generated from its other files.

    model_index.json, unet/config.json, scheduler/    what the model is
    training.json          facts of the training run: steps, images, time, data, hardware, held-out losses
    training_config.yaml   its resolved configuration
    samples.png            a grid of samples
    results.json           measurements; `eval/results.py` describes their format

training.json, training_config.yaml, samples.png and results.json may be missing; the card then says what is unknown.
CelebA is recognised by its name in the name of the data, or by one of its crops. The text of the card is in
`model_card_template.md`, and its references are in `citations.bib`.
"""

import json
import math
import re
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData
from safetensors import SafetensorError, safe_open

from common import InputError, one_line
from pipelines.card_edits import keep_edits
from pipelines.custom_unet_pipeline import discrete_samplers
from training.images import height_and_width
from training.log import trained_on_celeba
from training.sde import SDEScheduler, continuous_samplers

TASK = "unconditional-image-generation"
CELEBA_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
TEMPLATE, CITATIONS = (Path(__file__).with_name(name) for name in ("model_card_template.md", "citations.bib"))
SETTINGS = "mode floor n n_reference dataset split sampler steps eta".split()  # of a result


def write_card(folder: Path, name: str | None = None, previous: str | None = None) -> None:
    """Writes FOLDER/README.md and keeps manual edits of the previous card, by default the one in the folder."""
    previous = read_card(folder) if previous is None else previous
    (folder / "README.md").write_text(render_card(folder, name, previous), encoding="utf-8", errors="surrogateescape")


def read_card(folder: Path) -> str:
    """The text of a model repository's card; empty if it has none."""
    path = folder / "README.md"
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""


def render_card(folder: Path, name: str | None = None, previous: str = "") -> str:
    """The model card as Markdown with its YAML metadata.

    Args:
        folder: a model repository.
        name: model that the code examples load, a Hub id or a folder; by default the folder's name.
        previous: an older card, whose edits are kept; see `card_edits`.

    Raises:
        InputError: if a required file is missing, or a file cannot be read.
    """
    files = {
        "name": name or folder.resolve().name,
        "unet": read_mapping(folder / "unet" / "config.json"),
        "weights": _read_weights(folder / "unet"),
        "scheduler": read_mapping(folder / "scheduler" / "scheduler_config.json"),
        "facts": read_mapping(folder / "training.json", optional=True),
        "config": read_mapping(folder / "training_config.yaml", optional=True),
        "results": read_mapping(folder / "results.json", optional=True).get("results", []),
        "has_samples": (folder / "samples.png").is_file(),
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # the plus makes an undefined value an error that names it
    environment.filters |= {"n": lambda value: f"{+value:,}", "g": lambda value: f"{+value:g}", "cell": _cell}
    try:
        values = files | _derived(**files)
        text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)
        card = f"---\n{_metadata(**values).to_yaml()}\n---\n\n{text}\n"
    except (jinja2.UndefinedError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"a value in one of the files of {folder} is missing or wrong: {one_line(error)}") from error
    return keep_edits(card, previous)


def read_mapping(path: Path, optional: bool = False) -> dict:
    """The content of a JSON or YAML file, {} if it is optional and missing; raises InputError if it cannot be read."""
    if optional and not path.exists():
        return {}
    try:
        values = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds {type(values).__name__}; it should be a mapping of names to values")
    return values


def _read_weights(folder: Path) -> dict:
    """`num_parameters`, `num_bytes` and `dtype` of the weights in a folder, without those of variants like fp16."""
    weights = {"num_parameters": 0, "num_bytes": 0, "dtype": None}
    for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        if path.name.count(".") > 1:
            continue
        try:
            with safe_open(path, framework="pt") as file:
                tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (not a dictionary)
            weights["num_bytes"] += path.stat().st_size
            weights["num_parameters"] += sum(math.prod(tensor.get_shape()) for tensor in tensors)
            weights["dtype"] = tensors[0].get_dtype()
        except (SafetensorError, OSError, IndexError) as error:  # IndexError if there is no tensor
            raise InputError(f"{path} is damaged: {error}") from error
    return weights


def _derived(name: str, unet: dict, scheduler: dict, facts: dict, config: dict, results: list, **_) -> dict:
    """What the template and the metadata need besides the files themselves."""
    data, dataset_id, size = facts.get("data", {}), config.get("dataset_name"), unet["sample_size"]
    # a folder of photographs may have this name as well
    is_synthetic = data.get("source") == "synthetic-faces" and not config.get("train_data_dir")
    sde = {}
    if scheduler["_class_name"] == SDEScheduler.__name__:
        process = SDEScheduler.from_config(scheduler)
        levels = {key: getattr(process.sde, key, None) for key in ("sigma_min", "sigma_max")}  # null in some files
        sde = {**process.config} | levels
    entries = re.findall(r"^(@\w+\{(\w+),.*?^\})", CITATIONS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return {
        "title": name.split("/")[-1] if "/" in name else config.get("output_dir") or name,
        "data": data,
        "dataset_id": None if dataset_id == "synthetic-faces" else dataset_id,
        "is_celeba": trained_on_celeba(facts),
        "data_are_celeba": trained_on_celeba({"data": data}),
        "is_synthetic": is_synthetic,
        "is_only_synthetic": is_synthetic and not facts.get("pretrained"),
        "sde": sde,  # empty unless it was trained in continuous time
        "is_flow": sde.get("objective") == "flow",
        "num_classes": max((unet.get("num_class_embeds") or 1) - 1, 0),  # the last embedding is the null class
        "resolution": "x".join(map(str, height_and_width(size))),
        "is_square": len({*height_and_width(size)}) == 1,
        "channels": unet.get("in_channels"),
        "is_grey": unet.get("in_channels") in (1, 2),
        "sampler_names": continuous_samplers(sde["objective"]) if sde else discrete_samplers(scheduler),
        "columns": [key for key in SETTINGS if any(result.get(key) is not None for result in results)],
        "bibtex": {key: entry for entry, key in entries},
    }


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str("" if value is None else value)


def _metadata(**model) -> ModelCardData:
    is_celeba, is_synthetic = model["is_celeba"], model["is_synthetic"]
    licence = {"license": "apache-2.0"} if model["is_only_synthetic"] else {}
    if is_celeba:
        licence = {"license": "other", "license_name": "celeba-agreement", "license_link": CELEBA_PAGE}
    kind = ["score-based", "sde"] if model["sde"] else ["ddpm", "ddim"]
    kind = ["flow-matching", "rectified-flow"] if model["is_flow"] else kind
    tags = ["diffusers", "pytorch", "diffusion", *kind, "unet", TASK, "custom_code"]
    tags += ["class-conditional"] if model["num_classes"] else []
    results = [_eval_result(model, result) for result in model["results"] if result.get("value") is not None]
    return ModelCardData(
        **licence,
        library_name="diffusers",
        pipeline_tag=TASK,
        datasets=[model["dataset_id"]] if model["dataset_id"] else None,
        tags=tags + (["faces"] if is_celeba or is_synthetic else []),
        model_name=model["title"] if results else None,
        eval_results=results or None,
    )


def _eval_result(model: dict, result: dict) -> EvalResult:
    settings = {key: result[key] for key in SETTINGS if key != "floor" and result.get(key) is not None}
    words = {"n": "n = {:,}", "sampler": "{}", "steps": "{} steps"}
    details = [text.format(settings[key]) for key, text in words.items() if key in settings]
    dataset_name = settings.get("dataset") or model["data"].get("source", "unknown")
    return EvalResult(
        task_type=TASK,
        task_name="Unconditional image generation",
        dataset_type=model["dataset_id"] or dataset_name,
        dataset_name=f"{dataset_name} {model['resolution']}",
        dataset_split=settings.get("split"),
        metric_type=result["metric"],
        metric_name=", ".join([result["name"], *details]),
        metric_config=settings.get("mode"),
        metric_value=result["value"],
        metric_args=settings or None,
    )
