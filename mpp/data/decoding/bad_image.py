"""An image that cannot be used, as one exception with a reason in one line."""

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import past_limit
from mpp.data.sources.names import printable
from mpp.errors import RunError, UserError

LEAST_BYTES = 4  # that a decoded pixel counts: Pillow allocates so many for most
P = ParamSpec("P")
T = TypeVar("T")
_CUT_OFF = re.compile(r"truncat|not enough|incomplete|unexpected end|end of file|premature|cut off", re.IGNORECASE)


class BadImage(RunError):
    """An image that cannot be used: the reason in one line, and what to count it as.

    Kinds are empty, not an image, truncated, damaged, too large, wrong channels and no range.
    """

    def __init__(self, reason: str, kind: str = "damaged") -> None:
        super().__init__(reason)
        self.kind = kind


def raises_bad_image(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a BadImage of any Exception that a function raises, but lets a UserError through."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
            raise as_bad_image(error) from error

    return run


def as_bad_image(error: Exception) -> BadImage:
    """Classifies what a decoder raised."""
    if out_of_memory(error):
        return BadImage("takes more memory than there is", "too large")
    reason = one_line(error)
    if "bomb" in reason or "too large" in reason:
        return BadImage(reason, "too large")
    return BadImage(reason, "truncated" if isinstance(error, EOFError) or _CUT_OFF.search(reason) else "damaged")


def out_of_memory(error: Exception) -> bool:
    """Whether an error of Python's or torch's says that memory ran out."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def one_line(error: Exception) -> str:
    """The text of an error, or its type where it has none, in one printable line."""
    return printable(re.sub(r"\s+", " ", str(error)).strip()) or type(error).__name__


def check_size(width: int, height: int, options: DecodeOptions, pixel_bytes: int = 1) -> None:
    """Raises BadImage where the decoded pixels would take more bytes than allowed, or where there are none."""
    if width < 1 or height < 1:
        raise BadImage(f"{width} x {height} pixels")
    size = width * height * max(LEAST_BYTES, pixel_bytes, options.channels)
    if size > options.max_bytes:
        raise BadImage(f"{width} x {height} pixels, {past_limit(size, options.max_bytes)}", "too large")
