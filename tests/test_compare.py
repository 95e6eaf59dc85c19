"""The comparison of several models, from real evaluations and from faulty results."""

import json
import shutil
from pathlib import Path

import pytest
from diffusers import DDIMScheduler
from test_eval_run import FACTS, export, write_real_images

from eval import run
from eval.compare import main
from eval.results import number, read_results, write_results
from training.sde import SDEScheduler

SCHEDULERS = {
    "ddpm": DDIMScheduler(prediction_type="v_prediction"),
    "vp": SDEScheduler(objective="vp", prediction_type="epsilon"),
}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """Evaluations of two models: `ddpm`, with images by two samplers, and `vp`, without facts about its training."""
    folder = tmp_path_factory.mktemp("evaluated")
    environment = pytest.MonkeyPatch()
    environment.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    real = write_real_images(folder / "real", train=24, validation=4)

    def evaluate(name: str, *flags: str) -> None:
        fixed = f"--num_images 10 --steps 3 --crop none --num_cpu_threads 1 --reference {real}"
        where = f"--pipeline {folder / 'models' / name} --out {folder / name}"
        assert run.main([*fixed.split(), *where.split(), *flags]) == 0

    few = "--likelihood_images 2 --bound_evaluations 2 --ode_images 2 --ode_tolerance 0.01 --heldout_images 4".split()
    for name, scheduler in SCHEDULERS.items():
        export(folder / "models" / name, scheduler, facts=FACTS if name == "ddpm" else None)
        evaluate(name, *few, "--metrics", "swd", "memorisation", "likelihood", "heldout")
    evaluate("ddpm", "--metrics", "swd", "--sampler", "euler_maruyama")
    environment.undo()
    return folder


@pytest.fixture
def copies(evaluated, tmp_path) -> tuple[Path, Path]:
    """Copies of the evaluations, which a test may modify."""
    return tuple(shutil.copytree(evaluated / name, tmp_path / name) for name in SCHEDULERS)


def compare(*runs: Path, out: Path, flags: str = "") -> list[dict[str, str]]:
    """The rows of the table, each a dict from heading to cell."""
    assert main([*map(str, runs), "--out", str(out), *flags.split()]) == 0
    lines = (out / "comparison.md").read_text().splitlines()
    heading, rule, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line[:1] == "|"]
    assert set(rule) == {"---"}
    return [dict(zip(heading, row, strict=True)) for row in rows]


def entry(folder: Path, name: str, **about) -> dict:
    found = read_results(folder / "results.json")["results"]
    (one,) = [e for e in found if e["name"] == name and about.items() <= e.items()]
    return one


def test_table_matches_the_results(evaluated, tmp_path):
    ddpm, vp = evaluated / "ddpm", evaluated / "vp"
    table = compare(ddpm, vp, out=tmp_path, flags="--titles DDPM VP")
    assert [(row["model"], row["objective"], row["sampler"]) for row in table] == [
        ("DDPM", "ddpm, v_prediction", "ddim, 3 steps"),
        ("DDPM", "ddpm, v_prediction", "euler_maruyama, 3 steps"),
        ("VP", "vp, epsilon", "edm_heun, 3 steps"),
    ]
    assert [row["images seen in training"] for row in table] == ["12", "12", "not measured"]
    assert [row["network evaluations per image"] for row in table] == ["3", "4", "5"]
    assert [row["images drawn"] for row in table] == ["10"] * 3
    swd = [entry(ddpm, "SWD, mean", sampler=sampler) for sampler in ("ddim", "euler_maruyama")]
    expected = [f"{number(e['value'])} ({number(e['floor'])})" for e in [*swd, entry(vp, "SWD, mean")]]
    assert [row["SWD (real against real)"] for row in table] == expected
    ratio = entry(ddpm, "Nearest training image, generated / held-out (median)")
    shown = [row["nearest training image, generated / held-out"] for row in table]
    assert shown[:2] == [number(ratio["value"]), "not measured"]
    for run_dir, row in ((ddpm, table[1]), (vp, table[2])):
        ode = entry(run_dir, "Probability-flow ODE, held-out")
        assert row["bits/dim by the ODE, held-out"].startswith(f"{number(ode['value'])} ± ")
        error = entry(run_dir, "Error of x_0, mean over log sigma, held-out")
        assert row["error of x_0, held-out"].startswith(f"{number(error['value'])} ± ")
    assert "the least level that the model knows: DDPM 0.01, VP 0.001" in (tmp_path / "comparison.md").read_text()


