"""Remote shards against real servers on this machine."""

import errno
import gzip
import os
import pickle
import threading
import time

import numpy as np
import pytest

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from mpp.cache.entries import entries
from mpp.data.config import Reading
from mpp.data.loader import sequential
from mpp.data.transform import EvalTransform
from mpp.errors import Unreachable
from mpp.sources import kept, remote, remote_shards
from mpp.sources.base import SourceAway, SourceError, TooLarge, read_many
from mpp.sources.shards import open_shards
from mpp.sources.tar_index import write_sidecar
from tests.sources.file_server import FileServer
from tests.sources.test_shards import all_read, write_shards, write_tar


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    running = FileServer(tmp_path / "www")
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    return tmp_path / "cache"


def opened(text, **options):
    return open_shards(f"shards:{text}", text, **options)


def refused(text, **options):
    with pytest.raises(SourceError) as caught:
        opened(text, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_remote_equals_local(server):
    folder = write_shards(server.folder)
    local = opened(f"{folder}/*.tar")
    source = opened(f"{server.url}/s-{{000..002}}.tar")
    assert all_read(source) == all_read(local)
    indices = [11, 0, 5, 5, 7]
    assert source.read_many(indices) == [local.read(index) for index in indices]
    assert source.labels().tolist() == local.labels().tolist()
    assert (source.classes, source.describe()) == (local.classes, local.describe())
    assert source.where(5) == f"{server.url}/s-001.tar, byte 2560"
    with pytest.raises(IndexError):
        source.read_many([0, 12])
    assert not hasattr(local, "read_many")


def test_the_index_is_made_once(server):
    write_shards(server.folder)
    pattern = f"{server.url}/s-{{000..002}}.tar"
    first = all_read(opened(pattern))
    server.asked.clear()
    again = opened(pattern)
    assert {wanted for path, wanted in server.asked if path.endswith(".tar")} == {"bytes=0-0"}
    assert not any(path.endswith(".index") for path, _ in server.asked)
    assert all_read(again) == first
    write_tar(server.folder / "s-001.tar", [("new.jpg", b"new"), ("new.cls", b"0")])
    assert opened(pattern).read(4) == (b"new", 0)


def test_a_sidecar_saves_reading_the_shard(server):
    folder = write_shards(server.folder)
    expected = all_read(opened(f"{folder}/*.tar"))
    for path in sorted(folder.glob("*.tar")):
        write_sidecar(path)
    source = opened(f"{server.url}/s-{{000..002}}.tar")
    assert {wanted for path, wanted in server.asked if path.endswith(".tar")} == {"bytes=0-0"}
    assert all_read(source) == expected


def test_mixed_local_and_remote(server, tmp_path):
    write_shards(server.folder, 3)
    (tmp_path / "here").mkdir()
    write_tar(tmp_path / "here" / "a.tar", [("a.jpg", b"local"), ("a.cls", b"1")])
    source = opened(f"{server.url}/s-000.tar {tmp_path}/here/*.tar")
    assert [data for data, _ in source.read_many([4, 0])] == [b"image 0003", b"local"]
    os.truncate(tmp_path / "here" / "a.tar", 512)
    lost, found = source.read_many([0, 1])
    assert isinstance(lost, OSError)
    assert found == (b"image 0000", 0)


def test_class_names_lie_beside_remote_shards(server, tmp_path):
    write_shards(server.folder, 1)
    (server.folder / "classes.txt").write_text("ant\nbee\ncat\n")
    assert opened(f"{server.url}/s-000.tar").classes == ("ant", "bee", "cat")
    (tmp_path / "here").mkdir()
    write_shards(tmp_path / "here", 1)
    (tmp_path / "here" / "classes.txt").write_text("bee\nant\ncat\n")
    assert "name different classes" in refused(f"{server.url}/s-000.tar {tmp_path}/here/*.tar")


def test_failures_that_pass_are_met_by_asking_again(server):
    write_shards(server.folder)
    expected = all_read(opened(f"{server.folder}/*.tar"))
    server.failing = lambda number: number % 3 == 1
    source = opened(f"{server.url}/s-{{000..002}}.tar")
    assert source.read_many(range(12)) == expected


def test_failures_that_stay_become_errors_of_their_images(server):
    write_shards(server.folder)
    source = opened(f"{server.url}/s-{{000..002}}.tar")
    (server.folder / "s-001.tar").unlink()
    os.truncate(server.folder / "s-002.tar", 512)
    results = source.read_many(range(12))
    assert [isinstance(result, OSError) for result in results] == [False] * 4 + [True] * 8
    assert str(results[4]) == f"{server.url}/s-001.tar, byte 512: is not there"
    with pytest.raises(OSError, match=r"s-002\.tar, byte 512: "):
        source.read(8)
    server.failing = lambda number: True
    with pytest.raises(OSError, match="byte 512: HTTP status 500"):
        source.read(0)


def test_a_server_that_hangs_is_given_up(server, monkeypatch):
    monkeypatch.setattr(remote, "_ATTEMPTS", 2)
    write_shards(server.folder, 1)
    source = opened(f"{server.url}/s-000.tar", timeout=0.2)
    server.hanging.set()
    begin = time.monotonic()
    with pytest.raises(OSError, match=r"s-000\.tar, byte 512: no answer within 0\.2 s"):
        source.read(0)
    assert time.monotonic() - begin < 5
    server.hanging.clear()
    assert source.read(0) == (b"image 0000", 0)


def test_a_server_without_ranges_is_refused(server):
    write_shards(server.folder, 1)
    server.ranges = False
    assert "the server sends whole files only" in refused(f"{server.url}/s-000.tar")


@pytest.mark.usefixtures("any_name")
def test_names_that_an_address_cannot_hold(server):
    write_tar(server.folder / "größe 1.tar", [("a.jpg", b"a")])
    for name in (r"größe\ 1.tar", "gr%C3%B6%C3%9Fe%201.tar"):
        assert all_read(opened(f"{server.url}/{name}")) == [(b"a", None)]


def test_what_is_not_there(server):
    write_shards(server.folder, 1)
    assert f"{server.url}/s-001.tar matches no file" in refused(f"{server.url}/s-{{000..001}}.tar")
    assert "over http nothing lists files" in refused(f"{server.url}/*.tar")
    assert "is no address of a kind that is known" in refused("ftp://host/a.tar")
    (server.folder / "text.tar").write_text("not a tar file, " * 100)
    assert f"{server.url}/text.tar is not a complete tar file" in refused(f"{server.url}/text.tar")
    whole = (server.folder / "s-000.tar").read_bytes()
    (server.folder / "cut.tar").write_bytes(whole[:515])
    assert "cut.tar is not a complete tar file" in refused(f"{server.url}/cut.tar")
    header = bytearray(whole)
    header[124:136] = b"\xff" * 12  # a size of -1
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(b" " * 8) + sum(header[156:512]))
    (server.folder / "negative.tar").write_bytes(header)
    assert "negative.tar is not a complete tar file (" in refused(f"{server.url}/negative.tar")


