"""Images listed in a CSV or TSV file: path, label and split, row by row.

cats/1.jpg,cat          path,label,split
dogs/7.jpg,dog    or    cats/1.jpg,cat,train
"""

import contextlib
import csv
import os
import re
import time
from array import array
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpp.data.sources.base import ClassNames, LabelSets, Source, SourceError
from mpp.data.sources.dicom import with_frames
from mpp.data.sources.files import FileSource, PathTable
from mpp.data.sources.in_memory import numbered_classes, sets_note
from mpp.data.sources.names import LABEL_COLUMNS, SPLIT_NAMES, Split, folded, is_image, printable, splits_among
from mpp.data.sources.specs import spec_of

_PATH_COLUMNS = (
    *("path", "filepath", "imagepath", "imgpath", "file", "filename"),
    *("imagefile", "imagename", "imgname", "image", "img"),
)  # as `folded` gives them, the likeliest first
_SPLITS = ("", "train", "val", "test")
_MARKS = ",;|\t"
_TRIED = 100  # paths, of which one must be there
_BETWEEN = ";|"  # several labels of an image
_CELLS = {"1": "1", "1.0": "1", "true": "1"} | dict.fromkeys(
    ("0", "0.0", "", "-1", "-1.0", "false"), "0"
)  # of findings
_EMPTY = -2  # the number of a row without a label, which may be the empty set
_MOST_CLASSES = 1_000_000
_MOST_DIGITS = 18  # of a label
_SETTLED = 2e9  # ns; a file that was written since may be written again without looking any different


class _Columns(NamedTuple):
    """Where a row has its path, label, split and group (-1: nowhere), how many cells, and whether the first is a
    header."""

    path: int
    label: int
    split: int
    group: int
    width: int
    header: bool
    findings: tuple[int, ...] = ()
    """Of a header without a label column: those that are neither of the others."""


