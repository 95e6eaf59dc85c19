"""Compares the evaluations of several models: a table, its numbers, and images from the same seeds.

    python -m eval.compare RUN_DIR... --out DIR --titles NAME...

RUN_DIR is the output folder of `python -m eval.run`. DIR/comparison.md is a table with one row per model and sampler
setting, DIR/comparison.json has its numbers, DIR/comparison.png shows images for each row (if RUN_DIR still has them),
and DIR/comparison_errors.png plots the held-out errors against the noise level. Exit codes: 0 done, 1 failed, 2 bad
input.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import InputError, Parser, check_numbers, make_folder, run_command
from eval.evaluation import IMAGES, images_folder
from eval.figures import labelled_grid, plot_curves
from eval.results import number, read_results, sampler_text, table, value_text, write_results
from pipelines.image_folder import RECORD, image_path, missing_seeds

DRAWN = ("swd", "features", "memorisation")  # families of results about generated images
SETTING = "sampler steps eta sampler_settings class_label guidance_scale seeds dtype".split()
COLUMNS = {  # key in a row: heading
    "title": "model",
    "objective": "objective",
    "images_seen": "images seen in training",
    "drawn_by": "sampler",
    "network_evaluations": "network evaluations per image",
    "n": "images drawn",
    "swd": "SWD (real against real)",
    "memorisation_ratio": "nearest training image, generated / held-out",
    "bits_per_dim_ode": "bits/dim by the ODE, held-out",
    "sample_mse": "error of x_0, held-out",
}
FEATURES = ("fid", "kid", "cmmd")  # metrics with one column for each name that was measured


class Run(NamedTuple):
    """An evaluation: its folder, its title, its record, and those results that have a value."""

    folder: Path
    title: str
    record: dict
    results: list[dict]

    @property
    def settings(self) -> list[dict]:
        """The sampler settings of its images: one, several or none."""
        found = []
        for entry in self.results:
            setting = {key: entry[key] for key in SETTING if key in entry}
            if entry["family"] in DRAWN and setting not in found:
                found.append(setting)
        return found


def open_runs(folders: list[Path], titles: list[str] | None) -> list[Run]:
    """Reads the evaluations; raises InputError if a folder has none, the real images differ, or titles repeat."""
    if titles is not None and len(titles) != len(folders):
        raise InputError(f"there are {len(titles)} --titles for {len(folders)} folders; pass one per folder")
    records = [read_results(folder / "results.json") for folder in folders]
    titles = titles or [record["pipeline"] for record in records]
    first = records[0]["reference"]
    for title, record in zip(titles, records, strict=True):
        if titles.count(title) > 1:
            raise InputError(f"{titles.count(title)} models are called {title}; distinguish them with --titles")
        for key in first | record["reference"]:
            here, there = record["reference"].get(key), first.get(key)
            if here != there:
                differ = f"the real images of {title} have {key} {here}, those of {titles[0]} {there}"
                raise InputError(f"{differ}; evaluate both with the same images")
    measured = [[entry for entry in record["results"] if entry["value"] is not None] for record in records]
    heldout = [entry for results in measured for entry in results if entry["name"].endswith(", held-out")]
    splits = sorted({entry.get("split", "") for entry in heldout})
    if len(splits) > 1:
        raise InputError(f"the held-out images are from the splits {', '.join(splits)}; evaluate with the same images")
    return [Run(*run) for run in zip(folders, titles, records, measured, strict=True)]


def rows_of(run: Run) -> Iterator[dict]:
    """One row per sampler setting, or a single row without images; None means not measured."""
    model = run.record["model"]
    names = dict.fromkeys((model["objective"], model["prediction_type"]))  # the same word for edm
    objective = ", ".join([*names] + ["likelihood weighting"] * model.get("likelihood_weighting", False))
    row = {"title": run.title, "objective": objective, "images_seen": model.get("images_seen")}
    row |= {metric: _newest(run.results, metric, ", held-out") for metric in ("bits_per_dim_ode", "sample_mse")}
    for setting in run.settings or [None]:
        entries = [entry for entry in run.results if setting is not None and setting.items() <= entry.items()]
        row |= {"setting": setting, "drawn_by": setting and sampler_text(setting)}
        row["network_evaluations"] = (_newest(entries, "seconds_drawing") or {}).get("network_evaluations")
        row["n"] = max((entry["n"] for entry in entries if entry["family"] in DRAWN), default=None)
        row["swd"] = _newest(entries, "swd", "SWD, mean")
        row["memorisation_ratio"] = _newest(entries, "memorisation_ratio", "(median)")  # in pixels
        yield row | {entry["name"]: entry for entry in entries if entry["metric"] in FEATURES}


def _newest(results: list[dict], metric: str, end_of_name: str = "") -> dict | None:
    found = [entry for entry in results if entry["metric"] == metric and entry["name"].endswith(end_of_name)]
    return found[-1] if found else None


def table_of(rows: list[dict]) -> str:
    """Formats the rows as Markdown; missing values read "not measured"."""
    fixed = {*COLUMNS, "setting"}
    columns = COLUMNS | {key: key for row in rows for key in row if key not in fixed}
    text = table([{key: _cell(row.get(key)) for key in columns} for row in rows], columns)
    ends = {row["title"]: row["bits_per_dim_ode"] for row in rows if row["bits_per_dim_ode"] is not None}
    left = [f"{title} {number(entry['first_sigma'])}" for title, entry in ends.items() if "first_sigma" in entry]
    note = f"\n\nThe bits/dim are of images with noise of the least level that the model knows: {', '.join(left)}."
    return text + note if left else text


def _cell(value: dict | float | str | None) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, dict):
        return value_text(value) + (f" ({number(value['floor'])})" if value["metric"] == "swd" else "")
    return number(value).replace("|", r"\|")


def images_of(runs: list[Run], num_images: int) -> tuple[range, dict[str, list[Path]]]:
    """Seeds, and their images by model and sampler setting; settings with missing images are left out."""
    folders = {}
    for run in runs:
        for setting in run.settings:
            folder = run.folder / IMAGES / images_folder(setting)
            if (folder / RECORD).is_file():  # drawn by `pipelines.generate`, so not photographs
                folders[f"{run.title}: {sampler_text(setting)}"] = folder, int(setting["seeds"].split()[0])
    first = max((seed for _, seed in folders.values()), default=0)
    seeds = range(first, first + num_images)
    whole = {label: folder for label, (folder, _) in folders.items() if not missing_seeds(folder, seeds)}
    return seeds, {label: [image_path(folder, seed) for seed in seeds] for label, folder in whole.items()}


def errors_by_noise_level(runs: list[Run]) -> tuple[list[float], dict[str, np.ndarray]]:
    """The noise levels, and by model the held-out error of the noise at each; models without errors are left out."""
    found = {run.title: _newest(run.results, "sample_mse", ", held-out") for run in runs}
    sigmas = next((entry["sigmas"] for entry in found.values() if entry is not None), [])
    return sigmas, {
        title: np.array(entry["curve"]) / np.square(sigmas)
        for title, entry in found.items()
        if entry is not None and entry["sigmas"] == sigmas
    }


def compare(options: Namespace) -> None:
    """Writes the comparison. Raises InputError if the evaluations cannot be compared."""
    check_numbers(options, {"num_images": 1}, {"num_images": 64})
    out = options.out
    try:
        runs = open_runs(options.run_dirs, options.titles)
        rows = [row for run in runs for row in rows_of(run)]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"a result lacks a value to compare, or the value has the wrong type: {error}") from error
    seeds, images = images_of(runs, options.num_images)
    sigmas, curves = errors_by_noise_level(runs)
    make_folder(out)
    (out / "comparison.md").write_text(f"{table_of(rows)}\n")
    if images:
        labelled_grid(images).save(out / "comparison.png")
    if curves:
        labels = {"xlabel": "noise level sigma", "ylabel": "mean squared error of the noise, held-out"}
        labels |= {"xscale": "log", "yscale": "log"}
        bands = {title: (curve, None) for title, curve in curves.items()}
        plot_curves(sigmas, bands, labels, out / "comparison_errors.png")
    shown = {"seeds": [*seeds], "labels": [*images]} if images else None
    write_results(out / "comparison.json", {"reference": runs[0].record["reference"], "rows": rows, "shown": shown})
    print(f"wrote {out / 'comparison.md'}: {len(rows)} rows, images of {len(images)}", flush=True)


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m eval.compare", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="output folder of eval.run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the table and figures")
    parser.add_argument("--titles", nargs="+", help="titles of the models (default: the names of their folders)")
    parser.add_argument("--num_images", type=int, default=8, help="images per row of the figure (default 8)")
    return run_command(lambda: compare(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
