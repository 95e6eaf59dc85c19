"""Measures class-conditional sampling: how often an image shows the requested class, and what guidance costs.

    python -m experiments.guidance --pipeline DIR --judge DIR [--classifier DIR] --scales 0 1 2 4 --num_images 700
        --out DIR

A class-conditional model uses classifier-free guidance (arXiv 2207.12598): scale 0 is its null class, 1 plain
conditional sampling. With --classifier, the gradient of that classifier guides an unconditional model (arXiv
2011.13456, section 5): scale 0 is sampling without it. The judge classifies the generated images; it must be a
different classifier of the same classes. Both are output folders of `python -m experiments.classifier`.

    OUT/guidance.json   for each scale: the share of images in the requested class, SWD, evaluations, seconds
    OUT/guidance.md     the same as a table
    OUT/guidance.png    images of the same seeds: one row per class, with some images at each scale in turn

Image i has seed i and class i mod K. Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C.
"""

import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

from common import Failed, InputError, Parser, check_numbers, command_line, make_folder, run_command, sha256_of
from eval.figures import plot_image_rows
from eval.results import number, result, table, write_results
from eval.swd import SMALLEST_RESOLUTION, sliced_wasserstein
from experiments.classifier import RECORD, NoisyImageClassifier, predict
from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.loading import WEIGHTS, find_pipeline, load_pipeline, weight_files
from training.data import ImageStore, open_image_store
from training.log import device_name
from training.sde import CONTINUOUS_SAMPLERS

SPLIT = "train"  # of the synthetic faces, the reference for SWD
BATCH_SIZE = 64
SHOWN_OF_A_CLASS = 3  # images per class and scale in the figure


# ---- Models


def load_classifier(folder: Path) -> tuple[NoisyImageClassifier, dict]:
    """Loads a classifier, and a record that identifies it and has its accuracy on real images without noise.

    Raises:
        InputError: if the classifier cannot be read.
    """
    try:
        sha256 = sha256_of(folder / WEIGHTS)  # diffusers would look for a missing folder on the Hub
        network = NoisyImageClassifier.from_pretrained(folder, use_safetensors=True).requires_grad_(False)
        validation = json.loads((folder / RECORD).read_text())["validation"]
        accuracy = {row["sigma"]: row["accuracy"] for row in validation["by_noise"]}[0.0]
        about = {"name": folder.resolve().name, "weights_sha256": sha256, "accuracy": float(accuracy)}
        return network, about | {key: validation[key] for key in ("split", "num_images")}
    except Exception as error:  # damaged files make the libraries raise almost anything
        raise InputError(f"{folder} is not a classifier of experiments.classifier: {error!r:.200}") from error


def check_fit(unet, judge: NoisyImageClassifier, classifier: NoisyImageClassifier | None, data: dict) -> None:
    """Checks that model, judge and classifier have the same image format and classes.

    Args:
        data: the model repository's record of its training images; empty if there is no record.

    Raises:
        InputError: if they differ.
    """
    num_embeds, num_classes = unet.config.get("num_class_embeds"), len(judge.config.label_names)
    if (num_embeds is None) == (classifier is None):
        hint = "has no classes; guide it by" if num_embeds is None else "has classes; leave out"
        raise InputError(f"the model {hint} --classifier")
    if num_embeds not in (None, num_classes + 1):
        raise InputError(f"the model has {num_embeds} class embeddings, not {num_classes} of --judge and a null class")
    of_classes = {key: data[key] for key in ("label_column", "label_names") if key in data and num_embeds is not None}
    others = {"the model": dict(unet.config) | of_classes, "--classifier": classifier.config if classifier else {}}
    for who, config in others.items():
        for key in ("in_channels", "sample_size", "label_column", "label_names"):
            expected = judge.config[key]
            if config.get(key, expected) != expected:
                raise InputError(f"{who} has {key} {config[key]!s:.100}, --judge {expected!s:.100}; they must agree")


