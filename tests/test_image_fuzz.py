"""Hundreds of damaged and unusual images from a fixed seed: each decodes or raises a one-line `BadImage`."""

import hashlib
import io
import resource
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageFile

from training.images import BadImage, decode_image

SEED, SIDE = 20, 24
LARGEST_BYTES = 2 << 30
WHOLE, BAD, EITHER = "the whole picture", "bad", "either"
DAMAGES = ("flipped", "header", "zeroed", "third missing")


class Case(NamedTuple):
    """An encoded image.

    Attributes:
        kind: the kind of image or damage.
        expected: BAD, EITHER, or WHOLE, the pixels that `original` decodes to.
    """

    kind: str
    name: str
    encoded: bytes
    expected: str = EITHER
    original: bytes | None = None


# ---- Intact images


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def picture(mode: str = "RGB", seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """Noise, so that no row resembles another row or the filler of a decoder."""
    generator = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 65536, size[::-1], dtype=np.uint16))
    if mode == "P":
        image = Image.fromarray(generator.integers(0, 16, size[::-1], dtype=np.uint8)).convert("P")
        image.putpalette(generator.integers(0, 256, 48, dtype=np.uint8).tobytes())
        return image
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    return Image.fromarray(generator.integers(0, 256, (*size[::-1], *channels), dtype=np.uint8), mode)


def frames(mode: str = "RGB") -> dict:
    return {"save_all": True, "append_images": [picture(mode, seed) for seed in (1, 2)]}


def intact_images() -> dict[str, bytes]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some releases of Pillow deprecate the `mode` of fromarray
        return {
            "png rgb": encode(picture(), "PNG"),
            "png l": encode(picture("L"), "PNG"),
            "png la": encode(picture("LA"), "PNG"),
            "png p": encode(picture("P"), "PNG"),
            "png p transparent": encode(picture("P"), "PNG", transparency=bytes(range(0, 256, 16))),
            "png rgba": encode(picture("RGBA"), "PNG"),
            "png 16": encode(picture("I;16"), "PNG"),
            "png animated": encode(picture(), "PNG", **frames()),
            "jpeg rgb": encode(picture(), "JPEG", quality=90),
            "jpeg l": encode(picture("L"), "JPEG"),
            "jpeg cmyk": encode(picture("CMYK"), "JPEG"),
            "jpeg progressive": encode(picture(), "JPEG", progressive=True),
            "jpeg two": encode(picture(), "MPO", **frames()),
            "webp lossy": encode(picture(), "WEBP"),
            "webp lossless": encode(picture("RGBA"), "WEBP", lossless=True),
            "webp animated": encode(picture(), "WEBP", **frames()),
            "gif": encode(picture("P"), "GIF"),
            "gif animated": encode(picture("P"), "GIF", **frames("P")),
            "bmp rgb": encode(picture(), "BMP"),
            "bmp p": encode(picture("P"), "BMP"),
            "tiff rgb": encode(picture(), "TIFF"),
            "tiff cmyk": encode(picture("CMYK"), "TIFF"),
            "tiff lzw": encode(picture(), "TIFF", compression="tiff_lzw"),
            "tiff deflate": encode(picture("RGBA"), "TIFF", compression="tiff_adobe_deflate"),
            "tiff jpeg": encode(picture(), "TIFF", compression="jpeg"),
            "tiff 16": encode(picture("I;16"), "TIFF"),
            "tiff pages": encode(picture(), "TIFF", **frames()),
            "jpeg 2000": encode(picture(), "JPEG2000"),
            "icon": encode(picture("RGBA"), "ICO", sizes=[(SIDE, SIDE)]),
            "ppm": encode(picture(), "PPM"),
        }


# ---- Damage


