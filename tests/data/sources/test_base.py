import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import tracemalloc

import numpy as np
import pytest

from mpp.data.sources.base import ListSource, SourceError, Subset, TooLarge, read_many, size_of, where
from mpp.data.sources.files import FileSource, NotAFile, PathTable, read_file
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.names import printable
from mpp.data.sources.opening import open_source
from tests.data.sources.tar_shards import write_shards, write_tar


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)


def test_subset(images):
    source = ListSource(list(images), [0, 1, 0, 1, 2], ("x", "y", "z"))
    subset = Subset(source, [4, 1])
    assert len(subset) == 2
    assert subset.classes == ("x", "y", "z")
    assert subset.labels().tolist() == [2, 1]
    np.testing.assert_array_equal(subset.read(0)[0], images[4])
    assert subset.read(1)[1] == 1
    assert subset.describe() == "2 of 5 images in 3 classes"
    assert Subset(subset, [1]).labels().tolist() == [1]
    assert len(Subset(source, [])) == 0
    with pytest.raises(IndexError):
        Subset(source, [5])
    with pytest.raises(IndexError):
        subset.read(2)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0, 1, 2, 3], r"the labels are int64 \(4,\); expected 5 whole numbers from 0"),
        ([0.0, 1.0, np.nan, 0.0, 0.0], r"the labels are float64 \(5,\)"),
        (["a", "b", "a", "b", "a"], r"the labels are <U1 \(5,\)"),
        ([0, 1, -2, 0, 0], "there is a label -2"),
        ([0, 1, 2**24, 0, 0], "the label 16777216 would mean 16,777,217 classes, of 5 images"),
    ],
)
def test_labels_in_memory_are_checked(labels, text, images):
    with pytest.raises(SourceError, match=text):
        ListSource(images, labels)
    with pytest.raises(SourceError, match="there is a label 2, but 2 classes; check the labels"):
        ListSource(images, [0, 1, 2, 0, 0], ("x", "y"))


def test_sources_do_not_count_from_the_end(picture_folder, images, tmp_path):
    np.save(tmp_path / "a.npy", images)
    folder = picture_folder("1.png")
    for source in (ListSource(images), open_source(f"folder:{folder}"), open_source(f"array:{tmp_path / 'a.npy'}")):
        for index in (-1, len(source)):
            with pytest.raises(IndexError):
                source.read(index)


def test_paths_come_back_as_they_were():
    paths = ["", "a", "b/ü€.png", "\udcff\udc80.png", "line\nbreak", "x" * 5000, "last"]
    table = PathTable(iter(paths))
    assert [table[i] for i in range(len(table))] == paths
    copy = pickle.loads(pickle.dumps(table))
    assert [copy[i] for i in range(len(copy))] == paths
    assert len(PathTable([])) == 0
    for index in (-1, len(paths)):
        with pytest.raises(IndexError):
            table[index]


@pytest.mark.slow
def test_a_table_takes_the_paths_own_bytes_and_eight_more():
    number = 300_000
    tracemalloc.start()
    table = PathTable(f"class_{i % 1000:04d}/{i:09d}.jpg" for i in range(number))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    length = len("class_0000/000000000.jpg")
    assert held / number < 1.15 * length + 8 + 1
    # At most the growing buffer, the ends twice, and one piece of strings on the way.
    assert peak < number * (1.15 * length + 17) + 65_536 * 200
    assert table[123_456] == "class_0456/000123456.jpg"


TEN_MILLION = """
import os, time
import numpy as np
from mpp.data.sources.files import PathTable

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

number = 10_000_000
before = resident()
table = PathTable(f"class_{i % 1000:04d}/{i:09d}.jpg" for i in range(number))
print((resident() - before) / number)
wanted = np.random.default_rng(0).integers(0, number, 100_000).tolist()
began = time.perf_counter()
found = [table[index] for index in wanted]
print((time.perf_counter() - began) / len(wanted))
assert found == [f"class_{i % 1000:04d}/{i:09d}.jpg" for i in wanted]
"""


