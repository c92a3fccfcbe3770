import os
import pickle
import subprocess
import sys
import threading

import pytest

from mpp.data.sources.files import FileSource, NotAFile, PathTable, read_file
from mpp.data.sources.names import printable


def test_paths_come_back_as_they_were():
    paths = ["", "a", "b/ü€.png", "\udcff\udc80.png", "line\nbreak", "x" * 5000, "last"]
    table = PathTable(iter(paths))
    assert [table[i] for i in range(len(table))] == list(table) == list(pickle.loads(pickle.dumps(table))) == paths


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
    size, seconds = map(float, done.stdout.split())
    assert size < 24 * 1.15 + 8 * 1.15 + 8
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "1.png").write_bytes(b"x")
    (tmp_path / "1.png").chmod(0)
    with pytest.raises(PermissionError):
        FileSource("folder:x", tmp_path, ["1.png"]).read(0)
