"""Where images come from: the Hub, a local folder, or the embedded synthetic faces.

A source has `name`, `split`, `label_column`, `num_images` (None if unknown before reading), `identity`
(JSON-serializable: determines the images), and `decode`, which yields the pixels of each image, or why there are none.
After decoding, if there is a `label_column`, `labels` has the class of each image: a number if `label_names` is known,
otherwise a string, integer or bool. `summary` says how many files were found, used and left out, and why (None if the
source does not report it).
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import fsspec
import numpy as np
from huggingface_hub import DatasetInfo, HfApi, constants
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # from the HTTP library in use, which differs between releases
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image

from common import InputError, one_line
from training.folders import (
    METADATA_READERS,
    TABLE_EXTENSIONS,
    FolderImages,
    describe_files,
    digest_of,
    extensions,
    list_files,
    no_column,
    pick_split,
)
from training.images import BadImage, Format, crop_and_resize, decode_row
from training.synthetic_faces import (
    LABEL_NAMES,
    SPLIT_SIZES,
    SYNTHETIC_FACES,
    VERSION,
    face_factors,
    render_faces,
    split_indices,
)
from training.workers import on_all_cores

logger = logging.getLogger(__name__)


class SyntheticFaces:
    """The embedded data set, rendered at the requested resolution."""

    name, labels, summary = SYNTHETIC_FACES, None, None

    def __init__(self, split: str, max_images: int | None, label_column: str | None):
        self.split, self.label_column = pick_split(self.name, split, SPLIT_SIZES), label_column
        if label_column is not None and label_column not in LABEL_NAMES:
            raise no_column(self.name, label_column, LABEL_NAMES)
        self.label_names = LABEL_NAMES.get(label_column)
        self.indices = split_indices(split, max_images)
        self.identity = {"source": self.name, "revision": VERSION, "split": split, "max_images": max_images}
        self.identity["label_column"] = label_column
        self.num_images = len(self.indices)

    def decode(self, to: Format) -> Iterator[np.ndarray]:
        if to.crop not in ("none", "center"):
            raise InputError(f"crop {to.crop} is for CelebA's photographs; choose none for {self.name}")
        if self.label_column is not None:
            self.labels = face_factors(self.indices)[self.label_column].tolist()
        yield from on_all_cores(partial(self._draw, to), self.num_images)

    def _draw(self, to: Format, part: slice) -> list[np.ndarray]:
        squares = render_faces(self.indices[part], max(to.shape[1:]))
        return [crop_and_resize(Image.fromarray(square), *to) for square in squares]


@dataclass(eq=False)
class HuggingFaceImages:
    """A split of a data set that the `datasets` library reads, from the Hub or a local folder.

    Attributes:
        revision: commit on the Hub, or digest of the files in the folder.
        found: the names of all files of the data set; None if the Hub did not answer.
    """

    name: str
    revision: str | None
    config_name: str | None
    split: str
    image_column: str
    max_images: int | None
    streaming: bool
    label_column: str | None
    found: list[str] | None
    labels = label_names = summary = num_images = None

    @property
    def identity(self) -> dict:
        source = os.path.basename(self.name) if self.is_local else self.name
        names = ("revision", "config_name", "split", "image_column", "max_images", "label_column")
        return {"source": source} | {name: getattr(self, name) for name in names}

    @property
    def is_local(self) -> bool:
        return os.path.isdir(self.name)

    def decode(self, to: Format) -> Iterator[np.ndarray | str]:
        rows = self._open()
        if self.streaming:
            yield from self._stream(rows, to)
        else:
            self.num_images = len(rows)
            self.labels = rows[self.label_column][:] if self.label_column else None
            yield from on_all_cores(partial(self._decode_part, rows, to), self.num_images)

    def _stream(self, rows: datasets.IterableDataset, to: Format) -> Iterator[np.ndarray | str]:
        self.labels = []
        try:
            for row in rows:
                yield self._decode_cell(len(self.labels), row[self.image_column], to)
                self.labels.append(row.get(self.label_column))
        except (OSError, HTTPError, ValueError) as error:
            num_done = len(self.labels)
            raise InputError(f"the stream of {self.name} failed after {num_done} rows: {_reason(error)}") from error

    def _decode_part(self, rows: datasets.Dataset, to: Format, part: slice) -> list[np.ndarray | str]:
        cells = rows[part][self.image_column]
        return [self._decode_cell(number, cell, to) for number, cell in enumerate(cells, part.start)]

    def _decode_cell(self, number: int, cell: dict | None, to: Format) -> np.ndarray | str:
        name = os.path.basename(cell["path"] or "") if cell else None
        return decode_row(number, name, partial(self._read, cell), to)

    def _read(self, cell: dict | None) -> bytes:
        """An image's content, from the table, this machine, the Hub (hf://) or an archive (zip://inner::outer.zip).

        A failed download raises an OSError, which ends the stream: it is not a bad image.
        """
        encoded, path = (cell["bytes"], cell["path"]) if cell else (None, None)
        if encoded is not None:
            return encoded
        if path is None:
            raise BadImage("no image")
        if not self._may_read(path):
            raise BadImage(f"its path {path!r:.80} is outside the data set and was not read")
        if "://" in path:
            with fsspec.open(path, "rb") as file:
                return file.read()
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise BadImage(error.strerror) from error

    def _may_read(self, path: str) -> bool:
        """Whether an image's path is in the data set itself, or in the caches for downloaded and unpacked files.

        A table may name any path or URL, which would let an untrusted data set read this machine's files.
        """
        *inside, container = path.split("::")
        if len(inside) > 1 or not all(part.startswith("zip://") for part in inside):
            return False
        if "://" in container:
            return not self.is_local and container.startswith(f"hf://datasets/{self.name}@")
        roots = [datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE]
        roots += [self.name] if self.is_local else []
        absolute = Path(os.path.normpath(container))
        return any(absolute.is_relative_to(os.path.abspath(root)) for root in roots)

    def _open(self) -> datasets.Dataset | datasets.IterableDataset:
        """The rows of the split, with images as encoded bytes or file names."""
        before = datasets.config.HF_HUB_OFFLINE
        datasets.config.HF_HUB_OFFLINE = before or self.found is None  # use its cache without retries
        try:
            return self._with_columns(self._load())
        except InputError:
            raise
        except Exception as error:  # `datasets` raises many kinds of errors for missing or damaged data
            if self.is_local:
                raise InputError(f"no readable data set in {_listing(Path(self.name))}: {_reason(error)}") from error
            if self.found is not None:
                raise InputError(f"cannot read {self.name}: {_reason(error)}") from error
            raise InputError(
                f"cannot download {self.name} from the Hub and it is not cached: {_reason(error)}; check the network,"
                f" or give --train_data_dir, or --dataset_name {SYNTHETIC_FACES}, which needs none"
            ) from error
        finally:
            datasets.config.HF_HUB_OFFLINE = before

    def _with_columns(self, rows: datasets.Dataset | datasets.IterableDataset):
        features = rows.features or {}
        if self.image_column not in features:
            raise no_column(self.name, self.image_column, features)
        if self.label_column is not None:
            if self.label_column not in features:
                raise no_column(self.name, self.label_column, features)
            self.label_names = getattr(features[self.label_column], "names", None)  # of a ClassLabel
        if self.streaming:
            # `datasets` decodes image files from the Hub in its own threads, even after a cast
            rows = rows.decode(False)
        rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        return rows if self.max_images is None else rows.take(self.max_images)

    def _load(self) -> datasets.Dataset | datasets.IterableDataset:
        if any(os.path.isfile(os.path.join(self.name, file)) for file in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(self.name)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            return splits[pick_split(self.name, self.split, splits)]
        if self.is_local:
            builder = datasets.load_dataset_builder(self.name, self.config_name)
        else:
            builder = datasets.load_dataset_builder(self.name, self.config_name, revision=self.revision)
            if builder.hash != self.revision:  # offline, `datasets` uses whatever commit was cached last
                raise InputError(
                    f"the cached copy of {self.name} is commit {builder.hash}, not {self.revision or 'main'};"
                    f" connect to the Hub or give --dataset_revision {builder.hash}"
                )
        split = pick_split(self.name, self.split, builder.info.splits or builder.as_streaming_dataset())
        if self.found is not None and builder.config.data_files:
            self._summarize(builder.config.data_files)
        if self.streaming:
            return builder.as_streaming_dataset(split)
        builder.download_and_prepare()
        return builder.as_dataset(split)

    def _summarize(self, data_files: dict[str, list[str]]) -> None:
        """Reports the files that `datasets` leaves out: other file types, and names that match no split."""
        root = f"{self.name}/" if self.is_local else f"@{self.revision}/"
        taken = {file.partition(root)[2] for files in data_files.values() for file in files}
        left_out = {*self.found} - taken - {"README.md", ".gitattributes"}
        counts = Counter({f"not read by `datasets`: {extensions(left_out)}": len(left_out)})
        self.summary = describe_files(self.name, len(self.found), f"read: {len(taken):,}", counts)


Source = SyntheticFaces | HuggingFaceImages | FolderImages


def find_source(
    *,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    dataset_config_name: str | None = None,
    dataset_revision: str | None = None,
    split: str = "train",
    image_column: str = "image",
    streaming: bool = False,
    max_images: int | None = None,
    label_column: str | None = None,
    last_commit: Callable[[], str | None],
) -> Source:
    """The source that the arguments describe; its images are not read yet.

    Args:
        dataset_name: Hub id, or `synthetic-faces`; either this or `train_data_dir` is given.
        train_data_dir: folder of images, of parquet files, or written by `save_to_disk`.
        streaming: read the Hub data set as a stream, so that its original files are never all on disk.
        label_column: also read each image's class: a column of ClassLabel, of bool (the classes are no and yes), or of
            strings or integers (the classes are its sorted values); for `synthetic-faces`, a categorical factor or
            `glasses`.
        last_commit: returns the commit of the revision when the Hub last answered.

    Raises:
        InputError: if there is no such source.
    """
    split = "validation" if split == "valid" else split
    if dataset_name == SYNTHETIC_FACES:
        return SyntheticFaces(split, max_images, label_column)
    names = dataset_config_name, split, image_column, max_images, streaming, label_column
    if dataset_name is not None:
        if os.path.isdir(dataset_name):  # `datasets` would prefer it to the Hub
            raise InputError(f"{dataset_name} is a local folder; give it as --train_data_dir")
        info = _ask_the_hub(dataset_name, dataset_revision)
        if info is None:
            return HuggingFaceImages(dataset_name, last_commit() or dataset_revision, *names, found=None)
        found = [file.rfilename for file in info.siblings or ()]
        return HuggingFaceImages(dataset_name, info.sha, *names, found)
    # absolute, because some names, such as `parquet`, mean something else to `datasets`
    folder = Path(os.path.abspath(os.path.expanduser(train_data_dir)))
    if not folder.is_dir():
        nearest = next(parent for parent in folder.parents if parent.is_dir())
        raise InputError(f"folder not found: {folder}; its nearest existing parent is {_listing(nearest)}")
    files, left_out = list_files(folder)
    if not files:
        raise InputError(f"no images found in {_listing(folder)}")
    tables = [file for file in files if file.extension in TABLE_EXTENSIONS and file.base not in METADATA_READERS]
    if dataset_config_name is None and sum(file.is_image for file in files) > len(tables):
        return FolderImages(folder, files, left_out, split, max_images, label_column)
    return HuggingFaceImages(str(folder), digest_of(files), *names, [file.name for file in files])


def _ask_the_hub(name: str, revision: str | None) -> DatasetInfo | None:
    """The current commit of a data set's revision, and its files; None if the Hub does not answer."""
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=20)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(
            f"cannot open {name}, revision {revision or 'main'}, on the Hub: {_reason(error)}; accept the terms of a"
            " gated data set there, and log in with `hf auth login`"
        ) from error
    except (OSError, HTTPError) as error:
        logger.info("no answer from the Hub; using the cached copy of %s: %s", name, _reason(error))
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, datasets.exceptions.DatasetGenerationError):  # its own message gives no reason
        error = error.__cause__ or error
    return one_line(error)[:300] or type(error).__name__


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder}, which holds {', '.join(names[:5]) or 'nothing'}{more}"
