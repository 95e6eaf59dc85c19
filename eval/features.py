"""Features of images, computed by an extractor on all processes and cached on disk."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm

from common import InputError, on_main_process, replace_file
from training.data import cache_folder


@dataclass(frozen=True)
class FeatureExtractor:
    """A network that maps each image to a vector."""

    name: str
    mode: str  # how images are resized and scaled for the network
    sha256: str  # of its weights
    network: Callable[[Tensor], Tensor]  # preprocesses uint8 images (B, 3, H, W) and returns their features

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) of 1 to 4 channels -> float32 (B, D).

        Raises ValueError for other images, since pixels in [-1, 1] would be taken for black, and InputError for other
        features.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or not 1 <= images.shape[1] <= 4:
            raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; give uint8 (B, 3, H, W)")
        features = self.network(over_white(images).expand(-1, 3, -1, -1))
        if features.ndim != 2 or len(features) != len(images):
            raise InputError(f"{self.name} returns {tuple(features.shape)} for {len(images)} images, not (B, D)")
        return features.float()


def over_white(images: Tensor) -> Tensor:
    """Composites uint8 images (B, C, H, W) on white, which drops the alpha channel, the last of 2 or 4."""
    if images.shape[1] % 2 == 1:
        return images
    colours, alpha = images[:, :-1].float(), images[:, -1:].float() / 255
    return (alpha * colours + 255 * (1 - alpha)).round().to(torch.uint8)


def subset(num_images: int, count: int, part: int = 0) -> np.ndarray:
    """Ascending positions of `count` images, drawn at random (folders may be sorted by class) with a fixed seed.

    Subsets with the same count and different parts, 0, 1, ..., are disjoint. Raises InputError if there are too few.
    """
    if not 1 <= count * (part + 1) <= num_images:
        raise InputError(f"{count * (part + 1)} of {num_images} images were requested; request fewer (--num_images)")
    return np.sort(np.random.default_rng(0).permutation(num_images)[count * part : count * (part + 1)])


def read_images(paths: Sequence[Path], mode: str = "RGB") -> np.ndarray:
    """Image files of one size, as RGB or in another mode of Pillow, such as `L`; uint8 (N, C, H, W)."""

    def read(path: Path) -> Tensor:  # (C, H, W)
        with Image.open(path) as image:
            return pil_to_tensor(image.convert(mode))

    return torch.stack(in_threads(read, paths)).numpy()


def in_threads(function: Callable, items: Iterable) -> list:
    """Applies a function that releases the GIL (decoding, resizing) to each item, on all cores."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(function, items))


def extract_features(
    images: np.ndarray, extractor: FeatureExtractor, state: PartialState, *, batch_size: int = 64
) -> np.ndarray:
    """Features of uint8 images (N, C, H, W), float32 (N, D), on every process; each process computes a part."""
    part = np.array_split(np.arange(len(images)), state.num_processes)[state.process_index]
    starts, features = range(0, len(part), batch_size), []
    for start in tqdm(starts, f"{extractor.name} features", unit="batch", disable=not state.is_main_process):
        batch = torch.from_numpy(images[part[start : start + batch_size]])
        features.append(extractor(batch).cpu().numpy())
        if not np.isfinite(features[-1]).all():
            raise InputError(f"features of {extractor.name} are not finite; its weights are damaged")
    if state.num_processes > 1:
        features = gather_object(features)  # in the order of the processes
    return np.concatenate(features)


def cached_features(
    images: np.ndarray, extractor: FeatureExtractor, state: PartialState, *, batch_size: int = 64
) -> np.ndarray:
    """`extract_features`, or the features of the same images from the same network in the user's cache."""
    pixels = on_main_process(state, lambda: hashlib.sha256(np.ascontiguousarray(images)).hexdigest())
    key = json.dumps([extractor.name, extractor.mode, extractor.sha256, images.shape, pixels])
    path = cache_folder("train_unet_eval") / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"

    def read() -> np.ndarray | None:
        try:
            with np.load(path, allow_pickle=False) as file:  # verifies the checksums of the zip file
                return file["features"]
        except Exception:  # missing or damaged, for which numpy raises almost anything
            return None

    def write() -> None:
        content = io.BytesIO()
        np.savez(content, features=features)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.getvalue())

    features = on_main_process(state, read)
    if features is None:
        features = extract_features(images, extractor, state, batch_size=batch_size)
        on_main_process(state, write)
    return features
