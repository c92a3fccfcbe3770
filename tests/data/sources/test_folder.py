import os
import pickle
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from mpp.data.sources.folder import split_folders
from mpp.data.sources.opening import open_source, open_splits
from tests.data.sources.reading import all_read, locations, refused


def test_folder_without_classes(picture_folder):
    folder = picture_folder("b.png", "a.JPG", "deep/er/c.jpeg")
    source = open_source(f"folder:{folder}")
    assert locations(source) == [str(folder / name) for name in ("a.JPG", "b.png", "deep/er/c.jpeg")]
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
    assert source.labels().tolist() == [label for _, label in all_read(source)] == [0, 0, 1, 1, 2]
    assert source.labels().dtype == np.int64
    assert source.describe() == "5 images in 3 classes"


def test_which_files_a_folder_reads_and_passes_over(picture_folder):
    read = ("jpg", "jpeg", "jpe", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "PGM")
    hidden = (".hidden.png", "__MACOSX/2.png", ".git/3.png", "Thumbs.db", "._1.jpg", "@eaDir/4.png", "lost+found/5.png")
    more = ("$RECYCLE.BIN/6.png", "System Volume Information/7.png", ".ipynb_checkpoints/8.png", ".DS_Store")
    images = sorted(f"1.{extension}" for extension in read)
    folder = picture_folder(*images, "2.jpg/3.png", *hidden, *more, "desktop.ini", "notes.txt", "png")
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "linked.png").symlink_to(folder / "1.png")
    (folder / "round").mkdir()
    (folder / "round" / "again").symlink_to(folder)
    source = open_source(f"folder:{folder}")
    # A folder that is called as an image is a folder.
    assert locations(source) == [str(folder / name) for name in (*images, "linked.png", "2.jpg/3.png")]
    assert source.describe() == "13 images, unlabelled; ignored 12 hidden and 5 other files"


@pytest.mark.usefixtures("any_name")
def test_order_is_that_of_the_bytes_of_names(picture_folder):
    strange = ("1/ü €.png", "1/€.png", "1/z.png", "1/\udcff.png", "1/\U0001f600.png", "B/1.png")
    folder = picture_folder(*(f"{i % 3}/{i:04d}.png" for i in range(10)), *strange)
    source = open_source(f"folder:{folder}")
    expected = sorted((path.relative_to(folder).as_posix() for path in folder.rglob("*.png")), key=os.fsencode)
    assert [os.path.relpath(name, folder) for name in locations(source)] == expected
    assert all(data[1:4] == b"PNG" for data, _ in all_read(source))
    assert len(pickle.dumps(source)) < 16 * 60 + 1000


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_with_splits(test_name, picture_folder, monkeypatch):
    train, test = ("train/a/1.png", "train/b/2.png"), ("a/3.png", "aardvark/4.png", "zebra/5.png")
    folder = picture_folder(*train, *(f"{test_name}/{name}" for name in test))
    (folder / "README.md").write_text("about")
    (folder / "train" / "itself").symlink_to("itself")  # broken links are no classes
    (folder / test_name / "gone").symlink_to("nowhere")
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(os.path.relpath(path, folder)) or scandir(path))
    splits = open_splits(f"folder:{folder}")
    test, train = splits["test"], splits["train"]
    assert train.classes == ("a", "b")
    assert test.classes == ("a", "b", "aardvark", "zebra")  # after the train split's, so that those keep their numbers
    assert test.labels().tolist() == [0, 2, 3]
    assert test.describe().startswith(f"3 images in 4 classes; {test_name}/ alone, as its sub-folders are splits")
    below = ("train", "train/a", "train/b", *(f"{test_name}/{name}" for name in ("a", "aardvark", "zebra")))
    assert sorted(listed) == sorted((".", *below, test_name))  # each once
    (folder / "gone.png").symlink_to("nowhere")  # an image beside the splits
    assert "test" not in open_splits(f"folder:{folder}")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("training", "validation"), {"train": "training", "test": "validation"}),
        (("train", "valid", "test"), {"train": "train", "val": "valid", "test": "test"}),
        (("Train", "Dev", "TESTING"), {"train": "Train", "val": "Dev", "test": "TESTING"}),
        (("train", "eval"), {"train": "train", "test": "eval"}),
        (("valid", "test"), {}),
        (("train", "val", "valid"), {}),  # two of a kind: not what it seems
    ],
)
def test_what_splits_are_called(names, expected, picture_folder):
    folder = picture_folder(*(f"{name}/{label}/1.png" for name in names for label in "ab"))
    assert {split: path.name for split, path in split_folders(folder).items()} == expected
    assert set(open_splits(f"folder:{folder}")) == (set(expected) or {"train"})


