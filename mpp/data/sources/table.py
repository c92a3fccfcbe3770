"""Images listed in a CSV or TSV file: path, label and split, read row by row.

cats/1.jpg,cat          path,label,split
dogs/7.jpg,dog    or    cats/1.jpg,cat,train
"""

import csv
import os
import re
import time
from array import array
from collections import defaultdict
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpp.data.sources.base import SourceError, Split, numbered_classes
from mpp.data.sources.files import FileSource, PathTable
from mpp.data.sources.names import is_image, printable
from mpp.data.sources.specs import spec_of

# As `_folded` gives them, the likeliest first.
_PATH = (
    "path",
    "filepath",
    "imagepath",
    "imgpath",
    "file",
    "filename",
    "imagefile",
    "imagename",
    "imgname",
    "image",
    "img",
)
_LABEL = ("label", "class", "target", "classname")
_SPLITS = ("train", "val", "test")
_MARKS = ",;|\t"
_TRIED = 100
_PIECE = 65_536  # paths that are strings at a time
_MOST_CLASSES = 1_000_000
_MOST_DIGITS = 18  # of a label


@dataclass(frozen=True)
class _Columns:
    """Where a row holds what; -1: nowhere."""

    path: int
    label: int
    split: int
    width: int
    header: bool


def _folded(name: str) -> str:
    """A column's name without its case, spaces and dashes: `Image_Path` is `imagepath`."""
    return re.sub(r"[\s_-]", "", name.lower())


class _Rows:
    """Path and label of each row of a split."""

    def __init__(self) -> None:
        self.paths = PathTable()
        self.numbers: dict[str, int] = {}  # of the labels, as they come
        self.labels = array("i")
        self._piece: list[str] = []

    def add(self, path: str, label: str) -> None:
        self.labels.append(self.numbers.setdefault(label, len(self.numbers)) if label else -1)
        self._piece.append(path)
        if len(self._piece) == _PIECE:
            self.end()

    def end(self) -> None:
        self.paths.extend(self._piece)
        self._piece.clear()


