"""The curves of a training, from its checkpoints and its log."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from custom_unet import CustomUNet2DModel
from experiments.curves import identity, main, take_folder
from training.run_log import RunLog, read_log

REPOSITORY = Path(__file__).resolve().parent.parent
TRAINING = (
    "--config configs/quickstart.yaml --resolution 16 --attention_head_dim 16 --block_out_channels 16 32"
    " --down_block_types DownBlock2D DownBlock2D --up_block_types UpBlock2D UpBlock2D --norm_num_groups 8"
    " --max_train_steps 6 --lr_warmup_steps 1 --validation_images 8 --train_batch_size 4 --checkpointing_steps 2"
    " --validation_steps 2 --save_images_steps 100 --checkpoints_total_limit null --logging_steps 2 --report_to none"
    " --num_cpu_threads 1"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A training with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("training") / "run"
    command = [sys.executable, "train_unet.py", *TRAINING, "--output_dir", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return folder


def curves(run: Path, out: Path, *more: str) -> int:
    options = "--reference synthetic-faces --num_images 8 --steps 2 --num_cpu_threads 1".split()
    return main(["--run", str(run), "--out", str(out), *options, *more])


@pytest.fixture(scope="module")
def measured(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("curves")
    assert curves(run, out) == 0
    return out


def rows(out: Path) -> list[dict]:
    return json.loads((out / "curves.json").read_text())["rows"]


def test_each_checkpoint_is_measured_with_its_own_ema_weights(run, measured):
    seen = set()
    for step in (2, 4, 6):
        expected = load_file(run / f"checkpoint-{step}" / "ema_unet.safetensors")
        found = load_file(measured / f"step-{step}" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in expected)
        record = json.loads((measured / f"step-{step}" / "results.json").read_text())
        assert record["model"]["images_seen"] == 4 * step
        seen.add(record["weights_sha256"]["diffusion_pytorch_model.safetensors"])
    assert len(seen) == 3


def test_rows_have_the_results_of_the_evaluation_and_the_losses_of_the_log(run, measured):
    log = read_log(run / "log.jsonl")
    assert [(row["step"], row["images_seen"]) for row in rows(measured)] == [(2, 8), (4, 16), (6, 24)]
    for row in rows(measured):
        results = json.loads((measured / f"step-{row['step']}" / "results.json").read_text())["results"]
        by_name = {entry["name"]: entry for entry in results}
        swd, nearest = by_name["SWD, mean"], by_name["Nearest training image, generated / held-out (median)"]
        assert (row["swd"], row["swd_floor"]) == (swd["value"], swd["floor"])
        assert row["memorisation_ratio"] == nearest["value"]
        (loss,) = [r["heldout_loss"] for r in log if r["step"] == row["step"] and "heldout_loss" in r]
        assert row["heldout_loss"] == loss


def test_the_losses_of_the_whole_log_are_kept(run, measured):
    losses = json.loads((measured / "curves.json").read_text())["losses"]
    log = read_log(run / "log.jsonl")
    assert losses["loss"] == [[r["images_seen"], r["loss"]] for r in log if "loss" in r]
    assert [images for images, _ in losses["heldout_loss_q4"]] == [0, 8, 16, 24]


def test_there_are_a_table_and_a_figure(measured):
    lines = (measured / "curves.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| 8", "| 16", "| 24"]
    assert "SWD of 8 images (ddim, 2 steps, fp32)" in lines[-1]
    with Image.open(measured / "curves.png") as figure:
        assert figure.height > figure.width


def test_a_second_start_measures_nothing_again_and_another_number_of_images_does(run, measured, tmp_path):
    out = shutil.copytree(measured, tmp_path / "curves")
    times = {path: path.stat().st_mtime_ns for path in out.glob("step-*/results.json")}
    assert curves(run, out) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert curves(run, out, "--num_images", "6", "--every", "3") == 0
    assert [path.parent.name for path in times if path.stat().st_mtime_ns != times[path]] == ["step-6"]
    assert [row["step"] for row in rows(out)] == [6]


def test_what_was_measured_otherwise_or_of_other_weights_is_measured_anew(run, tmp_path):
    options = Namespace(reference="synthetic-faces", num_images=8, steps=2, dtype="fp32", every=1)
    of = [identity(options, run / f"checkpoint-{step}") for step in (2, 4)]
    assert of[0] != of[1]
    folder = tmp_path / "step-2"
    for wanted, is_kept in ((of[0], False), (of[0], True), (of[0] | {"steps": 3}, False), (of[1], False)):
        take_folder(folder, wanted)
        assert (folder / "results.json").exists() == is_kept
        (folder / "results.json").touch()


def test_a_run_that_was_killed_has_its_curves_too(run, measured, tmp_path):
    """Its log tells of lost updates behind the records of a checkpoint."""
    killed, out = shutil.copytree(run, tmp_path / "run"), shutil.copytree(measured, tmp_path / "curves")
    RunLog(killed / "log.jsonl", step=6).write(8, images_seen=32)
    log = RunLog(killed / "log.jsonl", step=6)
    assert read_log(log.path)[-1] == {"step": 6, "lost_steps": 2}
    assert curves(killed, out) == 0
    assert rows(out) == rows(measured)


def test_a_damaged_checkpoint_is_refused(run, tmp_path, capsys):
    broken = shutil.copytree(run, tmp_path / "run")
    weights = broken / "checkpoint-2" / "ema_unet.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert curves(broken, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert "checkpoint-2" in line


def test_a_checkpoint_of_another_network_is_refused(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "run")
    config = json.loads((other / "pipeline" / "unet" / "config.json").read_text())
    assert config["block_out_channels"] == [16, 32]
    shutil.rmtree(other / "pipeline" / "unet")
    narrower = {"block_out_channels": (16, 16), "sample_size": 16, "norm_num_groups": 8, "attention_head_dim": 16}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    CustomUNet2DModel(**narrower, **blocks).save_pretrained(other / "pipeline" / "unet")
    assert curves(other, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "ema_unet.safetensors" in line


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("checkpoint-*", "has no checkpoints"),
        ("pipeline", "has no pipeline folder"),
        ("log.jsonl", "no record of step"),
    ],
)
def test_a_run_that_lacks_something_is_refused(run, tmp_path, capsys, missing, message):
    part = shutil.copytree(run, tmp_path / "run")
    for path in part.glob(missing):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert curves(part, tmp_path / "out", "--every", "3") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.fixture(scope="module")
def second_run(run, tmp_path_factory) -> Path:
    """A training of two updates that began with the weights of the first one."""
    folder = tmp_path_factory.mktemp("training") / "second"
    command = [sys.executable, "train_unet.py", *TRAINING, "--output_dir", str(folder), "--max_train_steps", "2"]
    command += ["--pretrained_model_name_or_path", str(run / "pipeline")]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return folder


def test_a_run_that_began_with_anothers_weights_goes_on_with_its_curves(second_run, measured, tmp_path):
    assert curves(second_run, tmp_path, "--after", str(measured / "curves.json")) == 0
    alone = tmp_path / "alone"
    assert curves(second_run, alone) == 0
    (last,) = rows(alone)
    assert rows(tmp_path) == [*rows(measured), last | {"images_seen": 24 + 8}]
    first, second, both = (
        json.loads((out / "curves.json").read_text())["losses"] for out in (measured, alone, tmp_path)
    )
    assert both.keys() == first.keys()
    for key, points in both.items():
        assert points == first[key] + [[24 + images, loss] for images, loss in second[key]]


def test_curves_of_another_precision_are_joined_and_it_is_told(second_run, measured, tmp_path):
    record = json.loads((measured / "curves.json").read_text())
    record["drawn_by"]["dtype"] = "bf16"
    (tmp_path / "before.json").write_text(json.dumps(record))
    assert curves(second_run, tmp_path / "out", "--after", str(tmp_path / "before.json")) == 0
    assert len(rows(tmp_path / "out")) == len(rows(measured)) + 1
    assert "(ddim, 2 steps, bf16, then fp32)" in (tmp_path / "out" / "curves.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["rows"].pop(), "began with weights that had seen 24 images"),
        (lambda record: record.pop("rows"), "has no curves of a training"),
        (lambda record: record.pop("losses"), "has no curves of a training"),
        (lambda record: record.update(n=9), "measured otherwise (n)"),
        (lambda record: record["drawn_by"].update(steps=3), "measured otherwise (drawn_by)"),
    ],
)
def test_other_curves_are_not_joined(second_run, measured, tmp_path, capsys, change, message):
    record = json.loads((measured / "curves.json").read_text())
    change(record)
    (tmp_path / "before.json").write_text(json.dumps(record))
    assert curves(second_run, tmp_path / "out", "--after", str(tmp_path / "before.json")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out" / "curves.json").exists()


def test_a_run_of_fresh_weights_is_after_none(run, measured, tmp_path, capsys):
    assert curves(run, tmp_path, "--after", str(measured / "curves.json")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--run began with fresh weights" in line
