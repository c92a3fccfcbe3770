"""Decoded pixels of a whole source, kept on disk: images decode once and for all.

source, reading -> the cache has them -> memory-mapped uint8, one image after the other
                   else decode all    -> write them whole, with the sizes of the images

Here for data.cache pixels: exact pixels of images of one size, for all that reads the source. For auto: auto_cache.py.
"""

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mpp.data.decoding.decode import BadImage, Picture, open_picture
from mpp.data.loader import in_order
from mpp.data.reader import Batch, Reader
from mpp.data.sending import empty_pixels
from mpp.data.settings import DataConfig, Reading
from mpp.data.sources.base import Source, Subset, check_index, read_many, size_of, warnings_of, where
from mpp.data.sources.fingerprint import fingerprint
from mpp.data.sources.opening import open_source
from mpp.data.transform import TRANSFORM_VERSION, EvalTransform
from mpp.errors import Unreachable, UserError
from mpp.system.cache import drop, make_room, shown_size, use
from mpp.system.files import cache_folder, claimed, write_whole

_FORMAT = 3  # of the files
_DECODERS = ("pillow", "simplejpeg", "imagecodecs", "tifffile")  # of another version perhaps with other pixels
_MOST_AT_ONCE, _BYTES_AT_ONCE = 256, 2**24  # images of a batch to decode


