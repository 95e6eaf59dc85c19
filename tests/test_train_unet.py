"""The main job as its users start it: whole runs, kills, resumes, signals and refusals, with a tiny network."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import train_unet
from common import InputError
from pipelines import CustomUNetPipeline
from training import training_data
from training.checkpoint import SNAPSHOTS, list_checkpoints
from training.config import TrainConfig
from training.log import read_log
from training.post_hoc_ema import STORED
from training.processes import StopSignal, build_accelerator

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = {
    "dataset_name": "synthetic-faces",
    "max_images": 50,
    "crop": "none",
    "resolution": 8,
    "random_flip": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "dropout": 0.3,
    "train_batch_size": 7,
    "gradient_accumulation_steps": 2,
    "lr_warmup_steps": 2,
    "learning_rate": 1e-3,
    "max_train_steps": 9,
    "checkpointing_steps": 3,
    "validation_steps": 100,
    "save_images_steps": 100,
    "logging_steps": 1,
    "eval_batch_size": 4,
    "ddpm_num_inference_steps": 3,
    "report_to": "none",
    "num_cpu_threads": 1,
    "post_hoc_ema": True,
    "post_hoc_ema_steps": 2,
}
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def start(tmp_path_factory, cache_dir):
    """Starts the main job with the tiny configuration and further flags, in one process or in two."""
    config_path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    config_path.write_text(yaml.safe_dump(TINY))
    started = []

    def start(*flags, output_dir: Path, num_processes: int = 1) -> subprocess.Popen:
        launcher = TWO_PROCESSES if num_processes == 2 else []
        own_flags = ["--config", config_path, "--output_dir", output_dir, "--cache_dir", cache_dir]
        process = subprocess.Popen(
            [sys.executable, *launcher, "train_unet.py", *own_flags, *flags],
            cwd=REPOSITORY,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        kill(process)


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """Number of processes -> the output folder of a run that nothing disturbed."""
    runs = {}

    def run_with(num_processes: int) -> Path:
        if num_processes not in runs:
            runs[num_processes] = tmp_path_factory.mktemp("uninterrupted") / "run"
            finish(start(output_dir=runs[num_processes], num_processes=num_processes))
        return runs[num_processes]

    return run_with


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all it started, wherever in the tree."""
    if process.poll() is None:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(tree)
        process.communicate()


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits for the end with this exit code; returns stdout and stderr."""
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == code, stderr[-3000:]
    return stdout + stderr


def wait_for_step(process: subprocess.Popen, output_dir: Path, step: int) -> None:
    while not any(record["step"] >= step for record in read_log(output_dir / "log.jsonl")):
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.005)


def records(output_dir: Path, key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in read_log(output_dir / "log.jsonl") if key in record}


def assert_same_tensors(one: Path, other: Path) -> None:
    """Of two checkpoints, and of the snapshots up to them."""
    for name in ("unet", "ema_unet", "optimizer", *STORED):
        assert_same_file(one, other, name)
    steps = [list(list_checkpoints(folder.parent / SNAPSHOTS)) for folder in (one, other)]
    assert steps[0] == steps[1]
    for step, name in itertools.product(steps[0], STORED):
        assert_same_file(*(folder.parent / SNAPSHOTS / f"checkpoint-{step}" for folder in (one, other)), name)


def assert_same_file(one: Path, other: Path, name: str) -> None:
    ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"


def error_line(output: str) -> str:
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert "Traceback" not in output
    return line


def test_a_run_from_start_to_pipeline_and_the_same_command_again(start, tmp_path):
    run = tmp_path / "run"
    flags = ["--validation_split", "validation", "--validation_images", "20", "--report_to", "tensorboard"]
    output = finish(start(*flags, output_dir=run))
    assert "parameters at 8x8" in output
    assert "images/s" in output
    assert "9 of 9 steps, 126 images" in output
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-9"}
    assert list(records(run, "loss")) == list(range(1, 10))
    assert list(records(run, "heldout_loss")) == [0, 9]
    rate = records(run, "learning_rate")
    assert rate[1] == 0
    assert rate[2] == pytest.approx(0.5e-3)
    assert rate[3] == pytest.approx(1e-3)
    with Image.open(run / "samples" / "step-0000009.png") as grid:
        assert grid.size == (2 * 8 + 3 * 2,) * 2
    assert list(run.rglob("events.out.tfevents*"))
    pipe = CustomUNetPipeline.from_pretrained(run / "pipeline")
    ema = load_file(run / "checkpoint-9" / "ema_unet.safetensors")
    assert all(torch.equal(value, ema[key]) for key, value in pipe.unet.state_dict().items())
    assert len(pipe(batch_size=2, num_inference_steps=2).images) == 2
    facts = json.loads((run / "pipeline" / "training.json").read_text())
    assert (facts["step"], facts["total_steps"], facts["images_seen"], facts["samples_step"]) == (9, 9, 126, 9)
    assert facts["heldout"]["heldout_loss"] == records(run, "heldout_loss")[9]
    assert (run / "pipeline" / "samples.png").read_bytes() == (run / "samples" / "step-0000009.png").read_bytes()
    public = yaml.safe_load((run / "pipeline" / "training_config.yaml").read_text())
    assert {key: public[key] for key in TINY} == TINY | {"report_to": "tensorboard"}
    assert "126 images seen" in (run / "pipeline" / "README.md").read_text()
    for path in (run / "pipeline").rglob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes()
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert {key: saved[key] for key in TINY} == TINY | {"report_to": "tensorboard"}

    (run / "pipeline" / "results.json").write_text('{"results": []}')
    log = (run / "log.jsonl").read_text()
    output = finish(start(*flags, output_dir=run))
    assert "step 9" in output
    assert (run / "log.jsonl").read_text() == log
    assert (run / "pipeline" / "results.json").exists(), "the weights that were measured are still these"


@pytest.mark.parametrize(("num_processes", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_killed_in_mid_epoch_and_resumed_equals_never_killed(start, uninterrupted, tmp_path, num_processes, workers):
    """50 images, 14 or 28 an update: checkpoints fall inside epochs. Dropout, flips and accumulation are on."""
    straight, broken = uninterrupted(num_processes), tmp_path / "run"
    arguments = {"output_dir": broken, "num_processes": num_processes}
    process = start("--dataloader_num_workers", str(workers), **arguments)
    wait_for_step(process, broken, 5)
    kill(process)
    assert not (broken / "checkpoint-9").exists(), "the run was over before it was killed"
    output = finish(start("--dataloader_num_workers", str(workers), **arguments))
    assert re.search(r"starts at +step [36]\n", output)
    assert records(broken, "loss") == records(straight, "loss")
    assert_same_tensors(broken / "checkpoint-9", straight / "checkpoint-9")


def test_two_processes_and_accumulation_change_neither_the_learning_rate_nor_the_images(
    start, uninterrupted, tmp_path
):
    finish(start("--train_batch_size", "14", output_dir=tmp_path / "one"))
    runs = [tmp_path / "one", uninterrupted(2)]
    one, two = (records(run, "learning_rate") for run in runs)
    assert one == two
    assert one[9] > 0
    assert [records(run, "images_seen")[9] for run in runs] == [9 * 28, 9 * 28]


def test_time_budget_then_the_same_command_goes_on(start, tmp_path):
    run = tmp_path / "run"
    flags = ["--max_train_steps", "100000", "--checkpointing_steps", "100000", "--max_train_minutes", "0.1"]
    finish(start(*flags, output_dir=run))
    first = max(records(run, "loss"))
    assert (run / "pipeline" / "model_index.json").is_file()
    assert (run / f"checkpoint-{first}").is_dir()
    finish(start(*flags, output_dir=run))
    assert max(records(run, "loss")) > first


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_and_the_documented_exit_code(start, tmp_path, number, code):
    run = tmp_path / "run"
    process = start("--max_train_steps", "100000", "--checkpointing_steps", "100000", output_dir=run)
    wait_for_step(process, run, 2)
    process.send_signal(number)
    finish(process, code)
    (folder,) = run.glob("checkpoint-*")
    assert folder.name == f"checkpoint-{max(records(run, 'loss'))}"


def test_dry_run_writes_nothing(start, tmp_path):
    output = finish(start("--dry_run", output_dir=tmp_path / "run"))
    assert "dry run: loss" in output
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_run_and_a_missing_path_are_refused(uninterrupted, tmp_path, cache_dir, capfd):
    run = uninterrupted(1)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    arguments = ["--config", tmp_path / "tiny.yaml", "--output_dir", run, "--cache_dir", cache_dir]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}

    def refused(*flags) -> str:
        assert train_unet.main([str(argument) for argument in (*arguments, *flags)]) == 1
        return error_line(capfd.readouterr().err)

    line = refused("--train_batch_size", "5", "--ddpm_beta_schedule", "scaled_linear", "--dropout", "0.1")
    for difference in ("train_batch_size: 7 -> 5", "'linear' -> 'scaled_linear'", "dropout: 0.3 -> 0.1"):
        assert difference in line
    assert "does not exist" in refused("--resume_from_checkpoint", run / "checkpoint-2")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block_out_channels", "8", "18"], "groups"),
        (["--resolution", "9"], "sample_size"),
        (["--split", "test"], "validation"),
        (["--validation_split", "validation", "--validation_images", "3"], "3 held-out images"),
        (["--validation_split", "train"], "not held out"),
        (["--dataset_revision", "main"], "--dataset_revision is for the Hub"),
        (["--train_batch_size", "51"], "50 images are fewer"),
        (["--mixed_precision", "fp16"], "fp16"),
        (["--report_to", "wandb"], "wandb"),
        (["--learning_rat", "1"], "--learning_rate"),
        (["--objective", "edm", "--sigma_max", "5"], "--sigma_max is 5, too little"),
        (["--objective", "edm", "--sigma_min", "0.2"], "--sigma_min is 0.2, visible noise"),
        (["--objective", "ve"], "fourier"),
        (["--label_column", "mouth"], "glasses"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path, cache_dir, capfd):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--output_dir", str(tmp_path / "run")]
    assert train_unet.main([*arguments, "--cache_dir", str(cache_dir), *flags]) == 2
    output = capfd.readouterr()
    assert message in error_line(output.err)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images_is_all_that_a_newcomer_gives(tmp_path, cache_dir, monkeypatch, capfd):
    """The configuration is then the quickstart's, which names other images and a split that the folder lacks."""
    for number in range(16):
        (tmp_path / "faces").mkdir(exist_ok=True)
        Image.new("RGB", (20, 30), (number, 0, 0)).save(tmp_path / "faces" / f"{number}.png")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    own = ["--cache_dir", str(cache_dir), "--output_dir", str(tmp_path / "run"), "--max_train_steps", "1"]
    own += ["--save_images_steps", "1000", "--ddpm_num_inference_steps", "2", "--eval_batch_size", "1"]
    assert train_unet.main(["--train_data_dir", str(tmp_path / "faces"), *own]) == 0
    output = capfd.readouterr().out
    assert "--train_data_dir replaces dataset_name, validation_split of quickstart.yaml" in output
    assert len(list_checkpoints(tmp_path / "run")) == 1


