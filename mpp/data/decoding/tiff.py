"""TIFF that Pillow cannot read, or would reduce to 8 bits: any type and number of channels, by tifffile.

LZW is decoded by the libtiff in imagecodecs, which withstands damaged files: tifffile's own LZW can crash the process.
"""

import io
import logging
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from mpp.data.decoding.bad_image import BadImage, check_size, one_line
from mpp.data.decoding.picture import Picture
from mpp.data.decoding.to_uint8 import RawValues, to_uint8
from mpp.data.settings import DecodeOptions
from mpp.system.process import without_warnings

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags
_BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _SAMPLE_FORMAT = 258, 262, 274, 277, 339
_INVERTED, _GREY, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6  # photometric interpretations
_UNCOMPRESSED, _LZW, _JPEG = 1, 5, 7
# None, LZW, JPEG, deflate, packbits, LZMA, zstd: tested on thousands of damaged files. Others print to the terminal,
# allocate whatever size a damaged tile states (WebP), or have not been tested.
_DECODED = (_UNCOMPRESSED, _LZW, _JPEG, 8, 32946, 32773, 34925, 50000)
_PLANAR = 2
_ASSOCIATED, _UNASSOCIATED = (1,), (2,)
_SPARE = 2**24  # pixels that a tile may have beyond the picture


def is_plain(image: Image.Image, channels: int) -> bool:
    """Whether Pillow reads a TIFF and loses nothing that is asked for. Raises BadImage for tiles far too large."""
    tags: Any = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    if image.info.get("compression") == "webp":  # not in Pillow's wheels
        return False
    _check_tiles(tags.get(_TILE_WIDTH, 1), tags.get(_TILE_LENGTH, 1), image.width, image.height)
    wide = image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == _GREY
    if (max(tags.get(_BITS, (1,))) > 8 and not wide) or set(tags.get(_SAMPLE_FORMAT, (1,))) != {1}:
        return False
    bands = len(image.getbands())
    if tags.get(_SAMPLES, 1) != bands and not (channels in (1, 3) and bands >= 3):
        return False
    if bands == 1 and channels > 1:  # perhaps a stack of grey pages
        try:
            image.seek(channels - 1)
        except EOFError:
            return True
        except Exception:  # a later page is damaged: tifffile looks at the first alone
            return False
        image.seek(0)
        return False
    return True


def open_tiff(data: bytes, options: DecodeOptions) -> Picture:
    """Opens the first page, or all where there are as many grey ones as channels are wanted. Raises BadImage."""
    with without_warnings():
        try:
            return _picture(_pages(data, options.channels), data, options)
        except (BadImage, MemoryError):
            raise
        except Exception as error:  # damaged tags raise anything
            raise BadImage(f"a TIFF with damaged tags ({one_line(error)})") from error


def _pages(data: bytes, channels: int) -> list[Any]:
    import tifffile  # slow to import, and few need it

    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it would print what becomes a BadImage here
    file = tifffile.TiffFile(io.BytesIO(data))
    pages: list[Any] = []
    try:
        for number in range(channels + 1):
            pages.append(file.pages[number])
    except IndexError:
        pass
    except Exception:  # damage further on says nothing about the first page
        if not pages:
            raise
    if not pages:
        raise BadImage("a TIFF without a page")
    first = pages[0]
    stack = channels > 1 and len(pages) == channels and all(len(page.shape) == 2 for page in pages)
    alike = stack and all((page.shape, page.dtype) == (first.shape, first.dtype) for page in pages)
    return pages if alike else pages[:1]


