"""The trainer under process, disk and numerical failures; every fault is real."""

import copy
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.optimizer import AcceleratedOptimizer
from tiny_training import (
    HANG_SECONDS,
    REPOSITORY,
    TINY,
    act_at,
    assert_same_file,
    assert_same_tensors,
    contents,
    error_line,
    full_disk,
    full_disk_at,
    records,
    signal_at,
    wait_until,
)

from training import checkpoint, log
from training.checkpoint import restore, save_checkpoint
from training.log import read_log

pytest_plugins = ["tiny_training"]
ENDLESS = {"max_train_steps": 10**6, "checkpointing_steps": 10**6, "lr_scheduler": "constant"}


def limit_memory(num_bytes: int) -> None:
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, used + num_bytes))


def copy_until(straight: Path, folder: Path, step: int) -> Path:
    """Copies the output folder in its state just after the checkpoint of this step."""
    shutil.copytree(straight, folder)
    for path in (*folder.glob("checkpoint-*"), *folder.glob("ema_snapshots/checkpoint-*")):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    return folder


def rewrite(folder: Path, nan: str | None = None, **identity) -> None:
    """Saves a checkpoint again, with NaN in all tensors of a file and another identity, as an older version would."""
    stems = [path.stem for path in folder.glob("*.safetensors")]
    tensors, state = checkpoint.load_tensors(folder, stems), checkpoint.read_state(folder)
    if nan is not None:
        tensors[nan] = {name: value * float("nan") for name, value in tensors[nan].items()}
    state["identity"] |= identity
    del state["identity"]["optimizer"]  # a setting that older versions did not have
    shutil.rmtree(folder)
    checkpoint.write_checkpoint(folder.parent, state["progress"]["step"], tensors, state, None)


# ---- SIGKILL and resume


def test_interrupted_snapshots_are_taken_again(start, straight, tmp_path):
    run = copy_until(straight, tmp_path / "run", 3)
    kill = partial(signal_at, signal.SIGKILL, "open", "/ema_snapshots/.tmp-checkpoint-6/manifest", 1)
    start(run, fault=kill).finish(-signal.SIGKILL)
    assert list(checkpoint.list_checkpoints(run / "ema_snapshots")) == [2, 4]
    output = start(run).finish(0)
    assert f"{run / 'ema_snapshots' / 'checkpoint-4'} is newer than the checkpoint resumed from" in output
    assert (run / "ema_snapshots" / "abandoned-checkpoint-4" / "state.json").is_file()
    assert not list(run.rglob(".tmp-*"))
    assert_same_tensors(run / "checkpoint-9", straight / "checkpoint-9")


