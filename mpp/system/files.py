"""Files and folders that appear whole or not at all, and claims on a folder by one process at a time."""

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

_ABANDONED = 3600.0  # seconds after which a temporary folder belongs to no living process
LOCK = ".lock"
"""File of a folder that its writer claims."""


def cache_folder() -> Path:
    """$MPP_CACHE, or ~/.cache/mpp."""
    return Path(os.environ.get("MPP_CACHE") or "~/.cache/mpp").expanduser()


def make_folder(folder: Path, names: Sequence[str]) -> None:
    """Makes the folder that `--out` names, before hours are spent on the files called `names` that go into it.

    Raises UserError where it cannot be made or written to, or has folders of those names.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK) or any((folder / name).is_dir() for name in names):
        raise UserError(f"cannot write {', '.join(names)} to --out {folder}; choose another folder")


@contextlib.contextmanager
def unmade_if_refused(folder: Path) -> Generator[None]:
    """Removes a folder that was made within, and is still empty, if an error leaves the context."""
    made = not folder.exists()
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def write_whole(path: Path, content: str | bytes | Callable[[BinaryIO], object], sync: bool = False) -> None:
    """Writes a file under a temporary name and renames it at the end, so that no process ever sees half of it.

    `content` is text (as UTF-8), bytes, or a function that writes to the open file. The folder is made where it is
    missing; with `sync` the file survives a crash of the machine. Raises OSError; the earlier file is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:  # not mkstemp, whose files nobody else may read
            with contextlib.suppress(OSError):  # a lock marks it as being written
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows as CSV in UTF-8, as `write_whole`; paths that are not UTF-8 keep their bytes. Raises OSError."""

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        text.detach()

    write_whole(path, write)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a CSV file as dictionaries; none where it is missing or no such file."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(file)]
    except (OSError, csv.Error):
        return []


@contextlib.contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """Gives a temporary folder that replaces `folder` at the end; after an error nothing of it stays.

    The old folder goes only when the new one has its name. A process that is killed between the two leaves the old one
    beside, as .NAME.old, and the next call puts it back. Raises UserError where it cannot be written, or is or holds
    the current folder.
    """
    inside = False
    try:
        target = folder.resolve()  # of "." and "..", which have no name to put another beside
        with contextlib.suppress(FileNotFoundError):  # the current folder is gone
            inside = Path.cwd().is_relative_to(target)
    except (OSError, RuntimeError) as error:  # a link to itself
        raise UserError(f"cannot write to {folder}: {getattr(error, 'strerror', None) or error}") from error
    if inside:
        raise UserError(f"cannot write to {folder}: it is or holds the current folder; name a new one")
    old, temporary = target.with_name(f".{target.name}.old"), target.with_name(f".{target.name}-{secrets.token_hex(6)}")

    def put_back() -> None:
        if old.exists() and not target.exists():
            old.rename(target)

    try:
        put_back()
        temporary.mkdir(parents=True)
        yield temporary
        remove(old)  # of a process that was killed before it could
        with contextlib.suppress(FileNotFoundError):
            target.rename(old)
        temporary.rename(target)
    except BaseException as error:
        put_back()
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
        raise
    finally:
        remove(temporary)
    for left in (old, *target.parent.glob(f".{glob.escape(target.name)}-{12 * '[0-9a-f]'}")):
        with contextlib.suppress(OSError):
            if left == old or time.time() - left.stat().st_mtime > _ABANDONED:
                remove(left)


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def set_aside(folder: Path) -> Path | None:
    """Renames a folder to NAME_before, in the place of an earlier one, until `drop_aside`; None if there is none."""
    before = folder.with_name(f"{folder.name}_before")
    if not folder.exists():
        return None
    remove(before)
    return folder.rename(before)


def drop_aside(folder: Path) -> None:
    """Removes the folder that was set aside."""
    remove(folder.with_name(f"{folder.name}_before"))


_locks: set[BinaryIO] = set()
_opening = threading.Lock()
_noted_no_locks = False


def _release_in_child() -> None:
    """A forked child, such as a loader's worker, would keep its parent's locks beyond its parent's death."""
    for file in _locks:
        file.close()
    _locks.clear()
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_release_in_child)


@contextlib.contextmanager
def claimed(lock: Path, wait: bool = False) -> Generator[bool]:
    """Gives whether this thread has the file to itself, among all processes and threads, until the end.

    The claim ends with the process, however that ends. While it lasts, `holder` names the process. With `wait`, waits
    until nobody else has it. On a file system without locks every claim succeeds, which is noted once on stderr.
    The file is made where it is missing, and stays: removing it would part those who wait from those who come. Raises
    OSError where it cannot be made.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with _opening:  # no fork between opening and noting it
            file = stack.enter_context(lock.open("a+b", buffering=0))
            _locks.add(file)
        stack.callback(_locks.discard, file)
        mine = _lock(file, lock, wait)
        if mine:
            now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            _write_holder(file, f"process {os.getpid()} on {socket.gethostname()} since {now}")
            stack.callback(_write_holder, file, "")
        yield mine


def _lock(file: BinaryIO, path: Path, wait: bool) -> bool:
    global _noted_no_locks
    try:
        # Not lockf's lock, which is the whole process's, and gone as soon as it closes the file anywhere.
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # the latter on some network disks
        return False
    except OSError as error:
        if not _noted_no_locks:
            why = f"{path} cannot be locked ({error.strerror or error})"
            print(f"note: {why}: see to it that one process alone writes there", file=sys.stderr)
        _noted_no_locks = True
    return True


def _write_holder(file: BinaryIO, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk; a forked child, where it is closed
        file.truncate(0)
        file.write(text.encode())


@contextlib.contextmanager
def one_writer(folder: Path, setting: str, lock: str = LOCK) -> Generator[None]:
    """Claims a folder, made where it is missing, for writing by this thread alone, by the file `lock` in it.

    Raises ConfigError, which names the `setting`, such as "--out": another process has claimed it, or it cannot be
    written.
    """
    with contextlib.ExitStack() as stack:
        try:
            mine = stack.enter_context(claimed(folder / lock))
        except OSError as error:
            why = f"cannot be written to ({error.strerror}); give another one"
            raise ConfigError(f"{setting} {folder} {why}") from error
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
