"""What there is to read: one string opens a folder, shards, an array, a list, a Hugging Face dataset, CIFAR, the demo.

source = open_source("folder:/data/images")
data, label = source.read(0)
mixed = open_source("3 * folder:/data/images + 1 * shards:/data/more/*.tar")
"""

from collections.abc import Sequence

from mpp.sources.array import ArraySource
from mpp.sources.base import Source, SourceError, Split
from mpp.sources.datasets import open_cifar, open_demo
from mpp.sources.folder import open_folder, split_folders
from mpp.sources.hub import hub_splits, open_hub
from mpp.sources.mixture import MixtureSource
from mpp.sources.names import home_expanded
from mpp.sources.patterns import shown
from mpp.sources.shards import open_shards
from mpp.sources.specs import parse, parts_of
from mpp.sources.table import open_table, table_splits


def open_source(
    spec: str, split: Split = "train", download: bool = False, expected: Sequence[str] = (), keep: bool = False
) -> Source:
    """Opens a source by its string.

    Args:
        spec: folder:DIR, shards:GLOB, array:FILE.npy, csv:FILE.csv, hf:NAME_OR_DIR[:SPLIT], cifar10:DIR,
            cifar100:DIR or demo; or several joined by " + ", all or none of them with a weight in front, "3 * ". A name
            that holds " + " is quoted, folder:"/a + b".
        split: `test` needs a source with a split of its own (`has_split`); where there is none, `train` is all of it.
        download: fetch cifar10 or cifar100 where DIR lacks it.
        expected: classes that a folder may hold a single one of (see `open_folder`).
        keep: keep in the cache what is fetched of remote shards.

    Raises:
        SourceError: unknown kind, nothing there, or nothing readable.
    """
    weights, parts = parts_of(spec)
    if len(parts) > 1:
        opened = [open_source(part, split, download, expected, keep) for part in parts]
        return MixtureSource(shown(spec), opened, weights if split == "train" else None)  # test images are not drawn
    kind, argument = parse(spec)
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
    _, parts = parts_of(spec)
    if len(parts) > 1:
        return all(map(has_split, parts))
    kind, argument = parse(spec)
    if kind == "folder":
        return bool(split_folders(home_expanded(argument)))
    if kind == "csv":
        return bool(table_splits(spec, home_expanded(argument)))
    if kind == "hf":
        return bool(hub_splits(spec, argument))
    return kind in ("cifar10", "cifar100", "demo")
