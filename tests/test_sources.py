"""Image sources: folders, parquet, `save_to_disk`, the Hub (a loopback server) and synthetic faces."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

from common import InputError
from training import training_data
from training.config import TrainConfig
from training.data import ImageStore, open_image_store
from training.synthetic_faces import LABEL_NAMES, draw_faces, face_factors, split_indices

REPOSITORY = Path(__file__).resolve().parent.parent
SIDE = 8
pytestmark = pytest.mark.usefixtures("own_caches")


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


def table(indices, **columns) -> datasets.Dataset:
    """A data set of pictures, with more columns, each as (values, feature)."""
    features = {"image": datasets.Image()} | {name: feature for name, (_, feature) in columns.items()}
    values = {"image": [{"bytes": encoded(i), "path": None} for i in indices]}
    values |= {name: values for name, (values, _) in columns.items()}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def parquet(folder: Path, **splits: datasets.Dataset) -> Path:
    folder.mkdir()
    for split, rows in splits.items():
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def assert_pictures(images: np.ndarray, indices) -> None:
    np.testing.assert_array_equal(images, np.stack([picture(i) for i in indices]).transpose(0, 3, 1, 2))


# Folders of images: the files, the numbers of the pictures taken (in order), the report of files left out

UNREADABLE = "not an image format of Pillow, by extension"
OUTSIDE = "outside the splits, the top-level folders train, validation and test"
NAMES = b'{"file_name": "1.png"}\n{"file_name": "0.png"}'
LINKS, UNNAMED = "a link to an image that is already used", "not named by the metadata"
FOLDERS = {
    "sorted by name": (
        ["B/2.png", "[1].png", "a b/1.png", "a-b/1.png", "a.PNG", "a/1.png", "hf:/x.png", "x*?::3.png"],
    ),
    "names that are not UTF-8": ({os.fsdecode(b"\xe9/\xff.png"): 0, "1.png": 1}, [1, 0]),
    "hidden": (
        {"1.png": 1, ".2.png": 2, "__MACOSX/3.png": 3, "c/.cache/4.png": 4, "__5.png": 5},
        [1, 5],
        "3 (hidden)",
    ),
    "links": (
        {"a/0.png": 0, "../c/1.png": 1, "b": "-> a", "c": "-> ../c", "d.png": "-> a/0.png"}
        | {"e": "-> nowhere", "f": "-> f", "a/g": "-> .."},
        [0, 1],
        f"2 (a broken link), 2 (a link to a folder that contains it), 2 ({LINKS})",
    ),
    "formats that `datasets` does not list": (
        {"0.qoi": encoded(0, "QOI"), "1.MPO": encoded(1), "2.pnm": encoded(2, "PPM")},
        [0, 1, 2],
    ),
    "other files": ({"0.jpg": 0, "1": 1, "b.heic": b"x"}, [0], f"2 ({UNREADABLE}: .heic, without extension)"),
    "an archive": (
        {"a.zip": zipped({"./0.png": 0, "b/1.qoi": encoded(1, "QOI"), "__MACOSX/._0.png": b""})},
        [0, 1],
        "1 (hidden)",
    ),
    "archives beside their edited contents": (
        {"a.zip": zipped({"0.png": 5, "1.png": 6, "2.png": 2}), "a/0.png": 0, "1.png": 1},
        [1, 0, 2],
        "2 (in an archive that is unpacked beside it)",
    ),
    "splits": (
        {"Train/a_test.png": 0, "masks/1.png": 1, "test/b.jpg/1.png": 2, "3.png": 3},
        [0],
        f"2 ({OUTSIDE}), 1 (in another split)",
    ),
    "no splits": (["1.png", "alice/test/1.png", "test.png", "train2017/1.png", "val-2.png"],),
    "splits below a shared folder": ({"x/train/0.png": 0, "x/test/1.png": 1}, [0], "1 (in another split)"),
    "archives that are splits": (
        {"train.zip": zipped({"0.png": 0}), "test.zip": zipped({"1.png": 1})},
        [0],
        "1 (in another split)",
    ),
    "a split made of links": ({"all/0.png": 0, "train/1.png": "-> ../all/0.png"}, [0], f"1 ({OUTSIDE})"),
    "metadata from a spreadsheet select and sort": (
        {"metadata.csv": "\ufefffile_name,image\nx\\7.png,3,\n./a.png,4,\nx/7.png,3\n".encode()}
        | {"x/7.png": 0, "a.png": 1, "b.png": 2},
        [0, 1],
        f"1 ({UNNAMED})",
    ),
    "metadata in an archive": (
        {"a.zip": zipped({"metadata.jsonl": NAMES, "0.png": 0, "1.png": 1})},
        [1, 0],
    ),
    "metadata above the splits": (
        {"metadata.csv": b"file_name\ntrain/1.png\ntest/2.png\ntrain/0.png\n"}
        | {"train/0.png": 0, "train/1.png": 1, "test/2.png": 2},
        [1, 0],
        "1 (in another split)",
    ),
    "metadata that name no files": (
        {"metadata.csv": b"id,age\n1,2\n", "a/metadata.csv": b"file_name\n", "0.png": 0},
        [0],
    ),
    "output of a run": (
        {"0.png": 0, "out/log.jsonl": b"", "out/samples/1.png": 1, "model/model_index.json": b"", "model/2.png": 2}
        | {"drawn/generate.json": b"", "drawn/00000.png": 3, "cache/x/images.uint8": b""},
        [0],
        "4 (a folder that a run, an evaluation or a cache has written)",
    ),
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
    report = f", used for split train: {len(store)}{left_out and '; left out: '}{left_out}"
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


# Parquet and save_to_disk


def saved(folder: Path, **splits: datasets.Dataset) -> None:
    datasets.DatasetDict(splits).save_to_disk(folder)


@pytest.mark.parametrize("write", [parquet, saved])
def test_parquet_and_saved_dataset_dicts_have_splits(tmp_path, open_store, error_of, write):
    folder, ages = tmp_path / "data", datasets.Value("int64")
    photos = [{"bytes": encoded(i), "path": None} for i in (7, 8, 9)]
    rows = table([0, 1, 2], photo=(photos, datasets.Image()), age=([1, 2, 3], ages))
    write(folder, train=rows, valid=rows.select([2]))
    assert_pictures(open_store(folder).images, [0, 1, 2])
    assert_pictures(open_store(folder, split="validation").images, [2])
    assert_pictures(open_store(folder, image_column="photo", max_images=2).images, [7, 8])
    assert "has no split 'test'; it has train, valid" in error_of(folder, split="test")
    assert error_of(folder, image_column="img").endswith("has no column 'img'; it has image, photo, age")
    assert "Unsupported cast from int64" in error_of(folder, image_column="age")


def test_saved_data_set_is_the_train_split(tmp_path, open_store, error_of):
    rows = table([2, 0]).add_item({"image": None})
    rows.save_to_disk(tmp_path / "data")
    assert "data, row 2: no image; " in error_of(tmp_path / "data")
    assert_pictures(open_store(tmp_path / "data", skip_bad_images=True).images, [2, 0])
    assert error_of(tmp_path / "data", split="validation").endswith("has no split 'validation'; it has train")
    (arrow,) = (tmp_path / "data").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert error_of(tmp_path / "data").startswith(f"no readable data set in {tmp_path}/data, which holds ")


def test_files_beside_tables_are_reported(tmp_path, open_store):
    folder = write(parquet(tmp_path / "data", train=table([0])), {"preview.png": 9, "README.md": b"?"})
    table([6]).to_parquet(folder / "more.parquet")  # `datasets` assigns it to no split
    store = open_store(folder)
    assert_pictures(store.images, [0])
    assert store.summary == "data: files found: 4, read: 1; left out: 2 (not read by `datasets`: .parquet, .png)"


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
@pytest.mark.parametrize("streaming", [False, True])
def test_binary_columns_may_hold_images(tmp_path, open_store, kind, streaming):
    features = datasets.Features({"image": datasets.Value(kind)})
    rows = datasets.Dataset.from_dict({"image": [encoded(0), encoded(1)]}, features=features)
    assert_pictures(open_store(parquet(tmp_path / "data", train=rows), streaming=streaming).images, [0, 1])


# Labels


LABELS = {  # values, feature, class numbers and names
    "classes": ([1, 0, 2, 0], datasets.ClassLabel(names=["z", "y", "x"]), [1, 0, 2, 0], ["z", "y", "x"]),
    "bool": ([True, False, False, True], datasets.Value("bool"), [1, 0, 0, 1], ["no", "yes"]),
    "strings": (["b", "ä", "a", "b"], datasets.Value("large_string"), [1, 2, 0, 1], ["a", "b", "ä"]),
    "integers": ([10, -1, 9, 10], datasets.Value("int8"), [2, 0, 1, 2], ["-1", "9", "10"]),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_stored_with_their_names_also_from_streams(tmp_path, open_store, name):
    values, feature, numbers, names = LABELS[name]
    folder = parquet(tmp_path / "data", train=table(range(4), kind=(values, feature)))
    store = open_store(folder, label_column="kind")
    assert store.labels.tolist() == numbers
    assert store.description.items() >= {"label_names": names, "label_column": "kind"}.items()
    assert_pictures(store.images, range(4))
    streamed = open_store(folder, label_column="kind", streaming=True, cache_dir=str(tmp_path / "streamed"))
    assert streamed.fingerprint == store.fingerprint  # of the pixels, labels and names


def test_class_folders_become_labels(tmp_path, open_store, error_of):
    names = ["train/dogs/0.png", "train/cats/1.png", "train/cats/2.png", "valid/cats/3.png", "valid/dogs/4.png"]
    folder = write(tmp_path / "faces", names)
    for split, images, labels in (("train", [1, 2, 0], [0, 0, 1]), ("valid", [3, 4], [0, 1])):
        store = open_store(folder, split=split, label_column="label")
        assert_pictures(store.images, images)
        assert store.labels.tolist() == labels
        assert store.description["label_names"] == ["cats", "dogs"]
    write(folder, {"train/dogs/small/5.png": 5})
    for unequal in (folder, write(tmp_path / "b", ["0.png"]), write(tmp_path / "c", ["train/0.png", "val/1.png"])):
        message = error_of(unequal, label_column="label")
        assert "has no column 'label'; it has label (the folder's name) if all images are in class" in message


@pytest.mark.parametrize(
    ("table", "column", "labels", "names"),
    [
        (b"file_name,hair\na.png,dark\nb.png,NA\nc.png,dark\n", "hair", [1, 0, 1], ["NA", "dark"]),
        (b"file_name,n\na.png,10\nb.png,9\nc.png,10\n", "n", [1, 0, 1], ["9", "10"]),
        (b"file_name,smiles\na.png,true\nb.png,false\nc.png,true\n", "smiles", [1, 0, 1], ["no", "yes"]),
    ],
)
def test_metadata_columns_become_labels(tmp_path, open_store, error_of, table, column, labels, names):
    files = {"train/a.png": 0, "train/b.png": 1, "train/c.png": 2, "train/metadata.csv": table}
    folder = write(tmp_path / "faces", files | {"val/0.png": 0, "val/metadata.csv": b"file_name\n0.png\n"})
    store = open_store(folder, label_column=column)
    assert store.labels.tolist() == labels
    assert store.description["label_names"] == names
    assert f"has no column 'x'; it has {column}, " in error_of(folder, label_column="x")


@pytest.mark.parametrize("labels", [("1", '"a"'), ("true", "2")])
def test_labels_of_several_types_are_rejected(tmp_path, error_of, labels):
    lines = [f'{{"file_name": "{row}.png", "kind": {label}}}\n' for row, label in enumerate(labels)]
    folder = write(tmp_path / "faces", {"0.png": 0, "1.png": 1, "metadata.jsonl": "".join(lines).encode()})
    assert error_of(folder, label_column="kind").startswith(f"the column 'kind' of {folder} holds ")


def test_labels_of_skipped_images_are_skipped(tmp_path, open_store):
    lines = b"file_name,kind\n0.png,a\n1.png,only here\n2.png,b\n"
    folder = write(tmp_path / "data", {"0.png": 0, "1.png": b"text", "2.png": 2, "metadata.csv": lines})
    store = open_store(folder, label_column="kind", skip_bad_images=True)
    assert_pictures(store.images, [0, 2])
    assert (store.labels.tolist(), store.description["label_names"]) == ([0, 1], ["a", "b"])


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        (["a", None, "b"], datasets.Value("string"), "holds None in row 1; labels are class numbers, or all "),
        ([0, 1, -1], datasets.ClassLabel(names=["a", "b"]), "holds -1 in row 2; labels are "),
        ([1.5, 2, 3], datasets.Value("float32"), "holds 1.5 in row 0; labels are "),
    ],
)
def test_unusable_labels_are_rejected(tmp_path, error_of, values, feature, message):
    table([0] * len(values), kind=(values, feature)).save_to_disk(tmp_path / "data")
    start = f"the column 'kind' of {tmp_path}/data {message}"
    assert error_of(tmp_path / "data", label_column="kind").startswith(start)
    assert error_of(tmp_path / "data", label_column="z").endswith("no column 'z'; it has image, kind")
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("column", [None, "hair_style", "glasses"])
def test_synthetic_faces_have_class_labels(open_store, column):
    options = {"dataset_name": "synthetic-faces", "max_images": 70, "label_column": column}
    for split in ("train", "validation"):
        store, indices = open_store(**options, split=split), split_indices(split, 70)
        np.testing.assert_array_equal(store.images, draw_faces(face_factors(indices), SIDE).transpose(0, 3, 1, 2))
        if column is not None:
            np.testing.assert_array_equal(store.labels, face_factors(indices)[column])
            assert store.description["label_names"] == LABEL_NAMES[column]


# Paths that lead out of the data set


@pytest.fixture
def secret(tmp_path) -> Path:
    """A picture outside the data set."""
    return write(tmp_path / "private", {"secret.png": 7}) / "secret.png"


@pytest.mark.parametrize("way", ["../private/secret.png", "{}", "file://{}"])
def test_metadata_paths_out_of_the_folder_are_rejected(tmp_path, open_store, error_of, secret, way):
    lines = f"file_name\n{way.format(secret)}\n0.png".encode()
    folder = write(tmp_path / "faces", {"0.png": 0, "metadata.csv": lines})
    message = "secret.png): the metadata list it, but the folder has no such image; fix it"
    assert message in error_of(folder)
    assert_pictures(open_store(folder, skip_bad_images=True).images, [0])


def test_table_paths_out_of_the_data_set_are_not_read(tmp_path, open_store, error_of, secret):
    folder, inside = tmp_path / "data", {"bytes": encoded(0), "path": "../private/secret.png"}
    ways = [secret, f"file://{secret}", f"{folder}/../private/secret.png", f"file://{secret}::{folder}/inner.zip"]
    ways += [f"simplecache::file://{secret}", "../private/secret.png", "https://127.0.0.1:9/secret.png"]
    cells = [inside, *({"bytes": None, "path": str(way)} for way in ways)]
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    parquet(folder, train=datasets.Dataset.from_dict({"image": cells}, features=features))
    message = error_of(folder)
    assert "row 1 (secret.png): its path '" in message
    assert "is outside the data set and was not read" in message
    store = open_store(folder, skip_bad_images=True)
    assert_pictures(store.images, [0])  # a row that holds the bytes does not need its path
    assert store.description["num_skipped"] == len(ways)


# Missing and damaged data


def test_errors_for_missing_and_empty_folders_say_what_exists(tmp_path, error_of):
    folder = tmp_path / "parent"
    write(folder, ["f.zip", *(f"{name}/.0.png" for name in "abcdeg")])
    listing = f"its nearest existing parent is {folder}, which holds a, b, c, d, e and 2 more"
    for missing in ("faces", "x/faces", "f.zip"):
        assert error_of(folder / missing) == f"folder not found: {folder}/{missing}; {listing}"
    assert error_of(folder / "a") == f"no images found in {folder}/a, which holds .0.png"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.zip", b"PK", "faces/a.zip is not an intact zip archive: File is not a zip file; "),
        ("metadata.csv", b"\xff,\n", "faces/metadata.csv is damaged: 'utf-8' codec"),
        ("a.tar", b"?", "faces, which holds 0.png, a.tar: truncated header"),
        ("a.parquet", b"PAR1", "Parquet"),
        ("model.xyz", b"?", "no readable data set in "),
    ],
)
def test_damaged_data_raise_one_line_errors_with_the_reason(tmp_path, error_of, name, content, reason):
    files = {name: content} | ({} if name == "model.xyz" else {"0.png": 0})
    error = error_of(write(tmp_path / "faces", files))
    assert reason in error
    assert "generating the dataset" not in error


def test_unsupported_and_contradictory_arguments_are_rejected(tmp_path, error_of):
    faces = "synthetic-faces"
    message = f"{faces} has no column 'smile'; it has hair_style, hair_colour, eye_colour, "
    assert error_of(dataset_name=faces, label_column="smile").startswith(message)
    assert error_of(dataset_name=faces, split="test") == f"{faces} has no split 'test'; it has train, validation"
    assert "is for CelebA's photographs; choose none" in error_of(dataset_name=faces, crop="celeba_140")
    assert error_of(dataset_name=str(tmp_path)) == f"{tmp_path} is a local folder; give it as --train_data_dir"
    assert error_of(dataset_name="a/b/c").startswith("cannot open a/b/c, revision main, on the Hub: Repo id must be ")
    write(tmp_path / "faces", ["0.png"])
    assert error_of(tmp_path / "faces", dataset_config_name="x").endswith("'x' not found. Available: ['default']")
    config = TrainConfig(train_data_dir=str(tmp_path), output_dir=f"{tmp_path}/x/..", max_train_steps=1)
    with pytest.raises(InputError, match="is the folder of the images; choose another one"):
        training_data.TrainingData(config, SimpleNamespace(num_processes=1))


# The Hub


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
    folders = [
        parquet(tmp_path / name, train=table(indices)) for name, indices in (("first", [0, 1, 2]), ("later", [3, 4]))
    ]
    fingerprints = [open_store(folder).fingerprint for folder in folders]
    files = [
        {"train-00000-of-00001.parquet": (folder / "train.parquet").read_bytes(), "README.md": folder.name.encode()}
        for folder in folders
    ]
    commit, later_commit = hub.add("someone/faces", *files)
    hub.add("someone/gated", files[0])
    hub.refused = {
        "/datasets/someone/gated/resolve": (403, "GatedRepo"),
        "/api/datasets/someone/locked": (403, "GatedRepo"),
    }
    faces = {"dataset_name": "someone/faces", "resolution": SIDE, "cache_dir": str(tmp_path / "stores")}
    streamed = faces | {"cache_dir": str(tmp_path / "streamed"), "streaming": True}
    later = faces | {"dataset_revision": later_commit}
    cases = [streamed, faces, faces | {"dataset_revision": commit}, later, faces | {"dataset_revision": "v9"}]
    cases += [faces | {"split": "validation"}]
    cases += [faces | {"dataset_name": f"someone/{name}"} for name in ("gated", "locked")]
    answers = ask(cases, hub.address)
    assert answers[:4] == [[fingerprints[0], commit, 3]] * 3 + [[fingerprints[1], later_commit, 2]]
    starts = [
        "cannot open someone/faces, revision v9, on the Hub: 404 ",
        "someone/faces has no split 'validation'; it has train",
        "cannot read someone/gated: Dataset 'someone/gated' is a gated dataset on the Hub. Visit ",
        "cannot open someone/locked, revision main, on the Hub: 403 ",
    ]
    for answer, start in zip(answers[4:], starts, strict=True):
        assert answer.startswith(start)
        assert answer.endswith("log in with `hf auth login`") == (" on the Hub: " in start)
    assert len([path for path in (tmp_path / "stores").iterdir() if path.is_dir()]) == 2  # main is the first commit

    # Offline: the stores; another resolution from the cache of `datasets`, which has the later commit for the newest;
    # data that were never fetched
    never = {"dataset_name": "someone/other", "cache_dir": str(tmp_path / "stores")}
    small = {"resolution": 4}
    cases = [faces, streamed, later, later | small, faces | small, never, never | {"streaming": True}]
    for endpoint, environment in ((NOWHERE, {}), (hub.address, {"HF_HUB_OFFLINE": "1"})):
        answers = ask(cases, endpoint, **environment)
        assert answers[:3] == [[fingerprints[0], commit, 3]] * 2 + [[fingerprints[1], later_commit, 2]]
        assert answers[3][1:] == [later_commit, 2]
        assert answers[4] == (
            f"the cached copy of someone/faces is commit {later_commit}, not {commit};"
            f" connect to the Hub or give --dataset_revision {later_commit}"
        )
        for answer in answers[5:]:
            assert answer.startswith("cannot download someone/other from the Hub and it is not cached: ")
            assert answer.endswith("or give --train_data_dir, or --dataset_name synthetic-faces, which needs none")


def test_hub_image_files_are_read_with_and_without_streaming(tmp_path, hub, open_store):
    folder = write(tmp_path / "local", ["1.png", "2.png", "3.png"])
    fingerprint = open_store(folder).fingerprint
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())} | {"4.avif": encoded(4, "AVIF")}
    (commit,) = hub.add("someone/faces", files)
    hub.add("someone/broken", {f"_{name}": content for name, content in files.items()})
    hub.refused = {"/_2.png": (404, "EntryNotFound")}  # a failed download, not a bad image that may be skipped
    faces = {"dataset_name": "someone/faces", "resolution": SIDE, "cache_dir": str(tmp_path / "stores")}
    streamed = faces | {"cache_dir": str(tmp_path / "streamed"), "streaming": True}
    broken = streamed | {"dataset_name": "someone/broken", "skip_bad_images": True}
    answers = ask([streamed, faces, broken], hub.address)
    assert answers[:2] == [[fingerprint, commit, 3]] * 2
    (store,) = (tmp_path / "stores").glob("*/meta.json")
    summary = "faces: files found: 4, read: 3; left out: 1 (not read by `datasets`: .avif)"
    assert json.loads(store.read_text())["summary"] == summary
    assert answers[2].startswith("the stream of someone/broken failed after 1 rows: ")


def test_offline_load_puts_the_setting_of_datasets_back(monkeypatch, error_of):
    monkeypatch.setattr("training.sources._ask_the_hub", lambda *_: None)
    assert "it is not cached" in error_of(dataset_name="someone/faces")
    assert datasets.config.HF_HUB_OFFLINE is False


def test_only_the_main_process_resolves_the_commit(monkeypatch, open_store):
    """Otherwise, a moving branch could give the processes different images."""
    store, calls = open_store(dataset_name="synthetic-faces", max_images=20), []
    monkeypatch.setattr(training_data, "open_image_store", lambda **_: calls.append(1))
    monkeypatch.setattr(training_data, "on_main_process", lambda state, action: store)
    config = TrainConfig(dataset_name="someone/faces", max_train_steps=1)
    data = training_data.TrainingData(config, SimpleNamespace(num_processes=1))
    assert len(data.store) == 20
    assert not calls
