"""An image whose header has been read, and what may be wrong with it."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np

from mpp.data.settings import Reading
from mpp.data.sources.base import past_limit
from mpp.data.sources.names import printable
from mpp.errors import RunError, UserError

LEAST_BYTES = 4
"""That an image is reckoned to take a pixel: what Pillow allocates for most."""

P = ParamSpec("P")
T = TypeVar("T")

_CUT_OFF = re.compile(r"truncat|not enough|incomplete|unexpected end|end of file|premature|cut off", re.IGNORECASE)


class BadImage(RunError):
    """An image that cannot be used; its text is the reason, in one line.

    Args:
        reason: the text.
        kind: what to count it as: empty, not an image, truncated, damaged, too large, wrong channels, no range,
            missing, unreadable or not a file.
    """

    def __init__(self, reason: str, kind: str = "damaged") -> None:
        super().__init__(reason)
        self.kind = kind


def bad_image_for_any(function: Callable[P, T]) -> Callable[P, T]:
    """A function from which whatever a decoder raises comes as a BadImage; settings that do not fit as a UserError.

    What is no Exception (Ctrl-C, a signal's) goes through.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
            raise failure(error) from error

    return run


class Stored(NamedTuple):
    """What an image holds before it is scaled to 8 bits and turned."""

    values: np.ndarray
    """(H, W) or (H, W, C) of any real type."""
    alpha: bool = False
    """The last channel is opacity."""


class Picture:
    """An image whose header has been read, whose pixels have not.

    Args:
        height, width: upright, as EXIF has it.
        form: what it is, short: JPEG, PNG RGBA, TIFF 5 x uint16, array uint8 x 3.
        read: decodes.
        scale: of what `read` gave, uint8 (height, width, channels), contiguous and writable.
    """

    def __init__(
        self, height: int, width: int, form: str, read: Callable[[], Stored], scale: Callable[[Stored], np.ndarray]
    ) -> None:
        self.height, self.width, self.form, self._read, self._scale = height, width, form, read, scale

    def pixels(self) -> np.ndarray:
        """uint8 (height, width, channels), contiguous and writable; exact.

        Raises:
            BadImage: it cannot be decoded, or has other channels or no range.
            UserError: a range or background that does not fit.
        """
        return self.scaled(self.stored())

    @bad_image_for_any
    def stored(self) -> Stored:
        """The values in the file, for who would look at them, too. Raises BadImage."""
        return self._read()

    @bad_image_for_any
    def scaled(self, stored: Stored) -> np.ndarray:
        """`pixels()` of what `stored()` gave."""
        return self._scale(stored)

    def step(self, height: int, width: int, target_hw: tuple[int, int]) -> int:
        """Boxes of about this size whose edges are multiples of the step are scaled down by it while decoding."""
        return 1

    def region(
        self, top: int, left: int, height: int, width: int, target_hw: tuple[int, int] | None = None
    ) -> np.ndarray:
        """uint8 (h, w, channels) of a box, perhaps a view. Exact without `target_hw`.

        With `target_hw`, the size that the caller will resize it to, it may come scaled down already (never below that
        size) or from faster decoding; the resized box is within 1 grey level of the exact one on average.

        Raises:
            BadImage: the pixels cannot be decoded.
        """
        return self.pixels()[top : top + height, left : left + width]


def check_size(width: int, height: int, reading: Reading, bytes_a_pixel: int = 1) -> None:
    """Raises BadImage where the decoded pixels take more bytes than are allowed, or where there are none at all."""
    if width < 1 or height < 1:
        raise BadImage(f"{width} x {height} pixels")
    size = width * height * max(LEAST_BYTES, bytes_a_pixel, reading.channels)
    if size > reading.max_bytes:
        raise BadImage(f"{width} x {height} pixels, {past_limit(size, reading.max_bytes)}", "too large")


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """A view of (H, W, ...), turned upright by EXIF's orientation, 1 to 8; any other changes nothing."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return image[::rows, ::columns]


def out_of_memory(error: Exception) -> bool:
    """Whether an error is Python's or torch's for memory that is not to be had."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def failure(error: Exception) -> BadImage:
    """What a decoder raised, as a BadImage."""
    if out_of_memory(error):
        return BadImage("takes more memory than there is", "too large")
    reason = one_line(error)
    if "bomb" in reason or "too large" in reason:
        return BadImage(reason, "too large")
    return BadImage(reason, "truncated" if isinstance(error, EOFError) or _CUT_OFF.search(reason) else "damaged")


def one_line(error: Exception) -> str:
    """An error's text, or its name where it has none, in one line that a terminal shows as it is."""
    return printable(re.sub(r"\s+", " ", str(error)).strip()) or type(error).__name__
