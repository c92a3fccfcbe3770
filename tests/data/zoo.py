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
from tests.data import picture_files as make
from tests.data.picture_files import COLOURS, FINE, HIGH, WIDE


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
GREY_16, LOW_16 = make.quadrants(DEEP, np.uint16), make.quadrants([(value // 100,) * 3 for value in DEEP], np.uint16)
SUN, SUN_8 = make.quadrants([(0, 65535, value) for value in DEEP], np.uint16), [(0, 255, value) for value in EIGHT]
QUARTERS = (0, 0.25, 0.5, 1)
FIVE = make.quadrants([[round(65535 * (i + j) / 7) for j in range(5)] for i in range(4)], np.uint16)
FIVE_8 = [[round(255 * (i + j) / 7) for j in range(5)] for i in range(4)]
FIVE_PLANES = np.moveaxis(FIVE, -1, 0)

# JPEG
good("jpeg.jpg", make.jpeg(), COLOURS, 4)
good("progressive.jpg", make.jpeg(progressive=True), COLOURS, 4)
good("rgb.jpg", make.jpeg(keep_rgb=True), COLOURS, 4)
good("jpeg-and-more.jpg", make.jpeg() + b"more" * 50, COLOURS, 4)
good("jpeg-named.png", make.jpeg(), COLOURS, 4)
good("exif-damaged.jpg", make.jpeg(exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + b"\xee" * 30), COLOURS, 4)
good("exif-of-9.jpg", make.jpeg(exif=make.exif(9)), COLOURS, 4)
good("wrong-profile.jpg", make.jpeg(icc_profile=b"no profile" * 9), COLOURS, 4)
good("ycck.jpg", make.ycck(), COLOURS, 6)
good("cmyk-adobe.jpg", make.jpeg(make.picture("CMYK")), COLOURS, 6)
plain_inks = Image.fromarray(255 - np.asarray(make.picture("CMYK")), "CMYK")
good("cmyk-plain.jpg", make.without_adobe(make.jpeg(plain_inks)), COLOURS, 6)
good("grey.jpg", make.jpeg(make.picture("L")), GREYS, 4)
good("jpeg-to-grey.jpg", make.jpeg(), GREYS, 4, options=(1,))
good("mpo.jpg", make.animation("MPO"))
good("one-pixel.jpg", make.encoded(make.noise((1, 1, 3)), "JPEG"), size=(1, 1))
good("column.jpg", make.encoded(make.noise((20_000, 1, 3)), "JPEG"), size=(20_000, 1))
good("lower-than-held.jpg", make.resized_jpeg(WIDE, HIGH // 2), size=(HIGH // 2, WIDE))
for how in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
    good(f"smooth-{how.replace(':', '')}-turned-1.jpg", make.smooth(how, 1))
    good(f"smooth-{how.replace(':', '')}-turned-6.jpg", make.smooth(how, 6), size=(WIDE, HIGH))

# PNG
good("rgb.png", make.encoded(make.picture()), COLOURS)
good("png-named.jpg", make.encoded(make.picture()), COLOURS)
good("palette.png", make.palette(), COLOURS)
good("animated.png", make.animation("PNG"), COLOURS)
good("profile.png", make.text_png(b"iCCP", 1000), COLOURS)
good("rgb-16.png", make.png16(SUN), SUN_8, 0)
good("odd-profile-16.png", make.png16(SUN, make.chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"no profile"))), SUN_8, 0)
for container in ("PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
    good(f"to-grey.{container.lower()}", make.encoded(make.picture(), container), GREYS, options=(1,))
good("grey.png", make.encoded(make.picture("L")), GREYS)
good("one-bit.png", make.encoded(Image.fromarray(make.quadrants((0, 255, 255, 0))).convert("1")), (0, 255, 255, 0))
good("palette-glass.png", make.transparent_palette(), (*COLOURS[:2], WHITE, BLUE))
good("rgba.png", make.glass(), GLASS)
good("rgba-on-black.png", make.glass(), (RED, 0, 0, BLUE), options=(3, (), (0,)))
good("rgba-on-sky.png", make.glass(), (RED, (5, 10, 15), (10, 20, 30), BLUE), options=(3, (), (10, 20, 30)))
good("rgba-raw.png", make.glass(), ((*RED, 255), (0, 0, 0, 128), (9, 9, 9, 0), (*BLUE, 255)), options=(4,))
good("la.png", make.glass(mode="LA"), (76, 127, 255, 29))
good("la-to-grey.png", make.glass(mode="LA"), (76, 127, 255, 29), options=(1,))
good("la-raw.png", make.glass(mode="LA"), ((76, 255), (0, 128), (9, 0), (29, 255)), options=(2,))
good("colour-key.png", make.encoded(make.picture(), transparency=RED), (WHITE, *COLOURS[1:]))
good("grey-16.png", make.encoded(GREY_16), EIGHT, 0)
good("grey-16-ranged.png", make.encoded(GREY_16), (0, 127, 255, 255), 1, options=(3, (0, 43690)))
good("rgb-16-ranged.png", make.png16(LOW_16), EIGHT, 1, options=(3, (0, 655.35)))
good("rgba-16.png", make.png16(make.quadrants([(v, v, v, 65535) for v in DEEP], np.uint16)), EIGHT)
good("one-pixel.png", make.encoded(make.noise((1, 1, 3))), size=(1, 1))
good("line.png", make.encoded(make.noise((1, 20_000, 3))), size=(1, 20_000))

# Other formats
good("animated.gif", make.animation("GIF"), COLOURS)
good("animated.webp", make.animation("WEBP", lossless=True), COLOURS)
good("still.gif", make.palette("GIF"), COLOURS)
good("lossless.webp", make.encoded(make.picture(), "WEBP", lossless=True), COLOURS)
good("lossy.webp", make.encoded(make.picture(), "WEBP", quality=95), COLOURS, 25)
good("rgba.webp", make.glass("WEBP", exact=True, lossless=True), GLASS)
good("plain.bmp", make.encoded(make.picture(), "BMP"), COLOURS)
good("palette.bmp", make.palette("BMP"), COLOURS)
good("top-down.bmp", make.replaced(make.encoded(make.quadrants()[::-1], "BMP"), 22, struct.pack("<i", -HIGH)), COLOURS)
good("plain.ppm", make.encoded(make.picture(), "PPM"), COLOURS)
twelve = make.quadrants([(value // 16,) * 3 for value in DEEP], ">u2").tobytes()
good("12-bit.ppm", b"P6 # twelve\n48 32 4095\n" + twelve, EIGHT, 1)
nine = make.quadrants([(value // 128,) * 3 for value in DEEP], ">u2").tobytes()
good("ranged.ppm", b"P6 48 32 4095\n" + nine, EIGHT, 1, options=(3, (0, 511)))
good("16-bit.pgm", make.encoded(GREY_16, "PPM"), EIGHT, 0)
good("words.pgm", b"P2 2 2 1000\n0 333 667 1000\n", EIGHT, 1, (2, 2))
python_2 = "{'descr': '|u1', 'fortran_order': False, 'shape': (32L, 48L, 3L)}"
good("python-2.npy", make.npy_of(python_2, make.quadrants().tobytes()), COLOURS, 0)
good("columns-first.npy", make.npy(np.asfortranarray(make.quadrants())), COLOURS, 0)
good("big-endian.npy", make.npy(make.quadrants(DEEP, ">u2")), EIGHT, 0)
good("grey.npy", make.npy(make.quadrants(GREYS)), GREYS, 0)
good("rgb-16.npy", make.npy(SUN), SUN_8, 0)
good("float.npy", make.npy(make.quadrants(QUARTERS, "float32")), (0, 64, 128, 255), 1)
good("flags.npy", make.npy(make.quadrants((0, 1, 1, 0), bool)), (0, 255, 255, 0))
two = make.npy(make.quadrants(((0, 50), (100, 100), (50, 150), (25, 75)), "int16"))
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
        good(
            name,
            make.encoded(make.picture(), container, exif=make.exif(turn), **how),
            [COLOURS[each] for each in quarters],
            4,
            size,
        )

# TIFF
good("plain.tif", make.encoded(make.picture(), "TIFF"), COLOURS)
good("lzw.tif", make.encoded(make.picture(), "TIFF", compression="tiff_lzw"), COLOURS)
good("cmyk.tif", make.encoded(make.picture("CMYK"), "TIFF"), COLOURS)
good("cmyk-lzw.tif", make.encoded(make.picture("CMYK"), "TIFF", compression="tiff_lzw"), COLOURS)
good("palette-lzw.tif", make.palette("TIFF", compression="tiff_lzw"), COLOURS)
good("big.tif", make.tiff(make.quadrants(), "rgb", bigtiff=True), COLOURS)
good("planar.tif", make.tiff(np.moveaxis(make.quadrants(), -1, 0), "rgb", planarconfig="separate"), COLOURS)
for how in ("lzw", "zlib"):
    inks = np.asarray(make.picture("CMYK")).astype(np.uint16) * 257
    good(f"cmyk-16-{how}.tif", make.tiff(inks, "separated", compression=how), COLOURS)
good("jpeg.tif", make.encoded(make.picture(), "TIFF", compression="jpeg"), COLOURS, 40)
good("fax.tif", make.encoded(make.picture("1"), "TIFF", compression="group4"))
good("rgba.tif", make.glass("TIFF"), GLASS)
good("grey-16.tif", make.encoded(GREY_16, "TIFF"), EIGHT, 0)
good("grey-16-big-endian.tif", make.tiff(GREY_16, byteorder=">"), EIGHT, 0)
good("white-is-0.tif", make.tiff(GREY_16, "miniswhite"), EIGHT[::-1], 0)
good("rgb-16.tif", make.tiff(SUN, "rgb"), SUN_8, 0)
good("rgb-16-ranged.tif", make.tiff(LOW_16, "rgb"), EIGHT, 1, options=(3, (0, 655.35)))
black = make.quadrants([(0, 0, 0, value) for value in DEEP], np.uint16)
good("rgba-16.tif", make.tiff(black, "rgb", extrasamples=["unassalpha"]), EIGHT[::-1], 1)
for dtype in ("float16", "float32", "float64"):
    good(f"{dtype}.tif", make.tiff(make.quadrants(QUARTERS, dtype)), (0, 64, 128, 255), 1)
lzw = make.tiff(make.quadrants(QUARTERS, "float32"), compression="lzw", predictor=True)
good("float-lzw.tif", lzw, (0, 64, 128, 255), 1)
hot = make.tiff(make.quadrants((-5, 250, 300, 9000), "float32"))
good("hot.tif", hot, (0, 0, 128, 255), 1, options=(3, (250, 350)))
good("gaps.tif", make.tiff(make.quadrants((np.nan, 0, 0.5, 1), "float32")), (0, 0, 128, 255), 1)
for dtype in ("int16", "int32", "uint32"):
    good(
        f"{dtype}-ranged.tif", make.tiff(make.quadrants((0, 1000, 2000, 3000), dtype)), EIGHT, 1, options=(3, (0, 3000))
    )
good("bands.tif", make.bands(FIVE), FIVE_8, 1, options=(5,))
good("bands-planar.tif", make.planes(FIVE_PLANES), FIVE_8, 1, options=(5,))
good("bands-pages.tif", make.tiff(FIVE_PLANES, "minisblack"), FIVE_8, 1, options=(5,))
for how in ("zlib", "lzw", "zstd"):
    data = make.bands(FIVE, tile=(16, 16), compression=how, predictor=True)
    good(f"bands-{how}.tif", data, FIVE_8, 1, options=(5,))
STRIPS = ({"rowsperstrip": 5}, {"rowsperstrip": 32, "byteorder": ">"}, {"tile": (16, 32), "bigtiff": True})
for number, how in enumerate(STRIPS):
    data = make.planes(FIVE_PLANES, compression="lzw", predictor=number > 0, **how)
    good(f"planes-lzw-{number}.tif", data, FIVE_8, 1, options=(5,))
good("pages.tif", make.tiff(np.stack([make.quadrants(GREYS), make.quadrants(GREYS[::-1])]), "minisblack"), GREYS)
four_bit = make.tags({258: 4, 279: 4}, b"\0" * 78 + b"\x00\xff" * 2, width=4, height=2)
good("four-bit.tif", four_bit, (0, 255, 0, 255), size=(2, 4))
pink = make.tiff(make.quadrants(((100, 0, 0, 128),) * 4), "rgb", extrasamples=["assocalpha"])
good("premultiplied.tif", pink, ((227, 127, 127),) * 4)
good("eight-bands.tif", make.bands(make.noise((20, 30, 8))), size=(20, 30), options=(8,))
tiles = make.planes(make.noise((5, 32, 32)), tile=(16, 16), compression="jpeg")
good("planes-jpeg.tif", tiles, size=(32, 32), options=(5,))
infrared = [(*colour, 77) for colour in COLOURS]
good(
    "near-infrared.tif",
    make.tiff(make.quadrants(infrared), "rgb", extrasamples=["unspecified"]),
    infrared,
    options=(4,),
)
good("loop.tif", make.tags({}, b"\0" * 300, following=8), (0,) * 4, size=(8, 8))

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
    "icon.ico": make.encoded(make.picture(), "ICO"),
    "targa.tga": make.encoded(make.picture(), "TGA"),
    "flag.xbm": make.encoded(make.picture("1"), "XBM"),
    "pickle.npy": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "lists.npy": make.npy(np.array([{"a": 1}, None], dtype=object)),
    "words.npy": make.npy(np.array([["a", "b"]])),
    "cube.npy": make.npy(np.zeros((2, 3, 4, 5), np.uint8)),
    "nothing.npy": make.npy(np.zeros((0, 4), np.uint8)),
    "complex.npy": make.npy(np.zeros((4, 4), np.complex64)),
    "complex.tif": make.tiff(np.zeros((4, 4), np.complex64)),
    "comments.ppm": b"P5" + b"#\n" * 100_000 + b"x",  # for which a bad pattern would try for ever
    "true.npy": make.npy_promising(True, 2, 3) + bytes(6),
})  # fmt: skip
for container in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
    for share in (30, 60, 97):
        bad(
            "truncated",
            {f"cut-{share}.{container.lower()}": make.cut(make.encoded(make.noise(), container), share / 100)},
        )
bad("truncated", {
    "taller-than-told.jpg": make.resized_jpeg(WIDE, 500),
    "wider-than-held.jpg": make.resized_jpeg(2 * WIDE, HIGH),
    "cut-header.png": make.encoded(make.picture())[:20],
    "cut-header.webp": make.encoded(make.picture(), "WEBP")[:16],
    "no-end.jpg": make.encoded(make.picture(), "JPEG")[:-2],
    "no-end.png": make.encoded(make.picture())[:-12],
    "cut-and-ended.jpg": make.cut(make.encoded(make.noise(), "JPEG"), 0.6) + b"\xff\xd9",
    "no-pixels.png": make.png(64, 64, b"\0" * 99),
    "cut.npy": make.npy(make.quadrants())[:-1],
    "promise.npy": make.npy_promising(9_000, 9_000),
    "pixels-outside.tif": make.tags({273: 5000}, b"\0" * 300),
    "taller-than-held.tif": make.tags({}, b"\0" * 300, width=4000, height=4000),
})  # fmt: skip
bad("truncated", {"bands-cut.tif": make.cut(make.bands(FIVE), 0.5)}, 5)
bad("damaged", {
    "header-only.jpg": b"\xff\xd8\xff\xe0",
    "cut-header.gif": make.encoded(make.picture(), "GIF")[:8],
    "cut-header.tif": make.encoded(make.picture(), "TIFF")[:6],
    "header-checksum.png": make.broken_crc(b"IHDR"),
    "pixel-checksum.png": make.broken_crc(b"IDAT"),
    "no-width.png": make.png(0, 8, b"\0" * 99),
    "wrong-depth.png": make.png(8, 8, b"\0" * 999, depth=7),
    "no-zlib.png": make.png(8, 8, b"", between=make.chunk(b"IDAT", b"\xee" * 99)),
    "two-channels.jpg": make.resized_jpeg(WIDE, HIGH, 2),
    "no-height.jpg": make.resized_jpeg(WIDE, 0),
    "no-page.tif": b"II*\0\0\0\0\0",
    "directory-outside.tif": b"II*\0\xff\xff\xff\x7f" + b"\0" * 50,
    "blanks.ppm": b"P6" + b" " * 60 + b"x",  # for which a bad pattern would try for ever
    "cut-header.npy": make.npy(make.quadrants())[:40],
    "code.npy": make.npy(make.quadrants()).replace(b"'fortran_order': False", b"'fortran_order': open"),
    "corrupt-lzw.tif": make.replaced(make.encoded(make.noise(), "TIFF", compression="tiff_lzw"), 2000, b"\xff" * 9),
    "a-million-tiles.tif": make.tags({259: 8, 322: 16, 323: 16, 324: 230, 325: 9}, b"\0" * 300, 0, 2**13, 2**13),
    "tiles-of-terabytes.tif": make.tags({259: 8, 322: 2**20, 323: 2**20, 324: 230, 325: 9}, b"\0" * 300),
    "webp.tif": make.tiff(make.quadrants(), "rgb", compression="webp"),
    "jpeg-2000.tif": make.tiff(FIVE[:, :, :3], "rgb", compression="jpeg2000"),
    "wide-tiles.tif": make.tags({259: 7, 322: 2**20, 323: 32}, b"\0" * 300),
})  # fmt: skip
five_lzw = make.bands(make.noise((64, 64, 5)), compression="lzw")
bad("damaged", {
    "jpeg-tile-bomb.tif": make.lying_jpeg(),
    "bands-lzw-overwritten.tif": make.replaced(five_lzw, 9000, b"\xff" * 9),
}, 5)  # fmt: skip
bad("too large", {
    "bomb.png": make.png(50_000, 50_000, b"\0" * 99),
    "bomb-16.png": make.png(50_000, 50_000, b"\0" * 99, depth=16),
    "bomb.jpg": make.resized_jpeg(60_000, 60_000),
    "bomb.gif": make.replaced(make.encoded(make.picture("P"), "GIF"), 6, struct.pack("<HH", 65_535, 65_535)),
    "bomb.bmp": make.replaced(make.encoded(make.picture(), "BMP"), 18, struct.pack("<ii", 60_000, 60_000)),
    "bomb.ppm": b"P6 60000 60000 255\n" + b"\0" * 99,
    "bomb-16.ppm": b"P6 60000 60000 65535\n" + b"\0" * 99,
    "bomb.npy": make.npy_promising(60_000, 60_000),
    "endless.npy": make.npy_promising(10**40, 2, 3),
    "text-bomb.png": make.text_png(b"zTXt", 20_000_000),
    "profile-bomb.png": make.text_png(b"iCCP", 20_000_000),
    "bomb.tif": make.tags({}, b"\0" * 300, width=60_000, height=60_000),
    "bomb-of-bands.tif": make.tags({258: 64, 339: 3}, b"\0" * 300, width=60_000, height=60_000),
})  # fmt: skip
bad("too large", {"bomb-of-bands.npy": make.npy_promising(10_000, 10_000, 9)}, 9)
bad(
    "no range",
    {
        f"{each}-unranged.tif": make.tiff(make.quadrants((0, 1, 2, 3), each))
        for each in ("int8", "int16", "int32", "uint32")
    },
)
bad("no range", {
    "loop-of-bands.tif": make.tags({258: 32, 279: 256}, b"\0" * 400, following=8),
    "hot-unranged.tif": hot,
    "infinite.tif": make.tiff(make.quadrants((0, 0, 1, np.inf), "float32")),
})  # fmt: skip
bad("wrong channels", {"three-for-four.png": make.encoded(make.picture())}, 4)
bad("wrong channels", {"three-for-five.jpg": make.encoded(make.picture(), "JPEG")}, 5)
bad("wrong channels", {"seven.npy": make.npy(np.zeros((9, 9, 7), np.uint8)), "bands-for-three.tif": make.bands(FIVE)})
