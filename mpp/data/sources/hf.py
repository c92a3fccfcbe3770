"""Rows of a Hugging Face dataset: images, labels, and the columns that they are in."""

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpp.data.sources.base import ClassNames, Placement, Source, SourceError, spread
from mpp.data.sources.files import Outside, file_places, file_size, file_state, read_file, within
from mpp.data.sources.in_memory import checked_labels, numbered_classes
from mpp.data.sources.names import LABEL_COLUMNS, folded, printable

if TYPE_CHECKING:
    from datasets import Dataset

_IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "bytes")


def _compute() -> Any:
    """pyarrow.compute, which makes its functions when it is imported: type checkers know none of them."""
    return import_module("pyarrow.compute")


class HfSource(Source):
    """Images in a memory-mapped Arrow table.

    Args:
        name: the string it was opened with.
        dataset: of Hugging Face's `datasets`.
        column: of the images: encoded bytes, or a struct with `bytes` and `path`.
        folders: those that a path may lead into; relative ones start from the first.
        labels, classes, note: as of every source.
    """

    _kind = "HubSource"

    def __init__(
        self,
        name: str,
        dataset: "Dataset",
        column: str,
        folders: Sequence[Path],
        labels: np.ndarray | None,
        classes: ClassNames,
        note: str,
    ) -> None:
        super().__init__(name, labels, classes, note)
        self._dataset, self._column, self._folders = dataset, column, tuple(map(str, folders))
        self._bytes, self._paths = self._arrow_columns()

    def _arrow_columns(self) -> tuple[Any, Any]:
        """The images' bytes, and their paths or None; six times as fast as dataset[index]."""
        import pyarrow as pa

        column: Any = self._dataset.data.column(self._column)
        if not pa.types.is_struct(column.type):
            return column, None
        names = [field.name for field in column.type]
        paths = _compute().struct_field(column, "path") if "path" in names else None
        return _compute().struct_field(column, "bytes"), paths

    def __getstate__(self) -> dict[str, Any]:
        # A dataset pickles as the path of its file, a column as all its bytes.
        return {**vars(self), "_bytes": None, "_paths": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._bytes, self._paths = self._arrow_columns()

    def __len__(self) -> int:
        return len(self._bytes)

    def _path(self, index: int) -> str:
        """The path that a row states beside its bytes or instead of them, or ""."""
        return (self._paths[index].as_py() or "") if self._paths is not None else ""

    def _file(self, index: int) -> str:
        """The file that a row names; "" where its bytes are in the table, or it names none."""
        path = "" if self._bytes[index].is_valid else self._path(index)
        return os.path.join(self._folders[0], path) if path else ""  # noqa: PTH118

    def _inside(self, path: str) -> bool:
        """Whether a path that the table names may be read: the data set may be anybody's, the disk is not."""
        return bool(path) and within(path, self._folders)

    def location(self, index: int) -> str:
        """The file that the row names; else the row, and the name that it has for its image."""
        row, path = super().location(index).replace("image", "row", 1), self._path(index)
        return self._file(index) or (f"{row} ({path})" if path else row)

    def size(self, index: int) -> int:
        data: Any = self._bytes[index]
        path = self._file(index)
        return data.as_buffer().size if data.is_valid else file_size(path) if self._inside(path) else 0

    def image(self, index: int) -> bytes:
        """The image's bytes, from the table or from the file that it names; Outside where that lies elsewhere."""
        data = self._bytes[index].as_py()
        if data is not None:
            return data
        path = self._file(index)
        if not path:
            raise OSError(f"{printable(self.location(index))} holds neither bytes nor a path")
        if not self._inside(path):
            named = printable(self._path(index))
            raise Outside(f"row {index} of {self.name} names {named}, outside of the data set, and is not read")
        return read_file(path)

    def sizes(self) -> np.ndarray:
        """Encoded bytes of each image, without reading them: int64 (len,), -1 where they lie in a file."""
        import pyarrow as pa

        pc = _compute()
        return np.array(pc.fill_null(pc.cast(pc.binary_length(self._bytes), pa.int64()), -1))

    def placement(self, indices: np.ndarray) -> Placement:
        table, sizes = self._dataset._fingerprint, self.sizes()[indices]
        places = np.array([hash((table, index)) for index in indices.tolist()], dtype=np.int64)
        in_files = np.flatnonzero(sizes < 0)
        paths = [self._file(index) for index in indices[in_files].tolist()]
        places[in_files], sizes[in_files] = file_places([path if self._inside(path) else "" for path in paths])
        return super().placement(indices)._replace(place=places, size=sizes)

    def _fingerprint_parts(self, times: bool, most: int | None, labelled: bool) -> Iterator[str | bytes]:
        sizes = self.sizes()
        yield str(self._dataset._fingerprint) if times else sizes.astype("<i8").tobytes()
        for index in spread(np.flatnonzero(sizes < 0), most):
            path = self._file(index)
            yield path if times else os.path.basename(path)  # noqa: PTH119
            yield file_state(path, times) if self._inside(path) else "outside"


def image_column(spec: str, features: Mapping[str, Any]) -> str:
    """The column of type Image, or one of bytes called image, img and the like.

    Raises SourceError: it is not clear which.
    """
    from datasets import Image

    def holds_bytes(feature: Any) -> bool:
        # Parquet files that another program wrote have lost the type Image and kept its struct.
        feature = feature.get("bytes") if isinstance(feature, dict) else feature
        return getattr(feature, "dtype", "") in ("binary", "large_binary")

    typed = [name for name, feature in features.items() if isinstance(feature, Image)]
    if len(typed) == 1:
        return typed[0]
    among = typed or [name for name, feature in features.items() if holds_bytes(feature)]
    if named := [name for name in among if name.lower() in _IMAGE_COLUMNS]:
        return named[0]
    columns = ", ".join(f"{name} ({_type(feature)})" for name, feature in features.items())
    raise SourceError(f"{spec}: which column are the images? It holds {columns}; call one of type Image 'image'")


def _type(feature: Any) -> str:
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


def label_column(features: Mapping[str, Any]) -> tuple[str, str]:
    """The column of type ClassLabel, or of numbers or names called label, class and the like, or ""; and a note where
    it is not clear which it is."""
    typed = [name for name, feature in features.items() if _type(feature) == "ClassLabel"]
    if len(typed) == 1:
        return typed[0], ""
    plain = ("int", "uint", "string", "large_string")
    among = typed or [name for name, feature in features.items() if _type(feature).startswith(plain)]
    named = [name for known in LABEL_COLUMNS for name in among if folded(name) == known]
    if typed and not named:
        return "", f"labels left aside, for {' and '.join(typed)} could each be it"
    return (named[0] if named else ""), ""


def read_labels(
    spec: str, dataset: "Dataset", train: "Dataset | None", column: str
) -> tuple[np.ndarray | None, ClassNames]:
    """int64 labels, -1 for none, and the classes: those of `train` first, where it is given."""
    import pyarrow as pa

    pc = _compute()
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
