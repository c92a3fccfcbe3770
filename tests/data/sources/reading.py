"""Tools for the tests of sources: reads all, expects a refusal, and writes tar shards by hand."""

import io
import tarfile

import numpy as np
import pytest

from mpp.data.sources.base import SourceError
from mpp.data.sources.opening import open_source
from mpp.data.sources.shards import open_shards


def all_read(source):
    return [source.read(i) for i in range(len(source))]


def read_many(source, indices):
    return list(source.read_many(indices))


def refused(spec, split="train", **options):
    """The text of the SourceError, which is one line."""
    with pytest.raises(SourceError) as caught:
        open_source(spec, split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_shards(text, **options):
    """As `refused`, of shards by a pattern."""
    with pytest.raises(SourceError) as caught:
        opened(text, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def states(source, times):
    """By which a fingerprint knows each shard."""
    return [origin.state(times) for origin in source.origins]


def write_tar(path, members):
    """`members`: (name, bytes or TarInfo) in order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                data.name = name
                tar.addfile(data)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder, number=3, each=4):
    """Shards whose images are not even images: nothing here decodes."""
    folder.mkdir(exist_ok=True)
    for shard in range(number):
        members = []
        for i in range(each):
            key = f"{shard * each + i:04d}"
            members += [(f"{key}.jpg", f"image {key}".encode()), (f"{key}.cls", str(i % 3).encode())]
        write_tar(folder / f"s-{shard:03d}.tar", members)
    return folder


def write_pictures(folder, encode, number=12):
    members = []
    for i in range(number):
        members += [(f"{i}.png", encode(np.full((8, 8, 3), i, dtype=np.uint8))), (f"{i}.cls", b"0")]
    return write_tar(folder / "p.tar", members)


def opened(text, **options):
    """Shards by a pattern."""
    return open_shards(f"shards:{text}", text, **options)
