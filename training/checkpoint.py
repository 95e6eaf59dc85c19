"""Checkpoints of a training run, and resuming from them. `trainer` is a `train_unet.Trainer`.

A checkpoint is written to a temporary folder, checksummed, renamed into place, and verified when it is read:

    OUTPUT_DIR/checkpoint-STEP/
        NAME.safetensors   tensors by name: the network, its EMA, the optimizer's moments
        state.json         progress, settings that a resumed run must share with this one, precision, gradient scaler,
                           facts of the pretrained model
        manifest.json      size and SHA-256 of every other file; written last

With `--post_hoc_ema`, a checkpoint also contains the moving averages. Their snapshots, in
OUTPUT_DIR/ema_snapshots/checkpoint-STEP, have the same format; they are set aside or deleted with the checkpoints.
No random state is saved: all randomness in an update derives from (seed, attempt, rank). Nothing is pickled.
"""

import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from uuid import uuid4

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import Failed, difference, on_main_process, replace_file, sha256_of
from training.config import LIMITS
from training.log import LOG, list_grids, start_log

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
SNAPSHOTS = "ema_snapshots"
TEMPORARY_PREFIX = ".tmp-"
NAME = re.compile(r"checkpoint-(\d+)")
PROJECT = "unet"  # project name for the trackers; TensorBoard's folder
# Settings of the data, the optimizer and the loss that a resumed run must keep, besides those of the network
KEPT = "train_batch_size gradient_accumulation_steps random_flip label_column label_dropout seed".split()
KEPT += ["optimizer", "post_hoc_ema", "objective", "timestep_sampling"]
KEPT += [name for name, limits in LIMITS.items() if "only" in limits and name != "sampler"]


@dataclass
class Progress:
    """A run's progress. A skipped update advances `attempts`, but not weights, EMA, learning rate and `step`."""

    step: int = 0  # optimizer updates applied
    attempts: int = 0  # updates attempted: the position in the data stream
    train_seconds: float = 0.0  # time spent in updates, summed over all starts


# ---- Starting or resuming a run


def start_or_resume(trainer) -> None:
    """Locks the output folder and restores the checkpoint to resume from, if any.

    Raises Failed, before anything is changed, if the folder is in use or the checkpoint is damaged or of another run.
    """
    folder = on_main_process(trainer.accelerator, partial(_take_output_dir, trainer))
    if folder is not None:
        restore(trainer, folder)
        logger.info(f"resuming from {folder}")
    on_main_process(trainer.accelerator, partial(_prepare_output_dir, trainer))
    settings = {name: str(value) for name, value in asdict(trainer.config).items()}
    trainer.accelerator.init_trackers(PROJECT, settings, tracker_options(trainer))


