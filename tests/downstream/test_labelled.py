"""Which images are learned from and which are tested, and what is said about it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mpp.data.sources.base import SourceError
from mpp.data.sources.in_memory import ListSource
from mpp.downstream.labelled import Labelled, hold_out, label, open_labelled, parse_share, take_fraction

LABELS = st.lists(st.integers(-1, 5), max_size=60).map(lambda values: np.array(values, dtype=np.int64))


def source(labels: list[int] | np.ndarray | None, classes: str | None = None, name: str = "some") -> ListSource:
    """Labelled images that nobody looks at."""
    images = np.zeros((0 if labels is None else len(labels), 1, 1), dtype=np.uint8)
    return ListSource(images, labels, None if classes is None else tuple(classes.split()), name)


def write(folder: Path, *names: str) -> str:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)
    return f"folder:{folder}"


def sizes(labels: np.ndarray, classes: int) -> list[int]:
    return np.bincount(labels[labels >= 0], minlength=classes).tolist()


def test_a_folder_with_a_test_split(tmp_path: Path) -> None:
    spec = write(tmp_path, *(f"train/{c}/{i}.png" for c in "abc" for i in range(2)), "test/zebra/1.png", "val/a/1.png")
    spec = write(tmp_path, "test/b/1.png", "test/b/2.png")
    opened = open_labelled(spec)
    assert opened.classes == ("a", "b", "c")
    assert opened.foreign == ("zebra",)
    assert opened.train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert opened.test_labels.tolist() == [1, 1, 3]
    assert opened.train_indices.tolist() == list(range(6))
    assert opened.test_indices.tolist() == [0, 1, 2]
    assert opened.notes == (
        "1 class has no training images, so that 1 test image can only count as wrong: zebra",
        "2 classes have no test images: a, c",
    )


def test_a_test_source_of_its_own(tmp_path: Path) -> None:
    data = write(tmp_path / "here", "train/a/1.png", "train/b/1.png", "test/a/1.png")
    whole = write(tmp_path / "there", "b/1.png", "b/2.png", "a/1.png")
    opened = open_labelled(data, whole)
    assert [opened.train.name, len(opened.train), opened.test.name, len(opened.test)] == [data, 2, whole, 3]
    assert opened.test_labels.tolist() == [0, 1, 1]
    assert opened.notes == ()
    opened = open_labelled(whole, data)  # the test split of a test source that has one
    assert opened.test_labels.tolist() == [0]
    assert "imbalance: 1 to 2 training images a class (median 2)" in opened.notes


def test_a_fifth_is_held_out_where_there_is_no_test_split(tmp_path: Path) -> None:
    spec = write(tmp_path, *(f"a/{i}.png" for i in range(10)), *(f"b/{i}.png" for i in range(3)), "c/0.png")
    for i in range(100):
        (tmp_path / f"a/{i}.heic").touch()
    opened = open_labelled(spec)
    assert opened.test is opened.train
    assert sizes(opened.train_labels, 3) == [8, 2, 1]
    assert sizes(opened.test_labels, 3) == [2, 1, 0]
    assert not set(opened.train_indices) & set(opened.test_indices)
    assert opened.notes[0].startswith("100 pictures ignored, such as 0.heic: ")
    assert opened.notes[1:] == (
        f"{spec} has no test split of its own: a fifth of it, 3 images, is held out",
        "1 class has no test images: c",
        "imbalance: 1 to 8 training images a class (median 2)",
    )


@given(counts=st.lists(st.integers(0, 30), min_size=2, max_size=6).filter(lambda c: sum(n > 1 for n in c) > 1))
def test_the_fifth_is_the_one_it_always_was(counts: list[int]) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    opened = label(source(labels, "a b c d e f"))
    rng, held = np.random.default_rng(1729), []
    for c in range(6):  # how few-shot evaluations have held out test images since the first
        members = np.flatnonzero(labels == c)
        held += rng.permutation(members)[: max(round(len(members) / 5), 1) if len(members) > 1 else 0].tolist()
    assert opened.test_indices.tolist() == sorted(held)
    assert opened.train_indices.tolist() == sorted(set(range(len(labels))) - set(held))


def test_images_without_a_label_are_left_out() -> None:
    opened = label(source([0, -1, 1, -1], "a b", "pool"), source([1, 0, -1], "a b", "held"))
    assert opened.train_indices.tolist() == [0, 2]
    assert opened.test_indices.tolist() == [0, 1]
    assert opened.notes == (
        "2 images of pool without a label left out",
        "1 image of held without a label left out",
    )


def test_classes_are_matched_by_name() -> None:
    opened = label(source([0, 1, 2], "a b c"), source([0, 1, 2, 3, 0, -1], "c x a y nobody", "held"))
    assert opened.foreign == ("x", "y")  # nobody has no image
    assert opened.test_labels.tolist() == [2, 3, 0, 4, 2, -1]
    # Two classes of one name, as ImageNet has two cranes, stay two.
    both = source([0, 1, 2], "crane dog crane"), source([0, 1, 2], "crane dog crane", "held")
    assert label(*both).test_labels.tolist() == [0, 1, 2]
    assert label(both[0], source([0, 1, 2], "dog crane crane", "held")).test_labels.tolist() == [1, 0, 2]


def test_classes_without_names_are_numbers() -> None:
    opened = label(source([0, 1, 2, 3]), source([2, 5, 0], None, "held"))
    assert opened.classes == ("0", "1", "2", "3")
    assert opened.foreign == ("5",)
    assert opened.test_labels.tolist() == [2, 4, 0]


def test_a_class_that_has_a_name_but_no_training_image() -> None:
    opened = label(source([0, 0, 2], "a b c"), source([0, 1, 1, 2], "a b c", "held"))
    assert opened.foreign == ()
    assert opened.notes == (
        "1 class has no training images, so that 2 test images can only count as wrong: b",
        "imbalance: 1 to 2 training images a class (median 2)",
    )


def test_only_five_classes_are_named_and_each_on_the_same_line() -> None:
    classes = ("a", "b", "c\nd", *"efghi")
    notes = label(ListSource(np.zeros((8, 1, 1)), range(8), classes), source([0], "a", "held")).notes
    assert notes == ("7 classes have no test images: b, c d, e, f, g, ...",)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (source(None), None, r"some has no labels \(0 images, unlabelled\): give e.g. a folder of one sub-folder per"),
        (source([-1, -1], "a b"), None, r"some has no labels"),
        (source([1, 1, 1], "a b"), None, r"some has labelled images of one class alone, b: there must be two"),
        (source([0, 1], "a b"), None, r"no class of some has two images, one to hold out: name a source of test"),
        (source([0, 1], "a b"), source(None, name="held"), r"held has no labels"),
        (source([0, 1], "a b"), source([0, 1], "c d", "held"), r"of held are none of those of some: c, d against a, b"),
        (source([0, 1], "a b"), source([0], "c"), r"the classes of the test split of some are none of"),
        (source([0, 1], "a b c"), source([2], "a b c", "held"), r"the classes of held are none of .* against a, b"),
    ],
)
def test_what_cannot_be_used_is_one_line(train: ListSource, test: ListSource | None, message: str) -> None:
    with pytest.raises(SourceError, match=f"^[^\n]*{message}[^\n]*$"):
        label(train, test)


def test_a_source_of_ones_own_is_checked_too() -> None:
    train = source([0, 2], "a b c")
    train.classes = ("a", "b")
    with pytest.raises(SourceError, match=r"^some: there is a label 2, but 2 classes; check the labels$"):
        label(train)


def test_training_images_are_no_test_images(tmp_path: Path) -> None:
    spec = write(tmp_path, "a/1.png", "b/1.png")
    with pytest.raises(SourceError, match=r"is named for training and for testing, but has no test split of its own"):
        open_labelled(spec, spec)
    with pytest.raises(SourceError, match=r"/ holds the very images of folder:.*: name other images for the test"):
        open_labelled(spec, f"{spec}/")
    (tmp_path.parent / f"{tmp_path.name}-link").symlink_to(tmp_path)
    with pytest.raises(SourceError, match=r"-link holds the very images of folder:.*: name other images for the test"):
        open_labelled(spec, f"{spec}-link")
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 2, 2, 3), np.uint8), labels=np.arange(4) % 2)
    with pytest.raises(SourceError, match=r"a\.npz holds the very images of array:.*: name other images for the test"):
        open_labelled(f"array:{tmp_path}/a.npz", f"array:{tmp_path}/../{tmp_path.name}/a.npz")


def test_demo() -> None:
    opened = open_labelled("demo")
    assert len(opened.classes) == 9
    assert len(opened.train_indices) + len(opened.test_indices) == 3778
    assert [note.partition(":")[0] for note in opened.notes] == ["imbalance"]
    assert open_labelled("demo", "demo").test_labels.tolist() == opened.test_labels.tolist()


def pool_of(labels: np.ndarray) -> Labelled:
    pool = source(labels, "a b c d e f", "pool")
    return Labelled(pool, source([0], "a", "held"), pool.classes or (), labels, np.array([0]))


@given(labels=LABELS, shares=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted), seed=st.integers(0, 99))
def test_fractions_are_stratified_and_nested(labels: np.ndarray, shares: list[float], seed: int) -> None:
    few, many = (take_fraction(pool_of(labels), share, seed).train_labels for share in shares)
    for taken, share in zip((few, many), shares, strict=True):
        want = [max(round(share * n), 1) if n else 0 for n in sizes(labels, 6)]
        assert sizes(taken, 6) == want
        assert taken.dtype == np.int64
        assert ((taken == labels) | (taken == -1)).all()
    assert set(np.flatnonzero(few >= 0)) <= set(np.flatnonzero(many >= 0))
    np.testing.assert_array_equal(take_fraction(pool_of(labels), shares[0], seed).train_labels, few)
    np.testing.assert_array_equal(take_fraction(pool_of(labels), "100%", seed).train_labels, labels)


@pytest.mark.parametrize("seed", [0, 7])
def test_draws_are_those_they_always_were(seed: int) -> None:
    labels = np.arange(40) % 3
    for kind, indices in (
        (1, take_fraction(pool_of(labels), "30%", seed).train_indices),
        (2, hold_out(pool_of(labels), 0.3, seed).test_indices),
    ):
        rng = np.random.default_rng([seed, kind])
        members = [rng.permutation(np.flatnonzero(labels == c)) for c in range(3)]
        assert indices.tolist() == sorted(np.concatenate([of[: round(0.3 * len(of))] for of in members]).tolist())


@given(labels=LABELS, share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_settings_are_chosen_on_training_images(labels: np.ndarray, share: float, seed: int) -> None:
    opened = pool_of(labels)
    counts = np.array(sizes(labels, 6))
    if counts.max() < 2:
        with pytest.raises(SourceError, match=r"no class of pool has two training images"):
            hold_out(opened, share, seed)
        return
    choosing = hold_out(opened, share, seed)
    assert choosing.train is choosing.test is opened.train
    assert not set(choosing.train_indices) & set(choosing.test_indices)
    assert sorted([*choosing.train_indices, *choosing.test_indices]) == opened.train_indices.tolist()
    held = np.array(sizes(choosing.test_labels, 6))
    assert held.tolist() == [min(max(round(n * share), 1), n - 1) if n else 0 for n in counts]
    tested = choosing.test_indices
    np.testing.assert_array_equal(choosing.test_labels[tested], labels[tested])
    assert hold_out(opened, share, seed).test_indices.tolist() == tested.tolist()
    number = f"{len(tested)} of {len(opened.train_indices)}"
    assert choosing.notes[0] == f"{number} training images are held out to choose settings by"


def test_the_test_images_of_one_source_stay_out_of_the_choice() -> None:
    opened = label(source(np.repeat([0, 1], 50), "a b"))
    choosing = hold_out(opened, 0.25, seed=3)
    assert sizes(choosing.test_labels, 2) == [10, 10]
    assert not set(opened.test_indices) & {*choosing.train_indices, *choosing.test_indices}
    assert not set(opened.test_indices) & set(take_fraction(opened, "10%", seed=3).train_indices)
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            hold_out(opened, share, seed=0)


def test_shares() -> None:
    assert parse_share("1%") == parse_share("0.01") == parse_share(" 1 % ") == 0.01
    assert parse_share("100%") == parse_share("1") == 1.0
    for text in ("", "%", "ten", "0", "0%", "-1%", "101%", "10", "nan", "inf"):
        with pytest.raises(ValueError, match=r"^a share is above 0% and up to 100%, such as 1% or 0.01; got '.*'$"):
            parse_share(text)


def test_a_test_folder_of_one_class(tmp_path: Path) -> None:
    data = write(tmp_path / "data", *(f"{c}/{i}.png" for c in "abc" for i in range(2)))
    one = write(tmp_path / "one", "b/1.png", "b/deep/2.png")
    opened = open_labelled(data, one)
    assert opened.test_labels.tolist() == [1, 1]
    assert (opened.classes, opened.foreign) == (("a", "b", "c"), ())
    assert opened.notes == ("2 classes have no test images: a, c",)
    for spec in (write(tmp_path / "other", "zebra/1.png"), write(tmp_path / "loose", "b/1.png", "2.png")):
        with pytest.raises(SourceError, match="has no labels"):
            open_labelled(data, spec)
    with pytest.raises(SourceError, match="has no labels"):  # nor can one class be learned from
        open_labelled(one)


def test_the_notes_are_those_of_the_labels_that_are_left() -> None:
    labels = [0] * 8 + [1] * 3 + [-1]
    opened = label(source(labels, "a b c", "pool"), source([0, 2], "a b c", "held"))
    before = (
        "1 image of pool without a label left out",
        "1 class has no training images, so that 1 test image can only count as wrong: c",
        "1 class has no test images: b",
        "imbalance: 3 to 8 training images a class (median 6)",
    )
    assert opened.notes == before
    assert take_fraction(opened, "10%", 0).notes == before[:3]
    rest = np.where(opened.train_labels == 1, -1, opened.train_labels)
    assert replace(opened, train_labels=rest).notes == before[:2]
