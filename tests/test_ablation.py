"""Ablation studies: an end-to-end run, tables from hand-written results, resuming, and rejected inputs."""

import itertools
import json
import os
import signal
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_eval_run import write_real_images
from tiny_training import REPOSITORY, error_line

from eval.results import number, read_results, write_results
from experiments import ablation
from experiments.ablation import Job, jobs_of, main, table_of
from experiments.study import read_study

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
        "edm": {"network": "no_skips", "flags": EDM, "evaluation": {"sampler": "edm_heun", "churn": 2.0}},
    },
}
SEEDS = [0, 1, 5]
VARIANTS = {
    "base": {},
    "linear": {"flags": {"ddpm_beta_schedule": "linear"}},
    "fast": {"flags": {"learning_rate": 0.01}},
}
STUDY = REAL_STUDY | {"seeds": SEEDS, "variants": VARIANTS}


def write_study(folder: Path, content, name: str = "study.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def run_study(study: Path, data: Path | str = "synthetic-faces", *flags: str) -> int:
    return main([str(study), "--data", str(data), "--out", str(study.parent / "out"), *flags])


def rows(out: Path) -> list[dict[str, str]]:
    """The rows of the table, each a dict from heading to cell."""
    lines = [line for line in (out / "ablation.md").read_text().splitlines() if line.startswith("|")]
    heading, _, *rest = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(heading, row, strict=True)) for row in rest]


