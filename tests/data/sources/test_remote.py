"""Answers of a store, against real servers on this machine: failures, secrets, missing files."""

import os
import signal
import threading
import time

import pytest

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

from mpp.data.sources import remote
from mpp.data.sources.base import SourceAway, SourceError, TooLarge
from mpp.errors import Unreachable
from tests.data.sources.reading import all_read, opened, read_many, refused, states, write_shards, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


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


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, PermissionError),
        (403, PermissionError),
        (404, FileNotFoundError),
        (410, FileNotFoundError),
        (501, OSError),
    ],
)
def test_an_answer_that_stays_is_asked_for_once(server, status, kind):
    write_shards(server.folder, 1)
    source = opened(f"{server.url}/s-000.tar")
    server.failing = lambda number: status
    server.asked.clear()
    with pytest.raises(OSError, match="is not there" if kind is FileNotFoundError else str(status)) as caught:
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
