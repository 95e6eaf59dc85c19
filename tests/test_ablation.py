"""Ablation studies: a real one from end to end, tables from hand-written results, and refused inputs."""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from eval.results import number, read_results, write_results
from experiments import ablation, bench
from experiments.ablation import Job, jobs_of, main
from experiments.study import read_study
from training.arguments import parse_config

REPOSITORY = Path(__file__).resolve().parent.parent
SIZE, NUM_IMAGES = 16, 16
FLAGS = {
    "resolution": SIZE,
    "attention_head_dim": 32,
    "block_out_channels": [32, 32],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "max_train_steps": 3,
    "lr_warmup_steps": 1,
    "validation_images": 8,
    "max_images": 64,
}
EVALUATION = {"num_images": NUM_IMAGES, "steps": 3, "heldout_images": 8}
EDM = {"objective": "edm", "ddpm_beta_schedule": "linear", "snr_gamma": None}
REAL_STUDY = {
    "config": "configs/quickstart.yaml",
    "flags": FLAGS,
    "evaluation": EVALUATION,
    "seeds": [7],
    "variants": {
        "base": {"flags": {"learning_rate": 2.5e-4, "random_flip": False}},
        "edm": {"flags": EDM, "evaluation": {"sampler": "edm_heun", "churn": 2.0}},
    },
}
SEEDS = [0, 1, 5]
REFERENCE = {"dataset": "real", "split": "train", "crop": "none", "resolution": SIZE, "fingerprint": "a"}
STUDY = REAL_STUDY | {
    "seeds": SEEDS,
    "variants": {
        "base": {},
        "linear": {"flags": {"ddpm_beta_schedule": "linear"}},
        "fast": {"flags": {"learning_rate": 0.01}},
    },
}


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A folder of real images."""
    folder = tmp_path_factory.mktemp("data") / "real"
    for split, count in (("train", 64), ("validation", 12)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng((count, i)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            image.save(folder / split / f"{i:03}.png")
    return folder


def write_study(folder: Path, content, name: str = "study.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def start(study: Path, data: Path | str, *flags: str) -> int:
    return main([str(study), "--data", str(data), "--out", str(study.parent / "out"), *flags])


def rows(out: Path) -> list[dict[str, str]]:
    """The table's cells by their heading."""
    lines = [line for line in (out / "ablation.md").read_text().splitlines() if line.startswith("|")]
    heading, _, *rest = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(heading, row, strict=True)) for row in rest]


# ---- One for real


def test_a_study_is_trained_and_evaluated_with_its_flags_and_laid_side_by_side(real, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    study, out = write_study(tmp_path, REAL_STUDY), tmp_path / "out"
    code = start(study, real, "--jobs", "2")
    assert code == 0, "\n".join(path.read_text()[-2000:] for path in out.rglob("log.txt"))
    table = rows(out)
    assert [row["variant"] for row in table] == ["base", "edm"]
    assert table[0]["what is changed"] == "learning_rate 0.00025, random_flip False"
    assert [row["sampler"] for row in table] == ["ddim, 3 steps", "edm_heun, 3 steps, churn 2"]
    assert table[1]["error of the noise"] == table[1]["q1"] == "–"  # at other noise levels
    for row, changes in zip(table, ({"learning_rate": 2.5e-4, "random_flip": False}, EDM), strict=True):
        folder = out / row["variant"] / "seed-7"
        config = yaml.safe_load((folder / "run" / "config.yaml").read_text())
        assert (FLAGS | changes | {"seed": 7, "dataset_name": None}).items() <= config.items()
        record = read_results(folder / "evaluation" / "results.json")
        (swd,) = [entry for entry in record["results"] if entry["name"] == "SWD, mean"]
        assert (swd["n"], swd["steps"], row["SWD"]) == (NUM_IMAGES, 3, number(swd["value"]))
    text = (out / "ablation.md").read_text()
    assert f"In all rows: parameters {number(record['model']['parameters'])}, images seen {3 * 16}." in text
    assert str(tmp_path) not in (out / "ablation.json").read_text() + text  # nothing of this machine

    figures = {"ablation_errors.png", "ablation_images.png"}
    assert {p.name for p in out.iterdir() if p.is_file()} == {"ablation.md", "ablation.json"} | figures

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.parent != out}

    before = files()
    assert start(study, real) == 0
    assert files() == before
    assert "2 trainings and evaluations, 2 of them done before" in capsys.readouterr().out


# ---- Results that are written by hand


