"""Pushing to the Hub and loading from it by repository id, against a stand-in on loopback (loopback_hub.py)."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub import HfApi, ModelCard, constants
from loopback_hub import TOKEN, LoopbackHub
from PIL import Image
from tiny_pipeline import tiny_pipeline
from tiny_training import REPOSITORY, TINY, error_line

import train_unet
from pipelines import CustomUNetPipeline, export
from pipelines.export import export_pipeline
from pipelines.loading import find_pipeline, load_pipeline
from training.sde import SDEScheduler

STRAY = ("checkpoint-10/optimizer.pt", "log.jsonl", ".env", "scheduler/notes.txt", "unet/diffusion_pytorch_model.bin")


@pytest.fixture(autouse=True)
def the_hub(hub, tmp_path, monkeypatch):
    """Makes huggingface_hub in this process take the stand-in for the Hub; HF_TOKEN is the only login."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model repository with weights in two shards, and stray files beside its own."""
    grid, folder = tmp_path / "grid.png", tmp_path / "faces"
    Image.new("RGB", (8, 8)).save(grid)
    pipe = tiny_pipeline()
    export_pipeline(pipe, folder, sample_grid=grid)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipe.unet.save_pretrained(folder / "unet", max_shard_size=30_000)
    for name in STRAY:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} must not leave this machine")
    return folder


