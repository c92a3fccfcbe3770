import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from mpp.cache.entries import entries
from mpp.data.reader import kind_of
from mpp.errors import install
from mpp.sources.base import SourceError, TooLarge, read_many, size_of
from mpp.sources.files import NotAFile, Outside
from mpp.sources.fingerprint import fingerprint
from mpp.sources.hub_dataset import OpenedDataset
from mpp.sources.opening import has_split, open_source, open_splits

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def pictures(encode):
    """Twenty PNG files of one grey each."""
    return [encode(np.full((8, 8, 3), number * 10, dtype=np.uint8)) for number in range(20)]


@pytest.fixture
def made(pictures):
    """`made(start, stop)`: a dataset of pictures in three named classes, the last image first."""

    def make(start=0, stop=20, **columns):
        numbers = range(stop - 1, start - 1, -1)
        features = {"id": datasets.Value("int64"), "image": datasets.Image()}
        held = {"id": list(numbers), "image": [{"bytes": pictures[n], "path": f"{n}.png"} for n in numbers]}
        if not columns:
            features["label"] = datasets.ClassLabel(names=["ant", "bee", "cat"])
            held["label"] = [n % 3 for n in numbers]
        for name, (feature, values) in columns.items():
            features[name], held[name] = feature, [values[n] for n in numbers]
        return datasets.Dataset.from_dict(held, features=datasets.Features(features))

    return make


def write_parquet(folder, **parts):
    folder.mkdir(exist_ok=True)
    for name, part in parts.items():
        part.to_parquet(str(folder / f"{name}-00000-of-00001.parquet"))
    return folder


