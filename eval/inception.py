"""Inception as clean-fid (Parmar et al. 2022, arXiv 2104.11222) uses it: its weights, checked, and its three modes.

clean               antialiased bicubic resize to 299 in float, no rounding; the one to report
legacy_tensorflow   resize inside the network, bilinear without antialiasing: Heusel's code of 2017, StyleGAN's
legacy_pytorch      bilinear without antialiasing before the network: pytorch-fid; other weights file, same network
"""

import hashlib
import tempfile
import urllib.request
import warnings
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from unittest.mock import patch

import torch
from cleanfid import inception_pytorch
from cleanfid.resize import build_resizer
from torch import Tensor

from eval.features import check_images, default_cache_dir, resize_each
from eval.reference import FeatureError

NUM_FEATURES = 2048
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Weights:
    """A published file.

    Attributes:
        sha256: of the file; one of another hash is never used.
    """

    name: str
    url: str
    sha256: str


# NVIDIA's TorchScript translation of the TensorFlow network; its hash is that of k-diffusion's evaluation.py.
TORCHSCRIPT = Weights(
    "inception-2015-12-05",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
# The same network in pytorch-fid. Its name carries the first eight digits of its hash.
PYTORCH = Weights(
    "pt_inception-2015-12-05",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
WEIGHTS = {"clean": TORCHSCRIPT, "legacy_tensorflow": TORCHSCRIPT, "legacy_pytorch": PYTORCH}


class Inception:
    """clean-fid's features: those of the last pooling, D = 2048; a `FeatureExtractor`.

    Args:
        mode: `clean`, `legacy_tensorflow` or `legacy_pytorch`.
        path: the file of weights; by default it is looked for in the user's cache and fetched if need be.
        weights: which file it must be; by default the true one of the mode.

    Raises:
        FeatureError: if the mode is unknown, or as `find_weights`.
    """

    def __init__(
        self,
        mode: str = "clean",
        *,
        path: Path | None = None,
        device: torch.device | str = "cpu",
        weights: Weights | None = None,
    ):
        if mode not in WEIGHTS:
            raise FeatureError(f"unknown mode {mode!r}; take one of {', '.join(WEIGHTS)}")
        weights = weights or WEIGHTS[mode]
        file = find_weights(weights, path)
        self.name, self.mode, self.sha256, self.device = weights.name, mode, weights.sha256, torch.device(device)
        load = _load_pytorch if mode == "legacy_pytorch" else torch.jit.load
        self.network = load(str(file)).eval().to(self.device)
        with warnings.catch_warnings():  # clean-fid silences all warnings of the process
            self.resize = build_resizer(mode)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 2048), in clean-fid's order of operations (its utils.py, features.py)."""
        check_images(images)
        if self.mode == "legacy_tensorflow":  # through [0, 1] and back, as torchvision's ToTensor does there
            features = self.network((images.float() / 255 * 255).to(self.device), return_features=True)
        else:
            resized = resize_each(images, self.resize).float().to(self.device)  # (B, 3, 299, 299) in 0..255
            if self.mode == "clean":
                features = self.network.layers((resized - 128) / 128)
            else:
                features = self.network(resized / 255)[0]  # (B, 2048, 1, 1)
        return features.reshape(len(images), NUM_FEATURES)


def _load_pytorch(file: str) -> torch.nn.Module:
    """clean-fid's pytorch-fid network, which would fetch its weights itself and not check them."""
    with (
        warnings.catch_warnings(),
        patch.object(
            inception_pytorch, "load_state_dict_from_url", lambda *_, **__: torch.load(file, weights_only=True)
        ),
    ):
        warnings.simplefilter("ignore")  # torchvision calls clean-fid's arguments old
        return inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)


def find_weights(weights: Weights, path: Path | None = None, cache_dir: Path | None = None) -> Path:
    """The file, with the right hash: the one at `path`, or that in the cache, or fetched into it.

    With several processes, let the main one call it first.

    Raises:
        FeatureError: if the file at `path` is missing or another one, or it cannot be fetched whole.
    """
    if path is not None:
        if not path.is_file():
            raise FeatureError(f"there is no file {path}; give that of {weights.url}")
        found = _sha256(path)
        if found != weights.sha256:
            raise FeatureError(
                f"{path} is not {weights.name} or is damaged: its sha256 is {found}, it must be {weights.sha256};"
                f" fetch it again from {weights.url}"
            )
        return path
    target = (cache_dir or default_cache_dir() / "weights") / weights.url.split("/")[-1]
    if target.exists():
        found = _sha256(target)
        if found == weights.sha256:
            return target
        print(f"{target} is damaged: its sha256 is {found}, not {weights.sha256}; fetching it again", flush=True)
    _fetch(weights, target)
    return target


def _fetch(weights: Weights, target: Path) -> None:
    """Downloads into a file beside, which takes its name only when its hash is right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {weights.url} into {target.parent}", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as folder:
        temporary, size = Path(folder) / target.name, 0
        try:
            with (
                urllib.request.urlopen(weights.url, timeout=TIMEOUT_SECONDS) as response,
                temporary.open("wb") as file,
            ):
                while chunk := response.read(1 << 20):
                    size += file.write(chunk)
        except (OSError, HTTPException) as error:
            raise FeatureError(
                f"{weights.url} could not be fetched ({getattr(error, 'reason', None) or error}); fetch it elsewhere"
                f" and put it at {target}, or give its path"
            ) from error
        found = _sha256(temporary)
        if found != weights.sha256:
            raise FeatureError(
                f"what came from {weights.url} is cut short or another file: {size} bytes with sha256 {found}, it must"
                f" be {weights.sha256}; try again, or put the file at {target}"
            )
        temporary.replace(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
