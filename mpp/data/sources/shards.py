"""Tar shards in WebDataset naming, by patterns of paths and URLs: found, indexed once, read at random.

shards:/data/train-{000..146}.tar s3://bucket/more-*.tar  ->  files  ->  an index each  ->  one source
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mpp.data.sources.base import SourceAway, SourceError, count, most_numbered, numbered_classes
from mpp.data.sources.files import NotAFile, read_file
from mpp.data.sources.local_shards import Shard, ShardSource, open_local
from mpp.data.sources.names import Ignored, printable
from mpp.data.sources.patterns import is_url, local_shards, shown, split_patterns
from mpp.data.sources.remote import TIMEOUT, RemoteFile, fetch_small, find_remote
from mpp.data.sources.remote_shards import RemoteShardSource, open_remote
from mpp.data.sources.tar_index import UNREADABLE
from mpp.errors import Unreachable

_AT_ONCE = 16  # remote shards whose index is fetched or made at the same time


def open_shards(spec: str, pattern: str, keep: bool = False, timeout: float = TIMEOUT) -> ShardSource:
    r"""Tar shards by patterns: local ones in the order of their paths, then remote ones in that of their URLs.

    Class names come from a classes.txt beside the shards, one a line, or are numbers. A label that is missing or cannot
    be read is -1.

    Args:
        spec: the source as the user wrote it, for messages.
        pattern: paths and URLs (s3://, gs://, http(s)://, hf://) separated by white space, with globs and braces:
            `/a/*.tar s3://b/x-{000..123}.tar`. White space in a name is written `\ `, unless the name is alone.
            Over http there are no globs.
        keep: keep what is fetched of remote shards in the cache folder; gzipped ones lie there in any case.
        timeout: seconds that one request may take.

    Raises:
        SourceError: no such shard, not a tar file, no image inside, class names that do not fit, or a missing package.
    """
    name = shown(spec)
    paths: set[Path] = set()
    remote: dict[str, RemoteFile] = {}
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
    shards = [open_local(spec, Path(path)) for path in sorted(map(str, paths))]
    if remote:
        files = [remote[name] for name in sorted(remote)]  # signatures would change the order
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            shards += pool.map(partial(open_remote, spec, timeout=timeout), files)
    labelled = any(shard.index.labels.max(initial=-1) >= 0 for shard in shards)
    named, unread = _class_names(name, shards, timeout) if labelled else (None, [])
    shards = _without_large_labels(shards, 0 if named is None else len(named[1]))
    classes, notes = _classes_and_notes(name, shards, named)
    if all(shard.tar is not None for shard in shards):
        source = ShardSource(name, shards, classes, "; ".join(notes))
    else:
        source = RemoteShardSource(name, shards, classes, "; ".join(notes), keep, timeout)
    why = "a sample has one image, KEY.jpg or of another known ending"
    source.warnings = (*_ignored(shards).warnings(len(source), why), *unread)
    return source


def _ignored(shards: Sequence[Shard]) -> Ignored:
    total = Ignored()
    for shard in shards:
        total.merge(shard.index.ignored)
    return total


def _without_large_labels(shards: Sequence[Shard], named: int) -> list[Shard]:
    """The shards, where a label that is too large to be a class, as of a damaged .cls, is one that cannot be read."""
    most = max(named, most_numbered(sum(len(shard.index.labels) for shard in shards)))

    def checked(shard: Shard) -> Shard:
        labels = shard.index.labels
        if labels.max(initial=-1) < most:
            return shard
        return replace(shard, index=replace(shard.index, labels=np.where(labels < most, labels, UNREADABLE)))

    return [checked(shard) for shard in shards]


def _classes_and_notes(
    name: str, shards: Sequence[Shard], named: tuple[str, tuple[str, ...]] | None
) -> tuple[tuple[str, ...] | None, list[str]]:
    """Class names, and what `describe` adds."""
    images = sum(len(shard.index.labels) for shard in shards)
    if not images:
        expected = "expected members such as 000017.jpg, 000017.cls"
        raise SourceError(f"{name}: no image in {count(len(shards), 'shard')}; {expected}")
    ignored = _ignored(shards)
    notes = []
    if ignored.number:
        such = f", such as {printable(ignored.example)}"
        notes.append(f"ignored {count(ignored.number, 'other member')}{such}")
    labels = [shard.index.labels for shard in shards if len(shard.index.labels)]
    unreadable = sum(int((held == UNREADABLE).sum()) for held in labels)
    without = sum(int((held == -1).sum()) for held in labels)
    unlabelled = without + unreadable == images
    if without and not unlabelled:
        notes.append(f"{without:,} without a label")
    if unreadable:
        notes.append(f"{count(unreadable, 'label')} that cannot be read")
    if unlabelled:
        return None, notes
    largest = max(int(held.max()) for held in labels)
    if named is None:
        return numbered_classes(name, largest, images), notes
    place, names = named
    if largest >= len(names):
        what = f"names {len(names)} classes, but there is a label {largest}"
        raise SourceError(f"{name}: {shown(place)} {what}; complete it")
    return names, notes


def _class_names(
    name: str, shards: Sequence[Shard], timeout: float
) -> tuple[tuple[str, tuple[str, ...]] | None, list[str]]:
    """The classes.txt beside the shards, one or several that agree, and its lines, None where there is none.

    And a warning where we may not read one.
    """
    found: dict[str, tuple[str, ...]] = {}
    refused: list[str] = []
    places: dict[str, str] = {}  # in order, each once, however signed
    for shard in shards:
        place = shard.origin.beside("classes.txt")
        places.setdefault(_bare(place), place)
    for place in places.values():
        try:
            text = _read_names(place, timeout)
            if text is not None:
                found[place] = tuple(line.strip() for line in text.decode().splitlines() if line.strip())
        except UnicodeDecodeError as error:
            raise SourceError(f"{name}: cannot read {shown(place)} ({error}); write it in UTF-8") from error
        except OSError as error:
            if isinstance(error, PermissionError) and is_url(place):  # where it is not there, some stores say so, too
                refused.append(str(error))
                continue
            kind = SourceAway if isinstance(error, Unreachable) else SourceError
            reason = shown(error.strerror or str(error)).removeprefix(f"{shown(place)}: ")
            raise kind(f"{name}: cannot read {shown(place)} ({reason}); mend that, or take it away") from error
    names_are = "those of the other shards" if found else "numbers"
    warnings = [f"class names are {names_are}, for we may not read {error}" for error in refused[:1]]
    if not found:
        return None, warnings
    (place, names), *others = found.items()
    for other, differing in others:
        if differing != names:
            raise SourceError(f"{name}: {shown(place)} and {shown(other)} name different classes; make them agree")
    return (place, names), warnings


def _bare(place: str) -> str:
    return place.partition("?")[0] if is_url(place) else place


def _read_names(place: str, timeout: float) -> bytes | None:
    if not is_url(place):
        try:
            return read_file(place)
        except (FileNotFoundError, NotADirectoryError, NotAFile):
            return None
    try:
        return fetch_small(place, timeout)
    except PermissionError:
        if place == _bare(place):
            raise
        return fetch_small(_bare(place), timeout)  # open to all, beside shards that are not
