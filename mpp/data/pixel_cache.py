"""Decoded pixels of a whole source, kept in one array on disk: for images of one size, which decode once and for all.

source, reading -> the cache has it -> memory-mapped uint8 (n, h, w, C)
                   else decode all   -> write it whole, with the list of what could not be decoded
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
import torch
from torch import Tensor

from mpp.cache.room import drop, make_room
from mpp.cache.users import use
from mpp.data.config import DataConfig, Reading
from mpp.data.decode import BadImage, Picture, open_picture
from mpp.data.loader import sequential
from mpp.data.transform import TRANSFORM_VERSION
from mpp.errors import Unreachable, UserError
from mpp.files import cache_folder, claimed, write_whole
from mpp.sources.base import Source, check_index, read_many, size_of, warnings_of, where
from mpp.sources.fingerprint import fingerprint
from mpp.sources.opening import open_source

_BATCH = 256


class PixelSource:
    """A source whose images are decoded already; what did not decode is read from the source each time.

    Args:
        source: where labels, names and the images that did not decode come from.
        path: .npy, uint8 (n, h, w, C).
        bad: indices of the images that did not decode.
    """

    def __init__(self, source: Source, path: Path, bad: np.ndarray) -> None:
        self.source, self.path, self.name, self.classes = source, path, source.name, source.classes
        self.warnings = warnings_of(source)
        self._bad = frozenset(bad.tolist())
        self._labels = source.labels()
        self._pixels: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry every pixel to each spawned worker.
        return {**self.__dict__, "_pixels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pixels = np.load(self.path, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def original(self) -> Source:
        """Where the pixels came from."""
        return self.source

    def where(self, index: int) -> str:
        """The file or member that the pixels are of."""
        return where(self.source, index)

    def read(self, index: int) -> tuple[bytes | np.ndarray, int | None]:
        """uint8 (h, w, C), a view of the file, and the label; of what did not decode, what the source gives."""
        if not self.decoded(index):
            return self.source.read(index)
        pixels = np.asarray(self._pixels[check_index(index, len(self))])
        return pixels, None if self._labels is None or self._labels[index] < 0 else int(self._labels[index])

    def size(self, index: int) -> int:
        """Of what did not decode, as `size_of` the source."""
        return 0 if self.decoded(index) else size_of(self.source, index)

    def decoded(self, index: int) -> bool:
        """Whether the pixels are in the cache."""
        return index not in self._bad

    def block(self, indices: np.ndarray) -> np.ndarray | None:
        """uint8 (B, h, w, C), where all images decoded."""
        return None if self._bad else self._pixels[indices]

    def labels(self) -> np.ndarray | None:
        """int64 (len,), or None."""
        return self._labels

    def describe(self) -> str:
        """One line: as the source's, and where the pixels are."""
        size = "x".join(map(str, self._pixels.shape[1:3]))
        return f"{self.source.describe()}; decoded pixels ({size}) in {self.path}"


class _Same:
    """The pixels as they are; refuses another size."""

    draws = 0

    def __init__(self, image_hw: tuple[int, int]) -> None:
        self.image_hw = image_hw

    def __call__(self, image: Picture, draws: object = ()) -> Tensor:
        if (image.height, image.width) != self.image_hw:
            raise BadImage(f"{image.width} x {image.height} pixels", "another size")
        return torch.from_numpy(image.pixels()).permute(2, 0, 1)


def open_images(data: DataConfig, reading: Reading, workers: int) -> Source:
    """The images of a config, from the cache where it says so.

    Raises:
        UserError: a source that does not open, or a cache that does not fit it.
    """
    source = open_source(data.source, download=data.download, keep=data.keep)
    return cache_pixels(source, reading, workers) if data.cache == "pixels" else source


