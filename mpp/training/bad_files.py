"""Files that could not be decoded: counted by kind, named in the run's folder, and too many of them end the run."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from mpp.data.reader import Bad
from mpp.errors import RunError
from mpp.system.files import write_csv

HEAD = ("index", "kind", "file", "reason")
MIN_IMAGES = 1000
"""Below this many images read, the share of bad files is taken of this many."""


class BadFiles:
    """Counts and names the files that could not be decoded; too many of them end the run.

    Args:
        path: bad_files.csv of the run, read where the run goes on (`read` images before); None writes nothing.
        max_share: of the images read; the user calls it `setting`.
    """

    def __init__(self, path: Path | None, max_share: float, read: int = 0, setting: str = "data.max_bad") -> None:
        self._path = path
        self._max_share = max_share
        self._read, self._setting = read, setting
        self._kinds: dict[int, str] = {}
        if path is not None and path.exists() and read:
            rows = read_bad_rows(path)
            self._kinds = {int(row[0]): row[1] for row in rows}
            write_csv(path, [HEAD, *rows])  # without a last line that a crash cut short
        elif path is not None:
            path.unlink(missing_ok=True)

    def add(self, bad: Sequence[Bad], images: int) -> None:
        """Add the bad files met while reading `images` images; raises RunError past the allowed share."""
        self._read += images
        new = {file.index: file for file in bad if file.index not in self._kinds}
        self._kinds |= {index: file.kind for index, file in new.items()}
        if new and self._path is not None:
            rows = [(file.index, file.kind, file.where, file.reason) for file in new.values()]
            head = [] if self._path.exists() else [HEAD]
            with self._path.open("a", newline="", encoding="utf-8", errors="surrogateescape") as out:
                csv.writer(out, lineterminator="\n").writerows([*head, *rows])
        if new and len(self._kinds) > self._max_share * max(self._read, MIN_IMAGES):
            last = list(new.values())[-1]
            listed = f"; all are in {self._path}: mend them, or raise {self._setting}" if self._path else ""
            raise RunError(
                f"{len(self._kinds):,} of the first {self._read:,} images cannot be used "
                f"({by_kind(self._kinds.values())}), more than {self._setting} allows; the last is image {last.index}: "
                f"{last}{listed}"
            )

    def kinds(self) -> Counter[str]:
        """Count the files of each kind."""
        return Counter(self._kinds.values())

    def __len__(self) -> int:
        return len(self._kinds)


def by_kind(kinds: Iterable[str]) -> str:
    """Return `12 truncated, 1 empty`, the most frequent first."""
    return ", ".join(f"{number:,} {kind}" for kind, number in Counter(kinds).most_common())


def summary_of(folder: Path) -> str:
    """Return one line on the bad files of all ranks of a run; empty where there were none."""
    paths = sorted(folder.glob("bad_files*.csv"))
    kinds = {row[0]: row[1] for path in paths for row in read_bad_rows(path)}
    if not kinds:
        return ""
    return f"{len(kinds):,} images could not be used ({by_kind(kinds.values())}): {', '.join(map(str, paths))}"


def read_bad_rows(path: Path) -> list[list[str]]:
    """Read a bad_files.csv without its head, and without a last row that a crash cut short."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [row for row in csv.reader(file) if len(row) == len(HEAD) and row[0].isdigit()]
