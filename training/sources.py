"""Where images come from: the Hub, a local folder, or the embedded synthetic faces.

A source has `name`, `split`, `num_images` (None if unknown before reading), `identity` (JSON-serializable: determines
the images), `version` (of the code that turns them into pixels), and `decode(crop, shape)`. For each row, `decode`
yields the image as uint8 (C, H, W), or a string that says why it cannot, and the label: None without a `label_column`,
otherwise the number (or bool) of a class in `label_names`, or a string or integer if `label_names` is None. Once
`decode` has started, `label_names` is known, and so is `summary`: how many files were found, used and left out, and
why; None if the source does not report it.
"""

import contextlib
import difflib
import logging
import os
import posixpath
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import fsspec
import numpy as np
import pandas
import yaml
from huggingface_hub import DatasetCard, DatasetInfo, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # from the HTTP library in use, which differs between releases
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image

from common import InputError, one_line
from training.images import (
    BadImage,
    FolderFile,
    are_images,
    choose_images,
    crop_and_resize,
    decode_image,
    digest_of,
    extensions,
    list_files,
    printable,
)
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
from training.workers import on_all_cores

logger = logging.getLogger(__name__)

# What libraries raise for data sets that are missing, damaged or of an unknown kind
UNREADABLE = (OSError, HTTPError, ValueError, RuntimeError, IndexError, ImportError)
UNREADABLE += (zipfile.BadZipFile, tarfile.TarError, datasets.exceptions.DatasetsError)
Decoded = np.ndarray | str
Label = int | bool | str | None


class Format(NamedTuple):
    """What images are decoded to, the arguments of `decode_image`; `shape` is (C, H, W)."""

    crop: str
    shape: tuple[int, int, int]
    dtype: str = "uint8"


class SyntheticFaces:
    """The embedded data set, rendered at the requested resolution."""

    name, version, summary = SYNTHETIC_FACES, 2, None

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

    def decode(self, to: Format) -> Iterator[tuple[np.ndarray, Label]]:
        if to.crop not in ("none", "center"):
            raise InputError(f"crop {to.crop} is for CelebA's photographs; choose none for {self.name}")
        side = max(to.shape[1:])  # of the square from which a rectangle is taken
        if side < LEAST_RESOLUTION:
            raise InputError(f"{self.name} are drawn at a resolution of {LEAST_RESOLUTION} or more, not {side}")
        yield from on_all_cores(partial(self._draw, side, to), self.num_images)

    def _draw(self, side: int, to: Format, part: slice) -> list[tuple[np.ndarray, Label]]:
        factors = face_factors(self.indices[part])
        faces = [crop_and_resize(Image.fromarray(face), *to) for face in draw_faces(factors, side)]
        labels = factors[self.label_column].tolist() if self.label_column else [None] * len(faces)
        return list(zip(faces, labels, strict=True))


