"""From keys to batches: reads, decodes and transforms; notes bad images and, in training, replaces them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from mpp.data.decoding import BadImage, open_picture
from mpp.data.decoding.bad_image import as_bad_image, one_line, out_of_memory
from mpp.data.decoding.jpeg import JpegPicture
from mpp.data.seeds import image_seeds, uniforms
from mpp.data.settings import DecodeOptions
from mpp.data.shared_memory import empty_pixels
from mpp.data.sources.base import Source, TooLarge
from mpp.data.sources.files import NotAFile, Outside
from mpp.data.sources.names import printable
from mpp.data.transform import Transform
from mpp.errors import RunError, Unreachable, UserError, command

_ATTEMPTS = 20
_EOI, _TAIL = b"\xff\xd9", 1024  # end mark of a JPEG, and how many last bytes are searched for it
_ABOUT = 32  # pixels by which the sides of images in one block may differ
_SAMPLE, _REPLACEMENT = 2, 3  # purposes of random numbers; seeds.py has the other
T = TypeVar("T")
Found = tuple[bytes | np.ndarray, int | None] | OSError  # data and label, or why they cannot be read


class Bad(NamedTuple):
    """An image that could not be used."""

    index: int
    kind: str  # what it counts as: a `BadImage.kind`, missing, unreadable, outside or not a file
    where: str  # the file, as the system takes it, or which image of which file
    reason: str

    def __str__(self) -> str:
        where = printable(self.where)
        return self.reason if not where or where in self.reason else f"{where}: {self.reason}"


class TooManyBad(BadImage):
    """So many images in a row could not be used that something else must be wrong."""

    def __init__(self, reason: str, bad: list[Bad]) -> None:
        super().__init__(reason, bad[-1].kind)
        self.bad = bad

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.bad)


class UndecodedJpeg(NamedTuple):
    """A JPEG file of a batch that will be decoded on the device (device_jpeg.py)."""

    slot: int  # row in the batch
    epoch: int
    index: int
    size: int  # bytes of the file
    pixels: int  # height times width
    orientation: int  # EXIF's, 1 to 8
    draws: list[float]  # random numbers for its transform


class Batch(TypedDict):
    """One micro-batch."""

    images: Tensor  # uint8 (B, C, h, w)
    index: Tensor  # int64 (B,), of the images that are in it: in the place of a bad one, its replacement's
    label: Tensor  # int64 (B,), -1 where there is none
    bad: list[Bad]  # the images that could not be used
    undecoded: NotRequired[list[UndecodedJpeg]]  # those yet to be decoded, whose rows in `images` are unset
    files: NotRequired[Tensor]  # uint8 (bytes,), their files in one: each tensor from a worker is an open file


def attempt(source: Source, index: int, found: Found, make: Callable[[int, bytes | np.ndarray, int], T]) -> T | Bad:
    """`make(index, data, label)` of what was read, label -1 for none, or what is wrong with it. Raises Unreachable."""
    try:
        if isinstance(found, OSError):
            raise found
        data, label = found
        return make(index, data, -1 if label is None else label)
    except Unreachable:
        raise
    except (BadImage, OSError) as error:
        return _noted(source, index, error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _noted(source, index, as_bad_image(MemoryError()))


def attempt_each(
    source: Source, indices: Sequence[int], most_bytes: float, make: Callable[[int, bytes | np.ndarray, int], T]
) -> Iterator[tuple[int, T | Bad]]:
    """Reads images in order and yields each index with its `attempt`."""
    for index, found in zip(indices, source.read_many(indices, most_bytes), strict=True):
        yield index, attempt(source, index, found, make)


def _noted(source: Source, index: int, error: BadImage | OSError) -> Bad:
    named, reason = source.location(index), one_line(error)
    if isinstance(error, OSError) and error.strerror:
        link = isinstance(error, FileNotFoundError) and Path(named).is_symlink()
        reason = "a link that leads nowhere" if link else error.strerror
    return Bad(index, kind_of(error), named, reason)


def kind_of(error: BadImage | OSError | MemoryError) -> str:
    """The category that a bad image counts in."""
    if isinstance(error, BadImage):
        return error.kind
    if isinstance(error, (TooLarge, MemoryError)):
        return "too large"
    names = {FileNotFoundError: "missing", Outside: "outside", NotAFile: "not a file"}
    return next((name for kind, name in names.items() if isinstance(error, kind)), "unreadable")


class Reader:
    """Makes batches of keys: read, decoded by the options, transformed."""

    def __init__(self, source: Source, transform: Transform, options: DecodeOptions) -> None:
        self.source, self.transform, self.options = source, transform, options
        self._final = DecodeOptions(options.channels, max_bytes=options.max_bytes)

    def options_of(self, index: int) -> DecodeOptions:
        """How what the source gives of an image becomes pixels: as it is, where it is pixels already."""
        return self._final if self.source.decoded(index) else self.options

    def transformed(
        self, index: int, data: bytes | np.ndarray, label: int, draws: Sequence[float] = ()
    ) -> tuple[Tensor, int]:
        """The image at the input size, uint8 (C, h, w), and its label. Raises BadImage."""
        return self.transform(open_picture(data, self.options_of(index)), draws), label

    def __getitems__(self, keys: np.ndarray) -> Batch | UserError | Unreachable:
        """A batch, or why there is none: raised in a worker, it would arrive with the worker's whole traceback."""
        try:
            return self.batch(keys)
        except (UserError, Unreachable) as error:
            return error
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            what = f"{len(keys)} images of {' x '.join(map(str, self.transform.image_hw))}"
            return RunError(f"no memory for a batch of {what}: take fewer workers, or smaller batches (micro_batch)")

    def batch(self, keys: np.ndarray) -> Batch:
        raise NotImplementedError


