"""results.json and the tables that are made from it."""

import json
import math
from pathlib import Path

import pytest

from common import InputError
from eval.results import main, number, quality_table, read_results, result, summary_table, with_tables, write_results


def cost(sampler: str, steps: int, value: float, eta: float = 0.0) -> dict:
    about = {"sampler": sampler, "steps": steps, "eta": eta, "n": 1000, "seconds_per_image": steps / 100}
    about["network_evaluations"] = steps
    return result("cost", "SWD, mean", "swd", value, floor=1.5, **about)


RESULTS = [
    result("swd", "SWD, mean", "swd", 12.3456, floor=2.0, n=10000, n_reference=10000, sampler="ddim", steps=50),
    result("features", "FID (clean)", "fid", None, reason="no weights", n=None),
    result("features", "CMMD", "cmmd", None, reason="no weights either"),
    result("likelihood", "Variational bound, held-out", "bound", 4.0, std=0.0321, n=256, split="validation"),
    cost("ddim", 50, 3.0),
    cost("ddim", 10, 5.25),
    cost("ddim", 10, 7.0, eta=1.0),
    result("time", "swd", "seconds_swd", 61.5, n=10000, num_cpu_threads=2),
]


def test_the_spread_of_a_single_value_is_none():
    assert "std" not in result("likelihood", "bound", "bound", 4.0, n=1, std=math.nan)


def test_tables():
    assert quality_table(RESULTS).splitlines() == [
        "| metric | value | real against real | n | split | sampler |",
        "|---|---|---|---|---|---|",
        "| SWD, mean | 12.35 | 2 | 10,000 |  | ddim, 50 steps |",
        "| FID (clean); CMMD | not measured |  |  |  |  |",
        "| Variational bound, held-out | 4 ± 0.032 |  | 256 | validation |  |",
    ]
    assert [number(value) for value in (None, 12345, 0.000123456, "x")] == ["", "12,345", "0.0001235", "x"]


def test_a_sampler_that_chooses_its_steps_has_a_row_too(tmp_path):
    ode = {key: value for key, value in cost("ode", 0, 2.5).items() if key != "steps"}
    text = "<!-- results: results.json cost -->\n<!-- end -->"
    write_results(tmp_path / "results.json", {"results": [*RESULTS, ode]})
    lines = with_tables(text, tmp_path).splitlines()
    assert lines[-3] == "| ode | 2.5 | 0 | 0 |"


@pytest.fixture
def folder(tmp_path):
    write_results(tmp_path / "results.json", {"pipeline": "faces", "results": RESULTS})
    return tmp_path


def test_the_table_of_a_markdown_file_is_taken_as_it_is(tmp_path):
    (tmp_path / "guidance.md").write_text("| a |\n|---|\n| 1 |\n")
    text = "<!-- results: guidance.md table -->\nold\n<!-- end -->\n"
    assert with_tables(text, tmp_path).splitlines()[1:4] == ["| a |", "|---|", "| 1 |"]
    with pytest.raises(InputError, match=r"cannot read the table of nothing\.md"):
        with_tables(text.replace("guidance", "nothing"), tmp_path)


def test_the_held_out_losses_of_a_log_are_its_own_table(tmp_path):
    losses = {f"heldout_loss_q{quarter}": quarter / 8 for quarter in (1, 2, 3, 4)}
    records = [
        {"step": step, "images_seen": 16 * step, "heldout_loss": 0.5, **losses, "images_per_second": 8.0}
        for step in (0, 10, 20)
    ]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    text = "<!-- results: log.jsonl heldout -->\n<!-- end -->"
    lines = with_tables(text, tmp_path).splitlines()
    assert lines[3:6:2] == [
        "| 0 | 0.5000 | 0.1250 | 0.2500 | 0.3750 | 0.5000 |",
        "| 320 | 0.5000 | 0.1250 | 0.2500 | 0.3750 | 0.5000 |",
    ]
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(InputError, match=r"cannot read the heldout of log\.jsonl"):
        with_tables(text, tmp_path)


def test_the_summary_has_what_is_asked_first():
    fid = result("features", "FID (clean)", "fid", 9.0, floor=2.0, n=10000)
    training = result("likelihood", "Probability-flow ODE, training", "bits_per_dim_ode", 5.0)
    heldout = training | {"name": "Probability-flow ODE, held-out", "value": 6.0}
    lines = summary_table([*RESULTS, training, heldout, fid]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| FID (clean)", "| Probability-flow ODE, held-out"]


def test_marked_tables_are_made_anew_and_the_rest_stays(folder):
    text = "before\n<!-- results: results.json {} -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    made = with_tables(text.format("cost"), folder)
    assert made.splitlines() == [
        "before",
        "<!-- results: results.json cost -->",
        "| sampler | SWD | network evaluations | seconds per image |",
        "|---|---|---|---|",
        "| ddim, 50 steps | 3 | 50 | 0.5 |",
        "| ddim, 10 steps | 5.25 | 10 | 0.1 |",
        "| ddim, 10 steps, eta 1.0 | 7 | 10 | 0.1 |",
        "| real against real, n = 1,000 | 1.5 |  |  |",
        "<!-- end -->",
        "after <!-- end -->",
    ]
    assert with_tables(made, folder) == made
    assert "| swd | 10,000 | 61.5 |  | 2 |" in with_tables(text.format("time"), folder)
    (folder / "README.md").write_text(text.format("quality"))
    assert main([str(folder / "README.md")]) == 0
    assert "| SWD, mean | 12.35 |" in (folder / "README.md").read_text()


def test_what_cannot_be_written_or_read_is_refused(folder, capsys):
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"FID is (nan|inf)"):
            result("features", "FID", "fid", value)
    with pytest.raises(InputError, match="no value and no reason"):
        result("features", "FID", "fid", None)
    for text in ("{", "[]", '{"results": 3}'):
        (folder / "bad.json").write_text(text)
        with pytest.raises(InputError, match=r"cannot read the results .*bad\.json"):
            read_results(folder / "bad.json")
    (folder / "README.md").write_text("<!-- results: results.json beauty -->\n<!-- end -->")
    assert main([str(folder / "README.md")]) == 2
    assert capsys.readouterr().err == "error: there is no table 'beauty'; there are quality, summary, cost, time\n"
    assert json.loads((folder / "results.json").read_text())["pipeline"] == "faces"


@pytest.mark.parametrize("name", ["README.md", "REPORT.md", "samples/README.md"])
def test_the_tables_of_the_readme_are_those_of_the_results(name):
    readme = Path(__file__).parent.parent / name
    text = readme.read_text()
    assert "<!-- results: " in text
    assert with_tables(text, readme.parent) == text, f"run `python -m eval.results {name}`"
