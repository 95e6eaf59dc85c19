"""Synthetic faces: the embedded data set, drawn procedurally from known factors.

A face is a pure function of `index` and `seed`: `Philox(key=(index, seed))` gives one uniform number per factor
(`face_factors`), and the factors determine the picture (`draw_faces`). All factors are independent; the tables below
list their ranges, classes and odds. Pixels use only operations that IEEE 754 rounds exactly (+ - * / sqrt, min, max),
all elementwise, so a face has the same pixels in any batch and on any machine.

Shapes are signed distance fields (Inigo Quilez, https://iquilezles.org/articles/distfunctions2d), negative inside, in
head units: origin between the eyes and the nose, x to the right, y down, crown near -1 and chin near +1.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

SYNTHETIC_FACES = "synthetic-faces"
VERSION = 1  # part of the pixel cache's key: increment it whenever a pixel of any face changes
SPLIT_SIZES = {"train": 10_000, "validation": 1_000}
SPLIT_STARTS = {"train": 0, "validation": 2**40}  # splits of up to 2**40 faces do not overlap

# Uniform on [low, high).
CONTINUOUS = {
    # pose
    "roll": (-0.14, 0.14),  # radians, clockwise
    "yaw": (-1.0, 1.0),  # -1 looks to the left of the picture, +1 to its right
    "scale": (0.62, 0.70),  # half the head's height as a fraction of half the picture's
    "shift_x": (-0.05, 0.05),  # of the head's centre, in half picture widths
    "shift_y": (0.02, 0.10),  # a little low, to leave room for hair
    # head
    "skin_tone": (0.0, 1.0),  # light to dark
    "face_width": (0.74, 0.86),  # head units, half the width
    "jaw_width": (0.72, 0.98),  # as a fraction of the face's width
    "chin_length": (0.54, 0.66),  # head units
    "blush": (0.0, 1.0),
    # hair
    "hair_shade": (0.8, 1.2),  # multiplies the hair's colour
    "fringe": (0.0, 1.0),  # high forehead to full fringe
    "parting": (-1.0, 1.0),  # side to which the fringe falls
    # eyes and brows
    "eye_size": (0.19, 0.24),  # head units, half the width
    "eye_openness": (0.6, 0.95),  # height / width
    "eye_spacing": (0.32, 0.38),  # head units, half the distance between the pupils
    "gaze": (-1.0, 1.0),
    "brow_height": (0.0, 1.0),
    "brow_tilt": (-1.0, 1.0),  # -1 worried, +1 stern
    "brow_thickness": (0.025, 0.055),  # head units, half the thickness
    # nose and mouth
    "nose_length": (0.30, 0.40),  # head units, y of the tip
    "nose_width": (0.10, 0.17),
    "mouth_width": (0.24, 0.36),
    "mouth_open": (0.0, 1.0),
    "smile": (-0.3, 1.0),  # corners down to corners up
    "lip_colour": (0.0, 1.0),  # natural to red
    # surroundings
    "clothes_colour": (0.0, 1.0),  # position on the cyclic palette
    "background_colour": (0.0, 1.0),  # position on the cyclic palette
    "light": (-1.0, 1.0),  # side from which the light comes
}
# {class: odds}
CATEGORICAL = {
    "hair_style": {"bald": 1, "cropped": 2, "short": 3, "bob": 2, "long": 3, "curly": 2, "bun": 2},
    "hair_colour": {"black": 3, "brown": 3, "chestnut": 2, "red": 1, "blond": 2, "grey": 1},
    "eye_colour": {"brown": 3, "hazel": 2, "green": 2, "blue": 2, "grey": 1},
    "facial_hair": {"none": 6, "stubble": 1, "moustache": 1, "beard": 2},
}
BINARY = {"glasses": 0.25}  # probability
FACTORS = (*CONTINUOUS, *CATEGORICAL, *BINARY)
NO_YES = ["no", "yes"]  # classes of a binary factor
LABEL_NAMES = {name: list(odds) for name, odds in CATEGORICAL.items()} | dict.fromkeys(BINARY, NO_YES)

# Colours in sRGB, 0 to 255.
SKIN = ((255, 222, 199), (245, 200, 166), (226, 172, 132), (196, 138, 98), (158, 106, 74), (122, 82, 60))
LIPS = ((212, 116, 106), (204, 56, 72))
CLOTHES = ((58, 84, 128), (62, 134, 134), (98, 140, 96), (226, 178, 88), (222, 116, 98), (132, 84, 130))
BACKGROUND = ((164, 206, 232), (176, 222, 204), (240, 226, 172), (250, 202, 170), (240, 180, 192), (200, 186, 230))
WHITE, DARK, MOUTH, FRAME = (252, 250, 248), (38, 28, 34), (112, 32, 42), (52, 48, 60)
HAIR = {
    "black": (44, 39, 46),
    "brown": (84, 56, 44),
    "chestnut": (134, 82, 50),
    "red": (184, 90, 48),
    "blond": (228, 186, 112),
    "grey": (178, 176, 182),
}
IRIS = {
    "brown": (92, 56, 36),
    "hazel": (142, 102, 48),
    "green": (82, 134, 84),
    "blue": (66, 122, 180),
    "grey": (118, 132, 146),
}
# How far the hair stands off the skull, how far it falls straight down, height of its cut (head units), 1 for a bun.
HAIR_STYLE = {
    "bald": (0.0, 0.0, -2.0, 0),
    "cropped": (0.05, 0.0, -0.05, 0),
    "short": (0.13, 0.0, 0.08, 0),
    "bob": (0.14, 1.0, 0.74, 0),
    "long": (0.12, 2.0, 1.6, 0),
    "curly": (0.32, 0.0, 0.58, 0),
    "bun": (0.08, 0.0, 0.05, 1),
}
FACIAL_HAIR = {"none": (0.0, 0.0), "stubble": (0.3, 0.3), "moustache": (0.0, 0.95), "beard": (0.95, 0.95)}  # opacities

PIXELS_PER_CHUNK = 2**16  # a float32 plane of 256 KiB stays in the cache


def split_indices(split: str, num_images: int | None = None) -> range:
    """The indices of the first `num_images` faces of a split, by default as many as in SPLIT_SIZES."""
    return range(SPLIT_STARTS[split], SPLIT_STARTS[split] + (num_images or SPLIT_SIZES[split]))


def face_factors(indices: Sequence[int], seed: int = 0) -> dict[str, np.ndarray]:
    """The factors of n faces, each an (n,) column: float32, int64 (class number) or bool, in the order of FACTORS."""
    bits = [np.random.Philox(key=np.array([index, seed], np.uint64)).random_raw(len(FACTORS)) for index in indices]
    uniforms = np.array(bits, np.uint64).reshape(-1, len(FACTORS)).T
    uniforms = dict(zip(FACTORS, (uniforms >> np.uint64(11)) * 2.0**-53, strict=True))  # 53 bits: [0, 1)
    factors = {
        name: (low + (high - low) * uniforms[name]).astype(np.float32) for name, (low, high) in CONTINUOUS.items()
    }
    for name, odds in CATEGORICAL.items():
        thresholds = np.cumsum(list(odds.values())) / sum(odds.values())
        factors[name] = np.searchsorted(thresholds, uniforms[name], side="right")
    return factors | {name: uniforms[name] < probability for name, probability in BINARY.items()}


def render_faces(indices: Sequence[int], resolution: int, seed: int = 0) -> np.ndarray:
    """The pictures of n faces: (n, resolution, resolution, 3) uint8, RGB."""
    return draw_faces(face_factors(indices, seed), resolution)


def draw_faces(factors: dict[str, np.ndarray], resolution: int) -> np.ndarray:
    """The pictures of n faces from all their FACTORS: (n, resolution, resolution, 3) uint8, RGB."""
    num_images = len(factors[FACTORS[0]])
    images = np.empty((num_images, resolution, resolution, 3), np.uint8)
    chunk = max(1, PIXELS_PER_CHUNK // resolution**2)
    for start in range(0, num_images, chunk):
        part = slice(start, start + chunk)
        images[part] = _draw_chunk({name: factors[name][part] for name in FACTORS}, resolution)
    return images


# Distances. A point is a pair (x, y) of (n, R, R) arrays; parameters are numbers or (n, 1, 1) arrays.


def ellipse(point, centre, radii, fall=0.0):
    """Distance to an ellipse whose lower half is moved down by `fall`, an arch or a pill (first-order estimate)."""
    x, y = point[0] - centre[0], point[1] - centre[1]
    y = y - np.clip(y, 0.0, fall)
    u, v = x / radii[0], y / radii[1]
    norm = np.sqrt(u * u + v * v)
    u, v = u / radii[0], v / radii[1]
    return norm * (norm - 1.0) / np.sqrt(u * u + v * v + 1e-6)


def segment(point, start, end, thickness):
    """Distance to a segment with round ends; `thickness` is half its width."""
    x, y = point[0] - start[0], point[1] - start[1]
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy), 0.0, 1.0)
    x, y = x - along * dx, y - along * dy
    return np.sqrt(x * x + y * y) - thickness


def crescent(point, centre, half_width, bend, thickness):
    """Distance to a band around a parabola, pointed at its ends; `bend` > 0 smiles (first-order estimate)."""
    u = (point[0] - centre[0]) / half_width
    parabola = 0.5 - u * u
    across = np.abs(point[1] - centre[1] - bend * parabola) - thickness * (0.5 + parabola)
    slope = 2.0 * u * (np.abs(bend) + thickness) / half_width
    return np.maximum(across / np.sqrt(1.0 + slope * slope), (np.abs(u) - 1.0) * half_width)


def smooth_union(a, b, radius):
    """Union of two shapes with the seam filled over `radius` (polynomial smooth minimum)."""
    overlap = np.maximum(radius - np.abs(a - b), 0.0)
    return np.minimum(a, b) - overlap * overlap / (4.0 * radius)


# Colours, each (3, n, 1, 1), or (3, n, R, R) after lighting.


def rgb(colour):
    return np.array(colour, np.float32).reshape(3, 1, 1, 1)


def palette(stops, position):
    """The colour at a position in [0, 1] on the line through the stops."""
    stops = np.array(stops, np.float32).T
    position = position * np.float32(stops.shape[1] - 1)
    left = np.minimum(position.astype(np.int64), stops.shape[1] - 2)
    return stops[:, left] + (position - left.astype(np.float32)) * (stops[:, left + 1] - stops[:, left])


def mix(a, b, amount):
    return a + np.clip(amount, 0.0, 1.0, dtype=np.float32) * (b - a)


def lit(colour, f, point):
    """The colour under a soft light that falls from one side."""
    return colour * (1.0 + 0.16 * f.light * point[0])


# Painting, from back to front. `f` holds the factors, colours, coordinates and outlines of a chunk of faces and their
# unfinished pictures: `pixels` (3, n, R, R) float32, sRGB 0 to 255; `pixel` is a pixel's width in head units.


def paint(f, distance, colour, opacity=1.0, softness=0.0):
    """Fills a shape with a colour; its edge is one pixel wide plus `softness` (head units)."""
    coverage = np.clip(0.5 - distance / (f.pixel + softness), 0.0, 1.0)
    coverage *= opacity * coverage * (3.0 - 2.0 * coverage)
    f.pixels += coverage * (colour - f.pixels)


def _draw_chunk(factors: dict[str, np.ndarray], resolution: int) -> np.ndarray:
    f = SimpleNamespace(**{name: column[:, None, None] for name, column in factors.items()})
    mix_colours(f)
    place(f, resolution)
    outline(f)
    f.pixels = np.zeros((3, len(f.scale), resolution, resolution), np.float32)
    f.pixel = 2.0 / (resolution * f.scale)
    for part in (background, hair_back, shoulders, ears, head, beard, nose, mouth, eyes, brows, glasses, hair_front):
        part(f)
    return np.clip(f.pixels + 0.5, 0.0, 255.0).astype(np.uint8).transpose(1, 2, 3, 0)


def look_up(table, f, factor):
    """The table's rows for the classes of a categorical factor, one (n, 1, 1) array per column."""
    return np.array([table[name] for name in CATEGORICAL[factor]], np.float32).T[:, getattr(f, factor)]


