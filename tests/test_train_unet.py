"""train_unet.py as users run it: complete runs, kills, resumes and errors, and single training steps."""

import copy
import importlib.machinery
import json
import math
import re
import shutil
import signal
import sys
from functools import partial
from types import ModuleType
from unittest.mock import MagicMock

import accelerate.tracking
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_pipeline import tiny_pipeline
from tiny_training import TINY, assert_same_tensors, error_line, records, signal_at

import train_unet
from pipelines import CustomUNetPipeline
from pipelines.pretrained import take_weights
from training import training_data
from training.checkpoint import list_checkpoints, save_checkpoint
from training.config import TrainConfig
from training.log import report_heldout_loss, save_samples
from training.processes import build_accelerator

pytest_plugins = ["tiny_training"]


def test_run_exports_a_pipeline_and_a_repeated_command_changes_nothing(start, tmp_path):
    run = tmp_path / "run"
    flags = ["--validation_split", "validation", "--validation_images", "20", "--report_to", "tensorboard"]
    output = start(run, *flags).finish(0)
    for text in ("parameters at 8x8", "images/s", "9 of 9 steps, 126 images"):
        assert text in output
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-9"}
    assert list(records(run, "loss")) == list(range(1, 10))
    assert list(records(run, "heldout_loss")) == [0, 9]
    rate = records(run, "learning_rate")
    assert [rate[step] for step in (1, 2, 3)] == pytest.approx([0, 0.5e-3, 1e-3])
    assert list(run.rglob("events.out.tfevents*"))
    pipe = CustomUNetPipeline.from_pretrained(run / "pipeline")
    ema = load_file(run / "checkpoint-9" / "ema_unet.safetensors")
    assert all(torch.equal(value, ema[key]) for key, value in pipe.unet.state_dict().items())
    record = json.loads((run / "pipeline" / "training.json").read_text())
    assert (record["step"], record["total_steps"], record["images_seen"], record["samples_step"]) == (9, 9, 126, 9)
    assert record["heldout"]["heldout_loss"] == records(run, "heldout_loss")[9]
    assert (run / "pipeline" / "samples.png").read_bytes() == (run / "samples" / "step-0000009.png").read_bytes()
    for path in (run / "pipeline" / "training_config.yaml", run / "config.yaml"):
        saved = yaml.safe_load(path.read_text())
        assert {key: saved[key] for key in TINY} == TINY | {"report_to": "tensorboard"}
    assert "126 images seen" in (run / "pipeline" / "README.md").read_text()
    for path in (run / "pipeline").rglob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes()

    (run / "pipeline" / "results.json").write_text('{"results": []}')
    log = (run / "log.jsonl").read_text()
    assert "step 9" in start(run, *flags).finish(0)
    assert (run / "log.jsonl").read_text() == log
    assert (run / "pipeline" / "results.json").exists(), "the weights that were measured are still these"


def test_trackers_continue_after_a_stop(train, tmp_path, monkeypatch):
    """W&B continues the same run inside the output folder; TensorBoard drops events after the checkpoint."""
    calls = []
    wandb = ModuleType("wandb")
    wandb.init = lambda **options: calls.append(options) or MagicMock()
    wandb.config = wandb.Image = MagicMock()
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["tensorboard", "wandb"])
    heldout = {"validation_split": "validation", "validation_images": 4}
    for name, checkpoint in (("run", "latest"), ("run", tmp_path / "run" / "checkpoint-6"), ("other", "latest")):
        train(tmp_path / name, "--report_to", "all", "--resume_from_checkpoint", checkpoint, **heldout)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["resume_from_checkpoint"] == "latest"
    for path in list_checkpoints(tmp_path / "run").values():  # so that the run starts again
        shutil.rmtree(path)
    train(tmp_path / "run", "--report_to", "all", **heldout)
    first, second, other, again = calls
    assert first == second == again
    assert (first["dir"], first["resume"]) == (str(tmp_path / "run"), "allow")
    assert first["id"] != other["id"]
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "unet")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [*range(1, 10)]
    assert [event.step for event in events.Scalars("heldout_loss")] == [0, 9]


