"""Folders of images, at any depth; first-level sub-folders are classes, or train/, val/ and test/.

Of a data set for detection or segmentation, images/ beside labels/, masks/ or the like, the images alone are read.
"""

import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np

from mpp.data.sources.base import ClassNames, Source, SourceError
from mpp.data.sources.dicom import is_dicom_file, may_be_dicom, with_frames
from mpp.data.sources.files import FileSource, PathTable
from mpp.data.sources.names import (
    EXTRA_OF,
    IMAGE_EXTENSIONS,
    Ignored,
    Split,
    is_hidden,
    is_image,
    is_picture,
    is_split,
    lacking,
    printable,
    splits_among,
)
from mpp.data.sources.specs import spec_of
from mpp.system.progress import Progress

_TOLD = 256  # images between looks at the clock

_PICTURES = frozenset(("images", "image", "imgs", "img", "jpegimages"))
_BESIDE = frozenset(
    (
        *("mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentations", "seg"),
        *("gt", "ground_truth", "groundtruth", "labelmap", "labelmaps", "segmentationclass", "segmentationobject"),
    )
)
"""What folders beside those of the images are called, in lower case, where they say what is in these."""
_YEAR = re.compile(r"(train|val|test|unlabeled)(19|20)\d\d", re.IGNORECASE)  # COCO's folders


class _Ignored(Ignored):
    """Files that are passed over: those that a system hides, those that need an extra, masks, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 0
        self.lacking = dict[str, Ignored]()  # by what must be installed
        self.masks = dict[str, int]()  # pictures by the name of their folder

    def add_masks(self, folder: str, names: Sequence[str]) -> None:
        """Passes over these sub-folders, which say what is in the images beside them."""
        for name in names:
            pictures = sum(1 for _ in _images_under(f"{folder}/{name}", _Ignored()))
            self.masks[name] = self.masks.get(name, 0) + pictures

    def all_warnings(self, used: int, why: str) -> tuple[str, ...]:
        """As `warnings`, and lines about masks and about files for which something must be installed."""
        masks = [f"{number:,} in {printable(name)}/" for name, number in self.masks.items() if number]
        lines = [f"pictures beside images are taken for masks and not read: {', '.join(masks)}"] if masks else []
        for extra, files in self.lacking.items():
            example = f"{files.number:,} files ignored, such as {printable(files.example)}"
            lines.append(f"{example}: to read them, {lacking(extra)}")
        return (*lines, *self.warnings(used, why))

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
            elif is_folder:
                folders.append(entry.name)
            elif (called := is_image(entry.name)) or (may_be_dicom(entry.name) and is_dicom_file(entry.path)):
                ending = entry.name.rpartition(".")[2].lower() if called else "dcm"
                if (extra := EXTRA_OF.get(ending)) and lacking(extra):
                    ignored.lacking.setdefault(extra, Ignored()).add(entry.name, True)
                else:
                    images.append(entry.name)
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
        if beside := _beside_images(folders):
            ignored.add_masks(folder, beside)
            folders = [name for name in folders if name not in beside]
        for name in images:
            yield prefix + name
        within = above | {here}
        waiting += [(f"{prefix}{name}/", within) for name in reversed(folders)]


def _beside_images(folders: Sequence[str]) -> list[str]:
    """Those of these sibling folders that say what is in the images of another one; none where no images/ is there."""
    if not any(name.lower() in _PICTURES for name in folders):
        return []
    return [name for name in folders if name.lower() in _BESIDE]


def _images_of(folder: Path) -> tuple[Path, list[str]] | None:
    """The images/ of a data set for detection or segmentation, and the folders beside it; None for another folder.

    It lies beside labels/, masks/ or the like, or a .yaml as of YOLO, and no other images do.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208
        if not any(name.lower() in _PICTURES for name in names):
            return None
        images, folders = _listed(str(folder), _Ignored())
        called, beside = [name for name in folders if name.lower() in _PICTURES], _beside_images(folders)
        described = bool(beside) or any(name.lower().endswith((".yaml", ".yml")) for name in names)
        others = {*folders} - {*called, *beside}
        if images or len(called) != 1 or not described:
            return None
        if any(next(_images_under(f"{folder}/{name}", _Ignored()), "") for name in others):
            return None
        return folder / called[0], beside
    except OSError:
        return None


