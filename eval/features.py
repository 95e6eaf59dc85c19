"""Features of images: of which images, through which extractor, shared by all processes, cached on disk."""

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from common import InputError, on_main_process, one_line
from training.data import ImageStore


class FeatureExtractor(Protocol):
    """A network that maps each image to a vector.

    Attributes:
        name: of the network; a published name only with the published weights, whatever the file is called.
        mode: how images are resized and scaled for it.
        sha256: of its weights.
    """

    name: str
    mode: str
    sha256: str

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, D); anything else is refused by `check_images`."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, read when they are needed.

    Attributes:
        read: positions -> uint8 (B, 3, H, W).
        fingerprint: of the images or files.
        split, crop: of the data set; None for generated images.
        resolution: such as "64x64".
    """

    read: Callable[[Sequence[int]], np.ndarray]
    count: int
    fingerprint: str
    split: str | None
    crop: str | None
    resolution: str

    def key(self, extractor: FeatureExtractor) -> dict:
        """What identifies the features of these images in the cache."""
        facts = {name: getattr(self, name) for name in ("fingerprint", "split", "crop", "resolution", "count")}
        return facts | {"extractor": extractor.name, "mode": extractor.mode, "sha256": extractor.sha256}


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
    """One or more image files of one size in the given order, as RGB.

    Raises:
        InputError: if one cannot be read, or (when read) has another size than the first.
    """
    paths, digest = list(paths), hashlib.sha256()
    height, width = _read_file(paths[0]).shape[:2]
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())

    def read(indices: Sequence[int]) -> np.ndarray:
        wanted = [paths[index] for index in indices]
        images = _in_threads(_read_file, wanted)
        for path, image in zip(wanted, images, strict=True):
            if image.shape[:2] != (height, width):
                raise InputError(
                    f"{path} is {image.shape[1]}x{image.shape[0]}, but {paths[0].name} is {width}x{height};"
                    " all images must have one size"
                )
        return np.stack(images).transpose(0, 3, 1, 2)

    return ImageSet(read, len(paths), digest.hexdigest()[:16], None, None, f"{width}x{height}")


def _read_file(path: Path) -> np.ndarray:
    """uint8 (H, W, 3)."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def _in_threads(function: Callable, items: Sequence) -> list:
    """Applies a function that releases Python's lock (decoding, resizing) to each item, on all cores."""
    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:
        return list(pool.map(function, items))


def resize_each(images: Tensor, resize: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Applies a function (H, W, 3) -> (R, R, 3) to each image; uint8 (B, 3, H, W) -> (B, 3, R, R) of its type."""
    resized = _in_threads(resize, [image.permute(1, 2, 0).numpy() for image in images.cpu()])
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


def check_images(images: Tensor) -> None:
    """Raises ValueError unless they are uint8 (B, 3, H, W): pixels in [-1, 1] would pass for black images."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; give uint8 (B, 3, H, W)")


def extract_features(
    images: ImageSet, extractor: FeatureExtractor, state: PartialState, *, batch_size: int = 64
) -> np.ndarray:
    """Features of all images in their order, float32 (N, D), on every process; each takes a part of the images.

    Raises:
        InputError: if an image cannot be read, or a feature is not finite.
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
    """`extract_features`, or what an earlier start cached of the same images through the same extractor.

    Args:
        cache_dir: by default a folder in the user's cache. A damaged file there is reported and replaced.

    Raises:
        InputError: as `extract_features`.
        OSError: if the features cannot be written.
    """
    key = json.dumps(images.key(extractor), sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = (cache_dir or default_cache_dir() / "features") / f"{digest}.npz"
    features = on_main_process(state, lambda: _read_cached(path, key))
    if features is None:
        features = extract_features(images, extractor, state, batch_size=batch_size)
        on_main_process(state, lambda: _write_cached(path, key, features))
    return features


def _read_cached(path: Path, key: str) -> np.ndarray | None:
    """The cached arrays; None if the file is missing or damaged, which the checksums of the zip file reveal."""
    try:
        with np.load(path, allow_pickle=False) as file:
            there = json.dumps(json.loads(str(file["key"])), sort_keys=True)
            if there != key:
                raise ValueError(f"its features are those of {there}")
            return file["features"]
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        print(f"{path} is damaged or not of this kind ({one_line(error)}) and is replaced", flush=True)
        return None


def _write_cached(path: Path, key: str, features: np.ndarray) -> None:
    """Under its name only when complete; several evaluations may write the same file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", suffix=".npz", delete=False) as file:
        try:
            np.savez(file, key=np.array(key), features=features)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train_unet_eval"
