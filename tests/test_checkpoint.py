"""Checkpoints: complete or not there; a damaged one is never loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import Failed
from training import checkpoint

TENSORS = {"unet": {"a": torch.arange(5.0), "b": torch.ones(2, 3)}, "ema_unet": {"a": torch.zeros(5)}}


def save(folder: Path, step: int, total_limit: int | None = None) -> Path:
    return checkpoint.save_checkpoint(folder, step, TENSORS, {"progress": {"step": step}}, total_limit)


def test_round_trip(tmp_path):
    tensors, state = checkpoint.load_checkpoint(save(tmp_path, 7), ["unet", "ema_unet"])
    assert state == {"progress": {"step": 7}}
    assert torch.equal(tensors["unet"]["b"], TENSORS["unet"]["b"])
    assert torch.equal(tensors["ema_unet"]["a"], TENSORS["ema_unet"]["a"])


def test_rotation_keeps_the_newest(tmp_path):
    for step in (5, 20, 100):
        save(tmp_path, step, total_limit=2)
    assert list(checkpoint.list_checkpoints(tmp_path)) == [20, 100]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-20", "checkpoint-100"}


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    checkpoint.save_checkpoint(tmp_path, 5, {"unet": {"a": torch.zeros(1)}}, {}, 1)
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint-5", ["unet"])[0]["unet"]["a"].tolist() == [0.0]


def test_latest_is_the_highest_step_and_ignores_other_names(tmp_path):
    for step in (9, 100):
        save(tmp_path, step)
    for name in ("checkpoint-final", ".tmp-checkpoint-200", "abandoned-checkpoint-300"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-400").write_text("a file")
    assert checkpoint.find_checkpoint(tmp_path, "latest").name == "checkpoint-100"


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    assert checkpoint.find_checkpoint(tmp_path, "latest") is None
    assert checkpoint.find_checkpoint(tmp_path / "nowhere", "latest") is None


FILES = ["unet.safetensors", "ema_unet.safetensors", "state.json", "manifest.json"]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["removed", "truncated", "emptied", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_latest_falls_back_and_an_explicit_path_fails(tmp_path, name, how):
    save(tmp_path, 1)
    assert {path.name for path in (tmp_path / "checkpoint-1").iterdir()} == {*FILES}
    damage(save(tmp_path, 2) / name, how)
    reports = []
    assert checkpoint.find_checkpoint(tmp_path, "latest", reports.append).name == "checkpoint-1"
    (report,) = reports
    assert "checkpoint-2" in report
    if not (name == "manifest.json" and how == "flipped"):  # a flipped digest accuses the file it belongs to
        assert name in report
    with pytest.raises(Failed, match="checkpoint-2"):
        checkpoint.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-2"))


def test_nothing_intact_is_an_error_not_a_fresh_start(tmp_path):
    damage(save(tmp_path, 1) / "unet.safetensors", "flipped")
    with pytest.raises(Failed, match="none of the 1 checkpoints"):
        checkpoint.find_checkpoint(tmp_path, "latest")


def test_a_checkpoint_of_the_output_folder_by_its_name(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    assert checkpoint.find_checkpoint(tmp_path, "checkpoint-1") == tmp_path / "checkpoint-1"


def test_an_explicit_path_that_does_not_exist_lists_what_is_there(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(Failed, match=r"does not exist.*checkpoint-3"):
        checkpoint.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_without_a_file_that_is_needed(tmp_path):
    with pytest.raises(Failed, match=r"no optimizer\.safetensors"):
        checkpoint.load_checkpoint(save(tmp_path, 1), ["unet", "optimizer"])


def test_newer_checkpoints_are_set_aside_not_deleted(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    checkpoint.set_aside_newer(tmp_path, 1, lambda line: None)
    assert list(checkpoint.list_checkpoints(tmp_path)) == [1]
    checkpoint.verify_checkpoint(tmp_path / "abandoned-checkpoint-3")


def test_difference_names_what_differs():
    text = checkpoint.difference({"a": 1, "b": [2]}, {"a": 1, "b": [3], "c": None, "d": 4})
    assert text == "b: [2] -> [3]; d: None -> 4"


KILLED_AT_EACH_OPERATION = """
import os, shutil, signal, sys, torch
from pathlib import Path
from training import checkpoint

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree")
tensors = {name: {"a": torch.full((5,), 1.0)} for name in ("unet", "ema_unet", "optimizer")}

