import io
import resource
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp.curation.pack_image import PackOptions, pack_image
from mpp.data.decoding import BadImage, decode
from mpp.data.loader import sequential
from mpp.data.pixel_cache import cache_pixels
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.base import Source
from mpp.data.sources.in_memory import ListSource
from mpp.data.transform import EvalTransform, TrainTransform
from tests import runs
from tests.data.streams import fed
from tests.data.test_device_jpeg import stand_in
from tests.data.zoo import CASES, Case

PLACES = ((0.1, 0.1), (0.1, 0.9), (0.9, 0.1), (0.9, 0.9))


def test_names_are_unique_and_many():
    assert len({case.name for case in CASES}) == len(CASES) > 90


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_file_ends_as_expected(case: Case, capfd):
    data = case.data
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
        for (y, x), colour in zip(PLACES, case.corners, strict=bool(case.corners)):
            found = pixels[int(y * pixels.shape[0]), int(x * pixels.shape[1])]
            np.testing.assert_allclose(found, np.broadcast_to(colour, found.shape), atol=case.within)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name", ["bomb.png", "bomb.tif", "bomb-of-bands.tif", "bomb.npy", "promise.npy", "bomb.jpg", "jpeg-tile-bomb.tif"]
)
def test_bombs_are_refused_before_anything_is_allocated(name):
    case = next(case for case in CASES if case.name == name)
    with pytest.raises(BadImage):
        decode(case.data, case.reading)  # imports what it needs
    tracemalloc.start()
    try:
        with pytest.raises(BadImage):
            decode(case.data, case.reading)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


WHOLE = [case for case in CASES if not case.kind and case.size[0] * case.size[1] < 5000]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(case=st.sampled_from(WHOLE), draws=st.data())
def test_mutations_give_pixels_or_bad_image(case, draws):
    data = bytearray(case.data)
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


class Locked(ListSource):
    """Its second image cannot be read while it is locked."""

    locked = True

    def read(self, index: int) -> tuple[bytes | np.ndarray, int | None]:
        if self.locked and index == 1:
            raise PermissionError(13, "Permission denied")
        return super().read(index)


def trained_on(source: Source, reading: DecodeOptions, hw: tuple[int, int], decode: Any = None) -> torch.Tensor:
    """Both images of a source as a training gets them, whole."""
    transform = TrainTransform(DataConfig(crop_scale=(1, 1), hflip=0), hw, reading.channels)
    bad: list[Any] = []
    settings = {"batch_size": 2, "micro_batch": 2, "decode": decode, "report_bad": lambda found, _: bad.extend(found)}
    (batch,) = fed(source, 1, transform, reading, **settings)
    assert not bad
    return batch["images"]


def _first_of_each_kind() -> Iterator[Any]:
    """The fast tests take one file of each ending and number of channels."""
    found = set[tuple[str, int]]()
    for case in WHOLE:
        kind = Path(case.name).suffix, case.reading.channels
        yield runs.slow(case) if kind in found else case
        found.add(kind)


@pytest.mark.parametrize("case", [*_first_of_each_kind()], ids=lambda case: case.name)
def test_all_ways_to_the_pixels_of_a_file_agree(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, in blocks, from the cache or left out of it, decoded late, evaluated, packed."""
    monkeypatch.setenv("MPP_CACHE", str(tmp_path))  # each look at the usual one takes longer, the more is in it
    data, reading, final = case.data, case.reading, DecodeOptions(case.reading.channels)
    plain = ListSource([data] * 2)
    pixels = decode(data, reading)
    locked = Locked([data] * 2)
    half_cached = cache_pixels(locked, reading, workers=0)
    locked.locked = False
    assert [half_cached.decoded(index) for index in (0, 1)] == [True, False]
    ways: dict[str, tuple[Source, DecodeOptions, Any]] = {
        "one by one": (plain, reading, None),
        "late": (plain, reading, stand_in),
        "cached": (cache_pixels(plain, reading, workers=0), reading, None),
        "cached in part": (half_cached, reading, None),
        "cached in part and late": (half_cached, reading, stand_in),
        "in blocks": (ListSource(np.stack([pixels] * 2)), final, None),
    }
    for options in (PackOptions(reading), PackOptions(reading, resize=10_000), PackOptions(reading, encode="png")):
        packed = pack_image(data, options) if reading.channels in (1, 3) or options.encode == "keep" else None
        if packed is not None:
            np.testing.assert_array_equal(packed.pixels, pixels)
            ways[f"packed: {options}"] = (ListSource([packed.data] * 2), options.packed_reading, None)
    if case.name.endswith(".npy") and case.name != "python-2.npy":
        values = ListSource([np.load(io.BytesIO(data))] * 2)
        ways["array"] = (values, reading, None)
        ways["array, cached"] = (cache_pixels(values, reading, workers=0), reading, None)
    # Boxes of JPEGs may be decoded faster, or at half the size, which blurs colours that are as steep as here; blocks
    # round by themselves.
    for shrink in (1, 4):
        hw = (max(1, case.size[0] // shrink), max(1, case.size[1] // shrink))
        expected = trained_on(ListSource([pixels] * 2), final, hw)
        resized = ("one by one", "late", "cached in part and late", "in blocks")  # the others are the same from here
        found = {
            name: trained_on(source, how, hw, late)
            for name, (source, how, late) in ways.items()
            if shrink == 1 or name in resized
        }
        if shrink == 1:
            assert torch.equal(expected[1].permute(1, 2, 0), torch.from_numpy(pixels))
            for name in ("one by one", "cached", "cached in part"):
                batch = next(sequential(ways[name][0], EvalTransform(hw), reading, [0, 1], batch_size=2))
                found[f"{name}, evaluated"] = batch["images"]
        allowed = 5 if data[:2] == b"\xff\xd8" else 0 if shrink == 1 else 1
        for name, images in found.items():
            assert (images.int() - expected.int()).abs().float().mean() <= allowed, (name, shrink)
