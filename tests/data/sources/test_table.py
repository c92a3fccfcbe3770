import csv
import os
import tracemalloc

import numpy as np
import pytest

from mpp.data.sources import table as tables
from mpp.data.sources.opening import open_source, open_splits
from mpp.downstream.labelled import open_labelled
from mpp.system.files import write_csv
from tests.data.sources.reading import locations, refused


@pytest.fixture
def table(picture_folder):
    """`table(text, name="list.csv")`: the source string of such a file beside three pictures."""
    folder = picture_folder("1.png", "deep/2.png", "a,b.png")

    def write(text, name="list.csv"):
        path = folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return f"csv:{path}"

    return write


def settled(spec):
    """The spec, its file of long ago: one that was just written is read again each time."""
    os.utime(spec.removeprefix("csv:"), (1, 1))
    return spec


def test_path_and_label(table, tmp_path):
    source = open_source(table("1.png,dog\ndeep/2.png, cat\n\na.png,dog\n"))
    assert locations(source) == [str(tmp_path / name) for name in ("1.png", "deep/2.png", "a.png")]
    assert source.classes == ("cat", "dog")
    assert source.labels().tolist() == [1, 0, 1]
    assert source.labels().dtype == np.int64
    assert source.read(1) == ((tmp_path / "deep" / "2.png").read_bytes(), 0)
    assert source.describe() == "3 images in 2 classes"
    with pytest.raises(FileNotFoundError):
        source.read(2)


@pytest.mark.parametrize(
    ("text", "labels", "classes"),
    [
        ("1.png\ndeep/2.png\n", None, None),
        ("path\n1.png\n", None, None),
        ("path,label\n1.png,\ndeep/2.png,\n", None, None),
        ("1.png,cat\ndeep/2.png,\n", [0, -1], ("cat",)),
        ("Image,width,Class\n1.png,8,b\ndeep/2.png,8,a\n", [1, 0], ("a", "b")),
        ("target,id,filename\nb,7,1.png\na,8,deep/2.png\n", [1, 0], ("a", "b")),
        ("1.png,3\ndeep/2.png,00\n", [3, 0], ("0", "1", "2", "3")),
        ("1.png,3\ndeep/2.png,-1\n", [3, -1], ("0", "1", "2", "3")),
        ("1.png,cat\ndeep/2.png, -1\n", [0, -1], ("cat",)),
        ("1.png,-1\ndeep/2.png,-1\n", None, None),
        (f"1.png,{'0' * 5000}1\n", [1], ("0", "1")),
        ("1.png,class\ndeep/2.png,label\n", [0, 1], ("class", "label")),  # no header: an image comes first
        ("gone.png,class\n1.png,a\n", [1, 0], ("a", "class")),  # nor here, although the image is gone
        *((f"{name},class\n1.png,a\n", [0], ("a",)) for name in ("img_path", "File Name", "image-name", "imagePath")),
        ("1.png,3\ndeep/2.png,٣\n", [0, 1], ("3", "٣")),
        ('"a,b.png","x, y"\n1.png,"q ""z"""\n', [1, 0], ('q "z"', "x, y")),
        ("\ufeffpath,label\r\n1.png,a\r\ndeep/2.png,b\r\n", [0, 1], ("a", "b")),
        ("path,note,note,label\n1.png,x,y,a", [0], ("a",)),
    ],
)
def test_rows(text, labels, classes, table):
    source = open_source(table(text))
    assert source.classes == classes
    assert (None if source.labels() is None else source.labels().tolist()) == labels
    assert source.read(len(source) - 1)[1] == (None if labels is None or labels[-1] < 0 else labels[-1])
    if labels and -1 in labels:
        assert source.describe().endswith("; 1 without a label")


def test_numbers_of_a_large_set_and_a_picture_called_as_a_header(table, tmp_path):
    assert len(open_source(table("1.png,999\n2.png,99999\n")).classes) == 100_000
    (tmp_path / "image").write_bytes(b"x")
    assert len(open_source(table("image,a\n1.png,b\n"))) == 2


def test_tabs_and_absolute_paths(table, tmp_path):
    spec = table(f"{tmp_path}/1.png\tcat\na,b.png\tdog\n", "list.TSV")
    assert locations(open_source(spec)) == [str(tmp_path / "1.png"), str(tmp_path / "a,b.png")]
    moved = table(f"path,label\n{tmp_path}/1.png,cat\n", "deep/list.csv")
    assert locations(open_source(moved)) == [str(tmp_path / "1.png")]


