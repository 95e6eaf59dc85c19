"""What came of a training as it went on: losses from its log, SWD and memorisation of its checkpoints' EMA networks.

    python -m experiments.curves --run RUN_DIR --reference DATA --out runs/curves/NAME [--num_images 1024] [--every 2]

RUN_DIR is the output folder of a training that kept its checkpoints (`--checkpoints_total_limit null`). Each is laid
in OUT/step-N as a pipeline folder and measured by `eval.run`; OUT/curves.json has all figures against the images seen,
OUT/curves.md a table, OUT/curves.png the curves. Started again, the command measures what is new. Of a run that began
with the weights of another's last checkpoint, `--after CURVES_JSON` of that one makes the two one curve. Exit codes:
0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C.
"""

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from common import MOST_THREADS, InputError, Parser, check_numbers, run_command
from eval.figures import plot_panels
from eval.results import number, read_results, write_results
from eval.run import parse_options as parse_evaluation
from eval.run import run as evaluate
from pipelines.export import export_variant
from pipelines.loading import DTYPES, load_pipeline
from training.checkpoint import check_tensors, checksum, list_checkpoints, load_checkpoint, verify_checkpoint
from training.facts import progress_facts
from training.run_log import read_log

MEASURED = {  # key in a row: metric and end of its name in results.json
    "swd": ("swd", "SWD, mean"),
    "memorisation_ratio": ("memorisation_ratio", "(median)"),
}
LOSSES = ("loss", "heldout_loss", *(f"heldout_loss_q{q}" for q in (1, 2, 3, 4)))
COLUMNS = {
    "images_seen": "images seen",
    "heldout_loss": "held-out loss",
    **{f"heldout_loss_q{q}": f"q{q}" for q in (1, 2, 3, 4)},
    "swd": "SWD",
    "memorisation_ratio": "nearest training image, generated / held-out",
}


def lay_out(checkpoint: Path, pipeline_dir: Path, out: Path) -> None:
    """The pipeline folder of a run with the EMA network of one of its checkpoints.

    Raises:
        Failed: if the checkpoint is damaged or of another network.
        InputError: if the pipeline folder is damaged.
    """
    verify_checkpoint(checkpoint)
    tensors, state = load_checkpoint(checkpoint, ["ema_unet"])
    pipeline = load_pipeline(pipeline_dir, "fp32", None)
    check_tensors(checkpoint / "ema_unet.safetensors", tensors["ema_unet"], pipeline.unet.state_dict())
    pipeline.unet.load_state_dict(tensors["ema_unet"])
    export_variant(pipeline, pipeline_dir, out, progress_facts(state))


def images_seen_at(log: list[dict]) -> dict[int, int]:
    """Images seen by step; what the log says of lost updates tells nothing of them."""
    return {record["step"]: record["images_seen"] for record in log if "images_seen" in record}


def choose(options: Namespace, log: list[dict]) -> dict[int, Path]:
    """The checkpoints to measure, by step; the last one is among them.

    Raises:
        InputError: if there is none, no pipeline folder, or the log is not that of this run.
    """
    checkpoints = [*list_checkpoints(options.run).items()]
    chosen = dict(checkpoints[:: -options.every][::-1])
    if not chosen:
        raise InputError(f"--run {options.run} has no checkpoints; train with --checkpoints_total_limit null")
    if not (options.run / "pipeline" / "training.json").is_file():
        raise InputError(f"--run {options.run} has no pipeline folder; let the training export it")
    lacking = chosen.keys() - images_seen_at(log).keys()
    if lacking:
        raise InputError(f"the log of --run {options.run} has no record of step {min(lacking)}; is it of this run?")
    return chosen


