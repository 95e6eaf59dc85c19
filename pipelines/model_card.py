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

Of training.json, training_config.yaml, samples.png and results.json each may be missing; the card then says what is
not known. CelebA is recognised by its name in that of the data, or by one of its crops.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open

from common import InputError
from pipelines import card_texts
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
    except KeyError as error:
        raise InputError(
            f"{error} is missing in one of the files of {folder} that the card is written from"
        ) from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:  # a value of another type than it should be
        reason = " ".join(str(error).split())
        raise InputError(f"a value in one of the files of {folder} that the card is written from: {reason}") from error
    return str(ModelCard(f"---\n{metadata}\n---\n\n{text}\n"))


def _text(files: ModelFiles) -> str:
    sections = [
        f"# {files.title}",
        _introduction(files),
        "## Use\n\n" + _use(files),
        "## Training\n\n" + _training(files),
        "## Results\n\n" + _results(files),
        "## Limitations and bias\n\n" + _limitations(files),
        "## Licence\n\n" + _licence(files),
        "## Citations\n\n```bibtex\n" + "\n\n".join(_citations(files)) + "\n```",
    ]
    return "\n\n".join(sections)


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
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from error
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
        licence = {"license": "other", "license_name": "celeba-agreement", "license_link": card_texts.CELEBA_PAGE}
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


def _introduction(files: ModelFiles) -> str:
    kind, weights = files.scheduler.get("prediction_type"), files.weights
    conditional = "A class-conditional" if files.num_classes else "An unconditional"
    method = (
        f"and a sampler ({files.scheduler['_class_name']}) that follows its predictions from pure noise to an image."
    )
    if files.is_sde:
        numbers = files.sde_numbers
        process = card_texts.OBJECTIVES[numbers["objective"]].format(**numbers)
        method = (
            "trained in continuous time, and a sampler that follows its predictions from pure noise to an image, by a"
            f" stochastic or an ordinary differential equation. What it reverses is {process}."
        )
    dtype = DTYPES.get(weights["dtype"], weights["dtype"])
    variant = '; in float16 with `variant="fp16"`' if weights["has_fp16"] else ""
    profile = "power-function" if files.facts.get("post_hoc_ema") else "exponential"
    average = f", the {profile} moving average of its training," if files.config else ""
    lines = [
        f"{conditional} diffusion model that draws {files.resolution} images out of noise: a U-Net of"
        f" {weights['num_parameters']:,} parameters that predicts {PREDICTS.get(kind, kind)}, {method} The weights"
        f"{average} are {dtype} safetensors of {weights['num_bytes'] / 1e6:.1f} MB{variant}."
    ]
    if files.num_classes:
        lines.append(_classes(files))
    if files.has_samples:
        lines.append("![Grid of generated images](samples.png)\n\n" + _grid_caption(files))
    return "\n\n".join(lines)


def _classes(files: ModelFiles) -> str:
    names = files.data.get("label_names")
    if not names:
        return f"It has {files.num_classes} classes, 0 to {files.num_classes - 1}; their names are not recorded."
    listed = ", ".join(f"{index}: `{name}`" for index, name in enumerate(names[:CLASSES_LISTED]))
    rest = ", and so on as in `training.json`" if len(names) > CLASSES_LISTED else ""
    return f"Its {files.num_classes} classes are the values of `{files.data['label_column']}`: {listed}{rest}."


def _grid_caption(files: ModelFiles) -> str:
    parts = ["Generated, not selected"]
    if files.config:
        config = files.config
        parts.append(f"seeds 0 to {config['eval_batch_size'] - 1}")
        parts += ["the classes in turn"] if files.num_classes else []
        sampler = "edm_heun" if files.is_sde else config["sampler"].upper()
        parts.append(f"{sampler}, {config['ddpm_num_inference_steps']} steps")
    step, samples_step = files.facts.get("step"), files.facts.get("samples_step")
    if samples_step is not None and samples_step != step:
        parts.append(f"drawn at step {samples_step:,}, before the step {step:,} of these weights")
    return f"*{'; '.join(parts)}.*"


def _use(files: ModelFiles) -> str:
    parts = [_use_with_shipped_code(files)]
    if "/" in files.name:
        parts.append(card_texts.PINNED.format(name=files.name))
    parts.append(_use_without_code(files))
    parts.append(card_texts.USE_IN_A_CLONE.format(name=files.name))
    if files.is_sde:
        rows = card_texts.FLOW_SAMPLERS if files.is_flow else ""
        parts.append(card_texts.CONTINUOUS_SAMPLERS.format(flow_samplers=rows))
    return "\n\n".join(parts)


