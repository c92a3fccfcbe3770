"""Sections about a run folder, against figures that were written into it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mpp.config import to_yaml
from mpp.downstream.rankme import LARGEST, RANK
from mpp.errors import UserError
from mpp.pretraining.settings import PretrainConfig
from mpp.report.results import headline, verdict
from mpp.report.run_record import read_run
from mpp.study.settings import StudyConfig
from mpp.system.files import write_csv
from tests.report.run_folders import START, fewshot, pictures, pretrained, sections, tables, texts, trained, tuned

pytestmark = pytest.mark.usefixtures("undrawn")


def named(found: list, name: str) -> dict[str, Any]:
    """The first table of a section, which has two columns."""
    return {row[0]: row[1] for row in tables(found, name)[0].rows}


def test_a_pretraining_shows_its_measurements(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "run")
    found = sections(folder)
    assert [section.name for section in found] == ["curves", "few-shot", "data", "how-it-was-made"]
    drawn = pictures(found)
    assert " ".join(drawn) == "curve_loss curve_accuracy curve_few_shot curve_learning_rate curve_speed curve_data_wait"
    assert "masked rises from 3.1 % to 41.2 %; " in drawn["curve_accuracy"].alt
    assert "nearest visible patches begins and ends at 29.6 %" in drawn["curve_accuracy"].alt
    assert "5 shots rises from 20.0 % to 45.7 %" in drawn["curve_few_shot"].alt
    assert drawn["curve_few_shot"].caption == "Few-shot accuracy (band: standard deviation over the draws)"
    (figures,) = tables(found, "curves")
    assert [row[:5] for row in figures.rows] == [
        ("1,000", "10", "5.69", "3.1 %", "3.1 %"),
        ("20,000", "200", "3", "30.0 %", "30.0 %"),
        ("40,000", "400", "1.88", "41.2 %", "41.2 %"),
    ]
    (shots,) = tables(found, "few-shot")
    assert shots.head[1:3] == ("random initialisation", "pretrained")
    assert shots.rows == (
        ("1", "10.0 ± 1.0 %", "25.0 ± 1.0 %", "+15.0"),
        ("5", "20.0 ± 2.0 %", "45.7 ± 2.0 %", "+25.7"),
    )
    assert "over 3 draws" in shots.caption
    assert headline(read_run(folder)) == {
        "accuracy at masked patches": "41.2 %",
        "nearest visible patches": "29.6 %",
        "points gained at 5 shots": "+25.7",
        "images seen": "40,000",
        "training time": "7 min",
    }
    assert [sentence.partition(":")[0] for sentence in verdict(read_run(folder))] == [
        "It has learnt what a blur does not know",
        "Few-shot accuracy against the untrained encoder, in points",
    ]


def test_where_the_run_comes_from(tmp_path: Path) -> None:
    found = sections(pretrained(tmp_path / "run"))
    assert named(found, "data")["source"] == "folder:/my images"
    assert named(found, "data")["images found"] == "1,234 images in 7 classes"
    assert texts(found, "data") == ["Targets: 77 of 512 classes occur."]
    made = named(found, "how-it-was-made")
    assert made["commit"] == "0123456789ab, with changes"
    assert (made["processor"], made["memory"], made["seed"]) == ("Some CPU", "23.5 GiB", "0")
    assert made["device-hours of training"] == "0.111"  # 400 seconds
    command, config = texts(found, "how-it-was-made")
    assert command == "tools/pretrain.py \\\n  --data 'folder:/my images'"
    assert "\nobjective:\n" in config
    assert ("torch", "2.13.0") in tables(found, "how-it-was-made")[1].rows


def test_a_resumed_run_counts_the_devices_of_each_start(tmp_path: Path) -> None:
    later = {**START, "step": 200, "hardware": {**START["hardware"], "hosts": 2, "devices": ["H200 (1 GiB)"] * 8}}
    found = sections(pretrained(tmp_path / "run", starts=[START, later]))
    made = named(found, "how-it-was-made")
    assert made["devices"] == "8 x H200 (1 GiB), on 2 machines"
    assert made["device-hours of training"] == "0.5"  # 200 seconds on one, 200 on eight
    starts = tables(found, "how-it-was-made")[2]
    assert [row[:2] for row in starts.rows] == [("2026-03-01 10:00:00", "0"), ("2026-03-01 10:00:00", "200")]
    assert starts.caption == "Started 2 times"


def test_a_run_of_an_older_version(tmp_path: Path) -> None:
    found = sections(pretrained(tmp_path / "run", starts=()))
    assert any("older version" in text for text in texts(found, "how-it-was-made"))
    assert named(found, "how-it-was-made") == {"training time": "7 min", "few-shot evaluations": "90 s"}


def test_an_unfinished_run(tmp_path: Path) -> None:
    rows = [fewshot(0, 0.1, 0.2), trained(10, 0.1), trained(20, math.nan), fewshot(20, 0.2, 0.3)]
    rows.append({"step": 21, "images": 2100, "event": "non_finite", "precision": "bf16", "fp32_loss": "1.5"})
    folder = pretrained(tmp_path / "run", rows, ended=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "imag')
    found = sections(folder)
    assert texts(found, "curves") == [
        "This run has not ended; its last figures are those of step 20.",
        "At step 21 the loss was not finite in bf16; the same batch in fp32 gave 1.5.",
    ]
    assert tables(found, "curves")[0].rows[-1][:4] == ("2,000", "20", "-", "-")
    assert "masked is 10.0 %" in pictures(found)["curve_accuracy"].alt
    assert tables(found, "few-shot")[0].head[2] == "step 20"
    assert "accuracy at masked patches" not in headline(read_run(folder))  # of its last part nothing is finite
    assert verdict(read_run(folder))[0].startswith("This run has not ended")
    assert "(1) too short: it made 10 steps" in verdict(read_run(folder))[2]


@pytest.mark.parametrize("rows", [(), (fewshot(0, 0.1, 0.2),)])
def test_a_run_that_has_hardly_begun(rows: tuple, tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "run", rows, ended=False)
    found = sections(folder)
    assert "No figures of the training have been written yet." in texts(found, "curves")
    assert headline(read_run(folder)) == {}
    assert verdict(read_run(folder)) == ()
    for table in tables(found, "few-shot"):
        assert table.rows == (("1", "10.0 ± 1.0 %", "-", "-"), ("5", "20.0 ± 2.0 %", "-", "-"))
    (folder / "metrics.jsonl").unlink()
    assert [section.name for section in sections(folder)] == ["curves", "data", "how-it-was-made"]


def test_the_pixel_target_has_an_error(tmp_path: Path) -> None:
    rows = [trained(10, 0.5, "mse"), trained(20, 0.1234567, "mse")]
    folder = pretrained(tmp_path / "run", rows, target="pixels")
    found = sections(folder)
    assert "masked falls from 0.5 to 0.1235" in pictures(found)["curve_mse"].alt
    assert "mean patch" in pictures(found)["curve_mse"].alt
    assert tables(found, "curves")[0].head[3:7] == ("squared error", "masked", "neighbours", "mean patch")
    assert headline(read_run(folder))["squared error at masked patches"] == "0.1235"


def test_the_effective_rank_of_a_run_without_labels(tmp_path: Path) -> None:
    ranks = [{"step": n, "images": n, RANK: rank, LARGEST: 192} for n, rank in ((0, 14.06), (9, 6.5), (20, 1.25))]
    folder = pretrained(tmp_path / "run", [*ranks, trained(20, 0.3)])
    found = sections(folder)
    assert pictures(found)["curve_effective_rank"].alt.endswith("effective rank falls from 14.06 to 1.25.")
    assert "of 192 possible. A fall to one or two is a collapse" in texts(found, "curves")[0]
    assert any("fallen from 14.1 to 1.2 of 192" in sentence for sentence in verdict(read_run(folder)))


def test_bad_files_of_all_ranks(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "run")
    head = ("index", "kind", "file", "reason")
    bad = [(i, "empty", f"{i}.png", "no bytes") for i in range(6)]
    write_csv(folder / "bad_files.csv", [head, *bad, (9,)])  # the last one is cut short
    write_csv(folder / "bad_files.rank1.csv", [head, bad[0], (7, "truncated", "7.png", "cut")])
    table = tables(sections(folder), "data")[1]
    assert table.caption == "7 images could not be used: 6 empty, 1 truncated; the first 5"
    assert table.rows[0] == ("0.png", "empty", "no bytes")
    assert len(table.rows) == 5


def test_a_fine_tuning_shows_its_test(tmp_path: Path) -> None:
    folder = tuned(tmp_path / "ft", "runs/first", classes=12)
    head = ("lr", "held_out_top1", "held_out_images", "chosen")
    write_csv(folder / "sweep.csv", [head, (0.01, 0.5, 40, 1), (0.1, "diverged", "", 0)])
    found = sections(folder)
    assert [section.name for section in found] == ["fine-tuning", "curves", "data", "how-it-was-made"]
    measures = named(found, "fine-tuning")
    assert measures["top-1"] == "60.00 %"
    assert measures["95 % interval over test images"] == "55.0 % to 65.0 %"
    assert measures["started from"] == "runs/first"
    assert measures["always the most frequent class"] == f"{100 * 31 / sum(range(20, 32)):.2f} %"
    assert "top-5" not in measures
    _, worst, best, sweep = tables(found, "fine-tuning")
    assert [row[0] for row in worst.rows] == ["c0", "c1", "c2", "c3", "c4"]
    assert worst.rows[1] == ("c1", "21", "4.8 %", "c2")
    assert [row[0] for row in best.rows] == ["c11", "c10", "c9", "c8", "c7"]
    assert sweep.rows == (("0.01", "50.0 %", "yes"), ("0.1", "diverged", "no"))
    assert pictures(found)["class_confusion"].image.shape == (20, 30, 3)  # pyright: ignore
    assert "test images rises from 35.0 % to 60.0 %" in pictures(found)["curve_accuracy"].alt
    figures = {"top-1": "60.0 %", "always the most frequent class": "10.1 %", "mean over the classes": "55.0 %"}
    assert headline(read_run(folder)) == figures | {"images seen": "160", "training time": "20 s"}
    assert verdict(read_run(folder))[0].startswith("Better than always answering the most frequent class")


def test_a_fine_tuning_that_has_not_ended(tmp_path: Path) -> None:
    folder = tuned(tmp_path / "ft", "none", ended=False)
    assert [section.name for section in sections(folder)] == ["curves", "data", "how-it-was-made"]
    assert headline(read_run(folder))["training accuracy"] == "70.0 %"
    assert verdict(read_run(folder)) == ()
    (folder / "result.json").write_text("{")  # damaged: the rest is shown
    assert sections(folder)[0].name == "curves"


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run: it has no config"):
        sections(tmp_path)
    for config, message in ((to_yaml(StudyConfig()), "is a study"), ("a: 1", "no setting 'a'")):
        (tmp_path / "config.yaml").write_text(config)
        with pytest.raises(UserError, match=message):
            sections(tmp_path)


def test_no_password_of_an_address_is_shown(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "run")
    text = to_yaml(PretrainConfig()).replace("source: ''", "source: shards:s3://me:secret@bucket/a.tar")
    assert "secret" in text
    (folder / "config.yaml").write_text(text)
    assert "secret" not in json.dumps([str(block) for section in sections(folder) for block in section.blocks])
