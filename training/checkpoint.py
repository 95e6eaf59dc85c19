"""Checkpoints that survive crashes: written to a temporary folder, checksummed, renamed into place, verified on read.

    OUTPUT_DIR/checkpoint-STEP/
        NAME.safetensors   tensors by name: the network, its EMA, the optimizer's moments
        state.json         numbers: progress, and what a resumed run must have in common with this one
        manifest.json      size and SHA-256 of every other file; written last

The averages of `--post_hoc_ema` are further tensors of a checkpoint; snapshots of them are kept in the same form, as
OUTPUT_DIR/ema_snapshots/checkpoint-STEP, and follow the checkpoints where those are set aside or deleted by a new run.
There is no file for random states: everything random in a step derives from (seed, step, rank). Nothing is pickled.
"""

import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import Failed, sha256_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
SNAPSHOTS = "ema_snapshots"
TEMPORARY_PREFIX = ".tmp-"
_NAME = re.compile(r"checkpoint-(\d+)")


def lock_output_dir(output_dir: Path, report: Callable[[str], None] = logger.info) -> FileLock:
    """Takes the folder for this process until it ends, however it ends, and clears what a crash left half-written.

    Args:
        report: called with one line for each checkpoint whose save was cut off.

    Raises:
        Failed: if the folder cannot be made or another process is writing to it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Failed(f"{output_dir} is in use by another process; wait for it or take another folder") from error
    except OSError as error:
        raise Failed(f"cannot write to {output_dir}: {error.strerror}") from error
    for old in output_dir.glob(f"{TEMPORARY_PREFIX}old-*"):  # a kill between the two renames of `export_pipeline`
        name = old.name.removeprefix(f"{TEMPORARY_PREFIX}old-")
        new = output_dir / f"{TEMPORARY_PREFIX}{name}"
        if not (output_dir / name).exists():
            (new if new.exists() else old).rename(output_dir / name)
    newest = list(list_checkpoints(output_dir).values())[-1:]
    before = f"the newest complete one is {newest[0].name}" if newest else "there is no complete one"
    pattern = f"{TEMPORARY_PREFIX}*"
    for leftover in (*output_dir.glob(pattern), *(output_dir / SNAPSHOTS).glob(pattern)):
        name = leftover.name.removeprefix(TEMPORARY_PREFIX)
        if _NAME.fullmatch(name) and leftover.parent == output_dir:
            report(f"{output_dir}: the save of {name} was cut off; {before}")
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return lock


def list_checkpoints(output_dir: Path) -> dict[int, Path]:
    """Step -> folder, by rising step, of the folders named checkpoint-STEP; other names are ignored."""
    found = {}
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def save_checkpoint(
    output_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, total_limit: int | None
) -> Path:
    """Writes `checkpoint-STEP` and then deletes the oldest ones beyond `total_limit`.

    The folder appears under its name only when every byte of it is on the disk.

    Args:
        tensors: file stem -> tensors by name.
        state: JSON-able progress.
        total_limit: newest checkpoints to keep; None keeps all.

    Raises:
        Failed: naming the path, if the disk is full or cannot be written. Older checkpoints are untouched.
    """
    folder = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f"{TEMPORARY_PREFIX}{folder.name}"
    try:
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in group.items()}, temporary / f"{name}.safetensors")
        (temporary / STATE).write_text(json.dumps(state, indent=1))
        manifest = {path.name: _file_entry(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            _flush_to_disk(path)
        if folder.exists():
            _delete(folder)
        temporary.rename(folder)
        _flush_to_disk(output_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = os.strerror(errno.ENOSPC) if "No space left" in str(error) else error
        raise Failed(f"could not write {folder}: {reason}") from error
    if total_limit is not None:
        for path in list(list_checkpoints(output_dir).values())[:-total_limit]:
            _delete(path)
    return folder


def find_checkpoint(output_dir: Path, resume_from: str, report: Callable[[str], None] = logger.info) -> Path | None:
    """The checkpoint to resume from.

    Args:
        resume_from: `latest`: the newest one that verifies, after reporting each newer one that does not; or a path,
            also one inside `output_dir`, which must verify.
        report: called with one line for each checkpoint that is passed over.

    Returns:
        its folder, or None if `latest` finds no checkpoint at all.

    Raises:
        Failed: if the path is no complete checkpoint, or there are checkpoints but none verifies.
    """
    if resume_from != "latest":
        folder = next((path for path in (Path(resume_from), output_dir / resume_from) if path.is_dir()), None)
        if folder is None:
            there = ", ".join(p.name for p in list_checkpoints(output_dir).values()) or "no checkpoint"
            raise Failed(f"--resume_from_checkpoint {resume_from} does not exist; {output_dir} holds {there}")
        verify_checkpoint(folder)
        return folder
    candidates = list(reversed(list_checkpoints(output_dir).values()))
    for folder in candidates:
        try:
            verify_checkpoint(folder)
        except Failed as error:
            report(f"passing over a damaged checkpoint: {error}")
        else:
            return folder
    if candidates:
        raise Failed(f"none of the {len(candidates)} checkpoints in {output_dir} is intact; nothing was changed")
    return None


def verify_checkpoint(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        Failed: naming the first file that is missing, truncated or altered.
    """
    for name, (num_bytes, sha256) in _read_manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise Failed(f"{path} is missing")
        if path.stat().st_size != num_bytes:
            raise Failed(f"{path} has {path.stat().st_size} bytes instead of {num_bytes}")
        try:
            entry = _file_entry(path)
        except OSError as error:
            raise Failed(f"{path} cannot be read: {error.strerror}") from error
        if entry["sha256"] != sha256:
            raise Failed(f"{path} has another checksum than when it was written")


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, SHA-256).

    Raises:
        Failed: if it is no such table, or leaves out the state or names a file outside the folder.
    """
    path = folder / MANIFEST
    try:
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in _read_object(path).items()}
    except (TypeError, KeyError) as error:
        raise Failed(f"{path} is missing or damaged") from error
    outside = [name for name in entries if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name]
    if STATE not in entries or outside:
        wrong = (
            f"{outside[0]!r} is not the name of a file in its folder" if outside else f"it has no entry for {STATE}"
        )
        raise Failed(f"{path} is damaged: {wrong}")
    return entries


def _read_object(path: Path) -> dict:
    """A file that holds one JSON object. Raises Failed if it does not."""
    try:
        if not path.is_file():  # a named pipe would be read for ever
            raise FileNotFoundError(path)
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Failed(f"{path} is missing or damaged") from error
    if not isinstance(values, dict):
        raise Failed(f"{path} is damaged: it is no JSON object")
    return values


def load_checkpoint(folder: Path, names: list[str]) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The tensors of the named files, on the CPU, and the state of a verified checkpoint.

    Raises:
        Failed: if a name is not in it or not in its manifest, before anything is loaded; if a file cannot be
            read.
    """
    entries = _read_manifest(folder)
    for name in names:
        if f"{name}.safetensors" not in entries:
            raise Failed(f"{folder} has no {name}.safetensors")
    tensors = {}
    for name in names:
        path = folder / f"{name}.safetensors"
        try:
            tensors[name] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise Failed(f"{path} cannot be read: {error}") from error
    return tensors, read_state(folder)


