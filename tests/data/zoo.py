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

from mpp.data.settings import DecodeOptions

COLOURS = ((255, 0, 0), (0, 200, 0), (0, 0, 255), (255, 255, 255))
GREYS = (76, 117, 29, 255)  # their luma
HIGH, WIDE = 32, 48
GLASS = ((255, 0, 0), (127, 127, 127), (255, 255, 255), (0, 0, 255))
SHADES, EIGHT = (0, 21845, 43690, 65535), (0, 85, 170, 255)
SUN = tuple((0, 65535, value) for value in SHADES)
SUN8 = tuple((0, 255, value) for value in EIGHT)
BANDS = tuple(tuple(round(65535 * (i + j) / 7) for j in range(5)) for i in range(4))
BANDS8 = tuple(tuple(round(255 * (i + j) / 7) for j in range(5)) for i in range(4))
EIGHT_GREYS = tuple((value,) * 3 for value in EIGHT)
QUARTERS = tuple((value,) * 3 for value in (0, 64, 128, 255))
FLAGS = tuple((value,) * 3 for value in (0, 255, 255, 0))
LUMA = tuple((value,) * 3 for value in GREYS)
FINE: dict[str, Any] = {"quality": 95, "subsampling": 0}  # options of a JPEG that keep colours
Make = Callable[[], bytes]


@dataclass(frozen=True)
class Case:
    """One file and what must become of it."""

    name: str
    make: Make
    size: tuple[int, int] = (HIGH, WIDE)
    """Height and width, where it loads."""
    corners: tuple[Any, ...] = ()
    """Colours at top left, top right, bottom left, bottom right; (): any."""
    within: int = 2
    """Of those colours, grey levels."""
    kind: str = ""
    """The kind of BadImage; empty where it loads."""
    reading: DecodeOptions = DecodeOptions()


def alike(makes: dict[str, Make], *options: Any, **expected: Any) -> list[Case]:
    """Cases of which the same must become; `options` are those of `DecodeOptions`."""
    return [Case(name, make, reading=DecodeOptions(*options), **expected) for name, make in makes.items()]


def quadrants(colours: Any = COLOURS, dtype: Any = np.uint8, height: int = HIGH, width: int = WIDE) -> np.ndarray:
    """(height, width, C), or (height, width) for numbers: each quarter in one colour."""
    corners = np.array(colours, dtype=dtype).reshape(2, 2, -1)
    image = corners.repeat(height // 2, axis=0).repeat(width // 2, axis=1)
    return image if np.ndim(colours) > 1 else image[:, :, 0]


def encoded(image: np.ndarray | Image.Image, container: str, **options: Any) -> bytes:
    """By Pillow."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, container, **options)
    return buffer.getvalue()


def tiff(image: np.ndarray, photometric: str | None = None, **options: Any) -> bytes:
    """By tifffile."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, photometric=photometric, **options)
    return buffer.getvalue()


def bands(image: np.ndarray, **options: Any) -> bytes:
    """(H, W, C) by tifffile, the channels of a pixel beside each other."""
    return tiff(image, "minisblack", planarconfig="contig", **options)


def planes(image: np.ndarray, **options: Any) -> bytes:
    """(C, H, W) by tifffile."""
    return tiff(image, "minisblack", planarconfig="separate", **options)


def npy(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image)
    return buffer.getvalue()


def npy_of(header: str, values: bytes = b"") -> bytes:
    """An .npy file with this text in its header."""
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + values


def npy_promising(*shape: int) -> bytes:
    return npy_of(repr({"descr": "|u1", "fortran_order": False, "shape": shape}))


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


def text_png(kind: bytes, size: int) -> bytes:
    """A PNG whose text or profile chunk unpacks to so many bytes."""
    rows = b"".join(b"\0" + row.tobytes() for row in quadrants())
    head = b"icc\0\0" if kind == b"iCCP" else b"Comment\0\0"
    return png(WIDE, HIGH, rows, between=chunk(kind, head + zlib.compress(b"\0" * size)))


def broken_crc(kind: bytes) -> bytes:
    data = encoded(picture(), "PNG")
    start = data.index(kind)
    (length,) = struct.unpack_from(">I", data, start - 4)
    return replaced(data, start + 4 + length, bytes([data[start + 4 + length] ^ 0xFF]))


def tags(changed: dict[int, int], body: bytes = b"", following: int = 0, width: int = 8, height: int = 8) -> bytes:
    """An uncompressed grey TIFF of one directory, or of other tags."""
    numbers = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: height, 279: 64} | changed
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(numbers.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(numbers)) + rows + struct.pack("<I", following) + body


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def replaced(data: bytes, start: int, new: bytes) -> bytes:
    """The same length."""
    return data[:start] + new + data[start + len(new) :]


