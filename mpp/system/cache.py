"""The cache on disk: what lies there, which process uses what, and what goes when more is to come.

    KEY.index  KEY.tar  KEY.part KEY.sums  KEY.pixels KEY.sizes.npy  features/KEY.npz  hf/NAME/NAME  in_use/PROCESS

What was used longest ago goes first. What a living process uses stays, and so does every file of another name.
"""

import atexit
import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mpp.errors import ConfigError
from mpp.system.files import cache_folder, claimed
from mpp.system.files import remove as remove_path

KINDS = {
    "index": "where images lie in tars and in DICOM files of several frames",
    "unpacked": "tars out of .tar.gz",
    "kept": "images fetched of remote shards (data.keep)",
    "pixels": "decoded pixels (data.cache)",
    "features": "features of frozen encoders",
    "datasets": "Parquet folders as Hugging Face's datasets read them",
    "left-over": "half written by processes that were killed",
}
LIMIT = "80%"
"""Of the disk that the cache lies on: $MPP_CACHE_LIMIT unless it is set."""
_SUFFIXES = ("index", "tar", "part", "sums", "pixels", "sizes.npy", "pixels.json")
_PIXELS = r"pixels|sizes\.npy|pixels\.(?:json|npy)|bad\.npy"  # .npy of pixels and bad: of older releases
_KEYED = re.compile(rf"([0-9a-f]{{32}})\.(index|tar|part|sums|{_PIXELS}|lock)")
_FEATURES = re.compile(r"[0-9a-f]{64}\.npz")
_HALF = re.compile(rf"\.([0-9a-f]{{32}}\.(index|tar|{_PIXELS})|[0-9a-f]{{64}}\.npz)-[0-9a-f]{{12}}")
_KIND_OF = {"tar": "unpacked", "part": "kept", "sums": "kept", "index": "index"}
_YOUNG = 2.0  # seconds, in which a file may have been made and not yet locked
_LONG = 86_400.0  # seconds after which a file that cannot be locked counts as unused
_SPARE = 0.05  # share of the free room that the disk's other users keep


@dataclass(frozen=True)
class Entry:
    """One thing in the cache that goes as a whole."""

    kind: str  # of KINDS
    name: str  # its key, or its path in the cache
    paths: tuple[Path, ...]  # its files, or its folder
    size: int  # bytes on the disk
    used: float  # when it was written or used last, in seconds since 1970
    busy: bool  # whether a living process uses it

    def remove(self) -> None:
        for path in self.paths:
            remove_path(path)


def entries(folder: Path | None = None) -> list[Entry]:
    """What lies in the cache, by kind, and of each kind what was used longest ago first."""
    folder = folder or cache_folder()
    used = _in_use(folder)
    files, features = _files(folder), _files(folder / "features")
    found = list(_keyed(files, used))
    found += [_entry("features", f"features/{one.name}", [one]) for one in features if _FEATURES.fullmatch(one.name)]
    for path in folder.glob("hf/*/*"):
        if path.is_dir() and not path.is_symlink():
            name = path.relative_to(folder).as_posix()
            found.append(_entry("datasets", name, [path], name in used))
    for path in (*files, *features):
        if _HALF.fullmatch(path.name):
            with contextlib.suppress(OSError):
                found.append(_entry("left-over", path.name, [path], _is_claimed(path)))
    return sorted(found, key=lambda entry: ([*KINDS].index(entry.kind), entry.used, entry.name))


def _files(folder: Path) -> list[Path]:
    """The plain files of a folder; none where it is missing."""
    try:
        with os.scandir(folder) as found:
            return [Path(one.path) for one in found if one.is_file(follow_symlinks=False)]
    except OSError:
        return []


