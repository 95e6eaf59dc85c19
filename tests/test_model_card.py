"""The model card agrees with the files beside it, has metadata that huggingface_hub reads, and no placeholders."""

import json
import re
import shutil
from pathlib import Path

import pytest
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import ModelCard
from tiny_network import TINY
from tiny_pipeline import sde_pipeline, tiny_pipeline

from common import InputError
from custom_unet import CustomUNet2DModel
from pipelines import CustomUNetPipeline
from pipelines.export import export_pipeline
from pipelines.model_card import render_card
from training.config import TrainConfig
from training.images import CROPS, crop_box

DATA = {"split": "train", "crop": "celeba_140", "resolution": 8, "num_images": 21_803, "num_skipped": 3}
HELDOUT = {"step": 2_500, "split": "validation", "heldout_loss": 0.0629, "heldout_loss_q1": 0.1895}
HELDOUT |= {"heldout_loss_q2": 0.0404, "heldout_loss_q3": 0.0175, "heldout_loss_q4": 0.0044}
FACTS = {
    "step": 3_000,
    "total_steps": 4_000,
    "images_seen": 96_000,
    "train_seconds": 2_676.0,
    "num_processes": 2,
    "num_heldout_images": 512,
    "samples_step": 2_500,
    "parameters": 1,
    "data": DATA | {"source": "faces", "fingerprint": "0123456789abcdef"},
    "heldout": HELDOUT,
    "device": "A CPU of this test, 2 cores",
    "precision": "bf16",
    "versions": {"python": "3.11", "torch": "2.15"},
    "date": "2026-11-23",
}
CELEBA = {"name": "faces", "images_seen": 9, "train_seconds": 1.0, "celeba": True}  # where a model may have started
CATS = CELEBA | {"name": "cats", "celeba": False}
RESULTS = [
    {"name": "FID (clean)", "metric": "fid", "value": 12.345, "mode": "clean", "n": 10_000, "sampler": "DDIM"}
    | {"steps": 50, "eta": 0.0},
    {"name": "KID (clean)", "metric": "kid", "value": 0.0123, "std": 0.001, "mode": "clean", "n": 10_000},
    {"name": "Recall", "metric": "recall", "value": None, "n": 10_000},
]


def config(**options) -> str:
    source = {"dataset_name": "someone/faces"} if "train_data_dir" not in options else {}
    options = {"resolution": 8, "max_train_steps": 4_000, "snr_gamma": 5.0, "output_dir": "runs/my-faces"} | options
    return TrainConfig(**source | options, train_batch_size=16, gradient_accumulation_steps=2).to_public_yaml()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    pipe = tiny_pipeline(DDIMScheduler(prediction_type="v_prediction"))
    return export_pipeline(pipe, tmp_path_factory.mktemp("models") / "faces")


@pytest.fixture
def card(model, tmp_path):
    """Renders the card of a model folder with these additional files."""

    def card(facts: dict | None = FACTS, config: str | None = None, results=None, name=None, grid=True) -> ModelCard:
        folder = shutil.copytree(model, tmp_path / "faces", dirs_exist_ok=True)
        if facts is not None:
            (folder / "training.json").write_text(json.dumps(facts))
        if config is not None:
            (folder / "training_config.yaml").write_text(config)
        if results is not None:
            (folder / "results.json").write_text(results if isinstance(results, str) else json.dumps(results))
        if grid:
            (folder / "samples.png").write_bytes(b"a picture")
        content = render_card(folder, name)
        assert render_card(folder, name) == content, "a pure function of the folder"
        assert str(tmp_path) not in content
        return ModelCard(content)

    return card


def data(**changes) -> dict:
    return FACTS | {"data": FACTS["data"] | changes}


