"""Image sources: folders, parquet, `save_to_disk`, the Hub (simulated by a loopback server) and synthetic faces."""

import hashlib
import io
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

from common import InputError
from training import sources, training_data
from training.config import TrainConfig
from training.data import ImageStore, open_image_store
from training.sources import Format, HuggingFaceImages
from training.synthetic_faces import LABEL_NAMES, draw_faces, face_factors, split_indices

REPOSITORY = Path(__file__).resolve().parent.parent
SIDE = 8


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch, caplog):
    """Isolates this process and its children from the user's caches."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def open_store(tmp_path):
    def open_store(folder: Path | str | None = None, **options) -> ImageStore:
        options = {"resolution": SIDE, "crop": "none", "cache_dir": str(tmp_path / "cache")} | options
        return open_image_store(train_data_dir=folder and str(folder), **options)

    return open_store


@pytest.fixture
def error_of(open_store):
    def error_of(*arguments, **options) -> str:
        with pytest.raises(InputError) as error:
            open_store(*arguments, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    return error_of


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def encoded(i: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(i)).save(file, kind)
    return file.getvalue()


def several_frames(*indices: int) -> bytes:
    file, (first, *others) = io.BytesIO(), [Image.fromarray(picture(i)) for i in indices]
    first.save(file, "TIFF", save_all=True, append_images=others)
    return file.getvalue()


def zipped(files: dict[str, int | bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, encoded(content) if isinstance(content, int) else content)
    return file.getvalue()


def write(folder: Path, files: dict[str, int | bytes | str] | list[str]) -> Path:
    """Writes files: a number i is picture i as PNG, "-> path" is a link; in a list, the i-th file is picture i."""
    files = {name: i for i, name in enumerate(files)} if isinstance(files, list) else files
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.symlink_to(content.removeprefix("-> "))
        else:
            path.write_bytes(encoded(content) if isinstance(content, int) else content)
    return folder


def rows(indices) -> datasets.Dataset:
    cells = [{"bytes": encoded(i), "path": None} for i in indices]
    columns = {"image": cells, "photo": cells[::-1], "age": list(indices)}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def assert_pictures(images: np.ndarray, indices) -> None:
    np.testing.assert_array_equal(images, np.stack([picture(i) for i in indices]).transpose(0, 3, 1, 2))


# Folders of images: the files, the numbers of the pictures taken (in order), the report of files left out

UNREADABLE = "not an image that Pillow can read"
OUTSIDE = "outside of the splits, the top-level folders train, validation and test"
LINKS, UNNAMED = "a link to an image that is taken already", "not named by the metadata"
COPIES = "in an archive, with a copy outside of it or in another one"
FOLDERS = {
    "nested": (
        {"a/0.png": 0, "a/1.png": 1, "b/deep/2.png": 2, "README.md": b"?"},
        [0, 1, 2],
        f"1 ({UNREADABLE}: .md)",
    ),
    "sorted by name": (["10.png", "9.PNG", "B/2.png", "a b/1.png", "a-b/1.png", "a.png", "a/1.png"],),
    "split words within names": (["1.png", "alice/test/1.png", "test.png", "train2017/1.png", "val-2.png"],),
    "names like patterns or URLs": (["2::3.png", "[1].png", "a*b.png", "hf:/x.png", "q?.png", "{x}.png"],),
    "hidden": ({"1.png": 1, ".2.png": 2, "__MACOSX/3.png": 3, "c/.cache/4.png": 4}, [1], "3 (hidden)"),
    "beside the splits": (
        {"Train/a_test.png": 0, "masks/1.png": 1, "test/b.jpg/1.png": 2, "3.png": 3},
        [0],
        f"2 ({OUTSIDE}), 1 (in another split)",
    ),
    "all folders are links": (
        {"../src/a/0.png": 0, "../src/b/1.png": 1, "a": "-> ../src/a", "b": "-> ../src/b"},
        [0, 1],
    ),
    "one folder is a link": ({"a/0.png": 0, "../src/b/1.png": 1, "b": "-> ../src/b"}, [0, 1]),
    "a link to a link to a folder": ({"../c/0.png": 0, "../b": "-> c", "a": "-> ../b", "1.png": 1}, [1, 0]),
    "one folder under two names": ({"b/0.png": 0, "a": "-> b"}, [0], f"1 ({LINKS})"),
    "one file under two names": ({"b/0.png": 0, "a.png": "-> b/0.png", "c.png": "-> a.png"}, [0], f"2 ({LINKS})"),
    "an outside file under two names": (
        {"../0.png": 0, "a.png": "-> ../0.png", "b.png": "-> a.png"},
        [0],
        f"1 ({LINKS})",
    ),
    "a link to the parent folder": ({"a/0.png": 0, "a/b": "-> .."}, [0], "1 (a link to a folder that it is in)"),
    "a broken link": ({"0.png": 0, "1.png": "-> nowhere.png"}, [0], "1 (a broken link or no regular file)"),
    "a split made of links": ({"all/0.png": 0, "train/1.png": "-> ../all/0.png"}, [0], f"1 ({OUTSIDE})"),
    "formats that `datasets` does not list": (
        {"0.png": 0, "1.qoi": encoded(1, "QOI"), "2.MPO": encoded(2), "3.pnm": encoded(3, "PPM")},
        [0, 1, 2, 3],
    ),
    "names without a known extension": (
        {"0": 0, "1.jpg_large": 1, "2.png?w=8": 2, "3.HEIC": 3, "a.jxl": b"x", "b.heic": b"x", "0.txt": b"a face"},
        [0, 1, 2, 3],
        f"3 ({UNREADABLE}: .heic, .jxl, .txt)",
    ),
    "no file extensions": ({"0": 0, "1": 1, "labels.csv": b"x,y\n0,1\n"}, [0, 1], f"1 ({UNREADABLE}: .csv)"),
    "an archive": (
        {"a.zip": zipped({"0.png": 0, "b/1.qoi": encoded(1, "QOI"), "__MACOSX/._0.png": b""})},
        [0, 1],
        "1 (hidden in an archive)",
    ),
    "an archive with ./ in its names": ({"a.zip": zipped({"./1.png": 0, "./b/0.png": 1})}, [0, 1]),
    "an archive beside an edited folder of its name": (
        {"a.zip": zipped({"0.png": 2, "1.png": 1}), "a/0.png": 0, "a/1.png": 1},
        [0, 1, 2],
        f"1 ({COPIES})",
    ),
    "splits below a shared folder": ({"x/train/0.png": 0, "x/test/1.png": 1}, [0], "1 (in another split)"),
    "splits in an archive": (
        {"a.zip": zipped({"b/train/0.png": 0, "b/val/1.png": 1})},
        [0],
        "1 (in another split)",
    ),
    "several frames": (
        {"0.tif": several_frames(0, 1), "1.tif": encoded(1, "TIFF")},
        [0, 1],
        "1 (files with several frames or pages, of which the first is used)",
    ),
    "a link to itself": ({"0.png": 0, "a": "-> a"}, [0], "1 (a broken link or no regular file)"),
    "two names that Unicode considers equal": ({"\u212b.png": 1, "\u00c5.png": 0}, [0, 1]),
    "an archive beside its contents": (
        {"a.zip": zipped({"x/0.png": 0, "x/1.png": 1}), "x/0.png": 0, "x/1.png": 1},
        [0, 1],
        f"2 ({COPIES})",
    ),
    "an archive beside part of its contents": (
        {"a.zip": zipped({"0.png": 0, "1.png": 1}), "else/where/0.png": 0, "1.png": 2},
        [2, 1, 0],
        f"1 ({COPIES})",
    ),
    "the same archive twice": (
        {"a (1).zip": zipped({"0.png": 0}), "a.zip": zipped({"0.png": 0})},
        [0],
        f"1 ({COPIES})",
    ),
    "archives that are splits": (
        {"train.zip": zipped({"0.png": 0}), "test.zip": zipped({"1.png": 1})},
        [0],
        "1 (in another split)",
    ),
    "metadata selects and sorts": (
        {"metadata.csv": b"file_name,age\nb.png,30\na.png,40\n", "a.png": 0, "b.png": 1, "c.png": 2},
        [1, 0],
        f"1 ({UNNAMED})",
    ),
    "metadata names an image twice": (
        {"metadata.jsonl": b'{"file_name": "b.png"}\n{"file_name": "./b.png"}\n{"file_name": "a.png"}\n', "a.png": 0}
        | {"b.png": 1},
        [1, 0],
        "1 (named by the metadata before)",
    ),
    "metadata without rows": (
        {"metadata.csv": b"file_name,age\n", "0.png": 0},
        [0],
        "1 (a metadata table without rows)",
    ),
    "metadata with commas at the ends of rows and a column image": (
        {"metadata.csv": b"file_name,image\nb.png,3,\na.png,4,\n", "a.png": 0, "b.png": 1},
        [1, 0],
    ),
    "metadata from a spreadsheet": (
        {"metadata.csv": "\ufefffile_name\nx\\7\nx\\e\u0301.png\n".encode(), "x/7": 0, "x/\u00e9.png": 1},
        [0, 1],
    ),
    "metadata names a link": (
        {"all/metadata.csv": b"file_name\n1.png\n", "all/1.png": "-> ../raw/0.png", "raw/0.png": 0, "raw/1.png": 1},
        [0],
        f"1 ({LINKS}), 1 ({UNNAMED})",
    ),
    "metadata in an archive": (
        {"a.zip": zipped({"metadata.csv": b"file_name\n1.png\n0.png\n", "0.png": 0, "1.png": 1})},
        [1, 0],
    ),
    "metadata above the splits": (
        {"metadata.csv": b"file_name\ntrain/1.png\ntest/2.png\ntrain/0.png\n"}
        | {"train/0.png": 0, "train/1.png": 1, "test/2.png": 2},
        [1, 0],
        "1 (in another split)",
    ),
    "an unrelated metadata table": (
        {"metadata.csv": b"id,age\n1,2\n", "0.png": 0},
        [0],
        "1 (a metadata table without a column file_name)",
    ),
    "names that are not UTF-8": ({os.fsdecode(b"\xe9/\xff.png"): 0, "1.png": 1}, [1, 0]),
    "output of a run": (
        {
            "0.png": 0,
            "out/config.yaml": b"",
            "out/log.jsonl": b"",
            "out/samples/1.png": 1,
            "model/model_index.json": b"",
        }
        | {"model/samples.png": 2, "drawn/generate.json": b"", "drawn/00000.png": 3, "cache/x/meta.json": b""}
        | {"cache/x/images.uint8": b""},
        [0],
        "4 (a folder that a run, an evaluation or a cache has written)",
    ),
    "a README with bad front matter": ({"README.md": b"---\na: [\n---\n", "0.png": 0}, [0], f"1 ({UNREADABLE}: .md)"),
    "a script": ({"faces.py": b"raise SystemExit('it was run')\n", "0.png": 0}, [0], f"1 ({UNREADABLE}: .py)"),
    "more images than tables": (
        {"0.png": 0, "1.png": 1, "old.parquet": b"PAR1"},
        [0, 1],
        f"1 ({UNREADABLE}: .parquet)",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_images_are_taken_from_folders_and_reported(tmp_path, open_store, caplog, name):
    files, *expected = FOLDERS[name]
    taken, left_out = [*expected, *[None, ""][len(expected) :]]
    store = open_store(write(tmp_path / "faces", files))
    assert_pictures(store.images, range(len(files)) if taken is None else taken)
    report = f", taken for split train: {len(store)}{left_out and '; left out: '}{left_out}"
    assert store.summary.endswith(report)
    caplog.clear()
    open_store(tmp_path / "faces")  # again: from the store
    assert store.summary in caplog.text


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_top_level_folders_are_splits(tmp_path, open_store, error_of, name):
    folder = write(tmp_path / "faces", ["train/0.png", "train/1.png", f"{name}/2.png"])
    for alias in ("validation", "valid"):
        assert_pictures(open_store(folder, split=alias).images, [2])
    assert error_of(folder, split="test").endswith("has no split 'test'; it has train, validation")


def test_relative_home_and_module_like_folder_names_work(tmp_path, open_store, monkeypatch):
    write(tmp_path / "imagefolder", ["0.png", "1.png"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("imagefolder", "~/imagefolder"):  # shells do not expand a ~ in a file
        store = open_store(name, cache_dir="~/cache")
        assert_pictures(store.images, [0, 1])
        assert store.description["source"] == "imagefolder"
        assert store.folder.parent == tmp_path / "cache"
    monkeypatch.chdir("imagefolder")
    assert open_store(".", cache_dir="~/cache").folder == store.folder


def test_unreadable_folders_raise_one_line_errors(tmp_path, error_of):
    assert "faces: a.zip is no intact zip archive: " in error_of(
        write(tmp_path / "faces", {"a.zip": b"PK", "0.png": 0})
    )
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    assert error_of(write(folder, ["0.png"])) == f"the name of the folder {tmp_path}/\\xff is not UTF-8; rename it"
    faces = write(tmp_path / "others", {"metadata.csv": b"\xff,\n", "0.png": 0})
    assert "others: metadata.csv is damaged: " in error_of(faces)


def test_folders_that_link_to_each_other_are_listed_in_bounded_time(tmp_path, open_store):
    folder = write(tmp_path / "faces", {f"{i}/{i}.png": i for i in range(7)})
    for i, j in itertools.permutations(range(7), 2):
        (folder / f"{i}" / f"to {j}").symlink_to(f"../{j}")
    store = open_store(folder)
    assert_pictures(store.images, range(7))
    assert "(one of too many links to a folder)" in store.summary


def test_integer_labels_stay_integers_beside_tables_without_them(tmp_path, open_store, error_of):
    files = {"train/0.png": 0, "train/1.png": 1, "val/2.png": 2, "val/metadata.csv": b"file_name\n2.png\n"}
    folder = write(tmp_path / "faces", files | {"train/metadata.csv": b"file_name,age\n0.png,7\n1.png,3\n"})
    store = open_store(folder, label_column="age")
    assert (store.description["label_names"], store.labels.tolist()) == (["3", "7"], [1, 0])
    gap = write(tmp_path / "gap", {"0.png": 0, "1.png": 1, "metadata.csv": b"file_name,age\n0.png,7\n1.png,\n"})
    assert "row 1" in error_of(gap, label_column="age")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.zip", b"PK", "File is not a zip file"),
        ("a.tar", b"?", "truncated header"),
        ("a.parquet", b"PAR1", "Parquet"),
        ("a.jsonl", b"{", "JSON"),
    ],
)
def test_damaged_tables_raise_one_line_errors_with_the_reason(tmp_path, error_of, name, content, reason):
    error = error_of(write(tmp_path / "data", {name: content}))
    assert reason in error
    assert "generating the dataset" not in error


# Parquet and save_to_disk


def write_parquet(folder: Path) -> None:
    folder.mkdir()
    rows([0, 1, 2]).to_parquet(folder / "train-00000-of-00002.parquet")
    rows([3, 4]).to_parquet(folder / "train-00001-of-00002.parquet")
    rows([5]).to_parquet(folder / "validation-00000-of-00001.parquet")


def write_dataset_dict(folder: Path) -> None:
    datasets.DatasetDict({"train": rows(range(5)), "valid": rows([5])}).save_to_disk(folder)


@pytest.mark.parametrize("write", [write_parquet, write_dataset_dict])
def test_parquet_and_saved_dataset_dicts_have_splits(tmp_path, open_store, error_of, write):
    folder = tmp_path / "data"
    write(folder)
    assert_pictures(open_store(folder).images, range(5))
    assert_pictures(open_store(folder, split="valid").images, [5])
    assert_pictures(open_store(folder, split="validation").images, [5])
    assert_pictures(
        open_store(folder, image_column="photo", max_images=2).images,
        [4, 3] if write is write_dataset_dict else [2, 1],
    )
    assert "has no split 'test'; it has train, valid" in error_of(folder, split="test")
    assert error_of(folder, image_column="img").endswith("has no column 'img'; it has image, photo, age")
    assert error_of(folder, image_column="age") == f"the column 'age' of {folder} holds Value('int64'), not images"


def test_saved_data_set_is_the_train_split(tmp_path, open_store, error_of):
    rows([2, 0, 1]).save_to_disk(tmp_path / "data")
    assert_pictures(open_store(tmp_path / "data").images, [2, 0, 1])
    assert error_of(tmp_path / "data", split="validation").endswith("has no split 'validation'; it has train")


def test_error_names_the_row_without_an_image(tmp_path, open_store, error_of):
    features = datasets.Features({"image": datasets.Image()})
    cells = [{"bytes": encoded(0), "path": "faces/zero.png"}, None]
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(tmp_path / "data")
    assert "data, row 1: no image; " in error_of(tmp_path / "data")
    assert_pictures(open_store(tmp_path / "data", skip_bad_images=True).images, [0])


def test_files_beside_tables_are_reported(tmp_path, open_store):
    write_parquet(tmp_path / "data")
    write(tmp_path / "data", {"preview.png": 9, "README.md": b"?"})
    rows([6]).to_parquet(tmp_path / "data" / "more.parquet")  # `datasets` assigns it to no split
    store = open_store(tmp_path / "data")
    assert_pictures(store.images, range(5))
    assert store.summary == "data: files found: 6, read: 3; left out: 2 (not taken by `datasets`: .parquet, .png)"


def test_data_files_listed_in_the_readme_are_respected(tmp_path, open_store):
    data_files = "[{split: train, path: y/*}, {split: test, path: x/*}]"
    head = f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n---\n".encode()
    folder = write(tmp_path / "faces", {"x/1.png": 0, "y/2.png": 1, "README.md": head})
    assert_pictures(open_store(folder).images, [1])
    assert_pictures(open_store(folder, split="test").images, [0])


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
@pytest.mark.parametrize("streaming", [False, True])
def test_binary_columns_may_hold_images(tmp_path, kind, streaming):
    features = datasets.Features({"image": datasets.Value(kind)})
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_dict({"image": [encoded(0), encoded(1)]}, features=features)
    table.to_parquet(tmp_path / "data" / "train.parquet")
    source = HuggingFaceImages(str(tmp_path / "data"), None, None, "train", "image", None, streaming)
    assert_pictures(np.stack([image for image, _ in source.decode(Format("none", (3, SIDE, SIDE)))]), [0, 1])


# Label columns


LABELS = {  # values, feature, class numbers and names
    "classes": (
        [1, 0, 2, 0],
        datasets.ClassLabel(names=["red", "blue", "grey"]),
        [1, 0, 2, 0],
        ["red", "blue", "grey"],
    ),
    "bool": ([True, False, False, True], datasets.Value("bool"), [1, 0, 0, 1], ["no", "yes"]),
    "strings": (["b", "ä", "a", "b"], datasets.Value("string"), [1, 2, 0, 1], ["a", "b", "ä"]),
    "large strings": (["b", "c", "a", "b"], datasets.Value("large_string"), [1, 2, 0, 1], ["a", "b", "c"]),
    "integers": ([10, -1, 9, 10], datasets.Value("int8"), [2, 0, 1, 2], ["-1", "9", "10"]),
}


def labelled(values, feature) -> datasets.Dataset:
    cells = [{"bytes": encoded(i), "path": None} for i in range(len(values))]
    features = datasets.Features({"image": datasets.Image(), "kind": feature, "age": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": cells, "kind": values, "age": range(len(values))}, features=features)


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_stored_with_their_names(tmp_path, open_store, name):
    values, feature, numbers, names = LABELS[name]
    labelled(values, feature).save_to_disk(tmp_path / "data")
    store = open_store(tmp_path / "data", label_column="kind")
    assert store.labels.tolist() == numbers
    assert store.labels.dtype == np.int64
    assert store.description["label_names"] == names
    assert store.description["label_column"] == "kind"
    assert_pictures(store.images, range(4))


@pytest.mark.parametrize("name", LABELS)
def test_streaming_gives_the_same_images_and_labels(tmp_path, name):
    values, feature, *_ = LABELS[name]
    (tmp_path / "data").mkdir()
    labelled(values, feature).to_parquet(tmp_path / "data" / "train.parquet")
    for max_images in (None, 3):
        arguments = (str(tmp_path / "data"), None, None, "train", "image", max_images)
        streamed, read = (HuggingFaceImages(*arguments, streaming, label_column="kind") for streaming in (True, False))
        for source in (streamed, read):
            images, labels = zip(*source.decode(Format("none", (3, SIDE, SIDE))), strict=True)
            assert_pictures(np.stack(images), range(max_images or 4))
            assert list(labels) == values[:max_images]
        assert streamed.label_names == read.label_names


def test_class_folders_become_labels(tmp_path, open_store, error_of):
    names = ["train/dogs/0.png", "train/cats/1.png", "train/cats/2.png", "valid/cats/3.png", "valid/dogs/4.png"]
    folder = write(tmp_path / "faces", names)
    for split, images, labels in (("train", [1, 2, 0], [0, 0, 1]), ("valid", [3, 4], [0, 1])):
        store = open_store(folder, split=split, label_column="label")
        assert_pictures(store.images, images)
        assert store.labels.tolist() == labels
        assert store.description["label_names"] == ["cats", "dogs"]
    write(folder, {"train/dogs/small/5.png": 5})
    message = error_of(folder, label_column="label")
    assert "lie in folders of different depths, such as train/dogs/0.png and train/dogs/small/5.png, so " in message
    assert "has no column 'label' of labels; it has image" in error_of(
        write(tmp_path / "b", ["0.png"]), label_column="label"
    )


@pytest.mark.parametrize(
    ("table", "column", "labels", "names"),
    [
        (b"file_name,hair\na.png,dark\nb.png,NA\nc.png,dark\n", "hair", [1, 0, 1], ["NA", "dark"]),
        (b"file_name,n\na.png,10\nb.png,9\nc.png,10\n", "n", [1, 0, 1], ["9", "10"]),
        (b"file_name,smiles\na.png,true\nb.png,false\nc.png,true\n", "smiles", [1, 0, 1], ["no", "yes"]),
        (b"photo_file_name,label\nx,y\na.png,2\nc.png,1\n", "label", [0, 1, 0], None),
    ],
)
def test_metadata_columns_become_labels(tmp_path, open_store, error_of, table, column, labels, names):
    folder = write(tmp_path / "faces", {"a.png": 0, "b.png": 1, "c.png": 2, "metadata.csv": table})
    if names is None:
        message = error_of(folder, label_column=column, image_column="photo")
        assert "row 0 (x): the metadata name it, but it is not among the images of the folder" in message
        return
    store = open_store(folder, label_column=column)
    assert store.labels.tolist() == labels
    assert store.description["label_names"] == names
    assert "did you mean " + column in error_of(folder, label_column=column + "s")


def test_labels_of_skipped_images_are_skipped(tmp_path, open_store):
    table = labelled(["a", "only here", "b", "a"], datasets.Value("string"))
    cells = [cell if i != 1 else {"bytes": b"text", "path": None} for i, cell in enumerate(table.to_dict()["image"])]
    columns = table.remove_columns("image").to_dict() | {"image": cells}
    datasets.Dataset.from_dict(columns, features=table.features).save_to_disk(tmp_path / "data")
    store = open_store(tmp_path / "data", label_column="kind", skip_bad_images=True)
    assert_pictures(store.images, [0, 2, 3])
    assert store.labels.tolist() == [0, 1, 0]
    assert store.description["label_names"] == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        (["a", None, "b"], datasets.Value("string"), "has no label in row 1; fill it in or leave out --label_column"),
        ([True, False, None], datasets.Value("bool"), "has no label in row 2; "),
        ([0, 1, -1], datasets.ClassLabel(names=["a", "b"]), "has no label in row 2; "),
        ([1.5, 2, 3], datasets.Value("float32"), "holds Value('float32'); labels are a ClassLabel, bool, strings or "),
        ([[1], [2]], datasets.List(datasets.Value("int64")), "holds List(Value('int64')); labels are a ClassLabel"),
        (["x"] * 3, datasets.Value("string"), "has the single class 'x' in split train (3 images); name another"),
        ([1] * 3, datasets.ClassLabel(names=["a", "b"]), "has the single class 'b' in split train (3 images)"),
        ([False] * 2, datasets.Value("bool"), "has the single class 'no' in split train (2 images)"),
        ([*range(1001)], datasets.Value("int64"), "has more than 1,000 different values; name a column of classes"),
    ],
)
def test_unusable_labels_are_rejected(tmp_path, error_of, values, feature, message):
    labelled(values, feature).save_to_disk(tmp_path / "data")
    assert error_of(tmp_path / "data", label_column="kind").startswith(
        f"the column 'kind' of {tmp_path}/data {message}"
    )
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("name", ["strings", "classes"])
def test_heldout_images_may_have_a_single_class(tmp_path, open_store, name):
    values, feature, *_ = LABELS[name]
    table = labelled(values, feature)
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "data")
    store = open_store(tmp_path / "data", split="validation", max_images=1, label_column="kind")
    assert store.labels_among(["blue", "b"]).tolist() == [values[0] == "b"]


def test_class_numbers_without_a_name_are_rejected(tmp_path, error_of):
    table = labelled([0, 1, 7], datasets.Value("int64"))
    features = table.features | {"kind": datasets.ClassLabel(names=["a", "b"])}
    table = datasets.Dataset(table.data, info=datasets.DatasetInfo(features=datasets.Features(features)))
    table.save_to_disk(tmp_path / "data")
    message = error_of(tmp_path / "data", label_column="kind")
    assert message.endswith("has the class 7 in row 2, but there are 2 classes")


def test_missing_label_columns_are_rejected(tmp_path, error_of):
    labelled([True, False], datasets.Value("bool")).save_to_disk(tmp_path / "data")
    message = error_of(tmp_path / "data", label_column="kinds")
    assert message.endswith("has no column 'kinds' of labels; did you mean kind? it has image, kind, age")
    message = error_of(tmp_path / "data", label_column="zzz")
    assert message.endswith("has no column 'zzz' of labels; it has image, kind, age")
    assert "holds Image(" in error_of(tmp_path / "data", label_column="image")


# Synthetic faces


@pytest.mark.parametrize("column", [None, "hair_style", "glasses"])
def test_synthetic_faces_have_class_labels(open_store, column):
    options = {"dataset_name": "synthetic-faces", "max_images": 70, "label_column": column}
    for split in ("train", "validation"):
        store, indices = open_store(**options, split=split), split_indices(split, 70)
        np.testing.assert_array_equal(store.images, draw_faces(face_factors(indices), SIDE).transpose(0, 3, 1, 2))
        if column is not None:
            np.testing.assert_array_equal(store.labels, face_factors(indices)[column])
            assert store.description["label_names"] == LABEL_NAMES[column]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"label_column": "smile"},
            "smile of synthetic-faces is a number; choose one of hair_style, hair_colour, eye_colour, facial_hair, "
            "glasses",
        ),
        (
            {"label_column": "hair_color"},
            "synthetic-faces has no column 'hair_color' of labels; did you mean hair_colour?"
            " it has hair_style, hair_colour, eye_colour, facial_hair, glasses",
        ),
        ({"resolution": 7}, "synthetic-faces are drawn at a resolution of 8 or more, not 7"),
        ({"split": "test"}, "synthetic-faces has no split 'test'; it has train, validation"),
        ({"crop": "celeba_140"}, "crop celeba_140 is for CelebA's photographs; choose none for synthetic-faces"),
    ],
)
def test_synthetic_faces_reject_unsupported_options(error_of, options, message):
    assert error_of(dataset_name="synthetic-faces", **options) == message


# Paths that lead out of the data set


@pytest.fixture
def secret(tmp_path) -> Path:
    """A picture outside the data set."""
    write(tmp_path / "private", {"secret.png": 7})
    return tmp_path / "private" / "secret.png"


@pytest.mark.parametrize("way", ["../private/secret.png", "absolute", "file://"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_paths_out_of_the_folder_are_rejected(tmp_path, open_store, error_of, secret, name, way):
    target = {"absolute": str(secret), "file://": f"file://{secret}"}.get(way, way)
    lines = [json.dumps({"file_name": file}) for file in (target, "0.png")]
    lines = ["file_name", target, "0.png"] if name.endswith("csv") else lines
    folder = write(tmp_path / "faces", {"0.png": 0, name: "\n".join(lines).encode()})
    assert "secret.png): the metadata name it, but it is not among the images of the folder; fix it" in error_of(
        folder
    )
    assert_pictures(open_store(folder, skip_bad_images=True).images, [0])


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_table_paths_out_of_the_data_set_are_not_read(tmp_path, open_store, error_of, secret, kind):
    folder, inside = tmp_path / "data", {"bytes": encoded(0), "path": "../private/secret.png"}
    archive = tmp_path / "data" / "inner.zip"
    ways = [secret, f"file://{secret}", f"{folder}/../private/secret.png", f"file://{secret}::{archive}"]
    ways += [f"simplecache::file://{secret}", "../private/secret.png", "https://127.0.0.1:9/secret.png"]
    cells = [inside, *({"bytes": None, "path": str(way)} for way in ways)]
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    table = datasets.Dataset.from_dict({"image": cells}, features=features)
    if kind == "saved":
        table.save_to_disk(folder)
    else:
        folder.mkdir()
        table.to_parquet(folder / "train.parquet")
    message = error_of(folder)
    assert "row 1 (secret.png): its path '" in message
    assert "leads out of the data set and is not read" in message
    store = open_store(folder, skip_bad_images=True)
    assert_pictures(store.images, [0])  # a row that holds the bytes does not need its path
    assert store.description["num_skipped"] == len(ways)


def test_archives_with_outside_paths_write_nothing_outside(tmp_path, open_store):
    archive = zipped({"a/0.png": 0, "../../../escaped.png": 1, "/escaped.png": 2})
    folder = write(tmp_path / "faces", {"faces.zip": archive})
    before = {*tmp_path.rglob("*")}
    assert len(open_store(folder)) >= 1
    assert {path.relative_to(tmp_path).parts[0] for path in {*tmp_path.rglob("*")} - before} <= {"cache", "hf"}
    assert not [*tmp_path.rglob("escaped.png"), *tmp_path.parent.glob("escaped.png"), *Path("/").glob("escaped.png")]


def test_interrupted_streams_raise_input_errors(tmp_path, monkeypatch):
    def broken():
        yield {"image": {"bytes": encoded(0), "path": None}}
        raise ConnectionError("the server\nis gone")

    source = HuggingFaceImages("someone/faces", None, None, "train", "image", None, streaming=True)
    monkeypatch.setattr(source, "_open", broken)
    with pytest.raises(InputError, match=r"^the stream of someone/faces broke off after 1 rows: the server is gone$"):
        list(source.decode(Format("none", (3, SIDE, SIDE))))


# Missing and damaged data


def test_errors_for_missing_and_empty_folders_say_what_exists(tmp_path, error_of):
    for name in "abcdefg":
        (tmp_path / "parent" / name / "empty").mkdir(parents=True)
    parent = tmp_path / "parent"
    listing = f"there is {parent}, which holds a, b, c, d, e and 2 more"
    assert error_of(parent / "faces") == f"there is no folder {parent}/faces; {listing}"
    assert error_of(parent / "x" / "faces") == f"there is no folder {parent}/x/faces; {listing}"
    assert error_of(parent / "a") == f"the folder {parent}/a has no files"
    assert (
        error_of(write(parent / "a", {".0.png": 0})) == f"the folder {parent}/a has no files; passed over: 1 (hidden)"
    )


@pytest.mark.parametrize("fault", ["text", "parquet", "arrow", "state", "missing"])
def test_damaged_data_sets_raise_one_line_errors(tmp_path, error_of, fault):
    folder = tmp_path / "data"
    if fault in ("text", "parquet"):
        write(folder, {"model.xyz": b"?"} if fault == "text" else {"train.parquet": b"PAR1 and nothing else"})
    else:
        rows([0, 1]).save_to_disk(folder)
        (arrow,) = folder.glob("*.arrow")
        if fault == "arrow":
            arrow.write_bytes(arrow.read_bytes()[:100])
        elif fault == "state":
            (folder / "state.json").write_text("{")
        else:
            arrow.unlink()
    assert error_of(folder).startswith(f"no readable data set in {folder}, which holds ")


def test_contradictory_arguments_are_rejected(tmp_path, error_of):
    exactly_one = "give either dataset_name or train_data_dir, exactly one of them"
    assert error_of() == exactly_one
    assert error_of(tmp_path, dataset_name="synthetic-faces") == exactly_one
    assert error_of(dataset_name=str(tmp_path)) == f"{tmp_path} is a local folder; give it as --train_data_dir"
    assert error_of(dataset_name="a/b/c") == "'a/b/c' is neither synthetic-faces nor a data set's id on the Hub"
    write(tmp_path / "faces", ["0.png"])
    assert error_of(tmp_path / "faces", dataset_config_name="x").endswith("'x' not found. Available: ['default']")


def test_output_dir_equal_to_the_image_folder_is_rejected(tmp_path):
    config = TrainConfig(train_data_dir=str(tmp_path), output_dir=f"{tmp_path}/x/..", max_train_steps=1)
    with pytest.raises(InputError, match="is the folder of the images, among which the samples would be"):
        training_data.TrainingData(config, SimpleNamespace(num_processes=1))


# The Hub

COMMIT, LATER_COMMIT = "0123456789abcdef0123456789abcdef01234567", "89abcdef" * 5


class LoopbackHub(BaseHTTPRequestHandler):
    """Serves data sets like the Hub: `someone/faces` is public, the files of `someone/gated` are gated."""

    repositories: dict[str, dict[str, dict[str, bytes]]]  # name -> commit (main first) -> path -> content
    lost: str | None  # a file that is listed but cannot be downloaded

    def do_GET(self):
        path = self.path.split("?")[0]
        for name, commits in self.repositories.items():
            api, resolve = f"/api/datasets/{name}", f"/datasets/{name}/resolve/"
            if path == api or path.startswith((api + "/revision/", api + "/tree/")):
                commit = self.commit(name, path.removeprefix(api)[1:].split("/")[1] if path != api else "main")
                if commit is None:
                    return self.answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
                entries = [self.entry(file, content) for file, content in commits[commit].items()]
                if "/tree/" in path:
                    return self.answer(200, entries)
                siblings = [{"rfilename": entry["path"]} for entry in entries]
                return self.answer(200, {"id": name, "sha": commit, "siblings": siblings})
            if path.startswith(resolve) and name == "someone/gated":
                return self.answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            if path.startswith(resolve):
                revision, file = path.removeprefix(resolve).split("/", 1)
                commit = self.commit(name, revision)
                content = commits[commit].get(file)
                if content is not None and file != self.lost:
                    etag = hashlib.sha1(content).hexdigest()
                    return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
                return self.answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        if path == "/api/datasets/someone/private":
            return self.answer(401, {"error": "who are you?"}, {"X-Error-Code": "RepoNotFound"})
        if path == "/api/datasets/someone/locked":
            return self.answer(403, {"error": "accept"}, {"X-Error-Code": "GatedRepo"})
        return self.answer(404, {"error": "nothing here"})

    do_HEAD = do_GET

    def do_POST(self):  # /api/datasets/SOMEONE/NAME/paths-info/REVISION
        _, _, _, owner, name, _, revision = self.path.split("/")
        files = self.repositories[f"{owner}/{name}"][self.commit(f"{owner}/{name}", revision)]
        paths = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self.answer(200, [self.entry(path, files[path]) for path in paths if path in files])

    def commit(self, name: str, revision: str) -> str | None:
        commits = list(self.repositories[name])
        return commits[0] if revision == "main" else revision if revision in commits else None

    def entry(self, path: str, content: bytes) -> dict:
        return {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}

    def answer(self, status: int, content: bytes | dict | list, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        first = 0
        if status == 200 and isinstance(content, bytes) and (span := self.headers.get("Range")):
            first, _, last = span.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(body)), len(body) - 1)
            headers = (headers or {}) | {"Content-Range": f"bytes {first}-{last}/{len(body)}"}
            status, body = 206, body[first : last + 1]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def parquet(indices) -> bytes:
    file = io.BytesIO()
    rows(indices).to_parquet(file)
    return file.getvalue()


@pytest.fixture
def hub():
    """The URL of a loopback Hub that runs until the test ends."""
    files = {"train-00000-of-00001.parquet": parquet([0, 1, 2]), "README.md": b"# Faces\n"}
    LoopbackHub.repositories = {name: {COMMIT: files} for name in ("someone/faces", "someone/gated")}
    LoopbackHub.lost = None
    server = ThreadingHTTPServer(("127.0.0.1", 0), LoopbackHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CASES = """
