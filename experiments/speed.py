"""How fast training and sampling are beside plain diffusers: images per second of both, and their ratio.

    python -m experiments.speed --config configs/celeba32_cpu.yaml [--steps 40] [--rounds 3] [--out speed.json]
        [--flag ...]

Three variants take turns in every round, so that a machine that slows down slows all of them:

    ours       training: `train_unet.py` as configured; sampling: CustomUNetPipeline on what it exported, under the
               autocast of the trainer's own grids
    ours_fp32  the same with --mixed_precision no, to compare like with like
    plain      training: experiments/plain_loop.py, around UNet2DModel in fp32; sampling: DDIMPipeline with
               UNet2DModel in fp32, from the same folder

Every training is a process of its own, and only its updates count, without the first eighth of them.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from common import Failed, InputError
from pipelines import CustomUNetPipeline
from training.config import TrainConfig, parse_config
from training.data import open_image_store
from training.run_log import read_log

REPOSITORY = Path(__file__).resolve().parent.parent
VARIANTS = ("ours", "ours_fp32", "plain")
AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
NEVER = 10**9  # steps


def training_throughput(records: list[dict]) -> float:
    """Images per second of updates, from the log of a run; the updates up to its first record are warm-up.

    Args:
        records: of `log.jsonl`; those with `train_seconds` (time spent in updates so far) and `images_seen` count.

    Raises:
        Failed: if less than two of them count.
    """
    records = [record for record in records if "train_seconds" in record]
    if len(records) < 2:
        raise Failed(f"the run has {len(records)} log records with times; two are needed")
    first, last = records[0], records[-1]
    return (last["images_seen"] - first["images_seen"]) / (last["train_seconds"] - first["train_seconds"])


def comparison(rounds: dict[str, list[float]]) -> dict:
    """Medians over the rounds (images per second) of each variant and the ratios of ours to plain.

    Args:
        rounds: images per second of each round, by variant.
    """
    medians = {name: statistics.median(rounds[name]) for name in VARIANTS}
    return {
        "images_per_second": {name: {"median": medians[name], "rounds": rounds[name]} for name in VARIANTS},
        "ratio_as_configured": medians["ours"] / medians["plain"],
        "ratio_fp32": medians["ours_fp32"] / medians["plain"],
    }


def measure_training(config: TrainConfig, variant: str, folder: Path) -> float:
    """Images per second of one training of a variant, in a process of its own that writes to the folder.

    Raises:
        Failed: if the process fails, with the last line that it wrote.
    """
    folder.mkdir()
    precision = config.mixed_precision if variant == "ours" else "no"
    config = dataclasses.replace(config, output_dir=str(folder), mixed_precision=precision)
    path = folder / "speed.yaml"
    path.write_text(config.to_yaml())
    command = ["-m", "experiments.plain_loop"] if variant == "plain" else [str(REPOSITORY / "train_unet.py")]
    python_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *command, "--config", str(path)],
        env=os.environ | {"PYTHONPATH": python_path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"the training of {variant!r} failed with exit code {done.returncode}: {last_line}")
    return training_throughput(read_log(folder / "log.jsonl"))


def compare_sampling(
    config: TrainConfig, folder: Path, batch_size: int, num_inference_steps: int, num_rounds: int
) -> dict:
    """Images per second of DDIM sampling from a pipeline folder; see `comparison`."""
    device = Accelerator(mixed_precision="no").device
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    ours = CustomUNetPipeline.from_pretrained(folder).to(device)
    ours.scheduler = scheduler
    if config.channels_last:
        ours.unet.to(memory_format=torch.channels_last)
    plain = DDIMPipeline(UNet2DModel.from_pretrained(folder, subfolder="unet"), scheduler).to(device)
    rounds = {name: [] for name in VARIANTS}
    for number in range(num_rounds + 1):  # the first one is warm-up
        for name in VARIANTS:
            pipeline = plain if name == "plain" else ours
            pipeline.set_progress_bar_config(disable=True)
            dtype = AUTOCAST[config.mixed_precision] if name == "ours" else None
            generator = torch.Generator().manual_seed(number)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                started_at_seconds = time.perf_counter()
                pipeline(batch_size, generator, num_inference_steps=num_inference_steps, output_type="np")
                seconds = time.perf_counter() - started_at_seconds
            if number > 0:
                rounds[name].append(batch_size / seconds)
    return comparison(rounds)


def measured_config(arguments: list[str], steps: int) -> tuple[TrainConfig, bool]:
    """The configuration cut down to updates alone, and whether the synthetic faces stand in for a missing source.

    Raises:
        InputError: as `parse_config`, and for what plain diffusers does not train.
    """
    stands_in = False
    try:
        config = parse_config(arguments)
    except InputError as error:
        try:
            config = parse_config([*arguments, "--dataset_name", "synthetic-faces", "--crop", "none"])
        except InputError:
            raise error from None  # something else is wrong
        stands_in = True
    if config.mixed_precision == "auto":
        raise InputError("--mixed_precision auto has no fixed precision to compare; take no, fp16 or bf16")
    if config.objective != "ddpm" or config.label_column is not None:
        raise InputError("plain diffusers trains ddpm without classes: take --objective ddpm, no --label_column")
    length = {"max_train_steps": steps, "num_epochs": None, "max_train_minutes": None}
    intervals = dict.fromkeys(("checkpointing_steps", "validation_steps", "save_images_steps"), NEVER)
    last_grid = {"eval_batch_size": 1, "ddpm_num_inference_steps": 1}
    rest = {"gradient_accumulation_steps": 1, "validation_split": None, "report_to": "none", "dry_run": False}
    rest |= {"logging_steps": max(1, steps // 8), "resume_from_checkpoint": "latest"}
    rest |= {"num_cpu_threads": config.num_cpu_threads or torch.get_num_threads()}
    return dataclasses.replace(config, **length, **intervals, **last_grid, **rest), stands_in


def measure(config: TrainConfig, options: argparse.Namespace) -> dict:
    """Both comparisons, `training` and `sampling`."""
    with tempfile.TemporaryDirectory(prefix="speed-") as temporary:
        rounds = {name: [] for name in VARIANTS}
        for number in range(1, options.rounds + 1):
            for name in VARIANTS:
                rounds[name].append(measure_training(config, name, Path(temporary) / f"{name}-{number}"))
                print(f"round {number}, training, {name}: {rounds[name][-1]:.2f} images/s", flush=True)
        folder = Path(temporary) / "ours-1" / "pipeline"
        sampling = compare_sampling(
            config, folder, options.sampling_batch_size, options.sampling_steps, options.rounds
        )
        return {"training": comparison(rounds), "sampling": sampling}


def table(result: dict, mixed_precision: str) -> str:
    """Markdown: the median rates of each variant, and their ratio to plain diffusers."""
    titles = {
        "ours": f"this project as configured ({mixed_precision})",
        "ours_fp32": "this project in fp32",
        "plain": "diffusers in fp32",
    }
    ratios = {"ours": "ratio_as_configured", "ours_fp32": "ratio_fp32"}
    lines = ["| images/s, median | training | ratio | sampling | ratio |", "|---|---|---|---|---|"]
    for name in VARIANTS:
        cells = [titles[name]]
        for what in ("training", "sampling"):
            ratio = result[what][ratios[name]] if name in ratios else 1.0
            cells += [f"{result[what]['images_per_second'][name]['median']:.1f}", f"{ratio:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def parse_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and the remaining flags, which are those of `train_unet.py`."""
    parser = Parser(
        prog="python -m experiments.speed",
        description="Compares the speed with plain diffusers. Further flags are those of train_unet.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=40, help="updates of each training, an eighth of them warm-up")
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant is measured")
    parser.add_argument("--sampling_batch_size", type=int, default=16, help="images sampled at once")
    parser.add_argument("--sampling_steps", type=int, default=10, help="DDIM steps")
    parser.add_argument("--out", type=Path, help="JSON file to write; the table goes beside it, as .md")
    options, flags = parser.parse_known_args(arguments)
    smallest = {"steps": 2, "rounds": 1, "sampling_batch_size": 1, "sampling_steps": 1}
    for name, least in smallest.items():
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least {least}")
    if options.out is not None and (options.out.suffix != ".json" or options.out.is_dir()):
        parser.error(f"--out {options.out} is no JSON file; name one that ends in .json")
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.parent} does not exist")
    return options, flags


def main(arguments: list[str]) -> int:
    options, flags = parse_options(arguments)
    try:
        config, stands_in = measured_config(flags, options.steps)
        if stands_in:
            print("no data source given: taking synthetic-faces without a crop")
        store = open_image_store(**config.data_source(), split=config.split, max_images=config.max_images)
        torch.set_num_threads(config.num_cpu_threads)
        result = measure(config, options)
    except (InputError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    facts = {
        "config": next((f for f in flags if f.endswith((".yaml", ".yml"))), "configs/quickstart.yaml"),
        "source": store.description["source"],
        "resolution": config.resolution,
        "mixed_precision": config.mixed_precision,
        "train_batch_size": config.train_batch_size,
        **{name: getattr(options, name) for name in ("steps", "rounds", "sampling_batch_size", "sampling_steps")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    text = table(result, config.mixed_precision)
    print(text)
    if options.out is not None:
        options.out.write_text(json.dumps(facts | result, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