def results_of(name: str, seed: int) -> dict:
    """As eval.run writes them, with other numbers for each variant and seed."""
    values = np.random.default_rng([*name.encode(), seed])
    drawing = {"sampler": "ddim", "steps": 3, "eta": 0.0, "seeds": "0 to 15", "dtype": "fp32", "n": NUM_IMAGES}

    def result(family: str, name: str, metric: str, **settings) -> dict:
        return {"family": family, "name": name, "metric": metric, "value": values.uniform(1, 9)} | settings

    nearest = "Nearest training image, generated / held-out (median)"
    curve, sigmas = values.uniform(0.1, 1, 20).tolist(), {"sigmas": [0.5, 2.0], "curve": [0.1, 0.2]}
    return {
        "pipeline": "pipeline",
        "reference": REFERENCE,
        "model": {"parameters": 1234, "images_seen": 48, "train_seconds": values.uniform(60, 600)},
        "versions": {"torch": "2"},
        "results": [
            result("heldout", "Error of the noise, mean over timesteps, held-out", "epsilon_mse", curve=curve),
            result("heldout", "Error of x_0, mean over log sigma, held-out", "sample_mse", **sigmas),
            result("swd", "SWD, mean", "swd", floor=0.625, **drawing),
            result("memorisation", nearest, "memorisation_ratio", **drawing),
            result("features", "FID (clean)", "fid", floor=1.5, **drawing),
            result("features", "KID (clean)", "kid", std=0.1, floor=0.25, **drawing),
        ],
    }


def jobs(study: Path, data: Path) -> list[Job]:
    return jobs_of(read_study(study), str(data), None, study.parent / "out")


@pytest.fixture
def by_hand(real, tmp_path) -> Path:
    """A study whose jobs count as done."""
    study = write_study(tmp_path, STUDY)
    for job in jobs(study, real):
        (job.folder / "evaluation").mkdir(parents=True)
        write_results(job.folder / "evaluation" / "results.json", results_of(job.variant.name, job.seed))
        write_results(job.folder / "job.json", job.record | {"is_done": True})
    return study


def values(name: str, metric: str) -> list[float]:
    """Of a variant, by seed."""
    records = [results_of(name, seed) for seed in SEEDS]
    return [e["value"] for record in records for e in record["results"] if e["metric"] == metric]


def with_spread(numbers: list[float]) -> str:
    return f"{number(statistics.mean(numbers))} ± {statistics.stdev(numbers):.2g}"


def test_the_table_has_means_and_standard_deviations_over_the_seeds(by_hand, real):
    """Quarters are means of the curve by timestep, and only compared at the same noise schedule."""
    assert start(by_hand, real) == 0
    out = by_hand.parent / "out"
    metrics = {"FID": "fid", "KID": "kid", "SWD": "swd", "error of x_0": "sample_mse"}
    metrics |= {"nearest training image, generated / held-out": "memorisation_ratio"}
    for row in rows(out):
        for heading, metric in metrics.items():
            assert row[heading] == with_spread(values(row["variant"], metric))
        minutes = [results_of(row["variant"], seed)["model"]["train_seconds"] / 60 for seed in SEEDS]
        assert row["minutes of training"] == with_spread(minutes)
    _, linear, fast = rows(out)
    curves = [results_of("fast", seed)["results"][0]["curve"] for seed in SEEDS]
    for quarter in range(4):
        means = [sum(curve[5 * quarter : 5 * quarter + 5]) / 5 for curve in curves]
        assert fast[f"q{quarter + 1}"] == with_spread(means)
        assert linear[f"q{quarter + 1}"] == linear["error of the noise"] == "–"
    assert read_results(out / "ablation.json")["rows"][2]["swd"]["values"] == values("fast", "swd")
    text = (out / "ablation.md").read_text()
    assert "between two sets of real ones FID is 1.5, KID is 0.25, SWD is 0.625." in text
    assert "standard deviations over 3 trainings" in text
    assert {path.name for path in out.glob("*.png")} == {"ablation_errors.png"}  # there are no images


def test_results_that_lack_what_is_compared_are_refused(by_hand, real, capsys):
    path = by_hand.parent / "out" / "linear" / "seed-1" / "evaluation" / "results.json"
    other = {"reference": REFERENCE | {"fingerprint": "b"}}
    no_distance = {"results": results_of("linear", 1)["results"][:2]}
    for change, message in (
        ({"results": []}, "a result of linear lacks what"),
        (no_distance, "no distance between its images and real ones"),
        (other, "have fingerprint b"),
    ):
        write_results(path, results_of("linear", 1) | change)
        assert start(by_hand, real) == 2
        assert message in error_line(capsys)