def test_resume_after_several_kills_is_bit_identical():
    """The soak test with a few kills; `make soak` runs a hundred."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.soak", "--kills", "4"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4 kills over")


# ---- A full disk


@pytest.mark.parametrize(
    ("num_bytes", "name"),
    [(150_000, "checkpoint-6"), (100_000, "ema_snapshots/checkpoint-4"), (2000, "log.jsonl")],
)
def test_full_disk_error_names_the_path_and_the_run_can_be_resumed(start, straight, tmp_path, num_bytes, name):
    run = copy_until(straight, tmp_path / "run", 3)
    if name == "log.jsonl":
        (run / name).write_text("".join(f'{{"step": {step}, "text": "{"x" * 600}"}}\n' for step in range(4)))
    before = contents(run)
    line = error_line(start(run, fault=partial(full_disk, num_bytes)).finish(1))
    assert str(run / name) in line
    assert "File too large" in line
    after = contents(run)
    for path in before:
        if path.parent.name != "samples" and (path.name not in ("log.jsonl", "config.yaml") or path.name == name):
            assert after[path] == before[path]
    assert not list(run.rglob(".tmp-*"))
    start(run).finish(0)
    assert_same_tensors(run / "checkpoint-9", straight / "checkpoint-9")


def test_failed_export_keeps_the_previous_pipeline(start, straight, tmp_path):
    run = tmp_path / "run"
    start(run, "--max_train_steps", "3").finish(0)
    before = contents(run / "pipeline")
    fault = partial(full_disk_at, 10_000, "os.mkdir", ".tmp-pipeline")
    assert str(run / "pipeline") in error_line(start(run, fault=fault).finish(1))
    assert contents(run / "pipeline") == before
    assert not list(run.glob(".tmp-*"))
    checkpoint.verify_checkpoint(run / "checkpoint-6")
    start(run).finish(0)
    assert json.loads((run / "pipeline" / "training.json").read_text())["step"] == 9


def test_failed_sampling_does_not_change_the_losses(start, straight, tmp_path):
    run = copy_until(straight, tmp_path / "run", 3)
    rewrite(run / "checkpoint-3", nan="ema_unet")
    output = start(run, "--save_images_steps", "1").finish(0)
    assert output.count("sampling failed: ") == 6
    assert records(run, "loss") == records(straight, "loss")
    assert_same_file(run / "checkpoint-9", straight / "checkpoint-9", "unet")


# ---- Incompatible checkpoints


def test_error_lists_all_differences_from_the_checkpoint(start, straight, tmp_path):
    run = copy_until(straight, tmp_path / "run", 3)
    rewrite(run / "checkpoint-3", num_processes=2)
    flags = ["--block_out_channels", "8", "24", "--beta_end", "0.03", "--train_batch_size", "5"]
    flags += ["--snr_gamma", "5", "--snr_weighting", "soft_min", "--post_hoc_ema", "false"]
    flags += ["--label_column", "glasses"]
    before = contents(run)
    line = error_line(start(run, *flags).finish(1))
    for text in (
        "block_out_channels: [8, 16] -> [8, 24]",
        "beta_end: 0.02 -> 0.03",
        "train_batch_size: 7 -> 5",
        "snr_weighting: 'min' -> 'soft_min'",
        "num_processes: 2 -> 1",
        "post_hoc_ema: True -> False",
        "label_names: None -> ['no', 'yes']",
    ):
        assert text in line
    assert contents(run) == before


def test_overwriting_deletes_only_the_files_of_the_earlier_run(start, straight, tmp_path):
    run = copy_until(straight, tmp_path / "run", 3)
    (run / "abandoned-checkpoint-4").mkdir()
    for name in ("samples/step-0000006.png", "logs/unet/events", "logs/mine", "my-checkpoint-notes.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    start(run, "--overwrite_output_dir", "--max_train_steps", "1").finish(0)
    expected = "checkpoint-1 config.yaml log.jsonl logs my-checkpoint-notes.txt pipeline samples".split()
    assert sorted(path.name for path in run.iterdir() if path.name != ".lock") == expected
    assert [path.name for path in run.glob("samples/*")] == ["step-0000001.png"]
    assert [path.name for path in run.glob("logs/*")] == ["mine"]
    assert records(run, "loss").keys() == {1}
    start(run, "--config", run / "config.yaml", "--max_train_steps", "2").finish(0)  # it does not overwrite again
    assert list(checkpoint.list_checkpoints(run)) == [1, 2]


def test_run_stopped_before_its_first_update_exports_no_model(start, straight, tmp_path):
    run = copy_until(straight, tmp_path / "run", 3)
    before = contents(run / "pipeline")
    output = start(run, "--overwrite_output_dir", "--max_train_minutes", "1e-9").finish(0)
    assert "stopped before the first update" in output
    assert contents(run / "pipeline") == before


# ---- Signals


def signal_while_sampling(number: int) -> None:
    """Sends the signal in the second step of the sampler."""
    stop_callback, asked = log.stop_callback, []

    def stop_callback_with_signal(should_stop):
        def should_stop_with_signal():
            asked.append(1)
            if len(asked) == 2:
                os.kill(os.getpid(), number)
            return should_stop()

        return stop_callback(should_stop_with_signal)

    log.stop_callback = stop_callback_with_signal


@pytest.mark.parametrize(
    ("number", "file", "checkpoints", "message"),
    [
        (signal.SIGTERM, "/run/.tmp-config.yaml", [], "stopped before training began"),
        (signal.SIGINT, "/run/log.jsonl", [1], "the pipeline is"),
        (signal.SIGTERM, "/run/.tmp-checkpoint-3/", [3], "the pipeline is"),
        (signal.SIGTERM, None, [2], "step 2: sampling failed: the run is stopping"),
    ],
    ids=["before the first step", "during a step", "while saving", "while sampling"],
)
def test_signals_end_the_run_gracefully(start, tmp_path, number, file, checkpoints, message):
    run, flags = tmp_path / "run", [] if file else ["--save_images_steps", "2"]
    fault = partial(signal_at, number, "open", file, 1) if file else partial(signal_while_sampling, number)
    output = start(run, *flags, fault=fault).finish(128 + number)
    assert message in output
    assert "Traceback" not in output
    assert list(checkpoint.list_checkpoints(run)) == checkpoints
    assert not list(run.glob("samples/*"))
    for step in checkpoints:
        checkpoint.verify_checkpoint(run / f"checkpoint-{step}")
        assert json.loads((run / "pipeline" / "training.json").read_text())["step"] == step


def signal_group_at(number: int, path_part: str, count: int) -> None:
    os.setsid()
    act_at(lambda: os.killpg(0, number), "open", path_part, count)


def is_group_gone(group: int) -> bool:
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return False
    return True


def test_signals_to_the_process_group_end_the_run_gracefully(start, tmp_path):
    """Like Ctrl-C in a terminal, which also reaches the data loader's workers."""
    run = tmp_path / "run"
    fault = partial(signal_group_at, signal.SIGINT, "/run/log.jsonl", 2)
    job = start(run, "--dataloader_num_workers", "2", fault=fault)
    assert "Traceback" not in job.finish(130)
    assert list(checkpoint.list_checkpoints(run)) == [2]
    wait_until(lambda: is_group_gone(job.process.pid))


