"""Opens an image of any format: what a file is shows in its first bytes, never in its name.

- JPEG of 1 or 3 channels: libjpeg-turbo by simplejpeg, about 1.5 times as fast as Pillow (jpeg.py); CMYK, YCCK and
  whatever it warns of: Pillow.
- TIFF of 8 bits, or 16 in grey, of 1, 3 or 4 channels: Pillow. Any other: tifffile and imagecodecs (tiff.py).
- PNG: Pillow; with 16 bits and more than 1 channel, which Pillow would reduce to 8 bits: imagecodecs.
- DICOM: pydicom (dicom.py). HEIC: Pillow, with pillow-heif.
- BMP, GIF, WebP, AVIF, PPM: Pillow. PPM of more than 8 bits, .npy and arrays: NumPy, here.

Then to_uint8.py scales to 8 bits the channels that are asked for, and picture.py turns the image upright.
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

from mpp.data.decoding.bad_image import LEAST_BYTES, BadImage, check_size, one_line, raises_bad_image
from mpp.data.decoding.dicom import is_dicom, open_dicom
from mpp.data.decoding.jpeg import exif_orientation, open_jpeg
from mpp.data.decoding.picture import Picture
from mpp.data.decoding.tiff import MAGIC as TIFF
from mpp.data.decoding.tiff import is_plain, open_tiff
from mpp.data.decoding.to_uint8 import RawValues
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import past_limit
from mpp.data.sources.names import lacking
from mpp.system.process import silence_libtiff, without_warnings

# Left to choose, Pillow would hand PostScript in a .jpg to an interpreter.
_PILLOW = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")
# They would print what becomes a BadImage, TIFF that goes to tifffile, and odd metadata.
for _name in ("PIL.TiffImagePlugin", "imagecodecs"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)
_PNG = b"\x89PNG\r\n\x1a\n"
_NPY = b"\x93NUMPY"
_MAGIC = (b"\xff\xd8\xff", _PNG, b"GIF87a", b"GIF89a", *TIFF)
_NETPBM = re.compile(rb"(P[56])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s")
_NETPBM_HEADER = 4096  # bytes at most


def decode(data: bytes | np.ndarray, options: DecodeOptions) -> np.ndarray:
    """uint8 (H, W, channels) of an encoded image or an array: `open_picture(data, options).pixels()`."""
    return open_picture(data, options).pixels()


@raises_bad_image
def open_picture(data: bytes | np.ndarray, options: DecodeOptions) -> Picture:
    """Reads the header of an image's bytes, or of an array (H, W) or (H, W, C) of real numbers.

    Its pixels will be turned upright by EXIF, composited on the background where transparent, and scaled to 8 bits by
    their range; of an animation or of several pages the first counts. 1 channel becomes 3 and 3 become 1; any other
    number of channels is what the file holds, opacity included. Raises BadImage.
    """
    if isinstance(data, np.ndarray):
        return _from_array(data, options, "array")
    if not data:
        raise BadImage("empty file", "empty")
    if data[:2] == b"\xff\xd8" and options.channels in (1, 3) and options.value_range in ((), (0, 255)):
        picture = open_jpeg(data, options, lambda: _from_pillow(data, options).raw_values())
        if picture is not None:
            return picture
    if is_dicom(data):
        return open_dicom(data, options)
    if data[:6] == _NPY:
        return _from_npy(data, options)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise BadImage("a WebP that is cut off before its end", "truncated")
    header = _NETPBM.match(data, 0, _NETPBM_HEADER) if data[:1] == b"P" else None
    if header and 255 < int(header[4]) <= 65535:
        return _from_netpbm(data, header, options)
    return _from_pillow(data, options)


class _ArrayPicture(Picture):
    """An array that is pixels already; its regions are views."""

    def __init__(self, values: np.ndarray, form: str, options: DecodeOptions) -> None:
        super().__init__(values.shape[:2], form, lambda: RawValues(values), options)
        self._values = values

    def scaled(self, raw: RawValues) -> np.ndarray:
        return np.array(raw.values, order="C")

    def region(
        self, top: int, left: int, height: int, width: int, target_hw: tuple[int, int] | None = None
    ) -> np.ndarray:
        return self._values[top : top + height, left : left + width]


def _from_array(values: np.ndarray, options: DecodeOptions, container: str) -> Picture:
    if values.dtype == np.uint8 and values.shape[2:] == (options.channels,) and values.size and not options.value_range:
        check_size(values.shape[1], values.shape[0], options)
        return _ArrayPicture(values, f"{container} uint8 x {options.channels}", options)
    if values.dtype.kind not in "buif" or values.ndim not in (2, 3) or 0 in values.shape:
        reason = f"the array is {values.dtype} {values.shape}; expected numbers of shape (H, W) or (H, W, C)"
        raise BadImage(reason, "not an image")
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    height, width, channels = values.shape if values.ndim == 3 else (*values.shape, 1)
    check_size(width, height, options, channels * values.dtype.itemsize)
    return Picture((height, width), f"{container} {values.dtype} x {channels}", lambda: RawValues(values), options)


def _from_npy(data: bytes, options: DecodeOptions) -> Picture:
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
    check_size(shape[1], shape[0], options, (shape[2] if len(shape) == 3 else 1) * dtype.itemsize)
    count = math.prod(shape)
    if len(data) - stream.tell() < count * dtype.itemsize:
        raise BadImage(f"a .npy of {shape} {dtype} that ends too early", "truncated")
    values = np.frombuffer(data, dtype, count, stream.tell()).reshape(shape, order="F" if columns_first else "C")
    return _from_array(values, options, "npy")


def _from_netpbm(data: bytes, header: re.Match[bytes], options: DecodeOptions) -> Picture:
    """Binary PGM and PPM of more than 8 bits, which Pillow would scale by itself."""
    width, height, high = (int(header[group]) for group in (2, 3, 4))
    channels = 3 if header[1] == b"P6" else 1
    check_size(width, height, options, 2 * channels)
    if len(data) - header.end() < 2 * width * height * channels:
        raise BadImage("a PPM that ends too early", "truncated")

    def read() -> RawValues:
        values = np.frombuffer(data, ">u2", width * height * channels, header.end()).astype(np.uint16)
        return RawValues(values.reshape(height, width, channels), high=high)

    return Picture((height, width), f"PPM {channels} x uint16", read, options)


def _from_pillow(data: bytes, options: DecodeOptions) -> Picture:
    if Image.MAX_IMAGE_PIXELS and options.max_bytes > LEAST_BYTES * 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = None  # the user asks for more than Pillow's limit, and ours is in its place
    # Pillow warns of odd metadata, and in a worker such a warning would only reach the terminal.
    with without_warnings():
        try:
            formats = _heif_formats(data) if data[4:8] == b"ftyp" else _PILLOW
            image: Any = Image.open(io.BytesIO(data), formats=formats)
            # A PNG of 16 bits that Pillow would reduce to 8.
            wide = image.format == "PNG" and data[24] == 16 and image.mode != "I;16"
            check_size(image.width, image.height, options, 2 * len(image.getbands()) if wide else 1)
            if image.format == "TIFF" and not is_plain(image, options.channels):
                return open_tiff(data, options)
            orientation = _orientation(image, data)
        except Image.DecompressionBombError as error:
            pixels = int(re.sub(r"\D*(\d+).*", r"\1", str(error)))
            reason = f"{pixels:,} pixels, {past_limit(LEAST_BYTES * pixels, options.max_bytes)}"
            raise BadImage(reason, "too large") from error
        except Image.UnidentifiedImageError:
            if data[:4] in TIFF:
                return open_tiff(data, options)
            if data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
                reason = "starts as an image, but its header is cut off, damaged or of a kind that is not read"
                raise BadImage(reason) from None
            raise BadImage("not an image in a known format", "not an image") from None
    form = f"{image.format} {image.mode}"
    if wide or image.mode.startswith("I;16"):
        form = f"{image.format} {len(image.getbands())} x uint16"

    def read() -> RawValues:
        nonlocal image
        opened = image if image is not None else Image.open(io.BytesIO(data), formats=formats)
        image = None  # so that Pillow's pixels are freed once they are read
        with without_warnings():
            if opened.format == "PNG":
                _check_png(data)
            if not wide:
                return _values(opened)
            import imagecodecs  # slow to import, and few need it

            values = imagecodecs.png_decode(data)
            return RawValues(values, alpha=values.ndim == 3 and values.shape[2] in (2, 4))

    return Picture((image.height, image.width), form, read, options, orientation)


def _heif_formats(data: bytes) -> tuple[str, ...]:
    """What Pillow reads a HEIC or AVIF as. Raises BadImage where what it needs is not installed."""
    brands = data[8 : min(int.from_bytes(data[:4]), 256)]
    kind, extra = ("AVIF", "pillow") if b"avif" in brands or b"avis" in brands else ("HEIF", "heif")
    if command := lacking(extra):
        raise BadImage(f"a{'n' * (kind == 'AVIF')} {kind} image, which needs: {command}", "not an image")
    if kind == "HEIF":
        import pillow_heif  # slow to import, and few need it

        pillow_heif.register_heif_opener()
    return (kind,)


def _values(image: Image.Image) -> RawValues:
    if any(tile[0] == "libtiff" for tile in getattr(image, "tile", ())):
        silence_libtiff()
    image.load()
    if image.has_transparency_data and not image.mode.startswith("I"):
        grey = image.mode in ("L", "LA", "La")
        return RawValues(np.asarray(image.convert("LA" if grey else "RGBA")), alpha=True)
    if image.mode in ("1", "L", "RGB", "I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.format == "PPM" and image.mode == "I":  # text of more than 8 bits, which Pillow scales to 16
            values = values.astype(np.uint16)
        return RawValues(values.astype(values.dtype.newbyteorder("="), copy=False))
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow inverts the inks of every JPEG, as Adobe writes them; without its marker they are not inverted.
        image = Image.fromarray(255 - np.asarray(image), "CMYK")
    return RawValues(np.asarray(image.convert("RGB")))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk's body that lies in the file."""
    start = len(_PNG) + 8
    while start + 4 <= len(data):
        (length,) = struct.unpack_from(">I", data, start - 8)
        end = start + length
        if end + 4 > len(data):
            return
        yield data[start - 4 : start], start, end
        start = end + 12


def _check_png(data: bytes) -> None:
    """It is whole, and the chunks of pixels have their checksums, which Pillow passes over."""
    for kind, start, end in _png_chunks(data):
        if kind == b"IEND":
            return
        (stated,) = struct.unpack_from(">I", data, end)
        if kind in (b"IDAT", b"PLTE", b"tRNS") and zlib.crc32(data[start - 4 : end]) != stated:
            raise BadImage(f"a PNG whose {kind.decode()} chunk has a wrong checksum")
    raise BadImage("a PNG that is cut off before its end", "truncated")


def _orientation(image: Any, data: bytes) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns it by itself
    if image.format == "HEIF":  # libheif turns it by these boxes, beside which EXIF does not count
        turned = b"irot" in data or b"imir" in data
        return 1 if turned else image.info.get("original_orientation") or 1
    if image.format == "PNG" and "Raw profile type exif" not in image.info:
        # Without this entry Pillow would decode the pixels, in search of EXIF behind them.
        body = next((data[start:end] for kind, start, end in _png_chunks(data) if kind == b"eXIf"), None)
        image.info["exif"] = b"" if body is None else b"Exif\0\0" + body
    return exif_orientation(image)
