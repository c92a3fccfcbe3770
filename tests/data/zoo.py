"""Files of every kind that people have, good and bad, made by code, each with what must become of it."""

import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from mpp.data.config import Reading

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
    reading: Reading = Reading()


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


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2, between: bytes = b"") -> bytes:
    """A PNG of these filtered rows, whatever its header says."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + between + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(image: np.ndarray) -> bytes:
    """uint16 (H, W, C) as PNG."""
    height, width, channels = image.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    return png(width, height, rows, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels])


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


def _palette(**options: Any) -> bytes:
    image = picture().quantize(8)
    return encoded(image, options.pop("container", "PNG"), **options)


def _transparent_palette() -> bytes:
    image = Image.fromarray(quadrants((0, 1, 2, 3)), "P")
    image.putpalette([255, 0, 0, 0, 200, 0, 9, 9, 9, 0, 0, 255])
    return encoded(image, "PNG", transparency=2)


def _inverted(ink: bytes) -> bytes:
    """The same CMYK JPEG without Adobe's marker: its inks are taken as they are."""
    place = ink.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", ink, place + 2)
    return ink[:place] + ink[place + 2 + length :]


def _sized(width: int, height: int, channels: int | None = None) -> bytes:
    data = encoded(picture(), "JPEG")
    place = after(data, b"\xff\xc0")
    data = replaced(data, place + 3, struct.pack(">HH", height, width))
    return data if channels is None else replaced(data, place + 7, bytes([channels]))


def _broken_crc(kind: bytes) -> bytes:
    data = encoded(picture(), "PNG")
    place = data.index(kind)
    (length,) = struct.unpack_from(">I", data, place - 4)
    return replaced(data, place + 4 + length, bytes([data[place + 4 + length] ^ 0xFF]))


def _animation(container: str, **options: Any) -> bytes:
    return encoded(picture(), container, save_all=True, append_images=[picture("L").convert("RGB")], **options)


def _top_down_bmp() -> bytes:
    data = encoded(quadrants()[::-1], "BMP")
    return replaced(data, 22, struct.pack("<i", -HIGH))


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


def _npy_promising(shape: tuple[int, ...]) -> bytes:
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def _share(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def _text_png(kind: bytes, size: int) -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in quadrants())
    head = b"icc\0\0" if kind == b"iCCP" else b"Comment\0\0"
    return png(WIDE, HIGH, rows, between=chunk(kind, head + zlib.compress(b"\0" * size)))


def _gif_of(width: int, height: int) -> bytes:
    data = encoded(picture("P"), "GIF")
    return replaced(data, 6, struct.pack("<HH", width, height))