def _picture(pages: list[Any], data: bytes, options: DecodeOptions) -> Picture:
    page = pages[0]
    height, width = int(page.imagelength), int(page.imagewidth)
    channels = len(pages) if len(pages) > 1 else int(page.samplesperpixel)
    check_size(width, height, options)
    if page.imagedepth != 1 or page.dtype is None or page.photometric not in (*range(4), _CMYK, _YCBCR):
        raise BadImage("a TIFF of a kind that is not read; save it as plain grey, RGB or channels")
    check_size(width, height, options, channels * page.dtype.itemsize)
    for each in pages:
        _check_tiles(each.tilewidth, each.tilelength, width, height)
        if each.compression not in _DECODED:
            name = getattr(each.compression, "name", each.compression)
            raise BadImage(f"a TIFF of compression {name}, which is not read; save it with deflate, LZW or zstd")
        _check_segments(each, data)

    def read() -> RawValues:
        with without_warnings():
            values = [_values(each, data) for each in pages]
        return _raw(np.stack(values, axis=-1) if len(values) > 1 else values[0], page, options)

    tag = page.tags.get(_ORIENTATION)
    form = {_PALETTE: "TIFF P", _CMYK: "TIFF CMYK"}.get(page.photometric, f"TIFF {channels} x {page.dtype}")
    return Picture((height, width), form, read, options, int(tag.value) if tag is not None else 1)


def _values(page: Any, data: bytes) -> np.ndarray:
    values = _lzw(page, data) if page.compression == _LZW else page.asarray(maxworkers=1)
    return np.moveaxis(values, 0, -1) if page.samplesperpixel > 1 and page.planarconfig == _PLANAR else values


def _lzw(page: Any, data: bytes) -> np.ndarray:
    """What `page.asarray()` would give, by libtiff. Raises imagecodecs.TiffError."""
    import imagecodecs
    import tifffile

    if page.photometric in (_CMYK, _YCBCR):  # libtiff would make RGB of it: say that these are plain channels
        file = io.BytesIO(data)
        copy: Any = tifffile.TiffFile(file).pages[page.index]
        copy.tags[_PHOTOMETRIC].overwrite(_GREY)
        data = file.getvalue()
    return imagecodecs.tiff_decode(data, index=page.index, out=np.empty(page.shape, page.dtype))


def _raw(values: np.ndarray, page: Any, options: DecodeOptions) -> RawValues:
    """Of one page: where colours are asked for, without channels beyond them, and with opacity apart from them."""
    if page.photometric == _PALETTE:
        colours = (np.moveaxis(np.asarray(page.colormap), 0, -1) >> 8).astype(np.uint8)
        return RawValues(colours[values], scaled=True)
    if page.photometric == _CMYK and page.samplesperpixel == 4:
        inks = to_uint8(RawValues(values), DecodeOptions(4, options.value_range[:2]))
        return RawValues(np.asarray(Image.fromarray(inks, "CMYK").convert("RGB")), scaled=True)
    extra = tuple(page.extrasamples)
    alpha = page.samplesperpixel in (2, 4) and extra in (_ASSOCIATED, _UNASSOCIATED)
    if options.channels in (1, 3):
        if alpha and extra == _ASSOCIATED and values.dtype.kind == "u":
            largest, values = np.iinfo(values.dtype).max, values.copy()
            for row in values:  # in floating point all at once would take ten times as much
                opacity = np.maximum(row[:, -1:], 1).astype(np.float64)
                row[:, :-1] = np.minimum(np.rint(row[:, :-1] * (largest / opacity)), largest)
        elif page.photometric == _RGB and page.samplesperpixel > 3 and not alpha:
            values = values[:, :, :3]
    high = 2**page.bitspersample - 1 if values.dtype.kind == "u" and page.bitspersample < 16 else 65535
    return RawValues(values, alpha, high, page.photometric == _INVERTED)


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
    needed = page.nbytes * page.bitspersample // (8 * page.dtype.itemsize)
    if page.compression == _UNCOMPRESSED and sum(counts) < needed:
        raise BadImage("a TIFF with fewer bytes than its size needs", "truncated")
    if page.compression == _JPEG:
        high, wide = min(page.rowsperstrip, page.imagelength), page.imagewidth
        if page.is_tiled:
            high, wide = page.tilelength, page.tilewidth
        for start, count in zip(starts, counts, strict=True):
            height, width, *_ = simplejpeg.decode_jpeg_header(data[start : start + count])
            if height > high or width > wide:  # it would be decoded whole, whatever its size
                raise BadImage(f"a TIFF with a JPEG tile of {width} x {height} pixels; its tiles are {wide} x {high}")
