"""Rows of Hugging Face datasets: images, labels, names and sizes."""

import os
import pickle
import re

import pytest

from mpp.data.reader import kind_of
from mpp.data.sources.base import TooLarge, read_many, size_of
from mpp.data.sources.files import NotAFile, Outside
from mpp.data.sources.fingerprint import fingerprint
from mpp.data.sources.hub_dataset import OpenedDataset
from mpp.data.sources.opening import open_source
from tests.data.sources.parquet import write_parquet
from tests.data.sources.reading import all_read, refused

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("no_progress_bars")


def test_every_row_is_named_by_its_file(made, pictures, tmp_path, monkeypatch):
    made().save_to_disk(str(tmp_path / "saved"), num_shards=3)
    for number, (start, stop) in enumerate([(0, 7), (7, 8), (8, 20)]):
        write_parquet(tmp_path / "rows", **{f"train-{number}": made(start, stop)})
    for folder, sizes in (("saved", [7, 7, 6]), ("rows", [7, 1, 12])):
        source = open_source(f"hf:{tmp_path / folder}")
        files = sorted(path for path in (tmp_path / folder).iterdir() if path.suffix in (".arrow", ".parquet"))
        numbers = [int(re.search(r"\((\d+)\.png\)", source.where(index))[1]) for index in range(20)]
        assert [source.read(index)[0] for index in range(20)] == [pictures[number] for number in numbers]
        named = [f"row {row} of {file}" for file, size in zip(files, sizes, strict=True) for row in range(size)]
        assert [source.where(index).partition(" (")[0] for index in range(20)] == named
        copy = pickle.loads(pickle.dumps(source))
        assert copy.where(13) == source.where(13)
        with pytest.raises(IndexError):
            source.where(20)
    monkeypatch.setattr(OpenedDataset, "files", lambda self, split: [])  # as of a dataset from the hub
    spec = f"hf:{tmp_path / 'rows'}"
    assert open_source(spec).where(9).startswith(f"row 9 of the split train of {spec} (")
    assert open_source(f"{spec}:train").where(9).startswith(f"row 9 of {spec}:train (")


def test_copies_are_small_and_read_the_same(split_in_two):
    source = open_source(split_in_two)
    whole = all_read(source)
    copy = pickle.dumps(source)
    assert len(copy) < 5_000
    assert all_read(pickle.loads(copy)) == whole
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        same = all_read(source) == whole
        os.write(write_end, b"same" if same else b"other")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read_end, 10) == b"same"
    os.close(read_end)
    os.close(write_end)


INTEGER, TEXT = datasets.Value("int32"), datasets.Value("string")


@pytest.mark.parametrize(
    ("columns", "classes", "of_first"),
    [
        ({"class": (INTEGER, [4, 0] * 10)}, ("0", "1", "2", "3", "4"), 4),
        ({"labels": (TEXT, ["dog", "cat"] * 10)}, ("cat", "dog"), 1),
        ({"label": (TEXT, ["dog", None] * 10)}, ("dog",), 0),
        ({"label": (INTEGER, [None] * 20)}, None, None),
        ({"caption": (TEXT, ["dog", "cat"] * 10), "width": (INTEGER, [4, 0] * 10)}, None, None),
        ({"kind": (datasets.ClassLabel(names=["x", "y"]), [1, 0] * 10)}, ("x", "y"), 1),
        (
            {
                "coarse_label": (datasets.ClassLabel(names=["x", "y"]), [1, 0] * 10),
                "fine_label": (datasets.ClassLabel(names=["a", "b", "c"]), [2, 0] * 10),
            },
            ("a", "b", "c"),
            2,
        ),
    ],
)
def test_label_columns(columns, classes, of_first, made, tmp_path):
    made(**columns).save_to_disk(str(tmp_path / "d"))
    source = open_source(f"hf:{tmp_path / 'd'}")
    assert source.classes == classes
    # The rows come last image first.
    assert source.read(19)[1] == of_first
    labels = source.labels()
    assert (None if labels is None else int(labels[19])) == of_first


