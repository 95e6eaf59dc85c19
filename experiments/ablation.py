"""An ablation study: trains and evaluates variants of a configuration with an equal budget, and tabulates the results.

    python -m experiments.ablation configs/ablations/settings.yaml --data DATA --out runs/ablations/settings [--jobs 2]

DATA is a folder of CelebA, its id on the Hub or `synthetic-faces`; experiments/study.py describes the study file.

OUT/ablation.md is the table, OUT/ablation.json its numbers; ablation_errors.png shows the held-out errors by noise
level, ablation_images.png images of the same seeds. The training runs are in OUT/VARIANT/seed-S.
In a study with equal training time, OUT/speeds.json has the images/s, measured before the first run, and the settings
they are for; keep the machine idle for that minute. The same command resumes a study; you can add variants and seeds.
Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped (Ctrl-C or SIGTERM).
"""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from common import Failed, InputError, Parser, check_numbers, make_folder, run_command
from eval.compare import Run, errors_by_noise_level, images_of, open_runs
from eval.figures import labelled_grid, plot_curves
from eval.results import number, sampler_text, table, value_text, write_results
from eval.run import parse_options as parse_evaluation
from experiments.bench import measure_speeds
from experiments.study import Study, Variant, flags_as_arguments, read_study
from pipelines.custom_unet_pipeline import SAMPLERS
from training.arguments import parse_config
from training.config import DEFAULTS, TrainConfig
from training.sde import continuous_samplers

POLL_SECONDS = 0.5
NEVER = 10**9
IMAGES_OF_A_VARIANT = 8  # in the figure
SHOWN_ERRORS = (0.5, 2.0)  # range of the axis, relative to the first variant
FLAGS = {  # of every training run, unless the study sets others; a grid is drawn only at the end
    "report_to": "none",
    "save_images_steps": NEVER,
    "eval_batch_size": 1,
    "validation_split": "validation",
}
METRICS = {"metrics": ["swd", "memorisation", "heldout"]}  # of every evaluation, unless the study sets others
QUARTERS = ("q1", "q2", "q3", "q4")
SCHEDULE = "objective ddpm_num_steps ddpm_beta_schedule beta_start beta_end rescale_betas_zero_snr".split()
RESULTS = {  # key in a row: name of the result
    "fid": "FID (clean)",
    "kid": "KID (clean)",
    "swd": "SWD, mean",
    "memorisation_ratio": "Nearest training image, generated / held-out (median)",
    "sample_mse": "Error of x_0, mean over log sigma, held-out",
    "epsilon_mse": "Error of the noise, mean over timesteps, held-out",
}
COLUMNS = {  # key in a row: heading
    "variant": "variant",
    "changed": "what is changed",
    "parameters": "parameters",
    "images_seen": "images seen",
    "train_minutes": "minutes of training",
    "drawn_by": "sampler",
    "fid": "FID",
    "kid": "KID",
    "swd": "SWD",
    "memorisation_ratio": "nearest training image, generated / held-out",
    "sample_mse": "error of x_0",
    "epsilon_mse": "error of the noise",
} | {quarter: quarter for quarter in QUARTERS}
DISTANCES = ("fid", "kid", "swd")
MEASURED = [*RESULTS, *QUARTERS, "train_minutes"]


# ---- Training runs and evaluations