def _use_with_shipped_code(files: ModelFiles) -> str:
    code = ["custom_unet_pipeline.py", "unet/custom_unet_2d.py", *(["scheduler/sde.py"] if files.is_sde else [])]
    label = ", class_labels=0" if files.num_classes else ""
    own = "edm_heun" if files.is_sde else None
    other = "predictor_corrector" if files.is_sde else "unipc"
    names = samplers_for(files.sde_numbers["objective"] if files.is_sde else "ddpm")
    others = ", ".join(name for name in names if name not in (own, other))
    lines = [
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{files.name}", trust_remote_code=True)',
        f"images = pipe(seeds=range(4), num_inference_steps=50{label}).images  # one seed an image",
        f'pipe.set_sampler("{other}")  # or {others}',
        f"images = pipe(seeds=range(4), num_inference_steps={50 if files.is_sde else 20}{label}).images",
    ]
    if files.num_classes:
        labels = [index % files.num_classes for index in range(4)]
        lines.append(f"images = pipe(seeds=range(4), class_labels={labels}, guidance_scale=2.0).images")
    shipped = f"{', '.join(f'`{name}`' for name in code[:-1])} and `{code[-1]}`"
    return card_texts.USE_WITH_SHIPPED_CODE.format(
        name=files.name,
        files=shipped,
        example="\n".join(lines),
        methods=card_texts.SDE_METHODS if files.is_sde else card_texts.METHODS,
        number={2: "two", 3: "three"}[len(code)],
    )


def _use_without_code(files: ModelFiles) -> str:
    """What diffusers alone can do: sample, or for classes or an SDE other than a flow only load the weights."""
    if files.num_classes or (files.is_sde and not files.is_flow):
        reason = card_texts.NO_STOCK_SDE if files.is_sde else card_texts.NO_STOCK_CLASSES
        return card_texts.USE_WEIGHTS_ALONE.format(name=files.name, reason=reason)
    scheduler = "FlowMatchEulerDiscreteScheduler" if files.is_flow else files.scheduler["_class_name"]
    pipeline = "DDIMPipeline" if scheduler == "DDIMScheduler" else "DDPMPipeline"
    text = card_texts.USE_WITHOUT_CODE.format(name=files.name, pipeline=pipeline, scheduler=scheduler)
    return f"{text}\n\n{card_texts.STOCK_FLOW}" if files.is_flow else text


def _training(files: ModelFiles) -> str:
    if not files.facts and not files.config:
        return "This repository has no record of the training: neither `training.json` nor `training_config.yaml`."
    parts = []
    if files.facts:
        parts += [_data_text(files), _run_text(files)]
        if files.facts.get("metric"):
            parts.append(_selection_text(files.facts["metric"]))
        if files.facts.get("heldout"):
            parts.append(_heldout_text(files.facts))
    if files.config:
        rows = [f"| {name} | {value} |" for name, value in _hyperparameters(files).items()]
        parts.append("\n".join(["| hyper-parameter | value |", "|---|---|", *rows]))
        parts.append("The whole configuration is in `training_config.yaml`, which the trainer reads with `--config`.")
    return "\n\n".join(parts)


def _data_text(files: ModelFiles) -> str:
    data = files.data
    crop = card_texts.CROPS.get(data.get("crop"), "not recorded")
    pixels = f"**Crop:** {crop}. Then a bicubic resize with antialiasing to {files.resolution}."
    if files.is_synthetic:
        source = "procedural faces (`synthetic-faces`), drawn by a program from known factors; they show nobody"
        pixels = f"They are drawn at {files.resolution}."
    elif files.dataset_id:
        source = f"[{files.dataset_id}](https://huggingface.co/datasets/{files.dataset_id})"
        source += f" at revision `{data['revision']}`" if data.get("revision") else ""
    else:
        source = f"{'images of CelebA in ' if files.is_celeba else ''}a local folder named `{data.get('source')}`"
    skipped = f" ({data['num_skipped']:,} unreadable ones left out)" if data.get("num_skipped") else ""
    return (
        f"**Data:** {source}; split `{data.get('split', 'unknown')}`, {data.get('num_images', 0):,} images{skipped}."
        f" {pixels} Fingerprint of the pixels: `{data.get('fingerprint', 'not recorded')}`."
    )


