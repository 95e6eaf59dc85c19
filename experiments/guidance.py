"""Measures class-conditional sampling: how often an image is of the class asked for, and what guidance costs.

    python -m experiments.guidance --pipeline DIR --judge DIR [--classifier DIR] --scales 0 1 2 4 --num_images 700
        --out DIR

A class-conditional model is guided without a classifier (arXiv 2207.12598): scale 0 is its null class, 1 plain
conditional sampling. With --classifier an unconditional model is guided by the gradient of that classifier (arXiv
2011.13456, section 5): scale 0 is sampling without it. The judge tells what class a generated image shows; it must be
another classifier of the same classes. Both are folders that `python -m experiments.classifier` wrote.

    OUT/guidance.json   for each scale: the share of the images in the class asked for, SWD, evaluations, seconds
    OUT/guidance.md     the same as a table
    OUT/guidance.png    images of the same seeds: a row for each class, a block of columns for each scale

The class of image i is i mod K, its seed --seed + i. Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C.
"""

import json
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from common import MOST_THREADS, InputError, Parser, check_numbers, check_seeds, command_line, make_folder, run_command
from eval.cost import sample
from eval.results import number, result, table, write_results
from eval.swd import sliced_wasserstein
from experiments.classifier import RECORD, NoisyImageClassifier
from pipelines import CustomUNetPipeline, generate
from pipelines.custom_unet_pipeline import CONTINUOUS_SAMPLERS, SAMPLERS
from pipelines.loading import WEIGHTS, find_pipeline, load_pipeline
from training.data import ImageStore, open_image_store, to_model_range
from training.facts import device_name

SHOWN_OF_A_CLASS = 3  # in each block of the figure
LIBRARIES = ("torch", "diffusers")
REFERENCE = ("source", "split", "resolution", "fingerprint")


@dataclass(frozen=True)
class OwnSampler:
    """For `eval.cost.sample`: the sampler that the pipeline was loaded with."""

    steps: int

    def set_on(self, pipeline: CustomUNetPipeline) -> dict:
        return {"num_inference_steps": self.steps}


