"""Files behind URLs, by ranges of bytes: s3://, gs://, http(s)://, hf://, through fsspec.

Every request has a time limit and is made again when it fails for a reason that may pass (see answers.py), so that a
cut connection neither hangs nor ends a run. Many ranges are fetched at the same time, for each waits mostly for the
network.

fsspec's file systems do not survive a fork. They are made where they are first needed, in each process its own.
"""

import asyncio
import logging
import os
import re
import urllib.parse
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mpp.data.sources.answers import RangeNotSupported, http_status, is_away, kind_of_failure, may_pass, reason
from mpp.data.sources.base import SourceAway, SourceError, TooLarge
from mpp.data.sources.patterns import expand_braces, shown
from mpp.errors import Unreachable, install, split_query

TIMEOUT = 30.0
"""Seconds that one request may take, beside those that its bytes need."""
_ATTEMPTS = 6
_FIRST_PAUSE = 0.25  # seconds before the second attempt; doubles from one to the next
_AT_ONCE = 64
_SLOWEST = 2**17  # bytes a second, below which a transfer counts as standing still
_LISTING = 20  # times the limit of a request, for a listing of which each request has none of its own

_SAME_PROTOCOL = (("http", "https"), ("s3", "s3a"), ("gs", "gcs"), ("hf",))

_made: dict[tuple[int, str, float], Any] = {}  # never emptied: a child must not close what its parent still uses

