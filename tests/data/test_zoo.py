import resource
import time
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp.data.decode import BadImage, decode
from tests.data.zoo import CASES, Case

PLACES = ((0.1, 0.1), (0.1, 0.9), (0.9, 0.1), (0.9, 0.9))


def at(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return np.array([pixels[int(y * height), int(x * width)] for y, x in PLACES], dtype=int)


def test_names_are_unique_and_many():
    assert len({case.name for case in CASES}) == len(CASES) > 90


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_file_ends_as_expected(case: Case, capfd):
    data = case.make()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if case.kind:
        with pytest.raises(BadImage) as caught:
            decode(data, case.reading)
        text = str(caught.value)
        assert caught.value.kind == case.kind, text
        assert text == " ".join(text.split()) != ""
    else:
        pixels = decode(data, case.reading)
        assert pixels.shape == (*case.size, case.reading.channels)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable
        if case.corners:
            expected = np.array(case.corners).reshape(4, -1)
            np.testing.assert_allclose(at(pixels), expected, atol=case.within)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name", ["bomb.png", "bomb.tif", "bomb-of-bands.tif", "bomb.npy", "promise.npy", "bomb.jpg", "jpeg-tile-bomb.tif"]
)
def test_bombs_are_refused_before_anything_is_allocated(name):
    case = next(case for case in CASES if case.name == name)
    data = case.make()
    with pytest.raises(BadImage):
        decode(data, case.reading)  # imports what it needs
    tracemalloc.start()
    try:
        with pytest.raises(BadImage):
            decode(data, case.reading)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


WHOLE = [case for case in CASES if not case.kind and case.size[0] * case.size[1] < 5000]


@settings(max_examples=300, deadline=None)
@given(case=st.sampled_from(WHOLE), draws=st.data())
def test_mutations_give_pixels_or_bad_image(case, draws):
    data = bytearray(case.make())
    for _ in range(draws.draw(st.integers(1, 6))):
        place = draws.draw(st.integers(0, len(data) - 1) | st.integers(0, min(len(data) - 1, 200)))
        change = draws.draw(st.sampled_from(["set", "cut", "drop", "double"]))
        if change == "set":
            data[place] = draws.draw(st.integers(0, 255))
        elif change == "cut" and place:
            del data[place:]
        elif change == "drop" and len(data) > 8:
            del data[place : place + draws.draw(st.integers(1, 4))]
        elif change == "double":
            data[place:place] = data[place : place + 9]
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            pixels = decode(bytes(data), case.reading)
        except BadImage as error:
            text = str(error)
            assert text == " ".join(text.split()) != ""
        else:
            assert pixels.dtype == np.uint8
            assert pixels.shape[2:] == (case.reading.channels,)
    assert time.process_time() - start < 5
