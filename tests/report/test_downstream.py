"""Fine-tuning runs, few-shot tables and studies beside a run that name it."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpp.config import to_yaml
from mpp.report.downstream import downstream_section, names_run
from mpp.study.settings import StudyConfig
from mpp.system.files import write_csv
from tests.report.run_folders import pretrained, sections, tables, tuned

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("runs/first", True),
        ("random:runs/first", True),
        ("./runs/first/", True),
        ("first", True),
        ("../runs/first/model", True),
        ("runs/first/checkpoints/step_000000010.pt", True),
        ("HERE/runs/first", True),
        ("random:HERE/runs/first/model", True),
        ("runs/first2", False),
        ("other/first", False),
        ("/runs/first", False),
        ("none", False),
        ("", False),
        ("..", False),
    ],
)
def test_whether_a_start_names_this_run(init: str, expected: bool, tmp_path: Path) -> None:
    assert names_run(init.replace("HERE", str(tmp_path)), tmp_path / "runs" / "first") is expected


def test_fewshot_tables_that_name_the_run(tmp_path: Path) -> None:
    run = pretrained(tmp_path / "pretrained")
    head = ("model", "shots", "accuracy", "std", "interval95", "seeds", "l2")
    rows = [
        (f"{name} ({how})", k, accuracy, 0.01, "", 3, "")
        for name, how, accuracy in (("random:pretrained", "mean", 0.2), ("pretrained", "token, layer 3", 0.5))
        for k in (5, 10)
    ]
    other = ("resnet18 (mean)", 5, 0.9, 0.01, "", 3, "")
    write_csv(tmp_path / "shots" / "fewshot.csv", [head, *rows, other])
    write_csv(tmp_path / "others" / "fewshot.csv", [head, other])
    write_csv(tmp_path / "broken" / "fewshot.csv", [head, ("pretrained (mean)", "x", "y", "", "", "", "")])
    (table,) = tables(sections(run), "downstream")
    assert table.head == ("encoder", "5 shots", "10 shots")
    assert table.rows == (
        ("random initialisation (mean)", "20.0 ± 1.0 %", "20.0 ± 1.0 %"),
        ("pretrained (token, layer 3)", "50.0 ± 1.0 %", "50.0 ± 1.0 %"),
        ("resnet18 (mean)", "90.0 ± 1.0 %", "-"),
    )


@pytest.mark.parametrize("own", [True, False])
def test_the_study_of_a_run(own: bool, tmp_path: Path) -> None:
    study = tmp_path / "study"
    run = pretrained(study / "pretrain" / "4x4" / "seed_1" if own else tmp_path / "first")
    study.mkdir(exist_ok=True)
    (study / "config.yaml").write_text(to_yaml(StudyConfig(init="" if own else str(run))))
    arm, mine = ("4x4", 1) if own else ("pretrained", None)  # 7 is another pretraining of the arm
    sides = (("scratch", 0.4, None), ("other", 0.9, mine), (arm, 0.45, mine))
    runs = [(side, seed, start, top1 + 0.1 * seed) for side, top1, start in sides for seed in (0, 1)]
    runs.append((arm, 2, 7, 0.99))
    readings = [("random", None, -1, 0.2), (arm, mine, -1, 0.5), (arm, 7, -1, 0.99), (arm, mine, -2, 0.6)]
    readings.append(("other", mine, -1, 0.9))
    content = {
        "pretraining": [{"arm": "other", "seed": 0}, {"arm": "4x4", "seed": 1}] if own else [],
        "finetuning": [
            {"side": side, "labels": "10%", "seed": seed, "pretrain_seed": start, "top1": top1}
            for side, seed, start, top1 in runs
        ],
        "fewshot": [
            {"side": side, "pretrain_seed": start, "layer": layer, "pool": "mean", "shots": 5}
            | {"accuracy": [accuracy, accuracy + 0.02]}
            for side, start, layer, accuracy in readings
        ],
    }
    (study / "study.json").write_text(json.dumps(content))
    table, few = tables(sections(run), "downstream")
    assert table.head == ("labels", "from scratch", arm, "gain in points")
    assert table.rows == (("10%", "45.0 ± 7.1 %", "50.0 ± 7.1 %", "+5.0 ± 0.0"),)
    assert table.caption.startswith("Study study: ")
    assert table.caption.endswith("95 % interval over 2 fine-tuning seeds of one pretraining")
    assert few.caption.endswith("mean ± standard deviation over 2 draws of the shots")
    assert few.rows == (
        ("random (mean)", "21.0 ± 1.4 %"),
        (f"{arm} (mean, layer -2)", "61.0 ± 1.4 %"),
        (f"{arm} (mean)", "51.0 ± 1.4 %"),
    )
    (study / "study.json").write_text(json.dumps({**content, "pretraining": []}))
    (study / "config.yaml").write_text(to_yaml(StudyConfig(init="" if own else str(tmp_path / "another"))))
    assert downstream_section(run) is None


def test_scratch_beside_pretrained(tmp_path: Path) -> None:
    run = pretrained(tmp_path / "runs" / "first")
    assert downstream_section(run) is None
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
    setting = "folder:/labelled, 100% of the labels, auto"
    assert pair.rows == ((setting, "50.0 % (45.0 to 55.0)", "70.0 % (65.0 to 75.0)", "+20.0"),)
    assert single.folded
    found = [(row[0], row[1], row[-1]) for row in single.rows]
    assert found == [("a", "pretrained", "70.0 %"), ("b", "random", "50.0 %"), ("c", "pretrained", "40.0 %")]
    pair, single = tables(sections(run, [tmp_path / "elsewhere" / "d"]), "downstream")
    assert pair.rows[0][2:] == ("75.0 ± 7.1 % (2 runs)", "+25.0")
    assert len(single.rows) == 4


def test_scratch_is_what_new_weights_need(tmp_path: Path) -> None:
    run = pretrained(tmp_path / "first")
    tuned(tmp_path / "a", "first", 0.7, model__head="probe", optim__layer_decay="0.75")
    tuned(tmp_path / "b", f"random:{run}", 0.4, optim__layer_decay="0.75")
    (single,) = tables(sections(run), "downstream")
    assert len(single.rows) == 2
    tuned(tmp_path / "c", f"random:{run}", 0.5)
    assert tables(sections(run), "downstream")[0].rows[0][3] == "+20.0"
    # Two pretrained recipes are two rows beside the one scratch that is what new weights need for either.
    tuned(tmp_path / "d", "first", 0.6)
    assert sorted(row[3] for row in tables(sections(run), "downstream")[0].rows) == ["+10.0", "+20.0"]


def test_of_several_labels_an_image_mean_average_precisions_are_compared(tmp_path: Path) -> None:
    run = pretrained(tmp_path / "first")
    tuned(tmp_path / "a", "first", 0.3, mean_ap=0.7)
    tuned(tmp_path / "b", f"random:{run}", 0.4, mean_ap=0.5)
    pair, single = tables(sections(run), "downstream")
    scores = ("50.0 % mAP, exact match 40.0 %", "70.0 % mAP, exact match 30.0 %")
    assert pair.rows[0][1:] == ("50.0 % mAP (45.0 to 55.0)", "70.0 % mAP (65.0 to 75.0)", "+20.0")
    assert (single.head[-1], *(row[-1] for row in single.rows)) == ("result", *scores[::-1])
    tuned(tmp_path / "c", "first", 0.3, seed=1, mean_ap=0.6)
    assert tables(sections(run), "downstream")[0].rows[0][2:] == ("65.0 ± 7.1 % mAP (2 runs)", "+20.0")


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
def test_different_recipes_are_not_compared(other: dict[str, Any], tmp_path: Path) -> None:
    run = pretrained(tmp_path / "runs" / "first")
    tuned(tmp_path / "runs" / "a", "runs/first", 0.7)
    tuned(tmp_path / "runs" / "b", f"random:{run}", 0.5, **other)
    (single,) = tables(sections(run), "downstream")
    assert not single.folded
    assert [row[0] for row in single.rows] == ["a", "b"]


@pytest.mark.parametrize("part", ["train", "test"])
def test_of_other_images_of_the_same_name_there_is_no_gain(part: str, tmp_path: Path) -> None:
    run, hashes = pretrained(tmp_path / "runs" / "first"), {"train": "x", "test": "y"}
    here, there = tuned(tmp_path / "runs" / "a", "runs/first"), tuned(tmp_path / "runs" / "b", f"random:{run}")
    (here / "inputs.json").write_text(json.dumps(hashes | {"weights": "a"}))
    (there / "inputs.json").write_text(json.dumps(hashes | {part: "other"}))
    assert len(tables(sections(run), "downstream")) == 1
    (there / "inputs.json").write_text(json.dumps(hashes | {"weights": "b"}))
    assert tables(sections(run), "downstream")[0].rows[0][3] == "+0.0"
    (there / "inputs.json").unlink()  # as in the folder of an older version
    (there / "sweep.csv").write_text("lr,held_out_top1\nbroken,0.5\n")
    assert tables(sections(run), "downstream")[0].rows[0][3] == "+0.0"


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
