"""Functions for the tests of sources: read all, expect a refusal, write tar shards by hand."""

import io
import tarfile

import numpy as np
import pytest

from mpp.data.loader import sequential
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import SourceError
from mpp.data.sources.opening import open_source
from mpp.data.sources.shards import open_shards
from mpp.data.transform import EvalTransform


def all_read(source):
    return [source.read(i) for i in range(len(source))]


def read_many(source, indices):
    return list(source.read_many(indices))


def locations(source):
    return [source.location(i) for i in range(len(source))]


def read_by_workers(source):
    """The greys of the twelve pictures of `write_pictures`, as two forked workers read them."""
    batches = sequential(source, EvalTransform((8, 8)), DecodeOptions(), range(12), batch_size=3, workers=2)
    return [int(image[0, 0, 0]) for batch in batches for image in batch["images"]]


def refused(spec, split="train", **options):
    """The text of the SourceError, which is one line."""
    with pytest.raises(SourceError) as caught:
        open_source(spec, split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def opened(text, **options):
    """Shards by a pattern."""
    return open_shards(f"shards:{text}", text, **options)


def states(source, times):
    """By which a fingerprint knows each shard."""
    return [origin.state(times) for origin in source.origins]


def write_tar(path, members):
    """`members`: (name, bytes or TarInfo) in order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo()
            info.name = name
            if info is not data:
                info.size = len(data)
            tar.addfile(info, None if info is data else io.BytesIO(data))
    return path


def write_shards(folder, number=3, each=4):
    """Shards whose images are not even images: nothing here decodes."""
    folder.mkdir(exist_ok=True)
    for shard in range(number):
        keys = [(i, f"{shard * each + i:04d}") for i in range(each)]
        members = [((f"{key}.jpg", f"image {key}".encode()), (f"{key}.cls", b"%d" % (i % 3))) for i, key in keys]
        write_tar(folder / f"s-{shard:03d}.tar", [member for pair in members for member in pair])
    return folder


def write_pictures(folder, encode):
    """A shard of twelve pictures, of the greys 0 to 11."""
    greys = [encode(np.full((8, 8, 3), i, dtype=np.uint8)) for i in range(12)]
    write_tar(folder / "p.tar", [(f"{i}.png", data) for i, data in enumerate(greys)])