def test_nothing_that_is_secret_is_shown(server):
    write_shards(server.folder, 1)
    server.password = "Basic dXNlcjpzZWNyZXQ="  # user:secret
    address = server.url.replace("http://", "http://user:secret@")
    source = opened(f"{address}/s-000.tar?sig=secret")
    assert source.read(0) == (b"image 0000", 0)
    (server.folder / "s-000.tar").unlink()
    with pytest.raises(OSError, match="not there") as caught:
        source.read(0)
    server.failing = lambda number: True
    with pytest.raises(OSError, match="500") as failed:
        source.read(0)
    server.failing = lambda number: False
    texts = [str(caught.value), str(failed.value), source.name, source.where(0), source.describe(), *source.state(True)]
    texts += [refused(f"{address}/{name}?sig=secret") for name in ("none.tar", "*.tar")]
    texts += [refused(f"{server.url}/s-000.tar?sig=secret")]
    assert not [text for text in texts if "secret" in text]


@pytest.mark.parametrize("status", [401, 403, 404, 410, 501])
def test_an_answer_that_stays_is_asked_for_once(server, status):
    write_shards(server.folder, 1)
    source = opened(f"{server.url}/s-000.tar")
    server.failing = lambda number: status
    server.asked.clear()
    with pytest.raises(OSError, match="is not there" if status in (404, 410) else str(status)) as caught:
        source.read(0)
    assert not isinstance(caught.value, Unreachable)
    assert len(server.asked) == 1
    kind = {401: PermissionError, 403: PermissionError, 501: OSError}.get(status, FileNotFoundError)
    assert type(caught.value) is kind


