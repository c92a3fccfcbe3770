import errno
import os

import pytest

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from mpp.data.sources import range_cache
from mpp.system.cache import entries
from tests.data.sources.reading import all_read, opened, read_many, refused, states, write_shards, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_range_is_fetched_once(server, own_cache):
    pattern = f"{server.url}/s-{{000..002}}.tar"
    expected = all_read(opened(f"{write_shards(server.folder)}/*.tar"))
    source = opened(pattern, keep=True)
    assert read_many(source, range(8)) == expected[:8]
    again = opened(pattern, keep=True)
    server.asked.clear()
    assert read_many(source, range(8)) == expected[:8]
    assert again.read(3) == expected[3]
    assert server.asked == []
    assert read_many(again, [3, 9]) == [expected[3], expected[9]]
    assert server.asked == [("/s-002.tar", "bytes=2560-2569")]
    # A crash between data and its sum, or after a torn write: the sum does not fit.
    for part in own_cache.glob("*.part"):
        part.write_bytes(b"\0" * part.stat().st_size)
    assert read_many(opened(pattern, keep=True), range(12)) == expected
    for path in [*own_cache.glob("*.part"), *own_cache.glob("*.sums")]:
        path.write_bytes(path.read_bytes()[:7])
    assert read_many(opened(pattern, keep=True), range(12)) == expected


@pytest.mark.parametrize("tag", ["", "Sun, 29 Nov 2026 08:00:00 GMT"])
def test_objects_that_differ_in_their_query_alone(server, tag):
    """Of one size and, to the server, of one time: each has its own index and its own bytes."""
    server.etags = tag
    for number, names in enumerate((["a.jpg", "b.txt"], ["a.txt", "b.jpg"])):
        write_tar(server.folder / f"{number}", [(name, b"%d" % number) for name in names])
    server.naming = lambda path: "/" + path.partition("id=")[2].partition("&")[0]
    first = opened(f"{server.url}/get?id=0&Signature=s", keep=True)
    second = opened(f"{server.url}/get?Signature=t&id=1", keep=True)
    assert [all_read(first), all_read(second)] == [[(b"0", None)], [(b"1", None)]]
    assert [source.location(0).rpartition(" ")[2] for source in (first, second)] == ["512", "1536"]
    for times in (True, False):
        assert not set(states(first, times)) & set(states(second, times))


@pytest.mark.parametrize("etags", [True, False])
def test_a_signature_that_changes_is_no_other_object(server, own_cache, etags):
    server.etags = etags
    write_shards(server.folder)
    addresses = [f"{server.url}/s-00{number}.tar" for number in range(3)]
    # Of the signatures the last comes first in the alphabet, once and not the other time.
    first = opened(" ".join(f"{url}?Expires={9 - n}&token=a" for n, url in enumerate(addresses)), keep=True)
    images = read_many(first, range(12))
    server.asked.clear()
    second = opened(" ".join(f"{url}?Expires={n}&token=b" for n, url in enumerate(addresses)), keep=True)
    assert read_many(second, range(12)) == images
    assert {wanted for path, wanted in server.asked if ".tar?" in path} == {"bytes=0-0"}
    assert states(first, True) == states(second, True)
    assert len({path.stem for path in own_cache.glob("*.index")}) == 3


def test_a_cache_that_is_full(server, monkeypatch):
    def refuse(size):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(range_cache, "_AT_ONCE", 100)
    monkeypatch.setenv("MPP_CACHE_LIMIT", "none")
    write_shards(server.folder)
    source = opened(f"{server.url}/s-{{000..002}}.tar", keep=True)
    images = read_many(source, range(8))
    monkeypatch.setattr(range_cache, "make_room", refuse)
    assert read_many(source, range(12)) == read_many(opened(f"{server.url}/s-{{000..002}}.tar"), range(12))
    server.asked.clear()
    assert read_many(source, range(12))[:8] == images
    # The last ones were not kept, those of before are.
    assert {path for path, _ in server.asked} == {"/s-002.tar"}


def test_ranges_and_indices_count_as_used(server, own_cache):
    write_shards(server.folder, 1)
    for _ in range(2):
        source = opened(f"{server.url}/s-000.tar", keep=True)
        source.read(0)
        assert {entry.kind: entry.busy for entry in entries()} == {"index": True, "kept": True}
        assert min(entry.used for entry in entries()) > 1
        for path in own_cache.glob("*.*"):
            os.utime(path, (0, 0))


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    write_shards(server.folder, 1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "file" / "cache"))
    assert len(opened(f"{server.url}/s-000.tar")) == 4
    assert "set MPP_CACHE" in refused(f"shards:{server.url}/s-000.tar", keep=True)
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    source = opened(f"{server.url}/s-000.tar", keep=True)
    (tmp_path / "cache").rename(tmp_path / "gone")
    assert source.read(1) == source.read(1) == (b"image 0001", 1)
