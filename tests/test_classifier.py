"""The classifier of noisy images: its interface, what it learns, and the errors of its command."""

import json
import resource

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from experiments import classifier
from experiments.classifier import NoisyImageClassifier, main, measure
from training.data import open_image_store

SIDE = 8
NAMES = ["dark", "light"]
SIGMAS = torch.tensor([0.0, 0.02, 1.0, 30.0, 500.0])


@pytest.fixture(autouse=True, scope="module")
def own_caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def write_pictures(folder, kinds) -> None:
    """Grey pictures, dark or light, with a little noise, and a table of which is which."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(len(kinds))
    lines = ["file_name,kind"]
    for i, kind in enumerate(kinds):
        pixels = generator.normal({"dark": 80, "light": 180}.get(kind, 130), 10, (SIDE, SIDE, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.png")
        lines.append(f"{i:03}.png,{kind}")
    (folder / "metadata.csv").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three quarters are dark."""
    folder = tmp_path_factory.mktemp("toy") / "pictures"
    write_pictures(folder / "train", ["dark", "light", "dark", "dark"] * 30)
    write_pictures(folder / "validation", ["light", "dark", "dark", "dark"] * 10)
    return folder


def command(pictures, out, *more) -> list[str]:
    options = {
        "train_data_dir": pictures,
        "label_column": "kind",
        "resolution": SIDE,
        "max_train_steps": 3,
        "out": out,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + list(more)


@pytest.fixture(scope="module")
def trained(pictures):
    """The folder of a classifier that was trained for some seconds."""
    folder = pictures.parent / "trained"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "BATCH_SIZE", 16)
        assert main(command(pictures, folder, "--max_train_steps", "200")) == 0
    return folder


def untrained(**options) -> NoisyImageClassifier:
    torch.manual_seed(0)
    return NoisyImageClassifier(["a", "b", "c"], "kind", SIDE, **options).eval()


# The network


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_in_the_images_is_finite_at_every_noise_level(dtype):
    for signal_scale in (1.0, 1e-3, 0.0):
        images = torch.randn(5, 3, SIDE, SIDE, requires_grad=True, dtype=dtype)
        noise_scale = SIGMAS.clamp(min=0.0 if signal_scale else 1.0)
        log_probs = untrained()(images, signal_scale, noise_scale).log_softmax(1)
        assert log_probs.shape == (5, 3)
        (gradient,) = torch.autograd.grad(log_probs[:, 1].sum(), images)
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("alpha", [1e-3, 0.3, 4.0])
def test_only_the_ratio_of_image_and_noise_to_the_signal_matters(alpha):
    network, images = untrained(), 3 * torch.randn(5, 3, SIDE, SIDE)
    expected = network(images, 1.0, SIGMAS)
    scaled = network(alpha * images, torch.full((5,), alpha, dtype=torch.float64), alpha * SIGMAS)
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-5)


def test_the_noise_level_matters():
    network, images = untrained(), torch.randn(1, 3, SIDE, SIDE).expand(5, -1, -1, -1)
    logits = network(images * (SIGMAS.square() + 0.25).sqrt().view(5, 1, 1, 1), 1.0, SIGMAS)  # one and the same input
    torch.testing.assert_close(logits[0], network(images[:1] * 0.5, 1.0, 0.0)[0])
    assert len({tuple(row.tolist()) for row in logits.detach().round(decimals=4)}) == 5


def test_beyond_the_noise_of_training_the_nearest_noise_level_counts():
    network, images = untrained(), torch.randn(2, 3, SIDE, SIDE)
    sigma = torch.tensor([100.0, 1e6])
    logits = network(images[:1] * (sigma.square() + 0.25).sqrt().view(2, 1, 1, 1), 1.0, sigma)
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(network(images[:1], 0.0, 1.0)[0], logits[0], rtol=1e-4, atol=1e-4)  # alpha = 0


def test_images_of_another_shape_and_classes_that_cannot_be_told_apart_are_refused():
    for shape in ((2, 3, SIDE, 2 * SIDE), (2, 1, SIDE, SIDE), (3, SIDE, SIDE)):
        with pytest.raises(ValueError, match=r"noisy_images have shape .*; this classifier takes \(B, 3, 8, 8\)$"):
            untrained()(torch.zeros(shape), 1.0, 1.0)
    for names in (["a"], ["a", "b", "a"]):
        with pytest.raises(ValueError, match="they must be two or more, and differ"):
            NoisyImageClassifier(names, "kind", SIDE)