def _good() -> list[Case]:
    jpeg = {"quality": 95, "subsampling": 0}
    grey = tuple((value,) * 3 for value in GREYS)
    eight = tuple((value,) * 3 for value in EIGHT)
    ones, fours, fives = Reading(1), Reading(4), Reading(5)
    lossless: dict[str, Any] = {"lossless": True}
    adobe = encoded(picture("CMYK"), "JPEG", **jpeg)
    turns = {
        f"{container.lower()}-turned-{turn}.{container.lower()}": (container, turn)
        for container in ("JPEG", "PNG", "WEBP", "TIFF")
        for turn in range(1, 9)
    }
    stored = {1: (0, 1, 2, 3), 2: (1, 0, 3, 2), 3: (3, 2, 1, 0), 4: (2, 3, 0, 1)}
    stored |= {5: (0, 2, 1, 3), 6: (2, 0, 3, 1), 7: (3, 1, 2, 0), 8: (1, 3, 0, 2)}
    cases = [
        Case("jpeg.jpg", lambda: encoded(picture(), "JPEG", **jpeg), corners=COLOURS, within=4),
        Case(
            "progressive.jpg", lambda: encoded(picture(), "JPEG", progressive=True, **jpeg), corners=COLOURS, within=4
        ),
        Case("grey.jpg", lambda: encoded(picture("L"), "JPEG", **jpeg), corners=grey, within=4),
        Case("rgb.jpg", lambda: encoded(picture(), "JPEG", keep_rgb=True, **jpeg), corners=COLOURS, within=4),
        Case("cmyk-adobe.jpg", lambda: adobe, corners=COLOURS, within=6),
        Case(
            "cmyk-plain.jpg",
            lambda: _inverted(encoded(Image.fromarray(255 - np.asarray(picture("CMYK")), "CMYK"), "JPEG", **jpeg)),
            corners=COLOURS,
            within=6,
        ),
        Case("jpeg-to-grey.jpg", lambda: encoded(picture(), "JPEG", **jpeg), (32, 48), GREYS, 4, reading=ones),
        Case("jpeg-and-more.jpg", lambda: encoded(picture(), "JPEG", **jpeg) + b"more" * 50, corners=COLOURS, within=4),
        Case("mpo.jpg", lambda: encoded(picture(), "MPO", save_all=True, append_images=[picture("L").convert("RGB")])),
        Case("png-named.jpg", lambda: encoded(picture(), "PNG"), corners=COLOURS),
        Case("jpeg-named.png", lambda: encoded(picture(), "JPEG", **jpeg), corners=COLOURS, within=4),
        Case("rgb.png", lambda: encoded(picture(), "PNG"), corners=COLOURS),
        Case("grey.png", lambda: encoded(picture("L"), "PNG"), corners=grey),
        Case(
            "one-bit.png",
            lambda: encoded(Image.fromarray(quadrants((0, 255, 255, 0))).convert("1"), "PNG"),
            corners=((0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3),
        ),
        Case("palette.png", _palette, corners=COLOURS),
        Case("palette-glass.png", _transparent_palette, corners=(COLOURS[0], COLOURS[1], (255,) * 3, (0, 0, 255))),
        Case("rgba.png", lambda: glass("PNG"), corners=GLASS),
        Case(
            "rgba-on-black.png",
            lambda: glass("PNG"),
            reading=Reading(background=(0,)),
            corners=((255, 0, 0), (0,) * 3, (0,) * 3, (0, 0, 255)),
        ),
        Case(
            "rgba-on-sky.png",
            lambda: glass("PNG"),
            reading=Reading(background=(10, 20, 30)),
            corners=((255, 0, 0), (5, 10, 15), (10, 20, 30), (0, 0, 255)),
        ),
        Case(
            "rgba-raw.png",
            lambda: glass("PNG"),
            reading=fours,
            corners=((255, 0, 0, 255), (0, 0, 0, 128), (9, 9, 9, 0), (0, 0, 255, 255)),
        ),
        Case("la.png", lambda: glass("PNG", "LA"), corners=((76,) * 3, (127,) * 3, (255,) * 3, (29,) * 3)),
        Case(
            "la-raw.png",
            lambda: glass("PNG", "LA"),
            reading=Reading(2),
            corners=((76, 255), (0, 128), (9, 0), (29, 255)),
        ),
        Case(
            "colour-key.png",
            lambda: encoded(picture(), "PNG", transparency=(255, 0, 0)),
            corners=((255,) * 3, *COLOURS[1:]),
        ),
        Case("grey-16.png", lambda: encoded(quadrants(SHADES, np.uint16), "PNG"), corners=eight, within=0),
        Case(
            "grey-16-ranged.png",
            lambda: encoded(quadrants(SHADES, np.uint16), "PNG"),
            within=1,
            corners=((0,) * 3, (127,) * 3, (255,) * 3, (255,) * 3),
            reading=Reading(value_range=(0, 43690)),
        ),
        Case(
            "rgb-16.png", lambda: png16(quadrants(SUN, np.uint16)), corners=tuple((0, 255, v) for v in EIGHT), within=0
        ),
        Case(
            "rgb-16-ranged.png",
            lambda: png16(quadrants(tuple((v // 100,) * 3 for v in SHADES), np.uint16)),
            corners=eight,
            within=1,
            reading=Reading(value_range=(0, 655.35)),
        ),
        Case(
            "rgba-16.png", lambda: png16(quadrants(tuple((v, v, v, 65535) for v in SHADES), np.uint16)), corners=eight
        ),
        Case("animated.png", lambda: _animation("PNG"), corners=COLOURS),
        Case("animated.gif", lambda: _animation("GIF"), corners=COLOURS),
        Case("animated.webp", lambda: _animation("WEBP", lossless=True), corners=COLOURS),
        Case("still.gif", lambda: _palette(container="GIF"), corners=COLOURS),
        Case("lossless.webp", lambda: encoded(picture(), "WEBP", **lossless), corners=COLOURS),
        Case("lossy.webp", lambda: encoded(picture(), "WEBP", quality=95), corners=COLOURS, within=25),
        Case("rgba.webp", lambda: glass("WEBP", exact=True, **lossless), corners=GLASS),
        Case("plain.bmp", lambda: encoded(picture(), "BMP"), corners=COLOURS),
        Case("palette.bmp", lambda: _palette(container="BMP"), corners=COLOURS),
        Case("top-down.bmp", _top_down_bmp, corners=COLOURS),
        Case("plain.ppm", lambda: encoded(picture(), "PPM"), corners=COLOURS),
        Case("16-bit.pgm", lambda: encoded(quadrants(SHADES, np.uint16), "PPM"), corners=eight, within=0),
        Case(
            "12-bit.ppm",
            lambda: (
                b"P6 # twelve\n48 32 4095\n"
                + quadrants(tuple((v // 16,) * 3 for v in SHADES), np.dtype(">u2")).tobytes()
            ),
            corners=eight,
            within=1,
        ),
        Case(
            "ranged.ppm",
            lambda: b"P6 48 32 4095\n" + quadrants(tuple((v // 128,) * 3 for v in SHADES), np.dtype(">u2")).tobytes(),
            corners=eight,
            within=1,
            reading=Reading(value_range=(0, 511)),
        ),
        Case("words.pgm", lambda: b"P2 2 2 1000\n0 333 667 1000\n", (2, 2), eight, 1),
        Case("plain.tif", lambda: encoded(picture(), "TIFF"), corners=COLOURS),
        Case("lzw.tif", lambda: encoded(picture(), "TIFF", compression="tiff_lzw"), corners=COLOURS),
        Case("jpeg.tif", lambda: encoded(picture(), "TIFF", compression="jpeg"), corners=COLOURS, within=40),
        Case("fax.tif", lambda: encoded(picture("1"), "TIFF", compression="group4")),
        Case("cmyk.tif", lambda: encoded(picture("CMYK"), "TIFF"), corners=COLOURS),
        Case("rgba.tif", lambda: glass("TIFF"), corners=GLASS),
        Case("big.tif", lambda: tiff(quadrants(), photometric="rgb", bigtiff=True), corners=COLOURS),
        Case(
            "planar.tif",
            lambda: tiff(np.moveaxis(quadrants(), -1, 0), photometric="rgb", planarconfig="separate"),
            corners=COLOURS,
        ),
        Case("grey-16.tif", lambda: encoded(quadrants(SHADES, np.uint16), "TIFF"), corners=eight, within=0),
        Case(
            "white-is-0.tif",
            lambda: tiff(quadrants(SHADES, np.uint16), photometric="miniswhite"),
            corners=eight[::-1],
            within=0,
        ),
        Case(
            "rgb-16.tif",
            lambda: tiff(quadrants(SUN, np.uint16), photometric="rgb"),
            corners=tuple((0, 255, v) for v in EIGHT),
            within=0,
        ),
        Case(
            "rgb-16-ranged.tif",
            lambda: tiff(quadrants(tuple((v // 100,) * 3 for v in SHADES), np.uint16), photometric="rgb"),
            corners=eight,
            within=1,
            reading=Reading(value_range=(0, 655.35)),
        ),
        Case(
            "rgba-16.tif",
            lambda: tiff(
                quadrants(tuple((0, 0, 0, v) for v in SHADES), np.uint16),
                photometric="rgb",
                extrasamples=["unassalpha"],
            ),
            corners=eight[::-1],
            within=1,
        ),
        *(
            Case(
                f"{dtype}.tif",
                lambda dtype=dtype: tiff(quadrants((0, 0.25, 0.5, 1), dtype)),
                corners=((0,) * 3, (64,) * 3, (128,) * 3, (255,) * 3),
                within=1,
            )
            for dtype in ("float16", "float32", "float64")
        ),
        Case(
            "hot.tif",
            lambda: tiff(quadrants((-5, 250, 300, 9000), "float32")),
            within=1,
            corners=((0,) * 3, (0,) * 3, (128,) * 3, (255,) * 3),
            reading=Reading(value_range=(250, 350)),
        ),
        Case(
            "gaps.tif",
            lambda: tiff(quadrants((np.nan, 0, 0.5, 1), "float32")),
            within=1,
            corners=((0,) * 3, (0,) * 3, (128,) * 3, (255,) * 3),
        ),
        *(
            Case(
                f"{dtype}-ranged.tif",
                lambda dtype=dtype: tiff(quadrants((0, 1000, 2000, 3000), dtype)),
                corners=eight,
                within=1,
                reading=Reading(value_range=(0, 3000)),
            )
            for dtype in ("int16", "int32", "uint32")
        ),
        Case(
            "bands.tif",
            lambda: tiff(quadrants(BANDS, "uint16"), photometric="minisblack", planarconfig="contig"),
            corners=BANDS8,
            within=1,
            reading=fives,
        ),
        Case(
            "bands-planar.tif",
            lambda: tiff(
                np.moveaxis(quadrants(BANDS, "uint16"), -1, 0), photometric="minisblack", planarconfig="separate"
            ),
            corners=BANDS8,
            within=1,
            reading=fives,
        ),
        *(
            Case(
                f"bands-{method}.tif",
                lambda method=method: tiff(
                    quadrants(BANDS, "uint16"),
                    photometric="minisblack",
                    planarconfig="contig",
                    tile=(16, 16),
                    compression=method,
                    predictor=True,
                ),
                corners=BANDS8,
                within=1,
                reading=fives,
            )
            for method in ("zlib", "lzw", "zstd")
        ),
        Case(
            "bands-pages.tif",
            lambda: tiff(np.moveaxis(quadrants(BANDS, "uint16"), -1, 0), photometric="minisblack"),
            corners=BANDS8,
            within=1,
            reading=fives,
        ),
        Case(
            "pages.tif",
            lambda: tiff(np.stack([quadrants(GREYS), quadrants(GREYS[::-1])]), photometric="minisblack"),
            corners=grey,
        ),
        Case(
            "four-bit.tif",
            lambda: tags({**plain_tags(4, 2, held=4), 258: (4, 1, 4)}, b"\0" * 78 + b"\x00\xff" * 2),
            (2, 4),
            ((0,) * 3, (255,) * 3) * 2,
        ),
        Case("palette-lzw.tif", lambda: _palette(container="TIFF", compression="tiff_lzw"), corners=COLOURS),
        Case("cmyk-lzw.tif", lambda: encoded(picture("CMYK"), "TIFF", compression="tiff_lzw"), corners=COLOURS),
        Case(
            "premultiplied.tif",
            lambda: tiff(quadrants(((100, 0, 0, 128),) * 4), photometric="rgb", extrasamples=["assocalpha"]),
            corners=((227, 127, 127),) * 4,
        ),
        Case(
            "eight-bands.tif",
            lambda: tiff(noise((20, 30, 8)), photometric="minisblack", planarconfig="contig"),
            (20, 30),
            reading=Reading(8),
        ),
        Case(
            "corrupt-lzw.tif",
            lambda: replaced(encoded(noise(), "TIFF", compression="tiff_lzw"), 2000, b"\xff" * 9),
            kind="damaged",
        ),
        Case(
            "a-million-tiles.tif",
            lambda: tags(
                {**plain_tags(2**13, 2**13), 259: (4, 1, 8), 324: (4, 1, 230), 325: (4, 1, 9)}
                | dict.fromkeys((322, 323), (4, 1, 16)),
                b"\0" * 300,
            ),
            kind="damaged",
        ),
        Case(
            "tiles-of-terabytes.tif",
            lambda: tags(
                {
                    **plain_tags(),
                    259: (4, 1, 8),
                    322: (4, 1, 2**20),
                    323: (4, 1, 2**20),
                    324: (4, 1, 230),
                    325: (4, 1, 9),
                },
                b"\0" * 300,
            ),
            kind="damaged",
        ),
        Case(
            "near-infrared.tif",
            lambda: tiff(quadrants(tuple((*c, 77) for c in COLOURS)), photometric="rgb", extrasamples=["unspecified"]),
            corners=tuple((*c, 77) for c in COLOURS),
            reading=fours,
        ),
        Case(
            "bands-ranged.npy",
            lambda: npy(quadrants(((0, 50), (100, 100), (50, 150), (25, 75)), "int16")),
            within=1,
            corners=((0, 0), (255, 128), (128, 255), (64, 64)),
            reading=Reading(2, (0, 100, 50, 150)),
        ),
        Case("grey.npy", lambda: npy(quadrants(GREYS)), corners=grey, within=0),
        Case("rgb-16.npy", lambda: npy(quadrants(SUN, np.uint16)), corners=tuple((0, 255, v) for v in EIGHT), within=0),
        Case("columns-first.npy", lambda: npy(np.asfortranarray(quadrants())), corners=COLOURS, within=0),
        Case("big-endian.npy", lambda: npy(quadrants(SHADES, ">u2")), corners=eight, within=0),
        Case(
            "float.npy",
            lambda: npy(quadrants((0, 0.25, 0.5, 1), "float32")),
            within=1,
            corners=((0,) * 3, (64,) * 3, (128,) * 3, (255,) * 3),
        ),
        Case(
            "flags.npy",
            lambda: npy(quadrants((0, 1, 1, 0), bool)),
            corners=((0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3),
        ),
        Case("one-pixel.png", lambda: encoded(noise((1, 1, 3)), "PNG"), (1, 1)),
        Case("one-pixel.jpg", lambda: encoded(noise((1, 1, 3)), "JPEG"), (1, 1)),
        Case("line.png", lambda: encoded(noise((1, 20_000, 3)), "PNG"), (1, 20_000)),
        Case("column.jpg", lambda: encoded(noise((20_000, 1, 3)), "JPEG"), (20_000, 1)),
        Case(
            "exif-damaged.jpg",
            lambda: encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + b"\xee" * 30, **jpeg),
            corners=COLOURS,
            within=4,
        ),
        Case("exif-of-9.jpg", lambda: encoded(picture(), "JPEG", exif=exif(9), **jpeg), corners=COLOURS, within=4),
        Case("profile.png", lambda: _text_png(b"iCCP", 1000), corners=COLOURS),
        Case(
            "wrong-profile.jpg",
            lambda: encoded(picture(), "JPEG", icc_profile=b"no profile" * 9, **jpeg),
            corners=COLOURS,
            within=4,
        ),
    ]
    for name, (container, turn) in turns.items():
        extra = jpeg if container == "JPEG" else lossless if container == "WEBP" else {}
        cases.append(
            Case(
                name,
                lambda c=container, t=turn, e=extra: encoded(picture(), c, exif=exif(t), **e),
                (WIDE, HIGH) if turn >= 5 else (HIGH, WIDE),
                tuple(COLOURS[place] for place in stored[turn]),
                4,
            )
        )
    return cases


def _bad() -> list[Case]:
    texts: dict[str, bytes] = {
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
    cases = [Case(name, lambda data=data: data, kind="not an image") for name, data in texts.items()]
    for container in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        for share in (0.3, 0.6, 0.97):
            cases.append(
                Case(
                    f"cut-{int(100 * share)}.{container.lower()}",
                    lambda c=container, s=share: _share(encoded(noise(), c), s),
                    kind="truncated",
                )
            )
    damaged: dict[str, Callable[[], bytes]] = {
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
        "two-channels.jpg": lambda: _sized(WIDE, HIGH, 2),
        "no-height.jpg": lambda: _sized(WIDE, 0),
        "no-page.tif": lambda: b"II*\0\0\0\0\0",
        "directory-outside.tif": lambda: b"II*\0\xff\xff\xff\x7f" + b"\0" * 50,
    }
    cases += [Case(name, make, kind="damaged") for name, make in damaged.items()]
    cases += [
        Case("empty.jpg", lambda: b"", kind="empty"),
        Case("taller-than-told.jpg", lambda: _sized(WIDE, 500), kind="truncated"),
        Case("cut-header.png", lambda: encoded(picture(), "PNG")[:20], kind="truncated"),
        Case("cut-header.webp", lambda: encoded(picture(), "WEBP")[:16], kind="truncated"),
        Case("no-end.jpg", lambda: encoded(picture(), "JPEG")[:-2], kind="truncated"),
        Case("no-end.png", lambda: encoded(picture(), "PNG")[:-12], kind="truncated"),
        Case("cut-and-ended.jpg", lambda: _share(encoded(noise(), "JPEG"), 0.6) + b"\xff\xd9", kind="truncated"),
        Case("wider-than-held.jpg", lambda: _sized(2 * WIDE, HIGH), kind="truncated"),
        Case("lower-than-held.jpg", lambda: _sized(WIDE, HIGH // 2), (HIGH // 2, WIDE)),
        Case("no-pixels.png", lambda: png(64, 64, b"\0" * 99), kind="truncated"),
        Case("pixels-outside.tif", lambda: tags(plain_tags(start=5000), b"\0" * 300), kind="truncated"),
        Case("taller-than-held.tif", lambda: tags(plain_tags(4000, 4000), b"\0" * 300), kind="truncated"),
        Case(
            "bands-cut.tif",
            lambda: _share(tiff(quadrants(BANDS, "uint16"), photometric="minisblack", planarconfig="contig"), 0.5),
            kind="truncated",
            reading=Reading(5),
        ),
        Case("loop.tif", lambda: tags(plain_tags(), b"\0" * 300, following=8), (8, 8), ((0,) * 3,) * 4),
        Case(
            "loop-of-bands.tif",
            lambda: tags({**plain_tags(), 258: (4, 1, 32), 279: (4, 1, 256)}, b"\0" * 400, following=8),
            kind="no range",
        ),
        Case("bomb.png", lambda: png(50_000, 50_000, b"\0" * 99), kind="too large"),
        Case("bomb-16.png", lambda: png(50_000, 50_000, b"\0" * 99, depth=16), kind="too large"),
        Case("bomb.jpg", lambda: _sized(60_000, 60_000), kind="too large"),
        Case("bomb.gif", lambda: _gif_of(65_535, 65_535), kind="too large"),
        Case(
            "bomb.bmp",
            lambda: replaced(encoded(picture(), "BMP"), 18, struct.pack("<ii", 60_000, 60_000)),
            kind="too large",
        ),
        Case("bomb.ppm", lambda: b"P6 60000 60000 255\n" + b"\0" * 99, kind="too large"),
        Case("bomb-16.ppm", lambda: b"P6 60000 60000 65535\n" + b"\0" * 99, kind="too large"),
        Case("bomb.tif", lambda: tags(plain_tags(60_000, 60_000), b"\0" * 300), kind="too large"),
        Case(
            "bomb-of-bands.tif",
            lambda: tags({**plain_tags(60_000, 60_000), 258: (4, 1, 64), 339: (4, 1, 3)}, b"\0" * 300),
            kind="too large",
        ),
        Case("bomb.npy", lambda: _npy_promising((60_000, 60_000)), kind="too large"),
        Case("bomb-of-bands.npy", lambda: _npy_promising((10_000, 10_000, 9)), kind="too large", reading=Reading(9)),
        Case("cut.npy", lambda: npy(quadrants())[:-1], kind="truncated"),
        Case("promise.npy", lambda: _npy_promising((9_000, 9_000)), kind="truncated"),
        Case("cut-header.npy", lambda: npy(quadrants())[:40], kind="damaged"),
        Case(
            "code.npy",
            lambda: npy(quadrants()).replace(b"'fortran_order': False", b"'fortran_order': open"),
            kind="damaged",
        ),
        Case("text-bomb.png", lambda: _text_png(b"zTXt", 20_000_000), kind="too large"),
        Case("profile-bomb.png", lambda: _text_png(b"iCCP", 20_000_000), kind="too large"),
        Case("hot-unranged.tif", lambda: tiff(quadrants((-5, 250, 300, 9000), "float32")), kind="no range"),
        Case("infinite.tif", lambda: tiff(quadrants((0, 0, 1, np.inf), "float32")), kind="no range"),
        *(
            Case(f"{dtype}-unranged.tif", lambda dtype=dtype: tiff(quadrants((0, 1, 2, 3), dtype)), kind="no range")
            for dtype in ("int8", "int16", "int32", "uint32")
        ),
        Case(
            "bands-for-three.tif",
            lambda: tiff(quadrants(BANDS, "uint16"), photometric="minisblack", planarconfig="contig"),
            kind="wrong channels",
        ),
        Case("three-for-four.png", lambda: encoded(picture(), "PNG"), kind="wrong channels", reading=Reading(4)),
        Case("three-for-five.jpg", lambda: encoded(picture(), "JPEG"), kind="wrong channels", reading=Reading(5)),
        Case("seven.npy", lambda: npy(np.zeros((9, 9, 7), np.uint8)), kind="wrong channels"),
    ]
    return cases


CASES = [*_good(), *_bad()]
