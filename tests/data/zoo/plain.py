"""Whole files of every kind but TIFF."""

import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from mpp.data.settings import DecodeOptions
from tests.data.zoo.making import (
    COLOURS,
    EIGHT,
    EIGHT_GREYS,
    FINE,
    GLASS,
    GREYS,
    HIGH,
    LUMA,
    SHADES,
    SUN,
    WIDE,
    Case,
    after,
    chunk,
    encoded,
    exif,
    glass,
    noise,
    npy,
    npy_of,
    palette,
    picture,
    png16,
    quadrants,
    replaced,
    smooth,
    text_png,
)


def _transparent_palette() -> bytes:
    image = Image.fromarray(quadrants((0, 1, 2, 3)), "P")
    image.putpalette([255, 0, 0, 0, 200, 0, 9, 9, 9, 0, 0, 255])
    return encoded(image, "PNG", transparency=2)


def _inverted(ink: bytes) -> bytes:
    """The same CMYK JPEG without Adobe's marker: its inks are taken as they are."""
    place = ink.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", ink, place + 2)
    return ink[:place] + ink[place + 2 + length :]


def _animation(container: str, **options: Any) -> bytes:
    return encoded(picture(), container, save_all=True, append_images=[picture("L").convert("RGB")], **options)


def _top_down_bmp() -> bytes:
    data = encoded(quadrants()[::-1], "BMP")
    return replaced(data, 22, struct.pack("<i", -HIGH))


def _ycck() -> bytes:
    """Adobe's: the inks as luma and two colours, black apart, all inverted."""
    inks = np.asarray(picture("CMYK"))
    colours = np.asarray(Image.fromarray(inks[:, :, :3]).convert("YCbCr"))
    planes = np.concatenate([255 - colours, inks[:, :, 3:]], axis=2)
    data = encoded(Image.fromarray(planes, "CMYK"), "JPEG", **FINE)
    return replaced(data, after(data, b"Adobe") + 6, b"\2")  # its transform


JPEG = [
    Case("ycck.jpg", _ycck, corners=COLOURS, within=6),
    Case("jpeg.jpg", lambda: encoded(picture(), "JPEG", **FINE), corners=COLOURS, within=4),
    Case("progressive.jpg", lambda: encoded(picture(), "JPEG", progressive=True, **FINE), corners=COLOURS, within=4),
    Case("grey.jpg", lambda: encoded(picture("L"), "JPEG", **FINE), corners=LUMA, within=4),
    Case("rgb.jpg", lambda: encoded(picture(), "JPEG", keep_rgb=True, **FINE), corners=COLOURS, within=4),
    Case("cmyk-adobe.jpg", lambda: encoded(picture("CMYK"), "JPEG", **FINE), corners=COLOURS, within=6),
    Case(
        "cmyk-plain.jpg",
        lambda: _inverted(encoded(Image.fromarray(255 - np.asarray(picture("CMYK")), "CMYK"), "JPEG", **FINE)),
        corners=COLOURS,
        within=6,
    ),
    Case("jpeg-to-grey.jpg", lambda: encoded(picture(), "JPEG", **FINE), (32, 48), GREYS, 4, reading=DecodeOptions(1)),
    Case("jpeg-and-more.jpg", lambda: encoded(picture(), "JPEG", **FINE) + b"more" * 50, corners=COLOURS, within=4),
    Case("mpo.jpg", lambda: encoded(picture(), "MPO", save_all=True, append_images=[picture("L").convert("RGB")])),
    Case("png-named.jpg", lambda: encoded(picture(), "PNG"), corners=COLOURS),
    Case("one-pixel.jpg", lambda: encoded(noise((1, 1, 3)), "JPEG"), (1, 1)),
    Case("column.jpg", lambda: encoded(noise((20_000, 1, 3)), "JPEG"), (20_000, 1)),
    Case(
        "exif-damaged.jpg",
        lambda: encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + b"\xee" * 30, **FINE),
        corners=COLOURS,
        within=4,
    ),
    Case("exif-of-9.jpg", lambda: encoded(picture(), "JPEG", exif=exif(9), **FINE), corners=COLOURS, within=4),
    Case(
        "wrong-profile.jpg",
        lambda: encoded(picture(), "JPEG", icc_profile=b"no profile" * 9, **FINE),
        corners=COLOURS,
        within=4,
    ),
    *(
        Case(
            f"smooth-{how.replace(':', '')}-turned-{turn}.jpg",
            lambda how=how, turn=turn: encoded(smooth(), "JPEG", quality=90, subsampling=how, exif=exif(turn)),
            (WIDE, HIGH) if turn >= 5 else (HIGH, WIDE),
        )
        for how in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")
        for turn in (1, 6)
    ),
]


