"""What a run says of its figures: every branch, from rows written by hand."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mpp.config import from_file
from mpp.data.sources.in_memory import ListSource
from mpp.downstream.finetune_result import read_result, verdict_of
from mpp.downstream.multi_label import MultiLabelScores, precision_by_image
from mpp.downstream.settings import FinetuneConfig
from mpp.downstream.verdict import BLUR, TREND, Comparison, Verdict, of_finetuning, of_pretraining, paired
from mpp.errors import command
from mpp.system.files import write_csv
from tests.report.run_folders import tuned

NOISE = 0.001 * np.array([1, -1, 0, 2, -2, 1, 0, -1, 0, 0] * 4)  # of 40 rows; its sum and those of each ten are 0


def curve(at: Sequence[float] | np.ndarray, score: str = "accuracy", blur: float = 0.3, **more: Any) -> list[dict]:
    """Rows every 100 steps of 100 seconds each, with scores at masked patches."""
    figures = {f"{score}_baseline_neighbours": blur, f"{score}_baseline_frequent": 0.1, "time/images_per_second": 8.0}
    return [
        {"step": 100 * n, "images": 800 * n, "loss": 6 / n, score: 0.0, f"{score}_masked": float(masked)}
        | figures | {name: value(n) if callable(value) else value for name, value in more.items()}
        for n, masked in enumerate(at, 1)
    ]  # fmt: skip


def few(step: int, **draws: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "images": 8 * step, "time/fewshot_seconds": 50.0}
    for name, values in draws.items():
        row |= {f"fewshot/{name}": float(np.mean(values)), f"fewshot/{name}_draws": values}
    return row


LEVEL, RISING = NOISE + 0.3, NOISE + np.linspace(0.1, 0.25, 40)
ABOVE = "It has learnt what a blur does not know: "
BELOW = "It has learnt nothing yet that a blur does not know: "


@pytest.mark.parametrize(
    ("rows", "options", "found"),
    [
        (curve(LEVEL + 0.07), {}, [ABOVE, "37.0%", "in 30.0%: +7.0 ± 0.", " points, 10% of the way from there"]),
        (curve(LEVEL), {}, [BELOW, "+0.0 ± 0.", "(no difference shown).", "is not shown (+0.0 ±", "do not say"]),
        (curve(LEVEL - 0.1), {}, [BELOW, "\u221210.0 ± 0."]),
        (curve([0.4, 0.41]), {}, [ABOVE, "+11.0 points, 16% of the way", "(too few rows of figures for an interval)"]),
        (curve([0.2]), {}, [BELOW, "(1) too short: it made 100 steps."]),
        (curve(RISING), {}, ["(1) too short: at the slope of its last quarter", "still improved at its end (+3.8 ±"]),
        (curve(RISING), {}, ["twice the length would take about 2.2 h at this speed."]),  # 2 x 4,000 s
        (curve(RISING + 0.0525), {}, [BELOW, "+0.1 ±", "no difference", "it has drawn level, and still improved at"]),
        (curve(RISING[::-1] + 0.3), {}, [ABOVE, "It got worse at its end (\u22123.8 ±"]),
        (curve(LEVEL, loss=lambda n: 3 + n / 100), {}, ["(1) a learning rate that is too high: the loss rises"]),
        (curve(LEVEL, loss=6.2), {}, ["(1) a learning rate that is too low, or much too high", "(6.2 to 6.2)"]),
        (curve(LEVEL), {"images": 40}, ["(1) too few images: 40, so add some"]),
        (curve(LEVEL), {"warning": "the same"}, ["(1) nearly all targets are the same, as with"]),
        (curve(LEVEL, accuracy_baseline_frequent=0.95), {"images": 40}, ["(1) nearly all", "95%", "(2) too few"]),
        (curve(1 - LEVEL - 0.42, "mse", 0.4), {}, [ABOVE, "patches is 0.28, that of", "0.4: \u221230.0 ± 0."]),
        (curve(1 - LEVEL - 0.1, "mse", 0.4), {}, [BELOW, "0.4: +50.0 ± 0."]),
        (curve(1 - RISING, "mse", 0.5), {}, ["It still improved at its end (+7.6 ±", "% of the blur's error over"]),
        ([{"step": 9, "images": 9, "accuracy": 0.5, "accuracy_baseline_neighbours": 0.3}], {}, ["corrupted patches"]),
        (curve([math.nan]), {}, None),
        ([], {}, None),
    ],
)  # fmt: skip
def test_a_pretraining_against_the_blur(rows: list, options: dict, found: list[str] | None) -> None:
    score = "mse" if rows and "mse" in rows[0] else "accuracy"
    text = "\n".join(of_pretraining(rows, score, **options).sentences)
    assert all(part in text for part in found or ()), text
    assert bool(text) == (found is not None)
    assert not text.startswith(ABOVE) or "Likely why" not in text


def test_the_slope_and_the_noise_are_those_of_a_regression() -> None:
    values = RISING + 0.3
    verdict = of_pretraining(curve(values), "accuracy")
    steps = np.arange(100, 4001, 100)[29:]  # from 75 % of the run on
    fitted, t = stats.linregress(steps, values[29:]), stats.t.ppf(0.975, len(steps) - 2)
    of = {each.what: each for each in verdict.comparisons}
    assert of[TREND].difference == pytest.approx(1000 * fitted.slope)
    assert of[TREND].half == pytest.approx(1000 * t * fitted.stderr)
    deviation = np.std(values[29:] - fitted.intercept - fitted.slope * steps) * math.sqrt(len(steps) / (len(steps) - 2))
    assert of[BLUR].half == pytest.approx(t * deviation / math.sqrt(2))  # of the last twentieth: two rows
    short = of_pretraining(curve(RISING), "accuracy").sentences[1]
    more = (0.3 - RISING[-2:].mean()) / fitted.slope
    assert f"needs {more:,.0f} more steps to draw level, {1 + more / 4000:.1f} times its 4,000 in all" in short


@pytest.mark.parametrize(
    ("before", "after", "init", "found"),
    [
        ([0.1, 0.2, 0.3], [0.3, 0.4, 0.51], "", "the untrained encoder, in points: 5 shots +20.3 ± 1.4 (gained); 95%"),
        ([0.1, 0.2, 0.3], [0.2, 0.1, 0.3], "x", "weights it began with, in points: 5 shots +0.0 ± 24.8 (no difference"),
        ([0.3, 0.4, 0.5], [0.1, 0.2, 0.3], "", "5 shots \u221220.0 ± 0.0 (lost); 95% intervals over 3 draws of the"),
        ([0.1], [0.2], "", "5 shots +10.0; without an interval: one draw of the shots; --fewshot.seeds takes more."),
    ],
)
def test_few_shot_accuracy_draw_by_draw(before: list, after: list, init: str, found: str) -> None:
    rows = [few(0, **{"5shot": before}), few(50, **{"5shot": [0.9] * len(before)}), few(90, **{"5shot": after})]
    verdict = of_pretraining(rows, "accuracy", init=init)
    assert found in verdict.sentences[0]
    assert of_pretraining(rows[:1], "accuracy") == of_pretraining(rows[1:], "accuracy") == Verdict(())


def test_shots_are_in_order_and_older_runs_have_no_interval() -> None:
    rows = [few(step, **{"10shot": [0.1, 0.2], "5shot": [0.1, step / 100]}) for step in (0, 90)]
    assert "points: 5 shots +45.0 ± 571.8 (no difference shown), 10 shots +0.0 ± 0.0" in str(
        of_pretraining(rows, "mse")
    )
    for row in rows:
        row |= {"fewshot/5shot_std": 0.1, "fewshot/5shot_draws": None, "fewshot/10shot_std": 0.1}
    assert "5 shots +45.0, 10 shots" in str(of_pretraining(rows, "mse"))
    assert "this run did not keep the single draws" in str(of_pretraining(rows, "mse"))


TESTED = [{"step": 10 * n, "images": n, "test/top1": 0.5 + n / 100, "time/images_per_second": 1.0} for n in range(1, 9)]

SEVERAL = {"several": True, "rows": [{**row, "test/mean_ap": row["test/top1"]} for row in TESTED]}


@pytest.mark.parametrize(
    ("top1", "frequent", "options", "found"),
    [
        (0.6, 0.3, {}, ["Better than always answering", "right in 30.0%: 60.0% of 100 test images, 95% interval 50"]),
        (0.6, 0.55, {}, ["Not shown to be better than always"]),
        (0.6, 0.9, {}, ["Worse than always"]),
        (0.6, None, {"scratch_command": "finetune a b"}, ["is not known", "This makes one:\nfinetune a b"]),
        (0.6, None, {"scratch": Comparison("top-1", "plain", 0.05, 0.02, "100 test images")},
         ["from scratch (plain): +5.0 ± 2.0 points (gained); 95% interval over 100 test images, with one seed each."]),
        (0.6, 0.3, SEVERAL, ["Better than giving every image each class's share", "is 30.0%: 60.0% on 100 test "]),
        (0.6, 0.3, SEVERAL, ["It still improved at its end (+2.0 ± 0.0 points of mean average precision", "16 s"]),
        (0.6, None, {"rows": TESTED}, ["It still improved at its end (+2.0 ± 0.0 points of test accuracy", "16 s"]),
    ],
)  # fmt: skip
def test_a_fine_tuning(top1: float, frequent: float | None, options: dict, found: list[str]) -> None:
    text = "\n".join(of_finetuning(top1, (top1 - 0.1, top1 + 0.1), 100, frequent, **options).sentences)
    assert all(part in text for part in found), text


def test_classifiers_are_compared_image_by_image() -> None:
    right = {str(n): n < 60 for n in range(100)}
    found = paired(right, {str(n): 20 <= n < 70 for n in range(100)}, "plain")
    each = np.repeat([1, 0, -1, 0], [20, 40, 10, 30])
    assert found is not None
    assert found.difference == pytest.approx(0.1)
    assert found.half == pytest.approx(stats.t.ppf(0.975, 99) * stats.sem(each))
    assert paired(right, {"0": True}, "plain") is None


def finished(folder: Path, init: str, right: int, images: str = "a", depth: int = 2, **settings: str) -> Path:
    """A fine-tuning that has ended, with the first so many of 100 test images right."""
    tuned(folder, init, **settings)
    (folder / "inputs.json").write_text(json.dumps({"weights": init, "train": images, "test": images}))
    write_csv(folder / "predictions.csv", [("index", "correct"), *((n, int(n < right)) for n in range(100))])
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"architecture": "vit", "model_args": {"depth": depth}}))
    return folder


def verdict_in(folder: Path, trivial: float | None = None) -> str:
    config, result = from_file(FinetuneConfig, folder / "config.yaml"), read_result(folder)
    assert result is not None
    return "\n".join(verdict_of(config, folder, result, trivial).sentences)


def test_the_same_training_from_scratch_is_found_beside_a_run_and_nothing_else_is(tmp_path: Path) -> None:
    run = finished(tmp_path / "runs" / "a run", "runs/first", 60)
    for name, changed in (("images", {"images": "b"}), ("seed", {"train__seed": "1"}), ("depth", {"depth": 3})):
        finished(run.parent / name, "random:runs/first", 10, **changed)
    tuned(run.parent / "other", "random:runs/first", ended=False)
    finished(run.parent / "weights", "runs/second", 10)
    words = f"--config '{run / 'config.yaml'}' --init random:runs/first --run-dir '{run}_scratch'"
    assert verdict_in(run).endswith(f"This makes one:\n{command('finetune')} {words}")
    write_csv(run / "sweep.csv", [("lr", "chosen"), (0.01, 1), (0.1, 0)])
    assert " --optim.lr 0.01 0.1 --run-dir " in verdict_in(run)
    scratch = finished(run.parent / "plain", "none", 50, model__name="vit", lr=0.1)  # pyright: ignore[reportArgumentType]
    assert "is not known" in verdict_in(run)  # it had one rate alone, another
    write_csv(scratch / "sweep.csv", [("lr", "chosen"), (0.01, 0), (0.1, 1)])
    assert "from scratch (plain): +10.0 ± 6.0 points (gained); 95% interval over 100 test images" in verdict_in(run)
    assert "from scratch" not in verdict_in(scratch)


@pytest.mark.parametrize("head", ["probe", "keep"])
def test_from_scratch_there_is_no_head_to_begin_with(head: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", "runs/first", 60, model__head=head)
    finished(tmp_path / "tanh", "random:runs/first", 50, model__head="tanh")
    assert "--init random:runs/first --model.head linear --run-dir " in verdict_in(run)
    finished(tmp_path / "plain", "random:runs/first", 50, model__head="linear")
    assert "from scratch (plain): +10.0 ± 6.0 points (gained)" in verdict_in(run)


def test_from_scratch_all_layers_learn_at_the_whole_rate(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", "runs/first", 60, optim__layer_decay="0.75")
    finished(tmp_path / "slow", "random:runs/first", 10, optim__layer_decay="0.75")
    assert "--init random:runs/first --optim.layer-decay 1 --run-dir " in verdict_in(run)
    finished(tmp_path / "plain", "random:runs/first", 50)
    assert "from scratch (plain): +10.0 ± 6.0 points (gained)" in verdict_in(run)


def test_several_labels_are_compared_by_mean_average_precision(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth, random = (rng.random((100, 2)) < 0.3).astype(np.uint8), rng.random((100, 2)).round(6)
    values = []
    for name, known in (("a", 0.3), ("plain", 0.0)):
        folder = finished(tmp_path / name, "runs/first" if known else "none", 50)
        scores = MultiLabelScores(("index", "mass"), np.arange(100), truth, random + known * truth)
        result = json.loads((folder / "result.json").read_text("utf-8"))
        result |= {"mean_ap": scores.mean_ap} | ({"mean_ap_interval": scores.interval} if known else {})
        (folder / "result.json").write_text(json.dumps(result))
        scores.write(folder, ListSource([b""] * 100), truth)
        values.append(precision_by_image(scores.probability, truth))
    gain = values[0] - values[1]
    half = stats.t.ppf(0.975, 99) * stats.sem(gain)
    text = verdict_in(tmp_path / "a", scores.chance)
    assert f"(plain): +{100 * gain.mean():.1f} ± {100 * half:.1f} points (gained); 95% interval over 100 test" in text
    assert f"{scores.chance:.1%}" in text
    older = verdict_in(tmp_path / "plain", scores.chance)
    assert "Not shown to be better than giving" in older
    assert "on 100 test images, without an interval." in older


def test_how_it_is_written(tmp_path: Path) -> None:
    verdict = Verdict(("word " * 30 + "ends:\ncommand " + "flag " * 40,), (Comparison("5 shots", "it", 0.5, None),))
    head, *wrapped, command, empty = verdict.lines()
    assert (head, len(wrapped), command, empty) == ("What the figures mean:", 2, "    command " + "flag " * 40, "")
    assert [line[:2] for line in wrapped] == ["- ", "  "]
    assert Verdict(()).lines() == []
    verdict.write(tmp_path, ["a note"])
    written = json.loads((tmp_path / "verdict.json").read_text("utf-8"))
    assert (written["sentences"], written["notes"]) == ([*verdict.sentences], ["a note"])
    assert written["comparisons"][0] | {"outcome": "not known", "difference": 0.5} == written["comparisons"][0]