class EvalReader(Reader):
    """Batches of images by index, int64 (B,), without the bad ones."""

    def batch(self, keys: np.ndarray) -> Batch:
        images: list[Tensor] = []
        good: list[int] = []
        labels: list[int] = []
        bad: list[Bad] = []
        for index, result in attempt_each(self.source, keys.tolist(), self.options.max_bytes, self.transformed):
            if isinstance(result, Bad):
                bad.append(result)
            else:
                images.append(result[0])
                good.append(index)
                labels.append(result[1])
        stacked = empty_pixels(len(images), self.options.channels, *self.transform.image_hw)
        return {
            "images": torch.stack(images, out=stacked) if images else stacked,
            "index": torch.tensor(good, dtype=torch.int64),
            "label": torch.tensor(labels, dtype=torch.int64),
            "bad": bad,
        }


class TrainReader(Reader):
    """Batches of images by (epoch, index), int64 (B, 2), with replacements for bad ones.

    `seed` is that of all draws; with `device_jpegs`, ordinary JPEGs are left undecoded.
    """

    def __init__(
        self, source: Source, transform: Transform, options: DecodeOptions, seed: int, device_jpegs: bool = False
    ) -> None:
        super().__init__(source, transform, options)
        self.seed, self.device_jpegs = seed, device_jpegs
        self._labels = source.labels()
        self._in_blocks = bool(len(source)) and self._takes_blocks()

    def _takes_blocks(self) -> bool:
        """Whether the source gives small images of one size in blocks: asked of the first, so that no batch is fetched
        in vain."""
        if self.options_of(0).value_range:  # the array's values are not its pixels yet
            return False
        first = self.source.block(np.zeros(1, dtype=np.int64))
        if first is None or first.shape[3] != self.options.channels:
            return False
        return self.transform.takes_blocks(*first.shape[1:3])

    def batch(self, keys: np.ndarray) -> Batch:
        drawn = uniforms(image_seeds(_SAMPLE, self.seed, keys[:, 0], keys[:, 1]), self.transform.draws)
        if self._in_blocks and (block := self.source.block(keys[:, 1])) is not None:
            label = np.full(len(keys), -1) if self._labels is None else self._labels[keys[:, 1]]
            index, label = torch.from_numpy(keys[:, 1]), torch.from_numpy(label)
            return {"images": self.transform.block(block, drawn), "index": index, "label": label, "bad": []}
        draws, epochs, index = drawn.tolist(), keys[:, 0].tolist(), keys[:, 1].tolist()
        images = empty_pixels(len(keys), self.options.channels, *self.transform.image_hw)
        labels, bad = [-1] * len(keys), list[Bad]()
        undecoded, files = list[UndecodedJpeg](), list[bytes]()
        blocks = dict[tuple[int, int], list[tuple[int, np.ndarray]]]()  # slots and images of about one size
        for slot, found in enumerate(self.source.read_many(index, self.options.max_bytes)):
            picture = self._undecoded(index[slot], found) if self.device_jpegs else None
            if picture is not None and not isinstance(found, OSError):
                size, pixels = len(picture.data), picture.height * picture.width
                undecoded.append(
                    UndecodedJpeg(slot, epochs[slot], index[slot], size, pixels, picture.orientation, draws[slot])
                )
                files.append(picture.data)
                labels[slot] = -1 if found[1] is None else found[1]
            else:
                make = functools.partial(self._whole_or_transformed, draws=draws[slot])
                index[slot], (image, labels[slot]) = self._attempts(epochs[slot], index[slot], found, make, bad)
                if isinstance(image, Tensor):
                    images[slot].copy_(image)
                else:
                    about = -(-image.shape[0] // _ABOUT), -(-image.shape[1] // _ABOUT)
                    blocks.setdefault(about, []).append((slot, image))
        for block in blocks.values():
            slots, sizes = [slot for slot, _ in block], [image.shape[:2] for _, image in block]
            padded = np.zeros((len(block), *np.max(sizes, axis=0), self.options.channels), dtype=np.uint8)
            for row, (_, image) in zip(padded, block, strict=True):
                row[: image.shape[0], : image.shape[1]] = image
            made = self.transform.block(padded, drawn[slots], sizes)
            images.numpy()[slots] = made.numpy()  # torch's own indexing takes 20 times as long
        batch: Batch = {"images": images, "index": torch.tensor(index), "label": torch.tensor(labels), "bad": bad}
        if undecoded:
            joined = empty_pixels(sum(map(len, files)))
            joined.numpy()[:] = np.frombuffer(b"".join(files), dtype=np.uint8)
            batch["undecoded"], batch["files"] = undecoded, joined
        return batch

    def _whole_or_transformed(
        self, index: int, data: bytes | np.ndarray, label: int, draws: Sequence[float]
    ) -> tuple[np.ndarray | Tensor, int]:
        """As `transformed`, but an image that goes in a block as it is, uint8 (H, W, C)."""
        picture = open_picture(data, self.options_of(index))
        hw, target_hw = (picture.height, picture.width), self.transform.image_hw
        if not self.transform.takes_blocks(*hw) or picture.step(*hw, target_hw) > 1:
            return self.transform(picture, draws), label
        return picture.region(0, 0, *hw, target_hw), label

    def _undecoded(self, index: int, found: Found) -> JpegPicture | None:
        """A JPEG that the device may decode: whole, and in ordinary colours."""
        options = self.options_of(index)
        if isinstance(found, OSError) or options.value_range:
            return None
        try:
            picture = open_picture(found[0], options)
        except BadImage:
            return None  # the usual way names it
        if not isinstance(picture, JpegPicture) or picture.plain_rgb:
            return None
        return picture if _EOI in picture.data[-_TAIL:] else None  # nvJPEG would make up what is missing at the end

    def sample(
        self, epoch: int, index: int, found: Found, draws: Sequence[float], bad: list[Bad]
    ) -> tuple[int, Tensor, int]:
        """Index, image and label; a bad image is added to `bad` and another one drawn, or TooManyBad raised."""
        shown, made = self._attempts(epoch, index, found, functools.partial(self.transformed, draws=draws), bad)
        return shown, *made

    def _attempts(
        self, epoch: int, index: int, found: Found, make: Callable[[int, bytes | np.ndarray, int], T], bad: list[Bad]
    ) -> tuple[int, T]:
        """The index and what is made of it, as `sample`."""
        shown = index
        for number in range(1, _ATTEMPTS + 1):
            result = attempt(self.source, shown, found, make)
            if not isinstance(result, Bad):
                return shown, result
            bad.append(result)
            other = image_seeds(_REPLACEMENT, self.seed, epoch, index, number)
            shown = int(other[0] % np.uint64(len(self.source)))
            (found,) = self.source.read_many([shown], self.options.max_bytes)
        raise TooManyBad(
            f"{_ATTEMPTS} images in a row could not be decoded; check {printable(self.source.name)} with "
            f"{command('check_data')}. The last: {bad[-1]}",
            bad,
        )