@dataclass(eq=False)
class HuggingFaceImages:
    """A split of a data set that the `datasets` library reads, from the Hub or a local folder.

    Attributes:
        revision: commit on the Hub, or digest of the files in the folder.
        is_offline: whether the Hub did not answer, so that `datasets` need not wait for it.
        found: the names of all files of the data set; None if the Hub did not answer.
    """

    name: str
    revision: str | None
    config_name: str | None
    split: str
    image_column: str
    max_images: int | None
    streaming: bool
    label_column: str | None = None
    is_offline: bool = False
    found: list[str] | None = None
    label_names = summary = num_images = None
    version = 4  # incremented whenever decoding or the choice of files changes

    @property
    def identity(self) -> dict:
        source = printable(Path(self.name).name) if os.path.isdir(self.name) else self.name
        names = "revision config_name split image_column max_images label_column".split()
        names = names[: None if self.label_column else -1]
        return {"source": source} | {name: getattr(self, name) for name in names}

    def decode(self, to: Format) -> Iterator[tuple[Decoded, Label]]:
        rows = self._open()
        if self.streaming:
            yield from self._stream(rows, to)
        else:
            self.num_images = len(rows)
            yield from on_all_cores(partial(self._decode_rows, rows, to), self.num_images)

    def _stream(self, rows, to: Format) -> Iterator[tuple[Decoded, Label]]:
        num_decoded = 0
        try:
            for row in rows:
                cell = row[self.image_column]
                path = cell["path"] if cell and cell["bytes"] is None else None
                if "://" in (path or "") and self._may_read(path):
                    cell = cell | {"bytes": _read(path)}  # read here, because a failed download is not a bad image
                decoded = self._decode_row(num_decoded, cell, to)
                num_decoded += 1
                yield decoded, row[self.label_column] if self.label_column else None
        except (OSError, HTTPError, ValueError) as error:
            raise InputError(
                f"the stream of {self.name} broke off after {num_decoded} rows: {_reason(error)}"
            ) from error

    def _decode_rows(self, rows, to: Format, part: slice) -> list[tuple[Decoded, Label]]:
        columns = rows[part]
        cells = columns[self.image_column]
        decoded = [self._decode_row(part.start + i, cell, to) for i, cell in enumerate(cells)]
        labels = columns[self.label_column] if self.label_column else [None] * len(cells)
        return list(zip(decoded, labels, strict=True))

    def _decode_row(self, number: int, cell: dict | None, to: Format) -> Decoded:
        encoded, path = (cell["bytes"], cell["path"]) if cell else (None, None)
        try:
            return decode_image(self._read(path) if encoded is None else encoded, *to)
        except (BadImage, OSError) as error:
            name = path and (Path(path).name if os.path.isabs(path) or "://" in path else path)
            return f"row {number}{f' ({name})' if name else ''}: {error}"

    def _read(self, path: str | None) -> bytes:
        if path is None:
            raise BadImage("no image")
        if not self._may_read(path):
            raise BadImage(f"its path {path!r:.80} leads out of the data set and is not read")
        return _read(path)

    def _may_read(self, path: str) -> bool:
        """Whether an image's path is in the data set itself, or in the caches for downloaded and unpacked files.

        A table may name any path or URL, which would let an untrusted data set read this machine's files.
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
        """The rows of the split, with images as encoded bytes or file names."""
        try:
            with _no_waiting_for_the_hub() if self.is_offline else contextlib.nullcontext():
                rows = self._load()
        except InputError:
            raise
        except UNREADABLE as error:
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
            or getattr(feature, "dtype", None) in ("binary", "large_binary")
        ):
            raise InputError(f"the column {self.image_column!r} of {self.name} holds {feature}, not images")
        if self.streaming and rows.features:
            # `datasets` decodes image files from the Hub in its own threads, even after a cast
            rows = rows.decode(False)
        rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        return rows if self.max_images is None else rows.take(self.max_images)

    def _class_names(self, feature) -> list[str] | None:
        """The names of a column's classes; None for strings and integers, whose values are the classes."""
        if isinstance(feature, datasets.ClassLabel):
            return feature.names
        kind = feature.dtype if isinstance(feature, datasets.Value) else None
        if kind == "bool":
            return NO_YES
        if kind in ("string", "large_string") or (kind and kind.startswith(("int", "uint"))):
            return None
        held = f"{feature}"[:100] if feature is not None else "what a stream does not tell (leave out --streaming)"
        raise InputError(
            f"the column {self.label_column!r} of {self.name} holds {held};"
            " labels are a ClassLabel, bool, strings or integers"
        )

    def _load(self) -> datasets.Dataset | datasets.IterableDataset:
        if _is_saved(Path(self.name)):
            saved = datasets.load_from_disk(self.name)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            return splits[self._pick(splits)]
        if os.path.isdir(self.name):
            builder = datasets.load_dataset_builder(self.name, self.config_name)
        else:
            builder = datasets.load_dataset_builder(self.name, self.config_name, revision=self.revision)
            self._check_what_is_cached(builder)
        split = self._pick(builder.info.splits or builder.as_streaming_dataset())
        if self.found is not None and builder.config.data_files:
            self._summarize(builder.config.data_files)
        if self.streaming:
            return builder.as_streaming_dataset(split)
        builder.download_and_prepare()
        return builder.as_dataset(split)

    def _summarize(self, data_files: dict[str, list[str]]) -> None:
        """Reports the files that `datasets` leaves out: other file types, and names that match no split."""
        root = f"{self.name}/" if os.path.isdir(self.name) else f"@{self.revision}/"
        taken = {file.partition(root)[2] for files in data_files.values() for file in files}
        left_out = [name for name in self.found if name not in taken and name not in ("README.md", ".gitattributes")]
        kinds = Counter({f"not taken by `datasets`: {extensions(left_out)}": len(left_out)})
        self.summary = _summary(self.name, len(self.found), f"read: {len(taken):,}", kinds)

    def _check_what_is_cached(self, builder: datasets.DatasetBuilder) -> None:
        """Without a network, `datasets` uses whatever commit and configuration was cached last: check both."""
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


