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
from tests.data.sources.reading import (
    all_read,
    opened,
    read_many,
    refused_shards,
    states,
    write_shards,
    write_tar,
)

pytestmark = pytest.mark.usefixtures("own_cache")


def test_failures_that_pass_are_asked_again(server):
    write_shards(server.folder)
    expected = all_read(opened(f"{server.folder}/*.tar"))
    server.failing = lambda number: number % 3 == 1
    source = opened(f"{server.url}/s-{{000..002}}.tar")
    assert read_many(source, range(12)) == expected


def test_failures_that_stay_become_errors_of_their_images(server):
    write_shards(server.folder)
    source = opened(f"{server.url}/s-{{000..002}}.tar")
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


def test_a_server_without_ranges_is_refused_shards(server):
    write_shards(server.folder, 1)
    server.ranges = False
    assert "the server sends whole files only" in refused_shards(f"{server.url}/s-000.tar")


@pytest.mark.usefixtures("any_name")
def test_names_that_an_address_cannot_hold(server):
    write_tar(server.folder / "größe 1.tar", [("a.jpg", b"a")])
    for name in (r"größe\ 1.tar", "gr%C3%B6%C3%9Fe%201.tar"):
        assert all_read(opened(f"{server.url}/{name}")) == [(b"a", None)]


def test_missing_or_broken_shards(server):
    write_shards(server.folder, 1)
    assert f"{server.url}/s-001.tar matches no file" in refused_shards(f"{server.url}/s-{{000..001}}.tar")
    assert "over http nothing lists files" in refused_shards(f"{server.url}/*.tar")
    assert "is no address of a kind that is known" in refused_shards("ftp://host/a.tar")
    (server.folder / "text.tar").write_text("not a tar file, " * 100)
    assert f"{server.url}/text.tar is not a complete tar file" in refused_shards(f"{server.url}/text.tar")
    whole = (server.folder / "s-000.tar").read_bytes()
    (server.folder / "cut.tar").write_bytes(whole[:515])
    assert "cut.tar is not a complete tar file" in refused_shards(f"{server.url}/cut.tar")
    header = bytearray(whole)
    header[124:136] = b"\xff" * 12  # a size of -1
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(b" " * 8) + sum(header[156:512]))
    (server.folder / "negative.tar").write_bytes(header)
    assert "negative.tar is not a complete tar file (" in refused_shards(f"{server.url}/negative.tar")


def test_no_secret_is_shown(server):
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
    texts = [
        str(caught.value),
        str(failed.value),
        source.name,
        source.location(0),
        source.describe(),
        *states(source, True),
    ]
    texts += [refused_shards(f"{address}/{name}?sig=secret") for name in ("none.tar", "*.tar")]
    texts += [refused_shards(f"{server.url}/s-000.tar?sig=secret")]
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


def test_the_settings_of_fsspec_count(server, monkeypatch):
    config = pytest.importorskip("fsspec.config")
    write_shards(server.folder, 1)
    server.password = "Bearer token"
    assert "HTTP status 401" in refused_shards(f"{server.url}/s-000.tar")
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
