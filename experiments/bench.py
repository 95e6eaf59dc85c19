"""Measures the training and sampling speed of our U-Net and of diffusers' UNet2DModel on this machine.

    python -m experiments.bench --config configs/celeba64.yaml [--compile true] [--mixed_precision bf16] ...

The flags are those of train_unet.py; precision `auto` measures float32 and bf16. A training row times updates of the
configured objective (forward, loss, backward, clipping, optimizer, EMA) on random images on the device, and compares
their operations per second with a matrix product in the same precision. A sampling row times DDIM by our pipeline or
the stock DDIMPipeline. Exit codes: 0 done, 1 out of memory, 2 bad input.
"""

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from common import run_command
from custom_unet import CustomUNet2DModel
from eval.results import number, table
from experiments.architecture import ANY_DATA
from experiments.unet_variants import VARIANTS
from pipelines import CustomUNetPipeline
from training.arguments import parse_config
from training.config import TrainConfig
from training.diffusion import diffusion_loss
from training.log import device_name
from training.optimization import build_optimizer, update_ema
from training.precision import DTYPES, under_autocast

NETWORKS = {"ours": CustomUNet2DModel, "diffusers": UNet2DModel}
WARM_UP_CALLS, MEASURED_SECONDS, SAMPLING_STEPS = 3, 5.0, 10  # the first call compiles
COLUMNS = ("task", "network", "precision", "images/s", "peak GiB", "share of the matmul rate")
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def build_network(config: TrainConfig, network_class: type[nn.Module], device: torch.device) -> nn.Module:
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return network_class(**config.unet_kwargs()).to(device, memory_format=memory_format)


def training_update(config: TrainConfig, network_class: type[nn.Module], device: torch.device) -> Callable[[], None]:
    """Returns a function that updates a new network and its EMA as the trainer does, on random images."""
    unet = build_network(config, network_class, device).train()
    ema_unet = copy.deepcopy(unet).requires_grad_(False)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.compile:
        unet.compile(fullgraph=True)
    optimizer, scheduler = build_optimizer(config, unet), config.noise_scheduler()
    images = torch.rand(config.train_batch_size, *config.image_shape, device=device).mul_(2).sub_(1)
    called = partial(under_autocast, unet, DTYPES[config.mixed_precision])

    def update() -> None:
        diffusion_loss(called, scheduler, images, **config.loss_settings()).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema_unet, unet, config.ema_max_decay)

    return update


def sampling_call(config: TrainConfig, network_class: type[nn.Module], device: torch.device) -> Callable[[], None]:
    """Returns a function that draws a batch with untrained weights; the cost does not depend on them."""
    unet = build_network(config, network_class, device).eval()
    scheduler = DDIMScheduler.from_config(config.noise_scheduler().config)
    pipeline = (DDIMPipeline if network_class is UNet2DModel else CustomUNetPipeline)(unet, scheduler).to(device)
    pipeline.set_progress_bar_config(disable=True)
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[config.mixed_precision]

    def draw() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            pipeline(config.train_batch_size, generator, num_inference_steps=SAMPLING_STEPS, output_type="np")

    return draw


def flops_per_image(config: TrainConfig) -> int:
    """Floating-point operations of the forward and backward pass for one image, counted on the meta device."""
    with torch.device("meta"):
        unet = CustomUNet2DModel(**config.unet_kwargs())
        image = torch.zeros(1, *config.image_shape)
    with FlopCounterMode(display=False) as counter:
        diffusion_loss(unet, config.noise_scheduler(), image, **config.loss_settings()).backward()
    return counter.get_total_flops()


def median_seconds(call: Callable[[], object], min_run_time: float) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median


def measure(task: str, network_class: type[nn.Module], config: TrainConfig, device: torch.device) -> dict[str, float]:
    """Images/s, peak memory on a GPU, and for training the share of the rate of a product of two square matrices."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    call = (training_update if task == "training" else sampling_call)(config, network_class, device)
    for _ in range(WARM_UP_CALLS):
        call()
    measured = {"images/s": config.train_batch_size / median_seconds(call, MEASURED_SECONDS)}
    if device.type == "cuda":
        measured["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    if task == "training":
        size = MATMUL_SIZE[device.type]
        a, b = torch.randn(2, size, size, device=device, dtype=DTYPES[config.mixed_precision])
        flops_per_second = 2 * size**3 / median_seconds(lambda: a @ b, 1.0)
        measured[COLUMNS[-1]] = measured["images/s"] * flops_per_image(config) / flops_per_second
    return measured


def measure_speeds(runs: dict[str, tuple[TrainConfig, str]]) -> dict[str, float]:
    """Training images/s by name: the median over 9 interleaved updates on the CPU with all threads, after 2 others.

    Args:
        runs: the configuration and the name of the network in `experiments.unet_variants`.
    """
    device, seconds = torch.device("cpu"), {name: [] for name in runs}
    updates = {name: training_update(config, VARIANTS[net], device) for name, (config, net) in runs.items()}
    for _ in range(2 + 9):
        for name, update in updates.items():
            started_at_seconds = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - started_at_seconds)
    return {name: runs[name][0].train_batch_size / statistics.median(seconds[name][2:]) for name in runs}


def run(arguments: list[str]) -> None:
    """Measures and prints the rows; raises InputError for bad arguments."""
    config = parse_config([*arguments, *ANY_DATA])
    if config.num_cpu_threads is not None:
        torch.set_num_threads(config.num_cpu_threads)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    machine = f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"batches of {config.train_batch_size} on {machine}", flush=True)
    rows = []
    precisions = ["no", "bf16"] if config.mixed_precision == "auto" else [config.mixed_precision]
    tasks = ["training", "sampling"] if config.objective == "ddpm" else ["training"]
    for precision, task, name in itertools.product(precisions, tasks, NETWORKS):
        measured = measure(task, NETWORKS[name], replace(config, mixed_precision=precision), device)
        rows.append({"task": task, "network": name, "precision": precision} | measured)
        print(", ".join(map(number, rows[-1].values())), flush=True)
    print(table(rows, {name: name for name in COLUMNS}))


def main(arguments: list[str]) -> int:
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
