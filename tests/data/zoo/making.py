"""What the files are made with."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from mpp.data.settings import DecodeOptions

COLOURS = ((255, 0, 0), (0, 200, 0), (0, 0, 255), (255, 255, 255))
GREYS = (76, 117, 29, 255)
"""Their luma."""
HIGH, WIDE = 32, 48
Corners = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One file and what must become of it."""

    name: str
    """As a file of it would be called."""
    make: Callable[[], bytes]
    size: tuple[int, int] = (HIGH, WIDE)
    """Height and width, where it loads."""
    corners: Corners = ()
    """Colours at top left, top right, bottom left, bottom right; (): not looked at."""
    within: int = 2
    """Of those colours, grey levels."""
    kind: str = ""
    """The kind of BadImage; empty where it loads."""
    reading: DecodeOptions = DecodeOptions()


def quadrants(colours: Corners = COLOURS, dtype: Any = np.uint8, height: int = HIGH, width: int = WIDE) -> np.ndarray:
    """(height, width, C), or (height, width) for numbers: each quarter in one colour."""
    corners = np.array(colours, dtype=dtype).reshape(2, 2, -1)
    image = corners.repeat(height // 2, axis=0).repeat(width // 2, axis=1)
    return image if np.ndim(colours) > 1 else image[:, :, 0]


def encoded(image: np.ndarray | Image.Image, container: str, **options: Any) -> bytes:
    """By Pillow."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, container, **options)
    return buffer.getvalue()


def tiff(image: np.ndarray, **options: Any) -> bytes:
    """By tifffile."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, **options)
    return buffer.getvalue()


def npy(image: np.ndarray) -> bytes:
    """By NumPy."""
    buffer = io.BytesIO()
    np.save(buffer, image)
    return buffer.getvalue()


def npy_of(header: str, values: bytes = b"") -> bytes:
    """An .npy file with this text in its header."""
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + values


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2, between: bytes = b"") -> bytes:
    """A PNG of these filtered rows, whatever its header says."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + between + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(image: np.ndarray, between: bytes = b"") -> bytes:
    """uint16 (H, W, C) as PNG."""
    height, width, channels = image.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    return png(width, height, rows, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], between)


def tags(entries: dict[int, tuple[int, int, int]], body: bytes = b"", following: int = 0) -> bytes:
    """A TIFF of one directory: tag to type, count, value."""
    rows = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + struct.pack("<I", following) + body


def plain_tags(width: int = 8, height: int = 8, start: int = 200, held: int = 64) -> dict[int, tuple[int, int, int]]:
    """Of an uncompressed grey TIFF."""
    numbers = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: start, 277: 1, 278: height, 279: held}
    return {tag: (4, 1, value) for tag, value in numbers.items()}


def exif(orientation: int) -> Image.Exif:
    """With nothing else."""
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def replaced(data: bytes, place: int, new: bytes) -> bytes:
    """The same length."""
    return data[:place] + new + data[place + len(new) :]


def after(data: bytes, marker: bytes) -> int:
    """Where the marker ends."""
    return data.index(marker) + len(marker)


def noise(shape: tuple[int, ...] = (64, 64, 3)) -> np.ndarray:
    """uint8, always the same."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def smooth() -> Image.Image:
    """Soft colours, as of a photograph out of focus."""
    return Image.fromarray(noise((4, 6, 3))).resize((WIDE, HIGH), Image.Resampling.BICUBIC)


def picture(mode: str = "RGB") -> Image.Image:
    """The quadrants in a mode of Pillow's."""
    return Image.fromarray(quadrants()).convert(mode)


def glass(container: str, mode: str = "RGBA", **options: Any) -> bytes:
    """Red, half transparent, transparent, blue."""
    colours = ((255, 0, 0, 255), (0, 0, 0, 128), (9, 9, 9, 0), (0, 0, 255, 255))
    return encoded(Image.fromarray(quadrants(colours)).convert(mode), container, **options)


GLASS = ((255, 0, 0), (127, 127, 127), (255, 255, 255), (0, 0, 255))
SHADES = (0, 21845, 43690, 65535)
EIGHT = (0, 85, 170, 255)
SUN = tuple((0, 65535, value) for value in SHADES)
BANDS = tuple(tuple(round(65535 * (i + j) / 7) for j in range(5)) for i in range(4))
BANDS8 = tuple(tuple(round(255 * (i + j) / 7) for j in range(5)) for i in range(4))


EIGHT_GREYS = tuple((value,) * 3 for value in EIGHT)
LUMA = tuple((value,) * 3 for value in GREYS)
FINE: dict[str, Any] = {"quality": 95, "subsampling": 0}
"""Options of a JPEG that keep colours."""


def palette(**options: Any) -> bytes:
    """The quadrants with a palette."""
    image = picture().quantize(8)
    return encoded(image, options.pop("container", "PNG"), **options)


def resized_jpeg(width: int, height: int, channels: int | None = None) -> bytes:
    """A JPEG whose header says something else than its pixels."""
    data = encoded(picture(), "JPEG")
    place = after(data, b"\xff\xc0")
    data = replaced(data, place + 3, struct.pack(">HH", height, width))
    return data if channels is None else replaced(data, place + 7, bytes([channels]))


def text_png(kind: bytes, size: int) -> bytes:
    """A PNG whose text or profile chunk unpacks to so many bytes."""
    rows = b"".join(b"\0" + row.tobytes() for row in quadrants())
    head = b"icc\0\0" if kind == b"iCCP" else b"Comment\0\0"
    return png(WIDE, HIGH, rows, between=chunk(kind, head + zlib.compress(b"\0" * size)))


def cut(data: bytes, share: float) -> bytes:
    """The first part."""
    return data[: int(len(data) * share)]
