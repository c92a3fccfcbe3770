"""What there is to read: one string opens a folder, shards, an array, a list, a Hugging Face dataset, CIFAR, the demo.

source = open_source("folder:/data/images")
data, label = source.read(0)
mixed = open_source("3 * folder:/data/images + 1 * shards:/data/more/*.tar")
"""

import difflib
import os
import re
from collections.abc import Sequence

from mpp.sources.array import ArraySource
from mpp.sources.base import Source, SourceError, Split
from mpp.sources.datasets import open_cifar, open_demo
from mpp.sources.folder import open_folder, split_folders
from mpp.sources.hub import hub_splits, open_hub
from mpp.sources.mixture import MixtureSource
from mpp.sources.names import home_expanded
from mpp.sources.patterns import is_url, shown
from mpp.sources.shards import open_shards
from mpp.sources.table import open_table, table_splits

_EXAMPLES = {
    "folder": "folder:DIR",
    "shards": "shards:GLOB",
    "array": "array:FILE.npy",
    "csv": "csv:FILE.csv",
    "hf": "hf:NAME_OR_DIR",
    "cifar10": "cifar10:DIR",
    "cifar100": "cifar100:DIR",
    "demo": "demo",
}
_ENDINGS = {"array": (".npy", ".npz"), "csv": (".csv", ".tsv"), "shards": (".tar", ".tgz", ".tar.gz")}
_PLUS = " + "
_WEIGHTED = re.compile(r"([^\s:*]+)\s*\*\s*(\S.*)", re.DOTALL)


def open_source(
    spec: str, split: Split = "train", download: bool = False, expected: Sequence[str] = (), keep: bool = False
) -> Source:
    """Opens a source by its string.

    Args:
        spec: folder:DIR, shards:GLOB, array:FILE.npy, csv:FILE.csv, hf:NAME_OR_DIR[:SPLIT], cifar10:DIR,
            cifar100:DIR or demo; or several joined by " + ", all or none of them with a weight in front, "3 * ".
        split: `test` needs a source with a split of its own (`has_split`); where there is none, `train` is all of it.
        download: fetch cifar10 or cifar100 where DIR lacks it.
        expected: classes that a folder may hold a single one of (see `open_folder`).
        keep: keep in the cache what is fetched of remote shards.

    Raises:
        SourceError: unknown kind, nothing there, or nothing readable.
    """
    if _PLUS in spec:
        weights, parts = _parts(spec)
        opened = [open_source(part, split, download, expected, keep) for part in parts]
        return MixtureSource(shown(spec), opened, weights if split == "train" else None)  # test images are not drawn
    kind, argument = _parse(spec)
    if split == "test" and not has_split(spec):
        raise SourceError(
            f"{shown(spec)} has no test split of its own: give the held-out images as a source of their own"
        )
    if kind == "demo":
        return open_demo(split)
    if kind in ("cifar10", "cifar100"):
        return open_cifar(kind, home_expanded(argument), split, download)
    if kind == "shards":
        return open_shards(spec, argument, keep)
    if kind == "array":
        return ArraySource(spec, home_expanded(argument))
    if kind == "csv":
        return open_table(spec, home_expanded(argument), split)
    if kind == "hf":
        return open_hub(spec, argument, split)
    return open_folder(spec, home_expanded(argument), split, expected)


def has_split(spec: str) -> bool:
    """Whether `open_source(spec, "test")` gives held-out images.

    cifar10, cifar100 and demo have them; a folder does when it holds train/ and test/ or val/ and no other images, a
    CSV by its column split, a dataset by the names of its splits, a mixture when all of its parts do.

    Raises:
        SourceError: unknown kind, or a CSV or a dataset that cannot be opened.
    """
    if _PLUS in spec:
        return all(has_split(part) for part in _parts(spec)[1])
    kind, argument = _parse(spec)
    if kind == "folder":
        return bool(split_folders(home_expanded(argument)))
    if kind == "csv":
        return bool(table_splits(spec, home_expanded(argument)))
    if kind == "hf":
        return bool(hub_splits(spec, argument))
    return kind in ("cifar10", "cifar100", "demo")


def _parts(spec: str) -> tuple[list[float] | None, list[str]]:
    """The weights, where there are any, and the sources of a mixture."""
    texts, spec = [text.strip() for text in spec.split(_PLUS)], shown(spec)
    if not all(texts):
        raise SourceError(f"{spec!r}: a source is missing beside a +; write e.g. folder:/a + folder:/b")
    found = [_WEIGHTED.fullmatch(text) for text in texts]
    weighted = [match for match in found if match]
    if not weighted:
        return None, texts
    if len(weighted) < len(texts):
        bare = next(text for text, match in zip(texts, found, strict=True) if not match)
        raise SourceError(f"{spec!r}: {shown(bare)} has no weight; give every source one, or none")
    return [_weight(spec, match[1]) for match in weighted], [match[2] for match in weighted]


def _weight(spec: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SourceError(f"{spec!r}: the weight {text!r} is no number; write e.g. 3 * folder:DIR") from None


def _parse(spec: str) -> tuple[str, str]:
    """`kind:argument` in two, checked."""
    if "\0" in spec:
        raise SourceError(f"{shown(spec)!r} holds a NUL, which no path does; check it")
    if weighted := _WEIGHTED.fullmatch(spec):
        raise SourceError(f"{shown(spec)!r}: a weight is for one of several sources; write {shown(weighted[2])}")
    kind, _, argument = spec.partition(":")
    if kind == "demo" and not argument:
        return kind, ""
    if kind == "demo":
        raise SourceError(f"{shown(spec)!r}: demo takes no argument; write demo")
    if kind in _EXAMPLES and not argument:
        raise SourceError(f"{spec!r} does not say where; write {_EXAMPLES[kind]}")
    if kind in _EXAMPLES and kind != "shards" and is_url(argument):
        raise SourceError(f"{shown(spec)}: only shards are read over the network, shards:URL; copy it to a local disk")
    if kind in _EXAMPLES:
        return kind, argument
    known = f"a source is one of {', '.join(_EXAMPLES.values())}"
    if is_url(spec):
        raise SourceError(f"{shown(spec)!r} lacks the kind of source: did you mean shards:{shown(spec)}?")
    if not spec:
        raise SourceError(f"no source of images was given (data.source, or --data for short); {known}")
    path = home_expanded(spec)
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a name that is too long
        suffix = "".join(path.suffixes[-2:]).lower()
        fitting = next((kind for kind, endings in _ENDINGS.items() if suffix.endswith(endings)), "")
        if path.is_dir() or fitting:
            kind = "folder" if path.is_dir() else fitting
            raise SourceError(f"{spec!r} lacks the kind of source: did you mean {kind}:{spec}?")
        raise SourceError(f"{spec!r} is a single file: did you mean the folder that it lies in, folder:{path.parent}?")
    near = difflib.get_close_matches(kind.lower(), _EXAMPLES, n=1, cutoff=0.5)
    rest = f":{shown(argument)}" if argument and near[:1] != ["demo"] else ""
    hint = f"did you mean {near[0]}{rest}? " if near else ""
    raise SourceError(f"{shown(spec)!r}: there is no kind of source called {shown(kind)!r}; {hint}{known}")
