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
from eval.features import extract_features, read_images
from eval.inception import find_weights, load_layers, open_inception, resize_as_tensorflow
from tests.stand_in_networks import draw_images, write_images

WEIGHTS = inception.packaged_file()


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
    sets = [read_images(write_images(tmp_path / name, images)) for name, images in sets.items()]
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
    assert kernel_distance(*ours, seed=3)["value"] == pytest.approx(fid.kernel_distance(*theirs), rel=1e-4)


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


def test_layers_load_from_both_published_file_formats(tmp_path):
    """Under `layers`, as NVIDIA's, or with such a module under `net`."""
    images, layers = torch.rand(1, 3, 4, 4), nn.Conv2d(3, 8, 4)
    nvidia = nn.Sequential(OrderedDict(layers=layers))
    for module in (nvidia, nn.Sequential(OrderedDict(net=nvidia))):
        torch.jit.script(module).save(str(tmp_path / "network.pt"))
        found = load_layers(tmp_path / "network.pt", torch.device("cpu"))(images)
        torch.testing.assert_close(found, layers(images))


def test_weights_files_that_are_missing_damaged_or_not_published_are_refused(tmp_path, monkeypatch):
    given, packaged = tmp_path / "given.pt", tmp_path / "package" / "default_1.pt"
    monkeypatch.setattr(inception, "packaged_file", lambda: packaged)
    monkeypatch.setattr(inception, "SHA256", (hashlib.sha256(b"the weights").hexdigest(),))
    packaged.parent.mkdir()
    for file, path in ((given, given), (packaged, None)):
        with pytest.raises(InputError, match=rf"{file.name} is not a file; run `make inception`"):
            open_inception(path=path)
        for damaged in (b"the weight", b"the weights!", b""):
            file.write_bytes(damaged)
            with pytest.raises(InputError, match=rf"{file.name} is damaged or not Inception.*; run `make inception`"):
                open_inception(path=path)
        file.write_bytes(b"the weights")
        assert find_weights(path)[0] == file
    with pytest.raises(InputError, match="unknown mode 'legacy' of Inception; choose clean or legacy_tensorflow"):
        open_inception("legacy")
