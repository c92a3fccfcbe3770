"""An image whose header has been read; its pixels are decoded when they are asked for."""

from collections.abc import Callable

import numpy as np

from mpp.data.decoding.bad_image import raises_bad_image
from mpp.data.decoding.to_uint8 import RawValues, to_uint8
from mpp.data.settings import DecodeOptions


class Picture:
    """An image that `read` decodes; its height and width are those of the upright image.

    `stored_hw` is its size before it is turned by EXIF's orientation, 1 to 8; `form` names its format in short: JPEG,
    PNG RGBA, TIFF 5 x uint16, array uint8 x 3.
    """

    def __init__(
        self,
        stored_hw: tuple[int, int],
        form: str,
        read: Callable[[], RawValues],
        options: DecodeOptions,
        orientation: int = 1,
    ) -> None:
        self.height, self.width = stored_hw[::-1] if orientation in (5, 6, 7, 8) else stored_hw
        self.form, self.options, self.orientation, self._read = form, options, orientation, read

    def pixels(self) -> np.ndarray:
        """Decodes to uint8 (height, width, channels), exact, contiguous and writable. Raises BadImage."""
        return self.scaled(self.raw_values())

    @raises_bad_image
    def raw_values(self) -> RawValues:
        """Decodes to the values in the file. Raises BadImage."""
        return self._read()

    @raises_bad_image
    def scaled(self, raw: RawValues) -> np.ndarray:
        """`pixels()` of what `raw_values()` gave."""
        return np.ascontiguousarray(turned(to_uint8(raw, self.options), self.orientation))

    def step(self, height: int, width: int, target_hw: tuple[int, int]) -> int:
        """By what a box of this size, with edges at multiples of it, is scaled down while it is decoded."""
        return 1

    def region(
        self, top: int, left: int, height: int, width: int, target_hw: tuple[int, int] | None = None
    ) -> np.ndarray:
        """uint8 (h, w, channels) of a box, perhaps a view; exact without `target_hw`. Raises BadImage.

        With `target_hw`, the size that the caller will resize it to, it may come scaled down already (never below that
        size) or from faster decoding; the resized box is within 1 grey level of the exact one on average.
        """
        return self.pixels()[top : top + height, left : left + width]


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """A view of (H, W, ...), turned upright by EXIF's orientation, 1 to 8; any other changes nothing."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return image[::rows, ::columns]
