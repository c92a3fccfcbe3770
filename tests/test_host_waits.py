"""A step queues its work and goes on: nothing in it waits for the device, seen on one that is pretended."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.testing._internal.distributed.fake_pg import FakeStore

from mpp import dist
from mpp.config import parse
from mpp.data.settings import DecodeOptions
from mpp.data.transform import EvalTransform
from mpp.dist import World
from mpp.downstream import features, tuning
from mpp.downstream.labelled import open_labelled
from mpp.downstream.settings import FinetuneConfig
from mpp.pretraining.build import build
from mpp.pretraining.step import training_step
from mpp.training.loop import fit
from tests import pretended, runs

ALONE = World()
SMALL = {"model__depth": "1", "model__attention": "sdpa", "train__compile": "off"}

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


def waits_after_the_first_step(
    run: Any, step: Any, batches: Any, waits: pretended.Waits, rows: bool = False
) -> dict[str, int]:
    """What the second step of a run waits for; the first fills caches."""
    after: list[dict[str, int]] = []
    every: list[Any] = [(1, lambda state: state.meter.read())] if rows else []
    note = lambda _: after.append(dict(waits.seen))  # noqa: E731
    assert run.schedule.accumulate == 2
    with contextlib.closing(batches):
        fit(run.state, run.wrapped, batches, step, replace(run.schedule, total_steps=2), every, each_step=[note])
    return {place: times - after[0].get(place, 0) for place, times in after[-1].items() if times != after[0].get(place)}


def pretrain(source: str, rows: bool = False, world: World = ALONE, **changed: str) -> dict[str, int]:
    config = runs.pretrain_config(source, **SMALL | {"fewshot__data": "", **changed})
    with pretended.cuda() as waits:
        run = build(config, world, pretended.CUDA)
        return waits_after_the_first_step(run, training_step(run), run.batches(), waits, rows)


READ = {"mpp/training/meter.py:read: copy to cpu, blocking": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "waits"),
    [
        ({"optim__ema_decay": "0.9", "objective__picking": "block", "objective__random_from": "batch"}, READ),
        ({"train__precision": "bf16", "objective__target": "pixels", "objective__decoder_depth": "1"}, {}),
        (
            {
                "train__precision": "fp16",
                "objective__detail": "0.5",
                "objective__words": "0.5",
                "optim__name": "sgd",
                "optim__clip_norm": "0",
            },
            {},
        ),
    ],
)
def test_pretraining_waits_for_a_row_of_figures_alone(
    changed: dict[str, str], waits: dict[str, int], source: str
) -> None:
    assert pretrain(source, rows=waits == READ, **changed) == waits


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A rank whose collectives do nothing."""
    monkeypatch.setattr(dist, "gather", lambda value: [value, value])
    monkeypatch.setattr(dist, "agree", lambda facts: None)
    monkeypatch.setattr(dist, "barrier", lambda patient=False: None)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield World(0, 2, 0, 2)
    dist.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "waits"),
    [
        ({"train__precision": "bf16"}, {}),
        ({"optim__name": "sgd"}, {"mpp/training/loop.py:check: item": 1}),  # torch has no fused one for shards
    ],
)
def test_fsdp_does_not_wait(changed: dict[str, str], waits: dict[str, int], first_of_two: World, source: str) -> None:
    changed = {"train__parallel": "fsdp", "train__micro_batch": "4", **changed}
    assert pretrain(source, world=first_of_two, **changed) == waits


@pytest.mark.parametrize(
    "changed", [{}, runs.slow({"loss__mixup": "0.8", "loss__cutmix": "1", "optim__name": "adamw"})]
)
def test_fine_tuning_does_not_wait(changed: dict[str, str], source: str, tmp_path: Path) -> None:
    words = runs.finetune_command(source, tmp_path, **SMALL | changed)
    config = parse(FinetuneConfig, words[1:], "finetune", "", {})
    labelled = open_labelled(source)
    with pretended.cuda() as waits:
        run = tuning.build_tuning(config, labelled, 0.1, World(), pretended.CUDA)
        batches = run.batches()
        assert waits_after_the_first_step(run, tuning.training_step(run), batches, waits) == {}


def test_features_are_taken_while_the_next_batch_is_on_its_way(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "EVALUATION_BATCH", 8)
    labelled = open_labelled(source)
    given = (labelled.train, labelled.train_indices, EvalTransform((32, 32)), DecodeOptions(3), pretended.CUDA)
    with pretended.cuda() as waits, pytest.raises(RuntimeError, match="numpy"):  # of which nothing pretended has any
        features.extract_by_all(lambda images: images.float().mean(dim=(2, 3)), *given, workers=0)
    assert len(waits.copied) == 3  # a batch to the device, its features back, and the next batch
    assert not waits.seen


@pytest.mark.parametrize(
    ("does", "what"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: x.cpu(), "copy to cpu, blocking"),
        (lambda x: x.copy_(torch.ones(3)), "copy to cuda:0, blocking"),
        (lambda x: torch.ones(3).to(x.device, non_blocking=True), "copy to cuda:0, not pinned"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.to("cpu", non_blocking=True), None),
        (lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True), None),
        (lambda x: torch.where(x > 0, x, 0).masked_fill(x > 1, 2.0).gather(0, x.argsort()) + torch.ones(()), None),
    ],
)
def test_waits_are_seen(does: Callable[[Tensor], Any], what: str | None) -> None:
    with pretended.cuda() as waits:
        x = torch.empty(3, device=pretended.CUDA)
        with contextlib.suppress(DynamicOutputShapeException):
            does(x)
    assert dict(waits.seen) == ({} if what is None else {f"elsewhere: {what}": 1})
