"""Where the images of a tar file lie: an index that is made once and kept, in the cache or beside the tar.

WebDataset naming: a sample's key is its members' path up to the first dot of the base name; an image member gives the
picture, `.cls` (ASCII digits) or `.json` ({"label": 3}) the label. Where what follows the first dot is no known ending,
as in `cam.0001.jpg`, the key goes up to the last dot, so that no picture is lost: `a.left.jpg` and `a.right.jpg` are
two images, whose label may be `a.cls` or their own. Only beside `a.jpg` is `a.mask.png` a field of the same sample, and
ignored. `a.jpg.json` is the label of `a.jpg`. Names are never paths of this machine: `/a/b.jpg` and `../b.jpg` are
as good as others.

The kept form is one block of bytes, little-endian: a header of 48 bytes (_HEADER: magic with the format's number, CRC32
of the rest, then images, ignored members, pictures among these, and the tar's size), the three columns one after the
other, and the name of an ignored member.
"""

import json
import re
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from mpp.data.sources.base import SourceError
from mpp.data.sources.files import read_file
from mpp.data.sources.names import IMAGE_EXTENSIONS, Ignored, is_hidden, is_image, is_picture
from mpp.system.files import write_whole

INDEX_FORMAT = 3
"""A new number makes the old indices be made again."""
BLOCK = 512
"""Members of a tar start at multiples of this."""
MAX_LABEL = 2**24
"""A larger number is an identifier of something, not a class."""
UNREADABLE = -2
"""In an index, the label of an image that has a `.cls` or `.json` of which none can be read."""
_LABELS = ("cls", "json")
_HEADER = struct.Struct("<8sQQQQQ")
_MAGIC = b"mpp idx%d" % INDEX_FORMAT
_BEFORE = b"mpp idx2"
"""Read, too, where it passed nothing over, as of every shard of ours: reading all of them anew may take a day."""
_MAX_SIZE = 2**32 - 1
_MAX_BESIDE = 2**20  # bytes of a .cls, a .json or a long name
_LONG = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class BrokenTar(Exception):
    """Not a tar, damaged or cut off: the text says how."""


@dataclass(frozen=True)
class TarIndex:
    """The images of one tar, in the order in which they lie in it.

    Args:
        blocks: uint32 (n,), where each image starts, in blocks of 512 bytes.
        sizes: uint32 (n,), in bytes.
        labels: int32 (n,), -1 where there is none, UNREADABLE where it cannot be read.
        ignored: members that are neither images nor labels, hidden, no plain files, or a second image of a key.
        tar_size: of the whole file, in bytes.
    """

    blocks: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    ignored: Ignored
    tar_size: int

    def to_bytes(self) -> bytes:
        """The kept form."""
        columns = (self.blocks.astype("<u4"), self.sizes.astype("<u4"), self.labels.astype("<i4"))
        example = self.ignored.example.encode("utf-8", "surrogateescape")
        rest = b"".join([*(column.tobytes() for column in columns), example])
        counts = struct.pack("<QQQQ", len(self.blocks), self.ignored.number, self.ignored.pictures, self.tar_size)
        return struct.pack("<8sQ", _MAGIC, zlib.crc32(counts + rest)) + counts + rest

    @staticmethod
    def from_bytes(data: bytes, tar_size: int) -> "TarIndex | None":
        """Back from the kept form; None where it is damaged, of another format or tar, or says what cannot be.

        An index that lies beside somebody's shard is no more to be trusted than the shard.
        """
        if len(data) < _HEADER.size:
            return None
        magic, checksum, number, ignored, pictures, size = _HEADER.unpack_from(data)
        if magic != _MAGIC and (magic != _BEFORE or ignored or pictures):
            return None
        end = _HEADER.size + 12 * number
        if size != tar_size or not end <= len(data) <= end + _MAX_BESIDE or zlib.crc32(data[16:]) != checksum:
            return None
        starts = [_HEADER.size + 4 * number * column for column in range(3)]
        dtypes = ("<u4", "<u4", "<i4")
        columns = [np.frombuffer(data, dtype, number, start) for dtype, start in zip(dtypes, starts, strict=True)]
        blocks, sizes, labels = columns
        if number and (
            int((blocks.astype(np.int64) * BLOCK + sizes).max()) > size
            or not UNREADABLE <= int(labels.min()) <= int(labels.max()) < MAX_LABEL
        ):
            return None
        example = data[end:].decode("utf-8", "surrogateescape")
        return TarIndex(blocks, sizes, labels, Ignored(ignored, pictures, example), size)


def sidecar_name(shard: str) -> str:
    """Path or URL of the index that lies beside a shard; of a URL, the query stays at the end."""
    address, mark, query = shard.partition("?") if "://" in shard else (shard, "", "")
    return f"{address}.index{mark}{query}"


