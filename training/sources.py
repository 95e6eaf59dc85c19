"""Where images come from: the Hub, a local folder, or the embedded synthetic faces.

A source has `name`, `split`, `num_images` (None if only reading tells), `identity` (JSON-able: which images they are)
and `decode(crop, resolution)`, which yields each image as uint8 (3, R, R) or, where it cannot, says why in a string.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of the HTTP library in use, which differs between releases
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch.utils.data import DataLoader

from training.images import BadImage, decode_image
from training.processes import available_cores
from training.synthetic_faces import SYNTHETIC_FACES, VERSION, render_faces, split_indices

CHUNK = 64  # images that a decoding process hands over at a time


class DataError(ValueError):
    """Data that cannot be had or used. The message is one line: what is wrong, what is there, what to do."""


class SyntheticFaces:
    """The embedded data set, rendered at the resolution that is asked for."""

    name = SYNTHETIC_FACES

    def __init__(self, split: str, max_images: int | None):
        self.split = split
        try:
            self.indices = split_indices(split, max_images)
        except ValueError as error:
            raise DataError(str(error)) from error
        self.identity = {"source": self.name, "revision": VERSION, "split": split, "max_images": max_images}
        self.num_images = len(self.indices)

    def decode(self, crop: str, resolution: int) -> Iterator[np.ndarray]:
        if crop not in ("none", "center"):
            raise DataError(f"crop {crop} is for CelebA's photographs; take none for {self.name}")
        yield from _in_worker_processes(_FaceChunks(self.indices, resolution))


class HuggingFaceImages:
    """A split of a data set that the `datasets` library reads: of the Hub or of a local folder."""

    def __init__(
        self,
        name: str,
        revision: str | None,
        config_name: str | None,
        split: str,
        image_column: str,
        max_images: int | None,
        streaming: bool,
    ):
        self.name, self.revision, self.config_name, self.split = name, revision, config_name, split
        self.image_column, self.max_images, self.streaming = image_column, max_images, streaming
        self.num_images = None
        self.identity = {
            "source": Path(name).name if os.path.isdir(name) else name,
            "revision": revision,
            "config_name": config_name,
            "split": split,
            "image_column": image_column,
            "max_images": max_images,
        }

    def decode(self, crop: str, resolution: int) -> Iterator[np.ndarray | str]:
        rows = self._open()
        if self.streaming:
            number = 0
            try:
                for number, row in enumerate(rows):
                    yield _decode_row(number, row[self.image_column], crop, resolution)
            except (OSError, HTTPError, ValueError) as error:
                raise DataError(f"the stream of {self.name} broke off after row {number}: {_reason(error)}") from error
        else:
            self.num_images = len(rows)
            yield from _in_worker_processes(_RowChunks(rows, self.image_column, crop, resolution))

    def _open(self) -> datasets.Dataset | datasets.IterableDataset:
        """The rows of the split, with the encoded bytes of the images."""
        try:
            rows = self._load()
        except DataError:
            raise
        except (OSError, HTTPError, ValueError, datasets.exceptions.DatasetsError) as error:
            if os.path.isdir(self.name):
                raise DataError(f"no readable data set in {_listing(Path(self.name))}: {_reason(error)}") from error
            if isinstance(error, datasets.exceptions.DatasetNotFoundError) and " gated " in str(error):
                raise _gated(self.name) from error
            if isinstance(error, (OSError, HTTPError)):
                raise DataError(
                    f"cannot get {self.name} from the Hub and it is not cached: {_reason(error)}; check the network,"
                    f" or give --train_data_dir, or --dataset_name {SYNTHETIC_FACES}, which needs none"
                ) from error
            raise DataError(f"cannot read {self.name}: {_reason(error)}") from error
        features = rows.features or dict.fromkeys(next(iter(rows), {}))
        if self.image_column not in features:
            raise DataError(f"{self.name} has no column {self.image_column!r}; it has {', '.join(features)}")
        feature = features[self.image_column]
        if not (feature is None or isinstance(feature, datasets.Image) or "bytes" in _keys(feature)):
            raise DataError(f"the column {self.image_column!r} of {self.name} holds {feature}, not images")
        rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        if self.max_images is not None:
            rows = rows.take(self.max_images)
        return rows

    def _load(self) -> datasets.Dataset | datasets.IterableDataset:
        folder = Path(self.name)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(self.name)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            return splits[self._pick(splits)]
        hub = {} if folder.is_dir() else {"revision": self.revision}
        splits = datasets.get_dataset_split_names(self.name, self.config_name, **hub)
        return datasets.load_dataset(
            self.name, self.config_name, split=self._pick(splits), streaming=self.streaming, **hub
        )

    def _pick(self, splits) -> str:
        for name in (self.split, "valid" if self.split == "validation" else self.split):
            if name in splits:
                return name
        raise DataError(f"{self.name} has no split {self.split!r}; it has {', '.join(splits)}")


def find_source(
    dataset_name: str | None,
    train_data_dir: str | None,
    dataset_config_name: str | None,
    dataset_revision: str | None,
    split: str,
    image_column: str,
    max_images: int | None,
    streaming: bool,
    cache_dir: Path,
) -> SyntheticFaces | HuggingFaceImages:
    """The source that the arguments name, without reading its images.

    Raises:
        DataError: if there is no such source.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise DataError("give either dataset_name or train_data_dir, exactly one of them")
    split = "validation" if split == "valid" else split
    if dataset_name == SYNTHETIC_FACES:
        return SyntheticFaces(split, max_images)
    if dataset_name is not None:
        if os.path.isdir(dataset_name):  # `datasets` would prefer it to the Hub's
            raise DataError(f"{dataset_name} is a local folder; give it as --train_data_dir")
        commit = _resolve_commit(dataset_name, dataset_revision, cache_dir / "commits.json")
        return HuggingFaceImages(dataset_name, commit, dataset_config_name, split, image_column, max_images, streaming)
    folder = Path(os.path.abspath(train_data_dir))  # `datasets` has names of its own, such as `parquet`
    if not folder.is_dir():
        nearest = next(parent for parent in folder.parents if parent.is_dir())
        raise DataError(f"there is no folder {folder}; there is {_listing(nearest)}")
    if not any(path.is_file() for path in folder.rglob("*")):
        raise DataError(f"the folder {folder} has no files")
    return HuggingFaceImages(
        str(folder), _file_fingerprint(folder), dataset_config_name, split, image_column, max_images, streaming=False
    )


