"""Streams of images for the tests of the loader."""

import contextlib
import copy
import itertools
from typing import Any

import numpy as np
import torch

from mpp.data.feed import DeviceBatch, feed
from mpp.data.loader import stream
from mpp.data.settings import DecodeOptions
from mpp.data.sources.in_memory import ListSource
from mpp.data.transform import EvalTransform
from mpp.dist import World

CPU = torch.device("cpu")


def numbered(length, side=12, bad=()):
    """Images that hold their own index; those in `bad` are no images."""
    images = [b"broken" if i in bad else np.full((side, side, 3), i, dtype=np.uint8) for i in range(length)]
    return ListSource(images, [i % 3 for i in range(length)])


def run(source, batches, transform=None, options=DecodeOptions(3), copied=False, **settings):  # noqa: B008
    """The first batches of a stream, closed after, or copies of them: a worker's own each keep a file open."""
    settings = {"seed": 7, "batch_size": 8, "micro_batch": 4, "start": 0, **settings}
    with contextlib.closing(stream(source, transform or EvalTransform((4, 4)), options, **settings)) as it:
        return [copy.deepcopy(batch) if copied else batch for batch in itertools.islice(it, batches)]


def fed(source, batches, transform, options=DecodeOptions(3), device=CPU, **changed) -> list[DeviceBatch]:  # noqa: B008
    """The first batches as a training gets them, closed after."""
    settings: dict[str, Any] = {"seed": 1, "start": 0, "world": World(), "workers": 0, **changed}
    with contextlib.closing(feed(source, transform, options, device, **settings)) as it:
        return list(itertools.islice(it, batches))


def joined(batches, key):
    return torch.cat([batch[key] for batch in batches])


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("images", "index", "label"))
        assert a["bad"] == b["bad"]


class Failing(ListSource):
    """Images of which one does something else when it is read."""

    def __init__(self, act, length=64):
        super().__init__(list(np.zeros((length, 8, 8, 3), dtype=np.uint8)))
        self.act = act

    def read(self, index):
        if index == 5:
            self.act()
        return super().read(index)


def raising(error):
    def act(*_, **__):
        raise error

    return act
