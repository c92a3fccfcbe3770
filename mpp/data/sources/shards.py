"""Tar shards in WebDataset naming, by patterns of paths and URLs: found, indexed once, read at random.

shards:/data/train-{000..146}.tar s3://bucket/more-*.tar  ->  files  ->  an index each  ->  one source
read  ->  os.pread at an offset of a local shard, or ranges of remote ones, a batch at a time  ->  (cached)
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mpp.data.sources.base import (
    UNKNOWN,
    Placement,
    Sample,
    Source,
    SourceError,
    check_index,
    count,
    opening_error,
    spread,
)
from mpp.data.sources.descriptors import Descriptors
from mpp.data.sources.files import NotAFile, file_place, read_file
from mpp.data.sources.in_memory import most_numbered, numbered_classes
from mpp.data.sources.names import EXTRA_OF, Ignored, lacking, needed_extra, printable
from mpp.data.sources.patterns import is_url, local_shards, shown, split_patterns
from mpp.data.sources.range_cache import RangeCache
from mpp.data.sources.remote import TIMEOUT, RemoteFile, fetch_ranges, fetch_small, find_remote
from mpp.data.sources.shard_files import Shard, open_local, open_remote, remote_key
from mpp.data.sources.tar_index import BLOCK, UNREADABLE
from mpp.system.files import cache_folder
from mpp.system.progress import Progress

_LOOKED, _LOOKED_LOCAL, _FIRST = 8, 64, 256  # images, remote and on the disk, and bytes of each, to tell their kind
_AT_ONCE = 16  # remote shards whose index is fetched or made at the same time


class ShardSource(Source):
    """Images inside uncompressed tar files, on the local disk or behind URLs. Twelve bytes an image in memory.

    Args:
        name, classes, note: as of every source.
        shards: in the order of their images.
        keep: whether to cache what is fetched of remote shards.
        timeout: seconds for which a request may wait for more of its answer.

    Raises SourceError: `keep`, and the cache folder cannot be made.
    """

    def __init__(
        self, name: str, shards: Sequence[Shard], classes: tuple[str, ...] | None, note: str, keep: bool, timeout: float
    ) -> None:
        labels = np.concatenate([np.maximum(shard.index.labels, -1) for shard in shards])
        super().__init__(name, None if classes is None else labels, classes, note)
        self.origins = [shard.origin for shard in shards]
        self.tars = [None if shard.tar is None else str(shard.tar) for shard in shards]
        self.reads_together = None in self.tars
        self._kind = "RemoteShardSource" if self.reads_together else "ShardSource"
        self.timeout = timeout
        self._starts = np.cumsum([0, *(len(shard.index.blocks) for shard in shards)])
        self._blocks = np.concatenate([shard.index.blocks for shard in shards])
        self._sizes = np.concatenate([shard.index.sizes for shard in shards])
        self._open, self._cache = Descriptors(os.O_RDONLY), None
        if keep and self.reads_together:
            keys = [remote_key(origin) if isinstance(origin, RemoteFile) else "" for origin in self.origins]
            try:
                self._cache = RangeCache(cache_folder(), keys)
            except OSError as error:
                what = f"cannot keep anything in {cache_folder()} ({error.strerror})"
                raise SourceError(f"{name}: {what}; set MPP_CACHE to a folder with room") from error

    def __len__(self) -> int:
        return len(self._blocks)

    def _extent(self, index: int) -> tuple[int, int, int]:
        """Number of the shard, first byte in it, size."""
        shard = int(np.searchsorted(self._starts, check_index(index, len(self)), side="right")) - 1
        return shard, BLOCK * int(self._blocks[index]), int(self._sizes[index])

    def location(self, index: int) -> str:
        shard, start, _ = self._extent(index)
        return f"{self.origins[shard]}, byte {start}"

    def size(self, index: int) -> int:
        return int(self._sizes[check_index(index, len(self))])

    def image(self, index: int) -> bytes:
        """The member's bytes. Of several remote ones, `read_many` is many times as fast."""
        data = self._local(index)
        data = self._fetched([index])[index] if data is None else data
        if isinstance(data, OSError):
            raise data
        return data

    def _local(self, index: int) -> bytes | None:
        """The bytes from a local shard, or out of the cache; None: to be fetched."""
        shard, start, size = self._extent(index)
        tar = self.tars[shard]
        if tar is None:
            member = index - int(self._starts[shard])
            return None if self._cache is None else self._cache.get(shard, member, start, size)
        data = os.pread(self._open[tar], size, start)  # positioned, so that forked workers may share a descriptor
        if len(data) != size:
            early = size - len(data)
            raise OSError(f"{self.location(index)}: the shard ends {early} bytes early; it changed since indexing")
        return data

    def _fetched(self, indices: Sequence[int]) -> dict[int, bytes | OSError]:
        """Images of remote shards, or why there are none; at the same time."""
        wanted = list[tuple[str, int, int]]()
        for index in indices:
            shard, start, size = self._extent(index)
            origin = self.origins[shard]
            assert isinstance(origin, RemoteFile)
            wanted.append((origin.url, start, size))
        found = dict(zip(indices, fetch_ranges(wanted, self.timeout), strict=True))
        for index, data in found.items():
            if self._cache is not None and isinstance(data, bytes):
                shard, start, _ = self._extent(index)
                self._cache.put(shard, index - int(self._starts[shard]), start, data)
        return found

    def _read_together(self, indices: Sequence[int]) -> list[Sample | OSError]:
        found, missing = dict[int, bytes | OSError](), list[int]()
        for index in dict.fromkeys(indices):
            try:
                data = self._local(index)
            except OSError as error:
                data = error
            if data is None:
                missing.append(index)
            else:
                found[index] = data
        found |= self._fetched(missing)
        pairs = ((index, found[index]) for index in indices)
        return [data if isinstance(data, OSError) else (data, self.label(index)) for index, data in pairs]

    def unread(self) -> list[str]:
        """A line for each kind of images that need something installed to be read, from a look at some of them."""
        if not any(map(lacking, {*EXTRA_OF.values()})):
            return []
        looked = spread(np.arange(len(self)), _LOOKED if self.reads_together else _LOOKED_LOCAL)
        begins, remote = dict[int, bytes | OSError](), dict[int, tuple[str, int, int]]()
        for index in looked:
            shard, start, size = self._extent(index)
            tar, origin, size = self.tars[shard], self.origins[shard], min(size, _FIRST)
            if tar is None:
                assert isinstance(origin, RemoteFile)
                remote[index] = origin.url, start, size
            else:
                with contextlib.suppress(OSError):  # reading an image says so
                    begins[index] = os.pread(self._open[tar], size, start)
        begins |= zip(remote, fetch_ranges([*remote.values()], self.timeout), strict=True)
        found = dict[str, list[int]]()
        for index, data in begins.items():
            if isinstance(data, bytes) and (extra := needed_extra(data)) and lacking(extra):
                found.setdefault(extra, []).append(index)
        return [
            f"{len(indices)} of {count(len(looked), 'image')} looked at cannot be read, such as "
            f"{printable(self.location(indices[0]))}: to read them, {lacking(extra)}"
            for extra, indices in sorted(found.items())
        ]

    def placement(self, indices: np.ndarray) -> Placement:
        origins = [
            hash(origin.named) if isinstance(origin, RemoteFile) else file_place(str(origin.path))[0]
            for origin in self.origins
        ]
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        starts = self._blocks[indices].astype(np.int64) * BLOCK
        pairs = zip(shards.tolist(), starts.tolist(), strict=True)
        places = [hash((origins[shard], start)) if origins[shard] != UNKNOWN else UNKNOWN for shard, start in pairs]
        local = np.array([tar is not None for tar in self.tars])[shards]
        return Placement(np.array(places, dtype=np.int64), self._sizes[indices].astype(np.int64), local)

    def _fingerprint_parts(self, times: bool, most: int | None, labelled: bool) -> Iterator[str | bytes]:
        for origin in self.origins:
            yield origin.state(times)
        if most is not None:  # tars come in few sizes, images in many
            yield self._sizes.astype("<i8").tobytes()