def cache_pixels(source: Source, reading: Reading, workers: int) -> PixelSource:
    """The source with its decoded pixels in the cache, decoded now where they are not there.

    Raises:
        UserError: images of several sizes, none that decodes, or no room for them.
    """
    if getattr(source, "weights", None):
        raise UserError(f"data.cache pixels does not go with weights, as in {source.name}; leave one of them out")
    told = [fingerprint(source), asdict(reading), TRANSFORM_VERSION, PIL.__version__]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
    path, bad_path = cache_folder() / f"{key}.pixels.npy", cache_folder() / f"{key}.bad.npy"
    use(key)
    with _alone(cache_folder() / f"{key}.lock"):
        if not (path.is_file() and bad_path.is_file()):
            place = _place(source, reading)
            drop(_outdated(place))
            _decode_all(source, reading, workers, path, bad_path)
            text = json.dumps(place)
            with contextlib.suppress(OSError):
                write_whole(path.with_suffix(".json"), lambda file: file.write(text.encode()))
    return PixelSource(source, path, np.load(bad_path, allow_pickle=False))


def _place(source: Source, reading: Reading) -> list[Any]:
    """Which images these are, whatever is in them: those of a split, of a folder that may be named from elsewhere."""
    folder = str(Path(getattr(source, "root", "")).absolute())
    first = where(source, 0) if len(source) else ""
    return [type(source).__name__, source.name, folder, first, asdict(reading)]


def _outdated(place: list[Any]) -> Iterator[str]:
    """Keys of arrays of what was at this place and read in this way: files that changed make them useless."""
    for path in cache_folder().glob("*.pixels.json"):
        with contextlib.suppress(OSError, ValueError):
            # The name of a remote source lacks what may name another object.
            if json.loads(path.read_bytes()) == json.loads(json.dumps(place)) and "://" not in place[1]:
                yield path.name.partition(".")[0]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds a lock, so that several runs decode the same images once. It ends with the process, however that ends.

    Raises:
        UserError: the cache cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(claimed(path, wait=True))
        except OSError as error:
            why = f"cannot write to {path.parent} ({error.strerror})"
            raise UserError(f"{why}: set MPP_CACHE to another folder") from error
        yield


def _decode_all(source: Source, reading: Reading, workers: int, path: Path, bad_path: Path) -> None:
    height, width = _first_size(source, reading)
    shape = (len(source), height, width, reading.channels)
    size = int(np.prod(shape, dtype=np.int64))
    try:
        make_room(size, f"an array of the decoded pixels of {source.name}")
    except OSError as error:
        raise UserError(
            f"{error.strerror}: set MPP_CACHE to a folder with room, or leave data.cache at none"
        ) from error
    bad: list[int] = []

    def write(file: BinaryIO) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        batches = sequential(
            source, _Same((height, width)), reading, np.arange(len(source)), batch_size=_BATCH, workers=workers
        )
        for batch in batches:
            for other in batch["bad"]:
                if other.kind == "another size":
                    raise UserError(
                        f"data.cache pixels takes images of one size: the first is {width} x {height}, {other}; "
                        "leave data.cache at none"
                    )
                bad.append(other.index)
            # Images that did not decode leave a hole.
            for index, image in zip(batch["index"].tolist(), batch["images"].permute(0, 2, 3, 1).numpy(), strict=True):
                file.seek(start + index * image.size)
                file.write(np.ascontiguousarray(image).data)
        file.truncate(start + size)

    try:
        write_whole(path, write)
        write_whole(bad_path, lambda file: np.save(file, np.array(sorted(bad), dtype=np.int64), allow_pickle=False))
    except Unreachable:
        raise
    except OSError as error:
        raise UserError(
            f"cannot keep the decoded pixels in {path.parent} ({error.strerror}): set MPP_CACHE to a folder with room"
        ) from error


def _first_size(source: Source, reading: Reading) -> tuple[int, int]:
    """Height and width of the first image that decodes."""
    for index in range(len(source)):
        try:
            (found,) = read_many(source, [index], reading.max_bytes)
            if isinstance(found, OSError):
                raise found
            picture = open_picture(found[0], reading)
        except Unreachable:
            raise
        except (BadImage, OSError):
            continue
        return picture.height, picture.width
    raise UserError(f"none of the images of {source.name} could be decoded")
