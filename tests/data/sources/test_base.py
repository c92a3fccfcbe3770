import os
import pickle

import numpy as np
import pytest

from mpp.data.sources.base import Source, SourceError, Subset, TooLarge
from mpp.data.sources.files import FileSource
from mpp.data.sources.in_memory import ListSource
from mpp.data.sources.opening import open_source
from mpp.errors import RunError
from tests.data.sources.reading import read_many, write_shards, write_tar


class Plain(Source):
    """The least that a source must define."""

    def __len__(self):
        return 3

    def image(self, index):
        return b"%d" % index


def test_the_defaults():
    source = Plain("plain")
    assert read_many(source, [2, 0]) == [(b"2", None), (b"0", None)]
    assert (source.describe(), source.location(1)) == ("3 images, unlabelled", "image 1 of plain")
    assert (source.size(0), source.decoded(0), source.block(np.array([0]))) == (0, False, None)
    assert Plain("plain", np.array([0, -1, 1]), ("a", "b"), "a note").describe() == "3 images in 2 classes; a note"


def test_subset(images):
    subset = Subset(ListSource(list(images), [0, 1, 0, 1, 2], ("x", "y", "z")), [4, 1])
    assert (len(subset), subset.classes, subset.labels().tolist()) == (2, ("x", "y", "z"), [2, 1])
    np.testing.assert_array_equal(subset.read(0)[0], images[4])
    assert subset.describe() == "2 of 5 images in 3 classes"
    assert (subset.location(1), Subset(subset, [1]).location(0)) == ("image 1 of list", "image 1 of list")
    assert Subset(subset, [1]).labels().tolist() == [1]
    assert len(Subset(subset, [])) == 0
    with pytest.raises(IndexError):
        Subset(subset, [2])


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0, 1, 2, 3], r"the labels are int64 \(4,\); expected 5 whole numbers from 0"),
        ([0.0, 1.0, np.nan, 0.0, 0.0], r"the labels are float64 \(5,\)"),
        (["a", "b", "a", "b", "a"], r"the labels are <U1 \(5,\)"),
        ([0, 1, -2, 0, 0], "there is a label -2"),
        ([0, 1, 2**24, 0, 0], "the label 16777216 would mean 16,777,217 classes, of 5 images"),
    ],
)
def test_labels_in_memory_are_checked(labels, text, images):
    with pytest.raises(SourceError, match=text):
        ListSource(images, labels)
    with pytest.raises(SourceError, match="there is a label 2, but 2 classes; check the labels"):
        ListSource(images, [0, 1, 2, 0, 0], ("x", "y"))


def test_sources_do_not_count_from_the_end(picture_folder, images, tmp_path):
    np.save(tmp_path / "a.npy", images)
    folder = picture_folder("1.png")
    sources = [ListSource(images), open_source(f"folder:{folder}"), open_source(f"array:{tmp_path / 'a.npy'}")]
    for source in (*sources, Subset(sources[0], [1]), open_source(f"folder:{folder} + folder:{folder}")):
        for index in (-1, len(source)):
            for call in (source.read, source.location):
                with pytest.raises(IndexError):
                    call(index)


class AtOnce(ListSource):
    """Notes which images are read together."""

    reads_together = True
    groups = ()

    def size(self, index):
        return len(self._images[index])

    def _read_together(self, indices):
        self.groups = [*self.groups, list(indices)]
        return [self.read(index) for index in indices]


def test_images_read_together_have_no_more_bytes_than_one_may(monkeypatch):
    source = AtOnce([bytes(n) for n in (40, 40, 40, 101, 1, 100)])
    found = list(source.read_many(range(6), most=100))
    assert source.groups == [[0, 1], [2], [4], [5]]
    assert [isinstance(each, TooLarge) or len(each[0]) for each in found] == [40, 40, 40, True, 1, 100]
    source.groups = ()
    monkeypatch.setattr(AtOnce, "size", lambda self, index: pytest.fail("without a limit, no size is asked for"))
    read_many(Subset(source, [5, 0, 1, 2, 3, 4]), range(6))
    assert source.groups == [[5, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("together", [False, True])
def test_an_image_that_memory_does_not_hold_is_its_own_fault(together):
    class Greedy(ListSource):
        reads_together = together

        def image(self, index):
            if index == 1:
                raise MemoryError
            return super().image(index)

        def _read_together(self, indices):
            raise MemoryError

    first, second, third = Greedy([b"0", b"1", b"2"]).read_many(range(3))
    assert (first, third) == ((b"0", None), (b"2", None))
    assert isinstance(second, TooLarge)
    assert str(second) == "takes more memory than there is"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("folder", [False, True]),
        ("csv", [False, True]),
        ("shards", [False, False, True]),
        ("mixture", [False, True, False, False, True]),
        ("subset", [True, False]),
    ],
)
def test_images_of_too_many_bytes_are_not_read(kind, expected, tmp_path):
    """Of any source: a file of 64 GB, or a member larger than the limit, costs no more than a question."""
    write_tar(tmp_path / "s.tar", [("0.jpg", b"small"), ("1.jpg", b"small"), ("large.jpg", bytes(1000))])
    (tmp_path / "a.jpg").write_bytes(b"small")
    with (tmp_path / "b.jpg").open("wb") as file:
        file.truncate(2**36)
    (tmp_path / "list.csv").write_text("a.jpg\nb.jpg\n")
    listed, shards = f"csv:{tmp_path}/list.csv", f"shards:{tmp_path}/s.tar"
    source = open_source(
        {"folder": f"folder:{tmp_path}", "shards": shards, "mixture": f"{listed} + {shards}"}.get(kind, listed)
    )
    source = Subset(source, [1, 0]) if kind == "subset" else source
    found = list(source.read_many(range(len(source)), most=100))
    assert [isinstance(each, TooLarge) for each in found] == expected
    large = str(next(each for each in found if isinstance(each, TooLarge)))
    assert large == f"{'0.0' if kind == 'shards' else '68,719.5'} MB, more than data.max_image_mb 0 allows"
    assert all(source.size(i) == 5 for i, large in enumerate(expected) if not large)


def test_copies_by_pickle_read_the_same(picture_folder, images, tmp_path):
    np.save(tmp_path / "a.npy", images)
    folder = picture_folder("1.png", "2.png")
    write_shards(tmp_path / "shards", 2)
    for spec in (f"folder:{folder}", f"array:{tmp_path}/a.npy", f"shards:{tmp_path}/shards/*.tar"):
        for source in (open_source(spec), Subset(open_source(f"{spec} + {spec}"), [1, 0])):
            copy = pickle.loads(pickle.dumps(source))
            for ours, theirs in zip(read_many(copy, [1, 0]), read_many(source, [1, 0]), strict=True):
                np.testing.assert_array_equal(ours[0], theirs[0])


def test_a_run_out_of_open_files_is_no_fault_of_an_image(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(FileSource, "image", fail)
    with pytest.raises(RunError, match="too many open files"):
        read_many(FileSource("folder:x", tmp_path, ["a"]), [0])
