"""From keys to batches: read, decode, transform; whatever cannot be used is noted and, in training, replaced."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from mpp.data.decoding.decode import BadImage, Picture, one_line, open_picture
from mpp.data.decoding.jpeg import JpegPicture
from mpp.data.decoding.picture import failure, out_of_memory
from mpp.data.draws import seeds, uniforms
from mpp.data.sending import empty_pixels
from mpp.data.settings import Reading
from mpp.data.sources.base import Source, TooLarge, block, decoded, read_many, where
from mpp.data.sources.files import NotAFile, Outside
from mpp.data.sources.names import printable
from mpp.errors import RunError, Unreachable, UserError, command

_ATTEMPTS = 20
_EOI, _TAIL = b"\xff\xd9", 1024  # where a JPEG ends, and how far from the end of the file that is looked for
# What the draws are for, so that those of one purpose are unrelated to those of another.
_SAMPLE, _REPLACEMENT = 2, 3


class TooManyBad(BadImage):
    """So many images in a row could not be used that something else must be wrong.

    Args:
        reason: the text.
        bad: the images.
    """

    def __init__(self, reason: str, bad: "list[Bad]") -> None:
        super().__init__(reason, bad[-1].kind)
        self.bad = bad

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.bad)


class Transform(Protocol):
    """From a picture to the input size."""

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the result."""
        ...

    @property
    def draws(self) -> int:
        """How many random numbers one image takes; 0 where nothing is random."""
        ...

    def __call__(self, image: Picture, draws: Sequence[float]) -> Tensor:
        """uint8 (C, h, w); `draws` are uniform in [0, 1).

        Raises:
            BadImage: pixels that cannot be decoded.
        """
        ...


class Bad(NamedTuple):
    """An image that could not be used."""

    index: int
    kind: str
    """`BadImage.kind`, for counting."""
    where: str
    """The file, as the system takes it, or which image of which file, as `mpp.data.sources.base.where` says."""
    reason: str

    def __str__(self) -> str:
        where = printable(self.where)
        return self.reason if not where or where in self.reason else f"{where}: {self.reason}"


class Late(NamedTuple):
    """A JPEG file that is decoded only on the device (see mpp/data/late.py)."""

    slot: int
    """Its place in the batch."""
    which_pass: int
    index: int
    size: int
    """Bytes of the file, which lies in `Batch.files` behind those before it."""
    pixels: int
    """Height times width."""
    orientation: int
    """EXIF's, 1 to 8."""
    draws: list[float]
    """Of its transform."""


class Batch(TypedDict):
    """One micro-batch."""

    images: Tensor
    """uint8 (B, C, h, w)."""
    index: Tensor
    """int64 (B,), of the images that are in it: in the place of a bad one, its replacement's."""
    label: Tensor
    """int64 (B,), -1 where there is none."""
    bad: list[Bad]
    """The images that could not be used."""
    late: list[Late]
    """The images that are yet to be decoded, their places in `images` unset."""
    files: Tensor
    """uint8 (bytes,), the files of `late`: as one tensor, for each one that a worker sends is a file descriptor."""


