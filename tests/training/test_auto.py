"""Values in the place of auto: the rule at both ends, what goes on, what was set, several ranks; micro-batches."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpp.config import differences, overridden, to_dict
from mpp.downstream.settings import ClassifierConfig, FinetuneConfig, FinetuneOptimConfig, LabelledConfig, LossConfig
from mpp.errors import RunError
from mpp.pretraining.settings import PretrainConfig
from mpp.training import micro_batch
from mpp.training.auto import Choice, Facts, divisor, needs_choice, settle
from mpp.training.micro_batch import largest, try_micro_batch
from mpp.training.schedule import Schedule
from mpp.training.settings import ScheduleConfig, TrainConfig, chosen

AUTO = ScheduleConfig(warmup="auto")
PRETRAIN = PretrainConfig(schedule=AUTO)
FINETUNE = FinetuneConfig(
    model=ClassifierConfig(head="auto"),
    data=LabelledConfig(randaugment="auto"),
    schedule=AUTO,
    optim=FinetuneOptimConfig(name="adamw", ema_decay="auto"),
    loss=LossConfig(mixup="auto", cutmix="auto"),
)
PHOTOS = Facts(1_281_167, labelled=False, cpu=False)
LABELS = Facts(40, labelled=True, cpu=True, width=192)


def test_few_labels_make_a_real_run() -> None:
    config, choices = settle(FINETUNE, LABELS)
    assert (config.train.batch_size, config.train.length, config.train.micro_batch) == (16, "500 steps", 16)
    assert (config.schedule.warmup, config.log.every, config.checkpoint.every) == ("50 steps", "25 steps", "100 steps")
    assert config.optim.lr == pytest.approx((1e-3 * (16 / 512 * 768 / 192) ** 0.5,), rel=0.02)
    assert (config.optim.ema_decay, config.loss.mixup, config.loss.cutmix) == (0.98, 0.8, 1)
    assert not needs_choice(config)
    assert "train.batch_size 16: the largest power of two up to half of 40 images" in str(choices[0])


@pytest.mark.parametrize(
    ("images", "readable", "head"),
    [(40, True, "probe"), (50_000, True, "probe"), (50_001, True, "linear"), (40, False, "linear")],
)
def test_few_labels_are_read_before_the_encoder_is_tuned(images: int, readable: bool, head: str) -> None:
    config, _ = settle(FINETUNE, replace(LABELS, images=images, readable=readable))
    assert config.model.head == head


def test_millions_of_images_make_the_run_that_base_had() -> None:
    config, _ = settle(PRETRAIN, PHOTOS)
    assert (config.train.batch_size, config.train.length, config.train.micro_batch) == (1024, "50000 steps", 256)
    assert config.optim.lr == 1e-3  # BEiT's for ViT-B, by the square root of the batch
    assert settle(PRETRAIN, replace(PHOTOS, words=True))[0].optim.lr == 1e-3  # not tried at this width
    many, _ = settle(FINETUNE, replace(PHOTOS, labelled=True))
    assert (many.train.batch_size, many.optim.ema_decay) == (512, 0.99964)


@pytest.mark.parametrize(
    ("images", "changed", "mixed"),
    [
        (40, {}, True),
        (1_000, {}, True),
        (30_000, {}, True),
        (1_281_167, {}, False),  # 11 passes over them
        (5_000, {"cpu": True}, False),  # 38 passes
        (5_000, {"colour": False}, True),
    ],
)
def test_many_passes_are_mixed(images: int, changed: dict[str, bool], mixed: bool) -> None:
    facts = replace(PHOTOS, labelled=True, images=images, **changed)
    config, choices = settle(FINETUNE, facts)
    assert (config.loss.mixup, config.loss.cutmix) == ((0.8, 1.0) if mixed else (0.0, 0.0))
    assert config.data.randaugment == ("rand-m9-mstd0.5-inc1" if mixed and facts.colour else "")
    (said,) = (str(choice) for choice in choices if choice.name == "data.randaugment")
    assert (mixed and facts.colour) or said.startswith("data.randaugment none: ")


@pytest.mark.parametrize(
    ("images", "width", "augmented"), [(450, 128, True), (1_000, 191, True), (1_001, 191, False), (4_500, 192, True)]
)
def test_narrow_encoders_of_many_images_are_not_augmented(images: int, width: int, augmented: bool) -> None:
    config, choices = settle(FINETUNE, replace(PHOTOS, labelled=True, images=images, width=width))
    assert ((config.data.randaugment != ""), config.loss.mixup) == (augmented, 0.8)
    said = next(choice.because for choice in choices if choice.name == "data.randaugment")
    assert augmented != said.startswith("more than 1,000 images are enough for an encoder of width")


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("images", [2, 7, 50, 500, 5_000, 50_000])
def test_every_number_of_images_makes_a_run_that_can_learn(images: int, labelled: bool) -> None:
    recipe: Any = FINETUNE if labelled else PRETRAIN
    for cpu in (True, False):
        config, _ = settle(recipe, Facts(images, labelled, cpu))
        steps, warmup = (int(text.split()[0]) for text in (config.train.length, config.schedule.warmup))
        assert config.train.batch_size <= images
        assert steps >= 500
        assert 0 < warmup <= steps / 4


def test_the_documentation_tells_how_long_it_makes_a_run() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pretraining.md").read_text("utf-8")
    table = page.partition("\n| your images |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == 4
    for row in table:
        images, *figures = (float(figure.replace(",", "")) for figure in re.findall(r"[\d.,]+", row))
        for cpu, (steps, batch, passes) in zip((False, True), (figures[:3], figures[3:]), strict=True):
            train = settle(PRETRAIN, Facts(int(images), labelled=False, cpu=cpu))[0].train
            assert (train.length, train.batch_size) == (f"{steps:.0f} steps", batch)
            assert float(f"{steps * batch / images:.2g}") == float(f"{passes:.2g}")


@pytest.mark.parametrize(("batch", "images"), [("9", 40), ("auto", 1)])
def test_what_makes_no_pairs_is_not_mixed(batch: str, images: int) -> None:
    config, choices = settle(overridden(FINETUNE, ["--train.batch-size", batch]), replace(LABELS, images=images))
    assert (config.loss.mixup, config.loss.cutmix, config.data.randaugment != "") == (0, 0, True)
    assert "the images of a pass make no pairs" in " ".join(map(str, choices))


def test_words_take_twice_the_rate() -> None:
    facts = Facts(5_000, labelled=False, cpu=True, width=192)
    usual, words = (chosen(settle(PRETRAIN, replace(facts, words=some))[0].optim.lr) for some in (False, True))
    assert words == pytest.approx(2 * usual, rel=0.02)
    tenth, _ = settle(PRETRAIN, replace(facts, words=True, continued=True))
    assert tenth.optim.lr == pytest.approx(words / 10, rel=0.02)


def test_what_was_set_stays_and_the_rest_goes_by_it() -> None:
    train = TrainConfig(length="3 epochs", batch_size=128, micro_batch=7)
    config, choices = settle(replace(PRETRAIN, train=train), PHOTOS)
    assert config.train == train
    assert config.schedule.warmup == f"{round(0.05 * 3 * 1_281_167 / 128)} steps"
    assert [choice.name for choice in choices] == ["schedule.warmup", "optim.lr", "log.every", "checkpoint.every"]
    assert config.optim.lr == pytest.approx(5e-4 * 0.5**0.5, rel=0.02)


def test_a_run_that_goes_on_keeps_its_values_on_another_machine() -> None:
    begun, _ = settle(PRETRAIN, PHOTOS)
    elsewhere, choices = settle(PRETRAIN, replace(PHOTOS, cpu=True, images=7), begun)
    assert elsewhere == begun
    assert {choice.because for choice in choices} == {"as this run began"}
    assert not differences(PretrainConfig, to_dict(begun), to_dict(PRETRAIN))
    assert differences(PretrainConfig, to_dict(PRETRAIN), to_dict(begun))  # auto is only what was there before


def test_a_batch_is_shared_out_equally() -> None:
    config, _ = settle(PRETRAIN, replace(PHOTOS, ranks=6))
    assert config.train.batch_size == 1026
    assert config.train.micro_batch == 171 or 171 % chosen(config.train.micro_batch) == 0
    for ranks in (1, 2, 3, 5, 6, 7):  # mixup takes the images of a process in pairs
        config, _ = settle(FINETUNE, Facts(20_000, labelled=True, cpu=False, ranks=ranks))
        assert config.loss.mixup
        assert chosen(config.train.batch_size) % (2 * ranks) == 0, ranks


def test_memory_limits_the_micro_batch_of_a_cpu() -> None:
    facts = Facts(5_000, labelled=False, cpu=True, image_bytes=10**8, memory=16 * 10**9)
    assert settle(PRETRAIN, facts)[0].train.micro_batch == 32


@pytest.mark.parametrize(("share", "most", "expected"), [(16, 256, 16), (30, 29, 10), (510, 256, 170), (15, 4, 3)])
def test_a_divisor_is_even_where_it_can_be(share: int, most: int, expected: int) -> None:
    assert divisor(share, most) == expected


@pytest.mark.parametrize(("room", "most", "expected"), [(100, 512, 64), (1000, 512, 512), (3, 512, 2), (100, 96, 96)])
def test_a_micro_batch_is_doubled_until_it_does_not_fit(room: int, most: int, expected: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= room

    assert largest(fits, most) == expected
    assert len(tried) == len(set(tried))
    with pytest.raises(RunError, match="with one image"):
        largest(lambda size: False, most)


def test_trials_take_pairs_for_mixup_and_leave_no_peak_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def fits(run: Any, step: Any, size: int, *image: Any) -> bool:
        done.append(size)
        return size <= 2

    monkeypatch.setattr(micro_batch, "_fits", fits)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("reset"))
    run: Any = SimpleNamespace(
        choices=(Choice("train.micro_batch", "6", "at most 256"),),
        config=replace(FINETUNE, loss=LossConfig(mixup=0.8)),
        schedule=Schedule(10, 6, 6, lambda step: 0.1),
        **{"state": SimpleNamespace(sharded=False), "device": torch.device("cuda"), "world": SimpleNamespace(size=1)},
    )
    try_micro_batch(run, lambda model, batch: None, (8, 8), 3)  # pyright: ignore[reportArgumentType]
    assert done == [6, 2, "reset"]
    assert (run.config.train.micro_batch, run.schedule.accumulate) == (2, 3)
    with pytest.raises(RunError, match="with 2 images"):
        largest(lambda size: False, 6, 2)