@dataclass(eq=False)
class FolderImages(HuggingFaceImages):
    """A split of a folder of image files and zip archives of images.

    Top-level folders named train, validation or test are the splits; without any, all images belong to train. Images
    are sorted by name, or selected and ordered by the rows of metadata tables (metadata.csv, .jsonl or .parquet with a
    column `file_name`). Each real file is used once. In addition to the columns of these tables there is `label`, the
    name of the folder that contains the image.

    Attributes:
        listed, left_out: results of `list_files`.
        files: the image files of the split by name.
    """

    listed: list[FolderFile] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)

    def _read(self, path: str | None) -> bytes:
        if path not in self.files:
            raise BadImage("the metadata name it, but it is not among the images of the folder")
        return self.files[path].read()

    def _load(self) -> datasets.Dataset:
        try:
            chosen = choose_images(self.listed, self._pick, self.image_column)
        except BadImage as error:
            raise InputError(f"{self.name}: {error}; fix it or move it out of the folder") from error
        self.files = chosen.files
        taken = f"taken for split {chosen.split}: {len(chosen.rows):,}"
        self.summary = _summary(self.name, chosen.num_found, taken, self.left_out + chosen.left_out)
        return self._with_labels(chosen.rows, chosen.names_in_splits)

    def _with_labels(self, rows: pandas.DataFrame, names_in_splits: list[str]) -> datasets.Dataset:
        """The images and their labels, from a metadata column or from the folder names in all splits."""
        label, names = self.label_column, rows.iloc[:, 0].tolist()
        loaded = datasets.Dataset.from_dict({rows.columns[0]: names})
        loaded = loaded.cast_column(rows.columns[0], datasets.Image(decode=False))
        if label in (None, rows.columns[0]):
            return loaded
        if label in rows:
            values = rows[label].astype(object)
            return loaded.add_column(label, values.where(values.notna(), None).tolist())
        if label != "label" or not all("/" in name for name in names):
            raise _no_column(self.name, label, rows)
        depths = {name.count("/"): name for name in names}
        if len(depths) > 1:
            raise InputError(
                f"the images of {self.name} lie in folders of different depths, such as"
                f" {' and '.join(sorted(depths.values())[:2])}, so these are no classes; leave out --label_column"
            )
        folders = [posixpath.basename(posixpath.dirname(name)) for name in names]
        classes = sorted({posixpath.basename(posixpath.dirname(name)) for name in names_in_splits})
        loaded = loaded.add_column(label, [classes.index(folder) for folder in folders])
        return loaded.cast_column(label, datasets.ClassLabel(names=classes))


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
    """The source that the arguments describe; its images are not read yet.

    Args:
        dataset_name: Hub id, or `synthetic-faces`.
        train_data_dir: folder of images, of parquet files, or written by `save_to_disk`.
        split: `valid` and `validation` mean the same.
        streaming: read the Hub data set as a stream, so that its original files are never all on disk; the store and
            training are the same.
        last_commit: returns the commit of the revision when the Hub last answered.

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
        if os.path.isdir(dataset_name):  # `datasets` would prefer it to the Hub
            raise InputError(f"{dataset_name} is a local folder; give it as --train_data_dir")
        info = _ask_the_hub(dataset_name, dataset_revision)
        if info is None:
            return HuggingFaceImages(dataset_name, last_commit() or dataset_revision, *names, is_offline=True)
        found = [file.rfilename for file in info.siblings or ()]
        return HuggingFaceImages(dataset_name, info.sha, *names, found=found)
    # absolute, because some names mean something else to `datasets`, such as `parquet`
    folder = Path(os.path.abspath(os.path.expanduser(train_data_dir)))
    if printable(str(folder)) != str(folder):
        raise InputError(f"the name of the folder {printable(str(folder))} is not UTF-8; rename it")
    if not os.path.isdir(folder):  # unlike Path.is_dir, it returns False for a name that is too long
        if os.path.exists(folder):
            raise InputError(f"{folder} is a file; give the folder that it is in")
        nearest = next(parent for parent in folder.parents if os.path.isdir(parent))
        raise InputError(f"there is no folder {folder}; there is {_listing(nearest)}")
    try:
        files, passed_over = list_files(folder)
        is_of_images = dataset_config_name is None and not _has_a_list_of_files(folder) and are_images(files)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or folder}: {error.strerror}") from error
    if not files:
        raise InputError(f"the folder {folder} has no files{_listed(passed_over, '; passed over: ')}")
    digest = digest_of(files)
    if is_of_images:
        return FolderImages(str(folder), digest, *names, listed=files, left_out=passed_over)
    return HuggingFaceImages(str(folder), digest, *names, found=[file.name for file in files])


def _has_a_list_of_files(folder: Path) -> bool:
    """Whether `datasets` must read the folder: it was written by `save_to_disk`, or its README.md lists its files."""
    card = folder / "README.md"
    if not card.is_file():
        return _is_saved(folder)
    with contextlib.suppress(ValueError, yaml.YAMLError):  # a README of another kind
        return bool(DatasetCard.load(card).data.get("configs")) or _is_saved(folder)
    return _is_saved(folder)


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _ask_the_hub(name: str, revision: str | None) -> DatasetInfo | None:
    """The current commit of a data set's revision, and its files; None if the Hub does not answer."""
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=20)
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
    """Makes `datasets` use its cache at once instead of retrying the Hub for half a minute."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _gated(name: str) -> InputError:
    return InputError(f"{name} is gated: accept its terms on the Hub and log in with `hf auth login`")


def _no_column(source: str, name: str, columns: Iterable[str]) -> InputError:
    """The error for a missing label column; suggests the nearest name."""
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return InputError(f"{source} has no column {name!r:.80} of labels; {hint}it has {', '.join(columns)}")


def _reason(error: Exception) -> str:
    if isinstance(error, datasets.exceptions.DatasetGenerationError):  # it only says that there is a cause
        error = error.__cause__ or error
    return one_line(error)[:300] or type(error).__name__


def _summary(name: str, num_found: int, taken: str, left_out: Counter) -> str:
    return f"{Path(name).name}: files found: {num_found:,}, {taken}{_listed(left_out, '; left out: ')}"


def _listed(counts: Counter, introduction: str) -> str:
    parts = [f"{count:,} ({what})" for what, count in counts.items() if count]
    return introduction + ", ".join(parts) if parts else ""


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder}, which holds {', '.join(names[:5]) or 'nothing'}{more}"


def _read(path: str) -> bytes:
    """A file's content, from this machine, the Hub (hf://) or an archive (zip://inner.png::outer.zip)."""
    if "://" not in path:
        return Path(path).read_bytes()
    with fsspec.open(path, "rb") as file:
        return file.read()
