"""data.cache auto: a training reads decoded pixels wherever its images are small enough, and decoded more than once.

The bits are those of reading the files: only what decodes to the same pixels whatever the crop is kept, JPEGs as the
training decodes them. Anything else goes on as before, with a line that says why.
"""

import math
import shutil
from collections.abc import Callable

import numpy as np

from mpp.data.decoding import open_picture
from mpp.data.decoding.bad_image import one_line
from mpp.data.pixel_cache import PixelSource, WholeReader, cached
from mpp.data.reader import Bad, attempt_each
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.base import Source, count, spread
from mpp.data.transform import Transform
from mpp.errors import Unreachable, UserError
from mpp.system.cache import shown_size
from mpp.system.cores import memory
from mpp.system.files import cache_folder

_SHARE = 4  # of the memory, and of what is free on the disk, one part of so many is taken
_SAMPLE = 32  # images by which the size of all is judged
_WORTH = 2  # passes from which on decoding all beforehand pays


class _Unfit(UserError):
    """Images that data.cache auto does not keep decoded; its text is why."""


def keep_decoded(
    data: DataConfig,
    source: Source,
    transform: Transform,
    options: DecodeOptions,
    *,
    images: int,
    workers: int,
    device_jpegs: bool = False,
    make: bool = True,
    say: Callable[[str], None],
) -> Source:
    """The source that a training reads under data.cache auto: the same bits, decoded already where that pays and fits.

    `images` are still to be read, each as often as it is read; `make` says whether to decode what is not in the cache.
    `say` takes a line before images are decoded, and one that says where the pixels are, or why there are none.
    Raises Unreachable where what the images are read from gives no answer.
    """
    if data.cache != "auto" or not len(source):
        return source
    reader = WholeReader(source, options, transform.image_hw, device_jpegs)
    try:
        pixels = _cached(reader, images, workers, make, say)
    except Unreachable:
        raise
    except (UserError, OSError) as error:
        reason = str(error)
        if not isinstance(error, _Unfit):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
            reason = f"they cannot be kept in {cache_folder()} ({reason})"
        if reason:
            say(f"images are decoded each time they are read: {reason}")
        return source
    note = (
        f"images are decoded once: {shown_size(pixels.nbytes)} in {pixels.path} "
        "(--data.cache none decodes them each time)"
    )
    missing = int((pixels.sizes[:, 0] == 0).sum())
    say(f"{note}; not {missing:,} of them, {reader.left_out}, or damaged" if missing else note)
    return pixels


def _cached(reader: WholeReader, images: int, workers: int, make: bool, say: Callable[[str], None]) -> PixelSource:
    """From the cache, or decoded now. Raises _Unfit."""
    source = reader.source
    if source.weights:
        raise _Unfit("the sources are weighted")
    if "://" in source.name:
        raise _Unfit("they are remote (--data.keep true keeps the files)")
    estimate = _estimate(reader)  # of arrays, which need no decoding, there is nothing to ask or to say
    room = {"the memory": memory() // _SHARE}

    def size() -> int:
        if images < _WORTH * len(source):
            raise _Unfit(f"{count(images, 'image')} of {len(source):,} are to be read, fewer than two passes")
        if not make:
            raise _Unfit("a dry run keeps no pixels")
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        room[f"what is free in {folder}"] = shutil.disk_usage(folder).free // _SHARE
        for what, most in room.items():
            if estimate > most:
                raise _Unfit(f"decoded they take {shown_size(estimate)}, more than a quarter of {what}")
        say(f"decoding {count(len(source), 'image')}, once for all that is to be read: {shown_size(estimate)}")
        return estimate

    def check(written: int) -> None:
        if written > (most := min(room.values())):
            raise _Unfit(f"decoded they take more than {shown_size(most)}")

    pixels = cached(reader, workers, size, check)
    if pixels.nbytes > min(room.values()):  # made on a machine, or in a container, with more
        raise _Unfit(f"decoded they take {shown_size(pixels.nbytes)}, more than a quarter of the memory")
    return pixels


def _estimate(reader: WholeReader) -> int:
    """Bytes that all images take decoded, by the headers of some. Raises _Unfit where there is nothing to decode."""

    def area(_: int, data: bytes | np.ndarray, __: int) -> int:
        if isinstance(data, np.ndarray):
            raise _Unfit("")  # nothing to decode, and nothing to say
        picture = open_picture(data, reader.options)
        return picture.height * picture.width if reader.keeps(picture) else 0

    source = reader.source
    indices = spread(np.arange(len(source)), _SAMPLE)
    each = attempt_each(source, indices, reader.options.max_bytes, area)
    areas = [found for _, found in each if not isinstance(found, Bad)]
    if not areas:
        raise _Unfit("none of some decodes")
    if areas.count(0) > len(areas) / 2:
        raise _Unfit(reader.left_out)
    return math.ceil(sum(areas) * reader.options.channels / len(indices) * len(source))
