"""Training images: the store of decoded pixels and the stream of batches.

Images from any source are decoded, cropped and resized once, and cached as uint8 with their class labels, if a label
column is given; training reads them from the cache.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from common import InputError
from training.images import CROPS, Format, compact, height_and_width
from training.sources import Source, find_source
from training.synthetic_faces import NO_YES

logger = logging.getLogger(__name__)

VERSION = 7  # part of each store's key: incremented whenever decoding or the choice of files changes
STALE_SECONDS = 2 * 24 * 3600  # longer than any download takes before the first image is written
PIXELS, META = "images.{}", "meta.json"


class ImageStore:
    """Decoded images of one split, in a folder written by `open_image_store`.

    Attributes:
        images: uint8 or uint16, shape (N, C, H, W), memory-mapped, read-only.
        labels: class number of each image, int64, shape (N,); None without a label column.
        summary: how many files were found, used and left out, and why; None if the source does not report it.
        fingerprint: hex digest of the pixels and labels, the same on every machine.
        description: JSON-serializable facts: source, revision, split, crop, resolution, num_images, num_skipped, ...;
            with labels also label_names, the names of the classes in the order of their numbers.
    """

    def __init__(self, folder: Path, max_images: int | None = None):
        self.folder, self.max_images = folder, max_images
        self.description = json.loads((folder / META).read_text())
        self.summary: str | None = self.description.pop("summary")
        self.fingerprint: str = self.description["fingerprint"]
        shape, dtype = (self.description["num_images"], *_image_shape(self.description)), self.description["dtype"]
        self.images = np.memmap(folder / PIXELS.format(dtype), dtype, "r", shape=shape)
        labels = self.description.pop("labels")
        self.labels = None if labels is None else np.array(labels, np.int64)
        if max_images is not None:  # the first images of a store without labels
            self.images, self.summary = self.images[:max_images], None  # the summary is of the whole split
            self.description |= {"max_images": max_images, "num_images": len(self.images)}
            self.fingerprint = self.description["fingerprint"] = self.digest()

    def __reduce__(self):
        """Pickles the folder, not the pixels, for spawned processes."""
        return ImageStore, (self.folder, self.max_images)

    def digest(self) -> str:
        """The fingerprint, recomputed from the data on disk."""
        digest = hashlib.sha256(self.images)
        if self.labels is not None:
            names = json.dumps(self.description["label_names"])
            digest.update(names.encode() + self.labels.tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
        """Images (B, C, H, W) and labels (B,)."""
        return self.images[indices], None if self.labels is None else self.labels[indices]

    def labels_among(self, names: Sequence[str]) -> np.ndarray:
        """The labels as indices into `names`, the classes of another split; InputError if one of ours is missing."""
        split, column, own_names = (self.description[key] for key in ("split", "label_column", "label_names"))
        for name in own_names:
            if name not in names:
                known = ", ".join(names)
                raise InputError(f"split {split} has the class {name!r:.80} of {column!r}, not one of {known:.200}")
        return np.array([names.index(name) for name in own_names], np.int64)[self.labels]


def cache_folder(name: str, cache_dir: str | None = None) -> Path:
    """`cache_dir`, or the folder of this name in the user's cache. Raises InputError if there is no home folder."""
    root = Path(cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", name))
    try:
        return root.expanduser()
    except RuntimeError as error:
        raise InputError(f"there is no home folder for the cache {root}; set XDG_CACHE_HOME") from error


def open_image_store(
    *,
    crop: str = "center",
    resolution: int | Sequence[int] = 64,
    in_channels: int | None = 3,
    preserve_input_precision: bool = False,
    cache_dir: str | None = None,
    skip_bad_images: bool = False,
    **which,
) -> ImageStore:
    """Opens the store of a split: decodes the images on all cores the first time, verifies the pixels afterwards.

    Args:
        resolution: R or (H, W).
        in_channels: see `decode_image`; None means 1 if the decoded pixels of all images are grey, else 3.
        preserve_input_precision: whether to decode to uint16 instead of uint8.
        cache_dir: folder of the stores; by default in the user's cache.
        skip_bad_images: leave out unreadable images and count them in the description.
        which: the data set, see `find_source`.

    Raises:
        InputError: for any problem with the arguments, the source, an image or the disk.
    """
    if crop not in CROPS:
        raise InputError(f"unknown crop {crop!r}; choose one of {', '.join(CROPS)}")
    height, width = height_and_width(resolution)
    if crop.startswith("celeba") and height != width:
        raise InputError(f"crop {crop} is square, but {height}x{width} is not; choose center or none")
    root = cache_folder("train_unet", cache_dir)
    name, revision = which.get("dataset_name"), which.get("dataset_revision")
    source = find_source(**which, last_commit=partial(_last_commit, root, name, revision))
    facts = source.identity | {
        "crop": crop,
        "resolution": compact((height, width)),
        "in_channels": in_channels or 3,
        "dtype": "uint16" if preserve_input_precision else "uint8",
        "skip_bad_images": skip_bad_images,
    }
    facts |= {} if name is None else {"requested_revision": revision}
    store = _open_or_build(root, source, facts)
    if in_channels is None and all((image == image[0]).all() for image in store.images):
        store = _open_or_build(root, source, facts | {"in_channels": 1})
    if store.summary is not None:
        logger.info(store.summary)
    return store


def _open_or_build(root: Path, source: Source, facts: dict) -> ImageStore:
    """Opens the store with these facts, or part of the whole split's store; builds it if there is neither."""
    if facts["max_images"] is not None and source.label_column is None and not facts["skip_bad_images"]:
        whole = _open_if_intact(_store_folder(root, facts | {"max_images": None}))
        if whole is not None:
            return ImageStore(whole.folder, facts["max_images"])
    folder = _store_folder(root, facts)
    return _open_if_intact(folder) or _build(folder, source, facts)


def _store_folder(root: Path, facts: dict) -> Path:
    """The folder of a store, named by a digest of its facts without the name by which a commit was requested."""
    key = [VERSION, facts | {"requested_revision": None}]
    return root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _image_shape(facts: dict) -> tuple[int, int, int]:
    """(C, H, W) of a store's images."""
    return facts["in_channels"], *height_and_width(facts["resolution"])


def _last_commit(root: Path, name: str, revision: str | None) -> str | None:
    """The commit of a Hub data set from which the newest store of a revision was built."""
    for meta in sorted(root.glob(f"*/{META}"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            facts = json.loads(meta.read_text())
            if facts.get("source") == name and facts.get("requested_revision", ()) == revision:
                return facts["revision"]
    return None


def _open_if_intact(folder: Path) -> ImageStore | None:
    """The store in a folder; None if there is none or it is damaged, in which case it is logged and deleted."""
    if not folder.exists():
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        store = ImageStore(folder)
        if store.digest() == store.fingerprint:
            return store
    logger.info("the image store %s is damaged: rebuilding it", folder)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _build(folder: Path, source: Source, facts: dict) -> ImageStore:
    """Decodes into a temporary folder and renames it, so that crashes and concurrent builders do no harm."""
    logger.info("decoding %s, split %s, into %s", source.name, source.split, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        with TemporaryDirectory(prefix=".tmp-", dir=folder.parent, ignore_cleanup_errors=True) as name:
            temporary = Path(name)
            meta = facts | _write(temporary, source, facts)
            (temporary / META).write_text(json.dumps(meta))
            meta["fingerprint"] = ImageStore(temporary).digest()
            (temporary / META).write_text(json.dumps(meta))
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.exists():  # otherwise another process was faster
                    raise
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write the store {folder}: {reason}; free some space or set --cache_dir") from error
    return ImageStore(folder)


def _write(folder: Path, source: Source, facts: dict) -> dict:
    """Decodes the images of a source into a folder; returns their number, labels and classes."""
    kept, skipped, dtype = [], [], facts["dtype"]
    decoding = contextlib.closing(source.decode(Format(facts["crop"], _image_shape(facts), dtype)))
    with decoding as images, (folder / PIXELS.format(dtype)).open("wb") as file, tqdm(unit=" images") as bar:
        for row, decoded in enumerate(images):
            bar.total = source.num_images
            bar.update()
            if isinstance(decoded, np.ndarray):
                file.write(decoded.tobytes())
                kept.append(row)
            elif facts["skip_bad_images"]:
                skipped.append(decoded)
            else:
                raise InputError(f"{source.name}, {decoded}; fix it or pass --skip_bad_images")
    if not kept:
        raise InputError(f"{source.name}, split {source.split}, has no usable image; {len(skipped)} are unreadable")
    unreadable = f"left out {len(skipped)} unreadable images, the first one: {skipped[0]}" if skipped else None
    summary = "; ".join(filter(None, [source.summary, unreadable])) or None
    about = {"num_images": len(kept), "num_skipped": len(skipped), "fingerprint": "", "summary": summary}
    return about | ({"labels": None} if source.label_column is None else _classes(source, kept))


def _classes(source: Source, kept: list[int]) -> dict:
    """The class numbers of the rows that are kept, and the names of the classes."""
    labels = [source.labels[row] for row in kept]
    for row, label in zip(kept, labels, strict=True):
        is_unknown = label is None or (source.label_names is not None and label == -1)  # -1 in `datasets`
        if is_unknown or not isinstance(label, (int, str)) or type(label) is not type(labels[0]):
            raise InputError(
                f"the column {source.label_column!r} of {source.name} holds {label!r:.80} in row {row}; labels are"
                " class numbers, or all integers, all strings or all booleans: correct it or leave out --label_column"
            )
    if source.label_names is not None:
        return {"labels": labels, "label_names": source.label_names}
    if isinstance(labels[0], bool):
        return {"labels": labels, "label_names": NO_YES}
    classes = sorted({*labels})
    numbers = {label: number for number, label in enumerate(classes)}
    return {"labels": [numbers[label] for label in labels], "label_names": [str(label) for label in classes]}


def _remove_leftovers(root: Path) -> None:
    """Removes folders left by killed builders, recognised by age because a builder may run on another machine."""
    for leftover in root.glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # its builder has just finished
            if max(path.stat().st_mtime for path in (leftover, *leftover.iterdir())) < time.time() - STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0..255 or uint16 0..65535 -> float32 in [-1, 1], same shape."""
    return images.float() / (torch.iinfo(images.dtype).max / 2) - 1


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1] (clamped) -> uint8 0..255, rounded; the inverse of `to_model_range`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def random_flip(images: Tensor) -> Tensor:
    """Flips each image (B, C, H, W) left to right with probability 1/2, using the global random generator."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(-1), images)


def shuffled_batches(
    num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start_batch: int = 0
) -> Iterator[list[int]]:
    """The indices of one process's batches: an endless stream of shuffled epochs, a pure function of the position.

    Position p of the global stream is image permutation_e[p - e N] with e = p // N, for N images. Batch k of all W
    processes together covers positions k B W to (k + 1) B W, where B is the batch size of one process; rank r gets the
    r-th part. Batches may therefore span epochs, every image occurs once per epoch, and starting at batch k,
    `start_batch`, reads no earlier data.
    """

    @lru_cache(maxsize=2)  # a batch may reach into the next epoch
    def permutation(epoch: int) -> list[int]:
        return np.random.default_rng((seed, epoch)).permutation(num_images).tolist()

    for batch in itertools.count(start_batch):
        first = (batch * world_size + rank) * batch_size
        positions = (divmod(position, num_images) for position in range(first, first + batch_size))
        yield [permutation(epoch)[position] for epoch, position in positions]
