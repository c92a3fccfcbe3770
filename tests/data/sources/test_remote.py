import gzip
import os
import pickle
import signal
import threading
import time

import pytest

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from mpp.data.sources import remote, shards
from mpp.data.sources.base import SourceAway, SourceError, TooLarge
from mpp.data.sources.tar_index import write_sidecar
from mpp.errors import Unreachable
from tests.data.sources.reading import (
    all_read,
    opened,
    read_by_workers,
    read_many,
    refused,
    states,
    write_pictures,
    write_shards,
    write_tar,
)

pytestmark = pytest.mark.usefixtures("own_cache")


def test_remote_equals_local(server):
    local = opened(f"{write_shards(server.folder)}/*.tar")
    source = opened(f"{server.url}/s-{{000..002}}.tar")
    assert all_read(source) == all_read(local)
    indices = [11, 0, 5, 5, 7]
    assert read_many(source, indices) == [local.read(index) for index in indices]
    assert source.labels().tolist() == local.labels().tolist()
    assert (source.classes, source.describe()) == (local.classes, local.describe())
    assert source.location(5) == f"{server.url}/s-001.tar, byte 2560"
    with pytest.raises(IndexError):
        read_many(source, [0, 12])
    assert (source.reads_together, local.reads_together) == (True, False)
    assert all_read(pickle.loads(pickle.dumps(opened(f"{server.url}/s-000.tar", keep=True)))) == all_read(local)[:4]


def test_the_index_is_made_once_for_each_state_of_a_shard(server):
    write_shards(server.folder)
    pattern = f"{server.url}/s-{{000..002}}.tar"
    first = opened(pattern)
    assert states(first, False) == [f"s-00{n}.tar 10240" for n in range(3)]
    server.asked.clear()
    again = opened(pattern)
    assert {wanted for path, wanted in server.asked if path.endswith(".tar")} == {"bytes=0-0"}
    assert not any(path.endswith(".index") for path, _ in server.asked)
    assert all_read(again) == all_read(first)
    assert states(again, True) == states(first, True)
    write_tar(server.folder / "s-001.tar", [("new.jpg", b"new"), ("new.cls", b"0")])
    changed = opened(pattern)
    assert changed.read(4) == (b"new", 0)
    assert [a == b for a, b in zip(states(changed, True), states(first, True), strict=True)] == [True, False, True]


def test_a_sidecar_saves_reading_the_shard(server):
    expected = all_read(opened(f"{write_shards(server.folder)}/*.tar"))
    for path in sorted(server.folder.glob("*.tar")):
        write_sidecar(path)
    source = opened(f"{server.url}/s-{{000..002}}.tar")
    assert {wanted for path, wanted in server.asked if path.endswith(".tar")} == {"bytes=0-0"}
    assert all_read(source) == expected


def test_mixed_local_and_remote_and_their_class_names(server, tmp_path):
    write_shards(server.folder, 1)
    (tmp_path / "here").mkdir()
    local = write_tar(tmp_path / "here" / "a.tar", [("a.jpg", b"local"), ("a.cls", b"1")])
    pattern = f"{server.url}/s-000.tar {tmp_path}/here/*.tar"
    source = opened(pattern)
    assert [data for data, _ in read_many(source, [4, 0])] == [b"image 0003", b"local"]
    (server.folder / "classes.txt").write_text("ant\nbee\ncat\n")
    assert opened(pattern).classes == ("ant", "bee", "cat")
    (tmp_path / "here" / "classes.txt").write_text("bee\nant\ncat\n")
    assert "name different classes" in refused(f"shards:{pattern}")
    os.truncate(local, 512)
    lost, found = read_many(source, [0, 1])
    assert isinstance(lost, OSError)
    assert found == (b"image 0000", 0)


def signed_shards(server, allowed):
    """A shard that only signed requests may read; `allowed`: what else is answered, by the request."""
    write_shards(server.folder, 1)
    server.refusing = lambda path: not ((path.startswith("/s-000.tar") and "Signature=ok" in path) or allowed(path))
    return f"{server.url}/s-000.tar?Signature=ok&Expires=1"