import json, sys
from common import InputError
from training.data import open_image_store
for case in json.loads(sys.argv[1]):
    try:
        store = open_image_store(crop="none", **case)
        answer = [store.fingerprint, store.description["revision"], len(store)]
    except InputError as error:
        answer = str(error)
    print("ANSWER", json.dumps(answer), flush=True)
"""


def ask(cases: list[dict], endpoint: str, **environment) -> list:
    """Opens stores one after another in a process whose Hub is at `endpoint`."""
    result = subprocess.run(
        [sys.executable, "-c", CASES, json.dumps(cases)],
        cwd=REPOSITORY,
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("ANSWER ")]
    answers = [json.loads(line.removeprefix("ANSWER ")) for line in lines]
    assert not any("\n" in answer for answer in answers)
    return answers


NOWHERE = "http://127.0.0.1:9"  # the discard port: refuses connections


def test_hub_data_sets_open_online_and_offline(tmp_path, hub, open_store):
    write_parquet(tmp_path / "local")
    fingerprint = open_store(tmp_path / "local", max_images=3).fingerprint
    faces = {"dataset_name": "someone/faces", "resolution": SIDE, "cache_dir": str(tmp_path / "stores")}
    streamed = faces | {"cache_dir": str(tmp_path / "streamed"), "streaming": True}
    cases = [
        streamed,
        faces,
        faces | {"dataset_revision": COMMIT},
        faces | {"dataset_revision": "v9"},
        faces | {"split": "validation"},
        faces | {"dataset_name": "someone/gated"},
        faces | {"dataset_name": "someone/locked"},
        faces | {"dataset_name": "someone/private"},
    ]
    answers = ask(cases, hub)
    assert answers[:3] == [[fingerprint, COMMIT, 3]] * 3
    log_in = "is gated: accept its terms on the Hub and log in with `hf auth login`"
    assert answers[3:] == [
        "someone/faces has no revision 'v9' on the Hub",
        "someone/faces has no split 'validation'; it has train",
        f"someone/gated {log_in}",
        f"someone/locked {log_in}",
        "there is no data set someone/private on the Hub, or it is private: `hf auth login`",
    ]
    assert len([path for path in (tmp_path / "stores").iterdir() if path.is_dir()]) == 1  # main is that commit

    # Offline: the store, then another resolution from the cache of `datasets`, then data that was never fetched
    never = {"dataset_name": "someone/other", "cache_dir": str(tmp_path / "stores")}
    cases = [faces, streamed, faces | {"resolution": 4}, never, never | {"streaming": True}]
    for endpoint, environment in ((NOWHERE, {}), (hub, {"HF_HUB_OFFLINE": "1"})):
        answers = ask(cases, endpoint, **environment)
        assert answers[:2] == [[fingerprint, COMMIT, 3]] * 2
        assert answers[2][1:] == [COMMIT, 3]
        for answer in answers[3:]:
            assert answer.startswith("cannot get someone/other from the Hub and it is not cached: ")
            assert answer.endswith("or give --train_data_dir, or --dataset_name synthetic-faces, which needs none")


def test_offline_stores_hold_the_requested_revision(tmp_path, hub, open_store):
    fingerprints = []
    for name, indices in (("first", [0, 1, 2]), ("later", [3, 4])):
        rows(indices).save_to_disk(tmp_path / name)
        fingerprints.append(open_store(tmp_path / name).fingerprint)
    later_files = {"train-00000-of-00001.parquet": parquet([3, 4]), "README.md": b"# Other faces\n"}
    LoopbackHub.repositories["someone/faces"][LATER_COMMIT] = later_files
    configs = "[{config_name: a, data_files: a.parquet, default: true}, {config_name: b, data_files: b.parquet}]"
    readme = f"---\nconfigs: {configs}\n---\n".encode()
    files = {"a.parquet": parquet([0]), "b.parquet": parquet([1]), "README.md": readme}
    LoopbackHub.repositories["someone/two"] = {COMMIT: files}

    faces = {"dataset_name": "someone/faces", "resolution": SIDE, "cache_dir": str(tmp_path / "stores")}
    later = faces | {"dataset_revision": LATER_COMMIT}
    two = faces | {"dataset_name": "someone/two"}
    two_b = two | {"dataset_config_name": "b"}
    answers = ask([faces, later, two_b], hub)  # by its time, `datasets` takes the later one for the newest
    assert answers[:2] == [[fingerprints[0], COMMIT, 3], [fingerprints[1], LATER_COMMIT, 2]]

    small = {"resolution": 4}  # not in any store yet
    unknown = faces | {"cache_dir": str(tmp_path / "unknown")}  # no record of which commit main is
    cases = [faces, later, two_b]
    cases += [later | small, two_b | small]
    cases += [faces | small, faces | small | {"dataset_revision": COMMIT}, faces | small | {"dataset_revision": "v9"}]
    cases += [unknown, unknown | {"streaming": True}, two | small]
    offline = ask(cases, NOWHERE)
    assert offline[:3] == answers
    assert [answer[1:] for answer in offline[3:5]] == [[LATER_COMMIT, 2], [COMMIT, 1]]
    there = f"what is cached of someone/faces is commit {LATER_COMMIT}"
    remedy = f"connect to the Hub or give --dataset_revision {LATER_COMMIT}"
    asked_for = (COMMIT, COMMIT, "v9", "main", "main")
    assert offline[5:10] == [f"{there}, not {revision}; {remedy}" for revision in asked_for]
    assert offline[10] == (
        "what is cached of someone/two is its configuration 'b', perhaps not the one it has by default;"
        " connect to the Hub or give --dataset_config_name b"
    )


def test_hub_image_files_are_read_with_and_without_streaming(tmp_path, hub, open_store):
    folder = write(tmp_path / "local", ["1.png", "2.png", "3.png"])
    fingerprint = open_store(folder).fingerprint
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())} | {"4.avif": encoded(4, "AVIF")}
    broken = {f"_{name}": content for name, content in files.items()}
    LoopbackHub.repositories = {"someone/faces": {COMMIT: files}, "someone/broken": {COMMIT: broken}}
    LoopbackHub.lost = "_2.png"  # not a bad image that may be skipped
    faces = {"dataset_name": "someone/faces", "resolution": SIDE, "cache_dir": str(tmp_path / "stores")}
    streamed = faces | {"cache_dir": str(tmp_path / "streamed"), "streaming": True}
    answers = ask([streamed, faces, streamed | {"dataset_name": "someone/broken", "skip_bad_images": True}], hub)
    assert answers[:2] == [[fingerprint, COMMIT, 3]] * 2
    (store,) = (tmp_path / "stores").glob("*/meta.json")
    summary = "faces: files found: 4, read: 3; left out: 1 (not taken by `datasets`: .avif)"
    assert json.loads(store.read_text())["summary"] == summary
    assert answers[2].startswith("the stream of someone/broken broke off after 1 rows: ")


def test_hub_is_contacted_again_after_a_connection_error(tmp_path, monkeypatch, open_store):
    """A timeout affects a single request and does not put the rest of the process offline."""
    answers = iter([ConnectionError("down"), ConnectionError("down")])
    offline_while_loading = []

    def no_answer(*_, **__):
        raise next(answers)

    def load(self):
        offline_while_loading.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("nothing cached")

    monkeypatch.setattr(sources.HfApi, "dataset_info", no_answer)
    monkeypatch.setattr(HuggingFaceImages, "_load", load)
    for _ in range(2):
        with pytest.raises(InputError, match="it is not cached"):
            open_store(dataset_name="someone/faces")
        assert not datasets.config.HF_HUB_OFFLINE
    assert offline_while_loading == [True, True]


def test_only_the_main_process_resolves_the_commit(monkeypatch, tmp_path):
    """Otherwise, a moving branch could give the processes different images."""
    folder = open_image_store(
        dataset_name="synthetic-faces", max_images=20, resolution=8, cache_dir=str(tmp_path)
    ).folder
    calls = []
    monkeypatch.setattr(training_data, "open_image_store", lambda **_: calls.append(1))
    monkeypatch.setattr(training_data, "on_main_process", lambda state, action: (folder, 18))
    config = TrainConfig(dataset_name="someone/faces", max_train_steps=1)
    data = training_data.TrainingData(config, SimpleNamespace(num_processes=1))
    assert len(data.store) == 18
    assert not calls
