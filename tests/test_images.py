"""Decoding: crops compared with pixel boxes, unusual modes, sizes and metadata."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from training.images import BadImage, crop_box, decode_image

# First and last row, first and last column
BOXES = {"celeba_140": (39, 179, 19, 159), "celeba_128": (57, 185, 25, 153)}


def encode(image: Image.Image | np.ndarray, file_format: str = "PNG", **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def coordinates(width: int, height: int) -> np.ndarray:
    """Each pixel's row (red channel) and column (green channel)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8)


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Crops


@pytest.mark.parametrize("crop", BOXES)
def test_celeba_crops_select_exactly_their_rows_and_columns(crop):
    first_row, last_row, first_column, last_column = BOXES[crop]
    side = last_row - first_row
    pixels = decode_image(encode(coordinates(178, 218)), crop, (3, side, side))  # no resizing: pixels are copied
    np.testing.assert_array_equal(pixels[0], np.broadcast_to(np.arange(first_row, last_row)[:, None], (side, side)))
    np.testing.assert_array_equal(pixels[1], np.broadcast_to(np.arange(first_column, last_column), (side, side)))
    half = tuple(edge / 2 for edge in (first_column, first_row, last_column, last_row))
    assert crop_box(crop, 89, 109) == half  # of an image of half the size; not rounded


@pytest.mark.parametrize("size", [(218, 178), (178, 220), (177, 220)])
def test_celeba_crops_reject_other_aspect_ratios(size):
    message = rf"^{size[0]} x {size[1]} pixels are not in CelebA's 178 x 218 .*celeba_140"
    with pytest.raises(BadImage, match=message):
        decode_image(encode(noise(*size)), "celeba_140", (3, 8, 8))


# Modes


def solid_image(mode: str, colour) -> Image.Image:
    return Image.new(mode, (4, 4), colour)


def palette_png(transparent: bool) -> bytes:
    image = solid_image("P", 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return encode(image, transparency=1) if transparent else encode(image)


@pytest.mark.parametrize(
    ("encoded", "colour"),
    [
        (encode(solid_image("RGB", (1, 2, 3))), (1, 2, 3)),
        (encode(solid_image("1", 1)), (255, 255, 255)),
        (encode(solid_image("L", 77)), (77, 77, 77)),
        (encode(solid_image("LA", (100, 51))), (224, 224, 224)),  # 255 - (255 - 100) 51 / 255
        (encode(solid_image("RGBA", (255, 0, 100, 51))), (255, 204, 224)),
        (encode(solid_image("RGBA", (9, 8, 7, 0))), (255, 255, 255)),
        (encode(solid_image("RGB", (9, 8, 7)), transparency=(9, 8, 7)), (255, 255, 255)),
        (palette_png(transparent=False), (10, 200, 30)),
        (palette_png(transparent=True), (255, 255, 255)),
        (encode(solid_image("CMYK", (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
        (encode(solid_image("CMYK", (0, 0, 0, 128)), "TIFF"), (127, 127, 127)),
        (encode(np.full((4, 4), 0, np.uint16)), (0, 0, 0)),
        (encode(np.full((4, 4), 257 * 100, np.uint16)), (100, 100, 100)),  # 65535 maps to 255
        (encode(np.full((4, 4), 65535, np.uint16)), (255, 255, 255)),
        (b"P5 2 2 65535\n" + bytes([0x64]) * 8, (100, 100, 100)),  # Pillow widens its 16 bits to 32
    ],
    ids="rgb 1 l la rgba transparent rgb_key p p_key cyan cmyk_black black_16 grey_16 white_16 pgm_16".split(),
)
def test_every_mode_is_converted_to_rgb(encoded, colour):
    pixels = decode_image(encoded, "center", (3, 2, 2))
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.array(colour)[:, None, None], (3, 2, 2)))


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (np.full((4, 4), 1.0, np.float32), {}),
        (np.full((4, 4), 255, np.int32), {}),
        (np.full((4, 4), 1000, np.uint16), {"tiffinfo": {339: 2}}),  # SampleFormat: signed
    ],
)
def test_pixels_of_unknown_range_are_rejected(pixels, options):
    with pytest.raises(BadImage, match="of unknown range"):
        decode_image(encode(pixels, "TIFF", **options), "none", (3, 4, 4))


@pytest.mark.parametrize("exif", [b"Exif\0\0\0\x08\0\x02\x01\x12\0\x03", b"Exif\0\0II*\0", b"b'Exif'"])
@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_broken_exif_is_ignored(file_format, options, exif):
    pixels = decode_image(encode(noise(6, 6), file_format, exif=exif, **options), "none", (3, 6, 6))
    np.testing.assert_array_equal(pixels, noise(6, 6).transpose(2, 0, 1))


def test_long_texts_are_accepted():
    text, exif = PngImagePlugin.PngInfo(), Image.Exif()
    text.add_text("workflow", "x" * (3 << 20), zip=True)  # as image generators write it; Pillow's limit is 1 MiB
    exif[274] = 3
    turned = encode(noise(6, 6)[::-1, ::-1], pnginfo=text, exif=exif)
    np.testing.assert_array_equal(decode_image(turned, "none", (3, 6, 6)), noise(6, 6).transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = noise(6, 6)
    # How a camera stores the upright picture for each orientation (EXIF 2.3, 4.6.4, tag 274)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    pixels = decode_image(encode(np.ascontiguousarray(stored), exif=exif), "none", (3, 6, 6))
    np.testing.assert_array_equal(pixels, upright.transpose(2, 0, 1))


# Sizes


def test_one_pixel_image_fills_the_output():
    for crop in ("center", "none"):
        pixels = decode_image(encode(solid_image("RGB", (5, 6, 7)).resize((1, 1))), crop, (3, 8, 8))
        assert pixels.reshape(3, -1).T.tolist() == [[5, 6, 7]] * 64


def test_very_long_images_are_center_cropped_or_squeezed():
    long = np.zeros((5000, 1, 3), np.uint8)
    long[2500:] = 200
    squeezed = decode_image(encode(long), "none", (3, 8, 8))
    assert squeezed[:, :3].max() == 0
    assert squeezed[:, 5:].min() == 200
    center = decode_image(encode(long), "center", (3, 8, 8))
    assert center.shape == (3, 8, 8)  # rows 2499.5 to 2500.5, from black to grey
    assert center[:, 0].max() < 20
    assert center[:, -1].min() > 180
