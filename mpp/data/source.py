"""What there is to read: one string opens a folder, shards, an array, CIFAR or the demo pictures.

source = open_source("folder:/data/images")
data, label = source.read(0)
"""

import difflib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpp.data.base import (
    FileSource,
    ListSource,
    Source,
    SourceError,
    Subset,
    check_index,
    numbered_classes,
    summary,
)
from mpp.data.datasets import open_cifar, open_demo
from mpp.data.shards import IMAGE_EXTENSIONS, open_shards

__all__ = ["ArraySource", "FileSource", "ListSource", "Source", "SourceError", "Subset", "has_split", "open_source"]

Split = Literal["train", "test"]

_EXAMPLES = {
    "folder": "folder:DIR",
    "shards": "shards:GLOB",
    "array": "array:FILE.npy",
    "cifar10": "cifar10:DIR",
    "cifar100": "cifar100:DIR",
    "demo": "demo",
}


def open_source(spec: str, split: Split = "train", download: bool = False, expected: Sequence[str] = ()) -> Source:
    """Opens a source by its string.

    Args:
        spec: folder:DIR, shards:GLOB, array:FILE.npy, cifar10:DIR, cifar100:DIR or demo.
        split: `test` needs a source with a split of its own (`has_split`); where there is none, `train` is all of it.
        download: fetch cifar10 or cifar100 where DIR lacks it.
        expected: classes that a folder may hold a single one of (see `open_folder`).

    Raises:
        SourceError: unknown kind, nothing there, or nothing readable.
    """
    kind, argument = _parse(spec)
    if split == "test" and not has_split(spec):
        raise SourceError(f"{spec} has no test split of its own: give the held-out images as a source of their own")
    if kind == "demo":
        return open_demo(split)
    if kind in ("cifar10", "cifar100"):
        return open_cifar(kind, Path(argument).expanduser(), split, download)
    if kind == "shards":
        return open_shards(spec, argument)
    if kind == "array":
        return ArraySource(spec, Path(argument).expanduser())
    return open_folder(spec, Path(argument).expanduser(), split, expected)


def has_split(spec: str) -> bool:
    """Whether `open_source(spec, "test")` gives held-out images.

    cifar10, cifar100 and demo have them; a folder does when it holds train/ and test/ or val/ and no other images.

    Raises:
        SourceError: unknown kind.
    """
    kind, argument = _parse(spec)
    if kind == "folder":
        return bool(_split_folders(Path(argument).expanduser()))
    return kind in ("cifar10", "cifar100", "demo")


def _parse(spec: str) -> tuple[str, str]:
    """`kind:argument` in two, checked."""
    kind, _, argument = spec.partition(":")
    if kind == "demo" and not argument:
        return kind, ""
    if kind == "demo":
        raise SourceError(f"{spec!r}: demo takes no argument; write demo")
    if kind in _EXAMPLES and not argument:
        raise SourceError(f"{spec!r} does not say where; write {_EXAMPLES[kind]}")
    if kind in _EXAMPLES:
        return kind, argument
    known = f"a source is one of {', '.join(_EXAMPLES.values())}"
    if not spec:
        raise SourceError(f"no source of images was given (data.source, or --data for short); {known}")
    path = Path(spec).expanduser()
    if path.exists():
        suffix = "".join(path.suffixes[-2:]).lower()
        fitting = "folder" if path.is_dir() else "array" if suffix.endswith((".npy", ".npz")) else "shards"
        if path.is_dir() or suffix.endswith((".npy", ".npz", ".tar", ".tgz", ".tar.gz")):
            raise SourceError(f"{spec!r} lacks the kind of source: did you mean {fitting}:{spec}?")
        raise SourceError(f"{spec!r} is a single file: did you mean the folder that it lies in, folder:{path.parent}?")
    near = difflib.get_close_matches(kind.lower(), _EXAMPLES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}{':' + argument if argument and near[0] != 'demo' else ''}? " if near else ""
    raise SourceError(f"{spec!r}: there is no kind of source called {kind!r}; {hint}{known}")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini", "__macosx")


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]], ignored: Counter[str]) -> Iterator[str]:
    """Paths of the images under a folder, sorted; counts what it passes over.

    `above` holds the folders on the way down, by device and inode: a link back to one of them would never end.
    """
    info = Path(folder).stat()
    here = (info.st_dev, info.st_ino)
    if here in above:
        ignored["other"] += 1
        return
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder = is_file = False
        if _is_hidden(entry.name):
            ignored["hidden"] += 1
        elif is_folder:
            yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {here}, ignored)
        elif is_file and entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in entry.name:
            yield prefix + entry.name
        else:
            ignored["other"] += 1