def open_shards(spec: str, pattern: str, keep: bool = False, timeout: float = TIMEOUT) -> ShardSource:
    r"""Tar shards by patterns: local ones in the order of their paths, then remote ones in that of their URLs.

    Class names come from a classes.txt beside the shards, one a line, or are numbers. A label that is missing or cannot
    be read is -1.

    Args:
        spec: the source as the user wrote it, for messages.
        pattern: paths and URLs (s3://, gs://, http(s)://, hf://) separated by white space, with globs (not over http)
            and braces: `/a/*.tar s3://b/x-{000..123}.tar`. White space in a name is written `\ `.
        keep, timeout: as of `ShardSource`.

    Raises SourceError: no such shard, no tar file, no image inside, class names that do not fit, or a missing package.
    """
    name = shown(spec)
    paths, remote = set[Path](), dict[str, RemoteFile]()
    patterns = split_patterns(pattern)
    if not patterns:
        raise SourceError(f"{name!r} does not say where; write shards:GLOB")
    for one in patterns:
        if is_url(one):
            remote |= {file.named: file for file in find_remote(spec, one, timeout)}
        elif "://" in one:
            known = "s3://, gs://, http://, https:// and hf://"
            raise SourceError(f"{name}: {shown(one)} is no address of a kind that is known: {known}")
        else:
            paths.update(local_shards(spec, one))
    shards = list[Shard]()
    with Progress("indexing", len(paths) + len(remote), "shards") as progress:
        for path in sorted(map(str, paths)):
            shards.append(open_local(spec, Path(path)))
            progress.add()
        if remote:
            files = [remote[name] for name in sorted(remote)]  # signatures would change the order
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for shard in pool.map(partial(open_remote, spec, timeout=timeout), files):
                    shards.append(shard)
                    progress.add()
    named, warnings = None, list[str]()
    if any(shard.index.labels.max(initial=-1) >= 0 for shard in shards):
        named, warnings = _class_names(name, shards, timeout)
    # A label that is too large to be a class, as of a damaged .cls, is one that cannot be read.
    most = max(len(named[1]) if named else 0, most_numbered(sum(len(shard.index.labels) for shard in shards)))
    ignored = Ignored()
    for number, shard in enumerate(shards):
        ignored.merge(shard.index.ignored)
        labels = shard.index.labels
        if labels.max(initial=-1) >= most:
            checked = replace(shard.index, labels=np.where(labels < most, labels, UNREADABLE))
            shards[number] = replace(shard, index=checked)
    classes, note = _classes_and_note(name, shards, ignored, named)
    source = ShardSource(name, shards, classes, note, keep, timeout)
    lost = ignored.warnings(len(source), "a sample has one image, KEY.jpg or of another known ending")
    source.warnings = (*lost, *warnings, *source.unread())
    return source