def split_folders(folder: Path) -> dict[Split, Path]:
    """The folders of the splits; empty where a folder is not split, for it has no such folders or other images."""
    try:
        listed = sorted(os.listdir(folder))  # noqa: PTH208
        # COCO's train2014 and train2017 are one split, of which the later counts.
        named = {_YEAR.sub(r"\1", name): name for name in listed if _YEAR.fullmatch(name) or is_split(name)}
        called = {split: name for split, name in named.items() if (folder / name).is_dir()}
        if not (found := splits_among([name for name in called if is_split(name)])):
            return {}
        splits: dict[Split, str] = {split: called[name] for split, name in found.items()}
        images, folders = _listed(str(folder), _Ignored())
        others = {name for name in folders if not _YEAR.fullmatch(name)} - {*splits.values()}
        if images or any(next(_images_under(f"{folder}/{name}", _Ignored()), "") for name in others):
            return {}
    except OSError:
        return {}
    return {split: folder / name for split, name in splits.items()}


def open_folder(spec: str, folder: Path, expected: Sequence[str] = ()) -> dict[Split, Callable[[], Source]]:
    """What opens each split of a folder: of images at any depth, or of train/, val/ and test/ (see `SPLIT_NAMES`).

    Images are labelled by first-level sub-folder where all lie in two or more. The classes of another split are those
    of the train split, and after them those that it alone has.

    Args:
        spec, folder: the source as the user wrote it, and where to look.
        expected: classes that it may hold a single one of, as of the images that a test belongs to.

    Raises SourceError: on opening a split that is missing, not a folder, unreadable, or without an image.
    """
    found = _images_of(folder)
    splits = split_folders(found[0] if found else folder)
    if not splits:
        return {"train": lambda: _open(spec, folder, expected)}
    train = cache(lambda: _open(spec, splits["train"], expected, split=True))

    def other(root: Path) -> Source:
        return _open(spec, root, expected, train().classes or (), split=True)

    return {split: train if split == "train" else partial(other, root) for split, root in splits.items()}


def _open(spec: str, root: Path, expected: Sequence[str], known: ClassNames = None, split: bool = False) -> Source:
    if not os.path.exists(root):  # noqa: PTH110 - Path.exists raises for a name that is too long
        raise SourceError(f"{spec}: there is no folder {root}; check the path")
    if not root.is_dir():
        parent = spec_of("folder", str(root.parent))
        raise SourceError(f"{spec}: {root} is a file; give the folder that it lies in, {parent}")
    ignored, paths = _Ignored(), PathTable()
    found, whole = _images_of(root), str(root)
    root, beside = found or (root, [])
    numbers: dict[str, int] = {}  # of the first-level folders as they come; "": the root itself
    number_of = array("i")
    try:
        ignored.add_masks(whole, beside)
        with Progress("listing the folder", None) as progress:
            for path in _images_under(str(root), ignored):
                paths.append(path)
                first, slash, _ = path.partition("/")
                number_of.append(numbers.setdefault(first if slash else "", len(numbers)))
                if not len(paths) % _TOLD:
                    progress.to(len(paths))
    except OSError as error:
        raise SourceError(f"{spec}: cannot list {error.filename} ({error.strerror}); check its permissions") from error
    alone = f"{root.name}/ alone" * bool(found) or f"{root.name}/ alone, as its sub-folders are splits" * split
    note = "; ".join(filter(None, (alone, ignored.note())))
    extensions = f"files that end in {' '.join(IMAGE_EXTENSIONS)}"
    warnings = ignored.all_warnings(len(paths), f"only {extensions} are read; convert the others")
    if not len(paths):
        what = "; ".join(filter(None, (note, *warnings[: len(ignored.lacking)])))
        raise SourceError(f"{spec}: no image in {root}{f' ({what})' if what else ''}; expected {extensions}")
    own = tuple(sorted(name for name in numbers if name))
    known = own if known is None else known
    labels, classes = None, None
    if found or all(_YEAR.fullmatch(name) for name in own):
        pass
    elif "" not in numbers and (len(known) >= 2 or set(own) <= set(expected)):
        classes = tuple(dict.fromkeys((*known, *own)))
        label_of = {name: label for label, name in enumerate(classes)}
        labels = np.array([label_of[name] for name in numbers], dtype=np.int64)
        labels = labels[np.frombuffer(number_of, dtype=np.intc)]
    source = FileSource(spec, root, paths, labels, classes, note)
    source.warnings = warnings
    return with_frames(source)
