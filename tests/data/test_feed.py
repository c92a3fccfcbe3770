"""Micro-batches with their place in the run."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

from mpp.data.feed import DeviceBatch, feed
from mpp.data.reader import Bad
from mpp.data.settings import DecodeOptions
from mpp.data.sources.in_memory import ListSource
from mpp.data.transform import EvalTransform
from mpp.dist import World
from tests import pretended
from tests.data.streams import run

CPU = torch.device("cpu")
SOURCE = ListSource(np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8), np.arange(10))


def some(number: int, start: int, world: World, micro: int, source=SOURCE, **changed: Any) -> list[DeviceBatch]:
    settings = {
        "seed": 1,
        "batch_size": 8,
        "micro_batch": micro,
        "start": start,
        "world": world,
        "workers": 0,
        **changed,
    }
    with contextlib.closing(feed(source, EvalTransform((4, 4)), DecodeOptions(3), CPU, **settings)) as batches:
        return [next(batches) for _ in range(number)]


def test_places_of_one_process() -> None:
    batches = some(5, 16, World(), 4)
    assert [(batch["position"], batch["slot"]) for batch in batches] == [(16, 0), (16, 4), (24, 0), (24, 4), (32, 0)]
    for batch in batches:
        assert (batch["images"].dtype, batch["images"].shape) == (torch.uint8, (4, 3, 4, 4))
        assert batch["labels"].tolist() == batch["images"][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_ranks_share_what_one_process_reads(micro: int) -> None:
    whole = torch.cat([batch["labels"] for batch in some(6, 8, World(), 4)])
    rows = torch.full((24,), -1)
    for rank in range(2):
        for batch in some(3 * 4 // micro, 8, World(rank, 2), micro):
            first = batch["position"] - 8 + batch["slot"]
            rows[first : first + micro] = batch["labels"]
    assert torch.equal(rows, whole)


def test_it_is_the_stream() -> None:
    (batch,) = run(SOURCE, 1, EvalTransform((4, 4)), seed=1, micro_batch=8, start=8)
    assert torch.equal(batch["images"], some(1, 8, World(), 8)[0]["images"])


def test_on_cuda_a_stream_of_its_own_copies_what_the_training_then_uses() -> None:
    with pretended.cuda() as waits:
        training = pretended.Stream.current
        settings = {"seed": 1, "batch_size": 8, "micro_batch": 4, "start": 0, "world": World(), "workers": 0}
        batches = feed(SOURCE, EvalTransform((4, 4)), DecodeOptions(3), pretended.CUDA, **settings)
        for number in (1, 2):
            batch = next(batches)
            assert batch["images"].device == batch["labels"].device == pretended.CUDA
            assert pretended.Stream.current is training
            assert len(set(waits.copied)) == 1
            assert training not in waits.copied
            assert training.waits_for == waits.copied[::2]  # once a batch, after both of its copies
            assert training.uses == [(4, 3, 4, 4), (4,)] * number
        batches.close()
    assert not waits.seen


def test_bad_files_are_reported_with_the_images_read() -> None:
    source = ListSource([*(np.full((4, 4, 3), value, np.uint8) for value in range(4)), b"no image"], [0, 1, 2, 3, 4])
    heard: list[tuple[list[Bad], int]] = []
    (batch,) = some(1, 0, World(), 5, source, batch_size=5, report_bad=lambda bad, number: heard.append((bad, number)))
    ((bad, number),) = heard
    assert number == 5
    assert {(one.index, one.kind) for one in bad} == {(4, "not an image")}
    assert 4 not in batch["labels"]
