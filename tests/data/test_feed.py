"""Micro-batches with their place in the run."""

import numpy as np
import pytest
import torch

from mpp.data.feed import feed
from mpp.data.reader import Bad
from mpp.data.settings import DecodeOptions
from mpp.data.sources.in_memory import ListSource
from mpp.data.transform import EvalTransform
from mpp.dist import World
from tests import pretended
from tests.data.streams import fed, joined, numbered, run

SOURCE = ListSource(np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8), np.arange(10))
SMALL = EvalTransform((4, 4))


def test_places_and_images_of_one_process() -> None:
    batches = fed(SOURCE, 5, SMALL, batch_size=8, micro_batch=4, start=16)
    assert [(batch["position"], batch["slot"]) for batch in batches] == [(16, 0), (16, 4), (24, 0), (24, 4), (32, 0)]
    for batch in batches:
        assert (batch["images"].dtype, batch["images"].shape) == (torch.uint8, (4, 3, 4, 4))
        assert batch["labels"].tolist() == batch["images"][:, 0, 0, 0].tolist()
    assert torch.equal(joined(batches, "images"), joined(run(SOURCE, 5, SMALL, seed=1, start=16), "images"))


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_ranks_share_what_one_process_reads(micro: int) -> None:
    whole = joined(fed(SOURCE, 6, SMALL, batch_size=8, micro_batch=4, start=8), "labels")
    rows = torch.full((24,), -1)
    for rank in range(2):
        settings = {"batch_size": 8, "micro_batch": micro, "start": 8, "world": World(rank, 2)}
        for batch in fed(SOURCE, 3 * 4 // micro, SMALL, **settings):
            first = batch["position"] - 8 + batch["slot"]
            rows[first : first + micro] = batch["labels"]
    assert torch.equal(rows, whole)


def test_on_cuda_a_stream_of_its_own_copies_what_the_training_then_uses() -> None:
    with pretended.cuda() as waits:
        training = pretended.Stream.current
        settings = {"seed": 1, "batch_size": 8, "micro_batch": 4, "start": 0, "world": World(), "workers": 0}
        batches = feed(SOURCE, SMALL, DecodeOptions(3), pretended.CUDA, **settings)
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
    heard: list[tuple[list[Bad], int]] = []
    settings = {"batch_size": 5, "micro_batch": 5, "report_bad": lambda bad, number: heard.append((bad, number))}
    (batch,) = fed(numbered(5, bad=(4,)), 1, SMALL, **settings)
    ((bad, number),) = heard
    assert number == 5
    assert {(one.index, one.kind) for one in bad} == {(4, "not an image")}
    assert 4 not in batch["images"]
