"""What is kept of remote shards in the cache: by which object, and where there is no room for it."""

import errno
import os

import pytest

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from mpp.data.sources import kept
from mpp.system.cache import entries
from tests.data.sources.reading import all_read
from tests.data.sources.tar_shards import opened, refused, write_shards, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


def test_what_is_kept_is_fetched_once(server, own_cache):
    write_shards(server.folder)
    pattern = f"{server.url}/s-{{000..002}}.tar"
    source = opened(pattern, keep=True)
    expected = all_read(opened(f"{server.folder}/*.tar"))
    assert source.read_many(range(8)) == expected[:8]
    again = opened(pattern, keep=True)
    server.asked.clear()
    assert source.read_many(range(8)) == expected[:8]
    assert again.read(3) == expected[3]
    assert server.asked == []
    assert again.read_many([3, 9]) == [expected[3], expected[9]]
    assert server.asked == [("/s-002.tar", "bytes=2560-2569")]
    # A crash between data and its sum, or after a torn write: the sum does not fit.
    for part in own_cache.glob("*.part"):
        part.write_bytes(b"\0" * part.stat().st_size)
    assert opened(pattern, keep=True).read_many(range(12)) == expected
    for path in [*own_cache.glob("*.part"), *own_cache.glob("*.sums")]:
        path.write_bytes(path.read_bytes()[:7])
    assert opened(pattern, keep=True).read_many(range(12)) == expected


@pytest.mark.parametrize("tag", ["", "Sun, 29 Nov 2026 08:00:00 GMT"])
def test_objects_that_differ_in_their_query_alone(server, own_cache, tag):
    """Of one size and, to the server, of one time: each has its own index and its own bytes."""
    server.etags = tag
    for number, names in enumerate((["a.jpg", "b.txt"], ["a.txt", "b.jpg"])):
        write_tar(server.folder / f"{number}", [(name, b"%d" % number) for name in names])
    assert (server.folder / "0").stat().st_size == (server.folder / "1").stat().st_size
    server.naming = lambda path: "/" + path.partition("id=")[2].partition("&")[0]
    first = opened(f"{server.url}/get?id=0&Signature=s", keep=True)
    second = opened(f"{server.url}/get?Signature=t&id=1", keep=True)
    assert first.read_many([0]) == [(b"0", None)]
    assert second.read_many([0]) == [(b"1", None)]
    assert [source.where(0).rpartition(" ")[2] for source in (first, second)] == ["512", "1536"]
    assert not set(first.state(True)) & set(second.state(True))
    assert not set(first.state(False)) & set(second.state(False))


@pytest.mark.parametrize("etags", [True, False])
def test_a_signature_that_changes_is_no_other_object(server, own_cache, etags):
    server.etags = etags
    write_shards(server.folder)
    addresses = [f"{server.url}/s-00{number}.tar" for number in range(3)]
    # Of the signatures the last comes first in the alphabet, once and not the other time.
    first = opened(" ".join(f"{url}?Expires={9 - n}&token=a" for n, url in enumerate(addresses)), keep=True)
    images = first.read_many(range(12))
    server.asked.clear()
    second = opened(" ".join(f"{url}?Expires={n}&token=b" for n, url in enumerate(addresses)), keep=True)
    assert second.read_many(range(12)) == images
    assert {wanted for path, wanted in server.asked if ".tar?" in path} == {"bytes=0-0"}
    assert list(first.state(True)) == list(second.state(True))
    assert len({path.stem for path in own_cache.glob("*.index")}) == 3


def test_keeping_in_a_cache_that_is_full(server, own_cache, monkeypatch):
    monkeypatch.setattr(kept, "_AT_ONCE", 100)
    monkeypatch.setenv("MPP_CACHE_LIMIT", "none")
    write_shards(server.folder)
    source = opened(f"{server.url}/s-{{000..002}}.tar", keep=True)
    images = source.read_many(range(8))
    monkeypatch.setattr(kept, "make_room", refuse_room)
    assert source.read_many(range(12)) == opened(f"{server.url}/s-{{000..002}}.tar").read_many(range(12))
    server.asked.clear()
    assert source.read_many(range(12))[:8] == images
    assert len(server.asked) > 0  # the last ones were not kept, those of before are
    assert all("s-002" in path for path, _ in server.asked)


def refuse_room(size):
    raise OSError(errno.ENOSPC, "full")


def test_what_is_kept_and_indexed_counts_as_used(server, own_cache):
    write_shards(server.folder, 1)
    for keep in (True, True):
        source = opened(f"{server.url}/s-000.tar", keep=keep)
        source.read(0)
        assert {entry.kind: entry.busy for entry in entries()} == {"index": True, "kept": True}
        assert min(entry.used for entry in entries()) > 1
        for path in own_cache.glob("*.*"):
            os.utime(path, (0, 0))


def test_keeping_in_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    write_shards(server.folder, 1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "file" / "cache"))
    assert len(opened(f"{server.url}/s-000.tar")) == 4
    assert "set MPP_CACHE" in refused(f"{server.url}/s-000.tar", keep=True)
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    source = opened(f"{server.url}/s-000.tar", keep=True)
    (tmp_path / "cache").rename(tmp_path / "gone")
    assert source.read(1) == source.read(1) == (b"image 0001", 1)
