"""The complete evaluation of tiny models through the command."""

import argparse
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler
from PIL import Image
from stand_in_networks import write_features
from tiny_pipeline import tiny_pipeline
from tiny_training import error_line, torchrun

from custom_unet import CustomUNet2DModel
from eval.distances import frechet_distance
from eval.encoders import open_extractor
from eval.evaluation import Evaluation, SamplerSetting, WithoutClass, parse_sampler
from eval.features import read_images, subset
from eval.results import result
from eval.run import keep, main, parse_options
from pipelines.export import export_pipeline
from training.data import open_image_store
from training.sde import SDEScheduler

N = 24
SMALL = f"--num_images {N} --steps 3".split()
SMALL += "--likelihood_images 3 --bound_evaluations 3 --ode_images 2 --heldout_images 4 --cost_images 4".split()
SMALL += "--cost_samplers ddim:2 ddim:3:1 unipc:3 --num_cpu_threads 1".split()
FAMILIES = {"swd", "colours", "features", "memorisation", "likelihood", "heldout", "cost", "time"}
FACTS = {  # what the card needs to know about a run
    **{"step": 1, "images_seen": 4, "train_seconds": 1.0, "num_processes": 1, "device": "cpu", "precision": "fp32"},
    "pretrained": {"name": "before", "images_seen": 8, "train_seconds": 1.5},
    "data": {"source": "real", "split": "train", "crop": "none", "resolution": 16, "num_images": 50},
    **{"versions": {"torch": "2"}, "date": "2026-11-23"},
}


