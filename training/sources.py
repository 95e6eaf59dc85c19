"""Where images come from: the Hub, a local folder, or the embedded synthetic faces.

A source has `name`, `split`, `num_images` (None if only reading tells), `identity` (JSON-able: which images they are)
and `decode(crop, resolution)`. For each row that yields the image as uint8 (3, R, R) or, where it cannot, says why in
a string; and with it the label: None without a `label_column`, else the number (or bool) of a class in `label_names`,
or a string where these are None. The names may be known only once `decode` has begun.
"""

import contextlib
import difflib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import datasets
import fsspec
import numpy as np
from datasets.data_files import SPLIT_KEYWORDS, DataFilesDict, DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import DatasetCard, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of the HTTP library in use, which differs between releases
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from common import InputError, one_line
from training.images import BadImage, decode_image
from training.synthetic_faces import (
    FACTORS,
    LABEL_NAMES,
    LEAST_RESOLUTION,
    NO_YES,
    SYNTHETIC_FACES,
    VERSION,
    draw_faces,
    face_factors,
    split_indices,
)
from training.workers import available_cores, load_batches

logger = logging.getLogger(__name__)

SPLIT_OF_WORD = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}  # val -> validation
SPLIT_WORD = re.compile(rf"(^|[-._ 0-9/])({'|'.join(SPLIT_OF_WORD)})([-._ 0-9/])")
SPLIT_RULE = "splits are the top-level folders named train, validation or test"
Decoded = np.ndarray | str
Label = int | bool | str | None
CHUNK = 64  # images that a decoding process hands over at a time


class SyntheticFaces:
    """The embedded data set, rendered at the resolution that is asked for."""

    name = SYNTHETIC_FACES

    def __init__(self, split: str, max_images: int | None, label_column: str | None = None):
        self.split, self.label_column = split, label_column
        if label_column in FACTORS and label_column not in LABEL_NAMES:
            raise InputError(f"{label_column} of {self.name} is a number; choose one of {', '.join(LABEL_NAMES)}")
        if label_column is not None and label_column not in LABEL_NAMES:
            raise _no_column(self.name, label_column, LABEL_NAMES)
        self.label_names = LABEL_NAMES.get(label_column)
        self.indices = split_indices(split, max_images)
        self.identity = {"source": self.name, "revision": VERSION, "split": split, "max_images": max_images}
        if label_column is not None:
            self.identity["label_column"] = label_column
        self.num_images = len(self.indices)

    def decode(self, crop: str, resolution: int) -> Iterator[tuple[np.ndarray, Label]]:
        if crop not in ("none", "center"):
            raise InputError(f"crop {crop} is for CelebA's photographs; choose none for {self.name}")
        if resolution < LEAST_RESOLUTION:
            raise InputError(f"{self.name} are drawn at a resolution of {LEAST_RESOLUTION} or more, not {resolution}")
        yield from _on_all_cores(partial(self._draw, resolution), self.num_images)

    def _draw(self, resolution: int, part: slice) -> list[tuple[np.ndarray, Label]]:
        factors = face_factors(self.indices[part])
        faces = draw_faces(factors, resolution).transpose(0, 3, 1, 2)  # (n, R, R, 3) -> (n, 3, R, R)
        labels = factors[self.label_column].tolist() if self.label_column else [None] * len(faces)
        return list(zip(faces, labels, strict=True))


