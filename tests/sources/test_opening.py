import os
import pickle

import numpy as np
import pytest

from mpp.sources.base import ListSource, SourceError, Subset
from mpp.sources.opening import has_split, open_source


def names(source):
    return [source.where(i) for i in range(len(source))]


def refused(spec, **options):
    """The text of the SourceError, which is one line."""
    with pytest.raises(SourceError) as caught:
        open_source(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_without_classes(picture_folder):
    folder = picture_folder("b.png", "a.JPG", "deep/er/c.jpeg")
    source = open_source(f"folder:{folder}")
    assert names(source) == [str(folder / name) for name in ("a.JPG", "b.png", "deep/er/c.jpeg")]
    assert source.classes is None
    assert source.labels() is None
    assert source.read(0) == ((folder / "a.JPG").read_bytes(), None)
    assert source.describe() == "3 images, unlabelled"
    assert source.name == f"folder:{folder}"


def test_folder_with_classes(picture_folder):
    folder = picture_folder("dog/2.png", "cat/1.png", "cat/young/3.png", "dog/1.png")
    (folder / "empty").mkdir()
    source = open_source(f"folder:{folder}")
    assert source.classes == ("cat", "dog")
    assert source.labels().tolist() == [0, 0, 1, 1]
    assert source.labels().dtype == np.int64
    assert [source.read(i)[1] for i in range(4)] == [0, 0, 1, 1]
    assert source.describe() == "4 images in 2 classes"


def test_one_sub_folder_is_no_class(picture_folder):
    assert open_source(f"folder:{picture_folder('all/1.png', 'all/2.png')}").classes is None


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "jpe", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "PGM"])
def test_extensions(extension, picture_folder):
    assert len(open_source(f"folder:{picture_folder('a.' + extension)}")) == 1


def test_what_a_folder_passes_over(picture_folder):
    folder = picture_folder("1.png", ".hidden.png", "__MACOSX/2.png", ".git/3.png", "notes.txt", "png", "Thumbs.db")
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    (folder / "linked.png").symlink_to(folder / "1.png")
    (folder / "round").mkdir()
    (folder / "round" / "again").symlink_to(folder)
    source = open_source(f"folder:{folder}")
    assert names(source) == [str(folder / "1.png"), str(folder / "linked.png")]
    assert source.describe() == "2 images, unlabelled; ignored 4 hidden and 6 other files"


