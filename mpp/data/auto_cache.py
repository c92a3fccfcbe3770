"""data.cache auto: a training reads decoded pixels wherever its images are small enough, and decoded more than once.

The bits are those of reading the files: only what decodes to the same pixels whatever the crop is kept, JPEGs as the
training decodes them. Anything else goes on as before, with a line that says why.
"""

import contextlib
import math
import shutil
from collections.abc import Callable

import numpy as np

from mpp.data.decoding.decode import BadImage, Picture, one_line, open_picture
from mpp.data.decoding.jpeg import JpegPicture, scales
from mpp.data.pixel_cache import PixelSource, Whole, cached
from mpp.data.reader import Transform
from mpp.data.settings import DataConfig, Reading
from mpp.data.sources.base import Source, count, read_many
from mpp.errors import Unreachable, UserError
from mpp.system.cache import shown_size
from mpp.system.cores import memory
from mpp.system.files import cache_folder

_SHARE = 4  # of the memory, and of what is free on the disk, one part of so many is taken
_SAMPLE = 32  # images by which the size of all is judged
_WHY = "JPEGs that are scaled to their crop while they are decoded"
_WORTH = 2  # passes from which on decoding all beforehand pays


class _Unfit(UserError):
    """Images that data.cache auto does not keep decoded; its text is why."""


class _Training(Whole):
    """Whole images as a training decodes them.

    Args:
        source: what to read.
        reading: how files become pixels.
        transform: of the training.
        late: whether its JPEGs are decoded on the device.
    """

    def __init__(self, source: Source, reading: Reading, transform: Transform, late: bool) -> None:
        super().__init__(source, reading)
        self.target_hw = self.hw = transform.image_hw
        self.late = late

    def keeps(self, picture: Picture) -> bool:
        """Not JPEGs whose pixels depend on the crop, or on the device."""
        if not isinstance(picture, JpegPicture):
            return True
        return not self.late and not scales(picture.height, picture.width, self.hw)


def keep_decoded(
    data: DataConfig,
    source: Source,
    transform: Transform,
    reading: Reading,
    *,
    images: int,
    workers: int,
    late: bool = False,
    make: bool = True,
    say: Callable[[str], None],
) -> Source:
    """What a training reads under data.cache auto: the same bits, from decoded pixels where that pays and can be.

    Args:
        data: of the training.
        source: its images; whatever else reads them goes on with these.
        transform: its transform.
        reading: how files become pixels.
        images: how many it is still to read, each as often as it is read.
        workers: loader processes to decode with.
        late: whether its JPEGs are decoded on the device.
        make: whether to decode what is not in the cache yet.
        say: takes a line before images are decoded, and one that says where the pixels are, or why there are none.

    Returns:
        The source to train from.

    Raises:
        Unreachable: what the images are read from gives no answer.
    """
    if data.cache != "auto" or not len(source):
        return source
    try:
        kept = _kept(_Training(source, reading, transform, late), images, workers, make, say)
    except Unreachable:
        raise
    except _Unfit as why:
        if str(why):
            say(f"images are decoded each time they are read: {why}")
        return source
    except (UserError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        say(f"images are decoded each time they are read: they cannot be kept in {cache_folder()} ({reason})")
        return source
    told = (
        f"images are decoded once: {shown_size(kept.nbytes)} in {kept.path} (--data.cache none decodes them each time)"
    )
    missing = sum(not kept.decoded(index) for index in range(len(source)))
    left_out = f"{'JPEGs decoded on the device' if late else _WHY}, or damaged"
    say(f"{told}; not {missing:,} of them, {left_out}" if missing else told)
    return kept


def _kept(whole: _Training, images: int, workers: int, make: bool, say: Callable[[str], None]) -> PixelSource:
    """From the cache, or decoded now. Raises _Unfit."""
    source = whole.source
    if getattr(source, "weights", None):
        raise _Unfit("the sources are weighted")
    if "://" in source.name:
        raise _Unfit("they are remote (--data.keep true keeps the files)")
    _estimate(whole, 1)  # of arrays, which need no decoding, there is nothing to ask or to say
    room = memory() // _SHARE

    def size() -> int:
        nonlocal room
        if images < _WORTH * len(source):
            raise _Unfit(f"{count(images, 'image')} of {len(source):,} are to be read, fewer than two passes")
        if not make:
            raise _Unfit("a dry run keeps no pixels")
        estimate = _estimate(whole, _SAMPLE)
        refused = f"decoded they take {shown_size(estimate)}, more than a quarter of "
        if estimate > room:
            raise _Unfit(f"{refused}the memory")
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free // _SHARE
        if estimate > free:
            raise _Unfit(f"{refused}what is free in {folder}")
        room = min(room, free)
        say(f"decoding {count(len(source), 'image')}, once for all that is to be read: {shown_size(estimate)}")
        return estimate

    def check(sizes: np.ndarray, written: int) -> None:
        if written > room:
            raise _Unfit(f"decoded they take more than {shown_size(room)}")

    kept = cached(whole, ["training", *whole.hw, whole.late], workers, size, check)
    if kept.nbytes > room:  # kept on a machine, or in a container, with more
        raise _Unfit(f"decoded they take {shown_size(kept.nbytes)}, more than a quarter of the memory")
    return kept


def _estimate(whole: _Training, sample: int) -> int:
    """Bytes that all images take decoded, by the headers of some. Raises _Unfit where there is nothing to decode."""
    indices = np.unique(np.linspace(0, len(whole.source) - 1, sample).astype(np.int64)).tolist()
    areas, left = list[int](), 0
    for found in read_many(whole.source, indices, whole.reading.max_bytes):
        if isinstance(found, Unreachable):
            raise found
        if isinstance(found, OSError):
            continue
        if isinstance(found[0], np.ndarray):
            raise _Unfit("")  # nothing to decode, and nothing to say
        with contextlib.suppress(BadImage):
            picture = open_picture(found[0], whole.reading)
            if whole.keeps(picture):
                areas.append(picture.height * picture.width * whole.reading.channels)
            else:
                left += 1
    if not areas and not left:
        raise _Unfit("none of some decodes")
    if left > len(areas):
        raise _Unfit("JPEGs decoded on the device" if whole.late else _WHY)
    return math.ceil(sum(areas) / len(indices) * len(whole.source))