_T = TypeVar("_T")


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
    if key not in _made:
        import fsspec
        from fsspec.config import conf

        options: dict[str, Any] = {}
        if protocol in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            options["client_kwargs"] = {"timeout": limits, "trust_env": True}
        elif protocol == "s3":
            limits = {"connect_timeout": timeout, "read_timeout": timeout}
            # s3fs and this file ask again; three that do so would multiply.
            again = {"total_max_attempts": 1}
            options["config_kwargs"] = {**limits, "max_pool_connections": _AT_ONCE, "retries": again}
        elif protocol == "gs":
            import aiohttp

            options["requests_timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # or it prints tracebacks of its retries
        # What the user set in fsspec's own configuration, such as headers or an addressing style, counts for more.
        names = next(same for same in _SAME_PROTOCOL if protocol in same)
        told = {name: value for among in names for name, value in conf.get(among, {}).items()}
        for name, ours in options.items():
            options[name] = {**ours, **told.get(name, {})} if isinstance(ours, dict) else told.get(name, ours)
        plain = {"encoded": True} if protocol in ("http", "https") else {}
        _made[key] = fsspec.filesystem(protocol, skip_instance_cache=True, **plain, **options)
    return _made[key]


def _run(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """The result of a coroutine, run on the thread that fsspec keeps for it."""
    from fsspec.asyn import get_loop

    return asyncio.run_coroutine_threadsafe(work(), get_loop()).result()


async def _persist(ask: Callable[[], Coroutine[Any, Any, _T]], url: str, limit: float | None, attempts: int = 0) -> _T:
    """Asks until there is an answer, a reason that stays, or no attempt left.

    Args:
        ask: the request.
        url: for messages.
        limit: seconds that one attempt may take.
        attempts: by default _ATTEMPTS.

    Raises:
        OSError: one line that names the URL and the reason.
    """
    pause = _FIRST_PAUSE
    attempts = attempts or _ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            return await asyncio.wait_for(ask(), limit)
        except MemoryError as error:
            raise TooLarge(f"{shown(url)}: takes more memory than there is") from error
        except Exception as error:  # each file system has errors of its own
            if attempt == attempts or not may_pass(error):
                raise _failure(error)(f"{shown(url)}: {reason(error, limit)}") from error
        await asyncio.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


def _failure(error: Exception) -> type[OSError]:
    return kind_of_failure(error) or (Unreachable if is_away(error) else OSError)


async def _range(system: Any, url: str, start: int, size: int, timeout: float) -> bytes:
    if not size:
        return b""

    async def ask() -> bytes:
        if system.async_impl:
            return await system._cat_file(_path(system, url), start=start, end=start + size)
        # Without its cache the file would fetch some megabytes beyond the end.
        return await asyncio.to_thread(system.cat_file, _path(system, url), start, start + size, cache_type="none")

    data = await _persist(ask, url, timeout + size / _SLOWEST)
    if len(data) != size:
        what = f"ends {size - len(data)} bytes early; it changed since indexing"
        raise OSError(f"{shown(url)}: {what if len(data) < size else 'the server sends more than it is asked for'}")
    return data


def _path(system: Any, url: str) -> str:
    """A URL as its file system takes it; an http one with all that a URL cannot hold escaped, and no more."""
    if url.lower().startswith("http"):
        return urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    return system._strip_protocol(url)


def fetch_ranges(ranges: Sequence[tuple[str, int, int]], timeout: float = TIMEOUT) -> list[bytes | OSError]:
    """Several ranges of bytes, at the same time.

    Args:
        ranges: URL, first byte, number of bytes.
        timeout: seconds that one request may take.

    Returns:
        One a range: its bytes, or why there are none, with URL and byte.
    """
    if not ranges:
        return []
    try:  # not in the loop: logging in may take long
        systems = {url: _file_system(url, timeout) for url, _, _ in ranges}
    except Exception as error:  # of a worker's own login
        failed, why = _failure(error), reason(error, timeout)
        return [failed(f"{shown(url)}, byte {start}: {why}") for url, start, _ in ranges]

    async def all_of_them() -> list[bytes | OSError]:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(url: str, start: int, size: int) -> bytes | OSError:
            async with gate:
                try:
                    return await _range(systems[url], url, start, size, timeout)
                except OSError as error:
                    why = str(error).removeprefix(f"{shown(url)}: ")
                    return type(error)(f"{shown(url)}, byte {start}: {why}")

        return await asyncio.gather(*(one(*wanted) for wanted in ranges))

    return _run(all_of_them)


def fetch_small(url: str, timeout: float = TIMEOUT) -> bytes | None:
    """The whole of a small file; None where it is not there.

    Raises:
        PermissionError: it is not for us. Some servers answer so, too, where it is not there.
        OSError: it could not be fetched.
    """
    system = _file_system(url, timeout)

    # Else s3fs asks for the size first, to fetch a large file in pieces.
    options = {"max_concurrency": 1} if url.lower().startswith("s3:") else {}

    async def ask() -> bytes:
        if system.async_impl:
            return await system._cat_file(_path(system, url), **options)
        return await asyncio.to_thread(system.cat_file, _path(system, url))

    try:
        return _run(lambda: _persist(ask, url, timeout))
    except FileNotFoundError:
        return None
    except OSError as error:
        if isinstance(error.__cause__, Exception) and http_status(error.__cause__) == 400:  # of a wrong signature
            raise PermissionError(str(error)) from error
        raise


def find_remote(spec: str, pattern: str, timeout: float = TIMEOUT) -> list[RemoteFile]:
    """The files that a pattern of URLs stands for. Globs need a listing, which http has not.

    Raises:
        SourceError: nothing there, no access, a glob on http, a server that cannot send ranges, or a missing package.
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
    urls = list(expand_braces(pattern))
    if over_http and "*" in pattern.partition("?")[0]:
        hint = "write the URLs, with braces such as x-{000..123}.tar"
        raise SourceError(f"{name}: {shown(pattern)}: over http nothing lists files, so * finds none; {hint}")

    async def all_of_them() -> list[list[RemoteFile]]:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(url: str) -> list[RemoteFile]:
            async with gate:
                if over_http:
                    return await _persist(lambda: _probe(url, timeout), url, timeout)
                if not _is_glob(url):
                    return await _persist(lambda: _list(url, timeout), url, timeout)
                # Of any number of pages. Those of the asynchronous ones have limits of their own; all ask again for
                # each of them.
                limit = None if _file_system(url, timeout).async_impl else _LISTING * timeout
                return await _persist(lambda: _list(url, timeout), url, limit, attempts=2)

        return await asyncio.gather(*(one(url) for url in urls))

    try:
        found = _run(all_of_them)
    except FileNotFoundError as error:
        raise SourceError(
            f"{name}: {str(error).replace(': is not there', '')} matches no file; check the URL"
        ) from error
    except OSError as error:
        kind = SourceAway if isinstance(error, Unreachable) else SourceError
        raise kind(f"{name}: cannot open {error}; check the URL and the credentials") from error
    return [file for files in found for file in files]


async def _probe(url: str, timeout: float) -> list[RemoteFile]:
    """Asks for the first byte: the answer tells the size, also where HEAD is not allowed, as on signed URLs."""
    system = _file_system(url, timeout)
    session = await system.set_session()
    address = system.encode_url(_path(system, url))
    async with session.get(address, headers={"Range": "bytes=0-0"}) as answer:
        if answer.status == 404:
            raise FileNotFoundError(url)
        answer.raise_for_status()
        size = re.fullmatch(r"bytes 0-0/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status != 206 or not size:
            answer.close()  # or the whole shard would come
            raise RangeNotSupported("the server sends whole files only; download the shards, or use one with ranges")
        return [RemoteFile(url, int(size[1]), answer.headers.get("ETag") or answer.headers.get("Last-Modified", ""))]


def _is_glob(url: str) -> bool:
    return any(character in url for character in "*?[")


async def _list(url: str, timeout: float) -> list[RemoteFile]:
    """The files that a URL or a glob stands for, on a file system with listings."""
    system = _file_system(url, timeout)
    path = _path(system, url)
    listing = _is_glob(url)
    if listing and system.async_impl:
        held = await system._glob(path, detail=True)
    elif listing:
        held = await asyncio.to_thread(system.glob, path, detail=True)
    else:
        held = {path: await (system._info(path) if system.async_impl else asyncio.to_thread(system.info, path))}
    protocol = url.partition("://")[0]
    files = [
        RemoteFile(f"{protocol}://{name}" if listing else url, int(info["size"]), _tag(info))
        for name, info in sorted(held.items())
        if info.get("type") == "file" and not name.endswith(".index")
    ]
    if not files:
        raise FileNotFoundError(url)
    return files


def _tag(info: dict[str, Any]) -> str:
    """What a listing tells of a file's state, by the names of s3, gs and hf."""
    known = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "mtime", "last_modified", "updated", "created")
    return next((str(info[name]) for name in known if info.get(name)), "")