PNG = [
    Case(
        "odd-profile-16.png",
        lambda: png16(quadrants(SUN, np.uint16), chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"no profile"))),
        corners=tuple((0, 255, v) for v in EIGHT),
        within=0,
    ),
    Case("jpeg-named.png", lambda: encoded(picture(), "JPEG", **FINE), corners=COLOURS, within=4),
    Case("rgb.png", lambda: encoded(picture(), "PNG"), corners=COLOURS),
    Case("grey.png", lambda: encoded(picture("L"), "PNG"), corners=LUMA),
    Case(
        "one-bit.png",
        lambda: encoded(Image.fromarray(quadrants((0, 255, 255, 0))).convert("1"), "PNG"),
        corners=((0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3),
    ),
    Case("palette.png", palette, corners=COLOURS),
    Case("palette-glass.png", _transparent_palette, corners=(COLOURS[0], COLOURS[1], (255,) * 3, (0, 0, 255))),
    Case("rgba.png", lambda: glass("PNG"), corners=GLASS),
    Case(
        "rgba-on-black.png",
        lambda: glass("PNG"),
        reading=DecodeOptions(background=(0,)),
        corners=((255, 0, 0), (0,) * 3, (0,) * 3, (0, 0, 255)),
    ),
    Case(
        "rgba-on-sky.png",
        lambda: glass("PNG"),
        reading=DecodeOptions(background=(10, 20, 30)),
        corners=((255, 0, 0), (5, 10, 15), (10, 20, 30), (0, 0, 255)),
    ),
    Case(
        "rgba-raw.png",
        lambda: glass("PNG"),
        reading=DecodeOptions(4),
        corners=((255, 0, 0, 255), (0, 0, 0, 128), (9, 9, 9, 0), (0, 0, 255, 255)),
    ),
    Case("la.png", lambda: glass("PNG", "LA"), corners=((76,) * 3, (127,) * 3, (255,) * 3, (29,) * 3)),
    Case(
        "la-raw.png",
        lambda: glass("PNG", "LA"),
        reading=DecodeOptions(2),
        corners=((76, 255), (0, 128), (9, 0), (29, 255)),
    ),
    Case(
        "colour-key.png",
        lambda: encoded(picture(), "PNG", transparency=(255, 0, 0)),
        corners=((255,) * 3, *COLOURS[1:]),
    ),
    Case("grey-16.png", lambda: encoded(quadrants(SHADES, np.uint16), "PNG"), corners=EIGHT_GREYS, within=0),
    Case(
        "grey-16-ranged.png",
        lambda: encoded(quadrants(SHADES, np.uint16), "PNG"),
        within=1,
        corners=((0,) * 3, (127,) * 3, (255,) * 3, (255,) * 3),
        reading=DecodeOptions(value_range=(0, 43690)),
    ),
    Case("rgb-16.png", lambda: png16(quadrants(SUN, np.uint16)), corners=tuple((0, 255, v) for v in EIGHT), within=0),
    Case(
        "rgb-16-ranged.png",
        lambda: png16(quadrants(tuple((v // 100,) * 3 for v in SHADES), np.uint16)),
        corners=EIGHT_GREYS,
        within=1,
        reading=DecodeOptions(value_range=(0, 655.35)),
    ),
    Case(
        "rgba-16.png", lambda: png16(quadrants(tuple((v, v, v, 65535) for v in SHADES), np.uint16)), corners=EIGHT_GREYS
    ),
    Case("animated.png", lambda: _animation("PNG"), corners=COLOURS),
    Case("one-pixel.png", lambda: encoded(noise((1, 1, 3)), "PNG"), (1, 1)),
    Case("line.png", lambda: encoded(noise((1, 20_000, 3)), "PNG"), (1, 20_000)),
    Case("profile.png", lambda: text_png(b"iCCP", 1000), corners=COLOURS),
]

OTHERS = [
    Case("animated.gif", lambda: _animation("GIF"), corners=COLOURS),
    Case("animated.webp", lambda: _animation("WEBP", lossless=True), corners=COLOURS),
    Case("still.gif", lambda: palette(container="GIF"), corners=COLOURS),
    Case("lossless.webp", lambda: encoded(picture(), "WEBP", lossless=True), corners=COLOURS),
    Case("lossy.webp", lambda: encoded(picture(), "WEBP", quality=95), corners=COLOURS, within=25),
    Case("rgba.webp", lambda: glass("WEBP", exact=True, lossless=True), corners=GLASS),
    Case("plain.bmp", lambda: encoded(picture(), "BMP"), corners=COLOURS),
    Case("palette.bmp", lambda: palette(container="BMP"), corners=COLOURS),
    Case("top-down.bmp", _top_down_bmp, corners=COLOURS),
    Case("plain.ppm", lambda: encoded(picture(), "PPM"), corners=COLOURS),
    Case("16-bit.pgm", lambda: encoded(quadrants(SHADES, np.uint16), "PPM"), corners=EIGHT_GREYS, within=0),
    Case(
        "12-bit.ppm",
        lambda: (
            b"P6 # twelve\n48 32 4095\n" + quadrants(tuple((v // 16,) * 3 for v in SHADES), np.dtype(">u2")).tobytes()
        ),
        corners=EIGHT_GREYS,
        within=1,
    ),
    Case(
        "ranged.ppm",
        lambda: b"P6 48 32 4095\n" + quadrants(tuple((v // 128,) * 3 for v in SHADES), np.dtype(">u2")).tobytes(),
        corners=EIGHT_GREYS,
        within=1,
        reading=DecodeOptions(value_range=(0, 511)),
    ),
    Case("words.pgm", lambda: b"P2 2 2 1000\n0 333 667 1000\n", (2, 2), EIGHT_GREYS, 1),
    Case(
        "bands-ranged.npy",
        lambda: npy(quadrants(((0, 50), (100, 100), (50, 150), (25, 75)), "int16")),
        within=1,
        corners=((0, 0), (255, 128), (128, 255), (64, 64)),
        reading=DecodeOptions(2, (0, 100, 50, 150)),
    ),
    Case("grey.npy", lambda: npy(quadrants(GREYS)), corners=LUMA, within=0),
    Case("rgb-16.npy", lambda: npy(quadrants(SUN, np.uint16)), corners=tuple((0, 255, v) for v in EIGHT), within=0),
    Case(
        "python-2.npy",
        lambda: npy_of("{'descr': '|u1', 'fortran_order': False, 'shape': (32L, 48L, 3L)}", quadrants().tobytes()),
        corners=COLOURS,
        within=0,
    ),
    Case("columns-first.npy", lambda: npy(np.asfortranarray(quadrants())), corners=COLOURS, within=0),
    Case("big-endian.npy", lambda: npy(quadrants(SHADES, ">u2")), corners=EIGHT_GREYS, within=0),
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
]

_STORED = {1: (0, 1, 2, 3), 2: (1, 0, 3, 2), 3: (3, 2, 1, 0), 4: (2, 3, 0, 1)}
_STORED |= {5: (0, 2, 1, 3), 6: (2, 0, 3, 1), 7: (3, 1, 2, 0), 8: (1, 3, 0, 2)}


def _turned(container: str, turn: int) -> bytes:
    options = FINE if container == "JPEG" else {"lossless": True} if container == "WEBP" else {}
    return encoded(picture(), container, exif=exif(turn), **options)


TURNED = [
    Case(
        f"{container.lower()}-turned-{turn}.{container.lower()}",
        lambda c=container, t=turn: _turned(c, t),
        (WIDE, HIGH) if turn >= 5 else (HIGH, WIDE),
        tuple(COLOURS[place] for place in places),
        4,
    )
    for container in ("JPEG", "PNG", "WEBP", "TIFF")
    for turn, places in _STORED.items()
]
