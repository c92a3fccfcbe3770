"""What goes from the cache, and what stays: by age, by use, by its name."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpp.errors import ConfigError
from mpp.system.cache import KINDS, clear, drop, entries, limit_of, make_room, parse_limit, shown_size, use
from mpp.system.files import write_whole

KEYS = [f"{number:032x}" for number in range(1, 9)]
SIZE = 2**16
FOREIGN = ["notes.txt", "photo.index", f"{KEYS[0]}.jpg", "features/mine.npz", "hf/readme.md", f".{KEYS[0]}.tar"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what is somebody else's in it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MPP_CACHE", str(folder))
    monkeypatch.setenv("MPP_CACHE_LIMIT", "none")
    for name in FOREIGN:
        put(folder / name, age=10**6)
    (folder / "link.tar").symlink_to(tmp_path)
    return folder


def put(path: Path, age: float = 0, size: int = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    return path


@pytest.fixture
def filled(cache: Path) -> Path:
    """One of each kind, in the order of their age: the oldest first."""
    one, two, three, four, five, six, *_ = KEYS
    ages = {f"{one}.index": 800, f"{two}.tar": 700, f"{two}.index": 700, f"{three}.part": 600, f"{three}.sums": 600}
    ages |= {f"{four}.pixels": 500, f"{four}.sizes.npy": 500, f"features/{five}{five}.npz": 400}
    for name, age in (ages | {"hf/parquet/default-1/0.0.0/a.arrow": 300, f".{six}.tar-0123456789ab": 200}).items():
        put(cache / name, age)
    for path in (cache / "hf").rglob("*"):
        os.utime(path, (path.stat().st_mtime, cache.stat().st_mtime - 300))
    return cache


def kinds() -> list[str]:
    return [entry.kind for entry in entries()]


def total() -> int:
    return sum(entry.size for entry in entries())


def assert_foreign_is_left(cache: Path) -> None:
    assert all((cache / name).stat().st_size == SIZE for name in FOREIGN)
    assert (cache / "link.tar").is_symlink()


def test_the_oldest_goes_first_and_indices_last(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = []
    while total():
        before = kinds()
        monkeypatch.setenv("MPP_CACHE_LIMIT", str(total() - 1))
        make_room(0)
        gone += [kind for kind in before if kind not in kinds()]
    assert gone == ["left-over", "unpacked", "kept", "pixels", "features", "datasets", "index"]
    assert_foreign_is_left(filled)


def test_nothing_goes_that_need_not(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (filled / f".{KEYS[5]}.tar-0123456789ab").unlink()
    before = kinds()
    assert make_room(SIZE) > SIZE
    monkeypatch.setenv("MPP_CACHE_LIMIT", str(total() + SIZE))
    assert make_room(SIZE) == SIZE
    assert kinds() == before
    make_room(SIZE + 1)
    assert [kind for kind in before if kind not in kinds()] == ["unpacked"]


def test_a_disk_that_is_full_is_a_limit(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, whole = shutil.disk_usage(filled), total()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=(whole - total()) / 0.95))
    make_room(4 * SIZE)  # two leave 5 files' room
    assert kinds() == ["index", "pixels", "features", "datasets"]
    with pytest.raises(OSError, match=r"a lot takes 1 TB, .* has room for") as caught:
        make_room(10**12, "a lot")
    assert caught.value.errno == errno.ENOSPC
    assert kinds() == ["index", "pixels", "features", "datasets"]  # in vain nothing goes


def test_more_than_the_limit_is_refused_before_anything_goes(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPP_CACHE_LIMIT", "1MB")
    with pytest.raises(OSError, match=r"an array takes 1\.5 MB, of the 1 MB that MPP_CACHE_LIMIT allows"):
        make_room(1_500_000, "an array")
    assert len(kinds()) == 7


_USER = """
import sys
from mpp.system.cache import use
use(*sys.argv[1:])
print("ready", flush=True)
sys.stdin.read()
"""


def test_what_lies_there(filled: Path) -> None:
    found = {entry.kind: entry for entry in entries()}
    assert list(found) == ["index", "unpacked", "kept", "pixels", "features", "datasets", "left-over"]
    assert sum(path.is_file() for entry in found.values() for path in entry.paths) == 9
    for kind, number in {"index": 1, "unpacked": 2, "kept": 2, "pixels": 2, "features": 1, "left-over": 1}.items():
        assert found[kind].size == number * SIZE
    assert found["datasets"].size >= SIZE
    assert not any(entry.busy for entry in found.values())
    clear(KINDS)
    with (filled / f"{KEYS[0]}.part").open("wb") as file:
        file.truncate(2**31)
    assert total() < 2**20  # a hole takes nothing
    for suffix in ("pixels", "sizes.npy", "pixels.json", "pixels.npy", "bad.npy"):  # the last three of older releases
        put(filled / f".{KEYS[5]}.{suffix}-0123456789ab", 200)
    assert kinds() == ["kept", *5 * ["left-over"]]


LIMITS = {"1000": 1000, "200GB": 200 * 10**9, "1.5 TiB": 3 * 2**39, "2k": 2000, "0": 0, "none": None}


def test_limits_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {text: parse_limit(text, tmp_path, "x") for text in LIMITS} == LIMITS
    disk = shutil.disk_usage(tmp_path).total
    assert parse_limit("50%", tmp_path / "not" / "there", "x") == disk // 2
    monkeypatch.delenv("MPP_CACHE_LIMIT", raising=False)
    assert limit_of(tmp_path) == int(0.8 * disk)
    for text in ("some", "5x", "-1", "1e9", "GB", "50%B"):
        with pytest.raises(ConfigError, match=rf"--limit '{text}' is no size; write e\.g\. 200GB"):
            parse_limit(text, tmp_path, "--limit")
    shown = {0: "0 bytes", 999: "999 bytes", 1000: "1 kB", 123_456_789: "123 MB", 2e12: "2 TB", 5e15: "5,000 TB"}
    assert {size: shown_size(size) for size in shown} == shown


@contextlib.contextmanager
def user(*names: str):
    words = [sys.executable, "-c", _USER, *names]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_what_a_living_process_uses_stays(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with user(KEYS[1], KEYS[3], "hf/parquet/default-1"):
        for path in (filled / "in_use").iterdir():  # not young any more
            os.utime(path, (0, 0))
        busy = {entry.kind for entry in entries() if entry.busy}
        assert busy == {"unpacked", "pixels", "datasets"}
        monkeypatch.setenv("MPP_CACHE_LIMIT", "1MB")
        make_room(10**6 - sum(entry.size for entry in entries() if entry.busy))
        assert set(kinds()) == busy
        with pytest.raises(OSError, match=r"MPP_CACHE_LIMIT allows, .* of them in use"):
            make_room(10**6)
        assert clear(["unpacked", "pixels", "datasets"]) == []
        drop([KEYS[1]])
        assert set(kinds()) == busy
    for path in (filled / "in_use").iterdir():  # killed: its lock is gone
        os.utime(path, (0, 0))
    assert {entry.kind for entry in clear(["unpacked", "pixels", "datasets"])} == busy
    assert not list((filled / "in_use").iterdir())
    assert_foreign_is_left(filled)


def test_what_this_process_or_one_before_uses(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with user(KEYS[1]) as process:
        process.communicate("")  # it ends by itself, and leaves nothing but a new time
    assert not list((filled / "in_use").iterdir())
    monkeypatch.setenv("MPP_CACHE_LIMIT", str(total() - 3 * SIZE))
    make_room(0)
    assert set(kinds()) == {"index", "unpacked", "pixels", "features", "datasets"}
    use(KEYS[3])
    use(KEYS[3], KEYS[0])
    assert {entry.kind for entry in entries() if entry.busy} == {"index", "pixels"}
    clear(["index", "pixels", "unpacked"])
    assert set(kinds()) == {"index", "pixels", "features", "datasets"}


def test_what_is_being_written_stays(cache: Path) -> None:
    def write(file) -> None:
        file.write(bytes(SIZE))
        file.flush()
        (half,) = (path for path in cache.iterdir() if path.name.startswith(f".{KEYS[6]}.tar-"))
        os.utime(half, (0, 0))
        make_room(0)
        assert clear(["left-over"]) == []
        assert half.exists()

    write_whole(cache / f"{KEYS[6]}.tar", write)
    assert (cache / f"{KEYS[6]}.tar").stat().st_size == SIZE


def test_clear_by_kind_and_by_limit(filled: Path) -> None:
    assert [entry.kind for entry in clear(["features"])] == ["features"]
    assert [entry.kind for entry in clear(["kept", "pixels"], total() - 1)] == ["kept"]
    assert [entry.kind for entry in clear(KINDS, total() - 2 * SIZE)] == ["left-over", "unpacked"]
    clear(KINDS)
    assert kinds() == []
    assert_foreign_is_left(filled)


def test_without_locks_nothing_is_removed(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setenv("MPP_CACHE_LIMIT", str(total() - 1))
    with pytest.raises(OSError, match="MPP_CACHE_LIMIT"):
        make_room(0)
    with pytest.raises(OSError, match="has no locks, so that nobody knows what is in use"):
        clear(["pixels"])
    assert len(kinds()) == 7


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "file" / "cache"))
    use(KEYS[0])
    drop([KEYS[0]])
    assert entries() == []
    with pytest.raises(NotADirectoryError):
        make_room(1)
