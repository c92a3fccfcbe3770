"""python tools/bench.py data: decoding and augmentation beside Pillow and torchvision, the loader, a very long index.

1. One core, images in memory: decode, random resized crop, flip; ours, the usual pipeline, decoding alone.
2. Grey levels between our crops and exact ones of the same boxes.
3. The loader with one worker and with several.
4. Small images out of an array, to the batch.
5. Where there is CUDA: training batches on the device, decoded there and by the workers.
6. An index of millions of images (index.py).
"""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch

import mpp.system.torchvision_import  # noqa: F401

from PIL import Image  # isort: skip
from torchvision.transforms import v2  # isort: skip

from benchmarks.index import index
from benchmarks.settings import DataBench
from mpp.data.decoding import BadImage, open_picture
from mpp.data.decoding.picture import Picture
from mpp.data.device_jpeg import nvjpeg
from mpp.data.feed import feed
from mpp.data.loader import stream
from mpp.data.seeds import image_seeds, uniforms
from mpp.data.settings import DataConfig, DecodeOptions
from mpp.data.sources.in_memory import ListSource
from mpp.data.sources.opening import open_source
from mpp.data.transform import TrainTransform
from mpp.dist import World
from mpp.errors import UserError
from mpp.system.process import one_thread
from mpp.training.timing import hardware, in_turns, ratios, seconds_a_call, spread, timed

_READING = DecodeOptions(3)
_SMALL = 32  # side of the images of part 4, CIFAR's
_BATCH = 256
_CPU = torch.device("cpu")


def data(config: DataBench) -> int:
    """Measures and prints rates per second and their ratios, medians with spread; returns the exit code.

    Raises:
        UserError: a source that does not open, or none of whose images decodes.
    """
    encoded = encoded_images(config)
    megapixels = np.mean([picture.height * picture.width for picture in map(_open, encoded)]) / 1e6
    print(hardware())
    print(
        f"{len(encoded):,} images of {config.data}, {megapixels:.2f} megapixels and "
        f"{np.mean([len(data) for data in encoded]) / 1024:.0f} KiB on average, to {config.size} x {config.size}; "
        f"median (least to most) of {config.repeats}\n"
    )
    with one_thread():
        _one_core(encoded, config)
        _difference(encoded, config)
        _loader(encoded, config)
        _small_images(config)
        if torch.cuda.is_available():
            rates = device_rates(encoded, config)
            title = f"Batches of {_BATCH} on {torch.cuda.get_device_name()}, {config.workers} workers, images/s"
            _print(title, rates, {"nvJPEG / workers": ratios(*rates.values())})
    if config.entries:
        index(config.entries, config.reads)
    return 0


def encoded_images(config: DataBench) -> list[bytes]:
    """The first images that decode, as they lie in their files."""
    source = open_source(config.data)
    found: list[bytes] = []
    for number in range(len(source)):
        (held,) = source.read_many([number], _READING.max_bytes)
        if isinstance(held, OSError):
            continue
        data = held[0]
        if isinstance(data, np.ndarray):
            raise UserError(f"{config.data} holds pixels already; the bench measures decoding: name files or shards")
        try:
            _open(data).pixels()
        except BadImage:
            continue
        found.append(data)
        if len(found) == config.images:
            break
    if not found:
        raise UserError(f"none of the images of {config.data} could be decoded")
    return found


def _open(data: bytes) -> Picture:
    return open_picture(data, _READING)


def _print(title: str, rates: Mapping[str, Sequence[float]], compared: Mapping[str, Sequence[float]]) -> None:
    print(f"{title}:")
    for values, unit in ((rates, ""), (compared, " x")):
        for name, of in values.items():
            print(f"  {name:36} {spread(of, unit):>26}")
    print()


def _transform(side: int, hflip: float = 0.5) -> TrainTransform:
    return TrainTransform(DataConfig(hflip=hflip), (side, side), 3)


def _draws(transform: TrainTransform, number: int) -> list[list[float]]:
    """The random numbers of each image."""
    return uniforms(image_seeds(0, np.arange(number)), transform.draws).tolist()


