"""Images that belong together stay on one side of every split."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from mpp.data.sources.base import Source, SourceError, Subset
from mpp.data.sources.in_memory import ListSource
from mpp.data.sources.opening import open_source
from mpp.downstream.fewshot import Fewshot, choose_l2
from mpp.downstream.groups import ALONE, draw_groups, groups_of, strata
from mpp.downstream.labelled import Labelled, hold_out, label, open_labelled, take_fraction
from mpp.downstream.probe import sweep_knn
from mpp.downstream.settings import LabelledConfig
from tests.runs import write_folder

IMAGES = st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 12)), min_size=1, max_size=80)


class Grouped(ListSource):
    """Images of no interest, with groups."""

    def __init__(self, labels: list[int], groups: list[str], name: str = "some") -> None:
        super().__init__(np.zeros((len(labels), 1, 1), dtype=np.uint8), labels, tuple("abcdefghij"), name)
        self._groups = groups

    def groups(self) -> list[str]:
        return self._groups


def patients(seed: int = 0, number: int = 60, name: str = "some") -> Grouped:
    """Three classes of unequal size, mixed within groups of 1 to 9 images."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(number), rng.integers(1, 10, number))
    likely = rng.dirichlet([4, 2, 1], number)
    return Grouped([int(rng.choice(3, p=likely[of])) for of in group], [f"patient{of}" for of in group], name)


def sides(labelled: Labelled) -> tuple[set[int], set[int]]:
    assert labelled.train_groups is not None
    assert labelled.test_groups is not None
    train, test = labelled.train_groups[labelled.train_indices], labelled.test_groups[labelled.test_indices]
    return set(train.tolist()) - {ALONE}, set(test.tolist()) - {ALONE}


@settings(max_examples=100, deadline=None)
@given(IMAGES, st.floats(0.01, 1), st.integers(0, 1), st.integers(0, 3))
def test_draws_take_whole_groups(images: list[tuple[int, int]], share: float, leave: int, seed: int) -> None:
    labels, groups = (np.array(column) for column in zip(*images, strict=True))
    drawn = draw_groups(labels, groups, share, np.random.default_rng(seed), leave)
    assert not drawn[labels < 0].any()
    used = labels >= 0
    both = set(groups[drawn & used]) & set(groups[~drawn & used]) - {ALONE}
    assert not both
    own = np.where(groups == ALONE, -2 - np.arange(len(groups)), groups)
    for number in np.unique(labels[used]):
        assert drawn[labels == number].any() or leave
        assert not leave or (~drawn[labels == number]).any()
        assert len(np.unique(own[labels == number])) > 1 or not leave or not drawn[labels == number].any()
    if not leave:  # a smaller share is part of a larger one
        larger = draw_groups(labels, groups, min(1, 1.5 * share), np.random.default_rng(seed), 0)
        assert not (drawn & ~larger).any()


def test_images_by_themselves_are_drawn_to_the_share() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    drawn = draw_groups(labels, None, 0.2, np.random.default_rng(0), 1)
    assert np.bincount(labels[drawn]).tolist() == [20, 10, 2]


@pytest.mark.slow
def test_held_out_shares_are_as_near_and_as_stratified_as_those_of_scikit_learn() -> None:
    ours, theirs = [], []
    for seed in range(20):
        source = patients(seed)
        labelled, groups = label(source), groups_of(source)
        labels = source.labels()
        assert groups is not None
        assert labels is not None
        train, test = sides(labelled)
        assert train
        assert test
        assert not train & test
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(labels, labels, groups)
        for found, tested in ((ours, labelled.test_indices), (theirs, next(folds)[1])):
            found.append(np.bincount(labels[tested], minlength=3) / np.bincount(labels))
    error_of_ours, error_of_theirs = (np.abs(np.array(found) - 0.2).mean() for found in (ours, theirs))
    assert error_of_ours < 1.5 * error_of_theirs
    assert error_of_ours < 0.05


def test_every_split_keeps_groups_whole() -> None:
    labelled = label(patients())
    assert labelled.notes[0] == "60 groups of 1 to 9 images (median 5) stay together"
    for part in (take_fraction(labelled, "30%", 1), hold_out(labelled, 0.1, 1)):
        train, test = sides(part)
        assert train
        assert not train & test
    assert set(take_fraction(labelled, "10%", 1).train_indices) < set(take_fraction(labelled, "40%", 1).train_indices)
    chosen = hold_out(take_fraction(labelled, "50%", 0), 0.2, 0)
    assert 0.1 < len(chosen.test_indices) / len(take_fraction(labelled, "50%", 0).train_indices) < 0.3


