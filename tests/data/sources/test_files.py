import os
import pickle
import threading

import pytest

from mpp.data.sources.files import FileSource, NotAFile, PathTable, read_file
from mpp.data.sources.names import printable
from tests import runs


def test_paths_come_back_as_they_were():
    paths = ["", "a", "b/ü€.png", "\udcff\udc80.png", "line\nbreak", "x" * 5000, "last"]
    table = PathTable(iter(paths))
    assert [table[i] for i in range(len(table))] == list(table) == list(pickle.loads(pickle.dumps(table))) == paths


MILLIONS = """
import os, time
from mpp.data.sources.files import PathTable

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

number, before = 2_000_000, resident()
table = PathTable(f"class_{i % 1000:04d}/{i:09d}.jpg" for i in range(number))
print((resident() - before) / number)
began = time.perf_counter()
assert all(table[i] == f"class_{i % 1000:04d}/{i:09d}.jpg" for i in range(0, number, 101))
print((time.perf_counter() - began) / (number // 101))
"""


@pytest.mark.slow
def test_two_million_paths():
    size, seconds = map(float, runs.finish(["-c", MILLIONS])[0].split())  # no other test's memory is in this process
    assert size < 36
    assert seconds < 50e-6


def test_printable():
    assert printable("/a/ü €\u3000wide.png") == "/a/ü €\u3000wide.png"
    assert printable("two\nlines\r\x1b[1m\t\u2028\x00 \udcff\udc80") == r"two\nlines\r\x1b[1m\t\u2028\x00 \xff\x80"


def test_files_of_any_name_and_labels_of_some(tmp_path):
    names = ["a\n\udcff.png", "b"]
    for name in names:
        (tmp_path / name).write_bytes(os.fsencode(name))
    source = FileSource("csv:x", tmp_path, names, [-1, 0], ("only",))
    assert source.location(0) == f"{tmp_path}/a\n\udcff.png"
    assert [source.read(i) for i in range(2)] == [(b"a\n\xff.png", None), (b"b", 0)]


def test_a_path_that_is_no_file_is_never_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    names = {"fifo.png": "a FIFO", "folder.png": "a folder", "/dev/null": "a device"}
    source = FileSource("folder:x", tmp_path, [*names, "none.png"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_, **__: 1 / 0)
        *found, missing = source.read_many(range(4))
    for (name, kind), error in zip(names.items(), found, strict=True):
        assert isinstance(error, NotAFile)
        assert str(error) == f"{tmp_path / name} is {kind}, not a file"
    assert isinstance(missing, FileNotFoundError)


def test_a_file_that_becomes_a_fifo_between_looking_and_opening(tmp_path, monkeypatch):
    path, look, raised = tmp_path / "1.png", os.stat, []
    path.write_bytes(b"x")

    def look_and_swap(*args, **options):
        found = look(*args, **options)
        os.unlink(path)  # noqa: PTH108
        os.mkfifo(path)
        return found

    def read():
        try:
            read_file(str(path))
        except NotAFile as error:
            raised.append(str(error))

    monkeypatch.setattr(os, "stat", look_and_swap)
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    monkeypatch.undo()
    assert raised == [f"{path} is a FIFO, not a file"]