def _keyed(files: Iterable[Path], used: set[str]) -> Iterator[Entry]:
    by_key: dict[str, dict[str, Path]] = {}
    for path in files:
        if found := _KEYED.fullmatch(path.name):
            by_key.setdefault(found[1], {})[found[2]] = path
    for key, by_suffix in by_key.items():
        groups: dict[str, list[Path]] = {}
        for suffix, path in by_suffix.items():
            kind = _KIND_OF.get(suffix, "pixels")
            if suffix in ("index", "lock") and "tar" in by_suffix:  # without its index the tar does not count as whole
                kind = "unpacked"
            elif suffix == "lock" and "pixels" not in by_suffix:
                kind = "left-over"
            groups.setdefault(kind, []).append(path)
        for kind, paths in groups.items():
            with contextlib.suppress(OSError):
                yield _entry(kind, key, paths, _is_claimed(paths[0]) if kind == "left-over" else key in used)


def _entry(kind: str, name: str, paths: list[Path], busy: bool = False) -> Entry:
    size, used = 0, 0.0
    for path in paths:
        inside = [Path(top, one) for top, _, files in os.walk(path) for one in files] if path.is_dir() else [path]
        for one in inside:
            with contextlib.suppress(OSError):
                info = one.lstat()
                # A .part has holes where nothing was fetched.
                size += 512 * info.st_blocks if one.suffix == ".part" else info.st_size
                used = max(used, info.st_mtime)
        with contextlib.suppress(OSError):
            used = max(used, path.lstat().st_mtime)
    return Entry(kind, name, tuple(sorted(paths)), size, used, busy)


def use(*names: str) -> None:
    """Marks entries, KEY or hf/NAME/NAME, as new and as used by this process for as long as it lives.

    A cache that cannot be written is no error: then nobody can remove anything from it, either.
    """
    folder, now = cache_folder(), time.time()
    with contextlib.suppress(OSError), _alone(folder):
        here = os.getpid(), folder  # a forked child has none of its parent's
        if here not in _users:
            _users[here] = _User(folder / "in_use")
        _users[here].add(names)
        for name in names:
            for path in [folder / name] if "/" in name else [folder / f"{name}.{suffix}" for suffix in _SUFFIXES]:
                with contextlib.suppress(OSError):
                    os.utime(path, (now, now))


class _User:
    """This process's list of what it uses, and a lock on a file beside it, which ends with the process."""

    def __init__(self, folder: Path) -> None:
        self._list = folder / f"{os.getpid()}-{secrets.token_hex(4)}"
        self._names: set[str] = set()
        self._claim = contextlib.ExitStack()
        self._claim.enter_context(claimed(self._list.with_suffix(".lock"), wait=True))

    def add(self, names: Iterable[str]) -> None:
        new = [name for name in dict.fromkeys(names) if name not in self._names]
        self._names.update(new)
        with self._list.open("a", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in new)

    def close(self) -> None:
        self._claim.close()
        _remove_user(self._list)


_users: dict[tuple[int, Path], _User] = {}


@atexit.register
def _end() -> None:
    for (process, _), user in _users.items():
        if process == os.getpid():
            user.close()


def _remove_user(path: Path) -> None:
    remove_path(path)
    remove_path(path.with_suffix(".lock"))


def _in_use(folder: Path) -> set[str]:
    """The names that living processes use."""
    names: set[str] = set()
    for lock in folder.glob("in_use/*.lock"):
        with contextlib.suppress(OSError):
            if _is_claimed(lock):
                names.update(lock.with_suffix("").read_text("utf-8").split("\n"))
            else:
                _remove_user(lock.with_suffix(""))
    return names - {""}


def _is_claimed(path: Path) -> bool:
    """Whether a living process has locked the file; where there are no locks, whether one may have, within a day."""
    with path.open("r+b") as file:
        age = time.time() - os.fstat(file.fileno()).st_mtime
        if age < _YOUNG:  # even to try would keep its maker from locking it
            return True
        locked = _is_locked(file)
        return age < _LONG if locked is None else locked


def _is_locked(file: BinaryIO) -> bool | None:
    """Whether another open file holds the lock, taken where none does; None on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return None
    return False


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Keeps other processes from using or removing entries; gives whether there are locks to go by."""
    lock = folder / "cache.lock"
    with claimed(lock, wait=True), lock.open("r+b") as file:
        yield _is_locked(file) is True


