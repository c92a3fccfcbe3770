"""The predict command: classes of images, by a model that was fine-tuned or that came with a head."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.cli import predict
from mpp.weights.base import build
from mpp.weights.opening import open_weights
from tests.downstream.tuned import Done, read_csv

import timm  # isort: skip  (after mpp, which makes it importable beside the CPU build of torch)


@pytest.fixture(scope="module")
def images(split: str) -> Path:
    return Path(split.removeprefix("folder:"))


def test_it_says_what_the_run_said(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    rows = done.predictions[::5]
    assert predict(["--init", str(done.run_dir), "--device", "cpu", "--top", "1", *(row["path"] for row in rows)]) == 0
    lines = [f"{row['path']}: {row['predicted']} {float(row['probability']):.1%}" for row in rows]
    assert capsys.readouterr().out.splitlines() == lines


def test_a_folder_to_a_csv(done: Done, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(images / "train", tmp_path / "images" / "train")  # of a split folder all parts count
    shutil.copytree(images / "test" / "red", tmp_path / "images" / "test" / "red")
    (copy / "red" / ".hidden.png").write_text("hidden")
    (copy / "notes.txt").write_text("no image")
    out = tmp_path / "made" / "out.csv"
    words = ["--init", str(done.run_dir), str(tmp_path / "images"), "--device", "cpu", "--top", "1", "--out", str(out)]
    assert predict(words) == 0
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith(f"cannot be decoded: {copy / 'red' / 'text.png'}: not an image in a known format")
    rows = read_csv(out)
    assert list(rows[0]) == ["path", "class1", "probability1"]
    assert [row["path"] for row in rows] == sorted(str(path) for path in (tmp_path / "images").rglob("[0-9]*.png"))


def test_all_splits_of_a_source(done: Done, images: Path, tmp_path: Path) -> None:
    files = [images / split / name / "1.png" for split in ("train", "test") for name in ("red", "green")]
    arrays = [np.asarray(Image.open(path).convert("RGB").resize((20, 20))) for path in files]
    np.savez(tmp_path / "two.npz", train_images=np.stack(arrays[:2]), test_images=np.stack(arrays[2:]))
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{number}.png")
    words = ["--init", str(done.run_dir), "--device", "cpu", "--out"]
    assert predict([*words, str(tmp_path / "a.csv"), "--data", f"array:{tmp_path / 'two.npz'}"]) == 0
    assert predict([*words, str(tmp_path / "b.csv"), *(str(tmp_path / f"{number}.png") for number in range(4))]) == 0
    rows, expected = read_csv(tmp_path / "a.csv"), read_csv(tmp_path / "b.csv")
    places = [
        f"image {number} of {split}_images in {tmp_path / 'two.npz'}"
        for split in ("train", "test")
        for number in (0, 1)
    ]
    assert [row.pop("path") for row in rows] == places
    assert rows == [{name: value for name, value in row.items() if name != "path"} for row in expected]


def test_a_classifier_of_timm_s_sees_what_timm_shows_it(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    told = {"crop_pct": 0.75, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3), "input_size": (3, 40, 40)}
    timm.models.save_for_hf(model, str(tmp_path / "timm"), data_config=told, safe_serialization=True)
    out = tmp_path / "out.csv"
    argv = [str(images / "train"), "--init", str(tmp_path / "timm"), "--top", "10", "--out", str(out)]
    assert predict([*argv, "--device", "cpu"]) == 0
    model.pretrained_cfg = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).pretrained_cfg

    def off(**changed: float) -> float:
        data = timm.data.resolve_model_data_config(model) | changed
        transform = timm.data.create_transform(**data)
        wrong = []
        for row in read_csv(out):
            with torch.no_grad(), Image.open(row["path"]) as image:
                expected = model(transform(image)[None])[0].softmax(dim=0)
            wrong += [float(row[f"probability{k}"]) - float(expected[int(row[f"class{k}"])]) for k in range(1, 11)]
        return float(np.abs(wrong).max())

    assert off() < 0.1 * off(crop_pct=1.0)


def test_images_of_too_many_bytes_are_said(
    done: Done, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large, file, small = tmp_path / "large.png", tmp_path / "file.jpg", images / "train" / "red" / "0.png"
    Image.new("RGB", (600, 500)).save(large)
    with file.open("wb") as out:
        out.truncate(2**36)
    words = ["--init", str(done.run_dir), "--device", "cpu", str(large), str(small), str(file)]
    assert predict([*words, "--max-image-mb", "1"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{small}: ")
    assert told.err.splitlines() == [
        f"cannot be decoded: {large}: 600 x 500 pixels, 1.2 MB, more than data.max_image_mb 1 allows",
        f"cannot be decoded: {file}: 68,719.5 MB, more than data.max_image_mb 1 allows",
    ]
    assert predict(words) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [str(large), str(small)]


WRONG = {
    "a.png": "no model: give --init",
    "--init RUN": "no images: name files or folders",
    "--init RUN IMAGE --data demo": "both --data and --images: name files or folders",
    "--init RUN --data folder:TMP/nowhere": "folder:TMP/nowhere: there is no folder TMP/nowhere",
    "--init RUN TMP/nowhere.png": "there is no image TMP/nowhere.png",
    "--init RUN IMAGE TMP/nowhere.png": "there is no image TMP/nowhere.png",
    "--init RUN TMP/empty": "there is no image in the folder TMP/empty",
    "--init TMP/nowhere IMAGE": "--init TMP/nowhere: there is no such file or folder",
    "--init random:test_vit IMAGE": "--init random:test_vit has no head to classify with",
    "--init RUN IMAGE --top 0": "top must be at least 1",
    "--init RUN IMAGE --topp 1": "no setting '--topp'; did you mean '--top'?",
    "--init RUN IMAGE --out TMP/empty": "cannot write --out TMP/empty",
    "--init RUN IMAGE --out TMP/file/out.csv": "cannot write --out TMP/file/out.csv",
}


@pytest.mark.parametrize(("words", "said"), WRONG.items())
def test_wrong_input_is_one_line(
    words: str, said: str, done: Done, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    places = {"RUN": str(done.run_dir), "IMAGE": str(images / "train" / "red" / "0.png"), "TMP": str(tmp_path)}
    for name, value in places.items():
        words, said = words.replace(name, value), said.replace(name, value)
    assert predict(words.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("predict: error: ")
    assert said in line
    assert sorted(tmp_path.rglob("*")) == before


def test_no_image_that_decodes(done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.png").write_text("no image")
    words = ["--images", str(tmp_path / "bad.png"), "--init", str(done.run_dir), "--out", str(tmp_path / "x.csv")]
    assert predict([*words, "--device", "cpu"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "predict: error: none of the 1 images could be decoded"
    assert not (tmp_path / "x.csv").exists()


def test_names_of_several_lines_are_said_on_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = replace(open_weights("random:test_vit"), classes=("a\nb", "\x1b[31m"))
    weights = replace(weights, state=build(weights).state_dict())
    monkeypatch.setattr("mpp.downstream.predict.open_weights", lambda spec: weights)
    path = tmp_path / os.fsdecode(b"\xff\n1.png")
    Image.new("RGB", (8, 8)).save(path)
    assert predict(["--init", "x", str(path), "--device", "cpu"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(rf"{tmp_path}/\xff\n1.png: ")
    line.encode()  # what a terminal of strict UTF-8 takes
    assert "a b " in line
    assert r"\x1b[31m " in line