# ---- What is repeated


def not_done(study: Path, data: Path) -> set[tuple[str, int]]:
    return {(job.variant.name, job.seed) for job in jobs(study, data) if not job.is_done}


def test_what_has_other_flags_is_not_done_and_is_removed_when_it_begins(by_hand, real):
    assert not_done(by_hand, real) == set()
    config = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())
    own = write_study(by_hand.parent, config, "own.yaml")
    write_study(by_hand.parent, STUDY | {"config": str(own)})
    assert not_done(by_hand, real) == set()  # the same, elsewhere
    write_study(by_hand.parent, config | {"dropout": 0.25}, "own.yaml")
    assert len(not_done(by_hand, real)) == 9
    fast = STUDY["variants"] | {"fast": {"flags": {"learning_rate": 0.02}}}
    for changes, left in ({"evaluation": EVALUATION | {"steps": 4}}, {"run"}), ({"variants": fast}, set()):
        write_study(by_hand.parent, STUDY | changes)
        job = jobs(by_hand, real)[2]
        assert (job.variant.name, job.is_done) == ("fast", False)
        (job.folder / "run").mkdir(exist_ok=True)
        job.begin()
        assert {path.name for path in job.folder.iterdir()} == left | {"job.json"}
        assert json.loads((job.folder / "job.json").read_text()) == job.record
    assert not_done(by_hand, real) == {("fast", seed) for seed in SEEDS}


