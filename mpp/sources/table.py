"""Images listed in a CSV or TSV file: path, label and split, read row by row.

cats/1.jpg,cat          path,label,split
dogs/7.jpg,dog    or    cats/1.jpg,cat,train
"""

import csv
import os
import re
from array import array
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpp.sources.base import SourceError, Split, numbered_classes
from mpp.sources.files import FileSource, PathTable
from mpp.sources.names import is_image, printable
from mpp.sources.specs import spec_of

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
_TRIED = 100
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


class _Table:
    """The rows of one file."""

    def __init__(self, spec: str, path: Path) -> None:
        self.spec, self.path = spec, path
        self.delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self.columns = self._find_columns()

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
            known = next((cell for cell, name in zip(first, names, strict=True) if name in (*_LABEL, "split")), "")
            if known and path < 0 and not any(is_image(cell) or os.path.lexists(self._full(cell)) for cell in first):
                held = ", ".join(first)
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

    def entries(self) -> Generator[tuple[str, str, str]]:
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

    def check_exists(self, paths: list[str]) -> None:
        """That not all of these are missing: a few missing files are bad files, all of them a wrong folder."""
        if not any(os.path.lexists(self._full(path)) for path in paths):
            shown = printable(self._full(paths[0]))
            many = f"none of the first {len(paths)} images is there, such as {shown}"
            what = many if len(paths) > 1 else f"the first image is not there: {shown}"
            marks = [mark for mark in ",;|\t" if mark != self.delimiter and all(mark in path for path in paths)]
            hint = f"; is {marks[0]!r} between its columns? Write {self.delimiter!r}" if marks else ""
            raise SourceError(f"{self.spec}: {what}; paths start from the file's folder{hint}")


def table_splits(spec: str, path: Path) -> dict[str, str]:
    """What the column `split` calls the two splits; empty where a file is not split.

    Raises:
        SourceError: as `open_table`.
    """
    table = _Table(spec, path)
    if table.columns.split < 0:
        return {}
    found: set[str] = set()
    with closing(table.entries()) as entries:
        for _, _, split in entries:
            found.add(split)
            if len(found) == len(_SPLITS):
                break
    held_out = "test" if "test" in found else "val"
    return {"train": "train", "test": held_out} if {"train", held_out} <= found else {}


class _Wanted:
    """Passes on the paths of one split, and notes their labels."""

    def __init__(self, table: _Table, splits: dict[str, str], split: Split) -> None:
        self._table, self._splits, self._wanted = table, splits, splits.get(split, "")
        self.numbers: dict[str, int] = {}
        self.found = array("i")
        self.of_train: set[str] = set()
        self.rows = 0  # of all splits

    def __iter__(self) -> Iterator[str]:
        first: list[str] | None = []
        for self.rows, (path, label, split) in enumerate(self._table.entries(), start=1):  # noqa: B020
            if self._splits and split == "train" != self._wanted:
                self.of_train.add(label)
            if self._splits and split != self._wanted:
                continue
            self.found.append(self.numbers.setdefault(label, len(self.numbers)) if label else -1)
            if max(len(self.numbers), len(self.of_train)) > _MOST_CLASSES:
                raise SourceError(
                    f"{self._table.spec}: more than {_MOST_CLASSES:,} different labels, the last {label[:40]!r}; "
                    "leave out the column, or name classes in it"
                )
            if first is not None:
                first.append(path)
                if len(first) == _TRIED:
                    self._table.check_exists(first)
                    first = None
            yield path
        if first:
            self._table.check_exists(first)

    def labels(self) -> tuple[np.ndarray, tuple[str, ...]] | None:
        """int64 (n,), -1 for none, and the classes: the train split's, then those that the other alone has."""
        own, known = set(self.numbers), self.of_train - {""}
        if not own:
            return None
        if all(name.isascii() and name.isdigit() for name in own | known):
            bare = {name: name.lstrip("0") or "0" for name in own | known}
            largest = max(bare.values(), key=lambda name: (len(name), name))
            if len(largest) > _MOST_DIGITS:  # int refuses thousands of digits
                raise SourceError(
                    f"{self._table.spec}: the label {largest[:40]} would mean as many classes; "
                    "write names or count from 0"
                )
            classes = numbered_classes(self._table.spec, int(largest), self.rows)
            numbers = {name: int(bare[name]) for name in self.numbers}
        else:
            classes = (*sorted(known), *sorted(own - known))
            places = {name: label for label, name in enumerate(classes)}
            numbers = {name: places[name] for name in self.numbers}
        table = np.array([*(numbers[name] for name in self.numbers), -1], dtype=np.int64)
        return table[np.frombuffer(self.found, dtype=np.intc)], classes


def open_table(spec: str, path: Path, split: Split = "train") -> FileSource:
    """The images that a CSV (.tsv: tab-separated) file lists; paths are absolute or start from its folder.

    Columns are path and, where there is one, label. A header names them: path, file, image and the like (img_path,
    File Name); label, class or target; split, of train, val and test. Other columns are passed over. Labels are names,
    sorted into classes, or whole numbers from 0; where a row has none, or -1, it is -1. Files that are missing are met
    when they are read.

    Raises:
        SourceError: missing, not such a file, without rows, columns of which none can be the paths, more labels than
            classes can be, or none of the first 100 images is there.
    """
    table = _Table(spec, path)
    splits = table_splits(spec, path)
    wanted = _Wanted(table, splits, split)
    paths = PathTable(wanted)
    if not len(paths):
        raise SourceError(f"{spec}: {path} has a header and no rows; write one for each image")
    notes = [f"the rows of split {splits[split]} alone"] if splits else []
    labelled = wanted.labels()
    if labelled is None:
        return FileSource(spec, path.parent, paths, note="; ".join(notes))
    labels, classes = labelled
    if missing := int((labels < 0).sum()):
        notes.append(f"{missing:,} without a label")
    return FileSource(spec, path.parent, paths, labels, classes, "; ".join(notes))