def test_numbers_and_figures_are_written_beside_the_table(evaluated, tmp_path):
    compare(evaluated / "ddpm", evaluated / "vp", out=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"comparison.md", "comparison.json", "comparison.png", "comparison_errors.png"}
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["title"] for row in record["rows"]] == ["ddpm", "ddpm", "vp"]
    assert record["rows"][2]["swd"] == entry(evaluated / "vp", "SWD, mean")
    labels = ["ddpm: ddim, 3 steps", "ddpm: euler_maruyama, 3 steps", "vp: edm_heun, 3 steps"]
    assert record["shown"] == {"seeds": list(range(8)), "labels": labels}
    assert str(evaluated) not in (tmp_path / "comparison.json").read_text()


def test_missing_or_damaged_images_are_left_out(copies, tmp_path):
    ddpm, vp = copies
    shutil.rmtree(vp / "images")
    (ddpm / "images" / "ddim-3-steps-fp32" / "seed-0000003.png").write_bytes(b"damaged")
    compare(ddpm, vp, out=tmp_path / "out", flags="--num_images 4")
    shown = json.loads((tmp_path / "out" / "comparison.json").read_text())["shown"]
    assert shown == {"seeds": [0, 1, 2, 3], "labels": ["ddpm: euler_maruyama, 3 steps"]}
    shutil.rmtree(ddpm / "images")
    compare(ddpm, vp, out=tmp_path / "none")
    assert not (tmp_path / "none" / "comparison.png").exists()


def test_shipped_results_with_missing_metrics_are_tabulated(tmp_path):
    samples = Path(__file__).parent.parent / "samples" / "celeba32_cpu"
    whole, part = (compare(samples / name, out=tmp_path)[0] for name in ("evaluation", "samplers/ddpm"))
    assert (whole["sampler"], part["sampler"]) == ("unipc, 20 steps", "ddpm, 50 steps")
    fid = entry(samples / "evaluation", "FID (clean)", family="features")["value"]
    assert whole["FID (clean)"] == number(fid)
    assert part["bits/dim by the ODE, held-out"] == part["error of x_0, held-out"] == "not measured"


def update_results(folder: Path, **keys) -> None:
    write_results(folder / "results.json", read_results(folder / "results.json") | keys)


def test_model_without_images_has_a_row(copies, tmp_path):
    ddpm, _ = copies
    entries = read_results(ddpm / "results.json")["results"]
    update_results(ddpm, results=[entry for entry in entries if entry["family"] in ("likelihood", "heldout")])
    (row,) = compare(ddpm, out=tmp_path / "out")
    assert row["sampler"] == row["SWD (real against real)"] == "not measured"
    assert "±" in row["bits/dim by the ODE, held-out"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["ddpm", "nowhere", "--out", "out"], "cannot read the results nowhere/results.json"),
        (["ddpm", "vp", "--out", "out", "--titles", "one"], "there are 1 --titles for 2 folders"),
        (["ddpm", "vp", "--out", "out", "--titles", "one", "one"], "2 models are called one; tell them apart"),
        (["ddpm", "other_data", "--out", "out"], "have fingerprint other, those of ddpm"),
        (["ddpm", "--out", "ddpm/results.json"], "--out ddpm/results.json is not a folder; choose another one"),
    ],
)
def test_bad_input_exits_with_code_2_and_one_line(copies, flags, message, monkeypatch, capsys):
    monkeypatch.chdir(copies[0].parent)
    other = read_results(Path("vp/results.json"))["reference"] | {"fingerprint": "other"}
    shutil.copytree("vp", "other_data")
    update_results(Path("other_data"), pipeline="other_data", reference=other)
    assert main(flags) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert not Path("out").exists()