def refused(spec, split="train"):
    with pytest.raises(SourceError) as caught:
        open_source(spec, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def all_read(source):
    return [source.read(i) for i in range(len(source))]


@pytest.fixture(params=["saved", "parquet"])
def split_in_two(request, made, tmp_path):
    """The source string of a dataset with twelve images to train and eight to test."""
    folder = tmp_path / "held"
    if request.param == "saved":
        datasets.DatasetDict(train=made(0, 12), test=made(12, 20)).save_to_disk(str(folder))
    else:
        write_parquet(folder, train=made(0, 12), test=made(12, 20))
    return f"hf:{folder}"


def test_splits(split_in_two, pictures):
    assert has_split(split_in_two)
    train, test = open_source(split_in_two), open_source(split_in_two, "test")
    assert all_read(train) == [(pictures[n], n % 3) for n in range(11, -1, -1)]
    assert all_read(test) == [(pictures[n], n % 3) for n in range(19, 11, -1)]
    assert train.classes == test.classes == ("ant", "bee", "cat")
    assert test.labels().tolist() == [n % 3 for n in range(19, 11, -1)]
    assert test.labels().dtype == np.int64
    assert train.describe() == "12 images in 3 classes; the split train alone"
    saved, parquet = (Path(split_in_two[3:]).glob(name) for name in ("train/*.arrow", "train-*"))
    (file,) = (*saved, *parquet)
    assert train.where(3) == f"row 3 of {file} (8.png)"
    for index in (-1, 12):
        with pytest.raises(IndexError):
            train.read(index)


def test_a_data_set_is_opened_once_for_both_splits(split_in_two, monkeypatch):
    opened = []
    for name in ("load_from_disk", "load_dataset_builder"):
        real = getattr(datasets, name)
        monkeypatch.setattr(datasets, name, lambda *args, real=real, **more: opened.append(args) or real(*args, **more))
    splits = open_splits(split_in_two)
    assert (len(splits["train"]), len(splits["test"])) == (12, 8)
    assert len(opened) == (
        1 if opened[0][0] == "parquet" else 2
    )  # the builder of both splits, or each of the saved ones


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


def test_one_split_by_name(split_in_two):
    source = open_source(f"{split_in_two}:test")
    assert all_read(source) == all_read(open_source(split_in_two, "test"))
    assert not has_split(f"{split_in_two}:test")
    assert "has no test split of its own" in refused(f"{split_in_two}:test", "test")
    assert "has no split 'tset' but the splits train, test; choose one of them" in refused(f"{split_in_two}:tset")


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


def test_one_saved_dataset(made, tmp_path, pictures):
    made().save_to_disk(str(tmp_path / "one"))
    spec = f"hf:{tmp_path / 'one'}"
    assert not has_split(spec)
    source = open_source(spec)
    assert source.describe() == "20 images in 3 classes"
    assert source.read(0) == (pictures[19], 1)
    assert "has no split 'test' but no splits" in refused(f"{spec}:test")


def test_validation_is_held_out_where_there_is_no_test(made, tmp_path):
    datasets.DatasetDict(train=made(0, 12), validation=made(12, 20)).save_to_disk(str(tmp_path / "v"))
    assert len(open_source(f"hf:{tmp_path / 'v'}", "test")) == 8
    datasets.DatasetDict(one=made(0, 12), two=made(12, 20)).save_to_disk(str(tmp_path / "w"))
    assert not has_split(f"hf:{tmp_path / 'w'}")
    assert "has the splits one, two and none called train" in refused(f"hf:{tmp_path / 'w'}")
    datasets.DatasetDict(one=made(0, 12)).save_to_disk(str(tmp_path / "x"))
    assert open_source(f"hf:{tmp_path / 'x'}").describe() == "12 images in 3 classes"


def test_a_copy_of_parquet_that_was_touched_makes_room_for_the_next(made, tmp_path, pictures, monkeypatch):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mpp.sources.hub_dataset.use", lambda *names: None)  # by another process, that is
    folder = write_parquet(tmp_path / "rows", train=made())
    (tmp_path / "more").mkdir()
    write_parquet(tmp_path / "more" / "rows", train=made())
    open_source(f"hf:{tmp_path}/more/rows")
    for second in range(1, 4):
        for path in folder.rglob("*.parquet"):
            os.utime(path, (second, second))
        assert len(open_source(f"hf:{folder}")) == len(pictures)
        assert [entry.kind for entry in entries()] == ["datasets"] * 2
    monkeypatch.setenv("MPP_CACHE_LIMIT", "1kB")
    os.utime(path)
    with pytest.raises(SourceError, match=r"a copy of .*rows takes .*, of the 1 kB that MPP_CACHE_LIMIT allows"):
        open_source(f"hf:{folder}")


def test_parquet_that_is_written_again_is_read_again(made, tmp_path, pictures):
    folder = write_parquet(tmp_path / "p", train=made(0, 12))
    first = open_source(f"hf:{folder}")
    write_parquet(folder, train=made(0, 20))
    os.utime(folder / "train-00000-of-00001.parquet", ns=(0, 10**9))
    second = open_source(f"hf:{folder}")
    assert [len(first), len(second)] == [12, 20]
    assert second.read(0)[0] == pictures[19]


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


def test_a_saved_data_set_names_no_file_outside_its_folder(made, tmp_path):
    datasets.DatasetDict(train=made(0, 12), test=made(12, 20)).save_to_disk(str(tmp_path / "d"))
    made().save_to_disk(str(tmp_path / "other"))
    listed = (tmp_path / "d" / "dataset_dict.json").read_text()
    (tmp_path / "d" / "dataset_dict.json").write_text(listed.replace('"test"', '"../other"'))
    assert "names '../other', outside of its folder" in refused(f"hf:{tmp_path / 'd'}:../other")
    (tmp_path / "d" / "dataset_dict.json").write_text(listed)
    state = tmp_path / "d" / "train" / "state.json"
    other = next((tmp_path / "other").glob("*.arrow"))
    for name in (str(other), f"../../other/{other.name}"):
        held = json.loads(state.read_text())
        held["_data_files"] = [{"filename": name}]
        state.write_text(json.dumps(held))
        assert f"names '{name}', outside of its folder, and is not read" in refused(f"hf:{tmp_path / 'd'}")


def test_a_data_set_of_the_hub_reads_nothing_of_this_machine(pictures, tmp_path, monkeypatch):
    """As `datasets` opens one by name, whose author lists files or writes paths."""
    private, downloads = tmp_path / "private", tmp_path / "downloads"
    for folder in (private, downloads):
        folder.mkdir()
        (folder / "a.png").write_bytes(pictures[0])
    load = datasets.load_dataset_builder
    cache = {"cache_dir": str(tmp_path / "cache")}
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", downloads)
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name: load("imagefolder", data_dir=str(private), **cache)
    )
    assert f"lists {private / 'a.png'}, a file of this machine, and is not read" in refused("hf:somebody/some")
    monkeypatch.setattr(OpenedDataset, "_check_files", lambda self: None)  # the files stand for those that are fetched
    with pytest.raises(OSError, match="outside of the data set"):
        open_source("hf:somebody/some").read(0)
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name: load("imagefolder", data_dir=str(downloads), **cache)
    )
    assert open_source("hf:somebody/some").read(0) == (pictures[0], None)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    held = pa.array([{"bytes": None, "path": str(downloads / "a.png")}, {"bytes": None, "path": "private/a.png"}], kind)
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"image": held}), tmp_path / "rows" / "train.parquet")
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name: load("parquet", data_dir=str(tmp_path / "rows"), **cache)
    )
    monkeypatch.chdir(tmp_path)
    # An author's own paths lead neither there nor into the working folder.
    for index, text in enumerate(
        ("outside of the data set", r"No such file .*datasets--somebody--some/private/a\.png")
    ):
        with pytest.raises(OSError, match=text):
            open_source("hf:somebody/some").read(index)


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


