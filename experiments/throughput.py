"""How fast one training step is on this machine: our network and diffusers', eager and compiled, in both layouts.

    python -m experiments.throughput --config configs/celeba64.yaml [--batch_sizes 64 128 256] [--seconds 5]
        [--only ours:compiled:channels_last ...] [--out throughput.json] [--flag ...]

A step is forward, loss, backward, clipping, AdamW and EMA, made of the trainer's own parts in the precision of the
configuration, on random images that lie on the device. A row of the result is one combination at one batch size. The
rows are measured in another process, so one that runs out of memory, does not compile, dies or takes too long is a
row with the reason. What needs no compilation comes first; the file is written after each row, as the machine may be
taken away.

"Model FLOP/s" counts the multiplications and additions that forward and backward must make, whatever the program
does; its share is of the rate at which the same device multiplies two large bf16 matrices.
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from common import InputError, Parser
from custom_unet import CustomUNet2DModel
from training.config import TrainConfig, parse_config
from training.diffusion import diffusion_loss, make_noise_scheduler
from training.optimization import build_optimizer, ema_decay, learning_rate_schedule, update_ema
from training.processes import build_accelerator

NETWORKS = {"ours": CustomUNet2DModel, "diffusers": UNet2DModel}
MODES = ("eager", "compiled")
LAYOUTS = ("channels_last", "contiguous")
WARMUP_STEPS = 3  # the first one compiles
WINDOWS = 5  # the median is over these
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
MATMULS = 10  # between two waits for the device
GIB = 2**30


@dataclass(frozen=True)
class Variant:
    """One row: which network, how it runs, how its memory is laid out, images per step."""

    network: str
    mode: str
    layout: str
    batch_size: int

    def __str__(self) -> str:
        return f"{self.network}:{self.mode}:{self.layout}, batch {self.batch_size}"


def variants(batch_sizes: list[int], only: list[str]) -> list[Variant]:
    """The rows in the order of measurement: what needs no compilation first, then by the order of the batch sizes.

    Args:
        only: selections such as `ours:compiled:channels_last` or `eager`; a row is taken if it has every word of one
            of them. All rows without any.

    Raises:
        InputError: for a word that is none of the names.
    """
    words = {*NETWORKS, *MODES, *LAYOUTS}
    for word in (word for selection in only for word in selection.split(":")):
        if word not in words:
            raise InputError(f"--only has {word!r}; it takes words of {', '.join(sorted(words))}, joined by colons")
    rows = [
        Variant(network, mode, layout, batch_size)
        for mode in MODES
        for batch_size in batch_sizes
        for layout in LAYOUTS
        for network in NETWORKS
    ]
    chosen = [set(selection.split(":")) for selection in only] or [set()]
    return [row for row in rows if any(words <= {row.network, row.mode, row.layout} for words in chosen)]


def read_config(flags: list[str]) -> TrainConfig:
    """The configuration of one step. No data is opened, so none has to be given.

    Raises:
        InputError: as `parse_config`, or if the network cannot be built.
    """
    if not any(flag.startswith("--train_data_dir") for flag in flags):
        flags = [*flags, "--train_data_dir", "null", "--dataset_name", "synthetic-faces"]
    config = parse_config(flags)
    if config.mixed_precision == "auto":
        raise InputError("--mixed_precision auto has no fixed precision to measure; choose no, fp16 or bf16")
    try:
        with torch.device("meta"):
            CustomUNet2DModel(**config.unet_kwargs())
    except ValueError as error:
        raise InputError(str(error)) from error
    alone = {"gradient_accumulation_steps": 1, "report_to": "none"}
    alone |= {"num_cpu_threads": config.num_cpu_threads or torch.get_num_threads()}
    return dataclasses.replace(config, max_train_steps=config.max_train_steps or config.lr_warmup_steps + 1, **alone)


def noise_scheduler(config: TrainConfig):
    names = "ddpm_num_steps ddpm_beta_schedule beta_start beta_end prediction_type rescale_betas_zero_snr".split()
    return make_noise_scheduler(*(getattr(config, name) for name in names))


def flops_per_image(config: TrainConfig, network: str) -> int:
    """Floating-point operations of forward and backward for one image, counted on a network without data."""
    with torch.device("meta"):
        unet = NETWORKS[network](**config.unet_kwargs())
        image = torch.zeros(1, 3, config.resolution, config.resolution)
    with FlopCounterMode(display=False) as counter:
        diffusion_loss(unet, noise_scheduler(config), image, **config.loss_settings()).backward()
    return counter.get_total_flops()


def build_step(config: TrainConfig, network: str) -> tuple[Callable[[], None], torch.device]:
    """One update as `train_unet.py` makes it, on random images, and the device that it runs on."""
    accelerator = build_accelerator(config)
    torch.manual_seed(config.seed)
    unet = NETWORKS[network](**config.unet_kwargs()).train()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    unet.to(accelerator.device, memory_format=memory_format)
    ema_unet = copy.deepcopy(unet).eval().requires_grad_(False)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    prepared, optimizer = accelerator.prepare(unet, build_optimizer(config, unet))
    scheduler = noise_scheduler(config)
    learning_rate_at = learning_rate_schedule(config, config.max_train_steps)
    shape = (config.train_batch_size, 3, config.resolution, config.resolution)
    clean_images = torch.rand(shape, device=accelerator.device).mul_(2).sub_(1).to(memory_format=memory_format)
    decay = ema_decay(config.lr_warmup_steps, config.ema_inv_gamma, config.ema_power, config.ema_max_decay)

    def step() -> None:
        accelerator.backward(diffusion_loss(prepared, scheduler, clean_images, **config.loss_settings()))
        grad_norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        bool(torch.isfinite(grad_norm))  # the trainer waits for it as well
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(config.lr_warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema_unet, unet, decay)

    return step, accelerator.device


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calls_per_second(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """The rate of each of `WINDOWS` windows that last `seconds` together, or a call each if that is longer.

    Args:
        call: waits for the device at least once, so that no long queue builds up.
    """
    rates = []
    for _ in range(WINDOWS):
        synchronize(device)
        calls, started_at_seconds = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - started_at_seconds < seconds / WINDOWS:
            call()
            calls += 1
        synchronize(device)
        rates.append(calls / (time.perf_counter() - started_at_seconds))
    return rates


def measure_step(config: TrainConfig, variant: Variant, seconds: float) -> dict:
    """Images per second and peak memory of one variant."""
    gc.collect()  # the network of the row before
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    compiled, channels_last = variant.mode == "compiled", variant.layout == "channels_last"
    config = dataclasses.replace(
        config, compile=compiled, channels_last=channels_last, train_batch_size=variant.batch_size
    )
    started_at_seconds = time.perf_counter()
    step, device = build_step(config, variant.network)
    for _ in range(WARMUP_STEPS):
        step()
    synchronize(device)
    warmup_seconds = time.perf_counter() - started_at_seconds
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rates = [rate * variant.batch_size for rate in calls_per_second(step, device, seconds)]
    peak_memory_gib = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    return {
        "images_per_second": statistics.median(rates),
        "windows_images_per_second": rates,
        "peak_memory_gib": peak_memory_gib,
        "warmup_seconds": warmup_seconds,
    }


def measure_matmul(config: TrainConfig, seconds: float) -> dict:
    """FLOP/s of a large bf16 matrix product on random numbers, and what the device is."""
    device = build_accelerator(dataclasses.replace(config, compile=False)).device
    size = MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(MATMULS):
            a @ b
        synchronize(device)

    products()
    rate = MATMULS * statistics.median(calls_per_second(products, device, seconds))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "matmul_size": size, "matmul_flops_per_second": 2 * size**3 * rate}


def attempt(measure: Callable[..., dict], arguments: tuple) -> dict:
    """The result of `measure(*arguments)`, or `{"error": the reason in one line}`."""
    try:
        return measure(*arguments)
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {first_line(error)}"}
    except Exception as error:  # of whatever kind, it is this row's alone
        return {"error": f"{type(error).__name__}: {first_line(error)}"}


def first_line(error: Exception) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), "no message")


def serve(connection: Connection) -> None:
    """In the worker's process: measures what it is told to until the other end is closed."""
    with contextlib.suppress(EOFError):
        while True:
            connection.send(attempt(*connection.recv()))


