"""A task: some thousand images in a row, packed into one shard, or into several where they take too many bytes.

indices -> read -> packed image or what is wrong with it -> shards of the task -> its record
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpp.curation.packing.figures import Figures
from mpp.curation.packing.images import Form, Packed, pack_image
from mpp.curation.packing.tar_writer import Part, TarWriter, member_bytes
from mpp.data.decoding import BadImage
from mpp.data.decoding.bad_image import one_line
from mpp.data.reader import Bad, kind_of
from mpp.data.sources.base import Source
from mpp.errors import RunError, Unreachable

_AT_ONCE = 16  # images read at the same time, where they lie far away


@dataclass(frozen=True)
class Plan:
    """Which image goes where.

    How many bytes an image takes is known only once it is packed. So what is planned is the number of images in a
    task; a task that turns out too large makes several shards, and the shards are numbered once all tasks are done.

    Args:
        order: int64 (n,), the images in the order of the shards; an image's key is its place here.
        task_images: images of a task, and so the most in a shard.
        shard_bytes: most bytes of a shard; an image that is larger gets one alone.
        form: of the packed images.
    """

    order: np.ndarray
    task_images: int
    shard_bytes: int
    form: Form

    @property
    def tasks(self) -> int:
        """How many there are."""
        return -(-len(self.order) // self.task_images)

    def images(self, task: int) -> int:
        """How many images a task reads."""
        return min(self.task_images, len(self.order) - task * self.task_images)


@dataclass
class Record:
    """What came of a task."""

    parts: list[Part]
    bad: list[Bad]
    figures: Figures

    def to_dict(self) -> dict[str, Any]:
        """In plain lists and numbers, for JSON."""
        return {"parts": self.parts, "bad": self.bad, "figures": self.figures.to_dict()}

    @staticmethod
    def from_dict(held: dict[str, Any]) -> "Record":
        """Back from `to_dict`."""
        parts, bad = [Part(*part) for part in held["parts"]], [Bad(*bad) for bad in held["bad"]]
        return Record(parts, bad, Figures.from_dict(held["figures"]))


def pack_task(source: Source, plan: Plan, task: int, folder: Path, count: Callable[[int], None]) -> Record:
    """Packs the images of a task into shards in `folder`, named by task and part.

    Args:
        source: what to read.
        plan: which images.
        task: from 0.
        folder: there already.
        count: called with the number of images read since the last call.

    Raises:
        RunError: a shard read back differs from what was written.
        OSError: a shard cannot be written.
    """
    shards = _Shards(folder, f"{task:06d}", plan.shard_bytes)
    record = Record([], [], Figures(len(source.classes or ()), plan.form.reading.channels))
    first = task * plan.task_images
    last = first + plan.images(task)
    try:
        for start in range(first, last, _AT_ONCE):
            indices = plan.order[start : min(start + _AT_ONCE, last)].tolist()
            images = source.read_many(indices, plan.form.reading.max_bytes)
            for key, (index, found) in enumerate(zip(indices, images, strict=True), start):
                if isinstance(found, Unreachable):
                    raise RunError(f"{found}; once it answers, run the same command again")
                try:
                    if isinstance(found, OSError):
                        raise found
                    packed, label = pack_image(found[0], plan.form), found[1]
                except (BadImage, OSError, MemoryError) as error:
                    record.bad.append(Bad(index, kind_of(error), source.location(index), one_line(error)))
                    continue
                label = None if label is None or label < 0 else int(label)
                shards.add(f"{key:09d}", packed, label)
                record.figures.add(packed.pixels, label)
            count(len(indices))
        record.parts = shards.finish()
    except BaseException:
        shards.abandon()
        raise
    return record


class _Shards:
    """The shards of a task, one after the other."""

    def __init__(self, folder: Path, name: str, most: int) -> None:
        self._folder, self._name, self._most = folder, name, most
        self._parts: list[Part] = []
        self._writer: TarWriter | None = None

    def add(self, key: str, packed: Packed, label: int | None) -> None:
        size = member_bytes(len(packed.data)) + (0 if label is None else member_bytes(len(str(label))))
        if self._writer and self._writer.size + size > self._most:
            self.finish()
        self._writer = self._writer or TarWriter(self._folder / f"{self._name}-{len(self._parts):03d}.tar")
        self._writer.add(key, packed.extension, packed.data, label)

    def finish(self) -> list[Part]:
        if self._writer:
            self._parts.append(self._writer.finish())
            self._writer = None
        return self._parts

    def abandon(self) -> None:
        if self._writer:
            self._writer.abandon()