def test_metadata_round_trips_through_huggingface_hub(card):
    read = card(config=config(), results={"results": RESULTS}, name="someone/faces-8")
    assert str(ModelCard(str(read))) == str(read)
    assert read.data.library_name == "diffusers"
    assert read.data.pipeline_tag == "unconditional-image-generation"
    assert read.data.datasets == ["someone/faces"]
    assert read.data.model_name == "faces-8"
    fid, kid = read.data.eval_results  # metrics that were not measured are left out
    assert (fid.metric_type, fid.metric_value, fid.metric_config) == ("fid", 12.345, "clean")
    assert fid.metric_name == "FID (clean), n = 10,000, DDIM, 50 steps"
    assert fid.metric_args == {"mode": "clean", "n": 10_000, "sampler": "DDIM", "steps": 50, "eta": 0.0}
    assert (kid.metric_type, kid.metric_value) == ("kid", 0.0123)


@pytest.mark.parametrize(
    ("facts", "licence", "claim"),
    [
        (data(), "other", "non-commercial research only"),
        (data(crop="center", source="CelebA-HQ"), "other", "identify anybody"),
        (data(crop="none", source="synthetic-faces"), "apache-2.0", "procedural faces"),
        (data(crop="center", source="cats"), None, "no licence is claimed"),
        (data(crop="none", source="synthetic-faces") | {"pretrained": CATS}, None, "of the weights that it started"),
        (data(crop="center", source="cats") | {"pretrained": CELEBA}, "other", "a local folder named `cats`"),
        (None, None, "no record of the training"),
    ],
)
def test_licence_and_limitations_depend_on_the_data(card, facts, licence, claim):
    read, is_celeba = card(facts), licence == "other"
    assert read.data.license == licence
    assert (read.data.license_name == "celeba-agreement") == (read.data.license_link is not None) == is_celeba
    assert claim in read.text
    assert ("CelebA" in read.text) == ("liu2015faceattributes" in read.text) == is_celeba


@pytest.mark.parametrize("crop", CROPS)
def test_each_crop_is_described_by_its_rows_and_columns(card, crop):
    text = card(data(crop=crop)).text
    left, top, right, bottom = crop_box(crop, 178, 218)
    if crop.startswith("celeba"):
        assert f"rows {top:g} to {bottom - 1:g}, columns {left:g} to {right - 1:g}" in " ".join(text.split())
    assert "not recorded" not in text


def test_card_states_the_facts_of_the_run(card):
    text = card(config=config(train_data_dir="/home/somebody/faces", crop="celeba_140")).text
    parameters = sum(parameter.numel() for parameter in CustomUNet2DModel(**TINY).parameters())
    for fact in (
        f"U-Net of {parameters:,} parameters that predicts v",
        "images of CelebA in a local folder named `faces`; split `train`, 21,803 images (3 unreadable ones left out)",
        "3,000 of 4,000 updates, 96,000 images seen, 4.4 passes over the data, in 44.6 minutes",
        "A CPU of this test, 2 cores; 2 processes, bf16",
        "**Held-out loss** at step 2,500: 0.0629",
        "512 images of the split `validation`",
        "0.1895, 0.0404, 0.0175, 0.0044",
        "generated at step 2,500, while these weights are from step 3,000",
        "64 = 16 x 2 (accumulated) x 2 (processes)",
        "min-SNR, gamma 5",
        "trained on 21,803 images",
    ):
        assert fact in " ".join(text.split()), fact
    assert "somebody" not in text
    photographs = data(source="synthetic-faces", crop="center")
    assert card(photographs, config(train_data_dir="synthetic-faces")).data.license is None
    assert text.startswith("\n# my-faces\n")


def test_card_lists_the_results_or_says_that_there_are_none(card):
    assert "Not measured" in card().text
    text = card(results={"results": RESULTS}).text
    assert "Not measured" not in text
    assert "| metric | value | mode | n | sampler | steps | eta |" in text
    assert "| KID (clean) | 0.0123 ± 0.001 | clean | 10,000 |  |  |  |" in text
    assert "| Recall | not measured |" in text


