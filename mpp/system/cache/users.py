"""Who uses what in the cache: a list for each process, which counts for as long as that process lives."""

import atexit
import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from mpp.system.files import cache_folder, claimed

SUFFIXES = ("index", "tar", "part", "sums", "pixels", "sizes.npy", "pixels.json")
"""Of what lies under one key."""
_YOUNG = 2.0  # seconds, in which a file may have been made and not yet locked
_LONG = 86_400.0  # seconds, after which nobody is taken to use what nobody can lock


def use(*names: str) -> None:
    """Says that this process uses these entries, KEY or hf/NAME/NAME, for as long as it lives, and that they are new.

    A cache that cannot be written is no error: then nobody can remove anything from it, either.
    """
    folder, now = cache_folder(), time.time()
    with contextlib.suppress(OSError), alone(folder):
        here = os.getpid(), folder  # a forked child has none of its parent's
        user = _users.get(here) or _User(folder / "in_use")
        _users[here] = user
        user.add(names)
        for name in names:
            for path in [folder / name] if "/" in name else [folder / f"{name}.{suffix}" for suffix in SUFFIXES]:
                with contextlib.suppress(OSError):
                    os.utime(path, (now, now))


class _User:
    """What this process says that it uses: a list, and a lock on another file, which ends with the process."""

    def __init__(self, folder: Path) -> None:
        self._list = folder / f"{os.getpid()}-{secrets.token_hex(4)}"
        self._names: set[str] = set()
        self._claim = contextlib.ExitStack()
        self._claim.enter_context(claimed(self._list.with_suffix(".lock"), wait=True))

    def add(self, names: Iterable[str]) -> None:
        new = [name for name in dict.fromkeys(names) if name not in self._names]
        self._names.update(new)
        if new:
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
    for one in (path, path.with_suffix(".lock")):
        with contextlib.suppress(OSError):
            one.unlink()


def busy(folder: Path) -> set[str]:
    """What living processes say that they use."""
    names: set[str] = set()
    for lock in folder.glob("in_use/*.lock"):
        with contextlib.suppress(OSError):
            if is_claimed(lock):
                names.update(lock.with_suffix("").read_text("utf-8").split("\n"))
            else:
                _remove_user(lock.with_suffix(""))
    return names - {""}


def is_claimed(path: Path) -> bool:
    """Whether a living process has locked the file; where there are no locks, whether one may have, within a day."""
    with path.open("r+b") as file:
        age = time.time() - os.fstat(file.fileno()).st_mtime
        if age < _YOUNG:  # even to try would keep its maker from locking it
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            return age < _LONG
        return False


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Within it nobody else says what is in use, or removes anything; gives whether there are locks to go by."""
    with claimed(folder / "cache.lock", wait=True), (folder / "cache.lock").open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks = False  # although it is claimed
        except (BlockingIOError, PermissionError):
            locks = True
        except OSError:
            locks = False
        yield locks
