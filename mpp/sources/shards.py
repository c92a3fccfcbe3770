"""Tar shards in WebDataset naming, read at random: an index of offsets is made once and kept.

    shards:/data/train-{000..146}.tar  ->  index every shard (or load its index)  ->  os.pread at offsets

A sample's key is its members' path up to the first dot of the base name; an image member gives the picture, `.cls`
(ASCII digits) or `.json` ({"label": 3}) the label. Nothing is ever extracted: a .tar.gz is unpacked to a .tar as a
whole, in the cache, because one cannot read in the middle of gzip.
"""

import contextlib
import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpp.files import cache_folder, write_whole
from mpp.sources.base import SourceError, check_index, numbered_classes, summary
from mpp.sources.names import IMAGE_EXTENSIONS

_FORMAT = 1  # of the cached index; a new number makes the old ones be rebuilt
_OPEN_FILES = 64
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class _Index:
    """Where the images of one shard lie."""

    offsets: np.ndarray  # int64 (n,)
    sizes: np.ndarray  # int64 (n,)
    labels: np.ndarray  # int64 (n,), -1 where there is none
    ignored: int


class ShardSource:
    """Images inside uncompressed tar files.

    Args:
        name: the string it was opened with.
        paths: the .tar files.
        indices: one a file.
        classes: class names; None: unlabelled.
        note: what `describe` adds.
    """

    def __init__(
        self, name: str, paths: list[Path], indices: list[_Index], classes: tuple[str, ...] | None, note: str
    ) -> None:
        self.name, self.paths, self.classes, self.note = name, paths, classes, note
        self._starts = np.cumsum([0, *(len(index.offsets) for index in indices)])
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self._labels = None if classes is None else np.concatenate([index.labels for index in indices])
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has none of this process's descriptors.
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._offsets)

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, check_index(index, len(self)), side="right")) - 1

    def where(self, index: int) -> str:
        """The shard, and where the image starts in it."""
        return f"{self.paths[self._shard_of(index)]}, byte {self._offsets[index]}"

    def read(self, index: int) -> tuple[bytes, int | None]:
        """The member's bytes and its label. Positioned reads, so that forked workers may share a descriptor."""
        shard = self._shard_of(index)
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            while len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        size = int(self._sizes[index])
        data = os.pread(self._open[shard], size, int(self._offsets[index]))
        if len(data) != size:
            raise OSError(
                f"{self.where(index)}: the shard ends {size - len(data)} bytes early; it changed since indexing"
            )
        return data, None if self._labels is None else int(self._labels[index])

    def labels(self) -> np.ndarray | None:
        """int64 (len,), or None."""
        return self._labels

    def describe(self) -> str:
        """One line: count, classes, what was ignored."""
        return summary(len(self), self.classes, self.note)


def open_shards(spec: str, pattern: str) -> ShardSource:
    """Local .tar or .tar.gz shards by glob and brace ranges, in the order of their names.

    Class names come from a classes.txt beside the shards, one a line, or are numbers.

    Raises:
        SourceError: no such shard, not a tar file, no image inside, or labels that do not fit.
    """
    shards = _match(spec, pattern)
    opened = [_open_shard(spec, shard) for shard in shards]
    paths, indices = [path for path, _ in opened], [index for _, index in opened]
    labels = np.concatenate([index.labels for index in indices])
    if not len(labels):
        raise SourceError(
            f"{spec}: no image in {len(shards)} shard(s); expected members such as 000017.jpg, 000017.cls"
        )
    ignored = sum(index.ignored for index in indices)
    notes = [f"ignored {ignored:,} other members"] if ignored else []
    classes = None
    if (labels >= 0).all():
        classes = _class_names(spec, shards[0].parent / "classes.txt", labels)
    elif (labels >= 0).any():
        notes.append(f"labels left aside, for {(labels < 0).sum():,} images have none")
    return ShardSource(spec, paths, indices, classes, "; ".join(notes))


def _class_names(spec: str, path: Path, labels: np.ndarray) -> tuple[str, ...]:
    if not path.is_file():
        return numbered_classes(labels)
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if labels.max() >= len(names):
        raise SourceError(
            f"{spec}: {path} names {len(names)} classes, but there is a label {labels.max()}; complete it"
        )
    return names


def _match(spec: str, pattern: str) -> list[Path]:
    """Shards that a pattern stands for, sorted. Every alternative in braces must exist."""
    found: set[str] = set()
    for alternative in expand_braces(os.path.expanduser(pattern)):  # noqa: PTH111 - a pattern is not yet a path
        matches = [alternative] if Path(alternative).is_file() else glob.glob(alternative, recursive=True)  # noqa: PTH207
        files = [match for match in matches if Path(match).is_file()]
        if not files:
            what = "is a folder; write e.g. shards:DIR/*.tar" if Path(alternative).is_dir() else "matches no file"
            raise SourceError(f"{spec}: {alternative} {what}; check the path")
        found.update(files)
    return [Path(match) for match in sorted(found)]


