"""From encoded bytes or arrays to uint8 pixels; whatever is wrong with an image becomes one `BadImage`.

What a file is shows in its first bytes, never in its name. What reads it:

- JPEG of 1 or 3 channels: libjpeg-turbo by simplejpeg, about 1.5 times as fast as Pillow (`jpeg`); CMYK, YCCK and
  whatever it warns of: Pillow.
- TIFF of 8 bits, or 16 in grey, of 1, 3 or 4 channels: Pillow. Any other: tifffile and imagecodecs (`tiff`), but its
  LZW by Pillow's libtiff (`lzw`).
- PNG: Pillow; with 16 bits and more than 1 channel: imagecodecs. Pillow would reduce it to 8 bits.
- BMP, GIF, WebP, PPM: Pillow. PPM of more than 8 bits, .npy and arrays: NumPy, here.

Then `values` makes uint8 of the channels that are asked for, and EXIF's orientation is applied.
"""

import io
import logging
import math
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mpp.data.decoding.jpeg import open_jpeg, orientation_of
from mpp.data.decoding.picture import (
    LEAST_BYTES,
    BadImage,
    Picture,
    Stored,
    bad_image_for_any,
    check_size,
    one_line,
    turned,
)
from mpp.data.decoding.tiff import MAGIC as TIFF
from mpp.data.decoding.tiff import is_plain, open_tiff
from mpp.data.decoding.values import to_pixels
from mpp.data.settings import Reading
from mpp.data.sources.base import past_limit
from mpp.system.process import silence_libtiff, without_warnings

__all__ = ["BadImage", "Picture", "decode", "one_line", "open_picture"]

# Left to choose, Pillow would hand PostScript in a .jpg to an interpreter.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")
# Tell the terminal of what becomes a BadImage, of TIFF that goes to tifffile, and of odd metadata.
for _name in ("PIL.TiffImagePlugin", "imagecodecs"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)
_PNG = b"\x89PNG\r\n\x1a\n"
_NPY = b"\x93NUMPY"
_MAGIC = (b"\xff\xd8\xff", _PNG, b"GIF87a", b"GIF89a", *TIFF)
_NETPBM = re.compile(rb"(P[2356])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s")
_LONGEST_NETPBM = 4096  # bytes of its header
_BLANK = re.compile(rb"\s")
_TEXT_AT_ONCE = 2**20


def decode(data: bytes | np.ndarray, reading: Reading) -> np.ndarray:
    """Pixels of an encoded image or of an array: `open_picture(data, reading).pixels()`."""
    return open_picture(data, reading).pixels()


@bad_image_for_any
def open_picture(data: bytes | np.ndarray, reading: Reading) -> Picture:
    """An image of any kind, its header read: JPEG, PNG, BMP, GIF, WebP, TIFF, PPM, .npy, or an array.

    Its pixels will be turned upright by EXIF, composited on the background where transparent, and scaled to 8 bits by
    their range; of an animation or of several pages the first counts. 1 channel becomes 3 and 3 become 1; any other
    number of channels is what the file holds, opacity included.

    Args:
        data: a file's bytes, or an array (H, W) or (H, W, C) of real numbers.
        reading: channels, range, background.

    Raises:
        BadImage: not an image, its header damaged, or too large.
        UserError: settings that do not fit.
    """
    if isinstance(data, np.ndarray):
        return _from_array(data, reading, "array")
    if not data:
        raise BadImage("empty file", "empty")
    if data[:2] == b"\xff\xd8" and reading.channels in (1, 3) and reading.value_range in ((), (0, 255)):
        picture = open_jpeg(data, reading, lambda: _from_pillow(data, reading).pixels())
        if picture is not None:
            return picture
    if data[:6] == _NPY:
        return _from_npy(data, reading)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise BadImage("a WebP that is cut off before its end", "truncated")
    if data[:1] == b"P" and (header := _NETPBM.match(data, 0, _LONGEST_NETPBM)) and 255 < int(header[4]) <= 65535:
        return _from_netpbm(data, header, reading)
    return _from_pillow(data, reading)


class _Pixels(Picture):
    """An array that is pixels already; its regions are views."""

    def __init__(self, values: np.ndarray, form: str) -> None:
        height, width = values.shape[:2]
        super().__init__(height, width, form, lambda: Stored(values), lambda stored: np.array(stored.values, order="C"))
        self._values = values

    def region(
        self, top: int, left: int, height: int, width: int, target_hw: tuple[int, int] | None = None
    ) -> np.ndarray:
        """See `Picture`."""
        return self._values[top : top + height, left : left + width]