class Table:
    """The rows of one file, read once for all of its splits.

    Columns are path and, where there is one, label. A header names them: path, file, image and the like (img_path,
    File Name); label, class or target; split (see `SPLIT_NAMES`); group. Others are passed over. Labels are names,
    sorted into classes, or whole numbers from 0; where a row has none, or -1, it is -1. Where one has several, with `;`
    or `|` between, all rows have sets of them, without a label the empty one. So they do where, instead of a column of
    labels, two or more have 1 for "yes", 0, nothing or -1 ("uncertain") for "no". Paths are absolute or start from the
    file's folder; reading an image says where a file is missing.

    Raises SourceError: missing, not such a file, without rows, no column of paths, or more labels than classes can be.
    """

    def __init__(self, spec: str, path: Path) -> None:
        self.spec, self.path = spec, path
        self.delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self.paths, self._numbers, self._splits = PathTable(), array("i"), bytearray()
        self._names: dict[str, int] = {}  # of the labels, numbered as they come
        self._groups: PathTable | None = None
        self._findings: dict[int, str] = {}  # columns that may still be findings, with their names
        rows = self._rows()
        first = next(rows, (0, []))
        if not first[1]:
            raise SourceError(f"{spec}: {path} is empty; expected rows of path,label")
        columns = self._find_columns(first[1])
        if columns.group >= 0:
            self._groups = PathTable()
        self._findings = {column: first[1][column].strip() for column in columns.findings}
        for line, row in rows if columns.header else chain([first], rows):
            self._add(line, row, columns)
        if not len(self.paths):
            raise SourceError(f"{spec}: {path} has a header and no rows; write one for each image")
        yes = set().union(*({at for at, cell in enumerate(cells) if cell == "1"} for cells in self._names))
        self._places = [at for at, column in enumerate(columns.findings) if column in self._findings and at in yes]
        if columns.findings and len(self._places) < 2:  # they are other columns
            self._numbers, self._names, self._places = array("i", [-1] * len(self.paths)), {}, []
        self._classes = tuple(self._findings[columns.findings[at]] for at in self._places)
        found = {_SPLITS[number] for number in set(self._splits)}
        self.splits: dict[Split, str] = splits_among(found) or {"train": ""}

    def _add(self, line: int, row: list[str], columns: _Columns) -> None:
        def fail(what: str) -> SourceError:
            return SourceError(f"{self.spec}: {self.path}, line {line}, {what}")

        if len(row) != columns.width:
            raise fail(f"has {len(row)} cells, the first row {columns.width}; mend the row")
        path = row[columns.path]
        if not path or "\0" in path:
            raise fail(f"has the path {path!r}; write the path of an image")
        split = row[columns.split].strip().lower() if columns.split >= 0 else ""
        if columns.split >= 0:
            called = next((known for known, names in SPLIT_NAMES.items() if split in names), None)
            if called is None:
                raise fail(f"has the split {split!r}; write train, val or test")
            split = called
        label = row[columns.label].strip() if columns.label >= 0 else ""
        if self._findings:
            cells = [_CELLS.get(row[c].strip().lower(), " ") for c in columns.findings]
            if " " in cells:  # these columns are no findings
                others = {c for c, cell in zip(columns.findings, cells, strict=True) if cell == " "}
                self._findings = {c: name for c, name in self._findings.items() if c not in others}
            label = "".join(cells)
        self.paths.append(path)
        self._splits.append(_SPLITS.index(split))
        if self._groups is not None:
            self._groups.append(row[columns.group].strip())
        unknown = {"": _EMPTY, "-1": -1}
        self._numbers.append(unknown[label] if label in unknown else self._names.setdefault(label, len(self._names)))
        if len(self._names) > _MOST_CLASSES and not columns.findings:
            what = f"more than {_MOST_CLASSES:,} different labels, the last {label[:40]!r}"
            raise SourceError(f"{self.spec}: {what}; leave out the column, or name classes in it")

    def open(self, split: Split = "train") -> Source:
        """The images of a split; of all rows, where the file is not split.

        Raises SourceError: a label that is no class, or none of the first 100 images is there.
        """
        name = self.splits[split]
        rows = self._rows_of(name)
        paths, groups = self.paths, self._groups
        if name:
            paths = PathTable(paths[row] for row in rows.tolist())
            groups = None if groups is None else PathTable(groups[row] for row in rows.tolist())
        self._check_exists([paths[index] for index in range(min(_TRIED, len(paths)))])
        notes = [f"the rows of split {name} alone"] if name else []
        sets, classes = self._sets(rows)
        if sets is not None:
            notes.append(sets_note(sets))
            labels = None
        else:
            labels, classes = self._labels(rows, split)
            if labels is not None and (missing := int((labels < 0).sum())):
                notes.append(f"{missing:,} without a label")
        note, folder = "; ".join(notes), self.path.parent
        return with_frames(FileSource(self.spec, folder, paths, labels, classes, note, groups, sets))

    def _rows_of(self, name: str) -> np.ndarray:
        splits = np.frombuffer(self._splits, dtype=np.uint8)
        return np.flatnonzero(splits == _SPLITS.index(name)) if name else np.arange(len(splits))

    def _sets(self, rows: np.ndarray) -> tuple[LabelSets | None, ClassNames]:
        """The sets of labels of these rows, and the classes of all; twice None where each has one label at most."""
        names = list(self._names)
        if self._places:
            classes = self._classes
            cells = [[name[at] == "1" for at in self._places] for name in names]
        elif any(mark in name for name in names for mark in _BETWEEN):
            found = [{part.strip() for part in re.split(f"[{_BETWEEN}]", name)} - {""} for name in names]
            classes = tuple(sorted(set().union(*found)))
            cells = [[name in labels for name in classes] for labels in found]
        else:
            return None, None
        # The empty set last, for rows without a label.
        distinct, number = np.unique([*cells, [False] * len(classes)], axis=0, return_inverse=True)
        numbers = np.frombuffer(self._numbers, dtype=np.intc)[rows]
        of_rows = np.where(numbers == -1, -1, number.reshape(-1)[np.where(numbers < 0, len(names), numbers)])
        return LabelSets(of_rows.astype(np.int64), distinct.astype(np.uint8)), classes

    def _labels(self, rows: np.ndarray, split: Split) -> tuple[np.ndarray | None, ClassNames]:
        """int64 (n,), -1 for none, and the classes: the train split's, then those that the other alone has."""
        numbers, names = np.maximum(np.frombuffer(self._numbers, dtype=np.intc), -1), list(self._names)

        def used(among: np.ndarray) -> set[str]:
            return {names[number] for number in np.unique(numbers[among]).tolist() if number >= 0}

        own, known = used(rows), used(self._rows_of("train")) if split != "train" else set[str]()
        if not own:
            return None, None
        if all(name.isascii() and name.isdigit() for name in own | known):
            bare = {name: name.lstrip("0") or "0" for name in own | known}
            largest = max(bare.values(), key=lambda name: (len(name), name))
            if len(largest) > _MOST_DIGITS:  # int refuses thousands of digits
                what = f"the label {largest[:40]} would mean as many classes"
                raise SourceError(f"{self.spec}: {what}; write names or count from 0")
            images = sum(len(self._rows_of(name)) for name in self.splits.values())
            classes = numbered_classes(self.spec, int(largest), images)
            label_of = {name: int(number) for name, number in bare.items()}
        else:
            classes = (*sorted(known), *sorted(own - known))
            label_of = {name: label for label, name in enumerate(classes)}
        return np.array([*(label_of.get(name, -1) for name in names), -1], dtype=np.int64)[numbers[rows]], classes

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Rows with the number of their (last) line; empty lines are passed over."""
        line = 0
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file, delimiter=self.delimiter, strict=True)
                for row in reader:
                    line = reader.line_num
                    if row:
                        yield line, row
        except FileNotFoundError:
            raise SourceError(f"{self.spec}: there is no file {self.path}; check the path") from None
        except IsADirectoryError:
            meant = spec_of("folder", str(self.path))
            raise SourceError(f"{self.spec}: {self.path} is a folder; did you mean {meant}?") from None
        except OSError as error:
            raise SourceError(f"{self.spec}: cannot read {self.path} ({error.strerror}); check it") from error
        except UnicodeDecodeError as error:
            what = f"{self.path} is not UTF-8 after line {line} ({error.reason})"
            raise SourceError(f"{self.spec}: {what}; save it as UTF-8") from error
        except csv.Error as error:
            raise SourceError(f"{self.spec}: {self.path}, after line {line}: {error}; mend the row") from error

    def _find_columns(self, first: list[str]) -> _Columns:
        def there(cell: str) -> bool:
            return os.path.lexists(self._full(cell))

        def place(known: tuple[str, ...]) -> int:
            return next((names.index(name) for name in known if name in names), -1)

        names = [folded(cell) for cell in first]
        path, label, split = place(_PATH_COLUMNS), place(LABEL_COLUMNS), place(("split",))
        group = place(("group",))
        if path < 0 or there(first[path]):
            if len(first) > 2:
                what = f"{self.path} has {len(first)} columns and no header"
                raise SourceError(f"{self.spec}: {what}; begin it with e.g. path,label")
            may_be_images = any(is_image(cell) or there(cell) or any(mark in cell for mark in _MARKS) for cell in first)
            if path < 0 and not may_be_images:
                columns = printable(", ".join(first))
                raise SourceError(f"{self.spec}: {self.path} has the columns {columns}; call that of the images path")
            return _Columns(0, 1 if len(first) == 2 else -1, -1, -1, len(first), False)
        for column in (path, label, split, group):
            if column >= 0 and names.count(names[column]) > 1:
                raise SourceError(f"{self.spec}: {self.path} has two columns {names[column]!r}; rename one")
        others = tuple(c for c in range(len(first)) if c not in (path, split, group)) if label < 0 else ()
        return _Columns(path, label, split, group, len(first), True, others)

    def _full(self, path: str) -> str:
        return os.path.join(self.path.parent, path)  # noqa: PTH118 - as in files.py

    def _check_exists(self, paths: list[str]) -> None:
        """Refuses a table whose first images are all missing: a few are bad files, all of them a wrong folder."""
        if any(os.path.lexists(self._full(path)) for path in paths):
            return
        first = printable(self._full(paths[0]))
        many = f"none of the first {len(paths)} images is there, such as {first}"
        what = many if len(paths) > 1 else f"the first image is not there: {first}"
        marks = [mark for mark in _MARKS if mark != self.delimiter and all(mark in path for path in paths)]
        hint = f"; is {marks[0]!r} between its columns? Write {self.delimiter!r}" if marks else ""
        raise SourceError(f"{self.spec}: {what}; paths start from the file's folder{hint}")


def read_table(spec: str, path: Path) -> Table:
    """The table in a CSV (.tsv: tab-separated) file; of one that has not changed, the same as before.

    A command opens its images several times: to train, to test, for the page in the end. SourceError as of `Table`.
    """
    with contextlib.suppress(OSError):  # which `Table` says
        info = path.stat()
        if time.time_ns() - info.st_mtime_ns >= _SETTLED:
            return _cached_table(spec, path, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)
    return Table(spec, path)


@lru_cache(maxsize=2)  # images to train on, and to test with
def _cached_table(spec: str, path: Path, *_state: int) -> Table:
    return Table(spec, path)
