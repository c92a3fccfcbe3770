"""Images in HDF5 files, against the arrays that were written."""

import pickle
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpp.data.sources.base import Source, SourceError
from mpp.data.sources.opening import open_splits

h5py = pytest.importorskip("h5py")
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(name: str = "a.h5", **arrays: Any) -> Path:
        with h5py.File(tmp_path / name, "w") as file:
            for key, array in arrays.items():
                packed = {"chunks": True, "compression": "gzip"} if np.ndim(array) else {}
                file.create_dataset(key.replace("__", "/"), data=array, **packed)
        return tmp_path / name

    return written


def check(source: Source, images: np.ndarray, labels: np.ndarray | None) -> None:
    assert np.array_equal([np.asarray(source.image(index)) for index in range(len(source))], images)
    found = source.labels()
    assert (found is None) if labels is None else (found is not None and found.tolist() == labels.tolist())


@pytest.mark.parametrize(
    ("arrays", "named", "labels"),
    [
        ({"images": IMAGES, "labels": LABELS}, ":images", LABELS),
        ({"images": IMAGES, "labels": LABELS}, "", LABELS),
        ({"x": IMAGES, "y": LABELS.reshape(-1, 1, 1, 1)}, "", LABELS),
        ({"deep__one": IMAGES, "deep__labels": LABELS}, ":deep/one", LABELS),
        ({"only": IMAGES[..., 0].astype(np.float32)}, "", None),
        ({"images": IMAGES.astype(">u2"), "other": IMAGES[:3]}, ":/images", None),
        ({"images": IMAGES, "label": 3}, "", None),  # of the file, not of its images
    ],
)
def test_a_dataset_is_read_row_by_row(
    arrays: dict[str, Any], named: str, labels: np.ndarray | None, write: Callable[..., Path]
) -> None:
    splits = open_splits(f"array:{write(**arrays)}{named}")
    assert list(splits) == ["train"]
    check(splits["train"], next(iter(arrays.values())), labels)


def test_several_labels_an_image(write: Callable[..., Path]) -> None:
    several = np.arange(len(IMAGES) * 3).reshape(-1, 3) % 2
    source = open_splits(f"array:{write(images=IMAGES, labels=several)}")["train"]
    sets = source.label_sets()
    assert sets is not None
    assert (source.classes, source.labels()) == (("0", "1", "2"), None)
    np.testing.assert_array_equal(sets.table[sets.number], several)
    assert (
        source.fingerprint()
        != open_splits(f"array:{write('b.h5', images=IMAGES, labels=1 - several)}")["train"].fingerprint()
    )


@pytest.mark.parametrize("form", ["{0}_images {0}_labels", "{0}__x {0}__y", "{0}__images {0}__labels"])
def test_splits_are_datasets(form: str, write: Callable[..., Path]) -> None:
    arrays = dict[str, Any]()
    for place, split in enumerate(("train", "valid", "test")):
        images, labels = form.format(split).split()
        arrays |= {images: IMAGES[4 * place :][:4], labels: LABELS[4 * place :][:4]}
    splits = open_splits(f"array:{write(**arrays)}")
    assert list(splits) == ["train", "val", "test"]
    for place, source in enumerate(splits.values()):
        check(source, IMAGES[4 * place :][:4], LABELS[4 * place :][:4])


def test_patchcamelyon_is_read_as_it_is(write: Callable[..., Path]) -> None:
    for place, split in enumerate(("train", "valid", "test")):
        rows = slice(4 * place, 4 * place + 4)
        name = f"camelyonpatch_level_2_split_{split}"
        path = write(f"{name}_x.h5", x=IMAGES[rows])
        write(f"{name}_y.h5", y=LABELS[rows].reshape(-1, 1, 1, 1))
    spec = f"array:{path.with_name('camelyonpatch_level_2_split_train_x.h5')}"
    for given in (spec, f"{spec}:x"):
        splits = open_splits(given)
        assert list(splits) == ["train", "val", "test"]
        for place, source in enumerate(splits.values()):
            check(source, IMAGES[4 * place :][:4], LABELS[4 * place :][:4])
    alone = open_splits(f"array:{path}")
    assert list(alone) == ["train"]
    check(alone["train"], IMAGES[8:], LABELS[8:])


def _sums(source: Source) -> list[int]:
    return [int(source.image(index).sum()) for index in range(len(source))]  # type: ignore[union-attr]


def test_every_process_opens_the_file(write: Callable[..., Path]) -> None:
    source = open_splits(f"array:{write(images=IMAGES)}")["train"]
    before = _sums(source)
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000
    assert _sums(pickle.loads(pickled)) == before == [int(image.sum()) for image in IMAGES]
    with get_context("fork").Pool(2) as pool:  # with a file that is open already
        assert pool.map(_sums, [source] * 4) == [before] * 4
    assert _sums(source) == before


def test_the_whole_file_is_never_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "large.h5", "w") as file:
        images = file.create_dataset("images", (10**6, 1000, 1000, 3), np.uint8, chunks=(1, 1000, 1000, 3))
        images[7] = 7
    source = open_splits(f"array:{tmp_path / 'large.h5'}")["train"]
    assert len(source) == 10**6
    assert np.asarray(source.image(7)).min() == 7


def test_large_chunks_are_a_warning(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "chunks.h5", "w") as file:
        file.create_dataset("images", (1000, 100, 100, 3), np.uint8, chunks=(1000, 100, 100, 3))
    (warning,) = open_splits(f"array:{tmp_path / 'chunks.h5'}")["train"].warnings
    assert "its chunks are 30 MB, and reading one image unpacks a whole one" in warning


def test_what_is_no_such_file_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    whole = write(images=IMAGES, labels=LABELS).read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.h5").write_text("text")
    (tmp_path / "folder.h5").mkdir()
    write("two.h5", a=IMAGES, b=IMAGES)
    write("text_labels.h5", images=IMAGES, labels=LABELS / 2)
    write("nchw.h5", images=np.zeros((2, 3, 32, 32), np.uint8))
    with h5py.File(tmp_path / "away.h5", "w") as file:
        file["images"] = h5py.ExternalLink("a.h5", "images")
    for name, message in {
        "cut.h5": "is no whole HDF5 file",
        "text.h5": "is no whole HDF5 file",
        "folder.h5": "is no file; give an HDF5 file",
        "none.h5": "there is no file",
        "two.h5": r"holds a, b; say which, .*two.h5:NAME",
        "a.h5:other": "has no dataset 'other'; it has images, labels",
        "a.h5:labels": "the array is int64; images are one of",
        "text_labels.h5": "the labels are float64",
        "nchw.h5": "looks like NCHW",
        "away.h5": "holds no array; say which",
        "away.h5:images": "has no dataset 'images'; it has none",
    }.items():
        with pytest.raises(SourceError, match=message) as error:
            open_splits(f"array:{tmp_path / name}")["train"].image(0)
        assert "\n" not in str(error.value)


def test_a_missing_package_is_named(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(images=IMAGES)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(SourceError, match=r"HDF5 needs the package h5py .*pip install"):
        open_splits(f"array:{path}")
