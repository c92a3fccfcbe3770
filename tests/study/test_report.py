"""Tables of a study from its data, against figures computed by hand; what a data file must not tell."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.inspection.features import effective_rank
from mpp.run_page.reading import read_csv
from mpp.study.record import without_folders
from mpp.study.report import fewshot, table, write


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


def test_gains_are_paired_by_the_seed() -> None:
    rows = {(row.labels, row.side): row for row in table(document())}
    assert [labels for labels, _ in rows] == ["1%"] * 3 + ["10%"] * 3
    a, b, scratch = (rows["10%", side] for side in ("a", "b", "scratch"))
    assert (scratch.top1, scratch.std) == (pytest.approx(0.25), pytest.approx(0.1 / np.sqrt(2)))
    assert (scratch.gain, scratch.gain_std) == (None, None)
    assert (a.gain, a.gain_std) == (pytest.approx(0.2), pytest.approx(0.2 / np.sqrt(2)))
    assert (b.gain, b.gain_std) == (pytest.approx(0.05), pytest.approx(0, abs=1e-9))
    one = document()
    one["finetuning"] = [run for run in one["finetuning"] if run["seed"] == 1 or run["side"] == "a"]
    assert {row.side: row.gain for row in table(one)}["a"] == pytest.approx(0.1)  # of the seed that both have


def test_few_shot_is_over_the_draws_of_all_pretrainings() -> None:
    ((readout, result),) = fewshot(document()).items()
    assert readout.name == "a (mean)"
    assert result.shots == (1, 5)
    np.testing.assert_allclose(result.accuracy, [[0.1, 0.5], [0.1, 0.5], [0.1, 0.5], [0.2, 0.6]])


def test_one_pretraining_stands_beside_scratch_several_below(tmp_path: Path) -> None:
    write(tmp_path, document(("a",)))
    text = (tmp_path / "study.md").read_text()
    assert "| labels | images | steps | from scratch | a | gain |" in text
    assert "| 10% | 40 | 9 | 25.0 ± 7.1 | 45.0 ± 7.1 | +20.0 |" in text
    assert "| a | 50.0 ± 14.1 |" in text
    assert "Pretraining: 1,600 images, 100 steps." in text
    assert not (tmp_path / "layers.png").exists()
    write(tmp_path, document())
    text = (tmp_path / "study.md").read_text()
    assert "| 10% | 40 | a | 9 | 45.0 ± 7.1 | +20.0 ± 14.1 |" in text
    assert "Pretraining of b: 1,600 images, 100 steps." in text
    assert [row["side"] for row in read_csv(tmp_path / "table.csv")] == ["scratch", "a", "b"] * 2


@pytest.mark.parametrize(
    ("told", "bare"),
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
def test_folders_are_left_out_of_what_is_told(told: str, bare: str) -> None:
    assert without_folders({"data": [told]}) == {"data": [bare]}


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