def tracker_options(trainer) -> dict:
    """Arguments for the trackers, so that all starts log to one W&B run and TensorBoard shows each step once."""
    path = trainer.output_dir / trainer.config.logging_dir / PROJECT / "wandb_id"
    wandb = {"dir": str(trainer.output_dir), "resume": "allow"}
    if trainer.accelerator.is_main_process and trainer.config.report_to in ("wandb", "all"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            replace_file(path, uuid4().hex.encode())
        wandb["id"] = path.read_text()
    step = trainer.progress.step
    return {"wandb": wandb, "tensorboard": {"purge_step": step + 1 if step else 0}}


def identity(trainer) -> dict:
    """The settings that a resumed run must share with its checkpoint, as a flat dictionary."""
    found = trainer.unet_kwargs() | {name: getattr(trainer.config, name) for name in KEPT}
    found |= {"num_processes": trainer.accelerator.num_processes, "label_names": trainer.data.label_names}
    found["data_fingerprint"] = trainer.data.store.fingerprint
    return json.loads(json.dumps(found))  # turns tuples into lists, as in the file


def _take_output_dir(trainer) -> Path | None:
    """On the main process, locks the folder and returns the checkpoint to resume from, if any."""
    trainer.lock = lock_output_dir(trainer.output_dir)
    folder = checkpoint_of(trainer.config)
    if folder is None:
        return None
    saved = read_state(folder)["identity"]
    # an older checkpoint may lack settings that did not exist yet
    current = {name: value for name, value in identity(trainer).items() if name in saved}
    if changes := difference(saved, current):
        raise Failed(
            f"{folder} belongs to another run ({changes}); restore these settings or choose another --output_dir"
        )
    return folder


def _prepare_output_dir(trainer) -> None:
    """On the main process, removes outputs that the run does not build on, and starts the log and config.yaml."""
    output_dir, step = trainer.output_dir, trainer.progress.step
    if trainer.config.overwrite_output_dir:
        logs, snapshots = output_dir / trainer.config.logging_dir / PROJECT, output_dir / SNAPSHOTS
        checkpoints = [*list_checkpoints(output_dir).values(), *output_dir.glob("abandoned-checkpoint-*")]
        for folder in (*checkpoints, snapshots, logs, trainer.best_dir):
            shutil.rmtree(folder, ignore_errors=True)
    set_aside_newer(output_dir, step)
    for grid_step, grid in list_grids(output_dir / "samples").items():
        if grid_step > step:
            grid.unlink()
    trainer.records = start_log(output_dir / LOG, step)
    # so that a run started from this file resumes
    again = replace(trainer.config, overwrite_output_dir=False, resume_from_checkpoint="latest")
    replace_file(output_dir / "config.yaml", again.to_yaml().encode())


def checkpoint_of(config) -> Path | None:
    """The checkpoint that the run of a `TrainConfig` resumes from; None for a new run. Raises Failed."""
    if config.overwrite_output_dir:
        return None
    return find_checkpoint(Path(config.output_dir), config.resume_from_checkpoint)


def saved_state(config) -> dict | None:
    """The state of that checkpoint, or None. Raises Failed."""
    folder = checkpoint_of(config)
    return None if folder is None else read_state(folder)


# ---- The output folder


def lock_output_dir(output_dir: Path) -> FileLock:
    """Locks the folder until this process ends, however it ends, and removes half-written files left by a crash.

    Raises Failed if the folder cannot be created or another process is writing to it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Failed(f"{output_dir} is in use by another process; wait for it or choose another folder") from error
    except OSError as error:
        raise Failed(f"cannot write to {output_dir}: {error.strerror}") from error
    for old in output_dir.glob(f"{TEMPORARY_PREFIX}old-*"):  # killed between the two renames of `export_pipeline`
        name = old.name.removeprefix(f"{TEMPORARY_PREFIX}old-")
        new = output_dir / f"{TEMPORARY_PREFIX}{name}"
        if not (output_dir / name).exists():
            (new if new.exists() else old).rename(output_dir / name)
    for leftover in (*output_dir.glob(f"{TEMPORARY_PREFIX}*"), *output_dir.glob(f"{SNAPSHOTS}/{TEMPORARY_PREFIX}*")):
        if leftover.match(f"{TEMPORARY_PREFIX}checkpoint-*"):
            logger.info(f"removing {leftover}, left by an interrupted save")
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return lock


def list_checkpoints(output_dir: Path) -> dict[int, Path]:
    """Maps each step, in ascending order, to its folder checkpoint-STEP; other names are ignored."""
    found = {path: NAME.fullmatch(path.name) for path in output_dir.glob("checkpoint-*") if path.is_dir()}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def find_checkpoint(output_dir: Path, resume_from: str) -> Path | None:
    """For `latest`, the newest intact checkpoint, or None if there are no checkpoints; otherwise the one at a path.

    Damaged checkpoints are logged. The path may be relative to `output_dir`. Raises Failed if the checkpoint at the
    path, or every checkpoint, is damaged.
    """
    there = list_checkpoints(output_dir).values()
    if resume_from != "latest":
        folder = next((path for path in (Path(resume_from), output_dir / resume_from) if path.is_dir()), None)
        if folder is None:
            names = ", ".join(path.name for path in there) or "no checkpoint"
            raise Failed(f"--resume_from_checkpoint {resume_from} does not exist; {output_dir} holds {names}")
        verify_checkpoint(folder)
        return folder
    for folder in reversed(there):
        try:
            verify_checkpoint(folder)
            return folder
        except Failed as error:
            logger.info(f"skipping a damaged checkpoint: {error}")
    if there:
        raise Failed(f"none of the {len(there)} checkpoints in {output_dir} is intact; nothing was changed")
    return None


def set_aside_newer(output_dir: Path, step: int) -> None:
    """Renames checkpoints and snapshots beyond `step`, so that a run resumed from `step` never uses them."""
    for folder in (output_dir, output_dir / SNAPSHOTS):
        for path in (path for other, path in list_checkpoints(folder).items() if other > step):
            aside = path.with_name(f"abandoned-{path.name}")
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
            logger.info(f"{path} is newer than the checkpoint resumed from: renamed to {aside.name}")


# ---- Writing


def save_checkpoint(trainer) -> None:
    """Saves the training state. Raises Failed, naming the path, if it cannot be written."""
    tensors = {"unet": trainer.network.state_dict(), "ema_unet": trainer.ema_network.state_dict()} | trainer.averages
    tensors["optimizer"] = optimizer_tensors(trainer.optimizer, trainer.network)
    _write(trainer, trainer.output_dir, tensors, trainer.config.checkpoints_total_limit)


def save_snapshot(trainer) -> None:
    """Saves the averages of `--post_hoc_ema` in half precision; snapshots are never deleted."""
    halves = {stem: {name: t.half() for name, t in average.items()} for stem, average in trainer.averages.items()}
    _write(trainer, trainer.output_dir / SNAPSHOTS, halves, None)


def _write(trainer, folder: Path, tensors: dict[str, dict[str, Tensor]], total_limit: int | None) -> None:
    scaler = trainer.accelerator.scaler
    state = {
        "progress": asdict(trainer.progress),
        "identity": identity(trainer),
        "grad_scaler": None if scaler is None else scaler.state_dict(),
        "mixed_precision": trainer.config.mixed_precision,
        "pretrained": trainer.pretrained_facts,
    }
    save = partial(write_checkpoint, folder, trainer.progress.step, tensors, state, total_limit)
    on_main_process(trainer.accelerator, save)


def write_checkpoint(
    output_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, total_limit: int | None
) -> None:
    """Writes `checkpoint-STEP` and then deletes the oldest ones beyond `total_limit` (None keeps all).

    The folder gets its final name only after every byte is on disk.

    Args:
        tensors: file stem -> tensors by name.
        state: JSON-serializable numbers.

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
        temporary.rename(folder)
        _flush_to_disk(output_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise Failed(f"could not write {folder}: {error}") from error
    if total_limit is not None:
        for path in list(list_checkpoints(output_dir).values())[:-total_limit]:
            # renamed first, so that a crash leaves no partial folder with a checkpoint's name
            shutil.rmtree(path.rename(path.with_name(f"{TEMPORARY_PREFIX}deleted-{path.name}")))


def _file_entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- Reading


def restore(trainer, folder: Path) -> None:
    """Restores a verified checkpoint of a run with the same identity; it is read completely first."""
    network, averages, scaler = trainer.network, trainer.averages, trainer.accelerator.scaler
    tensors = load_tensors(folder, ["unet", "ema_unet", "optimizer", *averages])
    state = read_state(folder)
    network.load_state_dict(tensors["unet"])
    trainer.ema_network.load_state_dict(tensors["ema_unet"])
    for name, average in averages.items():
        for key, tensor in average.items():
            tensor.copy_(tensors[name][key])
    restore_optimizer(trainer.optimizer, network, tensors["optimizer"])
    if scaler is not None and state.get("grad_scaler") is not None:
        scaler.load_state_dict(state["grad_scaler"])
    trainer.progress = Progress(**state["progress"])
    trainer.pretrained_facts = state.get("pretrained", trainer.pretrained_facts)


def verify_checkpoint(folder: Path) -> None:
    """Compares every file with the manifest. Raises Failed, naming the first missing, truncated or altered file."""
    try:
        manifest = dict(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise Failed(f"{folder / MANIFEST} is missing or damaged") from error
    for name, entry in ({STATE: None} | manifest).items():
        path = folder / name
        try:
            found = _file_entry(path)
        except OSError as error:
            raise Failed(f"{path} cannot be read: {error.strerror}") from error
        if found != entry:
            raise Failed(f"{path} is damaged: its size or checksum does not match {MANIFEST}")


def read_state(folder: Path) -> dict:
    """The numbers of a verified checkpoint."""
    return json.loads((folder / STATE).read_text())


def load_tensors(folder: Path, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of the named files of a verified checkpoint, on the CPU. Raises OSError, naming a missing file."""
    return {name: load_file(folder / f"{name}.safetensors") for name in names}


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """Optimizer state, `PARAMETER/KEY` -> tensor: AdamW's step, exp_avg and exp_avg_sq, or Muon's momentum_buffer."""
    return {
        f"{name}/{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; moments take the memory format of their parameter."""
    parameters = dict(network.named_parameters())
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        empty = torch.empty((), device=parameter.device) if key == "step" else torch.empty_like(parameter)
        optimizer.state[parameter][key] = empty.detach().copy_(value)
