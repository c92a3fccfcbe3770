"""That nothing but a BadImage, or a UserError for settings, comes out of decoding."""

import pickle

import numpy as np
import pytest
import simplejpeg

from mpp.data.decoding import BadImage, Picture, formats, open_picture, picture
from mpp.data.decoding.bad_image import one_line
from mpp.data.decoding.to_uint8 import RawValues
from mpp.data.settings import DecodeOptions
from mpp.errors import UserError
from tests.data.streams import raising

PLAIN = DecodeOptions()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "too large"),
        (RecursionError("too deep"), "damaged"),
        (EOFError("no more"), "truncated"),
        (TypeError("an integer is required"), "damaged"),
    ],
)
def test_whatever_a_decoder_raises_is_a_bad_image(error, kind, monkeypatch, encode, quadrants):
    jpeg = open_picture(encode(quadrants, "JPEG"), PLAIN)
    monkeypatch.setattr(formats, "_from_pillow", raising(error))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", raising(error))
    monkeypatch.setattr(picture, "to_uint8", raising(error))
    values = RawValues(np.zeros((2, 2)))
    for attempt in (
        lambda: open_picture(b"GIF89a", PLAIN),
        Picture((2, 2), "odd", raising(error), PLAIN).raw_values,
        lambda: Picture((2, 2), "odd", lambda: values, PLAIN).scaled(values),
        lambda: jpeg.region(0, 0, 16, 16, (8, 8)),
        jpeg.pixels,
    ):
        with pytest.raises(BadImage) as caught:
            attempt()
        assert caught.value.kind == kind
        assert str(caught.value) == " ".join(str(caught.value).split()) != ""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("a setting"), BadImage("a reason", "empty")])
def test_the_rest_goes_through(error, monkeypatch):
    monkeypatch.setattr(formats, "_from_pillow", raising(error))
    with pytest.raises(type(error)) as caught:
        open_picture(b"GIF89a", PLAIN)
    assert caught.value is error


def test_reasons_are_one_line_and_kinds_travel_between_processes():
    assert one_line(ValueError("a\n\t b \x1b[31m \udcff é")) == r"a b \x1b[31m \xff é"
    assert one_line(ValueError()) == "ValueError"
    error = pickle.loads(pickle.dumps(BadImage("a reason", "truncated")))
    assert (str(error), error.kind) == ("a reason", "truncated")