@dataclass(frozen=True, eq=False)
class Job:
    """The training and the evaluation of one variant with one seed.

    Attributes:
        flags: the arguments of the tasks `train` and `evaluate`.
        record: the settings of training and evaluation without their folders; stored in `job.json`.
    """

    variant: Variant
    folder: Path
    config: TrainConfig
    flags: dict[str, list[str]]
    record: dict

    @property
    def is_done(self) -> bool:
        """Whether it has finished; raises InputError if it was started with other settings."""
        path, evaluation = self.folder / "job.json", self.folder / "evaluation"
        before = json.loads(path.read_text()) if path.exists() else {}
        for part, folder in (("training", self.folder), ("evaluation", evaluation)):
            if folder.exists() and any(folder.iterdir()) and before.get(part) != self.record[part]:
                raise InputError(f"{folder} was made with other settings; remove it or choose another --out")
        return (evaluation / "results.md").exists()  # its last file

    def start(self, task: str, num_threads: int) -> subprocess.Popen:
        """Starts the task, `train` or `evaluate`, in a subprocess whose output goes to `log.txt`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_results(self.folder / "job.json", self.record)
        flags = [*self.flags[task], f"--num_cpu_threads={num_threads}"]
        command = [sys.executable, "-m", "experiments.unet_variants", self.variant.network, task, *flags]
        with (self.folder / "log.txt").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def jobs_of(
    study: Study, data: str, crop: str | None, out: Path, num_steps: dict[str, int] | None = None
) -> list[Job]:
    """Builds all jobs; raises InputError if the arguments of a training or an evaluation are invalid.

    Args:
        num_steps: updates of each variant in a study with equal training time, once they are known.
    """
    jobs = []
    images = {"train_data_dir": data, "dataset_name": None}
    if not os.path.isdir(data):
        images = {"train_data_dir": None, "dataset_name": data}
    images |= {} if crop is None else {"crop": crop}
    for seed, variant in itertools.product(study.seeds, study.variants):
        folder = out / variant.name / f"seed-{seed}"
        flags = FLAGS | study.flags | images | variant.flags | {"seed": seed, "output_dir": folder / "run"}
        if study.minutes is not None:
            flags["max_train_steps"] = NEVER if num_steps is None else num_steps[variant.name]
        train = ["--config", study.config, *flags_as_arguments(flags)]
        how = flags_as_arguments({"reference": data} | METRICS | study.evaluation | variant.evaluation)
        evaluate = [f"--pipeline={folder / 'run' / 'pipeline'}", f"--out={folder / 'evaluation'}", *how]
        try:
            config = parse_config(train)
            check_fits(config, parse_evaluation(evaluate).sampler, jobs[0].config if jobs else config)
        except InputError as error:
            raise InputError(f"variant {variant.name}: {error}") from error
        unusual = {name: value for name, value in asdict(config).items() if value != DEFAULTS[name]}
        del unusual["output_dir"]
        unusual |= {} if variant.network == "plain" else {"network": variant.network}
        tasks, record = {"train": train, "evaluate": evaluate}, {"training": unusual, "evaluation": how}
        jobs.append(Job(variant, folder, config, tasks, record))
    return jobs


def check_fits(config: TrainConfig, sampler: str | None, first: TrainConfig) -> None:
    """Raises InputError if the sampler does not suit the model, or its images are not those of the first variant."""
    samplers = [*(SAMPLERS if config.objective == "ddpm" else ()), *continuous_samplers(config.objective)]
    if sampler not in (None, *samplers):
        raise InputError(f"objective {config.objective} cannot use {sampler}; choose {', '.join(samplers)}")
    if (config.resolution, config.crop) != (first.resolution, first.crop):
        raise InputError("its --resolution or --crop differs from the first variant's; all need the same images")


def updates_in(minutes: float, jobs: list[Job], path: Path) -> dict[str, int]:
    """The number of updates that each variant makes in this many minutes, from speeds stored in a file.

    Each speed in the file is for certain settings. Missing ones are measured together with the first variant's, and
    scaled so that its speed matches the file.
    """
    stored, first = json.loads(path.read_text()) if path.exists() else [], jobs[0].variant.name
    runs = {job.variant.name: (job.config, job.variant.network) for job in jobs}
    any_run = {"seed": None, "train_data_dir": None, "dataset_name": None, "max_train_steps": None}
    settings = {job.variant.name: job.record["training"] | any_run for job in jobs}
    speeds = {entry["name"]: entry["speed"] for entry in stored if entry["settings"] == settings.get(entry["name"])}
    missing = runs.keys() - speeds.keys()
    if missing:
        print(f"measuring the speed of {len(missing)} training runs side by side", flush=True)
        found = measure_speeds({name: runs[name] for name in runs if name in missing or name == first})
        scale = speeds.get(first, found[first]) / found[first]
        speeds |= {name: round(found[name] * scale, 2) for name in runs if name in missing}
        new = [{"name": name, "speed": speeds[name], "settings": settings[name]} for name in runs if name in missing]
        make_folder(path.parent)
        write_results(path, stored + new)
    num_steps = {}
    for name, (config, _) in runs.items():
        images_per_update = config.train_batch_size * config.gradient_accumulation_steps
        steps = round(minutes * 60 * speeds[name] / images_per_update)
        num_steps[name] = max(steps, config.lr_warmup_steps + 1)
    return num_steps


def do_all(jobs: list[Job], at_once: int) -> None:
    """Runs the unfinished jobs, `at_once` at a time; an error or a signal stops those that are running.

    Raises:
        Failed: if a training or an evaluation fails.
        KeyboardInterrupt: after SIGINT or SIGTERM.
    """
    left = [job for job in jobs if not job.is_done]
    print(f"{len(jobs)} training runs and evaluations, {len(jobs) - len(left)} of them already done", flush=True)
    num_threads = max(1, torch.get_num_threads() // at_once)
    running, signals = {}, []  # `running` has the task and the process of each job
    for kind in (signal.SIGINT, signal.SIGTERM):  # an exception might be raised before a process is in `running`
        signal.signal(kind, lambda number, frame: signals.append(number))
    try:
        while left or running:
            while left and len(running) < at_once:
                job = left.pop(0)
                running[job] = "train", job.start("train", num_threads)
            time.sleep(POLL_SECONDS)
            if signals:
                raise KeyboardInterrupt
            for job, (task, process) in list(running.items()):
                if process.poll() is None:
                    continue
                name = f"{job.variant.name}, {job.folder.name}"
                if process.returncode != 0:
                    log = job.folder / "log.txt"
                    lines = ["no message", *log.read_text(errors="replace").split("\n")]
                    last = [line for line in lines if line.strip()][-1]
                    raise Failed(f"{name} failed with exit code {process.returncode}: {last} (see {log})")
                if task == "train":
                    running[job] = "evaluate", job.start("evaluate", num_threads)
                else:
                    del running[job]
                    print(f"{name}: done", flush=True)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.default_int_handler)


# ---- Table and figures


def values_of(run: Run, has_same_timesteps: bool) -> dict:
    """The results of one training run; None for values that were not measured or are not comparable."""
    entries = {entry["name"]: entry for entry in run.results if entry["family"] != "cost"}
    found = {key: entries[name] for key, name in RESULTS.items() if name in entries}
    if not has_same_timesteps:
        found.pop("epsilon_mse", None)
    values = dict.fromkeys(MEASURED) | {key: entry["value"] for key, entry in found.items()}
    if "epsilon_mse" in found:
        parts = np.array_split(found["epsilon_mse"]["curve"], len(QUARTERS))
        values |= {quarter: float(part.mean()) for quarter, part in zip(QUARTERS, parts, strict=True)}
    model = run.record["model"]
    values |= {"parameters": model["parameters"], "images_seen": model["images_seen"]}
    values["train_minutes"] = model["train_seconds"] / 60
    values["floors"] = {name: found[name]["floor"] for name in DISTANCES if "floor" in found.get(name, {})}
    drawn = next((entry for entry in found.values() if "sampler" in entry), {})
    return values | {"drawn_by": sampler_text(drawn), "n": drawn.get("n")}


def row_of(variant: Variant, study: Study, found: list[dict]) -> dict:
    """The mean and standard deviation of each value over the seeds, and the values.

    Args:
        found: the `values_of` each seed.
    """
    changes = [] if variant.network == "plain" else [f"network {variant.network}"]
    changes += [f"{name} {'null' if value is None else value}" for name, value in variant.flags.items()]
    row = {"variant": variant.name, "changed": ", ".join(changes) or "nothing", "seeds": study.seeds, **found[0]}
    for key in MEASURED:
        values = [study.minutes or one[key] if key == "train_minutes" else one[key] for one in found]
        spread = {"std": statistics.stdev(values)} if len(values) > 1 and None not in values else {}
        row[key] = None if None in values else {"value": statistics.mean(values), **spread, "values": values}
    return row


def table_of(rows: list[dict]) -> str:
    """Formats the rows as Markdown. Values that are the same in all rows go below the table instead of in a column."""

    def cell(value) -> str:
        if value is None:
            return "–"
        return value_text(value) if isinstance(value, dict) else number(value)

    columns = {key: heading for key, heading in COLUMNS.items() if any(row[key] is not None for row in rows)}
    cells = [{key: cell(row[key]) for key in columns} for row in rows]
    shared = [key for key in columns if len({row[key] for row in cells}) == 1]
    same = ", ".join(f"{columns.pop(key)} {cells[0][key]}" for key in shared)
    first, seeds = rows[0], rows[0]["seeds"]
    floors = ", ".join(f"{COLUMNS[name]} is {number(floor)}" for name, floor in first["floors"].items())
    floors = f"; between two sets of real ones {floors}" if floors else ""
    spread = f" Means and standard deviations over {len(seeds)} trainings." if len(seeds) > 1 else ""
    return (
        f"{table(cells, columns)}\n\nDistances between {number(first['n'])} generated and as many real images"
        f"{floors}. Errors are mean squared errors on held-out images: of x_0 at noise levels"
        " that are the same for all, of the noise over the timesteps and by their quarters, q1 with the least noise"
        f" (–: other noise levels, which do not compare).{f' In all rows: {same}.' if same else ''}{spread}\n"
    )


def write_study(study: Study, jobs: list[Job], out: Path) -> None:
    """Writes the table and the figures.

    Raises:
        InputError: if results are missing, or measured with other real images.
    """
    runs = open_runs([job.folder / "evaluation" for job in jobs], [str(job.folder) for job in jobs])
    found = {variant: [] for variant in study.variants}
    for job, run in zip(jobs, runs, strict=True):
        has_same_timesteps = all(getattr(job.config, name) == getattr(jobs[0].config, name) for name in SCHEDULE)
        found[job.variant].append(values_of(run, has_same_timesteps))
    rows = [row_of(variant, study, values) for variant, values in found.items()]
    (out / "ablation.md").write_text(table_of(rows))
    about = {key: runs[0].record[key] for key in ("reference", "versions")}
    write_results(out / "ablation.json", about | {"results": [], "rows": rows})
    names = [variant.name for variant in study.variants]
    shown = [run._replace(title=name) for name, run in zip(names, runs, strict=False)]  # those of the first seed
    (sigmas, curves), base = errors_by_noise_level(shown), names[0]
    if base in curves:
        bands = {name: (curve / curves[base], None) for name, curve in curves.items()}
        labels = {"xlabel": "noise level sigma", "ylabel": f"held-out error of x_0, of {base} = 1"}
        labels |= {"xscale": "log", "ylim": SHOWN_ERRORS}  # one bad variant would hide the other differences
        plot_curves(np.array(sigmas), bands, labels, out / "ablation_errors.png")
    _, images = images_of(shown, IMAGES_OF_A_VARIANT)
    if images:
        labelled_grid(images).save(out / "ablation_images.png")
    print(f"wrote {out / 'ablation.md'}: {len(rows)} rows", flush=True)


def run(arguments: list[str]) -> None:
    """Runs the study; raises InputError for bad input, Failed if a training or an evaluation fails."""
    parser = Parser(prog="python -m experiments.ablation", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--data", required=True, help="images: a folder, a Hub id or synthetic-faces")
    parser.add_argument("--crop", help="name of the crop (default: from the study's configuration)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the training runs, table and figures")
    parser.add_argument("--jobs", type=int, default=1, help="parallel training runs; they share the cores (default 1)")
    options = parser.parse_args(arguments)
    check_numbers(options, {"jobs": 1}, {"jobs": 64})
    study = read_study(options.study)
    jobs = jobs_of(study, options.data, options.crop, options.out)
    if study.minutes is not None:
        num_steps = updates_in(study.minutes, jobs, options.out / "speeds.json")
        jobs = jobs_of(study, options.data, options.crop, options.out, num_steps)
    do_all(jobs, options.jobs)
    write_study(study, jobs, options.out)


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_command(lambda: run(arguments), "stopped; the same command resumes from here")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
