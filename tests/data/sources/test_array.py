import os

import numpy as np
import pytest

from mpp.data.sources.array import DTYPES
from mpp.data.sources.opening import open_source, open_splits
from mpp.data.sources.overlap import same_places
from tests.data.sources.reading import refused


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_come_as_they_are(dtype, order, tmp_path):
    values = np.random.default_rng(0).normal(1000, 300, (4, 5, 6, 2)).astype(np.dtype(dtype).newbyteorder(order))
    np.save(tmp_path / "a.npy", values)
    source = open_source(f"array:{tmp_path / 'a.npy'}")
    image, label = source.read(2)
    assert (len(source), image.dtype, label, source.labels()) == (4, np.dtype(dtype), None, None)
    np.testing.assert_array_equal(image, values[2])
    assert source.describe() == "4 images, unlabelled" + ("" if dtype == "uint8" else f"; {dtype}")


@pytest.mark.parametrize(("key", "label_key"), [("images", "labels"), ("x", "y"), ("anything", "labels")])
@pytest.mark.parametrize(
    ("labels", "classes"), [([2, 0, 1, 2, 0], 3), ([999, -1, 0, 21_840, 999], 21_841), ([-1] * 5, None)]
)
def test_npz_with_labels(key, label_key, labels, classes, tmp_path, images):
    np.savez(tmp_path / "a.npz", **{key: images, label_key: np.array(labels, dtype=np.int16)})
    source = open_source(f"array:{tmp_path / 'a.npz'}")
    assert source.location(1) == f"image 1 of {tmp_path / 'a.npz'}"
    assert source.classes == (classes and tuple(map(str, range(classes))))
    assert [source.read(i)[1] for i in range(5)] == [None if label < 0 else label for label in labels]
    if classes:
        assert (source.labels().dtype, source.labels().tolist()) == (np.int64, labels)


def test_npz_with_splits(tmp_path, images):
    """As MedMNIST's files are: labels N x 1, greys N x H x W."""
    path, rows = tmp_path / "m.npz", {"train": 3, "val": 1, "test": 2}
    arrays = {f"{split}_images": images[:number, :, :, 0] + number for split, number in rows.items()}
    np.savez(path, **arrays, **{f"{split}_labels": np.arange(number)[:, None] for split, number in rows.items()})
    splits = open_splits(f"array:{path}")
    assert {split: source.labels().tolist() for split, source in splits.items()} == {
        **{"train": [0, 1, 2], "test": [0, 1]},
        "val": [0],
    }
    for split, source in splits.items():
        np.testing.assert_array_equal([source.read(i)[0] for i in range(len(source))], arrays[f"{split}_images"])
        assert source.describe().endswith(f"; the split {split} alone")
    assert splits["test"].location(1) == f"image 1 of test_images in {path}"
    assert not same_places(splits["train"], splits["test"])
    assert len({source.fingerprint() for source in splits.values()}) == 3


