"""Checkpoints are complete or absent; a damaged one is never loaded, not even in part."""

import copy
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from common import Failed
from training import checkpoint
from training.checkpoint import restore, save_checkpoint, start_or_resume

pytest_plugins = ["tiny_training"]
TENSORS = {"unet": {"a": torch.arange(5.0), "b": torch.ones(2, 3)}, "ema_unet": {"a": torch.zeros(5)}}
FILES = ["unet.safetensors", "ema_unet.safetensors", "state.json", "manifest.json"]


def state_of(step: int) -> dict:
    return {"progress": {"step": step, "attempts": step, "train_seconds": 0.5}, "identity": {}}


def save(folder: Path, step: int, total_limit: int | None = None, tensors=TENSORS) -> Path:
    checkpoint.write_checkpoint(folder, step, tensors, state_of(step), total_limit)
    return folder / f"checkpoint-{step}"


def test_checkpoint_round_trip(tmp_path):
    folder = save(tmp_path, 7)
    assert {path.name for path in folder.iterdir()} == {*FILES}
    tensors = checkpoint.load_tensors(folder, ["unet", "ema_unet"])
    assert checkpoint.read_state(folder) == state_of(7)
    assert torch.equal(tensors["unet"]["b"], TENSORS["unet"]["b"])
    assert torch.equal(tensors["ema_unet"]["a"], TENSORS["ema_unet"]["a"])
    with pytest.raises(FileNotFoundError, match=r"optimizer\.safetensors"):
        checkpoint.load_tensors(folder, ["unet", "optimizer"])


def test_rotation_keeps_the_newest_and_latest_ignores_other_names(tmp_path):
    assert checkpoint.find_checkpoint(tmp_path / "nowhere", "latest") is None
    for step in (5, 20, 100):
        save(tmp_path, step, total_limit=2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-20", "checkpoint-100"}
    for name in ("checkpoint-final", ".tmp-checkpoint-200", "abandoned-checkpoint-300"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-400").write_text("a file")
    assert list(checkpoint.list_checkpoints(tmp_path)) == [20, 100]
    assert checkpoint.find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    assert checkpoint.find_checkpoint(tmp_path, "checkpoint-20") == tmp_path / "checkpoint-20"
    with pytest.raises(Failed, match=r"does not exist.*checkpoint-20, checkpoint-100"):
        checkpoint.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-4"))


EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree")


class KilledBetweenTensors(dict):
    def items(self):
        os.kill(os.getpid(), signal.SIGKILL)


def save_and_be_killed(folder: Path, count: int) -> int:
    """Saves checkpoint-3 in a child process that is killed at its count-th file operation; returns its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS:  # os.kill is an audit event, too
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    if count == 0:  # safetensors writes its files without audit events
        save(folder, 3, 1, TENSORS | {"ema_unet": KilledBetweenTensors()})
    sys.addaudithook(hook)
    save(folder, 3, total_limit=1)
    os._exit(0)


def test_sigkill_during_save_leaves_the_previous_or_the_new_checkpoint(tmp_path, caplog):
    """Even with `checkpoints_total_limit` 1."""
    save(tmp_path / "prepared", 2)
    newest, status = [], signal.SIGKILL
    while status == signal.SIGKILL:
        folder = shutil.copytree(tmp_path / "prepared", tmp_path / str(len(newest)))
        status = save_and_be_killed(folder, len(newest))
        was_cut_off = (folder / ".tmp-checkpoint-3").exists()
        caplog.clear()
        lock = checkpoint.lock_output_dir(folder)
        newest.append(checkpoint.find_checkpoint(folder, "latest").name)
        expected = [f"removing {folder / '.tmp-checkpoint-3'}, left by an interrupted save"]
        assert caplog.messages == (expected if was_cut_off else []), "nothing that is there is damaged"
        assert not list(folder.glob(".tmp-*"))
        for path in checkpoint.list_checkpoints(folder).values():
            checkpoint.verify_checkpoint(path)
        save(folder, 4, total_limit=1)
        assert list(checkpoint.list_checkpoints(folder)) == [4]
        lock.release()
    assert status == 0
    assert len(newest) > 20
    assert newest == sorted(newest), "once the new one is there it stays"
    assert set(newest) == {"checkpoint-2", "checkpoint-3"}


# ---- Damage: a one-line error or a fallback to the previous checkpoint, never a partial restore


def damage_file(path: Path, how: str) -> None:
    content = path.read_bytes()
    at = random.Random(path.name).randrange(len(content))
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "removed":
        changed = {
            "flipped": content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :],
            "truncated": content[:-1],
            "extended": content + b"\0",
            "emptied": b"",
        }
        path.write_bytes(changed[how])


def replace_manifest(path: Path, content) -> None:
    path.write_text(json.dumps(content))


FILE_DAMAGES = ("removed", "a folder", "flipped", "truncated", "extended", "emptied")
DAMAGES = [(damage_file, name, how) for name in (*FILES, "optimizer.safetensors") for how in FILE_DAMAGES]
DAMAGES += [(replace_manifest, "manifest.json", content) for content in (None, 1, "x", [[]], {})]


def full_state(trainer) -> dict:
    moments = checkpoint.optimizer_tensors(trainer.optimizer, trainer.network)
    tensors = {"unet": trainer.network.state_dict(), "ema_unet": trainer.ema_network.state_dict()}
    return copy.deepcopy({"progress": vars(trainer.progress), **tensors, **trainer.averages, "optimizer": moments})


def is_same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("explicit", [False, True], ids=["latest", "explicit"])
def test_damaged_checkpoint_is_rejected_or_skipped_as_a_whole(make_trainer, tmp_path, explicit, capsys):
    trainer = make_trainer()
    good, states = trainer.output_dir, {}
    for step in (1, 2):
        trainer.training_step()
        save_checkpoint(trainer)
        states[step] = full_state(trainer)
    for number, (damage, file, how) in enumerate(DAMAGES):
        run = tmp_path / f"damaged-{number}"
        for step in (1, 2):
            shutil.copytree(good / f"checkpoint-{step}", run / f"checkpoint-{step}")
        damage(run / "checkpoint-2" / file, how)
        restore(trainer, good / "checkpoint-1")
        trainer.output_dir, trainer.config.output_dir = run, str(run)
        trainer.config.resume_from_checkpoint = "checkpoint-2" if explicit else "latest"
        trainer.lock.release()
        message, case = "", f"{file} {how}, case {number}"
        try:
            start_or_resume(trainer)
        except Failed as failure:
            message = str(failure)
        assert is_same(full_state(trainer), states[1]), f"{case}: restored, or half of it"
        assert bool(message) == explicit, case
        assert str(run / "checkpoint-2") in message + capsys.readouterr().out, case
        if explicit:
            assert {p.name for p in run.glob("*checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}, case


def test_resuming_without_an_intact_checkpoint_fails(tmp_path):
    damage_file(save(tmp_path, 1) / "unet.safetensors", "flipped")
    with pytest.raises(Failed, match="none of the 1 checkpoints"):
        checkpoint.find_checkpoint(tmp_path, "latest")
