import os
import pickle
import shutil
import socket

import numpy as np
import pytest

from mpp.data.sources.opening import open_source, open_splits
from tests.data.sources.reading import refused


def names(source):
    return [source.location(i) for i in range(len(source))]


def test_folder_without_classes(picture_folder):
    folder = picture_folder("b.png", "a.JPG", "deep/er/c.jpeg")
    source = open_source(f"folder:{folder}")
    assert names(source) == [str(folder / name) for name in ("a.JPG", "b.png", "deep/er/c.jpeg")]
    assert (source.classes, source.labels(), source.name) == (None, None, f"folder:{folder}")
    assert source.read(0) == ((folder / "a.JPG").read_bytes(), None)
    assert source.describe() == "3 images, unlabelled"
    assert open_source(f"folder:{picture_folder('all/1.png', 'all/2.png')}/all").classes is None


def test_folder_with_classes(picture_folder, tmp_path_factory):
    folder = picture_folder("dog/2.png", "cat/1.png", "cat/young/3.png", "dog/1.png")
    (folder / "empty").mkdir()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(folder / "cat" / "1.png", elsewhere)
    (folder / "linked").symlink_to(elsewhere)
    source = open_source(f"folder:{folder}")
    assert source.classes == ("cat", "dog", "linked")
    assert source.labels().tolist() == [source.read(i)[1] for i in range(5)] == [0, 0, 1, 1, 2]
    assert source.labels().dtype == np.int64
    assert source.describe() == "5 images in 3 classes"


def test_extensions(picture_folder):
    read = ["jpg", "jpeg", "jpe", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "PGM"]
    assert len(open_source(f"folder:{picture_folder(*(f'a.{extension}' for extension in read))}")) == len(read)


def test_files_that_a_folder_passes_over(picture_folder):
    hidden = (".hidden.png", "__MACOSX/2.png", ".git/3.png", "Thumbs.db", "._1.jpg", "@eaDir/4.png", "lost+found/5.png")
    more = ("$RECYCLE.BIN/6.png", "System Volume Information/7.png", ".ipynb_checkpoints/8.png", ".DS_Store")
    folder = picture_folder("1.png", "2.jpg/3.png", *hidden, *more, "desktop.ini", "notes.txt", "png")
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "linked.png").symlink_to(folder / "1.png")
    (folder / "round").mkdir()
    (folder / "round" / "again").symlink_to(folder)
    source = open_source(f"folder:{folder}")
    # A folder that is called as an image is a folder.
    assert names(source) == [str(folder / name) for name in ("1.png", "linked.png", "2.jpg/3.png")]
    assert source.describe() == "3 images, unlabelled; ignored 12 hidden and 5 other files"


@pytest.mark.usefixtures("any_name")
def test_order_is_that_of_the_bytes_of_names(picture_folder):
    strange = ("1/ü €.png", "1/€.png", "1/z.png", "1/\udcff.png", "1/\U0001f600.png", "B/1.png")
    folder = picture_folder(*(f"{i % 3}/{i:04d}.png" for i in range(10)), *strange)
    source = open_source(f"folder:{folder}")
    expected = sorted((path.relative_to(folder).as_posix() for path in folder.rglob("*.png")), key=os.fsencode)
    assert [os.path.relpath(name, folder) for name in names(source)] == expected
    assert all(source.read(i)[0][1:4] == b"PNG" for i in range(len(source)))
    assert len(pickle.dumps(source)) < 16 * 60 + 1000


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_with_splits(test_name, picture_folder):
    folder = picture_folder(
        *("train/a/1.png", "train/b/2.png", "train/c/3.png"), f"{test_name}/b/4.png", f"{test_name}/c/5.png"
    )
    (folder / "README.md").write_text("about")
    splits = open_splits(f"folder:{folder}")
    train, test = splits["train"], splits["test"]
    assert [len(train), len(test)] == [3, 2]
    assert train.classes == test.classes == ("a", "b", "c")
    assert test.labels().tolist() == [1, 2]
    assert test.describe() == f"2 images in 3 classes; {test_name}/ alone, as its sub-folders are splits"


def test_folders_that_are_not_split(picture_folder):
    folder = picture_folder("train/a/1.png", "test/a/2.png", "other/3.png")
    splits = open_splits(f"folder:{folder}")
    assert (list(splits), len(splits), "test" in splits, splits.get("test")) == (["train"], 1, False, None)
    with pytest.raises(KeyError):
        splits["test"]
    assert splits["train"].classes == ("other", "test", "train")
    assert "has no test split of its own" in refused(f"folder:{folder}", split="test")
    assert "test" not in open_splits(f"folder:{folder / 'train'}")
    assert "test" not in open_splits(f"folder:{folder / 'missing'}")


