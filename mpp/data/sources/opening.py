"""Opens sources by their strings: folders, shards, arrays, lists, Hugging Face datasets, CIFAR, the demo, mixtures.

splits = open_splits("folder:/data/images")
source = splits["train"]
image, label = source.read(0)
mixed = open_source("3 * folder:/data/images + 1 * shards:/data/more/*.tar")
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from mpp.data.sources.array import open_array
from mpp.data.sources.base import Source, SourceError
from mpp.data.sources.cifar import open_cifar
from mpp.data.sources.demo import open_demo
from mpp.data.sources.folder import open_folder
from mpp.data.sources.from_python import registered
from mpp.data.sources.hdf5 import hdf5_name, open_hdf5
from mpp.data.sources.hf_dataset import HfDataset
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.names import Split, home_expanded
from mpp.data.sources.patterns import shown
from mpp.data.sources.shards import open_shards
from mpp.data.sources.specs import parse, parts_of
from mpp.data.sources.table import read_table

_BOTH: tuple[Split, ...] = ("train", "test")


class Splits(Mapping[Split, Source]):
    """The splits of a source: `train`, all there is where it has no others, `test`, where it holds images out, and
    `val`, where it holds others out to choose settings by.

    Each is opened, or refused, when it is asked for, and once; `openers` say how.
    """

    def __init__(self, openers: Mapping[Split, Callable[[], Source]]) -> None:
        self._openers: dict[Split, Callable[[], Source]] = {split: cache(opener) for split, opener in openers.items()}

    def __getitem__(self, split: Split) -> Source:
        return self._openers[split]()

    def __contains__(self, split: object) -> bool:  # Mapping's would open it
        return split in self._openers

    def __iter__(self) -> Iterator[Split]:
        return iter(self._openers)

    def __len__(self) -> int:
        return len(self._openers)


def open_splits(spec: str, download: bool = False, expected: Sequence[str] = (), keep: bool = False) -> Splits:
    """The splits of a source by its string.

    cifar10, cifar100 and demo hold images out; a folder does where it holds train/ and test/ or val/ and no other
    images, a CSV by its column split, a dataset by the names of its splits, an .npz by those of its arrays
    (train_images), a mixture where all of its parts do. Each by any of `SPLIT_NAMES`.

    Args:
        spec: folder:DIR, shards:GLOB, array:FILE.npy, csv:FILE.csv, hf:NAME_OR_DIR[:SPLIT], cifar10:DIR,
            cifar100:DIR or demo; or several joined by " + ", all or none of them with a weight in front, "3 * ". A name
            that holds " + " is quoted, folder:"/a + b".
        download: fetch cifar10 or cifar100 where DIR lacks it.
        expected: classes that a folder may hold a single one of (see `open_folder`).
        keep: keep in the cache what is fetched of remote shards.

    Raises SourceError: unknown kind, or a CSV or a dataset that cannot be opened; in taking a split, nothing there, or
    nothing readable.
    """
    weights, parts = parts_of(spec)
    if len(parts) == 1:
        return Splits(_openers(spec, download, expected, keep))
    opened = [open_splits(part, download, expected, keep) for part in parts]

    def mixed(split: Split) -> Source:
        # Test images are not drawn.
        return MixtureSource(shown(spec), [part[split] for part in opened], weights if split == "train" else None)

    return Splits({split: partial(mixed, split) for split in opened[0] if all(split in part for part in opened)})


def _openers(spec: str, download: bool, expected: Sequence[str], keep: bool) -> Mapping[Split, Callable[[], Source]]:
    """What opens each split of a single source. A new kind of source goes here."""
    kind, argument = parse(spec)
    path = home_expanded(argument)
    if kind == "demo":
        return {split: partial(open_demo, split) for split in _BOTH}
    if kind in ("cifar10", "cifar100"):
        return {split: partial(open_cifar, kind, path, split, download) for split in _BOTH}
    if kind == "python":
        return {"train": partial(registered, spec)}
    if kind == "shards":
        return {"train": lambda: open_shards(spec, argument, keep)}
    if kind == "array":
        named = hdf5_name(str(path))
        return open_hdf5(spec, Path(named[0]), named[1]) if named else open_array(spec, path)
    if kind == "csv":
        table = read_table(spec, path)
        return {split: partial(table.open, split) for split in table.splits}
    if kind == "hf":
        dataset = HfDataset(spec, argument)
        return {split: partial(dataset.open, split) for split in dataset.splits}
    return open_folder(spec, path, expected)


def open_source(spec: str, split: Split = "train", download: bool = False, keep: bool = False) -> Source:
    """One split of a source by its string, as `open_splits`; SourceError also where there is no such split."""
    splits = open_splits(spec, download, keep=keep)
    if split not in splits:
        hint = "give the held-out images as a source of their own"
        raise SourceError(f"{shown(spec)} has no {split} split of its own: {hint}")
    return splits[split]