def test_splits(table):
    splits = open_splits(table("path,label,split\n1.png,b,train\n2.png,c,train\n1.png,a,val\n4.png,c,val\n"))
    train, test = splits["train"], splits["test"]
    assert (train.classes, train.labels().tolist()) == (("b", "c"), [0, 1])
    # As in folders the train split's classes come first, so that they keep their numbers.
    assert (test.classes, test.labels().tolist()) == (("b", "c", "a"), [2, 1])
    assert train.describe() == "2 images in 2 classes; the rows of split train alone"
    both = open_splits(table("path,label,split\n1.png,0,Training\n1.png,2,dev\n1.png,1,test\n"))
    assert [(split, *source.labels()) for split, source in both.items()] == [("train", 0), ("val", 2), ("test", 1)]
    numbers = open_splits(table("path,label,split\n1.png,4,train\n1.png,0,test\n"))
    assert numbers["test"].classes == numbers["train"].classes == ("0", "1", "2", "3", "4")
    for text in ("path,split\n1.png,train\n2.png,train\n", "path,split\n1.png,val\n2.png,test\n3.png,val\n"):
        source = open_source(spec := table(text))  # not split: in the order of the lines
        assert [name.rpartition("/")[2] for name in locations(source)] == [line[:5] for line in text.split()[1:]]
        assert "has no test split of its own" in refused(spec, "test")
    assert "test" not in open_splits(table("path,label\n1.png,a\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("photo,class\n1.png,a\n", "has the columns photo, class; call that of the images path"),
        ("photo,species\n1.png,a\n", "has the columns photo, species; call that of the images path"),
        ("photo\n1.png\n", "has the columns photo; call that of the images path"),
        ("1.png;cat\na,b.png;dog\n", "line 2, has 2 cells"),
        ("1.png;cat\n2.png;dog\n", "the file's folder; is ';' between its columns? Write ','"),
        ("path\tlabel\n1.png\tdog\n", "the file's folder; is '\\t' between its columns? Write ','"),
        ("1.png," + "9" * 5000, "the label 9999999999999999999999999999999999999999 would mean as many classes"),
        ("", "is empty; expected rows of path,label"),
        ("\n\n", "is empty; expected rows of path,label"),
        ("path,label\n", "has a header and no rows"),
        ("1.png,a\n1.png\n", "line 2, has 1 cells, the first row 2; mend the row"),
        ("path,label\n1.png,a\n\n1.png,a,b\n", "line 4, has 3 cells"),
        ("1.png,a,train\n", "has 3 columns and no header; begin it with e.g. path,label"),
        ("path,label,label\n1.png,a,b\n", "has two columns 'label'; rename one"),
        ("path,label\n,a\n", "line 2, has the path ''; write the path of an image"),
        ("1.png,a\n\0,a\n", "line 2, has the path '\\x00'"),
        ("path,split\n1.png,old\n", "line 2, has the split 'old'; write train, val or test"),
        ('1.png,a\n"1.png,a\n', "after line 1: unexpected end of data; mend the row"),
        ("1.png," + "x" * 200_000, "field larger than field limit"),
        ("1.png,naïve\n".encode("latin-1"), "is not UTF-8 after line 0 (invalid continuation byte); save it as UTF-8"),
        ("1.png,123456789012\n", "the label 123456789012 would mean 123,456,789,013 classes, of 1 image"),
    ],
)
def test_errors(text, message, table):
    assert message in refused(table(text))


def test_missing_files(table, tmp_path):
    assert f"there is no file {tmp_path / 'none.csv'}; check the path" in refused(f"csv:{tmp_path / 'none.csv'}")
    assert f"did you mean folder:{tmp_path}?" in refused(f"csv:{tmp_path}")
    assert "is ',' between its columns? Write '\\t'" in refused(table("1.png,cat\n", "list.tsv"))
    missing = "".join(f"{i}.jpg,a\n" for i in range(99))
    assert len(open_source(table(missing + "1.png,a\n"))) == 100
    text = refused(table("x/1.png,a\n"))
    assert f"the first image is not there: {tmp_path / 'x' / '1.png'}; paths start from the file's folder" in text
    text = refused(table(missing + "99.jpg,a\n1.png,a\n"))
    assert f"none of the first 100 images is there, such as {tmp_path / '0.jpg'};" in text


def test_paths_that_the_library_wrote(picture_folder, tmp_path):
    folder = picture_folder("a\nb.png", 'q"uote.png')
    write_csv(tmp_path / "list.csv", [("path", "label"), ("a\nb.png", "x"), ('q"uote.png', "y")])
    source = open_source(f"csv:{folder / 'list.csv'}")
    assert [source.read(i)[1] for i in range(2)] == [0, 1]
    assert source.location(0).endswith("a\nb.png")


@pytest.mark.slow
def test_large_tables_stay_small(table):
    number = 50_000
    rows = "".join(f"{i:07d}.png,class {i % 50}\n" for i in range(number - 1))
    spec = settled(table("path,label\n1.png,class 0\n" + rows))
    open_source(spec)
    tables._cached_table.cache_clear()
    tracemalloc.start()
    source = open_source(spec)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == number
    # Paths of 11 bytes, their ends and labels of 8, labels of 4 and splits of 1 for the next time.
    assert size / number < 1.15 * (11 + 8 + 4 + 1) + 8 + 2
    assert peak < number * (1.15 * (11 + 8 + 4 + 1) + 5 * 8) + 10**6


def test_more_labels_than_classes_can_be(table, monkeypatch):
    monkeypatch.setattr(tables, "_MOST_CLASSES", 1000)
    rows = [f"1.png,caption {i}\n" for i in range(1001)]
    assert len(open_source(table("".join(rows[:-1]))).classes) == 1000
    assert "more than 1,000 different labels, the last 'caption 1000'" in refused(table("".join(rows)))


def test_a_list_is_parsed_once_for_all_of_its_splits(table, monkeypatch):
    parsed, real = [], csv.reader
    monkeypatch.setattr(csv, "reader", lambda *args, **more: parsed.append(1) or real(*args, **more))
    rows = "".join(f"{'1.png,{},train' if i % 3 else 'deep/2.png,{},test'}\n".format("ab"[i % 2]) for i in range(1000))
    spec = table(f"path,label,split\n{rows}")
    assert {split: len(source) for split, source in open_splits(spec).items()} == {"train": 666, "test": 334}
    assert len(parsed) == 1
    assert len(open_labelled(spec).test_indices) == 334
    assert len(parsed) == 2  # it was written a moment ago, and may have been again
    settled(spec)
    for _ in range(3):  # as for training, few-shot and the page in the end
        assert len(open_source(spec)) == 666
        assert len(open_labelled(spec).test_indices) == 334
    assert len(parsed) == 3
    assert len(open_source(settled(table(f"path,label,split\n{rows}1.png,a,test\n")), "test")) == 335
