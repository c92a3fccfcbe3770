"""The training stream, brought to the device: this rank's micro-batches with their place in the run."""

from collections.abc import Callable, Generator, Iterable
from contextlib import nullcontext
from typing import TypedDict

import torch
from torch import Tensor

from mpp.data.late import DecodeJpegs, LateDecoder
from mpp.data.loader import stream
from mpp.data.reader import Bad, TooManyBad, Training, Transform
from mpp.data.settings import Reading
from mpp.data.sources.base import Source
from mpp.dist import World


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
    On CUDA both that and the copies go by a stream of their own, while the training computes with the batches before.
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
    copying = torch.cuda.Stream(device) if cuda else None
    try:
        for number, batch in enumerate(batches):
            update, part = divmod(number, share // micro_batch)
            with nullcontext() if copying is None else torch.cuda.stream(copying):
                batch = late(batch) if late else batch
                images, labels = (batch[key].to(device, non_blocking=cuda) for key in ("images", "label"))
            if copying is not None:
                _hand_over((images, labels), copying, torch.cuda.current_stream(device))
            report_bad(batch["bad"], len(images))
            yield {
                "images": images,
                "labels": labels,
                "position": start + update * batch_size,
                "slot": world.rank * share + part * micro_batch,
            }
            del images, labels  # or they would lie beside the next
    except TooManyBad as error:
        report_bad(error.bad, 0)
        raise
    finally:
        batches.close()


def _hand_over(tensors: Iterable[Tensor], made: torch.cuda.Stream, used: torch.cuda.Stream) -> None:
    """Lets what a stream makes be used by another one, which alone waits for it."""
    used.wait_stream(made)
    for tensor in tensors:
        tensor.record_stream(used)  # else its memory would be written to anew as soon as nobody here knows it
