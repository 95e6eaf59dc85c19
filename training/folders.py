"""Folders of image files and zip archives: which files are images, in which split, under which labels."""

import hashlib
import itertools
import os
import posixpath
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
from PIL import Image

from common import InputError, one_line
from training.images import FORMATS, BadImage, Format, decode_row
from training.workers import on_all_cores

IMAGE_EXTENSIONS = {".mpo"} | {extension for extension, kind in Image.EXTENSION.items() if kind in FORMATS}
TABLE_EXTENSIONS = {".parquet", ".arrow", ".tar"}
METADATA_READERS = {
    "metadata.csv": partial(
        pandas.read_csv,
        dtype={"file_name": str},
        encoding="utf-8-sig",
        keep_default_na=False,
        na_values=[""],
        index_col=False,  # trailing commas do not create an index
        dtype_backend="numpy_nullable",  # integers stay integers in columns with missing values
    ),
    "metadata.jsonl": partial(pandas.read_json, lines=True, dtype=False, dtype_backend="numpy_nullable"),
    "metadata.parquet": partial(pandas.read_parquet, dtype_backend="numpy_nullable"),
}
SPLITS = {  # the names of their folders, as in `datasets`
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_FOLDER = {folder: split for split, folders in SPLITS.items() for folder in folders}
# Each marks a folder written by this repository: a run, a model, generated images, decoded images
OWN_FILES = {"log.jsonl", "model_index.json", "generate.json", "images.uint8", "images.uint16"}


class FolderFile(NamedTuple):
    """A file in a folder, or in a zip archive in it.

    Attributes:
        name: relative to the folder, with slashes; non-UTF-8 bytes become `\\xNN`. Files in an archive are named
            as if the archive were a folder without `.zip`.
        path: path on the disk; for a file in an archive, that of the archive.
        real_path: the path with links resolved.
        member: name inside the archive; None for a file outside archives.
    """

    name: str
    path: str
    real_path: str
    size: int
    mtime_ns: int
    member: str | None = None

    @property
    def base(self) -> str:
        return posixpath.basename(self.name)

    @property
    def extension(self) -> str:
        return posixpath.splitext(self.name)[1].lower()

    @property
    def is_image(self) -> bool:
        return self.extension in IMAGE_EXTENSIONS

    @property
    def is_hidden(self) -> bool:
        """Whether its name or a folder's starts with a dot, or a folder's with __, as created by macOS and Python."""
        *folders, base = self.name.split("/")
        return base.startswith(".") or any(folder.startswith((".", "__")) for folder in folders)

    def read(self) -> bytes:
        """The content. Raises BadImage if it cannot be read, or the archive is damaged or encrypted."""
        try:
            if self.member is None:
                return Path(self.path).read_bytes()
            return _open_archive(self.path, os.getpid()).read(self.member)
        except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
            raise BadImage(f"cannot be read: {error}") from error


@lru_cache(maxsize=16)
def _open_archive(path: str, process_id: int) -> zipfile.ZipFile:
    """Opens an archive, once per process, because forked processes would share the file position."""
    return zipfile.ZipFile(path)


def list_files(folder: Path) -> tuple[list[FolderFile], Counter]:
    """All files below a folder and in its zip archives, sorted, and how many entries are left out, by reason.

    Links are followed, so a real file may occur several times. Hidden files, folders that this repository has written,
    and the files of an archive that has been unpacked beside it are left out.

    Raises:
        InputError: if an archive is damaged.
        OSError: if a folder cannot be read.
    """
    files, left_out = [], Counter()
    folders = [(str(folder), "", (os.path.realpath(folder),))]
    for path, prefix, real_paths in folders:  # the loop extends the list
        with os.scandir(path) as scan:
            entries = list(scan)
        if prefix and OWN_FILES & {entry.name for entry in entries}:
            left_out["a folder that a run, an evaluation or a cache has written"] += 1
            continue
        for entry in entries:
            name = prefix + os.fsencode(entry.name).decode("utf-8", "backslashreplace")
            real_path = os.path.join(real_paths[-1], entry.name)
            real_path = os.path.realpath(entry.path) if entry.is_symlink() else real_path
            try:
                status = entry.stat()
            except OSError:
                left_out["a broken link"] += 1
                continue
            if stat.S_ISREG(status.st_mode):
                files.append(FolderFile(name, entry.path, real_path, status.st_size, status.st_mtime_ns))
            elif real_path in real_paths:
                left_out["a link to a folder that contains it"] += 1
            elif stat.S_ISDIR(status.st_mode):
                folders.append((entry.path, f"{name}/", (*real_paths, real_path)))
    archives = [file for file in files if file.extension == ".zip" and not file.is_hidden]
    files = [file for file in files if file.extension != ".zip"]
    outside = {file.name for file in files}
    for archive in archives:
        try:
            entries = _open_archive(archive.path, os.getpid()).infolist()
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
            raise InputError(f"{archive.path} is not an intact zip archive: {error}; move it elsewhere") from error
        for entry in entries:
            name = posixpath.normpath(f"{posixpath.splitext(archive.name)[0]}/{entry.filename}")
            unpacked = posixpath.normpath(posixpath.join(posixpath.dirname(archive.name), entry.filename))
            if {name, unpacked} & outside:
                left_out["in an archive that is unpacked beside it"] += 1
            elif not entry.is_dir():
                files.append(archive._replace(name=name, size=entry.file_size, member=entry.filename))
    shown = sorted(file for file in files if not file.is_hidden)
    left_out["hidden"] = len(files) - len(shown)
    return shown, left_out


def digest_of(files: Iterable[FolderFile]) -> str:
    """A digest of the names, sizes and modification times of files."""
    lines = (f"{file.name}\0{file.size}\0{file.mtime_ns}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def splits_of(names: list[str]) -> dict[str, str | None]:
    """The split named by each file's top-level folder, below those that all files share; None if it names none.

    If no folder names a split, all files belong to train.
    """
    for folders in itertools.zip_longest(*(name.lower().split("/")[:-1] for name in names)):
        splits = [SPLIT_OF_FOLDER.get(folder) for folder in folders]
        if any(splits):
            return dict(zip(names, splits, strict=True))
        if len({*folders}) > 1:
            break
    return dict.fromkeys(names, "train")


def read_metadata(tables: Iterable[FolderFile]) -> pandas.DataFrame:
    """The rows of metadata tables, with file names relative to the image folder in the first column, `file_name`.

    Raises:
        InputError: if a table is damaged.
    """
    frames = [pandas.DataFrame({"file_name": []})]
    for table in tables:
        folder, reader = posixpath.dirname(table.name), METADATA_READERS[table.base]
        try:
            frame = reader(BytesIO(table.read()))
        except (ValueError, OSError) as error:
            raise InputError(f"{table.path} is damaged: {one_line(error)[:200]}") from error
        if "file_name" in frame:
            paths = [posixpath.join(folder, str(cell).replace("\\", "/")) for cell in frame.pop("file_name")]
            frame.insert(0, "file_name", [posixpath.normpath(path) for path in paths])
            frames.append(frame)
    return pandas.concat(frames[1:] or frames, ignore_index=True)


class FolderImages:
    """A split of a folder of images, a source (see `training.sources`).

    Top-level folders named train, validation or test are the splits; without any, all images belong to train. Images
    are sorted by name, or selected and ordered by the rows of metadata tables (metadata.csv, .jsonl or .parquet with a
    column `file_name`). Each real file is used once. Labels are a column of these tables, or `label`, the name of the
    folder that contains the image.

    Args:
        files, left_out: results of `list_files`.

    Raises:
        InputError: if there is no such split or label column, or a metadata table is damaged.
    """

    label_names = None

    def __init__(
        self,
        folder: Path,
        files: list[FolderFile],
        left_out: Counter,
        split: str,
        max_images: int | None,
        label_column: str | None,
    ):
        self.name, self.label_column = str(folder), label_column
        images = [file for file in files if file.is_image]
        tables = [file for file in files if file.base in METADATA_READERS]
        others = [file.name for file in files if not file.is_image and file not in tables]
        splits = splits_of([file.name for file in images])
        self.split = pick_split(self.name, split, [name for name in SPLITS if name in splits.values()])
        self.files = {file.name: file for file in images if splits[file.name] == self.split}
        # the first name of each real file
        real_files = {(file.real_path, file.member): file.name for file in reversed(self.files.values())}
        counts = Counter(splits.values())
        left_out.update(
            {
                f"not an image format of Pillow, by extension: {extensions(others)}": len(others),
                "outside the splits, the top-level folders train, validation and test": counts[None],
                "in another split": len(images) - counts[None] - counts[self.split],
                "a link to an image that is already used": len(self.files) - len(real_files),
            }
        )
        self.names, rows = sorted(real_files.values()), read_metadata(tables)
        rows = rows[[splits.get(name, self.split) == self.split for name in rows["file_name"]]]
        if len(rows):
            rows = rows.drop_duplicates("file_name")
            left_out["not named by the metadata"] = len({*self.names} - {*rows["file_name"]})
            self.names = rows["file_name"].tolist()
        self.labels = self._labels(rows)
        self.names = self.names[:max_images]
        self.num_images = len(self.names)
        self.identity = {"source": folder.name, "revision": digest_of(files), "split": split, "max_images": max_images}
        self.identity["label_column"] = label_column
        taken = f"used for split {self.split}: {self.num_images:,}"
        self.summary = describe_files(self.name, len(files), taken, left_out)

    def _labels(self, rows: pandas.DataFrame) -> list | None:
        column = self.label_column
        if column is None:
            return None
        if column in rows.columns[1:]:
            values = rows[column].astype(object)
            return values.where(values.notna(), None).tolist()
        folders = [f"/{name}".split("/")[-2] for name in self.names]
        is_equally_deep = len({name.count("/") for name in self.names}) == 1
        no_classes = {folder.lower() for folder in folders} <= {"", *SPLIT_OF_FOLDER}
        if column != "label" or no_classes or not is_equally_deep:
            columns = [*rows.columns[1:], "label (the folder's name) if all images are in class folders, equally deep"]
            raise no_column(self.name, column, columns)
        return folders

    def decode(self, to: Format) -> Iterator[np.ndarray | str]:
        yield from on_all_cores(partial(self._decode_part, to), self.num_images)

    def _decode_part(self, to: Format, part: slice) -> list[np.ndarray | str]:
        return [
            decode_row(row, name, partial(self._read, name), to)
            for row, name in enumerate(self.names[part], part.start)
        ]

    def _read(self, name: str) -> bytes:
        if name not in self.files:
            raise BadImage("the metadata list it, but the folder has no such image")
        return self.files[name].read()


# ---- Messages


def pick_split(source: str, split: str, splits: Iterable[str]) -> str:
    """The source's own name for a split: `valid` and `validation` mean the same."""
    for name in (split, "valid" if split == "validation" else split):
        if name in splits:
            return name
    raise InputError(f"{source} has no split {split!r}; it has {', '.join(splits)}")


def no_column(source: str, name: str, columns: Iterable[str]) -> InputError:
    return InputError(f"{source} has no column {name!r:.80}; it has {', '.join(columns)}")


def extensions(names: Iterable[str]) -> str:
    found = sorted({posixpath.splitext(name)[1].lower() or "without extension" for name in names})
    return ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")


def describe_files(source: str, num_found: int, taken: str, left_out: Counter) -> str:
    reasons = ", ".join(f"{count:,} ({why})" for why, count in left_out.items() if count)
    return f"{Path(source).name}: files found: {num_found:,}, {taken}" + (f"; left out: {reasons}" if reasons else "")
