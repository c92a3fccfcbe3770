"""TIFF that Pillow cannot read, or would reduce to 8 bits: any type and number of channels, by tifffile."""

import io
import logging
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from mpp.data.decoding.lzw import LZW, lzw_values
from mpp.data.decoding.picture import BadImage, Picture, Stored, check_size, one_line, turned
from mpp.data.decoding.values import to_pixels
from mpp.data.settings import Reading
from mpp.system.process import without_warnings

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _FORMAT = 258, 262, 274, 277, 339
_INVERTED, _RGB, _PALETTE, _CMYK = 0, 2, 3, 5
_READ = (_INVERTED, 1, _RGB, _PALETTE, _CMYK, 6)
_UNCOMPRESSED, _JPEG, _PLANAR = 1, 7, 2
# None, LZW, JPEG, deflate, packbits, LZMA, zstd: their decoders have borne thousands of damaged files. Others print,
# allocate what a damaged tile says (WebP), or have not been tried.
_DECODED = (_UNCOMPRESSED, LZW, _JPEG, 8, 32946, 32773, 34925, 50000)
_ASSOCIATED, _UNASSOCIATED = 1, 2
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_SPARE = 2**24  # pixels that a tile may have beyond the picture


def is_plain(image: Image.Image, channels: int) -> bool:
    """Whether Pillow reads a TIFF, and loses nothing that is asked for. Raises BadImage for tiles far too large."""
    tags: Any = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    if image.info.get("compression") == "webp":  # not in Pillow's wheels
        return False
    _check_tiles(tags.get(_TILE_WIDTH, 1), tags.get(_TILE_LENGTH, 1), image.width, image.height)
    bits, samples = tags.get(_BITS, (1,)), tags.get(_SAMPLES, 1)
    wide = image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == 1
    if (max(bits) > 8 and not wide) or set(tags.get(_FORMAT, (1,))) != {1}:
        return False
    bands = len(image.getbands())
    if samples != bands and not (channels in (1, 3) and bands >= 3):
        return False
    if bands == 1 and channels > 1:
        try:
            image.seek(channels - 1)
        except EOFError:
            return True
        except Exception:  # a page further on is damaged: tifffile looks at the first alone
            return False
        image.seek(0)
        return False  # perhaps a stack
    return True


def open_tiff(data: bytes, reading: Reading) -> Picture:
    """The first page, or where there are just as many pages of one channel as channels are wanted, all of them.

    Raises:
        BadImage: no such file, one whose pages lie outside it, or too large.
    """
    with without_warnings():
        try:
            pages = _pages(data, reading.channels)
            return _picture(pages, data, reading)
        except (BadImage, MemoryError):
            raise
        except Exception as error:  # damaged tags raise anything
            raise BadImage(f"a TIFF with damaged tags ({one_line(error)})") from error


def _pages(data: bytes, channels: int) -> list[Any]:
    import tifffile  # slow to import, and few need it

    log = logging.getLogger("tifffile")  # tells the terminal what becomes a BadImage here
    log.setLevel(logging.CRITICAL + 1)
    file = tifffile.TiffFile(io.BytesIO(data))
    pages: list[Any] = []
    for number in range(channels + 1):
        try:
            pages.append(file.pages[number])
        except IndexError:
            break
        except Exception:  # damage further on says nothing about the first page
            if not pages:
                raise
            break
    if not pages:
        raise BadImage("a TIFF without a page")
    first = pages[0]
    stack = channels > 1 and len(pages) == channels and all(len(page.shape) == 2 for page in pages)
    alike = stack and all((page.shape, page.dtype) == (first.shape, first.dtype) for page in pages)
    return pages if alike else pages[:1]


def _picture(pages: list[Any], data: bytes, reading: Reading) -> Picture:
    page = pages[0]
    height, width, samples = int(page.imagelength), int(page.imagewidth), int(page.samplesperpixel)
    channels = len(pages) if len(pages) > 1 else samples
    check_size(width, height, reading)
    if page.imagedepth != 1 or page.dtype is None or page.photometric not in _READ:
        raise BadImage("a TIFF of a kind that is not read; save it as plain grey, RGB or channels")
    check_size(width, height, reading, channels * page.dtype.itemsize)
    for part in pages:
        _check_tiles(part.tilewidth, part.tilelength, width, height)
        if part.compression not in _DECODED:
            name = getattr(part.compression, "name", part.compression)
            raise BadImage(f"a TIFF of compression {name}, which is not read; save it with deflate, LZW or zstd")
        _check_segments(part, data)
    tag = page.tags.get(_ORIENTATION)
    orientation = int(tag.value) if tag is not None else 1

    def read() -> Stored:
        with without_warnings():
            values = [_values(part, data) for part in pages]
        if len(values) > 1:
            return Stored(np.stack(values, axis=-1))
        return _stored(values[0], page, reading.channels)

    def scale(stored: Stored) -> np.ndarray:
        return np.ascontiguousarray(turned(_scaled(stored, page, reading), orientation))

    if orientation in (5, 6, 7, 8):
        height, width = width, height
    return Picture(height, width, f"TIFF {channels} x {page.dtype}", read, scale)


