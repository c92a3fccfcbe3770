import json
import os
import pickle
import sys

import numpy as np
import pytest

from mpp.data.reader import kind_of
from mpp.data.sources.base import TooLarge
from mpp.data.sources.files import NotAFile, Outside
from mpp.data.sources.opening import open_source, open_splits
from mpp.errors import install
from tests.data.sources.reading import all_read, refused

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

INTEGER, TEXT, XY = datasets.Value("int32"), datasets.Value("string"), datasets.ClassLabel(names=["x", "y"])
ROW = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write_rows(folder, rows):
    """Parquet by hand: `datasets` would read the files and write their bytes."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(rows, ROW)}), folder / "train.parquet")
    return f"hf:{folder}"


def saved(dataset, folder):
    dataset.save_to_disk(str(folder))
    return f"hf:{folder}"


def test_splits(split_in_two, pictures, made, tmp_path, monkeypatch):
    calls = []
    for name in ("load_from_disk", "load_dataset_builder"):
        real = getattr(datasets, name)
        monkeypatch.setattr(datasets, name, lambda *args, real=real, **more: calls.append(args) or real(*args, **more))
    splits = open_splits(split_in_two)
    train, test = splits["train"], splits["test"]
    assert len(calls) == (1 if calls[0][0] == "parquet" else 2)  # the builder of both, or each of the saved ones
    assert all_read(train) == [(pictures[n], n % 3) for n in range(11, -1, -1)]
    assert all_read(test) == [(pictures[n], n % 3) for n in range(19, 11, -1)]
    assert train.classes == test.classes == ("ant", "bee", "cat")
    assert (test.labels().dtype, test.labels().tolist()) == (np.int64, [n % 3 for n in range(19, 11, -1)])
    assert train.describe() == "12 images in 3 classes; the split train alone"
    assert train.location(3) == f"row 3 of {split_in_two} (8.png)"
    for index in (-1, 12):
        for call in (train.read, train.location):
            with pytest.raises(IndexError):
                call(index)
    source = open_source(f"{split_in_two}:test")
    assert all_read(source) == all_read(test)
    assert test.fingerprint() == source.fingerprint() != train.fingerprint() == open_source(split_in_two).fingerprint()
    copy = open_source(saved(made(0, 12), tmp_path / "copy")).fingerprint(times=False)
    assert copy == train.fingerprint(times=False) != test.fingerprint(times=False)
    assert "has no test split of its own" in refused(f"{split_in_two}:test", "test")
    assert "has no split 'tset' but the splits train, test; choose one of them" in refused(f"{split_in_two}:tset")


def test_which_split_is_meant(made, tmp_path, monkeypatch):
    for names, opened in {("train", "validation"): [12, 8], ("one", "two"): None, ("one",): [12]}.items():
        parts = dict(zip(names, (made(0, 12), made(12, 20)), strict=False))
        spec = saved(datasets.DatasetDict(parts), tmp_path / "-".join(names))
        if opened is None:
            assert "has the splits one, two and none called train; write hf:" in refused(spec)
        else:
            assert [len(source) for source in open_splits(spec).values()] == opened
    spec = saved(made(), tmp_path / "alone")
    monkeypatch.setenv("HOME", str(tmp_path))
    (source,) = open_splits("hf:~/alone").values()
    assert source.describe() == "20 images in 3 classes"
    assert "has no split 'test' but no splits" in refused(f"{spec}:test")


def test_copies_are_small_and_read_the_same(split_in_two):
    source = open_source(split_in_two)
    whole, copy = all_read(source), pickle.dumps(source)
    assert len(copy) < 5_000
    assert all_read(pickle.loads(copy)) == whole
    child = os.fork()
    if not child:
        os._exit(0 if all_read(source) == whole else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("columns", "classes", "first_two", "note"),
    [
        ({"class": (INTEGER, [4, 0])}, ("0", "1", "2", "3", "4"), [4, 0], ""),
        ({"labels": (TEXT, ["dog", "cat"])}, ("cat", "dog"), [1, 0], ""),
        ({"label": (TEXT, ["dog", None])}, ("dog",), [0, -1], "; 10 without a label"),
        ({"label": (INTEGER, [None, None])}, None, None, ""),
        ({"caption": (TEXT, ["dog", "cat"]), "width": (INTEGER, [4, 0])}, None, None, ""),
        ({"kind": (XY, [1, 0])}, ("x", "y"), [1, 0], ""),
        ({"coarse_label": (XY, [1, 0]), "fine_label": (XY, [0, 1])}, ("x", "y"), [0, 1], ""),
        (
            {"shape": (XY, [1, 0]), "colour": (XY, [1, 0])},
            *(None, None, "; labels left aside, for shape and colour could each be it"),
        ),
    ],
)
def test_label_columns(columns, classes, first_two, note, made, tmp_path):
    dataset = made(**{name: (feature, values * 10) for name, (feature, values) in columns.items()})
    source = open_source(saved(dataset, tmp_path / "d"))
    assert source.classes == classes
    labels = source.labels()
    assert (None if labels is None else labels[:-3:-1].tolist()) == first_two  # the rows come last image first
    assert source.read(19)[1] == (first_two and first_two[0])
    kind = f" in {len(classes)} class{'es' * (len(classes) > 1)}" if classes else ", unlabelled"
    assert source.describe() == f"20 images{kind}{note}"


@pytest.mark.parametrize("kind", [INTEGER, TEXT])
def test_classes_of_a_test_split_follow_those_of_train(kind, made, tmp_path):
    values = [2, 3] * 6 + [0, 3] * 4 if kind is INTEGER else ["m", "z"] * 6 + ["a", "z"] * 4
    parts = {"train": made(0, 12, label=(kind, values)), "test": made(12, 20, label=(kind, values))}
    test = open_source(saved(datasets.DatasetDict(parts), tmp_path / "d"), "test")
    assert test.classes == (("0", "1", "2", "3") if kind is INTEGER else ("m", "z", "a"))
    assert test.labels().tolist() == ([3, 0] * 4 if kind is INTEGER else [1, 2] * 4)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_bytes_without_the_type_image(kind, pictures, tmp_path):
    value = datasets.Value("binary" if kind == "struct" else kind)
    feature = {"bytes": value, "path": datasets.Value("string")} if kind == "struct" else value
    images = [{"bytes": data, "path": None} for data in pictures] if kind == "struct" else pictures
    features = datasets.Features({"mask": datasets.Value("binary"), "img": feature})
    dataset = datasets.Dataset.from_dict({"mask": pictures, "img": images}, features=features)
    source = open_source(saved(dataset, tmp_path / "d"))
    assert all_read(source) == [(data, None) for data in pictures]
    assert [source.size(i) for i in range(20)] == [len(data) for data in pictures]


def test_images_by_path(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes(name.encode())
    os.mkfifo(folder / "fifo.png")
    with (folder / "large.png").open("wb") as file:
        file.truncate(2**36)
    paths = [str(folder / "0.png"), "1.png", "fifo.png", "no", "large.png", "../outside.png"]
    rows = [{"bytes": None, "path": path} for path in paths]
    source = open_source(write_rows(folder, [*rows, {"bytes": b"x", "path": "y"}, {"bytes": bytes(10_000)}, None]))
    found = list(source.read_many(range(9), most=5000))
    assert [each[0] for each in found if isinstance(each, tuple)] == [b"0.png", b"1.png", b"x"]
    errors = [type(each) for each in found if not isinstance(each, tuple)]
    assert errors == [NotAFile, FileNotFoundError, TooLarge, Outside, TooLarge, OSError]
    assert str(found[8]) == f"row 8 of hf:{folder} holds neither bytes nor a path"
    assert [source.size(i) for i in range(9)] == [5, 5, 0, 0, 2**36, 0, 1, 10_000, 0]
    assert [source.location(i) for i in (1, 6)] == [str(folder / "1.png"), f"row 6 of hf:{folder} (y)"]
    before, without = source.fingerprint(), source.fingerprint(times=False)
    os.utime(folder / "1.png", ns=(0, 1))
    assert source.fingerprint() != before
    assert source.fingerprint(times=False) == without
    (folder / "1.png").write_bytes(b"others")
    assert source.fingerprint(times=False) != without


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("TMP/private.png", False),
        ("../private.png", False),
        ("sub/../../private.png", False),
        ("link.png", False),  # to ../private.png
        ("folder/private.png", False),  # behind a link to ..
        ("../d2/a.png", False),  # a folder whose name only begins alike
        ("http://127.0.0.1/a.png", False),
        ("file://TMP/private.png", False),
        ("hf://datasets/somebody/some/a.png", False),
        (".", False),
        ("a.png\0", False),
        ("sub/../a.png", True),
        ("TMP/d/a.png", True),
        ("linked.png", True),  # to a.png
    ],
)
def test_a_data_set_reads_nothing_outside_its_folder(path, read, tmp_path, monkeypatch):
    folder = tmp_path / "d"
    for place in (tmp_path / "private.png", folder / "a.png", folder / "sub" / "b.png", tmp_path / "d2" / "a.png"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"image")
    for link, target in {"link.png": "../private.png", "linked.png": "a.png", "folder": ".."}.items():
        (folder / link).symlink_to(target)
    write_rows(folder, [{"bytes": None, "path": path.replace("TMP", str(tmp_path))}])
    monkeypatch.chdir(tmp_path)
    source = open_source("hf:d")
    assert len(source.fingerprint()) == 64
    if read:
        assert source.read(0) == (b"image", None)
    else:
        is_address = "://" in path  # never fetched: a name like others, which is not there
        text = "No such file" if is_address else "^row 0 of hf:d names .*, outside of the data set, and is not read"
        with pytest.raises(OSError, match=text) as caught:
            source.read(0)
        assert kind_of(caught.value) == ("missing" if is_address else "outside")


def test_a_saved_data_set_names_no_file_outside_its_folder(made, tmp_path):
    spec = saved(datasets.DatasetDict(train=made(0, 12), test=made(12, 20)), tmp_path / "d")
    saved(made(), tmp_path / "other")
    listed = (tmp_path / "d" / "dataset_dict.json").read_text()
    (tmp_path / "d" / "dataset_dict.json").write_text(listed.replace('"test"', '"../other"'))
    assert "names '../other', outside of its folder" in refused(f"{spec}:../other")
    (tmp_path / "d" / "dataset_dict.json").write_text(listed)
    state = tmp_path / "d" / "train" / "state.json"
    other = next((tmp_path / "other").glob("*.arrow"))
    for name in (str(other), f"../../other/{other.name}"):
        state.write_text(json.dumps({**json.loads(state.read_text()), "_data_files": [{"filename": name}]}))
        assert f"names '{name}', outside of its folder, and is not read" in refused(spec)


def test_a_data_set_of_the_hub_reads_nothing_of_this_machine(pictures, tmp_path, monkeypatch):
    """As `datasets` opens one by name, whose author lists files or writes paths."""
    private, downloads = tmp_path / "private", tmp_path / "downloads"
    for folder in (private, downloads):
        folder.mkdir()
        (folder / "a.png").write_bytes(pictures[0])
    load = datasets.load_dataset_builder
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", downloads)

    def opened_by_name(kind, folder):
        builder = load(kind, data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)

    opened_by_name("imagefolder", private)
    assert f"lists {private / 'a.png'}, a file of this machine, and is not read" in refused("hf:somebody/some")
    monkeypatch.setattr("mpp.data.sources.hf_dataset._REMOTE", "/")  # the files stand for those that are fetched
    with pytest.raises(OSError, match="outside of the data set"):
        open_source("hf:somebody/some").read(0)
    opened_by_name("imagefolder", downloads)
    assert open_source("hf:somebody/some").read(0) == (pictures[0], None)
    write_rows(tmp_path / "rows", [{"path": str(downloads / "a.png")}, {"path": "private/a.png"}])
    opened_by_name("parquet", tmp_path / "rows")
    monkeypatch.chdir(tmp_path)
    # An author's own paths lead neither there nor into the working folder.
    missing = r"No such file .*datasets--somebody--some/private/a\.png"
    for index, text in enumerate(("outside of the data set", missing)):
        with pytest.raises(OSError, match=text):
            open_source("hf:somebody/some").read(index)


def test_columns_that_cannot_be_the_images(made, pictures, tmp_path):
    rows = datasets.Dataset.from_dict({"data": pictures, "n": list(range(20))})
    text = refused(saved(rows, tmp_path / "a"))
    assert "which column are the images? It holds data (binary), n (int64); call one of type Image 'image'" in text
    two = made(right=(datasets.Image(), [{"bytes": data, "path": None} for data in pictures]))
    two = two.rename_column("image", "left")
    assert "It holds id (int64), left (Image), right (Image)" in refused(saved(two, tmp_path / "b"))
    assert len(open_source(saved(two.rename_column("right", "image"), tmp_path / "c"))) == 20


@pytest.mark.parametrize(
    ("label", "dtype", "text"),
    [
        (-7, "int32", "column label: there is a label -7; labels count classes from 0"),
        (16_777_215, "int32", "column label: the label 16777215 would mean 16,777,216 classes, of 20 images"),
        (2**63 + 7, "uint64", "column label: the label 9223372036854775815 would mean"),
        (3, "", "column label: there is a label 3, but 3 classes; check the labels"),  # of the type ClassLabel
    ],
)
def test_labels_that_are_no_classes(label, dtype, text, made, tmp_path):
    table = (made(label=(datasets.Value(dtype), [0] * 20)) if dtype else made()).data.table
    place = table.schema.get_field_index("label")
    values = pa.array([*[0] * 19, label], type=table.schema.field(place).type)
    pq.write_table(table.set_column(place, table.schema.field(place), values), tmp_path / "train.parquet")
    assert text in refused(f"hf:{tmp_path}")


@pytest.mark.usefixtures("own_cache")
def test_the_copy_of_parquet(made, tmp_path, pictures, monkeypatch, capfd):
    path, spec = tmp_path / "p" / "train-00000-of-00001.parquet", f"hf:{tmp_path / 'p'}"
    path.parent.mkdir()
    lengths = []
    for number in (12, 20):
        made(0, number).to_parquet(str(path))
        os.utime(path, ns=(0, number))
        capfd.readouterr()
        source = open_source(spec)  # written again, so read again
        assert capfd.readouterr() == ("", "")  # no progress bars, as others have
        lengths.append(len(source))
    assert lengths == [12, 20]
    assert source.read(0)[0] == pictures[19]
    assert not datasets.utils.are_progress_bars_disabled()
    monkeypatch.setenv("MPP_CACHE_LIMIT", "1kB")
    os.utime(path)
    text = refused(spec)
    assert f"a copy of {tmp_path / 'p'} takes " in text
    assert ", of the 1 kB that MPP_CACHE_LIMIT allows" in text
    path.write_bytes(path.read_bytes()[:-100])
    assert f"cannot read {tmp_path / 'p'} (" in refused(spec)


def test_folders_that_are_no_dataset(made, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds neither Parquet files nor a saved dataset" in refused(f"hf:{tmp_path / 'empty'}")
    assert f"there is no folder {tmp_path / 'none'}; check the path" in refused(f"hf:{tmp_path / 'none'}")
    spec = saved(made(), tmp_path / "saved")
    for arrow in (tmp_path / "saved").glob("*.arrow"):
        arrow.write_bytes(arrow.read_bytes()[:100])
    assert f"cannot read {tmp_path / 'saved'} (" in refused(spec)
    made().select([]).save_to_disk(str(tmp_path / "none-left"), num_shards=1)
    assert "has no rows; check it" in refused(f"hf:{tmp_path / 'none-left'}")


def test_a_name_without_a_connection(monkeypatch, capfd):
    constants = pytest.importorskip("huggingface_hub.constants")
    for module in (datasets.config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    text = refused("hf:somebody/some-pictures:train")
    assert "there is no folder somebody/some-pictures, nor can it be had from the Hugging Face hub" in text
    assert text.endswith("; check the name and the connection")
    assert capfd.readouterr() == ("", "")


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    text = refused(f"hf:{tmp_path}")
    assert "the package datasets is missing (" in text
    assert text.endswith(f": {install('hf')}")
