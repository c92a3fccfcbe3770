"""Folders of images, at any depth; first-level sub-folders are classes, train/ with test/ or val/ are splits."""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from mpp.data.sources.base import SourceError, Split
from mpp.data.sources.files import FileSource, PathTable
from mpp.data.sources.names import IMAGE_EXTENSIONS, Ignored, is_hidden, is_image, is_picture
from mpp.data.sources.specs import spec_of

_PIECE = 65_536
_Place = tuple[int, int]


class _Passed(Ignored):
    """Files that are passed over: those that a system hides, and others."""

    hidden = 0

    def note(self) -> str:
        """`ignored 2 hidden and 1 other files`; empty for none."""
        kinds = [f"{number:,} {kind}" for kind, number in (("hidden", self.hidden), ("other", self.number)) if number]
        files = "file" if self.hidden + self.number == 1 else "files"
        return f"ignored {' and '.join(kinds)} {files}" if kinds else ""


def _entries(folder: str, passed: _Passed) -> Iterator[tuple[str, bool]]:
    """Names of the images and (True) sub-folders in a folder, in any order; counts what it passes over.

    Whatever is called as an image and is no folder counts as one, be it a broken link or a FIFO: it is met, and
    named, when it is read.
    """
    with os.scandir(folder) as found:
        for entry in found:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself
                is_folder = False
            if is_hidden(entry.name):
                passed.hidden += 1
            elif is_folder or is_image(entry.name):
                yield entry.name, is_folder
            else:
                passed.add(entry.name, is_picture(entry.name))


def _in_order(names: Iterable[str]) -> Iterator[str]:
    """Names by their bytes. Sorted in one buffer: ten million strings of one flat folder would take gigabytes."""
    rest, pieces = iter(names), []
    while piece := [name.encode("utf-8", "surrogateescape") for name in islice(rest, _PIECE)]:
        pieces.append(np.array(piece))
    if pieces:
        table = np.concatenate(pieces)
        pieces.clear()
        table.sort()
        for start in range(0, len(table), _PIECE):
            for name in table[start : start + _PIECE].tolist():
                yield name.decode("utf-8", "surrogateescape")


def _identity(folder: str) -> _Place:
    """Device and inode: a link back to a folder on the way down would never end."""
    info = os.stat(folder)  # noqa: PTH116
    return info.st_dev, info.st_ino


def _walk(root: str, passed: _Passed) -> Iterator[tuple[str, list[str]]]:
    """What each folder's paths begin with, the root's first, then those of each sub-folder in order.

    The caller puts the names of a folder's sub-folders into the list that comes with it. A stack of our own, for
    folders may be nested deeper than functions.
    """
    waiting, around = [("", 0)], list[_Place]()
    while waiting:
        prefix, depth = waiting.pop()
        del around[depth:]
        here = _identity(_path(root, prefix))
        if here in around:
            passed.add(prefix[:-1], False)
            continue
        around.append(here)
        folders: list[str] = []
        yield prefix, folders
        waiting += [(f"{prefix}{name}/", depth + 1) for name in reversed(list(_in_order(folders)))]


def _path(root: str, prefix: str) -> str:
    return f"{root}/{prefix[:-1]}" if prefix else root


def _own_images(folder: str, folders: list[str], passed: _Passed) -> Iterator[str]:
    for name, is_folder in _entries(folder, passed):
        if is_folder:
            folders.append(name)
        else:
            yield name


def _images_under(root: str, passed: _Passed) -> Iterator[str]:
    """Paths of the images under a folder, sorted: its own, then those of each sub-folder."""
    for prefix, folders in _walk(root, passed):
        for name in _in_order(_own_images(_path(root, prefix), folders, passed)):
            yield prefix + name