def test_class_names_beside_signed_shards(server):
    (server.folder / "classes.txt").write_text("ant\nbee\ncat\n")
    for allowed in (lambda path: "Signature=ok" in path, lambda path: path == "/classes.txt"):
        source = opened(signed_shards(server, allowed))
        assert (source.classes, source.warnings) == (("ant", "bee", "cat"), ())
    # Whether there are any or not: some stores answer 403 to both.
    source = opened(signed_shards(server, lambda path: False))
    why = f"class names are numbers, for we may not read {server.url}/classes.txt: HTTP status 403 Forbidden"
    assert (source.classes, source.warnings) == (("0", "1", "2"), (why,))
    server.refusing = lambda path: False
    server.failing = lambda number: 500 if "classes" in server.asked[-1][0] else False
    with pytest.raises(SourceError, match=r"cannot read http.*/classes\.txt \(HTTP status 500"):
        opened(f"{server.url}/s-000.tar")


def test_class_names_are_asked_for_once_a_folder_however_signed(server):
    write_shards(server.folder)
    opened(" ".join(f"{server.url}/s-00{i}.tar?token={i}" for i in range(3)))
    assert [path for path, _ in server.asked if "classes" in path] == ["/classes.txt?token=0"]


def test_gzipped_remote_shards_are_unpacked_into_the_cache(server):
    expected = all_read(opened(f"{write_shards(server.folder, 1)}/*.tar"))
    packed = gzip.compress((server.folder / "s-000.tar").read_bytes())
    (server.folder / "s-000.tar.gz").write_bytes(packed)
    assert all_read(opened(f"{server.url}/s-000.tar.gz")) == expected
    server.asked.clear()
    source = opened(f"{server.url}/s-000.tar.gz")
    assert all_read(source) == expected
    assert [wanted for path, wanted in server.asked if path.endswith(".gz")] == ["bytes=0-0"]
    assert source.location(0) == f"{server.url}/s-000.tar.gz, byte 512"
    (server.folder / "cut.tar.gz").write_bytes(packed[:-20])
    assert "not a complete gzip file" in refused(f"shards:{server.url}/cut.tar.gz")


@pytest.mark.parametrize("keep", [False, True])
def test_forked_workers_read_on_their_own(server, encode, keep):
    write_pictures(server.folder, encode)
    source = opened(f"{server.url}/p.tar", keep=keep)
    source.read(0)  # the parent's own connection, which workers must not use
    for _ in range(2):
        assert read_by_workers(source) == list(range(12))
    assert len(read_many(source, range(12))) == 12


def test_members_of_too_many_bytes_are_not_fetched(server, monkeypatch):
    write_tar(server.folder / "s.tar", [("a.jpg", b"small"), ("b.jpg", bytes(1000)), ("c.jpg", b"small")])
    source, fetched = opened(f"{server.url}/s.tar"), []
    monkeypatch.setattr(shards, "fetch_ranges", lambda ranges, _: fetched.extend(ranges) or remote.fetch_ranges(ranges))
    first, second, third = source.read_many(range(3), most=100)
    assert (first[0], third[0]) == (b"small", b"small")
    assert isinstance(second, TooLarge)
    assert [size for _, _, size in fetched] == [5, 5]


def test_failures_that_pass_are_asked_again_and_those_that_stay_become_errors(server):
    expected = all_read(opened(f"{write_shards(server.folder)}/*.tar"))
    server.failing = lambda number: number % 3 == 1
    source = opened(f"{server.url}/s-{{000..002}}.tar")
    assert read_many(source, range(12)) == expected
    server.failing = lambda number: False
    (server.folder / "s-001.tar").unlink()
    os.truncate(server.folder / "s-002.tar", 512)
    results = read_many(source, range(12))
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


def test_ctrl_c_does_not_wait_for_requests(server):
    write_shards(server.folder)
    source = opened(f"{server.url}/s-{{000..002}}.tar", timeout=20)
    server.hanging.set()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        read_many(source, range(12))
    assert time.monotonic() - begin < 5
    server.hanging.clear()


@pytest.mark.usefixtures("any_name")
def test_names_that_an_address_cannot_hold(server):
    write_tar(server.folder / "größe 1.tar", [("a.jpg", b"a")])
    for name in (r"größe\ 1.tar", "gr%C3%B6%C3%9Fe%201.tar"):
        assert all_read(opened(f"{server.url}/{name}")) == [(b"a", None)]


