"""Makes picture files by code, good and damaged ones."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import tifffile
from PIL import Image

COLOURS = ((255, 0, 0), (0, 200, 0), (0, 0, 255), (255, 255, 255))
HIGH, WIDE = 32, 48
FINE: dict[str, Any] = {"quality": 95, "subsampling": 0}  # options of a JPEG that keep colours


def quadrants(colours: Any = COLOURS, dtype: Any = np.uint8) -> np.ndarray:
    """(32, 48, C), or (32, 48) for numbers: each quarter in one colour."""
    corners = np.array(colours, dtype=dtype).reshape(2, 2, -1)
    image = corners.repeat(HIGH // 2, axis=0).repeat(WIDE // 2, axis=1)
    return image if np.ndim(colours) > 1 else image[:, :, 0]


def picture(mode: str = "RGB") -> Image.Image:
    """The quadrants in a mode of Pillow's."""
    return Image.fromarray(quadrants()).convert(mode)


def noise(shape: tuple[int, ...] = (64, 64, 3)) -> np.ndarray:
    """uint8, always the same."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, container: str = "PNG", **options: Any) -> bytes:
    """By Pillow."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, container, **options)
    return buffer.getvalue()


def jpeg(image: Any = None, container: str = "JPEG", **options: Any) -> bytes:
    return encoded(picture() if image is None else image, container, **FINE, **options)


def tiff(image: np.ndarray, photometric: str | None = None, **options: Any) -> bytes:
    """By tifffile."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, photometric=photometric, **options)
    return buffer.getvalue()


def bands(image: np.ndarray, **options: Any) -> bytes:
    """(H, W, C) by tifffile, the channels of a pixel beside each other."""
    return tiff(image, "minisblack", planarconfig="contig", **options)


def planes(image: np.ndarray, **options: Any) -> bytes:
    """(C, H, W) by tifffile."""
    return tiff(image, "minisblack", planarconfig="separate", **options)


def npy(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image)
    return buffer.getvalue()


def npy_of(header: str, values: bytes = b"") -> bytes:
    """An .npy file with this text in its header."""
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + values


def npy_promising(*shape: int) -> bytes:
    return npy_of(repr({"descr": "|u1", "fortran_order": False, "shape": shape}))


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2, between: bytes = b"") -> bytes:
    """A PNG of these filtered rows, whatever its header says."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + between + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(image: np.ndarray, between: bytes = b"") -> bytes:
    """uint16 (H, W, C) as PNG."""
    height, width, channels = image.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    return png(width, height, rows, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], between)


def text_png(kind: bytes, size: int) -> bytes:
    """A PNG whose text or profile chunk unpacks to so many bytes."""
    rows = b"".join(b"\0" + row.tobytes() for row in quadrants())
    head = b"icc\0\0" if kind == b"iCCP" else b"Comment\0\0"
    return png(WIDE, HIGH, rows, between=chunk(kind, head + zlib.compress(bytes(size), 1)))


def broken_crc(kind: bytes) -> bytes:
    data = encoded(picture())
    start = data.index(kind)
    (length,) = struct.unpack_from(">I", data, start - 4)
    return replaced(data, start + 4 + length, bytes([data[start + 4 + length] ^ 0xFF]))


def tags(changed: dict[int, int], body: bytes = b"", following: int = 0, width: int = 8, height: int = 8) -> bytes:
    """An uncompressed grey TIFF of one directory, or of other tags."""
    numbers = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: height, 279: 64} | changed
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(numbers.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(numbers)) + rows + struct.pack("<I", following) + body


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def replaced(data: bytes, start: int, new: bytes) -> bytes:
    """The same length."""
    return data[:start] + new + data[start + len(new) :]


def after(data: bytes, marker: bytes) -> int:
    """Where the marker ends."""
    return data.index(marker) + len(marker)


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def glass(container: str = "PNG", mode: str = "RGBA", **options: Any) -> bytes:
    """Red, half transparent, transparent, blue."""
    colours = ((255, 0, 0, 255), (0, 0, 0, 128), (9, 9, 9, 0), (0, 0, 255, 255))
    return encoded(Image.fromarray(quadrants(colours)).convert(mode), container, **options)


def palette(container: str = "PNG", **options: Any) -> bytes:
    return encoded(picture().quantize(8), container, **options)


def transparent_palette() -> bytes:
    image = Image.fromarray(quadrants((0, 1, 2, 3)), "P")
    image.putpalette([255, 0, 0, 0, 200, 0, 9, 9, 9, 0, 0, 255])
    return encoded(image, transparency=2)


def resized_jpeg(width: int, height: int, channels: int | None = None) -> bytes:
    """A JPEG whose header says something else than its pixels."""
    data = encoded(picture(), "JPEG")
    frame = after(data, b"\xff\xc0")
    data = replaced(data, frame + 3, struct.pack(">HH", height, width))
    return data if channels is None else replaced(data, frame + 7, bytes([channels]))


def without_adobe(ink: bytes) -> bytes:
    """The same CMYK JPEG without Adobe's marker: its inks are taken as they are."""
    start = ink.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", ink, start + 2)
    return ink[:start] + ink[start + 2 + length :]


def ycck() -> bytes:
    """Adobe's: the inks as luma and two colours, black apart, all inverted."""
    inks = np.asarray(picture("CMYK"))
    colours = np.asarray(Image.fromarray(inks[:, :, :3]).convert("YCbCr"))
    data = jpeg(Image.fromarray(np.concatenate([255 - colours, inks[:, :, 3:]], axis=2), "CMYK"))
    return replaced(data, after(data, b"Adobe") + 6, b"\2")  # its transform


def animation(container: str, **options: Any) -> bytes:
    return encoded(picture(), container, save_all=True, append_images=[picture("L").convert("RGB")], **options)


def lying_jpeg() -> bytes:
    """Tiles of 16 x 16 in name, of 65,000 x 65,000 by the headers of their JPEGs."""
    data = planes(noise((5, 32, 32)), tile=(16, 16), compression="jpeg")
    return replaced(data, after(data, b"\xff\xc0") + 3, struct.pack(">HH", 65_000, 65_000))


def smooth(subsampling: str, turn: int) -> bytes:
    """Soft colours, as of a photograph out of focus."""
    image = Image.fromarray(noise((4, 6, 3))).resize((WIDE, HIGH), Image.Resampling.BICUBIC)
    return encoded(image, "JPEG", quality=90, subsampling=subsampling, exif=exif(turn))


def as_dicom(values: np.ndarray, **tags: Any) -> bytes:
    """A DICOM file of uint16 values (H, W), or (frames, H, W), of 12 stored bits unless `tags` say otherwise."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = "1.2.3"
    image.Rows, image.Columns = values.shape[-2:]
    image.SamplesPerPixel, image.PixelRepresentation, image.PhotometricInterpretation = 1, 0, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
    if values.ndim == 3:
        image.NumberOfFrames = len(values)
    for name, value in tags.items():
        setattr(image, name, value)
    image.HighBit = image.BitsStored - 1
    image.PixelData = values.astype("<u2").tobytes()
    out = io.BytesIO()
    image.save_as(out, enforce_file_format=True)
    return out.getvalue()
