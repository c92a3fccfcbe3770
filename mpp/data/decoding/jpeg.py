"""JPEG by libjpeg-turbo: a whole image bit-equal to Pillow's, a box that will be resized sooner.

Measured on photographs: scaling by 1/2, 1/4, 1/8 in the inverse DCT gives about twice the rate for large files, the
plain upsampling of colours 5 %; both keep a resized crop within 1 grey level on average. The fast DCT (1.1 levels),
factors between (slow in libjpeg-turbo) and decoders of a region (11 % at best: all bits before it must be read) lost.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from mpp.data.decoding.picture import BadImage, Picture, Stored, bad_image_for_any, check_size, one_line, turned
from mpp.data.settings import Reading
from mpp.system.process import without_warnings

_ORIENTATION = 0x0112
_START_OF_SCAN = b"\xda"
_SPARE = 1.25
"""A scaled box keeps this much more than its target: 0.5 grey levels off, not 0.7."""


class JpegPicture(Picture):
    """A JPEG; see `Picture`.

    Args:
        data: the file.
        height, width: before it is turned.
        form: see `Picture`.
        channels: 1 or 3.
        fallback: gives all its pixels where libjpeg-turbo warns.
        plain_rgb: red, green and blue are stored as they are, not as luma and chroma.
    """

    def __init__(
        self,
        data: bytes,
        height: int,
        width: int,
        form: str,
        channels: int,
        fallback: Callable[[], np.ndarray],
        plain_rgb: bool = False,
    ) -> None:
        self.data, self._stored_hw, self._fallback, self.plain_rgb = data, (height, width), fallback, plain_rgb
        self._colours = "RGB" if channels == 3 else "GRAY"
        self.orientation = orientation(data)
        if self.orientation >= 5:
            height, width = width, height
        super().__init__(height, width, form, self._whole, lambda stored: stored.values)

    def step(self, height: int, width: int, target_hw: tuple[int, int]) -> int:
        """See `Picture`: 1, 2, 4 or 8."""
        step = 1
        while step < 8 and scales(height / step, width / step, target_hw):
            step *= 2
        # Turned, blocks are counted from the far edge.
        while step > 1 and self.orientation != 1 and any(side % step for side in self._stored_hw):
            step //= 2
        return step

    @bad_image_for_any
    def region(
        self, top: int, left: int, height: int, width: int, target_hw: tuple[int, int] | None = None
    ) -> np.ndarray:
        """See `Picture`."""
        if target_hw is None:
            return super().region(top, left, height, width)
        step = self.step(height, width, target_hw)
        while any(edge % step for edge in (top, left, height, width)):
            step //= 2
        pixels = self._decoded(step, fast=True)
        if pixels is None:
            return super().region(top, left, height, width)
        top, left, height, width = (edge // step for edge in (top, left, height, width))
        return turned(pixels, self.orientation)[top : top + height, left : left + width]

    def _whole(self) -> Stored:
        pixels = self._decoded(1, fast=False)
        return Stored(self._fallback() if pixels is None else np.ascontiguousarray(turned(pixels, self.orientation)))

    def _decoded(self, step: int, fast: bool) -> np.ndarray | None:
        """As stored, 1/step of the size; None where Pillow must look. Raises BadImage where it is cut off."""
        height, width = (-(-side // step) for side in self._stored_hw)
        try:
            # Strict: libjpeg's other warnings, such as bytes too many, are for Pillow to judge.
            pixels = simplejpeg.decode_jpeg(
                self.data,
                self._colours,
                fastupsample=fast,
                min_height=height if step > 1 else 0,
                min_width=width if step > 1 else 0,
                strict=True,
            )
        except ValueError as error:
            if "premature end" in str(error).lower():  # Pillow would fill up with grey where the end mark follows
                raise BadImage(one_line(error), "truncated") from error
            return None
        return pixels if pixels.shape[:2] == (height, width) else None


def scales(height: Any, width: Any, target_hw: tuple[int, int]) -> Any:
    """Whether boxes of this size, numbers or arrays, are scaled down while they are decoded; if one, any larger one."""
    return (height >= 2 * _SPARE * target_hw[0]) & (width >= 2 * _SPARE * target_hw[1])


def open_jpeg(data: bytes, reading: Reading, fallback: Callable[[], np.ndarray]) -> JpegPicture | None:
    """A JPEG that libjpeg-turbo reads by itself, or None. Raises BadImage for one too large."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in ("YCbCr", "RGB", "Gray"):
        return None
    check_size(int(width), int(height), reading)
    form = "JPEG grey" if colours == "Gray" else "JPEG"
    return JpegPicture(data, int(height), int(width), form, reading.channels, fallback, colours == "RGB")


def orientation(data: bytes) -> int:
    """EXIF's, of a JPEG; 1 where there is none."""
    header = _before_pixels(data)
    if b"Exif\0\0" not in header and b"tiff:Orientation" not in header:
        return 1
    with without_warnings():
        try:
            return orientation_of(Image.open(io.BytesIO(data), formats=("JPEG",)))
        except Exception:  # the decoding itself will say what is wrong
            return 1


def _before_pixels(data: bytes) -> bytes:
    """The header; all the file where its segments do not follow each other."""
    place = 2
    while data[place : place + 1] == b"\xff":
        if data[place + 1 : place + 2] == _START_OF_SCAN:
            return data[:place]
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return data


def orientation_of(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 where there is none or it is damaged."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF raises anything and says nothing about the pixels
        return 1
    return found if found in range(1, 9) else 1
