"""The command from labelled images to a classifier that timm loads, what it tells of it, and how it resumes."""

import csv
import json
import os
import pickle
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mpp.cli import finetune, pretrain
from mpp.data.config import Reading
from mpp.data.decode import decode
from mpp.data.transform import EvalTransform, normalise
from mpp.downstream.account import Inputs, Result, finished, read_result
from mpp.downstream.config import FinetuneConfig
from mpp.train.checkpoint import Checkpoints
from mpp.train.loop import EXIT_REQUEUE
from mpp.weights.base import build
from mpp.weights.opening import open_weights
from tests import runs

import timm  # isort: skip  (after mpp, which makes it importable beside the CPU build of torch)

HUES = {"blue": (60, 60, 200), "green": (60, 200, 60), "lonely": (180, 60, 180), "red": (200, 60, 60)}
TESTED = 45  # images of each class that is in both parts: with the others more than one batch, and a part of another
SOFT = {
    "loss__mixup": "0.8",
    "loss__cutmix": "1",
    "loss__smoothing": "0.1",
    "data__randaugment": "rand-m9-mstd0.5-inc1",
}


def write_split(root: Path) -> str:
    """A split folder of images of many sizes; one class is in train/ alone, one in test/ alone, and each has a bad
    image."""
    rng = np.random.default_rng(0)
    parts = {"train": dict.fromkeys(HUES, 8) | {"lonely": 3}, "test": {"blue": TESTED, "green": TESTED, "red": TESTED}}
    for part, classes in parts.items():
        for name, number in classes.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(number):
                small = (HUES[name] + rng.normal(0, 40, (3, 4, 3))).clip(0, 255).astype(np.uint8)
                size = (20 + index, 50 - index) if index % 2 else (31, 17)
                Image.fromarray(small).resize(size).save(folder / f"{index}.png")
    (root / "test" / "unknown").mkdir()
    shutil.copy(root / "test" / "red" / "0.png", root / "test" / "unknown" / "0.png")
    (root / "train" / "red" / "text.png").write_text("this is no PNG")
    (root / "test" / "green" / "empty.png").touch()
    return f"folder:{root}"


class Done(NamedTuple):
    source: str
    run_dir: Path
    words: list[str]
    out: str
    err: str

    @property
    def predictions(self) -> list[dict[str, str]]:
        return read_csv(self.run_dir / "predictions.csv")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_split(tmp_path_factory.mktemp("split") / "images")