def test_folders_that_are_not_split(picture_folder):
    folder = picture_folder("train/a/1.png", "test/a/2.png", "other/3.png")
    splits = open_splits(f"folder:{folder}")
    assert (list(splits), len(splits), "test" in splits, splits.get("test")) == (["train"], 1, False, None)
    assert splits["train"].classes == ("other", "test", "train")
    assert "has no test split of its own" in refused(f"folder:{folder}", split="test")
    assert "test" not in open_splits(f"folder:{folder / 'train'}")
    assert "test" not in open_splits(f"folder:{folder / 'missing'}")


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
    found = [type(each if isinstance(each, OSError) else each[0]).__name__ for each in source.read_many(range(7))]
    assert dict(zip((location.rpartition("/")[2] for location in locations(source)), found, strict=True)) == {
        **{"1.png": "bytes", "2.png": "bytes", "fifo.png": "NotAFile", "gone.png": "FileNotFoundError"},
        **{"itself.png": "OSError", "socket.png": "NotAFile", "only.png": "FileNotFoundError"},
    }


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
        for extension in ("JP2", "txt", "jpg"):
            (tmp_path / f"{i:03d}.{extension}").touch()
    (warning,) = open_source(f"folder:{tmp_path}").warnings
    assert warning.startswith("100 pictures ignored, such as 000.JP2: only files that end in jpg ")
    (tmp_path / "000.JP2").unlink()
    assert open_source(f"folder:{tmp_path}").warnings == ()  # fewer than a hundred, and than those that are read
    for i in range(2, 100):
        (tmp_path / f"{i:03d}.jpg").unlink()
    assert len(open_source(f"folder:{tmp_path}").warnings) == 1


def pictures(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


LAYOUTS: dict[
    str, tuple[list[str], dict[str, int], str]
] = {  # files, images by split, what the first warning begins with
    "YOLO": (
        ["data.yaml", "images/train/1.jpg", "images/val/2.jpg", "labels/train/1.txt", "labels/val/2.txt"],
        {"train": 1, "test": 1},
        "",
    ),
    "YOLO, not split": (["data.yaml", "images/1.jpg", "images/a/2.jpg", "images/b/3.jpg"], {"train": 3}, ""),
    "Roboflow": (
        ["train/images/1.jpg", "train/labels/1.txt", "valid/images/2.jpg", "valid/labels/2.txt", "test/images/3.jpg"],
        {"train": 1, "val": 1, "test": 1},
        "",
    ),
    "COCO": (
        ["annotations/instances.json", "images/train2017/1.jpg", "images/train2017/2.jpg", "images/val2017/3.jpg"],
        {"train": 2, "test": 1},
        "",
    ),
    "COCO without images/": (
        [
            "annotations/a.json",
            "train2014/1.jpg",
            "train2017/1.jpg",
            "train2017/2.jpg",
            "val2017/3.jpg",
            "unlabeled2017/4.jpg",
        ],
        {"train": 2, "test": 1},
        "",
    ),
    "COCO, two sets to learn from": (["train2017/1.jpg", "unlabeled2017/2.jpg"], {"train": 2}, ""),
    "masks": (
        ["images/1.jpg", "images/2.jpg", "Masks/1.png", "Masks/2.png"],
        {"train": 2},
        "pictures beside images are taken for masks and not read: 2 in Masks/",
    ),
    "masks of splits": (
        ["train/images/1.jpg", "train/gt/1.png", "val/images/2.jpg", "val/gt/2.png"],
        {"train": 1, "test": 1},
        "pictures beside images are taken for masks and not read: 1 in gt/",
    ),
    "Pascal VOC": (
        ["JPEGImages/1.jpg", "SegmentationClass/1.png", "Annotations/1.xml", "ImageSets/Main/train.txt"],
        {"train": 1},
        "pictures beside images are taken for masks and not read: 1 in SegmentationClass/",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_sets_for_detection_and_segmentation_are_unlabelled_images(layout: str, tmp_path: Path) -> None:
    files, counts, warning = LAYOUTS[layout]
    pictures(tmp_path, *files)
    splits = open_splits(f"folder:{tmp_path}")
    assert {split: len(source) for split, source in splits.items()} == counts
    for source in splits.values():
        assert source.classes is None
        assert "".join(source.warnings).startswith(warning)


def test_masks_of_each_patient_are_passed_over(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"{patient}/{kind}/1.png" for patient in "ab" for kind in ("images", "masks")))
    source = open_splits(f"folder:{tmp_path}")["train"]
    assert (source.classes, len(source)) == (("a", "b"), 2)
    assert source.warnings == ("pictures beside images are taken for masks and not read: 2 in masks/",)


def test_a_class_may_be_called_masks(tmp_path: Path) -> None:
    pictures(tmp_path, "masks/1.jpg", "hats/2.jpg", "labels/3.jpg")
    source = open_splits(f"folder:{tmp_path}")["train"]
    assert (source.classes, source.warnings) == (("hats", "labels", "masks"), ())
