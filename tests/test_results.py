"""results.json and the tables generated from it."""

import math
from pathlib import Path

import pytest

from common import InputError
from eval.results import main, number, quality_table, read_results, result, sampler_text, with_tables, write_results

COST = {"floor": 1.5, "n": 1000, "network_evaluations": 50, "seconds_per_image": 0.5}
RESULTS = [
    result("swd", "SWD, mean", "swd", 12.3456, floor=2.0, n=10000, n_reference=10000, sampler="ddim", steps=50),
    result("features", "FID (clean)", "fid", None, reason="no weights", n=None),
    result("likelihood", "Variational bound, held-out", "bound", 4.0, std=0.0321, n=256, split="validation"),
    result("cost", "SWD, mean", "swd", 3.0, sampler="ddim", steps=50, eta=1.0, **COST),
    result("time", "drawing images", "seconds_drawing", 61.5, n=10000, num_cpu_threads=2),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_results(tmp_path / "results.json", {"pipeline": "faces", "results": RESULTS})
    return tmp_path


def marked(file: str, family: str) -> str:
    return f"before\n<!-- results: {file} {family} -->\nold\n<!-- end -->\nafter <!-- end -->\n"


def table_in(folder: Path, file: str, family: str) -> list[str]:
    lines = with_tables(marked(file, family), folder).splitlines()
    assert lines[:2] + lines[-2:] == [line for line in marked(file, family).splitlines() if line != "old"]
    return lines[2:-2]


def test_quality_table_formats_values():
    assert quality_table(RESULTS).splitlines() == [
        "| metric | value | real against real | n | split | sampler |",
        "|---|---|---|---|---|---|",
        "| SWD, mean | 12.35 | 2 | 10,000 |  | ddim, 50 steps |",
        "| Variational bound, held-out | 4 ± 0.032 |  | 256 | validation |  |",
    ]
    assert [number(value) for value in (None, 12345, 0.000123456, "x")] == ["", "12,345", "0.0001235", "x"]


def test_cost_table_lists_samplers_and_the_floor(folder):
    lines = [
        "| sampler | SWD | network evaluations | seconds per image |",
        "|---|---|---|---|",
        "| ddim, 50 steps, eta 1 | 3 | 50 | 0.5 |",
        "| real against real, n = 1,000 | 1.5 |  |  |",
    ]
    assert table_in(folder, "results.json", "cost") == lines


def test_cost_table_keeps_feature_spaces_apart(tmp_path):
    found = {"FID (clean)": 20.0, "FD-DINOv2": 900.0}
    found = [result("cost", name, "fid", value, sampler="ode", **COST) for name, value in found.items()]
    write_results(tmp_path / "results.json", {"results": found})
    lines = table_in(tmp_path, "results.json", "cost [sampler; FID; FD-DINOv2]")
    assert lines[2:] == ["| ode | 20 | 900 |", "| real against real, n = 1,000 | 1.5 | 1.5 |"]


def test_sampler_text_lists_settings_that_are_not_defaults():
    own = {"churn": 5.0, "churn_min": 0.0}  # older results have settings that no longer exist
    entry = {"sampler": "edm_heun", "steps": 9, "sampler_settings": own, "class_label": [0, 2], "guidance_scale": 2.0}
    assert sampler_text(entry) == "edm_heun, 9 steps, churn 5, class 0 2, guidance scale 2"
    assert sampler_text({"metric": "bits_per_dim_ode"}) is None


def test_tables_come_from_markdown_files(tmp_path):
    (tmp_path / "guidance.md").write_text("| a |\n|---|\n| 1 |\n")
    assert table_in(tmp_path, "guidance.md", "table") == ["| a |", "|---|", "| 1 |"]
    for file, family in (("nothing.md", "table"), ("guidance.md", "cost")):
        with pytest.raises(InputError, match=f"cannot read the {family} of {file}"):
            with_tables(marked(file, family), tmp_path)


def test_columns_and_rows_of_a_table_can_be_selected(tmp_path, folder):
    lines = "| name | a | b |\n|---|---|---|\n| x | 1 |  |\n| y | 3 | 4 |\n| x | 5 | 6 |\n\nA note.\n"
    (tmp_path / "f.md").write_text(lines)
    assert table_in(tmp_path, "f.md", "table [b; name]")[2:] == ["|  | x |", "| 4 | y |", "| 6 | x |"]
    assert table_in(tmp_path, "f.md", "table [name; a] [x]") == ["| name | a |", "|---|---|", "| x | 1 |", "| x | 5 |"]
    assert table_in(folder, "results.json", "quality [metric; value] [SWD, mean]")[2:] == ["| SWD, mean | 12.35 |"]
    for selection in ("[name; c]", "[name] [z]"):
        with pytest.raises(InputError, match=r"the table has no '[cz]'; it has name, a, b, x, y, x"):
            with_tables(marked("f.md", f"table {selection}"), tmp_path)


def test_command_updates_a_file_or_reports_an_error(folder, capsys):
    readme = folder / "README.md"
    readme.write_text(marked("results.json", "quality"))
    assert main([str(readme)]) == 0
    assert "| SWD, mean | 12.35 |" in readme.read_text()
    readme.write_text(marked("results.json", "beauty"))
    assert main([str(readme)]) == 2
    assert capsys.readouterr().err == "error: unknown table 'beauty'; choose one of quality, cost, table\n"


def test_invalid_values_and_files_are_rejected(tmp_path):
    for value in (math.nan, math.inf):
        with pytest.raises(InputError, match=r"FID is (nan|inf)"):
            result("features", "FID", "fid", value)
    for text in ("{", "[]", '{"results": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=r"cannot read the results .*bad\.json"):
            read_results(tmp_path / "bad.json")


@pytest.mark.parametrize("name", ["README.md", "REPORT.md", "samples/README.md"])
def test_committed_tables_match_the_results(name):
    readme = Path(__file__).parent.parent / name
    text = readme.read_text()
    assert "<!-- results: " in text
    assert with_tables(text, readme.parent) == text, f"run `python -m eval.results {name}`"