def mix_colours(f):
    f.skin = palette(SKIN, f.skin_tone)
    f.shade = f.skin * rgb((0.80, 0.70, 0.68))  # skin in shadow
    f.hair = look_up(HAIR, f, "hair_colour") * f.hair_shade
    f.iris = look_up(IRIS, f, "eye_colour")
    f.lips = mix(palette(LIPS, f.lip_colour), f.shade, 0.15)
    f.clothes = palette((*CLOTHES, CLOTHES[0]), f.clothes_colour)
    f.backdrop = palette((*BACKGROUND, BACKGROUND[0]), f.background_colour)


def place(f, resolution):
    """Coordinates: `frame` in half pictures; `body` (upright), `head` (rolled) and `face` (turned) in head units."""
    axis = (np.arange(resolution, dtype=np.float32) + 0.5) * np.float32(2.0 / resolution) - 1.0
    f.frame = axis[None, None, :], axis[None, :, None]
    f.body = x, y = (f.frame[0] - f.shift_x) / f.scale, (f.frame[1] - f.shift_y) / f.scale
    cos, sin = (turn(f.roll.astype(np.float64)).astype(np.float32) for turn in (np.cos, np.sin))
    f.head = x, y = cos * x + sin * y, cos * y - sin * x
    bulge = np.maximum(1.0 - np.square(x / f.face_width), 0.0)  # parallax: protruding parts move more
    f.face = x - 0.11 * f.yaw * bulge, y
    f.mirrored = np.abs(f.face[0]), y  # both eyes, brows, cheeks and lenses at once
    f.side = np.sign(f.face[0])