def test_a_class_that_the_train_split_lacks(picture_folder):
    folder = picture_folder("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/aardvark/4.png", "test/zebra/5.png")
    train, test = open_source(f"folder:{folder}"), open_source(f"folder:{folder}", "test")
    assert train.classes == ("a", "b")
    assert test.classes == ("a", "b", "aardvark", "zebra")  # after the train split's, so that those keep their numbers
    assert test.labels().tolist() == [0, 2, 3]


def test_folder_errors(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "empty" / "a.txt").write_text("x")
    assert f"there is no folder {tmp_path / 'none'}" in refused(f"folder:{tmp_path / 'none'}")
    assert f"is a file; give the folder that it lies in, folder:{tmp_path}" in refused(f"folder:{tmp_path / 'file'}")
    text = refused(f"folder:{tmp_path / 'empty'}")
    assert f"no image in {tmp_path / 'empty'} (ignored 1 other file); expected files that end in jpg" in text


def test_bad_entries_are_listed_and_fail_when_read(picture_folder):
    folder = picture_folder("a/1.png", "b/2.png")
    os.mkfifo(folder / "a" / "fifo.png")
    (folder / "a" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "b" / "itself.png").symlink_to(folder / "b" / "itself.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "b" / "socket.png"))
    (folder / "c").mkdir()
    (folder / "c" / "only.png").symlink_to(folder / "nowhere.png")
    source = open_source(f"folder:{folder}")
    assert source.classes == ("a", "b", "c")
    found = {
        source.location(index).rpartition("/")[2]: type(image if isinstance(image, OSError) else image[0]).__name__
        for index, image in enumerate(source.read_many(range(len(source))))
    }
    assert found == {
        **{"1.png": "bytes", "2.png": "bytes", "fifo.png": "NotAFile", "gone.png": "FileNotFoundError"},
        **{"itself.png": "OSError", "socket.png": "NotAFile", "only.png": "FileNotFoundError"},
    }


def test_a_broken_link_among_the_classes_of_a_split(picture_folder):
    folder = picture_folder("train/a/1.png", "train/b/2.png", "test/b/3.png")
    for name in ("train/gone", "train/a/gone.png", "test/gone"):
        (folder / name).symlink_to("nowhere")
    (folder / "train" / "itself").symlink_to("itself")
    assert open_splits(f"folder:{folder}")["test"].classes == ("a", "b")
    (folder / "gone.png").symlink_to("nowhere")  # an image beside the splits
    assert "test" not in open_splits(f"folder:{folder}")


def test_folders_nested_deeper_than_functions(tmp_path):
    path = tmp_path / "deep"
    path.mkdir()
    for _ in range(1100):
        path /= "d"
        path.mkdir()
    (path / "1.png").write_bytes(b"deep")
    assert open_source(f"folder:{tmp_path}").read(0) == (b"deep", None)
    (path / "1.png").unlink()
    while path != tmp_path:  # shutil.rmtree calls itself
        path.rmdir()
        path = path.parent


def test_pictures_that_are_not_read_are_a_warning(tmp_path):
    for i in range(100):
        for extension in ("HEIC", "txt", "jpg"):
            (tmp_path / f"{i:03d}.{extension}").touch()
    (warning,) = open_source(f"folder:{tmp_path}").warnings
    assert warning.startswith("100 pictures ignored, such as 000.HEIC: only files that end in jpg ")
    (tmp_path / "000.HEIC").unlink()
    assert open_source(f"folder:{tmp_path}").warnings == ()  # fewer than a hundred, and than those that are read
    for i in range(2, 100):
        (tmp_path / f"{i:03d}.jpg").unlink()
    assert len(open_source(f"folder:{tmp_path}").warnings) == 1


def test_a_folder_is_listed_once_for_both_splits(picture_folder, monkeypatch):
    folder = picture_folder(*(f"{split}/{kind}/1.png" for split in ("train", "val") for kind in "ab"), "val/c/1.png")
    listed = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(os.path.relpath(path, folder)) or real(path))
    splits = open_splits(f"folder:{folder}")
    assert (splits["test"].classes, splits["train"].classes) == (("a", "b", "c"), ("a", "b"))
    assert sorted(listed) == [".", "train", "train/a", "train/b", "val", "val/a", "val/b", "val/c"]