KILLS = {  # flags, processes, the step whose record is not written, the checkpoints at that time
    "mid-epoch": ("", 1, 6, [3]),  # 50 images, 14 per update: checkpoints fall inside epochs
    "two workers": ("--dataloader_num_workers 2", 1, 9, [3, 6]),
    "two processes": ("", 2, 6, [3]),
    "end of an epoch": ("--max_images 35 --checkpointing_steps 5", 1, 9, [5]),
    "edm with classes": ("--objective edm --label_column glasses --channels_last true", 1, 9, [3, 6]),
    "muon": ("--optimizer muon", 1, 9, [3, 6]),
}


@pytest.mark.parametrize("kill", KILLS)
def test_resume_after_sigkill_is_bit_identical(start, straight, tmp_path, kill):
    """With dropout, flips and gradient accumulation."""
    flags, num_processes, step, checkpoints = KILLS[kill]
    flags, run, undisturbed = flags.split(), tmp_path / "run", tmp_path / "undisturbed"
    if kill in ("mid-epoch", "two workers"):
        undisturbed = straight
    else:
        start(undisturbed, *flags, num_processes=num_processes).finish(0)
    fault = partial(signal_at, signal.SIGKILL, "open", "/run/log.jsonl", step)  # it is opened once for each record
    start(run, *flags, fault=fault, num_processes=num_processes).finish(-signal.SIGKILL)
    assert list(list_checkpoints(run)) == checkpoints
    output = start(run, *flags, num_processes=num_processes).finish(0)
    assert re.search(rf"starts at +step {checkpoints[-1]}\n", output)
    assert records(run, "loss") == records(undisturbed, "loss")
    assert_same_tensors(run / "checkpoint-9", undisturbed / "checkpoint-9")


def test_two_processes_keep_the_learning_rate_and_the_images_seen(start, tmp_path):
    start(tmp_path / "one", "--train_batch_size", "14").finish(0)
    start(tmp_path / "two", num_processes=2).finish(0)
    one, two = (records(tmp_path / name, "learning_rate") for name in ("one", "two"))
    assert one == two
    assert one[9] > 0
    assert [records(tmp_path / name, "images_seen")[9] for name in ("one", "two")] == [9 * 28, 9 * 28]


def test_time_budget_ends_the_run_and_the_same_command_resumes_it(make_trainer):
    trainer = make_trainer(max_train_steps=10_000, checkpointing_steps=10_000)
    step_once = trainer.training_step

    def step_until_the_deadline():
        trainer.stop.deadline_seconds = math.inf if trainer.progress.step < 4 else 0.0
        return step_once()

    trainer.training_step = step_until_the_deadline
    trainer.train()
    trainer.lock.release()
    assert list(list_checkpoints(trainer.output_dir)) == [5]
    assert json.loads((trainer.pipeline_dir / "training.json").read_text())["step"] == 5
    again = make_trainer(max_train_steps=6, lr_scheduler="constant", output_dir=trainer.config.output_dir)
    again.train()
    assert list(records(again.output_dir, "loss")) == [1, 2, 3, 4, 5, 6]


def test_dry_run_shows_sizes_and_memory_and_writes_nothing(train, tmp_path):
    output = train(tmp_path / "run", "--dry_run")
    assert re.search(r"dry run: loss .*; one update takes .* s and [\d,]+ MiB\n", output)
    for row in (r"memory +\d MiB for weights", "14 = 7 x 2 accumulated x 1 processes", r"9 updates = 2\.5 epochs"):
        assert re.search(row, output)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--resolution 9", "sample_size"),
        ("--split test", "validation"),
        ("--validation_split validation --validation_images 3", "3 held-out images"),
        ("--train_batch_size 51", "50 images are fewer"),
        ("--mixed_precision fp16", "fp16 needs a GPU"),
        ("--label_column mouth", "glasses"),
    ],
)
def test_bad_input_exits_with_code_2_and_one_line(flags, message, train, tmp_path):
    assert message in error_line(train(tmp_path / "run", *flags.split(), code=2))
    assert not (tmp_path / "run").exists()


def test_a_pipeline_folder_with_other_files_is_refused_before_training(train, tmp_path):
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    (tmp_path / "run" / "pipeline" / "notes.txt").touch()
    assert "not a model repository" in error_line(train(tmp_path / "run", code=2))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["pipeline"]