def test_linked_class_folders_are_followed(picture_folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    folder = picture_folder("a/1.png")
    (elsewhere / "2.png").write_bytes((folder / "a" / "1.png").read_bytes())
    (folder / "b").symlink_to(elsewhere)
    assert open_source(f"folder:{folder}").labels().tolist() == [0, 1]


def test_names_that_are_not_utf_8(picture_folder):
    folder = picture_folder("ü €.png")
    strange = os.fsencode(folder) + b"/\xff.png"
    with open(strange, "wb") as file:
        file.write(b"x")
    source = open_source(f"folder:{folder}")
    assert sorted(source.read(i)[0][:1] for i in range(2)) == [b"x", b"\x89"]


def test_home_is_expanded(picture_folder, monkeypatch):
    folder = picture_folder("pics/1.png")
    monkeypatch.setenv("HOME", str(folder))
    assert len(open_source("folder:~/pics")) == 1


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folder_with_splits(held_out, picture_folder):
    folder = picture_folder(
        "train/a/1.png", "train/b/2.png", "train/c/3.png", f"{held_out}/b/4.png", f"{held_out}/c/5.png"
    )
    (folder / "README.md").write_text("about")
    spec = f"folder:{folder}"
    assert has_split(spec)
    train, test = open_source(spec), open_source(spec, "test")
    assert [len(train), len(test)] == [3, 2]
    assert train.classes == test.classes == ("a", "b", "c")
    assert test.labels().tolist() == [1, 2]


def test_folders_that_are_not_split(picture_folder):
    folder = picture_folder("train/a/1.png", "test/a/2.png", "other/3.png")
    assert not has_split(f"folder:{folder}")
    assert open_source(f"folder:{folder}").classes == ("other", "test", "train")
    assert "has no test split of its own" in refused(f"folder:{folder}", split="test")
    assert not has_split(f"folder:{folder / 'train'}")
    assert not has_split(f"folder:{folder / 'missing'}")


def test_a_class_that_the_train_split_lacks(picture_folder):
    folder = picture_folder("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/aardvark/4.png", "test/zebra/5.png")
    train, test = open_source(f"folder:{folder}"), open_source(f"folder:{folder}", "test")
    assert train.classes == ("a", "b")
    assert test.classes == ("a", "b", "aardvark", "zebra")  # after the train split's, so that those keep their numbers
    assert test.labels().tolist() == [0, 2, 3]


def test_has_split_by_kind(tmp_path):
    assert has_split("demo")
    assert has_split(f"cifar10:{tmp_path}")
    assert has_split(f"cifar100:{tmp_path}")
    assert not has_split("array:x.npy")
    assert not has_split("shards:x-{0..3}.tar")


def test_folder_errors(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "empty" / "a.txt").write_text("x")
    assert f"there is no folder {tmp_path / 'none'}" in refused(f"folder:{tmp_path / 'none'}")
    assert f"is a file; give the folder that it lies in, folder:{tmp_path}" in refused(f"folder:{tmp_path / 'file'}")
    text = refused(f"folder:{tmp_path / 'empty'}")
    assert f"no image in {tmp_path / 'empty'} (ignored 1 other file); expected files that end in jpg" in text


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("", "no source of images was given"),
        ("flder:/x", "there is no kind of source called 'flder'; did you mean folder:/x?"),
        ("cifar:/x", "did you mean cifar10:/x?"),
        ("Shards:a.tar", "did you mean shards:a.tar?"),
        ("deom", "did you mean demo?"),
        ("qqq:1", "a source is one of folder:DIR, shards:GLOB"),
        ("folder:", "does not say where; write folder:DIR"),
        ("array", "does not say where; write array:FILE.npy"),
        ("demo:72", "demo takes no argument; write demo"),
    ],
)
def test_unknown_kinds(spec, text):
    assert text in refused(spec)


def test_paths_without_a_kind(tmp_path):
    assert f"did you mean folder:{tmp_path}?" in refused(str(tmp_path))
    for name, kind in (("a.npy", "array"), ("a.npz", "array"), ("a.tar", "shards"), ("a.tar.gz", "shards")):
        (tmp_path / name).touch()
        assert f"did you mean {kind}:{tmp_path / name}?" in refused(str(tmp_path / name))
    (tmp_path / "a.png").touch()
    assert f"single file: did you mean the folder that it lies in, folder:{tmp_path}?" in refused(
        str(tmp_path / "a.png")
    )


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)


def test_array(tmp_path, images):
    np.save(tmp_path / "a.npy", images)
    source = open_source(f"array:{tmp_path / 'a.npy'}")
    assert len(source) == 5
    np.testing.assert_array_equal(source.read(3)[0], images[3])
    assert source.read(3)[1] is None
    assert source.labels() is None
    assert source.describe() == "5 images, unlabelled"
    copy = pickle.dumps(source)
    assert len(copy) < images.nbytes
    np.testing.assert_array_equal(pickle.loads(copy).read(4)[0], images[4])
    np.save(tmp_path / "grey.npy", images[..., 0])
    assert open_source(f"array:{tmp_path / 'grey.npy'}").read(0)[0].shape == (6, 7)