def _images_under(folder: Path, ignored: Counter[str] | None = None) -> Iterator[str]:
    return _walk(str(folder), "", frozenset(), Counter() if ignored is None else ignored)


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the two splits; empty where a folder is not split."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not _is_hidden(entry.name))
        held_out = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
        if held_out is None or not (folder / "train").is_dir():
            return {}
        for name in set(names) - {"train", "test", "val"}:
            path = folder / name
            if path.is_dir() and next(_images_under(path), None):
                return {}
            if path.is_file() and path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS:
                return {}
    except OSError:
        return {}
    return {"train": folder / "train", "test": folder / held_out}


def _class_names(folder: Path) -> tuple[str, ...]:
    """First-level sub-folders that hold an image, sorted."""
    with os.scandir(folder) as found:
        names = sorted(entry.name for entry in found if not _is_hidden(entry.name) and Path(entry).is_dir())
    return tuple(name for name in names if next(_images_under(folder / name), None))


def open_folder(spec: str, folder: Path, split: Split = "train", expected: Sequence[str] = ()) -> FileSource:
    """The images under a folder, at any depth, labelled by first-level sub-folder where all lie in two or more.

    The classes of a test split are those of the train split, and after them those that it alone has. A single
    sub-folder is a class, too, where it has one of the `expected` names, as of the images that a test belongs to.

    Raises:
        SourceError: missing, not a folder, unreadable, or no image in it.
    """
    if not folder.exists():
        raise SourceError(f"{spec}: there is no folder {folder}; check the path")
    if not folder.is_dir():
        raise SourceError(f"{spec}: {folder} is a file; give the folder that it lies in, folder:{folder.parent}")
    splits = _split_folders(folder)
    root = splits.get(split, folder)
    ignored: Counter[str] = Counter()
    try:
        paths = list(_images_under(root, ignored))
        folders = [path.rpartition("/")[0].partition("/")[0] for path in paths]
        own = sorted({name for name in folders if name})
        # A test split counts by the train split's classes, for it may lack some, then by those that it alone has.
        held_out = root != splits.get("train", root)
        known = _class_names(splits["train"]) if held_out else tuple(own)
    except OSError as error:
        raise SourceError(f"{spec}: cannot list {error.filename} ({error.strerror}); check its permissions") from error
    parts = [f"{root.name}/ alone, as its sub-folders are splits"] if splits else []
    passed = [f"{number:,} {kind}" for kind in ("hidden", "other") if (number := ignored[kind])]
    if passed:
        parts.append(f"ignored {' and '.join(passed)} {'file' if sum(ignored.values()) == 1 else 'files'}")
    note = "; ".join(parts)
    if not paths:
        extensions = " ".join(IMAGE_EXTENSIONS)
        raise SourceError(
            f"{spec}: no image in {root}{f' ({note})' if note else ''}; expected files that end in {extensions}"
        )
    if not all(folders) or (len(known) < 2 and not set(own) <= set(expected)):
        return FileSource(spec, root, paths, note=note)
    classes = tuple(dict.fromkeys((*known, *own)))
    numbers = {name: label for label, name in enumerate(classes)}
    return FileSource(spec, root, paths, [numbers[name] for name in folders], classes, note)


