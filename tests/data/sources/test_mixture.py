import time
from collections import Counter

import numpy as np
import pytest

import mpp.data.sources.mixture
from mpp.data.sources.base import SourceError
from mpp.data.sources.in_memory import ListSource
from mpp.data.sources.mixture import MixtureSource
from mpp.data.sources.opening import open_source, open_splits
from tests.data.sources.reading import all_read, locations, read_many, refused


def sized(size):
    """So many images that nobody reads."""
    return ListSource(range(size))


@pytest.fixture
def two(picture_folder):
    """Two folders with classes of their own: {ant, bee} and {bee, cat}."""
    folder = picture_folder("one/ant/1.png", "one/bee/2.png", "one/bee/3.png", "two/bee/4.png", "two/cat/5.png")
    return f"folder:{folder / 'one'}", f"folder:{folder / 'two'}"


def test_parts_one_after_the_other(two):
    one, other = map(open_source, two)
    source = open_source(" + ".join(two))
    assert (len(source), source.weights, source.name) == (5, None, " + ".join(two))
    assert source.classes == ("ant", "bee", "cat")
    assert (source.labels().dtype, source.labels().tolist()) == (np.int64, [0, 1, 1, 1, 2])
    assert locations(source) == locations(one) + locations(other)
    images = [image for image, _ in all_read(one) + all_read(other)]
    assert all_read(source) == list(zip(images, [0, 1, 1, 1, 2], strict=True))
    assert source.describe() == f"5 images in 3 classes; {two[0]}: 3 images; {two[1]}: 2 images"


@pytest.mark.parametrize("together", [False, True])
def test_many_at_once(together, two, tmp_path):
    source = open_source(" + ".join(two))
    source.reads_together = together  # as of one with remote shards
    (tmp_path / "one" / "bee" / "3.png").unlink()
    found = read_many(source, [4, 2, 0, 4])
    assert isinstance(found[1], FileNotFoundError)
    assert [found[0], found[2], found[3]] == [source.read(4), source.read(0), source.read(4)]


def test_without_labels_or_with_some():
    labelled = ListSource([b"a", b"b"], [0, -1], ("x",), name="some")
    bare = ListSource([b"c"], name="bare")
    assert MixtureSource("m", [labelled, labelled]).labels().tolist() == [0, -1, 0, -1]
    mixed = MixtureSource("m", [labelled, bare])
    assert (mixed.classes, mixed.labels()) == (None, None)
    assert all_read(mixed) == [(b"a", None), (b"b", None), (b"c", None)]
    assert mixed.describe().endswith("; labels left aside, for bare has none")
    assert "left aside" not in MixtureSource("m", [bare, bare]).describe()


def test_weights(two):
    source = open_source(f"3 * {two[0]} + 1* {two[1]}")
    assert source.weights == (3.0, 1.0)
    assert f"{two[0]}: 3 images, 80.0% of the images drawn; " in source.describe()
    assert open_source(f"0.5*{two[0]} + 4e-1 * {two[1]} + 2 * {two[0]}").weights == (0.5, 0.4, 2.0)


@pytest.mark.parametrize(
    ("weights", "sizes", "expected"),
    [
        (None, [3, 2, 5], [3, 2, 5]),
        ([1, 1], [3, 4], [4, 3]),  # of equal remainders the first
        ([1, 1, 1], [1, 1, 8], [4, 3, 3]),
        ([3, 1], [60, 40], [75, 25]),
        ([0.7, 0.2, 0.1], [4, 3, 4], [8, 2, 1]),  # 7.7, 2.2, 1.1
    ],
)
def test_quotas_are_largest_remainders(weights, sizes, expected):
    assert MixtureSource("m", [sized(size) for size in sizes], weights).quotas.tolist() == expected