def test_two_columns_of_classes_that_could_be_meant(made, tmp_path):
    kinds = datasets.ClassLabel(names=["x", "y"])
    made(shape=(kinds, [1, 0] * 10), colour=(kinds, [1, 0] * 10)).save_to_disk(str(tmp_path / "d"))
    source = open_source(f"hf:{tmp_path / 'd'}")
    assert source.classes is None
    assert source.describe() == "20 images, unlabelled; labels left aside, for shape and colour could each be it"


def test_some_without_a_label(made, tmp_path):
    made(label=(TEXT, ["dog", None] * 10)).save_to_disk(str(tmp_path / "d"))
    source = open_source(f"hf:{tmp_path / 'd'}")
    assert source.labels().tolist() == [-1, 0] * 10
    assert source.describe() == "20 images in 1 class; 10 without a label"


@pytest.mark.parametrize("kind", [INTEGER, TEXT])
def test_classes_of_a_test_split_follow_those_of_train(kind, made, tmp_path):
    values = [2, 3] * 6 + [0, 3] * 4 if kind is INTEGER else ["m", "z"] * 6 + ["a", "z"] * 4
    parts = {"train": made(0, 12, label=(kind, values)), "test": made(12, 20, label=(kind, values))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    test = open_source(f"hf:{tmp_path / 'd'}", "test")
    assert test.classes == (("0", "1", "2", "3") if kind is INTEGER else ("m", "z", "a"))
    assert test.labels().tolist() == ([3, 0] * 4 if kind is INTEGER else [1, 2] * 4)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_bytes_without_the_type_image(kind, pictures, tmp_path):
    value = datasets.Value("binary" if kind == "struct" else kind)
    feature = {"bytes": value, "path": datasets.Value("string")} if kind == "struct" else value
    images = [{"bytes": data, "path": None} for data in pictures] if kind == "struct" else pictures
    features = datasets.Features({"mask": datasets.Value("binary"), "img": feature})
    datasets.Dataset.from_dict({"mask": pictures, "img": images}, features=features).save_to_disk(str(tmp_path / "d"))
    source = open_source(f"hf:{tmp_path / 'd'}")
    assert all_read(source) == [(data, None) for data in pictures]
    assert source.sizes().tolist() == [len(data) for data in pictures]


def test_images_by_path(pictures, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(pictures[number])
    os.mkfifo(folder / "fifo.png")
    (folder / "inside.png").write_bytes(b"inside")
    paths = [*(str(folder / f"{number}.png") for number in range(3)), "inside.png", str(folder / "fifo.png"), "no"]
    held = [{"bytes": None, "path": path} for path in paths] + [{"bytes": b"x", "path": "y"}, None]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    # By hand, as `datasets` would read the files and write their bytes.
    pq.write_table(pa.table({"image": pa.array(held, kind)}), tmp_path / "d" / "train.parquet")
    source = open_source(f"hf:{tmp_path / 'd'}")
    assert [source.read(i)[0] for i in (0, 1, 2, 3, 6)] == [*pictures[:3], b"inside", b"x"]
    assert source.where(1) == str(folder / "1.png")
    for index, error in ((4, NotAFile), (5, FileNotFoundError)):
        with pytest.raises(error):
            source.read(index)
    with pytest.raises(OSError, match=r"row 7 of .* holds neither bytes nor a path"):
        source.read(7)
    before, without = fingerprint(source), fingerprint(source, times=False)
    os.utime(folder / "1.png", ns=(0, 1))
    assert fingerprint(source) != before
    assert fingerprint(source, times=False) == without
    (folder / "1.png").write_bytes(b"other")
    assert fingerprint(source, times=False) != without


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
        place.write_bytes(b"held")
    (folder / "link.png").symlink_to("../private.png")
    (folder / "linked.png").symlink_to("a.png")
    (folder / "folder").symlink_to("..")
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    held = [{"bytes": None, "path": path.replace("TMP", str(tmp_path))}]
    pq.write_table(pa.table({"image": pa.array(held, kind)}), folder / "train.parquet")
    monkeypatch.chdir(tmp_path)
    source = open_source("hf:d")
    assert len(fingerprint(source)) == 64
    if read:
        assert source.read(0) == (b"held", None)
    else:
        is_address = "://" in path  # never fetched: a name like others, which is not there
        text = "No such file" if is_address else "^row 0 of hf:d names .*, outside of the data set, and is not read"
        with pytest.raises(OSError, match=text) as caught:
            source.read(0)
        assert kind_of(caught.value) == ("missing" if is_address else "outside")


def test_fingerprints(split_in_two, made, tmp_path):
    train, test = open_source(split_in_two), open_source(split_in_two, "test")
    assert fingerprint(train) == fingerprint(open_source(split_in_two))
    assert len({fingerprint(source) for source in (train, test, open_source(f"{split_in_two}:test"))}) == 2
    made(0, 12).save_to_disk(str(tmp_path / "copy"))
    copy = open_source(f"hf:{tmp_path / 'copy'}")
    assert fingerprint(copy, times=False) == fingerprint(train, times=False) != fingerprint(test, times=False)


def test_columns_that_cannot_be_the_images(made, pictures, tmp_path):
    rows = datasets.Dataset.from_dict({"data": pictures, "n": list(range(20))})
    rows.save_to_disk(str(tmp_path / "a"))
    text = refused(f"hf:{tmp_path / 'a'}")
    assert "which column are the images? It holds data (binary), n (int64); call one of type Image 'image'" in text
    two = made(right=(datasets.Image(), [{"bytes": data, "path": None} for data in pictures]))
    two = two.rename_column("image", "left")
    two.save_to_disk(str(tmp_path / "b"))
    assert "It holds id (int64), left (Image), right (Image)" in refused(f"hf:{tmp_path / 'b'}")
    two.rename_column("right", "image").save_to_disk(str(tmp_path / "c"))
    assert len(open_source(f"hf:{tmp_path / 'c'}")) == 20


@pytest.mark.parametrize(
    ("label", "dtype", "text"),
    [
        (16_777_215, "int32", "column label: the label 16777215 would mean 16,777,216 classes, of 20 images"),
        (2**63 + 7, "uint64", "column label: the label 9223372036854775815 would mean"),
        (3, "", "column label: there is a label 3, but 3 classes; check the labels"),  # of the type ClassLabel
    ],
)
def test_labels_that_are_no_classes(label, dtype, text, made, tmp_path):
    dataset = made() if not dtype else made(label=(datasets.Value(dtype), [0] * 20))
    table = dataset.data.table
    place = table.schema.get_field_index("label")
    values = pa.array([*[0] * 19, label], type=table.schema.field(place).type)
    pq.write_table(table.set_column(place, table.schema.field(place), values), tmp_path / "train.parquet")
    assert text in refused(f"hf:{tmp_path}")


def test_rows_of_too_many_bytes_are_not_read(tmp_path, pictures):
    (tmp_path / "set").mkdir()
    with (tmp_path / "set" / "large.png").open("wb") as file:
        file.truncate(2**36)
    (tmp_path / "set" / "small.png").write_bytes(pictures[0])
    rows = [{"bytes": pictures[1], "path": None}, {"bytes": bytes(10_000), "path": None}]
    rows += [{"bytes": None, "path": name} for name in ("small.png", "large.png", "../outside.png", None)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "set" / "train.parquet")
    source = open_source(f"hf:{tmp_path / 'set'}")
    found = list(read_many(source, range(6), most=5000))
    assert [type(each) for each in found] == [tuple, TooLarge, tuple, TooLarge, Outside, OSError]
    assert [size_of(source, i) for i in range(6)] == [len(pictures[1]), 10_000, len(pictures[0]), 2**36, 0, 0]
