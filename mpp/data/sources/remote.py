"""Files behind URLs, by ranges of bytes: s3://, gs://, http(s)://, hf://, through fsspec.

Every request has a time limit and is made again when it fails for a reason that may pass (see remote_errors.py), so
that a cut connection neither hangs nor ends a run. Many ranges are fetched at the same time, for each waits mostly for
the network.

fsspec's file systems do not survive a fork. They are made where they are first needed, in each process its own.
"""

import contextlib
import io
import logging
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from mpp.data.sources.base import SourceAway, SourceError, TooLarge, opening_error
from mpp.data.sources.patterns import expand_braces, shown
from mpp.data.sources.remote_errors import RangeNotSupported, http_status, is_away, kind_of_failure, may_pass, reason
from mpp.errors import Unreachable, install, split_query

TIMEOUT = 30.0
"""Seconds for which a request may wait for more of its answer."""
_ATTEMPTS = 6
_FIRST_PAUSE = 0.25  # seconds before the second attempt; doubles from one to the next
_AT_ONCE = 64
_PIECE = 4 * 2**20  # bytes a request while a whole file is read

_SAME_PROTOCOL = (("http", "https"), ("s3", "s3a"), ("gs", "gcs"), ("hf",))
# A file's state, by the names that s3, gs and hf have for it in their listings.
_TAGS = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "mtime", "last_modified", "updated", "created")
_made: dict[tuple[int, str, float], Any] = {}  # never emptied: a child must not close what its parent still uses

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, as it was when it was opened."""

    url: str
    size: int
    tag: str
    """ETag, or time of modification; empty where the server tells neither."""

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def named(self) -> str:
        """The URL without what signs it: another object has another."""
        return split_query(self.url)[0] if self.url.lower().startswith("http") else str(self)

    def state(self, times: bool) -> str:
        """URL, size and tag; without `times` name and size."""
        address, mark, query = self.named.partition("?")
        name = (address if times else address.rpartition("/")[2]) + mark + query
        return f"{name} {self.size} {self.tag}" if times else f"{name} {self.size}"

    def beside(self, name: str) -> str:
        """URL of another file in the same folder, signed as this one is, which may be good for it, too."""
        address = f"{self.url.partition('?')[0].rpartition('/')[0]}/{name}"
        signature = split_query(self.url)[1] if self.url.lower().startswith("http") else ""
        return f"{address}?{signature}" if signature else address


def _file_system(url: str, timeout: float) -> Any:
    """fsspec's, for a URL, in this process. ImportError where its package is missing."""
    protocol = url.partition("://")[0].lower()
    key = (os.getpid(), protocol, timeout)
    if key in _made:
        return _made[key]
    import fsspec
    from fsspec.config import conf

    options: dict[str, Any] = {}
    if protocol in ("http", "https", "gs"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        if protocol == "gs":
            options["requests_timeout"] = limits
            logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # or it prints tracebacks of its retries
        else:
            options = {"client_kwargs": {"timeout": limits, "trust_env": True}, "encoded": True}
    elif protocol == "s3":
        # s3fs and this file ask again; three that do so would multiply.
        limits = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = {**limits, "max_pool_connections": _AT_ONCE}
    # What the user set in fsspec's own configuration, such as headers or an addressing style, counts for more.
    for name in next(same for same in _SAME_PROTOCOL if protocol in same):
        for option, value in conf.get(name, {}).items():
            if option in options:
                options[option] = {**options[option], **value} if isinstance(options[option], dict) else value
    _made[key] = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    return _made[key]


def _path(system: Any, url: str) -> str:
    """A URL as its file system takes it; an http one with all that a URL cannot hold escaped, and no more."""
    if url.lower().startswith("http"):
        return urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    return system._strip_protocol(url)


def _answer(ask: Callable[[], _T], url: str, timeout: float) -> _T:
    """Asks until there is an answer, a reason that stays, or no attempt left.

    Raises OSError: one line that names the URL and the reason.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return ask()
        except MemoryError as error:
            raise TooLarge(f"{shown(url)}: takes more memory than there is") from error
        except Exception as error:  # each file system has errors of its own
            if attempt == _ATTEMPTS - 1 or not may_pass(error):
                kind = kind_of_failure(error) or (Unreachable if is_away(error) else OSError)
                raise kind(f"{shown(url)}: {reason(error, timeout)}") from error
        time.sleep(_FIRST_PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _at_once(work: Callable[[_T], _R], many: Sequence[_T]) -> list[_R]:
    """The results in order, or the first error. Not by a pool: Ctrl-C would wait for all of its requests."""
    if len(many) < 2:
        return [work(one) for one in many]
    futures = [Future[_R]() for _ in many]
    rest = iter(list(zip(many, futures, strict=True)))  # taking one needs no lock

    def run() -> None:
        for one, future in rest:
            try:
                future.set_result(work(one))
            except BaseException as error:
                future.set_exception(error)

    for _ in range(min(_AT_ONCE, len(many))):
        threading.Thread(target=run, daemon=True).start()
    try:
        return [future.result() for future in futures]
    finally:
        list(rest)  # nothing more is begun


def fetch_ranges(ranges: Sequence[tuple[str, int, int]], timeout: float = TIMEOUT) -> list[bytes | OSError]:
    """Several ranges of bytes, (URL, first byte, number of bytes), at the same time.

    Each is its bytes, or why there are none, with URL and byte; it may wait `timeout` seconds for more of its answer.
    """

    def fetch(wanted: tuple[str, int, int]) -> bytes | OSError:
        url, start, size = wanted
        try:
            return _range(url, start, size, timeout) if size else b""
        except OSError as error:
            return type(error)(f"{shown(url)}, byte {start}: {str(error).removeprefix(f'{shown(url)}: ')}")

    for protocol_url in {url.partition("://")[0]: url for url, _, _ in ranges}.values():
        with contextlib.suppress(Exception):  # made once, before the threads, which say why it cannot be
            _file_system(protocol_url, timeout)
    return _at_once(fetch, ranges)


def _range(url: str, start: int, size: int, timeout: float) -> bytes:
    def ask() -> bytes:
        system = _file_system(url, timeout)
        # With its cache, the file of one that is not asynchronous would fetch some megabytes beyond the end.
        options = {} if system.async_impl else {"cache_type": "none"}
        return system.cat_file(_path(system, url), start=start, end=start + size, **options)

    data = _answer(ask, url, timeout)
    if len(data) != size:
        what = f"ends {size - len(data)} bytes early; it changed since indexing"
        raise OSError(f"{shown(url)}: {what if len(data) < size else 'the server sends more than it is asked for'}")
    return data


def fetch_small(url: str, timeout: float = TIMEOUT) -> bytes | None:
    """The whole of a small file; None where it is not there.

    Raises:
        PermissionError: it is not for us. Some servers answer so, too, where it is not there.
        OSError: it could not be fetched.
    """
    system = _file_system(url, timeout)
    # Else s3fs asks for the size first, to fetch a large file in pieces.
    options = {"max_concurrency": 1} if url.lower().startswith("s3:") else {}
    try:
        return _answer(lambda: system.cat_file(_path(system, url), **options), url, timeout)
    except FileNotFoundError:
        return None
    except OSError as error:
        if isinstance(error.__cause__, Exception) and http_status(error.__cause__) == 400:  # of a wrong signature
            raise PermissionError(str(error)) from error
        raise


def find_remote(spec: str, pattern: str, timeout: float = TIMEOUT) -> list[RemoteFile]:
    """The files that a pattern of URLs stands for. Globs need a listing, which http has not.

    Raises SourceError: nothing there, no access, a glob on http, a server without ranges, or a missing package.
    """
    name = shown(spec)
    try:
        _file_system(pattern, timeout).invalidate_cache()  # its listings of before
    except ImportError as error:
        protocol = pattern.partition("://")[0]
        raise SourceError(f"{name}: {protocol}:// needs more packages ({error}); {install('remote')}") from error
    except Exception as error:  # logging in
        kind = SourceAway if is_away(error) else SourceError
        raise kind(f"{name}: {reason(error, timeout)}; check the credentials") from error
    over_http = pattern.lower().startswith("http")
    if over_http and "*" in pattern.partition("?")[0]:
        hint = "write the URLs, with braces such as x-{000..123}.tar"
        raise SourceError(f"{name}: {shown(pattern)}: over http nothing lists files, so * finds none; {hint}")
    look = _probe if over_http else _list
    try:
        urls = list(expand_braces(pattern))
        found = _at_once(lambda url: _answer(lambda: look(url, timeout), url, timeout), urls)
    except FileNotFoundError as error:
        what = str(error).replace(": is not there", "")
        raise SourceError(f"{name}: {what} matches no file; check the URL") from error
    except OSError as error:
        raise opening_error(f"{name}: cannot open {error}; check the URL and the credentials", error) from error
    return [file for files in found for file in files]


def _probe(url: str, timeout: float) -> list[RemoteFile]:
    """Asks for the first byte: the answer tells the size, also where HEAD is not allowed, as on signed URLs."""
    from fsspec.asyn import sync

    system = _file_system(url, timeout)

    async def probe() -> list[RemoteFile]:
        session = await system.set_session()
        async with session.get(system.encode_url(_path(system, url)), headers={"Range": "bytes=0-0"}) as answer:
            if answer.status == 404:
                raise FileNotFoundError(url)
            answer.raise_for_status()
            size = re.fullmatch(r"bytes 0-0/(\d+)", answer.headers.get("Content-Range", ""))
            if answer.status != 206 or not size:
                answer.close()  # or the whole shard would come
                hint = "download the shards, or use one with ranges"
                raise RangeNotSupported(f"the server sends whole files only; {hint}")
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified", "")
            return [RemoteFile(url, int(size[1]), tag)]

    found: Any = sync(system.loop, probe)
    return found


def _list(url: str, timeout: float) -> list[RemoteFile]:
    """The files that a URL or a glob stands for, on a file system with listings."""
    system = _file_system(url, timeout)
    path, listing = _path(system, url), any(character in url for character in "*?[")
    found = system.glob(path, detail=True) if listing else {path: system.info(path)}
    protocol, files = url.partition("://")[0], list[RemoteFile]()
    for name, info in sorted(found.items()):
        if info.get("type") == "file" and not name.endswith(".index"):
            tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
            files.append(RemoteFile(f"{protocol}://{name}" if listing else url, int(info["size"]), tag))
    if not files:
        raise FileNotFoundError(url)
    return files


def open_stream(file: RemoteFile, timeout: float = TIMEOUT) -> io.BufferedReader:
    """A remote file as a readable, seekable one."""
    return io.BufferedReader(_RangeReader(file, timeout), _PIECE)


class _RangeReader(io.RawIOBase):
    """Reads a remote file; each read is a request."""

    def __init__(self, file: RemoteFile, timeout: float) -> None:
        super().__init__()
        self._file, self._timeout, self._position = file, timeout, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        size = max(0, min(len(buffer), self._file.size - self._position))
        (data,) = fetch_ranges([(self._file.url, self._position, size)], self._timeout)
        if isinstance(data, OSError):
            raise data
        buffer[:size] = data
        self._position += size
        return size
