"""The model card: the README.md of a model repository, written from the other files that lie in it.

    model_index.json, unet/config.json, scheduler/    what the model is
    training.json          facts of the run: steps, images, time, data, hardware, held-out losses
    training_config.yaml   its resolved configuration
    samples.png            a grid of samples
    results.json           measurements, {"results": [RESULT, ...]}, where a RESULT has

        name    what a table calls it, as "FID (clean)"
        metric  its identifier in the metadata, as "fid"
        value   a finite number; null stands for not measured
        std     its standard deviation, and any of mode, n, n_reference, dataset, split, sampler, steps and eta, which
                say how it was measured; further keys are ignored

training.json, training_config.yaml, samples.png and results.json may be missing; the card then says what is not known.
CelebA is recognised by its name in that of the data, or by one of its crops. The text of the card is
`model_card_template.md`; the works that it cites are in `citations.bib`.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open

from common import InputError, one_line
from pipelines.custom_unet_pipeline import samplers_for
from training.sde import SDEScheduler

TASK = "unconditional-image-generation"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PREDICTS = {
    "epsilon": "the noise",
    "sample": "the clean image",
    "v_prediction": "v",
    "score": "the score",
    "edm": "a mixture of noise and clean image (EDM's preconditioning)",
    "flow_prediction": "the velocity (noise minus clean image)",
}
CELEBA_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
TEMPLATE, CITATIONS = (Path(__file__).with_name(name) for name in ("model_card_template.md", "citations.bib"))
CROPS = {
    "celeba_140": "the central 140x140 of the aligned 178x218 image (rows 39 to 178, columns 19 to 158), as in the"
    " code of score-based SDEs; FIDs do not compare with those of DDIM's 128x128 crop",
    "celeba_128": "128x128 of the aligned 178x218 image around row 121 and column 89 (rows 57 to 184, columns 25 to"
    " 152), as in the code of DDIM; FIDs do not compare with those of the central 140x140 crop",
    "center": "the central square",
    "none": "none; an image that is not square was stretched to a square",
}
# What an SDE model was trained with, by its objective; the numbers are those of its scheduler
OBJECTIVES = {
    "vp": "the variance-preserving SDE (VP; Song et al. 2021) dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw, beta(t)"
    " from {beta_min:g} to {beta_max:g} at times t from 0 to 1",
    "subvp": "the sub-VP SDE (Song et al. 2021), which has the drift of the variance-preserving SDE and less noise,"
    " beta(t) from {beta_min:g} to {beta_max:g} at times t from 0 to 1",
    "ve": "the variance-exploding SDE (VE; Song et al. 2021), noise levels from {sigma_min:g} to {sigma_max:g} for"
    " images in [-1, 1]",
    "edm": "the process of EDM (Karras et al. 2022), noise levels from {sigma_min:g} to {sigma_max:g} for images in"
    " [-1, 1]",
    "flow": "rectified flow (Liu et al. 2022), the straight paths x_t = (1 - t) x_0 + t epsilon from an image x_0 at"
    " time 0 to noise epsilon at time 1",
}
CLASSES_LISTED = 40
SETTINGS = "mode floor n n_reference dataset split sampler steps eta".split()  # of a result


@dataclass
class ModelFiles:
    """What the files of a model repository say.

    Attributes:
        name: what the code examples load: an id on the Hub or the folder's name.
        facts, config, results: empty if there is no such file.
        weights: what `read_weights` returns.
    """

    name: str
    unet: dict
    weights: dict
    scheduler: dict
    facts: dict
    config: dict
    results: list[dict]
    has_samples: bool

    @property
    def data(self) -> dict:
        return self.facts.get("data", {})

    @property
    def dataset_id(self) -> str | None:
        """The id of the training data on the Hub, if it comes from there."""
        name = self.config.get("dataset_name")
        return None if name == "synthetic-faces" else name

    @property
    def is_celeba(self) -> bool:
        return "celeba" in str(self.data.get("source")).lower() or str(self.data.get("crop")).startswith("celeba")

    @property
    def is_synthetic(self) -> bool:
        return self.data.get("source") == "synthetic-faces"

    @property
    def is_sde(self) -> bool:
        """Whether it was trained in continuous time."""
        return self.scheduler["_class_name"] == SDEScheduler.__name__

    @property
    def is_flow(self) -> bool:
        """Whether that was as a rectified flow."""
        return self.is_sde and self.scheduler.get("objective") == "flow"

    @property
    def sde_numbers(self) -> dict:
        """The configuration of its `SDEScheduler`, with the noise levels that stand there as null."""
        scheduler = SDEScheduler.from_config(self.scheduler)
        levels = {name: getattr(scheduler.sde, name, None) for name in ("sigma_min", "sigma_max")}
        return {**scheduler.config} | levels

    @property
    def num_classes(self) -> int:
        """0 for a network without class embeddings; the last embedding is that of no class."""
        return max((self.unet.get("num_class_embeds") or 1) - 1, 0)

    @property
    def title(self) -> str:
        return self.name.split("/")[-1] if "/" in self.name else self.config.get("output_dir") or self.name

    @property
    def resolution(self) -> str:
        size = self.unet["sample_size"]
        return "x".join(map(str, size if isinstance(size, list) else [size, size]))


def write_card(folder: Path, name: str | None = None) -> None:
    """Writes FOLDER/README.md anew; see `render_card`."""
    (folder / "README.md").write_text(render_card(folder, name), encoding="utf-8")


def render_card(folder: Path, name: str | None = None) -> str:
    """The model card as Markdown with its YAML metadata.

    Args:
        folder: a model repository.
        name: what the code examples load, an id on the Hub or a folder; by default the folder's name.

    Raises:
        InputError: if a file is missing that must be there, or one cannot be read.
    """
    files = read_files(folder, name or folder.resolve().name)
    try:
        metadata, text = _metadata(files).to_yaml(), _text(files)
    except (jinja2.UndefinedError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"a value in one of the files of {folder} that the card is written from is missing or wrong:"
            f" {one_line(error)}"
        ) from error
    return str(ModelCard(f"---\n{metadata}\n---\n\n{text}\n"))


def _text(files: ModelFiles) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"n": _formatted("{:,}"), "g": _formatted("{:g}"), "time": _time, "cell": _cell}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(_values(files))


def read_files(folder: Path, name: str) -> ModelFiles:
    """Raises InputError for a file that is missing or cannot be read."""
    results = _read(folder / "results.json", optional=True).get("results", [])
    for result in results if isinstance(results, list) else [results]:
        _check_result(result, folder / "results.json")
    return ModelFiles(
        name=name,
        unet=_read(folder / "unet" / "config.json"),
        weights=read_weights(folder / "unet"),
        scheduler=_read(folder / "scheduler" / "scheduler_config.json"),
        facts=_read(folder / "training.json", optional=True),
        config=_read(folder / "training_config.yaml", optional=True),
        results=results,
        has_samples=(folder / "samples.png").is_file(),
    )


def _read(path: Path, optional: bool = False) -> dict:
    if optional and not path.exists():
        return {}
    try:
        values = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds {type(values).__name__}; it should be a mapping of names to values")
    return values


def read_weights(folder: Path) -> dict:
    """`num_parameters`, `num_bytes` and `dtype` of the weights in a folder, and whether it `has_fp16` ones beside."""
    weights = {"num_parameters": 0, "num_bytes": 0, "dtype": None, "has_fp16": False}
    for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        if path.name.startswith("diffusion_pytorch_model.fp16"):
            weights["has_fp16"] = True
            continue
        weights["num_bytes"] += path.stat().st_size
        try:
            with safe_open(path, framework="pt") as file:
                tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (not a dictionary)
                weights["num_parameters"] += sum(math.prod(tensor.get_shape()) for tensor in tensors)
                weights["dtype"] = tensors[0].get_dtype()
        except (SafetensorError, OSError, IndexError) as error:  # the last one where there is no tensor
            raise InputError(f"cannot read {path}: {error}") from error
    return weights


def _check_result(result, path: Path) -> None:
    if not isinstance(result, dict) or not all(isinstance(result.get(key), str) for key in ("name", "metric")):
        raise InputError(f"{path}: each of its results needs a name and a metric; one is {result!r:.80}")
    for key in ("value", "std"):
        number = result.get(key)
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if number is not None and not (is_number and math.isfinite(number)):
            raise InputError(
                f"{path}: the {key} of {result['name']} is {number!r}; it must be a finite number or null"
            )


# ---- Metadata


def _metadata(files: ModelFiles) -> ModelCardData:
    licence = {"license": "apache-2.0"} if files.is_synthetic else {}
    if files.is_celeba:
        licence = {"license": "other", "license_name": "celeba-agreement", "license_link": CELEBA_PAGE}
    kind = ["score-based", "sde"] if files.is_sde else ["ddpm", "ddim"]
    kind = ["flow-matching", "rectified-flow"] if files.is_flow else kind
    tags = ["diffusers", "pytorch", "diffusion", *kind, "unet", TASK, "custom_code"]
    tags += ["class-conditional"] if files.num_classes else []
    results = [_eval_result(files, result) for result in files.results if result.get("value") is not None]
    return ModelCardData(
        **licence,
        library_name="diffusers",
        pipeline_tag=TASK,
        datasets=[files.dataset_id] if files.dataset_id else None,
        tags=tags + (["faces"] if files.is_celeba or files.is_synthetic else []),
        model_name=files.title if results else None,
        eval_results=results or None,
    )


def _eval_result(files: ModelFiles, result: dict) -> EvalResult:
    settings = {key: result[key] for key in SETTINGS if key != "floor" and result.get(key) is not None}
    details = [f"n = {_cell(settings['n'])}"] if "n" in settings else []
    details += [settings["sampler"]] if "sampler" in settings else []
    details += [f"{settings['steps']} steps"] if "steps" in settings else []
    dataset_name = settings.get("dataset") or files.data.get("source", "unknown")
    return EvalResult(
        task_type=TASK,
        task_name="Unconditional image generation",
        dataset_type=files.dataset_id or dataset_name,
        dataset_name=f"{dataset_name} {files.resolution}",
        dataset_split=settings.get("split"),
        metric_type=result["metric"],
        metric_name=", ".join([result["name"], *details]),
        metric_config=settings.get("mode"),
        metric_value=result["value"],
        metric_args=settings or None,
    )


# ---- Text


def _values(files: ModelFiles) -> dict:
    """What the template shows besides the files themselves."""
    config, facts, sde = files.config, files.facts, files.sde_numbers if files.is_sde else {}
    own, other = ("edm_heun", "predictor_corrector") if files.is_sde else (None, "unipc")
    names = samplers_for(sde.get("objective", "ddpm"))
    stock = "FlowMatchEulerDiscreteScheduler" if files.is_flow else files.scheduler["_class_name"]
    kind, num_images = files.scheduler.get("prediction_type"), files.data.get("num_images")
    class_names = (files.data.get("label_names") or [])[:CLASSES_LISTED]
    values = {
        "files": files,
        "config": config,
        "facts": facts,
        "data": files.data,
        "scheduler": files.scheduler,
        "sde": sde,
        "predicts": PREDICTS.get(kind, kind),
        "process": OBJECTIVES[sde["objective"]].format(**sde) if sde else None,
        "dtype": DTYPES.get(files.weights["dtype"], files.weights["dtype"]),
        "chosen": facts.get("post_hoc_ema"),
        "classes": ", ".join(f"{index}: `{name}`" for index, name in enumerate(class_names)),
        "label": ", class_labels=0" if files.num_classes else "",
        "four_labels": [index % files.num_classes for index in range(4)] if files.num_classes else None,
        "other_sampler": other,
        "more_samplers": ", ".join(name for name in names if name not in (own, other)),
        "stock_scheduler": stock,
        "stock_pipeline": "DDIMPipeline" if stock == "DDIMScheduler" else "DDPMPipeline",
        "crop": CROPS.get(files.data.get("crop"), "not recorded"),
        "num_images": f"{num_images:,}" if num_images else "an unknown number of",
        "columns": [key for key in SETTINGS if any(result.get(key) is not None for result in files.results)],
        "citations": _citations(files),
    }
    if config:
        batch = [config["train_batch_size"], config["gradient_accumulation_steps"], facts.get("num_processes", 1)]
        values["batch"] = "{} = {} x {} (accumulated) x {} (processes)".format(math.prod(batch), *batch)
        values["loss_weight"] = _loss_weight(files)
    return values


def _loss_weight(files: ModelFiles) -> str:
    config = files.config
    if not files.is_sde:
        return f"{_snr_weighting(config)}, gamma {config['snr_gamma']:g}" if config["snr_gamma"] else "none"
    if files.sde_numbers["objective"] in ("edm", "flow"):
        return "1, of the squared error of the network's output"
    weight = "g(t)^2 (likelihood weighting)" if config["likelihood_weighting"] else "n(t)^2, the variance of the noise"
    return f"{weight}, of the score's squared error"


def _snr_weighting(config: dict) -> str | None:
    """The name of the loss weight, None without one; older configurations with a gamma mean min-SNR."""
    names = {"min": "min-SNR", "soft_min": "soft-min-SNR"}
    return names[config.get("snr_weighting", "min")] if config.get("snr_gamma") else None


def _formatted(pattern: str) -> Callable[[object], str]:
    """A filter of the template; `str` of a missing value raises an error with its name."""
    return lambda value: pattern.format(str(value) if isinstance(value, jinja2.Undefined) else value)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _citations(files: ModelFiles) -> str:
    """The BibTeX entries of the works that this model rests on."""
    applies = {
        "liu2015faceattributes": files.is_celeba,
        "ho2020denoising": True,
        "ronneberger2015unet": True,
        "song2021denoising": files.scheduler["_class_name"] == "DDIMScheduler",
        "salimans2022progressive": files.scheduler.get("prediction_type") == "v_prediction",
        "hang2023efficient": _snr_weighting(files.config) == "min-SNR",
        "crowson2024scalable": _snr_weighting(files.config) == "soft-min-SNR",
        "song2021scorebased": files.is_sde,
        "karras2022elucidating": files.is_sde,
        "liu2023flow": files.is_flow,
        "lipman2023flow": files.is_flow,
        "esser2024scaling": files.is_flow and files.scheduler.get("time_density") == "logit_normal",
        "song2021maximum": files.is_sde and bool(files.config.get("likelihood_weighting")),
        "ho2022classifierfree": bool(files.num_classes),
        "karras2024analyzing": bool(files.facts.get("post_hoc_ema")),
    }
    entries = CITATIONS.read_text(encoding="utf-8").strip().split("\n\n")
    texts = {re.match(r"@\w+\{(\w+),", entry).group(1): entry for entry in entries}
    return "\n\n".join(texts[key] for key, is_used in applies.items() if is_used)
