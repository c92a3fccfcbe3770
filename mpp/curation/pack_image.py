"""What becomes of one image: kept as it is, or shrunk and encoded anew; decoded once either way."""

import io
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from mpp.data.decoding import BadImage, open_picture
from mpp.data.settings import DecodeOptions

_EXTENSIONS = {"jpeg": "jpg", "dib": "bmp", "tiff": "tif"}
"""Of formats, where it is not their name."""


@dataclass(frozen=True)
class PackOptions:
    """How images are packed."""

    reading: DecodeOptions
    resize: int = 0
    """Shorter side that larger images are shrunk to; 0: none are."""
    encode: Literal["keep", "jpeg", "png", "webp"] = "keep"
    quality: int = 92
    """Of JPEG and WebP, 1 to 100."""

    @property
    def all_anew(self) -> bool:
        """Whether every image is encoded anew, from its final pixels."""
        # With a stated range, files that kept it beside others that lost it to 8 bits could not be read by one setting.
        return self.encode != "keep" or bool(self.resize and self.reading.value_range)

    @property
    def packed_reading(self) -> DecodeOptions:
        """How a training has to read what is packed, to see the same pixels."""
        return self.final if self.all_anew else self.reading

    @property
    def final(self) -> DecodeOptions:
        """Of what is encoded anew."""
        return DecodeOptions(self.reading.channels, max_bytes=self.reading.max_bytes)


class Packed(NamedTuple):
    """An image, ready to be written."""

    data: bytes
    extension: str
    """By content, without the dot."""
    pixels: np.ndarray
    """uint8 (H, W, channels): what a training will decode from `data`."""


def pack_image(data: bytes | np.ndarray, options: PackOptions) -> Packed:
    """The bytes to pack of a file's bytes or an array (H, W) or (H, W, C).

    An array that is kept becomes a PNG where it is uint8 of 1 or 3 channels, else an .npy.

    Raises:
        BadImage: it cannot be decoded, or not be written as asked.
    """
    picture = open_picture(data, options.reading)
    pixels = picture.pixels()
    small = shrunk(pixels, options.resize)
    anew = options.all_anew or small is not pixels
    if not anew and isinstance(data, np.ndarray):
        if data.dtype == np.uint8 and (data.ndim == 2 or data.shape[2] in (1, 3)):
            return Packed(*_encoded(data.reshape(*data.shape[:2], -1), "png", 0), pixels)
        return Packed(_as_npy(data), "npy", pixels)
    if not anew:
        assert isinstance(data, bytes)  # pyright does not conclude it
        form = picture.form.partition(" ")[0].lower()
        return Packed(data, _EXTENSIONS.get(form, form), pixels)
    container = options.encode
    if container == "keep":
        container = "jpeg" if picture.form.startswith("JPEG") else "png"
    if small.shape[2] in (1, 3):
        encoded, extension = _encoded(small, container, options.quality)
    else:
        encoded, extension = _as_npy(small), "npy"
    return Packed(encoded, extension, open_picture(encoded, options.final).pixels())


def shrunk(pixels: np.ndarray, shorter: int) -> np.ndarray:
    """uint8 (h, w, C) with this shorter side, by Pillow's bicubic filter, which is antialiased; never enlarged.

    Args:
        pixels: uint8 (H, W, C).
        shorter: in pixels; 0 leaves the image as it is.
    """
    height, width, channels = pixels.shape
    side = min(height, width)
    if not shorter or side <= shorter:
        return pixels
    size = (round(width * shorter / side), round(height * shorter / side))
    if channels == 3:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    planes = [Image.fromarray(np.ascontiguousarray(pixels[:, :, channel])) for channel in range(channels)]
    return np.stack([np.asarray(plane.resize(size, Image.Resampling.BICUBIC)) for plane in planes], axis=2)


def _encoded(pixels: np.ndarray, container: str, quality: int) -> tuple[bytes, str]:
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    options = {} if container == "png" else {"quality": quality}
    out = io.BytesIO()
    try:
        image.save(out, container, **options)
    except (OSError, ValueError) as error:  # sides longer than the format can say
        reason = f"{image.width} x {image.height} pixels cannot be written as {container}"
        raise BadImage(reason, "too large") from error
    return out.getvalue(), _EXTENSIONS.get(container, container)


def _as_npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values, allow_pickle=False)
    return out.getvalue()