def measure(options: Namespace, chosen: dict[int, Path]) -> list[dict]:
    """Measures the checkpoints that are not measured yet; a row for each, in order.

    Raises:
        InputError, InputError: as `eval.run`.
        Failed: as `lay_out`.
    """
    rows = []
    for step, checkpoint in chosen.items():
        folder = options.out / f"step-{step}"
        take_folder(folder, identity(options, checkpoint))
        if not (folder / "pipeline").exists():
            lay_out(checkpoint, options.run / "pipeline", folder / "pipeline")
        arguments = ["--pipeline", str(folder / "pipeline"), "--reference", options.reference, "--out", str(folder)]
        arguments += ["--metrics", "swd", "memorisation", "--num_images", str(options.num_images)]
        arguments += ["--steps", str(options.steps), "--dtype", options.dtype]
        if options.num_cpu_threads:
            arguments += ["--num_cpu_threads", str(options.num_cpu_threads)]
        if not _is_measured(folder / "results.json"):
            evaluate(parse_evaluation(arguments))
        rows.append(_row(step, read_results(folder / "results.json")))
    return rows


def identity(options: Namespace, checkpoint: Path) -> dict:
    """What the measurements of a checkpoint depend on."""
    names = ("reference", "num_images", "steps", "dtype")
    return {name: getattr(options, name) for name in names} | {"weights": checksum(checkpoint, "ema_unet.safetensors")}


def take_folder(folder: Path, wanted: dict) -> None:
    """Makes the folder, empty unless it is of the same measurements."""
    path = folder / "measured.json"
    if not path.exists() or json.loads(path.read_text()) != wanted:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        path.write_text(json.dumps(wanted) + "\n")


def _is_measured(path: Path) -> bool:
    return path.exists() and {"swd", "memorisation"} <= {entry["family"] for entry in read_results(path)["results"]}


def _row(step: int, record: dict) -> dict:
    row = {"step": step, "n": None, "reference": record["reference"], "versions": record["versions"]}
    for key, (metric, name) in MEASURED.items():
        entry = [e for e in record["results"] if e["metric"] == metric and e["name"].endswith(name)][-1]
        row |= {key: entry["value"], f"{key}_floor": entry["floor"], "n": entry["n"]}
        row["drawn_by"] = {name: entry[name] for name in ("sampler", "steps", "seeds", "dtype") if name in entry}
    return row


def with_losses(rows: list[dict], log: list[dict]) -> list[dict]:
    """Each row with its images seen, and the held-out loss that the log has of its step, if any."""
    found = []
    for row in rows:
        records = [record for record in log if record["step"] == row["step"]]
        losses = {key: record[key] for record in records for key in LOSSES[1:] if key in record}
        found.append({"step": row["step"], "images_seen": images_seen_at(log)[row["step"]], **losses, **row})
    return found


def table(record: dict) -> str:
    """Markdown."""
    rows, by = record["rows"], record["drawn_by"]
    lines = [f"| {' | '.join(COLUMNS.values())} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(number(row.get(key)) for key in COLUMNS)} |" for row in rows]
    lines.append(
        f"\nSWD of {number(record['n'])} images ({by['sampler']}, {by.get('steps', 'its own')} steps, {by['dtype']});"
        f" of as many real ones it is {number(rows[0]['swd_floor'])}."
    )
    return "\n".join(lines)


def describe(rows: list[dict], log: list[dict]) -> dict:
    """What curves.json says: the rows, what they share, and the losses of the whole log."""
    shared = {name: rows[0][name] for name in ("reference", "versions", "drawn_by", "n")}
    short = [{key: value for key, value in row.items() if key not in shared} for row in rows]
    losses = {key: [(r["images_seen"], r[key]) for r in log if key in r] for key in LOSSES}
    return shared | {"results": [], "rows": short, "losses": losses}


