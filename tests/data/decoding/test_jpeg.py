import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from mpp.data.decoding import decode, open_picture
from mpp.data.settings import DecodeOptions
from tests.data.picture_files import exif


def opened(data):
    return Image.open(io.BytesIO(data))


def test_jpeg_equals_pillow(shared, encode):
    photos = sorted(shared("data/photos").glob("*.jpg"))[:8]
    for turn, path in enumerate(photos, 1):
        plain = path.read_bytes()
        for data in (plain, encode(opened(plain).convert("RGB"), "JPEG", exif=exif(turn), quality=90)):
            reference = np.asarray(ImageOps.exif_transpose(opened(data)).convert("RGB"))
            np.testing.assert_array_equal(decode(data, DecodeOptions(3)), reference)
            grey = opened(data)
            grey.draft("L", grey.size)  # the file's own luma, as it is before clipped colours are made of it
            luma = decode(data, DecodeOptions(1))[..., 0]
            np.testing.assert_array_equal(luma, np.asarray(ImageOps.exif_transpose(grey)))


def crop(pixels, box, target_hw):
    """Pillow's own: cut out, then resize."""
    top, left, height, width = box
    image = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    return np.asarray(image.resize(target_hw[::-1], Image.Resampling.BICUBIC)).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_of_a_jpeg(orientation, shared, encode):
    photo = Image.open(sorted(shared("data/photos").glob("*.jpg"))[1]).convert("RGB").resize((1240, 1000))
    picture = open_picture(encode(photo, "JPEG", quality=92, exif=exif(orientation)), DecodeOptions())
    pixels, target = picture.pixels(), (112, 112)
    assert pixels.shape == (picture.height, picture.width, 3)
    odd = (33, 101, 700, 561)
    np.testing.assert_array_equal(picture.region(*odd), pixels[33:733, 101:662])
    for box, step in ((odd, 1), ((32, 104, 720, 568), 4), ((32, 104, 240, 304), 1), ((40, 8, 904, 856), 4)):
        assert picture.step(box[2], box[3], target) == (4 if box is odd else step)
        region = picture.region(*box, target)
        assert region.shape == (box[2] // step, box[3] // step, 3)
        whole = (0, 0, *region.shape[:2])
        difference = np.abs(crop(region, whole, target) - crop(pixels, box, target))
        assert difference.mean() < 1


def test_steps_are_counted_from_the_stored_edge(encode):
    for orientation, step in ((1, 8), (3, 2)):
        jpeg = encode(np.zeros((1002, 1000, 3), np.uint8), "JPEG", exif=exif(orientation))
        picture = open_picture(jpeg, DecodeOptions())
        assert picture.step(1000, 1000, (32, 32)) == step
    assert picture.step(60, 1000, (32, 32)) == 1