def test_study_trains_evaluates_and_tabulates_every_variant(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    study, out = write_study(tmp_path, REAL_STUDY), tmp_path / "out"
    real = write_real_images(tmp_path / "real", train=64, validation=12)
    code = run_study(study, real, "--jobs", "2")
    assert code == 0, "\n".join(path.read_text()[-2000:] for path in out.rglob("log.txt"))
    base, edm = rows(out)
    assert base["what is changed"] == "learning_rate 0.00025, random_flip False"
    assert edm["what is changed"].startswith("network no_skips, objective edm")
    assert [base["sampler"], edm["sampler"]] == ["ddim, 3 steps", "edm_heun, 3 steps, churn 2"]
    assert edm["error of the noise"] == edm["q1"] == "–"  # measured at other noise levels
    for row, variant in zip((base, edm), REAL_STUDY["variants"].values(), strict=True):
        folder = out / row["variant"] / "seed-7"
        config = yaml.safe_load((folder / "run" / "config.yaml").read_text())
        assert (FLAGS | variant["flags"] | {"seed": 7, "dataset_name": None}).items() <= config.items()
        record = read_results(folder / "evaluation" / "results.json")
        (swd,) = [entry for entry in record["results"] if entry["name"] == "SWD, mean"]
        assert (swd["n"], swd["steps"], row["SWD"]) == (NUM_IMAGES, 3, number(swd["value"]))
        assert row["parameters"] == number(record["model"]["parameters"])
    text = (out / "ablation.md").read_text()
    assert f"In all rows: images seen {3 * 16}." in text
    assert str(tmp_path) not in (out / "ablation.json").read_text() + text  # no local paths
    files = {"ablation.md", "ablation.json", "ablation_errors.png", "ablation_images.png"}
    assert {path.name for path in out.iterdir() if path.is_file()} == files

    assert run_study(study, real) == 0
    assert "2 training runs and evaluations, 2 of them already done" in capsys.readouterr().out


# ---- Hand-written results


def results_of(name: str, seed: int) -> dict:
    """Results in the format of eval.run, with different numbers for each variant and seed."""
    values = np.random.default_rng([*name.encode(), seed])
    noise = {"name": "Error of the noise, mean over timesteps, held-out", "curve": values.uniform(0.1, 1, 20).tolist()}
    fid = {"name": "FID (clean)", "floor": 1.5, "sampler": "ddim", "steps": 3, "n": NUM_IMAGES}
    return {
        "pipeline": "pipeline",
        "reference": {"dataset": "real"},
        "model": {"parameters": 1234, "images_seen": 48, "train_seconds": values.uniform(60, 600)},
        "versions": {"torch": "2"},
        "results": [{"family": "", "metric": "", "value": values.uniform(1, 9)} | entry for entry in (noise, fid)],
    }


def jobs(study: Path) -> list[Job]:
    return jobs_of(read_study(study), "synthetic-faces", None, study.parent / "out")


@pytest.fixture
def finished_study(tmp_path) -> Path:
    """A study whose jobs are all marked as done."""
    study = write_study(tmp_path, STUDY)
    for job in jobs(study):
        (job.folder / "evaluation").mkdir(parents=True)
        seed = int(job.folder.name.removeprefix("seed-"))
        write_results(job.folder / "evaluation" / "results.json", results_of(job.variant.name, seed))
        (job.folder / "evaluation" / "results.md").touch()
        write_results(job.folder / "job.json", job.record)
    return study


def test_table_has_mean_and_standard_deviation_over_seeds(finished_study):
    """Each quarter is a mean over timesteps, shown only for variants with the same noise schedule."""

    def cell(values: list[float]) -> str:
        return f"{number(statistics.mean(values))} ± {statistics.stdev(values):.2g}"

    assert run_study(finished_study) == 0
    out = finished_study.parent / "out"
    for row in rows(out):
        records = [results_of(row["variant"], seed) for seed in SEEDS]
        assert row["FID"] == cell([record["results"][1]["value"] for record in records])
        assert row["minutes of training"] == cell([record["model"]["train_seconds"] / 60 for record in records])
        curves = np.array([record["results"][0]["curve"] for record in records])
        for quarter in range(4):
            mean = cell(curves[:, 5 * quarter : 5 * quarter + 5].mean(1).tolist())
            assert row[f"q{quarter + 1}"] == ("–" if row["variant"] == "linear" else mean)
    text = (out / "ablation.md").read_text()
    assert "between two sets of real ones FID is 1.5. " in text
    assert "standard deviations over 3 trainings" in text


def test_committed_tables_follow_from_their_numbers():
    for name in ("recipe32", "recipe32_30_minutes", "objectives32"):  # the others are older
        path = REPOSITORY / "samples" / "ablations" / name / "ablation.json"
        assert table_of(read_results(path)["rows"]) == path.with_suffix(".md").read_text(), name


# ---- Resuming


def unfinished(study: Path) -> set[tuple[str, str]]:
    return {(job.variant.name, job.folder.name) for job in jobs(study) if not job.is_done}


def test_changed_settings_are_rejected_and_new_variants_are_left_to_do(finished_study, capsys):
    assert unfinished(finished_study) == set()
    fast = VARIANTS | {"fast": {"flags": {"learning_rate": 0.02}}}
    for changes, folder in ({"evaluation": {}}, "evaluation"), ({"variants": fast}, "seed-0"):
        assert run_study(write_study(finished_study.parent, STUDY | changes)) == 2
        assert f"{folder} was made with other settings" in error_line(capsys.readouterr().err)
    (finished_study.parent / "out" / "new" / "seed-6").mkdir(parents=True)  # as left by a kill before job.json
    write_study(finished_study.parent, STUDY | {"variants": VARIANTS | {"new": {}}, "seeds": [*SEEDS, 6]})
    new = [f"seed-{seed}" for seed in (*SEEDS, 6)]
    assert unfinished(finished_study) == {*itertools.product(VARIANTS, ["seed-6"]), *itertools.product(["new"], new)}


def test_sigterm_stops_the_processes(tmp_path, monkeypatch, capsys):
    started = []

    def start(job, task, num_threads):
        started.append(subprocess.Popen(["sleep", "infinity"]))
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(Job, "start", start)
    assert run_study(write_study(tmp_path, STUDY), "synthetic-faces", "--jobs", "2") == 130
    assert [process.poll() for process in started] == [-signal.SIGTERM] * 2
    assert capsys.readouterr().err == "stopped; the same command resumes from here\n"


# ---- Equal training time


def test_every_variant_trains_for_the_minutes_of_the_study(tmp_path, monkeypatch):
    """Here for 30 seconds. Measured speeds are kept; new and changed variants are measured with the first one."""
    flags = {name: value for name, value in FLAGS.items() if name != "max_train_steps"}
    content = REAL_STUDY | {"flags": flags, "minutes": 0.5}
    variants = {"base": {}, "fast": {"flags": {"train_batch_size": 8}}, "short": {"flags": {"lr_warmup_steps": 70}}}
    measured, done = [], []

    def measure(runs):
        measured.append([*runs])
        speeds = {"base": 32.0, "fast": 40.0, "short": 32.0, "new": 64.0}
        return {name: speeds[name] / len(measured) for name in runs}  # the machine is busy the second time

    monkeypatch.setattr(ablation, "measure_speeds", measure)
    monkeypatch.setattr(ablation, "do_all", lambda jobs, _: done.append({j.variant.name: j.config for j in jobs}))
    monkeypatch.setattr(ablation, "write_study", lambda *arguments: None)
    for more in ({}, {"new": {}}, {"new": {}, "fast": {"flags": {"train_batch_size": 4}}}):
        assert run_study(write_study(tmp_path, content | {"variants": variants | more})) == 0
    assert measured == [["base", "fast", "short"], ["base", "new"], ["base", "fast"]]
    steps = {"base": 60, "fast": 150, "short": 71}  # longer than the warm-up
    assert {name: config.max_train_steps for name, config in done[0].items()} == steps
    assert {name: config.max_train_steps for name, config in done[1].items()} == steps | {"new": 120}
    assert done[2]["fast"].max_train_steps == 300


# ---- Failures and rejected inputs


def test_failed_training_reports_one_line_error(tmp_path, capsys):
    """The data folder has no images; the jobs after the failed one do not start."""
    (tmp_path / "empty").mkdir()
    assert run_study(write_study(tmp_path, REAL_STUDY), tmp_path / "empty") == 1
    assert error_line(capsys.readouterr().err).startswith("error: base, seed-7 failed with exit code 2: error: ")
    assert not (tmp_path / "out" / "edm").exists()
    assert not (tmp_path / "out" / "ablation.md").exists()


def study_with(**variant) -> dict:
    return REAL_STUDY | {"variants": {"base": {}, "other": variant}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a mapping"),
        (REAL_STUDY | {"variant": {}}, "unexpected keyword argument 'variant'"),
        (REAL_STUDY | {"seeds": 3}, "must be an iterable, not int"),
        (study_with(flags=["compile"]), "'list' object is not a mapping"),
        (REAL_STUDY | {"variants": {}}, "it needs variants, seeds"),
        (study_with(flags={"seed": 1}), "the command itself sets seed"),
        (REAL_STUDY | {"minutes": 1}, "the command itself sets max_train_steps"),
        (study_with(network="no_head"), "other has the network no_head"),
        (study_with(flags={"learnig_rate": 1.0}), "variant other: unknown flag --learnig_rate"),
        (study_with(evaluation={"num_images": 0}), "--num_images is 0"),
        (study_with(flags=EDM, evaluation={"sampler": "ddim"}), "objective edm cannot use ddim"),
        (study_with(flags={"resolution": 64}), "all need the same images"),
    ],
)
def test_invalid_study_is_rejected_before_any_training(content, message, tmp_path, capsys):
    assert run_study(write_study(tmp_path, content)) == 2
    assert message in error_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "ablations").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_studies_are_valid(path, tmp_path):
    study = read_study(path)
    found = jobs_of(study, "synthetic-faces", "none", tmp_path / "out")
    assert len(found) == len(study.variants) * len(study.seeds)
    assert len({json.dumps(job.record) for job in found[: len(study.variants)]}) == len(study.variants)
    assert not (tmp_path / "out").exists()
