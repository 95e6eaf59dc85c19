"""The measurement of guidance: what a scale means, what the judge says of images, what is written, what is refused."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from tiny_network import TINY

from custom_unet import CustomUNet2DModel
from experiments.classifier import NoisyImageClassifier
from experiments.guidance import class_shares, classes_of, draw, main, real_sets, swd
from pipelines import CustomUNetPipeline
from pipelines.export import export_pipeline
from training.data import open_image_store, to_uint8
from training.sde import SDEScheduler

SIZE, NAMES = 16, ["no", "yes"]
FLAGS = "--split validation --num_images 9 --num_inference_steps 3 --batch_size 4 --num_cpu_threads 1"


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
    export_pipeline(tiny_pipeline(num_class_embeds=3), folder / "hair")
    (folder / "hair" / "training.json").write_text(json.dumps({"data": {"label_column": "hair_style"}}))
    write_classifier(folder / "judge", seed=0)
    write_classifier(folder / "guide", seed=1)
    shutil.copytree(folder / "judge", folder / "copy")
    write_classifier(folder / "of_hair", seed=2, column="hair_style")
    write_classifier(folder / "other_names", seed=2, names=["yes", "no"])
    write_classifier(folder / "small_guide", seed=2, size=8)
    write_classifier(folder / "small_judge", seed=3, size=8)
    shutil.copytree(folder / "judge", folder / "no_record")
    (folder / "no_record" / "classifier.json").unlink()
    shutil.copytree(folder / "judge", folder / "damaged")
    (folder / "damaged" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    return folder


@pytest.fixture(autouse=True)
def there(models, monkeypatch):
    """The commands name the models as they are called."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(models / "cache"))


def guide(arguments: str, out: Path) -> dict:
    assert main([*FLAGS.split(), *arguments.split(), "--out", str(out)]) == 0
    return json.loads((out / "guidance.json").read_text())


def draw_some(
    pipe, num_images: int, scale: float, classifier=None, steps: int = 3, seed: int = 0, batch_size: int = 99
):
    options = Namespace(num_images=num_images, steps=steps, seed=seed, batch_size=batch_size)
    return draw(pipe, options, scale, 2, classifier)


# What a scale means


def test_scales_of_a_class_conditional_model_are_null_class_plain_and_guided():
    pipe, labels = tiny_pipeline(num_class_embeds=3), [0, 1, 0]
    calls = {0.0: {"class_labels": 2}, 1.0: {"class_labels": labels}}
    calls[3.0] = {"class_labels": labels, "guidance_scale": 3.0}
    seen = []
    for scale, call in calls.items():
        images, evaluations, _ = draw_some(pipe, 3, scale)
        expected = pipe(seeds=range(3), num_inference_steps=3, output_type="pt", **call)
        np.testing.assert_array_equal(images, (255 * expected.images).round().to(torch.uint8).numpy())
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
        images, _, _ = draw_some(pipe, 40, scale, Brightness(), steps=12)
        shares.append(class_shares(classes_of(Brightness(), images), np.array(labels), ["dark", "light"])["value"])
        contrasts.append(images[1::2].mean() - images[::2].mean())
    assert 0.3 < shares[0] < 0.7
    assert min(shares[1:]) > 0.9
    assert abs(contrasts[0]) < 1.5 < contrasts[1] < contrasts[2]


# What is measured


