"""What there is to read: one string opens a folder, shards, an array, CIFAR or the demo pictures.

source = open_source("folder:/data/images")
data, label = source.read(0)
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

from mpp.sources.array import ArraySource
from mpp.sources.base import Source, SourceError, Split
from mpp.sources.datasets import open_cifar, open_demo
from mpp.sources.folder import open_folder, split_folders
from mpp.sources.shards import open_shards

_EXAMPLES = {
    "folder": "folder:DIR",
    "shards": "shards:GLOB",
    "array": "array:FILE.npy",
    "cifar10": "cifar10:DIR",
    "cifar100": "cifar100:DIR",
    "demo": "demo",
}


def open_source(spec: str, split: Split = "train", download: bool = False, expected: Sequence[str] = ()) -> Source:
    """Opens a source by its string.

    Args:
        spec: folder:DIR, shards:GLOB, array:FILE.npy, cifar10:DIR, cifar100:DIR or demo.
        split: `test` needs a source with a split of its own (`has_split`); where there is none, `train` is all of it.
        download: fetch cifar10 or cifar100 where DIR lacks it.
        expected: classes that a folder may hold a single one of (see `open_folder`).

    Raises:
        SourceError: unknown kind, nothing there, or nothing readable.
    """
    kind, argument = _parse(spec)
    if split == "test" and not has_split(spec):
        raise SourceError(f"{spec} has no test split of its own: give the held-out images as a source of their own")
    if kind == "demo":
        return open_demo(split)
    if kind in ("cifar10", "cifar100"):
        return open_cifar(kind, Path(argument).expanduser(), split, download)
    if kind == "shards":
        return open_shards(spec, argument)
    if kind == "array":
        return ArraySource(spec, Path(argument).expanduser())
    return open_folder(spec, Path(argument).expanduser(), split, expected)


def has_split(spec: str) -> bool:
    """Whether `open_source(spec, "test")` gives held-out images.

    cifar10, cifar100 and demo have them; a folder does when it holds train/ and test/ or val/ and no other images.

    Raises:
        SourceError: unknown kind.
    """
    kind, argument = _parse(spec)
    if kind == "folder":
        return bool(split_folders(Path(argument).expanduser()))
    return kind in ("cifar10", "cifar100", "demo")


def _parse(spec: str) -> tuple[str, str]:
    """`kind:argument` in two, checked."""
    kind, _, argument = spec.partition(":")
    if kind == "demo" and not argument:
        return kind, ""
    if kind == "demo":
        raise SourceError(f"{spec!r}: demo takes no argument; write demo")
    if kind in _EXAMPLES and not argument:
        raise SourceError(f"{spec!r} does not say where; write {_EXAMPLES[kind]}")
    if kind in _EXAMPLES:
        return kind, argument
    known = f"a source is one of {', '.join(_EXAMPLES.values())}"
    if not spec:
        raise SourceError(f"no source of images was given (data.source, or --data for short); {known}")
    path = Path(spec).expanduser()
    if path.exists():
        suffix = "".join(path.suffixes[-2:]).lower()
        fitting = "folder" if path.is_dir() else "array" if suffix.endswith((".npy", ".npz")) else "shards"
        if path.is_dir() or suffix.endswith((".npy", ".npz", ".tar", ".tgz", ".tar.gz")):
            raise SourceError(f"{spec!r} lacks the kind of source: did you mean {fitting}:{spec}?")
        raise SourceError(f"{spec!r} is a single file: did you mean the folder that it lies in, folder:{path.parent}?")
    near = difflib.get_close_matches(kind.lower(), _EXAMPLES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}{':' + argument if argument and near[0] != 'demo' else ''}? " if near else ""
    raise SourceError(f"{spec!r}: there is no kind of source called {kind!r}; {hint}{known}")