def expand_braces(pattern: str) -> Iterator[str]:
    """`a-{00..02}.tar` to a-00.tar, a-01.tar, a-02.tar; `{x,y}` to x, y. Numbers keep the width of the first."""
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if bounds:
        width = len(bounds[1])
        choices = [f"{number:0{width}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        choices = found[1].split(",")
    for choice in choices:
        yield from expand_braces(pattern[: found.start()] + choice + pattern[found.end() :])


def _open_shard(spec: str, shard: Path) -> tuple[Path, _Index]:
    """The uncompressed file and its index, both from the cache where they are there."""
    info = shard.stat()
    key = hashlib.sha256(f"{shard.resolve()}\0{info.st_size}\0{info.st_mtime_ns}\0{_FORMAT}".encode()).hexdigest()[:32]
    kept, tar = cache_folder() / f"{key}.npz", shard
    packed = _is_gzip(spec, shard)
    if packed:
        tar = cache_folder() / f"{key}.tar"
    index = _load_index(kept, tar.stat().st_size if tar.is_file() else -1)
    if index is None:
        if packed:  # also where there is a .tar: only its index says that it is whole
            _unpack(spec, shard, tar)
        try:
            index = _build_index(tar)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise SourceError(f"{spec}: {shard} is not a complete tar file ({error}); make it again") from error
        except SourceError as error:
            raise SourceError(f"{spec}: {shard}: {error}") from error
        _save_index(kept, index, tar.stat().st_size)
    return tar, index


def _is_gzip(spec: str, shard: Path) -> bool:
    try:
        with shard.open("rb") as file:
            return file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise SourceError(f"{spec}: cannot read {shard} ({error.strerror}); check its permissions") from error


def _unpack(spec: str, shard: Path, tar: Path) -> None:
    try:
        with gzip.open(shard) as packed:
            write_whole(tar, lambda file: shutil.copyfileobj(packed, file, 2**20))
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise SourceError(f"{spec}: {shard} is not a complete gzip file ({error}); make it again") from error
    except OSError as error:
        reason = f"cannot unpack {shard.name} into {tar.parent} ({error.strerror})"
        raise SourceError(f"{spec}: {reason}; set MPP_CACHE to a folder with room, or gunzip the shards") from error


def _load_index(path: Path, tar_size: int) -> _Index | None:
    """The kept index; None where it is missing, damaged or of another file."""
    try:
        # numpy leaves a file of its own open when the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            index = _Index(held["offsets"], held["sizes"], held["labels"], int(held["ignored"]))
            whole = int(held["tar_size"]) == tar_size
    except Exception:  # whatever is wrong with it, it can be made again
        return None
    columns = (index.offsets, index.sizes, index.labels)
    fitting = all(column.dtype == np.int64 and column.shape == index.offsets.shape for column in columns)
    return index if whole and fitting and index.offsets.ndim == 1 else None


def _save_index(path: Path, index: _Index, tar_size: int) -> None:
    columns = {"offsets": index.offsets, "sizes": index.sizes, "labels": index.labels}
    columns |= {"ignored": np.array(index.ignored), "tar_size": np.array(tar_size)}
    # An index that cannot be kept costs time at the next start, nothing else.
    with contextlib.suppress(OSError):
        write_whole(path, lambda file: np.savez(file, allow_pickle=False, **columns))


def _build_index(tar_path: Path) -> _Index:
    """Reads every header of a tar file, and the few bytes of the labels."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    ignored = 0
    with tarfile.open(tar_path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else every header of a large shard stays in memory
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key, extension = f"{folder}/{stem}", extension.lower()
            is_image = extension.rpartition(".")[2] in IMAGE_EXTENSIONS
            if member.isdir():
                continue
            if not member.isreg() or member.issparse() or not stem or (is_image and key in images):
                ignored += 1
            elif is_image:
                images[key] = (member.offset_data, member.size)
            elif extension in ("cls", "json"):
                file = tar.extractfile(member)
                label = _label(member.name, extension, file.read() if file else b"")
                if label is not None and (extension == "cls" or key not in labels):
                    labels[key] = label
            else:
                ignored += 1
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    order = np.argsort(places[:, 0])
    found = np.array([labels.get(key, -1) for key in images], dtype=np.int64)
    return _Index(places[order, 0], places[order, 1], found[order], ignored)


def _label(name: str, extension: str, data: bytes) -> int | None:
    """The label in a .cls or .json member; None for a .json that has none."""
    if extension == "cls":
        text = data.strip()
        if not re.fullmatch(rb"[0-9]{1,18}", text):
            raise SourceError(f"{name} holds {text[:40]!r}; a .cls is a label in ASCII digits, such as 7")
        return int(text)
    try:
        held = json.loads(data)
    except ValueError as error:
        raise SourceError(f"{name} is not JSON ({error}); write it again") from error
    label = held.get("label") if isinstance(held, dict) else None
    if label is None:
        return None
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise SourceError(f"{name} has the label {label!r}; expected a whole number from 0")
    return label
