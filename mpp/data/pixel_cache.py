"""Decoded pixels of a whole source, kept on disk: images decode once and for all.

source, options -> the cache has them -> memory-mapped uint8, one image after the other
                   else decode all    -> write them whole, with the sizes of the images

Here for data.cache pixels: exact pixels of images of one size, for all that reads the source. For auto: auto_cache.py.
"""

import contextlib
import functools
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mpp.data.decoding import Picture, open_picture
from mpp.data.decoding.jpeg import JpegPicture, is_scaled
from mpp.data.loader import in_order
from mpp.data.reader import Batch, Reader, attempt_each
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.shared_memory import empty_pixels
from mpp.data.sources.base import Placement, Source, Subset
from mpp.data.sources.opening import open_source
from mpp.data.transform import TRANSFORM_VERSION, EvalTransform
from mpp.errors import Unreachable, UserError
from mpp.system.cache import drop, make_room, shown_size, use
from mpp.system.files import cache_folder, claimed, write_whole
from mpp.system.progress import Progress

_FORMAT = 3  # of the files
_DECODERS = ("pillow", "simplejpeg", "imagecodecs", "tifffile")  # of another version perhaps with other pixels
_BATCH, _BATCH_BYTES = 256, 2**24  # most images and bytes decoded at a time


class PixelSource(Source):
    """A source whose images are decoded already; what is not is read from `source` each time.

    `path` has uint8, the pixels of one image after the other, and `sizes`, int32 (n, 2), their height and width, or
    zeros. `block` gives images where all are decoded and have one size.
    """

    def __init__(self, source: Source, path: Path, sizes: np.ndarray, channels: int) -> None:
        super().__init__(source.name, source.labels(), source.classes)
        self.source, self.path, self.warnings = source, path, source.warnings
        self.sizes, self.channels = sizes, channels
        self._ends = _ends(sizes, channels)
        self._in_blocks = bool((sizes[:, 0] > 0).all() and (sizes == sizes[:1]).all())
        self._pixels = self._mapped()  # before workers fork: they read on where the cache is removed meanwhile

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return int(self._ends[-1]) if len(self) else 0

    def _mapped(self) -> np.ndarray:
        return np.asarray(np.memmap(self.path, np.uint8, "r") if self.nbytes else np.empty(0, dtype=np.uint8))

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry every pixel to each spawned worker.
        return {name: value for name, value in vars(self).items() if name != "_pixels"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._pixels = self._mapped()

    def __len__(self) -> int:
        return len(self.sizes)

    def location(self, index: int) -> str:
        return self.source.location(index)

    def image(self, index: int) -> bytes | np.ndarray:
        """uint8 (h, w, C), a view of the file; of an image that did not decode, as the source gives it."""
        if not self.decoded(index):
            return self.source.image(index)
        (height, width), end = self.sizes[index].tolist(), int(self._ends[index])
        return self._pixels[end - height * width * self.channels : end].reshape(height, width, self.channels)

    def size(self, index: int) -> int:
        """Bytes of an image that did not decode."""
        return 0 if self.decoded(index) else self.source.size(index)

    def decoded(self, index: int) -> bool:
        """Whether the pixels are in the cache."""
        return bool(self.sizes[index, 0])

    def block(self, indices: np.ndarray) -> np.ndarray | None:
        """uint8 (B, h, w, C), where all images are decoded and have one size."""
        return self._pixels.reshape(len(self), *self.sizes[0], self.channels)[indices] if self._in_blocks else None

    def placement(self, indices: np.ndarray) -> Placement:
        return self.source.placement(indices)

    def fingerprint(self, *, times: bool = True, most: int | None = None, labelled: bool = True) -> str:
        """That of the source: the pixels are its images in another form."""
        return self.source.fingerprint(times=times, most=most, labelled=labelled)

    def describe(self) -> str:
        """One line: as the source's, and where the pixels are."""
        return f"{self.source.describe()}; decoded pixels ({shown_size(self.nbytes)}) in {self.path}"


class WholeReader(Reader):
    """Batches of whole images: `images` uint8 of one after the other, `label` int32 (B, 2) their sizes, or zeros.

    Exact pixels, or with `crop_hw` as a training with crops of this size decodes them, with `device_jpegs` its JPEGs on
    the device.
    """

    def __init__(
        self, source: Source, options: DecodeOptions, crop_hw: tuple[int, int] | None = None, device_jpegs: bool = False
    ) -> None:
        super().__init__(source, EvalTransform((1, 1)), options)
        self.crop_hw, self.device_jpegs = crop_hw, device_jpegs
        self.only_hw: tuple[int, int] | None = None  # the size that all images must have

        # What the pixels, and which images have some, depend on beside the options; which images are left out.
        self.how: list[Any] = ["training", *crop_hw, device_jpegs] if crop_hw else []
        scaled = "that are scaled to their crop while they are decoded"
        self.left_out = f"JPEGs {'decoded on the device' if device_jpegs else scaled}"

    def keeps(self, picture: Picture) -> bool:
        """Not JPEGs whose pixels in a training depend on the crop, or on the device."""
        if self.crop_hw is None or not isinstance(picture, JpegPicture):
            return True
        return not self.device_jpegs and not is_scaled(picture.height, picture.width, self.crop_hw)

    def batch(self, keys: np.ndarray) -> Batch:
        """See `Reader`."""

        def whole(index: int, data: bytes | np.ndarray, _: int) -> np.ndarray | None:
            picture = open_picture(data, self.options_of(index))
            if self.only_hw not in (None, (picture.height, picture.width)):
                raise UserError(
                    f"data.cache pixels takes images of one size: the first is {self.only_hw[1]} x {self.only_hw[0]}, "
                    f"{self.source.location(index)}: {picture.width} x {picture.height} pixels; "
                    "leave data.cache at auto"
                )
            return picture.region(0, 0, picture.height, picture.width, self.crop_hw) if self.keeps(picture) else None

        sizes, pixels = np.zeros((len(keys), 2), dtype=np.int32), [np.empty(0, dtype=np.uint8)]
        each = attempt_each(self.source, keys.tolist(), self.options.max_bytes, whole)
        for row, (_, image) in enumerate(each):
            if isinstance(image, np.ndarray):
                sizes[row] = image.shape[:2]
                pixels.append(image.reshape(-1))
        joined = empty_pixels(sum(map(len, pixels)))
        np.concatenate(pixels, out=joined.numpy())
        return {"images": joined, "index": torch.from_numpy(keys), "label": torch.from_numpy(sizes), "bad": []}


def open_images(data: DataConfig, options: DecodeOptions, workers: int) -> Source:
    """Opens the images of a config, with data.cache pixels from the cache. Raises UserError."""
    source = open_source(data.source, download=data.download, keep=data.keep)
    return cache_pixels(source, options, workers) if data.cache == "pixels" else source


def cache_pixels(source: Source, options: DecodeOptions, workers: int) -> PixelSource:
    """The source with its exact pixels in the cache, decoded now where they are not there.

    Raises UserError for weighted mixtures, images of several sizes, none that decodes, or no room for them.
    """
    if source.weights:
        raise UserError(f"data.cache pixels does not go with weights, as in {source.name}; leave one of them out")
    reader = WholeReader(source, options)

    def size() -> int:
        reader.only_hw = _first_size(source, options)
        return len(source) * math.prod(reader.only_hw) * options.channels

    try:
        return cached(reader, workers, size)
    except Unreachable:
        raise
    except OSError as error:
        raise UserError(
            f"cannot keep the decoded pixels in {cache_folder()} ({error.strerror}): set MPP_CACHE to another folder "
            "with room, or data.cache to auto"
        ) from error


def cached(
    reader: WholeReader, workers: int, size: Callable[[], int], check: Callable[[int], None] = lambda written: None
) -> PixelSource:
    """The pixels from the cache, or decoded now; damaged files are written anew. Raises OSError without room.

    `size` gives about how many bytes they will take, before anything is written; `check` takes the bytes so far. Either
    may raise to refuse them.
    """
    source, options = reader.source, reader.options
    depends_on = [_FORMAT, source.fingerprint(), asdict(options), TRANSFORM_VERSION, _decoders(), *reader.how]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]
    path, sizes_path = cache_folder() / f"{key}.pixels", cache_folder() / f"{key}.sizes.npy"

    def whole_sizes() -> np.ndarray | None:
        try:
            sizes = np.load(sizes_path, allow_pickle=False)
            fits = sizes.shape == (len(source), 2) and int(_ends(sizes, options.channels)[-1]) == path.stat().st_size
            return sizes if fits else None
        except (OSError, ValueError, EOFError):
            return None

    wanted = size() if whole_sizes() is None else 0
    use(key)
    with claimed(cache_folder() / f"{key}.lock", wait=True):  # so that several runs decode the same images once
        if (sizes := whole_sizes()) is None:
            placement = _placement(reader)
            drop(_outdated(placement))
            sizes = _decode_all(reader, workers, wanted or size(), check, path, sizes_path)
            with contextlib.suppress(OSError):
                write_whole(path.with_suffix(".pixels.json"), placement)
    return PixelSource(source, path, sizes, options.channels)