@pytest.mark.parametrize(("key", "label_key"), [("images", "labels"), ("x", "y"), ("anything", "labels")])
def test_npz_with_labels(key, label_key, tmp_path, images):
    np.savez(tmp_path / "a.npz", **{key: images, label_key: np.array([2, 0, 1, 2, 0], dtype=np.uint8)})
    source = open_source(f"array:{tmp_path / 'a.npz'}")
    assert source.labels().tolist() == [2, 0, 1, 2, 0]
    assert source.labels().dtype == np.int64
    assert source.classes == ("0", "1", "2")
    assert source.read(0)[1] == 2
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(1)[0], images[1])


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_uint16_is_scaled_from_its_own_range(dtype, tmp_path):
    wide = np.random.default_rng(0).integers(1000, 5000, (4, 5, 6)).astype(dtype)
    np.save(tmp_path / "a.npy", wide)
    source = open_source(f"array:{tmp_path / 'a.npy'}")
    low, high = int(wide.min()), int(wide.max())
    expected = np.rint((wide.astype(float) - low) / (high - low) * 255)
    got = np.stack([source.read(i)[0] for i in range(4)])
    assert got.dtype == np.uint8
    assert [got.min(), got.max()] == [0, 255]
    assert np.abs(got - expected).max() <= 1
    assert source.describe() == f"4 images, unlabelled; uint16 scaled from {low}..{high} to 0..255"
    np.save(tmp_path / "flat.npy", np.full((2, 3, 3), 700, dtype=np.uint16))
    assert open_source(f"array:{tmp_path / 'flat.npy'}").read(0)[0].max() == 0


def test_array_errors(tmp_path, images):
    def saved(array):
        np.save(tmp_path / "bad.npy", array, allow_pickle=True)
        return refused(f"array:{tmp_path / 'bad.npy'}")

    assert "the array is float32; images are uint8 or uint16" in saved(images.astype(np.float32))
    assert "the array has the shape (5, 6); expected NHWC or NHW" in saved(images[:, :, 0, 0])
    assert "the array has the shape (0, 6, 7, 3)" in saved(images[:0])
    assert "looks like NCHW" in saved(np.zeros((2, 3, 20, 20), dtype=np.uint8))
    assert "not a readable .npy or .npz" in saved(np.array([{}, "pickled"], dtype=object))
    (tmp_path / "text.npy").write_text("x")
    assert "not a readable .npy or .npz" in refused(f"array:{tmp_path / 'text.npy'}")
    (tmp_path / "zero.npy").touch()
    assert "not a readable .npy or .npz" in refused(f"array:{tmp_path / 'zero.npy'}")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    assert "not a readable .npy or .npz" in refused(f"array:{tmp_path / 'cut.npz'}")
    assert "there is no file" in refused(f"array:{tmp_path / 'none.npy'}")
    assert f"did you mean folder:{tmp_path}?" in refused(f"array:{tmp_path}")
    np.savez(tmp_path / "two.npz", a=images, b=images)
    assert "holds ['a', 'b']; name the array of images 'images'" in refused(f"array:{tmp_path / 'two.npz'}")
    for labels in (np.zeros(4, int), np.zeros(5), np.array([0, 1, -1, 0, 0]), np.zeros((5, 1), int)):
        np.savez(tmp_path / "labels.npz", images=images, labels=labels)
        assert "expected 5 whole numbers from 0" in refused(f"array:{tmp_path / 'labels.npz'}")


def test_subset(images):
    source = ListSource(list(images), [0, 1, 0, 1, 2], ("x", "y", "z"))
    subset = Subset(source, [4, 1])
    assert len(subset) == 2
    assert subset.classes == ("x", "y", "z")
    assert subset.labels().tolist() == [2, 1]
    np.testing.assert_array_equal(subset.read(0)[0], images[4])
    assert subset.read(1)[1] == 1
    assert subset.describe() == "2 of 5 images in 3 classes"
    assert Subset(subset, [1]).labels().tolist() == [1]
    assert len(Subset(source, [])) == 0
    with pytest.raises(IndexError):
        Subset(source, [5])
    with pytest.raises(IndexError):
        subset.read(2)


def test_sources_do_not_count_from_the_end(picture_folder, images, tmp_path):
    np.save(tmp_path / "a.npy", images)
    folder = picture_folder("1.png")
    for source in (ListSource(images), open_source(f"folder:{folder}"), open_source(f"array:{tmp_path / 'a.npy'}")):
        for index in (-1, len(source)):
            with pytest.raises(IndexError):
                source.read(index)


def test_large_folders_stay_small(picture_folder):
    folder = picture_folder(*(f"{i % 3}/{i:04d}.png" for i in range(300)))
    assert len(pickle.dumps(open_source(f"folder:{folder}"))) < 300 * 40