def test_folders_that_are_no_dataset(made, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds neither Parquet files nor a saved dataset" in refused(f"hf:{tmp_path / 'empty'}")
    assert f"there is no folder {tmp_path / 'none'}; check the path" in refused(f"hf:{tmp_path / 'none'}")
    folder = write_parquet(tmp_path / "cut", train=made())
    path = folder / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"cannot read {folder} (" in refused(f"hf:{folder}")
    made().save_to_disk(str(tmp_path / "saved"))
    for arrow in (tmp_path / "saved").glob("*.arrow"):
        arrow.write_bytes(arrow.read_bytes()[:100])
    assert f"cannot read {tmp_path / 'saved'} (" in refused(f"hf:{tmp_path / 'saved'}")
    made().select([]).save_to_disk(str(tmp_path / "none-left"), num_shards=1)
    assert "has no rows; check it" in refused(f"hf:{tmp_path / 'none-left'}")
    made(label=(INTEGER, [-7] * 20)).save_to_disk(str(tmp_path / "below"))
    assert "column label: there is a label -7; labels count classes from 0" in refused(f"hf:{tmp_path / 'below'}")


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


def test_a_name_without_a_connection(monkeypatch, capfd):
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    text = refused("hf:somebody/some-pictures:train")
    assert "there is no folder somebody/some-pictures, nor can it be had from the Hugging Face hub" in text
    assert text.endswith("; check the name and the connection")
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed(made, tmp_path, capfd):
    datasets.enable_progress_bars()
    folder = write_parquet(tmp_path / "p", train=made())
    capfd.readouterr()
    open_source(f"hf:{folder}")
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "the package datasets is missing (" in refused(f"hf:{tmp_path}")
    assert refused(f"hf:{tmp_path}").endswith(f": {install('hf')}")


def test_home_is_expanded(made, tmp_path, monkeypatch):
    made().save_to_disk(str(tmp_path / "pictures"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("hf:~/pictures")) == 20
    assert not Path("~").exists()


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
