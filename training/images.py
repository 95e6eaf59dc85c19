"""From an encoded image to training pixels: decode, crop by name, resize."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

CROPS = ("celeba_140", "celeba_128", "center", "none")
MAX_PIXELS = 89_478_485  # Pillow's limit against decompression bombs, here an error instead of a warning
# A progressive JPEG costs a pass over all blocks for every scan, and a scan may take a few bytes; libtiff's limit
MAX_SCANS = 100
_CELEBA_WIDTH, _CELEBA_HEIGHT = 178, 218
# left, top, right, bottom in the aligned image of 178 x 218
_CELEBA_BOXES = {"celeba_140": (19, 39, 159, 179), "celeba_128": (25, 57, 153, 185)}


class BadImage(ValueError):
    """An image that cannot be used. The message is one line."""


def decode_image(encoded: bytes, crop: str, resolution: int) -> np.ndarray:
    """Decodes, crops and resizes one image.

    The EXIF orientation is applied. Transparent pixels are laid over white; grey, palette and CMYK images become RGB;
    16-bit ones are scaled to 8 bits; colour profiles are ignored. Floating-point pixels, whose range no file tells,
    are refused, and so is PostScript, a program that Pillow would hand to Ghostscript. Of several frames or pages the
    first one is taken.

    Returns:
        uint8, shape (3, resolution, resolution).

    Raises:
        BadImage: if the bytes are no complete image, there are too many pixels, or the crop does not suit the size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow tells of odd metadata, which are not used, at every image
            image = Image.open(io.BytesIO(encoded))
            _check_cost(image, encoded)
            ImageOps.exif_transpose(image, in_place=True)
            _check_cost(image, encoded)  # an icon is of the size that its content says
            image = _to_rgb(image)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"no image in its {len(encoded)} bytes") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others on damaged files
        raise BadImage(f"damaged image: {' '.join(str(error).split()) or type(error).__name__}") from error
    # Bicubic with antialiasing: the kernel widens with the reduction (Parmar et al. 2022, arXiv 2104.11222)
    box = crop_box(crop, image.width, image.height)
    resized = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized).transpose(2, 0, 1)  # (R, R, 3) -> (3, R, R)


def crop_box(crop: str, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom in pixels, possibly between pixels.

    `celeba_140` is the central 140 of the aligned 178 x 218 image, as in score_sde; `celeba_128` is 128 around
    (89, 121), as in DDIM; both scale with the width. `center` is the central square. `none` is the whole image, which
    resizing then makes square.

    Raises:
        BadImage: if a CelebA crop meets an image of other proportions.
    """
    if crop == "none":
        return 0, 0, width, height
    if crop == "center":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side
    if abs(width * _CELEBA_HEIGHT - height * _CELEBA_WIDTH) > _CELEBA_HEIGHT:  # more than a pixel's width off
        raise BadImage(f"{width} x {height} pixels are not in CelebA's 178 x 218 proportions, which {crop} needs")
    return tuple(edge * width / _CELEBA_WIDTH for edge in _CELEBA_BOXES[crop])


def _check_cost(image: Image.Image, encoded: bytes) -> None:
    """Raises BadImage for what would take too much memory or time, or run a program."""
    num_pixels = image.width * image.height
    if num_pixels > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS:,}")
    if image.format == "EPS":
        raise BadImage("it is PostScript, a program; convert it to PNG")
    if image.format in ("JPEG", "MPO"):
        scans = encoded.count(b"\xff\xda")  # the marker; within the data of a scan 255 is followed by 0
        if num_pixels * scans > MAX_PIXELS * MAX_SCANS:
            raise BadImage(f"its {scans} scans of {image.width} x {image.height} pixels take too long to decode")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers, of unknown range")
    if image.mode in ("P", "PA") and image.palette is None:
        raise BadImage("its pixels are numbers of colours, but there is no palette")
    if image.mode.startswith("I"):  # 16 bits, also where Pillow widens them to 32
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # round(values / 257), in less memory
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