def test_card_has_no_placeholders_and_only_relevant_citations(card):
    read = card(config=config(), results={"results": RESULTS})
    assert not re.search(r"\b(None|nan|TODO|TBD|null|unknown|More Information)\b|\{\}|<[a-z_-]+>", read.text)
    keys = re.findall(r"^@inproceedings\{(\w+),$", read.text, re.MULTILINE)
    assert len(keys) == len({*keys}) == 6
    bibtex = read.text.split("```bibtex")[1].split("```")[0]
    assert bibtex.count("{") == bibtex.count("}")
    soft = card(config=config(snr_weighting="soft_min", optimizer="muon")).text
    assert "soft-min-SNR, gamma 5" in soft
    assert ("crowson2024" in soft, "hang2023" in soft) == (True, False)
    assert "| optimizer | Muon for the matrices" in soft


def test_loading_instructions_match_the_name_and_the_sampler(card, tmp_path):
    assert "revision=commit" in card(name="someone/faces-8").text
    assert "revision" not in card().text
    for scheduler, stock in ((DDPMScheduler(), "DDPM"), (EulerDiscreteScheduler(), "DDIM")):
        folder = export_pipeline(tiny_pipeline(scheduler), tmp_path / stock)
        example = f"from diffusers import {stock}Pipeline, {stock}Scheduler, UNet2DModel"
        assert example in (folder / "README.md").read_text()


# Continuous-time and class-conditional models


def sde_model(folder: Path, objective: str = "vp", facts: dict | None = FACTS, classes: int | None = None, **options):
    """Exports a tiny model; if there are facts, with the configuration of a training with these options."""
    pipe = sde_pipeline(objective, num_class_embeds=classes and classes + 1)
    text = config(**{"snr_gamma": None, "objective": objective} | options) if facts is not None else None
    return export_pipeline(pipe, folder, facts=facts, training_config=text)


@pytest.mark.parametrize(
    ("objective", "options", "claims"),
    [
        ("vp", {"sde_beta_max": 15.0}, ["beta(t) from 0.1 to 15 at", "| objective | vp |", "| beta | 0.1 to 15 |"]),
        ("vp", {"sde_beta_max": 15.0, "likelihood_weighting": True}, ["the variance-preserving SDE"]),
        ("subvp", {"prediction_type": "v_prediction"}, ["the sub-VP SDE", "predicts v,", "beta(t) from 0.1 to 20 at"]),
        ("ve", {"sigma_max": 30.0, "time_embedding_type": "fourier"}, ["from 0.02 to 30", "predicts the score,"]),
        ("edm", {"noise_mean": -1.0}, ["from 0.002 to 80", "| ln(sigma) | normal, mean -1, standard deviation 1.2 |"]),
        (
            "flow",
            {"time_density": "logit_normal"},
            [
                "The process that it reverses is rectified flow",
                "predicts the velocity",
                "| density of the times | logit-normal |",
            ],
        ),
    ],
)
def test_card_describes_the_sde_and_its_parameters(tmp_path, objective, options, claims):
    folder = sde_model(tmp_path / "faces", objective, facts=data(crop="center", source="cats"), **options)
    card = ModelCard((folder / "README.md").read_text())
    text = " ".join(card.text.split())
    for claim in (*claims, "trained in continuous time", "`scheduler/sde.py`", "three Python files"):
        assert claim in text, claim
    weight = "1, of the squared error of" if objective in ("edm", "flow") else "n(t)^2, the variance of the noise,"
    weight = "g(t)^2 (likelihood weighting), of the score" if "likelihood_weighting" in options else weight
    assert f"| loss weight | {weight}" in text
    assert ("song2021maximum" in text) == ("likelihood_weighting" in options)
    assert not re.search("timesteps|DDIM|min-SNR|noise schedule", text)
    assert ("DDPMPipeline" in text) == ("liu2023flow" in text) == (objective == "flow")
    kind = {"flow-matching", "rectified-flow"} if objective == "flow" else {"score-based", "sde"}
    assert {*card.data.tags} & {"ddpm", "score-based", "sde", "flow-matching", "rectified-flow"} == kind
    for source in ("song2021scorebased", "karras2022elucidating"):
        assert source in card.text
    assert not re.search(r"\b(None|nan|null|unknown|inf)\b|\{\}|\{[a-z_]+\}", text)