def trainings_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Of its children those that train; libraries start others of their own for a moment while they are imported."""
    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "experiments.unet_variants" in child.cmdline():
                found.append(child)
    return found


def test_sigterm_ends_the_trainings_too(by_hand, real):
    """Those of one variant have other flags by now, and none of them can end by itself."""
    flags = {"learning_rate": 0.02, "max_train_steps": 1_000_000, "logging_steps": 1_000_000}
    write_study(by_hand.parent, STUDY | {"variants": STUDY["variants"] | {"fast": {"flags": flags}}})
    out = by_hand.parent / "out"
    arguments = [str(by_hand), "--data", str(real), "--out", str(out), "--jobs", "2"]
    command = [sys.executable, "-m", "experiments.ablation", *arguments]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(trainings := trainings_of(process)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, error = process.communicate(timeout=300)  # a training that is just starting may take long to stop
    assert process.returncode == 130, error
    assert not any(training.is_running() for training in trainings)
    assert error.splitlines()[-1] == "stopped; the same command resumes from here"
    assert not_done(by_hand, real) == {("fast", seed) for seed in SEEDS}
    begun = json.loads((out / "fast" / "seed-0" / "job.json").read_text())
    assert begun["training"]["learning_rate"] == 0.02  # it resumes from here


# ---- Equal time

EQUAL_TIME = REAL_STUDY | {
    "flags": {name: value for name, value in FLAGS.items() if name != "max_train_steps"},
    "minutes": 0.5,
    "variants": {"base": {}, "fast": {"flags": {"train_batch_size": 8}}, "short": {"flags": {"lr_warmup_steps": 70}}},
}


def test_speeds_are_medians_of_updates_made_in_turn(monkeypatch):
    """The clock of the test goes on by what each update costs; one of them is slow, as if something came between."""
    base = parse_config(["--config", "configs/quickstart.yaml"])
    trainings = {"small": (replace(base, train_batch_size=6), "plain"), "large": (base, "no_skips")}
    costs_seconds = {6: 2.0, 16: 4.0}
    now_seconds, turns = 0.0, []

    def loss(network, scheduler, images, **settings):
        nonlocal now_seconds
        assert settings == base.loss_settings()
        turns.append(len(images))
        now_seconds += costs_seconds[len(images)] + (100 if len(turns) == 9 else 0)
        return next(network.args[0].parameters()).sum()

    monkeypatch.setattr(bench, "diffusion_loss", loss)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now_seconds)
    assert bench.measure_speeds(trainings) == {"small": 3.0, "large": 4.0}
    assert turns == [6, 16] * (len(turns) // 2)


def test_each_variant_trains_as_long_as_the_study_says(real, tmp_path, monkeypatch, capsys):
    """30 seconds; what was measured once stays, and what is new is measured together with the first variant."""
    measured = []

    def measure(trainings):
        measured.append([*trainings])
        speeds = {"base": 32.0, "fast": 40.0, "short": 32.0, "new": 64.0}
        return {name: speeds[name] / len(measured) for name in trainings}  # the second time the machine is busy

    done = []
    monkeypatch.setattr(ablation, "measure_speeds", measure)
    monkeypatch.setattr(ablation, "do_all", lambda jobs, _: done.append({j.variant.name: j.config for j in jobs}))
    monkeypatch.setattr(ablation, "write_study", lambda *arguments: None)
    for variants in ({}, {"new": {}}):
        content = EQUAL_TIME | {"variants": EQUAL_TIME["variants"] | variants}
        assert start(write_study(tmp_path, content), real) == 0
    assert measured == [["base", "fast", "short"], ["base", "new"]]
    steps = {"base": 60, "fast": 150, "short": 71}  # more than the warm-up
    assert {name: config.max_train_steps for name, config in done[0].items()} == steps
    assert {name: config.max_train_steps for name, config in done[1].items()} == steps | {"new": 120}
    (tmp_path / "out" / "speeds.json").write_text("{")
    assert start(tmp_path / "study.yaml", real) == 1
    assert "speeds.json is damaged; delete it" in error_line(capsys)


# ---- What fails, and what is refused


def error_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1, error
    return error


def test_a_training_that_fails_is_one_line(tmp_path, capsys):
    """A folder without images; what comes after it is not begun."""
    (tmp_path / "empty").mkdir()
    study = write_study(tmp_path, REAL_STUDY)
    assert start(study, tmp_path / "empty") == 1
    error = error_line(capsys)
    log = tmp_path / "out" / "base" / "seed-7" / "log.txt"
    assert error.startswith("error: base, seed-7 failed with exit code 2: error: ")
    assert str(log) in error
    assert log.read_text().splitlines()[-1] in error
    assert not (tmp_path / "out" / "edm").exists()
    assert not (tmp_path / "out" / "ablation.md").exists()


def variant_with(flags: dict, **evaluation) -> dict:
    return REAL_STUDY | {"variants": {"base": {}, "other": {"flags": flags, "evaluation": evaluation}}}


BAD_STUDIES = {
    "empty": ("", "is not a study"),
    "an unknown key": (REAL_STUDY | {"variant": {}}, "unexpected keyword argument 'variant'"),
    "flags that are a list": (variant_with([1]), "is not a study"),
    "one variant": (REAL_STUDY | {"variants": {"base": {}}}, "with 1 variants; give"),
    "a name with a slash": (REAL_STUDY | {"variants": {"base": {}, "../other": {}}}, "is called '../other'"),
    "a seed twice": (REAL_STUDY | {"seeds": [4, 4]}, "is [4, 4]; give a list"),
    "a config that is not there": (REAL_STUDY | {"config": "configs/nowhere.yaml"}, "nowhere.yaml"),
    "an unknown flag": (variant_with({"learnig_rate": 1.0}), "variant other: unknown flag --learnig_rate"),
    "a flag of the command": (variant_with({"output_dir": "elsewhere"}), "the flag output_dir is set by the command"),
    "a bad evaluation flag": (variant_with({}, num_images=0), "variant other: --num_images is 0"),
    "minutes and steps": (REAL_STUDY | {"minutes": 1}, "the flag max_train_steps is set by the command"),
    "a sampler that does not suit": (variant_with(EDM, sampler="ddim"), "ddim is not for --objective edm"),
    "other real images": (variant_with({"resolution": 32}), "variant other: --resolution is 32, of the first"),
    "no held-out images": (variant_with({"validation_split": None}), "variant other: there is no --validation_split"),
}


@pytest.mark.parametrize("name", BAD_STUDIES)
def test_a_bad_study_is_refused_before_anything_is_done(name, real, tmp_path, capsys):
    content, message = BAD_STUDIES[name]
    assert start(write_study(tmp_path, content), real) == 2
    assert message in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_bad_flags_are_one_line(real, tmp_path, capsys):
    study = write_study(tmp_path, REAL_STUDY)
    for flags, message in ((["--jobs", "0"], "--jobs is 0"), (["--crop", "nowhere"], "variant base: ")):
        assert start(study, real, *flags) == 2
        assert message in error_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "ablations").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_studies_of_the_repository_can_begin(path, tmp_path):
    study = read_study(path)
    found = jobs_of(study, "synthetic-faces", "none", tmp_path / "out")
    assert len(found) == len(study.variants) * len(study.seeds)
    assert len({json.dumps(job.record) for job in found[: len(study.variants)]}) == len(study.variants)
    assert not (tmp_path / "out").exists()