def test_the_judge_tells_the_class_of_each_image_and_shares_are_counted():
    levels = np.array([-0.5, 0.5, 0.4, -0.1, -0.2, 0.3])
    images = to_uint8(torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)).numpy()

    class OfCleanImages(Brightness):
        def forward(self, images, signal_scale, noise_scale):
            assert (signal_scale, noise_scale) == (1, 0)
            return super().forward(images, signal_scale, noise_scale)

    found = classes_of(OfCleanImages(), images)
    assert found.tolist() == [0, 1, 1, 0, 0, 1]
    shares = class_shares(found, np.array([0, 1, 0, 1, 0, 1]), ["dark", "light"])
    assert (shares["value"], shares["n"]) == (4 / 6, 6)
    assert shares["std"] == pytest.approx((4 / 6 * 2 / 6 / 6) ** 0.5)
    assert [(c["name"], c["value"], c["n"]) for c in shares["classes"]] == [("dark", 2 / 3, 3), ("light", 2 / 3, 3)]
    perfect = class_shares(found, found, ["dark", "light"])
    assert (perfect["value"], perfect["std"]) == (1, 0)


def test_real_images_have_the_classes_in_the_numbers_asked_for_and_none_twice():
    store = open_image_store(
        dataset_name="synthetic-faces", split="validation", crop="none", resolution=SIZE, label_column="glasses"
    )
    labels_of = {image.tobytes(): label for image, label in zip(store.images, store.labels, strict=True)}
    first, second = real_sets(store, NAMES, [0, 1, 0, 1, 0])
    for images in (first, second):
        assert sorted(labels_of[image.tobytes()] for image in images) == [0, 0, 0, 1, 1]
    assert len({image.tobytes() for image in [*first, *second]}) == 10
    swapped, _ = real_sets(store, ["yes", "no"], [0, 0, 1])  # classes are known by their names
    assert sorted(labels_of[image.tobytes()] for image in swapped) == [0, 1, 1]


def test_a_class_conditional_model_is_measured(models, tmp_path, capsys):
    record = guide("--pipeline conditional --judge judge --scales 0 1 2.5 --seed 4", tmp_path)
    pipe = tiny_pipeline(num_class_embeds=3)
    judge = NoisyImageClassifier.from_pretrained(models / "judge")
    store = open_image_store(
        dataset_name="synthetic-faces", split="validation", crop="none", resolution=SIZE, label_column="glasses"
    )
    labels = [i % 2 for i in range(9)]
    real, others = real_sets(store, NAMES, labels)
    assert [entry["guidance_scale"] for entry in record["results"]] == [0, 1, 2.5]
    for entry in record["results"]:
        images, evaluations, _ = draw_some(pipe, 9, entry["guidance_scale"], seed=4, batch_size=4)
        assert entry["value"] == np.mean(classes_of(judge, images) == labels)
        assert entry["swd"] == pytest.approx(swd(images, real), rel=1e-4)
        assert entry["swd_floor"] == pytest.approx(swd(others, real))
        assert (entry["network_evaluations"], entry["n"], entry["seeds"]) == (evaluations, 9, "4 to 12")
        assert entry["seconds_per_image"] > 0
    assert [entry["network_evaluations"] for entry in record["results"]] == [3, 3, 6]
    assert record["judge"]["accuracy"] == 0.875
    assert (record["classifier"], record["label_column"]) == (None, "glasses")
    assert record["reference"]["fingerprint"] == store.fingerprint
    assert record["versions"].keys() == {"torch", "diffusers"}
    command = f"python -m experiments.guidance {FLAGS} --pipeline conditional --judge judge --scales 0 1 2.5 --seed 4"
    assert record["command"] == f"{command} --out {tmp_path.name}"  # of the folder its name alone
    assert str(tmp_path) not in json.dumps(record)
    assert capsys.readouterr().out.count("in the class asked for") == 3