class Reader:
    """What both readers share: from an index to a transformed image, or to what is wrong with it."""

    def __init__(self, source: Source, transform: Transform, reading: Reading) -> None:
        self.source, self.transform, self.reading = source, transform, reading
        self._final = Reading(reading.channels, max_bytes=reading.max_bytes)

    def reading_of(self, index: int) -> Reading:
        """How what the source gives of an image becomes pixels: as it is, where it is pixels already."""
        return self._final if decoded(self.source, index) else self.reading

    def __getitems__(self, keys: np.ndarray) -> Batch | UserError | Unreachable:
        """A batch, or why there is none: raised in a worker, it would arrive with the worker's whole traceback."""
        try:
            return self._batch(keys)
        except (UserError, Unreachable) as error:
            return error
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            what = f"{len(keys)} images of {' x '.join(map(str, self.transform.image_hw))}"
            return RunError(f"no memory for a batch of {what}: take fewer workers, or smaller batches (micro_batch)")

    def _batch(self, keys: np.ndarray) -> Batch:
        raise NotImplementedError

    def transformed(
        self, index: int, found: tuple[bytes | np.ndarray, int | None] | OSError, draws: Sequence[float]
    ) -> tuple[Tensor, int]:
        """Transformed image and label of what the source gave of an image.

        Raises:
            OSError: as `found`.
            BadImage: it cannot be decoded.
        """
        if isinstance(found, OSError):
            raise found
        data, label = found
        try:
            return self.transform(open_picture(data, self.reading_of(index)), draws), -1 if label is None else label
        except (MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                raise failure(MemoryError()) from error
            raise

    def noted(self, index: int, error: BadImage | OSError) -> Bad:
        """What is wrong with an image, by its place."""
        named, reason = where(self.source, index), one_line(error)
        if isinstance(error, OSError) and error.strerror:
            link = isinstance(error, FileNotFoundError) and Path(named).is_symlink()
            reason = "a link that leads nowhere" if link else error.strerror
        return Bad(index, kind_of(error), named, reason)


def _joined(files: list[bytes]) -> Tensor:
    joined = empty_pixels(sum(map(len, files)))
    if files:
        joined.numpy()[:] = np.frombuffer(b"".join(files), dtype=np.uint8)
    return joined


def kind_of(error: BadImage | OSError | MemoryError) -> str:
    """The category that a bad image counts in."""
    if isinstance(error, BadImage):
        return error.kind
    if isinstance(error, (TooLarge, MemoryError)):
        return "too large"
    if isinstance(error, FileNotFoundError):
        return "missing"
    return "outside" if isinstance(error, Outside) else "not a file" if isinstance(error, NotAFile) else "unreadable"


class Training(Reader):
    """Samples by (pass, index), with replacements for bad ones; with `late`, ordinary JPEGs come undecoded."""

    def __init__(self, source: Source, transform: Transform, reading: Reading, seed: int, late: bool = False) -> None:
        super().__init__(source, transform, reading)
        self.seed, self.late = seed, late
        self._block = self._block_transform()
        self._labels = source.labels()

    def _block_transform(self) -> Callable[[np.ndarray, np.ndarray], Tensor | None] | None:
        """What takes many images of an array at once; None where they go one by one. Asked of the first image, for all
        are of its size, so that no batch is fetched in vain."""
        transform: Any = getattr(self.transform, "block", None)
        if transform is None or not len(self.source):
            return None
        if self.reading_of(0).value_range:  # the array's values are not its pixels yet
            return None
        first = block(self.source, np.zeros(1, dtype=np.int64))
        if first is None or first.shape[3] != self.reading.channels:
            return None
        return None if transform(first, np.zeros((1, self.transform.draws))) is None else transform

    def _batch(self, keys: np.ndarray) -> Batch:
        """Of keys int64 (B, 2)."""
        draws = uniforms(seeds(_SAMPLE, self.seed, keys[:, 0], keys[:, 1]), self.transform.draws)
        together = self._together(keys[:, 1], draws)
        if together is not None:
            return together
        drawn = draws.tolist()
        images = empty_pixels(len(keys), self.reading.channels, *self.transform.image_hw)
        index, label, bad = keys[:, 1].tolist(), [-1] * len(keys), []
        passes = keys[:, 0].tolist()
        late: list[Late] = []
        files: list[bytes] = []
        for slot, found in enumerate(read_many(self.source, index, self.reading.max_bytes)):
            picture = self._undecoded(index[slot], found)
            if picture is not None and not isinstance(found, OSError):
                size, pixels = len(picture.data), picture.height * picture.width
                late.append(Late(slot, passes[slot], index[slot], size, pixels, picture.orientation, drawn[slot]))
                files.append(picture.data)
                label[slot] = -1 if found[1] is None else found[1]
                continue
            shown, image, label[slot] = self.sample(passes[slot], index[slot], found, drawn[slot], bad)
            images[slot].copy_(image)
            index[slot] = shown
        return {
            "images": images,
            "index": torch.tensor(index),
            "label": torch.tensor(label),
            "bad": bad,
            "late": late,
            "files": _joined(files),
        }

    def _undecoded(self, index: int, found: tuple[bytes | np.ndarray, int | None] | OSError) -> JpegPicture | None:
        """A JPEG that the device may decode: whole, and in ordinary colours."""
        reading = self.reading_of(index)
        if not self.late or isinstance(found, OSError) or reading.value_range:
            return None
        try:
            picture = open_picture(found[0], reading)
        except BadImage:
            return None  # the usual way names it
        if not isinstance(picture, JpegPicture) or picture.plain_rgb:
            return None
        return picture if _EOI in picture.data[-_TAIL:] else None  # nvJPEG would make up what is missing at the end

    def _together(self, indices: np.ndarray, draws: np.ndarray) -> Batch | None:
        """All at once, where the source holds small images in an array."""
        found = None if self._block is None else block(self.source, indices)
        images = None if self._block is None or found is None else self._block(found, draws)
        if images is None:
            return None
        label = np.full(len(indices), -1) if self._labels is None else self._labels[indices]
        return {
            "images": images,
            "index": torch.from_numpy(indices),
            "label": torch.from_numpy(label),
            "bad": [],
            "late": [],
            "files": _joined([]),
        }

    def sample(
        self,
        which_pass: int,
        index: int,
        found: tuple[bytes | np.ndarray, int | None] | OSError,
        draws: Sequence[float],
        bad: list[Bad],
    ) -> tuple[int, Tensor, int]:
        """Index, transformed image and label; a bad image is noted and another one drawn."""
        shown = index
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return shown, *self.transformed(shown, found, draws)
            except Unreachable:
                raise
            except (BadImage, OSError) as error:
                bad.append(self.noted(shown, error))
            other = seeds(_REPLACEMENT, self.seed, which_pass, index, attempt)
            shown = int(other[0] % np.uint64(len(self.source)))
            (found,) = read_many(self.source, [shown], self.reading.max_bytes)
        raise TooManyBad(
            f"{_ATTEMPTS} images in a row could not be decoded; check {printable(self.source.name)} with "
            f"{command('check_data')}. The last: {bad[-1]}",
            bad,
        )


class Evaluation(Reader):
    """Samples by index, without the bad ones."""

    def _batch(self, keys: np.ndarray) -> Batch:
        images: list[Tensor] = []
        kept: list[int] = []
        labels: list[int] = []
        bad: list[Bad] = []
        wanted = keys.tolist()
        for index, found in zip(wanted, read_many(self.source, wanted, self.reading.max_bytes), strict=True):
            try:
                image, label = self.transformed(index, found, ())
            except Unreachable:
                raise
            except (BadImage, OSError) as error:
                bad.append(self.noted(index, error))
            else:
                images.append(image)
                kept.append(index)
                labels.append(label)
        stacked = empty_pixels(len(images), self.reading.channels, *self.transform.image_hw)
        return {
            "images": torch.stack(images, out=stacked) if images else stacked,
            "index": torch.tensor(kept, dtype=torch.int64),
            "label": torch.tensor(labels, dtype=torch.int64),
            "bad": bad,
            "late": [],
            "files": _joined([]),
        }
