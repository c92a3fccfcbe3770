"""Files of every kind that people have, good and bad, each with what must become of it."""

import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from mpp.data.settings import DecodeOptions
from tests.data.picture_files import (
    COLOURS,
    FINE,
    HIGH,
    WIDE,
    animation,
    bands,
    broken_crc,
    chunk,
    cut,
    encoded,
    exif,
    glass,
    jpeg,
    lying_jpeg,
    noise,
    npy,
    npy_of,
    npy_promising,
    palette,
    picture,
    planes,
    png,
    png16,
    quadrants,
    replaced,
    resized_jpeg,
    smooth,
    tags,
    text_png,
    tiff,
    transparent_palette,
    without_adobe,
    ycck,
)


@dataclass(frozen=True)
class Case:
    """One file and what must become of it."""

    name: str
    data: bytes = field(repr=False)
    corners: tuple[Any, ...] = ()
    """Colours or greys at top left, top right, bottom left, bottom right; (): any."""
    within: int = 2
    """Of those colours, grey levels."""
    size: tuple[int, int] = (HIGH, WIDE)
    """Height and width, where it loads."""
    reading: DecodeOptions = DecodeOptions()
    kind: str = ""
    """The kind of BadImage; empty where it loads."""


CASES: list[Case] = []


def good(
    name: str, data: bytes, corners: Any = (), within: int = 2, size: Any = (HIGH, WIDE), options: tuple[Any, ...] = ()
) -> None:
    CASES.append(Case(name, data, tuple(corners), within, size, DecodeOptions(*options)))


def bad(kind: str, files: dict[str, bytes], channels: int = 3) -> None:
    CASES.extend(Case(name, data, reading=DecodeOptions(channels), kind=kind) for name, data in files.items())