def environment(hub: LoopbackHub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """An environment without this repository on the path and without the user's caches and login."""
    hidden = ("PYTHONPATH", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    env |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    env["HF_ENDPOINT"] = hub.address
    return env | ({"HF_TOKEN": token} if token else {})


def run(*arguments: str | Path, env: dict[str, str], cwd: Path = REPOSITORY) -> tuple[int, str]:
    """The exit code, and stdout followed by stderr, which must not contain the token."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert TOKEN not in output
    return done.returncode, output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def push(folder: Path, *flags: str) -> int:
    return export.main(["push", "--pipeline", str(folder), "--repo_id", "faces", *flags])


def own_files(folder: Path) -> set[str]:
    return {*contents(folder)} - {*STRAY}


LOAD = """
import sys
from pathlib import Path
import numpy, torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants
first_commit, out = sys.argv[1:]

def draw(pipe):
    generator = [torch.Generator().manual_seed(3)]
    return pipe(batch_size=1, generator=generator, num_inference_steps=4, output_type="np").images

pipe = DiffusionPipeline.from_pretrained("someone/faces", trust_remote_code=True)
assert type(pipe.scheduler).__name__ == "SDEScheduler"
assert all("diffusers_modules" in type(part).__module__ for part in (pipe, pipe.unet, pipe.scheduler))
assert len([*Path(constants.HF_HUB_CACHE).glob("models--someone--faces/snapshots/*/scheduler/sde.py")]) == 1
pinned = DiffusionPipeline.from_pretrained("someone/faces", revision=first_commit, trust_remote_code=True)
assert type(pinned.scheduler).__name__ == "DDIMScheduler"
numpy.savez(out, newest=draw(pipe), pinned=draw(pinned))
"""


def test_push_and_load_by_id_in_a_fresh_process(hub, folder, tmp_path):
    """The second push, of an SDE model in a single file, removes all shards of the first."""
    before = contents(folder)
    command = ["-m", "pipelines.export", "push", "--pipeline", folder, "--repo_id", "faces"]
    code, output = run(*command, env=environment(hub, tmp_path / "pushing"))
    assert (code, contents(folder)) == (0, before), output
    assert "pushed: " in output
    uploaded = hub.files("someone/faces")
    assert uploaded.keys() == own_files(folder) | {".gitattributes"}
    assert len([name for name in uploaded if name.endswith(".safetensors")]) >= 2
    assert all(uploaded[name] == before[name] for name in own_files(folder) - {"README.md"})
    card = ModelCard(uploaded["README.md"].decode())
    assert 'from_pretrained("someone/faces", revision=commit, trust_remote_code=True)' in card.text
    assert len(hub.commits["someone/faces"]) == 2, "the push is one commit"
    assert not hub.private

    second = tiny_pipeline(SDEScheduler(), seed=1)
    expected = {"pinned": CustomUNetPipeline.from_pretrained(folder), "newest": second}
    first_commit = hub.commit_id("someone/faces")
    export_pipeline(second, folder)
    hub.faults["PUT /lfs"] = ["cut"]  # huggingface_hub retries by itself
    assert push(folder) == 0
    assert not hub.faults["PUT /lfs"]
    assert hub.files("someone/faces").keys() == {*contents(folder)} | {".gitattributes"}

    out, home = tmp_path / "images.npz", tmp_path / "loading"
    code, output = run("-c", LOAD, first_commit, out, env=environment(hub, home, token=None), cwd=tmp_path)
    assert code == 0, output
    images = np.load(out)
    for name, pipe in expected.items():
        seeded = {"generator": [torch.Generator().manual_seed(3)], "num_inference_steps": 4, "output_type": "np"}
        np.testing.assert_allclose(images[name], pipe(batch_size=1, **seeded).images, atol=1e-5)
    assert np.abs(images["newest"] - images["pinned"]).max() > 0.01

    everything = [*hub.bodies, *hub.files("someone/faces").values(), *contents(tmp_path).values()]
    assert not any(TOKEN.encode() in content for content in everything)
    assert not any(b"must not leave" in content for content in hub.bodies)


def test_generating_from_the_hub_downloads_no_code(hub, tmp_path):
    folder = export_pipeline(tiny_pipeline(SDEScheduler()), tmp_path / "faces")
    assert push(folder) == 0
    source, commit = find_pipeline("someone/faces", None)
    assert commit == hub.commit_id("someone/faces")
    assert "scheduler/scheduler_config.json" in contents(source)
    assert not [name for name in contents(tmp_path / "hub-cache") if name.endswith(".py")]
    assert load_pipeline(source, "fp32", "predictor_corrector", snr=0.2).continuous_sampler.settings["snr"] == 0.2


# Failures: one line with the command to retry, an unchanged local folder, no token anywhere

CASES = {
    "server error on commit": ({"POST .*/commit/": [500]}, "500"),
    "connection lost during commit": ({"POST .*/commit/": ["cut"]}, "disconnected|reset"),
    "file rejected": ({"PUT /lfs": [403] * 9}, "403"),
    "no permission": ({"POST .*/commit/": [403]}, "use a token with write access there"),
}


@pytest.mark.parametrize("case", CASES)
def test_failed_push_prints_one_line_with_a_working_retry_command(hub, folder, case, capfd):
    faults, reason = CASES[case]
    hub.faults = {pattern: list(outcomes) for pattern, outcomes in faults.items()}
    before = contents(folder)
    assert push(folder, "--private") == 1
    output = "".join(capfd.readouterr())
    assert TOKEN not in output
    line = error_line(output)
    assert re.search(reason, line)
    assert contents(folder) == before
    assert len(hub.commits.get("someone/faces", [])) <= 1, "nothing was committed"
    hub.faults = {}
    command = line.split("push it again with: ")[1]
    assert command.startswith("python -m pipelines.export push ")
    assert export.main(shlex.split(command)[3:]) == 0
    assert hub.files("someone/faces").keys() == own_files(folder) | {".gitattributes"}
    assert hub.private == {"someone/faces"}


def test_token_name_and_network_errors_are_one_line(hub, folder, monkeypatch, capfd):
    def refused(repo_id: str = "faces") -> str:
        assert push(folder, "--repo_id", repo_id) == 1
        output = "".join(capfd.readouterr())
        assert not re.search("hf_(secret|wrong)", output)
        return error_line(output)

    assert "403" in refused("another/faces")
    assert "'a/b/c'" in refused("a/b/c")
    hub.error_text = f"the header said Bearer {TOKEN}"  # a server's response may quote the request
    hub.faults = {"POST /api/repos/create": [400]}
    assert "the header said Bearer ***" in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_wrongToken")
    assert "401" in refused()
    monkeypatch.delenv("HF_TOKEN")
    assert "set HF_TOKEN or log in with `hf auth login`" in refused()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port refuses connections
    assert "refused" in refused()
    assert not hub.commits


def test_unresponsive_hub_times_out(hub, folder, monkeypatch, capfd):
    monkeypatch.setattr("pipelines.hub.TIMEOUT_SECONDS", 0.2)
    hub.faults = {"POST /api/repos/create": ["stall"]}
    assert push(folder) == 1
    assert "timed out" in error_line(capfd.readouterr().err)


# Edits by people


def edit_on_hub(hub: LoopbackHub, card: bytes = b"", **files: bytes) -> None:
    """A commit made on the web page: text appended to the card, and more files."""
    there = hub.files("someone/faces")
    edited = there | {name.replace("__", "/"): content for name, content in files.items()}
    hub.commits["someone/faces"].append(edited | {"README.md": there["README.md"] + card})
    hub.heads["someone/faces", "main"] += 1


def test_local_and_hub_edits_survive_pushes_and_exports(hub, folder):
    with (folder / "README.md").open("a") as card:
        card.write("\n## Acknowledgements\n\nThanks to those who posed.\n")
    assert push(folder) == 0
    assert b"Thanks to those who posed." in hub.files("someone/faces")["README.md"]
    variant = "unet__diffusion_pytorch_model.fp16.safetensors"
    edit_on_hub(hub, b"\n## Written on the web page\n", unet__notes=b"notes", results=b"mine", **{variant: b"mine"})
    pipe = CustomUNetPipeline.from_pretrained(folder)
    export_pipeline(pipe, folder)  # one file of weights, and no samples.png
    assert "Thanks to those who posed." in (folder / "README.md").read_text()
    assert push(folder) == 0
    there = hub.files("someone/faces")
    assert {"unet/notes", "results", variant.replace("__", "/")} <= there.keys(), "no push wrote them"
    assert not [name for name in there if "-of-" in name or name == "samples.png"], "a push wrote them"
    text = there["README.md"].decode()
    assert text.count("## Acknowledgements\n\nThanks to those who posed.") == 1
    assert text.count("## Written on the web page") == 1
    assert "samples.png" not in text.split("<!--")[0]
    assert ModelCard(text).data.library_name == "diffusers"


def test_concurrent_commit_is_not_overwritten(hub, folder, capfd):
    """The pushed card was merged with the card that was on the Hub before."""
    assert push(folder) == 0
    hub.before_commit = lambda: edit_on_hub(hub, b"\n## Just now\n")
    assert push(folder) == 1
    assert "412" in error_line(capfd.readouterr().err)
    assert push(folder) == 0
    assert b"## Just now" in hub.files("someone/faces")["README.md"]


# Rejected before any request to the Hub


def point_outside(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text()) | {"unet": ["../evil", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def link_outside(folder: Path) -> None:
    (folder / "samples.png").unlink()
    (folder / "samples.png").symlink_to("/etc/hostname")


SPOILERS = {
    "not a model repository": lambda folder: (folder / "model_index.json").unlink(),
    "custom_unet_2d.py": lambda folder: (folder / "unet" / "custom_unet_2d.py").unlink(),
    "../evil": point_outside,
    "-00002-of": lambda folder: next((folder / "unet").glob("*-00002-of*")).unlink(),
    "is damaged": lambda folder: torch.save({}, next((folder / "unet").glob("*-00001-of*"))),
    "resolves to a path outside the folder": link_outside,
}


@pytest.mark.parametrize("reason", SPOILERS)
def test_invalid_folder_is_rejected_before_any_request(hub, folder, reason, capfd):
    SPOILERS[reason](folder)
    assert push(folder) == 2
    assert reason in error_line(capfd.readouterr().err)
    assert not hub.bodies


# The trainer


@pytest.fixture
def train_flags(tmp_path) -> list[str]:
    AcceleratorState._reset_state(reset_partial_state=True)  # left over from earlier tests
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"max_train_steps": 3, "push_to_hub": True}))
    flags = ["--config", tmp_path / "tiny.yaml", "--output_dir", tmp_path / "runs" / "tiny-faces"]
    return [str(flag) for flag in (*flags, "--cache_dir", tmp_path / "cache")]


def test_trainer_pushes_after_training_without_leaking_secrets(hub, train_flags, tmp_path):
    """Neither the Hub's token, by its current or its old variable, nor the W&B key is printed, written or pushed."""
    wandb_key = "0123456789wandbKeyOfThisTest0123456789"
    env = environment(hub, tmp_path / "home") | {"ACCELERATE_USE_CPU": "true", "WANDB_API_KEY": wandb_key}
    flags = ["--report_to", "tensorboard", "--validation_split", "valid", "--validation_images", "4"]
    flags += ["--checkpointing_steps", "2", "--save_images_steps", "2", "--logging_steps", "1", "--hub_private_repo"]
    code, output = run("train_unet.py", *train_flags, *flags, env=env | {"HUGGING_FACE_HUB_TOKEN": TOKEN})
    assert code == 0, output
    assert "pushed: " in output
    assert hub.private == {"someone/tiny-faces"}
    written, pushed = contents(tmp_path), hub.files("someone/tiny-faces")
    for part in ("config.yaml", "log.jsonl", "events.out.tfevents", "checkpoint-2/"):
        assert part in " ".join(written)
    assert pushed.keys() == {*contents(tmp_path / "runs" / "tiny-faces" / "pipeline"), ".gitattributes"}
    assert {"README.md", "samples.png", "training.json", "training_config.yaml"} <= pushed.keys()
    assert not any(re.search(r"optimizer|checkpoint|log\.jsonl|events|\.lock", name) for name in pushed)
    assert not any(str(tmp_path).encode() in content for content in pushed.values())
    for secret in (TOKEN, wandb_key):
        assert secret not in output
        assert not any(secret.encode() in content for content in (*written.values(), *hub.bodies, *pushed.values()))


def test_trainer_checks_access_to_the_hub_before_training(hub, train_flags, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("HF_TOKEN")
    assert train_unet.main(train_flags) == 2
    assert "set HF_TOKEN" in error_line(capfd.readouterr().err)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert train_unet.main([*train_flags, "--hub_model_id", "another/faces"]) == 2
    assert "the token belongs to someone, not to another" in error_line(capfd.readouterr().err)
    hub.token_role = "read"
    assert train_unet.main(train_flags) == 2
    assert "the token is read-only" in error_line(capfd.readouterr().err)
    hub.token_role = "write"
    HfApi().create_repo("tiny-faces")
    hub.faults = {"GET .*/auth-check/write": [403]}
    assert train_unet.main(train_flags) == 2
    assert "use a token with write access there" in error_line(capfd.readouterr().err)
    hub.commits.clear()
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "runs").exists()
    assert train_unet.main([*train_flags, "--split", "nowhere"]) == 2
    assert not hub.commits, "a repository was created for a training without data"


def test_failed_push_by_the_trainer_keeps_the_run_and_can_be_retried(hub, train_flags, tmp_path, capfd):
    hub.faults = {"POST .*/commit/": [500]}
    assert train_unet.main([*train_flags, "--hub_model_id", "someone/else"]) == 1
    line = error_line(capfd.readouterr().err)
    assert (tmp_path / "runs" / "tiny-faces" / "checkpoint-3").is_dir()
    assert export.main(shlex.split(line.split("push it again with: ")[1])[3:]) == 0
    assert "unet/diffusion_pytorch_model.safetensors" in hub.files("someone/else")
