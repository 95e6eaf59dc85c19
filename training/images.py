"""From files to training pixels: finding the images of a folder, decoding, cropping and resizing them."""

import hashlib
import io
import itertools
import os
import posixpath
import struct
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
from PIL import Image, ImageOps, UnidentifiedImageError

CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's mode for each number of channels
CROPS = ("celeba_140", "celeba_128", "center", "none")
MAX_PIXELS = 89_478_485  # Pillow's limit against decompression bombs, here an error instead of a warning
# Every scan of a progressive JPEG, however few bytes it has, costs a pass over all blocks; this is libtiff's limit
MAX_SCANS = 100
MAX_VISITS = 20  # of one folder, reached through links; more of them are left out
_CELEBA_WIDTH, _CELEBA_HEIGHT = 178, 218
# left, top, right, bottom in the aligned image of 178 x 218
_CELEBA_BOXES = {"celeba_140": (19, 39, 159, 179), "celeba_128": (25, 57, 153, 185)}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_START, JPEG_SCAN = b"\xff\xd8", 0xDA

Image.init()
# Pillow recognises these but cannot decode them, or would run a program that they contain
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
IMAGE_EXTENSIONS = {
    extension for extension, kind in Image.EXTENSION.items() if kind in Image.OPEN and kind not in _NOT_DECODED
}
# Recognised by their first bytes in files with other extensions; the signatures of other formats are too short
SNIFFED_FORMATS = [kind for kind in "AVIF BMP GIF JPEG JPEG2000 PNG PPM QOI TIFF WEBP".split() if kind in Image.OPEN]
EXTENSIONS_WITH_FRAMES = {".gif", ".tif", ".tiff", ".webp", ".apng", ".mpo"}
TABLE_EXTENSIONS = {".parquet", ".arrow", ".tar"}
METADATA_READERS = {
    "metadata.csv": partial(
        pandas.read_csv,
        dtype={"file_name": str},
        encoding="utf-8-sig",
        keep_default_na=False,
        na_values=[""],
        index_col=False,  # commas at the ends of rows make no index
        dtype_backend="numpy_nullable",  # integers stay integers beside missing ones
    ),
    "metadata.jsonl": partial(pandas.read_json, lines=True, dtype=False, dtype_backend="numpy_nullable"),
    "metadata.parquet": partial(pandas.read_parquet, dtype_backend="numpy_nullable"),
}
SPLITS = {  # splits and their folder names, as in `datasets`
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
# Files that identify folders written by this repository: a training run, a model, generated images, decoded images
OWN_FILES = ({"log.jsonl", "config.yaml"}, {"model_index.json"}, {"generate.json"})
OWN_FILES += tuple({f"images.{dtype}", "meta.json"} for dtype in ("uint8", "uint16"))


class BadImage(ValueError):
    """An image that cannot be used. The message is one line."""


# ---- The files of a folder


class FolderFile(NamedTuple):
    """A file in a folder, or in a zip archive in it.

    Attributes:
        name: name relative to the folder, with slashes; see `printable`. Files in an archive are named as if the
            archive were a folder without `.zip`.
        path: path on the disk; for a file in an archive, the path of the archive.
        real_path: the path with links resolved.
        is_link: whether the path contains links below the folder.
        member: name inside the archive; None for a file outside archives.
        crc: CRC-32 of the content, as stored in the archive; None for a file outside archives.
    """

    name: str
    path: str
    real_path: str
    size: int
    mtime_ns: int
    is_link: bool
    member: str | None = None
    crc: int | None = None

    @property
    def extension(self) -> str:
        return os.path.splitext(self.name)[1].lower()

    def read(self) -> bytes:
        """The content.

        Raises:
            BadImage: if the archive is damaged or encrypted.
            OSError: if the file cannot be read.
        """
        if self.member is None:
            return Path(self.path).read_bytes()
        try:
            return _open_archive(self.path, os.getpid()).read(self.member)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
            raise BadImage(f"cannot be taken out of its archive: {error}") from error

    @property
    def is_hidden(self) -> bool:
        """Whether it is a hidden file of an archive; `list_files` leaves out those of folders."""
        return any(part.startswith((".", "__")) for part in (self.member or "").split("/") if part != ".")

    def has_several_frames(self) -> bool:
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(self.path if self.member is None else io.BytesIO(self.read())) as image:
                return getattr(image, "is_animated", False)
        return False

    def checksum(self) -> int:
        """CRC-32 of the content."""
        return zlib.crc32(self.read()) if self.crc is None else self.crc

    def is_image(self) -> bool:
        """Whether it is an image, by its extension or, for unknown extensions, by its first bytes."""
        if self.extension in IMAGE_EXTENSIONS:
            return True
        with suppress(Exception), warnings.catch_warnings():  # decoders raise anything on files that are not images
            warnings.simplefilter("ignore")
            file = self.path if self.member is None else io.BytesIO(self.read())
            with Image.open(file, formats=SNIFFED_FORMATS):
                return True
        return False

    def files_inside(self) -> list["FolderFile"]:
        """The files in this zip archive.

        Raises:
            BadImage: if the archive is damaged.
            OSError: if it cannot be read.
        """
        try:
            entries = _open_archive(self.path, os.getpid()).infolist()
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
            raise BadImage(f"{self.name} is no intact zip archive: {error}") from error
        folder, names = self.name[: -len(self.extension)], {entry.filename: entry for entry in entries}
        return [
            self._replace(name=f"{folder}/{name.removeprefix('./')}", size=entry.file_size, member=name, crc=entry.CRC)
            for name, entry in names.items()
            if not entry.is_dir()
        ]


@lru_cache(maxsize=16)
def _open_archive(path: str, process_id: int) -> zipfile.ZipFile:
    """Opens an archive, once per process, because forked processes would share the file position."""
    return zipfile.ZipFile(path)


def printable(name: str) -> str:
    """A file name with each byte that is not UTF-8 as `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def list_files(folder: Path) -> tuple[list[FolderFile], Counter]:
    """All files below a folder, following links, and how many entries are skipped, by reason.

    Skipped are hidden files and folders (.name, and folders named __name, as created by macOS and Python), broken
    links, anything that is not a regular file, and folders written by this repository: a run, a model, generated
    images or a cache. A real file may occur several times, under the names of links.

    Raises:
        OSError: if a folder cannot be read.
    """
    files, passed_over, visits = [], Counter(), Counter()
    folders = deque([(str(folder), "", (os.path.realpath(folder),))])
    while folders:
        path, prefix, real_paths = folders.popleft()
        with os.scandir(path) as scan:
            entries = list(scan)
        if prefix and any(own <= {entry.name for entry in entries} for own in OWN_FILES):
            passed_over["a folder that a run, an evaluation or a cache has written"] += 1
            continue
        for entry in entries:
            name = prefix + printable(entry.name)
            real_path = os.path.join(real_paths[-1], entry.name)
            real_path = os.path.realpath(entry.path) if entry.is_symlink() else real_path
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder = is_file = False
            if entry.name.startswith(".") or (entry.name.startswith("__") and is_folder):
                passed_over["hidden"] += 1
            elif is_folder and real_path in real_paths:
                passed_over["a link to a folder that it is in"] += 1
            elif is_folder and visits[real_path] == MAX_VISITS:
                passed_over["one of too many links to a folder"] += 1
            elif is_folder:
                visits[real_path] += 1
                folders.append((entry.path, f"{name}/", (*real_paths, real_path)))
            elif is_file:
                status, is_link = entry.stat(), real_path != real_paths[0] + entry.path[len(str(folder)) :]
                files.append(FolderFile(name, entry.path, real_path, status.st_size, status.st_mtime_ns, is_link))
            else:
                passed_over["a broken link or no regular file"] += 1
    return sorted(files), passed_over


def unpack(files: list[FolderFile]) -> list[FolderFile]:
    """The files, with every zip archive replaced by the files in it, under distinct names.

    Raises:
        BadImage: if an archive is damaged.
    """
    archives = [file for file in files if file.extension == ".zip"]
    unpacked = [file for file in files if file.extension != ".zip"]
    names = {file.name for file in unpacked}
    for archive in archives:
        for file in archive.files_inside():
            if file.name in names:  # a folder has the name of the archive
                folder, base = posixpath.splitext(archive.name)[0], posixpath.basename(archive.name)
                file = file._replace(name=f"{folder}/{base}/{file.member}")
            names.add(file.name)
            unpacked.append(file)
    return unpacked


def are_images(files: list[FolderFile]) -> bool:
    """Whether there are more images than tables. If no extension is that of an image, the contents decide."""
    tables = sum(f.extension in TABLE_EXTENSIONS and posixpath.basename(f.name) not in METADATA_READERS for f in files)
    images = sum(file.extension in IMAGE_EXTENSIONS for file in files)
    with suppress(BadImage):  # reported when the images are read
        images = images or sum(file.is_image() for file in (files if tables else unpack(files)))
    return images > tables


def shared_folders(names: Iterable[str]) -> str:
    """The leading folders, each with a slash, that all files share, up to one that names a split."""
    shared = posixpath.commonprefix([f"{posixpath.dirname(name)}/" for name in names]).split("/")[:-1]
    return "".join(f"{part}/" for part in itertools.takewhile(lambda part: part and not split_of(f"{part}/"), shared))


def split_of(name: str, shared: str = "") -> str | None:
    """The split of a file, according to its top-level folder below `shared`; None if that does not name a split."""
    folder, slash, _ = name.removeprefix(shared).partition("/")
    return next((split for split, words in SPLITS.items() if slash and folder.lower() in words), None)


def take_each_once(images: list[FolderFile]) -> tuple[dict[str, FolderFile], Counter]:
    """Name -> file to use, also under the name's `comparable` form, and how many files are left out, by reason.

    A file is preferred to links to it, the first link to other links, and a file outside an archive to a copy inside.
    Copies have the same name, size and checksum.
    """
    taken, alike, files, left_out = {}, defaultdict(list), {}, Counter()
    for file in sorted(images, key=lambda file: (file.member is not None, file.is_link, file.name)):
        place, kind = (file.real_path, file.member), (posixpath.basename(file.name), file.size)
        same = taken.get(place)
        if same is not None:
            left_out["a link to an image that is taken already"] += 1
        elif file.member is not None:
            others = (other for other in alike[kind] if other.real_path != file.real_path)
            same = next((other for other in others if other.checksum() == file.crc), None)
            left_out["in an archive, with a copy outside of it or in another one"] += same is not None
        if same is None:
            alike[kind].append(file)
        taken[place] = files[file.name] = same or file
        files.setdefault(comparable(file.name), files[file.name])
    return files, left_out


def metadata_rows(tables: Iterable[FolderFile], image_column: str) -> tuple[pandas.DataFrame, int]:
    """The rows of metadata tables, and the number of tables that name no files.

    The first column holds the images: `image_column`, from a column of that name with `_file_name` appended, or
    `image`, from `file_name`. Its values are file names relative to the image folder, in their `comparable` form.

    Raises:
        BadImage: if a table is damaged.
    """
    frames, num_others = [pandas.DataFrame({"image": []})], 0
    for table in tables:
        folder, name = posixpath.split(table.name)
        try:
            frame = METADATA_READERS[name](io.BytesIO(table.read()))
        except (ValueError, OSError) as error:
            raise BadImage(f"{table.name} is damaged: {' '.join(str(error).split())[:200]}") from error
        column = f"{image_column}_file_name"
        column = column if column in frame else "file_name"
        if column not in frame:
            num_others += 1
            continue
        paths = [posixpath.join(folder, str(cell).replace("\\", "/")) for cell in frame.pop(column)]
        name = "image" if column == "file_name" else image_column
        frame = frame.drop(columns=name, errors="ignore")
        frame.insert(0, name, [comparable(path) for path in paths])
        frames.append(frame)
    return pandas.concat(frames[1:] or frames, ignore_index=True), num_others


class Chosen(NamedTuple):
    """The images chosen from a folder.

    Attributes:
        rows: rows of the metadata, with the image names in the first column; without metadata, only that column.
        files: files by name.
        names_in_splits: names of the images of all splits.
        left_out: number of files left out, by reason.
    """

    split: str
    rows: pandas.DataFrame
    files: dict[str, FolderFile]
    names_in_splits: list[str]
    num_found: int
    left_out: Counter


def choose_images(listed: list[FolderFile], pick: Callable[[list[str]], str], image_column: str) -> Chosen:
    """The images of a split, each real file once; metadata, if any, determine which images and their order.

    Args:
        listed: the files of the folder.
        pick: chooses one of the existing splits, or raises an error.
        image_column: see `metadata_rows`.

    Raises:
        BadImage: if an archive or a metadata table is damaged.
    """
    unpacked, left_out = unpack(listed), Counter()
    found = [file for file in unpacked if not file.is_hidden]
    left_out["hidden in an archive"] = len(unpacked) - len(found)
    tables = [file for file in found if posixpath.basename(file.name) in METADATA_READERS]
    images = [file for file in found if file.is_image()]
    others = [file.name for file in {*found} - {*images} - {*tables}]
    left_out[f"not an image that Pillow can read: {extensions(others)}"] = len(others)
    shared = shared_folders(file.name for file in images)
    has_splits = any(split_of(file.name, shared) for file in images)
    splits = {file.name: split_of(file.name, shared) if has_splits else "train" for file in images}
    split = pick([name for name in SPLITS if name in (splits.values() if has_splits else ("train",))])
    counts = Counter(splits.values())
    left_out["outside of the splits, the top-level folders train, validation and test"] = counts[None]
    left_out["in another split"] = len(images) - counts[None] - counts[split]
    files, repeated = take_each_once([file for file in images if splits[file.name] == split])
    left_out.update(repeated)

    rows, left_out["a metadata table without a column file_name"] = metadata_rows(tables, image_column)
    elsewhere = {comparable(name) for name, its_split in splits.items() if its_split != split}
    elsewhere |= {name for name in rows.iloc[:, 0] if has_splits and split_of(name, shared) not in (split, None)}
    without_names = left_out["a metadata table without a column file_name"]
    left_out["a metadata table without rows"] = int(rows.empty and len(tables) > without_names)
    rows = rows[~rows.iloc[:, 0].isin(elsewhere)].copy()
    rows.isetitem(0, [files[name].name if name in files else name for name in rows.iloc[:, 0]])
    is_repeated = rows.duplicated(rows.columns[0])
    names = sorted({file.name for file in files.values()})
    if len(rows):
        left_out["named by the metadata before"] = int(is_repeated.sum())
        left_out["not named by the metadata"] = len({*names} - {*rows.iloc[:, 0]})
    rows = rows[~is_repeated] if len(rows) else pandas.DataFrame({"image": names})
    used = [files[name] for name in rows.iloc[:, 0] if name in files]
    several = sum(file.extension in EXTENSIONS_WITH_FRAMES and file.has_several_frames() for file in used)
    left_out["files with several frames or pages, of which the first is used"] = several
    names_in_splits = sorted(name for name, its_split in splits.items() if its_split)
    return Chosen(split, rows, files, names_in_splits, len(found), left_out)


def extensions(names: Iterable[str]) -> str:
    """The extensions of some files, for a message."""
    found = sorted({posixpath.splitext(name)[1].lower() or "without extension" for name in names})
    return ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")


def comparable(name: str) -> str:
    """A path without . and .., with letters and accents composed (NFC)."""
    return unicodedata.normalize("NFC", posixpath.normpath(name))


def digest_of(files: Iterable[FolderFile]) -> str:
    """A digest of the names, sizes and modification times of files."""
    lines = (f"{file.name}\0{file.size}\0{file.mtime_ns}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


# ---- Decoding


def compact(sides: Sequence[int]) -> int | list[int]:
    """A resolution in its short form: R for [R] and [R, R], [H, W] for a rectangle."""
    return sides[0] if len({*sides}) == 1 else list(sides)


def height_and_width(resolution: int | Sequence[int]) -> tuple[int, int]:
    return (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)


def decode_image(encoded: bytes, crop: str, shape: tuple[int, int, int] | int, dtype: str = "uint8") -> np.ndarray:
    """Decodes, crops and resizes one image.

    The EXIF orientation is applied; broken or oversized metadata are ignored. Without an alpha channel, transparent
    pixels are composited on white. Palette and CMYK images become RGB; colour profiles are ignored. Pixels of unknown
    range (floating point, 32-bit integers) are refused, and so is PostScript, a program that Pillow would pass to
    Ghostscript. Of several frames or pages the first one is used.

    Args:
        shape: (C, H, W) with 1 channel (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha); R means (3, R, R).
        dtype: `uint8`, to which 16-bit images are scaled, or `uint16`, to which 8-bit images are scaled. Pillow reads
            only grey images with 16 bits.

    Returns:
        shape (C, H, W).

    Raises:
        BadImage: if the bytes are not a complete image, there are too many pixels, or the crop does not suit the size.
    """
    shape = (3, shape, shape) if isinstance(shape, int) else shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata, which are not used, at every image
            image = _to_standard_mode(_load(encoded), has_alpha=shape[0] % 2 == 0, dtype=dtype)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"no image in its {len(encoded)} bytes") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others on damaged files
        raise BadImage(f"damaged image: {' '.join(str(error).split()) or type(error).__name__}") from error
    return crop_and_resize(image, crop, shape, dtype)


def crop_and_resize(image: Image.Image, crop: str, shape: tuple[int, int, int], dtype: str = "uint8") -> np.ndarray:
    """The pixels, shape (C, H, W), of an image in a mode of `CHANNELS` or of 16-bit grey values in mode F.

    Raises:
        BadImage: if the crop does not suit the size.
    """
    channels, height, width = shape
    image = image if image.mode == "F" else image.convert(CHANNELS[channels])
    box = crop_box(crop, image.width, image.height, width / height)
    # Bicubic with antialiasing: the kernel widens with the reduction (Parmar et al. 2022, arXiv 2104.11222)
    resized = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(resized).reshape(height, width, -1).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)
    if image.mode == "F":
        return np.broadcast_to(pixels.round().clip(0, 65535), shape).astype(dtype)
    return pixels if dtype == "uint8" else pixels.astype(dtype) * 257


def crop_box(crop: str, width: int, height: int, aspect: float = 1.0) -> tuple[float, float, float, float]:
    """Left, top, right and bottom in pixels, possibly fractional.

    `celeba_140` is the central 140 x 140 of the aligned 178 x 218 image, as in score_sde; `celeba_128` is 128 x 128
    around (89, 121), as in DDIM; both scale with the width. `center` is the largest central box with width `aspect`
    times its height. `none` is the whole image, which resizing then stretches.

    Raises:
        BadImage: for a CelebA crop of an image with other proportions.
    """
    if crop == "none":
        return 0, 0, width, height
    if crop == "center":
        box_width, box_height = min(width, height * aspect), min(height, width / aspect)
        left, top = (width - box_width) / 2, (height - box_height) / 2
        return left, top, left + box_width, top + box_height
    if abs(width * _CELEBA_HEIGHT - height * _CELEBA_WIDTH) > _CELEBA_HEIGHT:  # more than a pixel's width off
        raise BadImage(f"{width} x {height} pixels are not in CelebA's 178 x 218 proportions, which {crop} needs")
    return tuple(edge * width / _CELEBA_WIDTH for edge in _CELEBA_BOXES[crop])


def _load(encoded: bytes) -> Image.Image:
    """Decodes the whole image and applies its orientation."""
    try:
        image = Image.open(io.BytesIO(encoded))
        _check_cost(image, encoded)
        image.load()
    except BadImage:
        raise
    except Exception:
        without_metadata = _without_metadata(encoded)
        if len(without_metadata) == len(encoded):
            raise
        return _load(without_metadata)
    with suppress(Exception):  # an image with broken metadata counts as upright
        ImageOps.exif_transpose(image, in_place=True)
    _check_cost(image, encoded)  # the size of an icon is known only after loading
    return image


def _without_metadata(encoded: bytes) -> bytes:
    """A PNG or JPEG without the metadata that Pillow may reject as damaged or too large; other formats unchanged."""
    if encoded.startswith(JPEG_START):
        return _without_jpeg_metadata(encoded)
    if not encoded.startswith(PNG_SIGNATURE):
        return encoded
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position + 12 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, position)
        end = position + 12 + length
        is_sound = encoded[end - 4 : end] == struct.pack(">I", zlib.crc32(encoded[position + 4 : end - 4]))
        is_needed = not kind[0] & 0x20 or kind == b"tRNS"  # a small first letter means ancillary
        if is_needed or (kind == b"eXIf" and is_sound):
            kept.append(encoded[position:end])
        position = end
    return b"".join([*kept, encoded[position:]])


def _without_jpeg_metadata(encoded: bytes) -> bytes:
    """A JPEG without its APPn segments, but for EXIF (APP1) and a complete Adobe segment, which tells the colours."""
    kept, position = [JPEG_START], len(JPEG_START)
    while position + 4 <= len(encoded):
        mark, kind, length = struct.unpack_from(">BBH", encoded, position)
        if mark != 0xFF or kind == JPEG_SCAN:
            break
        end = position + 2 + length
        is_needed = not 0xE0 <= kind <= 0xEF or kind == 0xE1 or (kind == 0xEE and length >= 14)
        if is_needed:
            kept.append(encoded[position:end])
        position = end
    return b"".join([*kept, encoded[position:]])


def _check_cost(image: Image.Image, encoded: bytes) -> None:
    """Raises BadImage for an image that would take too much memory or time to decode, or run a program."""
    num_pixels = image.width * image.height
    if num_pixels > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS:,}")
    if image.format == "EPS":
        raise BadImage("it is PostScript, a program; convert it to PNG")
    if image.format in ("JPEG", "MPO"):
        scans = encoded.count(b"\xff\xda")  # the scan marker; within scan data, 255 is followed by 0
        if num_pixels * scans > MAX_PIXELS * MAX_SCANS:
            raise BadImage(f"its {scans} scans of {image.width} x {image.height} pixels take too long to decode")


def _to_standard_mode(image: Image.Image, has_alpha: bool, dtype: str) -> Image.Image:
    """RGB, or RGBA if `has_alpha`; for 16-bit grey values and uint16 without alpha, F."""
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers, of unknown range")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these have 16 bits, which Pillow widens
        raise BadImage("its pixels are signed or 32-bit integers, of unknown range; convert them to 8 or 16 bits")
    if image.mode in ("P", "PA") and image.palette is None:
        raise BadImage("its pixels are numbers of colours, but there is no palette")
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        if dtype == "uint16" and not has_alpha:
            return Image.fromarray(values.astype(np.float32))
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # round(values / 257) with less memory
    if has_alpha:
        return image.convert("RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