GREYS = (76, 117, 29, 255)  # the luma of COLOURS
RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)
GLASS = (RED, 127, WHITE, BLUE)
DEEP, EIGHT = (0, 21845, 43690, 65535), (0, 85, 170, 255)  # four greys in 16 bits, and in 8
GREY_16, LOW_16 = quadrants(DEEP, np.uint16), quadrants([(value // 100,) * 3 for value in DEEP], np.uint16)
SUN, SUN_8 = quadrants([(0, 65535, value) for value in DEEP], np.uint16), [(0, 255, value) for value in EIGHT]
QUARTERS = (0, 0.25, 0.5, 1)
FIVE = quadrants([[round(65535 * (i + j) / 7) for j in range(5)] for i in range(4)], np.uint16)
FIVE_8 = [[round(255 * (i + j) / 7) for j in range(5)] for i in range(4)]
FIVE_PLANES = np.moveaxis(FIVE, -1, 0)

# JPEG
good("jpeg.jpg", jpeg(), COLOURS, 4)
good("progressive.jpg", jpeg(progressive=True), COLOURS, 4)
good("rgb.jpg", jpeg(keep_rgb=True), COLOURS, 4)
good("jpeg-and-more.jpg", jpeg() + b"more" * 50, COLOURS, 4)
good("jpeg-named.png", jpeg(), COLOURS, 4)
good("exif-damaged.jpg", jpeg(exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + b"\xee" * 30), COLOURS, 4)
good("exif-of-9.jpg", jpeg(exif=exif(9)), COLOURS, 4)
good("wrong-profile.jpg", jpeg(icc_profile=b"no profile" * 9), COLOURS, 4)
good("ycck.jpg", ycck(), COLOURS, 6)
good("cmyk-adobe.jpg", jpeg(picture("CMYK")), COLOURS, 6)
plain_inks = Image.fromarray(255 - np.asarray(picture("CMYK")), "CMYK")
good("cmyk-plain.jpg", without_adobe(jpeg(plain_inks)), COLOURS, 6)
good("grey.jpg", jpeg(picture("L")), GREYS, 4)
good("jpeg-to-grey.jpg", jpeg(), GREYS, 4, options=(1,))
good("mpo.jpg", animation("MPO"))
good("one-pixel.jpg", encoded(noise((1, 1, 3)), "JPEG"), size=(1, 1))
good("column.jpg", encoded(noise((20_000, 1, 3)), "JPEG"), size=(20_000, 1))
good("lower-than-held.jpg", resized_jpeg(WIDE, HIGH // 2), size=(HIGH // 2, WIDE))
for how in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
    good(f"smooth-{how.replace(':', '')}-turned-1.jpg", smooth(how, 1))
    good(f"smooth-{how.replace(':', '')}-turned-6.jpg", smooth(how, 6), size=(WIDE, HIGH))

# PNG
good("rgb.png", encoded(picture()), COLOURS)
good("png-named.jpg", encoded(picture()), COLOURS)
good("palette.png", palette(), COLOURS)
good("animated.png", animation("PNG"), COLOURS)
good("profile.png", text_png(b"iCCP", 1000), COLOURS)
good("rgb-16.png", png16(SUN), SUN_8, 0)
good("odd-profile-16.png", png16(SUN, chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"no profile"))), SUN_8, 0)
good("grey.png", encoded(picture("L")), GREYS)
good("one-bit.png", encoded(Image.fromarray(quadrants((0, 255, 255, 0))).convert("1")), (0, 255, 255, 0))
good("palette-glass.png", transparent_palette(), (*COLOURS[:2], WHITE, BLUE))
good("rgba.png", glass(), GLASS)
good("rgba-on-black.png", glass(), (RED, 0, 0, BLUE), options=(3, (), (0,)))
good("rgba-on-sky.png", glass(), (RED, (5, 10, 15), (10, 20, 30), BLUE), options=(3, (), (10, 20, 30)))
good("rgba-raw.png", glass(), ((*RED, 255), (0, 0, 0, 128), (9, 9, 9, 0), (*BLUE, 255)), options=(4,))
good("la.png", glass(mode="LA"), (76, 127, 255, 29))
good("la-to-grey.png", glass(mode="LA"), (76, 127, 255, 29), options=(1,))
good("la-raw.png", glass(mode="LA"), ((76, 255), (0, 128), (9, 0), (29, 255)), options=(2,))
good("colour-key.png", encoded(picture(), transparency=RED), (WHITE, *COLOURS[1:]))
good("grey-16.png", encoded(GREY_16), EIGHT, 0)
good("grey-16-ranged.png", encoded(GREY_16), (0, 127, 255, 255), 1, options=(3, (0, 43690)))
good("rgb-16-ranged.png", png16(LOW_16), EIGHT, 1, options=(3, (0, 655.35)))
good("rgba-16.png", png16(quadrants([(v, v, v, 65535) for v in DEEP], np.uint16)), EIGHT)
good("one-pixel.png", encoded(noise((1, 1, 3))), size=(1, 1))
good("line.png", encoded(noise((1, 20_000, 3))), size=(1, 20_000))

# Other formats
good("animated.gif", animation("GIF"), COLOURS)
good("animated.webp", animation("WEBP", lossless=True), COLOURS)
good("still.gif", palette("GIF"), COLOURS)
good("lossless.webp", encoded(picture(), "WEBP", lossless=True), COLOURS)
good("lossy.webp", encoded(picture(), "WEBP", quality=95), COLOURS, 25)
good("rgba.webp", glass("WEBP", exact=True, lossless=True), GLASS)
good("plain.bmp", encoded(picture(), "BMP"), COLOURS)
good("palette.bmp", palette("BMP"), COLOURS)
good("top-down.bmp", replaced(encoded(quadrants()[::-1], "BMP"), 22, struct.pack("<i", -HIGH)), COLOURS)
good("plain.ppm", encoded(picture(), "PPM"), COLOURS)
twelve = quadrants([(value // 16,) * 3 for value in DEEP], ">u2").tobytes()
good("12-bit.ppm", b"P6 # twelve\n48 32 4095\n" + twelve, EIGHT, 1)
nine = quadrants([(value // 128,) * 3 for value in DEEP], ">u2").tobytes()
good("ranged.ppm", b"P6 48 32 4095\n" + nine, EIGHT, 1, options=(3, (0, 511)))
good("16-bit.pgm", encoded(GREY_16, "PPM"), EIGHT, 0)
good("words.pgm", b"P2 2 2 1000\n0 333 667 1000\n", EIGHT, 1, (2, 2))
python_2 = "{'descr': '|u1', 'fortran_order': False, 'shape': (32L, 48L, 3L)}"
good("python-2.npy", npy_of(python_2, quadrants().tobytes()), COLOURS, 0)
good("columns-first.npy", npy(np.asfortranarray(quadrants())), COLOURS, 0)
good("big-endian.npy", npy(quadrants(DEEP, ">u2")), EIGHT, 0)
good("grey.npy", npy(quadrants(GREYS)), GREYS, 0)
good("rgb-16.npy", npy(SUN), SUN_8, 0)
good("float.npy", npy(quadrants(QUARTERS, "float32")), (0, 64, 128, 255), 1)
good("flags.npy", npy(quadrants((0, 1, 1, 0), bool)), (0, 255, 255, 0))
two = npy(quadrants(((0, 50), (100, 100), (50, 150), (25, 75)), "int16"))
good("bands-ranged.npy", two, ((0, 0), (255, 128), (128, 255), 64), 1, options=(2, (0, 100, 50, 150)))

# Turned ones: which quarter lies where, by EXIF's orientation
STORED = (
    (0, 1, 2, 3),
    (1, 0, 3, 2),
    (3, 2, 1, 0),
    (2, 3, 0, 1),
    (0, 2, 1, 3),
    (2, 0, 3, 1),
    (3, 1, 2, 0),
    (1, 3, 0, 2),
)
for container, how in (("JPEG", FINE), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
    for turn, quarters in enumerate(STORED, 1):
        name, size = (
            f"{container.lower()}-turned-{turn}.{container.lower()}",
            (HIGH, WIDE) if turn < 5 else (WIDE, HIGH),
        )
        good(name, encoded(picture(), container, exif=exif(turn), **how), [COLOURS[each] for each in quarters], 4, size)

# TIFF
good("plain.tif", encoded(picture(), "TIFF"), COLOURS)
good("lzw.tif", encoded(picture(), "TIFF", compression="tiff_lzw"), COLOURS)
good("cmyk.tif", encoded(picture("CMYK"), "TIFF"), COLOURS)
good("cmyk-lzw.tif", encoded(picture("CMYK"), "TIFF", compression="tiff_lzw"), COLOURS)
good("palette-lzw.tif", palette("TIFF", compression="tiff_lzw"), COLOURS)
good("big.tif", tiff(quadrants(), "rgb", bigtiff=True), COLOURS)
good("planar.tif", tiff(np.moveaxis(quadrants(), -1, 0), "rgb", planarconfig="separate"), COLOURS)
for how in ("lzw", "zlib"):
    inks = np.asarray(picture("CMYK")).astype(np.uint16) * 257
    good(f"cmyk-16-{how}.tif", tiff(inks, "separated", compression=how), COLOURS)
good("jpeg.tif", encoded(picture(), "TIFF", compression="jpeg"), COLOURS, 40)
good("fax.tif", encoded(picture("1"), "TIFF", compression="group4"))
good("rgba.tif", glass("TIFF"), GLASS)
good("grey-16.tif", encoded(GREY_16, "TIFF"), EIGHT, 0)
good("white-is-0.tif", tiff(GREY_16, "miniswhite"), EIGHT[::-1], 0)
good("rgb-16.tif", tiff(SUN, "rgb"), SUN_8, 0)
good("rgb-16-ranged.tif", tiff(LOW_16, "rgb"), EIGHT, 1, options=(3, (0, 655.35)))
black = quadrants([(0, 0, 0, value) for value in DEEP], np.uint16)
good("rgba-16.tif", tiff(black, "rgb", extrasamples=["unassalpha"]), EIGHT[::-1], 1)
for dtype in ("float16", "float32", "float64"):
    good(f"{dtype}.tif", tiff(quadrants(QUARTERS, dtype)), (0, 64, 128, 255), 1)
lzw = tiff(quadrants(QUARTERS, "float32"), compression="lzw", predictor=True)
good("float-lzw.tif", lzw, (0, 64, 128, 255), 1)
hot = tiff(quadrants((-5, 250, 300, 9000), "float32"))
good("hot.tif", hot, (0, 0, 128, 255), 1, options=(3, (250, 350)))
good("gaps.tif", tiff(quadrants((np.nan, 0, 0.5, 1), "float32")), (0, 0, 128, 255), 1)
for dtype in ("int16", "int32", "uint32"):
    good(f"{dtype}-ranged.tif", tiff(quadrants((0, 1000, 2000, 3000), dtype)), EIGHT, 1, options=(3, (0, 3000)))
good("bands.tif", bands(FIVE), FIVE_8, 1, options=(5,))
good("bands-planar.tif", planes(FIVE_PLANES), FIVE_8, 1, options=(5,))
good("bands-pages.tif", tiff(FIVE_PLANES, "minisblack"), FIVE_8, 1, options=(5,))
for how in ("zlib", "lzw", "zstd"):
    data = bands(FIVE, tile=(16, 16), compression=how, predictor=True)
    good(f"bands-{how}.tif", data, FIVE_8, 1, options=(5,))
STRIPS = ({"rowsperstrip": 5}, {"rowsperstrip": 32, "byteorder": ">"}, {"tile": (16, 32), "bigtiff": True})
for number, how in enumerate(STRIPS):
    data = planes(FIVE_PLANES, compression="lzw", predictor=number > 0, **how)
    good(f"planes-lzw-{number}.tif", data, FIVE_8, 1, options=(5,))
good("pages.tif", tiff(np.stack([quadrants(GREYS), quadrants(GREYS[::-1])]), "minisblack"), GREYS)
four_bit = tags({258: 4, 279: 4}, b"\0" * 78 + b"\x00\xff" * 2, width=4, height=2)
good("four-bit.tif", four_bit, (0, 255, 0, 255), size=(2, 4))
pink = tiff(quadrants(((100, 0, 0, 128),) * 4), "rgb", extrasamples=["assocalpha"])
good("premultiplied.tif", pink, ((227, 127, 127),) * 4)
good("eight-bands.tif", bands(noise((20, 30, 8))), size=(20, 30), options=(8,))
tiles = planes(noise((5, 32, 32)), tile=(16, 16), compression="jpeg")
good("planes-jpeg.tif", tiles, size=(32, 32), options=(5,))
infrared = [(*colour, 77) for colour in COLOURS]
good("near-infrared.tif", tiff(quadrants(infrared), "rgb", extrasamples=["unspecified"]), infrared, options=(4,))
good("loop.tif", tags({}, b"\0" * 300, following=8), (0,) * 4, size=(8, 8))

# Bad ones
with zipfile.ZipFile(archive := io.BytesIO(), "w") as file:
    file.writestr("a.txt", "text")
bad("empty", {"empty.jpg": b""})
bad("not an image", {
    "text.jpg": b"not an image, " * 20,
    "page.png": b"<!DOCTYPE html><html><body>404</body></html>",
    "answer.jpg": json.dumps({"error": "gone"}).encode(),
    "archive.jpg": archive.getvalue(),
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
})  # fmt: skip
for container in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
    for share in (30, 60, 97):
        bad("truncated", {f"cut-{share}.{container.lower()}": cut(encoded(noise(), container), share / 100)})
bad("truncated", {
    "taller-than-told.jpg": resized_jpeg(WIDE, 500),
    "wider-than-held.jpg": resized_jpeg(2 * WIDE, HIGH),
    "cut-header.png": encoded(picture())[:20],
    "cut-header.webp": encoded(picture(), "WEBP")[:16],
    "no-end.jpg": encoded(picture(), "JPEG")[:-2],
    "no-end.png": encoded(picture())[:-12],
    "cut-and-ended.jpg": cut(encoded(noise(), "JPEG"), 0.6) + b"\xff\xd9",
    "no-pixels.png": png(64, 64, b"\0" * 99),
    "cut.npy": npy(quadrants())[:-1],
    "promise.npy": npy_promising(9_000, 9_000),
    "pixels-outside.tif": tags({273: 5000}, b"\0" * 300),
    "taller-than-held.tif": tags({}, b"\0" * 300, width=4000, height=4000),
})  # fmt: skip
bad("truncated", {"bands-cut.tif": cut(bands(FIVE), 0.5)}, 5)
bad("damaged", {
    "header-only.jpg": b"\xff\xd8\xff\xe0",
    "cut-header.gif": encoded(picture(), "GIF")[:8],
    "cut-header.tif": encoded(picture(), "TIFF")[:6],
    "header-checksum.png": broken_crc(b"IHDR"),
    "pixel-checksum.png": broken_crc(b"IDAT"),
    "no-width.png": png(0, 8, b"\0" * 99),
    "wrong-depth.png": png(8, 8, b"\0" * 999, depth=7),
    "no-zlib.png": png(8, 8, b"", between=chunk(b"IDAT", b"\xee" * 99)),
    "two-channels.jpg": resized_jpeg(WIDE, HIGH, 2),
    "no-height.jpg": resized_jpeg(WIDE, 0),
    "no-page.tif": b"II*\0\0\0\0\0",
    "directory-outside.tif": b"II*\0\xff\xff\xff\x7f" + b"\0" * 50,
    "blanks.ppm": b"P6" + b" " * 60 + b"x",  # for which a bad pattern would try for ever
    "cut-header.npy": npy(quadrants())[:40],
    "code.npy": npy(quadrants()).replace(b"'fortran_order': False", b"'fortran_order': open"),
    "corrupt-lzw.tif": replaced(encoded(noise(), "TIFF", compression="tiff_lzw"), 2000, b"\xff" * 9),
    "a-million-tiles.tif": tags({259: 8, 322: 16, 323: 16, 324: 230, 325: 9}, b"\0" * 300, 0, 2**13, 2**13),
    "tiles-of-terabytes.tif": tags({259: 8, 322: 2**20, 323: 2**20, 324: 230, 325: 9}, b"\0" * 300),
    "webp.tif": tiff(quadrants(), "rgb", compression="webp"),
    "jpeg-2000.tif": tiff(FIVE[:, :, :3], "rgb", compression="jpeg2000"),
    "wide-tiles.tif": tags({259: 7, 322: 2**20, 323: 32}, b"\0" * 300),
})  # fmt: skip
bad("damaged", {
    "jpeg-tile-bomb.tif": lying_jpeg(),
    "bands-lzw-overwritten.tif": replaced(bands(noise((64, 64, 5)), compression="lzw"), 9000, b"\xff" * 9),
}, 5)  # fmt: skip
bad("too large", {
    "bomb.png": png(50_000, 50_000, b"\0" * 99),
    "bomb-16.png": png(50_000, 50_000, b"\0" * 99, depth=16),
    "bomb.jpg": resized_jpeg(60_000, 60_000),
    "bomb.gif": replaced(encoded(picture("P"), "GIF"), 6, struct.pack("<HH", 65_535, 65_535)),
    "bomb.bmp": replaced(encoded(picture(), "BMP"), 18, struct.pack("<ii", 60_000, 60_000)),
    "bomb.ppm": b"P6 60000 60000 255\n" + b"\0" * 99,
    "bomb-16.ppm": b"P6 60000 60000 65535\n" + b"\0" * 99,
    "bomb.npy": npy_promising(60_000, 60_000),
    "endless.npy": npy_promising(10**40, 2, 3),
    "text-bomb.png": text_png(b"zTXt", 20_000_000),
    "profile-bomb.png": text_png(b"iCCP", 20_000_000),
    "bomb.tif": tags({}, b"\0" * 300, width=60_000, height=60_000),
    "bomb-of-bands.tif": tags({258: 64, 339: 3}, b"\0" * 300, width=60_000, height=60_000),
})  # fmt: skip
bad("too large", {"bomb-of-bands.npy": npy_promising(10_000, 10_000, 9)}, 9)
bad(
    "no range",
    {f"{each}-unranged.tif": tiff(quadrants((0, 1, 2, 3), each)) for each in ("int8", "int16", "int32", "uint32")},
)
bad("no range", {
    "loop-of-bands.tif": tags({258: 32, 279: 256}, b"\0" * 400, following=8),
    "hot-unranged.tif": hot,
    "infinite.tif": tiff(quadrants((0, 0, 1, np.inf), "float32")),
})  # fmt: skip
bad("wrong channels", {"three-for-four.png": encoded(picture())}, 4)
bad("wrong channels", {"three-for-five.jpg": encoded(picture(), "JPEG")}, 5)
bad("wrong channels", {"seven.npy": npy(np.zeros((9, 9, 7), np.uint8)), "bands-for-three.tif": bands(FIVE)})