def test_a_store_that_is_away_may_open_later(server):
    write_shards(server.folder, 1)
    server.failing = lambda number: 503
    with pytest.raises(SourceAway, match="HTTP status 503"):
        opened(f"{server.url}/s-000.tar")
    server.failing = lambda number: 503 if number > 1 else False
    server.asked.clear()
    with pytest.raises(SourceAway, match="HTTP status 503"):  # answers of its size, and is away for its index
        opened(f"{server.url}/s-000.tar")
    server.failing = lambda number: 403
    with pytest.raises(SourceError, match="HTTP status 403") as caught:
        opened(f"{server.url}/s-000.tar")
    assert not isinstance(caught.value, Unreachable)


def test_a_large_range_may_take_longer(server):
    """Each request has its 30 seconds, here 0.2, and those that its bytes need, here 2 MiB: 16."""
    write_tar(server.folder / "large.tar", [("a.jpg", bytes(2**21))])
    source = opened(f"{server.url}/large.tar")
    server.latency = 0.5
    system = remote._file_system(server.url, 30.0)  # without the limit on each answer of the socket's own
    remote._made[os.getpid(), "http", 0.2] = system
    source.timeout = 0.2
    assert len(source.read(0)[0]) == 2**21


def signed_shards(server, allowed):
    """A shard that only signed requests may read; `allowed`: what else is answered, by the request."""
    write_shards(server.folder, 1)
    server.refusing = lambda path: not ((path.startswith("/s-000.tar") and "Signature=ok" in path) or allowed(path))
    return f"{server.url}/s-000.tar?Signature=ok&Expires=1"


def test_class_names_beside_signed_shards(server):
    (server.folder / "classes.txt").write_text("ant\nbee\ncat\n")
    for allowed in (lambda path: "Signature=ok" in path, lambda path: path == "/classes.txt"):
        source = opened(signed_shards(server, allowed))
        assert source.classes == ("ant", "bee", "cat")
        assert source.warnings == ()


def test_class_names_that_we_may_not_read_are_said_to_be_numbers(server):
    """Whether there are any or not: some stores answer 403 to both."""
    source = opened(signed_shards(server, lambda path: False))
    assert source.classes == ("0", "1", "2")
    why = f"class names are numbers, for we may not read {server.url}/classes.txt: HTTP status 403 Forbidden"
    assert source.warnings == (why,)
    server.refusing = lambda path: False
    server.failing = lambda number: 500 if "classes" in server.asked[-1][0] else False
    with pytest.raises(SourceError, match=r"cannot read http.*/classes\.txt \(HTTP status 500"):
        opened(f"{server.url}/s-000.tar")


def test_class_names_are_asked_for_once_a_folder_however_signed(server):
    write_shards(server.folder)
    server.asked.clear()
    opened(" ".join(f"{server.url}/s-00{i}.tar?token={i}" for i in range(3)))
    assert [path for path, _ in server.asked if "classes" in path] == ["/classes.txt?token=0"]


def test_what_the_user_configured_in_fsspec_counts(server, monkeypatch):
    config = pytest.importorskip("fsspec.config")
    write_shards(server.folder, 1)
    server.password = "Bearer token"
    assert "HTTP status 401" in refused(f"{server.url}/s-000.tar")
    headers = {"client_kwargs": {"headers": {"Authorization": "Bearer token"}}}
    monkeypatch.setitem(config.conf, "http", headers)
    monkeypatch.setattr(remote, "_made", {})
    assert opened(f"{server.url}/s-000.tar").read(0) == (b"image 0000", 0)


def test_state_tells_one_shard_from_another(server, tmp_path):
    write_shards(server.folder, 2)
    pattern = f"{server.url}/s-{{000..001}}.tar"
    before = opened(pattern)
    assert list(before.state(True)) == list(opened(pattern).state(True))
    assert list(before.state(False)) == ["s-000.tar 10240", "s-001.tar 10240"]
    write_tar(server.folder / "s-001.tar", [("new.jpg", b"new"), ("new.cls", b"0")])
    first, second = opened(pattern).state(True)
    assert first == next(before.state(True))
    assert second not in before.state(True)


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


