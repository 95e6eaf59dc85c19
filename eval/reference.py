"""Features on the disk, each with what they are of; and how many images a comparison needs.

A file is an npz: the arrays, and under `key` what they were computed from. Nothing is taken from a file whose key is
another than the one asked for.
"""

import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common import InputError

FEWEST_IMAGES = 2048  # below the 2,048 dimensions of Inception's features their covariance is singular


class DamagedFileError(InputError):
    """A file of features that cannot be read."""


@dataclass(frozen=True)
class FeatureKey:
    """What features are of.

    Attributes:
        fingerprint: of the images, by `ImageSet`.
        split, crop: of the data set; None for generated images.
        resolution: as "64x64".
        count: how many images.
        extractor, mode, sha256: which network, how images are resized for it, the hash of its weights.
    """

    fingerprint: str
    split: str | None
    crop: str | None
    resolution: str
    count: int
    extractor: str
    mode: str
    sha256: str


def check_counts(num_generated: int, num_reference: int, allow_few: bool = False, flag: str = "--num_images") -> None:
    """The rule for every figure that moves with n (FID, FD, CMMD, precision and the like): equal and not few.

    FID falls by about 1/n, in the generated set as in the reference, and CMMD likewise. So the reference is a subset
    of as many images as were generated (`images_of_store(store, count)`), or as many are generated as it has.

    Args:
        allow_few: take less than 2,048 images, for a figure that is compared with nothing outside.

    Raises:
        InputError: if the counts differ, or are below 2 or below 2,048.
    """
    if num_generated != num_reference:
        raise InputError(
            f"{num_generated} generated and {num_reference} reference images cannot be compared, as the figure depends"
            f" on both counts; take {min(num_generated, num_reference)} of both ({flag})"
        )
    if num_generated < 2:
        raise InputError(f"there is {num_generated} image of each; a distance of distributions needs 2 or more")
    if num_generated < FEWEST_IMAGES and not allow_few:
        raise InputError(
            f"{num_generated} images are too few for a figure that others can compare with; take {FEWEST_IMAGES} or"
            f" more ({flag}), or say --allow_few"
        )


def write_arrays(path: Path, key: FeatureKey, **arrays: np.ndarray) -> None:
    """Writes an npz that appears under its name only when it is complete. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", suffix=".npz", delete=False) as file:
        try:
            np.savez(file, key=np.array(json.dumps(asdict(key))), **arrays)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read_arrays(
    path: Path, asked: Mapping[str, object], names: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], FeatureKey]:
    """The named arrays of a file, and its key.

    Raises:
        DamagedFileError: if it cannot be read; zip checks the sum of every array.
        InputError: if there is no such file, or its key differs from `asked`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            key = FeatureKey(**json.loads(str(file["key"])))
            arrays = {name: file[name] for name in names}
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}; make it first, or give another path") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFileError(
            f"{path} is damaged or not of this kind ({' '.join(str(error).split())}); it must be made anew"
        ) from error
    there = asdict(key)
    differing = [
        f"{name} is {there[name]} there and {asked[name]} here" for name in asked if there[name] != asked[name]
    ]
    if differing:
        raise InputError(f"{path} is of something else: {'; '.join(differing)}; make it anew or give another path")
    return arrays, key
