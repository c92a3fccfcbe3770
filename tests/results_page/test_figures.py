"""What the page says of a study, against arithmetic by hand."""

from typing import Any

import pytest
from results_page import figures, goals, tables
from results_page.data import Study

from mpp.errors import UserError
from tests.results_page.invented import all_kinds, by_hand, rows


def changed(of: Study, name: str = "", **parts: Any) -> Study:
    """The study with other parts of its data."""
    return Study({**of.content, **parts}, name or of.name)


def with_top1(of: Study, top1: dict[str, float], name: str) -> Study:
    """The study with the same accuracy in all fine-tunings of a side, of these sides alone."""
    runs = [run | {"top1": top1[run["side"]]} for run in of.content["finetuning"] if run["side"] in top1]
    return changed(of, name, finetuning=runs, pretraining=[run | {"seconds": 1.0} for run in of.content["pretraining"]])


def verdicts(*studies: Study) -> list[str]:
    return [cell for _, *cells in goals.goal_rows(goals.columns(studies)) for cell in cells if cell != "-"]


def test_fine_tuning_by_hand() -> None:
    of = by_hand()
    # usual: mean 43, deviation sqrt((9 + 1 + 16) / 2). Its gains 10, 10, 13: mean 11, standard error 1, t(2) = 4.303.
    table = rows(tables.finetuning_table(of))
    assert table[""][:6] == ["labels", "from scratch", "from scratch, longer", "usual", "other", "same"]
    assert table["1%"][:3] == ["32.0 ± 2.0", "34.0 ± 1.0", "43.0 ± 3.6"]
    cells = dict(zip(table[""][1:], table["1%"], strict=True))
    assert cells["usual: gain over scratch"] == "+11.0 ± 4.3"
    # 7, 7, 13: mean 9, deviation sqrt(12), standard error 2.
    assert cells["usual: gain over scratch, longer"] == "+9.0 ± 8.6"
    assert figures.gain(of, "usual", "1%") == "+11.0 ± 4.3"
    assert figures.gain(of, "scratch", "1%", over="usual") == "\u221211.0 ± 4.3"


def test_the_reading_that_held_out_images_chose_stands_beside_the_mean_of_the_last_layer() -> None:
    ranked = [{"side": "random", "pretrain_seed": None, "layer": -1, "pool": "mean", "shots": 10, "rank": 3.0}]
    probes = [{"side": "random", "pretrain_seed": None, "top1": 0.3}]
    of = changed(by_hand(), fewshot=[run | {"accuracy": [0.1]} for run in ranked], probes=probes)
    assert rows(tables.probe_table(of))[""] == ["encoder", "linear probe", "gain", "effective rank"]
    chosen = {"layer": -2, "pool": "quarters", "held_out": 0.5, "top1": 0.4}
    table = rows(tables.probe_table(changed(of, probes=[probes[0] | {"chosen": chosen}])))
    assert table[""] == ["encoder", "linear probe", "gain", "chosen on held-out images", "effective rank"]
    assert table["random initialisation"] == ["30.0", "-", "40.0", "3.0"]


def test_the_headline_has_every_side_and_the_gain_of_what_held_out_training_images_chose() -> None:
    table = rows(tables.headline_table(by_hand()))
    sides = ["from scratch", "from scratch, longer", "usual", "other", "same"]
    assert table[""][1:] == [*sides, "other: gain over scratch"]
    expected = ["32.0 ± 2.0", "34.0 ± 1.0", "43.0 ± 3.6", "54.0 ± 3.6", "44.0 ± 2.6", "+22.0 ± 4.3"]
    assert table["1% of the labels"] == expected
    assert table["few-shot, 10 per class, frozen"][:3] == ["21.0 ± 1.4 (random)", "-", "35.0 ± 5.1"]


def test_test_images_choose_no_arm() -> None:
    of = by_hand()
    assert goals.chosen(of) == "other"
    # Of the best test accuracy by far, and not of the best on held-out training images.
    runs = [run | {"top1": 0.99} if run["side"] == "same" else run for run in of.content["finetuning"]]
    assert goals.chosen(changed(of, finetuning=runs)) == "other"
    none = changed(of, finetuning=[run | {"sweep": None} for run in runs])
    assert goals.chosen(none) is None
    assert [arm for _, arm in goals.columns([none])] == ["usual", "other", "same"]  # all of them, then
    heads = rows(tables.headline_table(none))[""]
    assert heads[-3:] == [f"{arm}: gain over scratch" for arm in ("usual", "other", "same")]