def _run_text(files: ModelFiles) -> str:
    facts = files.facts
    total = f" of {facts['total_steps']:,}" if facts.get("total_steps") else ""
    num_images = files.data.get("num_images")
    passes = f", {facts['images_seen'] / num_images:.1f} passes over the data" if num_images else ""
    processes = f"{facts['num_processes']} processes" if facts["num_processes"] > 1 else "1 process"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{_start_text(facts)}**Length:** {facts['step']:,}{total} updates, {facts['images_seen']:,} images"
        f" seen{passes}, in {_time(facts['train_seconds'])} of training. **Hardware:** {facts['device']}; {processes},"
        f" {facts['precision']}. **Software:** {versions}. **Date:** {facts['date']}."
    )


def _start_text(facts: dict) -> str:
    """What the training started from, if not from fresh weights."""
    pretrained = facts.get("pretrained")
    if pretrained is None:
        return ""
    trained = "whose training is not recorded"
    if pretrained["images_seen"] is not None:
        seen, time = f"{pretrained['images_seen']:,}", _time(pretrained["train_seconds"])
        trained = f"which had seen {seen} images in {time} of training"
    return f"**Start:** the weights of `{pretrained['name']}`, {trained}; what follows comes on top. "


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _selection_text(metric: dict) -> str:
    """By what these weights were chosen among those of the run."""
    return (
        f"**Selection:** the weights of the step with the lowest {metric['name'].upper()} measured during training,"
        f" {metric['value']:.4g} between {metric['num_images']:,} generated images ({metric['sampler']},"
        f" {metric['steps']} steps) and as many training images. As the lowest of several measurements it is a little"
        " too low."
    )


def _heldout_text(facts: dict) -> str:
    heldout = facts["heldout"]
    quarters = ", ".join(f"{heldout[f'heldout_loss_q{quarter}']:.4f}" for quarter in (1, 2, 3, 4))
    when = "" if heldout["step"] == facts["step"] else f" at step {heldout['step']:,}"
    return (
        f"**Held-out loss**{when}: {heldout['heldout_loss']:.4f}, the mean squared error of the predicted noise on"
        f" {facts['num_heldout_images']:,} images of the split `{heldout['split']}`; by quarter of the times, least"
        f" noise first: {quarters}."
    )


def _hyperparameters(files: ModelFiles) -> dict[str, str]:
    config = files.config
    processes = files.facts.get("num_processes", 1)
    batch = [config["train_batch_size"], config["gradient_accumulation_steps"], processes]
    warm_up, schedule = config["lr_warmup_steps"], config["lr_scheduler"]
    return {
        "channels of the levels": ", ".join(map(str, config["block_out_channels"])),
        "contracting path": ", ".join(config["down_block_types"]),
        "residual blocks a level": str(config["layers_per_block"]),
        "width of an attention head": str(config["attention_head_dim"] or "that of the features"),
        "dropout": f"{config['dropout']:g}",
        **(_sde_parameters(files) if files.is_sde else _ddpm_parameters(config)),
        **_label_parameters(config),
        "images an update": f"{math.prod(batch)} = {batch[0]} x {batch[1]} (accumulated) x {batch[2]} (processes)",
        "optimizer": f"AdamW, betas {config['adam_beta1']:g} and {config['adam_beta2']:g}, weight decay"
        f" {config['adam_weight_decay']:g}, epsilon {config['adam_epsilon']:g}",
        "learning rate": f"{config['learning_rate']:g}, {schedule}, {warm_up} updates of warm-up",
        "largest gradient norm": f"{config['max_grad_norm']:g}",
        "EMA": _average(files),
        "horizontal flips": "yes" if config["random_flip"] else "no",
        "seed": str(config["seed"]),
    }


def _average(files: ModelFiles) -> str:
    config, chosen = files.config, files.facts.get("post_hoc_ema")
    if chosen:
        return (
            f"power function of relative standard deviation {chosen['sigma_rel']:g}, chosen after the training; its"
            f" profile is reconstructed from {chosen['num_snapshots']} snapshots with a relative error of"
            f" {chosen['profile_error']:.2g}"
        )
    decay = f"1 - (1 + step / {config['ema_inv_gamma']:g})^-{config['ema_power']:g}"
    return f"decay {decay}, at most {config['ema_max_decay']:g}"


def _ddpm_parameters(config: dict) -> dict[str, str]:
    return {
        "prediction": config["prediction_type"],
        "noise schedule": f"{config['ddpm_beta_schedule']}, {config['ddpm_num_steps']:,} timesteps"
        + (", rescaled to zero terminal SNR" if config["rescale_betas_zero_snr"] else ""),
        "loss weight": f"{_snr_weighting(config)}, gamma {config['snr_gamma']:g}" if config["snr_gamma"] else "none",
        "timesteps of a batch": config["timestep_sampling"],
    }


