"""What a source holds, as one short string: the same string, the same images and labels."""

import hashlib
import json
import os
from typing import TYPE_CHECKING

import numpy as np

from mpp.sources.array import ArraySource
from mpp.sources.base import Source, Subset, summary
from mpp.sources.files import FileSource
from mpp.sources.hub import HubSource
from mpp.sources.local_shards import ShardSource
from mpp.sources.mixture import MixtureSource
from mpp.sources.remote_shards import RemoteShardSource

if TYPE_CHECKING:
    from hashlib import _Hash

_FORMAT = b"mpp fingerprint 1"
_SEVERAL = 1000


def quick_fingerprint(source: Source) -> str:
    """As `fingerprint` without times, in a moment even for millions of files: for what is asked at every start.

    All names, labels and classes count, and their order; of the sizes of single files, and of what lies in memory,
    those of 1,000 images, evenly spread.
    """
    return fingerprint(source, times=False, most=_SEVERAL)


def listing(source: Source) -> str:
    """How many images a source has, of how many classes, and which (as `quick_fingerprint`), in some words."""
    return f"{summary(len(source), source.classes)} with fingerprint {quick_fingerprint(source)[:12]}"


def fingerprint(source: Source, *, times: bool = True, most: int | None = None) -> str:
    """64 hexadecimal digits that change with any image, label or class name of a source.

    Files, shards and arrays on disk are not read: their paths, sizes and times of modification stand for what is in
    them, so that moving them changes the fingerprint too. A Hugging Face dataset has a fingerprint of its own, and a
    mixture is its parts and weights. Images in memory, and sources of other kinds, are hashed as `read` gives them.

    Without `times` it tells less, and survives a copy of the data: where files lie and when they were written no
    longer counts, only their names within the source and their sizes. `most` is how many single images are looked at,
    by default all.
    """
    original = getattr(source, "original", None)
    if original is not None:
        return fingerprint(original, times=times, most=most)
    digest = hashlib.sha256(_FORMAT)
    labels = source.labels()
    _put(digest, type(source).__name__, str(len(source)), json.dumps(source.classes))
    _put(digest, b"" if labels is None else np.ascontiguousarray(labels, dtype="<i8").tobytes())
    looked_at = _spread(np.arange(len(source)), most)
    # The type itself: a class derived from one of these may read something else.
    if type(source) is FileSource:
        root = str(source.root)
        _put(digest, str(source.root.resolve()) if times else "")
        if most is not None:
            _put(digest, *source.names())
        for index in looked_at:
            path = source.path(index)
            _put(digest, path.removeprefix(root).removeprefix(os.sep), _state(path, times))
    elif type(source) in (ShardSource, RemoteShardSource):
        assert isinstance(source, ShardSource)  # pyright does not conclude it
        _put(digest, *source.state(times))
    elif type(source) is ArraySource:
        _put(digest, str(source.path.resolve()) if times else "", _state(source.path, times))
    elif type(source) is HubSource:
        _put(digest, source.arrow_fingerprint if times else source.sizes().astype("<i8").tobytes())
        for index in _spread(np.flatnonzero(source.sizes() < 0), most):
            path = source.path(index) or ""
            state = _state(path, times) if source.inside(path) else "outside"
            _put(digest, path if times else os.path.basename(path), state)  # noqa: PTH119
    elif type(source) is MixtureSource:
        _put(digest, json.dumps(source.weights), *(fingerprint(part, times=times, most=most) for part in source.parts))
    elif type(source) is Subset:
        indices = np.ascontiguousarray(source.indices, dtype="<i8").tobytes()
        _put(digest, fingerprint(source.source, times=times, most=most), indices)
    else:
        for index in looked_at:
            _put_image(digest, source, index)
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


def _put_image(digest: "_Hash", source: Source, index: int) -> None:
    try:
        image, label = source.read(index)
    except OSError:
        _put(digest, "unreadable")
        return
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