def test_groups_that_given_splits_part_are_warned_of_and_left_out_of_the_test_of_shots() -> None:
    test = Grouped([0, 1, 2, 0], ["patient1", "patient2", "other", ""], "held")
    labelled = label(patients(), test)
    warning = "WARNING: 2 groups have images in the training and in the test split, 2 test images among them: "
    assert f"{warning}figures will be too good" in labelled.notes
    fewshot = Fewshot(labelled, (50,), (0,))
    assert (fewshot.test_indices.tolist(), fewshot.beside_shots) == ([2, 3], 2)
    with pytest.raises(SourceError, match="the groups of all 1 test images of held have images among the shots"):
        Fewshot(label(patients(), Grouped([0], ["patient1"], "held")), (50,), (0,))


def test_folds_part_no_group() -> None:
    """Images of a group are copies: with a neighbour in the training part every one would be known."""
    rng = np.random.default_rng(0)
    group, labels = np.repeat(np.arange(40), 5), np.repeat(rng.integers(0, 2, 40), 5)
    features = rng.normal(size=(40, 64))[group]
    easy, honest = (sweep_knn((features, labels), (features, labels), 2, (1, 2), groups=of) for of in (None, group))
    assert (easy.held_out, honest.held_out and honest.held_out < 0.9) == (1.0, True)
    easy, honest = (choose_l2(features, labels, 2, [1e-3], of) for of in (None, group))
    assert easy
    assert honest
    assert easy[1] == 1.0
    assert honest[1] < 0.8
    assert choose_l2(features[:10], np.repeat([0, 1], 5), 2, [1.0], group[:10]) is None  # nothing to choose by
    stratum, of_image = strata(np.array([0, 0, 1, -1]), np.array([7, 8, 8, 8]))
    assert (stratum.tolist(), of_image.tolist()) == ([0, 1], [0, 1, 1, -1])


def test_groups_by_a_pattern_or_a_column(tmp_path: Path) -> None:
    names = [f"{kind}/p{patient}_{number}.png" for kind in "ab" for patient in range(5) for number in range(2)]
    spec = write_folder(tmp_path / "images", *names)
    labelled = open_labelled(spec, group=r"p(\d)_")
    train, test = sides(labelled)
    assert not train & test
    assert len(labelled.test_indices) == 4
    table = tmp_path / "images.csv"
    rows = [f"images/{name},{name[0]},{name[3]}" for name in names]
    table.write_text("\n".join(["path,label,Group", *rows, ""]), "utf-8")
    by_column = open_labelled(f"csv:{table}")
    assert by_column.test_labels.tolist() == labelled.test_labels.tolist()
    source = open_source(f"csv:{table}")
    assert list(Subset(source, [0, 2, 19]).groups() or ()) == ["0", "1", "4"]
    mixed = open_source(f"csv:{table} + {spec}")
    assert list(mixed.groups() or ())[18:22] == ["4", "4", "", ""]
    assert groups_of(mixed, "p(4)_")[[0, 18, 38]].tolist() == [ALONE, *[groups_of(source)[18]] * 2]  # type: ignore[index]


@pytest.mark.parametrize(
    ("source", "pattern", "message"),
    [
        (
            patients(),
            "(x)",
            r"data\.group '\(x\)' matches no name of the images of some, such as image 0 of some; give",
        ),
        (patients(), "(im)", r"data\.group '\(im\)' puts all 2\d\d images of some into one group, so there is nothing"),
        (Grouped([0, 1], ["", ""]), "", "the column group is empty"),
        (Grouped([0, 1, 1], ["x", "x", "x"]), "", "the column group puts all 3 images of some into one group"),
        (Grouped([0, 1, 1, 1], ["x", "y", "y", "y"]), "", "every group of some is the only one of some class"),
    ],
)
def test_groups_that_part_nothing(source: Source, pattern: str, message: str) -> None:
    with pytest.raises(SourceError, match=f"^{message}"):
        label(source, group=pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", r"data\.group is no regular expression \(.*\), got '\('"), ("p.", "data.group needs brackets around what")],
)
def test_patterns_that_are_none(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelledConfig(group=pattern)
