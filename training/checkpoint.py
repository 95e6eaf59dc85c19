"""Checkpoints that survive crashes: written to a temporary folder, checksummed, renamed into place, verified on read.

    OUTPUT_DIR/checkpoint-STEP/
        NAME.safetensors   tensors by name: the network, its EMA, the optimizer's moments
        state.json         numbers: progress, and what a resumed run must have in common with this one
        manifest.json      size and SHA-256 of every other file; written last

There is no file for random states: everything random in a step derives from (seed, step, rank). Nothing is pickled.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MANIFEST = "manifest.json"
STATE = "state.json"
TEMPORARY_PREFIX = ".tmp-"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used. The message is one line."""


def lock_output_dir(output_dir: Path) -> FileLock:
    """Takes the folder for this process until it ends, however it ends, and clears what a crash left half-written.

    Raises:
        CheckpointError: if the folder cannot be made or another process is writing to it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(
            f"{output_dir} is in use by another process; wait for it or take another folder"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot write to {output_dir}: {error.strerror}") from error
    for leftover in output_dir.glob(f"{TEMPORARY_PREFIX}*"):
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
        CheckpointError: naming the path, if the disk is full or cannot be written. Older checkpoints are untouched.
    """
    folder = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f"{TEMPORARY_PREFIX}{folder.name}"
    try:
        temporary.mkdir()
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
        raise CheckpointError(f"could not write {folder}: {reason}") from error
    if total_limit is not None:
        for path in list(list_checkpoints(output_dir).values())[:-total_limit]:
            _delete(path)
    return folder


def find_checkpoint(output_dir: Path, resume_from: str, report=print) -> Path | None:
    """The checkpoint to resume from.

    Args:
        resume_from: `latest`: the newest one that verifies, after reporting each newer one that does not; or a path,
            which must verify.
        report: called with one line for each checkpoint that is passed over.

    Returns:
        its folder, or None if `latest` finds no checkpoint at all.

    Raises:
        CheckpointError: if the path is no complete checkpoint, or there are checkpoints but none verifies.
    """
    if resume_from != "latest":
        folder = Path(resume_from)
        if not folder.is_dir():
            there = ", ".join(p.name for p in list_checkpoints(output_dir).values()) or "no checkpoint"
            raise CheckpointError(f"--resume_from_checkpoint {folder} does not exist; {output_dir} holds {there}")
        verify_checkpoint(folder)
        return folder
    candidates = list(reversed(list_checkpoints(output_dir).values()))
    for folder in candidates:
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            report(f"passing over a damaged checkpoint: {error}")
        else:
            return folder
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {output_dir} is intact; nothing was changed"
        )
    return None


def verify_checkpoint(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or altered.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is missing or damaged") from error
    for name, (num_bytes, sha256) in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != num_bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {num_bytes}")
        if _file_entry(path)["sha256"] != sha256:
            raise CheckpointError(f"{path} has another checksum than when it was written")


def load_checkpoint(folder: Path, names: list[str]) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """The tensors of the named files, on the CPU, and the state of a verified checkpoint.

    Raises:
        CheckpointError: if a name is not in it, before anything is loaded.
    """
    for name in names:
        if not (folder / f"{name}.safetensors").is_file():
            raise CheckpointError(f"{folder} has no {name}.safetensors")
    return {name: load_file(folder / f"{name}.safetensors") for name in names}, read_state(folder)


def read_state(folder: Path) -> dict:
    return json.loads((folder / STATE).read_text())


def set_aside_newer(output_dir: Path, step: int, report=print) -> None:
    """Renames checkpoints beyond `step`, so that a run that goes on from there is never continued from them."""
    for other, path in list_checkpoints(output_dir).items():
        if other > step:
            aside = path.with_name(f"abandoned-{path.name}")
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
            report(f"{path.name} is newer than the checkpoint resumed from: renamed to {aside.name}")


def difference(saved: dict, current: dict) -> str:
    """What differs between two flat dictionaries, as `key: saved -> current; ...`; empty if nothing."""
    keys = sorted({*saved, *current})
    return "; ".join(f"{k}: {saved.get(k)!r} -> {current.get(k)!r}" for k in keys if saved.get(k) != current.get(k))


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


def _file_entry(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


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