class Table:
    """The rows of one file, read once for all of its splits.

    Columns are path and, where there is one, label. A header names them: path, file, image and the like (img_path,
    File Name); label, class or target; split, of train, val and test. Other columns are passed over. Labels are names,
    sorted into classes, or whole numbers from 0; where a row has none, or -1, it is -1. Paths are absolute or start
    from the file's folder; files that are missing are met when they are read.

    Raises:
        SourceError: missing, not such a file, without rows, columns of which none can be the paths, or more labels than
            classes can be.
    """

    def __init__(self, spec: str, path: Path) -> None:
        self.spec, self.path = spec, path
        self.delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self.columns = self._find_columns()
        self.by_split = self._read(self.columns.split >= 0)
        held_out = "test" if "test" in self.by_split else "val"
        self.splits = {"train": "train", "test": held_out} if {"train", held_out} <= self.by_split.keys() else {}
        if self.splits:
            self.by_split = {name: self.by_split[name] for name in self.splits.values()}
        elif len(self.by_split) > 1:
            self.by_split = self._read(False)  # not split after all: in the order of the lines
        if not self.by_split:
            raise SourceError(f"{spec}: {path} has a header and no rows; write one for each image")

    def _read(self, apart: bool) -> dict[str, _Rows]:
        """The rows of each split, or of all in one."""
        found: defaultdict[str, _Rows] = defaultdict(_Rows)
        for path, label, split in self._entries():
            rows = found[split if apart else ""]
            rows.add(path, label)
            if len(rows.numbers) > _MOST_CLASSES:
                raise SourceError(
                    f"{self.spec}: more than {_MOST_CLASSES:,} different labels, the last {label[:40]!r}; "
                    "leave out the column, or name classes in it"
                )
        for rows in found.values():
            rows.end()
        return dict(found)

    def open(self, split: Split = "train") -> FileSource:
        """The images of a split; of all rows, where the file is not split.

        Raises:
            SourceError: a label that is no class, or none of the first 100 images is there.
        """
        name = self.splits.get(split, next(iter(self.by_split)))
        rows = self.by_split[name]
        self._check_exists([rows.paths[index] for index in range(min(_TRIED, len(rows.paths)))])
        notes = [f"the rows of split {name} alone"] if self.splits else []
        labelled = self._labels(rows)
        if labelled is None:
            return FileSource(self.spec, self.path.parent, rows.paths, note="; ".join(notes))
        labels, classes = labelled
        if missing := int((labels < 0).sum()):
            notes.append(f"{missing:,} without a label")
        return FileSource(self.spec, self.path.parent, rows.paths, labels, classes, "; ".join(notes))

    def _labels(self, rows: _Rows) -> tuple[np.ndarray, tuple[str, ...]] | None:
        """int64 (n,), -1 for none, and the classes: the train split's, then those that the other alone has."""
        own = set(rows.numbers)
        known = set(self.by_split["train"].numbers) if self.splits and rows is not self.by_split["train"] else set()
        if not own:
            return None
        if all(name.isascii() and name.isdigit() for name in own | known):
            bare = {name: name.lstrip("0") or "0" for name in own | known}
            largest = max(bare.values(), key=lambda name: (len(name), name))
            if len(largest) > _MOST_DIGITS:  # int refuses thousands of digits
                raise SourceError(
                    f"{self.spec}: the label {largest[:40]} would mean as many classes; write names or count from 0"
                )
            images = sum(len(each.paths) for each in self.by_split.values())
            classes = numbered_classes(self.spec, int(largest), images)
            numbers = {name: int(bare[name]) for name in own}
        else:
            classes = (*sorted(known), *sorted(own - known))
            numbers = {name: label for label, name in enumerate(classes)}
        table = np.array([*(numbers[name] for name in rows.numbers), -1], dtype=np.int64)
        return table[np.frombuffer(rows.labels, dtype=np.intc)], classes

    def _rows(self) -> Generator[tuple[int, list[str]]]:
        """Rows with the number of their (last) line; empty lines are passed over."""
        number = 0
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file, delimiter=self.delimiter, strict=True)
                for row in reader:
                    number = reader.line_num
                    if row:
                        yield number, row
        except FileNotFoundError:
            raise SourceError(f"{self.spec}: there is no file {self.path}; check the path") from None
        except IsADirectoryError:
            meant = spec_of("folder", str(self.path))
            raise SourceError(f"{self.spec}: {self.path} is a folder; did you mean {meant}?") from None
        except OSError as error:
            raise SourceError(f"{self.spec}: cannot read {self.path} ({error.strerror}); check it") from error
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{self.spec}: {self.path} is not UTF-8 after line {number} ({error.reason}); save it as UTF-8"
            ) from error
        except csv.Error as error:
            raise SourceError(f"{self.spec}: {self.path}, after line {number}: {error}; mend the row") from error

    def _find_columns(self) -> _Columns:
        with closing(self._rows()) as rows:
            _, first = next(rows, (0, []))
        if not first:
            raise SourceError(f"{self.spec}: {self.path} is empty; expected rows of path,label")
        names = [_folded(cell) for cell in first]
        path = next((names.index(name) for name in _PATH if name in names), -1)
        if path < 0 or os.path.lexists(self._full(first[path])):
            if len(first) > 2:
                raise SourceError(
                    f"{self.spec}: {self.path} has {len(first)} columns and no header; begin it with e.g. path,label"
                )
            nothing = not any(is_image(cell) or os.path.lexists(self._full(cell)) for cell in first)
            if path < 0 and nothing and not any(mark in cell for cell in first for mark in _MARKS):
                held = printable(", ".join(first))
                raise SourceError(f"{self.spec}: {self.path} has the columns {held}; call that of the images path")
            return _Columns(0, 1 if len(first) == 2 else -1, -1, len(first), False)
        label = next((names.index(name) for name in _LABEL if name in names), -1)
        split = names.index("split") if "split" in names else -1
        for column in (path, label, split):
            if column >= 0 and names.count(names[column]) > 1:
                raise SourceError(f"{self.spec}: {self.path} has two columns {names[column]!r}; rename one")
        return _Columns(path, label, split, len(first), True)

    def _full(self, path: str) -> str:
        return os.path.join(self.path.parent, path)  # noqa: PTH118 - 10 million of them

    def _fail(self, line: int, what: str) -> SourceError:
        return SourceError(f"{self.spec}: {self.path}, line {line}, {what}")

    def _entries(self) -> Generator[tuple[str, str, str]]:
        """Path, label and split of each image; "" for what a row lacks."""
        columns, rows = self.columns, self._rows()
        with closing(rows):
            if columns.header:
                next(rows)
            for line, row in rows:
                if len(row) != columns.width:
                    raise self._fail(line, f"has {len(row)} cells, the first row {columns.width}; mend the row")
                path = row[columns.path]
                if not path or "\0" in path:
                    raise self._fail(line, f"has the path {path!r}; write the path of an image")
                split = "" if columns.split < 0 else row[columns.split].strip().lower()
                if columns.split >= 0 and split not in _SPLITS:
                    raise self._fail(line, f"has the split {split!r}; write train, val or test")
                label = "" if columns.label < 0 else row[columns.label].strip()
                yield path, "" if label == "-1" else label, split

    def _check_exists(self, paths: list[str]) -> None:
        """That not all of these are missing: a few missing files are bad files, all of them a wrong folder."""
        if not any(os.path.lexists(self._full(path)) for path in paths):
            shown = printable(self._full(paths[0]))
            many = f"none of the first {len(paths)} images is there, such as {shown}"
            what = many if len(paths) > 1 else f"the first image is not there: {shown}"
            marks = [mark for mark in _MARKS if mark != self.delimiter and all(mark in path for path in paths)]
            hint = f"; is {marks[0]!r} between its columns? Write {self.delimiter!r}" if marks else ""
            raise SourceError(f"{self.spec}: {what}; paths start from the file's folder{hint}")


_kept: dict[tuple[object, ...], Table] = {}
_MOST_KEPT = 2  # images to train on, and to test with
_SETTLED = 2e9  # ns; a file that was written since may be written again without looking any different


def read_table(spec: str, path: Path) -> Table:
    """The table in a CSV (.tsv: tab-separated) file; of one that has not changed, the same as before.

    A command opens its images several times: to train, to test, for the page in the end.

    Raises:
        SourceError: as `Table`.
    """
    try:
        info = path.stat()
    except OSError:
        return Table(spec, path)  # which says why
    key = (spec, path, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)
    if key not in _kept:
        table = Table(spec, path)
        if time.time_ns() - info.st_mtime_ns < _SETTLED:
            return table
        while len(_kept) >= _MOST_KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = table
    return _kept[key]
