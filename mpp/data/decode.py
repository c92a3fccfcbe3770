"""From encoded bytes to uint8 pixels; whatever is wrong with an image becomes one `BadImage`.

JPEG goes through simplejpeg, which is about 1.7 times as fast as Pillow; all the rest, and every JPEG that is out of
the ordinary (turned by EXIF, CMYK, damaged), through Pillow.
"""

import io
import re
import warnings

import numpy as np
import simplejpeg
from PIL import Image

from mpp.errors import RunError

MAX_PIXELS = 178_956_970
"""Larger images are refused before decoding: Pillow's own limit of a decompression bomb."""

# Only what `folder:` takes. Left to choose, Pillow would hand PostScript in a .jpg to an interpreter.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(RunError):
    """An image that cannot be used; its text is the reason, in one line."""


def decode(data: bytes | np.ndarray, channels: int) -> np.ndarray:
    """Pixels of an encoded image (JPEG, PNG, BMP, GIF, WebP, TIFF, PPM) or of an array.

    Encoded images are turned upright by EXIF, composited on white where transparent, and scaled from 16 to 8 bits by
    65535 : 255; of an animation the first frame counts.

    Args:
        data: encoded bytes, or uint8 (H, W) or (H, W, C).
        channels: of the result; encoded images give 1 or 3.

    Returns:
        uint8 (H, W, channels), contiguous and writable.

    Raises:
        BadImage: not an image, damaged, too large, or of channels that cannot become `channels`.
    """
    if isinstance(data, np.ndarray):
        return _from_array(data, channels)
    if channels not in (1, 3):
        raise BadImage(f"an encoded image gives 1 or 3 channels, the model takes {channels} (model.in_chans)")
    if not data:
        raise BadImage("empty file")
    pixels = _from_jpeg(data, channels) if data[:2] == b"\xff\xd8" else None
    return _from_pillow(data, channels) if pixels is None else pixels


def _from_array(image: np.ndarray, channels: int) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
        raise BadImage(f"the array is {image.dtype} {image.shape}; expected uint8 (H, W) or (H, W, C)")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.shape[2] != channels:
        if image.shape[2] == 1 and channels == 3:
            image = np.repeat(image, 3, axis=2)
        elif image.shape[2] == 3 and channels == 1:
            image = _luma(image)
        else:
            raise BadImage(f"has {image.shape[2]} channels, the model takes {channels} (model.in_chans)")
    return np.require(image, requirements=["C_CONTIGUOUS", "WRITEABLE"])


def _luma(image: np.ndarray) -> np.ndarray:
    """ITU-R 601-2 luma in Pillow's own integers, so that arrays and encoded images agree."""
    weighted = image.astype(np.uint32) @ np.array([19595, 38470, 7471], dtype=np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)[:, :, None]


def _from_jpeg(data: bytes, channels: int) -> np.ndarray | None:
    """The fast path, or None where Pillow must look."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("CMYK", "YCCK"):
            return None
        _check_size(int(width), int(height))
        if (b"Exif\0\0" in data or b"tiff:Orientation" in data) and _turn_of(data) is not None:
            return None
        # Strict: libjpeg's warnings, such as a premature end, are for Pillow to judge.
        return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY", strict=True)
    except ValueError:
        return None


def _turn_of(data: bytes) -> Image.Transpose | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _turn(Image.open(io.BytesIO(data), formats=("JPEG",)))
        except Exception:  # the full decoding will say what is wrong
            return None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns the image upright; None where it stands already or its EXIF is damaged."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises anything and says nothing about the pixels
        return None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels; more than {MAX_PIXELS:,} are taken for a decompression bomb")


def _from_pillow(data: bytes, channels: int) -> np.ndarray:
    # Pillow warns of odd metadata, and in a worker such a warning would only reach the terminal.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_size(*image.size)
                image.load()
                turn = _turn(image)
                upright = image if turn is None else image.transpose(turn)
                pixels = np.array(_eight_bits(upright, "RGB" if channels == 3 else "L", image.format))
        except (BadImage, MemoryError):
            raise
        except Image.UnidentifiedImageError:
            raise BadImage("not an image in a known format, or cut off in its header") from None
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
            raise BadImage(one_line(error)) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _eight_bits(image: Image.Image, mode: str, container: str | None) -> Image.Image:
    """The image in mode L or RGB: depth first, then transparency, then colour."""
    if image.mode.startswith("I;16") or (image.mode == "I" and container in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert(mode)
    if image.mode in ("I", "F"):
        raise BadImage(f"32-bit pixels (Pillow's mode {image.mode}) have no fixed range; convert them to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def one_line(error: Exception) -> str:
    """An error's text, or its name where it has none, without line breaks."""
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