@functools.cache
def _decoders() -> dict[str, str]:
    """Versions of the packages that decode; to read one takes 3 ms."""
    return {name: metadata.version(name) for name in _DECODERS}


def _ends(sizes: np.ndarray, channels: int) -> np.ndarray:
    """int64 (n,): where the pixels of each image end."""
    return np.cumsum(sizes[:, 0].astype(np.int64) * sizes[:, 1] * channels)


def _placement(reader: WholeReader) -> str:
    """Which images these are, whatever is in them, and how they are read: JSON."""
    source, part = reader.source, list[int]()
    first = source.location(0) if len(source) else ""
    if isinstance(source, Subset):
        part, source = [len(source), zlib.crc32(source.indices.tobytes())], source.source
    folder = str(Path(getattr(source, "root", "")).absolute())  # it may be named from elsewhere
    return json.dumps([type(source).__name__, source.name, folder, first, *part, asdict(reader.options), *reader.how])


def _outdated(placement: str) -> Iterator[str]:
    """Keys of pixels with the same placement: files that changed make them useless."""
    for path in cache_folder().glob("*.pixels.json"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text("utf-8")
            # The name of a remote source lacks what may name another object.
            if text == placement and "://" not in json.loads(text)[1]:
                yield path.name.partition(".")[0]


def _decode_all(
    reader: WholeReader, workers: int, wanted: int, check: Callable[[int], None], path: Path, sizes_path: Path
) -> np.ndarray:
    source = reader.source
    make_room(wanted, f"an array of the decoded pixels of {source.name}")
    sizes: list[np.ndarray] = []

    def write(file: BinaryIO) -> None:
        batch_size = max(1, min(_BATCH, _BATCH_BYTES * len(source) // max(1, wanted)))
        with (
            Progress("decoding images, once and for all", len(source)) as progress,
            contextlib.closing(in_order(reader, np.arange(len(source)), batch_size, workers)) as batches,
        ):
            for batch in batches:
                sizes.append(batch["label"].numpy())
                check(file.tell() + batch["images"].nbytes)
                file.write(batch["images"].numpy().data)
                progress.add(len(batch["index"]))

    write_whole(path, write)
    joined = np.concatenate(sizes)
    write_whole(sizes_path, lambda file: np.save(file, joined, allow_pickle=False))
    return joined


def _first_size(source: Source, options: DecodeOptions) -> tuple[int, int]:
    """Height and width of the first image that decodes."""
    for index in range(len(source)):
        for _, picture in attempt_each(source, [index], options.max_bytes, lambda _, d, __: open_picture(d, options)):
            if isinstance(picture, Picture):
                return picture.height, picture.width
    raise UserError(f"none of the images of {source.name} could be decoded")
