"""Several labels an image, or none: from the CSV to predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torch import nn

from mpp.cli import fewshot, finetune, predict, pretrain, probe, shard, study
from mpp.data.sources.base import Source, SourceError, Subset
from mpp.data.sources.in_memory import ListSource
from mpp.data.sources.opening import open_source
from mpp.downstream import ridge
from mpp.downstream.fewshot import Fewshot, choose_l2
from mpp.downstream.labelled import hold_out, open_labelled, take_fraction
from mpp.downstream.logistic import fit_linear
from mpp.downstream.multi_label import (
    MultiLabelScores,
    average_precisions,
    mean_average_precision,
    precision_by_image,
    read_precision,
    score,
)
from mpp.downstream.probe import sweep_linear
from mpp.downstream.tuning import ClassifierLoss
from mpp.weights.base import Weights
from tests.downstream.tuned import read_csv

NAMES = ("fluid", "mass", "nodule")


def write(folder: Path, images: int = 48, columns: bool = False, extra: str = "", seed: int = 0) -> str:
    """Grey images of which each class whitens a stripe, three of a patient, and a CSV of names or of findings."""
    rng = np.random.default_rng(seed)
    (folder / "i").mkdir(parents=True, exist_ok=True)
    rows = [f"path,{'age,' + ','.join(NAMES) if columns else 'Finding Labels'}"]
    for number in range(images):
        has = rng.random(3) < (0.5, 0.4, 0.3)
        pixels = rng.integers(90, 140, (32, 32, 3), dtype=np.uint8)
        for stripe in np.flatnonzero(has):
            pixels[4 + 9 * stripe : 10 + 9 * stripe] = 255
        name = f"i/p{number // 3}_{number}.png"
        Image.fromarray(pixels).save(folder / name)
        named = "|".join(name for name, one in zip(NAMES, has, strict=True) if one)
        cells = f"{number}," + ",".join("1.0" if one else ("-1.0", "", "0")[number % 3] for one in has)
        rows.append(f"{name},{cells if columns else named}")
    (folder / "a.csv").write_text("\n".join([*rows, extra]) + "\n", "utf-8")
    return f"csv:{folder / 'a.csv'}"


def test_average_precision_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random((60, 7)) < [0.5, 0.1, 0.02, 0.9, 0.3, 0, 1]).astype(np.uint8)
    for scores in (rng.normal(size=(60, 7)), rng.integers(0, 4, (60, 7))):  # ties, too
        ours = average_precisions(scores, truth)
        assert np.isnan(ours[5])
        for number in (0, 1, 3, 4, 6):
            assert ours[number] == pytest.approx(average_precision_score(truth[:, number], scores[:, number]))
        assert mean_average_precision(scores, truth) == pytest.approx(np.nanmean(ours))
    assert mean_average_precision(scores, np.zeros_like(truth)) == 0
    assert average_precisions(np.full((3, 1), -np.inf), np.array([[1], [0], [0]], np.uint8)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("ties", [False, True])
def test_its_spread_over_images_is_the_jackknife_s(ties: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    truth = (rng.random((30, 4)) < [0.5, 0.1, 0.9, 0]).astype(np.uint8)
    scores = rng.integers(1, 6, (30, 4)) / 8 if ties else rng.random((30, 4)).round(6)
    values = precision_by_image(scores, truth)
    left_out = [mean_average_precision(np.delete(scores, i, 0), np.delete(truth, i, 0)) for i in range(30)]
    assert values == pytest.approx(30 * mean_average_precision(scores, truth) - 29 * np.array(left_out))
    found = MultiLabelScores(("index", "a", "b", "c"), np.arange(30), truth, scores)
    half = stats.t.ppf(0.975, 29) * stats.sem(values)
    assert found.interval == pytest.approx((values.mean() - half, min(values.mean() + half, 1)))
    found.write(tmp_path, ListSource([b""] * 30), truth)
    assert read_precision(tmp_path / "predictions.csv") == pytest.approx({str(i): values[i] for i in range(30)})
    assert read_precision(tmp_path / "classes.csv") == read_precision(tmp_path / "none.csv") == {}
    assert precision_by_image(np.eye(4)[:, :1], np.eye(4, dtype=np.uint8)[:, :1]) == pytest.approx(np.ones(4))


def test_nine_in_ten_intervals_hold_the_truth_and_guesses_are_not_better_than_chance() -> None:
    """Of 50 classifiers that know something, and of 50 that know nothing; few images skew an average precision."""
    rng, inside, better = np.random.default_rng(0), 0, 0
    for known in (1.5, 0.0):
        many = (rng.random((20_000, 1)) < 0.2).astype(np.uint8)
        whole = mean_average_precision(rng.normal(size=many.shape) + known * many, many)
        for _ in range(50):
            truth = (rng.random((100, 3)) < 0.2).astype(np.uint8)
            scores = rng.normal(size=truth.shape) + known * truth
            found = score(scores, truth, np.arange(100), "abc")
            if known:
                inside += found.interval[0] <= whole <= found.interval[1]
            else:
                better += found.interval[0] > found.chance
    assert 42 <= inside <= 49
    assert better <= 3


@pytest.mark.parametrize("columns", [False, True])
def test_names_in_a_cell_and_columns_of_findings_say_the_same(tmp_path: Path, columns: bool) -> None:
    source = open_source(write(tmp_path, columns=columns))
    sets, names = source.label_sets(), open_source(write(tmp_path / "names")).label_sets()
    assert sets is not None
    assert names is not None
    assert (source.classes, source.labels()) == (NAMES, None)  # pretraining sees no labels
    np.testing.assert_array_equal(sets.table[sets.number], names.table[names.number])
    assert "several labels an image, none in " in source.describe()
    some = Subset(source, [3, 1]).label_sets()
    assert some is not None
    assert some.number.tolist() == sets.number[[3, 1]].tolist()
    assert source.fingerprint() != source.fingerprint(labelled=False)


def test_rows_without_a_known_label_are_left_out_and_empty_ones_are_not(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, extra="i/p0_0.png,-1\ni/p0_1.png,\ni/p0_2.png,mass; nodule;"))
    sets = source.label_sets()
    assert sets is not None
    assert sets.number[-3] == -1
    assert sets.table[sets.number[-2:]].tolist() == [[0, 0, 0], [0, 1, 1]]


def test_one_column_of_findings_and_other_columns_are_no_labels(tmp_path: Path) -> None:
    spec = write(tmp_path)
    for head, row in (("path,sick", ",1"), ("path,age,weight", ",50,1"), ("path,sick,empty", ",1,")):
        (tmp_path / "a.csv").write_text(f"{head}\ni/p0_0.png{row}\ni/p0_1.png{row}\n", "utf-8")
        source = open_source(spec)
        assert (source.labels(), source.label_sets(), source.classes) == (None, None, None)


def test_every_split_has_each_class_in_its_share(tmp_path: Path) -> None:
    labelled = open_labelled(write(tmp_path, 200), group=r"(p\d+)_")
    whole = labelled.sizes(labelled.train_labels) + labelled.sizes(labelled.test_labels)
    assert np.abs(labelled.sizes(labelled.test_labels) / whole - 0.2).max() < 0.06
    groups = labelled.train_groups
    assert groups is not None
    part = take_fraction(labelled, "30%", 0)
    for split in (labelled, hold_out(part, 0.2, 0)):
        assert not set(groups[split.train_indices]) & set(groups[split.test_indices])
        assert split.sizes(split.train_labels).min() > 0
    assert set(part.train_indices) < set(take_fraction(labelled, "60%", 0).train_indices)


def test_a_test_source_has_the_classes_of_the_training_images(tmp_path: Path) -> None:
    spec, other = write(tmp_path / "train"), tmp_path / "test" / "a.csv"
    write(tmp_path / "test", 4, seed=1)
    other.write_text("path,labels\ni/p0_0.png,nodule;new\ni/p0_1.png,\ni/p0_2.png,mass\n", "utf-8")
    labelled = open_labelled(spec, f"csv:{other}")
    assert labelled.truth(labelled.test_labels).tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert any("has no test images: fluid" in note for note in labelled.notes)
    other.write_text("path,labels\ni/p0_0.png,nodule\ni/p0_1.png,mass\n", "utf-8")
    labelled = open_labelled(spec, f"csv:{other}")
    assert labelled.truth(labelled.test_labels).tolist() == [[0, 0, 1], [0, 1, 0]]
    other.write_text("path\ni/p0_0.png\n", "utf-8")
    with pytest.raises(SourceError, match="has no labels"):
        open_labelled(spec, f"csv:{other}")
    other.write_text("path,label\ni/p0_0.png,mass\ni/p0_1.png,nodule\n", "utf-8")
    with pytest.raises(SourceError, match="several labels an image, and the training images have one each"):
        open_labelled(f"csv:{other}", spec)


def problem() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(150, 12))
    return features, (features @ rng.normal(size=(12, 4)) + rng.normal(size=(150, 4)) > 1).astype(np.uint8)


def test_the_linear_probe_is_logistic_regression_of_each_class_against_the_rest() -> None:
    features, truth = problem()
    ours = fit_linear(features, truth, 4, 0.01)
    standard = (features - features.mean(axis=0)) / (features.std(axis=0) + ridge.STD_OFFSET)
    for number in range(4):
        theirs = LogisticRegression(C=1 / (150 * 0.01), tol=1e-8, max_iter=1000).fit(standard, truth[:, number])
        np.testing.assert_allclose(ours.logits(features)[:, number], theirs.decision_function(standard), atol=2e-4)
    result = sweep_linear((features, truth), (features, truth), 4)
    assert result.top1 == pytest.approx(mean_average_precision(ours.logits(features), truth), abs=0.05)
    assert (result.multi_label, result.top5) == (True, None)


def test_least_squares_of_sets_are_those_of_each_class() -> None:
    features, truth = problem()
    (together,) = ridge.fit(features, truth, 4).logits(features, [3.0])
    for number in range(4):
        (alone,) = ridge.fit(features, truth[:, number].astype(np.int64), 2).logits(features, [3.0])
        np.testing.assert_allclose(together[:, number], alone[:, 1], atol=1e-8)
    chosen = choose_l2(features, truth, 4)
    assert chosen is not None
    assert 0.6 < chosen[1] < 1


def test_shots_have_each_class_and_none(tmp_path: Path) -> None:
    labelled = open_labelled(write(tmp_path, 150))
    task = Fewshot(labelled, (1, 5), (0, 1))
    few, more = task.draws[0]
    assert set(few) <= set(more)
    truth = labelled.truth(labelled.train_labels[more])
    assert truth.sum(axis=0).min() >= 5
    assert (truth.sum(axis=1) == 0).sum() >= 5

    def extract(source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels = np.maximum(labelled.train_labels, labelled.test_labels)[indices]
        return labelled.truth(labels).astype(np.float64), indices

    result = task.run(extract)
    assert result.accuracy[:, 1].tolist() == [1.0, 1.0]
    assert "mAP" in result.table()


def test_the_loss_is_binary_cross_entropy_of_smoothed_sets() -> None:
    logits = torch.randn(4, 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(logits[0])
    loss = ClassifierLoss(model, Weights("vit_tiny_patch16_224", {}, None, (2, 2)), 0.1, multi_label=True)
    target = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.uint8)
    found, figures = loss(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), target)
    p, y = logits[0].sigmoid(), target * 0.9 + 0.05
    assert found.item() == pytest.approx(-(y * p.log() + (1 - y) * (1 - p).log()).mean().item(), rel=1e-5)
    assert set(figures) == {"loss"}


def test_scores_say_how_many_sets_are_right(tmp_path: Path) -> None:
    logits = np.array([[5.0, -5], [5, 5], [-5, -5], [5, -5]])
    truth = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], dtype=np.uint8)
    scores = score(logits, truth, np.arange(4), ["a", "b"])
    assert (scores.exact, scores.recall) == (0.75, 0.75)
    assert scores.mean_ap == pytest.approx(average_precision_score(truth, logits))
    assert scores.table().splitlines()[1].split() == ["a", "2", "66.7%", "50.0%"]


SMALL = {
    "init": "none", "model.name": "vit_tiny_patch16_224", "model.img-size": "32", "model.patch-size": "8",
    "model.embed-dim": "48", "model.depth": "1", "model.num-heads": "2", "data.workers": "0", "train.batch-size": "16",
    "train.length": "10 steps", "train.device": "cpu", "optim.name": "adamw", "schedule.warmup": "0 steps",
    "log.every": "5 steps", "loss.smoothing": "0.02", "loss.mixup": "0.1", "group": r"(p\d+)_",
}  # fmt: skip


@pytest.mark.slow
def test_from_a_csv_to_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, run = write(tmp_path / "data"), tmp_path / "run"
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    assert finetune(["--data", spec, "--run-dir", str(run), *flags, "--optim.lr", "0.01", "0.001"]) == 0
    printed = capsys.readouterr().out
    assert "mAP " in printed
    assert "than giving every image each class's share of the images, whose mean average precision is" in printed
    result = json.loads((run / "result.json").read_text("utf-8"))
    assert 0 <= result["mean_ap_interval"][0] < result["mean_ap"] <= result["mean_ap_interval"][1] <= 1
    (against_share,) = json.loads((run / "verdict.json").read_text("utf-8"))["comparisons"]
    chance = np.mean([float(row["chance"]) for row in read_csv(run / "classes.csv")])
    assert against_share["difference"] == pytest.approx(result["mean_ap"] - chance, abs=1e-5)
    assert (run / "sweep.csv").read_text("utf-8").startswith("lr,held_out_mean_ap,")
    assert not (run / "confusion.png").exists()
    assert "giving every image each class&#39;s share" in (run / "report.html").read_text("utf-8")
    precisions = [float(row["average_precision"]) for row in read_csv(run / "classes.csv")]
    assert np.mean(precisions) == pytest.approx(result["mean_ap"], abs=1e-5)
    out = tmp_path / "out.csv"
    assert predict(["--init", str(run), str(tmp_path / "data" / "i"), "--out", str(out), "--device", "cpu"]) == 0
    found = {Path(row["path"]).name: row for row in read_csv(out)}
    assert list(found["p0_0.png"]) == ["path", *NAMES]
    for row in read_csv(run / "predictions.csv"):
        same = found[Path(row["path"]).name]
        assert float(row["probability of mass"]) == pytest.approx(float(same["mass"]), abs=2e-4)
    flags = ["--device", "cpu", "--workers", "0", "--pool", "mean", "--out", str(tmp_path / "f")]
    for tool in (fewshot, probe):
        assert tool(["--init", str(run), "--data", spec, *flags]) == 0
        assert "mAP" in capsys.readouterr().out
    assert (tmp_path / "f" / "fewshot.csv").read_text("utf-8").startswith("model,layer,pool,shots,mean_ap,")
    for tool, more, message in (
        (probe, ["--kind", "knn"], "--kind knn votes for one label an image"),
        (study, ["--run-dir", str(tmp_path / "s")], "has several labels an image, and a study compares accuracies"),
    ):
        assert tool(["--init", str(run), "--data", spec, *more]) == 2
        assert message in capsys.readouterr().err
    assert pretrain(["--data", spec, "--fewshot.data", spec, "--run-dir", str(tmp_path / "s")]) == 2
    assert "has several labels an image, and accuracy takes one" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_shard_leaves_several_labels_behind_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(["--data", write(tmp_path, 6), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    out, err = capsys.readouterr()
    assert "a shard holds one label an image" in err
    assert "have no label" not in out
    assert open_source(f"shards:{tmp_path / 'out'}/*.tar").classes is None