class HuggingFaceImages:
    """A split of a data set that the `datasets` library reads: of the Hub or of a local folder.

    Args:
        revision: commit on the Hub, or digest of the files of a folder.
        is_offline: whether the Hub does not answer, so that `datasets` need not wait for it.
    """

    def __init__(
        self,
        name: str,
        revision: str | None,
        config_name: str | None,
        split: str,
        image_column: str,
        max_images: int | None,
        streaming: bool,
        label_column: str | None = None,
        is_offline: bool = False,
    ):
        self.name, self.revision, self.config_name, self.split = name, revision, config_name, split
        self.image_column, self.max_images, self.streaming = image_column, max_images, streaming
        self.label_column, self.label_names, self.is_offline = label_column, None, is_offline
        self.num_images = None
        self.identity = {
            "source": Path(name).name if os.path.isdir(name) else name,
            "revision": revision,
            "config_name": config_name,
            "split": split,
            "image_column": image_column,
            "max_images": max_images,
        }
        if label_column is not None:
            self.identity["label_column"] = label_column

    def decode(self, crop: str, resolution: int) -> Iterator[tuple[Decoded, Label]]:
        rows = self._open()
        if self.streaming:
            yield from self._stream(rows, crop, resolution)
        else:
            self.num_images = len(rows)
            yield from _on_all_cores(partial(self._decode_rows, rows, crop, resolution), self.num_images)

    def _stream(self, rows, crop: str, resolution: int) -> Iterator[tuple[Decoded, Label]]:
        num_decoded = 0
        try:
            for row in rows:
                cell = row[self.image_column]
                path = cell["path"] if cell and cell["bytes"] is None else None
                if "://" in (path or "") and self._may_read(path):
                    cell = cell | {"bytes": _read(path)}  # here, as a failure is no fault of the image
                decoded = self._decode_row(num_decoded, cell, crop, resolution)
                num_decoded += 1
                yield decoded, row[self.label_column] if self.label_column else None
        except (OSError, HTTPError, ValueError) as error:
            raise InputError(
                f"the stream of {self.name} broke off after {num_decoded} rows: {_reason(error)}"
            ) from error

    def _decode_rows(self, rows, crop: str, resolution: int, part: slice) -> list[tuple[Decoded, Label]]:
        columns = rows[part]
        cells = columns[self.image_column]
        decoded = [self._decode_row(part.start + i, cell, crop, resolution) for i, cell in enumerate(cells)]
        labels = columns[self.label_column] if self.label_column else [None] * len(cells)
        return list(zip(decoded, labels, strict=True))

    def _decode_row(self, number: int, cell: dict | None, crop: str, resolution: int) -> Decoded:
        if cell is None or (cell["bytes"] is None and cell.get("path") is None):
            return f"row {number}: no image"
        path = cell.get("path")
        if cell["bytes"] is None and not self._may_read(path):
            return f"row {number}: its path {path!r:.80} leads out of the data set and is not read"
        try:
            return decode_image(cell["bytes"] if cell["bytes"] is not None else _read(path), crop, resolution)
        except (BadImage, OSError) as error:
            return f"row {number}{f' ({Path(path).name})' if path else ''}: {error}"

    def _may_read(self, path: str) -> bool:
        """Whether an image's path is in the data set itself, or in the caches into which it is fetched and unpacked.

        A table may name any path or address, which would make a stranger's data set read this machine's files.
        """
        *inside, container = path.split("::")
        if len(inside) > 1 or not all(part.startswith("zip://") for part in inside):
            return False
        if "://" in container:
            return not os.path.isdir(self.name) and container.startswith(f"hf://datasets/{self.name}@")
        roots = [datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE]
        roots += [self.name] if os.path.isdir(self.name) else []
        absolute = Path(os.path.normpath(container))
        return any(absolute.is_relative_to(os.path.abspath(root)) for root in roots)

    def _open(self) -> datasets.Dataset | datasets.IterableDataset:
        """The rows of the split, with the encoded bytes of the images."""
        try:
            with _no_waiting_for_the_hub() if self.is_offline else contextlib.nullcontext():
                rows = self._load()
        except InputError:
            raise
        except (OSError, HTTPError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            if os.path.isdir(self.name):
                raise InputError(f"no readable data set in {_listing(Path(self.name))}: {_reason(error)}") from error
            if isinstance(error, datasets.exceptions.DatasetNotFoundError) and " gated " in str(error):
                raise _gated(self.name) from error
            if isinstance(error, (OSError, HTTPError)):
                raise InputError(
                    f"cannot get {self.name} from the Hub and it is not cached: {_reason(error)}; check the network,"
                    f" or give --train_data_dir, or --dataset_name {SYNTHETIC_FACES}, which needs none"
                ) from error
            raise InputError(f"cannot read {self.name}: {_reason(error)}") from error
        features = rows.features or dict.fromkeys(next(iter(rows), {}))
        if self.image_column not in features:
            raise InputError(f"{self.name} has no column {self.image_column!r}; it has {', '.join(features)}")
        if self.label_column is not None:
            if self.label_column not in features:
                raise _no_column(self.name, self.label_column, features)
            self.label_names = self._class_names(features[self.label_column])
        feature = features[self.image_column]
        if not (
            feature is None
            or isinstance(feature, datasets.Image)
            or (isinstance(feature, dict) and "bytes" in feature)
        ):
            raise InputError(f"the column {self.image_column!r} of {self.name} holds {feature}, not images")
        if self.streaming and rows.features:
            # `datasets` decodes the image files of the Hub in threads of its own, which a cast does not stop
            rows = rows.decode(False)
        rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        if self.max_images is not None:
            rows = rows.take(self.max_images)
        return rows

    def _class_names(self, feature) -> list[str] | None:
        """The names of a column's classes; None for strings, whose values are the names."""
        if isinstance(feature, datasets.ClassLabel):
            return feature.names
        if isinstance(feature, datasets.Value) and feature.dtype == "bool":
            return NO_YES
        if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
            return None
        held = f"{feature}"[:100] if feature is not None else "what a stream does not tell (leave out --streaming)"
        raise InputError(
            f"the column {self.label_column!r} of {self.name} holds {held}; labels are a ClassLabel, bool or strings"
        )

    def _load(self) -> datasets.Dataset | datasets.IterableDataset:
        folder = Path(self.name)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(self.name)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            return splits[self._pick(splits)]
        if folder.is_dir():
            builder = datasets.load_dataset_builder(self.name, self.config_name, data_files=_image_files(folder))
        else:
            builder = datasets.load_dataset_builder(self.name, self.config_name, revision=self.revision)
            self._check_what_is_cached(builder)
        split = self._pick(builder.info.splits or builder.as_streaming_dataset())
        if self.streaming:
            return builder.as_streaming_dataset(split)
        builder.download_and_prepare()
        return builder.as_dataset(split)

    def _check_what_is_cached(self, builder: datasets.DatasetBuilder) -> None:
        """Without a network `datasets` takes what was cached last, of whatever commit and configuration."""
        if builder.hash != self.revision:
            raise InputError(
                f"what is cached of {self.name} is commit {builder.hash}, not {self.revision or 'main'};"
                f" connect to the Hub or give --dataset_revision {builder.hash}"
            )
        name = builder.config.name
        if builder.name == "cache" and self.config_name is None and name != "default":
            raise InputError(
                f"what is cached of {self.name} is its configuration {name!r}, perhaps not the one it has by default;"
                f" connect to the Hub or give --dataset_config_name {name}"
            )

    def _pick(self, splits) -> str:
        for name in (self.split, "valid" if self.split == "validation" else self.split):
            if name in splits:
                return name
        raise InputError(f"{self.name} has no split {self.split!r}; it has {', '.join(splits)}")


def find_source(
    *,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    dataset_config_name: str | None = None,
    dataset_revision: str | None = None,
    split: str = "train",
    image_column: str = "image",
    streaming: bool = False,
    max_images: int | None,
    label_column: str | None,
    last_commit: Callable[[], str | None],
) -> SyntheticFaces | HuggingFaceImages:
    """The source that the arguments name, without reading its images.

    Args:
        dataset_name: Hub id, or `synthetic-faces`.
        train_data_dir: folder of images, of parquet, or written by `save_to_disk`.
        split: `valid` and `validation` mean the same.
        streaming: read the Hub data set as a stream, so that its original files are never all on the disk; only the
            store is, and training is the same as ever.
        last_commit: tells which commit the revision was when the Hub last answered.

    Raises:
        InputError: if there is no such source.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise InputError("give either dataset_name or train_data_dir, exactly one of them")
    split = "validation" if split == "valid" else split
    if dataset_name == SYNTHETIC_FACES:
        return SyntheticFaces(split, max_images, label_column)
    names = dataset_config_name, split, image_column, max_images, streaming, label_column
    if dataset_name is not None:
        if os.path.isdir(dataset_name):  # `datasets` would prefer it to the Hub's
            raise InputError(f"{dataset_name} is a local folder; give it as --train_data_dir")
        commit, is_offline = _resolve_commit(dataset_name, dataset_revision), False
        if commit is None:
            commit, is_offline = last_commit() or dataset_revision, True
        return HuggingFaceImages(dataset_name, commit, *names, is_offline)
    folder = Path(os.path.abspath(train_data_dir))  # `datasets` has names of its own, such as `parquet`
    if not os.path.isdir(folder):  # unlike Path's, it takes a name that is too long for one that is not there
        nearest = next(parent for parent in folder.parents if os.path.isdir(parent))
        raise InputError(f"there is no folder {folder}; there is {_listing(nearest)}")
    if not any(path.is_file() for path in folder.rglob("*")):
        raise InputError(f"the folder {folder} has no files")
    return HuggingFaceImages(str(folder), _file_fingerprint(folder), *names)


def _resolve_commit(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a data set stands for now; None if the Hub does not answer."""
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=20).sha
    except HFValidationError as error:
        raise InputError(f"{name!r} is neither {SYNTHETIC_FACES} nor a data set's id on the Hub") from error
    except GatedRepoError as error:
        raise _gated(name) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision!r} on the Hub") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"there is no data set {name} on the Hub, or it is private: `hf auth login`") from error
    except (OSError, HTTPError) as error:
        logger.info("no answer from the Hub, using what is cached of %s: %s", name, _reason(error))
        return None


