"""Features of images: which images, through which extractor, on how many processes, kept on the disk."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from common import InputError, on_main_process
from eval.reference import DamagedFileError, FeatureKey, read_arrays, write_arrays
from training.data import ImageStore


class FeatureExtractor(Protocol):
    """A network that gives each image a vector.

    Attributes:
        name: of the network; only that of the true weights, whatever the file is called.
        mode: how images are resized and scaled for it.
        sha256: of its weights.
    """

    name: str
    mode: str
    sha256: str

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, D); refuses anything else, see `check_images`."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, read when they are needed.

    Attributes:
        read: positions -> uint8 (B, 3, H, W).
        fingerprint: of the images or files.
    """

    read: Callable[[Sequence[int]], np.ndarray]
    count: int
    fingerprint: str
    split: str | None
    crop: str | None
    resolution: str

    def key(self, extractor: FeatureExtractor) -> FeatureKey:
        facts = {name: getattr(self, name) for name in ("fingerprint", "split", "crop", "resolution", "count")}
        return FeatureKey(**facts, extractor=extractor.name, mode=extractor.mode, sha256=extractor.sha256)


def images_of_store(store: ImageStore, count: int | None = None, part: int = 0) -> ImageSet:
    """All images of a store, or the `count` of `subset`.

    Raises:
        InputError: if it has fewer.
    """
    positions = subset(len(store), len(store) if count is None else count, part)
    height, width = store.images.shape[2:]
    return ImageSet(
        read=lambda indices: store.images[positions[np.asarray(indices)]],
        count=len(positions),
        fingerprint=f"{store.fingerprint}{f', part {part}' if part else ''}",
        split=store.description["split"],
        crop=store.description["crop"],
        resolution=f"{width}x{height}",
    )


def subset(num_images: int, count: int, part: int = 0) -> np.ndarray:
    """Ascending positions of `count` images, always the same ones, at random: a folder may be sorted by class.

    Args:
        part: 0, 1, ...: subsets of the same count and different parts have no image in common.

    Raises:
        InputError: if there are fewer.
    """
    if not 1 <= count * (part + 1) <= num_images:
        raise InputError(f"{count * (part + 1)} images are asked of {num_images}; ask for fewer (--num_images)")
    return np.sort(np.random.default_rng(0).permutation(num_images)[count * part : count * (part + 1)])


def images_of_files(paths: Sequence[Path]) -> ImageSet:
    """Image files in the order given, as RGB; with generated ones, `pipelines.generate.image_paths`.

    Raises:
        InputError: if there is none, one cannot be read, or (when read) is of another size than the first.
    """
    if not paths:
        raise InputError("there are no images to take features of; generate some, or give another folder")
    paths, digest = list(paths), hashlib.sha256()
    height, width = _read_file(paths[0]).shape[:2]
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())

    def read(indices: Sequence[int]) -> np.ndarray:
        wanted = [paths[index] for index in indices]
        images = list(_in_threads(_read_file, wanted))
        for path, image in zip(wanted, images, strict=True):
            if image.shape[:2] != (height, width):
                raise InputError(
                    f"{path} is {image.shape[1]}x{image.shape[0]}, but {paths[0].name} is {width}x{height};"
                    " take features of images of one size"
                )
        return np.stack(images).transpose(0, 3, 1, 2)

    return ImageSet(read, len(paths), digest.hexdigest()[:16], None, None, f"{width}x{height}")


def _read_file(path: Path) -> np.ndarray:
    """uint8 (H, W, 3)."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an image: {' '.join(str(error).split())}") from error


def _in_threads(function: Callable, items: Sequence) -> list:
    """Applies a function that leaves Python's lock (decoding, resizing) to each item, as many at once as cores."""
    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:
        return list(pool.map(function, items))


def resize_each(images: Tensor, resize: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Applies a function (H, W, 3) -> (R, R, 3) to each image; uint8 (B, 3, H, W) -> (B, 3, R, R) of its type."""
    resized = _in_threads(resize, [image.permute(1, 2, 0).numpy() for image in images.cpu()])
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


def check_images(images: Tensor) -> None:
    """Raises InputError unless they are uint8 of shape (B, 3, H, W): pixels in [-1, 1] would pass for black ones."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = str(getattr(images, "dtype", type(images).__name__)).removeprefix("torch.")
        raise InputError(f"features are of uint8 images in 0..255, not of {kind}; convert by training.data.to_uint8")
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images have the shape {tuple(images.shape)}; it must be (B, 3, H, W)")


def extract_features(
    images: ImageSet, extractor: FeatureExtractor, state: PartialState, *, batch_size: int = 64
) -> np.ndarray:
    """Features of all images in their order, float32 (N, D), on every process; each takes a part of the images.

    Raises:
        InputError: if the images will not do, or a feature is not finite.
    """
    part = np.array_split(np.arange(images.count), state.num_processes)[state.process_index]
    features = []
    with tqdm(
        total=len(part), desc=f"{extractor.name} features", unit="image", disable=not state.is_main_process
    ) as bar:
        for start in range(0, len(part), batch_size):
            indices = part[start : start + batch_size]
            batch = extractor(torch.from_numpy(np.ascontiguousarray(images.read(indices))))
            if not torch.isfinite(batch).all():
                raise InputError(f"features of {extractor.name} are not finite; its weights are damaged")
            features.append(batch.float().cpu().numpy())
            bar.update(len(indices))
    if state.num_processes > 1:
        features = gather_object(features)  # in the order of the processes
    return np.concatenate(features)


def cached_features(
    images: ImageSet,
    extractor: FeatureExtractor,
    state: PartialState,
    *,
    cache_dir: Path | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """`extract_features`, or what an earlier start kept of the same images through the same extractor.

    Args:
        cache_dir: by default a folder in the user's cache. A damaged file there is told and made anew.

    Raises:
        InputError: as `extract_features`, or if a file there is of something else than its name says.
        OSError: if the features cannot be written.
    """
    key = images.key(extractor)
    digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()[:16]
    path = (cache_dir or default_cache_dir() / "features") / f"{digest}.npz"
    features = on_main_process(state, lambda: _read_cached(path, key))
    if features is None:
        features = extract_features(images, extractor, state, batch_size=batch_size)
        on_main_process(state, lambda: write_arrays(path, key, features=features))
    return features


def _read_cached(path: Path, key: FeatureKey) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        arrays, _ = read_arrays(path, asdict(key), ("features",))
    except DamagedFileError as error:
        print(error, flush=True)
        return None
    return arrays["features"]


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train_unet_eval"