def _one_core(encoded: list[bytes], config: DataBench) -> None:
    """Each side over all images, in turns."""
    transform, number = _transform(config.size), len(encoded)
    draws = _draws(transform, number)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(config.size, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    sides: dict[str, Callable[[int], object]] = {
        "mpp: decode, crop, resize, flip": lambda i: transform(_open(encoded[i]), draws[i]),
        "Pillow and torchvision: the same": lambda i: theirs(_pillow(encoded[i])),
        "mpp: decode alone": lambda i: _open(encoded[i]).pixels(),
        "Pillow: decode alone": lambda i: _pillow(encoded[i]),
    }

    def rate(side: Callable[[int], object]) -> float:
        return number / timed(lambda: [side(i) for i in range(number)])[1]

    for side in sides.values():  # the first images pay for what is loaded late
        side(0)
    rates = in_turns({name: partial(rate, side) for name, side in sides.items()}, config.repeats)
    ours, usual, alone, _ = rates.values()
    compared = {"mpp / Pillow and torchvision": ratios(ours, usual), "mpp / its decoding alone": ratios(ours, alone)}
    _print("One core, images/s", rates, compared)


def _pillow(data: bytes) -> Image.Image:
    """As torchvision's ImageFolder reads."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _difference(encoded: list[bytes], config: DataBench) -> None:
    """Our crops beside crops of the same boxes by Pillow alone: its decoding, its bicubic resizing."""
    side = config.size
    transform = _transform(side, hflip=0)
    off: list[float] = []
    for data, drawn in zip(encoded, _draws(transform, len(encoded)), strict=True):
        picture = _open(data)
        top, left, height, width = transform.box(picture, drawn)
        image = Image.fromarray(picture.pixels())
        exact = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
        ours = transform(picture, drawn).permute(1, 2, 0).numpy().astype(np.int16)
        off.append(float(np.abs(ours - np.asarray(exact)).mean()))
    levels = f"{np.mean(off):.2f} grey levels on average, {max(off):.2f} in the worst image"
    print(f"Crops of ours and Pillow's differ by {levels}.\n")


def _loader(encoded: list[bytes], config: DataBench) -> None:
    """Batches of 32 out of loader processes."""
    number = max(4 * config.workers, len(encoded) // 8)
    rate = partial(_stream_rate, ListSource(encoded), _transform(config.size), 32, number)
    several = f"{config.workers} workers"
    sides = {"1 worker": partial(rate, 1)} | ({several: partial(rate, config.workers)} if config.workers > 1 else {})
    rates = in_turns(sides, config.repeats)
    compared = {f"{several} / 1": ratios(rates[several], rates["1 worker"])} if several in rates else {}
    _print("The loader, images/s", rates, compared)


def _stream_rate(source: ListSource, transform: TrainTransform, batch: int, number: int, workers: int) -> float:
    """Images/s over `number` batches, once the workers have started and their first batches are through."""
    batches = stream(source, transform, _READING, seed=0, batch_size=batch, micro_batch=batch, start=0, workers=workers)
    with closing(batches):
        for _ in range(3 * workers + 1):
            next(batches)
        return batch / seconds_a_call(lambda: next(batches), _CPU, number)


def _small_images(config: DataBench) -> None:
    """From an array, read in this process, so that the rate is one core's."""
    images = np.random.default_rng(0).integers(0, 256, (20_000, _SMALL, _SMALL, 3), dtype=np.uint8)
    rates = [_stream_rate(ListSource(images), _transform(_SMALL), _BATCH, 40, 0) for _ in range(config.repeats)]
    title = f"Images of {_SMALL} x {_SMALL} in an array, crop, resize, flip, batch; one core, images/s"
    _print(title, {"mpp": rates}, {})


def device_rates(encoded: list[bytes], config: DataBench) -> dict[str, list[float]]:
    """Images/s of the same training batches on the device, decoded by nvJPEG and by the workers, in turns."""
    device, number = torch.device("cuda"), max(8, 2 * len(encoded) // _BATCH)

    def rate(on_the_device: bool) -> float:
        batches = feed(
            ListSource(encoded),
            _transform(config.size),
            _READING,
            device,
            seed=0,
            batch_size=_BATCH,
            micro_batch=_BATCH,
            start=0,
            world=World(),
            workers=config.workers,
            decode=nvjpeg(device) if on_the_device else None,
        )
        with closing(batches):
            for _ in range(config.workers + 1):
                next(batches)
            return _BATCH / seconds_a_call(lambda: next(batches), device, number)

    sides = {"decoded by nvJPEG": partial(rate, True), "decoded by the workers": partial(rate, False)}
    return in_turns(sides, config.repeats)
