"""Features of images as a file: against timm's, in every format, after a stop, and what is refused."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.cli import embed
from mpp.data.sources.opening import open_splits
from mpp.dist import World
from mpp.downstream import embed as embed_room
from mpp.downstream.embed import Parts
from mpp.downstream.feature_file import FeatureFile, read_features
from mpp.downstream.features import FrozenEncoder
from mpp.training.bad_files import HEAD
from tests import runs
from tests.downstream.tuned import in_timm, pixels

CPU = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]


def words(out: Path, init: str | Path, source: str, *flags: str) -> list[str]:
    return ["--init", str(init), "--data", source, "--out", str(out), *CPU, *flags]


@pytest.fixture(scope="module")
def whole(pretrained: Path, split: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of `split` by a pretraining run, made in two parts; the second image of all is bad."""
    out = tmp_path_factory.mktemp("features") / "features.npz"
    assert embed(words(out, pretrained, split)) == 0
    return out


def test_features_are_those_of_the_exported_model_in_timm(whole: Path, pretrained: Path, split: str) -> None:
    found = read_features(whole)
    model, row = in_timm(pretrained, num_classes=0), 0
    for name, source in open_splits(split).items():
        for index in range(len(source)):
            path = Path(source.location(index))
            if path.name in ("text.png", "empty.png"):
                continue
            assert found.record(row) == (str(path), path.parent.name, name, index)
            with torch.inference_mode():
                expected = model.forward_features(pixels([str(path)], model))[:, 1:].mean(dim=1)[0]
            np.testing.assert_allclose(found.features[row], expected.numpy(), rtol=0, atol=1e-5)
            row += 1
    assert row == len(found.features) == len(found.names)
    with whole.with_name("features.npz.bad_files.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert tuple(head) == HEAD
    assert [(row[1], Path(row[2]).name) for row in rows] == [("not an image", "text.png"), ("empty", "empty.png")]
    assert sorted(path.name for path in whole.parent.iterdir()) == ["features.npz", "features.npz.bad_files.csv"]


def test_numpy_alone_reads_the_npz(whole: Path) -> None:
    with np.load(whole, allow_pickle=False) as arrays:
        assert {name: array.dtype.kind for name, array in arrays.items()} == {
            "features": "f",
            "name": "U",
            "label": "U",
            "split": "U",
            "index": "i",
            "settings": "U",
        }
        assert json.loads(str(arrays["settings"]))["pool"] == "mean"


def same(one: FeatureFile, other: FeatureFile) -> bool:
    lists = all(getattr(one, name) == getattr(other, name) for name in ("names", "labels", "splits", "settings"))
    return lists and np.array_equal(one.features, other.features) and np.array_equal(one.indices, other.indices)


def test_parquet_and_csv_have_the_same(whole: Path, pretrained: Path, split: str, tmp_path: Path) -> None:
    expected = read_features(whole)
    assert embed(words(tmp_path / "f.csv", pretrained, split)) == 0
    with (tmp_path / "f.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["name", "label", "split", "index", *(f"f{n}" for n in range(48))]
    assert [(*row[:3], int(row[3])) for row in rows] == [expected.record(row) for row in range(len(rows))]
    assert np.array_equal(np.array([row[4:] for row in rows], dtype=np.float32), expected.features)
    parquet = pytest.importorskip("pyarrow.parquet")
    assert embed(words(tmp_path / "f.parquet", pretrained, split)) == 0
    assert same(read_features(tmp_path / "f.parquet"), expected)
    table = parquet.read_table(tmp_path / "f.parquet")
    assert np.array_equal(np.stack(table["features"].to_pylist()).astype(np.float32), expected.features)


@pytest.mark.parametrize(
    ("flags", "how", "layer"),
    [
        ("--pool token --layer 0", "token", 0),
        ("--pool mean+token --dtype float16", "mean+token", -1),
        ("--pool quarters --layer 0", "quarters", 0),
        ("--pool none --layer -2", "none", -2),
    ],
)
def test_layers_poolings_and_types(
    flags: str, how: str, layer: int, pretrained: Path, split: str, tmp_path: Path
) -> None:
    images = sorted(Path(split.partition(":")[2]).glob("train/blue/*.png"))[:3]
    out = tmp_path / "f.npz"
    command = ["--init", str(pretrained), "--images", *map(str, images), "--out", str(out), *CPU, *flags.split()]
    assert embed(command) == 0
    found = read_features(out)
    model = in_timm(pretrained, num_classes=0)
    options: dict[str, Any] = {"return_prefix_tokens": True, "output_fmt": "NLC", "intermediates_only": True}
    with torch.inference_mode():
        x = pixels([str(path) for path in images], model)
        layers = model.forward_intermediates(x, norm=layer == -1, **options)
        patches, prefix = layers[layer]
    grid = patches.unflatten(1, model.patch_embed.grid_size)
    quarters = [part for rows in grid.chunk(2, dim=1) for part in rows.chunk(2, dim=2)]
    expected = {
        "token": prefix[:, 0],
        "mean+token": torch.cat([patches.mean(dim=1), prefix[:, 0]], dim=1),
        "quarters": torch.cat([part.mean(dim=(1, 2)) for part in quarters], dim=1),
        "none": patches,
    }[how]
    assert found.features.dtype == (np.float16 if "float16" in flags else np.float32)
    np.testing.assert_allclose(found.features, expected, rtol=0, atol=2e-3 if "float16" in flags else 1e-5)
    assert (found.names, set(found.labels), set(found.splits)) == ([str(path) for path in images], {""}, {""})


def test_a_command_that_was_stopped_goes_on(
    whole: Path, pretrained: Path, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out, keep = tmp_path / "f.npz", Parts.write

    def stopped(parts: Parts, part: int, *told: Any) -> None:
        if part == 1:
            raise KeyboardInterrupt
        keep(parts, part, *told)

    with monkeypatch.context() as changes:
        changes.setattr(Parts, "write", stopped)
        assert embed(words(out, pretrained, split)) == 130
    assert not out.exists()
    assert embed(words(out, pretrained, split, "--layer", "0")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "has a part of other features (layer: -1 -> -2)" in line
    read = list[int]()
    whole_read = FrozenEncoder.read
    monkeypatch.setattr(
        FrozenEncoder, "read", lambda self, images, how: read.append(len(images)) or whole_read(self, images, how)
    )
    assert embed(words(out, pretrained, split)) == 0
    assert out.read_bytes() == whole.read_bytes()
    images = sum(len(source) for source in open_splits(split).values())
    assert sum(read) == 1 + images - 128  # and a blank one, to learn the shape
    assert same(read_features(out), read_features(whole))
    bad = "features.npz.bad_files.csv"
    assert out.with_name("f.npz.bad_files.csv").read_bytes() == whole.with_name(bad).read_bytes()
    capsys.readouterr()
    assert embed(words(out, pretrained, split)) == 0  # once more
    assert "is complete" in capsys.readouterr().err
    assert sum(read) == 2 + images - 128


def test_no_rank_waits_for_another_while_the_file_is_written(
    split: str, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[str]()
    for module, name in ((embed_room.dist, "gather"), (embed_room, "write_features")):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *of, name=name, whole=whole: calls.append(name) or whole(*of))
    image = next(Path(split.partition(":")[2]).glob("train/blue/*.png"))
    command = ["--init", str(pretrained), "--images", str(image), "--out", str(tmp_path / "f.npz"), *CPU]
    assert embed(command) == 0
    assert calls[-2:] == ["gather", "write_features"]  # a gather after it is one that the others wait in


def test_a_rank_without_a_part_joins_in_the_choice_of_the_kernel() -> None:
    frozen, nothing = Mock(), Mock()
    embed_room._make_parts(nothing, nothing, [0], nothing, frozen, World(rank=1, size=2))
    frozen.settle.assert_called_once_with()  # rank 0 waits in it for all


def test_several_labels_of_an_image_are_all_named(pretrained: Path, tmp_path: Path) -> None:
    labels = ["sea;land", "", "land", "-1"]
    for number in range(len(labels)):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    (tmp_path / "a.csv").write_text("\n".join(["path,label", *rows]))
    assert embed(words(tmp_path / "f.npz", pretrained, f"csv:{tmp_path / 'a.csv'}")) == 0
    assert read_features(tmp_path / "f.npz").labels == ["land;sea", "", "land", ""]


@pytest.mark.slow
def test_several_ranks_write_the_same(whole: Path, pretrained: Path, split: str, tmp_path: Path) -> None:
    command = [str(runs.ROOT / "tools" / "embed.py"), *words(tmp_path / "f.npz", pretrained, split)]
    runs.finish(command, ranks=2)
    ours, one = read_features(tmp_path / "f.npz"), read_features(whole)
    np.testing.assert_allclose(ours.features, one.features, rtol=0, atol=1e-5)
    assert (ours.names, ours.settings["images"]) == (one.names, one.settings["images"])
    bad = "features.npz.bad_files.csv"
    assert (tmp_path / "f.npz.bad_files.csv").read_bytes() == whole.with_name(bad).read_bytes()


def test_too_many_bad_files_end_it(split: str, pretrained: Path, tmp_path: Path, capsys) -> None:
    assert embed(words(tmp_path / "f.npz", pretrained, split, "--max-bad", "0")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "more than --max-bad allows" in line
    assert str(tmp_path / ".f.npz.parts" / "bad_files.csv") in line
    assert embed(words(tmp_path / "f.npz", pretrained, split)) == 0
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    flags = ["--init", str(pretrained), "--images", str(bad), "--out", str(tmp_path / "g.npz"), *CPU]
    assert embed(flags) == 1
    assert "none of the 1 image could be decoded" in capsys.readouterr().err


WRONG = {
    "": "no encoder: give --init",
    "--init RUN --out F.npz": "no images: give --data",
    "--init RUN --data DATA --images a.png --out F.npz": "both --data and --images: give --data",
    "--init RUN --data DATA": "nowhere to write to: give --out",
    "--init RUN --data DATA --out F.npy": "--out F.npy: features are written to .npz, .parquet or .csv, not .npy",
    "--init RUN --data DATA --out F.csv --pool none": "--out F.csv: of patch tokens (--pool none) only .npz",
    "--init RUN --data DATA --out F.npz --layer 9": "layer 9: RUN has layers 0 to 1",
    "--init RUN --data DATA --out F.npz --max-bad x": "max_bad is a share such as 1%",
    "--init RUN --data DATA --out F.npz --top 3": "--top looks into features that are there: give them by --index",
    "--init random:test_convnext --data DATA --out F.npz --pool token": "of random:test_convnext take mean",
    "--init RUN --data DATA --out TMP/file/F.npz": "cannot write --out TMP/file/F.npz",
    "--init RUN --data DATA --out TMP/file.npz": "TMP/file.npz is no file of features",
    "--init RUN --data DATA --out TMP/file.csv": "--out TMP/file.csv is there already",
    "--init RUN --data DATA --out TMP/folder.npz": "--out TMP/folder.npz is a folder",
    "--init RUN --images TMP/nowhere.png --out F.npz": "there is no image TMP/nowhere.png",
    "--index WHOLE": "nothing to look for: give --images",
    "--index WHOLE --images a.png --duplicates 0.9": "both --images and --duplicates",
    "--index F.csv --duplicates 0.9": "takes a file of features that ends in .npz or .parquet",
    "--index F.npz --duplicates 0.9": "there is no file of features F.npz",
    "--index TMP/file.npz --duplicates 0.9": "TMP/file.npz is no file of features",
    "--index WHOLE --duplicates 1.5": "duplicates is a cosine",
    "--index WHOLE --images 0.png --layer 0": "--layer beside --index: how its features were made is in WHOLE",
    "--index WHOLE --images nowhere.png": "--images nowhere.png: neither a file nor an image of WHOLE: not there",
    "--index WHOLE --images 0.png": "images of the index end so; give more of the path",
    "--index WHOLE --images TMP/image.png --init random:test_vit": "random:test_vit has changed since",
    "--index WHOLE --duplicates 0.9 --out FOLDER/look": "--out FOLDER/look is in the folder of the images",
}


@pytest.mark.parametrize(("command", "said"), WRONG.items())
def test_wrong_input_is_one_line(
    command: str, said: str, whole: Path, pretrained: Path, split: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npz").mkdir()
    for name in ("file", "file.npz", "file.csv"):
        (tmp_path / name).touch()
    shutil.copy(next(Path(split.partition(":")[2]).glob("train/blue/*.png")), tmp_path / "image.png")
    before = sorted(tmp_path.rglob("*"))
    places = {"RUN": pretrained, "DATA": split, "TMP": tmp_path, "WHOLE": whole, "FOLDER": split.partition(":")[2]}
    for name, value in places.items():
        command, said = command.replace(name, str(value)), said.replace(name, str(value))
    assert embed([*command.split(), *CPU[:2]]) == 2
    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if "images" not in line or "error" in line]
    assert line.startswith("embed: error: ")
    assert said in line
    assert told.out == ""
    assert sorted(tmp_path.rglob("*")) == before
