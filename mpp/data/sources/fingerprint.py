"""What a source holds, as one short string: the same string, the same images and labels."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpp.data.sources.array import ArraySource
from mpp.data.sources.base import Source, Subset, count, summary
from mpp.data.sources.files import FileSource
from mpp.data.sources.hub import HubSource
from mpp.data.sources.local_shards import ShardSource
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.remote_shards import RemoteShardSource

if TYPE_CHECKING:
    from hashlib import _Hash

_FORMAT = b"mpp fingerprint 1"
_SEVERAL = 1000
_SHOWN = 3  # classes that are named


@dataclass(frozen=True)
class Contents:
    """What a run trains on, as far as can be seen in no time: the names of all its images, and the sizes of some.

    It is the same for a copy elsewhere, and on every machine that has the same images in the same order.
    """

    images: int
    digest: str
    """64 hexadecimal digits, of the names in their order and the sizes."""
    classes: tuple[str, ...] = ()
    """In order, of a run that learns them."""
    labels: str = ""
    """64 hexadecimal digits, likewise."""

    @classmethod
    def of(cls, source: Source, labels: np.ndarray | None = None, classes: Sequence[str] = ()) -> "Contents":
        """Of all images of a source; with `labels` int64 (len,) and `classes` where they are what is learnt."""
        digest = quick_fingerprint(source, labelled=False)
        if labels is None:
            return cls(len(source), digest)
        told = hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes())
        return cls(len(source), digest, tuple(classes), told.hexdigest())

    @classmethod
    def from_dict(cls, held: Mapping[str, Any]) -> "Contents":
        """Back from `to_dict`."""
        return cls(**{**held, "classes": tuple(held["classes"])})

    def to_dict(self) -> dict[str, Any]:
        """In plain values, as a checkpoint holds them."""
        return {**vars(self), "classes": list(self.classes)}

    def changes(self, before: "Contents") -> list[str]:
        """What differs from what there was before, in words; nothing where all is the same."""
        if self.images != before.images:
            told = [f"{count(before.images, 'image')} then, {self.images:,} now"]
        else:
            same = f"{count(self.images, 'image')} then and now, but others, or in another order"
            told = [same] if self.digest != before.digest else []
        if self.classes != before.classes:
            told.append(_class_changes(before.classes, self.classes))
        elif self.labels != before.labels and not told:
            told.append("other labels")
        return told


def _class_changes(before: Sequence[str], now: Sequence[str]) -> str:
    new, gone = ([name for name in one if name not in other] for one, other in ((now, {*before}), (before, {*now})))
    if not new and not gone:
        place = next(number for number, name in enumerate(before) if now[number] != name)
        return f"the classes in another order: class {place} was {before[place]} and is {now[place]}"
    parts = [(what, names) for what, names in (("new", new), ("gone", gone)) if names]
    listed = [f"{what}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}" for what, names in parts]
    return f"{count(len(before), 'class')} then, {len(now):,} now ({'; '.join(listed)})"


def quick_fingerprint(source: Source, *, labelled: bool = True) -> str:
    """As `fingerprint` without times, in a moment even for millions of files: for what is asked at every start.

    All names, labels and classes count, and their order; of the sizes of single files, and of what lies in memory,
    those of 1,000 images, evenly spread. Labels and classes do not where `labelled` is false.
    """
    return fingerprint(source, times=False, most=_SEVERAL, labelled=labelled)


def listing(source: Source) -> str:
    """How many images a source has, of how many classes, and which (as `quick_fingerprint`), in some words."""
    return f"{summary(len(source), source.classes)} with fingerprint {quick_fingerprint(source)[:12]}"


def fingerprint(source: Source, *, times: bool = True, most: int | None = None, labelled: bool = True) -> str:
    """64 hexadecimal digits that change with any image, label or class name of a source.

    Files, shards and arrays on disk are not read: their paths, sizes and times of modification stand for what is in
    them, so that moving them changes the fingerprint too. A Hugging Face dataset has a fingerprint of its own, and a
    mixture is its parts and weights. Images in memory, and sources of other kinds, are hashed as `read` gives them.

    Without `times` it tells less, and survives a copy of the data: where files lie and when they were written no
    longer counts, only their names within the source and their sizes. `most` is how many single images are looked at,
    by default all; `labelled`, whether labels and class names count.
    """
    original = getattr(source, "original", None)
    if original is not None:
        return fingerprint(original, times=times, most=most, labelled=labelled)
    digest = hashlib.sha256(_FORMAT)
    labels, classes = (source.labels(), source.classes) if labelled else (None, None)
    _put(digest, type(source).__name__, str(len(source)), json.dumps(classes))
    _put(digest, b"" if labels is None else np.ascontiguousarray(labels, dtype="<i8").tobytes())
    looked_at = _spread(np.arange(len(source)), most)
    # The type itself: a class derived from one of these may read something else.
    if type(source) is FileSource:
        root = str(source.root)
        _put(digest, str(source.root.resolve()) if times else "")
        if most is not None:
            _put(digest, *source.names())
        for index in looked_at:
            path = source.where(index)
            name = path.removeprefix(root).removeprefix(os.sep) if most is None else ""
            _put(digest, name, _state(path, times))
    elif type(source) in (ShardSource, RemoteShardSource):
        assert isinstance(source, ShardSource)  # pyright does not conclude it
        _put(digest, *source.state(times))
        if most is not None:  # tars come in few sizes, images in many
            _put(digest, source.sizes().astype("<i8").tobytes())
    elif type(source) is ArraySource:
        _put(digest, str(source.path.resolve()) if times else "", _state(source.path, times))
    elif type(source) is HubSource:
        _put(digest, source.arrow_fingerprint if times else source.sizes().astype("<i8").tobytes())
        for index in _spread(np.flatnonzero(source.sizes() < 0), most):
            path = source.file_of(index) or ""
            state = _state(path, times) if source.inside(path) else "outside"
            _put(digest, path if times else os.path.basename(path), state)  # noqa: PTH119
    elif type(source) is MixtureSource:
        parts = (fingerprint(part, times=times, most=most, labelled=labelled) for part in source.parts)
        _put(digest, json.dumps(source.weights), *parts)
    elif type(source) is Subset:
        indices = np.ascontiguousarray(source.indices, dtype="<i8").tobytes()
        _put(digest, fingerprint(source.source, times=times, most=most, labelled=labelled), indices)
    else:
        for index in looked_at:
            _put_image(digest, source, index, labelled)
    return digest.hexdigest()


def _spread(indices: np.ndarray, most: int | None) -> list[int]:
    """At most so many of these indices, evenly spread; None: all."""
    if most is not None and len(indices) > most:
        indices = indices[np.linspace(0, len(indices) - 1, most).astype(np.int64)]
    return indices.tolist()


def _state(path: str | os.PathLike[str], times: bool) -> str:
    """Size of a file, and its time of modification."""
    try:
        info = os.stat(path)  # noqa: PTH116 - a Path for each of a million files takes longer than the question
    except OSError as error:  # gone since the source was opened: images that cannot be read are met later
        return f"error {error.errno}"
    return f"{info.st_size} {info.st_mtime_ns}" if times else str(info.st_size)


def _put_image(digest: "_Hash", source: Source, index: int, labelled: bool) -> None:
    try:
        image, label = source.read(index)
    except OSError:
        _put(digest, "unreadable")
        return
    label = label if labelled else None
    if isinstance(image, np.ndarray):
        _put(digest, f"{image.dtype.str} {image.shape}", np.ascontiguousarray(image).tobytes(), str(label))
    else:
        _put(digest, "bytes", image, str(label))


def _put(digest: "_Hash", *parts: str | bytes) -> None:
    """Each with its length before it, so that no two sequences of parts are the same bytes."""
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
