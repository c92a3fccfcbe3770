"""What the tests of sources do with one: read all of it, or be refused."""

import pytest

from mpp.data.sources.base import SourceError
from mpp.data.sources.opening import open_source


def all_read(source):
    return [source.read(i) for i in range(len(source))]


def refused(spec, split="train", **options):
    """The text of the SourceError, which is one line."""
    with pytest.raises(SourceError) as caught:
        open_source(spec, split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