def _resolve_commit(name: str, revision: str | None, record: Path) -> str | None:
    """The commit that a revision of a Hub data set stands for; without a network, the one it stood for last."""
    key = f"{name}@{revision or 'main'}"
    try:
        known = json.loads(record.read_text())
    except (OSError, ValueError):
        known = {}
    try:
        commit = HfApi().dataset_info(name, revision=revision, timeout=20).sha
    except HFValidationError as error:
        raise DataError(f"{name!r} is neither {SYNTHETIC_FACES} nor a data set's id on the Hub") from error
    except GatedRepoError as error:
        raise _gated(name) from error
    except RevisionNotFoundError as error:
        raise DataError(f"{name} has no revision {revision!r} on the Hub") from error
    except RepositoryNotFoundError as error:
        raise DataError(f"there is no data set {name} on the Hub, or it is private: `hf auth login`") from error
    except (OSError, HTTPError) as error:
        print(f"no answer from the Hub, taking what is cached of {name}: {_reason(error)}", flush=True)
        datasets.config.HF_HUB_OFFLINE = True  # or it asks again for half a minute before it looks into its cache
        return known.get(key, revision)
    with contextlib.suppress(OSError):  # the store tells of a cache that cannot be written
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(known | {key: commit}))
    return commit


def _gated(name: str) -> DataError:
    return DataError(f"{name} is gated: accept its terms on the Hub and log in with `hf auth login`")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _file_fingerprint(folder: Path) -> str:
    """Digest of the names, sizes and modification times of the files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder}, which holds {', '.join(names[:5]) or 'nothing'}{more}"


def _keys(feature) -> tuple:
    return tuple(feature) if isinstance(feature, dict) else ()


# Decoding in worker processes: item i of these is a list of decoded images


class _FaceChunks:
    def __init__(self, indices: range, resolution: int):
        self.indices, self.resolution = indices, resolution

    def __len__(self) -> int:
        return -(-len(self.indices) // CHUNK)

    def __getitem__(self, chunk: int) -> list[np.ndarray]:
        faces = render_faces(self.indices[chunk * CHUNK : (chunk + 1) * CHUNK], self.resolution)
        return list(faces.transpose(0, 3, 1, 2))  # (n, R, R, 3) -> (n, 3, R, R)


class _RowChunks:
    def __init__(self, rows: datasets.Dataset, image_column: str, crop: str, resolution: int):
        self.rows, self.image_column, self.crop, self.resolution = rows, image_column, crop, resolution

    def __len__(self) -> int:
        return -(-len(self.rows) // CHUNK)

    def __getitem__(self, chunk: int) -> list[np.ndarray | str]:
        first = chunk * CHUNK
        cells = self.rows[first : first + CHUNK][self.image_column]
        return [_decode_row(first + i, cell, self.crop, self.resolution) for i, cell in enumerate(cells)]


def _decode_row(number: int, cell: dict | None, crop: str, resolution: int) -> np.ndarray | str:
    if cell is None:
        return f"row {number}: no image"
    path = cell.get("path")
    try:
        encoded = cell["bytes"] if cell["bytes"] is not None else Path(path).read_bytes()
        return decode_image(encoded, crop, resolution)
    except (BadImage, OSError) as error:
        return f"row {number}{f' ({Path(path).name})' if path else ''}: {error}"


def _in_worker_processes(chunks) -> Iterator[np.ndarray | str]:
    """The images of all chunks, in order, made on all cores."""
    num_workers = min(available_cores(), len(chunks) - 1)  # not worth a process for a single chunk
    for chunk in DataLoader(chunks, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is):
        yield from chunk


def _as_it_is(batch):
    return batch
