"""Arrays of images of one size, memory-mapped where they can be."""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpp.data.sources.base import Placement, Source, SourceError, check_index
from mpp.data.sources.files import file_place, file_state
from mpp.data.sources.in_memory import labels_or_sets, sets_note
from mpp.data.sources.names import Split, splits_among
from mpp.data.sources.specs import spec_of

DTYPES = ("uint8", "uint16", "int16", "int32", "float16", "float32", "float64")
"""Of the images, in either byte order."""
_SMALL = 2**16  # bytes of an image; a larger one costs more to copy than is saved by taking many at once


def check_array(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    """The name of the type of an array that can be images. SourceError: it cannot, by its type or shape."""
    native = dtype.newbyteorder("=").name
    if native not in DTYPES:
        raise SourceError(f"{name}: the array is {dtype}; images are one of {', '.join(DTYPES)}: convert it first")
    if len(shape) not in (3, 4) or 0 in shape:
        expected = "images x height x width (x channels), none of them 0"
        raise SourceError(f"{name}: the array has the shape {shape}; expected {expected}")
    if len(shape) == 4 and shape[1] in (1, 3, 4) and shape[3] > 16:
        raise SourceError(f"{name}: {shape} looks like NCHW; save it as NHWC, with np.moveaxis(array, 1, -1)")
    return native


class ArraySource(Source):
    """Images of one size in a .npy (memory-mapped) or .npz file: NHWC or NHW, of a dtype in `DTYPES`.

    `read` gives values as they are; decoding says what they mean. An .npz holds the images as `images`, `x` or its
    only array of 3 or 4 dimensions, and may hold labels as `labels` or `y`, as `labels_or_sets` takes them. With
    `split` it holds them as `{split}_images` and `{split}_labels`, as MedMNIST's files do.

    Raises SourceError: missing, not such a file, or an array of another shape or dtype.
    """

    def __init__(self, name: str, path: Path, split: str = "") -> None:
        self.name, self.path, self.split = name, path, split
        self._images, labels = self._load()
        dtype = check_array(name, self._images.shape, self._images.dtype)
        numbers, classes, sets = (None, None, None) if labels is None else labels_or_sets(name, labels, len(self))
        notes = (f"the split {split} alone" if split else "", sets_note(sets), "" if dtype == "uint8" else dtype)
        super().__init__(name, numbers, classes, "; ".join(filter(None, notes)), sets)

    def _load(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Images, and labels or None."""
        try:
            with self.path.open("rb") as file:  # numpy leaves a file of its own open when the archive is damaged
                if file.read(6) == b"\x93NUMPY":
                    return np.load(self.path, mmap_mode="r", allow_pickle=False), None
                file.seek(0)
                with np.load(file, allow_pickle=False) as archive:
                    keys = [key for key in archive.files if key.startswith(f"{self.split}_" * bool(self.split))]
                    # They are unpacked whole, and a small file may hold more than any memory.
                    unpacked = sum(one.file_size for one in archive.zip.infolist() if one.filename[:-4] in keys)
                    if unpacked > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
                        sizes = f"{unpacked / 1e9:,.1f} GB unpacked, more than the {memory / 1e9:,.1f} of this"
                        hint = "save the images as .npy, which is read where it lies"
                        raise SourceError(f"{self.name}: {sizes} machine's memory; {hint}")
                    arrays: dict[str, np.ndarray] = {key: np.asarray(archive[key]) for key in keys}
        except FileNotFoundError:
            raise SourceError(f"{self.name}: there is no file {self.path}; check the path") from None
        except IsADirectoryError:
            meant = spec_of("folder", str(self.path))
            raise SourceError(f"{self.name}: {self.path} is a folder; did you mean {meant}?") from None
        except SourceError:
            raise
        except Exception as error:  # numpy lets zipfile's, zlib's and struct's errors through
            reason = str(error).partition("\n")[0].partition(" If you trust")[0]  # that is for numpy's callers
            raise SourceError(
                f"{self.name}: not a readable .npy or .npz of plain arrays ({reason}); save it by np.save or np.savez"
            ) from error
        if self.split:
            arrays = {key.removeprefix(f"{self.split}_"): array for key, array in arrays.items()}
        labels = next((arrays[key] for key in ("labels", "y") if key in arrays), None)
        named = [arrays[key] for key in ("images", "x") if key in arrays]
        fitting = named[:1] or [array for array in arrays.values() if array.ndim in (3, 4)]
        if len(fitting) != 1:
            raise SourceError(f"{self.name}: holds {sorted(arrays)}; name the array of images 'images'")
        return fitting[0], labels

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry every pixel to each spawned worker.
        mapped = isinstance(self._images, np.memmap)
        return {**vars(self), "_images": None} if mapped else vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._images is None:
            self._images = self._load()[0]

    def __len__(self) -> int:
        return len(self._images)

    def location(self, index: int) -> str:
        return f"image {check_index(index, len(self))} of {self.split and f'{self.split}_images in '}{self.path}"

    def image(self, index: int) -> np.ndarray:
        image = np.asarray(self._images[index])  # in this machine's byte order
        return image.astype(image.dtype.newbyteorder("="), copy=False)

    def block(self, indices: np.ndarray) -> np.ndarray | None:
        images = self._images
        if images.dtype != np.uint8 or images[0].nbytes > _SMALL:
            return None
        found = np.asarray(images[indices])
        return found if found.ndim == 4 else found[..., None]

    def placement(self, indices: np.ndarray) -> Placement:
        file, _ = file_place(str(self.path))
        part = (zlib.crc32(self.split.encode()),) if self.split else ()
        places = np.array([hash((file, *part, index)) for index in indices.tolist()], dtype=np.int64)
        return super().placement(indices)._replace(place=places, size=np.full(len(indices), self._images[0].nbytes))

    def _fingerprint_parts(self, times: bool, most: int | None, labelled: bool) -> Iterator[str | bytes]:
        yield str(self.path.resolve()) if times else ""
        yield file_state(self.path, times) + self.split


def open_array(spec: str, path: Path) -> dict[Split, Callable[[], ArraySource]]:
    """What opens each split of an array file: an .npz with `train_images`, `test_images` and the like has several."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name.removesuffix("_images.npy") for name in archive.namelist() if name.endswith("_images.npy")]
        found = splits_among(members)
    except Exception:  # a .npy, or a damaged file: opening it says so
        found = {}
    return {split: partial(ArraySource, spec, path, name) for split, name in (found or {"train": ""}).items()}
