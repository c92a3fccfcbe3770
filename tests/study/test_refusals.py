"""What a study refuses, in one line and before it does anything."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mpp.cli import study
from mpp.study import run
from mpp.weights.base import Weights, build
from mpp.weights.timm_folder import write_timm_folder
from tests.study.commands import TAKEN, command


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": ""}, "--data"),
        ({"data": "folder:/nowhere"}, "/nowhere"),
        (TAKEN | {"init": "/nowhere/run"}, "/nowhere/run"),
        ({"init": "/nowhere/run"}, "leave out arms"),
        ({"labels": "0%", "lengths": "", "longer": "", "tune_at": ""}, "labels"),
        ({"lengths": "6 steps"}, "lengths"),
        ({"lengths": "6 steps,foo"}, "lengths: train.length needs a number and a unit"),
        ({"seeds": "0,0"}, "seeds"),
        ({"finetune__init": "resnet18"}, "finetune.init is set by the study; use init"),
        ({"finetune__data__labels": "50%"}, "use labels"),
        ({"finetune__train__length": "9 steps"}, "lengths and finetune.train.length"),
        ({"longer": "10%"}, "longer takes shares that labels has, 50%, 100%"),
        ({"tune_at": "10%"}, "tune_at takes shares"),
        ({"pretrain__train__seed": "3"}, "use pretrain_seeds"),
        ({"arms": "a,b: --objective.rato 0.7"}, "arms: b: no setting '--objective.rato'; did you mean"),
        ({"arms": "a,75 % --data.source folder:/x"}, "arms: '75 % --data.source folder': put a colon before the flags"),
        ({"pretrain__data__keep": "true"}, "data.keep is for remote shards"),
        ({"finetune__data__keep": "true"}, "data.keep is for remote shards"),
        ({"labels": "50%,0.5"}, "labels takes different shares"),
        ({"arms": "a,b: --objective.ratio 7"}, "arms: b: objective.ratio must be in (0, 1]"),
        ({"arms": "a,b: --objective.target 'x"}, "arms: b: No closing quotation"),
        ({"arms": "a,A"}, "its folder would be that of 'a'"),
        ({"arms": "a,scratch longer"}, "that of 'scratch, longer'"),
        ({"arms": "a,b: --run-dir x"}, "arms: b: run_dir is the same for all arms"),
        ({"arms": "a,b: --model.num_heads 5"}, "b: "),
        # What would otherwise be met after hours of pretraining:
        ({"test": ""}, "would see the images held out"),
        ({"test": "", "pretrain__data__source": "DATA"}, "would see the images held out"),
        ({"layers": "-9"}, "layer"),
        ({"labels": "4%,100%", "longer": "", "tune_at": ""}, "error: 4% of the labels: no class of"),
        ({"finetune__loss__mixup": "0.5", "finetune__train__batch_size": "7"}, "7"),
    ],
)
def test_wrong_input_is_one_line(
    changed: dict[str, str], words: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {name: source if value == "DATA" else value for name, value in changed.items()}
    assert study(command(source, tmp_path / "study", **changed)[1:]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "study").exists()


def test_only_shares_that_choose_a_rate_need_images_to_choose_by(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_tasks", lambda tasks: 75)  # nothing is trained
    one_image_a_class = command(source, tmp_path / "study", labels="4%,100%", longer="", tune_at="100%", shots="1,11")
    assert study(one_image_a_class[1:]) == 75
    note = "note: classes that have fewer training images, of which all are taken: 4 of 4 for 11 shots"
    assert note in capsys.readouterr().err.splitlines()


def test_a_pooling_that_the_encoder_has_not_is_refused(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Weights("resnet10t", {}, None, (32, 32))
    write_timm_folder(replace(weights, state=build(weights).state_dict()), tmp_path / "cnn")
    taken = TAKEN | {"init": str(tmp_path / "cnn"), "layers": "-1", "pool": "token,quarters"}
    assert study(command(source, tmp_path / "study", **taken)[1:]) == 2
    assert capsys.readouterr().err.endswith("error: pool token quarters: the encoder takes mean\n")


@pytest.mark.parametrize("how", ["spelling", "relative", "link", "copy", "mixture"])
def test_it_does_not_pretrain_on_its_test_images(
    how: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command(source, tmp_path / "study")
    test = Path(words[words.index("--test") + 1].removeprefix("array:"))
    (tmp_path / "link.npz").symlink_to(test)
    shutil.copy(test, tmp_path / "copy.npz")
    monkeypatch.chdir(test.parent)
    names = {
        "spelling": f"array:{test.parent}/../{test.parent.name}//{test.name}",
        "relative": f"array:{test.name}",
        "link": f"array:{tmp_path}/link.npz",
        "copy": f"array:{tmp_path}/copy.npz",
        "mixture": f"{source} + array:{tmp_path}/link.npz",
    }
    assert study(command(source, tmp_path / "study", pretrain__data__source=names[how])[1:]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        f"study: error: default would be pretrained on the test images: all 24 of array:{test} are in"
    )
    assert line.endswith("; name other images for one of them, by --test or --pretrain.data.source")
    assert not (tmp_path / "study").exists()
