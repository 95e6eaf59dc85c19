"""How fast this machine trains and samples: our U-Net and UNet2DModel, eager and compiled, in both layouts.

    python -m experiments.bench --config configs/celeba64.yaml [--batch_sizes 64 128 256] [--precisions no bf16]
        [--only training:ours:compiled ...] [--out bench.json] [--flag ...]

A row is one combination. A training row times updates of the configured objective (forward, loss, backward, clipping,
AdamW, EMA) on random images that lie on the device; a sampling row times DDIM, by our pipeline or by the stock
DDIMPipeline. Every row runs in a process of its own, so one that runs out of memory, does not compile, dies or takes
too long is a row with the reason. Rows that need no compilation come first, and --out is written after each.

"Model FLOP/s" counts the multiplications and additions of forward and backward; its share is of the rate at which the
same device multiplies two large bf16 matrices. Exit codes: 0 done, 1 if no row succeeded, 2 bad input.
"""

import copy
import json
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import Failed, InputError, Parser, check_numbers, run_command
from custom_unet import CustomUNet2DModel
from eval.results import table, write_results
from experiments.unet_variants import VARIANTS
from pipelines import CustomUNetPipeline
from training.arguments import parse_config
from training.config import TrainConfig
from training.diffusion import diffusion_loss
from training.optimization import build_optimizer, update_ema
from training.precision import DTYPES, under_autocast

REPOSITORY = Path(__file__).resolve().parent.parent
NETWORKS = {"ours": CustomUNet2DModel, "diffusers": UNet2DModel}
TASKS, MODES, LAYOUTS = ("training", "sampling"), ("eager", "compiled"), ("channels_last", "contiguous")
WARM_UP_CALLS, WINDOWS = 3, 5  # the first call compiles; a rate is the median over the windows
MATMUL_SIZE, MATMULS = {"cuda": 8192, "cpu": 512}, 10
COLUMNS = {name: name for name in "task network mode layout precision".split()} | {
    "batch_size": "batch",
    "images_per_second": "images/s",
    "peak_memory_gib": "peak GiB",
    "model_tflops_per_second": "model TFLOP/s",
    "share_of_matmul": "share of the matmul rate",
}


@dataclass(frozen=True)
class Row:
    """One measurement; `Row("matmul")` is the matrix product that the others are compared with."""

    task: str
    network: str = "ours"
    mode: str = "eager"
    layout: str = "contiguous"
    precision: str = "no"  # a value of --mixed_precision
    batch_size: int = 1


def rows_of(options: Namespace, config: TrainConfig) -> list[Row]:
    """The rows that `--only` selects, in the order of measurement.

    Raises:
        InputError: for an unknown word.
    """
    rows = [
        Row(task, network, mode, layout, precision, batch_size)
        for mode in MODES
        for task in (TASKS if mode == "eager" and config.objective == "ddpm" else TASKS[:1])
        for precision in options.precisions
        for batch_size in options.batch_sizes
        for layout in LAYOUTS
        for network in NETWORKS
    ]
    known = {*NETWORKS, *TASKS, *MODES, *LAYOUTS, *DTYPES}
    selections = [set(selection.split(":")) for selection in options.only] or [set()]
    for word in set().union(*selections) - known:
        raise InputError(f"--only has {word!r}; give words out of {', '.join(sorted(known))}, joined by colons")
    return [row for row in rows if any(words <= set(asdict(row).values()) for words in selections)]


# ---- In the process of a row


def training_update(
    config: TrainConfig, network_class: type[nn.Module], device: torch.device | str
) -> Callable[[], None]:
    """One update of a new network and its EMA, as the trainer makes it, on images of noise."""
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    unet = network_class(**config.unet_kwargs()).train().to(device, memory_format=memory_format)
    ema_unet = copy.deepcopy(unet).requires_grad_(False)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.compile:
        unet.compile(fullgraph=True)
    optimizer, scheduler = build_optimizer(config, unet), config.noise_scheduler()
    shape = (config.train_batch_size, 3, config.resolution, config.resolution)
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