def _classes_and_note(
    name: str, shards: Sequence[Shard], ignored: Ignored, named: tuple[str, tuple[str, ...]] | None
) -> tuple[tuple[str, ...] | None, str]:
    """Class names, and what `describe` adds."""
    labels = np.concatenate([shard.index.labels for shard in shards])
    if not len(labels):
        expected = "expected members such as 000017.jpg, 000017.cls"
        raise SourceError(f"{name}: no image in {count(len(shards), 'shard')}; {expected}")
    notes = list[str]()
    if ignored.number:
        notes.append(f"ignored {count(ignored.number, 'other member')}, such as {printable(ignored.example)}")
    largest, without, unreadable = int(labels.max()), int((labels == -1).sum()), int((labels == UNREADABLE).sum())
    if without and largest >= 0:
        notes.append(f"{without:,} without a label")
    if unreadable:
        notes.append(f"{count(unreadable, 'label')} that cannot be read")
    if named is None:
        return (None if largest < 0 else numbered_classes(name, largest, len(labels))), "; ".join(notes)
    location, names = named
    if largest >= len(names):
        what = f"names {len(names)} classes, but there is a label {largest}"
        raise SourceError(f"{name}: {shown(location)} {what}; complete it")
    return (None if largest < 0 else names), "; ".join(notes)


def _class_names(
    name: str, shards: Sequence[Shard], timeout: float
) -> tuple[tuple[str, tuple[str, ...]] | None, list[str]]:
    """The classes.txt beside the shards, one or several that agree, with its lines, or None; and warnings."""
    found, refused = dict[str, tuple[str, ...]](), list[str]()
    locations = dict[str, str]()  # in order, each once, however signed
    for shard in shards:
        location = shard.origin.beside("classes.txt")
        locations.setdefault(_unsigned(location), location)
    for location in locations.values():
        try:
            text = _read_names(location, timeout)
            if text is not None:
                found[location] = tuple(line.strip() for line in text.decode().splitlines() if line.strip())
        except UnicodeDecodeError as error:
            raise SourceError(f"{name}: cannot read {shown(location)} ({error}); write it in UTF-8") from error
        except OSError as error:
            # Where it is not there, some stores say so, too.
            if isinstance(error, PermissionError) and is_url(location):
                refused.append(str(error))
                continue
            reason = shown(error.strerror or str(error)).removeprefix(f"{shown(location)}: ")
            text = f"{name}: cannot read {shown(location)} ({reason}); mend that, or take it away"
            raise opening_error(text, error) from error
    names_are = "those of the other shards" if found else "numbers"
    warnings = [f"class names are {names_are}, for we may not read {error}" for error in refused[:1]]
    if not found:
        return None, warnings
    (location, names), *others = found.items()
    for other, differing in others:
        if differing != names:
            raise SourceError(f"{name}: {shown(location)} and {shown(other)} name different classes; make them agree")
    return (location, names), warnings


def _unsigned(location: str) -> str:
    return location.partition("?")[0] if is_url(location) else location


def _read_names(location: str, timeout: float) -> bytes | None:
    if not is_url(location):
        try:
            return read_file(location)
        except (FileNotFoundError, NotADirectoryError, NotAFile):
            return None
    try:
        return fetch_small(location, timeout)
    except PermissionError:
        if location == _unsigned(location):
            raise
        return fetch_small(_unsigned(location), timeout)  # open to all, beside shards that are not