def write_sidecar(shard: Path) -> Path:
    """Indexes a .tar and writes `<shard>.index` beside it, which saves every later run from indexing it.

    Returns:
        The path of the index.

    Raises:
        SourceError: not a complete tar file.
        OSError: the index cannot be written.
    """
    path = Path(sidecar_name(str(shard)))
    data = index_tar(shard).to_bytes()
    write_whole(path, lambda file: file.write(data))
    return path


def index_tar(shard: Path) -> TarIndex:
    """The index of a local .tar.

    Raises:
        SourceError: unreadable, or not a complete tar file.
    """
    try:
        with shard.open("rb") as file:
            return build_index(file, shard.stat().st_size)
    except (BrokenTar, OSError) as error:
        raise SourceError(f"{shard} is not a complete tar file ({error}); make it again") from error


def load_index(path: Path, tar_size: int) -> TarIndex | None:
    """The kept index; None where it is missing, unreadable, damaged or of another file."""
    try:
        return TarIndex.from_bytes(read_file(str(path)), tar_size)
    except OSError:
        return None


def build_index(file: BinaryIO, tar_size: int) -> TarIndex:
    """Reads every header of an uncompressed tar, and the few bytes of the labels.

    Raises:
        BrokenTar: not a tar, damaged, or cut off.
        OSError: a read failed.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as tar:
            index = _index(tar, tar_size)
            file.seek(tar.offset)  # type: ignore[attr-defined]
            if file.read(BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise BrokenTar(f"no header at byte {tar.offset}")  # type: ignore[attr-defined]
            return index
    except SourceError:  # a ValueError, but from the network
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise BrokenTar(str(error) or type(error).__name__) from error


class _Member(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _LONG and not 0 <= member.size <= _MAX_BESIDE:  # it would be read into memory, whatever it is
            raise tarfile.ReadError(f"a name of {member.size:,} bytes")
        return member


def _index(tar: tarfile.TarFile, tar_size: int) -> TarIndex:
    images: dict[str, tuple[str, int, int]] = {}  # by key: the key up to the first dot, block, size
    endings: dict[str, str] = {}
    labels: dict[str, int] = {}
    ignored = Ignored()
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else every header of a large shard stays in memory
        if member.size < 0:  # the next header would be one that was read before
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        if member.isdir():
            continue
        short, key, extension = _split_name(member.name)
        hidden = any(is_hidden(part) for part in member.name.split("/") if part not in (".", ".."))
        if not member.isreg() or member.issparse() or member.size > _MAX_SIZE or hidden:
            ignored.add(member.name, not hidden and is_picture(member.name))
        elif is_image(f".{extension}") and key not in images:
            images[key] = (short, member.offset_data // BLOCK, member.size)
            endings[key] = extension
        elif extension in _LABELS:
            held = tar.extractfile(member) if member.size <= _MAX_BESIDE else None
            label = _label(extension, held.read()) if held else UNREADABLE
            known = labels.get(key, -1)
            if label >= 0 and (extension == "cls" or known < 0):
                labels[key] = label
            elif label < 0 and known < 0:
                labels[key] = min(label, known)
        else:
            ignored.add(member.name, is_picture(member.name))
    for key in [key for key, (short, _, _) in images.items() if key != short and short in images]:
        del images[key]
        ignored.add(f"{key}.{endings[key]}", True)
    rows = [(block, size) for _, block, size in images.values()]
    places = np.array(rows, dtype=np.uint32).reshape(-1, 2)
    known = [_first_label([key, f"{key}.{endings[key]}", short], labels) for key, (short, _, _) in images.items()]
    order = np.argsort(places[:, 0])
    found = np.array(known, dtype=np.int32)[order]
    return TarIndex(places[order, 0], places[order, 1], found, ignored, tar_size)


def _split_name(name: str) -> tuple[str, str, str]:
    """Of a member, the path up to the first dot of the base name, the key, and the ending in lower case."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    folder = "/" * name.startswith("/") + "".join(f"{part}/" for part in parts[:-1])
    base = parts[-1] if parts else ""
    short, _, extension = base.partition(".")
    key = short
    if extension.lower() not in (*IMAGE_EXTENSIONS, *_LABELS) and "." in extension:
        key, _, extension = base.rpartition(".")
    return folder + short, folder + key, extension.lower()


def _first_label(names: list[str], labels: dict[str, int]) -> int:
    """The label of the first name that has one; else UNREADABLE where one of them could not be read."""
    held = [labels[name] for name in names if name in labels]
    return next((label for label in held if label >= 0), min(held, default=-1))


def _label(extension: str, data: bytes) -> int:
    """The label in a .cls or .json member, -1 for a .json that has none and where it says so, or UNREADABLE."""
    try:
        if extension == "json":
            held = json.loads(data)
        else:
            held = int(data) if re.fullmatch(rb"\s*-?[0-9]+\s*", data) else None  # int takes other digits, too
    except (ValueError, RecursionError):
        return UNREADABLE
    if extension == "json":
        held = held.get("label", -1) if isinstance(held, dict) else -1
        held = -1 if held is None else held
    return held if type(held) is int and -1 <= held < MAX_LABEL else UNREADABLE
