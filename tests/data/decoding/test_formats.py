import io
import struct
import tracemalloc
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from mpp.data.decoding import BadImage, open_picture
from mpp.data.decoding import formats as decoding
from mpp.data.decoding import to_uint8 as values_of
from mpp.data.settings import DecodeOptions
from mpp.errors import UserError

CORNERS = ((2, 2), (2, -3), (-3, 2), (-3, -3))


def corners(image):
    return np.array([image[place] for place in CORNERS], dtype=int)


def decode(data, channels, **options):
    return decoding.decode(data, DecodeOptions(channels, **options))


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
    ("container", "mode", "options"),
    [
        ("JPEG", "RGB", {"quality": 95}),
        ("JPEG", "RGB", {"quality": 95, "progressive": True}),
        ("JPEG", "CMYK", {"quality": 95}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("BMP", "RGB", {}),
        ("GIF", "P", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("TIFF", "RGB", {}),
        ("TIFF", "CMYK", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("PPM", "RGB", {}),
    ],
)
def test_containers_and_modes(container, mode, options, quadrants, encode):
    data = encode(Image.fromarray(quadrants).convert(mode), container, **options)
    pixels = decode(data, 3)
    assert pixels.dtype == np.uint8
    assert pixels.shape == quadrants.shape
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    np.testing.assert_allclose(corners(pixels), corners(quadrants), atol=6)
    grey = decode(data, 1)
    assert grey.shape == (32, 48, 1)
    np.testing.assert_allclose(
        corners(grey)[:, 0], corners(np.asarray(opened(data).convert("RGB").convert("L"))), atol=3
    )


def test_a_region_of_anything_else_is_exact(quadrants, encode):
    picture = open_picture(encode(quadrants, "PNG"), DecodeOptions())
    assert picture.step(32, 48, (2, 2)) == 1
    np.testing.assert_array_equal(picture.region(1, 2, 20, 30, (2, 2)), quadrants[1:21, 2:32])
    np.testing.assert_array_equal(picture.pixels(), quadrants)  # may be asked again


def test_a_picture_knows_its_size_before_its_pixels(encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    for container in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = encode(np.zeros((64, 48, 3), np.uint8), container, exif=exif)
        picture = open_picture(data, DecodeOptions())
        assert (picture.height, picture.width) == (48, 64)
    whole = encode(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8), "PNG")
    picture = open_picture(whole[:1000], DecodeOptions())
    with pytest.raises(BadImage, match="cut off"):
        picture.pixels()


def test_forms(quadrants, encode):
    grey = quadrants[..., 0]
    forms = {
        "JPEG": encode(quadrants, "JPEG"),
        "JPEG grey": encode(grey, "JPEG"),
        "JPEG CMYK": encode(Image.fromarray(quadrants).convert("CMYK"), "JPEG"),
        "PNG RGB": encode(quadrants, "PNG"),
        "GIF P": encode(Image.fromarray(quadrants).quantize(4), "GIF"),
        "TIFF 1 x uint16": encode(grey.astype(np.uint16), "TIFF"),
        "array uint8 x 3": quadrants,
        "array float32 x 1": grey.astype(np.float32),
    }
    assert {form: open_picture(data, DecodeOptions()).form for form, data in forms.items()} == {
        form: form for form in forms
    }


def test_values_are_scaled_by_the_formula():
    rng = np.random.default_rng(0)
    for dtype, low, high in (("uint8", 10, 200), ("uint16", 100, 3000), ("int32", -500, 900), ("float64", -1.5, 2.5)):
        image = rng.uniform(low - 20, high + 20, (40, 40, 2)).clip(0 if dtype[0] == "u" else None).astype(dtype)
        if dtype == "uint8":
            image = rng.integers(0, 256, (40, 40, 2), dtype=np.uint8)
        scaled = decode(image, 2, value_range=(low, high, low, 2 * high))
        for channel, end in enumerate((high, 2 * high)):
            exact = (image[..., channel].astype(float) - low) / (end - low) * 255
            assert np.abs(scaled[..., channel] - exact.clip(0, 255)).max() <= 0.5 + 1e-6


def test_ranges_and_backgrounds_of_another_length(quadrants, encode):
    for unfit in ((0, 255, 3), (0, 1, 0, 1), (5, 5)):
        with pytest.raises(UserError, match=r"data.value_range takes "):
            decode(quadrants, 3, value_range=unfit)
    glass = encode(Image.fromarray(quadrants).convert("RGBA"), "PNG")
    with pytest.raises(UserError, match=r"data.background takes one number or 3"):
        decode(glass, 3, background=(1, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, container, quadrants, encode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(quadrants, container, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(opened(data)).convert("RGB"))
    pixels = decode(data, 3)
    assert pixels.shape == (expected.shape if orientation else None)
    np.testing.assert_allclose(corners(pixels), corners(expected), atol=8)
    assert pixels.shape[:2] == ((48, 32) if orientation >= 5 else (32, 48))


def test_damaged_exif_is_ignored(quadrants, encode):
    data = encode(quadrants, "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + b"\xee" * 30)
    np.testing.assert_allclose(corners(decode(data, 3)), corners(quadrants), atol=8)


@pytest.mark.parametrize("container", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_composited_on_white(container, encode):
    image = np.zeros((6, 6, 4), dtype=np.uint8)
    image[:, 2:4] = (200, 0, 0, 128)
    image[:, 4:] = (0, 0, 200, 255)
    options = {"lossless": True, "exact": True} if container == "WEBP" else {}
    pixels = decode(encode(image, container, **options), 3)[3]
    assert pixels[0].tolist() == [255, 255, 255]
    np.testing.assert_allclose(pixels[2], [227, 127, 127], atol=1)
    assert pixels[5].tolist() == [0, 0, 200]


def test_transparent_palette_grey_and_colour_key(encode):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 90, 80, 70])
    palette.putpixel((0, 0), 1)
    pixels = decode(encode(palette, "PNG", transparency=0), 3)
    assert pixels[0, 0].tolist() == [90, 80, 70]
    assert pixels[2, 2].tolist() == [255, 255, 255]
    grey = Image.new("LA", (4, 4), (50, 0))
    grey.putpixel((1, 1), (50, 255))
    assert decode(encode(grey, "PNG"), 1)[..., 0].tolist()[1] == [255, 50, 255, 255]
    key = Image.new("RGB", (4, 4), (1, 2, 3))
    key.putpixel((0, 0), (9, 9, 9))
    pixels = decode(encode(key, "PNG", transparency=(1, 2, 3)), 3)
    assert [pixels[0, 0, 0], pixels[3, 3, 0]] == [9, 255]


def test_one_bit(encode):
    image = Image.new("1", (8, 8))
    image.putpixel((0, 0), 1)
    for container in ("PNG", "TIFF", "PPM"):
        pixels = decode(encode(image, container), 3)
        assert [pixels[0, 0].tolist(), pixels[7, 7].tolist()] == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("container", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_by_their_range(container, encode):
    wide = np.array([[0, 128, 129, 257], [32767, 32768, 65534, 65535]], dtype=np.uint16)
    pixels = decode(encode(wide, container), 1)[..., 0]
    np.testing.assert_array_equal(pixels, np.rint(wide / 257).astype(np.uint8))
    assert decode(encode(wide, container), 3).shape == (2, 4, 3)


def test_big_endian_sixteen_bits(encode):
    wide = np.array([[0, 65535], [257, 25700]], dtype=np.uint16)
    image = Image.frombytes("I;16B", (2, 2), wide.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode(encode(image, "TIFF"), 1)[..., 0], wide // 257)


@pytest.mark.parametrize("container", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(container, encode):
    first, second = Image.new("RGB", (9, 7), (250, 0, 0)), Image.new("RGB", (9, 7), (0, 0, 250))
    options = {"lossless": True} if container == "WEBP" else {}
    pixels = decode(encode(first, container, save_all=True, append_images=[second], **options), 3)
    assert pixels.shape == (7, 9, 3)
    np.testing.assert_allclose(pixels[3, 3], [250, 0, 0], atol=2)


def test_one_pixel(encode):
    assert decode(encode(np.full((1, 1, 3), 77, dtype=np.uint8)), 3).tolist() == [[[77, 77, 77]]]
    assert decode(encode(np.full((1, 1, 3), 77, dtype=np.uint8), "JPEG"), 3).shape == (1, 1, 3)


@pytest.mark.parametrize("container", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(container, share, encode):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, container)
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * share)], 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image, " * 20, "not an image in a known format"),
        (b"\xff\xd8\xff\xe0 no more of a JPEG", "Truncated File Read|header is cut off"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n", "not an image in a known format"),
        (b"\0" * 500, "not an image in a known format"),
    ],
)
def test_not_an_image(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data, 3)


def png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def test_images_of_too_many_bytes(quadrants, encode):
    said = r"more than data.max_image_mb 700 allows"
    with pytest.raises(BadImage, match=rf"^2,500,000,000 pixels, 10,000.0 MB, {said}$"):
        decode(png_header(50_000, 50_000), 3)
    data = bytearray(encode(quadrants, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(BadImage, match=rf"^60000 x 60000 pixels, 14,400.0 MB, {said}$"):
        decode(bytes(data), 3)
    # Pillow itself only warns from here on; it must neither warn nor be refused before its pixels are missing.
    with pytest.raises(BadImage, match=r"truncated|broken|incomplete|not enough"):
        decode(png_header(10_000, 10_000), 3)


def forms(quadrants, encode):
    """Files of 96 x 64 pixels of every decoder, with the channels to ask for and the bytes that a pixel takes."""
    wide = quadrants.astype(np.uint16) << 8

    def tiff(values, **options):
        out = io.BytesIO()
        tifffile.imwrite(out, values, **options)
        return out.getvalue()

    def npy(values):
        out = io.BytesIO()
        np.save(out, values)
        return out.getvalue()

    height, width, _ = quadrants.shape
    yield from ((encode(quadrants, form), 3, 4) for form in ("JPEG", "PNG", "BMP", "WEBP", "GIF", "PPM", "TIFF"))
    yield imagecodecs.png_encode(wide), 3, 6
    yield f"P6 {width} {height} 65535\n".encode() + wide.astype(">u2").tobytes(), 3, 6
    for dtype in (np.uint16, np.float32, np.float64):
        yield tiff((quadrants > 99).astype(dtype), photometric="rgb"), 3, 3 * dtype().itemsize
    yield tiff(np.zeros((5, height, width), dtype=np.float64), photometric="minisblack"), 5, 40
    yield tiff(quadrants, photometric="rgb", compression="jpeg"), 3, 4
    yield npy(quadrants / 255), 3, 24
    yield quadrants / 255, 3, 24  # an array
    yield quadrants[:, :, 0], 3, 4
    yield np.zeros((height, width, 9), dtype=np.uint8), 9, 9


def test_a_limit_in_bytes_reaches_every_decoder(quadrants, encode):
    for data, channels, bytes_a_pixel in forms(quadrants, encode):
        size = quadrants[:, :, 0].size * bytes_a_pixel
        said = r"MB, more than data.max_image_mb \S+ allows$"
        with pytest.raises(BadImage, match=said) as caught:
            decode(data, channels, max_bytes=size - 1)
        assert caught.value.kind == "too large"
        assert decode(data, channels, max_bytes=size).shape == (*quadrants.shape[:2], channels)


def test_a_limit_above_pillows_is_the_users(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = png_header(100, 100)
    with pytest.raises(BadImage, match=r"^10,000 pixels, 0\.0 MB"):
        decode(data, 3, max_bytes=8000)
    with pytest.raises(BadImage, match=r"truncated|broken|incomplete|not enough"):
        decode(data, 3, max_bytes=40_000)


def test_scaling_takes_little_memory_of_its_own(monkeypatch):
    """And gives the same some rows at a time."""
    generator = np.random.default_rng(0)
    values = generator.random((1000, 300, 4))
    cases = [
        (values, 4, {}),
        (values[:, :, :3], 1, {}),
        ((values * 1000).astype(np.int32), 4, {"value_range": (0, 999)}),
    ]
    whole = [decode(each, channels, **options) for each, channels, options in cases]
    monkeypatch.setattr(values_of, "_BLOCK", 5000)
    for (each, channels, options), expected in zip(cases, whole, strict=True):
        tracemalloc.start()
        found = decode(each, channels, **options)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_array_equal(found, expected)
        assert most < 2.5 * each.size
    transparent = np.dstack([(values[:, :, :3] * 255).astype(np.uint8), (values[:, :, 3] * 255).astype(np.uint8)])
    out = io.BytesIO()
    Image.fromarray(transparent).save(out, "PNG")
    by_rows = decode(out.getvalue(), 3)
    monkeypatch.setattr(values_of, "_BLOCK", 2**30)
    np.testing.assert_array_equal(by_rows, decode(out.getvalue(), 3))


def test_arrays():
    image = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(image, 3), image)
    np.testing.assert_array_equal(decode(image, 1)[..., 0], np.asarray(Image.fromarray(image).convert("L")))
    np.testing.assert_array_equal(decode(image[..., 0], 3), np.repeat(image[..., :1], 3, axis=2))
    np.testing.assert_array_equal(decode(image[..., :1], 1), image[..., :1])
    assert decode(np.zeros((5, 4, 7), dtype=np.uint8), 7).shape == (5, 4, 7)
    image.flags.writeable = False
    turned = decode(image.transpose(1, 0, 2), 3)
    assert turned.flags.writeable
    assert turned.flags.c_contiguous


def test_unfit_channels_and_arrays(quadrants, encode):
    with pytest.raises(BadImage, match=r"has 4 channels, the model takes 3 \(model.in_chans\)"):
        decode(np.zeros((5, 4, 4), dtype=np.uint8), 3)
    with pytest.raises(BadImage, match=r"has 3 channels, the model takes 5 \(model.in_chans\)"):
        decode(encode(quadrants), 5)
    with pytest.raises(BadImage, match=r"from 0 to 7; floating point is taken as 0 to 1: state data.value_range"):
        decode(np.array([[0, 7]], dtype=np.float32), 3)
    for unfit in (np.zeros((5, 4), "datetime64[s]"), np.zeros(5, dtype=np.uint8), np.zeros((0, 4, 3), dtype=np.uint8)):
        with pytest.raises(BadImage, match="expected numbers of shape"):
            decode(unfit, 3)
