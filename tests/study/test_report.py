"""Tables of a study from its data, against figures computed by hand; what a data file leaves out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.downstream.estimates import of_table
from mpp.report.features import effective_rank
from mpp.report.wording import accuracy_text
from mpp.study.record import without_folders
from mpp.study.report import write
from mpp.system.files import read_csv


def document(arms: tuple[str, ...] = ("a", "b")) -> dict[str, Any]:
    top1 = {"scratch": (0.2, 0.3), "a": (0.5, 0.4), "b": (0.25, 0.35)}
    run = {"pretrain_seed": None, "length": "9 steps", "lr": 0.1, "train_images": 40, "steps": 9, "balanced": 0.5}
    return {
        "config": {"labels": ["1%", "10%"]},
        "finetuning": [
            {**run, "side": side, "labels": labels, "seed": seed, "top1": top1[side][seed], "top5": None}
            for labels in ("10%", "1%") for seed in (0, 1) for side in ("scratch", *arms)
        ],
        "fewshot": [
            {"side": "a", "pretrain_seed": seed, "layer": -1, "pool": "mean", "depth": 4, "shots": shots,
             "accuracy": [0.1 * shots, 0.1 * shots + 0.1 * seed], "rank": 3.0}
            for seed in (0, 1) for shots in (1, 5)
        ],
        "probes": [{"side": "a", "pretrain_seed": seed, "top1": 0.4 + 0.2 * seed} for seed in (0, 1)],
        "pretraining": [{"arm": arm, "images": 1600, "steps": 100} for arm in arms],
    }  # fmt: skip


@pytest.mark.slow
def test_the_document_of_several_pretrainings(tmp_path: Path) -> None:
    write(tmp_path, document(("a",)))
    text = (tmp_path / "study.md").read_text("utf-8")
    assert "| labels | images | steps | from scratch | a | gain |" in text
    assert "| 10% | 40 | 9 | 25.0 ± 7.1 | 45.0 ± 7.1 | +20.0 ± 127.1 |" in text  # +30 and +10
    seeds = "2 fine-tuning seeds of one pretraining"
    gain = f"gain over scratch in points, ± half the width of its 95 % interval over {seeds}:"
    assert f"mean ± standard deviation over {seeds}; {gain}" in text
    assert "| a | 50.0 ± 14.1 |" in text
    draws = "2 pretrainings and 2 draws of the shots"  # which are 0.1, 0.1 and 0.1, 0.2
    assert f"Few-shot accuracy on frozen features in %, mean ± standard deviation over {draws}" in text
    assert f"| a (mean) | {accuracy_text(of_table(np.array([[0.1, 0.1], [0.1, 0.2]])))} |" in text
    assert "Pretraining: 1,600 images, 100 steps.\n" in text
    write(tmp_path, document(("a",)) | {"data": {"test_images": 1000, "test_images_seen": {"a": 12}}})
    seen = "100 steps. Its images hold 12 of the 1,000 test images, so that its figures may be too good.\n"
    assert seen in (text := (tmp_path / "study.md").read_text("utf-8"))
    assert "fewer training images" not in text
    write(tmp_path, document(("a",)) | {"data": {"classes": 3, "short_classes": {"5": 1, "25": 2}}})
    few = (
        "\nclasses that have fewer training images, of which all are taken: 1 of 3 for 5 shots, 2 of 3 for 25 shots.\n"
    )
    assert few in (tmp_path / "study.md").read_text("utf-8")
    assert not (tmp_path / "layers.png").exists()
    write(tmp_path, document())
    text = (tmp_path / "study.md").read_text("utf-8")
    assert "| 10% | 40 | a | 9 | 45.0 ± 7.1 | +20.0 ± 127.1 |" in text
    assert "Pretraining of b: 1,600 images, 100 steps." in text
    table = read_csv(tmp_path / "table.csv")
    assert [row["side"] for row in table] == ["scratch", "a", "b"] * 2
    assert table[1]["over"] == "2 fine-tuning seeds of one pretraining"


def test_of_one_seed_and_one_draw_there_is_no_spread(tmp_path: Path) -> None:
    one = document(("a",))
    one["finetuning"] = [run for run in one["finetuning"] if run["seed"] == 0]
    one["fewshot"] = [run | {"accuracy": run["accuracy"][:1]} for run in one["fewshot"] if run["pretrain_seed"] == 0]
    one["probes"] = one["probes"][:1]
    write(tmp_path, one)
    assert "±" not in (tmp_path / "study.md").read_text("utf-8")
    assert all(row["std"] == row["interval95"] == "" for row in read_csv(tmp_path / "table.csv"))
    assert all(row["std"] == "" for row in read_csv(tmp_path / "fewshot.csv"))


@pytest.mark.slow
def test_the_probe_that_held_out_images_chose_stands_beside_that_of_the_mean(tmp_path: Path) -> None:
    several = document(("a",))
    write(tmp_path, several)
    assert "| encoder | mean of the last layer |\n" in (tmp_path / "study.md").read_text("utf-8")
    for probe, top1 in zip(several["probes"], (0.5, 0.9), strict=True):
        probe["chosen"] = {"layer": -2, "pool": "quarters", "held_out": 0.6, "top1": top1}
    write(tmp_path, several)
    text = (tmp_path / "study.md").read_text("utf-8")
    assert "| encoder | mean of the last layer | layer and pooling chosen on held-out training images |" in text
    assert "| a | 50.0 ± 14.1 | 70.0 ± 28.3 |" in text


@pytest.mark.slow
def test_what_cross_validation_chose_stands_beside_the_rest(tmp_path: Path) -> None:
    several = document(("a",))
    several["fewshot"] = [
        run | {"layer": layer, "accuracy": [accuracy] * 2, "held_out": held_out}
        for run in several["fewshot"]
        for layer, accuracy, held_out in ((-1, 0.2, [0.5, 0.5]), (-2, 0.4, [0.6, 0.4]))
    ]
    write(tmp_path, several)
    text = (tmp_path / "study.md").read_text("utf-8")
    assert "| a (chosen by cross-validation on the shots) | 30.0 ± 14.1 | 30.0 ± 14.1 |" in text  # one draw each


@pytest.mark.parametrize(
    ("value", "bare"),
    [
        ("cifar10:/data/here/cifar", "cifar10:cifar"),
        ("folder:~/a b/c", "folder:c"),
        ("3 * folder:/a/b + 1 * shards:/c/x-*.tar", "3 * folder:b + 1 * shards:x-*.tar"),
        ("shards:s3://bucket/folder/a.tar", "shards:s3://bucket/folder/a.tar"),
        ("--init /a/run --data.source folder:/b/c", "--init run --data.source folder:c"),
        ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
        ("hf:owner/name", "hf:owner/name"),
        ("shards:file:///home/me/x.tar", "shards:x.tar"),
        ("folder:../../home/me/x", "folder:x"),
        ("folder:data/../../home/me/x", "folder:x"),
        ("folder:data/x", "folder:data/x"),
        ("shards:/a/x-{000..009}.tar", "shards:x-{000..009}.tar"),
        ("shards:{/a/x,/b/y}/z.tar", "shards:*z.tar"),
        ("shards:/a/{b/x,c/y}.tar", "shards:*.tar"),
    ],
)
def test_folders_are_left_out_of_the_data_file(value: str, bare: str) -> None:
    assert without_folders({"data": [value]}) == {"data": [bare]}


def test_effective_rank() -> None:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(200, 12)))[0]
    axes -= axes.mean(axis=0)
    for features in (axes * np.arange(1, 13), rng.normal(size=(20, 50)), rng.normal(size=(300, 3)) @ np.ones((3, 8))):
        values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
        share = values[values > 1e-9] / values.sum()
        assert effective_rank(features + 5) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    assert effective_rank(rng.normal(size=(300, 1)) @ np.ones((1, 8))) == pytest.approx(1)
    assert effective_rank(np.ones((4, 3))) == 0
