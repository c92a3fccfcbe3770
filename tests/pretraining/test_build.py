"""The parts of a run put together: what the step is fed, what it draws, and that it learns."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mpp.pretraining.build
from mpp.config import parse
from mpp.data.reader import Bad
from mpp.dist import World
from mpp.errors import UserError
from mpp.objective.masking import RANDOM, Corruption
from mpp.pretraining.build import Run, build, derive_seed, draw, survey_source, training_batches, training_step
from mpp.pretraining.settings import PretrainConfig
from mpp.training.loop import fit
from tests import runs

CPU = torch.device("cpu")


def tiny(source: str, **changed: str) -> PretrainConfig:
    """The config of the tests' command line, without few-shot evaluation."""
    words = runs.command(source, None, **{"fewshot__data": ""} | changed)[1:]
    return parse(PretrainConfig, words, "pretrain", "", {})


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch):
    """Builds the run of one rank among several, without a process group."""
    monkeypatch.setattr(mpp.pretraining.build, "prepare", lambda model, *_: model)

    def rank(config: PretrainConfig, number: int, size: int) -> Run:
        return build(config, World(number, size, number, size), CPU)

    return rank


class Recorder(nn.Module):
    """Stands for the model and remembers what the step gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Tensor, Corruption]] = []

    def forward(self, images: Tensor, corruption: Corruption) -> tuple[Tensor, dict[str, Tensor]]:
        self.given.append((images, corruption))
        return torch.zeros(()), {}


def fed(run: Run, updates: int) -> dict[tuple[int, int], tuple[Tensor, Corruption]]:
    """What the model of one rank gets in some updates, by position and slot."""
    model, step, batches = Recorder(), training_step(run), training_batches(run)
    places = []
    for _ in range(updates * run.schedule.accumulate):
        batch = next(batches)
        step(model, batch)
        places.append((batch["position"], batch["slot"]))
    batches.close()
    assert len(set(places)) == len(places)
    return dict(zip(places, model.given, strict=True))


def assembled(given: dict[tuple[int, int], Any], position: int) -> list[Tensor]:
    """Images, picked, kinds and other of one global batch, by slot."""
    slots = sorted(slot for p, slot in given if p == position)
    parts = [given[position, slot] for slot in slots]
    assert slots == [0, *np.cumsum([len(images) for images, _ in parts])[:-1]]
    rows = [[images, *corruption[:3]] for images, corruption in parts]
    return [torch.cat(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(("size", "micro"), [(1, "16"), (1, "4"), (1, "1"), (2, "8"), (2, "4"), (4, "2")])
def test_images_and_corruption_are_the_same_in_any_split(size: int, micro: str, source: str, ranks) -> None:
    config = tiny(source, train__micro_batch=micro)
    given: dict[tuple[int, int], Any] = {}
    for number in range(size):
        given |= fed(ranks(config, number, size), updates=4)
    assert sorted({position for position, _ in given}) == [0, 16, 32, 48]  # past the end of an epoch of 40
    whole = build(tiny(source, train__micro_batch="16"), World(), CPU)
    expected = fed(whole, updates=4)
    for position in (0, 16, 32, 48):
        images, picked, kinds, other = assembled(given, position)
        first = draw(whole, position, 16)
        assert torch.equal(picked, first.picked)
        assert torch.equal(kinds, first.kinds)
        assert torch.equal(other, first.other)
        assert torch.equal(images, expected[position, 0][0])


def test_corruption_depends_on_position_and_seed(source: str) -> None:
    run = build(tiny(source), World(), CPU)
    other = build(tiny(source, train__seed="1"), World(), CPU)
    picked = [draw(run, 0, 16).picked, draw(run, 16, 16).picked, draw(other, 0, 16).picked]
    assert not any(torch.equal(a, b) for a, b in ((picked[0], picked[1]), (picked[0], picked[2])))
    assert torch.equal(picked[1], draw(run, 16, 16).picked)
    assert picked[0].shape == (16, 8)  # half of 4 x 4 patches


def test_batches_go_on_at_the_images_seen(source: str) -> None:
    run = build(tiny(source), World(), CPU)
    expected = fed(run, updates=4)
    run.state.images_seen = 32
    given = fed(run, updates=2)
    assert list(given) == [(32, 0), (32, 8), (48, 0), (48, 8)]
    for place in given:
        assert torch.equal(given[place][0], expected[place][0])


def test_slots_of_a_rank_in_micro_batches(source: str, ranks) -> None:
    given = fed(ranks(tiny(source, train__micro_batch="4"), 1, 2), updates=2)
    assert list(given) == [(0, 8), (0, 12), (16, 8), (16, 12)]


def test_pixels_are_the_normalised_images(source: str) -> None:
    run = build(tiny(source, data__mean="0.5,0.4,0.3", data__std="0.2"), World(), CPU)
    seen: list[Tensor] = []
    run.model.encoder.vit.patch_embed.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    batches = training_batches(run)
    batch = next(batches)
    batches.close()
    training_step(run)(run.model, batch)
    images, (pixels,) = batch["images"], seen
    assert (images.dtype, pixels.dtype) == (torch.uint8, torch.float32)
    expected = (images.double() / 255 - torch.tensor([0.5, 0.4, 0.3]).double().view(-1, 1, 1)) / 0.2
    torch.testing.assert_close(pixels.double(), expected, rtol=0, atol=1e-5)


def test_bad_files_are_reported_with_the_images_read(source: str) -> None:
    run = build(tiny(source), World(), CPU)
    heard: list[tuple[list[Bad], int]] = []
    batches = training_batches(run, lambda bad, images: heard.append((bad, images)))
    for _ in range(3):
        next(batches)
    batches.close()
    assert heard == [([], 8)] * 3


def test_random_from_the_batch_takes_patches_of_other_images(source: str) -> None:
    run = build(tiny(source, objective__random_from="batch", objective__split="0.5,0.5,0"), World(), CPU)
    drawn = draw(run, 0, 16)
    assert drawn.group == run.micro_batch == 8
    image = torch.arange(16)[:, None] % 8
    random = drawn.kinds == RANDOM
    elsewhere = (drawn.other // 16 != image)[random].double().mean()
    assert elsewhere > 0.7  # 7 of 8 on average
    assert draw(run, 0, 5).group == 5  # fewer images, to be pictured, take from each other
    losses = train(run, 1)
    assert math.isfinite(losses[0])


def train(run: Run, steps: int) -> list[float]:
    """Loss of each of some first steps."""
    schedule, losses = replace(run.schedule, total_steps=steps), []
    batches = training_batches(run)
    fit(
        run.state,
        run.wrapped,
        batches,
        training_step(run),
        schedule,
        [(1, lambda state: losses.append(state.meter.read()["loss"]))],
    )
    batches.close()
    return losses


def test_an_untrained_model_knows_nothing_of_512_classes(source: str) -> None:
    run = build(tiny(source), World(), CPU)
    assert train(run, 1)[0] == pytest.approx(math.log(512), abs=0.5)


def test_derived_seeds_are_distinct() -> None:
    keys = [(seed, 1, position) for seed in range(3) for position in range(0, 3200, 16)]
    keys += [(seed, 2, position, slot) for seed in range(3) for position in range(0, 800, 16) for slot in (0, 8)]
    keys += [(seed, 3) for seed in range(3)]
    keys += [(2, 1, 5), (5, 1, 2)]
    seeds = [derive_seed(*key) for key in dict.fromkeys(keys)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 1, 16) == derive_seed(0, 1, 16)


@pytest.mark.parametrize(
    ("batch", "micro", "size", "expected"),
    [(16, 6, 1, 4), (16, 100, 1, 16), (24, 5, 2, 4), (12, 5, 2, 3), (14, 6, 2, 1), (16, 16, 2, 8)],
)
def test_micro_batches_are_rounded_down_to_a_divisor(
    batch: int, micro: int, size: int, expected: int, source: str, ranks
) -> None:
    run = ranks(tiny(source, train__batch_size=str(batch), train__micro_batch=str(micro)), 0, size)
    assert run.micro_batch == expected
    assert run.micro_batch * run.schedule.accumulate * size == batch


def test_a_batch_that_the_processes_cannot_share_is_refused(source: str) -> None:
    with pytest.raises(UserError, match=r"train\.batch_size 16 is not a multiple of the 3 processes"):
        build(tiny(source), World(0, 3, 0, 3), CPU)


@pytest.mark.parametrize("key", ["mean", "std"])
@pytest.mark.parametrize(("numbers", "channels"), [("0.5,0.5", "3"), ("0.5,0.5,0.5", "1"), ("0.1,0.2,0.3,0.4", "5")])
def test_a_mean_or_std_of_the_wrong_length_is_refused(key: str, numbers: str, channels: str, source: str) -> None:
    changed = {f"data__{key}": numbers, "model__in_chans": channels}
    with pytest.raises(UserError, match=rf"data\.{key} takes one number or {channels}"):
        build(tiny(source, **changed), World(), CPU)


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
    source = constant_images(tmp_path, int(channels))
    run = build(tiny(source, model__in_chans=channels, data__mean=mean), World(), CPU)
    before = [parameter.clone() for parameter in run.model.parameters()]
    classes = 8 ** (int(channels) // predictions)
    assert train(run, 2)[0] == pytest.approx(math.log(classes), abs=0.5)
    assert run.model.target.predictions == predictions
    assert survey_source(run).images == 512
    changed = [not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)  # the first update has a rate of 0


TARGETS_AND_POSITIONS = [
    ("mean_colour", "learned"),
    ("mean_colour", "none"),
    ("mean_colour", "2d"),
    ("mean_colour", "sincos2d"),
    ("colour_4x4", "learned"),
    ("pixels", "learned"),
]


@pytest.mark.parametrize(("target", "pos_embed"), TARGETS_AND_POSITIONS)
def test_it_learns_what_the_neighbours_tell(target: str, pos_embed: str, tmp_path: Path) -> None:
    settings = {"objective__target": target, "model__pos_embed": pos_embed, "optim__lr": "5e-3"}
    run = build(tiny(constant_images(tmp_path), **settings, schedule__warmup="2 steps"), World(), CPU)
    losses = train(run, 30)
    # Whoever knows the four colours, but not the image's own, has their variance or entropy left.
    colours = np.load(tmp_path / "constant.npy")[:4, 0, 0] / 127.5 - 1
    blind = colours.var(axis=0).mean() if target == "pixels" else math.log(4)
    assert losses[0] > blind
    assert np.mean(losses[-5:]) < 0.7 * blind


def test_the_neighbours_do_tell_it(tmp_path: Path) -> None:
    run = build(tiny(constant_images(tmp_path)), World(), CPU)
    batches = training_batches(run)
    _, figures = training_step(run)(run.model, next(batches))
    batches.close()
    right, of = figures["accuracy_baseline_neighbours"].tolist()
    assert right == of == 8 * 8


def test_mask_embeddings_enter_before_the_block_that_the_config_names(source: str) -> None:
    """What the blocks before it get has no place for them."""
    late = {"objective__mask_enters": "1", "objective__split": "1,0,0", "objective__ratio": "0.75"}
    run = build(tiny(source, model__depth="3", **late), World(), CPU)
    counts: list[int] = []
    for block in run.model.encoder.vit.blocks:
        block.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[1]))
    batches = training_batches(run)
    training_step(run)(run.wrapped, next(batches))
    batches.close()
    patches = run.model.encoder.grid[0] * run.model.encoder.grid[1]
    assert counts == [1 + patches - round(0.75 * patches), 1 + patches, 1 + patches]


def test_with_a_decoder_mask_embeddings_need_not_enter_the_encoder(source: str, tmp_path: Path) -> None:
    never = {"objective__mask_enters": "2", "objective__split": "1,0,0", "objective__decoder_depth": "1"}
    run = build(tiny(source, model__depth="2", **never), World(), CPU)
    counts: list[int] = []
    assert run.model.decoder is not None
    for block in (*run.model.encoder.vit.blocks, *run.model.decoder.blocks):
        block.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[1]))
    batches = training_batches(run)
    training_step(run)(run.wrapped, next(batches))
    batches.close()
    patches = run.model.encoder.grid[0] * run.model.encoder.grid[1]
    visible = 1 + patches - run.config.objective.ratio * patches
    assert counts == [visible, visible, 1 + patches]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model__depth": "2", "objective__mask_enters": "2"}, "take at most 1, or 2 with objective.decoder_depth"),
        ({"model__depth": "2", "objective__mask_enters": "3", "objective__decoder_depth": "1"}, "take at most 1, or 2"),
        ({"model__depth": "2", "objective__decoder_depth": "3"}, "no light decoder; take fewer"),
        ({"model__depth": "2", "objective__mask_enters": "1", "objective__ratio": "1"}, "take a smaller ratio"),
    ],
)
def test_mask_embeddings_that_enter_nowhere_are_refused(changed: dict[str, str], told: str, source: str) -> None:
    with pytest.raises(UserError, match=told):
        build(tiny(source, objective__split="1,0,0", **changed), World(), CPU)


def test_patches_that_come_later_can_only_be_hidden(source: str) -> None:
    with pytest.raises(UserError, match=r"objective.mask_enters needs objective.split 1 0 0"):
        tiny(source, objective__mask_enters="1")


def test_patches_of_one_value_have_no_details(source: str) -> None:
    one = {"model__in_chans": "1", "model__patch_size": "1", "model__img_size": "4"}
    with pytest.raises(UserError, match="no details"):
        build(tiny(source, objective__detail="1", **one), World(), CPU)
