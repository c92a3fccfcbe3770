"""The training stream, brought to the device: this rank's micro-batches with their place in the run."""

from collections.abc import Callable, Generator
from contextlib import nullcontext
from typing import TypedDict

import torch
from torch import Tensor

from mpp.data.device_jpeg import DecodeJpegs, DeviceDecoder
from mpp.data.loader import stream
from mpp.data.reader import Bad, TooManyBad, TrainReader
from mpp.data.settings import DecodeOptions
from mpp.data.sources.base import Source
from mpp.data.transform import Transform
from mpp.dist import World


class DeviceBatch(TypedDict):
    """One micro-batch on the device."""

    images: Tensor  # uint8 (B, C, h, w)
    labels: Tensor  # int64 (B,), -1 where there is none
    index: Tensor  # int64 (B,), of the images in their source; on the CPU
    position: int  # images seen before the update that it belongs to
    slot: int  # its first row in the global batch


def feed(
    source: Source,
    transform: Transform,
    options: DecodeOptions,
    device: torch.device,
    *,
    seed: int,
    batch_size: int,
    micro_batch: int,
    start: int,
    world: World,
    workers: int,
    decode: DecodeJpegs | None = None,
    report_bad: Callable[[list[Bad], int], None] = lambda bad, images: None,
) -> Generator[DeviceBatch]:
    """This rank's endless micro-batches from `start` images seen on (see `stream`). Close it to end its workers.

    `decode` decodes ordinary JPEGs on the device. On CUDA that and copies go by a stream of their own, while the
    training computes. `report_bad` takes the files of a batch that could not be decoded, and the number of images read.
    """
    share, cuda = batch_size // world.size, device.type == "cuda"
    batches = stream(
        source,
        transform,
        options,
        seed=seed,
        batch_size=batch_size,
        micro_batch=micro_batch,
        start=start,
        rank=world.rank,
        world=world.size,
        workers=workers,
        pin_memory=cuda,
        device_jpegs=decode is not None,
    )
    decoder = decode and DeviceDecoder(TrainReader(source, transform, options, seed), decode, device)
    copying = torch.cuda.Stream(device) if cuda else None
    try:
        for number, batch in enumerate(batches):
            update, part = divmod(number, share // micro_batch)
            with nullcontext() if copying is None else torch.cuda.stream(copying):
                batch = decoder(batch) if decoder else batch
                images, labels = (batch[key].to(device, non_blocking=cuda) for key in ("images", "label"))
            if copying is not None:
                training = torch.cuda.current_stream(device)
                training.wait_stream(copying)
                for tensor in (images, labels):  # else their memory would be reused as soon as nobody here needs it
                    tensor.record_stream(training)
            report_bad(batch["bad"], len(images))
            yield {
                "images": images,
                "labels": labels,
                "index": batch["index"],
                "position": start + update * batch_size,
                "slot": world.rank * share + part * micro_batch,
            }
            del images, labels  # or they would lie beside the next
    except TooManyBad as error:
        report_bad(error.bad, 0)
        raise
    finally:
        batches.close()