class PixelSource:
    """A source whose images are decoded already; what is not is read from the source each time.

    Args:
        source: where labels, names and the images that are not decoded come from.
        path: uint8, the pixels of one image after the other.
        sizes: int32 (n, 2): height and width; zeros where there are no pixels.
        channels: of the pixels.
        blocks: whether `block` gives images, where all are decoded and have one size.
    """

    def __init__(self, source: Source, path: Path, sizes: np.ndarray, channels: int, blocks: bool = True) -> None:
        self.source, self.path, self.name, self.classes = source, path, source.name, source.classes
        self.warnings = warnings_of(source)
        self.sizes, self.channels = sizes, channels
        self._labels = source.labels()
        self._decoded = (sizes[:, 0] > 0).tobytes()
        self._ends = _ends(sizes, channels)
        self._one_size = blocks and 0 not in self._decoded and bool((sizes == sizes[:1]).all())
        self._pixels = self._mapped()

    @property
    def nbytes(self) -> int:
        """That all pixels take."""
        return int(self._ends[-1]) if len(self) else 0

    def _mapped(self) -> np.ndarray:
        pixels = np.asarray(np.memmap(self.path, np.uint8, "r") if self.nbytes else np.empty(0, dtype=np.uint8))
        return pixels.reshape(len(self), *self.sizes[0], self.channels) if self._one_size else pixels

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry every pixel to each spawned worker.
        return {**self.__dict__, "_pixels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pixels = self._mapped()

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def original(self) -> Source:
        """Where the pixels came from."""
        return self.source

    def where(self, index: int) -> str:
        """The file or member that the pixels are of."""
        return where(self.source, index)

    def read(self, index: int) -> tuple[bytes | np.ndarray, int | None]:
        """uint8 (h, w, C), a view of the file, and the label; of what did not decode, what the source gives."""
        if not self.decoded(check_index(index, len(self))):
            return self.source.read(index)
        label = None if self._labels is None or self._labels[index] < 0 else int(self._labels[index])
        if self._one_size:
            return self._pixels[index], label
        height, width = self.sizes[index].tolist()
        end = int(self._ends[index])
        return self._pixels[end - height * width * self.channels : end].reshape(height, width, self.channels), label

    def size(self, index: int) -> int:
        """Of what did not decode, as `size_of` the source."""
        return 0 if self.decoded(index) else size_of(self.source, index)

    def decoded(self, index: int) -> bool:
        """Whether the pixels are in the cache."""
        return bool(self._decoded[index])

    def block(self, indices: np.ndarray) -> np.ndarray | None:
        """uint8 (B, h, w, C), where all images are decoded and have one size, and `blocks`."""
        return self._pixels[indices] if self._one_size else None

    def labels(self) -> np.ndarray | None:
        """int64 (len,), or None."""
        return self._labels

    def describe(self) -> str:
        """One line: as the source's, and where the pixels are."""
        return f"{self.source.describe()}; decoded pixels ({shown_size(self.nbytes)}) in {self.path}"


class Whole(Reader):
    """Whole images as they decode: `images` uint8 of one after the other, `label` int32 (B, 2), their `sizes`.

    Args:
        source: what to read.
        reading: how files become pixels.
    """

    target_hw: tuple[int, int] | None = None
    """The size that crops are resized to afterwards; None: exact pixels."""

    def __init__(self, source: Source, reading: Reading) -> None:
        super().__init__(source, EvalTransform((1, 1)), reading)

    def _batch(self, keys: np.ndarray) -> Batch:
        sizes, pixels = np.zeros((len(keys), 2), dtype=np.int32), [np.empty(0, dtype=np.uint8)]
        wanted = keys.tolist()
        for row, found in enumerate(read_many(self.source, wanted, self.reading.max_bytes)):
            if isinstance(found, Unreachable):
                raise found
            if isinstance(found, OSError):
                continue
            with contextlib.suppress(BadImage):
                picture = open_picture(found[0], self.reading_of(wanted[row]))
                if self.keeps(picture):
                    whole = picture.region(0, 0, picture.height, picture.width, self.target_hw)
                    sizes[row] = whole.shape[:2]
                    pixels.append(whole.reshape(-1))
        joined = empty_pixels(sum(map(len, pixels)))
        np.concatenate(pixels, out=joined.numpy())
        index, label = torch.from_numpy(keys), torch.from_numpy(sizes)
        return {"images": joined, "index": index, "label": label, "bad": [], "late": [], "files": empty_pixels(0)}

    def keeps(self, picture: Picture) -> bool:
        """Whether its pixels are to be kept."""
        return True


def open_images(data: DataConfig, reading: Reading, workers: int) -> Source:
    """The images of a config, of data.cache pixels from the cache.

    Raises:
        UserError: a source that does not open, or a cache that does not fit it.
    """
    source = open_source(data.source, download=data.download, keep=data.keep)
    return cache_pixels(source, reading, workers) if data.cache == "pixels" else source


def cache_pixels(source: Source, reading: Reading, workers: int) -> PixelSource:
    """The source with its exact pixels in the cache, decoded now where they are not there.

    Raises:
        UserError: images of several sizes, none that decodes, or no room for them.
    """
    if getattr(source, "weights", None):
        raise UserError(f"data.cache pixels does not go with weights, as in {source.name}; leave one of them out")
    whole = Whole(source, reading)

    def size() -> int:
        height, width = _first_size(source, reading)
        return len(source) * height * width * reading.channels

    try:
        return cached(whole, [], workers, size, _one_size(source))
    except Unreachable:
        raise
    except OSError as error:
        raise UserError(
            f"cannot keep the decoded pixels in {cache_folder()} ({error.strerror}): set MPP_CACHE to another folder "
            "with room, or data.cache to auto"
        ) from error


Check = Callable[[np.ndarray, int], None]
"""Looks at the sizes of some images and at the bytes of all until now; raises where they are not to be kept."""


def _one_size(source: Source) -> Check:
    """Refuses images of another size than the first."""
    seen: list[tuple[int, int]] = []
    place = [0]

    def check(sizes: np.ndarray, written: int) -> None:
        for height, width in sizes.tolist():
            if height:
                seen.append((height, width))
                if seen[-1] != seen[0]:
                    raise UserError(
                        f"data.cache pixels takes images of one size: the first is {seen[0][1]} x {seen[0][0]}, "
                        f"{where(source, place[0])}: {width} x {height} pixels; leave data.cache at auto"
                    )
            place[0] += 1

    return check


def cached(whole: Whole, how: list[Any], workers: int, size: Callable[[], int], check: Check) -> PixelSource:
    """The pixels from the cache, or decoded now: how many bytes they will take is asked only then.

    `how` is what else the pixels, and which images have some, depend on. Files that are damaged are written anew.

    Raises:
        OSError: no room for them, or the cache cannot be written.
    """
    source, reading = whole.source, whole.reading
    told = [_FORMAT, fingerprint(source), asdict(reading), TRANSFORM_VERSION, _decoders(), *how]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
    path, sizes_path = cache_folder() / f"{key}.pixels", cache_folder() / f"{key}.sizes.npy"

    def there() -> np.ndarray | None:
        return _sizes(sizes_path, path, len(source), reading.channels)

    wanted = size() if there() is None else 0  # before anything is written: it may refuse
    use(key)
    with claimed(cache_folder() / f"{key}.lock", wait=True):  # so that several runs decode the same images once
        if (sizes := there()) is None:
            place = _place(source, reading, *how)
            drop(_outdated(place))
            sizes = _decode_all(whole, workers, wanted or size(), check, path, sizes_path)
            text = json.dumps(place)
            with contextlib.suppress(OSError):
                write_whole(path.with_suffix(".pixels.json"), lambda file: file.write(text.encode()))
    return PixelSource(source, path, sizes, reading.channels, not how)


def _decoders() -> dict[str, str]:
    """Versions of what decodes, where it is installed."""
    found: dict[str, str] = {}
    for name in _DECODERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _sizes(sizes_path: Path, path: Path, images: int, channels: int) -> np.ndarray | None:
    """The sizes of what is in the cache; None where it is not there, or one of the files is damaged."""
    try:
        sizes = np.load(sizes_path, allow_pickle=False)
        if sizes.shape == (images, 2) and int(_ends(sizes, channels)[-1]) == path.stat().st_size:
            return sizes
    except (OSError, ValueError, EOFError):
        pass
    return None


def _ends(sizes: np.ndarray, channels: int) -> np.ndarray:
    """int64 (n,): where the pixels of each image end."""
    return np.cumsum(sizes[:, 0].astype(np.int64) * sizes[:, 1] * channels)


def _place(source: Source, reading: Reading, *how: Any) -> list[Any]:
    """Which images these are, whatever is in them: those of a split, of a folder that may be named from elsewhere."""
    part: list[int] = []
    first = where(source, 0) if len(source) else ""
    if isinstance(source, Subset):
        part, source = [len(source), zlib.crc32(source.indices.tobytes())], source.source
    folder = str(Path(getattr(source, "root", "")).absolute())
    return [type(source).__name__, source.name, folder, first, *part, asdict(reading), *how]


def _outdated(place: list[Any]) -> Iterator[str]:
    """Keys of arrays of what was at this place and read in this way: files that changed make them useless."""
    for path in cache_folder().glob("*.pixels.json"):
        with contextlib.suppress(OSError, ValueError):
            # The name of a remote source lacks what may name another object.
            if json.loads(path.read_bytes()) == json.loads(json.dumps(place)) and "://" not in place[1]:
                yield path.name.partition(".")[0]


def _decode_all(whole: Whole, workers: int, wanted: int, check: Check, path: Path, sizes_path: Path) -> np.ndarray:
    source = whole.source
    make_room(wanted, f"an array of the decoded pixels of {source.name}")
    sizes: list[np.ndarray] = []

    def write(file: BinaryIO) -> None:
        at_once = max(1, min(_MOST_AT_ONCE, _BYTES_AT_ONCE * len(source) // max(1, wanted)))
        batches = in_order(whole, np.arange(len(source)), at_once, workers)
        with contextlib.closing(batches):
            for batch in batches:
                sizes.append(batch["label"].numpy())
                check(sizes[-1], file.tell() + batch["images"].nbytes)
                file.write(batch["images"].numpy().data)

    write_whole(path, write)
    joined = np.concatenate(sizes)
    write_whole(sizes_path, lambda file: np.save(file, joined, allow_pickle=False))
    return joined


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
