"""What there is to read: one string opens a folder, shards, an array, a list, a Hugging Face dataset, CIFAR, the demo.

source = open_source("folder:/data/images")
data, label = source.read(0)
mixed = open_source("3 * folder:/data/images + 1 * shards:/data/more/*.tar")
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from mpp.data.sources.array import ArraySource
from mpp.data.sources.base import Source, SourceError, Split
from mpp.data.sources.datasets import open_cifar, open_demo
from mpp.data.sources.folder import Folder
from mpp.data.sources.hub import open_hub
from mpp.data.sources.hub_dataset import OpenedDataset
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.names import home_expanded
from mpp.data.sources.patterns import shown
from mpp.data.sources.shards import open_shards
from mpp.data.sources.specs import parse, parts_of
from mpp.data.sources.table import read_table


class Splits(Mapping[Split, Source]):
    """The splits of a source: `train`, all there is where it has no others, and `test`, where it holds images out.

    Each is opened, or refused, when it is asked for, and once. What they share (a list, a listing) is read once.
    """

    def __init__(self, opener: Callable[[Split], Source], has_test: bool) -> None:
        self._opener = opener
        self._splits: tuple[Split, ...] = ("train", "test") if has_test else ("train",)
        self._opened: dict[Split, Source] = {}

    def __getitem__(self, split: Split) -> Source:
        if split not in self._splits:
            raise KeyError(split)
        if split not in self._opened:
            self._opened[split] = self._opener(split)
        return self._opened[split]

    def __contains__(self, split: object) -> bool:
        return split in self._splits

    def __iter__(self) -> Iterator[Split]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)


def open_splits(spec: str, download: bool = False, expected: Sequence[str] = (), keep: bool = False) -> Splits:
    """Both splits of a source by its string.

    cifar10, cifar100 and demo hold images out; a folder does where it holds train/ and test/ or val/ and no other
    images, a CSV by its column split, a dataset by the names of its splits, a mixture where all of its parts do.

    Args:
        spec: folder:DIR, shards:GLOB, array:FILE.npy, csv:FILE.csv, hf:NAME_OR_DIR[:SPLIT], cifar10:DIR,
            cifar100:DIR or demo; or several joined by " + ", all or none of them with a weight in front, "3 * ". A name
            that holds " + " is quoted, folder:"/a + b".
        download: fetch cifar10 or cifar100 where DIR lacks it.
        expected: classes that a folder may hold a single one of (see `Folder`).
        keep: keep in the cache what is fetched of remote shards.

    Raises:
        SourceError: unknown kind, or a CSV or a dataset that cannot be opened; in taking a split, nothing there, or
            nothing readable.
    """
    weights, parts = parts_of(spec)
    if len(parts) > 1:
        opened = [open_splits(part, download, expected, keep) for part in parts]

        def mixed(split: Split) -> Source:
            of = [part[split] for part in opened]
            return MixtureSource(shown(spec), of, weights if split == "train" else None)  # test images are not drawn

        return Splits(mixed, all("test" in part for part in opened))
    return Splits(*_opener(spec, download, expected, keep))


def _opener(spec: str, download: bool, expected: Sequence[str], keep: bool) -> tuple[Callable[[Split], Source], bool]:
    """What opens a split of a single source, and whether there is a test split."""
    kind, argument = parse(spec)
    if kind == "demo":
        return open_demo, True
    if kind in ("cifar10", "cifar100"):
        return lambda split: open_cifar(kind, home_expanded(argument), split, download), True
    if kind == "shards":
        return lambda split: open_shards(spec, argument, keep), False
    if kind == "array":
        return lambda split: ArraySource(spec, home_expanded(argument)), False
    if kind == "csv":
        table = read_table(spec, home_expanded(argument))
        return table.open, bool(table.splits)
    if kind == "hf":
        dataset = OpenedDataset(spec, argument)
        return partial(open_hub, dataset), bool(dataset.names())
    folder = Folder(spec, home_expanded(argument), expected)
    return folder.open, bool(folder.splits)


def open_source(spec: str, split: Split = "train", download: bool = False, keep: bool = False) -> Source:
    """One split of a source by its string; `open_splits` gives both, and says whether there is a `test`.

    The other arguments, and what is refused, are those of `open_splits`.

    Raises:
        SourceError: as `open_splits`, or no such split.
    """
    splits = open_splits(spec, download, keep=keep)
    if split not in splits:
        raise SourceError(
            f"{shown(spec)} has no test split of its own: give the held-out images as a source of their own"
        )
    return splits[split]
