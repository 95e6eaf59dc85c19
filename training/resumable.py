"""Resuming a training run after it was stopped: its progress, its checkpoints and its output folder.

`trainer` is a `train_unet.Trainer`.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from uuid import uuid4

from torch import Tensor

from common import Failed, on_main_process, replace_file
from training import checkpoint
from training.config import LIMITS
from training.log import RunLog
from training.samples import list_grids

logger = logging.getLogger(__name__)

PROJECT = "unet"  # project name for the trackers; TensorBoard's folder
# Settings of the data, the optimizer and the loss that a resumed run must keep, besides those of the network
KEPT = "train_batch_size gradient_accumulation_steps random_flip label_column label_dropout seed".split()
KEPT += ["optimizer", "post_hoc_ema", "objective", "timestep_sampling"]
KEPT += [name for name, limits in LIMITS.items() if "only" in limits and name != "sampler"]


@dataclass
class Progress:
    """How far a run is. An update advances weights, EMA, learning rate and `step`; a skipped one only `attempts`."""

    step: int = 0  # optimizer updates applied
    attempts: int = 0  # updates attempted: the position in the data stream
    train_seconds: float = 0.0  # time spent in updates, over all starts


def identity(trainer) -> dict:
    """The settings that a resumed run must share with its checkpoint, as a flat dictionary."""
    found = trainer.unet_kwargs() | {name: getattr(trainer.config, name) for name in KEPT}
    found |= {"num_processes": trainer.accelerator.num_processes, "label_names": trainer.data.label_names}
    found["data_fingerprint"] = trainer.data.store.fingerprint
    return json.loads(json.dumps(found))  # turns tuples into lists, as in the file


def start_or_resume(trainer) -> None:
    """Locks the output folder and restores the checkpoint to resume from, if any.

    Raises Failed, before anything is changed, if the folder is in use or the checkpoint damaged or from another run.
    """
    folder = on_main_process(trainer.accelerator, partial(_take_output_dir, trainer))
    if folder is not None:
        restore(trainer, folder)
        logger.info(f"resuming from {folder}")
    on_main_process(trainer.accelerator, partial(_prepare_output_dir, trainer))
    settings = {name: str(value) for name, value in asdict(trainer.config).items()}
    trainer.accelerator.init_trackers(PROJECT, settings, tracker_options(trainer))


def tracker_options(trainer) -> dict:
    """Arguments with which the trackers continue: one W&B run over all starts, and each step once in TensorBoard."""
    path = trainer.output_dir / trainer.config.logging_dir / PROJECT / "wandb_id"
    wandb = {"dir": str(trainer.output_dir), "resume": "allow"}
    if trainer.accelerator.is_main_process and trainer.config.report_to in ("wandb", "all"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            replace_file(path, uuid4().hex.encode())
        wandb["id"] = path.read_text()
    return {"wandb": wandb, "tensorboard": {"purge_step": trainer.progress.step + 1}}


def _take_output_dir(trainer) -> Path | None:
    """On the main process, locks the folder and returns the checkpoint to resume from, if any."""
    trainer.lock = checkpoint.lock_output_dir(trainer.output_dir)
    folder = checkpoint.checkpoint_of(trainer.config)
    if folder is None:
        return None
    saved = checkpoint.read_state(folder)["identity"]
    # an older checkpoint may lack settings that did not exist yet
    current = {name: value for name, value in identity(trainer).items() if name in saved}
    if difference := checkpoint.difference(saved, current):
        raise Failed(
            f"{folder} belongs to another run ({difference}); restore these settings or take another --output_dir"
        )
    return folder


def _prepare_output_dir(trainer) -> None:
    """On the main process, removes outputs that the run does not build on, and starts the log and config.yaml."""
    output_dir, step = trainer.output_dir, trainer.progress.step
    if trainer.config.overwrite_output_dir:
        logs, snapshots = output_dir / trainer.config.logging_dir / PROJECT, output_dir / checkpoint.SNAPSHOTS
        checkpoints = [*checkpoint.list_checkpoints(output_dir).values(), *output_dir.glob("abandoned-checkpoint-*")]
        for folder in (*checkpoints, snapshots, logs, trainer.best_dir):
            shutil.rmtree(folder, ignore_errors=True)
        (output_dir / "log.jsonl").unlink(missing_ok=True)
    checkpoint.set_aside_newer(output_dir, step)
    for grid_step, grid in list_grids(output_dir / "samples").items():
        if grid_step > step:
            grid.unlink()
    trainer.log = RunLog(output_dir / "log.jsonl", step)
    again = replace(trainer.config, overwrite_output_dir=False)  # so that a run started from this file resumes
    replace_file(output_dir / "config.yaml", again.to_yaml().encode())


def restore(trainer, folder: Path) -> None:
    """Restores a verified checkpoint of a run with the same identity, after reading all of it."""
    network, averages, scaler = trainer.network, trainer.averages, trainer.accelerator.scaler
    tensors = checkpoint.load_tensors(folder, ["unet", "ema_unet", "optimizer", *averages])
    state = checkpoint.read_state(folder)
    network.load_state_dict(tensors["unet"])
    trainer.ema_network.load_state_dict(tensors["ema_unet"])
    for name, average in averages.items():
        for key, tensor in average.items():
            tensor.copy_(tensors[name][key])
    checkpoint.restore_optimizer(trainer.optimizer, network, tensors["optimizer"])
    if scaler is not None and state.get("grad_scaler") is not None:
        scaler.load_state_dict(state["grad_scaler"])
    trainer.progress = Progress(**state["progress"])


def save_checkpoint(trainer) -> None:
    """Saves the training state. Raises Failed, naming the path, if it cannot be written."""
    tensors = {"unet": trainer.network.state_dict(), "ema_unet": trainer.ema_network.state_dict()} | trainer.averages
    tensors["optimizer"] = checkpoint.optimizer_tensors(trainer.optimizer, trainer.network)
    _write(trainer, trainer.output_dir, tensors, trainer.config.checkpoints_total_limit)


def save_snapshot(trainer) -> None:
    """Saves the averages of `--post_hoc_ema` in half precision; snapshots are never deleted."""
    halves = {stem: {name: t.half() for name, t in average.items()} for stem, average in trainer.averages.items()}
    _write(trainer, trainer.output_dir / checkpoint.SNAPSHOTS, halves, None)


def _write(trainer, folder: Path, tensors: dict[str, dict[str, Tensor]], total_limit: int | None) -> None:
    scaler = trainer.accelerator.scaler
    state = {
        "progress": asdict(trainer.progress),
        "identity": identity(trainer),
        "grad_scaler": None if scaler is None else scaler.state_dict(),
        "mixed_precision": trainer.config.mixed_precision,
    }
    save = partial(checkpoint.save_checkpoint, folder, trainer.progress.step, tensors, state, total_limit)
    on_main_process(trainer.accelerator, save)
