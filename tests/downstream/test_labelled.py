"""Which images are learned from and which are tested, and what is said about it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpp.data.sources.base import SourceError
from mpp.data.sources.in_memory import ListSource
from mpp.downstream.labelled import Labelled, hold_out, label, open_labelled, parse_share, take_fraction
from tests.runs import write_folder

LABELS = st.lists(st.integers(-1, 5), max_size=60).map(lambda values: np.array(values, dtype=np.int64))


def source(labels: list[int] | np.ndarray | None, classes: str | None = None, name: str = "some") -> ListSource:
    """Labelled images that nobody looks at."""
    images = np.zeros((0 if labels is None else len(labels), 1, 1), dtype=np.uint8)
    return ListSource(images, labels, None if classes is None else tuple(classes.split()), name)


def sizes(labels: np.ndarray, classes: int) -> list[int]:
    return np.bincount(labels[labels >= 0], minlength=classes).tolist()


def test_a_folder_with_a_test_split(tmp_path: Path) -> None:
    spec = write_folder(
        tmp_path, *(f"train/{c}/{i}.png" for c in "abc" for i in range(2)), "test/zebra/1.png", "val/a/1.png"
    )
    spec = write_folder(tmp_path, "test/b/1.png", "test/b/2.png")
    opened = open_labelled(spec)
    assert (opened.classes, opened.foreign) == (("a", "b", "c"), ("zebra",))
    assert opened.train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert opened.test_labels.tolist() == [1, 1, 3]
    assert opened.notes == (
        "1 class has no training images, so that 1 test image can only count as wrong: zebra",
        "2 classes have no test images: a, c",
    )


def test_a_test_source_of_its_own(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "here", "train/a/1.png", "train/b/1.png", "test/a/1.png")
    whole = write_folder(tmp_path / "there", "b/1.png", "b/2.png", "a/1.png")
    opened = open_labelled(data, whole)
    assert [opened.train.name, len(opened.train), opened.test.name, len(opened.test)] == [data, 2, whole, 3]
    assert opened.test_labels.tolist() == [0, 1, 1]
    assert opened.notes == ()
    opened = open_labelled(whole, data)  # the test split of a test source that has one
    assert opened.test_labels.tolist() == [0]
    assert "imbalance: 1 to 2 training images a class (median 2)" in opened.notes


def test_settings_are_chosen_on_a_validation_split(tmp_path: Path) -> None:
    names = ("train/a/1", "train/a/2", "train/b/1", "valid/a/1", "valid/b/1", "valid/new/1", "test/b/1", "test/old/1")
    opened = open_labelled(write_folder(tmp_path, *(f"{name}.png" for name in names)))
    assert (opened.foreign, opened.test_labels.tolist()) == (("old",), [1, 2])
    choosing = hold_out(take_fraction(opened, "50%", 0), 0.5, 0)
    assert (choosing.test, choosing.test_labels.tolist()) == (opened.val, [0, 1, -1])
    assert choosing.notes[0] == "settings are chosen on the validation split, 2 images"
    assert sizes(choosing.train_labels, 2) == [1, 1]  # none of them are held out
    # One that cannot be used is passed over, with a note.
    shutil.rmtree(tmp_path / "valid")
    for change, reason in (
        (lambda: (tmp_path / "valid").mkdir(), f"no image in {tmp_path}/valid"),
        (
            lambda: write_folder(tmp_path, "valid/new/1.png", "valid/newer/1.png"),
            "has none of the classes of its training",
        ),
        (lambda: (shutil.rmtree(tmp_path / "valid"), (tmp_path / "valid").symlink_to("test")), "holds the very images"),
    ):
        change()
        opened = open_labelled(f"folder:{tmp_path}")
        assert opened.val is None
        assert any(note.startswith("the validation split is not used: ") and reason in note for note in opened.notes)


def test_a_fifth_is_held_out_where_there_is_no_test_split(tmp_path: Path) -> None:
    spec = write_folder(tmp_path, *(f"a/{i}.png" for i in range(10)), *(f"b/{i}.png" for i in range(3)), "c/0.png")
    for i in range(100):
        (tmp_path / f"a/{i}.jp2").touch()
    opened = open_labelled(spec)
    assert opened.test is opened.train
    assert sizes(opened.train_labels, 3) == [8, 2, 1]
    assert sizes(opened.test_labels, 3) == [2, 1, 0]
    assert not set(opened.train_indices) & set(opened.test_indices)
    assert opened.notes[0].startswith("100 pictures ignored, such as 0.jp2: ")
    assert opened.notes[1:] == (
        f"{spec} has no test split of its own: a fifth of it, 3 images, is held out",
        "1 class has no test images: c",
        "imbalance: 1 to 8 training images a class (median 2)",
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
    assert (opened.classes, opened.foreign) == (("0", "1", "2", "3"), ("5",))
    assert opened.test_labels.tolist() == [2, 4, 0]


def test_only_five_classes_are_named_and_each_on_the_same_line() -> None:
    classes = ("a", "b", "c\nd", *"efghi")
    notes = label(ListSource(np.zeros((8, 1, 1)), range(8), classes), source([0], "a", "held")).notes
    assert notes == ("7 classes have no test images: b, c d, e, f, g, ...",)


UNCHECKED = source([0, 2], "a b c")
UNCHECKED.classes = ("a", "b")  # as a source of one's own may have it


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (UNCHECKED, None, r"some: there is a label 2, but 2 classes; check the labels"),
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


def test_training_images_are_no_test_images(tmp_path: Path) -> None:
    spec = write_folder(tmp_path, "a/1.png", "b/1.png")
    (tmp_path.parent / f"{tmp_path.name}-link").symlink_to(tmp_path)
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 2, 2, 3), np.uint8), labels=np.arange(4) % 2)
    array = f"array:{tmp_path}/a.npz", f"array:{tmp_path}/../{tmp_path.name}/a.npz"
    for train, test, said in (
        (spec, spec, "is named for training and for testing, but has no test split of its own"),
        (spec, f"{spec}/", r"/ holds the very images of folder:.*: name other images for the test"),
        (spec, f"{spec}-link", "-link holds the very images of folder:"),
        (*array, r"a\.npz holds the very images of array:"),
    ):
        with pytest.raises(SourceError, match=said):
            open_labelled(train, test)


def pool_of(labels: np.ndarray) -> Labelled:
    pool = source(labels, "a b c d e f", "pool")
    return Labelled(pool, source([0], "a", "held"), pool.classes or (), labels, np.array([0]))


def drawn(labels: np.ndarray, share: float, rng: np.random.Generator, leave: int) -> list[int]:
    """Draws as they always were, so that figures compare and smaller fractions are part of larger ones."""
    picked: list[int] = []
    for c in range(6):
        members = rng.permutation(np.flatnonzero(labels == c))
        picked += members[: min(max(round(share * len(members)), 1), max(len(members) - leave, 0))].tolist()
    return sorted(picked)


@given(labels=LABELS, share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_draws_are_those_they_always_were(labels: np.ndarray, share: float, seed: int) -> None:
    pool, everything = pool_of(labels), np.flatnonzero(labels >= 0).tolist()
    taken = take_fraction(pool, share, seed)
    assert taken.train_indices.tolist() == drawn(labels, share, np.random.default_rng([seed, 1]), leave=0)
    np.testing.assert_array_equal(take_fraction(pool, "100%", seed).train_labels, labels)
    held = drawn(labels, share, np.random.default_rng([seed, 2]), leave=1)
    fifth = drawn(labels, 1 / 5, np.random.default_rng(1729), leave=1)
    if not held:
        with pytest.raises(SourceError, match=r"no class of pool has two training images"):
            hold_out(pool, share, seed)
        return
    choosing = hold_out(pool, share, seed)
    assert choosing.train is choosing.test is pool.train
    number = f"{len(held)} of {len(everything)}"
    assert choosing.notes[0] == f"{number} training images are held out to choose settings by"
    splits = [(choosing, held)]
    if len(np.unique(labels[labels >= 0])) > 1:
        splits.append((label(pool.train), fifth))
    for split, tested in splits:
        assert split.test_indices.tolist() == tested
        assert split.train_indices.tolist() == sorted(set(everything) - set(tested))
        np.testing.assert_array_equal(split.test_labels[tested], labels[tested])


def test_the_test_images_of_one_source_stay_out_of_the_choice() -> None:
    opened = label(source(np.repeat([0, 1], 50), "a b"))
    choosing = hold_out(opened, 0.25, seed=3)
    assert sizes(choosing.test_labels, 2) == [10, 10]
    assert not set(opened.test_indices) & {*choosing.train_indices, *choosing.test_indices}
    assert not set(opened.test_indices) & set(take_fraction(opened, "10%", seed=3).train_indices)


def test_shares() -> None:
    assert parse_share("1%") == parse_share("0.01") == parse_share(" 1 % ") == 0.01
    assert parse_share("100%") == parse_share("1") == 1.0
    for text in ("", "%", "ten", "0", "0%", "-1%", "101%", "10", "nan", "inf"):
        with pytest.raises(ValueError, match=r"^a share is above 0% and up to 100%, such as 1% or 0.01; got '.*'$"):
            parse_share(text)


def test_a_test_folder_of_one_class(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", *(f"{c}/{i}.png" for c in "abc" for i in range(2)))
    one = write_folder(tmp_path / "one", "b/1.png", "b/deep/2.png")
    opened = open_labelled(data, one)
    assert opened.test_labels.tolist() == [1, 1]
    assert (opened.classes, opened.foreign) == (("a", "b", "c"), ())
    assert opened.notes == ("2 classes have no test images: a, c",)
    for spec in (write_folder(tmp_path / "other", "zebra/1.png"), write_folder(tmp_path / "loose", "b/1.png", "2.png")):
        with pytest.raises(SourceError, match="has no labels"):
            open_labelled(data, spec)
    with pytest.raises(SourceError, match="has no labels"):  # nor can one class be learned from
        open_labelled(one)


def test_the_notes_are_those_of_the_labels_that_are_left() -> None:
    labels = [0] * 8 + [1] * 3 + [-1]
    opened = label(source(labels, "a b c", "pool"), source([0, 2], "a b c", "held"))
    notes = (
        "1 image of pool without a label left out",
        "1 class has no training images, so that 1 test image can only count as wrong: c",
        "1 class has no test images: b",
        "imbalance: 3 to 8 training images a class (median 6)",
    )
    assert opened.notes == notes
    assert take_fraction(opened, "10%", 0).notes == notes[:3]