def test_a_dry_run_of_a_checkpoint_that_is_not_there_is_refused(tmp_path, cache_dir, capfd):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    flags = ["--config", tmp_path / "tiny.yaml", "--output_dir", tmp_path / "run", "--cache_dir", cache_dir]
    flags += ["--dry_run", "--resume_from_checkpoint", tmp_path / "nowhere"]
    assert train_unet.main([str(flag) for flag in flags]) == 1
    assert "nowhere does not exist" in error_line(capfd.readouterr().err)


def test_fp16_needs_a_gpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        build_accelerator(TrainConfig(**TINY | {"mixed_precision": "fp16"}))


def test_an_environment_variable_of_accelerate_does_not_divide_the_gradient(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert build_accelerator(TrainConfig(**TINY)).gradient_accumulation_steps == 1


def test_an_error_of_the_main_process_ends_all_processes(start, tmp_path):
    process = start("--split", "nowhere", output_dir=tmp_path / "run", num_processes=2)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    for rank in ("", r"\[rank 1\] "):
        assert re.search(rf"^{rank}error: .*nowhere", stderr, re.MULTILINE), stderr


# Objectives in continuous time, and classes

OBJECTIVES = {
    "vp": [],
    "subvp": ["--likelihood_weighting", "--prediction_type", "v_prediction"],
    "ve": ["--time_embedding_type", "fourier"],
    "edm": ["--timestep_sampling", "antithetic"],
    "flow": ["--timestep_sampling", "stratified", "--time_density", "logit_normal"],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_lowers_the_heldout_loss_and_leaves_its_pipeline(objective, tmp_path, cache_dir, capfd):
    run = tmp_path / "run"
    toy = {"dropout": 0.0, "max_train_steps": 80, "checkpointing_steps": 80, "learning_rate": 1e-2, "ema_power": 0.5}
    toy |= {"validation_split": "validation", "validation_images": 40, "objective": objective}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | toy | {"gradient_accumulation_steps": 1}))
    flags = ["--config", tmp_path / "tiny.yaml", "--output_dir", run, "--cache_dir", cache_dir]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_unet.main([str(part) for part in (*flags, *OBJECTIVES[objective])]) == 0
    output = "".join(capfd.readouterr())
    assert "sampling failed" not in output
    assert re.search(rf"objective +{objective}", output)
    losses = records(run, "heldout_loss")
    assert losses[80] < 0.8 * losses[0]
    pipeline = CustomUNetPipeline.from_pretrained(run / "pipeline")
    assert pipeline.scheduler.config.objective == objective
    assert torch.isfinite(torch.as_tensor(pipeline(seeds=[1], num_inference_steps=3, output_type="np").images)).all()
    assert json.loads((run / "pipeline" / "training.json").read_text())["objective"]["objective"] == objective
    assert (run / "samples" / "step-0000080.png").is_file()


