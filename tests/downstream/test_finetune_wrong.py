"""Fine-tuning on wrong input: one line, and nothing is written."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.downstream.tuned import tune

VIT, RESNET = {"init": "random:test_vit"}, {"init": "random:test_resnet"}
WRONG: dict[str, tuple[dict[str, str], str]] = {
    "missing init": ({"init": "TMP/nowhere"}, "--init TMP/nowhere: there is no such file or folder"),
    "empty init": ({"init": "TMP/empty"}, "--init TMP/empty: the folder is empty"),
    "weights cut off": ({"init": "TMP/cut"}, "TMP/cut/model.safetensors: truncated"),
    "an unknown name": ({"init": "resnet1888"}, "neither a file, a folder nor a model of timm"),
    "an unknown new model": ({"model__name": "vit_tinny_patch16_224"}, "near it: vit_tiny_patch16_224"),
    "no new model": ({"model__name": ""}, "say which by --model.name"),
    "an architecture twice": (VIT | {"model__depth": "3"}, "model.depth is for --init none; random:test_vit has its"),
    "channels twice": (VIT | {"model__in_chans": "1"}, "model.in_chans is for --init none"),
    "no head to keep": (VIT | {"model__head": "keep"}, "has no head; take linear"),
    "tanh on a ResNet": (RESNET | {"model__head": "tanh"}, "is not a ViT"),
    "token of a ResNet": (RESNET | {"model__pool": "token"}, "is not a ViT"),
    "an unused setting": ({"model__representation": "8"}, "model.representation is for model.head tanh"),
    "one class": ({"data__source": "array:TMP/one.npz"}, "has labelled images of one class alone, 1: there must be"),
    "one folder": ({"data__source": "folder:TMP/one"}, "folder:TMP/one has no labels (4 images, unlabelled)"),
    "no labels": ({"data__source": "array:TMP/plain.npy"}, "array:TMP/plain.npy has no labels"),
    "no images": ({"data__source": "folder:TMP/empty"}, "no image in TMP/empty"),
    "missing test": ({"data__test": "folder:TMP/nowhere"}, "there is no folder TMP/nowhere"),
    "broken patches": ({"model__img_size": "30"}, "model.img_size 30 is not a multiple of the patch size 8; take 24 o"),
    "no recipe": ({"data__randaugment": "rand-x9"}, "data.randaugment 'rand-x9' is no recipe of timm's"),
    "mixup of one image": ({"loss__mixup": "0.2", "train__micro_batch": "1"}, "mix pairs of images, but 1 go"),
    "a mean of two": ({"data__mean": "0.5,0.5"}, "data.mean takes one number or 3"),
    "no share": ({"data__labels": "0%"}, "data.labels is above 0% and up to 100%"),
    "all held out": ({"data__holdout": "100%"}, "data.holdout must leave images"),
    "a rate twice": ({"optim__lr": "0.1,0.1"}, "optim.lr takes different positive numbers"),
    "a warm-up past the end": ({"schedule__warmup": "41 steps"}, "warm-up (41 steps)"),
}
for name in ("missing init", "one class", "broken patches"):
    changed, said = WRONG[name]
    WRONG[f"{name}, sweep"] = changed | {"optim__lr": "0.1,0.2"}, said


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("changed", "said"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_nothing_is_written(
    changed: dict[str, str],
    said: str,
    source: str,
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "only").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / "one" / "only" / f"{number}.png")
    np.save(tmp_path / "plain.npy", np.zeros((8, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "one.npz", images=np.zeros((8, 32, 32, 3), np.uint8), labels=np.ones(8, np.int64))
    shutil.copytree(pretrained / "model", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = sorted(tmp_path.rglob("*"))
    changed = {name: value.replace("TMP", str(tmp_path)) for name, value in changed.items()}
    assert tune(changed.pop("data__source", source), tmp_path / "run", **changed) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("finetune: error: ")
    assert said.replace("TMP", str(tmp_path)) in line
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_of_something_else_are_left_alone(
    pretrained: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(pretrained)
    for rates in ("0.1", "0.1,0.2"):
        assert tune(source, pretrained, optim__lr=rates) == 2
        assert "holds a run of another kind; choose another --run-dir" in capsys.readouterr().err.splitlines()[-1]
    assert tune(source, pretrained, init=str(pretrained)) == 2
    assert "is what --init names" in capsys.readouterr().err
    assert files(pretrained) == before
    (tmp_path / "file").touch()
    assert tune(source, tmp_path / "file") == 2
    assert "cannot be written to (File exists); give another one" in capsys.readouterr().err.splitlines()[-1]


def test_a_loss_that_is_not_finite_ends_the_run(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(source, tmp_path / "run", optim__lr="1e38", optim__clip_norm="0") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("finetune: error: the loss is not finite at step ")
    assert "try a lower --optim.lr" in line
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints'}" in line
    assert not (tmp_path / "run" / "result.json").exists()


def test_other_images_are_refused(split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a fifth is held out, images that were trained on could be among the test images of a larger folder."""
    root = shutil.copytree(Path(split.removeprefix("folder:")) / "train", tmp_path / "images")
    few, run_dir = {"train__length": "3 steps", "optim__lr": "0.01,0.02", "data__max_bad": "50%"}, tmp_path / "run"
    assert tune(f"folder:{root}", run_dir, **few) == 0
    capsys.readouterr()
    for picture in (root / "red").glob("*.png"):
        shutil.copy(picture, picture.with_stem(f"{picture.stem}_again"))
    assert tune(f"folder:{root}", run_dir, **few) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the images have changed since the last checkpoint of" in line
    assert len(list((run_dir / "sweep").iterdir())) == 2


def test_other_classes_are_refused_but_by_force(split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shutil.copytree(split.removeprefix("folder:"), tmp_path / "images")
    few, run_dir = {"train__length": "3 steps", "data__max_bad": "50%"}, tmp_path / "run"
    assert tune(f"folder:{root}", run_dir, **few) == 0
    before = files(run_dir)
    for part in ("train", "test"):
        (root / part / "red").rename(root / part / "crimson")
    capsys.readouterr()
    assert tune(f"folder:{root}", run_dir, **few) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    said = "28 images then and now, but others, or in another order; 4 classes then, 4 now (new: crimson; gone: red)"
    assert said in line
    assert line.endswith("by --resume force")
    assert files(run_dir) == before
    assert tune(f"folder:{root}", run_dir, "--resume", "force", **few) == 0
    assert f"note: the images have changed ({said})" in capsys.readouterr().err