def test_a_folder_of_images_is_enough_to_train(tmp_path, cache_dir, on_cpu, capfd):
    """The quickstart configuration is used, without its data set and its validation split."""
    (tmp_path / "faces").mkdir()
    for number in range(16):
        Image.new("RGB", (20, 30), (number, 0, 0)).save(tmp_path / "faces" / f"{number}.png")
    own = ["--cache_dir", str(cache_dir), "--output_dir", str(tmp_path / "run"), "--max_train_steps", "1"]
    own += ["--save_images_steps", "1000", "--ddpm_num_inference_steps", "2", "--eval_batch_size", "1"]
    assert train_unet.main(["--train_data_dir", str(tmp_path / "faces"), *own]) == 0
    output = capfd.readouterr().out
    assert "--train_data_dir replaces dataset_name, validation_split of quickstart.yaml" in output
    assert len(list_checkpoints(tmp_path / "run")) == 1


def test_accelerate_environment_variable_does_not_scale_gradients(monkeypatch, on_cpu):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert build_accelerator(TrainConfig(**TINY)).gradient_accumulation_steps == 1


def test_errors_on_the_main_process_end_all_processes(start, tmp_path):
    output = start(tmp_path / "run", "--split", "nowhere", num_processes=2).finish(2)
    for rank in ("", r"\[rank 1\] "):
        assert re.search(rf"^{rank}error: .*nowhere", output, re.MULTILINE), output


# ---- Starting from pretrained weights


@pytest.fixture
def pretrained(make_trainer) -> train_unet.Trainer:
    """A trainer after two steps, with its exported pipeline."""
    trainer = make_trainer(learning_rate=0.05, lr_warmup_steps=0)
    trainer.training_step()
    trainer.training_step()
    trainer.export()
    return trainer


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_run_starts_from_the_ema_weights_of_a_pretrained_model(pretrained, make_trainer, tmp_path):
    """Only the first start needs them, and the exported model records where they came from."""
    name = {"pretrained_model_name_or_path": str(pretrained.pipeline_dir)}
    other = {"dropout": 0.2, "resolution": 16, "seed": 5}
    run = make_trainer(**name, **other)
    assert not same_weights(pretrained.network, pretrained.ema_network)
    assert same_weights(run.network, pretrained.ema_network)
    assert same_weights(run.ema_network, pretrained.ema_network)
    run.training_step()
    run.training_step()
    save_checkpoint(run)
    run.export()
    run.lock.release()
    pretrained.pipeline_dir.rename(tmp_path / "moved")
    again = make_trainer(**name, **other, output_dir=run.config.output_dir)
    assert again.progress.step == 2
    assert again.pretrained_facts == run.pretrained_facts
    assert same_weights(again.network, run.network)

    record = json.loads((run.pipeline_dir / "training.json").read_text())
    seconds = pretrained.progress.train_seconds
    assert record["pretrained"] == {"name": "run0", "images_seen": 28, "train_seconds": seconds, "celeba": False}
    assert "the weights of `run0`, which had seen 28 images" in (run.pipeline_dir / "README.md").read_text()
    public = yaml.safe_load((run.pipeline_dir / "training_config.yaml").read_text())
    assert public["pretrained_model_name_or_path"] == "run0"
    third = make_trainer(pretrained_model_name_or_path=str(run.pipeline_dir), **other)
    assert third.pretrained_facts["images_seen"] == 28 + 28


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 4)])
def test_deeper_network_starts_as_the_same_function(old, new):
    shallow, deep = (tiny_pipeline(layers_per_block=layers).unet.eval() for layers in (old, new))
    take_weights("shallow", shallow, deep, {**deep.config})
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([5, 700])
    torch.testing.assert_close(deep(*inputs).sample, shallow(*inputs).sample)
    assert len([*deep.parameters()]) > len([*shallow.parameters()])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--block_out_channels 8 24", "has another network (block_out_channels: [8, 16] -> [8, 24])"),
        ("--objective edm", "predicts v_prediction, this run edm"),
        ("--label_column hair_style", "num_class_embeds: None -> 8"),
    ],
)
def test_incompatible_pretrained_models_are_rejected(flags, message, pretrained, train, tmp_path):
    flags = ["--pretrained_model_name_or_path", pretrained.pipeline_dir, *flags.split()]
    assert message in error_line(train(tmp_path / "new", *flags, code=2))
    assert not (tmp_path / "new").exists()


# ---- Classes