@pytest.mark.parametrize("objective", ["vp", "flow"])
def test_numbers_of_evaluations_in_the_card_match_the_samplers(tmp_path, objective):
    folder = sde_model(tmp_path / "faces", objective, facts=None)
    rows = re.findall(r"^\| `(\w+)`.* \| (.*) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    pipe, calls = CustomUNetPipeline.from_pretrained(folder), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    assert rows[0][0] == pipe.continuous_sampler.name
    assert {name for name, _ in rows} == {*pipe.samplers}
    for name, formula in rows:
        pipe.set_sampler(name)
        calls.clear()
        taken = pipe(seeds=[0], num_inference_steps=7).network_evaluations
        assert taken == len(calls)
        if name == "ode":
            assert formula == "as many as it takes"
            assert taken > 20
        else:
            assert taken == eval(formula.split(" with")[0].replace("2N", "2 * N"), {"N": 7}), name


@pytest.mark.parametrize(("objective", "classes"), [("ddim", None), ("ve", None), ("edm", 3), ("flow", None)])
def test_examples_in_the_card_run(model, tmp_path, monkeypatch, objective, classes):
    """Runs all Python blocks in order, in the parent of the model folder."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = model if objective == "ddim" else sde_model(tmp_path / "faces", objective, facts=None, classes=classes)
    monkeypatch.chdir(folder.parent)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(block.replace("num_inference_steps=50", "num_inference_steps=2"), names)
        if objective in ("ddim", "flow"):
            assert len(names["pipe"](batch_size=1, num_inference_steps=2).images) == 1
    assert len(names["images"]) == 4
    if objective in ("ve", "edm"):
        assert type(names["unet"]).__name__ == "UNet2DModel"
    assert type(names["pipe"].unet).__name__ == "CustomUNet2DModel", "the last block loads by the clone"
    assert ("guidance_scale" in blocks[0]) == (classes is not None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"results": "{"}, "cannot read"),
        ({"results": "[]"}, "mapping"),
        ({"results": {"results": ["fid"]}}, "missing or wrong"),
        ({"facts": {name: value for name, value in FACTS.items() if name != "images_seen"}}, "images_seen"),
        ({"config": config().replace("learning_rate:", "rate:")}, "learning_rate"),
    ],
)
def test_bad_files_raise_one_line_errors(card, changes, message):
    with pytest.raises(InputError, match=message) as error:
        card(**changes)
    assert "\n" not in str(error.value)


def test_card_names_the_classes_and_shows_how_to_choose_them(tmp_path):
    labels = {"label_column": "Smiling", "label_names": ["no", "yes"]}
    options = {"label_column": "Smiling", "label_dropout": 0.2}
    folder = sde_model(tmp_path / "faces", facts=data(**labels), classes=2, **options)
    card = ModelCard((folder / "README.md").read_text())
    text = " ".join(card.text.split())
    for claim in (
        "A class-conditional diffusion model",
        "Its 2 classes are the values of `Smiling`: 0: `no`, 1: `yes`.",
        "class_labels=[0, 1, 0, 1], guidance_scale=2.0",
        "you can choose only the class",
        "trained with `Smiling` and reproduces their judgement",
        "| labels | Smiling |",
        "| label dropout probability | 0.2 |",
        "ho2022classifierfree",
    ):
        assert claim in text, claim
    assert "saw no labels" not in text
    assert "class-conditional" in card.data.tags
    unnamed = (export_pipeline(tiny_pipeline(num_class_embeds=11), tmp_path / "unnamed") / "README.md").read_text()
    assert "10 classes, 0 to 9; their names are not recorded" in unnamed
    assert "DDIMPipeline" not in unnamed, "diffusers' pipelines of pixels pass no labels to the network"