def _values(page: Any, data: bytes) -> np.ndarray:
    values = lzw_values(page, data) if page.compression == LZW else page.asarray(maxworkers=1)
    return np.moveaxis(values, 0, -1) if page.samplesperpixel > 1 and page.planarconfig == _PLANAR else values


def _stored(values: np.ndarray, page: Any, channels: int) -> Stored:
    """Where colours are asked for, without channels beyond them, and with opacity apart from them."""
    alpha = page.samplesperpixel in (2, 4) and tuple(page.extrasamples) in ((_ASSOCIATED,), (_UNASSOCIATED,))
    if channels in (1, 3):
        if alpha and tuple(page.extrasamples) == (_ASSOCIATED,) and values.dtype.kind == "u":
            largest, values = np.iinfo(values.dtype).max, values.copy()
            for row in values:  # in floating point all at once would take ten times as much
                opacity = np.maximum(row[:, -1:], 1).astype(np.float64)
                row[:, :-1] = np.minimum(np.rint(row[:, :-1] * (largest / opacity)), largest)
        elif page.photometric == _RGB and page.samplesperpixel > 3 and not alpha:
            values = values[:, :, :3]
    return Stored(values, alpha)


def _scaled(stored: Stored, page: Any, reading: Reading) -> np.ndarray:
    """uint8 (H, W, reading.channels), not turned yet."""
    values, kind = stored.values, page.photometric
    if kind == _PALETTE:
        colours = (np.moveaxis(np.asarray(page.colormap), 0, -1) >> 8).astype(np.uint8)
        return to_pixels(colours[values], Reading(reading.channels))
    if kind == _CMYK and page.samplesperpixel == 4:
        inks = to_pixels(values, Reading(4, reading.value_range[:2]))
        rgb = np.asarray(Image.fromarray(inks, "CMYK").convert("RGB"))
        return to_pixels(rgb, Reading(reading.channels))
    high = 2**page.bitspersample - 1 if values.dtype.kind == "u" and page.bitspersample < 16 else 65535
    return to_pixels(values, reading, alpha=stored.alpha, high=high, inverted=kind == _INVERTED)


def _check_tiles(wide: int, high: int, width: int, height: int) -> None:
    """Decoders allocate a whole tile."""
    if wide * high > width * height + _SPARE:
        raise BadImage(f"a TIFF of {width} x {height} pixels with tiles of {wide} x {high}")


def _check_segments(page: Any, data: bytes) -> None:
    """Strips and tiles lie in the file, and uncompressed ones are as long as the pixels need."""
    starts, counts = page.dataoffsets, page.databytecounts
    wanted = int(np.prod(page.chunked, dtype=float))
    if not len(starts) == len(counts) == wanted or min(counts) < 1:  # missing ones would be filled with 0, slowly
        raise BadImage("a TIFF without all of its strips or tiles", "truncated")
    if max(start + count for start, count in zip(starts, counts, strict=True)) > len(data):
        raise BadImage("a TIFF whose strips or tiles end outside the file", "truncated")
    if page.compression == _UNCOMPRESSED and sum(counts) < page.nbytes * page.bitspersample // (
        8 * page.dtype.itemsize
    ):
        raise BadImage("a TIFF with fewer bytes than its size needs", "truncated")
    if page.compression == _JPEG:
        high, wide = min(page.rowsperstrip, page.imagelength), page.imagewidth
        if page.is_tiled:
            high, wide = page.tilelength, page.tilewidth
        for start, count in zip(starts, counts, strict=True):
            height, width, *_ = simplejpeg.decode_jpeg_header(data[start : start + count])
            if height > high or width > wide:  # it would be decoded whole, whatever its size
                raise BadImage(f"a TIFF with a JPEG tile of {width} x {height} pixels; its tiles are {wide} x {high}")