def after(data: bytes, marker: bytes) -> int:
    """Where the marker ends."""
    return data.index(marker) + len(marker)


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def noise(shape: tuple[int, ...] = (64, 64, 3)) -> np.ndarray:
    """uint8, always the same."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def picture(mode: str = "RGB") -> Image.Image:
    """The quadrants in a mode of Pillow's."""
    return Image.fromarray(quadrants()).convert(mode)


def jpeg(image: Any = None, container: str = "JPEG", **options: Any) -> bytes:
    return encoded(picture() if image is None else image, container, **FINE, **options)


def glass(container: str, mode: str = "RGBA", **options: Any) -> bytes:
    """Red, half transparent, transparent, blue."""
    colours = ((255, 0, 0, 255), (0, 0, 0, 128), (9, 9, 9, 0), (0, 0, 255, 255))
    return encoded(Image.fromarray(quadrants(colours)).convert(mode), container, **options)


def palette(container: str = "PNG", **options: Any) -> bytes:
    return encoded(picture().quantize(8), container, **options)


def transparent_palette() -> bytes:
    image = Image.fromarray(quadrants((0, 1, 2, 3)), "P")
    image.putpalette([255, 0, 0, 0, 200, 0, 9, 9, 9, 0, 0, 255])
    return encoded(image, "PNG", transparency=2)


def resized_jpeg(width: int, height: int, channels: int | None = None) -> bytes:
    """A JPEG whose header says something else than its pixels."""
    data = encoded(picture(), "JPEG")
    frame = after(data, b"\xff\xc0")
    data = replaced(data, frame + 3, struct.pack(">HH", height, width))
    return data if channels is None else replaced(data, frame + 7, bytes([channels]))


def without_adobe(ink: bytes) -> bytes:
    """The same CMYK JPEG without Adobe's marker: its inks are taken as they are."""
    start = ink.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", ink, start + 2)
    return ink[:start] + ink[start + 2 + length :]


def ycck() -> bytes:
    """Adobe's: the inks as luma and two colours, black apart, all inverted."""
    inks = np.asarray(picture("CMYK"))
    colours = np.asarray(Image.fromarray(inks[:, :, :3]).convert("YCbCr"))
    data = jpeg(Image.fromarray(np.concatenate([255 - colours, inks[:, :, 3:]], axis=2), "CMYK"))
    return replaced(data, after(data, b"Adobe") + 6, b"\2")  # its transform


def animation(container: str, **options: Any) -> bytes:
    return encoded(picture(), container, save_all=True, append_images=[picture("L").convert("RGB")], **options)


def lying_jpeg() -> bytes:
    """Tiles of 16 x 16 in name, of 65,000 x 65,000 by the headers of their JPEGs."""
    data = planes(noise((5, 32, 32)), tile=(16, 16), compression="jpeg")
    return replaced(data, after(data, b"\xff\xc0") + 3, struct.pack(">HH", 65_000, 65_000))


def zip_of_text() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