def test_an_unconditional_model_is_guided_by_a_classifier_and_table_and_figure_are_written(models, tmp_path):
    record = guide("--pipeline unconditional --judge judge --classifier guide --scales 3 0", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"guidance.json", "guidance.md", "guidance.png"}
    pipe = tiny_pipeline(SDEScheduler(objective="edm", prediction_type="edm"))
    judge, classifier = (NoisyImageClassifier.from_pretrained(models / name) for name in ("judge", "guide"))
    guided = {"class_labels": [i % 2 for i in range(9)], "guidance_scale": 3.0, "classifier": classifier}
    text = (tmp_path / "guidance.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    for row, entry, call in zip(rows, record["results"], (guided, {}), strict=True):
        images = pipe(seeds=range(9), num_inference_steps=3, output_type="pt", **call).images
        found = classes_of(judge, (255 * images).round().to(torch.uint8).numpy())
        shares = [c["value"] for c in entry["classes"]]
        assert shares == [np.mean(found[k::2] == k) for k in (0, 1)]
        assert row[0] == f"{entry['guidance_scale']:g}"
        assert row[1].startswith(f"{entry['value']:.4g} ± ")
        assert row[2:5] == [*(f"{share:.4g}" for share in shares), f"{entry['swd']:.4g} ({entry['swd_floor']:.4g})"]
    assert "The judge puts 87.5% of 1,000 real images" in text
    assert "a gradient of the classifier" in text
    with Image.open(tmp_path / "guidance.png") as figure:
        assert figure.width > figure.height


def test_a_scale_at_which_sampling_breaks_down_leaves_what_was_measured(tmp_path, capsys):
    flags = f"{FLAGS} --pipeline unconditional --judge judge --classifier guide --scales 0 1e38 --out {tmp_path}"
    assert main(flags.split()) == 1
    error = capsys.readouterr().err.splitlines()[-1]  # after the bar of the decoding, if it is the first time
    assert error.startswith("error: ")
    assert "images are not finite" in error
    assert [entry["guidance_scale"] for entry in json.loads((tmp_path / "guidance.json").read_text())["results"]] == [
        0
    ]


# What is refused

CONDITIONAL, UNCONDITIONAL = "--pipeline conditional --judge judge", "--pipeline unconditional --judge judge"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (CONDITIONAL, "the following arguments are required: --scales"),
        (f"{CONDITIONAL} --scales nan", "--scales is nan"),
        (f"{CONDITIONAL} --scales 1 --num_images 1", "--num_images is 1, but there are 2 classes"),
        (f"{CONDITIONAL} --scales 1 --num_images 400", "and two sets of 200 are needed; use fewer --num_images"),
        (f"{CONDITIONAL} --scales 1 --seed 4294967290", "the last seed is 4294967298"),
        (f"{CONDITIONAL} --scales 1 --num_inference_steps 2000", "num_inference_steps is 2000"),
        (f"{CONDITIONAL} --scales 1 --classifier guide", "the model has classes; leave out --classifier"),
        (f"{UNCONDITIONAL} --scales 1", "the model has no classes; guide it by --classifier"),
        (f"{UNCONDITIONAL} --scales 1 --classifier copy", "--judge judge is also the --classifier"),
        (f"{UNCONDITIONAL} --scales 1 --classifier of_hair", "label_column hair_style, --judge glasses"),
        (f"{UNCONDITIONAL} --scales 1 --classifier other_names", "label_names ['yes', 'no'], --judge ['no', 'yes']"),
        (f"{UNCONDITIONAL} --scales 1 --classifier damaged", "damaged is not a classifier of experiments.classifier"),
        ("--pipeline small --judge judge --classifier guide --scales 1", "the model has sample_size 8, --judge 16"),
        ("--pipeline small --judge small_judge --classifier small_guide --scales 1", "the images are 8 pixels wide"),
        ("--pipeline no_null_class --judge judge --scales 1", "the model has 2 class embeddings"),
        ("--pipeline hair --judge judge --scales 1", "the model has label_column hair_style, --judge glasses"),
        ("--pipeline conditional --judge no_record --scales 1", "no_record is not a classifier"),
        ("--pipeline conditional --judge nowhere --scales 1", "nowhere is not a classifier"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_drawn(flags, message, tmp_path, capsys):
    assert main([*FLAGS.split(), *flags.split(), "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "images/s]" not in line]  # of a first decoding
    (error,) = filter(None, lines)
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()