def write_real_images(folder: Path, **counts: int) -> Path:
    """Smooth random images of 16x16 pixels, COUNTS by split."""
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng((count, i)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
            image.save(folder / split / f"{i:03}.png")
    return folder


def export(folder: Path, scheduler, **network) -> Path:
    """A model repository of a tiny network."""
    return export_pipeline(tiny_pipeline(scheduler, **{"sample_size": 16} | network), folder, facts=FACTS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A model repository, a TorchScript network, and a folder of real images."""
    folder = tmp_path_factory.mktemp("inputs")
    model = export(folder / "tiny", DDIMScheduler(prediction_type="v_prediction"))
    real = write_real_images(folder / "real", train=50, validation=8)
    return model, write_features(folder / "features.pt"), real


@pytest.fixture(scope="module")
def evaluate(inputs, tmp_path_factory):
    pipeline, features, real = inputs
    environment = pytest.MonkeyPatch()
    environment.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))

    def evaluate(out: Path, *flags: str, allow_few: bool = True) -> int:
        fixed = ["--pipeline", pipeline, "--reference", real, "--out", out, "--features", features, *SMALL]
        return main([*map(str, fixed), *["--allow_few"] * allow_few, *flags])

    yield evaluate
    environment.undo()


@pytest.fixture(scope="module")
def measured(evaluate, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluation")
    assert evaluate(out, "--write_card") == 0
    return out


def results(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["results"]


def test_results_and_card_have_every_metric_and_how_it_was_measured(measured, inputs):
    entries = results(measured)
    assert {entry["family"] for entry in entries} == FAMILIES
    swd = next(entry for entry in entries if entry["name"] == "SWD, mean")
    about = {"n": N, "n_reference": N, "sampler": "ddim", "steps": 3, "eta": 0.0, "seeds": f"0 to {N - 1}"}
    about |= {"dataset": "real", "split": "train", "crop": "none", "resolution": 16}
    assert about.items() <= swd.items()
    cost = [entry for entry in entries if entry["family"] == "cost"]
    assert len(cost) == 3 * len(("swd", "brightness", "contrast", "saturation", "fid"))
    assert all(entry["network_evaluations"] == entry["steps"] and entry["seconds_per_image"] > 0 for entry in cost)
    figures = "bound_terms colours cost denoising_error heldout_loss memorisation memorisation_features.pt"
    assert {path.stem for path in measured.glob("*.png")} == set(figures.split())
    record = json.loads((measured / "results.json").read_text())
    assert set(record["versions"]) == {"python", "torch", "diffusers", "accelerate", "clean-fid", "scipy"}
    assert str(measured.parent) not in (measured / "results.json").read_text()
    on_the_card = {entry["family"] for entry in results(inputs[0])}
    assert on_the_card == {"swd", "features", "memorisation", "likelihood"}
    assert "| SWD, mean |" in (inputs[0] / "README.md").read_text()


def test_rerun_reuses_images_and_keeps_other_results(measured, evaluate, tmp_path, capsys):
    """Results measured on another device keep its name."""
    out = shutil.copytree(measured, tmp_path / "out")
    images, before = {path: path.stat().st_mtime_ns for path in out.rglob("seed-*.png")}, results(out)
    record = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps(record | {"device": "a GPU"}))
    assert evaluate(out, "--metrics", "swd", "cost") == 0
    assert capsys.readouterr().out.count("0 images generated") == 4
    assert {path: path.stat().st_mtime_ns for path in out.rglob("seed-*.png")} == images
    assert json.loads((out / "results.json").read_text())["device"] == "cpu"

    def values(entries):
        return sorted((json.dumps(entry["value"]), entry["name"]) for entry in entries if entry["family"] != "time")

    assert values(results(out)) == values(before)
    where = {entry["family"]: entry.get("device") for entry in results(out) if entry["value"] is not None}
    assert (where["swd"], where["cost"], where["memorisation"]) == (None, None, "a GPU")


def test_features_can_be_compared_with_photographs_of_another_resolution(evaluate, inputs, tmp_path):
    assert evaluate(tmp_path, "--metrics", "features", "--reference_resolution", "8") == 0
    store = open_image_store(train_data_dir=str(inputs[2]), split="train", crop="none", resolution=8)
    generated = read_images(sorted(tmp_path.rglob("seed-*.png")))
    sets = [torch.from_numpy(images) for images in (store.images[subset(50, N)], generated)]
    expected = frechet_distance(*(open_extractor(str(inputs[1]))(images).numpy() for images in sets))
    fid = next(entry for entry in results(tmp_path) if entry["metric"] == "fid")
    assert (fid["value"], fid["resolution"]) == (pytest.approx(expected, rel=1e-3), 8)


def test_names_of_networks_may_have_a_slash(evaluate, inputs, tmp_path, monkeypatch):
    network = dataclasses.replace(open_extractor(str(inputs[1])), name="owner/network")
    monkeypatch.setattr("eval.evaluation.open_extractor", lambda name, **_: network)
    assert evaluate(tmp_path, "--metrics", "features", "memorisation") == 0
    assert (tmp_path / "memorisation_network.png").exists()


def test_two_processes_give_the_same_results_as_one(measured, inputs, tmp_path):
    """For features and cost; only the main process measures the other metrics."""
    pipeline, features, real = inputs
    arguments = ["--pipeline", pipeline, "--reference", real, "--features", features, *SMALL, "--allow_few"]
    arguments += ["--metrics", "features", "cost", "--out", tmp_path / "out"]
    torchrun("eval.run", *arguments, XDG_CACHE_HOME=str(tmp_path))

    def values(out: Path) -> dict:
        families = [entry for entry in results(out) if entry["family"] in ("features", "cost")]
        return {(e["family"], e["name"], e["sampler"], e["steps"], e["eta"]): e["value"] for e in families}

    assert values(tmp_path / "out") == pytest.approx(values(measured), rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "24"], "--k is 24; it must be below --num_images 24"),
        (["--k", "0"], "--k is 0"),
        (["--reference_resolution", "8"], "only features can be compared; add --metrics features"),
        (["--seed", "-1"], "--seed is -1"),
        (["--eta", "nan"], "--eta is nan"),
        (["--bound_evaluations", "1"], "--bound_evaluations is 1"),
        (["--ode_images", "0"], "--ode_images is 0"),
        (["--ode_tolerance", "0"], "--ode_tolerance is 0"),
        (["--metrics", "fid2"], "invalid choice: 'fid2'"),
        (["--split", "test"], "no split 'test'; it has train, validation"),
        (["--features", "nothing", "--metrics", "swd", "cost"], "nothing is not a TorchScript module"),
        (["--features", "inception", "--inception_path", "nothing"], "nothing is not a file; run `make inception`"),
        (["--sampler", "ode", "--churn", "1"], "--churn is 1, but ode and ddim and unipc take no churn"),
        (["--cost_samplers", "ddim:5", "edm_heun:1"], "num_inference_steps is 1"),
        (["--cost_samplers", "ddim:5:2"], "eta is 2.0"),
        (["--class_label", "1"], "no class embeddings"),
        (["--heldout_split", "", "--metrics", "memorisation"], "give --heldout_split"),
        (["--cost_images", "30", "--metrics", "cost"], "needs twice as many real images, but there are 50"),
        (["--num_images", "1", "--metrics", "features"], "--num_images is 1; a distance between"),
        (["--num_images", "51"], "split train has 50 images"),
        (["--pipeline", "no/where", "--write_card"], "--write_card is for a folder"),
    ],
)
def test_bad_input_exits_with_code_2_and_one_line(evaluate, measured, flags, message, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = (measured / "results.json").read_text()
    assert evaluate(measured, *flags) == 2
    assert message in error_line(capfd.readouterr().err)
    assert (measured / "results.json").read_text() == before


def test_parse_sampler_accepts_name_steps_and_eta():
    found = [parse_sampler(text) for text in ("ddpm", "ddim:10:1", "ode")]
    assert found == [("ddpm", 50, 0), ("ddim", 10, 1), ("ode", 50, 0)]
    for text in ("", "ddim:x", "euler2:5", "ddim:5:nan", "ddim:5:1:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not NAME, NAME:STEPS or NAME:STEPS:ETA"):
            parse_sampler(text)


def test_too_few_or_too_small_images_are_rejected(evaluate, tmp_path, capfd):
    assert evaluate(tmp_path / "out", allow_few=False) == 2
    assert "24 images are too few" in capfd.readouterr().err
    small = export(tmp_path / "small", DDIMScheduler(), sample_size=8)
    assert evaluate(tmp_path / "out", "--pipeline", str(small), "--metrics", "swd") == 2
    assert "swd and cost need images of 16 pixels" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_same_measurement_replaces_the_earlier_one():
    missing = result("features", "FID (clean)", "fid", None, reason="no weights")
    measured, again, fewer = (
        result("features", "FID (clean)", "fid", value, n=n, sampler="ddim", steps=50)
        for value, n in ((9.0, 10000), (8.0, 10000), (11.0, 2048))
    )
    record = {"results": [missing]}
    for entry, expected in ((measured, [measured]), (again, [again]), (fewer, [again, fewer])):
        keep(record, entry)
        assert record["results"] == expected


# ---- Samplers in continuous time, SDE models, class-conditional models


def export_sde(folder: Path, objective: str, prediction_type: str, **network) -> str:
    scheduler = SDEScheduler(objective=objective, prediction_type=prediction_type)
    return str(export(folder / objective, scheduler, **network))


@pytest.fixture(scope="module")
def measured_sde(evaluate, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sde_evaluation")
    cost = "--cost_samplers edm_heun:2 ode --tolerance 0.01".split()
    assert evaluate(out, "--pipeline", export_sde(out, "edm", "edm"), "--write_card", *cost) == 0
    return out


def test_sde_model_has_results_for_every_metric(measured_sde):
    entries = results(measured_sde)
    assert {entry["family"] for entry in entries} == FAMILIES
    swd = next(entry for entry in entries if entry["name"] == "SWD, mean")
    own = {"churn": 0.0}
    assert {"sampler": "edm_heun", "steps": 3, "sampler_settings": own}.items() <= swd.items()
    assert len(list((measured_sde / "images" / "edm_heun-3-steps-fp32").glob("seed-*.png"))) == N
    drawing = next(entry for entry in entries if entry["metric"] == "seconds_drawing")
    assert drawing["network_evaluations"] == 5
    cost = [entry for entry in entries if entry["family"] == "cost" and entry["metric"] == "swd"]
    assert [(entry["sampler"], entry.get("steps")) for entry in cost] == [("edm_heun", 2), ("ode", None)]
    assert cost[0]["network_evaluations"] == 3 < cost[1]["network_evaluations"]
    assert [entry["sampler_settings"] for entry in cost] == [own, {"tolerance": 0.01}]
    parameters = tiny_pipeline().unet.num_parameters()
    model = {"objective": "edm", "prediction_type": "edm", "parameters": parameters}
    record = json.loads((measured_sde / "results.json").read_text())
    assert record["model"] == model | {"images_seen": 4 + 8, "train_seconds": 1.0 + 1.5}


def test_ode_and_errors_by_noise_level_are_measured_for_ddpm_and_sde_models(measured_sde, measured):
    for out, first_sigma in ((measured_sde, 0.002), (measured, 0.01)):
        ode = [entry for entry in results(out) if entry["metric"] == "bits_per_dim_ode"]
        assert [entry["first_sigma"] for entry in ode] == pytest.approx([first_sigma] * 2, rel=1e-3)
        errors = {entry["name"]: entry for entry in results(out) if entry["metric"] == "sample_mse"}
        assert {name.rpartition(", ")[2] for name in errors} == {"training", "held-out"}
        assert all(len(entry["curve"]) == len(entry["sigmas"]) == 16 for entry in errors.values())
    by_timestep = [entry for entry in results(measured) if entry["metric"] == "epsilon_mse"]
    assert [entry["timesteps"] for entry in by_timestep] == [[*range(25, 1000, 50)]] * 2
    assert all(entry["value"] == pytest.approx(np.mean(entry["curve"])) for entry in by_timestep)
    assert not any(entry["metric"] == "epsilon_mse" for entry in results(measured_sde))


def test_sampler_settings_reach_the_images_and_the_results(evaluate, tmp_path):
    """Including the churn that VE models have by default."""
    model = ["--pipeline", export_sde(tmp_path, "ve", "score", time_embedding_type="fourier"), "--metrics", "swd"]
    pc = "--sampler predictor_corrector --snr 0.1 --corrector_steps 2".split()
    for flags in ([], ["--churn", "0"], pc, ["--sampler", "ode", "--tolerance", "0.1"]):
        assert evaluate(tmp_path, *model, *flags) == 0
    names = "edm_heun-3-steps-churn-10-fp32 edm_heun-3-steps-fp32 ode-tolerance-0.1-fp32"
    folders = {path.name for path in (tmp_path / "images").iterdir()}
    assert folders == {*names.split(), "predictor_corrector-3-steps-snr-0.1-corrector_steps-2-fp32"}
    entries = [entry for entry in results(tmp_path) if entry["name"] == "SWD, mean"]
    assert [entry["sampler_settings"].get("churn") for entry in entries] == [10.0, 0.0, None, None]
    expected = [{"snr": 0.1, "corrector_steps": 2}, {"tolerance": 0.1}]
    assert [entry["sampler_settings"] for entry in entries[2:]] == expected
    assert [entry.get("steps") for entry in entries] == [3, 3, 3, None]
    record = json.loads((tmp_path / "images" / "ode-tolerance-0.1-fp32" / "generate.json").read_text())
    assert record["settings"]["continuous_sampler"] == {"name": "ode", "tolerance": 0.1}


def test_class_conditional_model_needs_class_labels_and_a_suitable_sampler(evaluate, tmp_path, capfd):
    model = ["--pipeline", export_sde(tmp_path, "subvp", "v_prediction", num_class_embeds=3)]
    for flags, message in (([], "class"), (["--class_label", "0", "--sampler", "ddim"], "'ddim'.*euler_maruyama")):
        assert evaluate(tmp_path, *model, "--metrics", "swd", *flags) == 2
        assert re.match(f"error: .*{message}", capfd.readouterr().err.splitlines()[-1])
    flags = ["--class_label", "0", "1", "--guidance_scale", "2", "--cost_samplers", "euler_maruyama:2"]
    assert evaluate(tmp_path, *model, *flags, "--metrics", "swd", "likelihood", "heldout", "cost") == 0
    folders = {path.name for path in (tmp_path / "images").iterdir()}
    settings = ("edm_heun-3-steps", "euler_maruyama-2-steps")
    assert folders == {f"{setting}-class-0-1-guidance-scale-2-fp32" for setting in settings}
    entries = {entry["metric"]: entry for entry in results(tmp_path)}
    assert np.isfinite([entries[metric]["value"] for metric in ("bits_per_dim_ode", "sample_mse")]).all()
    assert entries["swd_16"]["guidance_scale"] == 2.0
    assert entries["swd"]["class_label"] == [0, 1]  # the newest entry, from the cost curve
    assert entries["swd"]["network_evaluations"] == 2 * 3


def test_without_class_uses_the_null_class():
    network = tiny_pipeline(sample_size=16, num_class_embeds=3).unet.eval()
    images, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([5, 500])
    null, other = (network(images, timesteps, class_labels=torch.tensor([label] * 2)).sample for label in (2, 0))
    found = WithoutClass(network).eval()(images, timesteps).sample
    torch.testing.assert_close(found, null)
    assert (found - other).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["learned time embedding", "noise levels from 0.002 to 10,"])
def test_unsupported_metrics_are_not_measured(evaluate, tmp_path, case):
    """Networks with learned timesteps have no ODE; those of few noise levels cannot be compared at the usual ones."""
    scheduler, network = SDEScheduler(objective="edm", prediction_type="edm", sigma_max=10), {}
    metrics = {"sample_mse"}
    if case == "learned time embedding":
        scheduler, network = DDIMScheduler(), {"time_embedding_type": "learned", "num_train_timesteps": 1000}
        metrics |= {"bits_per_dim_ode", "epsilon_mse"}
    model, out = export(tmp_path / "model", scheduler, **network), tmp_path / "out"
    assert evaluate(out, "--pipeline", str(model), "--metrics", "likelihood", "heldout") == 0
    missing = [entry for entry in results(out) if entry["value"] is None]
    assert len(missing) == 2 * len(metrics)
    assert {entry["metric"] for entry in missing} == metrics
    assert all(case in entry["reason"] for entry in missing)


@pytest.mark.parametrize("embedding", ["positional", "learned"])
def test_default_cost_curve_has_only_samplers_that_the_network_supports(inputs, evaluate, tmp_path, embedding):
    _, features, real = inputs
    network = {"time_embedding_type": embedding, "num_train_timesteps": 1000}
    files = {"pipeline": export(tmp_path / "model", DDIMScheduler(), **network), "reference": real, "out": tmp_path}
    flags = [f"--{name}={path}" for name, path in (files | {"features": features}).items()]
    options = parse_options([*flags, "--metrics=cost", "--cost_images=4", "--num_images=4", "--allow_few"])
    settings = Evaluation(options, PartialState(), "", CustomUNet2DModel).cost_settings
    assert (SamplerSetting("dpmpp_2m", 20) in settings) == (embedding == "positional")
    assert SamplerSetting("unipc", 20) in settings
