"""Measures training and sampling speed on this machine: our U-Net and UNet2DModel, eager and compiled, both layouts.

    python -m experiments.bench --config configs/celeba64.yaml [--precisions no bf16]
        [--only training:ours:compiled ...] [--flag value ...]

Each row is one combination. A training row times updates of the configured objective (forward, loss, backward,
clipping, AdamW, EMA) on random images on the device, and compares their operations per second with a matrix product in
the same precision. A sampling row times DDIM by our pipeline or the stock DDIMPipeline. A row that runs out of memory
or does not compile shows the reason. Rows that need no compilation come first. All other flags are those of
train_unet.py, such as --train_batch_size. Exit codes: 0 done, 1 if no row succeeded, 2 bad input.
"""

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from common import Failed, InputError, Parser, one_line, run_command
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
TASKS, MODES, LAYOUTS = ("training", "sampling"), ("eager", "compiled"), ("channels_last", "contiguous")
WARM_UP_CALLS, MEASURED_SECONDS, SAMPLING_STEPS = 3, 5.0, 10  # the first call compiles
SHARE = "share of the matmul rate"
COLUMNS = {name: name for name in ("task", "network", "mode", "layout", "precision", "images/s", "peak GiB", SHARE)}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def rows_of(config: TrainConfig, precisions: list[str], only: list[str]) -> list[dict[str, str]]:
    """The rows selected by `--only`, in the order of measurement.

    Raises:
        InputError: if `--only` has an unknown word.
    """
    known = {*NETWORKS, *TASKS, *MODES, *LAYOUTS, *DTYPES}
    selections = [set(selection.split(":")) for selection in only] or [set()]
    for word in set().union(*selections) - known:
        raise InputError(f"--only has {word!r}; choose from {', '.join(sorted(known))}, joined by colons")
    rows = []
    for mode, task, precision, layout, network in itertools.product(MODES, TASKS, precisions, LAYOUTS, NETWORKS):
        row = {"task": task, "network": network, "mode": mode, "layout": layout, "precision": precision}
        is_possible = task == "training" or (mode == "eager" and config.objective == "ddpm")
        if is_possible and any(words <= set(row.values()) for words in selections):
            rows.append(row)
    return rows


def training_update(
    config: TrainConfig, network_class: type[nn.Module], device: torch.device | str
) -> Callable[[], None]:
    """Returns a function that updates a new network and its EMA as the trainer does, on random images."""
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    unet = network_class(**config.unet_kwargs()).train().to(device, memory_format=memory_format)
    ema_unet = copy.deepcopy(unet).requires_grad_(False)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.compile:
        unet.compile(fullgraph=True)
    optimizer, scheduler = build_optimizer(config, unet), config.noise_scheduler()
    shape = (config.train_batch_size, *config.image_shape)
    clean_images = torch.rand(shape, device=device).mul_(2).sub_(1).to(memory_format=memory_format)
    called = partial(under_autocast, unet, DTYPES[config.mixed_precision])

    def update() -> None:
        for _ in range(config.gradient_accumulation_steps):
            diffusion_loss(called, scheduler, clean_images, **config.loss_settings()).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema_unet, unet, config.ema_max_decay)

    return update


def sampling_call(config: TrainConfig, network_class: type[nn.Module], device: torch.device) -> Callable[[], None]:
    """Returns a function that draws a batch with untrained weights; the cost does not depend on them."""
    unet = network_class(**config.unet_kwargs()).eval()
    unet.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
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


@cache
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the product of two square matrices."""
    size = MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=1).median


def measure(row: dict[str, str], config: TrainConfig, device: torch.device) -> dict[str, float]:
    """Images/s (median over calls after a warm-up), peak memory on a GPU, and for training the matmul-rate share."""
    how = {"mixed_precision": row["precision"], "compile": row["mode"] == "compiled"}
    how |= {"channels_last": row["layout"] == "channels_last", "gradient_accumulation_steps": 1}
    config = replace(config, **how)
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    prepare = training_update if row["task"] == "training" else sampling_call
    call = prepare(config, NETWORKS[row["network"]], device)
    for _ in range(WARM_UP_CALLS):
        call()
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    rate = config.train_batch_size / timer.blocked_autorange(min_run_time=MEASURED_SECONDS).median
    result = {"images/s": rate}
    if device.type == "cuda":
        result["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    if row["task"] == "training":
        peak = matmul_flops_per_second(device, DTYPES[config.mixed_precision])
        result[SHARE] = rate * flops_per_image(config) / peak
    return result


def run(arguments: list[str]) -> None:
    """Measures the rows one by one and prints them.

    Raises:
        InputError: for bad arguments.
        Failed: if no row succeeded.
    """
    parser = Parser(prog="python -m experiments.bench", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a training configuration")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, help="default: from the configuration")
    parser.add_argument("--only", nargs="+", default=[], help="rows, such as training:ours:compiled:channels_last")
    options, flags = parser.parse_known_args(arguments)
    config = parse_config(["--config", str(options.config), *flags, *ANY_DATA])
    configured = ["no", "bf16"] if config.mixed_precision == "auto" else [config.mixed_precision]
    rows = rows_of(config, options.precisions or configured, options.only)
    if config.num_cpu_threads is not None:
        torch.set_num_threads(config.num_cpu_threads)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    machine = f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{options.config.name}, batches of {config.train_batch_size}, on {machine}", flush=True)
    for row in rows:
        try:
            row |= measure(row, config, device)
        except Exception as error:  # any error concerns only this row
            row["images/s"] = f"{type(error).__name__}: {one_line(error)}"[:200].replace("|", "/")
        print(", ".join(map(number, row.values())), flush=True)
    print(table(rows, COLUMNS))
    if all(isinstance(row["images/s"], str) for row in rows):
        raise Failed("no row could be measured; the table says why")


def measure_speeds(trainings: dict[str, tuple[TrainConfig, str]], num_updates: int = 9) -> dict[str, float]:
    """Training images/s by name: the median over interleaved updates on the CPU with all threads.

    Args:
        trainings: the configuration, whose precision is not `auto`, and the name of the network in
            `experiments.unet_variants`.
        num_updates: updates per training, after two warm-up updates.
    """
    updates = {
        name: training_update(config, VARIANTS[network], "cpu") for name, (config, network) in trainings.items()
    }
    seconds = {name: [] for name in trainings}
    for _ in range(2 + num_updates):
        for name, update in updates.items():
            started_at_seconds = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - started_at_seconds)
    return {
        name: config.train_batch_size * config.gradient_accumulation_steps / statistics.median(seconds[name][2:])
        for name, (config, _) in trainings.items()
    }


def main(arguments: list[str]) -> int:
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
