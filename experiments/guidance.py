"""Measures classifier-free guidance (arXiv 2207.12598): how often an image shows the requested class, and the cost.

    python -m experiments.guidance --pipeline DIR --scales 0 1 2 4 --num_images 700 --out DIR

The model must have been trained on the synthetic faces with --label_column. Scale 0 samples its null class, and 1 is
plain conditional sampling. A linear classifier, fitted to the pixels of the training images, judges the images.

    OUT/guidance.json   for each scale: the share of images in the requested class, SWD, evaluations, seconds
    OUT/guidance.md     the same as a table
    OUT/guidance.png    images of the same seeds: one row per class, with some images at each scale in turn

Image i has seed i and class i mod K. Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C.
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import one_hot

from common import Failed, InputError, Parser, check_numbers, command_line, make_folder, run_command, sha256_of
from eval.figures import labelled_grid
from eval.results import number, result, table, write_results
from eval.swd import sliced_wasserstein
from pipelines import CustomUNetPipeline
from pipelines.custom_unet_pipeline import SAMPLERS
from pipelines.loading import find_pipeline, load_pipeline, weight_files
from training.data import ImageStore, open_image_store
from training.log import device_name, recorded
from training.processes import set_up_process
from training.sde import CONTINUOUS_SAMPLERS

SPLITS = ("train", "validation")  # of the synthetic faces, for judge and SWD, and for the judge's accuracy
BATCH_SIZE = 64
SHOWN_OF_A_CLASS = 3  # images per class and scale in the figure
RIDGE = 1.0  # penalty of the judge's weights, for pixels in [-1, 1]


def draw(pipeline: CustomUNetPipeline, scale: float, num_images: int, steps: int) -> tuple[np.ndarray, float]:
    """Draws uint8 images (N, 3, R, R), of the null class at scale 0; also the network evaluations per image."""
    images, evaluations, null_class = [], 0, pipeline.unet.config.num_class_embeds - 1
    for first in range(0, num_images, BATCH_SIZE):
        seeds = range(first, min(first + BATCH_SIZE, num_images))
        guided = {"class_labels": [i % null_class for i in seeds], "guidance_scale": scale}
        guided = {"class_labels": null_class} if scale == 0 else guided
        drawn = pipeline(seeds=seeds, num_inference_steps=steps, output_type="pt", **guided)
        images.append((drawn.images * 255).round().to(torch.uint8).cpu().numpy())
        evaluations += drawn.network_evaluations * len(seeds)
    return np.concatenate(images), evaluations / num_images


def real_sets(store: ImageStore, names: Sequence[str], labels: Sequence[int]) -> list[np.ndarray]:
    """Two disjoint sets of real images, uint8 (N, 3, R, R), each with the class counts of the labels."""
    known, chosen = store.labels_among(names), ([], [])
    order = np.random.default_rng(0).permutation(len(known))
    for k in range(len(names)):
        count, found = labels.count(k), order[known[order] == k]
        if len(found) < 2 * count:
            raise InputError(f"there are {len(found)} images of {names[k]!r}, not {2 * count}; lower --num_images")
        chosen[0].extend(found[:count])
        chosen[1].extend(found[count : 2 * count])
    return [np.asarray(store.images[np.sort(positions)]) for positions in chosen]


def swd(images: np.ndarray, real: np.ndarray) -> float:
    """Sliced Wasserstein distance, averaged over the pyramid levels."""
    return float(np.mean([*sliced_wasserstein(images, real).values()]))


def fit_judge(images: np.ndarray, labels: np.ndarray, num_classes: int) -> Callable[[np.ndarray], np.ndarray]:
    """A linear classifier of pixels: ridge regression on the classes as unit vectors, in closed form.

    It is fitted to uint8 images (N, C, R, R) and class numbers (N,), and returns the class numbers of others.
    """

    def pixels(images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(images)).flatten(1).double() / 127.5 - 1

    x, targets = pixels(images), one_hot(torch.from_numpy(labels), num_classes).double()
    x_mean, target_mean = x.mean(0), targets.mean(0)
    x = x - x_mean
    squares = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(squares, x.T @ (targets - target_mean))
    return lambda others: ((pixels(others) - x_mean) @ weights + target_mean).argmax(1).numpy()


def class_shares(found: np.ndarray, asked: np.ndarray, names: Sequence[str]) -> dict:
    """The share of images in the requested class with its binomial standard error, overall and per class."""

    def share(right: np.ndarray) -> dict:
        p = float(right.mean())
        return {"value": p, "std": math.sqrt(p * (1 - p) / len(right)), "n": len(right)}

    classes = [{"name": name} | share(found[asked == k] == k) for k, name in enumerate(names)]
    return share(found == asked) | {"classes": classes}


def summary(record: dict) -> str:
    """Formats the results as a Markdown table, one row per scale, with a note on how to read it."""
    rows, results, judge = [], record["results"], record["judge"]
    for entry in results:
        shares = {f"class {k}": of_class["value"] for k, of_class in enumerate(entry["classes"])}
        rows.append(entry | shares | {"swd": f"{number(entry['swd'])} ({number(entry['swd_floor'])})"})
    columns = {"guidance_scale": "guidance scale", "value": "in the class asked for"}
    columns |= {f"class {k}": of_class["name"] for k, of_class in enumerate(results[0]["classes"])}
    columns |= {"swd": "SWD (real against real)", "network_evaluations": "network evaluations per image"}
    return (
        f"{table(rows, columns | {'seconds_per_image': 'seconds per image'})}\n\n"
        f"{results[0]['n']} images of each scale, seeds {results[0]['seeds']}; ± is one standard error. The judge puts"
        f" {judge['accuracy']:.1%} of {judge['num_images']:,} real images into their class. SWD is against as many"
        " real images of each class as are asked for; at scale 0 the model chooses the classes itself.\n"
    )


def run(options: Namespace, command: str) -> None:
    """Draws and measures images, and writes the results; raises InputError, or Failed if sampling fails."""
    check_numbers(options, {"num_images": 1, "num_cpu_threads": 1, "scales": 0}, {})
    device = set_up_process(options.num_cpu_threads).device
    source, _ = find_pipeline(options.pipeline)
    pipeline, data = load_pipeline(source, sampler=options.scheduler).to(device), recorded(source, "data") or {}
    names, n, config = data.get("label_names") or [], options.num_images, pipeline.unet.config
    if data.get("source") != "synthetic-faces" or config.get("num_class_embeds") != len(names) + 1:
        raise InputError(f"{source} was not trained on synthetic-faces with --label_column and a null class")
    if n < len(names):
        raise InputError(f"--num_images is {n}, but there are {len(names)} classes; request at least as many")
    which = {"label_column": data["label_column"], "resolution": config.sample_size, "crop": "none"}
    store, others = (open_image_store(dataset_name="synthetic-faces", split=split, **which) for split in SPLITS)
    labels = [i % len(names) for i in range(n)]
    real, real_others = real_sets(store, names, labels)
    judge = fit_judge(store.images, store.labels_among(names), len(names))
    accuracy = float((judge(others.images) == others.labels_among(names)).mean())
    make_folder(options.out)  # early, because drawing the images takes long
    about = {"swd_floor": swd(real_others, real), "seeds": f"0 to {n - 1}", "batch_size": BATCH_SIZE}
    results, shown = [], {name: [] for name in names}
    for scale in options.scales:
        started_at_seconds = time.perf_counter()
        try:
            images, evaluations = draw(pipeline, scale, n, options.steps)
        except ValueError as error:  # images that are not finite, or steps that the sampler cannot take
            raise Failed(f"at scale {scale:g} {error}") from error
        seconds = time.perf_counter() - started_at_seconds
        measured = about | class_shares(judge(images), np.array(labels), names)
        measured |= {"guidance_scale": scale, "swd": swd(images, real)}
        measured |= {"network_evaluations": evaluations, "seconds_per_image": seconds / n}
        results.append(result("guidance", "Share in the class asked for", "class_share", **measured))
        for k, row in enumerate(shown.values()):
            row += [Image.fromarray(image.transpose(1, 2, 0)) for image in images[k :: len(names)][:SHOWN_OF_A_CLASS]]
    record = {
        "weights_sha256": {path.name: sha256_of(path) for path in weight_files(source)},
        "device": device_name(device),
        "judge": {"accuracy": accuracy, "split": SPLITS[1], "num_images": len(others)},
        "command": command,
        "reference": {key: store.description[key] for key in ("source", "split", "resolution", "fingerprint")},
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "results": results,
    }
    write_results(options.out / "guidance.json", record)
    text, scales = summary(record), ", ".join(f"{scale:g}" for scale in options.scales)
    (options.out / "guidance.md").write_text(text)
    rows = {f"{name}, at scales {scales}": images for name, images in shown.items()}
    labelled_grid(rows).save(options.out / "guidance.png")
    print(text)


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m experiments.guidance", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pipeline", required=True, help="folder of a model repository, or its id on the Hub")
    add("--scales", required=True, nargs="+", type=float, help="guidance scales; at 0 the class has no effect")
    add("--out", required=True, type=Path, help="folder for the numbers, table and figure")
    add("--num_images", type=int, default=256, help="images per scale, cycling through the classes (default 256)")
    add("--scheduler", choices=[*SAMPLERS, *CONTINUOUS_SAMPLERS], help="sampler (default: the repository's own)")
    add("--num_inference_steps", type=int, default=50, dest="steps", help="default 50; ode chooses its own")
    add("--num_cpu_threads", type=int)
    return run_command(lambda: run(parser.parse_args(arguments), command_line("experiments.guidance", arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
