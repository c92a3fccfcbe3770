"""Folders of images, at any depth; first-level sub-folders are classes, or train/, val/ and test/."""

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np

from mpp.data.sources.base import ClassNames, SourceError
from mpp.data.sources.files import FileSource, PathTable
from mpp.data.sources.names import (
    IMAGE_EXTENSIONS,
    Ignored,
    Split,
    is_hidden,
    is_image,
    is_picture,
    is_split,
    splits_among,
)
from mpp.data.sources.specs import spec_of
from mpp.system.progress import Progress

_TOLD = 256  # images between looks at the clock


class _Ignored(Ignored):
    """Files that are passed over: those that a system hides, and others."""

    hidden = 0

    def note(self) -> str:
        """`ignored 2 hidden and 1 other files`; empty for none."""
        kinds = [f"{number:,} {kind}" for kind, number in (("hidden", self.hidden), ("other", self.number)) if number]
        files = "file" if self.hidden + self.number == 1 else "files"
        return f"ignored {' and '.join(kinds)} {files}" if kinds else ""


def _listed(folder: str, ignored: _Ignored) -> tuple[list[str], list[str]]:
    """Names of the images and of the sub-folders in a folder, sorted by their bytes.

    Whatever is called as an image and is no folder counts as one, be it a broken link or a FIFO: reading it says so.
    """
    images, folders = list[str](), list[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself
                is_folder = False
            if is_hidden(entry.name):
                ignored.hidden += 1
            elif is_folder or is_image(entry.name):
                (folders if is_folder else images).append(entry.name)
            else:
                ignored.add(entry.name, is_picture(entry.name))
    return sorted(images, key=os.fsencode), sorted(folders, key=os.fsencode)


def _images_under(root: str, ignored: _Ignored) -> Iterator[str]:
    """Paths of the images under a folder, its own first, then those of each sub-folder in order.

    A stack of our own: os.walk follows a link back to a folder on the way down for ever.
    """
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        prefix, above = waiting.pop()
        folder = f"{root}/{prefix[:-1]}" if prefix else root
        info = os.stat(folder)  # noqa: PTH116
        here = (info.st_dev, info.st_ino)
        if here in above:
            ignored.add(prefix[:-1], False)
            continue
        images, folders = _listed(folder, ignored)
        for name in images:
            yield prefix + name
        within = above | {here}
        waiting += [(f"{prefix}{name}/", within) for name in reversed(folders)]


def split_folders(folder: Path) -> dict[Split, Path]:
    """The folders of the splits; empty where a folder is not split, for it has no such folders or other images."""
    try:
        called = [name for name in os.listdir(folder) if is_split(name) and (folder / name).is_dir()]  # noqa: PTH208
        if not (splits := splits_among(called)):
            return {}
        images, folders = _listed(str(folder), _Ignored())
        others = {*folders} - {*splits.values()}
        if images or any(next(_images_under(f"{folder}/{name}", _Ignored()), "") for name in others):
            return {}
    except OSError:
        return {}
    return {split: folder / name for split, name in splits.items()}


def open_folder(spec: str, folder: Path, expected: Sequence[str] = ()) -> dict[Split, Callable[[], FileSource]]:
    """What opens each split of a folder: of images at any depth, or of train/, val/ and test/ (see `SPLIT_NAMES`).

    Images are labelled by first-level sub-folder where all lie in two or more. The classes of another split are those
    of the train split, and after them those that it alone has.

    Args:
        spec, folder: the source as the user wrote it, and where to look.
        expected: classes that it may hold a single one of, as of the images that a test belongs to.

    Raises SourceError: on opening a split that is missing, not a folder, unreadable, or without an image.
    """
    splits = split_folders(folder)
    if not splits:
        return {"train": lambda: _open(spec, folder, expected)}
    train = cache(lambda: _open(spec, splits["train"], expected, split=True))

    def other(root: Path) -> FileSource:
        return _open(spec, root, expected, train().classes or (), split=True)

    return {split: train if split == "train" else partial(other, root) for split, root in splits.items()}


def _open(spec: str, root: Path, expected: Sequence[str], known: ClassNames = None, split: bool = False) -> FileSource:
    if not os.path.exists(root):  # noqa: PTH110 - Path.exists raises for a name that is too long
        raise SourceError(f"{spec}: there is no folder {root}; check the path")
    if not root.is_dir():
        parent = spec_of("folder", str(root.parent))
        raise SourceError(f"{spec}: {root} is a file; give the folder that it lies in, {parent}")
    ignored, paths = _Ignored(), PathTable()
    numbers: dict[str, int] = {}  # of the first-level folders as they come; "": the root itself
    number_of = array("i")
    try:
        with Progress("listing the folder", None) as progress:
            for path in _images_under(str(root), ignored):
                paths.append(path)
                first, slash, _ = path.partition("/")
                number_of.append(numbers.setdefault(first if slash else "", len(numbers)))
                if not len(paths) % _TOLD:
                    progress.to(len(paths))
    except OSError as error:
        raise SourceError(f"{spec}: cannot list {error.filename} ({error.strerror}); check its permissions") from error
    note = "; ".join(filter(None, (f"{root.name}/ alone, as its sub-folders are splits" * split, ignored.note())))
    extensions = f"files that end in {' '.join(IMAGE_EXTENSIONS)}"
    if not len(paths):
        raise SourceError(f"{spec}: no image in {root}{f' ({note})' if note else ''}; expected {extensions}")
    own = tuple(sorted(name for name in numbers if name))
    known = own if known is None else known
    labels, classes = None, None
    if "" not in numbers and (len(known) >= 2 or set(own) <= set(expected)):
        classes = tuple(dict.fromkeys((*known, *own)))
        label_of = {name: label for label, name in enumerate(classes)}
        labels = np.array([label_of[name] for name in numbers], dtype=np.int64)
        labels = labels[np.frombuffer(number_of, dtype=np.intc)]
    source = FileSource(spec, root, paths, labels, classes, note)
    source.warnings = ignored.warnings(len(source), f"only {extensions} are read; convert the others")
    return source