def read_before(path: Path, pipeline_dir: Path) -> dict:
    """The curves of the run with whose last weights another one began.

    Args:
        pipeline_dir: the other run's.

    Raises:
        InputError: if there are none, or the other run began otherwise.
    """
    before = read_results(path)
    if not {"reference", "drawn_by", "n", "losses"} <= before.keys() or not before.get("rows"):
        raise InputError(f"--after {path} has no curves of a training")
    end = before["rows"][-1]["images_seen"]
    began = json.loads((pipeline_dir / "training.json").read_text()).get("pretrained")
    if began is None or began["images_seen"] != end:
        weights = "fresh weights" if began is None else f"weights that had seen {number(began['images_seen'])} images"
        raise InputError(f"--run began with {weights}, and --after {path} ends at {end:,}")
    return before


def join(before: dict, record: dict) -> dict:
    """One record of two runs, of which the second began with the weights of the first one's last row.

    They may differ in the network's type while sampling, which changes images by less than an eye sees.

    Raises:
        InputError: if their checkpoints were measured in other different ways.
    """
    dtype = ", then ".join(dict.fromkeys(r["drawn_by"].get("dtype", "") for r in (before, record)))
    before, record = (r | {"drawn_by": r["drawn_by"] | {"dtype": dtype}} for r in (before, record))
    differing = [name for name in ("reference", "drawn_by", "n") if before[name] != record[name]]
    if differing:
        raise InputError(f"--after was measured otherwise ({', '.join(differing)}); use the same options for both")
    end = before["rows"][-1]["images_seen"]
    rows = [row | {"images_seen": row["images_seen"] + end} for row in record["rows"]]
    losses = {
        key: before["losses"][key] + [(images + end, loss) for images, loss in record["losses"][key]] for key in LOSSES
    }
    return record | {"rows": before["rows"] + rows, "losses": losses}


def write_curves(record: dict, out: Path) -> None:
    """Raises OSError if something cannot be written."""
    rows, losses = record["rows"], record["losses"]
    panels = {
        "loss in training": {"loss": losses["loss"]},
        "held-out loss": {"mean": losses["heldout_loss"]},
        "held-out loss by quarter of the timesteps": {key[-2:]: losses[key] for key in LOSSES[2:]},
    }
    for key, title in (("swd", "SWD"), ("memorisation_ratio", "nearest training image, generated / held-out")):
        floor = [(row["images_seen"], row[f"{key}_floor"]) for row in rows]
        real = "real against real" if key == "swd" else "held-out"
        panels[title] = {"generated": [(row["images_seen"], row[key]) for row in rows], real: floor}
    plot_panels(panels, "images seen", out / "curves.png")
    write_results(out / "curves.json", record)
    (out / "curves.md").write_text(f"{table(record)}\n")
    print(f"wrote {out / 'curves.md'}: {len(rows)} checkpoints", flush=True)


def parse_options(arguments: list[str]) -> Namespace:
    """Raises InputError."""
    parser = Parser(prog="python -m experiments.curves", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="output folder of a training")
    parser.add_argument("--reference", required=True, help="real images: a folder, a Hub id or synthetic-faces")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and figures")
    parser.add_argument("--after", type=Path, help="curves.json of the run with whose last weights this one began")
    parser.add_argument("--num_images", type=int, default=1024, help="generated of each checkpoint (default 1024)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (default 20)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the network while sampling")
    parser.add_argument("--every", type=int, default=1, help="take each so-and-so-manyth checkpoint (default 1)")
    parser.add_argument("--num_cpu_threads", type=int)
    options = parser.parse_args(arguments)
    least = dict.fromkeys(("num_images", "steps", "every", "num_cpu_threads"), 1)
    check_numbers(options, least, {"num_cpu_threads": MOST_THREADS})
    return options


def run(options: Namespace) -> None:
    log = read_log(options.run / "log.jsonl")
    chosen = choose(options, log)
    before = None if options.after is None else read_before(options.after, options.run / "pipeline")
    record = describe(with_losses(measure(options, chosen), log), log)
    write_curves(record if before is None else join(before, record), options.out)


def main(arguments: list[str]) -> int:
    stopped = "stopped; the same command goes on from here"
    return run_command(lambda: run(parse_options(arguments)), stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
