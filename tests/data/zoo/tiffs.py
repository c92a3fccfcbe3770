"""TIFF of every kind, whole and damaged."""

import struct
from typing import Any

import numpy as np

from mpp.data.settings import DecodeOptions
from tests.data.zoo.making import (
    BANDS,
    BANDS8,
    COLOURS,
    EIGHT,
    EIGHT_GREYS,
    GLASS,
    GREYS,
    LUMA,
    SHADES,
    SUN,
    Case,
    after,
    cut,
    encoded,
    glass,
    noise,
    palette,
    picture,
    plain_tags,
    quadrants,
    replaced,
    tags,
    tiff,
)


def _bands(**options: Any) -> bytes:
    values = np.moveaxis(quadrants(BANDS, "uint16"), -1, 0)
    return tiff(values, photometric="minisblack", planarconfig="separate", **options)


def _jpeg_planes() -> bytes:
    options: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "separate", "tile": (16, 16)}
    return tiff(noise((5, 32, 32)), compression="jpeg", **options)


def _lying_jpeg() -> bytes:
    """Tiles of 16 x 16 in name, of 65,000 x 65,000 by the headers of their JPEGs."""
    data = tiff(
        noise((5, 32, 32)), photometric="minisblack", planarconfig="separate", tile=(16, 16), compression="jpeg"
    )
    return replaced(data, after(data, b"\xff\xc0") + 3, struct.pack(">HH", 65_000, 65_000))


TIFF = [
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
    Case("grey-16.tif", lambda: encoded(quadrants(SHADES, np.uint16), "TIFF"), corners=EIGHT_GREYS, within=0),
    Case(
        "white-is-0.tif",
        lambda: tiff(quadrants(SHADES, np.uint16), photometric="miniswhite"),
        corners=EIGHT_GREYS[::-1],
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
        corners=EIGHT_GREYS,
        within=1,
        reading=DecodeOptions(value_range=(0, 655.35)),
    ),
    Case(
        "rgba-16.tif",
        lambda: tiff(
            quadrants(tuple((0, 0, 0, v) for v in SHADES), np.uint16),
            photometric="rgb",
            extrasamples=["unassalpha"],
        ),
        corners=EIGHT_GREYS[::-1],
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
        reading=DecodeOptions(value_range=(250, 350)),
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
            corners=EIGHT_GREYS,
            within=1,
            reading=DecodeOptions(value_range=(0, 3000)),
        )
        for dtype in ("int16", "int32", "uint32")
    ),
    Case(
        "bands.tif",
        lambda: tiff(quadrants(BANDS, "uint16"), photometric="minisblack", planarconfig="contig"),
        corners=BANDS8,
        within=1,
        reading=DecodeOptions(5),
    ),
    Case(
        "bands-planar.tif",
        lambda: tiff(np.moveaxis(quadrants(BANDS, "uint16"), -1, 0), photometric="minisblack", planarconfig="separate"),
        corners=BANDS8,
        within=1,
        reading=DecodeOptions(5),
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
            reading=DecodeOptions(5),
        )
        for method in ("zlib", "lzw", "zstd")
    ),
    Case(
        "bands-pages.tif",
        lambda: tiff(np.moveaxis(quadrants(BANDS, "uint16"), -1, 0), photometric="minisblack"),
        corners=BANDS8,
        within=1,
        reading=DecodeOptions(5),
    ),
    Case(
        "pages.tif",
        lambda: tiff(np.stack([quadrants(GREYS), quadrants(GREYS[::-1])]), photometric="minisblack"),
        corners=LUMA,
    ),
    Case(
        "four-bit.tif",
        lambda: tags({**plain_tags(4, 2, held=4), 258: (4, 1, 4)}, b"\0" * 78 + b"\x00\xff" * 2),
        (2, 4),
        ((0,) * 3, (255,) * 3) * 2,
    ),
    Case("palette-lzw.tif", lambda: palette(container="TIFF", compression="tiff_lzw"), corners=COLOURS),
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
        reading=DecodeOptions(8),
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
        reading=DecodeOptions(4),
    ),
]

TIFF += [
    Case(
        f"planes-lzw-{number}.tif",
        lambda o=options: _bands(compression="lzw", **o),
        corners=BANDS8,
        within=1,
        reading=DecodeOptions(5),
    )
    for number, options in enumerate(
        (
            {"rowsperstrip": 5},
            {"rowsperstrip": 32, "byteorder": ">", "predictor": True},
            {"tile": (16, 32), "bigtiff": True, "predictor": True},
        )
    )
]
TIFF += [
    Case(
        "float-lzw.tif",
        lambda: tiff(quadrants((0, 0.25, 0.5, 1), "float32"), compression="lzw", predictor=True),
        corners=((0,) * 3, (64,) * 3, (128,) * 3, (255,) * 3),
        within=1,
    ),
    Case(
        "planes-jpeg.tif",
        _jpeg_planes,
        (32, 32),
        reading=DecodeOptions(5),
    ),
]

DAMAGED_TIFF = [
    Case("webp.tif", lambda: tiff(quadrants(), photometric="rgb", compression="webp"), kind="damaged"),
    Case(
        "jpeg-2000.tif",
        lambda: tiff(quadrants(BANDS, "uint16")[:, :, :3], photometric="rgb", compression="jpeg2000"),
        kind="damaged",
    ),
    Case(
        "wide-tiles.tif",
        lambda: tags({**plain_tags(), 259: (4, 1, 7), 322: (4, 1, 2**20), 323: (4, 1, 32)}, b"\0" * 300),
        kind="damaged",
    ),
    Case("jpeg-tile-bomb.tif", _lying_jpeg, kind="damaged", reading=DecodeOptions(5)),
    Case(
        "bands-lzw-overwritten.tif",
        lambda: replaced(
            tiff(noise((64, 64, 5)), photometric="minisblack", planarconfig="contig", compression="lzw"),
            9000,
            b"\xff" * 9,
        ),
        kind="damaged",
        reading=DecodeOptions(5),
    ),
    Case("pixels-outside.tif", lambda: tags(plain_tags(start=5000), b"\0" * 300), kind="truncated"),
    Case("taller-than-held.tif", lambda: tags(plain_tags(4000, 4000), b"\0" * 300), kind="truncated"),
    Case(
        "bands-cut.tif",
        lambda: cut(tiff(quadrants(BANDS, "uint16"), photometric="minisblack", planarconfig="contig"), 0.5),
        kind="truncated",
        reading=DecodeOptions(5),
    ),
    Case("loop.tif", lambda: tags(plain_tags(), b"\0" * 300, following=8), (8, 8), ((0,) * 3,) * 4),
    Case(
        "loop-of-bands.tif",
        lambda: tags({**plain_tags(), 258: (4, 1, 32), 279: (4, 1, 256)}, b"\0" * 400, following=8),
        kind="no range",
    ),
    Case("bomb.tif", lambda: tags(plain_tags(60_000, 60_000), b"\0" * 300), kind="too large"),
    Case(
        "bomb-of-bands.tif",
        lambda: tags({**plain_tags(60_000, 60_000), 258: (4, 1, 64), 339: (4, 1, 3)}, b"\0" * 300),
        kind="too large",
    ),
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
]
