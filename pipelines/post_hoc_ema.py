"""Exports the model of a training run with an EMA length chosen after training.

    python -m pipelines.post_hoc_ema --run RUN_DIR --sigma_rel 0.075 [--step S] --out DIR

RUN_DIR is the output folder of a run with `--post_hoc_ema true`. The average at step S, by default the newest one, is
reconstructed from the snapshots in RUN_DIR/ema_snapshots and the checkpoints (`training/post_hoc_ema.py`) and written
as a model repository. Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C.
"""

import json
import math
import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import torch

from common import InputError, Parser, check_numbers, run_command
from pipelines.export import export_pipeline
from pipelines.loading import load_pipeline
from training.checkpoint import SNAPSHOTS, list_checkpoints, load_tensors, read_state, verify_checkpoint
from training.post_hoc_ema import LARGEST_SIGMA_REL, STORED, combine_profiles


def find_snapshots(run: Path, step: int | None) -> dict[int, Path]:
    """Step -> folder of the snapshots and checkpoints of a run up to `step`, in ascending order.

    Raises InputError if there is no snapshot of that step or the run kept no averages; Failed if one is damaged.
    """
    found = dict(sorted((list_checkpoints(run / SNAPSHOTS) | list_checkpoints(run)).items()))
    if step not in (None, *found):
        raise InputError(f"--step {step} has no snapshot in {run}; choose from {', '.join(map(str, found))}")
    found = {other: folder for other, folder in found.items() if step is None or other <= step}
    for folder in found.values():
        verify_checkpoint(folder)
    if not found or not read_state(found[max(found)])["identity"].get("post_hoc_ema"):
        raise InputError(f"--run {run} has no averages to reconstruct from; train with --post_hoc_ema true")
    return found


def reconstruct(snapshots: dict[int, Path], sigma_rel: float) -> tuple[dict[str, torch.Tensor], float]:
    """The average of length `sigma_rel` at the last snapshot, summed in float64, and its profile's relative error."""
    factors, error = combine_profiles([*snapshots], max(snapshots), sigma_rel)
    sums = defaultdict(float)
    for folder, row in zip(snapshots.values(), factors, strict=True):
        averages = load_tensors(folder, [*STORED])
        for stem, factor in zip(STORED, row, strict=True):
            for name, average in averages[stem].items():
                sums[name] += average.double() * factor  # snapshots are float16
    return {name: total.float() for name, total in sums.items()}, error


def parse_options(arguments: list[str]) -> Namespace:
    """Raises InputError."""
    parser = Parser(prog="python -m pipelines.post_hoc_ema", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="output folder of a run with --post_hoc_ema true")
    parser.add_argument(
        "--sigma_rel", type=float, required=True, help="EMA length: standard deviation / step, 0.01 to 0.28"
    )
    parser.add_argument("--step", type=int, help="step of a snapshot (default: the newest)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new model repository")
    options = parser.parse_args(arguments)
    check_numbers(options, {"sigma_rel": 0.01, "step": 1}, {"sigma_rel": LARGEST_SIGMA_REL})
    return options


def run(options: Namespace) -> None:
    snapshots, source = find_snapshots(options.run, options.step), options.run / "pipeline"
    pipeline = load_pipeline(source)
    weights, error = reconstruct(snapshots, options.sigma_rel)
    if weights.keys() != {name for name, weight in pipeline.unet.named_parameters() if weight.requires_grad}:
        raise InputError(f"the snapshots in {options.run} are from a different network than {source}")
    pipeline.unet.load_state_dict(weights, strict=False)  # frozen parameters have no averages
    step = max(snapshots)
    state = read_state(snapshots[step])
    sizes = (state["identity"][name] for name in ("train_batch_size", "gradient_accumulation_steps", "num_processes"))
    facts = json.loads((source / "training.json").read_text())
    facts |= {
        "step": step,
        "heldout": None,  # like samples and results, of the weights at the end of the run
        "samples_step": None,
        "train_seconds": state["progress"]["train_seconds"],
        "images_seen": state["progress"]["attempts"] * math.prod(sizes),
        "post_hoc_ema": {"sigma_rel": options.sigma_rel, "num_snapshots": len(snapshots), "profile_error": error},
    }
    training_config = (source / "training_config.yaml").read_text()
    export_pipeline(pipeline, options.out, facts=facts, training_config=training_config)
    print(
        f"wrote {options.out}: step {step}, sigma_rel {options.sigma_rel:g}, from {len(snapshots)} snapshots; the"
        f" relative error of its profile is {error:.2g}"
    )


def main(arguments: list[str]) -> int:
    return run_command(lambda: run(parse_options(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