def test_the_order_of_objects_does_not_depend_on_their_signatures(server):
    for number in range(3):
        write_tar(server.folder / f"{number}", [("a.jpg", b"%d" % number)])
    server.naming = lambda path: "/" + path.partition("id=")[2].partition("&")[0]
    for signs in ("012", "210", "120"):
        source = opened(" ".join(f"{server.url}/get?Expires={sign}&id={i}" for i, sign in enumerate(signs)))
        assert [data for data, _ in source.read_many(range(3))] == [b"0", b"1", b"2"]


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


def test_gzipped_remote_shards_are_unpacked_into_the_cache(server):
    write_shards(server.folder, 1)
    expected = all_read(opened(f"{server.folder}/*.tar"))
    packed = gzip.compress((server.folder / "s-000.tar").read_bytes())
    (server.folder / "s-000.tar.gz").write_bytes(packed)
    assert all_read(opened(f"{server.url}/s-000.tar.gz")) == expected
    server.asked.clear()
    source = opened(f"{server.url}/s-000.tar.gz")
    assert all_read(source) == expected
    assert [wanted for path, wanted in server.asked if path.endswith(".gz")] == ["bytes=0-0"]
    assert source.where(0) == f"{server.url}/s-000.tar.gz, byte 512"
    (server.folder / "cut.tar.gz").write_bytes(packed[:-20])
    assert "not a complete gzip file" in refused(f"{server.url}/cut.tar.gz")


def write_pictures(folder, encode, number=12):
    members = []
    for i in range(number):
        members += [(f"{i}.png", encode(np.full((8, 8, 3), i, dtype=np.uint8))), (f"{i}.cls", b"0")]
    return write_tar(folder / "p.tar", members)


@pytest.mark.parametrize("keep", [False, True])
def test_forked_workers_read_on_their_own(server, encode, keep):
    write_pictures(server.folder, encode)
    source = opened(f"{server.url}/p.tar", keep=keep)
    source.read(0)  # the parent's own connection, which workers must not use
    for _ in range(2):
        transform = EvalTransform((8, 8))
        batches = sequential(source, transform, Reading(), range(12), batch_size=3, workers=2)
        assert [int(image[0, 0, 0]) for batch in batches for image in batch["images"]] == list(range(12))
    assert len(source.read_many(range(12))) == 12


def test_a_copy_by_pickle_reads(server):
    write_shards(server.folder, 1)
    source = opened(f"{server.url}/s-000.tar", keep=True)
    source.read(0)
    assert all_read(pickle.loads(pickle.dumps(source))) == all_read(source)


def test_members_of_too_many_bytes_are_not_fetched(server, monkeypatch):
    write_tar(server.folder / "s.tar", [("a.jpg", b"small"), ("b.jpg", bytes(1000)), ("c.jpg", b"small")])
    source = opened(f"{server.url}/s.tar")
    fetch, fetched = remote_shards.fetch_ranges, []
    monkeypatch.setattr(
        remote_shards, "fetch_ranges", lambda ranges, timeout: fetched.extend(ranges) or fetch(ranges, timeout)
    )
    first, second, third = read_many(source, range(3), most=100)
    assert (first[0], third[0]) == (b"small", b"small")
    assert isinstance(second, TooLarge)
    assert [size for _, _, size in fetched] == [5, 5]


def test_a_range_that_memory_does_not_hold_is_not_asked_for_again(server, monkeypatch):
    write_tar(server.folder / "s.tar", [("a.jpg", b"small")])
    source, asked = opened(f"{server.url}/s.tar"), []

    async def greedy(*_, **__):
        asked.append(1)
        raise MemoryError

    monkeypatch.setattr(remote._file_system(server.url, source.timeout), "_cat_file", greedy)
    (found,) = read_many(source, [0])
    assert isinstance(found, TooLarge)
    assert str(found).endswith("takes more memory than there is")
    assert len(asked) == 1