def test_stopping_accelerate_launch_stops_the_trainer_after_a_checkpoint(start, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | ENDLESS))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "train_unet.py"]
    flags = ["--config", tmp_path / "tiny.yaml", "--output_dir", run, "--cache_dir", tmp_path / "cache"]
    launcher = subprocess.Popen([*command, *flags], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    trainers = []
    try:
        wait_until(lambda: launcher.poll() is not None or 2 in records(run, "loss"))
        trainers = psutil.Process(launcher.pid).children(recursive=True)
        launcher.send_signal(signal.SIGTERM)
        assert psutil.wait_procs(trainers, timeout=HANG_SECONDS)[1] == [], "the trainer outlived its launcher"
    finally:
        launcher.kill()
        launcher.communicate()
        for process in trainers:
            if process.is_running():
                process.kill()
    (step,) = checkpoint.list_checkpoints(run)
    checkpoint.verify_checkpoint(run / f"checkpoint-{step}")
    assert step == max(records(run, "loss"))
    start(run, "--max_train_steps", str(step + 1), "--lr_scheduler", "constant").finish(0)
    assert max(records(run, "loss")) == step + 1


def test_second_process_exits_and_the_first_continues_undisturbed(start, straight, tmp_path):
    run = tmp_path / "run"
    first = start(run, fault=partial(signal_at, signal.SIGSTOP, "open", "/run/log.jsonl", 5))
    wait_until(lambda: run.exists() and psutil.Process(first.process.pid).status() == psutil.STATUS_STOPPED)
    before = contents(run)
    line = error_line(start(run, "--overwrite_output_dir", "true").finish(1))
    assert f"{run} is in use by another process" in line
    assert contents(run) == before
    os.kill(first.process.pid, signal.SIGCONT)
    first.finish(0)
    assert records(run, "loss") == records(straight, "loss")
    assert_same_tensors(run / "checkpoint-9", straight / "checkpoint-9")


# ---- Numerical failures


def test_nonfinite_weights_end_the_run_after_max_nonfinite_steps(start, straight, tmp_path):
    run = copy_until(straight, tmp_path / "run", 3)
    rewrite(run / "checkpoint-3", nan="unet")
    before = contents(run / "checkpoint-3")
    output = start(run, "--max_nonfinite_steps", "4").finish(1)
    assert "4 gradients in a row were not finite at step 4" in error_line(output)
    assert [record["skipped_steps"] for record in read_log(run / "log.jsonl")[-4:]] == [1, 2, 3, 4]
    assert output.count("update skipped") == 4
    assert contents(run / "checkpoint-3") == before
    assert list(checkpoint.list_checkpoints(run)) == [3]


def test_out_of_memory_error_names_the_option_to_lower(start, tmp_path):
    flags = ["--block_out_channels", "2048", "4096"]
    output = start(tmp_path / "run", *flags, fault=partial(limit_memory, 300_000_000)).finish(1)
    line = error_line(output)
    assert "out of memory; lower the batch size" in line


def use_gradient_scaler(trainer, scale: float, monkeypatch) -> torch.amp.GradScaler:
    """Accelerate creates one only for fp16, which it rejects on CPUs; the autocast and its overflows are real."""
    accelerator, scaler = trainer.accelerator, torch.amp.GradScaler("cpu", init_scale=scale)
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    accelerator._optimizers[:] = [trainer.optimizer]
    half = torch.autocast("cpu", torch.float16)
    monkeypatch.setattr(trainer.network, "forward", half(type(trainer.network).forward.__get__(trainer.network)))
    return scaler


def test_fp16_overflow_skips_weights_ema_learning_rate_and_step(make_trainer, monkeypatch):
    trainer = make_trainer(dropout=0.3)
    scaler = use_gradient_scaler(trainer, 2.0**26, monkeypatch)
    trainer.learning_rate_at = lambda step: 1e-3 * (step + 1)
    networks, skipped = (trainer.network, trainer.ema_network), 0
    before = copy.deepcopy([network.state_dict() for network in networks])
    while not trainer.training_step()[2]:
        skipped += 1
        torch.testing.assert_close([network.state_dict() for network in networks], before, rtol=0, atol=0)
        assert scaler.get_scale() == 2.0 ** (26 - skipped)
        assert (trainer.progress.step, trainer.progress.attempts) == (0, skipped)
        assert trainer.optimizer.param_groups[0]["lr"] == 1e-3
    assert skipped > 0
    assert (trainer.progress.step, trainer.progress.attempts) == (1, skipped + 1)
    trainer.training_step()
    assert trainer.optimizer.param_groups[0]["lr"] == 2e-3
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {2}

    saved = scaler.state_dict()
    save_checkpoint(trainer)
    other = use_gradient_scaler(trainer, 4.0, monkeypatch)
    restore(trainer, trainer.output_dir / f"checkpoint-{trainer.progress.step}")
    assert other.state_dict() == saved