def _from_array(values: np.ndarray, reading: Reading, form: str) -> Picture:
    if values.dtype == np.uint8 and values.shape[2:] == (reading.channels,) and values.size and not reading.value_range:
        check_size(values.shape[1], values.shape[0], reading, reading.channels)
        return _Pixels(values, f"{form} uint8 x {reading.channels}")
    if values.dtype.kind not in "buif" or values.ndim not in (2, 3) or 0 in values.shape:
        reason = f"the array is {values.dtype} {values.shape}; expected numbers of shape (H, W) or (H, W, C)"
        raise BadImage(reason, "not an image")
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    height, width, channels = values.shape if values.ndim == 3 else (*values.shape, 1)
    check_size(width, height, reading, channels * values.dtype.itemsize)
    form = f"{form} {values.dtype} x {channels}"
    return Picture(height, width, form, lambda: Stored(values), lambda stored: to_pixels(stored.values, reading))


def _from_npy(data: bytes, reading: Reading) -> Picture:
    """Never unpickles: the header is a literal, and the values are taken from the buffer."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with without_warnings():  # of headers that Python 2 wrote
            shape, columns_first, dtype = read(stream)
    except Exception as error:  # the header is anybody's text
        raise BadImage(f"a .npy with a damaged header ({one_line(error)})") from error
    # True passes for a number in numpy's own check.
    sides = len(shape) in (2, 3) and all(type(side) is int and side > 0 for side in shape)
    if dtype.kind not in "buif" or not sides:
        reason = f"the .npy holds {dtype} {shape}; expected numbers of shape (H, W) or (H, W, C)"
        raise BadImage(reason, "not an image")
    check_size(shape[1], shape[0], reading, (shape[2] if len(shape) == 3 else 1) * dtype.itemsize)
    count = math.prod(shape)
    if len(data) - stream.tell() < count * dtype.itemsize:
        raise BadImage(f"a .npy of {shape} {dtype} that ends too early", "truncated")
    values = np.frombuffer(data, dtype, count, stream.tell()).reshape(shape, order="F" if columns_first else "C")
    return _from_array(values, reading, "npy")


def _from_netpbm(data: bytes, header: re.Match[bytes], reading: Reading) -> Picture:
    """PGM and PPM of more than 8 bits, which Pillow would scale by itself."""
    width, height, high = (int(header[group]) for group in (2, 3, 4))
    channels = 3 if header[1] in (b"P3", b"P6") else 1
    check_size(width, height, reading, 2 * channels)
    count, shape = width * height * channels, (height, width, channels)

    def read() -> Stored:
        if header[1] in (b"P5", b"P6"):
            if len(data) - header.end() < 2 * count:
                raise BadImage("a PPM that ends too early", "truncated")
            values = np.frombuffer(data, ">u2", count, header.end()).astype(np.uint16)
        else:
            values = _numbers(data, header.end(), count)
        return Stored(values.reshape(shape))

    if len(data) - header.end() < count:
        raise BadImage("a PPM that ends too early", "truncated")
    form = f"PPM {channels} x uint16"
    return Picture(height, width, form, read, lambda stored: to_pixels(stored.values, reading, high=high))


def _numbers(data: bytes, start: int, count: int) -> np.ndarray:
    """uint16 (count,), written out in a PPM. Piece by piece, for as Python's they take twenty times as much."""
    text = re.sub(rb"#[^\n]*", b"", memoryview(data)[start:])
    values, filled, place = np.empty(count, dtype=np.uint16), 0, 0
    while filled < count:
        blank = _BLANK.search(text, place + _TEXT_AT_ONCE)
        end = blank.start() if blank else len(text)
        words = text[place:end].split()[: count - filled]
        if not words and end == len(text):
            raise BadImage("a PPM that ends too early", "truncated")
        try:
            values[filled : filled + len(words)] = np.array([int(word) for word in words], dtype=np.uint16)
        except (ValueError, OverflowError) as error:
            raise BadImage(f"a PPM with {one_line(error)}") from error
        filled, place = filled + len(words), end
    return values


