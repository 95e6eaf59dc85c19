"""Training images: where they come from, the store of decoded pixels, and the stream of batches.

Whatever the source, the images are decoded, cropped and resized once and kept as uint8 in a cache folder; training
reads them from there. This module alone owns the pixel range.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from training.images import CROPS
from training.sources import DataError, HuggingFaceImages, SyntheticFaces, find_source

STORE_VERSION = 2  # raised whenever decoding changes the pixels
STALE_SECONDS = 2 * 24 * 3600  # longer than any download goes on before the first image is written
PIXELS, META = "images.uint8", "meta.json"


class ImageStore(Dataset):
    """Decoded images of one split.

    Attributes:
        images: uint8, shape (N, 3, R, R), mapped from the disk, read-only.
        fingerprint: hex digest of the pixels; the same images have the same one on every machine.
        description: JSON-able facts: source, revision, split, crop, resolution, num_images, num_skipped, ...
    """

    def __init__(self, folder: Path):
        self.description = json.loads((folder / META).read_text())
        self.fingerprint: str = self.description["fingerprint"]
        num_images, resolution = self.description["num_images"], self.description["resolution"]
        self.images = np.memmap(folder / PIXELS, np.uint8, "r", shape=(num_images, 3, resolution, resolution))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.images[index].copy())

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """uint8, shape (len(indices), 3, R, R)."""
        return torch.from_numpy(self.images[np.asarray(indices)])


def open_image_store(
    *,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    dataset_config_name: str | None = None,
    dataset_revision: str | None = None,
    split: str = "train",
    image_column: str = "image",
    crop: str = "center",
    resolution: int = 64,
    cache_dir: str | None = None,
    streaming: bool = False,
    skip_bad_images: bool = False,
    max_images: int | None = None,
) -> ImageStore:
    """Opens the store of a split; the first time it decodes the images, on all cores.

    Args:
        dataset_name: Hub id, or `synthetic-faces`.
        train_data_dir: folder of images, of parquet, or written by `save_to_disk`.
        split: `valid` and `validation` mean the same.
        cache_dir: where stores are kept; by default a folder in the user's cache.
        streaming: read the Hub data set as a stream, so that its original files are never all on the disk; only the
            store is, and training is the same as ever.
        skip_bad_images: leave out unreadable images and count them in the description.
        max_images: take the first ones only.

    Raises:
        DataError: one line, for whatever is wrong with the arguments, the source, an image or the disk.
    """
    if crop not in CROPS:
        raise DataError(f"unknown crop {crop!r}; take one of {', '.join(CROPS)}")
    if resolution < 1:
        raise DataError(f"the resolution is {resolution}; it must be at least 1")
    if max_images is not None and max_images < 1:
        raise DataError(f"max_images is {max_images}; it must be at least 1")
    root = Path(cache_dir) if cache_dir else _default_cache_dir()
    source = find_source(
        dataset_name,
        train_data_dir,
        dataset_config_name,
        dataset_revision,
        split,
        image_column,
        max_images,
        streaming,
        root,
    )
    facts = source.identity | {"crop": crop, "resolution": resolution, "skip_bad_images": skip_bad_images}
    key = hashlib.sha256(json.dumps([STORE_VERSION, facts], sort_keys=True).encode()).hexdigest()[:16]
    folder = root / key
    if not _is_complete(folder):
        _build(folder, source, facts)
    return ImageStore(folder)


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train_unet"


def _is_complete(folder: Path) -> bool:
    """Whether the store is there in full length; one that was tampered with is told and built again."""
    if not folder.exists():
        return False
    try:
        meta = json.loads((folder / META).read_text())
        num_bytes = meta["num_images"] * 3 * meta["resolution"] ** 2
        if (folder / PIXELS).stat().st_size == num_bytes:
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    print(f"the image store {folder} is damaged: building it again", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _build(folder: Path, source: SyntheticFaces | HuggingFaceImages, facts: dict) -> None:
    """Decodes into a folder beside and renames it: a crash leaves no store, and two builders do no harm."""
    print(f"decoding {source.name}, split {source.split}, into {folder}", flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    except OSError as error:
        raise DataError(f"cannot write to the cache {folder.parent}: {error.strerror}; set --cache_dir") from error
    try:
        num_images, skipped, digest = 0, [], hashlib.sha256()
        with (temporary / PIXELS).open("wb") as file, tqdm(unit=" images") as bar:
            for decoded in source.decode(facts["crop"], facts["resolution"]):
                bar.total = source.num_images
                bar.update()
                if isinstance(decoded, np.ndarray):
                    file.write(decoded.tobytes())
                    digest.update(decoded.tobytes())
                    num_images += 1
                elif facts["skip_bad_images"]:
                    skipped.append(decoded)
                else:
                    raise DataError(f"{source.name}, {decoded}; mend it or leave such images out by --skip_bad_images")
        if num_images == 0:
            raise DataError(f"{source.name}, split {source.split}, has no usable image; {len(skipped)} are unreadable")
        if skipped:
            print(f"left out {len(skipped)} unreadable images, the first one: {skipped[0]}", flush=True)
        counts = {"num_images": num_images, "num_skipped": len(skipped)}
        meta = facts | counts | {"fingerprint": digest.hexdigest()[:16]}
        (temporary / META).write_text(json.dumps(meta, indent=1))
        try:
            temporary.rename(folder)
        except OSError:
            if not _is_complete(folder):  # else another process was faster
                raise
    except OSError as error:
        raise DataError(f"could not write the image store {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(root: Path) -> None:
    """Removes what killed builders left; tells it by the age, as a builder may be alive on another machine."""
    for leftover in root.glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # its builder has just finished
            if max(path.stat().st_mtime for path in (leftover, *leftover.iterdir())) < time.time() - STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], same shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1] (clamped) -> uint8 0..255, rounded; the inverse of `to_model_range`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def random_flip(images: Tensor) -> Tensor:
    """Mirrors each image (B, C, H, W) left to right with probability 1/2, by the global random generator."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(-1), images)