def read_state(folder: Path) -> dict:
    """The numbers of a checkpoint. Raises Failed if the file is no JSON object."""
    return _read_object(folder / STATE)


def read_identity(folder: Path) -> dict:
    """What the run that wrote a checkpoint says of itself in the state. Raises Failed if it says nothing."""
    identity = read_state(folder).get("identity")
    if not isinstance(identity, dict):
        raise Failed(f"{folder / STATE} is damaged: it does not tell of which run it is")
    return identity


def _check_progress(folder: Path, progress) -> None:
    """Raises Failed unless it is `step`, `attempts` and `train_seconds`, and the folder is called after the step."""
    path, names = folder / STATE, ["attempts", "step", "train_seconds"]
    if not isinstance(progress, dict) or sorted(progress) != names:
        raise Failed(f"{path} is damaged: its progress is not made of {', '.join(names)}")
    step, attempts, seconds = progress["step"], progress["attempts"], progress["train_seconds"]
    if type(step) is not int or type(attempts) is not int or not 0 <= step <= attempts < 2**63:
        raise Failed(f"{path} is damaged: its step is {step!r:.40} of {attempts!r:.40} attempts")
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise Failed(f"{path} is damaged: its train_seconds is {seconds!r:.40}")
    named = _NAME.fullmatch(folder.name)
    if named and int(named[1]) != step:
        raise Failed(f"{folder} holds step {step}: it was renamed; give it back its name")


