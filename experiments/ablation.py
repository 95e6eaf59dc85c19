"""An ablation study: trains variants of a configuration with an equal budget, evaluates them, lays them side by side.

    python -m experiments.ablation configs/ablations/settings.yaml --data DATA --out runs/ablations/settings [--jobs 2]

DATA is a folder of CelebA, its id on the Hub or `synthetic-faces`; experiments/study.py says what a study is.

OUT/ablation.md is the table, OUT/ablation.json its numbers; ablation_swd.png shows the SWD, ablation_errors.png the
held-out errors by noise level, ablation_images.png images of the same seeds. The trainings lie in OUT/VARIANT/seed-S;
of a study of equal time OUT/speeds.json has the images/s, measured before the first training: leave the machine alone
for that minute. Started again, the command goes on where it stopped, and does anew what has other flags by now. Exit
codes: 0 done, 1 failed, 2 bad input, 130 stopped (Ctrl-C or SIGTERM).
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from common import Failed, InputError, Parser, check_numbers, make_folder, run_command
from eval.compare import Run, errors_by_noise_level, images_of, open_runs, rows_of
from eval.figures import plot_curves, plot_dots, plot_image_rows
from eval.results import number, write_results
from eval.run import parse_options as parse_evaluation
from experiments.equal_time import measure_speeds, updates_in
from experiments.study import Study, Variant, flags_as_arguments, read_study
from pipelines.custom_unet_pipeline import samplers_for
from training.config import DEFAULTS, TrainConfig, parse_config

REPOSITORY = Path(__file__).resolve().parent.parent
FAMILIES = ("swd", "memorisation", "heldout")  # the metrics of every variant, unless the study names others
SPEEDS = "speeds.json"
NEVER = PLACEHOLDER_STEPS = 10**9
SHOWN_ERRORS = (0.5, 2.0)  # of the first variant's
UNWATCHED = {"report_to": "none", "save_images_steps": NEVER, "eval_batch_size": 1}  # a grid is drawn at the end
QUARTERS = ("q1", "q2", "q3", "q4")
TIMESTEPS = "Error of the noise, mean over timesteps, held-out"
ALWAYS_THERE = ("swd", "memorisation_ratio", "sample_mse")  # in a row of eval.compare
SCHEDULE = "objective ddpm_num_steps ddpm_beta_schedule beta_start beta_end rescale_betas_zero_snr".split()
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
    **{quarter: quarter for quarter in QUARTERS},
}
MEASURED = ("train_minutes", "fid", "kid", "swd", "memorisation_ratio", "sample_mse", "epsilon_mse", *QUARTERS)


class Processes:
    """Processes that several threads wait for, and that end together."""

    def __init__(self):
        self._lock, self._running, self._are_ended = threading.Lock(), set(), False

    def run(self, command: list[str], **options) -> int:
        """Waits for a process.

        Args:
            options: of `subprocess.Popen`.

        Returns:
            its exit code, that of SIGTERM if the processes were ended before.
        """
        with self._lock:
            if self._are_ended:
                return -signal.SIGTERM
            process = subprocess.Popen(command, **options)
            self._running.add(process)
        exit_code = process.wait()
        with self._lock:
            self._running.remove(process)
        return exit_code

    def end(self) -> None:
        """Sends SIGTERM to those that run, and lets no other begin."""
        with self._lock:
            self._are_ended = True
            for process in self._running:
                process.terminate()


@dataclass(frozen=True)
class Job:
    """The training and the evaluation of one variant with one seed.

    Attributes:
        training: arguments of train_unet.py, and `config` what they come to.
        evaluation: arguments of eval.run.
        record: what makes training and evaluation what they are, wherever they lie.
    """

    variant: Variant
    seed: int
    folder: Path
    config: TrainConfig
    training: list[str]
    evaluation: list[str]
    record: dict

    @property
    def results(self) -> Path:
        return self.folder / "evaluation"

    @property
    def _record_path(self) -> Path:
        return self.folder / "job.json"

    def _earlier_record(self) -> dict:
        try:
            return json.loads(self._record_path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise Failed(f"{self._record_path} is damaged; delete {self.folder} to do it anew") from error

    @property
    def is_done(self) -> bool:
        """Whether it was done before with the same flags."""
        return self._earlier_record() == self.record | {"is_done": True}

    def _begin(self) -> None:
        """Removes what was made with other flags: a training would go on from its checkpoint, and be none."""
        earlier = self._earlier_record()
        folders = {"training": [Path(self.config.output_dir), self.results], "evaluation": [self.results]}
        stale = [key for key in folders if earlier and earlier.get(key) != self.record[key]]
        self.folder.mkdir(parents=True, exist_ok=True)
        if stale:  # stopped while removing, it has no record that anything is the same as
            write_results(self._record_path, dict.fromkeys(folders))
        for folder in {folder for key in stale for folder in folders[key] if folder.exists()}:
            shutil.rmtree(folder)
        write_results(self._record_path, self.record)

    def do(self, num_threads: int, processes: Processes) -> None:
        """Trains and evaluates in processes of their own, whose output goes to `log.txt`.

        Raises:
            Failed: with the last line of the one that failed.
        """
        self._begin()
        threads, network = f"--num_cpu_threads={num_threads}", self.variant.network
        train, evaluate = [str(REPOSITORY / "train_unet.py")], ["-m", "eval.run"]
        if network is not None:
            train, evaluate = (["-m", "experiments.unet_variants", network, task] for task in ("train", "evaluate"))
        commands = [
            [*train, *self.training, threads],
            [*evaluate, *self.evaluation, threads],
        ]
        search = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": str(num_threads)}
        log = self.folder / "log.txt"
        for command in commands:
            with log.open("w") as file:
                exit_code = processes.run([sys.executable, *command], env=environment, stdout=file, stderr=file)
            if exit_code != 0:
                last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
                raise Failed(
                    f"{self.variant.name}, {self.folder.name} failed with exit code {exit_code}: {last} (see {log})"
                )
        write_results(self._record_path, self.record | {"is_done": True})


def jobs_of(
    study: Study, data: str, crop: str | None, out: Path, num_steps: dict[str, int] | None = None
) -> list[Job]:
    """All of them, checked before the first begins.

    Args:
        num_steps: updates of each variant in a study of equal time; without it they have a placeholder.

    Raises:
        InputError: if the arguments of a training or of an evaluation are bad.
    """
    if os.path.isdir(data):
        data = os.path.abspath(data)
        where = {"train_data_dir": data, "dataset_name": None}
    else:
        where = {"dataset_name": data, "train_data_dir": None}
    where |= {} if crop is None else {"crop": crop}
    jobs = []
    for seed in study.seeds:
        for variant in study.variants:
            folder = out / variant.name / f"seed-{seed}"
            flags = UNWATCHED | study.flags | where | variant.flags | {"seed": seed, "output_dir": str(folder / "run")}
            if study.minutes is not None:
                flags["max_train_steps"] = PLACEHOLDER_STEPS if num_steps is None else num_steps[variant.name]
            training = ["--config", str(REPOSITORY / study.config), *flags_as_arguments(flags)]
            paths = {"pipeline": str(folder / "run" / "pipeline"), "out": str(folder / "evaluation")}
            measured = {"reference": data, "metrics": list(FAMILIES)} | study.evaluation | variant.evaluation
            evaluation = flags_as_arguments(paths | measured)
            try:
                config = parse_config(training, report=lambda text: None)
                options = parse_evaluation(evaluation)
                _check_fits(config, options, jobs[0].config if jobs else config)
            except ValueError as error:
                raise type(error)(f"variant {variant.name}: {error}") from error
            unusual = {name: value for name, value in asdict(config).items() if value != DEFAULTS[name]}
            del unusual["output_dir"]
            if variant.network is not None:
                unusual["network"] = variant.network
            record = {"training": unusual, "evaluation": flags_as_arguments(measured)}
            jobs.append(Job(variant, seed, folder, config, training, evaluation, record))
    return jobs


def _check_fits(config: TrainConfig, options: Namespace, first: TrainConfig) -> None:
    """Raises InputError if a training does not suit its evaluation, or not what the first variant is measured by."""
    if config.validation_split is None:
        raise InputError("there is no --validation_split, but held-out images are compared; give one")
    samplers = samplers_for(config.objective)
    if options.sampler not in (None, *samplers):
        raise InputError(
            f"--sampler {options.sampler} is not for --objective {config.objective}; take {', '.join(samplers)}"
        )
    for name in ("resolution", "crop"):
        here, there = getattr(config, name), getattr(first, name)
        if here != there:
            raise InputError(f"--{name} is {here}, of the first variant {there}; all are measured by the same images")


def settle_speeds(jobs: list[Job], path: Path) -> dict[str, float]:
    """Images/s in training by variant, kept in a file; what the file lacks is measured beside the first variant.

    Args:
        jobs: one for each variant; the first is what the others are compared with.

    Raises:
        Failed: if the file is damaged.
        OSError: if it cannot be read or written.
    """
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise Failed(f"{path} is damaged; delete it to measure anew") from error
    first = jobs[0].variant.name
    missing = [job for job in jobs if job.variant.name not in known]
    if missing:
        beside = missing if jobs[0] in missing else [jobs[0], *missing]
        print(f"measuring the speed of {len(beside)} trainings side by side", flush=True)
        found = measure_speeds({job.variant.name: (job.config, job.variant.network) for job in beside})
        scale = known.get(first, found[first]) / found[first]
        known |= {job.variant.name: round(found[job.variant.name] * scale, 2) for job in missing}
        make_folder(path.parent)
        write_results(path, known)
    return known


def do_all(jobs: list[Job], at_once: int) -> None:
    """Does what is not done yet, so many at once; what was begun when one fails is finished.

    Raises:
        Failed: for the first that failed.
    """
    left = [job for job in jobs if not job.is_done]
    print(f"{len(jobs)} trainings and evaluations, {len(jobs) - len(left)} of them done before", flush=True)
    num_threads = max(1, torch.get_num_threads() // at_once)
    processes, no_more = Processes(), threading.Event()

    def do(job: Job) -> None:
        if no_more.is_set():
            return
        try:
            job.do(num_threads, processes)
        except BaseException:
            no_more.set()
            raise
        print(f"{job.variant.name}, {job.folder.name}: done", flush=True)

    with ThreadPoolExecutor(at_once) as executor:
        try:
            futures = [executor.submit(do, job) for job in left]
            wait(futures)
        except KeyboardInterrupt:
            no_more.set()
            processes.end()
            raise
    for future in futures:
        future.result()


def changes_text(variant: Variant) -> str:
    """What a variant changes, for a table."""
    changes = [] if variant.network is None else [f"network {variant.network}"]
    changes += [f"{name} {'null' if value is None else value}" for name, value in variant.flags.items()]
    return ", ".join(changes) or "nothing"


def values_of(run: Run, comparable_timesteps: bool) -> dict:
    """The measured values of one training; None where there is none."""
    (row,) = rows_of(run)
    keys = {"fid": "FID (clean)", "kid": "KID (clean)", **{name: name for name in ALWAYS_THERE}}
    values = {name: row[key]["value"] if row.get(key) else None for name, key in keys.items()}
    curve = next((entry for entry in run.results if entry["name"] == TIMESTEPS), None)
    if curve is None or not comparable_timesteps:
        values |= dict.fromkeys(("epsilon_mse", *QUARTERS))
    else:
        parts = np.array_split(np.array(curve["curve"]), len(QUARTERS))
        values |= {"epsilon_mse": curve["value"]}
        values |= {quarter: float(part.mean()) for quarter, part in zip(QUARTERS, parts, strict=True)}
    model = run.record["model"]
    values["train_minutes"] = model["train_seconds"] / 60
    about = {"parameters": model["parameters"], "images_seen": model["images_seen"], "drawn_by": row["drawn_by"]}
    return values | about | {"n": row["n"], "swd_floor": row["swd"]["floor"]}


def rows_of_study(study: Study, jobs: list[Job]) -> list[dict]:
    """One row a variant: the mean over the seeds of each value, its standard deviation, and the values.

    Raises:
        InputError: if there are no results, or not those that are compared.
    """
    schedules = {job.variant.name: [getattr(job.config, name) for name in SCHEDULE] for job in jobs}
    rows = []
    for variant in study.variants:
        own = [job for job in jobs if job.variant is variant]
        comparable = schedules[variant.name] == schedules[study.variants[0].name]
        runs = open_runs([job.results for job in own], [str(job.folder) for job in own])
        try:
            found = [values_of(run, comparable) for run in runs]
        except (KeyError, TypeError, ValueError) as error:
            what = "lacks what is compared, or was measured in several ways"
            raise InputError(f"a result of {variant.name} {what}: {error}") from error
        for values in found:
            values["train_minutes"] = study.minutes or values["train_minutes"]
        row = {"variant": variant.name, "changed": changes_text(variant), "seeds": [job.seed for job in own]}
        row |= {key: value for key, value in found[0].items() if key not in MEASURED}
        for key in MEASURED:
            values = [value[key] for value in found]
            row[key] = None if None in values else _summary(values)
        rows.append(row)
    return rows


def _summary(values: list[float]) -> dict:
    spread = {"std": statistics.stdev(values)} if len(values) > 1 else {}
    return {"value": statistics.mean(values), **spread, "values": values}


def table(rows: list[dict]) -> str:
    """Markdown. What is the same in all rows stands below instead of in a column."""
    measured = {key: heading for key, heading in COLUMNS.items() if any(row[key] is not None for row in rows)}
    columns = {heading: [_cell(row[key]) for row in rows] for key, heading in measured.items()}
    shared = {heading: cells[0] for heading, cells in columns.items() if len(rows) > 1 and len(set(cells)) == 1}
    columns = {heading: cells for heading, cells in columns.items() if heading not in shared}
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)]
    first, seeds = rows[0], rows[0]["seeds"]
    of_all = f" In all rows: {', '.join(' '.join(pair) for pair in shared.items())}." if shared else ""
    spread = f" Means and standard deviations over {len(seeds)} trainings." if len(seeds) > 1 else ""
    lines.append(
        f"\nSWD of {number(first['n'])} images; of as many real ones it is {number(first['swd_floor'])}. Errors are"
        " mean squared errors on held-out images: of x_0 at noise levels that are the same for all, of the noise over"
        " the timesteps and by their quarters, q1 with the least noise (–: other noise levels, which do not compare)."
        f"{of_all}{spread}"
    )
    return "\n".join(lines)


def _cell(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        spread = f" ± {value['std']:.2g}" if "std" in value else ""
        return number(value["value"]) + spread
    return number(value).replace("|", r"\|")


def write_study(study: Study, jobs: list[Job], out: Path, num_images: int) -> None:
    """The table and the figures.

    Raises:
        InputError: if results of a variant are not what they must be.
        OSError: if something cannot be written.
    """
    rows = rows_of_study(study, jobs)
    first_seed = jobs[: len(study.variants)]
    runs = open_runs([job.results for job in first_seed], [job.variant.name for job in first_seed])
    (out / "ablation.md").write_text(f"{table(rows)}\n")
    write_results(
        out / "ablation.json",
        {
            "reference": runs[0].record["reference"],
            "versions": runs[0].record["versions"],
            "results": [],
            "rows": rows,
        },
    )
    values = {row["variant"]: row["swd"]["values"] for row in rows}
    plot_dots(values, rows[0]["swd_floor"], "SWD", out / "ablation_swd.png")
    sigmas, curves = errors_by_noise_level(runs)
    if study.variants[0].name in curves:
        base = curves[study.variants[0].name]
        bands = {name: (curve / base, None) for name, curve in curves.items()}
        labels = {"xlabel": "noise level sigma", "ylabel": f"held-out error of x_0, of {study.variants[0].name} = 1"}
        labels |= {"xscale": "log", "ylim": SHOWN_ERRORS}  # one bad variant would hide how the others differ
        plot_curves(np.array(sigmas), bands, labels, out / "ablation_errors.png")
    _, images = images_of(runs, num_images)
    if images:
        plot_image_rows(images, out / "ablation_images.png")
    print(f"wrote {out / 'ablation.md'}: {len(rows)} rows", flush=True)


def parse_options(arguments: list[str]) -> Namespace:
    """Raises InputError."""
    parser = Parser(prog="python -m experiments.ablation", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--data", required=True, help="images: a folder, a Hub id or synthetic-faces")
    parser.add_argument("--crop", help="crop by name (default: that of the study's configuration)")
    parser.add_argument("--out", type=Path, required=True, help="folder for trainings, table and figures")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, which share the cores (default 1)")
    parser.add_argument("--num_images", type=int, default=8, help="of each variant in the figure (default 8)")
    options = parser.parse_args(arguments)
    check_numbers(options, {"jobs": 1, "num_images": 1}, {"jobs": 64, "num_images": 64})
    return options


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def compare() -> None:
        options = parse_options(arguments)
        study = read_study(options.study)
        jobs = jobs_of(study, options.data, options.crop, options.out)
        if study.minutes is not None:
            configs = {job.variant.name: job.config for job in jobs}
            speeds = settle_speeds(jobs[: len(configs)], options.out / SPEEDS)
            num_steps = {name: updates_in(study.minutes, speeds[name], config) for name, config in configs.items()}
            jobs = jobs_of(study, options.data, options.crop, options.out, num_steps)
        do_all(jobs, options.jobs)
        write_study(study, jobs, options.out, options.num_images)

    stopped = "stopped; the same command goes on from here"
    return run_command(compare, stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