@pytest.mark.parametrize(
    ("weights", "together"), [(None, 1), ((5, 1, 1), 8), ((1, 1, 20), 1), ((1, 1, 20), 8), ((1, 1, 20), 2**18)]
)
def test_draws_use_every_pass_once(weights, together, monkeypatch):
    monkeypatch.setattr(mpp.data.sources.mixture, "_TOGETHER", together)
    sizes, epochs = [7, 20, 3], 40
    source = MixtureSource("m", [sized(size) for size in sizes], weights)
    starts = [0, 7, 27, 30]
    drawn = Counter()
    for epoch in range(epochs):
        passes, indices = source.draw(5, epoch)
        assert passes.dtype == indices.dtype == np.int64
        assert np.histogram(indices, bins=starts)[0].tolist() == source.quotas.tolist()
        drawn.update(zip(passes.tolist(), indices.tolist(), strict=True))
    assert max(drawn.values()) == 1
    for part, quota in enumerate(source.quotas.tolist()):
        of_part = [(turn, index) for turn, index in drawn if starts[part] <= index < starts[part + 1]]
        times = Counter(index for _, index in of_part)
        counts = [times[index] for index in range(starts[part], starts[part + 1])]
        assert sum(counts) == quota * epochs
        assert max(counts) - min(counts) <= 1
        # Pass k is complete before pass k + 1 begins.
        complete = Counter(turn for turn, _ in of_part)
        assert all(complete[turn] == sizes[part] for turn in range(quota * epochs // sizes[part]))


def test_draws_depend_on_seed_and_epoch_alone():
    source = MixtureSource("m", [sized(70), sized(30)], (1, 3))
    again = MixtureSource("other", [sized(70), sized(30)], (2, 6))
    orders = {(seed, epoch): source.draw(seed, epoch)[1].tolist() for seed in (0, 1) for epoch in (0, 1, 2)}
    for (seed, epoch), order in reversed(orders.items()):
        assert again.draw(seed, epoch)[1].tolist() == order
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    # The parts are shuffled together, not one behind the other.
    assert abs(np.flatnonzero(np.array(orders[0, 0]) >= 70).mean() - 49.5) < 12
    # The draws of an older release, so that its runs go on in the same bits.
    assert orders[0, 0][:8] == [71, 80, 93, 18, 59, 96, 85, 62]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(9_000_000, 999_990, 10), (2_000_000, 1, 10)])
def test_late_epochs_and_small_parts_are_cheap(sizes):
    source = MixtureSource("m", [sized(size) for size in sizes], (1, 2, 3))
    began = time.process_time()
    source.draw(0, 5000)
    assert time.process_time() - began < 3e-6 * sum(sizes)


def test_splits(picture_folder):
    folder = picture_folder("a/train/x/1.png", "a/train/y/2.png", "a/test/y/3.png", "b/train/x/4.png", "b/val/z/5.png")
    both = f"folder:{folder / 'a'} + folder:{folder / 'b'}"
    assert [len(split) for split in open_splits(both).values()] == [3, 2]
    assert "test" not in open_splits(f"{both} + folder:{folder / 'a' / 'train'}")
    weighted = open_splits(f"9 * folder:{folder / 'a'} + 9 * folder:{folder / 'b'}")
    assert weighted["test"].weights is None  # held-out images are not drawn


def test_errors(two):
    one, other = two
    assert "has no weight; give every source one, or none" in refused(f"3 * {one} + {other}")
    assert "the weight 'x' is no number; write e.g. 3 * folder:DIR" in refused(f"x * {one} + 1 * {other}")
    for weight in ("0", "-1", "nan", "inf"):
        assert f"the weight {weight} is not positive" in refused(f"{weight} * {one} + 1 * {other}")
    assert f"a weight is for one of several sources; write {one}" in refused(f"3 * {one}")
    assert "a source is missing beside a +" in refused(f"{one} +  + {other}")
    assert "there is no kind of source called 'flder'" in refused(f"{one} + flder:x")
    assert f"no image of {other} would ever be drawn, with an epoch of 5" in refused(f"100 * {one} + 1 * {other}")
    with pytest.raises(SourceError, match="1 weights for 2 sources"):
        MixtureSource("m", [sized(1), sized(1)], [1])