def test_test_images_choose_no_layer() -> None:
    of = by_hand()
    better = [run | {"layer": -2, "accuracy": [0.9, 0.9]} for run in of.content["fewshot"] if run["side"] != "random"]
    both = changed(of, fewshot=[*better, *of.content["fewshot"]])
    assert figures.fewshot_gain(both, "usual", 10) == figures.fewshot_gain(of, "usual", 10)
    assert tables.headline_table(both) == tables.headline_table(of)
    assert verdicts(both) == verdicts(of)
    # What cross-validation on the shots chooses stands there where the study noted it.
    noted = [run | {"held_out": [0.5 + (run["layer"] == -2) / 4] * 2} for run in both.content["fewshot"]]
    table = rows(tables.fewshot_table(changed(of, fewshot=noted)))
    assert table["usual, chosen on the shots"] == ["90.0 ± 0.0"]


def test_shares_come_from_the_fewest_labels_on() -> None:
    content = all_kinds()["benefit_cpu"]
    content["config"]["labels"] = ["10%", "1%", "50%", "100%"]
    assert Study(content, "benefit_cpu").labels == ["1%", "10%", "100%", "50%"]  # of 50 % there is no run


def test_few_shot_by_hand() -> None:
    of = by_hand()
    # 30 34 / 36 40: both effects, of 6 and of 4, are known from two: variances of 18 and 8. Gains of 10 12 / 16 18:
    # mean squares of 36 for the pretrainings, 4 for the draws and 0 for the rest, 40 over 4 cells, t(1) = 12.706.
    table = rows(tables.fewshot_table(of))
    assert table["random initialisation, mean"] == ["21.0 ± 1.4"]
    assert table["usual, mean"] == ["35.0 ± 5.1"]
    assert table["usual: gain, mean"] == ["+14.0 ± 40.2"]
    # Of one pretraining the pairs are the draws: 16 and 18.
    runs = [run for run in of.content["fewshot"] if run["pretrain_seed"] != 0]
    assert figures.fewshot_gain(changed(of, fewshot=runs), "usual", 10) == "+17.0 ± 12.7"


def test_every_arm_stands_beside_the_default_with_an_interval() -> None:
    table = rows(tables.ablation_table(by_hand()))
    head = table[""][1:]
    at = head.index("1% of the labels")
    assert head[at + 1] == "over the default"
    assert table["**usual**"][at : at + 2] == ["43.0 ± 3.6", "-"]
    assert table["other"][at : at + 2] == ["54.0 ± 3.6", "+11.0 ± 0.0"]
    assert table["same"][at : at + 2] == ["44.0 ± 2.6", "+1.0 ± 2.5"]  # 2, 1, 0: standard error 0.58
    assert table["no pretraining"][at : at + 2] == ["32.0 ± 2.0", "-"]
    assert table["**usual**"][head.index("10 shots")] == "35.0 ± 5.1"
    assert table["**usual**"][head.index("effective rank")] == "7.5"
    assert table["other"][0] == "`--x`"


def test_of_one_seed_no_table_has_a_spread() -> None:
    of = by_hand()
    tuned = [run for run in of.content["finetuning"] if run["seed"] == 0]
    frozen = [run | {"accuracy": run["accuracy"][:1]} for run in of.content["fewshot"] if run["pretrain_seed"] != 0]
    one = changed(of, finetuning=tuned, fewshot=frozen, pretraining=of.content["pretraining"][:3])
    made = (tables.finetuning_table, tables.headline_table, tables.fewshot_table, tables.ablation_table)
    assert not [text for make in made if "±" in (text := make(one))]


