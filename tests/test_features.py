"""Feature networks against the papers' preprocessing, images and the cache; test_inception.py tests Inception."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import PartialState
from huggingface_hub import snapshot_download
from PIL import Image
from torchvision import transforms

from common import InputError
from eval import encoders
from eval.encoders import open_extractor
from eval.features import cached_features, extract_features, read_images, subset
from eval.measures import feature_metrics
from tests.stand_in_networks import StandInExtractor, draw_images, write_clip, write_dinov2, write_images
from training.data import open_image_store


@pytest.fixture(scope="module")
def state():
    return PartialState(cpu=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    cache = tmp_path_factory.mktemp("store")
    return open_image_store(dataset_name="synthetic-faces", resolution=16, max_images=30, cache_dir=str(cache))


@pytest.fixture
def extractor():
    return StandInExtractor()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of cached features."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "train_unet_eval" / "features"


# ---- Images


def test_non_finite_features_are_rejected(store, state, extractor):
    extractor.convolution.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="features of stand-in are not finite"):
        extract_features(store.images, extractor, state)


def test_store_and_files_of_the_same_images_give_equal_features(store, extractor, state, tmp_path):
    paths = write_images(tmp_path / "images", np.asarray(store.images))
    ours = extract_features(store.images, extractor, state, batch_size=7)
    np.testing.assert_allclose(ours, extract_features(read_images(paths), extractor, state), rtol=1e-5)


def test_subsets_are_spread_out_reproducible_and_disjoint():
    positions = subset(1000, 100)
    assert (np.diff(positions) > 0).all()
    assert 300 < positions.mean() < 700, "not the first ones"
    assert (positions == subset(1000, 100)).all()
    parts = [subset(30, 10, part) for part in range(3)]
    assert (np.sort(np.concatenate(parts)) == np.arange(30)).all()
    for count, part in ((31, 0), (16, 1)):
        with pytest.raises(InputError, match=f"{count * (part + 1)} of 30 images were requested"):
            subset(30, count, part)


# ---- DINOv2, CLIP and TorchScript files


def preprocessed(images: np.ndarray, size: int, mean: tuple, std: tuple) -> torch.Tensor:
    """Images as dgm-eval and cmmd preprocess them: torchvision's Resize, ToTensor and Normalize."""
    resize = transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC)
    prepare = transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize(mean, std)])
    return torch.stack([prepare(Image.fromarray(image.transpose(1, 2, 0))) for image in images])


def test_dinov2_matches_stein_et_al(tmp_path, monkeypatch):
    """The features are the class token after the final LayerNorm."""
    folder, images = write_dinov2(tmp_path), draw_images(3, seed=0, size=40)
    pixels = preprocessed(images, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        network = transformers.Dinov2Model.from_pretrained(folder).eval()
        expected = network.layernorm(network.encoder(network.embeddings(pixels)).last_hidden_state)[:, 0]
    monkeypatch.setattr(encoders, "snapshot_download", lambda *_, **__: folder)
    extractor = open_extractor("dinov2")
    torch.testing.assert_close(extractor(torch.from_numpy(images)), expected, rtol=1e-4, atol=1e-5)
    assert (extractor.name, extractor.mode) == ("facebook/dinov2-large", "bicubic 224")


def test_clip_matches_jayasumana_et_al(hub, tmp_path, monkeypatch):
    """Loaded from the Hub, at its commit and not at the newest one."""
    folder, images = write_clip(tmp_path / "clip"), draw_images(3, seed=0, size=80)
    statistics = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    with torch.no_grad():
        network = transformers.CLIPModel.from_pretrained(folder).eval()
        pooled = network.vision_model(preprocessed(images, 48, *statistics)).pooler_output
        expected = network.visual_projection(pooled)
    repo_id = encoders.PUBLISHED["clip"].hub_id
    first, second = {path.name: path.read_bytes() for path in folder.iterdir()}, {"README.md": b"moved"}
    commit, _ = hub.add(repo_id, first, second)
    hub.heads[repo_id, "main"] = 1
    fetch = partial(snapshot_download, endpoint=hub.address, cache_dir=tmp_path / "hub")
    monkeypatch.setattr(encoders, "snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setitem(encoders.PUBLISHED, "clip", encoders.PUBLISHED["clip"]._replace(commit=commit, size=48))
    ours = open_extractor("clip")(torch.from_numpy(images))
    torch.testing.assert_close(ours, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_unreachable_hub_raises_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="facebook/dinov2-large could not be downloaded from the Hub"):
        open_extractor("dinov2")


def test_torchscript_network_is_loaded_by_path(tmp_path):
    for name, module in {"pixels.pt": torch.nn.Flatten(), "images.pt": torch.nn.Identity()}.items():
        torch.jit.script(module).save(str(tmp_path / name))
    images = torch.from_numpy(draw_images(3, seed=0))
    extractor = open_extractor(str(tmp_path / "pixels.pt"))
    torch.testing.assert_close(extractor(images), images.float().flatten(1))
    assert (extractor.name, extractor.mode) == ("pixels.pt", "as they are")
    for wrong in (images / 127.5 - 1, images.permute(0, 2, 3, 1), images[0]):
        with pytest.raises(ValueError, match=r"images are torch.* of shape .*; give uint8 \(B, 3, H, W\)"):
            extractor(wrong)
    with pytest.raises(InputError, match=r"returns \(3, 3, 20, 20\) for 3 images, not \(B, D\)"):
        open_extractor(str(tmp_path / "images.pt"))(images)
    (tmp_path / "text.pt").write_text("no module")
    for name in ("text.pt", "missing.pt"):
        with pytest.raises(InputError, match=f"{name} is not a TorchScript module"):
            open_extractor(str(tmp_path / name))


def test_name_that_only_starts_with_inception_is_not_inception():
    assert feature_metrics("inception")["fid"] == "FID (clean)"
    assert feature_metrics("inception:legacy_tensorflow")["fid"] == "FID (legacy_tensorflow)"
    assert feature_metrics("inception_v3")["fid"] == "FD-inception_v3"


# ---- The cache


def test_features_are_cached_and_recomputed_if_damaged(store, extractor, state, cache):
    images = store.images
    first = cached_features(images, extractor, state)
    np.testing.assert_array_equal(first, cached_features(images.copy(), extractor, state))
    assert extractor.num_images == 30
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, content[:1000], b""):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(cached_features(images, extractor, state), first)
    assert extractor.num_images == 30 + 3 * 30
    assert len(list(cache.iterdir())) == 1


def test_every_part_of_the_cache_key_matters(store, extractor, state, cache):
    images = np.zeros((10, 3, 16, 16), np.uint8)
    for other in (images, images + 1, images.reshape(10, 3, 8, 32)):
        cached_features(other, extractor, state)
    for part in ("mode", "sha256", "name"):
        setattr(extractor, part, "another")
        cached_features(images, extractor, state)
    assert len(list(cache.iterdir())) == 6


def test_full_disk_leaves_no_cache_file(store, extractor, state, cache, monkeypatch):
    def no_space(path, _):
        Path(path).touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(OSError, match="No space left"):
        cached_features(store.images, extractor, state)
    assert list(cache.iterdir()) == []
