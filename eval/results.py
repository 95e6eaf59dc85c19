"""results.json: every figure that a README, a report or a model card quotes, and the tables made from it.

    {"pipeline": ..., "reference": {...}, "versions": {...}, "device": ..., "results": [RESULT, ...]}

A RESULT has `name`, `metric` and `value` (null: not measured, with the `reason`), perhaps `std`, and how it was got:
mode, n, n_reference, dataset, split, crop, resolution, sampler, steps, eta, seeds, features, features_sha256, seconds.

    python -m eval.results README.md     writes the tables anew between <!-- results: FILE FAMILY --> and <!-- end -->,
                                         also those of other commands: <!-- results: FILE.md table -->, and the
                                         held-out losses of a training: <!-- results: LOG.jsonl heldout -->
"""

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from common import InputError, Parser, markdown_table, replace_file, run_command
from training.log import heldout_table, read_log

MARKED = re.compile(r"(<!-- results: (?P<file>\S+) (?P<family>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def result(family: str, name: str, metric: str, value: float | None, **settings) -> dict:
    """One RESULT; settings that are None are left out, and the `std` of a single value, which is NaN.

    Args:
        family: of metrics, the table it belongs to.

    Raises:
        InputError: for a value that is not finite, or none without a `reason`.
    """
    if value is None and not settings.get("reason"):
        raise InputError(f"{name} has no value and no reason why")
    if value is not None and not math.isfinite(value):
        raise InputError(f"{name} is {value}; it must be finite")
    kept = {key: setting for key, setting in settings.items() if setting is not None}
    if math.isnan(kept.get("std", 0)):
        del kept["std"]
    return {"family": family, "name": name, "metric": metric, "value": value, **kept}


def write_results(path: Path, record: dict) -> None:
    """Replaces the file at once, so that a crash leaves the old one."""
    replace_file(path, f"{json.dumps(record, indent=1)}\n".encode())


def read_results(path: Path) -> dict:
    """Raises InputError if there are none."""
    try:
        record = json.loads(path.read_text())
        return record | {"results": list(record["results"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read the results {path}: {error}") from error


def number(value: float | int | str | None) -> str:
    """As a table shows it: integers with separators, others with 4 significant digits."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def value_text(entry: dict) -> str:
    if entry["value"] is None:
        return "not measured"
    spread = f" ± {entry['std']:.2g}" if "std" in entry else ""
    return number(entry["value"]) + spread


def table(results: Iterable[dict], columns: dict[str, str]) -> str:
    """Markdown, one row a result.

    Args:
        columns: heading of each key; `value` is shown with its spread.
    """
    rows = [[value_text(entry) if key == "value" else number(entry.get(key)) for key in columns] for entry in results]
    return markdown_table(list(columns.values()), rows)


def quality_table(results: list[dict]) -> str:
    """All but costs and times; what was not measured shares a row with its like."""
    rows = []
    for entry in results:
        if entry["family"] in ("cost", "time"):
            continue
        if entry["value"] is None and rows and rows[-1]["value"] is None:
            rows[-1] = rows[-1] | {"name": f"{rows[-1]['name']}; {entry['name']}"}
        else:
            rows.append(entry)
    rows = [entry | {"sampler": _sampler(entry)} for entry in rows]
    columns = {"name": "metric", "value": "value", "floor": "real against real", "n": "n"}
    return table(rows, columns | {"split": "split", "sampler": "sampler"})


SUMMARY = "fid kid precision recall memorisation_ratio bits_per_dim_bound_fixed_large bits_per_dim_ode".split()


def summary_table(results: list[dict]) -> str:
    """What a reader asks first: the distances to real images, copies, and the likelihood of held-out images."""
    rows = [
        entry
        for entry in results
        if entry["metric"] in SUMMARY
        and entry["family"] != "cost"
        and entry["value"] is not None
        and not entry["name"].endswith(("training", "DINOv2", "legacy_tensorflow)"))
    ]
    rows = [entry | {"sampler": _sampler(entry)} for entry in rows]
    columns = {"name": "metric", "value": "value", "floor": "real against real", "n": "images", "sampler": "sampler"}
    return table(sorted(rows, key=lambda entry: SUMMARY.index(entry["metric"])), columns)


def _sampler(entry: dict) -> str | None:
    """With its steps and what else it was called with, as far as they are not its defaults."""
    steps = f", {entry['steps']} steps" if "steps" in entry else ""
    own = {name: value for name, value in entry.get("sampler_settings", {}).items() if value}
    own |= {name: entry[name] for name in ("eta", "class_label", "guidance_scale") if entry.get(name)}
    return entry.get("sampler") and "".join([entry["sampler"], steps, *(f", {name} {own[name]}" for name in own)])


def cost_table(results: list[dict]) -> str:
    """A row for each sampler and number of steps: its quality, network evaluations and seconds.

    The quality is FID and KID, or SWD where they were not measured.
    """
    rows = [entry for entry in results if entry["family"] == "cost"]
    if not rows:
        raise InputError("there is no cost curve among the results")
    measured = {entry["metric"] for entry in rows}
    metrics = [key for key in (("fid", "kid") if "fid" in measured else ("swd",)) if key in measured]
    by_count: dict[int, dict[str, dict]] = {}
    for entry in rows:
        by_count.setdefault(entry["n"], {}).setdefault(_sampler(entry), {})[entry["metric"]] = entry
    lines = []
    for n, settings in by_count.items():
        for name, by_metric in settings.items():
            cost = next(iter(by_metric.values()))
            cells = [value_text(by_metric[key]) if key in by_metric else "" for key in metrics]
            lines.append([name, *cells, number(cost["network_evaluations"]), number(cost["seconds_per_image"])])
        floors = [number(by_metric[key].get("floor")) if key in by_metric else "" for key in metrics]
        lines.append([f"real against real, n = {number(n)}", *floors, "", ""])
    headings = ["sampler", *map(str.upper, metrics), "network evaluations", "seconds per image"]
    return markdown_table(headings, lines)


def time_table(results: list[dict]) -> str:
    rows = [entry for entry in results if entry["family"] == "time"]
    columns = {"name": "what", "n": "n", "value": "seconds"}
    return table(rows, columns | {"num_processes": "processes", "num_cpu_threads": "CPU threads each"})


TABLES = {"quality": quality_table, "summary": summary_table, "cost": cost_table, "time": time_table}


def with_tables(text: str, folder: Path) -> str:
    """The text with each marked table made anew from its results file, whose path is relative to the folder.

    The table of a Markdown file (`FILE.md table`) is taken as it is.

    Raises:
        InputError: for an unknown family or an unreadable file.
    """

    def made_anew(match: re.Match) -> str:
        path, family = folder / match["file"], match["family"]
        try:
            if family == "table" and path.suffix == ".md":
                table = path.read_text()
            elif family == "heldout":
                table = f"{heldout_table(read_log(path))}\n"
            elif family in TABLES:
                table = f"{TABLES[family](read_results(path)['results'])}\n"
            else:
                raise InputError(f"there is no table {family!r}; there are {', '.join(TABLES)}")
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the {family} of {match['file']}: {error}") from error
        return f"{match[1]}{table}{match[4]}"

    return MARKED.sub(made_anew, text)


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m eval.results", description="Renews the marked tables of a Markdown file.")
    parser.add_argument("file", type=Path, metavar="FILE.md")

    def renew() -> None:
        path = parser.parse_args(arguments).file
        path.write_text(with_tables(path.read_text(), path.parent))

    return run_command(renew)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
