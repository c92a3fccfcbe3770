"""Files of features: .npz, .parquet or .csv, a row an image, written piece by piece so that memory stays small.

columns   features, name, label ("" for none, `;` between several), split, index (the image's number within its split)
settings  JSON: which weights made them, how, and of which images; .csv has none
"""

import csv
import functools
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from mpp.data.sources.names import printable
from mpp.errors import UserError, install
from mpp.system.files import write_whole

_AT_ONCE = 4096  # rows


class Record(NamedTuple):
    """An image: its name, such as its path, its class (several: `;` between), its split, and its number within that."""

    name: str
    label: str
    split: str
    index: int


@dataclass(frozen=True)
class Rows:
    """What is written: features of `number` images in `pieces` (b, *shape) of `dtype`, and a record of each."""

    number: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pieces: Callable[[], Iterable[np.ndarray]]
    records: Callable[[], Iterable[Record]]
    settings: dict[str, Any]


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """Features of images as they were written, row by row."""

    features: Float[np.ndarray, "n *shape"]
    names: list[str]
    labels: list[str]
    splits: list[str]
    indices: Int64[np.ndarray, " n"]
    settings: dict[str, Any]
    """Which weights made them, how, and of which images."""

    def record(self, row: int) -> Record:
        """The image of a row."""
        return Record(self.names[row], self.labels[row], self.splits[row], int(self.indices[row]))


def check_writable(path: Path) -> None:
    """Raises UserError where the package that files of this ending need is missing."""
    if path.suffix == ".parquet":
        _parquet(str(path))


def write_features(path: Path, rows: Rows) -> None:
    """Writes a file of features, of the kind that its ending says; it appears whole. Raises OSError."""
    write = {".npz": _write_npz, ".parquet": _write_parquet, ".csv": _write_csv}[path.suffix]
    write_whole(path, functools.partial(write, rows), sync=True)


def _write_npz(rows: Rows, file: BinaryIO) -> None:
    """As numpy.savez would, whose arrays must be in memory."""
    longest = [1, 1, 1]
    for record in rows.records():
        longest = list(map(max, longest, map(len, record[:3])))
    with zipfile.ZipFile(file, "w") as archive:

        def column(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(member, header)
                for piece in pieces:
                    member.write(np.ascontiguousarray(piece, dtype=dtype).reshape(-1).view(np.uint8).data)

        column("features", rows.dtype, (rows.number, *rows.shape), rows.pieces())
        for position, (name, length) in enumerate(zip(("name", "label", "split"), longest, strict=True)):
            values = (record[position] for record in rows.records())
            dtype = np.dtype(f"<U{length}")
            column(name, dtype, (rows.number,), (np.array(some, dtype=dtype) for some in _some(values)))
        numbers = (record.index for record in rows.records())
        column("index", np.dtype("<i8"), (rows.number,), (np.array(some) for some in _some(numbers)))
        text = np.array(json.dumps(rows.settings))
        column("settings", text.dtype, (), [text])


def _write_parquet(rows: Rows, file: BinaryIO) -> None:
    arrow, parquet = _parquet("")
    (width,) = rows.shape
    features = arrow.list_(arrow.from_numpy_dtype(rows.dtype), width)
    texts = [(name, arrow.string()) for name in ("name", "label", "split")]
    schema = arrow.schema(
        [*texts, ("index", arrow.int64()), ("features", features)], metadata={"settings": json.dumps(rows.settings)}
    )
    records = iter(rows.records())
    with parquet.ParquetWriter(file, schema) as writer:
        for piece in rows.pieces():
            of = [next(records) for _ in range(len(piece))]
            columns = [arrow.array(map(printable, texts), arrow.string()) for texts in list(zip(*of, strict=True))[:3]]
            columns += [arrow.array([record.index for record in of], arrow.int64())]
            values = arrow.array(np.ascontiguousarray(piece).reshape(-1))
            columns += [arrow.FixedSizeListArray.from_arrays(values, width)]
            writer.write_table(arrow.Table.from_arrays(columns, schema=schema))


def _write_csv(rows: Rows, file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow((*Record._fields, *(f"f{number}" for number in range(rows.shape[0]))))
    records = iter(rows.records())
    for piece in rows.pieces():
        # The fewest digits that give the same number again.
        table.writerows((*next(records), *map(str, row)) for row in piece)
    text.detach()


def read_features(path: str | Path) -> FeatureFile:
    """Reads an .npz or .parquet that the embed tool has written. Raises UserError for anything else."""
    path = Path(path).expanduser()
    if path.suffix == ".csv":
        raise UserError(
            f"{path}: a .csv of features is for other programs; embed to an .npz or a .parquet to read them"
        )
    try:
        return _read_parquet(path) if path.suffix == ".parquet" else _read_npz(path)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no file of features {path}") from error
    except Exception as error:  # whatever is wrong with it
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is no file of features that embed has written ({reason})") from error


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings of a file of features, without its features; None of a .csv, which has none. Raises as above."""
    if path.suffix == ".csv":
        return None
    try:
        if path.suffix == ".parquet":
            return json.loads(_parquet(str(path))[1].read_schema(path).metadata[b"settings"])
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return json.loads(str(arrays["settings"]))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is no file of features that embed has written; give another --out") from error


def _read_npz(path: Path) -> FeatureFile:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        names, labels, splits = (arrays[name].tolist() for name in ("name", "label", "split"))
        settings = json.loads(str(arrays["settings"]))
        return FeatureFile(arrays["features"], names, labels, splits, arrays["index"], settings)


def _read_parquet(path: Path) -> FeatureFile:
    _, parquet = _parquet(str(path))
    table = parquet.read_table(path)
    features = table["features"].combine_chunks()
    features = features.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    names, labels, splits = (table[name].to_pylist() for name in ("name", "label", "split"))
    settings = json.loads(table.schema.metadata[b"settings"])
    return FeatureFile(features, names, labels, splits, table["index"].to_numpy(), settings)


def _parquet(name: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{name}: .parquet needs pyarrow: {install('parquet')}; or take .npz") from error
    return pyarrow, pyarrow.parquet


def _some(values: Iterable[Any]) -> Iterator[list[Any]]:
    """The values in lists of at most _AT_ONCE."""
    some: list[Any] = []
    for value in values:
        some.append(value)
        if len(some) == _AT_ONCE:
            yield some
            some = []
    if some:
        yield some
