"""What a study came to, from its data: pairs and intervals by hand, and how often the intervals cover the truth."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from mpp.downstream.estimates import Estimate, estimate, of_groups, of_table
from mpp.report.study_results import StudyResults

SEEDS, DRAWS = (0, 1, 2), 10


def tuned(side: str, seed: int, top1: float, start: int | None = None, sweep: Any = None) -> dict[str, Any]:
    run = {"side": side, "labels": "1%", "seed": seed, "pretrain_seed": start, "top1": top1}
    return run | {"train_images": 40, "sweep": sweep}


def read(side: str, seed: int | None, accuracy: list[float], layer: int = -1, **more: Any) -> dict[str, Any]:
    run = {"side": side, "pretrain_seed": seed, "layer": layer, "pool": "mean", "shots": 5, "rank": 1.0}
    return run | {"accuracy": accuracy} | more


def study(finetuning: Sequence[dict[str, Any]] = (), fewshot: Sequence[dict[str, Any]] = ()) -> Any:
    return StudyResults({"finetuning": finetuning, "fewshot": fewshot, "pretraining": [], "probes": []})


def test_gains_are_paired_by_the_seed() -> None:
    runs = [tuned("scratch", seed, top1) for seed, top1 in enumerate((0.2, 0.3, 0.7))]
    runs += [tuned("a", seed, top1, seed) for seed, top1 in enumerate((0.5, 0.4))]
    runs += [tuned("b", seed, top1, seed) for seed, top1 in enumerate((0.6, 0.7))]
    of = study(runs)
    assert of.gain("a", "1%") == of_groups({0: [0.5 - 0.2], 1: [0.4 - 0.3]}, "2 pretrainings")
    assert of.gains("a", "1%") == pytest.approx({0: 0.3, 1: 0.1})
    expected, found = of_groups({0: [0.6 - 0.5], 1: [0.7 - 0.4]}, "2 pretrainings"), of.gain("b", "1%", over="a")
    assert (found.mean, found.half, found.over) == pytest.approx((expected.mean, expected.half, expected.over))
    assert of.gain("a", "10%") is None
    assert of.tuned("scratch", "1%").over == "3 fine-tuning seeds"


def test_fine_tunings_of_one_pretraining_are_said_to_be() -> None:
    for seeds, starts, over in (
        (3, 1, "3 fine-tuning seeds of one pretraining"),
        (4, 2, "2 pretrainings (4 fine-tunings)"),
    ):
        runs = [tuned("scratch", seed, 0.1 * seed) for seed in range(seeds)]
        runs += [tuned("a", seed, 0.1 * seed, seed % starts) for seed in range(seeds)]
        assert study(runs).gain("a", "1%").over == over


def test_few_shot_gains_are_paired_by_pretraining_and_draw() -> None:
    a, b, random = ([[0.3, 0.5], [0.5, 0.9]], [[0.4, 0.5], [0.6, 0.8]], [0.2, 0.3])
    runs = [read(side, seed, of[seed]) for side, of in (("a", a), ("b", b)) for seed in (0, 1)]
    of = study((), [*runs, read("random", None, random)])
    assert of.fewshot("a", 5) == of_table(np.array(a))
    assert of.fewshot_gain("a", 5) == of_table(np.array(a) - np.array(random))
    assert of.fewshot_gain("b", 5, over="a") == of_table(np.array(b) - np.array(a))
    assert of.fewshot_gain("a", 10) is None
    assert of.of_pretraining("a", 1).fewshot("a", 5) == estimate(a[1], "2 draws of the shots")
    assert of.of_pretraining("a", 1).fewshot_gain("b", 5) is None


def test_each_draw_chooses_by_what_it_held_out() -> None:
    deep = read("a", 0, [0.1, 0.2, 0.3], held_out=[0.5, 0.5, None])
    lower = read("a", 0, [0.7, 0.8, 0.9], layer=-2, held_out=[0.6, 0.5, None])
    found = study((), [lower, deep]).fewshot_chosen("a", 5)
    assert found == estimate([0.7, 0.2, 0.3], "3 draws of the shots")  # of equals, and of nothing, the last layer
    assert study((), [deep]).fewshot_chosen("a", 5) is None
    older = [{key: value for key, value in run.items() if key != "held_out"} for run in (deep, lower)]
    assert study((), older).fewshot_chosen("a", 5) is None


def test_a_side_s_learning_rate_is_chosen_by_held_out_training_images() -> None:
    sweeps = {"a": {"0.1": 0.4, "0.2": None}, "b": {"0.1": None}, "c": None}
    of = study([tuned(side, 0, 0.9, 0, sweep) for side, sweep in sweeps.items()])
    assert [of.held_out(side) for side in "abc"] == [0.4, None, None]


def coverage(simulated: Callable[[np.random.Generator], Estimate]) -> float:
    """How often the interval of a simulated study covers the true gain of 0.1."""
    rng = np.random.default_rng(0)
    found = [simulated(rng) for _ in range(1000)]
    return float(np.mean([abs(of.mean - 0.1) <= of.half for of in found if of.half is not None]))


@pytest.mark.parametrize("drawn", [0.0, 0.02])
def test_the_interval_of_a_few_shot_gain_covers_it(drawn: float) -> None:
    def simulated(rng: np.random.Generator) -> Estimate:
        """Three pretrainings that differ by a point, each with ten draws whose gains differ by none or two."""
        random, gain = rng.normal(0.2, 0.02, DRAWS), 0.1 + rng.normal(0, drawn, DRAWS)
        pretrained = random + gain + rng.normal(0, 0.01, (3, 1)) + rng.normal(0, 0.005, (3, DRAWS))
        runs = [read("a", seed, pretrained[seed].tolist()) for seed in SEEDS]
        return study((), [*runs, read("random", None, random.tolist())]).fewshot_gain("a", 5)

    assert 0.93 <= coverage(simulated) <= 0.97


@pytest.mark.parametrize("each", [1, 2])
def test_the_interval_of_a_fine_tuning_gain_covers_it(each: int) -> None:
    def simulated(rng: np.random.Generator) -> Estimate:
        """Three pretrainings that differ by a point, fine-tuned once or twice each, on labels that both sides share."""
        of = 0.1 + rng.normal(0, 0.01, 3)
        runs = []
        for seed in range(3 * each):
            labels = rng.normal(0.3, 0.02)
            runs.append(tuned("scratch", seed, labels + rng.normal(0, 0.004)))
            runs.append(tuned("a", seed, labels + of[seed % 3] + rng.normal(0, 0.004), seed % 3))
        return study(runs).gain("a", "1%")

    assert 0.93 <= coverage(simulated) <= 0.97