class Worker:
    """A process that measures, so that nothing it suffers can end the rest; after a failure a new one takes over.

    It is spawned: importing diffusers has touched the GPU already, which no forked process can use then.
    """

    process = None

    def run(self, measure: Callable[..., dict], arguments: tuple, limit_seconds: float) -> dict:
        """`measure(*arguments)` in the process: its result, or `{"error": the reason in one line}`."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, other_end = context.Pipe()
            self.process = context.Process(target=serve, args=(other_end,))
            self.process.start()
            other_end.close()  # so that the end of the process ends the waiting
        try:
            self.connection.send((measure, arguments))
            finished = self.connection.poll(limit_seconds)
            result = self.connection.recv() if finished else {"error": f"took more than {limit_seconds:g} s"}
        except (EOFError, ConnectionError):
            self.process.join()
            result = {"error": f"the process died with exit code {self.process.exitcode}"}
        if "error" in result:
            self.stop()
        return result

    def stop(self) -> None:
        if self.process is not None:
            self.connection.close()
            self.process.join(timeout=2)  # an idle one ends by itself
            self.process.kill()
            self.process.join()
            self.process = None


def measure_all(config: TrainConfig, rows: list[Variant], options: argparse.Namespace, save: Callable) -> list[dict]:
    """Measures the rows one after the other.

    Args:
        save: called with facts of the machine and the rows so far, after each row.
    """
    deadline_seconds = time.monotonic() + options.total_seconds
    facts = {f"flops_per_image_{name}": flops_per_image(config, name) for name in {row.network: 0 for row in rows}}
    worker, results = Worker(), []

    def run(measure: Callable[..., dict], *arguments) -> dict:
        seconds_left = deadline_seconds - time.monotonic()
        if seconds_left <= 0:
            return {"error": f"not begun: --total_seconds {options.total_seconds:g} are over"}
        return worker.run(measure, arguments, round(min(options.row_seconds, seconds_left), 1))

    try:
        matmul = run(measure_matmul, config, options.seconds / WINDOWS)
        facts |= {"matmul_error": matmul["error"]} if "error" in matmul else matmul
        print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
        for row in rows:
            if row.mode == "compiled":
                worker.stop()  # else a second batch size would be compiled for all sizes, unlike in a training
            result = run(measure_step, config, row, options.seconds)
            if "error" not in result:
                flops = result["images_per_second"] * facts[f"flops_per_image_{row.network}"]
                result["model_flops_per_second"] = flops
                if "matmul_flops_per_second" in facts:
                    result["share_of_matmul"] = flops / facts["matmul_flops_per_second"]
            results.append(dataclasses.asdict(row) | result)
            outcome = result.get("error") or f"{result['images_per_second']:,.1f} images/s"
            print(f"{row}: {outcome}", flush=True)
            save(facts, results)
    finally:
        worker.stop()
    return results


def table(rows: list[dict]) -> str:
    """Rows of the result as Markdown; what failed has its reason in place of the speed."""
    lines = [
        "| network | mode | layout | batch | images/s | peak GiB | model TFLOP/s | of the matmul rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"| {row['network']} | {row['mode']} | {row['layout']} | {row['batch_size']} |"
        if "error" in row:
            lines.append(f"{name} {row['error'].replace('|', '/')} | | | |")
            continue
        memory = "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f}"
        share = f"{row['share_of_matmul']:.0%}" if "share_of_matmul" in row else ""
        flops = row["model_flops_per_second"] / 1e12
        lines.append(f"{name} {row['images_per_second']:,.1f} | {memory} | {flops:.3g} | {share} |")
    return "\n".join(lines)


def parse_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and the remaining flags, which are those of `train_unet.py`."""
    parser = Parser(
        prog="python -m experiments.throughput",
        description="Measures a training step on this machine. Further flags are those of train_unet.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="images per step (default: train_batch_size)")
    parser.add_argument("--seconds", type=float, default=5, help="time measured in each row, after its warm-up")
    parser.add_argument("--row_seconds", type=float, default=120, help="limit of a row, its compilation included")
    parser.add_argument("--total_seconds", type=float, default=150, help="no row goes on beyond this")
    parser.add_argument("--only", nargs="+", default=[], help="rows to take, such as ours:compiled:channels_last")
    parser.add_argument("--out", type=Path, help="JSON file, written after each row")
    options, flags = parser.parse_known_args(arguments)
    for name in ("seconds", "row_seconds", "total_seconds"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} is {getattr(options, name):g}; it must be positive")
    for batch_size in options.batch_sizes or []:
        if batch_size < 1:
            parser.error(f"--batch_sizes has {batch_size}; it must be at least 1")
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.parent} does not exist")
    return options, flags


def main(arguments: list[str]) -> int:
    options, flags = parse_options(arguments)
    try:
        config = read_config(flags)
        rows = variants(options.batch_sizes or [config.train_batch_size], options.only)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    setting = {
        "config": next((f for f in flags if f.endswith((".yaml", ".yml"))), "configs/quickstart.yaml"),
        "resolution": config.resolution,
        "mixed_precision": config.mixed_precision,
        "gradient_checkpointing": config.gradient_checkpointing,
        "seconds": options.seconds,
        "num_threads": config.num_cpu_threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "diffusers": diffusers.__version__,
    }

    def save(facts: dict, results: list[dict]) -> None:
        if options.out is not None:
            temporary = options.out.with_name(f".tmp-{options.out.name}")
            temporary.write_text(json.dumps(setting | facts | {"rows": results}, indent=2) + "\n")
            temporary.replace(options.out)

    results = measure_all(config, rows, options, save)
    print(table(results))
    return 0 if any("error" not in row for row in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
