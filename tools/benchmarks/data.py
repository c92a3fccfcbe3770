"""python tools/bench.py data: decoding and augmentation beside Pillow and torchvision, the loader, a very long index.

1. One core, images in memory: decode, random resized crop, flip; ours, the usual pipeline, decoding alone.
2. Grey levels between our crops and exact ones of the same boxes.
3. The loader with one worker and with several.
4. Small images out of an array, to the batch.
5. Where there is CUDA: training batches on the device, decoded there and by the workers.
6. An index of millions of images (bench/index.py).
"""

import io
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch

import mpp.system.torchvision_import  # noqa: F401

from PIL import Image  # isort: skip
from torchvision.transforms import v2  # isort: skip

from benchmarks.index import index
from benchmarks.settings import DataBench
from mpp.data.decoding import BadImage, open_picture
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
from mpp.training.timing import hardware, ratios, spread, timed

_READING = DecodeOptions(3)
_SMALL = 32  # side of the images of part 4, CIFAR's
_BATCH = 256


def data(config: DataBench) -> int:
    """Measures and prints rates per second and their ratios, medians with spread; returns the exit code.

    Raises:
        UserError: a source that does not open, or none of whose images decodes.
    """
    encoded = encoded_images(config)
    print(hardware())
    pixels = np.mean([_size(data) for data in encoded])
    print(
        f"{len(encoded):,} images of {config.data}, {pixels / 1e6:.2f} megapixels and "
        f"{np.mean([len(data) for data in encoded]) / 1024:.0f} KiB on average, to {config.size} x {config.size}; "
        f"median (least to most) of {config.repeats}\n"
    )
    with one_thread():
        _one_core(encoded, config)
        _difference(encoded, config)
        _loader(encoded, config)
        _small_images(config)
        if torch.cuda.is_available():
            _on_the_device(encoded, config)
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
            open_picture(data, _READING).pixels()
        except BadImage:
            continue
        found.append(data)
        if len(found) == config.images:
            break
    if not found:
        raise UserError(f"none of the images of {config.data} could be decoded")
    return found


def _size(data: bytes) -> int:
    picture = open_picture(data, _READING)
    return picture.height * picture.width


