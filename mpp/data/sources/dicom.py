"""DICOM files of several frames: each frame an image.

files -> frames of each, read from its header once and kept in the cache -> one image a frame, as a file of one frame
"""

import contextlib
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mpp.data.sources.base import UNKNOWN, Placement, Sample, Source, SourceError, Subset, count
from mpp.data.sources.files import FileSource, file_state
from mpp.data.sources.names import lacking
from mpp.system.cache import use
from mpp.system.files import cache_folder, write_whole
from mpp.system.process import without_warnings

_THREADS = 16  # headers that are asked for at once, since a network disk answers late
_FORMAT = b"mpp frames 1"


def may_be_dicom(path: str) -> bool:
    """Whether a file is DICOM by its name: .dcm, .dicom, no ending, or a number for one, as of instance UIDs."""
    ending = os.path.splitext(path)[1].lower()  # noqa: PTH122 - a million of them
    return ending in ("", ".dcm", ".dicom") or ending[1:].isdigit()


def is_dicom_file(path: str) -> bool:
    """Whether a file begins as DICOM does, whatever its name."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - opening a FIFO waits for a writer
            return False
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def with_frames(source: FileSource) -> Source:
    """The same images, those of DICOM files with several frames one a frame; without files that hold no pixels.

    Raises SourceError: no file holds any.
    """
    if lacking("dicom"):
        return source
    asked = [index for index in range(len(source)) if may_be_dicom(source.record(index))]
    if not asked:
        return source
    frames = np.ones(len(source), dtype=np.int64)
    frames[asked] = _frames([source.location(index) for index in asked])
    if (frames == 1).all():
        return source
    if not frames.any():
        raise SourceError(f"{source.name}: no image, {count(len(source), 'DICOM file')} without pixels")
    return Frames(source, frames)


class Frames(Subset):
    """Frames of a source's files: `frames` int64 (len(source),), how many each file has."""

    def __init__(self, source: FileSource, frames: np.ndarray) -> None:
        super().__init__(source, np.repeat(np.arange(len(source)), frames))
        starts = np.cumsum(frames) - frames
        self.note, self._frames = source.note, frames
        self._frame = np.arange(len(self)) - starts[self.indices]
        if several := int((frames > 1).sum()):
            self.note += f"{'; ' * bool(self.note)}{count(several, 'DICOM file')} of several frames"
        if empty := int((frames == 0).sum()):
            self.note += f"{'; ' * bool(self.note)}{count(empty, 'DICOM file')} without pixels passed over"

    def describe(self) -> str:
        return Source.describe(self)

    def _of(self, index: int) -> tuple[str, int | None]:
        """Path, and number of the frame in a file of several."""
        inner = self._inner(index)
        several = self._frames[inner] > 1
        return self.source.location(inner), int(self._frame[index]) if several else None

    def image(self, index: int) -> bytes | np.ndarray:
        path, frame = self._of(index)
        return super().image(index) if frame is None else frame_of(path, frame)

    def location(self, index: int) -> str:
        path, frame = self._of(index)
        return path if frame is None else f"{path}, frame {frame}"

    def size(self, index: int) -> int:
        return super().size(index) // max(1, int(self._frames[self._inner(index)]))

    def read_many(self, indices: Sequence[int], most: float = math.inf) -> Iterator[Sample | OSError]:
        return Source.read_many(self, indices, most)

    def placement(self, indices: np.ndarray) -> Placement:
        files = super().placement(indices)
        pairs = zip(files.place.tolist(), self._frame[indices].tolist(), strict=True)
        places = [hash((place, frame)) if place != UNKNOWN else UNKNOWN for place, frame in pairs]
        return files._replace(place=np.array(places, dtype=np.int64))


def frame_of(path: str, number: int) -> bytes:
    """A frame of a DICOM file, as a file of one frame; only its header and that frame are read, unless it is deflated.

    Raises OSError: it cannot be read, or has no such frame.
    """
    from pydicom import dcmread
    from pydicom.encaps import encapsulate, get_frame
    from pydicom.pixels.utils import get_expected_length

    try:
        with without_warnings(), open(path, "rb") as file:
            image: Any = dcmread(file, stop_before_pixels=True)
            syntax, frames = image.file_meta.TransferSyntaxUID, int(image.NumberOfFrames)
            image.NumberOfFrames = 1
            if groups := image.get("PerFrameFunctionalGroupsSequence"):
                image.PerFrameFunctionalGroupsSequence = [groups[number]]
            size = get_expected_length(image)
            if syntax.is_deflated:
                data = dcmread(path).PixelData[number * size :][:size]
            elif syntax.is_encapsulated:
                file.seek(12, os.SEEK_CUR)  # tag, type and length of the pixels
                table = (image.ExtendedOffsetTable, image.ExtendedOffsetTableLengths) if _has_table(image) else None
                data = encapsulate([get_frame(file, number, extended_offsets=table, number_of_frames=frames)])
            else:
                file.seek((8 if syntax.is_implicit_VR else 12) + number * size, os.SEEK_CUR)
                data = file.read(size)
            if len(data) < (1 if syntax.is_encapsulated else size):
                raise OSError(f"{path}, frame {number}: the file ends before it")
            for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
                if name in image:
                    del image[name]
            image.PixelData = data + b"\0" * (len(data) % 2)
            image["PixelData"].VR = "OB" if syntax.is_encapsulated or image.BitsAllocated <= 8 else "OW"
            image["PixelData"].is_undefined_length = syntax.is_encapsulated
            out = io.BytesIO()
            image.save_as(out)
            return out.getvalue()
    except OSError:
        raise
    except Exception as error:  # damaged headers raise anything
        raise OSError(f"{path}, frame {number}: {str(error).partition(chr(10))[0]}") from error


def _has_table(image: Any) -> bool:
    return "ExtendedOffsetTable" in image and "ExtendedOffsetTableLengths" in image


def _frames(paths: list[str]) -> np.ndarray:
    """int64 (n,): frames by file, 0 for one without pixels, and 1 where reading it will say what is wrong."""
    with ThreadPoolExecutor(_THREADS) as pool:
        states = pool.map(lambda path: file_state(path, times=True), paths, chunksize=1000)
        key = hashlib.sha256(json.dumps([*zip(paths, states, strict=True)]).encode()).hexdigest()[:32]
        kept, size = cache_folder() / f"{key}.index", len(_FORMAT) + 8 * len(paths)
        try:
            use(key)
            if len(data := kept.read_bytes()) == size and data.startswith(_FORMAT):
                return np.frombuffer(data, "<i8", offset=len(_FORMAT)).astype(np.int64)
        except OSError:
            pass
        found = np.array([*pool.map(_frames_of, paths)], dtype=np.int64)
    with contextlib.suppress(OSError):  # it is only read again
        write_whole(kept, _FORMAT + found.astype("<i8").tobytes())
    return found


def _frames_of(path: str) -> int:
    import pydicom

    try:
        with without_warnings():
            header: Any = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Rows", "NumberOfFrames"])
    except Exception:  # damaged, missing or something else: reading the image says so
        return 1
    return max(1, int(header.get("NumberOfFrames") or 1)) if "Rows" in header else 0
