"""From encoded images to training pixels: decoding, cropping and resizing."""

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's mode for each number of channels
CROPS = ("celeba_140", "celeba_128", "center", "none")
_CELEBA_WIDTH, _CELEBA_HEIGHT = 178, 218
# left, top, right, bottom in the aligned image of 178 x 218
_CELEBA_BOXES = {"celeba_140": (19, 39, 159, 179), "celeba_128": (25, 57, 153, 185)}

Image.init()
# Excludes formats that Pillow recognises but cannot decode, and EPS, whose programs it would run
FORMATS = [kind for kind in Image.ID if kind not in {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}]

# Image generators embed workflows in PNG files as texts longer than Pillow's limit of 1 MiB
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class BadImage(ValueError):
    """An image that cannot be used. The message is one line."""


class Format(NamedTuple):
    """The format that images are decoded to, as arguments of `decode_image`; `shape` is (C, H, W)."""

    crop: str
    shape: tuple[int, int, int]
    dtype: str = "uint8"


def compact(sides: Sequence[int]) -> int | list[int]:
    """A resolution in its short form: R for [R] and [R, R], [H, W] for a rectangle."""
    return sides[0] if len({*sides}) == 1 else list(sides)


def height_and_width(resolution: int | Sequence[int]) -> tuple[int, int]:
    return (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)


def decode_image(encoded: bytes, crop: str, shape: tuple[int, int, int], dtype: str = "uint8") -> np.ndarray:
    """Decodes, crops and resizes one image.

    The EXIF orientation is applied; broken EXIF data are ignored, other damaged metadata are not. Without an alpha
    channel, transparent pixels are composited on white. Palette and CMYK images become RGB; colour profiles are
    ignored. Pixels of unknown range (floating point, 32-bit integers) are rejected, as is PostScript, a program that
    Pillow would pass to Ghostscript. The first of several frames or pages is used.

    Args:
        shape: (C, H, W) with 1 channel (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).
        dtype: `uint8`, to which 16-bit images are scaled, or `uint16`, to which 8-bit images are scaled. Pillow reads
            16 bits only from grey images.

    Returns:
        shape (C, H, W).

    Raises:
        BadImage: if the bytes are not a complete image, there are too many pixels, or the crop does not suit the size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for every image, Pillow warns about odd metadata, which we do not use
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # more than Image.MAX_IMAGE_PIXELS
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
            image.load()
            with suppress(Exception):  # an image with broken EXIF data counts as upright
                ImageOps.exif_transpose(image, in_place=True)
            image = _to_standard_mode(image, has_alpha=shape[0] % 2 == 0, dtype=dtype)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"its {len(encoded)} bytes are not an image") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others on damaged files
        raise BadImage(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from error
    return crop_and_resize(image, crop, shape, dtype)


def decode_row(row: int, name: str | None, read: Callable[[], bytes], to: Format) -> np.ndarray | str:
    """The pixels, shape (C, H, W), of a row's image, or why there are none; `read` may raise BadImage."""
    try:
        return decode_image(read(), *to)
    except BadImage as error:
        return f"row {row}{f' ({name})' if name else ''}: {error}"


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


def _to_standard_mode(image: Image.Image, has_alpha: bool, dtype: str) -> Image.Image:
    """RGB, or RGBA if `has_alpha`; for 16-bit grey values and uint16 without alpha, F."""
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers, of unknown range")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these have 16 bits, which Pillow widens to 32
        raise BadImage("its pixels are signed or 32-bit integers, of unknown range; convert them to 8 or 16 bits")
    if image.mode in ("P", "PA") and image.palette is None:
        raise BadImage("its pixels are palette indices, but there is no palette")
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
