"""Images in an HDF5 file, read row by row: `FILE.h5:images`, or a file of one array as PatchCamelyon has them."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpp.data.sources.array import check_array
from mpp.data.sources.base import Placement, Source, SourceError, check_index
from mpp.data.sources.files import file_place, file_state
from mpp.data.sources.in_memory import labels_or_sets, sets_note
from mpp.data.sources.names import Split, is_split, splits_among
from mpp.errors import install

if TYPE_CHECKING:
    import h5py

_NAMED = re.compile(r"(.*\.(?:h5|hdf5|hdf))(?::(.*))?", re.IGNORECASE | re.DOTALL)
_IMAGES, _LABELS = ("images", "x", "data"), ("labels", "label", "y", "targets")
_SLOW_CHUNK = 2**24  # bytes that are unpacked for one image


class Hdf5Source(Source):
    """A dataset of images N x H x W (x C) in an HDF5 file, of which one row is read at a time.

    Each process opens the file for itself. Labels are as `labels_or_sets` takes them.
    """

    def __init__(self, spec: str, path: Path, dataset: str, labels: np.ndarray | None, note: str) -> None:
        self.name, self.path, self.dataset = spec, path, dataset
        self._process, self._file = -1, None
        images = self._images()
        if images.external or images.is_virtual:
            raise SourceError(f"{spec}: {path}:{dataset} lies in other files; copy it into one")
        self._shape: tuple[int, ...] = images.shape
        dtype = check_array(spec, images.shape, images.dtype)
        self._bytes = int(np.prod(images.shape[1:])) * images.dtype.itemsize
        numbers, classes, sets = (None, None, None) if labels is None else labels_or_sets(spec, labels, len(images))
        notes = filter(None, (note, sets_note(sets), "" if dtype == "uint8" else dtype))
        super().__init__(spec, numbers, classes, "; ".join(notes), sets)
        chunk = int(np.prod(images.chunks)) * images.dtype.itemsize if images.chunks else 0
        if chunk > max(_SLOW_CHUNK, 2 * self._bytes):
            what = f"its chunks are {chunk / 1e6:,.0f} MB, and reading one image unpacks a whole one"
            self.warnings = (f"{path}: {what}: pack the images into shards, or save them with chunks of one image",)

    def _images(self) -> "h5py.Dataset":
        if self._process != os.getpid():  # a forked one must not share the file's position and cache
            self._process, self._file = os.getpid(), _opened(self.name, self.path)
        return self._file[self.dataset]  # type: ignore[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_process": -1, "_file": None}

    def __len__(self) -> int:
        return self._shape[0]

    def location(self, index: int) -> str:
        return f"image {check_index(index, len(self))} of {self.path}:{self.dataset}"

    def size(self, index: int) -> int:
        return self._bytes

    def image(self, index: int) -> np.ndarray:
        try:
            image = np.asarray(self._images()[index])
        except (OSError, RuntimeError, SourceError) as error:  # a damaged chunk, a filter that is not installed
            raise OSError(f"{self.location(index)}: {_reason(error)}") from error
        return image.astype(image.dtype.newbyteorder("="), copy=False)

    def placement(self, indices: np.ndarray) -> Placement:
        file, _ = file_place(str(self.path))
        places = np.array([hash((file, self.dataset, index)) for index in indices.tolist()], dtype=np.int64)
        return super().placement(indices)._replace(place=places, size=np.full(len(indices), self._bytes))

    def _fingerprint_parts(self, times: bool, most: int | None, labelled: bool) -> Iterator[str | bytes]:
        yield str(self.path.resolve()) if times else ""
        yield f"{file_state(self.path, times)} {self.dataset} {self._shape}"


def hdf5_name(argument: str) -> tuple[str, str] | None:
    """File and dataset of `FILE.h5:DATASET`, the latter perhaps empty; None for a file of another ending."""
    found = _NAMED.fullmatch(argument)
    return (found[1], found[2] or "") if found else None


def open_hdf5(spec: str, path: Path, dataset: str) -> Mapping[Split, Callable[[], Source]]:
    """What opens each split of images in HDF5.

    Several splits are datasets of one file, `train_images` or `train/images` and so on, or, as of PatchCamelyon, files
    whose names differ by the split alone: given that of train, those beside it are its others. Without `dataset` the
    images are `images`, `x`, `data` or the only array of 3 or 4 dimensions. Labels are the dataset `labels` or `y`
    beside them, else in a file beside it that has `y` or `labels` in the place of the name's `x` or `images`.

    Raises SourceError: h5py is missing; no such file or dataset, or several that might be meant.
    """
    if not dataset:
        arrays = _arrays(spec, path)
        found = {name: _split_of(name) for name in arrays if _is_images(name)}
        splits = splits_among({split for split in found.values() if split})
        inner: dict[Split, str] = {
            split: next(name for name, own in found.items() if own == called) for split, called in splits.items()
        }
        if inner:
            return {split: partial(_open, spec, path, name, f"{name} alone") for split, name in inner.items()}
    files = _split_files(path)
    if not files:
        return {"train": partial(_open, spec, path, dataset, "")}
    return {split: partial(_open, spec, file, dataset, f"{file.name} alone") for split, file in files.items()}


def _open(spec: str, path: Path, dataset: str, note: str) -> Source:
    arrays = _arrays(spec, path)
    if dataset and dataset.strip("/") not in arrays:
        there = ", ".join(arrays) or "none"
        raise SourceError(f"{spec}: {path} has no dataset {dataset!r}; it has {there}")
    name = dataset.strip("/")
    if not name:
        images = [key for key, shape in arrays.items() if len(shape) in (3, 4) and not _is_labels(key)]
        called = [key for known in _IMAGES for key in images if key.rpartition("/")[2].lower() == known]
        if not called and len(images) != 1:
            raise SourceError(f"{spec}: {path} holds {', '.join(arrays) or 'no array'}; say which, {path}:NAME")
        name = (called or images)[0]
    return Hdf5Source(spec, path, name, _labels(spec, path, name, arrays), note)


def _labels(spec: str, path: Path, images: str, arrays: Mapping[str, tuple[int, ...]]) -> np.ndarray | None:
    """The labels of a dataset of images: beside it, or in the file beside; None for none."""
    folder, slash, own = images.rpartition("/")
    stem = next((own[: len(own) - len(known)] for known in _IMAGES if own.lower().endswith(known)), "")
    for known in _LABELS:
        if (name := f"{folder}{slash}{stem}{known}") in arrays:
            return _read(spec, path, name)
    for known, theirs in zip(("x", "images"), ("y", "labels"), strict=True):
        beside = path.with_name(re.sub(rf"(?<![a-zA-Z]){known}(?=\.[^.]*$)", theirs, path.name))
        if beside != path and beside.is_file():
            others = _arrays(spec, beside)
            called = [name for name in others if _is_labels(name)] or list(others)
            if len(called) != 1:
                raise SourceError(f"{spec}: {beside} holds {', '.join(others) or 'no array'}; name the labels y")
            return _read(spec, beside, called[0])
    return None


def _split_files(path: Path) -> dict[Split, Path]:
    """The files of the splits, whose names differ by the name of a split alone; none unless `path` is that of train."""
    words = re.split(r"([a-zA-Z]+)", path.name)
    for place in (place for place, word in enumerate(words) if is_split(word)):
        before, after = "".join(words[:place]), "".join(words[place + 1 :])
        try:
            names = os.listdir(path.parent)  # noqa: PTH208
        except OSError:
            return {}
        called = {
            middle: name
            for name in names
            if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
            for middle in [name[len(before) : len(name) - len(after)]]
            if is_split(middle)
        }
        splits = splits_among(called)
        if splits and called[splits["train"]] == path.name:
            return {split: path.with_name(called[middle]) for split, middle in splits.items()}
    return {}


def _split_of(name: str) -> str:
    """`train` of `train_images`, `train/images` and `train/x`; empty for a name of another kind."""
    return next((word for word in re.split(r"[/_]", name)[:-1] if is_split(word)), "")


def _is_images(name: str) -> bool:
    return re.split(r"[/_]", name)[-1].lower() in _IMAGES


def _is_labels(name: str) -> bool:
    return re.split(r"[/_]", name)[-1].lower() in _LABELS


def _arrays(spec: str, path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all datasets in a file, by their paths in it; a single value is none."""
    found = dict[str, tuple[int, ...]]()

    def note(name: str, thing: Any) -> None:
        if getattr(thing, "shape", None):
            found[name] = tuple(thing.shape)

    with _opened(spec, path) as file:
        file.visititems(note)
    return found


def _read(spec: str, path: Path, name: str) -> np.ndarray:
    with _opened(spec, path) as file:
        return np.asarray(file[name])


def _opened(spec: str, path: Path) -> "h5py.File":
    try:
        import h5py
    except ImportError as error:
        raise SourceError(f"{spec}: HDF5 needs the package h5py ({error}): {install('hdf5')}") from None
    if not path.exists():
        raise SourceError(f"{spec}: there is no file {path}; check the path")
    if not path.is_file():
        raise SourceError(f"{spec}: {path} is no file; give an HDF5 file, FILE.h5:DATASET")
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise SourceError(f"{spec}: {path} is no whole HDF5 file ({_reason(error)}); get it again") from error


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0]