@contextlib.contextmanager
def _no_waiting_for_the_hub() -> Iterator[None]:
    """`datasets` looks into its cache at once instead of asking the Hub again for half a minute."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _image_files(folder: Path) -> DataFilesDict | None:
    """The files of a folder of images by split; None for a folder of tables, or one whose README.md lists its files.

    `datasets` would take a word like test anywhere in the names of files and folders for a split, and drop what has no
    such word. Here only folders at the top are splits, by their whole names; without any, every image is in train.
    """
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    found = sorted((path for path in found if not _is_hidden(path)), key=Path.as_posix)
    images = [path for path in found if path.suffix.lower() in ImageFolder.EXTENSIONS]
    metadata = [path for path in found if path.name in ImageFolder.METADATA_FILENAMES]
    tables = [path for path in found if path.suffix in (".parquet", ".arrow", ".tar") and path not in metadata]
    card = folder / "README.md"
    if len(images) <= len(tables) or (card.is_file() and DatasetCard.load(card).data.get("configs")):
        return None
    chained = next((folder / path for path in images if "::" in str(folder / path)), None)
    if chained:  # `datasets` takes what follows for an archive, and would drop the image
        raise InputError(f"the name {chained} has a ::, which `datasets` cannot read; rename it")
    archives = [path for path in found if path.suffix == ".zip"]
    split_of = {path: SPLIT_OF_WORD.get(path.parts[0].lower()) for path in images + archives + metadata}
    outside = [path for path in images if split_of[path] is None]
    if len(outside) == len(images):
        split_of = dict.fromkeys(split_of, "train")
        alike = next((path for path in images if SPLIT_WORD.search(path.as_posix().lower())), None)
        if alike:
            logger.info("all images of %s are in split train, also such as %s: %s", folder, alike, SPLIT_RULE)
    elif outside:
        logger.info("left out %d images of %s such as %s: %s", len(outside), folder, outside[0], SPLIT_RULE)
    splits = {}
    for split in dict.fromkeys(SPLIT_OF_WORD.values()):
        if any(split_of[path] == split for path in images):
            paths = [folder / path for path, its_split in split_of.items() if its_split == split]
            # made by hand, as `datasets` would read the names as patterns; by the times its cache notices changes
            splits[split] = DataFilesList(map(str, paths), [(str(path.stat().st_mtime_ns),) for path in paths])
    return DataFilesDict(splits)


def _is_hidden(path: Path) -> bool:
    """Whether `datasets` would pass over a file, as over those that macOS puts into archives."""
    return any(name.startswith(".") for name in path.parts) or any(name.startswith("__") for name in path.parts[:-1])


def _gated(name: str) -> InputError:
    return InputError(f"{name} is gated: accept its terms on the Hub and log in with `hf auth login`")


def _no_column(source: str, name: str, columns: Iterable[str]) -> InputError:
    """For a column of labels that is not there; names the nearest one first."""
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return InputError(f"{source} has no column {name!r:.80} of labels; {hint}it has {', '.join(columns)}")


def _reason(error: Exception) -> str:
    return one_line(error)[:300] or type(error).__name__


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


def _read(path: str) -> bytes:
    """A file's content: of this machine, of the Hub (hf://) or in an archive (zip://inner.png::outer.zip)."""
    if "://" not in path:
        return Path(path).read_bytes()
    with fsspec.open(path, "rb") as file:
        return file.read()


class _Chunks:
    """Item i is the i-th part of the images with their labels, for a worker process."""

    def __init__(self, decode: Callable[[slice], list], num_images: int):
        self.decode, self.num_images = decode, num_images

    def __len__(self) -> int:
        return -(-self.num_images // CHUNK)

    def __getitem__(self, chunk: int) -> list[tuple[Decoded, Label]]:
        return self.decode(slice(chunk * CHUNK, min((chunk + 1) * CHUNK, self.num_images)))


def _on_all_cores(decode: Callable[[slice], list], num_images: int) -> Iterator[tuple[Decoded, Label]]:
    """The images of all chunks with their labels, in order."""
    chunks = _Chunks(decode, num_images)
    num_workers = min(available_cores(), len(chunks) - 1)  # not worth a process for a single chunk
    for chunk in load_batches(chunks, num_workers, batch_size=None):
        yield from chunk
