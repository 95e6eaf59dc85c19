"""The guidance measurement: the meaning of a scale, the judge's verdicts, the written results, and refused inputs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from experiments import guidance
from experiments.classifier import NoisyImageClassifier, predict
from experiments.guidance import class_shares, draw, main, real_sets, swd
from pipelines import CustomUNetPipeline
from pipelines.export import export_pipeline
from training.data import open_image_store
from training.sde import SDEScheduler

SIZE, NAMES = 16, ["no", "yes"]
FLAGS = "--num_images 9 --num_inference_steps 3 --num_cpu_threads 1"


def tiny_pipeline(scheduler=None, **config) -> CustomUNetPipeline:
    torch.manual_seed(0)
    network = CustomUNet2DModel(**TINY | {"sample_size": SIZE} | config)
    pipe = CustomUNetPipeline(network, scheduler or DDIMScheduler(prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_classifier(folder: Path, seed: int, names=NAMES, column: str = "glasses", size: int = SIZE) -> None:
    torch.manual_seed(seed)
    NoisyImageClassifier(names, column, size, block_out_channels=(8, 16)).save_pretrained(folder)
    by_noise = [{"sigma": 0.0, "accuracy": 0.875}, {"sigma": 0.1, "accuracy": 0.5}]
    validation = {"split": "validation", "num_images": 1000, "by_noise": by_noise}
    (folder / "classifier.json").write_text(json.dumps({"validation": validation}))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Models, classifiers, and what does not suit them."""
    folder = tmp_path_factory.mktemp("models")
    export_pipeline(tiny_pipeline(num_class_embeds=3), folder / "conditional")
    unclipped = SDEScheduler(objective="edm", prediction_type="edm", clip_sample=False)
    export_pipeline(tiny_pipeline(unclipped), folder / "unconditional")
    export_pipeline(tiny_pipeline(num_class_embeds=2), folder / "no_null_class")
    export_pipeline(tiny_pipeline(sample_size=8), folder / "small")
    write_classifier(folder / "judge", seed=0)
    write_classifier(folder / "guide", seed=1)
    shutil.copytree(folder / "judge", folder / "copy")
    write_classifier(folder / "of_hair", seed=2, column="hair_style")
    write_classifier(folder / "small_guide", seed=2, size=8)
    write_classifier(folder / "small_judge", seed=3, size=8)
    shutil.copytree(folder / "judge", folder / "damaged")
    (folder / "damaged" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    return folder


@pytest.fixture(autouse=True)
def there(models, monkeypatch):
    """The commands name the models as they are called."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(models / "cache"))
    monkeypatch.setattr(guidance, "SPLIT", "validation")  # the smaller one
    monkeypatch.setattr(guidance, "BATCH_SIZE", 4)


def guide(arguments: str, out: Path) -> dict:
    assert main([*FLAGS.split(), *arguments.split(), "--out", str(out)]) == 0
    return json.loads((out / "guidance.json").read_text())


def real_images():
    which = {"label_column": "glasses", "resolution": SIZE, "crop": "none"}
    return open_image_store(dataset_name="synthetic-faces", split="validation", **which)


# What a scale means


def test_scales_of_a_class_conditional_model_are_null_class_plain_and_guided():
    pipe, labels = tiny_pipeline(num_class_embeds=3), [0, 1, 0, 1, 0]
    calls = {0.0: {"class_labels": 2}, 1.0: {"class_labels": labels}}
    calls[3.0] = {"class_labels": labels, "guidance_scale": 3.0}
    seen = []
    for scale, call in calls.items():
        images, evaluations = draw(pipe, scale, 5, 3, num_classes=2)
        expected = pipe(seeds=range(5), num_inference_steps=3, output_type="pt", **call)
        expected_images = (255 * expected.images).round().to(torch.uint8).numpy()
        assert np.abs(images.astype(int) - expected_images).max() <= 1  # batches of 4 and of 1
        assert evaluations == expected.network_evaluations == (6 if scale == 3 else 3)
        seen.append(images)
    assert not any(np.array_equal(seen[a], seen[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


class Brightness(torch.nn.Module):
    """The exact p(mean of x_0 is positive | x_t) for x_0 of independent normal pixels of standard deviation 0.5."""

    device = torch.device("cpu")

    def forward(self, noisy_images, signal_scale, noise_scale):
        num_dims = noisy_images[0].numel()
        alpha, n = torch.as_tensor(signal_scale), torch.as_tensor(noise_scale).clamp(min=1e-3)
        prior, noise = 0.25 / num_dims, n**2 / num_dims  # variances of the mean
        mean = alpha * prior * noisy_images.mean((1, 2, 3)) / (alpha**2 * prior + noise)
        z = mean / (prior * noise / (alpha**2 * prior + noise)).sqrt()
        return torch.stack([torch.special.log_ndtr(-z), torch.special.log_ndtr(z)], 1)


def test_an_exact_classifier_of_brightness_makes_images_dark_or_light():
    pipe = tiny_pipeline(SDEScheduler(objective="edm", prediction_type="edm"))
    for parameter in pipe.unet.conv_out.parameters():
        parameter.data.zero_()  # now x_0 is predicted as of normal pixels of standard deviation 0.5
    labels = [i % 2 for i in range(40)]
    shares, contrasts = [], []
    for scale in (0.0, 1.0, 4.0):
        images, _ = draw(pipe, scale, 40, 12, 2, Brightness())
        found = predict(Brightness(), images).argmax(1).numpy()
        shares.append(class_shares(found, np.array(labels), ["dark", "light"])["value"])
        contrasts.append(images[1::2].mean() - images[::2].mean())
    assert 0.3 < shares[0] < 0.7
    assert min(shares[1:]) > 0.9
    assert abs(contrasts[0]) < 1.5 < contrasts[1] < contrasts[2]


# What is measured


def test_shares_are_counted_with_their_standard_error():
    found = np.array([0, 1, 1, 0, 0, 1])
    shares = class_shares(found, np.array([0, 1, 0, 1, 0, 1]), ["dark", "light"])
    assert (shares["value"], shares["n"]) == (4 / 6, 6)
    assert shares["std"] == pytest.approx((4 / 6 * 2 / 6 / 6) ** 0.5)
    assert [(c["name"], c["value"], c["n"]) for c in shares["classes"]] == [("dark", 2 / 3, 3), ("light", 2 / 3, 3)]


def test_real_images_have_the_classes_in_the_numbers_asked_for_and_none_twice():
    store = real_images()
    labels_of = {image.tobytes(): label for image, label in zip(store.images, store.labels, strict=True)}
    first, second = real_sets(store, NAMES, [0, 1, 0, 1, 0])
    for images in (first, second):
        assert sorted(labels_of[image.tobytes()] for image in images) == [0, 0, 0, 1, 1]
    assert len({image.tobytes() for image in [*first, *second]}) == 10
    swapped, _ = real_sets(store, ["yes", "no"], [0, 0, 1])  # classes are known by their names
    assert sorted(labels_of[image.tobytes()] for image in swapped) == [0, 1, 1]


@pytest.mark.parametrize(
    ("flags", "evaluations"),
    [
        ("--pipeline conditional --judge judge --scales 0 3", (3, 6)),
        ("--pipeline unconditional --judge judge --classifier guide --scales 0 3", (5, 5)),
    ],
)
def test_a_model_is_measured_at_each_scale(models, tmp_path, flags, evaluations):
    record = guide(flags, tmp_path)
    pipe = CustomUNetPipeline.from_pretrained(models / flags.split()[1])
    judge, guiding = (NoisyImageClassifier.from_pretrained(models / name) for name in ("judge", "guide"))
    classifier = guiding if "--classifier" in flags else None
    labels = [i % 2 for i in range(9)]
    real, others = real_sets(real_images(), NAMES, labels)
    text = (tmp_path / "guidance.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    for row, entry, scale, expected_evaluations in zip(rows, record["results"], (0, 3), evaluations, strict=True):
        images, _ = draw(pipe, scale, 9, 3, 2, classifier)
        found = predict(judge, images).argmax(1).numpy()
        shares = [np.mean(found[k::2] == k) for k in (0, 1)]
        assert [of_class["value"] for of_class in entry["classes"]] == shares
        assert entry["value"] == np.mean(found == labels)
        assert entry["swd"] == pytest.approx(swd(images, real), rel=1e-4)
        assert entry["swd_floor"] == pytest.approx(swd(others, real))
        assert (entry["guidance_scale"], entry["network_evaluations"]) == (scale, expected_evaluations)
        assert row[0] == f"{scale}"
        assert row[1].startswith(f"{entry['value']:.4g} ± ")
        assert row[2:5] == [*(f"{share:.4g}" for share in shares), f"{entry['swd']:.4g} ({entry['swd_floor']:.4g})"]
    assert record["judge"]["accuracy"] == 0.875
    assert "The judge puts 87.5% of 1,000 real images" in text
    assert record["command"] == f"python -m experiments.guidance {FLAGS} {flags} --out {tmp_path.name}"
    assert str(tmp_path) not in json.dumps(record)
    assert {path.name for path in tmp_path.iterdir()} == {"guidance.json", "guidance.md", "guidance.png"}


def test_a_scale_at_which_sampling_breaks_down_leaves_what_was_measured(tmp_path, capsys):
    flags = f"{FLAGS} --pipeline unconditional --judge judge --classifier guide --scales 0 1e38 --out {tmp_path}"
    assert main(flags.split()) == 1
    assert "images are not finite" in capsys.readouterr().err.splitlines()[-1]
    results = json.loads((tmp_path / "guidance.json").read_text())["results"]
    assert [entry["guidance_scale"] for entry in results] == [0]


# What is refused

CONDITIONAL, UNCONDITIONAL = "--pipeline conditional --judge judge", "--pipeline unconditional --judge judge"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"{CONDITIONAL} --scales nan", "--scales is nan"),
        (f"{CONDITIONAL} --scales 1 --num_images 400", "and two sets of 200 are needed; use fewer --num_images"),
        (f"{CONDITIONAL} --scales 1 --classifier guide", "the model has classes; leave out --classifier"),
        (f"{UNCONDITIONAL} --scales 1", "the model has no classes; guide it by --classifier"),
        (f"{UNCONDITIONAL} --scales 1 --classifier copy", "--judge judge is also the --classifier"),
        (f"{UNCONDITIONAL} --scales 1 --classifier of_hair", "label_column hair_style, --judge glasses"),
        (f"{UNCONDITIONAL} --scales 1 --classifier damaged", "damaged is not a classifier of experiments.classifier"),
        ("--pipeline small --judge judge --classifier guide --scales 1", "the model has sample_size 8, --judge 16"),
        ("--pipeline small --judge small_judge --classifier small_guide --scales 1", "the images are 8 pixels wide"),
        ("--pipeline no_null_class --judge judge --scales 1", "the model has 2 class embeddings"),
        ("--pipeline conditional --judge nowhere --scales 1", "nowhere is not a classifier"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_drawn(flags, message, tmp_path, capsys):
    assert main([*FLAGS.split(), *flags.split(), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after the progress of a first decoding
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()
