"""A task of packing: some thousand images in a row become one shard, or several where they take too many bytes.

indices -> read -> packed image or what is wrong with it -> shards of the task -> its record
"""

import contextlib
import hashlib
import os
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpp.curation.pack_image import Packed, PackOptions, pack_image
from mpp.curation.pool import count_images
from mpp.data.reader import Bad, attempt_each
from mpp.data.sources.base import Source, SourceError
from mpp.data.sources.tar_index import BLOCK, load_index, sidecar_name, write_sidecar
from mpp.data.statistics import ChannelStatistics, histogram
from mpp.errors import RunError, Unreachable

TEMPORARY = ".unfinished"
"""The end of a shard's name while it is written."""
_AT_ONCE = 16  # images read at the same time, where they are remote
_END = bytes(2 * BLOCK)


@dataclass(frozen=True)
class Plan:
    """Which image goes where.

    The bytes of an image are known only once it is packed. So the plan fixes the number of images in a task; one that
    turns out too large makes several shards, and the shards are numbered once all tasks are done.
    """

    order: np.ndarray
    """int64 (n,), the images in the order of the shards; an image's key is its position here."""
    task_images: int
    """Images of a task, and so the most in a shard."""
    shard_bytes: int
    """Most bytes of a shard; an image that is larger gets one alone."""
    options: PackOptions

    @property
    def tasks(self) -> int:
        """How many there are."""
        return -(-len(self.order) // self.task_images)

    def images(self, task: int) -> int:
        """How many images a task reads."""
        return min(self.task_images, len(self.order) - task * self.task_images)


class Shard(NamedTuple):
    """A finished shard."""

    name: str
    images: int
    bytes: int
    sha256: str


class Figures:
    """Classes, sizes and colour statistics of any number of images; merged in order, they are the same to the bit."""

    def __init__(self, classes: int, channels: int) -> None:
        self.class_counts = np.zeros(classes, dtype=np.int64)
        self.colours = ChannelStatistics(channels)
        self.heights: Counter[int] = Counter()
        self.widths: Counter[int] = Counter()

    def add(self, pixels: np.ndarray, label: int | None) -> None:
        """Counts an image: uint8 (H, W, channels) and its label, None where it has none."""
        self.heights[pixels.shape[0]] += 1
        self.widths[pixels.shape[1]] += 1
        if label is not None:
            self.class_counts[label] += 1
        self.colours.add(histogram(pixels))

    def merge(self, other: "Figures") -> None:
        """Adds the images that another has counted."""
        self.class_counts += other.class_counts
        self.colours.merge(other.colours)
        self.heights += other.heights
        self.widths += other.widths

    def sizes(self) -> dict[str, dict[str, float]]:
        """Smallest, median and largest height and width in pixels."""
        found: dict[str, dict[str, float]] = {}
        for name, counts in (("height", self.heights), ("width", self.widths)):
            sides = np.array(sorted(counts))
            up_to = np.cumsum([counts[side] for side in sides.tolist()])
            middle = sides[np.searchsorted(up_to, [(up_to[-1] - 1) // 2, up_to[-1] // 2], side="right")]
            found[name] = {"min": int(sides[0]), "median": float(middle.mean()), "max": int(sides[-1])}
        return found


@dataclass
class Record:
    """The result of a task."""

    shards: list[Shard]
    bad: list[Bad]
    figures: Figures

    def to_dict(self) -> dict[str, Any]:
        """In plain lists and numbers, for JSON."""
        figures = {
            "class_counts": self.figures.class_counts.tolist(),
            "colours": self.figures.colours.to_dict(),
            "heights": sorted(self.figures.heights.items()),
            "widths": sorted(self.figures.widths.items()),
        }
        return {"parts": self.shards, "bad": self.bad, "figures": figures}

    @staticmethod
    def from_dict(record: dict[str, Any]) -> "Record":
        """Back from `to_dict`."""
        values = record["figures"]
        figures = Figures(len(values["class_counts"]), 0)
        figures.class_counts += np.array(values["class_counts"], dtype=np.int64)
        figures.colours = ChannelStatistics.from_dict(values["colours"])
        figures.heights.update(dict(values["heights"]))
        figures.widths.update(dict(values["widths"]))
        return Record([Shard(*shard) for shard in record["parts"]], [Bad(*bad) for bad in record["bad"]], figures)


def pack_task(source: Source, plan: Plan, folder: Path, task: int) -> Record:
    """Packs the images of a task (from 0) into shards in `folder`, named by task and number.

    Raises RunError where a shard read back differs or the source does not answer, OSError where one cannot be written.
    """
    record = Record([], [], Figures(len(source.classes or ()), plan.options.reading.channels))
    first = task * plan.task_images
    last = first + plan.images(task)
    writer: TarWriter | None = None

    def pack(_: int, data: bytes | np.ndarray, label: int) -> tuple[Packed, int | None]:
        return pack_image(data, plan.options), None if label < 0 else int(label)

    try:
        for start in range(first, last, _AT_ONCE):
            indices = plan.order[start : min(start + _AT_ONCE, last)].tolist()
            images = attempt_each(source, indices, plan.options.reading.max_bytes, pack)
            for key, (_, outcome) in enumerate(images, start):
                if isinstance(outcome, Bad):
                    record.bad.append(outcome)
                    continue
                packed, label = outcome
                if writer and writer.size_with(packed.data, label) > plan.shard_bytes:
                    record.shards.append(writer.finish())
                    writer = None
                writer = writer or TarWriter(folder / f"{task:06d}-{len(record.shards):03d}.tar")
                writer.add(f"{key:09d}", packed.extension, packed.data, label)
                record.figures.add(packed.pixels, label)
            count_images(len(indices))
        if writer:
            record.shards.append(writer.finish())
    except BaseException as error:
        if writer:
            writer.abandon()
        if isinstance(error, Unreachable):
            raise RunError(f"{error}; once it answers, run the same command again") from error
        raise
    return record


class TarWriter:
    """Writes a tar of images with their labels, the same bytes for the same members: no times, no owners."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f"{path.name}-{os.getpid()}{TEMPORARY}")
        self._file = self._temporary.open("wb")
        self._digest, self._size = hashlib.sha256(), 0
        self._sizes: list[int] = []
        self._labels: list[int] = []

    def size_with(self, data: bytes, label: int | None) -> int:
        """Bytes of the whole file, if it ended after this image."""
        sizes = [len(data)] if label is None else [len(data), len(str(label))]
        return self._size + sum(BLOCK + size + -size % BLOCK for size in sizes) + len(_END)

    def add(self, key: str, extension: str, data: bytes, label: int | None) -> None:
        """Adds an image, and its label where it has one. Raises OSError."""
        self._member(f"{key}.{extension}", data)
        if label is not None:
            self._member(f"{key}.cls", str(label).encode())
        self._sizes.append(len(data))
        self._labels.append(-1 if label is None else label)

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def finish(self) -> Shard:
        """Ends the file, reads it back, gives it its name and writes its index beside it. Raises RunError, OSError."""
        self._write(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that it is read from the disk, not from memory
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()
        if sha256(self._temporary) != self._digest.hexdigest():
            raise self._differs("other bytes than were written")
        os.replace(self._temporary, self._path)
        try:
            write_sidecar(self._path)
        except SourceError as error:
            raise self._differs(str(error)) from error
        index = load_index(Path(sidecar_name(str(self._path))), self._size)
        if index is None or index.sizes.tolist() != self._sizes or index.labels.tolist() != self._labels:
            raise self._differs("other members than were written")
        return Shard(self._path.name, len(self._sizes), self._size, self._digest.hexdigest())

    def _differs(self, what: str) -> RunError:
        return RunError(f"{self._path} read back gives {what}; check the disk, and run the same command again")

    def abandon(self) -> None:
        """Removes the unfinished file."""
        with contextlib.suppress(OSError):  # a full disk fails again in closing
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