def _holds_image(root: str) -> bool:
    passed = _Passed()
    walk = _walk(root, passed)
    return any(next(_own_images(_path(root, prefix), folders, passed), "") for prefix, folders in walk)


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the two splits; empty where a folder is not split."""
    try:
        held_out = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
        if held_out is None or not (folder / "train").is_dir():
            return {}
        for name, is_folder in _entries(str(folder), _Passed()):
            if not is_folder or (name not in ("train", "test", "val") and _holds_image(f"{folder}/{name}")):
                return {}
    except OSError:
        return {}
    return {"train": folder / "train", "test": folder / held_out}


def _class_names(folder: Path) -> tuple[str, ...]:
    """First-level sub-folders that hold an image, sorted."""
    names = sorted(name for name, is_folder in _entries(str(folder), _Passed()) if is_folder)
    return tuple(name for name in names if _holds_image(f"{folder}/{name}"))


class _ByFolder:
    """Passes paths through, and notes the first-level folder of each."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = paths
        self.numbers: dict[str, int] = {}  # "": the root itself
        self.found = array("i")

    def __iter__(self) -> Iterator[str]:
        for path in self._paths:
            folder = path.partition("/")[0] if "/" in path else ""
            self.found.append(self.numbers.setdefault(folder, len(self.numbers)))
            yield path


class Folder:
    """A folder, of images or of splits.

    Args:
        spec: the source as the user wrote it.
        folder: of the images under it, at any depth, or of train/ and test/ or val/.
        expected: classes that it may hold a single one of, as of the images that a test belongs to.
    """

    def __init__(self, spec: str, folder: Path, expected: Sequence[str] = ()) -> None:
        self.spec, self.folder, self.expected = spec, folder, expected
        self.splits = split_folders(folder)
        self._known: tuple[str, ...] | None = None

    def open(self, split: Split = "train") -> FileSource:
        """The images of a split, labelled by first-level sub-folder where all lie in two or more; of a folder that is
        not split, all.

        The classes of a test split are those of the train split, and after them those that it alone has.

        Raises:
            SourceError: missing, not a folder, unreadable, or no image in it.
        """
        spec, folder = self.spec, self.folder
        if not os.path.exists(folder):  # noqa: PTH110 - Path.exists raises for a name that is too long
            raise SourceError(f"{spec}: there is no folder {folder}; check the path")
        if not folder.is_dir():
            parent = spec_of("folder", str(folder.parent))
            raise SourceError(f"{spec}: {folder} is a file; give the folder that it lies in, {parent}")
        root = self.splits.get(split, folder)
        passed = _Passed()
        try:
            seen = _ByFolder(_images_under(str(root), passed))
            paths = PathTable(seen)
            own = tuple(sorted(name for name in seen.numbers if name))
            known = self._classes_of_train(own, root)
        except OSError as error:
            raise SourceError(
                f"{spec}: cannot list {error.filename} ({error.strerror}); check its permissions"
            ) from error
        alone = f"{root.name}/ alone, as its sub-folders are splits" if self.splits else ""
        note = "; ".join(filter(None, (alone, passed.note())))
        extensions = f"files that end in {' '.join(IMAGE_EXTENSIONS)}"
        if not len(paths):
            raise SourceError(f"{spec}: no image in {root}{f' ({note})' if note else ''}; expected {extensions}")
        labels, classes = None, None
        if "" not in seen.numbers and (len(known) >= 2 or set(own) <= set(self.expected)):
            classes = tuple(dict.fromkeys((*known, *own)))
            numbers = {name: label for label, name in enumerate(classes)}
            labels = np.array([numbers[name] for name in seen.numbers], dtype=np.int64)
            labels = labels[np.frombuffer(seen.found, dtype=np.intc)]
        source = FileSource(spec, root, paths, labels, classes, note)
        source.warnings = passed.warnings(len(source), f"only {extensions} are read; convert the others")
        return source

    def _classes_of_train(self, own: tuple[str, ...], root: Path) -> tuple[str, ...]:
        """A test split counts by the train split's classes, for it may lack some, then by those that it alone has."""
        train = self.splits.get("train", root)
        if root == train:
            self._known = own
        elif self._known is None:
            self._known = _class_names(train)
        return self._known
