"""The facts of a run: the newest held-out losses up to the step, what the machine is, and nothing of where it lies."""

import dataclasses
import json
import os
import platform

import torch
from torch import nn

from training.config import TrainConfig
from training.facts import LIBRARIES, device_name, recorded, run_facts


def test_facts(tmp_path):
    records = [{"step": step, "images_seen": step * 4, "heldout_loss": 1 / step} for step in (2, 4, 6)]
    records.insert(2, {"step": 5, "loss": 0.5})
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    config = TrainConfig(
        train_data_dir=str(tmp_path / "faces"), validation_split="test", max_train_steps=9, mixed_precision="bf16"
    )
    store = {"source": "faces", "revision": None, "num_images": 7}
    numbers = {"total_steps": 9, "images_seen": 20, "train_seconds": 1.5, "num_processes": 1}
    arguments = (config, nn.Linear(3, 2), store, tmp_path / "log.jsonl", torch.device("cpu"))
    facts = run_facts(*arguments, step=5, **numbers)
    assert json.loads(json.dumps(facts)) == facts
    assert str(tmp_path) not in json.dumps(facts)
    assert facts["heldout"] == {"step": 4, "heldout_loss": 0.25, "split": "test"}
    assert facts["data"] == {"source": "faces", "num_images": 7}
    assert (facts["step"], facts["parameters"], facts["precision"]) == (5, 8, "bf16")
    assert {key: facts[key] for key in numbers} == numbers
    assert facts["objective"] == config.objective_settings()
    assert facts["versions"].keys() == {"python", *LIBRARIES}
    assert facts["versions"]["python"] == platform.python_version()
    assert run_facts(*arguments, step=1, **numbers)["heldout"] is None
    without = dataclasses.replace(config, validation_split=None)  # given up by a run that goes on
    assert run_facts(without, *arguments[1:], step=5, **numbers)["heldout"] is None


def test_the_processor_is_named_with_its_cores():
    name = device_name(torch.device("cpu"))
    assert name.endswith(f", {len(os.sched_getaffinity(0))} cores")
    assert len(name.split(",")[0]) > 2
    assert device_name(torch.device("mps")) == "mps"


def test_the_step_of_a_model_repository(tmp_path):
    assert recorded(tmp_path, "step") is None
    (tmp_path / "training.json").write_text('{"step": 12}')
    assert recorded(tmp_path, "step") == 12
    for damaged in ('{"step', "[]", "{}"):
        (tmp_path / "training.json").write_text(damaged)
        assert recorded(tmp_path, "step") is None