def test_the_effect_of_a_flag_is_the_mean_over_the_pairs_that_differ_in_it_alone() -> None:
    of = by_hand()
    flags = {"usual": "", "other": "--x 1 2", "same": "--y", "both": "--y --x 1 2", "more": "--x 1 2 --z --y"}
    before, tuned = of.content["pretraining"][0], of.content["finetuning"][0]
    top1 = {"usual": (40, 42, 47), "other": (51, 53, 58), "same": (42, 43, 47), "both": (47, 48, 52), "more": (1, 1, 1)}
    runs = [
        tuned | {"side": side, "seed": seed, "top1": value / 100}
        for side, values in top1.items()
        for seed, value in enumerate(values)
    ]
    arms = [before | {"arm": arm, "flags": each} for arm, each in flags.items()]
    table = rows(tables.effects_table(changed(of, pretraining=arms, finetuning=runs)))
    assert table[""] == ["flag", "pairs", "10 shots", "1% of the labels"]
    # x: 11, 11, 11 without y and 5, 5, 5 with it. y: 2, 1, 0 without x and -4, -5, -6 with it: -1, -2, -3.
    assert table["`--x 1 2`"] == ["2", "-", "+8.0 ± 0.0"]
    assert table["`--y`"] == ["2", "-", "\u22122.0 ± 2.5"]
    assert len(table) == 3  # of z there is one pair
    assert tables.effects_table(of) == ""


def test_better_than_the_default_by_hand() -> None:
    seconds = {"usual": 10.0, "other": 10.0, "same": 5.0}
    of = by_hand()
    arms = [run | {"images": 1000, "seconds": seconds[run["arm"]]} for run in of.content["pretraining"]]
    of = changed(of, "best_hand", pretraining=arms, equal_time=None)
    # Gains 11, 22 and 12 points.
    assert rows(tables.best_table(of))["other"] == ["1,000", "1.00", "-", "+22.0 ± 4.3 (200%)"]
    assert goals.times(of, "other", "1%") == "2.0"
    twice = "other 2.00 times (in 100% of the time): **met**; same 1.09 times (in 50% of the time): not met"
    assert twice in verdicts(of)  # each of them, not the best
    assert "same 1.09 times (in 50% of the time): **met**" in verdicts(of)
    slow = {"arms": {arm: {"ratio": 1.5, "images": 1000} for arm in of.arms}}
    assert not [cell for cell in verdicts(changed(of, "best_slow", equal_time=slow)) if "met" in cell]


@pytest.mark.parametrize(
    ("usual", "other", "verdict"),
    [
        (0.27, 0.40, "the default gains nothing (\u22125.0); other +8.0 (in 100% of the time): **met**"),
        (0.32, 0.31, "the default gains nothing (+0.0); other \u22121.0 (in 100% of the time): not met"),
    ],
)
def test_better_than_a_default_that_gains_nothing(usual: float, other: float, verdict: str) -> None:
    of = with_top1(by_hand(), {"scratch": 0.32, "usual": usual, "other": other}, "best_hand")
    assert verdicts(of) == [verdict]
    assert rows(tables.best_table(of))["other"][-1] == figures.gain(of, "other", "1%")


def test_goals_are_met_by_the_mean() -> None:
    of = by_hand()
    assert verdicts(of) == ["+22.0 ± 4.3: **met**", "lowest +21.0 (1%, seed 0): **met**"]
    arms = ("usual", "other", "same")
    runs = [run | {"top1": 0.25 if run["side"] in arms else run["top1"]} for run in of.content["finetuning"]]
    gain, lowest = verdicts(changed(of, "benefit_worse", finetuning=runs))
    assert gain.endswith(": not met")
    assert lowest == "lowest \u22129.0 (1%, seed 2): not met"
    # Over scratch at 0.32 on average: 9.97 points, which round to the goal's 10.
    near = with_top1(of, {"scratch": 0.32, "usual": 0.4197}, "benefit_near")
    reached = dict(goals.goal_rows([(near, "usual")]))
    assert reached["+10.0 points over scratch at 1% of the labels"] == "+10.0 ± 0.0 (9.97): not met"


def test_a_sentence_that_names_what_is_not_there_is_refused() -> None:
    of = Study(all_kinds()["benefit_cpu"], "benefit_cpu")
    with pytest.raises(UserError, match=r"benefit_cpu has no 'pretraned' at '1%'; it has .*pretrained"):
        figures.gain(of, "pretraned", "1%")
    with pytest.raises(UserError, match="'5%'"):
        figures.accuracy(of, "scratch", "5%")
