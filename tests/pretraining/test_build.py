"""A built run: what its step gets, what it draws, that it learns, and what does not fit."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpp.data.seeds import derive_seed
from mpp.dist import World
from mpp.objective.masking import RANDOM, Corruption
from mpp.pretraining.build import PretrainingRun, build
from mpp.pretraining.settings import PretrainConfig
from mpp.pretraining.step import draw, training_step
from mpp.pretraining.survey import survey_source, surveyed_images
from mpp.training import training_run
from mpp.training.loop import fit
from tests import runs

CPU = torch.device("cpu")


def config_of(source: str, **changed: str) -> PretrainConfig:
    """The config of the tests' command line, without few-shot evaluation."""
    return runs.pretrain_config(source, **{"fewshot__data": "", **changed})


def built(source: str, **changed: str) -> PretrainingRun:
    return build(config_of(source, **changed), World(), CPU)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch):
    """Builds the run of one rank among several, without a process group."""
    monkeypatch.setattr(training_run, "prepare", lambda model, *_: model)
    return lambda config, number, size: build(config, World(number, size, number, size), CPU)


class Recorder(nn.Module):
    """Stands for the model and remembers what the step gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Tensor, Corruption]] = []

    def forward(self, images: Tensor, corruption: Corruption, _: None) -> tuple[Tensor, dict[str, Tensor]]:
        self.given.append((images, corruption))
        return torch.zeros(()), {}


def given_to_the_model(run: PretrainingRun, updates: int) -> dict[tuple[int, int], tuple[Tensor, Corruption]]:
    """Images and corruption in some updates, by position and slot."""
    model, step, batches, slots = Recorder(), training_step(run), run.batches(), []
    for _ in range(updates * run.schedule.accumulate):
        batch = next(batches)
        step(model, batch)
        slots.append((batch["position"], batch["slot"]))
    batches.close()
    assert len(set(slots)) == len(slots)
    return dict(zip(slots, model.given, strict=True))


@pytest.mark.parametrize(("size", "micro"), [(1, "4"), (1, "1"), (2, "4"), (4, "2")])
def test_images_and_corruption_are_the_same_in_any_split(size: int, micro: str, source: str, rank) -> None:
    config = config_of(source, train__micro_batch=micro)
    given: dict[tuple[int, int], Any] = {}
    for number in range(size):
        given |= given_to_the_model(rank(config, number, size), updates=4)
    whole = built(source, train__micro_batch="16")
    expected = given_to_the_model(whole, updates=4)
    assert sorted({position for position, _ in given}) == [0, 16, 32, 48]  # past the end of an epoch of 40
    for position in (0, 16, 32, 48):
        slots = sorted(slot for p, slot in given if p == position)
        assert slots == list(range(0, 16, int(micro)))
        rows = [(given[position, slot][0], *given[position, slot][1][:3]) for slot in slots]
        images, picked, kinds, other = (torch.cat(column) for column in zip(*rows, strict=True))
        first = draw(whole, position, 16)
        assert torch.equal(images, expected[position, 0][0])
        assert all(map(torch.equal, (picked, kinds, other), first[:3]))


def test_corruption_depends_on_position_and_seed(source: str) -> None:
    run, other = built(source), built(source, train__seed="1")
    first = draw(run, 0, 16).picked
    assert first.shape == (16, 8)  # half of 4 x 4 patches
    assert torch.equal(first, draw(run, 0, 16).picked)
    assert not torch.equal(first, draw(run, 16, 16).picked)
    assert not torch.equal(first, draw(other, 0, 16).picked)


def test_derived_seeds_are_distinct() -> None:
    keys = [(seed, 1, position) for seed in range(3) for position in range(0, 3200, 16)]
    keys += [(seed, 2, position, slot) for seed in range(3) for position in range(0, 800, 16) for slot in (0, 8)]
    keys += [(0, 3), (1, 3), (2, 3), (5, 1, 2)]
    assert len({derive_seed(*key) for key in keys}) == len(set(keys))


def test_pixels_are_the_normalised_images(source: str) -> None:
    run = built(source, data__mean="0.5,0.4,0.3", data__std="0.2")
    pixels: list[Tensor] = []
    run.model.encoder.vit.patch_embed.register_forward_pre_hook(lambda _, given: pixels.append(given[0]))
    batches = run.batches()
    images = (batch := next(batches))["images"]
    batches.close()
    training_step(run)(run.model, batch)
    assert (images.dtype, pixels[0].dtype) == (torch.uint8, torch.float32)
    expected = (images.double() / 255 - torch.tensor([0.5, 0.4, 0.3]).double().view(-1, 1, 1)) / 0.2
    torch.testing.assert_close(pixels[0].double(), expected, rtol=0, atol=1e-5)


def losses_of(run: PretrainingRun, steps: int) -> list[float]:
    """Loss of each of the first steps."""
    losses, batches = [], run.batches()
    every = [(1, lambda state: losses.append(state.meter.read()["loss"]))]
    fit(run.state, run.wrapped, batches, training_step(run), replace(run.schedule, total_steps=steps), every)
    batches.close()
    return losses


def test_random_from_the_batch_takes_patches_of_other_images(source: str) -> None:
    run = built(source, objective__random_from="batch", objective__split="0.5,0.5,0")
    drawn = draw(run, 0, 16)
    assert drawn.group == run.micro_batch == 8
    elsewhere = drawn.other // 16 != torch.arange(16)[:, None] % 8
    assert elsewhere[drawn.kinds == RANDOM].double().mean() > 0.7  # 7 of 8 on average
    assert draw(run, 0, 5).group == 5  # fewer images, in a picture, take from each other
    assert math.isfinite(losses_of(run, 1)[0])


def constant_images(folder: Path, channels: int = 3, number: int = 32) -> str:
    """Images of one colour each, of four colours in the middles of their bins."""
    colours = np.random.default_rng(0).permutation(8 * 4).reshape(8, 4)[:, np.arange(channels) % 4][:4] % 8 * 32 + 16
    images = np.broadcast_to(colours[np.arange(number) % 4, None, None], (number, 40, 40, channels))
    np.save(folder / "constant.npy", images.astype(np.uint8))
    return f"array:{folder / 'constant.npy'}"


@pytest.mark.parametrize(
    ("channels", "mean", "predictions"), [("1", "0.5", 1), ("5", "0.5,0.4,0.3,0.2,0.1", 5), ("3", "0.5", 1)]
)
def test_other_channels_run_end_to_end(channels: str, mean: str, predictions: int, tmp_path: Path) -> None:
    run = built(constant_images(tmp_path, int(channels)), model__in_chans=channels, data__mean=mean)
    before = [parameter.clone() for parameter in run.model.parameters()]
    classes = 8 ** (int(channels) // predictions)
    assert losses_of(run, 2)[0] == pytest.approx(math.log(classes), abs=0.5)  # an untrained model knows nothing
    assert run.model.target.predictions == predictions
    assert survey_source(run, surveyed_images(run)).images == 512
    changed = [not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)  # the first update has a rate of 0


@pytest.mark.parametrize(
    ("target", "pos_embed"),
    [
        ("mean_colour", "none"),
        runs.slow("mean_colour", "sincos2d"),
        runs.slow("colour_4x4", "learned"),
        runs.slow("pixels", "learned"),
    ],
)
def test_it_learns_what_the_neighbours_show(target: str, pos_embed: str, tmp_path: Path) -> None:
    settings = {"objective__target": target, "model__pos_embed": pos_embed, "optim__lr": "1e-2"}
    losses = losses_of(built(constant_images(tmp_path), **settings, schedule__warmup="2 steps"), 18)
    # Whoever knows the four colours, but not the image's own, has their variance or entropy left.
    colours = np.load(tmp_path / "constant.npy")[:4, 0, 0] / 127.5 - 1
    blind = colours.var(axis=0).mean() if target == "pixels" else math.log(4)
    assert losses[0] > blind
    assert np.mean(losses[-5:]) < 0.7 * blind


@pytest.mark.parametrize(
    ("depth", "changed", "ratio", "tokens"),
    [
        ("3", {"objective__mask_enters": "1"}, 0.75, [5, 17, 17]),
        ("2", {"objective__mask_enters": "2", "objective__decoder_depth": "1"}, 0.5, [9, 9, 17]),
    ],
)
def test_mask_embeddings_enter_before_the_block_that_the_config_names(
    depth: str, changed: dict[str, str], ratio: float, tokens: list[int], source: str
) -> None:
    """Earlier blocks get the visible patches alone."""
    run = built(source, model__depth=depth, objective__ratio=str(ratio), objective__split="1,0,0", **changed)
    counts: list[int] = []
    decoder = run.model.decoder.blocks if run.model.decoder is not None else ()
    for block in (*run.model.encoder.vit.blocks, *decoder):
        block.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[1]))
    batches = run.batches()
    training_step(run)(run.wrapped, next(batches))
    batches.close()
    assert counts == tokens
