"""The image store and damage to it, the order of the batches, the pixel range and the loader."""

import errno
import hashlib
import itertools
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import Failed, InputError
from training import data, folders, workers
from training.data import open_image_store, random_flip, shuffled_batches, to_model_range, to_uint8
from training.workers import load_batches

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_IMAGES, SIDE = 150, 8  # decoded in three chunks
pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """uint8, shape (N, 8, 8, 3)."""
    return np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture
def faces(tmp_path, pictures) -> Path:
    """A folder of PNG files, in the order of their names."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:04}.png")
    return folder


def open_faces(folder: Path, **options) -> data.ImageStore:
    options = {"resolution": SIDE, "crop": "none", "cache_dir": str(folder.parent / "cache")} | options
    return open_image_store(train_data_dir=str(folder), **options)


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def forbid_decoding(monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(folders.FolderImages, "decode", refuse)


# The image store


def test_store_holds_the_pixels_in_order(faces, pictures):
    store = open_faces(faces)
    np.testing.assert_array_equal(store.images, pictures.transpose(0, 3, 1, 2))
    assert len(store) == NUM_IMAGES
    facts = {"source": "faces", "split": "train", "crop": "none", "resolution": SIDE, "num_images": NUM_IMAGES}
    assert store.description.items() >= (facts | {"num_skipped": 0, "fingerprint": store.fingerprint}).items()
    with pytest.raises(ValueError, match="read-only"):
        store.images[0] = 0
    assert error_of(open_faces, faces, crop="middle").startswith("unknown crop 'middle'; choose one of celeba_140")


def test_reopening_a_store_does_not_decode_again(faces, monkeypatch):
    first = open_faces(faces)
    forbid_decoding(monkeypatch)
    second = open_faces(faces)
    assert second.fingerprint == first.fingerprint
    few = open_faces(faces, max_images=3)
    assert few.fingerprint == hashlib.sha256(first.images[:3]).hexdigest()[:16] == few.description["fingerprint"]
    assert (len(few), few.description["num_images"], few.summary) == (3, 3, None)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(few)).images, first.images[:3])
    for other in ({"crop": "center"}, {"resolution": 4}, {"skip_bad_images": True}):
        with pytest.raises(AssertionError, match="decoded again"):  # these need other stores
            open_faces(faces, **other)


def test_missing_home_folder_raises_one_line_error(faces, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for users without a home folder
    assert error_of(open_faces, faces, cache_dir=None).endswith("~/.cache/train_unet; set XDG_CACHE_HOME")


def test_changed_file_creates_a_new_store(faces, pictures):
    before = open_faces(faces)
    Image.fromarray(255 - pictures[5]).save(faces / "0005.png")
    after = open_faces(faces)
    assert after.fingerprint != before.fingerprint
    np.testing.assert_array_equal(after.images[5], 255 - pictures[5].transpose(2, 0, 1))
    (faces / "0149.png").unlink()
    assert len(open_faces(faces)) == NUM_IMAGES - 1


@pytest.mark.parametrize("content", [None, b"no image\nat all", b""], ids=["truncated", "text", "empty"])
def test_bad_image_error_names_row_and_file(faces, content):
    path = faces / "0100.png"
    path.write_bytes(path.read_bytes()[:80] if content is None else content)
    message = error_of(open_faces, faces)
    assert "faces, row 100 (0100.png): " in message
    assert "--skip_bad_images" in message
    assert not list((faces.parent / "cache").glob("*"))  # neither a store nor a temporary folder


def test_skip_bad_images_skips_and_counts_them(faces, pictures, caplog):
    (faces / "0100.png").write_bytes(b"")
    (faces / "0003.png").write_text("text")
    store = open_faces(faces, skip_bad_images=True)
    assert store.description["num_skipped"] == 2
    assert len(store) == NUM_IMAGES - 2
    np.testing.assert_array_equal(store.images, np.delete(pictures, [3, 100], 0).transpose(0, 3, 1, 2))
    caplog.clear()
    open_faces(faces, skip_bad_images=True)  # opened again, from the store
    assert "left out 2 unreadable images, the first one: row 3 (0003.png)" in caplog.text
    for path in faces.iterdir():
        path.write_bytes(b"")
    assert "has no usable image; 150 are unreadable" in error_of(open_faces, faces, skip_bad_images=True)


STALL = f"""
import itertools, signal, sys, training.data, training.folders
decode = training.folders.FolderImages.decode
def stalling(self, *arguments):
    yield from itertools.islice(decode(self, *arguments), 100)
    print("halfway", flush=True)
    signal.pause()