def random_damage(intact: dict[str, bytes]) -> Iterator[Case]:
    generator = np.random.default_rng(SEED)
    for name, encoded in intact.items():
        for length in generator.integers(1, len(encoded), 7):
            yield Case("truncated", f"{name} at {length}", encoded[:length], EITHER, encoded)
        for number in (1, 1, 2, 5, 20, 100):
            flipped = bytearray(encoded)
            for position in generator.integers(0, len(encoded), number):
                flipped[position] ^= 1 << int(generator.integers(8))
            yield Case("flipped", f"{name} {number} bits", bytes(flipped), EITHER, encoded)
        for _ in range(4):
            altered = bytearray(encoded)
            altered[int(generator.integers(8, min(80, len(encoded))))] = int(generator.choice([0, 1, 127, 128, 255]))
            yield Case("header", name, bytes(altered), EITHER, encoded)
        for length in (1, 5000):
            garbage = generator.integers(0, 256, length, dtype=np.uint8).tobytes()
            yield Case("trailing", f"{name} and {length} bytes", encoded + garbage, WHOLE, encoded)
        yield Case("concatenated", name, encoded + intact["png rgb"], WHOLE, encoded)
        first = int(generator.integers(0, len(encoded) - 8))
        hole = encoded[:first] + bytes(min(512, len(encoded) - first)) + encoded[first + 512 :]
        yield Case("zeroed", f"{name} from {first}", hole, EITHER, encoded)
        third = len(encoded) // 3
        yield Case("third missing", name, encoded[:third] + encoded[2 * third :], EITHER, encoded)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int, color: int, data: bytes, *chunks: bytes) -> bytes:
    """A PNG with an arbitrary header; `data` is the compressed rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(num_bytes: int) -> bytes:
    """A zlib stream that decompresses to `num_bytes` zero bytes."""
    compress, block = zlib.compressobj(1), bytes(1 << 20)
    parts = [compress.compress(block) for _ in range(num_bytes >> 20)]
    return b"".join([*parts, compress.compress(block[: num_bytes % (1 << 20)]), compress.flush()])


def wrong_header_sizes(_) -> Iterator[Case]:
    rows = zlib.compress(bytes((3 * SIDE + 1) * SIDE))
    for size in (0, 1, 23, 25, 5000, 65535, 2**31 - 1, 2**32 - 1):
        for width, height in ((size, SIDE), (SIDE, size), (size, size)):
            yield Case("size in the header", f"png {width} x {height}", png(width, height, 8, 2, rows))


def unusual_sizes(_) -> Iterator[Case]:
    for size in ((1, 1), (1, 5000), (5000, 1)):
        for file_format in ("PNG", "JPEG", "BMP", "TIFF"):
            encoded = encode(picture(size=size), file_format)
            yield Case("unusual size", f"{file_format} {size}", encoded, WHOLE, encoded)
    for side in (9459, 9460, 20_000):  # the first is just below the limit
        encoded = png(side, side, 1, 0, zeros((-(-side // 8) + 1) * side))
        yield Case("limit", f"png {side}", encoded, *((WHOLE, encoded) if side == 9459 else (BAD,)))
    for file_format in ("GIF", "BMP", "TIFF", "JPEG"):
        options = {"compression": "group4"} if file_format == "TIFF" else {}
        mode = "1" if file_format in ("BMP", "TIFF") else "L"
        yield Case("limit", file_format, encode(Image.new(mode, (11_000, 11_000)), file_format, **options), BAD)


def bombs(_) -> Iterator[Case]:
    bomb = zeros(300 << 20)
    rows = zlib.compress(bytes((3 * SIDE + 1) * SIDE))
    texts = {
        b"zTXt": b"Comment\0\0" + bomb,
        b"iCCP": b"profile\0\0" + bomb,
        b"iTXt": b"Comment\0\1\0\0\0" + bomb,
        b"eXIf": bytes(8 << 20),
    }
    for name, content in texts.items():
        yield Case("bomb", f"png {name.decode()}", png(SIDE, SIDE, 8, 2, rows, chunk(name, content)))
        many = chunk(name, content[:9] + zeros(1 << 20)) * 70
        yield Case("bomb", f"png 70 {name.decode()}", png(SIDE, SIDE, 8, 2, rows, many))
    yield Case("bomb", "png text", png(SIDE, SIDE, 8, 2, rows, chunk(b"tEXt", b"Comment\0" + b"x" * (80 << 20))))
    yield Case("bomb", "png rows", png(SIDE, SIDE, 8, 2, bomb))
    yield Case("bomb", "gif frames", encode(picture("P"), "GIF", save_all=True, append_images=[picture("P", 1)] * 500))


def unusual_contents(_) -> Iterator[Case]:
    text = b"this is no image\nbut text\n"
    for encoded in (b"", b"\0", text, text * 1000, bytes(5000), b"\xff" * 5000, b"<html><body>404</body></html>"):
        yield Case("not an image", f"{len(encoded)} bytes of {encoded[:8]!r}", encoded, BAD)
    for start in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP"):
        yield Case("not an image", f"the signature {start!r} alone", start, BAD)
        yield Case("not an image", f"the signature {start!r} and zeros", start + bytes(500), BAD)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n%%EndComments\nshowpage\n%%EOF\n"
    yield Case("not an image", "eps", eps, BAD)  # a program, which Pillow would pass to Ghostscript
    yield Case("not an image", "pdf", b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n", BAD)
    yield Case("not an image", "svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', BAD)

    # orientation as a short, as text, as five shorts stored elsewhere, as a double, as a value of unknown type
    for form, count, value in ((3, 1, 65535), (2, 3, 0x7075), (3, 5, 8), (12, 1, 8), (99, 1, 1)):
        for file_format in ("PNG", "JPEG", "WEBP"):
            exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 274, form, count, value, 0)
            encoded = encode(picture(), file_format, exif=exif)
            yield Case("exif", f"{file_format} orientation {value}, {count} of type {form}", encoded)
    exif = Image.Exif()
    exif[37510] = b"x" * 60_000
    yield Case("exif", "jpeg huge", encode(picture(), "JPEG", exif=exif), WHOLE, encode(picture(), "JPEG"))
    exif[37510] = b"x" * (20 << 20)
    yield Case("exif", "png huge", encode(picture(), "PNG", exif=exif), WHOLE, encode(picture(), "PNG"))


def all_cases() -> Iterator[Case]:
    intact = intact_images()
    yield from (Case("intact", name, encoded, WHOLE, encoded) for name, encoded in intact.items())
    for make in (random_damage, wrong_header_sizes, unusual_contents, unusual_sizes, bombs):
        yield from make(intact)


# ---- The outcomes


class Result(NamedTuple):
    case: Case
    outcome: str  # `picture`, `bad` or `error`
    detail: str  # the digest of the pixels, the message, the unexpected exception


def decoded(encoded: bytes) -> tuple[str, str]:
    try:
        pixels = decode_image(encoded, "none", (3, SIDE, SIDE))
    except BadImage as error:
        return "bad", str(error)
    except Exception as error:
        return "error", repr(error)
    assert (pixels.shape, pixels.dtype) == ((3, SIDE, SIDE), np.uint8)
    return "picture", hashlib.sha256(pixels.tobytes()).hexdigest()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def results() -> list[Result]:
    at_start_bytes = peak_bytes()
    results = [Result(case, *decoded(case.encoded)) for case in all_cases()]
    assert peak_bytes() - at_start_bytes < LARGEST_BYTES
    return results


@cache
def whole(original: bytes) -> str:
    return decoded(original)[1]


def is_bad_or_whole(result: Result) -> bool:
    return result.outcome == "bad" or result.detail == whole(result.case.original)


def test_every_kind_and_outcome_has_enough_cases(results):
    assert len(results) >= 600
    outcomes = Counter((result.case.kind, result.outcome) for result in results)
    for kind in ("flipped", "header"):
        assert min(outcomes[kind, "picture"], outcomes[kind, "bad"]) >= 3, kind
    assert outcomes["truncated", "bad"] >= 150


def test_every_image_decodes_or_raises_a_one_line_error(results):
    for case, outcome, detail in results:
        assert outcome in ("picture", "bad"), (case.name, detail)
        if outcome == "bad":
            assert 0 < len(detail) < 300, case.name
            assert "\n" not in detail
            assert "Error" not in detail, case.name  # says what is wrong with the image, not with the code


def test_damaged_images_decode_to_the_original_pixels_or_are_rejected(results):
    """All truncated images; other damage only in PNG, the format with checksums."""
    damaged = [
        result
        for result in results
        if result.case.kind == "truncated" or (result.case.kind in DAMAGES and result.case.name.startswith("png "))
    ]
    assert len(damaged) > 250
    for result in damaged:
        assert is_bad_or_whole(result), result.case.name


def test_intact_images_decode_completely_and_bad_ones_are_rejected(results):
    for result in results:
        if result.case.expected == WHOLE:
            assert result.outcome == "picture", result.case.name
            assert is_bad_or_whole(result), result.case.name
        if result.case.expected == BAD:
            assert result.outcome == "bad", result.case.name


def test_pillow_does_not_load_truncated_images():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # whatever other libraries were imported