def smooth(subsampling: str, turn: int) -> bytes:
    """Soft colours, as of a photograph out of focus."""
    image = Image.fromarray(noise((4, 6, 3))).resize((WIDE, HIGH), Image.Resampling.BICUBIC)
    return encoded(image, "JPEG", quality=90, subsampling=subsampling, exif=exif(turn))


JPEG = [
    *alike(
        {
            "jpeg.jpg": jpeg,
            "progressive.jpg": lambda: jpeg(progressive=True),
            "rgb.jpg": lambda: jpeg(keep_rgb=True),
            "jpeg-and-more.jpg": lambda: jpeg() + b"more" * 50,
            "jpeg-named.png": jpeg,
            "exif-damaged.jpg": lambda: jpeg(exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + b"\xee" * 30),
            "exif-of-9.jpg": lambda: jpeg(exif=exif(9)),
            "wrong-profile.jpg": lambda: jpeg(icc_profile=b"no profile" * 9),
        },
        corners=COLOURS,
        within=4,
    ),
    *alike(
        {
            "ycck.jpg": ycck,
            "cmyk-adobe.jpg": lambda: jpeg(picture("CMYK")),
            "cmyk-plain.jpg": lambda: without_adobe(jpeg(Image.fromarray(255 - np.asarray(picture("CMYK")), "CMYK"))),
        },
        corners=COLOURS,
        within=6,
    ),
    Case("grey.jpg", lambda: jpeg(picture("L")), corners=LUMA, within=4),
    Case("jpeg-to-grey.jpg", jpeg, (32, 48), GREYS, 4, reading=DecodeOptions(1)),
    Case("mpo.jpg", lambda: encoded(picture(), "MPO", save_all=True, append_images=[picture("L").convert("RGB")])),
    Case("one-pixel.jpg", lambda: encoded(noise((1, 1, 3)), "JPEG"), (1, 1)),
    Case("column.jpg", lambda: encoded(noise((20_000, 1, 3)), "JPEG"), (20_000, 1)),
    *(
        Case(
            f"smooth-{how.replace(':', '')}-turned-{turn}.jpg",
            lambda how=how, turn=turn: smooth(how, turn),
            (WIDE, HIGH) if turn >= 5 else (HIGH, WIDE),
        )
        for how in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")
        for turn in (1, 6)
    ),
]