def labels_seen_by(network, call) -> torch.Tensor:
    seen = []
    hook = network.class_embedding.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    call()
    hook.remove()
    return torch.cat(seen)


def test_labels_reach_the_network_and_are_dropped_at_the_given_rate(make_trainer):
    trainer = make_trainer(label_column="eye_colour", label_dropout=0.25)
    num_classes = len(trainer.data.label_names)
    assert trainer.network.config.num_class_embeds == num_classes + 1
    wanted = torch.cat([torch.tensor(next(trainer.data.batches)[1]) for _ in range(60)])
    trainer.open_batches()
    seen = labels_seen_by(trainer.network, lambda: [trainer.training_step() for _ in range(30)])
    kept = seen != num_classes
    assert torch.equal(seen[kept], wanted[kept])
    assert (~kept).double().mean().item() == pytest.approx(0.25, abs=0.06)


def test_heldout_loss_uses_true_labels_and_grids_cycle_through_classes(make_trainer, capfd):
    changes = {"validation_split": "validation", "validation_images": 20, "objective": "edm", "eval_batch_size": 5}
    trainer = make_trainer(label_column="glasses", in_channels=4, report_to="tensorboard", **changes)
    store = trainer.data.open_store("validation", 20)
    seen = labels_seen_by(trainer.ema_network, lambda: report_heldout_loss(trainer))
    assert torch.equal(seen, torch.from_numpy(store.labels.copy()))
    assert seen.max() == 1
    seen = labels_seen_by(trainer.ema_network, lambda: save_samples(trainer))
    assert seen.view(-1, 5).unique(dim=0).tolist() == [[0, 1, 0, 1, 0]]
    assert "sampling failed" not in "".join(capfd.readouterr())


# ---- One training step


@pytest.fixture
def trainer(make_trainer):
    return make_trainer()


def test_nonfinite_gradients_skip_the_whole_update(trainer, monkeypatch):
    trainer.training_step()
    networks, rate = (trainer.network, trainer.ema_network), trainer.optimizer.param_groups[0]["lr"]
    before = copy.deepcopy(networks)
    monkeypatch.setattr(training_data, "to_model_range", lambda images: images.float() * float("nan"))
    _, grad_norm, applied = trainer.training_step()
    assert not applied
    assert not torch.isfinite(grad_norm)
    assert (trainer.progress.step, trainer.progress.attempts) == (1, 2)
    assert all(same_weights(one, other) for one, other in zip(before, networks, strict=True))
    monkeypatch.undo()
    assert trainer.training_step()[2]
    assert (trainer.progress.step, trainer.progress.attempts) == (2, 3)
    assert trainer.optimizer.param_groups[0]["lr"] > rate


def test_accumulated_gradient_equals_that_of_the_whole_batch(trainer, monkeypatch):
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


def test_bf16_autocast_applies_only_to_the_network(make_trainer, monkeypatch):
    """The convolutions run in bfloat16; images, noise and loss stay float32."""
    trainer, seen = make_trainer(mixed_precision="bf16"), {}
    trainer.network.conv_in.register_forward_hook(
        lambda module, arguments, output: seen.update(inside=output.dtype, inputs=arguments[0].dtype)
    )
    used = train_unet.diffusion_loss.__globals__
    mse = used["per_image_mse"]
    monkeypatch.setitem(used, "per_image_mse", lambda a, b: seen.update(output=a.dtype, target=b.dtype) or mse(a, b))
    loss, _, applied = trainer.training_step()
    assert applied
    assert seen.pop("inside") == torch.bfloat16
    assert {*seen.values(), loss.dtype} == {torch.float32}


# ---- What a run reports


def test_pipeline_records_the_step_of_its_sample_grid(trainer):
    trainer.config.save_images_steps, trainer.config.checkpointing_steps, trainer.total_steps = 2, 3, 6
    exported = []

    def export():
        type(trainer).export(trainer)
        exported.append(json.loads((trainer.pipeline_dir / "training.json").read_text()))

    trainer.export = export
    trainer.train()
    assert [(record["step"], record["samples_step"]) for record in exported] == [(3, 2), (6, 6), (6, 6)]
    (trainer.pipeline_dir / "training.json").write_text('{"step": 1}')
    trainer.train()  # nothing is left to train, but a kill may have prevented the export
    assert exported[-1]["step"] == 6
    assert len(exported) == 4
