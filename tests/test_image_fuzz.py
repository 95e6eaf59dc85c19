"""Hundreds of damaged and unusual images from a fixed seed: each decodes or raises a one-line `BadImage`."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageFile
from test_images import encode

from training.images import BadImage, decode_image

SIDE = 24


def picture(mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise, so that no row resembles another row or the filler of a decoder."""
    generator = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 65536, (SIDE, SIDE), dtype=np.uint16))
    if mode == "P":
        image = Image.fromarray(generator.integers(0, 16, (SIDE, SIDE), dtype=np.uint8)).convert("P")
        image.putpalette(generator.integers(0, 256, 48, dtype=np.uint8).tobytes())
        return image
    image = Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8))
    return image.convert(mode)


def frames(mode: str = "RGB") -> dict:
    return {"save_all": True, "append_images": [picture(mode, seed) for seed in (1, 2)]}


INTACT = {
    "png rgb": encode(picture(), "PNG"),
    "png p transparent": encode(picture("P"), "PNG", transparency=bytes(range(0, 256, 16))),
    "png rgba": encode(picture("RGBA"), "PNG"),
    "png 16": encode(picture("I;16"), "PNG"),
    "png animated": encode(picture(), "PNG", **frames()),
    "jpeg rgb": encode(picture(), "JPEG", quality=90),
    "jpeg cmyk": encode(picture("CMYK"), "JPEG"),
    "jpeg progressive": encode(picture(), "JPEG", progressive=True),
    "jpeg two": encode(picture(), "MPO", **frames()),
    "webp lossy": encode(picture(), "WEBP"),
    "webp lossless": encode(picture("RGBA"), "WEBP", lossless=True),
    "webp animated": encode(picture(), "WEBP", **frames()),
    "gif": encode(picture("P"), "GIF"),
    "gif animated": encode(picture("P"), "GIF", **frames("P")),
    "bmp rgb": encode(picture(), "BMP"),
    "tiff rgb": encode(picture(), "TIFF"),
    "tiff lzw": encode(picture(), "TIFF", compression="tiff_lzw"),
    "tiff deflate": encode(picture("RGBA"), "TIFF", compression="tiff_adobe_deflate"),
    "tiff jpeg": encode(picture(), "TIFF", compression="jpeg"),
    "tiff 16": encode(picture("I;16"), "TIFF"),
    "tiff pages": encode(picture(), "TIFF", **frames()),
    "jpeg 2000": encode(picture(), "JPEG2000"),
    "icon": encode(picture("RGBA"), "ICO", sizes=[(SIDE, SIDE)]),
    "ppm": encode(picture(), "PPM"),
}


def decoded(encoded: bytes) -> np.ndarray | None:
    """The pixels, or None for a bad image."""
    try:
        return decode_image(encoded, "none", (3, SIDE, SIDE))
    except BadImage as error:
        message = str(error)
    assert 0 < len(message) < 300
    assert "\n" not in message
    assert "Error" not in message  # it says what is wrong with the image, not with the code
    return None


def random_damage(encoded: bytes) -> Iterator[tuple[str, bytes]]:
    """Kinds of damage and damaged images."""
    generator = np.random.default_rng(20)
    for length in generator.integers(1, len(encoded), 7):
        yield "truncated", encoded[:length]
    for number in (1, 1, 2, 5, 20, 100):
        flipped = bytearray(encoded)
        for position in generator.integers(0, len(encoded), number):
            flipped[position] ^= 1 << int(generator.integers(8))
        yield "flipped bits", bytes(flipped)
    for _ in range(4):
        altered = bytearray(encoded)
        altered[int(generator.integers(8, min(80, len(encoded))))] = int(generator.choice([0, 1, 127, 128, 255]))
        yield "altered header", bytes(altered)
    first = int(generator.integers(0, len(encoded) - 8))
    yield "zeroed", encoded[:first] + bytes(min(512, len(encoded) - first)) + encoded[first + 512 :]
    yield "third missing", encoded[: len(encoded) // 3] + encoded[2 * len(encoded) // 3 :]


@pytest.mark.parametrize("name", INTACT)
def test_damaged_images_are_rejected_or_decode_to_the_original_pixels(name):
    """All truncated images; other damage only in PNG, the format with checksums."""
    whole = decoded(INTACT[name])
    assert whole is not None
    for trailing in (b"?", bytes(5000), INTACT["png rgb"]):
        np.testing.assert_array_equal(decoded(INTACT[name] + trailing), whole)
    for kind, damaged in random_damage(INTACT[name]):
        pixels = decoded(damaged)
        if pixels is not None and (kind == "truncated" or name.startswith("png ")):
            np.testing.assert_array_equal(pixels, whole, err_msg=kind)


def test_images_above_pillows_pixel_limit_are_rejected():
    assert decoded(encode(Image.new("1", (9459, 9459)), "PNG")) is not None  # just below
    for side in (9460, 13_500):  # just above the limit, and above twice the limit
        assert decoded(encode(Image.new("1", (side, side)), "PNG")) is None
    for file_format in ("GIF", "BMP", "TIFF", "JPEG"):
        options = {"compression": "group4"} if file_format == "TIFF" else {}
        mode = "1" if file_format in ("BMP", "TIFF") else "L"
        assert decoded(encode(Image.new(mode, (11_000, 11_000)), file_format, **options)) is None


def test_other_contents_are_rejected():
    text = b"this is no image\nbut text\n"
    contents = [b"", b"\0", text, text * 1000, bytes(5000), b"\xff" * 5000, b"<html><body>404</body></html>"]
    for start in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP"):
        contents += [start, start + bytes(500)]
    # a program, which Pillow would pass to Ghostscript
    contents.append(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n%%EndComments\nshowpage\n%%EOF\n")
    contents.append(b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n")
    contents.append(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    for content in contents:
        assert decoded(content) is None, content[:20]


def test_pillow_does_not_load_truncated_images():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # whatever other libraries were imported
