"""Fine-tuning runs beside a run: from scratch and pretrained, and when there is a gain between them."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpp.report.run_page.related import related
from mpp.report.run_page.sections import sections
from mpp.system.files import write_csv
from tests.report.run_page.run_folders import pretrained, tables, tuned


def test_scratch_beside_pretrained(tmp_path: Path) -> None:
    run = pretrained(tmp_path / "runs" / "first")
    assert related(run) is None
    tuned(tmp_path / "runs" / "a", "runs/first", 0.7)
    tuned(tmp_path / "runs" / "b", f"random:{run}", 0.5)
    tuned(tmp_path / "runs" / "c", "runs/first", 0.4, labels="10%")
    tuned(tmp_path / "elsewhere" / "d", "runs/first", 0.8)
    tuned(tmp_path / "runs" / "of another", "runs/second", 0.9)
    tuned(tmp_path / "runs" / "going on", "runs/first", ended=False)
    damaged = tuned(tmp_path / "runs" / "damaged", "runs/first")
    (damaged / "result.json").write_text('{"top1": 1}')
    (tmp_path / "runs" / "file").write_text("")
    pair, single = tables(sections(run), "downstream")
    setting = "folder:/labelled, 100% of the labels, 10k steps"
    assert pair.rows == ((setting, "50.0 % (45.0 to 55.0)", "70.0 % (65.0 to 75.0)", "+20.0"),)
    assert single.folded
    assert [(row[0], row[1], row[-1]) for row in single.rows] == [
        ("a", "pretrained", "70.0 %"),
        ("b", "random", "50.0 %"),
        ("c", "pretrained", "40.0 %"),
    ]
    pair, single = tables(sections(run, [tmp_path / "elsewhere" / "d"]), "downstream")
    assert pair.rows[0][2:] == ("75.0 ± 7.1 % (2 runs)", "+25.0")
    assert len(single.rows) == 4


OTHERS = {
    "batch": {"train__batch_size": "64"},
    "optimiser": {"optim__name": "adamw"},
    "image size": {"model__img_size": "64"},
    "learning rate": {"lr": 0.02},
    "augmentation": {"data__randaugment": "rand-m9-mstd0.5-inc1"},
    "steps": {"steps": 30},
    "classes": {"classes": 4},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_of_two_recipes_both_sides_stand_without_a_gain(other: dict[str, Any], tmp_path: Path) -> None:
    run = pretrained(tmp_path / "runs" / "first")
    tuned(tmp_path / "runs" / "a", "runs/first", 0.7)
    tuned(tmp_path / "runs" / "b", f"random:{run}", 0.5, **other)
    (pair, single) = tables(sections(run), "downstream")
    assert [row[1:] for row in pair.rows] == [("-", "70.0 % (65.0 to 75.0)", "-"), ("50.0 % (45.0 to 55.0)", "-", "-")]
    assert len(single.rows) == 2
    first, second = (row[0].split(", ") for row in pair.rows)
    assert len(set(first) ^ set(second)) == 2  # each row says what the two differ by
    assert "no gain where recipe, steps, labels or test images differ" in pair.caption


@pytest.mark.parametrize("part", ["train", "test"])
def test_of_other_images_of_the_same_name_there_is_no_gain(part: str, tmp_path: Path) -> None:
    run = pretrained(tmp_path / "runs" / "first")
    for name, init in (("a", "runs/first"), ("b", f"random:{run}")):
        folder = tuned(tmp_path / "runs" / name, init)
        hashes = {"weights": name, "train": "x", "test": "y"}
        (folder / "inputs.json").write_text(json.dumps(hashes | ({part: name} if name == "b" else {})))
    (pair, _) = tables(sections(run), "downstream")
    assert [row[3] for row in pair.rows] == ["-", "-"]
    (folder / "inputs.json").write_text(json.dumps(hashes))
    (pair, _) = tables(sections(run), "downstream")
    assert [row[3] for row in pair.rows] == ["+0.0"]


def test_pairs_of_one_seed_and_of_one_sweep(tmp_path: Path) -> None:
    run = pretrained(tmp_path / "runs" / "first")
    for seed, (here, there) in enumerate(((0.7, 0.5), (0.8, 0.5), (0.9, 0.5))):
        tuned(tmp_path / "runs" / f"a{seed}", "runs/first", here, seed=seed, lr=0.1)
        tuned(tmp_path / "runs" / f"b{seed}", f"random:{run}", there, seed=seed, lr=0.2)
    tuned(tmp_path / "runs" / "alone", "runs/first", 0.1, seed=7, lr=0.1)  # no scratch has its seed
    for path in (tmp_path / "runs").glob("[ab]*"):
        write_csv(path / "sweep.csv", [("lr", "held_out_top1"), (0.1, 0.5), (0.2, 0.5)])  # each chose its own of these
    (pair, _) = tables(sections(run), "downstream")
    ((_, scratch, here, gain),) = pair.rows
    # 20, 30, 40 points: a deviation of 10, t of two degrees of freedom 4.303.
    assert (scratch, here, gain) == ("50.0 ± 0.0 % (3 runs)", "62.5 ± 35.9 % (4 runs)", "+30.0 ± 24.8")
    assert "95 % interval over the fine-tuning seeds of this one pretraining" in pair.caption
