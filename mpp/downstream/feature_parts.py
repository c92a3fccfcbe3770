"""The parts of a file of features that is being made: in a hidden folder beside it, each made once and whole.

settings.json     what all of them depend on
000012.npz        features (m, ...) and indices (m,) of the images from 12 x `size` on, without the bad ones
bad_files.csv     those, of each rank
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from mpp.errors import UserError
from mpp.system.files import one_writer, remove, write_csv, write_whole
from mpp.training.bad_files import HEAD, BadFiles, by_kind, read_bad_rows

_LOOSE = ("init", "data", "folder", "seed")  # weights and images are known by what is in them
_LONG = ("weights", "architecture", "input", "images")


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How the settings of some features differ from others, such as "layer: -1 -> -2; other weights"; "" if not."""
    names = [name for name in now if name not in _LOOSE and was.get(name) != now[name]]
    return "; ".join(f"other {name}" if name in _LONG else f"{name}: {was.get(name)} -> {now[name]}" for name in names)


class Parts:
    """The parts of the features of `images` images that belong to the file `out`, `size` images each.

    Attributes:
        number: how many there are in all.
    """

    def __init__(self, out: Path, images: int, size: int) -> None:
        self.folder = out.with_name(f".{out.name}.parts")
        self.images, self.size, self.number = images, size, -(-images // size)

    @contextlib.contextmanager
    def claimed(self, settings: dict[str, Any]) -> Iterator[None]:
        """Makes the folder, which nobody else then writes to; raises UserError where it has parts of other features."""
        path = self.folder / "settings.json"
        if path.exists() and (changed := changes(json.loads(path.read_bytes()), settings)):
            todo = f"give another --out, or remove {self.folder} to begin anew"
            raise UserError(f"{self.folder} has a part of other features ({changed}): {todo}")
        with one_writer(self.folder, "--out"):
            if not path.exists():
                write_whole(path, json.dumps(settings))
            yield

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:06d}.npz"

    def missing(self) -> list[int]:
        """Numbers of the parts that are yet to be made."""
        there = {path.name for path in self.folder.glob("*.npz")}
        return [part for part in range(self.number) if self._path(part).name not in there]

    def positions(self, part: int) -> Int64[np.ndarray, " n"]:
        """The images of a part."""
        return np.arange(part * self.size, min((part + 1) * self.size, self.images), dtype=np.int64)

    def write(self, part: int, features: np.ndarray, indices: Int64[np.ndarray, " m"]) -> None:
        """Keeps the features of the images of a part that are not bad. Raises OSError."""
        write_whole(self._path(part), lambda file: np.savez(file, features=features, indices=indices), sync=True)

    def features(self) -> Iterator[np.ndarray]:
        """The features of all parts in order, without the empty ones."""
        for part in range(self.number):
            if len(features := self._column(part, "features")):
                yield features

    def indices(self) -> Int64[np.ndarray, " m"]:
        """The images that are not bad, ascending."""
        return np.concatenate([self._column(part, "indices") for part in range(self.number)])

    def _column(self, part: int, name: str) -> np.ndarray:
        with self._path(part).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays[name]

    def bad_files(self, rank: int, max_share: float) -> BadFiles:
        """The list of a rank's bad files, which ends the work where there are too many."""
        done = (self.number - len(self.missing())) * self.size
        name = "bad_files.csv" if rank == 0 else f"bad_files.rank{rank}.csv"
        return BadFiles(self.folder / name, max_share, done, "--max-bad")

    def move_bad_files(self, to: Path) -> str:
        """Writes the bad files of all ranks to a CSV file; says how many there are, or "" for none."""
        rows: dict[int, list[str]] = {}
        for path in self.folder.glob("bad_files*.csv"):
            rows |= {int(row[0]): row for row in read_bad_rows(path)}
        if not rows:
            remove(to)  # of a file that was here before
            return ""
        write_csv(to, [HEAD, *(rows[index] for index in sorted(rows))])
        return f"{len(rows):,} could not be used ({by_kind(row[1] for row in rows.values())}): {to}"

    def remove(self) -> None:
        """Removes the parts."""
        remove(self.folder)
