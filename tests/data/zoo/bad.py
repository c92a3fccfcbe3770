"""Files that must be refused, and a few that must not."""

import gzip
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable

import numpy as np

from mpp.data.settings import DecodeOptions
from tests.data.zoo.making import (
    HIGH,
    WIDE,
    Case,
    chunk,
    cut,
    encoded,
    noise,
    npy,
    npy_of,
    picture,
    png,
    quadrants,
    replaced,
    resized_jpeg,
    text_png,
    tiff,
)


def _broken_crc(kind: bytes) -> bytes:
    data = encoded(picture(), "PNG")
    place = data.index(kind)
    (length,) = struct.unpack_from(">I", data, place - 4)
    return replaced(data, place + 4 + length, bytes([data[place + 4 + length] ^ 0xFF]))


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


def _npy_promising(shape: tuple[int, ...]) -> bytes:
    return npy_of(repr({"descr": "|u1", "fortran_order": False, "shape": shape}))


def _gif_of(width: int, height: int) -> bytes:
    data = encoded(picture("P"), "GIF")
    return replaced(data, 6, struct.pack("<HH", width, height))


_TEXTS: dict[str, bytes] = {
    "text.jpg": b"not an image, " * 20,
    "page.png": b"<!DOCTYPE html><html><body>404</body></html>",
    "answer.jpg": json.dumps({"error": "gone"}).encode(),
    "archive.jpg": _zip(),
    "paper.jpg": b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n%%EOF\n",
    "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n",
    "drawing.png": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "film.jpg": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"\0" * 200,
    "packed.png": gzip.compress(b"text" * 99, mtime=0),
    "random.jpg": random.Random(0).randbytes(5000),
    "zeros.png": b"\0" * 500,
    "one-byte.png": b"\x89",
    "icon.ico": encoded(picture(), "ICO"),
    "targa.tga": encoded(picture(), "TGA"),
    "flag.xbm": encoded(picture("1"), "XBM"),
    "pickle.npy": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "lists.npy": npy(np.array([{"a": 1}, None], dtype=object)),
    "words.npy": npy(np.array([["a", "b"]])),
    "cube.npy": npy(np.zeros((2, 3, 4, 5), np.uint8)),
    "nothing.npy": npy(np.zeros((0, 4), np.uint8)),
    "complex.npy": npy(np.zeros((4, 4), np.complex64)),
    "complex.tif": tiff(np.zeros((4, 4), np.complex64)),
}
_DAMAGED: dict[str, Callable[[], bytes]] = {
    "header-only.jpg": lambda: b"\xff\xd8\xff\xe0",
    "cut-header.gif": lambda: encoded(picture(), "GIF")[:8],
    "cut-header.tif": lambda: encoded(picture(), "TIFF")[:6],
    "header-checksum.png": lambda: _broken_crc(b"IHDR"),
    "pixel-checksum.png": lambda: _broken_crc(b"IDAT"),
    "no-width.png": lambda: png(0, 8, b"\0" * 99),
    "wrong-depth.png": lambda: png(8, 8, b"\0" * 999, depth=7),
    "no-zlib.png": lambda: (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"\xee" * 99)
        + chunk(b"IEND", b"")
    ),
    "two-channels.jpg": lambda: resized_jpeg(WIDE, HIGH, 2),
    "no-height.jpg": lambda: resized_jpeg(WIDE, 0),
    "no-page.tif": lambda: b"II*\0\0\0\0\0",
    "directory-outside.tif": lambda: b"II*\0\xff\xff\xff\x7f" + b"\0" * 50,
}

