"""Scores, against scikit-learn and SciPy, and the files they are written to."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, precision_score, top_k_accuracy_score

from mpp.data.sources.files import FileSource
from mpp.data.sources.in_memory import ListSource
from mpp.downstream.scoring import Scores, score
from tests.downstream.tuned import read_csv


def made(n: int, k: int, foreign: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Scores]:
    """Logits that are right more often than not, their labels and scores."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k + foreign, n)
    logits = rng.normal(size=(n, k)).astype(np.float32)
    known = np.flatnonzero(labels < k)
    logits[known, labels[known]] += 1.5
    names = [f"class {c}" for c in range(k + foreign)]
    return logits, labels, score(logits, labels, np.arange(n) * 3, names[:k], names[k:])


@pytest.mark.parametrize(("n", "k", "foreign"), [(500, 10, 0), (9000, 30, 3), (50, 5, 1), (20, 2, 0), (1, 6, 0)])
def test_against_scikit_learn(n: int, k: int, foreign: int, tmp_path: Path) -> None:
    logits, labels, scores = made(n, k, foreign)
    best = logits.argmax(axis=1)
    everything = np.arange(k + foreign)
    padded = np.pad(logits, ((0, 0), (0, foreign)), constant_values=-1e9)  # what cannot be predicted comes last
    assert scores.top1 == pytest.approx((best == labels).mean(), abs=1e-12)
    if k > 5:
        want = top_k_accuracy_score(labels, padded, k=5, labels=everything)
        assert scores.top5 == pytest.approx(want, abs=1e-12)
    else:
        assert scores.top5 is None
    want = confusion_matrix(labels, best, labels=everything)[:, :k]
    assert scores.confusion.tolist() == want.tolist()
    assert scores.confusion.dtype == np.int64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes without test images
        assert scores.balanced == pytest.approx(balanced_accuracy_score(labels, best), abs=1e-12)
        precision = precision_score(labels, best, average=None, labels=everything)
    scores.write(tmp_path, ListSource(np.zeros((3 * n, 1, 1), np.uint8)), labels)
    rows, images = read_csv(tmp_path / "classes.csv"), read_csv(tmp_path / "predictions.csv")
    np.testing.assert_allclose([float(row["precision"] or 0) for row in rows], precision, atol=1e-6)
    assert [int(row["train_images"]) for row in rows] == np.bincount(labels, minlength=k + foreign).tolist()
    assert np.mean([int(row["correct"]) for row in images]) == pytest.approx(scores.top1)
    assert [row["path"] for row in images] == [f"image {3 * i} of list" for i in range(n)]
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert scores.top.tolist() == order.tolist()
    probability = softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(scores.probability, np.take_along_axis(probability, order, axis=1), rtol=1e-12)


def test_equals_go_to_the_lower_class_and_large_logits_stay_finite() -> None:
    scores = score(np.array([[0.0, 1e4, 1e4], [0, 0, 0]], np.float16), np.array([1, 2]), np.arange(2), tuple("abc"))
    assert scores.top.tolist() == [[1, 2, 0], [0, 1, 2]]
    np.testing.assert_allclose(scores.probability, [[0.5, 0.5, 0.0], [1 / 3] * 3])


def by_hand() -> Scores:
    """Four classes, the last foreign, the third without test images."""
    labels, best = np.array([0, 0, 0, 0, 1, 1, 3]), [0, 0, 0, 1, 0, 0, 2]
    return score(np.eye(3)[best], labels, np.arange(7), ("cat, big", "dog\n\x1b[1m", "c" * 50), ("yak",))


def test_table_by_hand() -> None:
    scores = by_hand()
    assert scores.table().splitlines() == [
        "class        images  accuracy  most often taken for",
        "dog \\x1b[1m       2      0.0%  cat, big (2)",
        "yak               1      0.0%  ccccccccccccccccccccccccccccc... (1)",
        "cat, big          4     75.0%  dog \\x1b[1m (1)",
        "1 class without test images",
    ]
    assert scores.table(limit=1).splitlines()[2:] == ["... and 2 more in classes.csv", "1 class without test images"]
    perfect = score(np.eye(2), np.arange(2), np.arange(2), ("a", "b")).table().splitlines()
    assert perfect == [
        "class  images  accuracy  most often taken for",
        "a           1    100.0%",
        "b           1    100.0%",
    ]


def test_files_by_hand(tmp_path: Path) -> None:
    names = ["a,b.png", 'q"\n.png', "\udcff.png", "4.png", "5.png", "6.png", "7.png"]
    source = FileSource("folder:x", Path("/x"), names)
    by_hand().write(tmp_path / "new", source, np.array([0, 0, -1, 1, 1, 1, 2]))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["classes.csv", "predictions.csv"]
    rows = read_csv(tmp_path / "new" / "classes.csv")
    assert [list(row.values()) for row in rows] == [
        ["cat, big", "2", "4", "3", "0.750000", "0.600000", "dog\n\x1b[1m"],
        ["dog\n\x1b[1m", "3", "2", "0", "0.000000", "0.000000", "cat, big"],
        ["c" * 50, "1", "0", "0", "", "0.000000", ""],
        ["yak", "0", "1", "0", "0.000000", "", "c" * 50],
    ]
    assert list(rows[0]) == [
        *("class", "train_images", "test_images", "correct", "accuracy", "precision", "most_confused_with")
    ]
    rows = read_csv(tmp_path / "new" / "predictions.csv")
    assert [row["path"] for row in rows] == [f"/x/{name}" for name in names]
    assert [row["index"] for row in rows] == list("0123456")
    assert [row["correct"] for row in rows] == list("1110000")
    last = rows[-1]
    assert (last["label"], last["predicted"]) == ("yak", "c" * 50)
    assert float(last["probability"]) == pytest.approx(np.e / (np.e + 2), abs=1e-6)
    assert json.loads(last["top5"]) == ["c" * 50, "cat, big", "dog\n\x1b[1m"]
