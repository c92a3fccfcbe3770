"""Hugging Face datasets: saved with `save_to_disk`, as Parquet files in a folder, or by name from the hub."""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpp.data.sources.base import SourceError, Split, check_index, checked_labels, numbered_classes, summary
from mpp.data.sources.files import Outside, file_size, read_file, within
from mpp.data.sources.hub_dataset import OpenedDataset
from mpp.data.sources.names import printable
from mpp.data.sources.specs import spec_of

if TYPE_CHECKING:
    from datasets import Dataset

_IMAGES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "bytes")
_LABELS = ("label", "labels", "class", "target", "fine_label")


class HubSource:
    """Images in a memory-mapped Arrow table.

    Args:
        name: the string it was opened with.
        dataset: of Hugging Face's `datasets`.
        column: of the images: encoded bytes, or a struct with `bytes` and `path`.
        folders: those that a path may lead into; relative ones start from the first.
        files: those that the rows lie in, with how many there are in each; one alone may be any name.
        labels: one an image, -1 for none; None: unlabelled.
        classes: class names; None: unlabelled.
        note: what `describe` adds.
    """

    def __init__(
        self,
        name: str,
        dataset: "Dataset",
        column: str,
        folders: Sequence[Path],
        files: Sequence[tuple[str, int]],
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
        note: str = "",
    ) -> None:
        self.name, self.folders, self.classes, self.note = name, tuple(map(str, folders)), classes, note
        self._dataset, self._name, self._labels = dataset, column, labels
        self._files = tuple(name for name, _ in files)
        self._starts = np.cumsum([0, *(rows for _, rows in files[:-1])])
        self._column = dataset.data.column(column)  # six times as fast as dataset[index]

    def __getstate__(self) -> dict[str, Any]:
        # A dataset pickles as the path of its file, a column as all its bytes.
        return {**self.__dict__, "_column": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._column = self._dataset.data.column(self._name)

    def __len__(self) -> int:
        return len(self._column)

    def _stated(self, index: int) -> tuple[bool, str]:
        """Whether a row holds an image's bytes, and the path that it states beside them or instead, or ""."""
        held: Any = self._column[check_index(index, len(self))]
        if not hasattr(held, "keys"):
            return held.is_valid, ""
        path = held["path"].as_py() if held.is_valid and "path" in held.keys() else ""  # noqa: SIM118
        return held.is_valid and held["bytes"].is_valid, path or ""

    def file_of(self, index: int) -> str | None:
        """The file that a row names; None where its bytes are in the table."""
        has_bytes, path = self._stated(index)
        return None if has_bytes or not path else os.path.join(self.folders[0], path)  # noqa: PTH118

    def inside(self, path: str) -> bool:
        """Whether a path that the table names may be read: the data set may be anybody's, the disk is not."""
        return within(path, self.folders)

    def where(self, index: int) -> str:
        """The file that the row names; else the row, of which file, and what it calls its image."""
        named, (_, called) = self.file_of(index), self._stated(index)
        if named is not None:
            return named
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = f"row {index - int(self._starts[file])} of {self._files[file]}"
        return f"{row} ({called})" if called else row

    def size(self, index: int) -> int:
        """The bytes in the table, or of the file that the row names."""
        import pyarrow as pa

        held: Any = self._column[check_index(index, len(self))]
        data = held["bytes"] if pa.types.is_struct(held.type) else held
        if data.is_valid:
            return data.as_buffer().size
        path = self.file_of(index)
        return file_size(path) if path is not None and self.inside(path) else 0

    def read(self, index: int) -> tuple[bytes, int | None]:
        """The image's bytes, from the table or from the file that it names, and the label.

        Raises:
            Outside: the file lies outside the data set's folder.
            OSError: there are none, or the file cannot be read.
        """
        held = self._column[check_index(index, len(self))].as_py()
        label = -1 if self._labels is None else int(self._labels[index])
        data = held.get("bytes") if isinstance(held, dict) else held
        if data is None:
            path = self.file_of(index)
            if path is None:
                raise OSError(f"{printable(self.where(index))} holds neither bytes nor a path")
            if not self.inside(path):
                stated = printable(str(held["path"]))
                raise Outside(f"row {index} of {self.name} names {stated}, outside of the data set, and is not read")
            data = read_file(path)
        return data, None if label < 0 else label

    def labels(self) -> np.ndarray | None:
        """int64 (len,), -1 where an image has none, or None."""
        return self._labels

    def describe(self) -> str:
        """One line: count, classes, which split and what was left aside."""
        return summary(len(self), self.classes, self.note)

    @property
    def arrow_fingerprint(self) -> str:
        """What `datasets` calls the table's content."""
        return str(self._dataset._fingerprint)

    def sizes(self) -> np.ndarray:
        """Encoded bytes of each image, without reading them: int64 (len,), -1 where they lie in a file."""
        import pyarrow as pa

        pc: Any = import_module("pyarrow.compute")

        column: Any = self._column
        data = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
        return np.asarray(pc.fill_null(pc.cast(pc.binary_length(data), pa.int64()), -1).to_numpy())


def open_hub(opened: OpenedDataset, split: Split = "train") -> HubSource:
    """A saved dataset, a folder of Parquet files, or a dataset of the Hugging Face hub.

    Images are the column of type Image, or one of bytes called image, img and the like; labels the column of type
    ClassLabel, or one of whole numbers or names called label, class and the like.

    Raises:
        SourceError: nothing there or readable, or no column that must be the images.
    """
    spec = opened.spec
    names = opened.names()
    chosen = opened.asked or names.get(split) or ("train" if "train" in opened.splits else "")
    if not chosen and len(opened.splits) > 1:
        held = ", ".join(opened.splits)
        raise SourceError(
            f"{spec}: has the splits {held} and none called train; write {spec_of('hf', opened.place)}:SPLIT"
        )
    part = chosen or next(iter(opened.splits), "")
    dataset, files = opened.dataset(part), opened.files(part)
    if sum(rows for _, rows in files) != len(dataset):  # of the hub, or in another order
        files = [(f"the split {chosen} of {spec}" if chosen and not opened.asked else spec, len(dataset))]
    if not len(dataset):
        raise SourceError(f"{spec}: {opened.place} has no rows{f' in {chosen}' if chosen else ''}; check it")
    image = _image_column(spec, dataset.features)
    notes = [f"the split {chosen} alone"] if len(opened.splits) > 1 else []
    label, aside = _label_column(dataset.features)
    notes += [aside] if aside else []
    labels, classes = None, None
    if label:
        train = opened.dataset(names["train"]) if names and split == "test" else None
        labels, classes = _labels(spec, dataset, train, label)
        if labels is not None and (missing := int((labels < 0).sum())):
            notes.append(f"{missing:,} without a label")
    return HubSource(spec, dataset, image, opened.folders(), files, labels, classes, "; ".join(notes))


def _image_column(spec: str, features: Mapping[str, Any]) -> str:
    from datasets import Image

    def holds_bytes(feature: Any) -> bool:
        # Parquet files that another program wrote have lost the type Image and kept its struct.
        feature = feature.get("bytes") if isinstance(feature, dict) else feature
        return getattr(feature, "dtype", "") in ("binary", "large_binary")

    fitting = [name for name, feature in features.items() if isinstance(feature, Image)]
    if len(fitting) != 1:
        among = fitting or [name for name, feature in features.items() if holds_bytes(feature)]
        fitting = [name for name in among if name.lower() in _IMAGES][:1]
    if not fitting:
        held = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
        raise SourceError(f"{spec}: which column are the images? It holds {held}; call one of type Image 'image'")
    return fitting[0]


def _kind(feature: Any) -> str:
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


def _label_column(features: Mapping[str, Any]) -> tuple[str, str]:
    """The column of the labels or "", and a note where it is not clear which it is."""
    from datasets import ClassLabel

    fitting = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(fitting) == 1:
        return fitting[0], ""
    plain = [name for name, feature in features.items() if _kind(feature).startswith(("int", "uint", "string"))]
    plain += [name for name, feature in features.items() if _kind(feature) == "large_string"]
    named = [name for known in _LABELS for name in fitting or plain if name.lower() == known]
    if fitting and not named:
        return "", f"labels left aside, for {' and '.join(fitting)} could each be it"
    return (named[0] if named else ""), ""


def _labels(
    spec: str, dataset: "Dataset", train: "Dataset | None", column: str
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """int64 labels, -1 for none, and the classes: those of `train` first, where it is given."""
    import pyarrow as pa

    pc: Any = import_module("pyarrow.compute")

    values: Any = dataset.data.column(column)
    before: Any = train.data.column(column) if train is not None else values[:0]
    if pa.types.is_integer(values.type):
        name = f"{spec}, column {column}"
        largest = max(int(pc.max(each).as_py() or 0) for each in (before, values))
        names = getattr(dataset.features[column], "names", None)
        names = numbered_classes(name, largest, len(before) + len(values)) if names is None else tuple(names)
        labels = values.cast(pa.int64()).fill_null(-1).to_numpy()
        return checked_labels(name, labels, len(labels), names)
    known, own = ({*pc.unique(each).to_pylist()} - {None, ""} for each in (before, values))
    names = (*sorted(known), *sorted(own - known))
    found = pc.index_in(values, value_set=pa.array(names, type=values.type))
    return checked_labels(spec, found.cast(pa.int64()).fill_null(-1).to_numpy(), len(values), names)