def outline(f):
    """Distances to the outlines of the head and of the hair, separately."""
    skull = ellipse(f.head, (0.0, -0.12), (f.face_width, 0.86))
    jaw = ellipse(f.head, (0.04 * f.yaw, 0.38), (f.face_width * f.jaw_width, f.chin_length))
    f.head_outline = smooth_union(skull, jaw, 0.2)
    volume, fall, cut, f.bun = look_up(HAIR_STYLE, f, "hair_style")
    hair = ellipse(f.head, (0.0, -0.14), (f.face_width + volume, 0.86 + volume), fall)
    f.hair_outline = -smooth_union(-hair, cut - f.head[1], 0.12)  # inside the hair and above its cut


def background(f):
    x, y = f.frame
    f.pixels += f.backdrop * (1.08 - 0.10 * (x * x + y * y) + 0.06 * f.light * x)


def hair_back(f):
    paint(f, f.hair_outline, f.hair * 0.72)
    paint(f, ellipse(f.head, (0.0, -1.12), (0.30, 0.26)), lit(f.hair * 0.95, f, f.head), f.bun)


def shoulders(f):
    paint(f, ellipse(f.body, (0.0, 1.88), (1.25, 0.70), 2.0), lit(f.clothes, f, f.body))
    neck = lit(mix(f.shade, f.skin, 3.0 * f.head_outline), f, f.body)  # the chin's shadow falls on it
    paint(f, segment(f.body, (0.0, 0.6), (0.0, 1.14), 0.32), neck)