def test_several_labels_an_image(tmp_path, images):
    """As ChestMNIST's file is: labels N x K of zeros and ones."""
    path, rows = tmp_path / "m.npz", {"train": 5, "val": 3, "test": 2}
    labels = {split: (np.arange(14 * number) % 3 == 1).reshape(number, 14) for split, number in rows.items()}
    labels["val"][1] = 0
    arrays = {f"{split}_images": images[:number, :, :, 0] for split, number in rows.items()}
    np.savez(path, **arrays, **{f"{split}_labels": of.astype(np.uint8) for split, of in labels.items()})
    for split, source in open_splits(f"array:{path}").items():
        sets = source.label_sets()
        assert source.labels() is None
        assert source.classes == tuple(map(str, range(14)))
        np.testing.assert_array_equal(sets.table[sets.number], labels[split])
        none = int(split == "val")
        assert source.describe().endswith(
            f"in 14 classes; the split {split} alone; several labels an image, none in {none}"
        )
    with_unknown = np.array([[1, 0], [-1, 0], [-1, -1], [0, 1], [1, 1]], dtype=np.float32)
    np.savez(tmp_path / "u.npz", images=images, labels=with_unknown)
    sets = open_source(f"array:{tmp_path / 'u.npz'}").label_sets()
    assert (sets.number < 0).tolist() == [False, False, True, False, False]
    assert sets.table[sets.number[[0, 1, 3, 4]]].tolist() == [[1, 0], [0, 0], [0, 1], [1, 1]]
    np.savez(tmp_path / "o.npz", images=images, labels=np.eye(5))
    assert "each has one alone: save one number an image" in open_source(f"array:{tmp_path / 'o.npz'}").describe()


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (np.eye(5) * 2, "the labels are float64 (5, 5) and hold 2; several labels an image are 5 rows of 0 and 1"),
        (np.full((5, 2), np.nan), "and hold nan;"),
        (np.eye(6), "the labels are float64 (6, 6); several labels an image are 5 rows of 0 and 1, a column for each"),
        (np.zeros((5, 0)), "the labels are float64 (5, 0); several"),
        (np.full((5, 2), "a"), "the labels are <U1 (5, 2); several"),
        (np.zeros((5, 2, 2), int), "the labels are int64 (5, 2, 2); expected 5 whole numbers"),
        (np.array(3), "the labels are int64 (); expected 5 whole numbers"),
    ],
)
def test_labels_that_are_none(labels, text, tmp_path, images):
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    assert text in refused(f"array:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize(
    ("save", "text"),
    [
        (lambda images: images.astype(np.complex64), "the array is complex64; images are one of uint8, uint16"),
        (lambda images: images.astype(np.int64), "the array is int64; images are one of"),
        (lambda images: images > 0, "the array is bool; images are one of"),
        (lambda images: images[:, :, 0, 0], "the array has the shape (5, 6); expected images x height x width (x chan"),
        (lambda images: images[:0], "the array has the shape (0, 6, 7, 3)"),
        (lambda images: np.zeros((2, 3, 20, 20), dtype=np.uint8), "looks like NCHW"),
        (lambda images: np.array([{}, "pickled"], dtype=object), "not a readable .npy or .npz"),
    ],
)
def test_arrays_that_are_no_images(save, text, tmp_path, images):
    np.save(tmp_path / "bad.npy", save(images), allow_pickle=True)
    assert text in refused(f"array:{tmp_path / 'bad.npy'}")


def test_files_that_are_no_arrays(tmp_path, images):
    for name, data in {"text.npy": b"x", "zero.npy": b"", "cut.npz": b"PK\x03\x04 and no more"}.items():
        (tmp_path / name).write_bytes(data)
        text = refused(f"array:{tmp_path / name}")
        assert "not a readable .npy or .npz" in text
        assert "allow_pickle" not in text
    assert "there is no file" in refused(f"array:{tmp_path / 'none.npy'}")
    assert f"did you mean folder:{tmp_path}?" in refused(f"array:{tmp_path}")
    np.savez(tmp_path / "two.npz", a=images, b=images)
    assert "holds ['a', 'b']; name the array of images 'images'" in refused(f"array:{tmp_path / 'two.npz'}")
    np.savez(tmp_path / "label.npz", images=images, labels=np.array([0, 1, 2**63 + 7, 0, 0], dtype=np.uint64))
    assert "the label 9223372036854775815 would mean" in refused(f"array:{tmp_path / 'label.npz'}")


@pytest.mark.parametrize("file", ["a.npy", "a.npz"])
def test_many_at_once(file, tmp_path, images):
    for array in (images, images[..., 0]):
        (np.save if file == "a.npy" else np.savez)(tmp_path / file, array)
        found = open_source(f"array:{tmp_path / file}").block(np.array([4, 0, 4]))
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, array[[4, 0, 4]].reshape(3, 6, 7, -1))
    for array in (np.zeros((2, 4, 4, 3), dtype=np.uint16), np.zeros((2, 256, 256, 3), dtype=np.uint8)):
        np.save(tmp_path / "large.npy", array)  # slower, or no pixels yet
        assert open_source(f"array:{tmp_path / 'large.npy'}").block(np.array([0])) is None


def test_an_npz_that_memory_cannot_hold_is_not_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((40, 50, 50, 3), dtype=np.uint8))
    assert len(open_source(f"array:{tmp_path / 'a.npz'}")) == 40
    monkeypatch.setattr(os, "sysconf", lambda name: 1000 if name == "SC_PHYS_PAGES" else 100)
    text = refused(f"array:{tmp_path / 'a.npz'}")
    assert "0.0 GB unpacked, more than the 0.0 of this machine's memory; save the images as .npy" in text