def limit_of(folder: Path) -> int | None:
    """$MPP_CACHE_LIMIT in bytes; None where it is "none". Raises ConfigError where it is no size."""
    return parse_limit(os.environ.get("MPP_CACHE_LIMIT") or LIMIT, folder, "MPP_CACHE_LIMIT")


def parse_limit(text: str, folder: Path, setting: str) -> int | None:
    """A size such as 200GB, 1.5TiB, 50% (of the folder's disk) or none, in bytes. Raises ConfigError."""
    if text.strip().lower() == "none":
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(%)|([KMGTP]?)(i?)B?)\s*", text, re.IGNORECASE)
    if not found:
        raise ConfigError(f"{setting} {text!r} is no size; write e.g. 200GB, 50% (of the disk) or none")
    if found[2]:
        existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        return int(float(found[1]) / 100 * shutil.disk_usage(existing).total)
    return int(float(found[1]) * (1024 if found[4] else 1000) ** " KMGTP".index(found[3].upper() or " "))


def make_room(size: int, what: str = "it") -> int:
    """Removes what was used longest ago until `size` more bytes fit; gives how many may be written now.

    `what` names them in messages. Raises OSError (ENOSPC) where there is not even then room or the folder cannot be
    made, ConfigError where $MPP_CACHE_LIMIT is no size.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    limit = limit_of(folder)

    def free(removable: int = 0) -> int:
        room = int((1 - _SPARE) * shutil.disk_usage(folder).free)
        if size > room + removable:
            why = f"{what} takes {shown_size(size)}, {folder} has room for {shown_size(room)}"
            raise OSError(errno.ENOSPC, why)
        return room

    with _alone(folder) as locks:
        found = entries(folder)
        total = sum(entry.size for entry in found)
        idle = sorted((entry for entry in found if locks and not entry.busy), key=_turn)
        removable = sum(entry.size for entry in idle)
        if limit is not None and total - removable + size > limit:
            busy = f", {shown_size(total - removable)} of them in use" if total - removable else ""
            why = f"{what} takes {shown_size(size)}, of the {shown_size(limit)} that MPP_CACHE_LIMIT allows{busy}"
            raise OSError(errno.ENOSPC, why)
        room = free(removable)
        for entry in idle:
            over = limit is not None and total + size > limit
            if not over and size <= room and entry.kind != "left-over":
                break
            entry.remove()
            total -= entry.size
            removable -= entry.size
            room = free(removable)
        return room if limit is None else min(room, max(limit - total, 0))


def drop(names: Iterable[str]) -> None:
    """Removes the entries of these names that nobody uses. What cannot be removed stays."""
    folder, names = cache_folder(), set(names)
    with contextlib.suppress(OSError), _alone(folder) as locks:
        for entry in entries(folder) if names and locks else ():
            if entry.name in names and not entry.busy:
                entry.remove()


def clear(kinds: Iterable[str], limit: int = 0) -> list[Entry]:
    """Removes unused entries of these kinds, the longest unused first, until the cache is within `limit` bytes.

    Gives the removed entries. Raises OSError where the cache cannot be written, or has no locks to tell what is in use.
    """
    folder, kinds, removed = cache_folder(), set(kinds), []
    if not folder.is_dir():
        return []
    with _alone(folder) as locks:
        if not locks:
            raise OSError(errno.ENOLCK, f"{folder} has no locks, so that nobody knows what is in use")
        found = entries(folder)
        total = sum(entry.size for entry in found)
        for entry in sorted(found, key=_turn):
            if entry.kind in kinds and not entry.busy and total > limit:
                entry.remove()
                removed.append(entry)
                total -= entry.size
    return removed


def _turn(entry: Entry) -> tuple[bool, bool, float]:
    """Sorts by what goes first. Indices go last: small, and a whole shard is read for each."""
    return entry.kind != "left-over", entry.kind == "index", entry.used


def shown_size(size: float) -> str:
    """Bytes for people: 1.21 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size:.0f} bytes"
        size /= 1000
    return f"{size:,.3g} TB" if size < 1000 else f"{size:,.0f} TB"
