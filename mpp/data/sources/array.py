"""Arrays of images of one size, memory-mapped where they can be."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from mpp.data.sources.base import SourceError, check_index, checked_labels, summary
from mpp.data.sources.specs import spec_of

DTYPES = ("uint8", "uint16", "int16", "int32", "float16", "float32", "float64")
"""Of the images, in either byte order."""
_SMALL = 2**16  # bytes of an image; a larger one costs more to copy than is saved by taking many at once


class ArraySource:
    """Images of one size in a .npy (memory-mapped) or .npz file: NHWC or NHW, of a dtype in `DTYPES`.

    What values mean is for decoding to know: `read` gives them as they are. An .npz holds the images as
    `images`, `x` or its only array of 3 or 4 dimensions, and may hold labels as `labels` or `y`.

    Raises:
        SourceError: missing, not such a file, or an array of another shape or dtype.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._images, labels = self._load()
        shape, dtype = self._images.shape, self._images.dtype
        if dtype.newbyteorder("=").name not in DTYPES:
            raise SourceError(f"{name}: the array is {dtype}; images are one of {', '.join(DTYPES)}: convert it first")
        if len(shape) not in (3, 4) or 0 in shape:
            expected = "images x height x width (x channels), none of them 0"
            raise SourceError(f"{name}: the array has the shape {shape}; expected {expected}")
        if len(shape) == 4 and shape[1] in (1, 3, 4) and shape[3] > 16:
            raise SourceError(f"{name}: {shape} looks like NCHW; save it as NHWC, with np.moveaxis(array, 1, -1)")
        self._labels, self.classes = (None, None) if labels is None else checked_labels(name, labels, len(self))

    def _load(self) -> tuple[np.ndarray, np.ndarray | None]:
        try:
            with self.path.open("rb") as file:  # numpy leaves a file of its own open when the archive is damaged
                if file.read(6) == b"\x93NUMPY":
                    return np.load(self.path, mmap_mode="r", allow_pickle=False), None
                file.seek(0)
                with np.load(file, allow_pickle=False) as held:
                    self._check_room(sum(member.file_size for member in held.zip.infolist()))
                    arrays: dict[str, np.ndarray] = {key: np.asarray(held[key]) for key in held.files}
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
        images = next((arrays[key] for key in ("images", "x") if key in arrays), None)
        if images is None:
            fitting = [array for array in arrays.values() if array.ndim in (3, 4)]
            if len(fitting) != 1:
                raise SourceError(f"{self.name}: holds {sorted(arrays)}; name the array of images 'images'")
            images = fitting[0]
        return images, next((arrays[key] for key in ("labels", "y") if key in arrays), None)

    def _check_room(self, unpacked: int) -> None:
        """An .npz is unpacked whole, and a small one may hold more than any memory."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if unpacked > memory:
            sizes = f"{unpacked / 1e9:,.1f} GB unpacked, more than the {memory / 1e9:,.1f} of this machine's memory"
            raise SourceError(f"{self.name}: {sizes}; save the images as .npy, which is read where it lies")

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

    def where(self, index: int) -> str:
        """Which image of the file it is."""
        return f"image {check_index(index, len(self))} of {self.path}"

    def read(self, index: int) -> tuple[np.ndarray, int | None]:
        """(H, W) or (H, W, C) of the array's dtype, in this machine's byte order, and the label."""
        image = np.asarray(self._images[check_index(index, len(self))])
        native = image.astype(image.dtype.newbyteorder("="), copy=False)
        label = -1 if self._labels is None else int(self._labels[index])
        return native, None if label < 0 else label

    def block(self, indices: np.ndarray) -> np.ndarray | None:
        """Images uint8 (B, H, W, C); None where they are large or of another dtype."""
        images = self._images
        if images.dtype != np.uint8 or images[0].nbytes > _SMALL:
            return None
        found = np.asarray(images[indices])
        return found if found.ndim == 4 else found[..., None]

    def labels(self) -> np.ndarray | None:
        """int64 (len,), -1 where an image has none, or None."""
        return self._labels

    def describe(self) -> str:
        """One line: count, classes, and the dtype where it is not uint8."""
        dtype = self._images.dtype.newbyteorder("=").name
        return summary(len(self), self.classes, "" if dtype == "uint8" else dtype)
