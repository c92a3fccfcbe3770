"""Images of a Python program in the place of a source: a sequence, an array or a torch Dataset.

    source = register([image, ...])      images, or (image, label) pairs
    open_splits(source.name)             while `source` lives: python:list of 40 images, fingerprint 3fa9c1d2e4b7

The name says what they were, in config.yaml too, and is the same for the same images and labels.
"""

import io
from os import PathLike, fspath
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image

from mpp.data.sources.base import ClassNames, LabelSets, Source, SourceError, count
from mpp.data.sources.files import read_file
from mpp.data.sources.in_memory import checked_labels, labels_or_sets, sets_note

KIND = "python"
_ARRAYS = ("L", "RGB", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # Pillow's modes whose arrays are the pixels
_CHANNELS, _LEAST_SIDE = (1, 3, 4), 16  # by these the axis of the channels is found
_EXPECTED = "Pillow images, arrays (H, W) or (H, W, C), tensors (H, W) or (C, H, W), encoded bytes or paths of files"
_registered: WeakValueDictionary[str, "PythonSource"] = WeakValueDictionary()


class PythonSource(Source):
    """Images of a program's own, each asked for by its index whenever it is read.

    Args:
        images: has a length, and by index gives `as_image`'s images, or pairs of one and its label: a whole number, a
            name, None, or of several labels a row of 0 and 1. An attribute `targets` or `labels` has the labels where
            it is there, `classes` their names.
        labelled: whether labels are looked for. Without `targets` or `labels` that reads each image once.

    Raises SourceError: no length, no images, images or labels of another kind.
    """

    def __init__(self, images: Any, labelled: bool = True) -> None:
        kind = type(images).__name__
        try:
            number = len(images)
        except TypeError:
            raise SourceError(f"{kind} has no length; give a list or a Dataset of images, which has one") from None
        if not number:
            raise SourceError(f"{kind} of images is empty")
        self._images = images
        name = f"{KIND}:{kind} of {count(number, 'image')}"
        try:
            first = images[0]
            self._pairs = isinstance(first, tuple | list) and len(first) == 2
            _check_axes(first[0] if self._pairs else first)
            as_image(first[0] if self._pairs else first)
        except (TypeError, LookupError) as error:
            raise SourceError(f"{name}: image 0 cannot be used: {error}") from error
        labels, classes, sets = self._labels_of(name) if labelled else (None, None, None)
        super().__init__(name, labels, classes, sets_note(sets), sets)
        self.name = f"{name}, fingerprint {self.quick_fingerprint()[:12]}"

    def _labels_of(self, name: str) -> tuple[np.ndarray | None, ClassNames, LabelSets | None]:
        images = self._images
        attributes: list[Any] = [getattr(images, key, None) for key in ("targets", "labels")]
        given = next((list(labels) for labels in attributes if _fits(labels, self)), None)
        if given is None:
            if not self._pairs:
                return None, None, None
            given = [self._images[index][1] for index in range(len(self))]
        if np.ndim(given[0]) == 1 and len(given[0]) > 1:
            try:
                rows = np.stack([np.asarray(label) for label in given])
            except ValueError as error:  # rows of different lengths
                raise SourceError(
                    f"{name}: some images have more labels than others; give each a row of 0 and 1"
                ) from error
            return labels_or_sets(name, rows, len(self))
        try:
            values = [None if label is None else _plain(label) for label in given]
        except (TypeError, ValueError, RuntimeError) as error:  # torch's, for several numbers
            raise SourceError(f"{name}: {error}") from None
        whole = getattr(images, "dataset", None)  # of a torch Subset
        names = getattr(images, "classes", None) or getattr(whole, "classes", None)
        words = sorted({value for value in values if isinstance(value, str)})
        if words:
            if any(isinstance(value, int) for value in values):
                raise SourceError(f"{name}: some labels are numbers and some are names; give all as one of the two")
            names = names if names and {*words} <= {*names} else words
            numbering: dict[Any, int] = {name: number for number, name in enumerate(names)}
            values = [None if value is None else numbering[value] for value in values]
        numbers = [-1 if value is None else int(value) for value in values]
        return *checked_labels(name, numbers, len(self), tuple(map(str, names)) if names else None), None

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> bytes | np.ndarray:
        item = self._images[index]
        try:
            return as_image(item[0] if self._pairs else item)
        except TypeError as error:  # one bad image among many, as a bad file
            raise OSError(str(error)) from error


def register(images: Any, labelled: bool = True) -> PythonSource:
    """A source of these images, which `registered` finds by its name for as long as somebody keeps it."""
    source = PythonSource(images, labelled)
    _registered[source.name] = source  # another with this name may differ in an image that its fingerprint leaves out
    return source


def registered(name: str) -> Source:
    """The source of this name; SourceError where this process has none."""
    try:
        return _registered[name]
    except KeyError:
        what = "images of a Python program that has ended or no longer has them"
        raise SourceError(f"{name!r}: {what}; hand them over again, from Python, or name a folder of them") from None


def as_image(image: Any) -> bytes | np.ndarray:
    """Encoded bytes or an array (H, W) or (H, W, C), for `open_picture`.

    Args:
        image: a Pillow image; an array (H, W) or (H, W, C); a tensor (H, W) or (C, H, W); encoded bytes; or a path.
            uint8, or floating point from 0 to 1; other types need a value range, as in a file.

    Raises TypeError for anything else, OSError for a file that cannot be read.
    """
    if isinstance(image, Image.Image):
        return _of_pillow(image)
    if isinstance(image, torch.Tensor):
        values = image.detach().cpu()
        return (values.permute(1, 2, 0) if values.ndim == 3 else values).numpy()
    if isinstance(image, np.ndarray | bytes):
        return image
    if isinstance(image, str | PathLike):
        return read_file(fspath(image))
    raise TypeError(f"{type(image).__name__} is no image; images are {_EXPECTED}")


def _of_pillow(image: Image.Image) -> bytes | np.ndarray:
    if image.mode in _ARRAYS and "transparency" not in image.info:
        return np.asarray(image)
    if "transparency" not in image.info and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return np.asarray(image.convert("L" if image.mode == "1" else "RGB"))
    file = io.BytesIO()  # a decoder lays it on the background
    image.convert("RGBA").save(file, "PNG", compress_level=1)
    return file.getvalue()


def _check_axes(image: Any) -> None:
    """Refuses an image whose channels are where the height would be, or the other way round."""
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) == 3:
        first = shape[0] in _CHANNELS and shape[2] > _LEAST_SIDE
        last = shape[2] in _CHANNELS and shape[0] > _LEAST_SIDE
        if isinstance(image, torch.Tensor) and last and not first:
            raise TypeError(f"a tensor of {shape} looks like (H, W, C); tensors are (C, H, W): .permute(2, 0, 1)")
        if isinstance(image, np.ndarray) and first and not last:
            raise TypeError(f"an array of {shape} looks like (C, H, W); arrays are (H, W, C): np.moveaxis(a, 0, -1)")


def _fits(labels: Any, source: Source) -> bool:
    return hasattr(labels, "__len__") and not isinstance(labels, str) and len(labels) == len(source)


def _plain(label: Any) -> int | str:
    """A label as a Python value: also of a tensor, or an array, of one number."""
    value = label.item() if hasattr(label, "item") else label
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"a label is {value!r}; labels are whole numbers from 0, names, or None")
    return value
