"""The command from labelled images to a classifier that timm loads, and what it tells of it."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mpp.config import parse
from mpp.downstream.finetune_result import Inputs, finished
from mpp.downstream.settings import FinetuneConfig
from mpp.errors import UserError
from mpp.system.files import LOCK
from mpp.training.checkpoint import Checkpoints
from mpp.weights.base import build
from mpp.weights.opening import open_weights
from tests import runs
from tests.downstream.tuned import TESTED, Done, assert_same_run, in_timm, pixels, read_csv, tune

import timm  # isort: skip  (after mpp, which makes it importable beside the CPU build of torch)


def test_it_leaves_all_that_it_promises(done: Done) -> None:
    assert {path.name for path in done.run_dir.iterdir()} == {
        *(LOCK, "config.yaml", "environment.json", "inputs.json", "metrics.jsonl", "bad_files.csv", "tensorboard"),
        *("checkpoints", "model", "result.json", "verdict.json", "classes.csv", "predictions.csv", "confusion.png"),
    }
    assert Checkpoints(done.run_dir / "checkpoints").steps() == [30, 35, 40]
    assert np.asarray(Image.open(done.run_dir / "confusion.png")).std() > 1
    left = {path.name for path in done.run_dir.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"}
    assert left == {LOCK}
    # Bad training images are skipped and named.
    _, (index, kind, file, _) = csv.reader((done.run_dir / "bad_files.csv").read_text().splitlines())
    root = done.source.removeprefix("folder:")
    assert (index, kind, file) == (
        "27",
        "not an image",
        f"{root}/train/red/text.png",
    )  # the last of the training images


def test_every_test_image_is_scored_once(done: Done) -> None:
    rows, result = done.predictions, done.result
    root = done.source.removeprefix("folder:")
    files = {str(path) for path in Path(root, "test").rglob("*.png")} - {f"{root}/test/green/empty.png"}
    assert len(rows) == 3 * TESTED + 1
    assert {row["path"] for row in rows} == files
    assert all(Path(row["path"]).parent.name == row["label"] for row in rows)
    right = [row["predicted"] == row["label"] for row in rows]
    assert result.top1 == np.mean(right) > 0.6
    assert [row["correct"] == "1" for row in rows] == right
    assert (result.test_images, result.train_images, result.num_classes, result.steps) == (len(rows), 28, 4, 40)
    assert (result.top5, result.lr, result.init) == (None, 0.05, "none")
    classes = {row["class"]: row for row in read_csv(done.run_dir / "classes.csv")}
    assert (classes["lonely"]["train_images"], classes["lonely"]["test_images"]) == ("3", "0")
    assert (classes["unknown"]["train_images"], classes["unknown"]["correct"]) == ("0", "0")


def test_what_it_says(done: Done) -> None:
    for said in (
        "labels       28 training images and 137 test images in 4 classes",
        "note: 1 class has no training images, so that 1 test image can only count as wrong: unknown",
        "note: 1 class has no test images: lonely",
        "note: imbalance: 3 to 9 training images a class",
        "WARNING: 40 steps is too short a run to learn much",
    ):
        assert said in done.err
    for said in (
        "Finished: 40 steps on 28 images from scratch, optim.lr 0.05.",
        "Test accuracy on 136 images of 4 classes:",
        f"  top-1     {done.result.top1:7.2%}   (95 % interval ",
        f"  trivial   {TESTED / 136:7.2%}   (always the most frequent class of the training images)",
        "- Better than always answering the most frequent class",
        "note: test images that could not be decoded and are not counted: 1",
        "note: 1 class has no test images: lonely",
        str(done.run_dir / "predictions.csv"),
    ):
        assert said in done.out
    assert "top-5" not in done.out


def test_rows_of_figures(done: Done) -> None:
    rows = runs.figures(done.run_dir)
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(5, 41, 5))
    assert all({"accuracy", "grad_norm", "lr", "epoch"} <= row.keys() for row in trained)
    assert trained[-1]["loss"] < trained[0]["loss"] < 1.6
    tested = {row["step"]: row["test/top1"] for row in rows if "test/top1" in row}
    assert list(tested) == [20, 40]
    assert tested[40] == done.result.top1


def says_what_was_written_down(run_dir: Path, model: Any, rows: list[dict[str, str]]) -> None:
    """Asserts that the exported model, in timm and as weights here, predicts what predictions.csv says of these."""
    images = pixels([row["path"] for row in rows], model)
    with torch.no_grad():
        logits, again = model(images), build(open_weights(str(run_dir))).eval()(images)
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-5)
    probability, best = logits.softmax(dim=1).max(dim=1)
    names = json.loads((run_dir / "model" / "config.json").read_text())["label_names"]
    assert [names[number] for number in best.tolist()] == [row["predicted"] for row in rows]
    written = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(probability, written, rtol=0, atol=1e-5)


def test_the_model_loads_in_timm_and_says_what_was_written_down(done: Done) -> None:
    says_what_was_written_down(done.run_dir, in_timm(done.run_dir), done.predictions)


def test_the_average_is_what_is_exported(done: Done) -> None:
    state = runs.final_state(done.run_dir)
    model = load_file(done.run_dir / "model" / "model.safetensors")
    averaged = {name.removeprefix("module."): value for name, value in state["ema"].items() if name != "n_averaged"}
    runs.assert_same(model, {name: averaged[name] for name in model})
    assert not torch.equal(model["head.weight"], state["model"]["head.weight"])


def test_a_finished_run_does_not_train_again_and_a_changed_config_is_refused(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(done.run_dir, tmp_path / "copy")
    before = runs.figures(run_dir)
    for name in ("result.json", "predictions.csv", "classes.csv"):
        (run_dir / name).unlink()
    assert tune(done.source, run_dir, log__evaluate="20 steps") == 0
    assert "is finished (40 steps)" in capsys.readouterr().err
    assert runs.figures(run_dir) == before
    assert_same_run(run_dir, done.run_dir)
    assert tune(done.source, run_dir, optim__lr="0.02", loss__smoothing="0.1") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "optim.lr: [0.05] -> [0.02]" in line
    assert "loss.smoothing: 0.0 -> 0.1" in line
    assert tune(done.source, run_dir, "--resume", "force", train__length="42 steps") == 0
    assert "at step 40 of 42" in capsys.readouterr().err
    assert json.loads((run_dir / "result.json").read_text())["steps"] == 42


def test_whether_a_run_has_finished(done: Done, tmp_path: Path) -> None:
    def config(run_dir: Path, **changed: str) -> FinetuneConfig:
        return parse(FinetuneConfig, runs.finetune_command(done.source, run_dir, **changed)[1:], "finetune", "", {})

    inputs = Inputs(**json.loads((done.run_dir / "inputs.json").read_text()))
    assert finished(config(tmp_path / "none"), inputs) is None
    assert finished(config(done.run_dir, optim__lr="0.01,0.05"), inputs) == done.result
    assert finished(config(done.run_dir, optim__lr="0.01", resume="force"), inputs) is None
    with pytest.raises(UserError, match=r"optim\.lr: \[0\.05\] -> \[0\.01\]"):
        finished(config(done.run_dir, optim__lr="0.01"), inputs)
    with pytest.raises(UserError, match="the weights it started from and its test images have changed"):
        finished(config(done.run_dir), replace(inputs, weights="other", test="other"))
    copy = shutil.copytree(done.run_dir, tmp_path / "copy")
    (copy / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"result\.json: it is no result of a fine-tuning run; delete it"):
        finished(config(copy), inputs)


@pytest.mark.parametrize("name", [runs.slow("vit_tiny_r_s16_p8_224"), "test_resnet"])
def test_any_encoder_of_timm_s(name: str, split: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert tune(split, run_dir, init=f"random:{name}", model__img_size="32", train__length="2 steps") == 0
    model = in_timm(run_dir)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    for key in ("crop_pct", "interpolation", "crop_mode"):  # as its images are looked at, and as it was tested
        assert model.pretrained_cfg[key] == getattr(timm.get_pretrained_cfg(name), key)
    says_what_was_written_down(run_dir, model, read_csv(run_dir / "predictions.csv")[::30])
    exported, state = model.state_dict(), runs.final_state(run_dir)["model"]
    means = [key for key in state if key.endswith("running_mean")]
    assert bool(means) == (name == "test_resnet")
    for key in means:  # of batch normalisation: averages of weights go with the latest statistics
        assert torch.equal(exported[key], state[key])
        assert state[key].abs().max() > 0


def test_from_a_pretraining_run_at_a_higher_resolution(
    pretrained: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = {"optim__lr": "1e-30", "train__length": "1 steps", "optim__ema_decay": "0"}
    run_dir = tmp_path / "run"
    assert tune(source, run_dir, init=str(pretrained), model__img_size="48,40", **still) == 0
    told = f"note: 8 of the 8 test images are in the pretraining data of {pretrained}, {source}, 8 as the same files"
    assert all(told in text for text in capsys.readouterr())  # at the start and at the end
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (pretrained, run_dir))
    assert after.pop("head.weight").abs().max() == after.pop("head.bias").abs().max() < 1e-29
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name != "pos_embed":
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-20)
    assert (before["pos_embed"].shape[1], after["pos_embed"].shape[1]) == (1 + 4 * 4, 1 + 6 * 5)
    # The corners of the grid stay where they are (section 3.2: 2D interpolation).
    old, new = before["pos_embed"][0, 1:].view(4, 4, -1), after["pos_embed"][0, 1:].view(6, 5, -1)
    torch.testing.assert_close(new[[0, 0, -1, -1], [0, -1, 0, -1]], old[[0, 0, -1, -1], [0, -1, 0, -1]])
    model = in_timm(run_dir)
    assert model.pretrained_cfg["input_size"] == (3, 48, 40)
    assert model(torch.zeros(1, 3, 48, 40)).shape == (1, 4)


def test_the_paper_s_head_with_a_hidden_layer(pretrained: Path, split: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    told = {"model__head": "tanh", "model__representation": "20", "train__length": "10 steps"}
    assert tune(split, run_dir, init=str(pretrained), **told) == 0
    weights, headless = open_weights(str(run_dir)), in_timm(run_dir)
    assert (weights.representation, weights.classes) == (20, ("blue", "green", "lonely", "red"))
    rows = read_csv(run_dir / "predictions.csv")[::20]
    images = pixels([row["path"] for row in rows], headless)
    with torch.no_grad():
        best = build(weights).eval()(images).softmax(dim=1).max(dim=1).values
        assert headless(images).shape == (len(rows), 48)
    assert [float(row["probability"]) for row in rows] == pytest.approx(best.tolist(), abs=1e-5)


def test_a_head_is_kept_for_the_same_classes(
    done: Done, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = {"optim__lr": "1e-30", "train__length": "1 steps", "optim__ema_decay": "0", "model__head": "keep"}
    assert tune(done.source, tmp_path / "run", init=str(done.run_dir), **still) == 0
    assert (tmp_path / "run" / "predictions.csv").read_bytes() == (done.run_dir / "predictions.csv").read_bytes()
    capsys.readouterr()
    assert tune(source, tmp_path / "other", init=str(done.run_dir), **still) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("finetune: error: model.head keep: the head of ")
    assert "is for 4 classes, the labels of" in line
    assert not (tmp_path / "other").exists()


def test_a_share_of_the_labels_and_layers_that_learn_at_their_own_rates(
    pretrained: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"optim__layer_decay": "0.5", "optim__name": "adamw", "optim__weight_decay": "0.1", "data__labels": "50%"}
    assert tune(source, tmp_path / "run", init=str(pretrained), train__length="1 steps", **told) == 0
    said = (
        "labels       16 training images (50% of each class, drawn by data.labels_seed) and 8 test images in 4 classes"
    )
    assert said in capsys.readouterr().err
    rows = read_csv(tmp_path / "run" / "classes.csv")
    assert [(row["train_images"], row["test_images"]) for row in rows] == [("4", "2")] * 4
    groups = runs.final_state(tmp_path / "run")["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {1.0, 0.5, 0.25, 0.125}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