def open_models(options: Namespace) -> tuple:
    """Opens the pipeline, the judge and the classifier (or None), and returns them with a record of what they are.

    Raises:
        InputError: if they do not match each other or the options.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if options.num_cpu_threads is not None:
        torch.set_num_threads(options.num_cpu_threads)
    source, _ = find_pipeline(options.pipeline, None)
    pipeline = load_pipeline(source, "fp32", options.scheduler).to(device)
    judge, about_judge = load_classifier(options.judge)
    classifier, about = load_classifier(options.classifier) if options.classifier else (None, None)
    if about is not None and about["weights_sha256"] == about_judge["weights_sha256"]:
        raise InputError(f"--judge {options.judge} is also the --classifier and would judge itself; train another one")
    training = source / "training.json"
    data = json.loads(training.read_text()).get("data", {}) if training.exists() else {}
    check_fit(pipeline.unet, judge, classifier, data)
    try:
        pipeline.check_inputs(options.steps, 0.0)
    except ValueError as error:
        raise InputError(str(error)) from error
    record = {"weights_sha256": {path.name: sha256_of(path) for path in weight_files(source)}}
    record |= {"judge": about_judge, "classifier": about, "device": device_name(device)}
    return pipeline, judge.to(device), classifier and classifier.to(device), record


# ---- Measurements


def draw(
    pipeline: CustomUNetPipeline, scale: float, num_images: int, steps: int, num_classes: int, classifier=None
) -> tuple[np.ndarray, float]:
    """Draws uint8 images (N, 3, R, R); returns them with the network evaluations per image.

    At scale 0, the requested classes have no effect.
    """
    images, evaluations = [], 0
    for first in range(0, num_images, BATCH_SIZE):
        seeds = range(first, min(first + BATCH_SIZE, num_images))
        guided = {"class_labels": [i % num_classes for i in seeds], "guidance_scale": scale, "classifier": classifier}
        if scale == 0:
            guided = {} if classifier is not None else {"class_labels": num_classes}
        drawn = pipeline(seeds=seeds, num_inference_steps=steps, output_type="pt", **guided)
        images.append((drawn.images * 255).round().to(torch.uint8).cpu().numpy())
        evaluations += drawn.network_evaluations * len(seeds)
    return np.concatenate(images), evaluations / num_images


def real_sets(store: ImageStore, names: Sequence[str], labels: Sequence[int]) -> list[np.ndarray]:
    """Two disjoint sets of real images, uint8 (N, 3, R, R), each with the class counts of the labels.

    Raises:
        InputError: if a class has too few images.
    """
    known, chosen = store.labels_among(names), ([], [])
    order = np.random.default_rng(0).permutation(len(known))
    for k, name in enumerate(names):
        count, found = labels.count(k), order[known[order] == k]
        if len(found) < 2 * count:
            there = f"split {SPLIT} has {len(found)} images of {name!r}"
            raise InputError(f"{there}, and two sets of {count} are needed; use fewer --num_images")
        for part, positions in enumerate(chosen):
            positions.extend(found[part * count : (part + 1) * count])
    return [np.asarray(store.images[np.sort(positions)]) for positions in chosen]


def swd(images: np.ndarray, real: np.ndarray) -> float:
    """Sliced Wasserstein distance, averaged over the pyramid levels."""
    return float(np.mean([*sliced_wasserstein(images, real).values()]))


def class_shares(found: np.ndarray, asked: np.ndarray, names: Sequence[str]) -> dict:
    """The share of images in the requested class with its binomial standard error, overall and per class."""

    def share(right: np.ndarray) -> dict:
        p = float(right.mean())
        return {"value": p, "std": math.sqrt(p * (1 - p) / len(right)), "n": len(right)}

    classes = [{"name": name} | share(found[asked == k] == k) for k, name in enumerate(names)]
    return share(found == asked) | {"classes": classes}


# ---- What is written


def summary(record: dict) -> str:
    """Formats the results as a Markdown table, one row per scale, with a note on how to read it."""
    rows, results, judge = [], record["results"], record["judge"]
    for entry in results:
        shares = {f"class {k}": of_class["value"] for k, of_class in enumerate(entry["classes"])}
        rows.append(entry | shares | {"swd": f"{number(entry['swd'])} ({number(entry['swd_floor'])})"})
    columns = {"guidance_scale": "guidance scale", "value": "in the class asked for"}
    columns |= {f"class {k}": entry["name"] for k, entry in enumerate(results[0]["classes"])}
    columns |= {"swd": "SWD (real against real)", "network_evaluations": "network evaluations per image"}
    text = (
        f"{results[0]['n']} images of each scale, seeds {results[0]['seeds']}; ± is one standard error. The judge puts"
        f" {judge['accuracy']:.1%} of {judge['num_images']:,} real images into their class. SWD is against as many"
        " real images of each class as are asked for; at scale 0 the model chooses the classes itself."
    )
    if record["classifier"] is not None:
        text += " Above it, each network evaluation comes with a gradient of the classifier."
    return f"{table(rows, columns | {'seconds_per_image': 'seconds per image'})}\n\n{text}\n"


def parse_options(arguments: list[str]) -> Namespace:
    """Parses and checks the arguments; raises InputError."""
    parser = Parser(prog="python -m experiments.guidance", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pipeline", required=True, help="folder of a model repository, or its id on the Hub")
    add("--judge", required=True, type=Path, help="folder of the classifier that classifies the generated images")
    add("--classifier", type=Path, help="folder of the classifier that guides an unconditional model")
    add("--scales", required=True, nargs="+", type=float, help="guidance scales; at 0 the class has no effect")
    add("--out", required=True, type=Path, help="folder for the numbers, table and figure")
    add("--num_images", type=int, default=256, help="images per scale; the classes take turns (default 256)")
    add("--scheduler", choices=[*SAMPLERS, *CONTINUOUS_SAMPLERS], help="sampler (default: the repository's own)")
    add("--num_inference_steps", type=int, default=50, dest="steps", help="default 50; ode chooses its own")
    add("--num_cpu_threads", type=int)
    options = parser.parse_args(arguments)
    check_numbers(options, {"num_images": 1, "num_cpu_threads": 1, "scales": 0}, {})
    return options


def run(arguments: list[str]) -> None:
    """Checks the input, then draws and measures images; writes the results after each scale.

    Raises:
        InputError: for bad input.
        Failed: if sampling fails at a scale.
    """
    options = parse_options(arguments)
    pipeline, judge, classifier, record = open_models(options)
    names, n = list(judge.config.label_names), options.num_images
    if n < len(names):
        raise InputError(f"--num_images is {n}, but there are {len(names)} classes; ask for at least that many")
    size = judge.config.sample_size
    if size < SMALLEST_RESOLUTION:
        raise InputError(f"the images are {size} pixels wide, and SWD needs {SMALLEST_RESOLUTION}")
    labels = [i % len(names) for i in range(n)]
    which = {"label_column": judge.config.label_column, "resolution": size, "crop": "none"}
    store = open_image_store(dataset_name="synthetic-faces", split=SPLIT, **which)
    real, others = real_sets(store, names, labels)
    about = {"swd_floor": swd(others, real), "seeds": f"0 to {n - 1}", "batch_size": BATCH_SIZE}
    make_folder(options.out)
    record |= {"command": command_line("experiments.guidance", arguments)}
    record |= {"reference": {key: store.description[key] for key in ("source", "split", "resolution", "fingerprint")}}
    record |= {"versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}}
    record |= {"date": datetime.now(UTC).date().isoformat(), "results": []}
    rows = {f"{name}, at scales {', '.join(f'{scale:g}' for scale in options.scales)}": [] for name in names}
    for scale in options.scales:
        started_at_seconds = time.perf_counter()
        try:
            images, evaluations = draw(pipeline, scale, n, options.steps, len(names), classifier)
        except ValueError as error:  # images that are not finite
            raise Failed(f"at scale {scale:g} {error}") from error
        seconds = time.perf_counter() - started_at_seconds
        for k, row in enumerate(rows.values()):
            shown = images[k :: len(names)][:SHOWN_OF_A_CLASS]
            row += [Image.fromarray(image.transpose(1, 2, 0)) for image in shown]
        shares = class_shares(predict(judge, images).argmax(1).numpy(), np.array(labels), names)
        measured = {"guidance_scale": scale, **shares, "swd": swd(images, real), **about}
        measured |= {"network_evaluations": evaluations, "seconds_per_image": seconds / n}
        record["results"].append(result("guidance", "Share in the class asked for", "class_share", **measured))
        write_results(options.out / "guidance.json", record)
        share = f"{shares['value']:.1%} ± {shares['std']:.1%} in the class asked for"
        print(f"scale {scale:g}: {share}, SWD {measured['swd']:.4g}, {seconds:.0f} s", flush=True)
    (options.out / "guidance.md").write_text(summary(record))
    plot_image_rows(rows, options.out / "guidance.png")
    print(f"wrote {options.out / 'guidance.md'}", flush=True)


def main(arguments: list[str]) -> int:
    return run_command(lambda: run(arguments), "stopped; the scales measured so far are in guidance.json")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