def kill_at(count):
    seen = 0
    def look(event, arguments):
        nonlocal seen
        if event in EVENTS:  # os.kill is an event, too
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(look)

class KilledBetweenTensors(dict):
    def items(self):
        os.kill(os.getpid(), signal.SIGKILL)

def save(folder, step, limit, groups=tensors):
    checkpoint.save_checkpoint(folder, step, groups, {"progress": {"step": step}}, limit)

base, limit = Path(sys.argv[1]), int(sys.argv[2])
prepared = base.with_name(f"{base.name}-prepared")
prepared.mkdir()
save(prepared, 1, limit)
save(prepared, 2, limit)
count, status = 0, signal.SIGKILL
while status == signal.SIGKILL:
    folder = base / f"{count:03d}"
    shutil.copytree(prepared, folder)
    child = os.fork()
    if child == 0:
        if count == 0:  # safetensors writes its files without an operation that Python sees
            save(folder, 3, limit, tensors | {"ema_unet": KilledBetweenTensors()})
        kill_at(count)
        save(folder, 3, limit)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    count += 1
sys.exit(status != 0)
"""


@pytest.mark.parametrize("limit", [1, 2])
def test_sigkill_at_any_file_operation_of_a_save_leaves_the_one_before_or_the_new_one(tmp_path, limit):
    runs = tmp_path / "runs"
    runs.mkdir()
    subprocess.run([sys.executable, "-c", KILLED_AT_EACH_OPERATION, runs, str(limit)], check=True)
    *killed, completed = sorted(runs.iterdir())
    assert len(killed) > 20
    assert list(checkpoint.list_checkpoints(completed)) == ([3] if limit == 1 else [2, 3])
    newest = []
    for folder in killed:
        was_cut_off = (folder / ".tmp-checkpoint-3").exists()
        reports = []
        lock = checkpoint.lock_output_dir(folder, reports.append)
        found = checkpoint.find_checkpoint(folder, "latest", pytest.fail)  # nothing that is there is damaged
        newest.append(found.name)
        expected = [f"{folder}: the save of checkpoint-3 was cut off; the newest complete one is checkpoint-2"]
        assert reports == (expected if was_cut_off else [])
        assert not list(folder.glob(".tmp-*"))
        for path in checkpoint.list_checkpoints(folder).values():
            checkpoint.verify_checkpoint(path)
        save(folder, 4, limit)
        assert len(checkpoint.list_checkpoints(folder)) == limit
        lock.release()
    assert set(newest) == {"checkpoint-2", "checkpoint-3"}
    assert newest == sorted(newest), "once the new one is there it stays"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_optimizer_state_round_trip_is_exact(tmp_path, memory_format):
    def build():
        torch.manual_seed(0)
        network = torch.nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        return network, torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def update(network, optimizer, seed):
        torch.manual_seed(seed)
        network(torch.randn(2, 3, 5, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    straight = build()
    for seed in (1, 2, 3):
        update(*straight, seed)
    before = build()
    for seed in (1, 2):
        update(*before, seed)
    tensors = {"unet": before[0].state_dict(), "optimizer": checkpoint.optimizer_tensors(before[1], before[0])}
    folder = checkpoint.save_checkpoint(tmp_path, 2, tensors, {}, None)
    loaded, _ = checkpoint.load_checkpoint(folder, ["unet", "optimizer"])
    network, optimizer = build()
    network.load_state_dict(loaded["unet"])
    checkpoint.restore_optimizer(optimizer, network, loaded["optimizer"])
    assert optimizer.state[network.weight]["exp_avg"].stride() == network.weight.stride()
    update(network, optimizer, 3)
    assert torch.equal(network.weight, straight[0].weight)
    ours, theirs = (checkpoint.optimizer_tensors(o, n) for n, o in ((network, optimizer), straight))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