PNG = [
    *alike(
        {
            "rgb.png": lambda: encoded(picture(), "PNG"),
            "png-named.jpg": lambda: encoded(picture(), "PNG"),
            "palette.png": palette,
            "animated.png": lambda: animation("PNG"),
            "profile.png": lambda: text_png(b"iCCP", 1000),
        },
        corners=COLOURS,
    ),
    *alike(
        {
            "rgb-16.png": lambda: png16(quadrants(SUN, np.uint16)),
            "odd-profile-16.png": lambda: png16(
                quadrants(SUN, np.uint16), chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"no profile"))
            ),
        },
        corners=SUN8,
        within=0,
    ),
    Case("grey.png", lambda: encoded(picture("L"), "PNG"), corners=LUMA),
    Case(
        "one-bit.png",
        lambda: encoded(Image.fromarray(quadrants((0, 255, 255, 0))).convert("1"), "PNG"),
        (32, 48),
        FLAGS,
    ),
    Case("palette-glass.png", transparent_palette, corners=(*COLOURS[:2], (255,) * 3, (0, 0, 255))),
    Case("rgba.png", lambda: glass("PNG"), corners=GLASS),
    *alike(
        {"rgba-on-black.png": lambda: glass("PNG")}, 3, (), (0,), corners=((255, 0, 0), (0,) * 3, (0,) * 3, (0, 0, 255))
    ),
    *alike(
        {"rgba-on-sky.png": lambda: glass("PNG")},
        *(3, (), (10, 20, 30)),
        corners=((255, 0, 0), (5, 10, 15), (10, 20, 30), (0, 0, 255)),
    ),
    *alike(
        {"rgba-raw.png": lambda: glass("PNG")},
        4,
        corners=((255, 0, 0, 255), (0, 0, 0, 128), (9, 9, 9, 0), (0, 0, 255, 255)),
    ),
    Case("la.png", lambda: glass("PNG", "LA"), corners=((76,) * 3, (127,) * 3, (255,) * 3, (29,) * 3)),
    *alike({"la-raw.png": lambda: glass("PNG", "LA")}, 2, corners=((76, 255), (0, 128), (9, 0), (29, 255))),
    Case(
        "colour-key.png",
        lambda: encoded(picture(), "PNG", transparency=(255, 0, 0)),
        corners=((255,) * 3, *COLOURS[1:]),
    ),
    Case("grey-16.png", lambda: encoded(quadrants(SHADES, np.uint16), "PNG"), corners=EIGHT_GREYS, within=0),
    *alike(
        {"grey-16-ranged.png": lambda: encoded(quadrants(SHADES, np.uint16), "PNG")},
        *(3, (0, 43690)),
        within=1,
        corners=((0,) * 3, (127,) * 3, (255,) * 3, (255,) * 3),
    ),
    *alike(
        {"rgb-16-ranged.png": lambda: png16(quadrants(tuple((v // 100,) * 3 for v in SHADES), np.uint16))},
        *(3, (0, 655.35)),
        within=1,
        corners=EIGHT_GREYS,
    ),
    Case(
        "rgba-16.png", lambda: png16(quadrants(tuple((v, v, v, 65535) for v in SHADES), np.uint16)), corners=EIGHT_GREYS
    ),
    Case("one-pixel.png", lambda: encoded(noise((1, 1, 3)), "PNG"), (1, 1)),
    Case("line.png", lambda: encoded(noise((1, 20_000, 3)), "PNG"), (1, 20_000)),
]

OTHERS = [
    *alike(
        {
            "animated.gif": lambda: animation("GIF"),
            "animated.webp": lambda: animation("WEBP", lossless=True),
            "still.gif": lambda: palette("GIF"),
            "lossless.webp": lambda: encoded(picture(), "WEBP", lossless=True),
            "plain.bmp": lambda: encoded(picture(), "BMP"),
            "palette.bmp": lambda: palette("BMP"),
            "top-down.bmp": lambda: replaced(encoded(quadrants()[::-1], "BMP"), 22, struct.pack("<i", -HIGH)),
            "plain.ppm": lambda: encoded(picture(), "PPM"),
        },
        corners=COLOURS,
    ),
    *alike(
        {
            "python-2.npy": lambda: npy_of(
                "{'descr': '|u1', 'fortran_order': False, 'shape': (32L, 48L, 3L)}", quadrants().tobytes()
            ),
            "columns-first.npy": lambda: npy(np.asfortranarray(quadrants())),
        },
        corners=COLOURS,
        within=0,
    ),
    *alike(
        {
            "12-bit.ppm": lambda: (
                b"P6 # twelve\n48 32 4095\n" + quadrants(tuple((v // 16,) * 3 for v in SHADES), ">u2").tobytes()
            ),
        },
        corners=EIGHT_GREYS,
        within=1,
    ),
    *alike(
        {"ranged.ppm": lambda: b"P6 48 32 4095\n" + quadrants(tuple((v // 128,) * 3 for v in SHADES), ">u2").tobytes()},
        *(3, (0, 511)),
        corners=EIGHT_GREYS,
        within=1,
    ),
    *alike(
        {"bands-ranged.npy": lambda: npy(quadrants(((0, 50), (100, 100), (50, 150), (25, 75)), "int16"))},
        *(2, (0, 100, 50, 150)),
        within=1,
        corners=((0, 0), (255, 128), (128, 255), (64, 64)),
    ),
    Case("lossy.webp", lambda: encoded(picture(), "WEBP", quality=95), corners=COLOURS, within=25),
    Case("rgba.webp", lambda: glass("WEBP", exact=True, lossless=True), corners=GLASS),
    Case("16-bit.pgm", lambda: encoded(quadrants(SHADES, np.uint16), "PPM"), corners=EIGHT_GREYS, within=0),
    Case("big-endian.npy", lambda: npy(quadrants(SHADES, ">u2")), corners=EIGHT_GREYS, within=0),
    Case("words.pgm", lambda: b"P2 2 2 1000\n0 333 667 1000\n", (2, 2), EIGHT_GREYS, 1),
    Case("grey.npy", lambda: npy(quadrants(GREYS)), corners=LUMA, within=0),
    Case("rgb-16.npy", lambda: npy(quadrants(SUN, np.uint16)), corners=SUN8, within=0),
    Case("float.npy", lambda: npy(quadrants((0, 0.25, 0.5, 1), "float32")), corners=QUARTERS, within=1),
    Case("flags.npy", lambda: npy(quadrants((0, 1, 1, 0), bool)), corners=FLAGS),
]

_STORED = {1: (0, 1, 2, 3), 2: (1, 0, 3, 2), 3: (3, 2, 1, 0), 4: (2, 3, 0, 1)}
_STORED |= {5: (0, 2, 1, 3), 6: (2, 0, 3, 1), 7: (3, 1, 2, 0), 8: (1, 3, 0, 2)}
TURNED = [
    Case(
        f"{container.lower()}-turned-{turn}.{container.lower()}",
        lambda c=container, t=turn, o=options: encoded(picture(), c, exif=exif(t), **o),
        (WIDE, HIGH) if turn >= 5 else (HIGH, WIDE),
        tuple(COLOURS[quarter] for quarter in quarters),
        4,
    )
    for container, options in (("JPEG", FINE), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}))
    for turn, quarters in _STORED.items()
]

TIFF = [
    *alike(
        {
            "plain.tif": lambda: encoded(picture(), "TIFF"),
            "lzw.tif": lambda: encoded(picture(), "TIFF", compression="tiff_lzw"),
            "cmyk.tif": lambda: encoded(picture("CMYK"), "TIFF"),
            "cmyk-lzw.tif": lambda: encoded(picture("CMYK"), "TIFF", compression="tiff_lzw"),
            "palette-lzw.tif": lambda: palette("TIFF", compression="tiff_lzw"),
            "big.tif": lambda: tiff(quadrants(), "rgb", bigtiff=True),
            "planar.tif": lambda: tiff(np.moveaxis(quadrants(), -1, 0), "rgb", planarconfig="separate"),
        },
        corners=COLOURS,
    ),
    *alike(
        {
            f"cmyk-16-{method}.tif": lambda method=method: tiff(
                np.asarray(picture("CMYK")).astype(np.uint16) * 257, "separated", compression=method
            )
            for method in ("lzw", "zlib")
        },
        corners=COLOURS,
    ),
    Case("jpeg.tif", lambda: encoded(picture(), "TIFF", compression="jpeg"), corners=COLOURS, within=40),
    Case("fax.tif", lambda: encoded(picture("1"), "TIFF", compression="group4")),
    Case("rgba.tif", lambda: glass("TIFF"), corners=GLASS),
    Case("grey-16.tif", lambda: encoded(quadrants(SHADES, np.uint16), "TIFF"), corners=EIGHT_GREYS, within=0),
    Case("white-is-0.tif", lambda: tiff(quadrants(SHADES, np.uint16), "miniswhite"), (32, 48), EIGHT_GREYS[::-1], 0),
    Case("rgb-16.tif", lambda: tiff(quadrants(SUN, np.uint16), "rgb"), corners=SUN8, within=0),
    *alike(
        {"rgb-16-ranged.tif": lambda: tiff(quadrants(tuple((v // 100,) * 3 for v in SHADES), np.uint16), "rgb")},
        *(3, (0, 655.35)),
        corners=EIGHT_GREYS,
        within=1,
    ),
    Case(
        "rgba-16.tif",
        lambda: tiff(quadrants(tuple((0, 0, 0, v) for v in SHADES), np.uint16), "rgb", extrasamples=["unassalpha"]),
        corners=EIGHT_GREYS[::-1],
        within=1,
    ),
    *alike(
        {
            f"{dtype}.tif": lambda dtype=dtype: tiff(quadrants((0, 0.25, 0.5, 1), dtype))
            for dtype in ("float16", "float32", "float64")
        }
        | {"float-lzw.tif": lambda: tiff(quadrants((0, 0.25, 0.5, 1), "float32"), compression="lzw", predictor=True)},
        corners=QUARTERS,
        within=1,
    ),
    *alike(
        {"hot.tif": lambda: tiff(quadrants((-5, 250, 300, 9000), "float32"))},
        *(3, (250, 350)),
        within=1,
        corners=((0,) * 3, (0,) * 3, (128,) * 3, (255,) * 3),
    ),
    Case(
        "gaps.tif",
        lambda: tiff(quadrants((np.nan, 0, 0.5, 1), "float32")),
        within=1,
        corners=((0,) * 3, (0,) * 3, (128,) * 3, (255,) * 3),
    ),
    *alike(
        {
            f"{dtype}-ranged.tif": lambda dtype=dtype: tiff(quadrants((0, 1000, 2000, 3000), dtype))
            for dtype in ("int16", "int32", "uint32")
        },
        *(3, (0, 3000)),
        corners=EIGHT_GREYS,
        within=1,
    ),
    *alike(
        {
            "bands.tif": lambda: bands(quadrants(BANDS, "uint16")),
            "bands-planar.tif": lambda: planes(np.moveaxis(quadrants(BANDS, "uint16"), -1, 0)),
            "bands-pages.tif": lambda: tiff(np.moveaxis(quadrants(BANDS, "uint16"), -1, 0), "minisblack"),
        }
        | {
            f"bands-{method}.tif": lambda method=method: bands(
                quadrants(BANDS, "uint16"), tile=(16, 16), compression=method, predictor=True
            )
            for method in ("zlib", "lzw", "zstd")
        }
        | {
            f"planes-lzw-{number}.tif": lambda o=options: planes(
                np.moveaxis(quadrants(BANDS, "uint16"), -1, 0), compression="lzw", **o
            )
            for number, options in enumerate(
                (
                    {"rowsperstrip": 5},
                    {"rowsperstrip": 32, "byteorder": ">", "predictor": True},
                    {"tile": (16, 32), "bigtiff": True, "predictor": True},
                )
            )
        },
        5,
        corners=BANDS8,
        within=1,
    ),
    Case("pages.tif", lambda: tiff(np.stack([quadrants(GREYS), quadrants(GREYS[::-1])]), "minisblack"), corners=LUMA),
    Case(
        "four-bit.tif",
        lambda: tags({258: 4, 279: 4}, b"\0" * 78 + b"\x00\xff" * 2, width=4, height=2),
        (2, 4),
        ((0,) * 3, (255,) * 3) * 2,
    ),
    Case(
        "premultiplied.tif",
        lambda: tiff(quadrants(((100, 0, 0, 128),) * 4), "rgb", extrasamples=["assocalpha"]),
        corners=((227, 127, 127),) * 4,
    ),
    *alike({"eight-bands.tif": lambda: bands(noise((20, 30, 8)))}, 8, size=(20, 30)),
    *alike(
        {"planes-jpeg.tif": lambda: planes(noise((5, 32, 32)), tile=(16, 16), compression="jpeg")}, 5, size=(32, 32)
    ),
    *alike(
        {
            "near-infrared.tif": lambda: tiff(
                quadrants(tuple((*c, 77) for c in COLOURS)), "rgb", extrasamples=["unspecified"]
            )
        },
        4,
        corners=tuple((*c, 77) for c in COLOURS),
    ),
    Case("loop.tif", lambda: tags({}, b"\0" * 300, following=8), (8, 8), ((0,) * 3,) * 4),
]

BAD_TIFF = [
    *alike(
        {
            "corrupt-lzw.tif": lambda: replaced(encoded(noise(), "TIFF", compression="tiff_lzw"), 2000, b"\xff" * 9),
            "a-million-tiles.tif": lambda: tags(
                {259: 8, 322: 16, 323: 16, 324: 230, 325: 9}, b"\0" * 300, width=2**13, height=2**13
            ),
            "tiles-of-terabytes.tif": lambda: tags({259: 8, 322: 2**20, 323: 2**20, 324: 230, 325: 9}, b"\0" * 300),
            "webp.tif": lambda: tiff(quadrants(), "rgb", compression="webp"),
            "jpeg-2000.tif": lambda: tiff(quadrants(BANDS, "uint16")[:, :, :3], "rgb", compression="jpeg2000"),
            "wide-tiles.tif": lambda: tags({259: 7, 322: 2**20, 323: 32}, b"\0" * 300),
        },
        kind="damaged",
    ),
    *alike(
        {
            "jpeg-tile-bomb.tif": lying_jpeg,
            "bands-lzw-overwritten.tif": lambda: replaced(
                bands(noise((64, 64, 5)), compression="lzw"), 9000, b"\xff" * 9
            ),
        },
        5,
        kind="damaged",
    ),
    *alike({"bands-cut.tif": lambda: cut(bands(quadrants(BANDS, "uint16")), 0.5)}, 5, kind="truncated"),
    *alike(
        {
            "pixels-outside.tif": lambda: tags({273: 5000}, b"\0" * 300),
            "taller-than-held.tif": lambda: tags({}, b"\0" * 300, width=4000, height=4000),
        },
        kind="truncated",
    ),
    *alike(
        {
            "bomb.tif": lambda: tags({}, b"\0" * 300, width=60_000, height=60_000),
            "bomb-of-bands.tif": lambda: tags({258: 64, 339: 3}, b"\0" * 300, width=60_000, height=60_000),
        },
        kind="too large",
    ),
    *alike(
        {
            "loop-of-bands.tif": lambda: tags({258: 32, 279: 256}, b"\0" * 400, following=8),
            "hot-unranged.tif": lambda: tiff(quadrants((-5, 250, 300, 9000), "float32")),
            "infinite.tif": lambda: tiff(quadrants((0, 0, 1, np.inf), "float32")),
        }
        | {
            f"{dtype}-unranged.tif": lambda dtype=dtype: tiff(quadrants((0, 1, 2, 3), dtype))
            for dtype in ("int8", "int16", "int32", "uint32")
        },
        kind="no range",
    ),
    Case("bands-for-three.tif", lambda: bands(quadrants(BANDS, "uint16")), kind="wrong channels"),
]

_NOT_IMAGES: dict[str, bytes] = {
    "text.jpg": b"not an image, " * 20,
    "page.png": b"<!DOCTYPE html><html><body>404</body></html>",
    "answer.jpg": json.dumps({"error": "gone"}).encode(),
    "archive.jpg": zip_of_text(),
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
    "comments.ppm": b"P5" + b"#\n" * 100_000 + b"x",  # for which a bad pattern would try for ever
    "true.npy": npy_promising(True, 2, 3) + bytes(6),
}
BAD = [
    *alike({name: lambda data=data: data for name, data in _NOT_IMAGES.items()}, kind="not an image"),
    *alike(
        {
            f"cut-{int(100 * share)}.{container.lower()}": lambda c=container, s=share: cut(encoded(noise(), c), s)
            for container in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
            for share in (0.3, 0.6, 0.97)
        }
        | {
            "taller-than-told.jpg": lambda: resized_jpeg(WIDE, 500),
            "wider-than-held.jpg": lambda: resized_jpeg(2 * WIDE, HIGH),
            "cut-header.png": lambda: encoded(picture(), "PNG")[:20],
            "cut-header.webp": lambda: encoded(picture(), "WEBP")[:16],
            "no-end.jpg": lambda: encoded(picture(), "JPEG")[:-2],
            "no-end.png": lambda: encoded(picture(), "PNG")[:-12],
            "cut-and-ended.jpg": lambda: cut(encoded(noise(), "JPEG"), 0.6) + b"\xff\xd9",
            "no-pixels.png": lambda: png(64, 64, b"\0" * 99),
            "cut.npy": lambda: npy(quadrants())[:-1],
            "promise.npy": lambda: npy_promising(9_000, 9_000),
        },
        kind="truncated",
    ),
    *alike(
        {
            "header-only.jpg": lambda: b"\xff\xd8\xff\xe0",
            "cut-header.gif": lambda: encoded(picture(), "GIF")[:8],
            "cut-header.tif": lambda: encoded(picture(), "TIFF")[:6],
            "header-checksum.png": lambda: broken_crc(b"IHDR"),
            "pixel-checksum.png": lambda: broken_crc(b"IDAT"),
            "no-width.png": lambda: png(0, 8, b"\0" * 99),
            "wrong-depth.png": lambda: png(8, 8, b"\0" * 999, depth=7),
            "no-zlib.png": lambda: png(8, 8, b"", between=chunk(b"IDAT", b"\xee" * 99)),
            "two-channels.jpg": lambda: resized_jpeg(WIDE, HIGH, 2),
            "no-height.jpg": lambda: resized_jpeg(WIDE, 0),
            "no-page.tif": lambda: b"II*\0\0\0\0\0",
            "directory-outside.tif": lambda: b"II*\0\xff\xff\xff\x7f" + b"\0" * 50,
            "blanks.ppm": lambda: b"P6" + b" " * 60 + b"x",  # for which a bad pattern would try for ever
            "cut-header.npy": lambda: npy(quadrants())[:40],
            "code.npy": lambda: npy(quadrants()).replace(b"'fortran_order': False", b"'fortran_order': open"),
        },
        kind="damaged",
    ),
    *alike(
        {
            "bomb.png": lambda: png(50_000, 50_000, b"\0" * 99),
            "bomb-16.png": lambda: png(50_000, 50_000, b"\0" * 99, depth=16),
            "bomb.jpg": lambda: resized_jpeg(60_000, 60_000),
            "bomb.gif": lambda: replaced(encoded(picture("P"), "GIF"), 6, struct.pack("<HH", 65_535, 65_535)),
            "bomb.bmp": lambda: replaced(encoded(picture(), "BMP"), 18, struct.pack("<ii", 60_000, 60_000)),
            "bomb.ppm": lambda: b"P6 60000 60000 255\n" + b"\0" * 99,
            "bomb-16.ppm": lambda: b"P6 60000 60000 65535\n" + b"\0" * 99,
            "bomb.npy": lambda: npy_promising(60_000, 60_000),
            "endless.npy": lambda: npy_promising(10**40, 2, 3),
            "text-bomb.png": lambda: text_png(b"zTXt", 20_000_000),
            "profile-bomb.png": lambda: text_png(b"iCCP", 20_000_000),
        },
        kind="too large",
    ),
    *alike({"bomb-of-bands.npy": lambda: npy_promising(10_000, 10_000, 9)}, 9, kind="too large"),
    Case("empty.jpg", lambda: b"", kind="empty"),
    Case("lower-than-held.jpg", lambda: resized_jpeg(WIDE, HIGH // 2), (HIGH // 2, WIDE)),
    *alike({"three-for-four.png": lambda: encoded(picture(), "PNG")}, 4, kind="wrong channels"),
    *alike({"three-for-five.jpg": lambda: encoded(picture(), "JPEG")}, 5, kind="wrong channels"),
    Case("seven.npy", lambda: npy(np.zeros((9, 9, 7), np.uint8)), kind="wrong channels"),
]

CASES = [*JPEG, *PNG, *OTHERS, *TURNED, *TIFF, *BAD, *BAD_TIFF]