@pytest.fixture(scope="module")
def done(split: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """From scratch on a folder of files, as a process."""
    run_dir = tmp_path_factory.mktemp("runs") / "scratch"
    words = runs.finetune_command(split, run_dir, data__workers="2", log__evaluate="20 steps")
    return Done(split, run_dir, words, *runs.finish(words))


@pytest.fixture(scope="module")
def pretrained(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining run."""
    run_dir = tmp_path_factory.mktemp("pretrained") / "run"
    assert pretrain(runs.command(source, run_dir, train__length="3 steps", fewshot__data="")[1:]) == 0
    return run_dir


def tune(source: str, run_dir: Path, *flags: str, **changed: str) -> int:
    """The command in this process."""
    return finetune(runs.finetune_command(source, run_dir, *flags, **changed)[1:])


def in_timm(run_dir: Path, channels: int = 3, **options: Any) -> Any:
    model: Any = timm.create_model(f"local-dir:{run_dir / 'model'}", pretrained=True, **options).eval()
    assert model.pretrained_cfg["input_size"][0] == channels
    return model


def pixels(paths: list[str], model: Any) -> torch.Tensor:
    """The images as timm's config.json says that they are to be read."""
    told = model.pretrained_cfg
    transform = EvalTransform(tuple(told["input_size"][1:]))
    images = torch.stack([transform(decode(Path(path).read_bytes(), Reading(3))) for path in paths])
    return normalise(images, tuple(told["mean"]), tuple(told["std"]))


def assert_same_run(first: Path, second: Path) -> None:
    runs.assert_same_run(first, second)
    for name in ("result.json", "predictions.csv", "classes.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_it_leaves_all_that_it_promises(done: Done) -> None:
    assert {path.name for path in done.run_dir.iterdir()} == {
        *("config.yaml", "environment.json", "inputs.json", "metrics.jsonl", "bad_files.csv", "tensorboard"),
        *("checkpoints", "model", "result.json", "classes.csv", "predictions.csv", "confusion.png"),
    }
    assert Checkpoints(done.run_dir / "checkpoints").steps() == [30, 35, 40]
    assert np.asarray(Image.open(done.run_dir / "confusion.png")).std() > 1
    assert not [path for path in done.run_dir.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


def test_every_test_image_is_scored_once(done: Done) -> None:
    rows = done.predictions
    root = done.source.removeprefix("folder:")
    files = {str(path) for path in Path(root, "test").rglob("*.png")} - {f"{root}/test/green/empty.png"}
    assert len(rows) == 3 * TESTED + 1
    assert {row["path"] for row in rows} == files
    assert all(Path(row["path"]).parent.name == row["label"] for row in rows)
    result = read_result(done.run_dir)
    assert result is not None
    right = [row["predicted"] == row["label"] for row in rows]
    assert result.top1 == np.mean(right)
    assert [row["correct"] == "1" for row in rows] == right
    assert result.top1 > 0.6
    assert (result.test_images, result.train_images, result.num_classes, result.steps) == (len(rows), 28, 4, 40)
    assert (result.top5, result.lr, result.init) == (None, 0.05, "none")
    classes = {row["class"]: row for row in read_csv(done.run_dir / "classes.csv")}
    assert classes["lonely"]["train_images"], classes["lonely"]["test_images"] == ("3", "0")
    assert classes["unknown"]["train_images"], classes["unknown"]["correct"] == ("0", "0")


def test_what_it_says(done: Done) -> None:
    for said in (
        "labels: 28 training images and 137 test images in 4 classes",
        "note: 1 class has no training images, so that 1 test image can only count as wrong: unknown",
        "note: 1 class has no test images: lonely",
        "note: imbalance: 3 to 9 training images a class",
    ):
        assert said in done.err
    result = read_result(done.run_dir)
    assert result is not None
    for said in (
        "Finished: 40 steps on 28 images from scratch, optim.lr 0.05.",
        "Test accuracy on 136 images of 4 classes:",
        f"  top-1     {result.top1:7.2%}   (95 % interval ",
        f"  trivial   {TESTED / 136:7.2%}   (always the most frequent class of the training images)",
        "note: test images that could not be decoded and are not counted: 1",
        "note: 1 class has no test images: lonely",
        str(done.run_dir / "predictions.csv"),
    ):
        assert said in done.out
    assert "top-5" not in done.out


def test_bad_training_images_are_skipped_and_named(done: Done) -> None:
    _, (index, kind, file, _) = csv.reader((done.run_dir / "bad_files.csv").read_text().splitlines())
    root = done.source.removeprefix("folder:")
    assert int(index) == 27  # the last of the training images
    assert (kind, file) == ("not an image", f"{root}/train/red/text.png")


def test_rows_of_figures(done: Done) -> None:
    rows = runs.figures(done.run_dir)
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(5, 41, 5))
    assert all({"accuracy", "grad_norm", "lr", "epoch"} <= row.keys() for row in trained)
    assert trained[-1]["loss"] < trained[0]["loss"] < 1.6
    tested = [row for row in rows if "test/top1" in row]
    assert [row["step"] for row in tested] == [20, 40]
    result = read_result(done.run_dir)
    assert result is not None
    assert tested[-1]["test/top1"] == result.top1


def test_the_model_loads_in_timm_and_says_what_was_written_down(done: Done) -> None:
    model = in_timm(done.run_dir)
    rows = done.predictions
    with torch.no_grad():
        logits = model(pixels([row["path"] for row in rows], model))
    names = json.loads((done.run_dir / "model" / "config.json").read_text())["label_names"]
    assert names == ["blue", "green", "lonely", "red"]
    probability, best = logits.softmax(dim=1).max(dim=1)
    assert [names[number] for number in best.tolist()] == [row["predicted"] for row in rows]
    told = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(probability, told, rtol=0, atol=2e-6)
    read = build(open_weights(str(done.run_dir))).eval()
    with torch.no_grad():
        torch.testing.assert_close(read(pixels([rows[0]["path"]], model)), logits[:1], rtol=0, atol=1e-5)


def test_the_average_is_what_is_exported(done: Done) -> None:
    state = runs.final_state(done.run_dir)
    model = load_file(done.run_dir / "model" / "model.safetensors")
    averaged = {name.removeprefix("module."): value for name, value in state["ema"].items() if name != "n_averaged"}
    runs.assert_same(model, {name: averaged[name] for name in model})
    assert not torch.equal(model["head.weight"], state["model"]["head.weight"])


def test_a_finished_run_does_not_train_again(done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = shutil.copytree(done.run_dir, tmp_path / "copy")
    before = runs.figures(run_dir)
    for name in ("result.json", "predictions.csv", "classes.csv"):
        (run_dir / name).unlink()
    assert tune(done.source, run_dir, log__evaluate="20 steps") == 0
    assert "is finished (40 steps)" in capsys.readouterr().err
    assert runs.figures(run_dir) == before
    assert_same_run(run_dir, done.run_dir)


def test_a_changed_config_is_refused_with_the_difference(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(done.run_dir, tmp_path / "copy")
    assert tune(done.source, run_dir, optim__lr="0.02", loss__smoothing="0.1") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "optim.lr: [0.05] -> [0.02]" in line
    assert "loss.smoothing: 0.0 -> 0.1" in line
    assert tune(done.source, run_dir, "--resume", "force", train__length="42 steps") == 0
    assert "at step 40 of 42" in capsys.readouterr().err
    result = read_result(run_dir)
    assert result is not None
    assert result.steps == 42


def test_whether_a_run_has_finished(done: Done, tmp_path: Path) -> None:
    from mpp.cli import _FINETUNE
    from mpp.config import parse

    def config(run_dir: Path, *flags: str, **changed: str) -> FinetuneConfig:
        words = runs.finetune_command(done.source, run_dir, *flags, **changed)[1:]
        return parse(FinetuneConfig, words, "finetune", "", _FINETUNE)

    inputs = Inputs(**json.loads((done.run_dir / "inputs.json").read_text()))
    assert finished(config(tmp_path / "none"), inputs) is None
    assert isinstance(finished(config(done.run_dir), inputs), Result)
    assert isinstance(finished(config(done.run_dir, optim__lr="0.01,0.05"), inputs), Result)
    with pytest.raises(ValueError, match=r"optim\.lr: \[0\.05\] -> \[0\.01\]"):
        _raise_as_value(lambda: finished(config(done.run_dir, optim__lr="0.01"), inputs))
    assert finished(config(done.run_dir, "--resume", "force", optim__lr="0.01"), inputs) is None
    with pytest.raises(ValueError, match="the weights it started from and its test images have changed"):
        _raise_as_value(lambda: finished(config(done.run_dir), replace(inputs, weights="other", test="other")))
    copy = shutil.copytree(done.run_dir, tmp_path / "copy")
    (copy / "result.json").write_text("{}")
    with pytest.raises(ValueError, match=r"result\.json: it is no result of a fine-tuning run; delete it"):
        _raise_as_value(lambda: finished(config(copy), inputs))


def _raise_as_value(call: Any) -> None:
    from mpp.errors import UserError

    try:
        call()
    except UserError as error:
        raise ValueError(str(error)) from error


def test_other_images_are_refused(split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a fifth is held out, images that were trained on could be among the test images of a larger folder."""
    root = shutil.copytree(Path(split.removeprefix("folder:")) / "train", tmp_path / "images")
    few, run_dir = {"train__length": "3 steps", "optim__lr": "0.01,0.02", "data__max_bad": "50%"}, tmp_path / "run"
    assert tune(f"folder:{root}", run_dir, **few) == 0
    shutil.copytree(root, tmp_path / "moved")
    capsys.readouterr()
    for picture in (root / "red").glob("*.png"):
        shutil.copy(picture, picture.with_stem(f"{picture.stem}_again"))
    assert tune(f"folder:{root}", run_dir, **few) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "its training images and its test images have changed since; choose another --run-dir" in line
    assert len(list((run_dir / "sweep").iterdir())) == 2


@pytest.mark.slow
def test_a_forced_run_that_was_stopped_has_no_result(source: str, tmp_path: Path) -> None:
    """What an earlier config came to must not be taken for that of the new one."""
    few = {"optim__lr": "0.01,0.02", "train__length": "3 steps"}
    assert tune(source, tmp_path, **few) == 0
    sub = tmp_path / "sweep" / "lr_0.01"
    few["train__length"] = "100000 steps"
    process = runs.start(runs.finetune_command(source, tmp_path, "--resume", "force", **few))
    runs.wait_for_checkpoint(process, sub)
    runs.kill(process)
    assert not (sub / "result.json").exists()


def test_what_init_names_is_not_written_to(pretrained: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(source, pretrained, init=str(pretrained)) == 2
    assert "is what --init names" in capsys.readouterr().err


@pytest.fixture(scope="module")
def uninterrupted(source: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run with all that draws at random, from start to end, and the seconds that it took."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    began = time.monotonic()
    assert tune(source, run_dir, **SOFT) == 0
    return run_dir, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(0, "0"), (1, "2")])
def test_killed_at_a_random_moment(
    number: int, workers: str, source: str, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    reference, seconds = uninterrupted
    run_dir = tmp_path / "run"
    process = runs.start(runs.finetune_command(source, run_dir, data__workers=workers, **SOFT))
    runs.wait_for_checkpoint(process, run_dir)
    time.sleep(random.Random(number).uniform(0, seconds))
    runs.kill(process)
    assert tune(source, run_dir, **SOFT) == 0
    assert_same_run(run_dir, reference)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_killed_at_many_random_moments(
    number: int, source: str, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    workers = random.Random(50 + number).choice("02")
    test_killed_at_a_random_moment(100 + number, workers, source, uninterrupted, tmp_path)


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_exits_with_the_requeue_code(
    source: str, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = runs.start(runs.finetune_command(source, run_dir, data__workers="2", **SOFT), start_new_session=True)
    runs.wait_for_checkpoint(process, run_dir, step=5)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, err
    assert "the same command again goes on" in err
    assert "Traceback" not in err
    assert not (run_dir / "result.json").exists()
    assert tune(source, run_dir, **SOFT) == 0
    assert_same_run(run_dir, uninterrupted[0])


SWEEP = {"optim__lr": "0.001,0.1,1e38", "train__length": "12 steps", "data__holdout": "50%"}


@pytest.mark.slow
def test_a_sweep_chooses_on_held_out_training_images(
    split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert tune(split, run_dir, **SWEEP) == 0
    told = capsys.readouterr()
    rows = read_csv(run_dir / "sweep.csv")
    assert [row["lr"] for row in rows] == ["0.001", "0.1", "1e+38"]
    assert rows[2] == {"lr": "1e+38", "held_out_top1": "diverged", "held_out_images": "", "chosen": "0"}
    # Half of 8, 8, 3 and 9 training images, the bad one perhaps among them.
    assert all(int(row["held_out_images"]) in (13, 14) for row in rows[:2])
    accuracy = [float(row["held_out_top1"]) for row in rows[:2]]
    best = rows[int(np.argmax(accuracy))]
    assert [row["chosen"] for row in rows] == ["1" if row is best else "0" for row in rows]
    assert "sweep: optim.lr 1e+38 diverged: the loss is not finite at step " in told.err
    assert "held-out training images, by optim.lr:" in told.out
    assert f"best: optim.lr {float(best['lr']):g}; it trains on all 28 images" in told.out
    result = read_result(run_dir)
    assert result is not None
    assert (result.lr, result.train_images) == (float(best["lr"]), 28)
    # What the sweep leaves: results alone, of which none has met the test images.
    for lr in ("0.001", "0.1", "1e+38"):
        left = {path.name for path in (run_dir / "sweep" / f"lr_{lr}").iterdir()}
        assert not left & {"checkpoints", "model", "predictions.csv", "classes.csv"}
        assert ("result.json" in left) == (lr != "1e+38")

    # Again: nothing is trained, nothing changes.
    before = {path: path.read_bytes() for path in run_dir.rglob("*.csv")}
    assert tune(split, run_dir, **SWEEP) == 0
    told = capsys.readouterr()
    assert "sweep: optim.lr" not in told.err
    assert "  1e+38    diverged" in told.out
    assert {path: path.read_bytes() for path in run_dir.rglob("*.csv")} == before

    # Another config is refused before the sweep begins.
    assert tune(split, run_dir, **SWEEP, loss__smoothing="0.1") == 2
    told = capsys.readouterr()
    assert "loss.smoothing: 0.0 -> 0.1" in told.err.splitlines()[-1]
    assert "sweep:" not in told.err
    assert tune(split, run_dir, **{**SWEEP, "optim__lr": "0.5,0.6"}) == 2
    assert f"optim.lr: [{result.lr}] -> [0.5, 0.6]" in capsys.readouterr().err.splitlines()[-1]
    assert not (run_dir / "sweep" / "lr_0.5").exists()


def test_a_sweep_of_which_nothing_is_left(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(source, tmp_path / "run", optim__lr="1e37,1e38", optim__clip_norm="0") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("finetune: error: every learning rate of the sweep diverged (1e+37, 1e+38); try lower")
    assert not (tmp_path / "run" / "model").exists()


def test_a_loss_that_is_not_finite_ends_the_run(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(source, tmp_path / "run", optim__lr="1e38", optim__clip_norm="0") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("finetune: error: the loss is not finite at step ")
    assert "try a lower --optim.lr" in line
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints'}" in line
    assert not (tmp_path / "run" / "result.json").exists()


FEW = {"train__length": "2 steps", "optim__ema_decay": "0"}


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_r_s16_p8_224", "test_convnext"])
def test_any_encoder_of_timm_s(name: str, split: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert tune(split, run_dir, init=f"random:{name}", model__img_size="32", **FEW) == 0
    rows = read_csv(run_dir / "predictions.csv")[::30]
    model = in_timm(run_dir)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    with torch.no_grad():
        logits = model(pixels([row["path"] for row in rows], model))
    names = ("blue", "green", "lonely", "red")
    found = dict(zip(names, logits.softmax(dim=1).T, strict=True))
    for number, row in enumerate(rows):
        assert float(found[row["predicted"]][number]) == pytest.approx(float(row["probability"]), abs=1e-5)
    read = build(open_weights(str(run_dir))).eval()
    with torch.no_grad():
        torch.testing.assert_close(read(pixels([rows[0]["path"]], model)), logits[:1], rtol=0, atol=1e-5)


def test_statistics_of_batch_normalisation_are_learnt_and_exported(source: str, tmp_path: Path) -> None:
    assert tune(source, tmp_path / "run", init="random:test_resnet", model__img_size="32", train__length="3 steps") == 0
    model, state = in_timm(tmp_path / "run").state_dict(), runs.final_state(tmp_path / "run")["model"]
    means = [name for name in state if name.endswith("running_mean")]
    assert means
    for name in means:
        assert torch.equal(model[name], state[name])  # averages of weights go with the latest statistics
        assert state[name].abs().max() > 0


def test_from_a_pretraining_run_at_a_higher_resolution(pretrained: Path, source: str, tmp_path: Path) -> None:
    still = {"optim__lr": "1e-30", "train__length": "1 steps", "optim__ema_decay": "0"}
    run_dir = tmp_path / "run"
    assert tune(source, run_dir, init=str(pretrained), model__img_size="48,40", **still) == 0
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
    weights = open_weights(str(run_dir))
    assert (weights.representation, weights.classes) == (20, ("blue", "green", "lonely", "red"))
    model = build(weights).eval()
    headless = in_timm(run_dir)
    rows = read_csv(run_dir / "predictions.csv")[::20]
    images = pixels([row["path"] for row in rows], headless)
    with torch.no_grad():
        features, logits = headless(images), model(images)
    head: Any = model.get_submodule("head")
    assert features.shape == (len(rows), 48)
    by_hand = (features @ head.pre_logits.weight.T + head.pre_logits.bias).tanh() @ head.fc.weight.T + head.fc.bias
    torch.testing.assert_close(by_hand, logits, rtol=0, atol=1e-5)
    assert head.pre_logits.weight.shape == (20, 48)
    for row, best in zip(rows, logits.softmax(dim=1).max(dim=1).values.tolist(), strict=True):
        assert float(row["probability"]) == pytest.approx(best, abs=1e-5)


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


def test_a_share_of_the_labels_is_the_same_share_of_each_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = runs.write_images(tmp_path / "images", 200)
    assert tune(data, tmp_path / "run", "--labels", "10%", **FEW) == 0
    # 50 of each class, a fifth held out.
    rows = read_csv(tmp_path / "run" / "classes.csv")
    assert [(row["train_images"], row["test_images"]) for row in rows] == [("4", "10")] * 4
    said = "labels: 16 training images (10% of each class, drawn by data.labels_seed) and 40 test images in 4 classes"
    assert said in capsys.readouterr().err


def test_layers_learn_at_their_own_rates(pretrained: Path, source: str, tmp_path: Path) -> None:
    told = {"optim__layer_decay": "0.5", "optim__name": "adamw", "optim__weight_decay": "0.1"}
    assert tune(source, tmp_path / "run", init=str(pretrained), train__length="1 steps", **told) == 0
    groups = runs.final_state(tmp_path / "run")["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {1.0, 0.5, 0.25, 0.125}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


@pytest.mark.slow
def test_two_processes_do_what_one_does(split: str, tmp_path: Path) -> None:
    settings = {"model__drop_path": "0", "train__precision": "fp32", "train__length": "12 steps"}
    process = runs.torchrun(runs.finetune_command(split, tmp_path / "two", **settings))
    assert tune(split, tmp_path / "one", **settings) == 0
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert out.count("Finished: 12 steps on 28 images") == 1
    one, two = (runs.final_state(tmp_path / name) for name in ("one", "two"))
    for part in ("model", "ema"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=0, atol=1e-5, msg=f"{part}.{name}")
    first, second = (read_csv(tmp_path / name / "predictions.csv") for name in ("one", "two"))
    assert [row["path"] for row in first] == [row["path"] for row in second]
    for row, other in zip(first, second, strict=True):
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=1e-4)


@pytest.mark.slow
def test_two_processes_sweep_and_share_batch_statistics(split: str, tmp_path: Path) -> None:
    told = {"model__img_size": "32", "optim__lr": "0.01,1e38", "train__length": "6 steps", "log__evaluate": "2 steps"}
    process = runs.torchrun(runs.finetune_command(split, tmp_path / "two", init="random:test_resnet", **told))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert out.count("best: optim.lr 0.01") == 1
    assert [row["chosen"] for row in read_csv(tmp_path / "two" / "sweep.csv")] == ["1", "0"]
    # What both tested together is what the exported model says.
    model = in_timm(tmp_path / "two")
    rows = read_csv(tmp_path / "two" / "predictions.csv")
    with torch.no_grad():
        best = model(pixels([row["path"] for row in rows], model)).softmax(dim=1).max(dim=1).values
    told_of = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(best, told_of, rtol=0, atol=1e-5)


class Bomb:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def spoil(folder: Path, run_dir: Path, how: str) -> None:
    """The exported model of a run with weights that are damaged or worse."""
    shutil.copytree(run_dir / "model", folder)
    weights = folder / "model.safetensors"
    if how == "empty":
        weights.write_bytes(b"")
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "pickle":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))


WRONG: list[tuple[str, dict[str, str], list[str]]] = [
    ("missing init", {"init": "TMP/nowhere"}, ["--init TMP/nowhere: there is no such file or folder"]),
    ("empty init", {"init": "TMP/empty"}, ["--init TMP/empty: the folder is empty"]),
    ("weights of 0 bytes", {"init": "TMP/model_empty"}, ["TMP/model_empty/model.safetensors: truncated"]),
    ("weights cut off", {"init": "TMP/model_cut"}, ["TMP/model_cut/model.safetensors: truncated"]),
    ("weights that run code", {"init": "TMP/model_pickle"}, ["pytorch_model.bin: truncated, or no file of plain"]),
    ("an unknown name", {"init": "resnet1888"}, ["neither a file, a folder nor a model of timm"]),
    ("an unknown new model", {"model__name": "vit_tinny_patch16_224"}, ["model.name: timm", "vit_tiny_patch16_224"]),
    ("no new model", {"model__name": ""}, ["say which by --model.name"]),
    ("an architecture twice", {"init": "random:test_vit", "model__depth": "3"}, ["model.depth is for --init none"]),
    ("channels twice", {"init": "random:test_vit", "model__in_chans": "1"}, ["model.in_chans is for --init none"]),
    ("no head to keep", {"init": "random:test_vit", "model__head": "keep"}, ["has no head; take linear"]),
    ("tanh on a ResNet", {"init": "random:test_resnet", "model__head": "tanh"}, ["is not a ViT"]),
    ("an unused setting", {"model__representation": "8"}, ["model.representation is for model.head tanh"]),
    ("token of a ResNet", {"init": "random:test_resnet", "model__pool": "token"}, ["is not a ViT"]),
    ("one class", {"data__source": "array:TMP/one.npz"}, ["has labelled images of one class alone, 1: there must be"]),
    ("one folder", {"data__source": "folder:TMP/one"}, ["folder:TMP/one has no labels (4 images, unlabelled)"]),
    ("no labels", {"data__source": "array:TMP/plain.npy"}, ["array:TMP/plain.npy has no labels"]),
    ("no images", {"data__source": "folder:TMP/empty"}, ["no image in TMP/empty"]),
    ("missing test", {"data__test": "folder:TMP/nowhere"}, ["there is no folder TMP/nowhere"]),
    ("an image of broken patches", {"model__img_size": "30"}, ["model.img_size 30 is not a", "take 24 or 32"]),
    ("no recipe", {"data__randaugment": "rand-x9"}, ["data.randaugment 'rand-x9' is no recipe of timm's"]),
    ("mixup of one image", {"loss__mixup": "0.2", "train__micro_batch": "1"}, ["mix pairs of images, but 1 go"]),
    ("a mean of two", {"data__mean": "0.5,0.5"}, ["data.mean takes one number or 3"]),
    ("no share", {"data__labels": "0%"}, ["data.labels is above 0% and up to 100%"]),
    ("all held out", {"data__holdout": "100%"}, ["data.holdout must leave images"]),
    ("a rate twice", {"optim__lr": "0.1,0.1"}, ["optim.lr takes different positive numbers"]),
    ("a warm-up past the end", {"schedule__warmup": "41 steps"}, ["warm-up (41 steps)"]),
]


@pytest.mark.parametrize("sweep", [False, True], ids=["one rate", "sweep"])
@pytest.mark.parametrize(("changed", "said"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_input_is_one_line_and_nothing_is_written(
    sweep: bool,
    changed: dict[str, str],
    said: list[str],
    source: str,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "only").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / "one" / "only" / f"{number}.png")
    np.save(tmp_path / "plain.npy", np.zeros((8, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "one.npz", images=np.zeros((8, 32, 32, 3), np.uint8), labels=np.ones(8, np.int64))
    if "model_" in changed.get("init", ""):
        how = changed["init"].rpartition("_")[2]
        spoil(tmp_path / f"model_{how}", pretrained, how)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    changed = {name: value.replace("TMP", str(tmp_path)) for name, value in changed.items()}
    if sweep and "optim__lr" not in changed:
        changed["optim__lr"] = "0.1,0.2"
    assert tune(changed.pop("data__source", source), tmp_path / "run", **changed) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("finetune: error: ")
    for text in said:
        assert text.replace("TMP", str(tmp_path)) in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_folder_of_another_kind_is_left_alone(
    pretrained: Path, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(pretrained, tmp_path / "copy")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for rates in ("0.1", "0.1,0.2"):
        assert tune(source, run_dir, optim__lr=rates) == 2
        assert "holds a run of another kind; choose another --run-dir" in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    (tmp_path / "file").touch()
    assert tune(source, tmp_path / "file") == 2
    assert "cannot write to the run folder" in capsys.readouterr().err.splitlines()[-1]