class ArraySource:
    """Images of one size in a .npy (memory-mapped) or .npz file: NHWC or NHW, uint8 or uint16.

    uint16 is scaled linearly, from the array's own smallest..largest value to 0..255. An .npz holds the images as
    `images`, `x` or its only array of 3 or 4 dimensions, and may hold labels as `labels` or `y`.

    Raises:
        SourceError: missing, not such a file, or an array of another shape or dtype.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._images, self._labels = self._load()
        shape, dtype = self._images.shape, self._images.dtype
        if dtype.kind != "u" or dtype.itemsize > 2:
            raise SourceError(
                f"{name}: the array is {dtype}; images are uint8 or uint16, so scale and convert it first"
            )
        if len(shape) not in (3, 4) or 0 in shape:
            raise SourceError(f"{name}: the array has the shape {shape}; expected NHWC or NHW, none of them 0")
        if len(shape) == 4 and shape[1] in (1, 3, 4) and shape[3] > 16:
            raise SourceError(f"{name}: {shape} looks like NCHW; save it as NHWC, with np.moveaxis(array, 1, -1)")
        self.classes = None if self._labels is None else numbered_classes(self._labels)
        self._range = _value_range(self._images) if dtype.itemsize == 2 else None

    def _load(self) -> tuple[np.ndarray, np.ndarray | None]:
        try:
            with self.path.open("rb") as file:  # numpy leaves a file of its own open when the archive is damaged
                if file.read(6) == b"\x93NUMPY":
                    return np.load(self.path, mmap_mode="r", allow_pickle=False), None
                file.seek(0)
                with np.load(file, allow_pickle=False) as held:
                    arrays: dict[str, np.ndarray] = {key: np.asarray(held[key]) for key in held.files}
        except FileNotFoundError:
            raise SourceError(f"{self.name}: there is no file {self.path}; check the path") from None
        except IsADirectoryError:
            raise SourceError(f"{self.name}: {self.path} is a folder; did you mean folder:{self.path}?") from None
        except Exception as error:  # numpy lets zipfile's, zlib's and struct's errors through
            reason = str(error).partition("\n")[0]
            raise SourceError(f"{self.name}: not a readable .npy or .npz of plain arrays ({reason})") from error
        images = next((arrays[key] for key in ("images", "x") if key in arrays), None)
        if images is None:
            fitting = [array for array in arrays.values() if array.ndim in (3, 4)]
            if len(fitting) != 1:
                raise SourceError(f"{self.name}: holds {sorted(arrays)}; name the array of images 'images'")
            images = fitting[0]
        return images, self._check_labels(arrays, len(images) if images.ndim else 0)

    def _check_labels(self, arrays: dict[str, np.ndarray], length: int) -> np.ndarray | None:
        labels = next((arrays[key] for key in ("labels", "y") if key in arrays), None)
        if labels is None:
            return None
        if labels.shape != (length,) or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
            raise SourceError(
                f"{self.name}: the labels are {labels.dtype} {labels.shape}; expected {length} whole numbers from 0"
            )
        return labels.astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry every pixel to each spawned worker.
        mapped = isinstance(self._images, np.memmap)
        return {**self.__dict__, "_images": None} if mapped else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._images is None:
            self._images = self._load()[0]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[np.ndarray, int | None]:
        """uint8 (H, W) or (H, W, C), and the label."""
        image = np.asarray(self._images[check_index(index, len(self))])
        if self._range is not None:
            low, high = self._range
            scaled = (image.astype(np.float32) - low) * (255 / max(high - low, 1))
            image = np.rint(scaled).astype(np.uint8)
        return image, None if self._labels is None else int(self._labels[index])

    def labels(self) -> np.ndarray | None:
        """int64 (len,), or None."""
        return self._labels

    def describe(self) -> str:
        """One line: count, classes, and how 16 bits became 8."""
        scaled = "" if self._range is None else "uint16 scaled from {}..{} to 0..255".format(*self._range)
        return summary(len(self), self.classes, scaled)


def _value_range(images: np.ndarray) -> tuple[int, int]:
    """Smallest and largest value, a bounded piece at a time."""
    rows = max(1, 2**25 // max(1, images[0].size))
    pieces = [images[start : start + rows] for start in range(0, len(images), rows)]
    return min(int(piece.min()) for piece in pieces), max(int(piece.max()) for piece in pieces)