@pytest.fixture
def make_trainer(tmp_path, cache_dir):
    """A trainer of the tiny configuration with changes, ready for its first step."""
    trainers = []

    def make(**changes) -> train_unet.Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        own = {"output_dir": str(tmp_path / f"run{len(trainers)}"), "cache_dir": str(cache_dir), "dropout": 0.0}
        config = TrainConfig(**TINY | own | changes)
        trainers.append(train_unet.Trainer(config, build_accelerator(config), float("inf"), StopSignal()))
        trainers[-1].start_or_resume()
        trainers[-1].open_batches()
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.lock.release()
    AcceleratorState._reset_state(reset_partial_state=True)


# A start from the weights of a trained model


@pytest.fixture
def taught(make_trainer) -> train_unet.Trainer:
    """A trainer after two steps, with its pipeline folder."""
    trainer = make_trainer(learning_rate=0.05, lr_warmup_steps=0)
    trainer.training_step()
    trainer.training_step()
    trainer.export()
    return trainer


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_run_starts_from_the_weights_of_a_model(taught, make_trainer):
    """From the averaged ones; only its first start does, and its model tells."""
    name = {"pretrained_model_name_or_path": str(taught.pipeline_dir)}
    other = {"dropout": 0.2, "resolution": 16, "seed": 5}
    run = make_trainer(**name, **other)
    assert not same_weights(taught.network, taught.ema_network)
    assert same_weights(run.network, taught.ema_network)
    assert same_weights(run.ema_network, taught.ema_network)
    assert run.progress.step == 0
    run.training_step()
    run.training_step()
    run.save_checkpoint()
    run.export()
    run.lock.release()
    again = make_trainer(**name, **other, output_dir=run.config.output_dir)
    assert again.progress.step == 2
    assert same_weights(again.network, run.network)
    assert not same_weights(again.network, taught.ema_network)

    facts = json.loads((run.pipeline_dir / "training.json").read_text())
    seconds = taught.progress.train_seconds
    assert facts["pretrained"] == {"name": "run0", "images_seen": 28, "train_seconds": seconds}
    card = (run.pipeline_dir / "README.md").read_text()
    assert "the weights of `run0`, which had seen 28 images in 0.0 minutes of training; what follows" in card
    public = yaml.safe_load((run.pipeline_dir / "training_config.yaml").read_text())
    assert public["pretrained_model_name_or_path"] == "run0"
    third = make_trainer(pretrained_model_name_or_path=str(run.pipeline_dir), **other)
    assert third.pretrained_facts["images_seen"] == 28 + 28
    (run.pipeline_dir / "training.json").unlink()
    fourth = make_trainer(pretrained_model_name_or_path=str(run.pipeline_dir), **other)
    assert fourth.pretrained_facts == {"name": "run1", "images_seen": None, "train_seconds": None}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block_out_channels", "8", "24"], "is another network (block_out_channels: [8, 16] -> [8, 24])"),
        (["--prediction_type", "v_prediction"], "predicts epsilon, this run v_prediction"),
        (["--objective", "edm"], "predicts epsilon, this run edm"),
        (["--label_column", "hair_style"], "num_class_embeds: None -> 8"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(flags, message, taught, tmp_path, cache_dir, capfd):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    arguments = ["--config", tmp_path / "tiny.yaml", "--output_dir", tmp_path / "new", "--cache_dir", cache_dir]
    arguments += ["--pretrained_model_name_or_path", taught.pipeline_dir, *flags]
    assert train_unet.main([str(argument) for argument in arguments]) == 2
    assert message in error_line(capfd.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_a_class_conditional_model_is_no_start_of_an_unconditional_one(make_trainer):
    conditional = make_trainer(label_column="glasses")
    conditional.export()
    with pytest.raises(InputError, match="num_class_embeds: 3 -> None"):
        make_trainer(pretrained_model_name_or_path=str(conditional.pipeline_dir))


def test_a_model_that_cannot_be_had_is_told_before_the_data_are_read(taught, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    weights = taught.pipeline_dir / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    arguments = ["--config", tmp_path / "tiny.yaml", "--output_dir", tmp_path / "new", "--split", "nowhere"]
    for name, message in ((taught.pipeline_dir, "could not be loaded"), ("no/where/at/all", "is neither a folder")):
        flags = [*arguments, "--pretrained_model_name_or_path", name]
        assert train_unet.main([str(argument) for argument in flags]) == 2
        assert message in error_line(capfd.readouterr().err)


def labels_seen_by(network, call) -> torch.Tensor:
    seen = []
    hook = network.class_embedding.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    call()
    hook.remove()
    return torch.cat(seen)


def test_labels_reach_the_network_and_are_dropped_with_their_probability(make_trainer):
    trainer = make_trainer(label_column="eye_colour", label_dropout=0.25)
    num_classes = len(trainer.data.label_names)
    assert trainer.network.config.num_class_embeds == num_classes + 1
    wanted = torch.cat([labels for _, (_, labels) in zip(range(60), trainer.data.batches, strict=False)])
    trainer.open_batches()
    seen = labels_seen_by(trainer.network, lambda: [trainer.training_step() for _ in range(30)])
    kept = seen != num_classes
    assert torch.equal(seen[kept], wanted[kept])
    assert (~kept).double().mean().item() == pytest.approx(0.25, abs=0.06)


def test_heldout_losses_have_the_true_labels_and_grids_each_class_in_turn(make_trainer, capfd):
    trainer = make_trainer(
        label_column="glasses", validation_split="validation", validation_images=20, objective="edm", eval_batch_size=5
    )
    store = trainer.data.open_store("validation", 20)
    seen = labels_seen_by(trainer.ema_network, trainer.report_heldout_loss)
    assert torch.equal(seen, torch.from_numpy(store.labels.copy()))
    assert seen.max() == 1
    seen = labels_seen_by(trainer.ema_network, trainer.save_samples)
    assert seen.view(-1, 5).unique(dim=0).tolist() == [[0, 1, 0, 1, 0]]
    assert "sampling failed" not in "".join(capfd.readouterr())


def test_images_are_flipped_alike_with_and_without_labels(make_trainer, monkeypatch):
    flipped = []
    flip = training_data.random_flip
    monkeypatch.setattr(training_data, "random_flip", lambda images: flipped.append(flip(images)) or flipped[-1])
    for trainer in (make_trainer(), make_trainer(label_column="glasses")):
        trainer.training_step()
    one, _, other, _ = flipped  # of two micro-batches each, the second after noise and dropped labels
    assert torch.equal(one, other)


# Inside one process: what a step does with gradients that are not finite, and with a sampler that fails


@pytest.fixture
def trainer(tmp_path, cache_dir):
    config = TrainConfig(**TINY | {"output_dir": str(tmp_path / "run"), "cache_dir": str(cache_dir), "dropout": 0.0})
    trainer = train_unet.Trainer(config, build_accelerator(config), float("inf"), StopSignal())
    trainer.start_or_resume()
    trainer.open_batches()
    yield trainer
    trainer.lock.release()


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for n in (trainer.network, trainer.ema_network) for p in n.parameters()]


def test_a_step_moves_network_and_ema_by_the_documented_amount(trainer):
    trainer.training_step()  # the first learning rate is 0
    ema_before = [p.clone() for p in trainer.ema_network.parameters()]
    trainer.training_step()
    decay = 1 - (1 + 2 / trainer.config.ema_inv_gamma) ** -trainer.config.ema_power
    pairs = zip(ema_before, trainer.ema_network.parameters(), trainer.network.parameters(), strict=True)
    for before, ema, weight in pairs:
        torch.testing.assert_close(ema, decay * before + (1 - decay) * weight)
    assert not all(torch.equal(b, e) for b, e in zip(ema_before, trainer.ema_network.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_is_skipped_whole(trainer, monkeypatch):
    trainer.training_step()
    before, rate = weights(trainer), trainer.optimizer.param_groups[0]["lr"]
    monkeypatch.setattr(training_data, "to_model_range", lambda images: images.float() * float("nan"))
    _, grad_norm, applied = trainer.training_step()
    assert not applied
    assert not torch.isfinite(grad_norm)
    assert (trainer.progress.step, trainer.progress.attempts) == (1, 2)
    assert all(torch.equal(one, other) for one, other in zip(before, weights(trainer), strict=True))
    monkeypatch.undo()
    assert trainer.training_step()[2]
    assert (trainer.progress.step, trainer.progress.attempts) == (2, 3)
    assert trainer.optimizer.param_groups[0]["lr"] > rate


def test_too_many_bad_gradients_in_a_row_end_the_run(trainer, monkeypatch):
    monkeypatch.setattr(training_data, "to_model_range", lambda images: images.float() * float("nan"))
    trainer.config.max_nonfinite_steps = 3
    with pytest.raises(train_unet.Failed, match="3 gradients in a row"):
        trainer.train()
    assert trainer.progress.attempts == 3


def test_accumulated_gradient_is_that_of_the_whole_batch(trainer, monkeypatch):
    """Two micro-batches of 7 give the mean of their gradients."""
    gradients, losses = [], []
    loss_of = train_unet.diffusion_loss

    def recording_loss(*arguments, **options):
        loss = loss_of(*arguments, **options)
        gradients.append(torch.autograd.grad(loss, list(trainer.network.parameters()), retain_graph=True))
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(train_unet, "diffusion_loss", recording_loss)
    loss, grad_norm, _ = trainer.training_step()
    assert loss.item() == pytest.approx(sum(losses) / 2)
    mean = torch.cat([(one + other).flatten() / 2 for one, other in zip(*gradients, strict=True)])
    assert grad_norm.item() == pytest.approx(mean.norm().item(), rel=1e-5)


def test_a_failing_sampler_does_not_end_the_training(trainer, capfd):
    with torch.no_grad():
        trainer.ema_network.conv_out.weight.fill_(float("nan"))
    before = weights(trainer)
    trainer.save_samples()
    assert "sampling failed" in "".join(capfd.readouterr())
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, weights(trainer), strict=True))
    assert trainer.network.training
    assert trainer.training_step()[2]


def test_bf16_autocast_reaches_the_network_alone(tmp_path, cache_dir, monkeypatch):
    """The convolutions run in bfloat16; images, noise and loss stay float32."""
    changes = {"output_dir": str(tmp_path / "run"), "cache_dir": str(cache_dir), "mixed_precision": "bf16"}
    config = TrainConfig(**TINY | changes)
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = train_unet.Trainer(config, build_accelerator(config), float("inf"), StopSignal())
    seen = {}
    trainer.network.conv_in.register_forward_hook(
        lambda m, args, out: seen.update(inside=out.dtype, inp=args[0].dtype)
    )
    mse = train_unet.diffusion_loss.__globals__["per_image_mse"]
    monkeypatch.setitem(
        train_unet.diffusion_loss.__globals__,
        "per_image_mse",
        lambda a, b: seen.update(output=a.dtype, target=b.dtype) or mse(a, b),
    )
    trainer.open_batches()
    loss, _, applied = trainer.training_step()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert applied
    assert seen == {"inp": torch.float32, "inside": torch.bfloat16, "output": torch.float32, "target": torch.float32}
    assert loss.dtype == torch.float32


def test_the_pipeline_carries_the_grid_of_its_step_or_says_which(trainer):
    trainer.config.save_images_steps, trainer.config.checkpointing_steps, trainer.total_steps = 2, 3, 6
    exported = []

    def export():
        type(trainer).export(trainer)
        exported.append(json.loads((trainer.pipeline_dir / "training.json").read_text()))

    trainer.export = export
    trainer.train()
    assert [(facts["step"], facts["samples_step"]) for facts in exported] == [(3, 2), (6, 6), (6, 6)]


def test_an_export_that_a_kill_prevented_is_made_up_for(trainer):
    trainer.total_steps = 3
    trainer.train()
    (trainer.pipeline_dir / "training.json").write_text('{"step": 1}')
    trainer.train()  # nothing is left to train
    assert json.loads((trainer.pipeline_dir / "training.json").read_text())["step"] == 3


def test_the_facts_are_of_the_newest_heldout_loss_and_tell_no_path(make_trainer, tmp_path):
    trainer = make_trainer(validation_split="validation", validation_images=20)
    assert trainer.facts()["heldout"] is None
    for _ in range(2):
        trainer.training_step()
        trainer.report_heldout_loss()
    facts = trainer.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert str(tmp_path) not in json.dumps(facts)
    assert (facts["heldout"]["step"], facts["heldout"]["split"]) == (2, "validation")
    assert facts["heldout"].keys() > {"heldout_loss", "heldout_loss_q1", "heldout_loss_q4"}
    assert facts["objective"] == trainer.config.objective_settings()
    trainer.config.validation_split = None  # given up by a resumed run
    assert trainer.facts()["heldout"] is None


def test_log_records_are_json_numbers(trainer):
    trainer.record(loss=1.5)
    assert json.loads((trainer.output_dir / "log.jsonl").read_text()) == {"step": 0, "images_seen": 0, "loss": 1.5}
