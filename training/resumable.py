"""What lets a training go on after it was stopped: its progress, its checkpoints and its output folder."""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from filelock import FileLock
from torch import nn

from common import Failed, on_main_process, replace_file
from training import checkpoint
from training.config import DEFAULTS, TrainConfig
from training.log import RunLog
from training.samples import list_grids
from training.training_data import TrainingData

PROJECT = "unet"  # what the trackers call the run; TensorBoard's folder
OBJECTIVE = (  # what the loss and the noise process depend on; older checkpoints do not tell all of it
    "prediction_type ddpm_num_steps ddpm_beta_schedule beta_start beta_end rescale_betas_zero_snr objective"
    " likelihood_weighting sde_beta_min sde_beta_max sigma_min sigma_max sigma_data noise_mean noise_std time_density"
    " label_dropout snr_gamma snr_weighting"
).split()


@dataclass
class Progress:
    """How far a run is. Weights, EMA, learning rate and `step` move together; a skipped one moves only `attempts`."""

    step: int = 0  # optimizer updates applied
    attempts: int = 0  # updates tried: the position in the data stream
    train_seconds: float = 0.0  # spent in updates, over all starts


class Resumable:
    """The base of `train_unet.Trainer`, which sets these attributes."""

    config: TrainConfig
    accelerator: Accelerator
    data: TrainingData
    network: nn.Module
    ema_network: nn.Module
    averages: dict[str, dict[str, torch.Tensor]]  # of `--post_hoc_ema`
    optimizer: torch.optim.Optimizer
    progress: Progress
    output_dir: Path
    best_dir: Path
    lock: FileLock  # on the main process, until it ends
    log: RunLog  # on the main process

    def identity(self) -> dict:
        """What a checkpoint and a run that resumes from it must have in common, as one flat dictionary."""
        config = self.config
        names = "train_batch_size gradient_accumulation_steps random_flip timestep_sampling seed post_hoc_ema".split()
        identity = self.unet_kwargs() | {name: getattr(config, name) for name in [*OBJECTIVE, *names]}
        identity |= {"num_processes": self.accelerator.num_processes, "data_fingerprint": self.data.store.fingerprint}
        identity |= {"label_column": config.label_column, "label_names": self.data.label_names}
        return json.loads(json.dumps(identity))  # tuples become lists, as in the file

    def start_or_resume(self) -> None:
        """Takes the output folder and restores the checkpoint to resume from, if any.

        Raises:
            Failed: before anything is changed, if the folder is in use, if a checkpoint that should be there
                is not or is damaged, or if it belongs to another run.
            OSError: if the folder cannot be written.
        """
        folder = on_main_process(self.accelerator, self.take_output_dir)
        if folder is not None:
            self.restore(folder)
            self.tell(f"resuming from {folder}")
        on_main_process(self.accelerator, self.prepare_output_dir)
        self.accelerator.init_trackers(PROJECT, {k: str(v) for k, v in asdict(self.config).items()})

    def restore(self, folder: Path) -> None:
        """Takes over a checkpoint, once all of it is read and fits."""
        scaler, averages = self.accelerator.scaler, self.averages
        state = checkpoint.restore(folder, self.network, self.ema_network, averages, self.optimizer, scaler)
        self.progress = Progress(**state)

    def take_output_dir(self) -> Path | None:
        """Main process: locks the folder; returns the checkpoint to resume from, if any."""
        config = self.config
        self.lock = checkpoint.lock_output_dir(self.output_dir)
        wanted = config.resume_from_checkpoint
        if config.overwrite_output_dir and wanted == "latest":
            return None
        folder = checkpoint.find_checkpoint(self.output_dir, wanted)
        if folder is None:
            return None
        untold = {name: DEFAULTS[name] for name in [*OBJECTIVE, "post_hoc_ema"]} | {"snr_gamma": config.snr_gamma}
        saved = untold | checkpoint.read_identity(folder)
        difference = checkpoint.difference(saved, self.identity())
        if difference:
            raise Failed(
                f"{folder} belongs to another run ({difference}); restore these settings, choose another --output_dir"
                " or start from scratch with --overwrite_output_dir"
            )
        return folder

    def prepare_output_dir(self) -> None:
        """Main process: clears away what the run does not build on, and begins the log and config.yaml."""
        if self.config.overwrite_output_dir:
            checkpoint.delete_all(self.output_dir)
            (self.output_dir / "log.jsonl").unlink(missing_ok=True)
            for folder in (self.output_dir / self.config.logging_dir / PROJECT, self.best_dir):
                if folder.exists():
                    shutil.rmtree(folder)
        checkpoint.set_aside_newer(self.output_dir, self.progress.step)
        for step, grid in list_grids(self.output_dir / "samples").items():
            if step > self.progress.step:
                grid.unlink()
        self.log = RunLog(self.output_dir / "log.jsonl", self.progress.step)
        again = replace(self.config, overwrite_output_dir=False)  # so that a start from the file resumes
        replace_file(self.output_dir / "config.yaml", again.to_yaml().encode())

    def save_checkpoint(self) -> None:
        tensors = {"unet": self.network.state_dict(), "ema_unet": self.ema_network.state_dict()} | self.averages
        tensors["optimizer"] = checkpoint.optimizer_tensors(self.optimizer, self.network)
        self.write_checkpoint(self.output_dir, tensors, self.config.checkpoints_total_limit)

    def save_snapshot(self) -> None:
        """The averages of `--post_hoc_ema` in half precision, kept for good."""
        halves = {stem: {name: t.half() for name, t in average.items()} for stem, average in self.averages.items()}
        self.write_checkpoint(self.output_dir / checkpoint.SNAPSHOTS, halves, None)

    def write_checkpoint(self, folder: Path, tensors: dict[str, dict[str, torch.Tensor]], limit: int | None) -> None:
        scaler = self.accelerator.scaler
        state = {
            "progress": asdict(self.progress),
            "identity": self.identity(),
            "grad_scaler": scaler.state_dict() if scaler is not None else None,
            "mixed_precision": self.config.mixed_precision,
        }
        save = partial(checkpoint.save_checkpoint, folder, self.progress.step, tensors, state, limit)
        on_main_process(self.accelerator, save)
