"""DICOM by pydicom: modality and window applied, YBR to RGB, palettes to colours; of several frames the first.

grey values -> rescale slope or modality table -> without data.value_range, the file's own window or table -> pixels
"""

import io
import logging
from typing import Any

import numpy as np

from mpp.data.decoding.bad_image import BadImage, check_size
from mpp.data.decoding.picture import Picture
from mpp.data.decoding.to_uint8 import RawValues
from mpp.data.settings import DecodeOptions
from mpp.errors import install
from mpp.system.process import without_warnings

_PER_FRAME = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_BEYOND = 1e9  # any value of a pixel


def is_dicom(data: bytes) -> bool:
    """Whether these first bytes of a file are DICOM's."""
    return data[128:132] == b"DICM"


def open_dicom(data: bytes, options: DecodeOptions) -> Picture:
    """Opens an image in DICOM.

    Grey values go through the modality table or rescale, then through `options.value_range` or, where it is empty,
    through the file's VOI table or first window. Without a window unsigned values take the range of their stored bits.
    MONOCHROME1 is inverted. Raises BadImage.
    """
    try:
        import pydicom
    except ImportError as error:
        raise BadImage(f"a DICOM file, which needs the package pydicom: {install('dicom')}", "not an image") from error
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    with without_warnings():
        image = pydicom.dcmread(io.BytesIO(data))
        if "Rows" not in image or "PixelData" not in image:
            raise BadImage(f"a DICOM file without pixels ({image.get('Modality', 'no modality')})", "not an image")
        _hoist(image)
        height, width, channels = int(image.Rows), int(image.Columns), int(image.SamplesPerPixel)
        bits, colours = int(image.BitsAllocated), str(image.PhotometricInterpretation)
    check_size(width, height, options, channels * -(-bits // 8))

    def read() -> RawValues:
        with without_warnings(), np.errstate(all="ignore"):
            return _values(image, colours, options)

    form = {"PALETTE COLOR": "DICOM P"}.get(colours, f"DICOM {channels} x {bits} bits")
    return Picture((height, width), form, read, options)


def _hoist(image: Any) -> None:
    """Rescale and window of an enhanced file's first frame, to where those of a plain one are."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for name in _PER_FRAME if image.get(groups) else ():
            for element in (image[groups][0].get(name) or [[]])[0]:
                image[element.tag] = element


def _values(image: Any, colours: str, options: DecodeOptions) -> RawValues:
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
    from pydicom.pixels.utils import pixel_array

    stored = pixel_array(image, index=0)
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    if colours == "PALETTE COLOR":
        return RawValues(apply_color_lut(stored, image))
    high = 2 ** int(image.BitsStored) - 1
    if stored.ndim == 3:
        return RawValues(stored, high=high)
    inverted = colours == "MONOCHROME1"
    rescaled = apply_modality_lut(stored, image)
    if not options.value_range:
        table: Any = image.VOILUTSequence[0] if image.get("VOILUTSequence") else None
        if table is not None or (image.get("WindowCenter") is not None and image.get("WindowWidth") is not None):
            values = apply_voi_lut(rescaled.astype(np.int64) if table is not None else rescaled, image)
            if table is not None:
                low, top = 0, 2 ** table.LUTDescriptor[2] - 1
            else:
                low, top = apply_voi_lut(np.array([-_BEYOND, _BEYOND]), image)
            scaled = np.rint((values.astype(np.float64) - low) * (255 / (top - low)))
            return RawValues(np.clip(scaled, 0, 255).astype(np.uint8), inverted=inverted, scaled=True)
        plain = "ModalityLUTSequence" not in image
        if plain and stored.dtype.kind == "u" and stored.dtype.itemsize <= 2:
            return RawValues(stored, high=high, inverted=inverted ^ (float(image.get("RescaleSlope", 1) or 1) < 0))
    whole = rescaled.dtype.kind == "f" and stored.dtype.kind in "iu" and np.array_equal(rescaled, np.rint(rescaled))
    return RawValues(rescaled.astype(np.int32) if whole else rescaled, inverted=inverted)