# What it learns


def test_in_pure_noise_the_probabilities_are_the_shares_of_the_classes(trained):
    network = NoisyImageClassifier.from_pretrained(trained)
    torch.manual_seed(0)
    for signal_scale, noise_scale in ((1.0, 100.0), (0.0, 1.0)):
        images = noise_scale * torch.randn(64, 3, SIDE, SIDE)
        probabilities = network(images, signal_scale, noise_scale).softmax(1).mean(0)
        torch.testing.assert_close(probabilities, torch.tensor([0.75, 0.25]), rtol=0, atol=0.1)


def test_the_gradient_leads_to_the_class(trained):
    network = NoisyImageClassifier.from_pretrained(trained)
    images = torch.zeros(8, 3, SIDE, SIDE, requires_grad=True)
    log_probs = network(images + torch.randn_like(images), 1.0, 1.0).log_softmax(1)
    for label, sign in ((0, -1), (1, 1)):  # dark, light
        (gradient,) = torch.autograd.grad(log_probs[:, label].sum(), images, retain_graph=True)
        assert (sign * gradient.mean((1, 2, 3)) > 0).all()


def test_classes_are_known_by_their_names_not_their_numbers(trained, tmp_path):
    write_pictures(tmp_path / "data" / "validation", ["light"] * 8)  # whose number there is 0
    store = open_image_store(
        train_data_dir=str(tmp_path / "data"),
        split="validation",
        label_column="kind",
        resolution=SIDE,
    )
    measured = measure(NoisyImageClassifier.from_pretrained(trained), store)
    assert measured["by_noise"][0]["accuracy"] == 1


# The command


def test_the_folder_tells_what_was_learned_and_how(trained, pictures):
    """With little noise the classes are told apart."""
    files = {"config.json", "diffusion_pytorch_model.safetensors", "classifier.json"}
    assert {path.name for path in trained.iterdir()} == files
    config = NoisyImageClassifier.from_pretrained(trained).config
    assert (config.label_names, config.label_column, config.sample_size) == (NAMES, "kind", SIDE)
    record = json.loads((trained / "classifier.json").read_text())
    assert str(pictures.parent) not in json.dumps(record)
    assert (record["training"]["data"]["num_images"], record["validation"]["num_images"]) == (120, 40)
    accuracies = {row["sigma"]: row["accuracy"] for row in record["validation"]["by_noise"]}
    assert min(accuracies[0.0], accuracies[0.1], accuracies[1.0]) >= 0.95


def test_the_seed_decides_the_weights(pictures, tmp_path):
    weights = []
    for name, seed in (("first", "5"), ("again", "5"), ("other", "6")):
        assert main(command(pictures, tmp_path / name, "--seed", seed)) == 0
        weights.append((tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def error_of(capsys, arguments, code) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_bad_flags_are_one_line_and_an_out_that_is_there_is_left_as_it_is(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    bad = command(pictures, out, "--seed", "4294967296")
    assert "--seed is 4294967296; it must be" in error_of(capsys, bad, 2)
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("precious")
    for taken in (out, out / "mine" / "deep" / "out"):
        assert f"--out {taken} exists already or lies in a file" in error_of(capsys, command(pictures, taken), 2)
    assert (out / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (NAMES * 10, ["striped"], "split validation has the class 'striped' of 'kind', not one of dark, light"),
        (["dark"] * 20, ["dark"], "has the single class 'dark' in split train"),
        (NAMES * 10, NAMES, "20 images are fewer than a batch of 64"),
    ],
)
def test_data_that_cannot_be_learned_is_refused_before_the_training(train, validation, message, tmp_path, capsys):
    write_pictures(tmp_path / "data" / "train", train)
    write_pictures(tmp_path / "data" / "validation", validation)
    assert message in error_of(capsys, command(tmp_path / "data", tmp_path / "out"), 2)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_one_line(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifier, "LEARNING_RATE", 1e30)
    message = error_of(capsys, command(pictures, tmp_path / "out", "--max_train_steps", "20"), 1)
    assert message.startswith("error: the loss is ")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(pictures, trained, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = error_of(capsys, command(pictures, tmp_path / "out"), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"error: could not write {tmp_path}/out: ")
    assert "File too large" in message
    assert not list(tmp_path.iterdir())