BAD = [Case(name, lambda data=data: data, kind="not an image") for name, data in _TEXTS.items()]
BAD += [
    Case(
        f"cut-{int(100 * share)}.{container.lower()}",
        lambda c=container, s=share: cut(encoded(noise(), c), s),
        kind="truncated",
    )
    for container in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
    for share in (0.3, 0.6, 0.97)
]
BAD += [Case(name, make, kind="damaged") for name, make in _DAMAGED.items()]
BAD += [
    Case("empty.jpg", lambda: b"", kind="empty"),
    Case("taller-than-told.jpg", lambda: resized_jpeg(WIDE, 500), kind="truncated"),
    Case("cut-header.png", lambda: encoded(picture(), "PNG")[:20], kind="truncated"),
    Case("cut-header.webp", lambda: encoded(picture(), "WEBP")[:16], kind="truncated"),
    Case("no-end.jpg", lambda: encoded(picture(), "JPEG")[:-2], kind="truncated"),
    Case("no-end.png", lambda: encoded(picture(), "PNG")[:-12], kind="truncated"),
    Case("cut-and-ended.jpg", lambda: cut(encoded(noise(), "JPEG"), 0.6) + b"\xff\xd9", kind="truncated"),
    Case("wider-than-held.jpg", lambda: resized_jpeg(2 * WIDE, HIGH), kind="truncated"),
    Case("lower-than-held.jpg", lambda: resized_jpeg(WIDE, HIGH // 2), (HIGH // 2, WIDE)),
    Case("no-pixels.png", lambda: png(64, 64, b"\0" * 99), kind="truncated"),
    Case("bomb.png", lambda: png(50_000, 50_000, b"\0" * 99), kind="too large"),
    Case("bomb-16.png", lambda: png(50_000, 50_000, b"\0" * 99, depth=16), kind="too large"),
    Case("bomb.jpg", lambda: resized_jpeg(60_000, 60_000), kind="too large"),
    Case("bomb.gif", lambda: _gif_of(65_535, 65_535), kind="too large"),
    Case(
        "bomb.bmp",
        lambda: replaced(encoded(picture(), "BMP"), 18, struct.pack("<ii", 60_000, 60_000)),
        kind="too large",
    ),
    Case("bomb.ppm", lambda: b"P6 60000 60000 255\n" + b"\0" * 99, kind="too large"),
    Case("bomb-16.ppm", lambda: b"P6 60000 60000 65535\n" + b"\0" * 99, kind="too large"),
    Case("bomb.npy", lambda: _npy_promising((60_000, 60_000)), kind="too large"),
    Case("bomb-of-bands.npy", lambda: _npy_promising((10_000, 10_000, 9)), kind="too large", reading=DecodeOptions(9)),
    # What a pattern with a repetition in a repetition would try for ever.
    Case("blanks.ppm", lambda: b"P6" + b" " * 60 + b"x", kind="damaged"),
    Case("comments.ppm", lambda: b"P5" + b"#\n" * 100_000 + b"x", kind="not an image"),
    Case("true.npy", lambda: _npy_promising((True, 2, 3)) + bytes(6), kind="not an image"),
    Case("endless.npy", lambda: _npy_promising((10**40, 2, 3)), kind="too large"),
    Case("cut.npy", lambda: npy(quadrants())[:-1], kind="truncated"),
    Case("promise.npy", lambda: _npy_promising((9_000, 9_000)), kind="truncated"),
    Case("cut-header.npy", lambda: npy(quadrants())[:40], kind="damaged"),
    Case(
        "code.npy",
        lambda: npy(quadrants()).replace(b"'fortran_order': False", b"'fortran_order': open"),
        kind="damaged",
    ),
    Case("text-bomb.png", lambda: text_png(b"zTXt", 20_000_000), kind="too large"),
    Case("profile-bomb.png", lambda: text_png(b"iCCP", 20_000_000), kind="too large"),
    Case("three-for-four.png", lambda: encoded(picture(), "PNG"), kind="wrong channels", reading=DecodeOptions(4)),
    Case("three-for-five.jpg", lambda: encoded(picture(), "JPEG"), kind="wrong channels", reading=DecodeOptions(5)),
    Case("seven.npy", lambda: npy(np.zeros((9, 9, 7), np.uint8)), kind="wrong channels"),
]