def test_missing_or_broken_shards(server):
    whole = (write_shards(server.folder, 1) / "s-000.tar").read_bytes()
    spec = f"shards:{server.url}"
    assert f"{server.url}/s-001.tar matches no file" in refused(f"{spec}/s-{{000..001}}.tar")
    assert "over http nothing lists files" in refused(f"{spec}/*.tar")
    assert "is no address of a kind that is known" in refused("shards:ftp://host/a.tar")
    for name, data in {"text.tar": b"not a tar file, " * 100, "cut.tar": whole[:515]}.items():
        (server.folder / name).write_bytes(data)
        assert f"{server.url}/{name} is not a complete tar file (" in refused(f"{spec}/{name}")
    server.ranges = False
    assert "the server sends whole files only" in refused(f"{spec}/s-000.tar")


def test_no_secret_is_shown(server):
    write_shards(server.folder, 1)
    server.password = "Basic dXNlcjpzZWNyZXQ="  # user:secret
    address = server.url.replace("http://", "http://user:secret@")
    source = opened(f"{address}/s-000.tar?sig=secret")
    assert source.read(0) == (b"image 0000", 0)
    texts = [source.name, source.location(0), source.describe(), *states(source, True)]
    (server.folder / "s-000.tar").unlink()
    for failing, match in ((False, "not there"), (True, "500")):
        server.failing = lambda number, failing=failing: failing
        with pytest.raises(OSError, match=match) as caught:
            source.read(0)
        texts.append(str(caught.value))
    server.failing = lambda number: False
    texts += [refused(f"shards:{address}/{name}?sig=secret") for name in ("none.tar", "*.tar")]
    texts += [refused(f"shards:{server.url}/s-000.tar?sig=secret")]
    assert not [text for text in texts if "secret" in text]


def test_an_answer_that_stays_is_asked_for_once(server):
    write_shards(server.folder, 1)
    source = opened(f"{server.url}/s-000.tar")
    for status, kind, text in (
        (403, PermissionError, "403"),
        (410, FileNotFoundError, "not there"),
        (501, OSError, "501"),
    ):
        server.failing = lambda number, status=status: status
        server.asked.clear()
        with pytest.raises(OSError, match=text) as caught:
            source.read(0)
        assert (len(server.asked), type(caught.value)) == (1, kind)


def test_a_store_that_is_away_may_open_later(server):
    write_shards(server.folder, 1)
    # Away from the start, or answers of its size, and is away for its index.
    for failing in (lambda number: 503, lambda number: 503 if number > 1 else False):
        server.failing = failing
        server.asked.clear()
        with pytest.raises(SourceAway, match="HTTP status 503"):
            opened(f"{server.url}/s-000.tar")
    server.failing = lambda number: 403
    with pytest.raises(SourceError, match="HTTP status 403") as caught:
        opened(f"{server.url}/s-000.tar")
    assert not isinstance(caught.value, Unreachable)


def test_the_settings_of_fsspec_count(server, monkeypatch):
    config = pytest.importorskip("fsspec.config")
    write_shards(server.folder, 1)
    server.password = "Bearer token"
    assert "HTTP status 401" in refused(f"shards:{server.url}/s-000.tar")
    headers = {"client_kwargs": {"headers": {"Authorization": "Bearer token"}}}
    monkeypatch.setitem(config.conf, "http", headers)
    monkeypatch.setattr(remote, "_made", {})
    assert opened(f"{server.url}/s-000.tar").read(0) == (b"image 0000", 0)


def test_a_range_that_memory_does_not_hold_is_not_asked_for_again(server, monkeypatch):
    write_tar(server.folder / "s.tar", [("a.jpg", b"small")])
    source, asked = opened(f"{server.url}/s.tar"), []

    def greedy(*_, **__):
        asked.append(1)
        raise MemoryError

    monkeypatch.setattr(remote._file_system(server.url, source.timeout), "cat_file", greedy)
    (found,) = source.read_many([0])
    assert isinstance(found, TooLarge)
    assert str(found).endswith("takes more memory than there is")
    assert len(asked) == 1
