"""The training stream, brought to the device: this rank's micro-batches with their place in the run."""

from collections.abc import Callable, Generator
from typing import TypedDict

import torch
from torch import Tensor

from mpp.data.config import Reading
from mpp.data.late import DecodeJpegs, LateDecoder
from mpp.data.loader import stream
from mpp.data.reader import Bad, TooManyBad, Training, Transform
from mpp.dist import World
from mpp.sources.base import Source


class Placed(TypedDict):
    """One micro-batch on the device."""

    images: Tensor
    """uint8 (B, C, h, w)."""
    labels: Tensor
    """int64 (B,), -1 where there is none."""
    position: int
    """Images seen before the update that it belongs to."""
    slot: int
    """Its first row in the global batch."""


def feed(
    source: Source,
    transform: Transform,
    reading: Reading,
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
) -> Generator[Placed]:
    """This rank's endless micro-batches from `start` images seen on (see `stream`). Close it to end its workers.

    With `decode`, ordinary JPEGs are decoded by it, on the device (mpp/data/late.py).
    `report_bad` hears of the files that could not be decoded and of the number of images read.
    """
    share = batch_size // world.size
    cuda = device.type == "cuda"
    batches = stream(
        source,
        transform,
        reading,
        seed=seed,
        batch_size=batch_size,
        micro_batch=micro_batch,
        start=start,
        rank=world.rank,
        world=world.size,
        workers=workers,
        pin_memory=cuda,
        late=decode is not None,
    )
    late = decode and LateDecoder(Training(source, transform, reading, seed), decode, device)
    try:
        for number, batch in enumerate(batches):
            update, part = divmod(number, share // micro_batch)
            batch = late(batch) if late else batch
            report_bad(batch["bad"], len(batch["images"]))
            yield {
                "images": batch["images"].to(device, non_blocking=cuda),
                "labels": batch["label"].to(device, non_blocking=cuda),
                "position": start + update * batch_size,
                "slot": world.rank * share + part * micro_batch,
            }
    except TooManyBad as error:
        report_bad(error.bad, 0)
        raise
    finally:
        batches.close()