def check_tensors(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises Failed, naming the first that differs, unless both have the same names, shapes and types."""
    for name in sorted({*found, *expected}):
        ours, theirs = (
            f"{tuple(t[name].shape)} {t[name].dtype}" if name in t else "nothing" for t in (expected, found)
        )
        if ours != theirs:
            raise Failed(f"{path} does not fit the network: {name!r:.100} is {theirs} instead of {ours}")


def set_aside_newer(output_dir: Path, step: int, report: Callable[[str], None] = logger.info) -> None:
    """Renames checkpoints and snapshots beyond `step`, so that a run that resumes from there never uses them."""
    for folder in (output_dir, output_dir / SNAPSHOTS):
        for path in (path for other, path in list_checkpoints(folder).items() if other > step):
            aside = path.with_name(f"abandoned-{path.name}")
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
            report(f"{path} is newer than the checkpoint resumed from: renamed to {aside.name}")


def delete_all(output_dir: Path) -> None:
    """Deletes the checkpoints, those set aside and the folder of snapshots, and nothing else."""
    for path in output_dir.iterdir():
        if path.is_dir() and re.fullmatch(rf"(abandoned-)?checkpoint-\d+|{SNAPSHOTS}", path.name):
            shutil.rmtree(path)


def difference(saved: dict, current: dict) -> str:
    """What differs between two flat dictionaries, as `key: saved -> current; ...`; empty if nothing."""
    keys = sorted({*saved, *current})
    return "; ".join(f"{k}: {saved.get(k)!r} -> {current.get(k)!r}" for k in keys if saved.get(k) != current.get(k))


def restore(
    folder: Path,
    network: nn.Module,
    ema_network: nn.Module,
    averages: dict[str, dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> dict:
    """Takes over a checkpoint that verifies, once all of it is read and fits; returns its progress.

    Raises:
        Failed: before anything is changed.
    """
    tensors, state = load_checkpoint(folder, ["unet", "ema_unet", "optimizer", *averages])
    _check_progress(folder, state.get("progress"))
    moments = {
        f"{name}/{key}": value
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
        for key, value in {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}.items()
    }
    expected = {"unet": network.state_dict(), "ema_unet": network.state_dict(), "optimizer": moments} | averages
    for name, those in expected.items():
        check_tensors(folder / f"{name}.safetensors", tensors[name], those)
    if scaler is not None and state.get("grad_scaler") is not None:
        found, names = state["grad_scaler"], scaler.state_dict().keys()
        if not (isinstance(found, dict) and found.keys() == names and all(map(_is_finite, found.values()))):
            raise Failed(f"{folder / STATE} is damaged: grad_scaler is not made of numbers for {', '.join(names)}")
        scaler.load_state_dict(found)
    network.load_state_dict(tensors["unet"])
    ema_network.load_state_dict(tensors["ema_unet"])
    for name, average in averages.items():
        for key, tensor in average.items():
            tensor.copy_(tensors[name][key])
    restore_optimizer(optimizer, network, tensors["optimizer"])
    return state["progress"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as `PARAMETER/KEY` -> tensor (for AdamW: step, exp_avg, exp_avg_sq)."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; moments take the memory format of their parameter."""
    parameters = dict(model.named_parameters())
    index = {parameter: i for i, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, device="cpu", dtype=value.dtype).copy_(value)
        state.setdefault(index[parameter], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _is_finite(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _file_entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(folder: Path) -> None:
    """Removes a checkpoint so that a crash half-way leaves no folder with a checkpoint's name."""
    doomed = folder.rename(folder.with_name(f"{TEMPORARY_PREFIX}deleted-{folder.name}"))
    shutil.rmtree(doomed)