class ShuffledBatches(Sampler[list[int]]):
    """The indices of one process's batches: an endless stream of shuffled epochs, a pure function of the position.

    Position p of the global stream is image permutation_e[p - e N] with e = p // N. Batch k of all processes together
    covers positions k B W to (k + 1) B W, of which rank r has the r-th part. So batches reach across epochs, each
    image comes once an epoch, and starting at batch k reads nothing of what came before.

    Args:
        batch_size: B, images per process.
        world_size: W, processes.
        start_batch: k of the first batch.

    Raises:
        DataError: if one batch of all processes is more than the data.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        num_batches: int | None = None,
    ):
        if batch_size * world_size > num_images:
            raise DataError(
                f"{num_images} images are fewer than a batch of {batch_size} on {world_size} processes;"
                " lower --train_batch_size"
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start_batch, self.num_batches = start_batch, num_batches

    def __iter__(self) -> Iterator[list[int]]:
        epoch, permutation = -1, None
        batch = self.start_batch
        while self.num_batches is None or batch < self.start_batch + self.num_batches:
            first = (batch * self.world_size + self.rank) * self.batch_size
            indices = []
            for position in range(first, first + self.batch_size):
                if position // self.num_images != epoch:
                    epoch = position // self.num_images
                    permutation = self._permutation(epoch)
                indices.append(permutation[position % self.num_images])
            yield indices
            batch += 1

    def _permutation(self, epoch: int) -> list[int]:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_images).tolist()


def make_loader(store: ImageStore, batches: ShuffledBatches, num_workers: int, pin_memory: bool) -> DataLoader:
    """Yields uint8 tensors (B, 3, R, R)."""
    return DataLoader(
        store, batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory, collate_fn=_as_it_is
    )


def _as_it_is(batch: Tensor) -> Tensor:
    return batch  # `__getitems__` has made one tensor of it already


def main() -> None:
    """Measures the loader: images per second, as uint8 and in the model's range."""
    parser = argparse.ArgumentParser(prog="python -m training.data", description=main.__doc__)
    parser.add_argument("--dataset_name")
    parser.add_argument("--train_data_dir")
    parser.add_argument("--crop", default="center", choices=CROPS)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--cache_dir")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_batches", type=int, default=1000)
    parser.add_argument("--num_workers", type=int, default=0)
    arguments = vars(parser.parse_args())
    batch_size, num_batches, num_workers = (arguments.pop(k) for k in ("batch_size", "num_batches", "num_workers"))
    if arguments["train_data_dir"] is None and arguments["dataset_name"] is None:
        arguments["dataset_name"] = "synthetic-faces"
    try:
        store = open_image_store(**arguments)
        batches = ShuffledBatches(len(store), batch_size, seed=0, num_batches=num_batches)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    for name, convert in (("uint8", lambda images: images), ("float32 in [-1, 1]", to_model_range)):
        started_at_seconds = time.perf_counter()
        for images in make_loader(store, batches, num_workers, pin_memory=False):
            convert(images)
        seconds = time.perf_counter() - started_at_seconds
        print(f"{batch_size * num_batches / seconds:,.0f} images/s as {name}, {num_workers} workers")


if __name__ == "__main__":
    main()