def _snr_weighting(config: dict) -> str | None:
    """The name of the loss weight, None without one; older configurations with a gamma mean min-SNR."""
    names = {"min": "min-SNR", "soft_min": "soft-min-SNR"}
    return names[config.get("snr_weighting", "min")] if config.get("snr_gamma") else None


def _sde_parameters(files: ModelFiles) -> dict[str, str]:
    numbers, config = files.sde_numbers, files.config
    rows = {"objective": numbers["objective"], "prediction": numbers["prediction_type"]}
    if numbers["objective"] in ("vp", "subvp"):
        rows["beta"] = f"{numbers['beta_min']:g} to {numbers['beta_max']:g}"
    elif files.is_flow:
        rows["density of the times"] = numbers["time_density"].replace("_", "-")
    else:
        rows["noise levels"] = f"{numbers['sigma_min']:g} to {numbers['sigma_max']:g}"
    weight = "g(t)^2 (likelihood weighting)" if config["likelihood_weighting"] else "n(t)^2, the variance of the noise"
    rows["loss weight"] = f"{weight}, of the score's squared error"
    if numbers["objective"] == "edm":
        rows["standard deviation of the data"] = f"{numbers['sigma_data']:g}"
        rows["ln(sigma)"] = f"normal, mean {numbers['noise_mean']:g}, standard deviation {numbers['noise_std']:g}"
    if numbers["objective"] in ("edm", "flow"):
        rows["loss weight"] = "1, of the squared error of the network's output"
    return rows | {"times of a batch": config["timestep_sampling"]}


def _label_parameters(config: dict) -> dict[str, str]:
    if not config.get("label_column"):
        return {}
    return {"labels": config["label_column"], "probability that a label is left out": f"{config['label_dropout']:g}"}


def _results(files: ModelFiles) -> str:
    if not files.results:
        return "Not measured: the quality of these weights has not been evaluated, by FID or otherwise."
    columns = [key for key in SETTINGS if any(result.get(key) is not None for result in files.results)]
    lines = [f"| metric | value | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for result in files.results:
        cells = [result["name"], _value_text(result), *(_cell(result.get(column)) for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "`n` is the number of generated images; `floor` is the same figure of two disjoint sets of as many real images"
        " (of memorisation, what chance gives). FID falls as n grows, so compare it only at equal n, mode and crop."
    )
    return "\n".join(lines) + f"\n\n{note}"


def _value_text(result: dict) -> str:
    if result.get("value") is None:
        return "not measured"
    return f"{result['value']:.4g}" + (f" ± {result['std']:.2g}" if result.get("std") is not None else "")


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _limitations(files: ModelFiles) -> str:
    num_images = files.data.get("num_images")
    text = (card_texts.CLASS_LIMITATIONS if files.num_classes else card_texts.LIMITATIONS).format(
        resolution=files.resolution, num_images=f"{num_images:,}" if num_images else "an unknown number of"
    )
    if files.is_celeba:
        with_labels = card_texts.CELEBA_WITH_LABELS.format(column=files.data.get("label_column", "labels"))
        labels = with_labels if files.num_classes else card_texts.CELEBA_WITHOUT_LABELS
        text += f"\n\n{card_texts.CELEBA_LIMITATIONS.format(labels=labels)}"
    return text + (f"\n\n{card_texts.SYNTHETIC_LIMITATIONS}" if files.is_synthetic else "")


def _licence(files: ModelFiles) -> str:
    if files.is_celeba:
        return card_texts.CELEBA_LICENCE
    return card_texts.SYNTHETIC_LICENCE if files.is_synthetic else card_texts.UNKNOWN_LICENCE


def _citations(files: ModelFiles) -> list[str]:
    applies = {
        "celeba": files.is_celeba,
        "ddpm": True,
        "unet": True,
        "ddim": files.scheduler["_class_name"] == "DDIMScheduler",
        "v_prediction": files.scheduler.get("prediction_type") == "v_prediction",
        "min_snr": _snr_weighting(files.config) == "min-SNR",
        "soft_min_snr": _snr_weighting(files.config) == "soft-min-SNR",
        "score_sde": files.is_sde,
        "edm": files.is_sde,
        "flow": files.is_flow,
        "logit_normal": files.is_flow and files.scheduler.get("time_density") == "logit_normal",
        "likelihood_weighting": files.is_sde and bool(files.config.get("likelihood_weighting")),
        "guidance": bool(files.num_classes),
        "post_hoc_ema": bool(files.facts.get("post_hoc_ema")),
    }
    return [card_texts.CITATIONS[key] for key, is_used in applies.items() if is_used]