def load_classifier(folder: Path, device: torch.device) -> tuple[NoisyImageClassifier, dict]:
    """A classifier; and which one it is, and how often it is right on real images without noise.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        sha256 = generate.sha256_of(folder / WEIGHTS)  # what is no folder diffusers seeks on the Hub
        network = NoisyImageClassifier.from_pretrained(folder, use_safetensors=True).to(device).requires_grad_(False)
        validation = json.loads((folder / RECORD).read_text())["validation"]
        accuracy = {row["sigma"]: row["accuracy"] for row in validation["by_noise"]}[0.0]
        about = {"name": folder.resolve().name, "weights_sha256": sha256, "accuracy": float(accuracy)}
        return network, about | {key: validation[key] for key in ("split", "num_images")}
    except Exception as error:  # damaged files make the libraries raise nearly anything
        raise InputError(f"{folder} is no classifier as experiments.classifier writes it: {error!r:.200}") from error


def check_fit(unet, judge: NoisyImageClassifier, classifier: NoisyImageClassifier | None, data: dict) -> None:
    """Whether model, judge and classifier are of the same images and classes.

    Args:
        data: what the model repository says of the images of its training; empty if nothing.

    Raises:
        InputError: if not.
    """
    model, num_embeds = dict(unet.config), unet.config.get("num_class_embeds")
    is_conditional = num_embeds is not None or unet.config.get("class_embed_type") is not None
    if is_conditional == (classifier is not None):
        hint = "has classes; leave out" if is_conditional else "has no classes; guide it by"
        raise InputError(f"the model {hint} --classifier")
    if is_conditional:
        model |= {key: data[key] for key in ("label_column", "label_names") if key in data}
    for who, config in {"the model": model, "--classifier": dict(classifier.config) if classifier else {}}.items():
        for key in ("in_channels", "sample_size", "label_column", "label_names"):
            expected = judge.config[key]
            if config.get(key, expected) != expected:
                raise InputError(f"{who} has {key} {config[key]!s:.100}, --judge {expected!s:.100}; they must agree")
    needed = len(judge.config.label_names) + 1
    if is_conditional and num_embeds != needed:
        raise InputError(
            f"the model has {num_embeds} class embeddings; the judge's classes and a null one are {needed}"
        )


def call_arguments(
    scale: float, labels: Sequence[int], num_classes: int, classifier: NoisyImageClassifier | None
) -> dict:
    """What the pipeline is called with; at scale 0 the classes asked for play no part."""
    if scale == 0:
        return {} if classifier is not None else {"class_labels": [num_classes] * len(labels)}
    return {"class_labels": labels, "guidance_scale": scale, "classifier": classifier}


def real_sets(store: ImageStore, names: Sequence[str], labels: Sequence[int]) -> list[np.ndarray]:
    """Two disjoint sets of real images, uint8 (N, 3, R, R), each with as many of every class as the labels.

    Raises:
        InputError: if there are too few of a class.
    """
    known, chosen = store.labels_among(names), ([], [])
    order = np.random.default_rng(0).permutation(len(known))
    for k, name in enumerate(names):
        count, found = labels.count(k), order[known[order] == k]
        if len(found) < 2 * count:
            there = f"split {store.description['split']} has {len(found)} images of {name!r}"
            raise InputError(
                f"{there}, and two sets of {count} are needed; take fewer --num_images or another --split"
            )
        for part, positions in enumerate(chosen):
            positions.extend(found[part * count : (part + 1) * count])
    return [np.asarray(store.images[np.sort(positions)]) for positions in chosen]


def swd(images: np.ndarray, real: np.ndarray) -> float:
    """Mean over the levels of the pyramid."""
    return float(np.mean([*sliced_wasserstein(images, real).values()]))


@torch.no_grad()
def classes_of(judge: NoisyImageClassifier, images: np.ndarray) -> np.ndarray:
    """The class that the judge takes each image for, int64 (N,); of uint8 images (N, C, R, R)."""
    batches = (torch.from_numpy(images[first : first + 256]) for first in range(0, len(images), 256))
    logits = [judge(to_model_range(batch).to(judge.device), 1.0, 0.0).cpu() for batch in batches]
    return torch.cat(logits).argmax(1).numpy()


def class_shares(found: np.ndarray, asked: np.ndarray, names: Sequence[str]) -> dict:
    """The share of images in the class asked for with its binomial standard error, in all and for each class."""

    def share(right: np.ndarray) -> dict:
        p = float(right.mean())
        return {"value": p, "std": math.sqrt(p * (1 - p) / len(right)), "n": len(right)}

    classes = [{"name": name} | share(found[asked == k] == k) for k, name in enumerate(names)]
    return share(found == asked) | {"classes": classes}


def summary(record: dict) -> str:
    """Markdown: a row for each scale, and what one must know to read it."""
    rows, results, judge = [], record["results"], record["judge"]
    for entry in results:
        shares = {f"class {k}": of_class["value"] for k, of_class in enumerate(entry["classes"])}
        rows.append(entry | shares | {"swd": f"{number(entry['swd'])} ({number(entry['swd_floor'])})"})
    columns = {"guidance_scale": "guidance scale", "value": "in the class asked for"}
    columns |= {f"class {k}": entry["name"] for k, entry in enumerate(results[0]["classes"])}
    columns |= {"swd": "SWD (real against real)", "network_evaluations": "network evaluations an image"}
    text = (
        f"{results[0]['n']} images of each scale, seeds {results[0]['seeds']}; ± is one standard error. The judge puts"
        f" {judge['accuracy']:.1%} of {judge['num_images']:,} real images into their class. SWD is against as many"
        " real images of each class as are asked for; at scale 0 the model chooses the classes itself."
    )
    if record["classifier"] is not None:
        text += " Above it, each network evaluation comes with a gradient of the classifier."
    return f"{table(rows, columns | {'seconds_per_image': 'seconds an image'})}\n\n{text}\n"


def plot_images(blocks: dict[str, np.ndarray], names: Sequence[str], path: Path) -> None:
    """A row of images for each class, a block of columns for each label; uint8 (N, 3, R, R), classes in turn."""
    first = next(iter(blocks.values()))
    num_classes, size, num_shown = len(names), first.shape[-1], min(SHOWN_OF_A_CLASS, len(first) // len(names))
    inches = (1.2 + 0.8 * num_shown * len(blocks), 0.5 + 0.8 * num_classes)
    figure, axes = plt.subplots(1, len(blocks), figsize=inches, squeeze=False, layout="constrained")
    for panel, (label, images) in zip(axes[0], blocks.items(), strict=True):
        cells = images[: num_shown * num_classes].reshape(num_shown, num_classes, 3, size, size)
        cells = cells.transpose(1, 3, 0, 4, 2)  # (class, y, column, x, 3)
        panel.imshow(cells.reshape(num_classes * size, num_shown * size, 3), interpolation="nearest")
        panel.set(title=label, xticks=[], yticks=[])
    axes[0, 0].set_yticks([(k + 0.5) * size - 0.5 for k in range(num_classes)], names)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def parse_options(arguments: list[str]) -> Namespace:
    """Raises InputError."""
    parser = Parser(prog="python -m experiments.guidance", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pipeline", required=True, help="folder of a model repository, or its id on the Hub")
    add("--judge", required=True, type=Path, help="folder of the classifier that tells the class of an image")
    add("--classifier", type=Path, help="folder of the classifier that guides an unconditional model")
    add("--scales", required=True, nargs="+", type=float, help="of guidance; 0 is without")
    add("--split", default="train", help="of synthetic-faces, for SWD (default train)")
    add("--out", required=True, type=Path, help="folder for numbers, table and figure")
    add("--num_images", type=int, default=256, help="of each scale; the classes take turns")
    add("--seed", type=int, default=0, help="of the first image")
    add("--scheduler", choices=[*SAMPLERS, *CONTINUOUS_SAMPLERS], help="sampler (default: the repository's own)")
    add("--num_inference_steps", type=int, default=50, dest="steps", help="default 50; ode takes its own")
    for name, (kind, text) in generate.SAMPLER_SETTINGS.items():
        add(f"--{name}", type=kind, help=text)
    add("--batch_size", type=int, default=64)
    add("--num_cpu_threads", type=int)
    parser.set_defaults(eta=0.0, dtype="fp32", class_label=None)
    options = parser.parse_args(arguments)
    least = dict.fromkeys(("num_images", "batch_size", "num_cpu_threads"), 1) | {"seed": 0, "scales": 0}
    check_numbers(options, least, {"num_cpu_threads": MOST_THREADS})
    if len(set(options.scales)) < len(options.scales):
        parser.error(f"--scales are {' '.join(f'{scale:g}' for scale in options.scales)}; give each once")
    check_seeds(options)
    return options


def open_models(options: Namespace) -> tuple:
    """Pipeline, judge, classifier or None, and a record of what they are.

    Raises:
        InputError: unless they suit each other and the options.
    """
    state = generate.set_up_process(options.num_cpu_threads)
    source, commit = find_pipeline(options.pipeline, None)
    settings = {name: value for name in generate.SAMPLER_SETTINGS if (value := getattr(options, name)) is not None}
    pipeline = load_pipeline(source, options.dtype, options.scheduler, **settings).to(state.device)
    judge, judge_facts = load_classifier(options.judge, state.device)
    classifier, facts = load_classifier(options.classifier, state.device) if options.classifier else (None, None)
    if facts is not None and facts["weights_sha256"] == judge_facts["weights_sha256"]:
        raise InputError(f"--judge {options.judge} is the --classifier too, and would judge itself; train another one")
    training = source / "training.json"
    data = json.loads(training.read_text()).get("data", {}) if training.exists() else {}
    check_fit(pipeline.unet, judge, classifier, data)
    call = Namespace(steps=options.steps, eta=options.eta, class_label=None if classifier is not None else [0])
    generate.check_arguments(pipeline, call)
    about = {"judge": judge_facts, "classifier": facts, "label_column": judge.config.label_column}
    about |= {"device": device_name(state.device), "num_cpu_threads": torch.get_num_threads()}
    return pipeline, judge, classifier, generate.describe(pipeline, source, options, commit) | about


def run(options: Namespace, arguments: list[str]) -> None:
    """Checks everything, then draws and measures; what was measured is written down after each scale."""
    pipeline, judge, classifier, record = open_models(options)
    names, n, first_seed = list(judge.config.label_names), options.num_images, options.seed
    if n < len(names):
        raise InputError(f"--num_images is {n}, but there are {len(names)} classes; take that many or more")
    labels = [i % len(names) for i in range(n)]
    which = {"label_column": judge.config.label_column, "resolution": judge.config.sample_size, "crop": "none"}
    store = open_image_store(dataset_name="synthetic-faces", split=options.split, **which)
    real, others = real_sets(store, names, labels)
    try:
        floor = swd(others, real)
    except ValueError as error:
        raise InputError(f"SWD cannot be taken: {error}") from error
    make_folder(options.out)
    record |= {
        "command": command_line("experiments.guidance", arguments),
        "reference": {key: store.description[key] for key in REFERENCE},
        "versions": {name: version(name) for name in LIBRARIES},
        "date": datetime.now(UTC).date().isoformat(),
        "results": [],
    }
    blocks, about = {}, {"seeds": f"{first_seed} to {first_seed + n - 1}", "batch_size": options.batch_size}
    for scale in options.scales:
        images, evaluations, seconds = sample(
            pipeline,
            OwnSampler(options.steps),
            range(first_seed, first_seed + n),
            options.batch_size,
            **call_arguments(scale, labels, len(names), classifier),
        )
        blocks[f"scale {scale:g}"] = images
        shares, distance = class_shares(classes_of(judge, images), np.array(labels), names), swd(images, real)
        quality = {"swd": distance, "swd_floor": floor, "n_reference": len(real)}
        cost = {"network_evaluations": evaluations, "seconds_per_image": seconds}
        name = "Share in the class asked for"
        entry = result("guidance", name, "class_share", guidance_scale=scale, **shares, **quality, **cost, **about)
        record["results"].append(entry)
        write_results(options.out / "guidance.json", record)
        share = f"{entry['value']:.1%} ± {entry['std']:.1%} in the class asked for"
        print(f"scale {scale:g}: {share}, SWD {distance:.4g}, {seconds * n:.0f} s", flush=True)
    (options.out / "guidance.md").write_text(summary(record))
    plot_images(blocks, names, options.out / "guidance.png")
    print(f"wrote {options.out / 'guidance.md'}", flush=True)


def main(arguments: list[str]) -> int:
    stopped = "stopped; the scales that were measured are in guidance.json"
    return run_command(lambda: run(parse_options(arguments), arguments), stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
