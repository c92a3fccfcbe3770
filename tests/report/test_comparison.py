"""Runs side by side, against figures that were written into their folders."""

from pathlib import Path

import pytest

from mpp.errors import UserError
from mpp.report.comparison import comparison, short_names
from mpp.report.html import render
from tests.report.run_folders import START, pictures, pretrained, tables, texts, trained, tuned


@pytest.mark.usefixtures("undrawn")
def test_two_pretrainings(tmp_path: Path) -> None:
    first = pretrained(tmp_path / "a")
    later = {**START, "versions": {"python": "3.12.1", "torch": "2.14.0"}}
    second = pretrained(tmp_path / "b", [trained(10, 0.1), trained(20, 0.2)], [START, later], ended=False, lr=1e-3)
    page = comparison([first, second])
    results, shots = tables(page.sections, "pretraining-results")
    assert results.rows == (
        ("a", "40,000", "1.88", "41.2 %", "41.2 %", "29.6 %", "7 min", "yes"),
        ("b", "2,000", "4", "20.0 %", "20.0 %", "29.6 %", "20 s", "no"),
    )
    assert shots.rows == (
        ("a", "random initialisation", "10.0 ± 1.0 %", "20.0 ± 2.0 %"),
        ("a", "pretrained", "25.0 ± 1.0 %", "45.7 ± 2.0 %"),
    )
    drawn = pictures(page.sections)
    assert drawn["pretraining_accuracy_accuracy_masked"].alt.endswith("at the end: a 41.2 %, b 20.0 %.")
    assert drawn["pretraining_few_shot_fewshot_5shot"].alt.endswith("at the end: a 45.7 %.")
    assert "pretraining_loss_loss_random" not in drawn  # none of them has it
    settings, machines = tables(page.sections, "pretraining-differences")
    assert settings.rows == (("optim.lr", "0.0002", "0.001"),)
    assert machines.rows == (("torch", "2.13.0", "2.14.0"),)


@pytest.mark.usefixtures("undrawn")
def test_both_kinds_of_runs_stand_apart(tmp_path: Path) -> None:
    run, tuned_run = pretrained(tmp_path / "a"), tuned(tmp_path / "b", "a", 0.6)
    scratch = tuned(tmp_path / "c", "none", 0.5)
    pixels = pretrained(tmp_path / "d", [trained(10, 0.5, "mse")], target="pixels")
    page = comparison([run, tuned_run, scratch, pixels])
    assert [section.name for section in page.sections] == [
        f"{kind}-{name}" for kind in ("pretraining", "fine-tuning") for name in ("results", "curves", "differences")
    ]
    assert page.lead == "2 pretraining runs and 2 fine-tuning runs: a, b, c, d."
    (results,) = tables(page.sections, "fine-tuning-results")
    assert results.rows[0][:5] == ("b", "a", "160", "60.0 %", "55.0 % to 65.0 %")
    assert results.rows[1][:4] == ("c", "scratch", "160", "50.0 %")
    assert texts(page.sections, "fine-tuning-differences") == ["None of these runs wrote down its code and machine."]
    rows = {row[0]: row for row in tables(page.sections, "pretraining-results")[0].rows}
    assert rows["a"][3:9] == ("41.2 %", "41.2 %", "29.6 %", "-", "-", "-")
    assert rows["d"][3:9] == ("-", "-", "-", "0.5", "0.5", "0.296")
    drawn = pictures(page.sections)  # losses of different units stand apart
    assert drawn["pretraining_loss_loss"].alt.endswith("at the end: a 1.88.")
    assert drawn["pretraining_loss_mse_loss"].alt.endswith("at the end: d 1.")


@pytest.mark.usefixtures("undrawn")
def test_runs_of_several_labels_an_image_have_no_top_1(tmp_path: Path) -> None:
    runs = [tuned(tmp_path / "b", "none", 0.3, mean_ap=0.6), tuned(tmp_path / "c", "none", 0.4, mean_ap=0.5)]
    page = comparison(runs)
    (results,) = tables(page.sections, "fine-tuning-results")
    assert results.head[3:7] == ("mAP", "95 % interval over test images", "exact match", "recall by class")
    assert [row[3:7] for row in results.rows] == [
        ("60.0 %", "55.0 % to 65.0 %", "30.0 %", "55.0 %"),
        ("50.0 %", "45.0 % to 55.0 %", "40.0 %", "55.0 %"),
    ]
    alt = pictures(page.sections)["fine_tuning_mean_ap_test_mean_ap"].alt
    assert alt.endswith("at the end: b 60.0 %, c 50.0 %.")
    (mixed,) = tables(comparison([*runs, tuned(tmp_path / "d", "none", 0.7)]).sections, "fine-tuning-results")
    assert [(*row[3:5], *row[6:8]) for row in mixed.rows[1:]] == [
        ("50.0 %", "-", "40.0 %", "55.0 %"),
        ("-", "70.0 %", "-", "-"),
    ]


@pytest.mark.slow
def test_twenty_runs_are_drawn(tmp_path: Path) -> None:
    page = comparison([pretrained(tmp_path / f"run_{i}", lr=1e-4 * (i + 1)) for i in range(20)])
    assert len(tables(page.sections, "pretraining-results")[0].rows) == 20
    drawn = str(pictures(page.sections)["pretraining_accuracy_accuracy_masked"].image)
    assert all(f">run_{i}<" in drawn for i in range(20))  # in the legend
    assert render(page)


def test_one_run_that_has_hardly_begun_has_nothing_to_differ_from(tmp_path: Path) -> None:
    page = comparison([pretrained(tmp_path / "a", ())])
    assert [section.name for section in page.sections] == ["pretraining-results", "pretraining-curves"]
    assert tables(page.sections, "pretraining-results")[0].rows == (("a", "-", "-", "-", "-", "-", "-", "yes"),)
    with pytest.raises(UserError, match="is no run: it has no config"):
        comparison([tmp_path / "a", tmp_path])


def test_names_are_as_short_as_tells_runs_apart() -> None:
    for paths, names in (("/r/x/a /r/x/b", "a b"), ("/r/x/a /r/y/a", "x/a y/a"), ("/r/a /r/a/b", "a a/b")):
        assert short_names([*map(Path, paths.split())]) == names.split()