training.folders.FolderImages.decode = stalling
training.data.open_image_store(train_data_dir=sys.argv[1], cache_dir=sys.argv[2], resolution={SIDE}, crop="none")
"""


def test_sigkill_during_a_build_leaves_no_store(faces, pictures, monkeypatch):
    cache = faces.parent / "cache"
    command = [sys.executable, "-c", STALL, str(faces), str(cache)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert any("halfway" in line for line in process.stdout)
    (leftover,) = cache.iterdir()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert (leftover / "images.uint8").exists()
    np.testing.assert_array_equal(open_faces(faces).images, pictures.transpose(0, 3, 1, 2))
    forbid_decoding(monkeypatch)
    open_faces(faces)


def test_stale_temporary_folders_are_removed(faces):
    cache = faces.parent / "cache"
    for name in ("fresh", "old", "alive"):
        (cache / f".tmp-{name}").mkdir(parents=True)
        (cache / f".tmp-{name}" / "images").write_bytes(b"?")
    for path in (".tmp-old/images", ".tmp-old", ".tmp-alive"):  # a folder's mtime is not that of its file
        long_ago = time.time() - data.STALE_SECONDS - 60
        os.utime(cache / path, (long_ago, long_ago))
    open_faces(faces)
    assert {path.name for path in cache.glob(".tmp-*")} == {".tmp-fresh", ".tmp-alive"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_error_or_ctrl_c_while_decoding_stops_the_workers(faces, monkeypatch, error):
    monkeypatch.setattr(workers, "available_cores", lambda: 2)
    seen = []

    class Failing(data.tqdm):
        def update(self, *_):
            seen.append(len(multiprocessing.active_children()))
            raise error

    monkeypatch.setattr(data, "tqdm", Failing)
    with pytest.raises((InputError, KeyboardInterrupt)):
        open_faces(faces)
    assert seen == [2]
    assert not multiprocessing.active_children()


def test_concurrent_builders_share_the_store_of_the_first(faces, pictures, monkeypatch):
    write = data._write

    def let_another_finish_first(*arguments) -> dict:
        monkeypatch.setattr(data, "_write", write)
        open_faces(faces)
        assert len(list((faces.parent / "cache").iterdir())) == 2  # the other builder's store and this temporary one
        return write(*arguments)

    monkeypatch.setattr(data, "_write", let_another_finish_first)
    np.testing.assert_array_equal(open_faces(faces).images, pictures.transpose(0, 3, 1, 2))
    assert len(list((faces.parent / "cache").iterdir())) == 1


def test_full_disk_raises_one_line_error_and_leaves_nothing(faces, tmp_path):
    options = {"max_images": 60, "resolution": 16}  # 46,080 bytes
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        message = error_of(open_faces, faces, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"cannot write the store {tmp_path}/cache/")
    assert "File too large; free some space" in message
    assert not list((tmp_path / "cache").iterdir())
    assert len(open_faces(faces, **options)) == 60


def test_default_cache_is_in_the_users_cache_folder_and_must_be_writable(faces, tmp_path):
    assert open_faces(faces, cache_dir=None).folder.parent == tmp_path / "XDG_CACHE_HOME" / "train_unet"
    (tmp_path / "file").write_text("in the way")
    message = error_of(open_faces, faces, cache_dir=str(tmp_path / "file" / "cache"))
    assert "Not a directory; free some space or set --cache_dir" in message


# Labels


def write_metadata(folder: Path, kinds: list[str]) -> None:
    lines = [f"{i:04}.png,{kinds[i % len(kinds)]}" for i in range(NUM_IMAGES)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,kind", *lines]))


@pytest.fixture
def labelled(faces) -> Path:
    write_metadata(faces, ["b", "c", "a", "c", "b"])
    return faces


def test_labels_change_the_key_and_the_fingerprint(labelled):
    without, first = open_faces(labelled), open_faces(labelled, label_column="kind")
    assert without.labels is None
    assert without.fingerprint == hashlib.sha256(first.images).hexdigest()[:16]
    write_metadata(labelled, ["b", "c", "a", "c", "a"])
    other_labels = open_faces(labelled, label_column="kind")
    write_metadata(labelled, ["y", "z", "x", "z", "y"])
    other_names = open_faces(labelled, label_column="kind")
    assert other_names.labels.tolist() == first.labels.tolist()
    assert len({store.fingerprint for store in (without, first, other_labels, other_names)}) == 4
    assert len(list((labelled.parent / "cache").iterdir())) == 4


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("images.uint8", lambda content: content[:80] + bytes(4) + content[84:]),  # a check of the size would miss it
        ("images.uint8", lambda content: content[:40]),
        (data.META, lambda content: content[:40]),
        (data.META, lambda content: b"[1, 2]"),
        (data.META, lambda content: content.replace(b'"labels": [1', b'"labels": [0')),
    ],
)
def test_damaged_store_is_rebuilt(labelled, caplog, name, damage):
    store = open_faces(labelled, label_column="kind")
    images, labels, path = np.array(store.images), store.labels.tolist(), store.folder / name
    path.write_bytes(damage(path.read_bytes()))
    store = open_faces(labelled, label_column="kind")
    assert f"{store.folder} is damaged: rebuilding it" in caplog.text
    np.testing.assert_array_equal(store.images, images)
    assert store.labels.tolist() == labels


def test_labels_are_mapped_to_the_classes_of_another_split(labelled):
    write_metadata(labelled, ["b", "d"])
    store = open_faces(labelled, label_column="kind")
    assert store.labels[:2].tolist() == [0, 1]
    assert store.labels_among(["a", "b", "c", "d"])[:2].tolist() == [1, 3]
    assert store.labels_among(["d", "b"])[:2].tolist() == [1, 0]
    message = error_of(store.labels_among, ["a", "b"])
    assert message == "split train has the class 'd' of 'kind', not one of a, b"


# Order of the batches


def batches(count: int, *arguments, **options) -> list[list[int]]:
    return list(itertools.islice(shuffled_batches(*arguments, **options), count))


def test_epochs_have_every_image_once_even_if_batches_straddle_them():
    indices = np.array(batches(25, 10, 4, 0)).reshape(10, 10)  # 10 epochs
    assert (np.sort(indices) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in indices}) == 10  # each in a different order
    assert (indices != np.arange(10)).any(1).all()
    assert batches(25, 10, 4, 0) != batches(25, 10, 4, 1)  # the order depends on the seed


@pytest.mark.parametrize("start", [1, 7, 23, 100])
@pytest.mark.parametrize("options", [{}, {"rank": 1, "world_size": 3}])
def test_start_batch_skips_the_first_batches(start, options):
    later = batches(60, 23, 5, 0, **options, start_batch=start)
    assert later == batches(start + 60, 23, 5, 0, **options)[start:]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_together_see_one_larger_batch(world_size):
    per_rank = [batches(30, 26, 5, 0, rank, world_size) for rank in range(world_size)]
    together = [[index for part in parts for index in part] for parts in zip(*per_rank, strict=True)]
    assert together == batches(30, 26, 5 * world_size, 0)


# Pixel range


def test_model_range_is_minus_one_to_one_and_round_trips():
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_model_range(values)
    assert floats.dtype == torch.float32
    assert (floats[0], floats[255]) == (-1, 1)
    torch.testing.assert_close(floats.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), rtol=0, atol=1e-7)
    assert torch.equal(to_uint8(floats), values)
    assert torch.equal(to_uint8(floats.half()), values)
    floats = (torch.tensor([-7.0, -0.6, 0.4, 0.6, 254.4, 254.6, 255.4, 300.0])) / 127.5 - 1
    assert to_uint8(floats).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]


def test_random_flip_mirrors_half_of_the_images():
    images = torch.arange(2 * 3 * 4).reshape(1, 2, 3, 4).repeat(2000, 1, 1, 1)
    torch.manual_seed(0)
    flipped = random_flip(images)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert 900 < mirrored.sum() < 1100  # 4.5 standard deviations
    torch.manual_seed(0)
    assert torch.equal(random_flip(images), flipped)
    assert not torch.equal(random_flip(images), flipped)


# Loader


@pytest.mark.parametrize("column", [None, "kind"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_yields_images_with_their_labels(labelled, pictures, num_workers, column):
    store = open_faces(labelled, label_column=column)
    order = batches(9, NUM_IMAGES, 40, 3)
    numbers = np.tile([1, 2, 0, 2, 1], NUM_IMAGES // 5)
    loaded = list(load_batches(store, num_workers, order))
    for indices, (images, labels) in zip(order, loaded, strict=True):
        np.testing.assert_array_equal(images, pictures[indices].transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(labels, None if column is None else numbers[indices])


def test_workers_use_no_shared_memory_and_receive_no_pixels(faces):
    """/dev/shm may be too small for a batch, and a spawned worker receives a pickle of the data set."""
    store = open_faces(faces)
    assert type(store[[3, 1]][0]) is np.ndarray
    assert len(pickle.dumps(store)) < 5000 < store.images.nbytes


def die(index: int) -> None:
    os.kill(os.getpid(), signal.SIGBUS)


def test_dead_worker_raises_one_line_error():
    with pytest.raises(Failed, match=r"^DataLoader worker .* exited unexpectedly, perhaps because memory ran out; .*"):
        list(load_batches([0, 1], 1, convert=die))


def test_only_the_loaders_workers_are_killed_at_exit(faces, monkeypatch):
    at_exit = []
    monkeypatch.setattr(workers, "Finalize", lambda _, kill, exitpriority: at_exit.append(kill))
    other = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
    other.start()
    before = {*multiprocessing.active_children()}
    loaded = load_batches(open_faces(faces), 2, shuffled_batches(NUM_IMAGES, 4, 0))
    next(loaded)
    children = {*multiprocessing.active_children()} - before
    for kill in at_exit:
        kill()
    for child in children:
        child.join()
    assert len(children) == 2
    assert {child.exitcode for child in children} == {-signal.SIGKILL}
    assert other.is_alive()
    other.kill()
