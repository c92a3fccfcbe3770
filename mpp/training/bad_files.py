"""Files that could not be decoded: counted by reason, named in the run's folder, and too many of them end the run."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mpp.errors import RunError
from mpp.system.files import write_csv

HEAD = ("index", "kind", "file", "reason")
FEW_READ = 1000
"""Below this many images, the share of bad files is taken of this many."""


class BadFile(Protocol):
    """An image that could not be used; `mpp.data.reader.Bad` is one."""

    @property
    def index(self) -> int: ...

    @property
    def kind(self) -> str: ...

    @property
    def where(self) -> str: ...

    @property
    def reason(self) -> str: ...


class BadFiles:
    """Counts and names the files that could not be decoded; too many of them end the run.

    Args:
        path: bad_files.csv of the run, read where the run goes on; None writes nothing.
        max_share: of the images read.
        read: images read before this start of the run.
        setting: what the user calls `max_share`.
    """

    def __init__(self, path: Path | None, max_share: float, read: int = 0, setting: str = "data.max_bad") -> None:
        self._path = path
        self._max_share = max_share
        self._read, self._setting = read, setting
        self._kinds: dict[int, str] = {}
        if path is not None and path.exists() and read:
            rows = _rows(path)
            self._kinds = {int(row[0]): row[1] for row in rows}
            write_csv(path, [HEAD, *rows])  # without a last line that a crash cut short
        elif path is not None:
            path.unlink(missing_ok=True)

    def add(self, bad: Sequence[BadFile], images: int) -> None:
        """Notes the bad files met while reading `images` images.

        Raises:
            RunError: past the allowed share.
        """
        self._read += images
        fresh = {file.index: file for file in bad if file.index not in self._kinds}
        self._kinds |= {index: file.kind for index, file in fresh.items()}
        if fresh and self._path is not None:
            rows = [(file.index, file.kind, file.where, file.reason) for file in fresh.values()]
            head = [] if self._path.exists() else [HEAD]
            with self._path.open("a", newline="", encoding="utf-8", errors="surrogateescape") as out:
                csv.writer(out, lineterminator="\n").writerows([*head, *rows])
        limit = self._max_share * max(self._read, FEW_READ)
        if fresh and len(self._kinds) > limit:
            last = list(fresh.values())[-1]
            where = f"; all are in {self._path}: mend them, or raise {self._setting}" if self._path else ""
            raise RunError(
                f"{len(self._kinds):,} of the first {self._read:,} images cannot be used ({by_kind(self.kinds())}), "
                f"more than {self._setting} allows; the last is image {last.index}: {last}{where}"
            )

    def kinds(self) -> Counter[str]:
        """How many of each kind."""
        return Counter(self._kinds.values())

    def __len__(self) -> int:
        return len(self._kinds)


def by_kind(kinds: Counter[str]) -> str:
    """`12 truncated, 1 empty`, the most frequent first."""
    return ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())


def told(folder: Path) -> str:
    """One line on what all ranks of a run met; empty where there was nothing."""
    paths = sorted(folder.glob("bad_files*.csv"))
    met = {row[0]: row[1] for path in paths for row in _rows(path)}
    if not met:
        return ""
    return f"{len(met):,} images could not be used ({by_kind(Counter(met.values()))}): {', '.join(map(str, paths))}"


def _rows(path: Path) -> list[list[str]]:
    """The rows of a bad_files.csv; a last one that a crash cut short is left out."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [row for row in csv.reader(file) if len(row) == len(HEAD) and row[0].isdigit()]