def sampling_call(config: TrainConfig, row: Row, num_inference_steps: int, device: torch.device) -> Callable:
    """Draws a batch with untrained weights, whose images cost as much as others."""
    unet = NETWORKS[row.network](**config.unet_kwargs()).eval()
    unet.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    scheduler = DDIMScheduler.from_config(config.noise_scheduler().config)
    pipeline = (CustomUNetPipeline if row.network == "ours" else DDIMPipeline)(unet, scheduler).to(device)
    pipeline.set_progress_bar_config(disable=True)
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[row.precision]

    def draw() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            pipeline(row.batch_size, generator, num_inference_steps=num_inference_steps, output_type="np")

    return draw


def calls_per_second(call: Callable, device: torch.device, seconds: float) -> list[float]:
    """The rate in each of `WINDOWS` windows that last `seconds` together, or one call each if that takes longer."""
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    for _ in range(WARM_UP_CALLS):
        call()
    rates = []
    for _ in range(WINDOWS):
        synchronize()
        calls, started_at_seconds = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - started_at_seconds < seconds / WINDOWS:
            call()
            calls += 1
        synchronize()
        rates.append(calls / (time.perf_counter() - started_at_seconds))
    return rates


def measure(row: Row, config: TrainConfig, options: Namespace) -> dict:
    """Images/s and peak memory of a row, or FLOP/s of a matrix product and the name of the device."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if row.task == "matmul":
        size = MATMUL_SIZE[device.type]
        a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
        rate = statistics.median(
            calls_per_second(lambda: [a @ b for _ in range(MATMULS)], device, options.seconds / WINDOWS)
        )
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {"device": name, "matmul_size": size, "matmul_flops_per_second": MATMULS * 2 * size**3 * rate}
    how = {"mixed_precision": row.precision, "train_batch_size": row.batch_size, "gradient_accumulation_steps": 1}
    how |= {"compile": row.mode == "compiled", "channels_last": row.layout == "channels_last"}
    config = replace(config, **how)
    if row.task == "training":
        call = training_update(config, NETWORKS[row.network], device)
    else:
        call = sampling_call(config, row, options.sampling_steps, device)
    rates = [rate * row.batch_size for rate in calls_per_second(call, device, options.seconds)]
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {"images_per_second": statistics.median(rates), "windows": rates, "peak_memory_gib": memory}


def answer(row: Row, config: TrainConfig, options: Namespace) -> None:
    """Prints the result of a row, or the first line of its error, as JSON."""
    if config.num_cpu_threads is not None:
        torch.set_num_threads(config.num_cpu_threads)
    try:
        result = measure(row, config, options)
    except Exception as error:  # of whatever kind, it is this row's alone
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        result = {"error": f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]}
    print(f"\n{json.dumps(result)}")


# ---- All rows


def measured_apart(row: Row, arguments: list[str], limit_seconds: float) -> dict:
    """What `answer` prints in a process of its own, or `{"error": reason}`."""
    command = [sys.executable, "-m", "experiments.bench", *arguments, "--row", json.dumps(asdict(row))]
    how = {"env": environment_of_a_child(), "stdout": subprocess.PIPE, "text": True, "timeout": limit_seconds}
    try:
        done = subprocess.run(command, **how)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {limit_seconds:g} s"}
    except (ValueError, IndexError):
        return {"error": f"the process died with exit code {done.returncode}"}


def environment_of_a_child() -> dict[str, str]:
    """The environment in which a process finds the modules of this repository from any folder."""
    search = filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join(search)}


def flops_per_image(config: TrainConfig, network: str) -> int:
    """Floating-point operations of forward and backward for one image, counted on tensors without memory."""
    with torch.device("meta"):
        unet = NETWORKS[network](**config.unet_kwargs())
        image = torch.zeros(1, 3, config.resolution, config.resolution)
    with FlopCounterMode(display=False) as counter:
        diffusion_loss(unet, config.noise_scheduler(), image, **config.loss_settings()).backward()
    return counter.get_total_flops()


def measure_all(config: TrainConfig, options: Namespace, arguments: list[str]) -> None:
    """Measures the rows one after the other, writes and prints them.

    Raises:
        InputError: for rows that do not exist.
        Failed: if no row succeeded.
    """
    rows, results = rows_of(options, config), []
    flops = {name: flops_per_image(config, name) for name in NETWORKS}
    record = {"config": options.config.name, "objective": config.objective, "resolution": config.resolution}
    record |= {"sampling_steps": options.sampling_steps, "num_threads": config.num_cpu_threads}
    record |= {"torch": torch.__version__, "diffusers": diffusers.__version__, "flops_per_image": flops}
    record |= measured_apart(Row("matmul"), arguments, options.row_seconds)
    print(", ".join(f"{name} {value}" for name, value in record.items()), flush=True)
    for row in rows:
        result = measured_apart(row, arguments, options.row_seconds)
        if row.task == "training" and "error" not in result:
            flops_per_second = result["images_per_second"] * flops[row.network]
            result["model_tflops_per_second"] = flops_per_second / 1e12
            if "matmul_flops_per_second" in record:
                result["share_of_matmul"] = flops_per_second / record["matmul_flops_per_second"]
        results.append(asdict(row) | result)
        outcome = result.get("error") or f"{result['images_per_second']:,.1f} images/s"
        print(f"{' '.join(map(str, asdict(row).values()))}: {outcome}", flush=True)
        if options.out is not None:
            write_results(options.out, record | {"results": results})
    reasons = [{"images_per_second": row["error"].replace("|", "/")} if "error" in row else {} for row in results]
    print(table([row | reason for row, reason in zip(results, reasons, strict=True)], COLUMNS))
    if all("error" in row for row in results):
        raise Failed("no row could be measured; the table says why")


def run(arguments: list[str]) -> None:
    """Raises as `measure_all`, and InputError for bad arguments."""
    parser = Parser(prog="python -m experiments.bench", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--config", type=Path, required=True, help="YAML file of a training; further flags are those of train_unet.py")
    add("--batch_sizes", type=int, nargs="+", help="images at once (default: train_batch_size)")
    add("--precisions", nargs="+", choices=DTYPES, help="default: mixed_precision of the configuration")
    add("--only", nargs="+", default=[], help="rows to measure, such as training:ours:compiled:channels_last")
    add("--seconds", type=float, default=5, help="measured in each row, after its warm-up (default 5)")
    add("--row_seconds", type=float, default=180, help="limit of a row, its compilation included (default 180)")
    add("--sampling_steps", type=int, default=10, help="DDIM steps of a sampling row (default 10)")
    add("--out", type=Path, help="JSON file, written after each row")
    add("--row", help="measure this row, given as JSON, and print the result (used by the command itself)")
    options, flags = parser.parse_known_args(arguments)
    check_numbers(options, {"batch_sizes": 1, "sampling_steps": 1, "seconds": 1e-3, "row_seconds": 1e-3}, {})
    if options.out is not None and not options.out.parent.is_dir():
        raise InputError(f"--out {options.out}: the folder {options.out.parent} does not exist; create it first")
    data = ["--train_data_dir", "null", "--dataset_name", "synthetic-faces"]  # none are opened
    config = parse_config(["--config", str(options.config), *flags, *data])
    options.batch_sizes = options.batch_sizes or [config.train_batch_size]
    auto = ["no", "bf16"] if config.mixed_precision == "auto" else [config.mixed_precision]
    options.precisions = options.precisions or auto
    if options.row is not None:
        answer(Row(**json.loads(options.row)), config, options)
    else:
        measure_all(config, options, arguments)


# ---- For studies of equal time


def measure_speeds(trainings: dict[str, tuple[TrainConfig, str | None]], num_updates: int = 9) -> dict[str, float]:
    """Images/s in training by name: the median over updates that they make by turns, on the CPU with all threads.

    Args:
        trainings: the configuration of each, whose precision is not `auto`, and its network of
            `experiments.unet_variants`.
        num_updates: of each, after two that warm it up.
    """
    updates, seconds = {}, {name: [] for name in trainings}
    for name, (config, network) in trainings.items():
        updates[name] = training_update(config, CustomUNet2DModel if network is None else VARIANTS[network], "cpu")
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
