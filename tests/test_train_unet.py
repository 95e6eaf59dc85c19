"""The main job as its users start it: whole runs, kills, resumes, signals and refusals, on a tiny network."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.run_log import read_log

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = """
dataset_name: synthetic-faces
max_images: 50
crop: none
resolution: 8
random_flip: true
down_block_types: [DownBlock2D, AttnDownBlock2D]
up_block_types: [AttnUpBlock2D, UpBlock2D]
block_out_channels: [8, 16]
layers_per_block: 1
norm_num_groups: 4
dropout: 0.3
train_batch_size: 7
gradient_accumulation_steps: 2
lr_warmup_steps: 2
learning_rate: 1.0e-3
max_train_steps: 9
checkpointing_steps: 3
validation_steps: 100
save_images_steps: 100
logging_steps: 1
eval_batch_size: 4
ddpm_num_inference_steps: 3
report_to: none
"""
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml"]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def job(tmp_path, cache_dir):
    """Starts the main job with the tiny configuration and further flags in a process of its own."""
    config_path = tmp_path / "tiny.yaml"
    config_path.write_text(TINY)

    def start(*flags, output_dir: str = "run", num_processes: int | None = None) -> subprocess.Popen:
        launcher = []
        if num_processes:
            launcher = [*LAUNCH, "--num_processes", str(num_processes)]
            launcher += (
                ["--cpu", "--main_process_port", "0", "--multi_cpu"][: 4 if False else 3] if num_processes > 1 else []
            )
        arguments = ["--config", config_path, "--output_dir", tmp_path / output_dir, "--cache_dir", cache_dir, *flags]
        return subprocess.Popen(
            [sys.executable, *launcher, "train_unet.py", *map(str, arguments)],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits for the end and the exit code; returns stdout and stderr."""
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == code, stderr[-3000:]
    return stdout + stderr


def wait_for_step(process: subprocess.Popen, output_dir: Path, step: int) -> None:
    while not any(record["step"] >= step for record in read_log(output_dir / "log.jsonl")):
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.005)


def losses(output_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(output_dir / "log.jsonl") if "loss" in record}


def assert_same_checkpoint(one: Path, other: Path) -> None:
    names = {path.name for path in one.glob("*.safetensors")}
    assert names == {"unet.safetensors", "ema_unet.safetensors", "optimizer.safetensors"}
    for name in names:
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"