def ears(f):
    point = np.abs(f.head[0] + 0.05 * f.yaw), f.head[1]
    paint(f, ellipse(point, (f.face_width + 0.02, 0.12), (0.12, 0.19)), lit(f.skin * 0.94, f, f.head))
    paint(f, ellipse(point, (f.face_width + 0.03, 0.12), (0.05, 0.10)), f.shade, 0.6)


def head(f):
    skin = mix(f.skin, f.shade, 0.4 + 2.0 * f.head_outline)  # darker towards the outline
    paint(f, f.head_outline, lit(skin, f, f.head))
    cheeks = np.maximum(ellipse(f.mirrored, (0.42, 0.38), (0.18, 0.14)), f.head_outline + 0.1)
    paint(f, cheeks, f.skin * rgb((1.0, 0.68, 0.66)), 0.65 * f.blush, softness=0.2)


def beard(f):
    on_jaw, on_lip = look_up(FACIAL_HAIR, f, "facial_hair")
    bare = np.minimum(ellipse(f.face, (0.0, 0.10), (f.face_width * 0.86, 0.56)), f.head[1] - 0.1)
    paint(f, np.maximum(f.head_outline, -bare), f.hair * 0.9, on_jaw, softness=0.04)
    paint(f, crescent(f.face, (0.0, 0.50), 0.32, -0.10, 0.07), f.hair * 0.9, on_lip)


