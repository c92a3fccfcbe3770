"""Where things are kept that can be made again, and how a file is written so that nobody meets half of it."""

import contextlib
import csv
import fcntl
import io
import os
import secrets
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mpp.errors import UserError


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


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes under a temporary name and renames, so that no other process ever sees half a file.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:  # not mkstemp, whose files nobody else may read
            write(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows as CSV in UTF-8, whole or not at all; paths that are no UTF-8 keep their bytes.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        text.flush()
        text.detach()

    write_whole(path, write)


@contextlib.contextmanager
def claimed(lock: Path, wait: bool = False) -> Generator[bool]:
    """Whether no other process is within this with the same file; if so, none will be. `wait`: until it is so.

    The claim ends with the process, however that ends. On a file system without locks there is no telling, and all are
    let in.

    Raises:
        OSError: the file cannot be made.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        mine = True
        try:  # not flock's lock, which forked loader workers would share
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            mine = False
        except OSError:
            pass
        yield mine
