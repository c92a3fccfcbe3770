"""Durations, due dates and learning rates; the latter against the original JAX code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.errors import UserError
from mpp.training.duration import Duration, parse_duration
from mpp.training.schedule import Schedule, build_schedule, is_due, learning_rate
from mpp.training.settings import ScheduleConfig, TrainConfig


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1000 steps", 1000, "steps"),
        ("1 step", 1, "steps"),
        ("10_000 steps", 10_000, "steps"),
        ("10k steps", 10_000, "steps"),
        ("0.5 epochs", 0.5, "epochs"),
        ("1.28M images", 1_280_000, "images"),
        ("4B images", 4e9, "images"),
        ("2.5e+3 steps", 2500, "steps"),
        ("1image", 1, "images"),
        ("2.5 percent", 2.5, "percent"),
        ("  5  %  ", 5, "percent"),
    ],
)
def test_durations_are_read(text: str, value: float, unit: str) -> None:
    assert parse_duration(text) == Duration(pytest.approx(value), unit)


@pytest.mark.parametrize(
    "text", ["", "1000", "steps", "ten steps", "-5 steps", "5 parsecs", "5 %%", "1,000 steps", "1 k k steps"]
)
def test_what_is_no_duration_is_refused_with_the_fields_name_and_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"^train.length needs a number and a unit") as caught:
        parse_duration(text, "train.length")
    assert repr(text) in str(caught.value)
    assert all(parse_duration(form) for form in ("1000 steps", "90 epochs", "1.28M images", "5%"))


def test_durations_in_steps_of_a_batch_of_8_in_an_epoch_of_100_and_a_run_of_200() -> None:
    steps = {"1000 steps": 1000, "2 epochs": 25, "0.5 epochs": 6, "64 images": 8, "65 images": 8, "1 image": 1,
             "0.001 epochs": 1, "0 images": 0, "10%": 20, "0.1%": 1, "0%": 0, "100%": 200}  # fmt: skip
    assert {text: parse_duration(text).steps(8, 100, 200) for text in steps} == steps
    with pytest.raises(ValueError, match="a percentage needs the length of the run"):
        parse_duration("5%").steps(8, 100)


@pytest.mark.parametrize(
    ("period", "total", "due"),
    [(3, 10, [3, 6, 9, 10]), (5, 10, [5, 10]), (1, 4, [1, 2, 3, 4]), (11, 10, [10]), (9, 10, [9, 10]), (0, 10, [10])],
)
def test_due_steps(period: int, total: int, due: list[int]) -> None:
    assert [step for step in range(total + 1) if is_due(step, period, total)] == due


RATES: dict[str, dict[str, Any]] = {
    "big_vision/cosine": {"kind": "cosine", "base": 0.03, "warmup": 50},
    "vision_transformer/cosine": {"kind": "cosine", "base": 0.03, "warmup": 50},
    "big_vision/linear": {"kind": "linear", "base": 0.01},
    "big_vision/linear_warm": {"kind": "linear", "base": 0.003, "warmup": 100},
    "big_vision/rsqrt": {"kind": "rsqrt", "base": 8e-4, "warmup": 50, "cooldown": 200, "timescale": 100},
}


@pytest.mark.parametrize(("key", "settings"), RATES.items(), ids=RATES)
def test_rates_equal_the_original_codes(key: str, settings: dict[str, Any], shared: Callable[[str], Path]) -> None:
    expected = np.load(shared("fixtures/optim.npz"), allow_pickle=False)[f"lr/{key}"]
    rate = learning_rate(total_steps=len(expected) - 1, **settings)
    np.testing.assert_allclose([rate(step) for step in range(len(expected))], expected, atol=1e-8, rtol=0)


def test_constant_rises_stays_and_falls() -> None:
    rate = learning_rate("constant", 2.0, 10, warmup=4, cooldown=2)
    assert [rate(step) for step in range(11)] == [0, 0.5, 1, 1.5, 2, 2, 2, 2, 2, 1, 0]


def built(train: dict[str, Any], plan: dict[str, Any], ranks: int = 1) -> Schedule:
    return build_schedule(
        TrainConfig(**{"length": "10 steps", "batch_size": 16, "micro_batch": 256, **train}),
        ScheduleConfig(**plan),
        0.1,
        0.5,
        10,
        ranks,
    )


@pytest.mark.parametrize(
    ("batch", "most", "ranks", "expected"),
    [(16, 256, 1, (16, 1)), (16, 5, 1, (4, 4)), (16, 4, 2, (4, 2)), (15, 4, 1, (3, 5)), (7, 1, 1, (1, 7))],
)
def test_micro_batches_divide_the_batch_of_a_rank(batch: int, most: int, ranks: int, expected: tuple[int, int]) -> None:
    schedule = built({"batch_size": batch, "micro_batch": most}, {}, ranks)
    assert (schedule.micro_batch, schedule.accumulate) == expected


def test_the_schedule_of_a_config() -> None:
    schedule = built({"batch_size": 4}, {"warmup": "2 steps"})  # an epoch of 10 images
    assert (schedule.total_steps, schedule.clip_norm, schedule.step(8)) == (10, 0.5, 2)
    assert [schedule.steps(text, "x") for text in ("", "3 steps", "2 epochs", "50%", "8 images")] == [0, 3, 5, 5, 2]
    assert [schedule.rate(step) for step in (0, 1, 2, 10)] == pytest.approx([0, 0.05, 0.1, 0])
    with pytest.raises(UserError, match=r"schedule: warm-up \(6 steps\) and cooldown \(5\) .* \(10 steps\)"):
        built({}, {"warmup": "6 steps", "cooldown": "5 steps"})
    halves = built({"batch_size": 1, "length": "7 steps"}, {"kind": "constant", "warmup": "50%", "cooldown": "50%"})
    assert [halves.rate(step) for step in (0, 4, 7)] == pytest.approx([0, 0.1, 0])  # both would be 4 steps
    with pytest.raises(UserError, match=r"train\.batch_size 15 is not a multiple of the 2 processes"):
        built({"batch_size": 15}, {}, 2)
