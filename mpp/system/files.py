"""Where things are kept that can be made again, how a file is written so that nobody meets half of it, and by whom."""

import contextlib
import csv
import fcntl
import glob
import io
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from mpp.errors import ConfigError, UserError

_ABANDONED = 3600.0  # seconds after which a temporary folder belongs to nobody any more
LOCK = ".lock"
"""The file of a folder that is claimed by the one who writes there."""


def cache_folder() -> Path:
    """$MPP_CACHE, or ~/.cache/mpp."""
    return Path(os.environ.get("MPP_CACHE") or "~/.cache/mpp").expanduser()


def make_folder(folder: Path, names: Sequence[str]) -> None:
    """Makes the folder that `--out` names, before hours are spent on the files called `names` that go into it.

    Raises:
        UserError: it cannot be made or written to, or has folders of those names.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK) or any((folder / name).is_dir() for name in names):
        raise UserError(f"cannot write {', '.join(names)} to --out {folder}; choose another folder")


@contextlib.contextmanager
def whole_file(path: Path) -> Generator[BinaryIO]:
    """A file under a temporary name that is renamed at the end, so that no other process ever sees half of it.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:  # not mkstemp, whose files nobody else may read
            with contextlib.suppress(OSError):  # tells, until it has its name, that somebody is at it
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file as `whole_file`; raises what it does."""
    with whole_file(path) as file:
        write(file)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """A temporary folder beside `folder` that takes its place at the end; after an error nothing of it stays.

    What was there before goes only when the new one has its name. A process that is killed between the two leaves it
    beside, as .NAME.old, and the next one puts it back.

    Raises:
        UserError: where it cannot be written, and of the current folder or one that holds it, which would be replaced.
    """
    inside = False
    try:
        place = folder.resolve()  # of "." and "..", which have no name to put another beside
        with contextlib.suppress(FileNotFoundError):  # of a current folder that is gone
            inside = Path.cwd().is_relative_to(place)
    except (OSError, RuntimeError) as error:  # a link to itself
        raise UserError(f"cannot write to {folder}: {getattr(error, 'strerror', None) or error}") from error
    if inside:
        raise UserError(f"cannot write to {folder}: it is or holds the current folder; name a new one")
    old, temporary = place.with_name(f".{place.name}.old"), place.with_name(f".{place.name}-{secrets.token_hex(6)}")
    try:
        _put_back(old, place)
        temporary.mkdir(parents=True)
        yield temporary
        _remove(old)  # of one that was killed before it could
        with contextlib.suppress(FileNotFoundError):
            place.rename(old)
        temporary.rename(place)
    except BaseException as error:
        _put_back(old, place)
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
        raise
    finally:
        _remove(temporary)
    for left in (old, *place.parent.glob(f".{glob.escape(place.name)}-{12 * '[0-9a-f]'}")):
        with contextlib.suppress(OSError):
            if left == old or time.time() - left.stat().st_mtime > _ABANDONED:
                _remove(left)


def _put_back(old: Path, place: Path) -> None:
    if old.exists() and not place.exists():
        old.rename(place)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def set_aside(folder: Path) -> Path | None:
    """Renames a folder of an earlier time to NAME_before, in the place of one before that; None if there is none.

    It stays until `drop_aside`, when there is a new one.
    """
    before = folder.with_name(f"{folder.name}_before")
    if not folder.exists():
        return None
    _remove(before)
    return folder.rename(before)


def drop_aside(folder: Path) -> None:
    """Removes what was set aside."""
    _remove(folder.with_name(f"{folder.name}_before"))


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows as CSV in UTF-8, whole or not at all; paths that are no UTF-8 keep their bytes.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """

    with whole_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        text.flush()
        text.detach()


_locks: set[BinaryIO] = set()
_opening = threading.Lock()
_said_unlocked = False


def _let_go_in_child() -> None:
    """A forked child, such as a loader's worker, would keep its parent's locks beyond its parent's death."""
    for file in _locks:
        file.close()
    _locks.clear()
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_let_go_in_child)


@contextlib.contextmanager
def claimed(lock: Path, wait: bool = False) -> Generator[bool]:
    """Whether nobody else is within this with the same file, in another process or thread; if so, nobody will be.

    The claim ends with the process, however that ends, whatever becomes of the file. While it lasts, `holder` says
    whose it is. On a file system without locks all are let in, which is said once.

    Args:
        lock: made where it is missing, and left behind: removing it would part those who wait from those who come.
        wait: until nobody else is.

    Raises:
        OSError: the file cannot be made.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with _opening:  # no fork between opening and noting it
            file = stack.enter_context(lock.open("a+b", buffering=0))
            _locks.add(file)
        stack.callback(_locks.discard, file)
        mine = _lock(file, lock, wait)
        if mine:
            _write_holder(file, f"process {os.getpid()} on {socket.gethostname()} since {_now()}")
            stack.callback(_write_holder, file, "")
        yield mine


def _lock(file: BinaryIO, path: Path, wait: bool) -> bool:
    global _said_unlocked
    try:
        # Not lockf's lock, which is the whole process's, and gone as soon as it closes the file anywhere.
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # the latter on some network disks
        return False
    except OSError as error:
        if not _said_unlocked:
            why = error.strerror or error
            print(
                f"note: {path} cannot be locked ({why}): see to it that one process alone writes there", file=sys.stderr
            )
        _said_unlocked = True
    return True


def _write_holder(file: BinaryIO, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk; a forked child, where it is closed
        file.truncate(0)
        file.write(text.encode())


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


@contextlib.contextmanager
def one_writer(folder: Path, setting: str, lock: str = LOCK) -> Generator[None]:
    """Within it no other process or thread that asks for it writes to the folder, which is made where it is missing.

    Args:
        folder: to be written to.
        setting: that names it.
        lock: the file in it that is claimed.

    Raises:
        ConfigError: another one does, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            mine = stack.enter_context(claimed(folder / lock))
        except OSError as error:
            raise ConfigError(
                f"{setting} {folder} cannot be written to ({error.strerror}); give another one"
            ) from error
        if not mine:
            who = f"{holder(folder / lock)} writes to it"
            raise ConfigError(f"{setting} {folder} is in use: {who}; wait until it has ended, or give another one")
        yield


def holder(lock: Path) -> str:
    """Who has claimed the file: "process 4711 on host since 2026-01-31 12:00:00 UTC"; "another process" if unknown."""
    try:
        return lock.read_text("utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"
