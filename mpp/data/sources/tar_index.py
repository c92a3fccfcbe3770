"""The index of a tar file: where each image lies in it; made once, and stored in the cache or beside the tar.

WebDataset naming: a sample's key is its members' path up to the first dot of the base name; an image member gives the
picture, `.cls` (ASCII digits) or `.json` ({"label": 3}) the label. Where no known ending follows the first dot, as in
`cam.0001.jpg`, the key goes up to the last dot, so that no picture is lost: `a.left.jpg` and `a.right.jpg` are two
images, whose label may be `a.cls` or their own. Only beside `a.jpg` is `a.mask.png` a field of the same sample, and
ignored. `a.jpg.json` is the label of `a.jpg`. Of `a.dcm` and `a.jpg` the latter is the picture, as nothing must be
installed to read it; else the first. Names are never paths of this machine: `/a/b.jpg` and `../b.jpg` are
as good as others.

The stored form is one block of bytes, little-endian: a header of 48 bytes (_HEADER: magic with the format's number,
CRC32 of the rest, then images, ignored members, pictures among these, and the tar's size), the three columns one after
the other, and the name of an ignored member.
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
from mpp.data.sources.names import EXTRA_OF, IMAGE_EXTENSIONS, Ignored, is_hidden, is_image, is_picture
from mpp.system.files import write_whole

INDEX_FORMAT = 4
"""Of the stored form; a new number makes the old indices be made again."""
BLOCK = 512
"""Members of a tar start at multiples of this."""
MAX_LABEL = 2**24
"""A larger number is an identifier of something, not a class."""
UNREADABLE = -2
"""In an index, the label of an image that has a `.cls` or `.json` of which none can be read."""
_LABELS = ("cls", "json")
_HEADER = struct.Struct("<8sQQQQQ")
_MAGIC = b"mpp idx%d" % INDEX_FORMAT
_BEFORE = (b"mpp idx2", b"mpp idx3")
"""Read, too, where no picture was ignored, as of every shard of ours: making all indices again may take a day."""
_MAX_SIZE = 2**32 - 1
_MAX_BESIDE = 2**20  # bytes of a .cls, a .json or a long name
_LONG = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class BrokenTar(Exception):
    """Not a tar, damaged or cut off: the text says how."""


@dataclass(frozen=True)
class TarIndex:
    """The images of one tar, in the order in which they lie in it."""

    blocks: np.ndarray
    """uint32 (n,), where each image starts, in blocks of 512 bytes."""
    sizes: np.ndarray
    """uint32 (n,), in bytes."""
    labels: np.ndarray
    """int32 (n,), -1 where there is none, UNREADABLE where it cannot be read."""
    ignored: Ignored
    """Members that are neither images nor labels, hidden, no plain files, or a second image of a key."""
    tar_size: int
    """Of the whole file, in bytes."""

    def to_bytes(self) -> bytes:
        """The stored form."""
        columns = (self.blocks.astype("<u4"), self.sizes.astype("<u4"), self.labels.astype("<i4"))
        example = self.ignored.example.encode("utf-8", "surrogateescape")
        rest = b"".join([*(column.tobytes() for column in columns), example])
        counts = struct.pack("<QQQQ", len(self.blocks), self.ignored.number, self.ignored.pictures, self.tar_size)
        return struct.pack("<8sQ", _MAGIC, zlib.crc32(counts + rest)) + counts + rest

    @staticmethod
    def from_bytes(data: bytes, tar_size: int) -> "TarIndex | None":
        """Back from the stored form; None where it is damaged, of another format or tar, or says what cannot be.

        An index that lies beside somebody's shard is no more to be trusted than the shard.
        """
        if len(data) < _HEADER.size:
            return None
        magic, checksum, number, ignored, pictures, size = _HEADER.unpack_from(data)
        if magic != _MAGIC and (magic not in _BEFORE or pictures or (magic == _BEFORE[0] and ignored)):
            return None
        end = _HEADER.size + 12 * number
        if size != tar_size or not end <= len(data) <= end + _MAX_BESIDE or zlib.crc32(data[16:]) != checksum:
            return None
        blocks, sizes = np.frombuffer(data, "<u4", 2 * number, _HEADER.size).reshape(2, number)
        labels = np.frombuffer(data, "<i4", number, end - 4 * number)
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
    """Indexes a .tar and writes `<shard>.index` beside it, for every later run; gives the path of the index.

    Raises:
        SourceError: not a complete tar file.
        OSError: the index cannot be written.
    """
    path = Path(sidecar_name(str(shard)))
    write_whole(path, index_tar(shard).to_bytes())
    return path


def index_tar(shard: Path) -> TarIndex:
    """The index of a local .tar. Raises SourceError: unreadable, or not a complete tar file."""
    try:
        with shard.open("rb") as file:
            return build_index(file, shard.stat().st_size)
    except (BrokenTar, OSError) as error:
        raise SourceError(f"{shard} is not a complete tar file ({error}); make it again") from error


def load_index(path: Path, tar_size: int) -> TarIndex | None:
    """A stored index; None where it is missing, unreadable, damaged or of another file."""
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
        elif is_image(f".{extension}") and (
            key not in images or (endings[key] in EXTRA_OF and extension in IMAGE_EXTENSIONS)
        ):
            if key in images:
                ignored.add(f"{key}.{endings[key]}", True)
            images[key] = (short, member.offset_data // BLOCK, member.size)
            endings[key] = extension
        elif extension in _LABELS:
            file = tar.extractfile(member) if member.size <= _MAX_BESIDE else None
            label = _label(extension, file.read()) if file else UNREADABLE
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
    rows = list[tuple[int, int, int]]()
    for key, (short, block, size) in images.items():
        known = [labels[name] for name in (key, f"{key}.{endings[key]}", short) if name in labels]
        # The first that can be read.
        rows.append((block, size, next((label for label in known if label >= 0), min(known, default=-1))))
    blocks, sizes, found = np.array(sorted(rows), dtype=np.int64).reshape(-1, 3).T
    return TarIndex(blocks.astype(np.uint32), sizes.astype(np.uint32), found.astype(np.int32), ignored, tar_size)


def _split_name(name: str) -> tuple[str, str, str]:
    """The path of a member up to the first dot of the base name, the key, and the ending in lower case."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    folder = "/" * name.startswith("/") + "".join(f"{part}/" for part in parts[:-1])
    base = parts[-1] if parts else ""
    short, _, extension = base.partition(".")
    key = short
    if extension.lower() not in (*IMAGE_EXTENSIONS, *EXTRA_OF, *_LABELS) and "." in extension:
        key, _, extension = base.rpartition(".")
    return folder + short, folder + key, extension.lower()


def _label(extension: str, data: bytes) -> int:
    """The label in a .cls or .json member, -1 for a .json that has none and where it says so, or UNREADABLE."""
    try:
        if extension == "json":
            content = json.loads(data)
            label = content.get("label") if isinstance(content, dict) else None
            label = -1 if label is None else label
        else:
            label = int(data) if re.fullmatch(rb"\s*-?[0-9]+\s*", data) else None  # int takes other digits, too
    except (ValueError, RecursionError):
        return UNREADABLE
    return label if type(label) is int and -1 <= label < MAX_LABEL else UNREADABLE