def nose(f):
    point = f.face[0] - 0.05 * f.yaw, f.face[1]
    tip = f.nose_length
    bridge = segment(point, (-0.05 * f.light, 0.0), (-0.07 * f.light, tip - 0.06), 0.04)
    paint(f, bridge, f.shade, 0.35, softness=0.1)
    paint(f, ellipse(point, (0.0, tip - 0.05), (f.nose_width * 0.6, 0.06)), f.skin * 1.08, 0.6, softness=0.06)
    paint(f, crescent(point, (0.0, tip + 0.02), f.nose_width, 0.06, 0.035), f.shade * 0.85, 0.9)


def mouth(f):
    centre, bend = (0.0, 0.63), 0.20 * f.smile
    gap = 0.012 + 0.075 * f.mouth_open
    paint(f, crescent(f.face, centre, f.mouth_width, bend, gap + 0.05), f.lips)
    inside = crescent(f.face, centre, f.mouth_width * 0.88, bend, gap)
    paint(f, inside, rgb(MOUTH))
    teeth = crescent(f.face, (0.0, centre[1] - gap), f.mouth_width * 0.88, bend, gap)
    paint(f, np.maximum(inside, teeth), rgb(WHITE), np.minimum(2.5 * f.mouth_open, 1.0))


def eyes(f):
    x, y = f.mirrored
    centre = f.eye_spacing, 0.04
    white = ellipse((x, y), centre, (f.eye_size, f.eye_size * f.eye_openness))
    paint(f, white - 0.05, f.shade, 0.5, softness=0.08)
    paint(f, white, rgb(WHITE))
    x = x - 0.07 * f.gaze * f.side
    iris = ellipse((x, y), centre, (0.12, 0.12))
    paint(f, np.maximum(iris, white), f.iris)
    paint(f, np.maximum(iris + 0.06, white), rgb(DARK))
    paint(f, ellipse((x + 0.04 * f.side, y + 0.05), centre, (0.035, 0.035)), rgb(WHITE))
    paint(f, np.maximum(np.abs(white) - 0.025, y - 0.01), rgb(DARK))  # the upper lid


def brows(f):
    x, y = f.mirrored
    centre = f.eye_spacing + 0.02, -0.26 - 0.08 * f.brow_height
    tilted = x, y + 0.22 * f.brow_tilt * (x - centre[0])
    paint(f, crescent(tilted, centre, 0.24, -0.05, f.brow_thickness), mix(f.hair, f.shade, 0.2) * 0.85)


def glasses(f):
    worn = f.glasses.astype(np.float32)
    lens = ellipse(f.mirrored, (f.eye_spacing, 0.06), (0.28, 0.25))
    bridge = segment(f.mirrored, (0.0, 0.0), (0.1, 0.0), 0.022)
    temple = np.maximum(segment(f.mirrored, (0.6, 0.0), (1.0, -0.04), 0.022), f.head_outline)
    frame = np.minimum(np.abs(lens) - 0.022, np.maximum(np.minimum(bridge, temple), -lens))
    paint(f, lens, rgb(WHITE), 0.15 * worn)
    paint(f, frame, rgb(FRAME), worn)


def hair_front(f):
    x, y = f.head
    swept = x, y + 0.25 * f.parting * x
    opening = ellipse(swept, (0.0, 0.08), (f.face_width * 0.93, 0.74 - 0.36 * f.fringe), 4.0)
    hair = np.maximum(f.hair_outline, -opening)
    paint(f, np.maximum(hair - 0.06, f.head_outline + 0.04), f.shade, 0.5, softness=0.08)  # its shadow
    gloss = 1.04 - 0.24 * np.abs(y + 0.75)
    paint(f, hair, lit(f.hair * gloss, f, f.head))
