"""results.json holds every number that a README, a report or a model card quotes; this module formats its tables.

    {"pipeline": ..., "reference": {...}, "versions": {...}, "device": ..., "results": [RESULT, ...]}

A RESULT has `name`, `metric` and `value` (null if not measured, with the `reason`), optionally `std`, and the settings
of the measurement, such as mode, n, n_reference, dataset, split, crop, resolution, sampler, steps, eta, seeds,
features.

    python -m eval.results README.md     updates each table between <!-- results: FILE FAMILY --> and <!-- end -->

FILE FAMILY is `results.json quality`, `results.json cost`, or `FILE.md table` for a table that another command wrote.
`FILE FAMILY [COLUMN; COLUMN] [ROW; ROW]` selects columns by heading and rows by their first cell.
"""

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from common import InputError, Parser, markdown_table, replace_file, run_command
from training.sde import CONTINUOUS_SAMPLERS

SELECTION = r"(?: \[(?P<columns>[^]]+)\](?: \[(?P<rows>[^]]+)\])?)?"
MARKED = re.compile(
    rf"(<!-- results: (?P<file>\S+) (?P<family>\S+){SELECTION} -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def result(family: str, name: str, metric: str, value: float | None, **settings) -> dict:
    """One RESULT; settings that are None are left out.

    Args:
        family: the family of metrics, which determines the table.
        value: None if it was not measured; the settings then have a `reason`. Raises InputError if it is not finite.
    """
    if value is not None and not math.isfinite(value):
        raise InputError(f"{name} is {value}; it must be finite")
    kept = {key: setting for key, setting in settings.items() if setting is not None}
    return {"family": family, "name": name, "metric": metric, "value": value, **kept}


def write_results(path: Path, record: dict) -> None:
    """Replaces the file atomically, so that a crash leaves the old one."""
    replace_file(path, f"{json.dumps(record, indent=1)}\n".encode())


def read_results(path: Path) -> dict:
    """Reads a results.json; raises InputError if it is missing or invalid."""
    try:
        record = json.loads(path.read_text())
        return record | {"results": list(record["results"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read the results {path}: {error}") from error


def number(value: float | int | str | None) -> str:
    """Formats a value for a table: integers with separators, floats with 4 significant digits."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def value_text(entry: dict) -> str:
    spread = f" ± {entry['std']:.2g}" if "std" in entry else ""
    return number(entry["value"]) + spread


def table(results: Iterable[dict], columns: dict[str, str]) -> str:
    """Formats results as Markdown, one row each.

    Args:
        columns: headings by key; `value` is shown with its spread.
    """
    rows = [[value_text(entry) if key == "value" else number(entry.get(key)) for key in columns] for entry in results]
    return markdown_table(list(columns.values()), rows)


def sampler_text(entry: dict) -> str | None:
    """The sampler, its steps and its settings other than the defaults; None for a result without generated images."""
    if "sampler" not in entry:
        return None
    parts = [entry["sampler"]] + ([f"{entry['steps']} steps"] if "steps" in entry else [])
    defaults = {"eta": 0} | CONTINUOUS_SAMPLERS.get(entry["sampler"], {})
    settings = {"eta": entry.get("eta", 0)} | entry.get("sampler_settings", {})
    parts += [f"{name} {value:g}" for name, value in settings.items() if value != defaults.get(name, value)]
    if "class_label" in entry:
        classes = " ".join(map(str, entry["class_label"]))
        parts += [f"class {classes}", f"guidance scale {entry['guidance_scale']:g}"]
    return ", ".join(parts)


def quality_table(results: list[dict]) -> str:
    """All values except costs and times."""
    shown = [entry for entry in results if entry["family"] not in ("cost", "time") and entry["value"] is not None]
    rows = [entry | {"sampler": sampler_text(entry)} for entry in shown]
    columns = {"name": "metric", "value": "value", "floor": "real against real", "n": "n"}
    return table(rows, columns | {"split": "split", "sampler": "sampler"})


def cost_table(results: list[dict]) -> str:
    """One row per sampler setting: FID and KID, or else SWD, network evaluations and seconds, at the latest n.

    Each feature space has its own columns.
    """
    entries = [entry for entry in results if entry["family"] == "cost"]
    if not entries:
        raise InputError("the results have no cost curve")
    n, rows, names = entries[-1]["n"], {}, {"fid": {}, "kid": {}, "swd": {}}
    floors = {"sampler": f"real against real, n = {number(n)}"}
    for entry in entries:
        if entry["n"] == n:
            row = rows.setdefault(sampler_text(entry), entry | {"sampler": sampler_text(entry)})
            row[entry["name"]] = value_text(entry)
            floors[entry["name"]] = entry.get("floor")
            name = entry["name"].removesuffix(" (clean)").removesuffix(", mean")
            names.setdefault(entry["metric"], {})[entry["name"]] = name
    columns = {"sampler": "sampler"} | (names["fid"] | names["kid"] or names["swd"])
    columns |= {"network_evaluations": "network evaluations", "seconds_per_image": "seconds per image"}
    return table([*rows.values(), floors], columns)


TABLES = {
    "quality": lambda path: quality_table(read_results(path)["results"]),
    "cost": lambda path: cost_table(read_results(path)["results"]),
    "table": lambda path: path.read_text().rstrip(),
}


def selected(lines: str, columns: list[str], rows: list[str] | None) -> str:
    """Selects named columns, in the given order, and rows of a Markdown table; drops any text after the table."""
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines.splitlines() if line.startswith("|")]
    (heading, _, *body), first = cells, [row[0] for row in cells]
    for name in columns + (rows or []):
        if name not in heading + first:
            raise InputError(f"the table has no {name!r}; it has {', '.join(heading + first[2:])}")
    places = [heading.index(name) for name in columns]
    return markdown_table(columns, [[row[i] for i in places] for row in body if rows is None or row[0] in rows])


def with_tables(text: str, folder: Path) -> str:
    """Updates each marked table of a text from its results file, whose path is relative to the folder."""

    def renewed(match: re.Match) -> str:
        path, family = folder / match["file"], match["family"]
        if family not in TABLES:
            raise InputError(f"unknown table {family!r}; choose one of {', '.join(TABLES)}")
        try:
            lines = TABLES[family](path)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the {family} of {match['file']}: {error}") from error
        if match["columns"]:
            rows = match["rows"] and match["rows"].split("; ")
            lines = selected(lines, match["columns"].split("; "), rows)
        return f"{match[1]}{lines}\n{match['end']}"

    return MARKED.sub(renewed, text)


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m eval.results", description="Updates the marked tables of a Markdown file.")
    parser.add_argument("file", type=Path, metavar="FILE.md")

    def renew() -> None:
        path = parser.parse_args(arguments).file
        replace_file(path, with_tables(path.read_text(), path.parent).encode())

    return run_command(renew)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
