"""What lies beside a run: few-shot tables and studies that name it."""

import json
from pathlib import Path

import pytest

from mpp.config import to_yaml
from mpp.report.run_page.related import names, related
from mpp.report.run_page.sections import sections
from mpp.study.settings import StudyConfig
from mpp.system.files import write_csv
from tests.report.run_page.run_folders import pretrained, tables


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
    assert names(init.replace("HERE", str(tmp_path)), tmp_path / "runs" / "first") is expected


def test_fewshot_tables_that_name_the_run(tmp_path: Path) -> None:
    run = pretrained(tmp_path / "runs" / "first")
    head = ("model", "shots", "accuracy", "std", "interval95", "seeds", "l2")
    rows = [
        (f"{name} ({how})", k, accuracy, 0.01, "", 3, "")
        for name, how, accuracy in [("random:runs/first", "mean", 0.2), ("runs/first", "token, layer 3", 0.5)]
        for k in (5, 10)
    ]
    write_csv(tmp_path / "runs" / "shots" / "fewshot.csv", [head, *rows, ("resnet18 (mean)", 5, 0.9, 0.01, "", 3, "")])
    write_csv(tmp_path / "runs" / "others" / "fewshot.csv", [head, ("resnet18 (mean)", 5, 0.9, 0.01, "", 3, "")])
    write_csv(tmp_path / "runs" / "broken" / "fewshot.csv", [head, ("runs/first (mean)", "x", "y", "", "", "", "")])
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
    told = {
        "pretraining": [{"arm": "other", "seed": 0}, {"arm": "4x4", "seed": 1}] if own else [],
        "finetuning": [
            {"side": side, "labels": "10%", "seed": seed, "pretrain_seed": start, "top1": top1 + 0.1 * seed}
            for side, top1, start in (("scratch", 0.4, None), ("other", 0.9, mine), (arm, 0.45, mine))
            for seed in (0, 1)
        ] + [{"side": arm, "labels": "10%", "seed": 2, "pretrain_seed": 7, "top1": 0.99}],
        "fewshot": [
            {"side": side, "pretrain_seed": start, "layer": layer, "pool": "mean", "shots": 5,
             "accuracy": [accuracy, accuracy + 0.02]}
            for side, start, layer, accuracy in (
                ("random", None, -1, 0.2), (arm, mine, -1, 0.5), (arm, 7, -1, 0.99), (arm, mine, -2, 0.6),
                ("other", mine, -1, 0.9),
            )
        ],
    }  # fmt: skip
    (study / "study.json").write_text(json.dumps(told))
    table, few = tables(sections(run), "downstream")
    assert table.head == ("labels", "from scratch", arm, "gain in points")
    assert table.rows == (("10%", "45.0 ± 7.1 %", "50.0 ± 7.1 %", "+5.0 ± 0.0"),)
    gained = (
        "; the gain of the same seeds, ± half the width of its 95 % interval over 2 fine-tuning seeds of one "
        "pretraining"
    )
    assert table.caption.startswith("Study study: ")
    assert table.caption.endswith(gained)
    assert few.caption.endswith("mean ± standard deviation over 2 draws of the shots")
    rows = (
        ("random (mean)", "21.0 ± 1.4 %"),
        (f"{arm} (mean, layer -2)", "61.0 ± 1.4 %"),
        (f"{arm} (mean)", "51.0 ± 1.4 %"),
    )
    assert few.rows == rows
    (study / "study.json").write_text(json.dumps({**told, "pretraining": []}))
    (study / "config.yaml").write_text(to_yaml(StudyConfig(init="" if own else str(tmp_path / "another"))))
    assert related(run) is None
