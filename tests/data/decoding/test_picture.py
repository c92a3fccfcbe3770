"""That nothing but a BadImage, or a UserError for settings, comes out of decoding."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg

from mpp.data.decoding import BadImage, Picture, open_picture, picture
from mpp.data.decoding import formats as decoding
from mpp.data.decoding.bad_image import one_line
from mpp.data.decoding.to_uint8 import RawValues
from mpp.data.settings import DecodeOptions
from mpp.errors import UserError

RAISED = [
    (MemoryError(), "too large"),
    (RecursionError("too deep"), "damaged"),
    (EOFError("no more"), "truncated"),
    (TypeError("an integer is required"), "damaged"),
]


def raising(error: BaseException) -> Callable[..., RawValues]:
    def run(*_: object, **__: object) -> RawValues:
        raise error

    return run


@pytest.mark.parametrize(("error", "kind"), RAISED)
def test_whatever_a_decoder_raises_is_a_bad_image(
    error: Exception, kind: str, monkeypatch: pytest.MonkeyPatch, encode: Callable[..., bytes], quadrants: np.ndarray
) -> None:
    monkeypatch.setattr(picture, "to_uint8", raising(error))
    jpeg = open_picture(encode(quadrants, "JPEG"), DecodeOptions())
    monkeypatch.setattr(decoding, "_from_pillow", raising(error))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", raising(error))
    values = RawValues(np.zeros((2, 2)))
    attempts = (
        lambda: open_picture(b"GIF89a", DecodeOptions()),
        Picture((2, 2), "odd", raising(error), DecodeOptions()).pixels,
        lambda: Picture((2, 2), "odd", lambda: values, DecodeOptions()).scaled(values),  # pyright: ignore
        lambda: jpeg.region(0, 0, 16, 16, (8, 8)),
        jpeg.pixels,
    )
    for attempt in attempts:
        with pytest.raises(BadImage) as caught:
            attempt()
        assert caught.value.kind == kind
        assert str(caught.value) == " ".join(str(caught.value).split()) != ""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("a setting"), BadImage("a reason", "empty")])
def test_the_rest_goes_through(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_from_pillow", raising(error))
    with pytest.raises(type(error)) as caught:
        open_picture(b"GIF89a", DecodeOptions())
    assert caught.value is error


def test_reasons_are_one_line_that_a_terminal_shows() -> None:
    assert one_line(ValueError("a\n\t b \x1b[31m \udcff é")) == r"a b \x1b[31m \xff é"
    assert one_line(ValueError()) == "ValueError"


def test_a_bad_image_keeps_its_kind_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadImage("a reason", "truncated")))
    assert (str(error), error.kind) == ("a reason", "truncated")