@pytest.mark.slow
def test_ten_million_paths():
    # In a process of its own, whose memory no other test has had a part in.
    done = subprocess.run([sys.executable, "-c", TEN_MILLION], capture_output=True, text=True, check=True)
    held, seconds = map(float, done.stdout.split())
    assert held < 24 * 1.15 + 8 + 8
    assert seconds < 50e-6


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/a/ü €.png", "/a/ü €.png"),
        ("/a/\u3000wide.png", "/a/\u3000wide.png"),
        ("two\nlines\r\x1b[1m\t", r"two\nlines\r\x1b[1m\t"),
        ("\udcff\udc80.png", r"\xff\x80.png"),
        ("\u2028\x00", r"\u2028\x00"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_a_file_is_named_by_its_real_path(tmp_path):
    name = "a\n\udcff.png"
    (tmp_path / name).write_bytes(b"x")
    source = FileSource("folder:x", tmp_path, [name])
    assert source.where(0) == f"{tmp_path}/{name}"
    assert source.read(0) == (b"x", None)


def test_what_is_no_file_is_never_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    names = {"fifo.png": "a FIFO", "folder.png": "a folder", "/dev/null": "a device"}
    source = FileSource("folder:x", tmp_path, [*names, "none.png"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_, **__: 1 / 0)
        for index, (name, kind) in enumerate(names.items()):
            with pytest.raises(NotAFile) as caught:
                source.read(index)
            assert str(caught.value) == f"{tmp_path / name} is {kind}, not a file"
        with pytest.raises(FileNotFoundError):
            source.read(3)


def test_a_file_that_becomes_a_fifo_between_looking_and_opening(tmp_path, monkeypatch):
    path = str(tmp_path / "1.png")
    with open(path, "wb") as file:
        file.write(b"x")
    look = os.stat

    def look_and_swap(*args, **options):
        found = look(*args, **options)
        os.unlink(path)  # noqa: PTH108
        os.mkfifo(path)
        return found

    monkeypatch.setattr(os, "stat", look_and_swap)
    raised = []

    def read():
        try:
            read_file(path)
        except NotAFile as error:
            raised.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    monkeypatch.undo()
    assert raised == [f"{path} is a FIFO, not a file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "1.png").write_bytes(b"x")
    (tmp_path / "1.png").chmod(0)
    with pytest.raises(PermissionError):
        FileSource("folder:x", tmp_path, ["1.png"]).read(0)


def test_labels_of_some(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    source = FileSource("csv:x", tmp_path, ["a", "b"], [-1, 0], ("only",))
    assert [source.read(i) for i in range(2)] == [(b"a", None), (b"b", 0)]
    assert source.labels().tolist() == [-1, 0]


def test_many_at_once(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    source = FileSource("folder:x", tmp_path, ["a", "gone"], [1, 0], ("x", "y"))
    first, second, third = read_many(Subset(source, [1, 0]), [1, 0, 1])
    assert first == third == (b"a", 1)
    assert isinstance(second, FileNotFoundError)

    class Fast(ListSource):
        def read_many(self, indices):
            return [("fast", index) for index in indices]

    assert [*read_many(Subset(Fast([b"0", b"1", b"2"]), [2, 0]), [0, 1])] == [("fast", 2), ("fast", 0)]


def too_large(found):
    return isinstance(found, TooLarge)


@pytest.mark.parametrize("kind", ["folder", "csv", "shards", "mixture", "subset", "array of bytes"])
def test_images_of_too_many_bytes_are_not_read(kind, tmp_path, monkeypatch):
    """Of any source: a file of 64 GB, or a member larger than the limit, costs no more than a question."""
    write_shards(tmp_path, number=1, each=2)
    with tarfile.open(tmp_path / "s-000.tar", "a") as tar:
        info = tarfile.TarInfo("large.jpg")
        info.size = 1000
        tar.addfile(info, io.BytesIO(bytes(1000)))
    (tmp_path / "a.jpg").write_bytes(b"small")
    with (tmp_path / "b.jpg").open("wb") as file:
        file.truncate(2**36)
    (tmp_path / "list.csv").write_text("a.jpg\nb.jpg\n")
    specs = {
        "folder": f"folder:{tmp_path}",
        "csv": f"csv:{tmp_path}/list.csv",
        "shards": f"shards:{tmp_path}/s-000.tar",
        "mixture": f"csv:{tmp_path}/list.csv + shards:{tmp_path}/s-000.tar",
    }
    source = open_source(specs.get(kind, specs["csv"]))
    if kind == "subset":
        source = Subset(source, [1, 0])
    elif kind == "array of bytes":  # in memory already
        assert [found for found, _ in read_many(ListSource([bytes(100)]), [0], most=10)] == [bytes(100)]
        return
    found = list(read_many(source, range(len(source)), most=100))
    expected = {
        "folder": [False, True],
        "csv": [False, True],
        "shards": [False, False, True],
        "mixture": [False, True, False, False, True],
        "subset": [True, False],
    }
    assert [too_large(each) for each in found] == expected[kind]
    reason = str(next(filter(too_large, found)))
    assert reason == f"{'0.0' if kind == 'shards' else '68,719.5'} MB, more than data.max_image_mb 0 allows"
    assert [size_of(source, i) for i in range(len(source)) if not too_large(found[i])] == [
        len(each[0]) for each in found if not too_large(each)
    ]


def test_what_is_read_at_once_has_no_more_bytes_than_one_image_may(monkeypatch):
    groups = []

    class Fast(ListSource):
        def size(self, index):
            return len(self._images[index])

        def read_many(self, indices):
            groups.append(list(indices))
            return [self.read(index) for index in indices]

    source = Fast([bytes(n) for n in (40, 40, 40, 101, 1, 100)])
    found = list(read_many(source, range(6), most=100))
    assert groups == [[0, 1], [2], [4], [5]]
    assert [too_large(each) or len(each[0]) for each in found] == [40, 40, 40, True, 1, 100]
    groups.clear()
    monkeypatch.setattr(Fast, "size", lambda self, index: pytest.fail("without a limit, no size is asked for"))
    list(read_many(source, range(6)))
    assert groups == [[0, 1, 2, 3, 4, 5]]


def test_an_image_that_memory_does_not_hold_is_its_own_fault():
    class Greedy(ListSource):
        def read(self, index):
            if index == 1:
                raise MemoryError
            return super().read(index)

    class AtOnce(Greedy):
        def read_many(self, indices):
            raise MemoryError

    for source in (Greedy([b"0", b"1", b"2"]), AtOnce([b"0", b"1", b"2"])):
        first, second, third = read_many(source, range(3))
        assert (first, third) == ((b"0", None), (b"2", None))
        assert too_large(second)
        assert str(second) == "takes more memory than there is"


def test_every_source_names_its_images(picture_folder, images, tmp_path):
    folder = picture_folder("1.png", "2.png")
    np.savez(tmp_path / "a.npz", images=images)
    (tmp_path / "l.csv").write_text("1.png\n2.png\n")
    write_tar(tmp_path / "s.tar", [("a.jpg", b"a"), ("b.jpg", b"b")])

    class Plain:
        name, classes = "plain", None
        __len__, read, labels, describe = (lambda self: 2), None, None, None

    specs = ("array:a.npz", "shards:s.tar", "csv:l.csv")
    array, shard, file = (open_source(spec.replace(":", f":{tmp_path}/")) for spec in specs)
    whole = ListSource(images, name="cifar10:/x", split="test")
    named = {
        array: f"image 1 of {tmp_path / 'a.npz'}",
        shard: f"{tmp_path / 's.tar'}, byte 1536",
        file: str(tmp_path / "2.png"),
        open_source(f"folder:{folder}"): str(folder / "2.png"),
        whole: "image 1 of the test split of cifar10:/x",
        ListSource(images): "image 1 of list",
        Plain(): "image 1 of plain",
        Subset(whole, [3, 4]): "image 4 of the test split of cifar10:/x",
        Subset(Plain(), [0, 1]): "image 1 of plain",
        MixtureSource("m", [shard, file]): f"{tmp_path / 's.tar'}, byte 1536",
    }
    assert {source: where(source, 1) for source in named} == named