def _from_pillow(data: bytes, reading: Reading) -> Picture:
    if Image.MAX_IMAGE_PIXELS and reading.max_bytes > LEAST_BYTES * 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = None  # the user asks for more than Pillow's limit, and ours is in its place
    # Pillow warns of odd metadata, and in a worker such a warning would only reach the terminal.
    with without_warnings():
        try:
            image: Any = Image.open(io.BytesIO(data), formats=_FORMATS)
            check_size(image.width, image.height, reading, 2 * len(image.getbands()) if _is_wide(image, data) else 1)
            if image.format == "TIFF" and not is_plain(image, reading.channels):
                return open_tiff(data, reading)
            orientation = _orientation(image, data)
        except Image.DecompressionBombError as error:
            pixels = int(re.sub(r"\D*(\d+).*", r"\1", str(error)))
            reason = f"{pixels:,} pixels, {past_limit(LEAST_BYTES * pixels, reading.max_bytes)}"
            raise BadImage(reason, "too large") from error
        except Image.UnidentifiedImageError:
            if data[:4] in TIFF:
                return open_tiff(data, reading)
            raise _unidentified(data) from None
    width, height = image.size
    wide = _is_wide(image, data)
    form = f"{image.format} {image.mode}"
    if wide or image.mode.startswith("I;16"):
        form = f"{image.format} {len(image.getbands())} x uint16"

    def read() -> Stored:
        nonlocal image
        opened = image if image is not None else Image.open(io.BytesIO(data), formats=_FORMATS)
        image = None  # read once: loading closes it
        with without_warnings():
            if opened.format == "PNG":
                _check_png(data)
            return _wide_png(data) if wide else _values(opened)

    def scale(stored: Stored) -> np.ndarray:
        return np.ascontiguousarray(turned(to_pixels(stored.values, reading, alpha=stored.alpha), orientation))

    if orientation >= 5:
        height, width = width, height
    return Picture(height, width, form, read, scale)


def _is_wide(image: Image.Image, data: bytes) -> bool:
    """A PNG of 16 bits that Pillow would reduce to 8."""
    return image.format == "PNG" and data[24] == 16 and image.mode != "I;16"


def _unidentified(data: bytes) -> BadImage:
    if data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return BadImage("starts as an image, but its header is cut off, damaged or of a kind that is not read")
    return BadImage("not an image in a known format", "not an image")


def _values(image: Image.Image) -> Stored:
    """What a Pillow image holds."""
    if any(tile[0] == "libtiff" for tile in getattr(image, "tile", ())):
        silence_libtiff()
    image.load()
    if image.has_transparency_data and not image.mode.startswith("I"):
        grey = image.mode in ("L", "LA", "La")
        return Stored(np.asarray(image.convert("LA" if grey else "RGBA")), alpha=True)
    if image.mode in ("1", "L", "RGB", "I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        return Stored(values.astype(values.dtype.newbyteorder("="), copy=False))
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow inverts the inks of every JPEG, as Adobe writes them; without its marker they are not inverted.
        image = Image.fromarray(255 - np.asarray(image), "CMYK")
    return Stored(np.asarray(image.convert("RGB")))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk's body that lies in the file."""
    place = len(_PNG)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        start, end = place + 8, place + 8 + length
        if end + 4 > len(data):
            return
        yield data[place + 4 : start], start, end
        place = end + 4


def _check_png(data: bytes) -> None:
    """It is whole, and the chunks of pixels have their checksums, which Pillow passes over."""
    for kind, start, end in _png_chunks(data):
        if kind == b"IEND":
            return
        (stated,) = struct.unpack_from(">I", data, end)
        if kind in (b"IDAT", b"PLTE", b"tRNS") and zlib.crc32(data[start - 4 : end]) != stated:
            raise BadImage(f"a PNG whose {kind.decode()} chunk has a wrong checksum")
    raise BadImage("a PNG that is cut off before its end", "truncated")


def _orientation(image: Image.Image, data: bytes) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns it by itself
    if image.format == "PNG" and "Raw profile type exif" not in image.info:
        # Without this entry Pillow would decode the pixels, in search of EXIF behind them.
        body = next((data[start:end] for kind, start, end in _png_chunks(data) if kind == b"eXIf"), None)
        image.info["exif"] = b"" if body is None else b"Exif\0\0" + body
    return orientation_of(image)


def _wide_png(data: bytes) -> Stored:
    """16-bit colour or opacity, which Pillow would reduce to 8 bits."""
    import imagecodecs  # slow to import, and few need it

    values = imagecodecs.png_decode(data)
    return Stored(values, alpha=values.ndim == 3 and values.shape[2] in (2, 4))
