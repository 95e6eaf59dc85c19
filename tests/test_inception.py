"""Inception features compared with those of clean-fid, and how the weights file is found.

The tests of the real network need its weights: `make inception`.
"""

import hashlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from accelerate import PartialState
from cleanfid import fid
from torch import nn

from common import InputError
from eval import inception
from eval.distances import frechet_distance, kernel_distance
from eval.features import extract_features, images_of_files
from eval.inception import NVIDIA_FILE, find_weights, load_layers, open_inception, resize_as_tensorflow
from tests.stand_in_networks import draw_images, write_images

WEIGHTS = inception._packaged_file()


# ---- The real network


class TorchScript(nn.Module):
    """NVIDIA's network as clean-fid calls it, on images in 0..255 that are already resized."""

    def __init__(self):
        super().__init__()
        self.layers = torch.jit.load(str(WEIGHTS)).net.layers.eval()

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers((images - 128) / 128).flatten(1)


@pytest.mark.skipif(WEIGHTS is None, reason="needs Inception's weights: make inception")
def test_features_and_distances_match_clean_fid(tmp_path):
    """clean-fid reads and resizes the files and computes the distances with its own code."""
    sets = {"generated": draw_images(20, seed=0), "reference": draw_images(20, seed=1, tint=0.1)}
    sets = [images_of_files(write_images(tmp_path / name, images)) for name, images in sets.items()]
    options = {"num_workers": 0, "batch_size": 10, "device": torch.device("cpu"), "mode": "clean", "verbose": False}
    folders = (str(tmp_path / name) for name in ("generated", "reference"))
    theirs = [fid.get_folder_features(folder, TorchScript(), **options) for folder in folders]
    extractor, state = open_inception(path=WEIGHTS), PartialState(cpu=True)
    ours = [extract_features(images, extractor, state, batch_size=16) for images in sets]
    assert ours[0].shape == (20, 2048)
    for found, expected in zip(ours, theirs, strict=True):
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    few = [features[:, :64] for features in theirs]  # clean-fid's root of a 2,048 x 2,048 matrix takes a minute
    expected_fid = fid.fid_from_feats(*few)
    assert frechet_distance(*(features[:, :64] for features in ours)) == pytest.approx(expected_fid, rel=1e-4)
    np.random.seed(3)
    assert kernel_distance(*ours, seed=3).mean == pytest.approx(fid.kernel_distance(*theirs), rel=1e-4)


# ---- Without the weights


@pytest.mark.parametrize("size", [(20, 20), (32, 48)])
def test_resize_as_tensorflow_matches_nvidias_implementation(size):
    """NVIDIA's implementation is a sampling grid shifted towards the upper left corner."""
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    theta = torch.eye(2, 3)
    theta[0, 2] = 1 / size[1] - 1 / 299
    theta[1, 2] = 1 / size[0] - 1 / 299
    grid = nn.functional.affine_grid(theta.repeat(2, 1, 1), [2, 3, 299, 299], align_corners=False)
    expected = nn.functional.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(resize_as_tensorflow(images), expected, rtol=0, atol=0.02)


def test_unknown_modes_are_rejected():
    with pytest.raises(InputError, match="unknown mode 'legacy' of Inception; choose clean or legacy_tensorflow"):
        open_inception("legacy")


def test_layers_load_from_both_published_file_formats(tmp_path):
    """Under `layers`, as NVIDIA's, or with such a module under `net`."""
    images, layers = torch.rand(1, 3, 4, 4), nn.Conv2d(3, 8, 4)
    nvidia = nn.Sequential(OrderedDict(layers=layers))
    for module in (nvidia, nn.Sequential(OrderedDict(net=nvidia))):
        torch.jit.script(module).save(str(tmp_path / "network.pt"))
        found = load_layers(tmp_path / "network.pt", torch.device("cpu"))(images)
        torch.testing.assert_close(found, layers(images))


# ---- The weights file

WHOLE = b"the weights " * 1000


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Paths of the cached, the packaged and the published file, none of which exists; only `WHOLE` is accepted."""
    cache, packaged = tmp_path / "train_unet_eval" / "weights" / NVIDIA_FILE, tmp_path / "package" / "default_1.pt"
    for file in (cache, packaged):
        file.parent.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "_packaged_file", lambda: packaged)
    monkeypatch.setattr(inception, "NVIDIA_URL", (tmp_path / "published.pt").as_uri())
    for name in ("NVIDIA_SHA256", "PACKAGED_SHA256"):
        monkeypatch.setattr(inception, name, hashlib.sha256(WHOLE).hexdigest())
    return cache, packaged, tmp_path / "published.pt"


def test_weights_are_looked_up_in_the_documented_order(files, tmp_path):
    """The given path, the cache, the package, NVIDIA's URL."""
    cache, packaged, published = files
    given = tmp_path / "given.pt"
    for file, path in ((packaged, None), (cache, None), (given, given)):
        file.write_bytes(WHOLE)
        assert find_weights(path)[0] == file
    cache.unlink()
    packaged.unlink()
    published.write_bytes(WHOLE)
    assert find_weights()[0] == cache
    published.unlink()
    assert find_weights()[0] == cache
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize("content", [WHOLE[:5000], b"<html>moved</html>", b"", None])
def test_bad_downloads_are_never_used(content, files):
    cache, _, published = files
    if content is not None:
        published.write_bytes(content)
    with pytest.raises(InputError, match=r"could not be downloaded \(.+\); run `make inception`"):
        find_weights()
    assert not list(cache.parent.iterdir())
    published.write_bytes(WHOLE)
    assert find_weights()[0].read_bytes() == WHOLE


@pytest.mark.parametrize("content", [WHOLE[:1000], WHOLE[:-1] + b"!"], ids=["truncated", "flipped"])
def test_damaged_files_are_not_used(content, files, capsys):
    *local, published = files
    published.write_bytes(WHOLE)
    for path in local:
        path.write_bytes(content)
    assert find_weights()[0].read_bytes() == WHOLE
    output = capsys.readouterr().out
    assert all(f"{path} is damaged or not Inception: its sha256 is " in output for path in local)


def test_wrong_files_given_by_path_are_rejected(tmp_path):
    (tmp_path / "other.pt").write_bytes(WHOLE)
    with pytest.raises(InputError, match=rf"other\.pt is damaged.*, not {inception.NVIDIA_SHA256} .*make inception"):
        open_inception(path=tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"missing\.pt is not a file; run `make inception`"):
        open_inception(path=tmp_path / "missing.pt")
