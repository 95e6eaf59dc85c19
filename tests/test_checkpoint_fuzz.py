"""Damaged checkpoints made from a seed: an error of one line, the one before, or all of it; never a part."""

import copy
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train_unet import TINY

import train_unet
from common import Failed
from training import checkpoint
from training.config import TrainConfig
from training.processes import StopSignal, build_accelerator

NUM_CASES = 40  # of each of the four kinds
STRANGE = [None, True, -1, 0, 1.5, 10**400, float("nan"), float("inf"), "", "x\ny", [], [[]], {}, {"a": 1}]


class Hang(BaseException):
    """A case took too long."""


def damage_bytes(folder: Path, rng: random.Random) -> None:
    """A file that a disk or a person spoiled; the manifest does not know of it."""
    path = rng.choice(sorted(folder.iterdir()))
    other = rng.choice([p for p in sorted(folder.iterdir()) if p != path])
    content = bytearray(path.read_bytes())
    how = rng.choice("flip truncate extend delete empty swap duplicate folder".split())
    if how == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "extend":
        path.write_bytes(content + b"\0")
    elif how == "delete":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif how == "duplicate":
        other.write_bytes(content)
    else:
        path.unlink()
        path.mkdir()


def damage_manifest(folder: Path, rng: random.Random) -> None:
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    name = rng.choice(sorted(manifest))
    how = rng.choice("outside absolute missing type number nested cut bare".split())
    if how == "outside":
        (folder.parent / "outside").write_bytes(b"x")
        manifest["../outside"] = checkpoint._file_entry(folder.parent / "outside")
    elif how == "absolute":
        manifest[str(folder / "state.json")] = manifest["state.json"]
    elif how == "missing":
        del manifest[name]
    elif how == "type":
        manifest[name] = rng.choice(STRANGE)
    elif how == "number":
        manifest[name][rng.choice(["bytes", "sha256"])] = rng.choice(STRANGE)
    text = json.dumps(manifest)
    if how == "nested":
        text = "[" * 200_000
    elif how == "cut":
        text = text[: rng.randrange(len(text))]
    elif how == "bare":
        text = json.dumps(rng.choice(STRANGE))
    path.write_text(text)


def damage_state(folder: Path, rng: random.Random) -> None:
    """state.json that says something wrong, with the right checksum."""
    path = folder / checkpoint.STATE
    state = json.loads(path.read_text())
    how = rng.choice("top progress value identity negative extra behind whole".split())
    if how == "top":
        state.pop(rng.choice(sorted(state)))
    elif how == "progress":
        state["progress"].pop(rng.choice(sorted(state["progress"])))
    elif how == "value":
        state["progress"][rng.choice(sorted(state["progress"]))] = rng.choice(STRANGE)
    elif how == "identity":
        state["identity"] = rng.choice(STRANGE)
    elif how == "negative":
        state["progress"]["step"] = -3
    elif how == "extra":
        state["progress"]["x"] = 1
    elif how == "behind":
        state["progress"]["attempts"] = 0
    else:
        state = rng.choice([*STRANGE, {"progress": rng.choice(STRANGE)}])
    path.write_text(json.dumps(state))
    correct_manifest(folder)


def damage_tensors(folder: Path, rng: random.Random) -> None:
    """Tensors that do not fit, or no tensors at all, with the right checksum."""
    path = folder / f"{rng.choice(['unet', 'ema_unet', 'optimizer'])}.safetensors"
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    how = rng.choice("shape type missing extra rename none garbage header gone".split())
    if how == "shape":
        tensors[name] = torch.zeros(*tensors[name].shape, 2)
    elif how == "type":
        tensors[name] = tensors[name].to(rng.choice([torch.float16, torch.int64]))
    elif how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors["x"] = torch.zeros(1)
    elif how == "rename":
        tensors["no/such/x\ny"] = tensors.pop(name)
    elif how == "none":
        tensors = {}
    save_file(tensors, path)
    if how == "garbage":
        path.write_bytes(rng.randbytes(rng.randrange(200)))
    elif how == "header":
        path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    elif how == "gone":
        path.unlink()
    correct_manifest(folder)


def correct_manifest(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.name != checkpoint.MANIFEST]
    (folder / checkpoint.MANIFEST).write_text(json.dumps({path.name: checkpoint._file_entry(path) for path in files}))


@pytest.fixture(scope="module")
def trainer_and_run(tmp_path_factory):
    """A trainer and its output folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = TrainConfig(**TINY | {"output_dir": str(folder / "run"), "cache_dir": str(folder / "cache")})
    trainer = train_unet.Trainer(config, build_accelerator(config), float("inf"), StopSignal())
    trainer.start_or_resume()
    trainer.open_batches()
    for _ in range(2):
        trainer.training_step()
        trainer.save_checkpoint()
    trainer.lock.release()
    return trainer, folder / "run"


def whole_state(trainer) -> dict:
    moments = checkpoint.optimizer_tensors(trainer.optimizer, trainer.network)
    tensors = {"unet": trainer.network.state_dict(), "ema_unet": trainer.ema_network.state_dict()}
    return copy.deepcopy({"progress": vars(trainer.progress), **tensors, "optimizer": moments})


def is_same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("explicit", [False, True], ids=["latest", "explicit"])
@pytest.mark.parametrize("damage", [damage_bytes, damage_manifest, damage_state, damage_tensors])
def test_a_damaged_checkpoint_is_refused_passed_over_or_whole(trainer_and_run, tmp_path, damage, explicit, capsys):
    trainer, good = trainer_and_run
    states = {}
    for step in (1, 2):
        trainer.restore(good / f"checkpoint-{step}")
        states[step] = whole_state(trainer)

    def hang(number, frame):
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    outcomes = []
    for seed in range(NUM_CASES // 2):
        run = tmp_path / f"run-{seed}"
        shutil.copytree(good, run)
        damage(run / "checkpoint-2", random.Random(f"{damage.__name__} {seed} {explicit}"))
        trainer.restore(good / "checkpoint-1")
        before = whole_state(trainer)
        trainer.output_dir = run
        trainer.config.resume_from_checkpoint = str(run / "checkpoint-2") if explicit else "latest"
        signal.alarm(60)
        try:
            trainer.start_or_resume()
        except Failed as error:
            text = str(error)
            outcomes.append("refused")
            assert "\n" not in text, seed
            assert str(run) in text, seed
            assert is_same(whole_state(trainer), before), f"seed {seed}: half restored"
            assert {p.name for p in run.glob("*checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
        else:
            step = trainer.progress.step
            outcomes.append(step)
            assert is_same(whole_state(trainer), states[step]), f"seed {seed}: not the checkpoint of step {step}"
            checkpoint.load_checkpoint(run / f"checkpoint-{step}", ["unet", "ema_unet", "optimizer"])
        finally:
            signal.alarm(0)
            trainer.lock.release()
    capsys.readouterr()
    assert outcomes.count(2) <= NUM_CASES // 8, "most damage should matter"
    if explicit:
        assert 1 not in outcomes