def _one_core(encoded: list[bytes], config: DataBench) -> None:
    """Each side over all images, in turns."""
    transform = TrainTransform(DataConfig(), (config.size, config.size), 3)
    draws = uniforms(image_seeds(0, np.arange(len(encoded))), transform.draws).tolist()
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(config.size, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    sides: dict[str, Callable[[int], object]] = {
        "mpp: decode, crop, resize, flip": lambda i: transform(open_picture(encoded[i], _READING), draws[i]),
        "Pillow and torchvision: the same": lambda i: theirs(_pillow(encoded[i])),
        "mpp: decode alone": lambda i: open_picture(encoded[i], _READING).pixels(),
        "Pillow: decode alone": lambda i: _pillow(encoded[i]),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():  # the first images pay for what is loaded late
        side(0)
    for _ in range(config.repeats):
        for name, side in sides.items():
            rates[name].append(len(encoded) / timed(lambda side=side: [side(i) for i in range(len(encoded))])[1])
    print("One core, images/s:")
    for name, rate in rates.items():
        print(f"  {name:36} {spread(rate, ''):>26}")
    ours, usual, alone, _ = rates.values()
    print(f"  {'mpp / Pillow and torchvision':36} {spread(ratios(ours, usual), ' x'):>26}")
    print(f"  {'mpp / its decoding alone':36} {spread(ratios(ours, alone), ' x'):>26}\n")


def _pillow(data: bytes) -> Image.Image:
    """As torchvision's ImageFolder reads."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _difference(encoded: list[bytes], config: DataBench) -> None:
    """Our crops beside crops of the same boxes by Pillow alone: its decoding, its bicubic resizing."""
    side = config.size
    transform = TrainTransform(DataConfig(hflip=0), (side, side), 3)
    draws = uniforms(image_seeds(0, np.arange(len(encoded))), transform.draws).tolist()
    off: list[float] = []
    for data, drawn in zip(encoded, draws, strict=True):
        picture = open_picture(data, _READING)
        top, left, height, width = transform.box(picture, drawn)
        image = Image.fromarray(picture.pixels())
        exact = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
        ours = transform(picture, drawn).permute(1, 2, 0).numpy().astype(np.int16)
        off.append(float(np.abs(ours - np.asarray(exact)).mean()))
    levels = f"{np.mean(off):.2f} grey levels on average, {max(off):.2f} in the worst image"
    print(f"Crops of ours and Pillow's differ by {levels}.\n")


def _loader(encoded: list[bytes], config: DataBench) -> None:
    """Batches of 32 out of loader processes."""
    source = ListSource(encoded)
    transform = TrainTransform(DataConfig(), (config.size, config.size), 3)
    batch, counts = 32, sorted({1, config.workers})
    number = max(4 * config.workers, 4 * len(encoded) // batch)
    rates: dict[int, list[float]] = {workers: [] for workers in counts}
    for _, workers in itertools.product(range(config.repeats), counts):
        rates[workers].append(_stream_rate(source, transform, batch, number, workers))
    print("The loader, images/s:")
    for workers, rate in rates.items():
        print(f"  {f'{workers} worker' + 's' * (workers > 1):36} {spread(rate, ''):>26}")
    if len(counts) > 1:
        ratio = ratios(rates[counts[-1]], rates[1])
        print(f"  {f'{counts[-1]} workers / 1':36} {spread(ratio, ' x'):>26}")
    print()


def _stream_rate(source: ListSource, transform: TrainTransform, batch: int, number: int, workers: int) -> float:
    """Images/s over `number` batches, once the workers have started and their first batches are through."""
    batches = stream(source, transform, _READING, seed=0, batch_size=batch, micro_batch=batch, start=0, workers=workers)
    try:
        for _ in range(3 * workers + 1):
            next(batches)
        return batch * number / timed(lambda: [next(batches) for _ in range(number)])[1]
    finally:
        batches.close()


def _small_images(config: DataBench) -> None:
    """From an array, read in this process, so that the rate is one core's."""
    images = np.random.default_rng(0).integers(0, 256, (20_000, _SMALL, _SMALL, 3), dtype=np.uint8)
    transform = TrainTransform(DataConfig(), (_SMALL, _SMALL), 3)
    rates = [_stream_rate(ListSource(images), transform, _BATCH, 40, 0) for _ in range(config.repeats)]
    print(f"Images of {_SMALL} x {_SMALL} in an array, crop, resize, flip, batch; one core, images/s:")
    print(f"  {'mpp':36} {spread(rates, ''):>26}\n")


def device_rates(encoded: list[bytes], config: DataBench) -> dict[str, list[float]]:
    """Images/s of the same training batches on the device, decoded by nvJPEG and by the workers, in turns."""
    device, number = torch.device("cuda"), max(8, 2 * len(encoded) // _BATCH)
    rates: dict[str, list[float]] = {"decoded by nvJPEG": [], "decoded by the workers": []}
    for _ in range(config.repeats):
        for name, decode in zip(rates, (nvjpeg(device), None), strict=True):
            batches = feed(
                ListSource(encoded),
                TrainTransform(DataConfig(), (config.size, config.size), 3),
                _READING,
                device,
                seed=0,
                batch_size=_BATCH,
                micro_batch=_BATCH,
                start=0,
                world=World(),
                workers=config.workers,
                decode=decode,
            )

            def take(number: int, batches: Iterator[object] = batches) -> None:
                for _ in range(number):
                    next(batches)
                torch.cuda.synchronize()

            try:
                take(config.workers + 1)
                rates[name].append(_BATCH * number / timed(lambda take=take: take(number))[1])
            finally:
                batches.close()
    return rates


def _on_the_device(encoded: list[bytes], config: DataBench) -> None:
    rates = device_rates(encoded, config)
    print(f"Batches of {_BATCH} on {torch.cuda.get_device_name()}, {config.workers} workers, images/s:")
    for name, rate in rates.items():
        print(f"  {name:36} {spread(rate, ''):>26}")
    print(f"  {'nvJPEG / workers':36} {spread(ratios(*rates.values()), ' x'):>26}\n")
