"""How much the cache may take, and what goes when more is to come: first what was used longest ago.

What a living process uses stays, and so does what is none of ours (see entries.py).
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from mpp.errors import ConfigError
from mpp.system.cache.entries import Entry, entries, remove
from mpp.system.cache.users import alone
from mpp.system.files import cache_folder

LIMIT = "80%"
"""Of the disk that the cache lies on: what $MPP_CACHE_LIMIT is unless it is set."""
_SPARE = 0.05  # of the free room, which the disk's other users keep
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def limit_of(folder: Path) -> int | None:
    """$MPP_CACHE_LIMIT in bytes; None where it is "none".

    Raises:
        ConfigError: it is no size.
    """
    text = os.environ.get("MPP_CACHE_LIMIT") or LIMIT
    return parse_limit(text, folder, "MPP_CACHE_LIMIT")


def parse_limit(text: str, folder: Path, setting: str) -> int | None:
    """A size such as 200GB, 1.5TiB, 50% (of the disk that the folder lies on) or none, in bytes.

    Raises:
        ConfigError: it is no size.
    """
    if text.strip().lower() == "none":
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(%)|([KMGTP]?)(i?)B?)\s*", text, re.IGNORECASE)
    if not found:
        raise ConfigError(f"{setting} {text!r} is no size; write e.g. 200GB, 50% (of the disk) or none")
    if found[2]:
        return int(float(found[1]) / 100 * shutil.disk_usage(_existing(folder)).total)
    return int(float(found[1]) * (1024 if found[4] else 1000) ** _UNITS[found[3].upper()])


def make_room(size: int, what: str = "it") -> int:
    """Removes what was used longest ago until `size` more bytes are within the limit and on the disk.

    Args:
        size: bytes to be written.
        what: they are, for messages.

    Returns:
        How much may be written now, in bytes.

    Raises:
        OSError: not even then is there room, by ENOSPC; or the folder cannot be made.
        ConfigError: $MPP_CACHE_LIMIT is no size.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    limit = limit_of(folder)
    with alone(folder) as locks:
        held = entries(folder)
        total = sum(entry.size for entry in held)
        idle = sorted((entry for entry in held if not entry.busy), key=_turn)
        gone = sum(entry.size for entry in idle) if locks else 0
        if limit is not None and total - gone + size > limit:
            busy = f", {shown_size(total - gone)} of them in use" if total - gone else ""
            why = f"{what} takes {shown_size(size)}, of the {shown_size(limit)} that MPP_CACHE_LIMIT allows{busy}"
            raise OSError(errno.ENOSPC, why)
        free = _free(folder)
        if size > free + gone:
            raise OSError(errno.ENOSPC, f"{what} takes {shown_size(size)}, {folder} has room for {shown_size(free)}")
        for entry in idle if locks else ():
            over = limit is not None and total + size > limit
            if not over and size <= _free(folder) and entry.kind != "left-over":
                break
            remove(entry)
            total -= entry.size
        left = _free(folder)
        if size > left:
            raise OSError(errno.ENOSPC, f"{what} takes {shown_size(size)}, {folder} has room for {shown_size(left)}")
        return left if limit is None else min(left, max(limit - total, 0))


def drop(names: Iterable[str]) -> None:
    """Removes the entries of these names that nobody uses. What cannot be removed stays."""
    folder, names = cache_folder(), set(names)
    with contextlib.suppress(OSError), alone(folder) as locks:
        for entry in entries(folder) if names and locks else ():
            if entry.name in names and not entry.busy:
                remove(entry)


def clear(kinds: Iterable[str], limit: int = 0) -> list[Entry]:
    """Removes what nobody uses of these kinds, what was used longest ago first, until all is within `limit` bytes.

    Returns:
        What was removed.

    Raises:
        OSError: the cache cannot be written, or its file system has no locks, to tell what is in use.
    """
    folder, wanted, removed = cache_folder(), set(kinds), []
    if not folder.is_dir():
        return []
    with alone(folder) as locks:
        if not locks:
            raise OSError(errno.ENOLCK, f"{folder} has no locks, so that nobody knows what is in use")
        held = entries(folder)
        total = sum(entry.size for entry in held)
        for entry in sorted(held, key=_turn):
            if entry.kind in wanted and not entry.busy and total > limit:
                remove(entry)
                removed.append(entry)
                total -= entry.size
    return removed


def _turn(entry: Entry) -> tuple[bool, bool, float]:
    """What goes first. Indices last: small, and a whole shard is read for each."""
    return entry.kind != "left-over", entry.kind == "index", entry.used


def _free(folder: Path) -> int:
    return int((1 - _SPARE) * shutil.disk_usage(folder).free)


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.absolute().parents) if one.exists())


def shown_size(size: float) -> str:
    """Bytes as one reads them: 1.21 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size:.0f} bytes"
        size /= 1000
    return f"{size:,.3g} TB" if size < 1000 else f"{size:,.0f} TB"
