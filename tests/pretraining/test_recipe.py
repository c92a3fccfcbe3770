"""The command from images to a checkpoint that timm loads, and how it refuses what is wrong."""

import csv
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.cli import pretrain
from mpp.cli.commands import ALIASES
from mpp.config import from_file, parse
from mpp.downstream.features import pool
from mpp.downstream.rankme import LARGEST, RANK
from mpp.pretraining.build import build_model
from mpp.pretraining.settings import PretrainConfig
from mpp.training.checkpoint import Checkpoints
from mpp.training.rows import read_rows
from tests import runs

import timm  # isort: skip  (after mpp, which makes it importable beside the CPU build of torch)


def config_of(words: list[str]) -> PretrainConfig:
    return parse(PretrainConfig, words[1:], "pretrain", "", ALIASES)


def write_folder(root: Path, number: int = 30) -> str:
    """JPEGs in nested folders of three classes, with two bad ones, and what else lies about in folders."""
    rng = np.random.default_rng(0)
    hue = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    for index in range(number):
        label, depth = index % 3, index // 3 % 2
        folder = root / ("red", "green", "blue")[label] / ("", "deeper/still")[depth]
        folder.mkdir(parents=True, exist_ok=True)
        small = (hue[label] + rng.normal(0, 40, (6, 5, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(small).resize((50, 60)).save(folder / f"{index}.jpg", quality=90)
    (root / "red" / "text.jpg").write_text("this is no JPEG")
    whole = (root / "red" / "0.jpg").read_bytes()
    (root / "blue" / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (root / ".hidden.jpg").write_text("hidden")
    (root / "green" / ".DS_Store").write_text("hidden")
    (root / "green" / "notes.txt").write_text("notes")
    return f"folder:{root}"


class Finished(NamedTuple):
    source: str
    run_dir: Path
    words: list[str]
    out: str
    err: str
    rows: list[dict[str, Any]]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run on a folder of files."""
    folder = tmp_path_factory.mktemp("folder")
    source, run_dir = write_folder(folder / "images"), folder / "runs" / "first"
    words = runs.command(
        source, run_dir, train__length="20 steps", log__pictures="50%", data__workers="2", log__to="tensorboard"
    )
    return Finished(source, run_dir, words, *runs.call(words), read_rows(run_dir / "metrics.jsonl"))


def test_it_leaves_all_that_it_promises(finished: Finished) -> None:
    assert {path.name for path in finished.run_dir.iterdir()} == {
        *("config.yaml", "environment.json", "metrics.jsonl", "bad_files.csv", ".lock"),
        *("tensorboard", "checkpoints", "pictures", "model", "verdict.json"),
    }
    assert from_file(PretrainConfig, finished.run_dir / "config.yaml") == config_of(finished.words)
    assert Checkpoints(finished.run_dir / "checkpoints").steps() == [7, 14, 20]
    pictures = sorted((finished.run_dir / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"reconstruction_{step:09d}.png" for step in (0, 10, 20)]
    assert all(np.asarray(Image.open(path)).std() > 10 for path in pictures)
    assert not list(finished.run_dir.rglob("*.tmp"))


def test_bad_files_are_named_and_hidden_ones_ignored(finished: Finished) -> None:
    root = finished.source.removeprefix("folder:")
    with (finished.run_dir / "bad_files.csv").open(newline="") as file:
        named = {(row["index"], row["kind"], row["file"]) for row in csv.DictReader(file)}
    # Of the 32 paths in order, with 5 images before blue/cut.jpg, and red/text.jpg before red's sub-folder.
    assert named == {("5", "truncated", f"{root}/blue/cut.jpg"), ("26", "not an image", f"{root}/red/text.jpg")}
    assert "images       32 images in 3 classes; ignored 2 hidden and 1 other files" in finished.err
    assert finished.rows[-2]["time/bad_files"] == 2


KINDS = ("", "_masked", "_random", "_unchanged")
BASELINES = ("accuracy_baseline_frequent", "accuracy_baseline_neighbours")


def test_rows_and_curves_are_complete(finished: Finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [row for row in finished.rows if "loss" in row]
    assert [(row["step"], row["images"]) for row in rows] == [(5, 80), (10, 160), (15, 240), (20, 320)]
    for row in rows:
        assert all(0 <= row[name] <= 1 for name in (*(f"accuracy{kind}" for kind in KINDS), *BASELINES))
        assert all(0 < row[f"loss{kind}"] < 10 for kind in KINDS)
        parts = [row[f"loss{kind}"] for kind in KINDS[1:]]
        assert min(parts) <= row["loss"] <= max(parts)
        assert 0 < row["grad_norm"] < math.inf
        assert 0 < row["lr"] <= 1e-3
        assert row["epoch"] == row["images"] / 32
        assert {"time/images_per_second", "time/data_wait", "time/elapsed", "time/left"} <= row.keys()
    assert rows[0]["lr"] > rows[-1]["lr"]
    evaluated = [row for row in finished.rows if "fewshot/1shot" in row]
    assert [row["step"] for row in evaluated] == [0, 20]
    assert evaluated[0] == finished.rows[0]
    assert not any("fewshot/1shot_std" in row for row in evaluated)  # of one draw
    events = EventAccumulator(str(finished.run_dir / "tensorboard"))
    events.Reload()
    assert "reconstruction" in events.Tags()["images"]
    assert all(1 <= row[RANK] <= row[LARGEST] == 30 for row in evaluated)  # of 32 images, two of them bad
    curves = [("loss/all", rows, "loss"), *((name, evaluated, name) for name in ("fewshot/1shot", RANK))]
    for curve, found, name in curves:
        assert [event.step for event in events.Scalars(curve)] == [row["step"] for row in found]
        assert [event.value for event in events.Scalars(curve)] == pytest.approx([r[name] for r in found], rel=1e-6)


def test_what_it_prints(finished: Finished) -> None:
    for said in (
        "model        vit_tiny_patch16_224, 4 x 4 patches, 0.1 M parameters with heads, 32 x 32 pixels",
        "training     20 steps of 16 images, ",
        f"settings     all of them are in {finished.run_dir / 'config.yaml'}",
    ):
        assert said in finished.err
    assert from_file(PretrainConfig, finished.run_dir / "config.yaml") == config_of(finished.words)
    too_short = "WARNING: 20 steps is too short a run to learn much"
    assert too_short in finished.err
    assert too_short in finished.out
    assert "targets: " in finished.err
    assert "step 20/20  loss " in finished.err
    last = [row for row in finished.rows if "loss" in row][-1]
    shown = [f"{last[name]:7.1%}  " for name in ("accuracy_masked", *BASELINES)]
    shown += [f"  {row['fewshot/1shot']:.1%}" for row in finished.rows if "fewshot/1shot" in row]
    shown += [f"{row[RANK]:.1f} at " for row in finished.rows if RANK in row]
    shown += [str(finished.run_dir / "pictures"), str(finished.run_dir / "model"), "random init"]
    assert "without an interval: one draw of the shots" in " ".join(finished.out.split())  # however it is wrapped
    written = json.loads((finished.run_dir / "verdict.json").read_text("utf-8"))
    assert [sentence.split()[:6] for sentence in written["sentences"]] == [
        line.split()[1:7] for line in finished.out.splitlines() if line.startswith("- ")
    ]
    for text in (*shown, f"tensorboard --logdir {finished.run_dir}\n"):
        assert text in finished.out
    assert "±" not in finished.out + finished.err  # of one draw


def check_exported(words: list[str], run_dir: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Checks that model/ gives the averaged encoder's features in timm; returns the average and how far the newest
    weights' features are from it."""
    vit = timm.create_model(f"local-dir:{run_dir / 'model'}", pretrained=True).eval()
    model, state = build_model(config_of(words), "cpu").eval(), runs.final_state(run_dir)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ema = {name.removeprefix("module."): value for name, value in state["ema"].items() if name != "n_averaged"}
    features = []
    with torch.no_grad():
        for weights in (ema, state["model"]):
            model.load_state_dict(weights)
            features.append(pool(model.encoder(images), model.encoder.num_prefix_tokens, "mean"))
        torch.testing.assert_close(vit(images), features[0], rtol=0, atol=1e-6)
    return ema, (features[0] - features[1]).abs().max()


def test_the_model_loads_in_timm_and_gives_the_averaged_encoder_s_features(finished: Finished) -> None:
    _, difference = check_exported(finished.words, finished.run_dir)
    assert difference > 1e-3
    described = json.loads((finished.run_dir / "model" / "config.json").read_text())
    assert described["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]


def test_a_decoder_is_in_the_checkpoints_and_not_in_the_model(source: str, tmp_path: Path) -> None:
    never = {"objective__mask_enters": "2", "objective__split": "1,0,0", "objective__decoder_depth": "1"}
    words = runs.command(source, tmp_path / "run", train__length="4 steps", fewshot__data="", **never)
    assert pretrain(words[1:]) == 0
    ema, _ = check_exported(words, tmp_path / "run")
    assert any(name.startswith("decoder.blocks.0.") for name in ema)


def check_refused(err: str, *said: str) -> None:
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("pretrain: error: ")
    assert all(text in line for text in said), line


def test_too_many_bad_files_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "images", 12)
    words = runs.command(folder, tmp_path / "run", data__max_bad="0.1%", fewshot__data="", train__length="10 steps")
    assert pretrain(words[1:]) == 1
    check_refused(capsys.readouterr().err, "2 of the first ", "data.max_bad", str(tmp_path / "run" / "bad_files.csv"))
    assert len((tmp_path / "run" / "bad_files.csv").read_text().splitlines()) == 3
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.timeout(120)  # all steps of this run would take days
def test_a_dry_run_makes_few_steps_reports_and_writes_nothing(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    more = {"train__length": "100M images", "log__pictures": "50%", "objective__words": "1"}
    more["checkpoint__every"] = "1 steps"
    words = runs.command(source, tmp_path / "run", "--dry-run", **more)
    assert pretrain(words[1:]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line)
    assert lines["images"] == "40 images in 4 classes"
    assert lines["full"].startswith("run     6,250,000 steps, 100,000,000 images, ")
    assert lines["before"].endswith("to see every image whole once, for objective.words")
    for name, text in (("memory", " GiB peak of this process"), ("speed", " images/s ("), ("evaluation", " s each, ")):
        assert text in lines[name]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written == [tmp_path / "cache" / "attention.json"]  # so that the run itself need not time the kernels


@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_a_loss_that_is_not_finite_ends_the_run(
    ema: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absurd = {"optim__lr": "1e30", "optim__clip_norm": "0", "optim__ema_decay": ema, "schedule__warmup": "0 steps"}
    words = runs.command(source, tmp_path / "run", train__precision="fp32", fewshot__data="", **absurd)
    assert pretrain(words[1:]) == 1
    latest = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    event = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (event["event"], event["precision"]) == ("non_finite", "fp32")
    assert event["fp32_loss"] in ("nan", "inf")
    assert 1 < event["step"] < 60
    found = f"the loss is not finite at step {event['step']}; ", f"the last good checkpoint is {latest}"
    check_refused(capsys.readouterr().err, "fp32 is no better: try a lower --optim.lr", *found)
    assert not (tmp_path / "run" / "model").exists()
    state = runs.final_state(tmp_path / "run")
    assert all(value.isfinite().all() for value in state["model"].values())


GREY, TWO = {"model__in_chans": "1"}, {"model__depth": "2"}
HIDDEN = {"objective__split": "1,0,0", "objective__mask_enters": "1"}
WRONG: list[tuple[str, dict[str, str], list[str]]] = [
    ("missing folder", {"data__source": "folder:TMP/nowhere"}, ["TMP/nowhere", "check the path"]),
    ("a file for a folder", {"data__source": "folder:TMP/plain.npy"}, ["TMP/plain.npy is a file"]),
    ("empty folder", {"data__source": "folder:TMP/empty"}, ["no image in TMP/empty", "jpg"]),
    ("no images", {"data__source": "folder:TMP/texts"}, ["no image in TMP/texts (ignored 1 other file)"]),
    ("a plain path", {"data__source": "TMP/texts"}, ["did you mean folder:TMP/texts?"]),
    ("an unknown kind", {"data__source": "foldr:TMP/texts"}, ["'foldr'; did you mean folder:TMP/texts?"]),
    ("an unknown model", {"model__name": "vit_tinny_patch16_224"}, ["vit_tinny_patch16_224", "vit_tiny_patch16_224"]),
    ("a resnet", {"model__name": "resnet18"}, ["'resnet18' is not a VisionTransformer"]),
    ("a Swin", {"model__name": "swin_tiny_patch4_window7_224"}, ["is not a VisionTransformer"]),
    ("an image of broken patches", {"model__img_size": "30"}, ["model.img_size 30", "take 24 or 32"]),
    ("one patch", {"model__patch_size": "32"}, ["model.img_size holds one patch"]),
    (
        "one patch a micro-batch",
        {"model__patch_size": "32", "objective__random_from": "batch", "train__micro_batch": "1"},
        ["model.img_size holds one patch"],
    ),
    ("an automatic cooldown", {"schedule__cooldown": "auto"}, ["schedule.cooldown needs a number and a unit"]),
    ("an endless run", {"train__length": "1e400 steps"}, ["train.length is longer than any run"]),
    ("an endless rate", {"optim__lr": "inf"}, ["optim.lr must be positive and finite, got inf"]),
    ("no split", {"objective__split": "nan,nan,nan"}, ["objective.split must be three probabilities"]),
    ("heads that do not divide", {"model__num_heads": "5"}, ["'num_heads': 5", "divisible"]),
    ("positions of an odd width", {"model__embed_dim": "51", "model__pos_embed": "2d"}, ["divisible by 2, got 51"]),
    ("xformers on a CPU", {"model__attention": "xformers"}, ["model.attention xformers", "use auto or sdpa"]),
    ("fp16 on a CPU", {"train__precision": "fp16"}, ["train.precision fp16 needs CUDA", "take bf16 or fp32"]),
    ("no device", {"train__device": "toaster"}, ["train.device 'toaster' is not a device"]),
    ("a missing GPU", {"train__device": "cuda"}, ["this machine has 0 CUDA devices; take auto or cpu"]),
    ("few-shot without labels", {"fewshot__data": "array:TMP/plain.npy"}, ["array:TMP/plain.npy has no labels"]),
    ("few-shot from nowhere", {"fewshot__data": "folder:TMP/nowhere"}, ["there is no folder TMP/nowhere"]),
    ("a warm-up past the end", {"schedule__warmup": "61 steps"}, ["warm-up (61 steps)", "the run (60 steps)"]),
    ("a mean of two", {"data__mean": "0.5,0.5"}, ["data.mean takes one number or 3"]),
    ("a std of two", {"data__std": "0.5,0.5"}, ["data.std takes one number or 3"]),
    (
        "4x4 cells of 14 pixels",
        {"objective__target": "colour_4x4", "model__patch_size": "14", "model__img_size": "28"},
        ["colour_4x4 needs patch sides divisible by 4, got 14x14"],
    ),
    ("greyscale of grey images", {"data__grayscale": "0.5", **GREY}, ["data.grayscale needs 3 channels"]),
    ("saturation of grey images", {"data__jitter": "0,0,0.2,0", **GREY}, ["saturation needs 3 channels"]),
    ("a mean of three for grey images", {"data__mean": "0.5,0.5,0.5", **GREY}, ["data.mean takes one number or 1"]),
    ("[mask] after the last block", HIDDEN | TWO | {"objective__mask_enters": "2"}, ["take at most 1, or 2 with obj"]),
    (
        "[mask] after a decoder's beginning",
        HIDDEN | TWO | {"objective__mask_enters": "3", "objective__decoder_depth": "1"},
        ["take at most 1, or 2"],
    ),
    ("a heavy decoder", TWO | {"objective__decoder_depth": "3"}, ["no light decoder; take fewer"]),
    ("[mask] late and nothing visible", HIDDEN | {"objective__ratio": "1"}, ["take a smaller ratio"]),
    ("visual words and nothing visible", {"objective__words": "1", "objective__ratio": "1"}, ["words needs others"]),
    ("[mask] late and patches replaced", HIDDEN | {"objective__split": "0.8,0.1,0.1"}, ["needs objective.split 1 0 0"]),
    (
        "details of one value",
        {"objective__detail": "1", "model__patch_size": "1", "model__img_size": "4", **GREY},
        ["patches of one value have no details"],
    ),
]


def write_wrong(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "texts").mkdir()
    (folder / "texts" / "notes.txt").write_text("notes")
    np.save(folder / "plain.npy", np.zeros((8, 32, 32, 3), np.uint8))


@pytest.mark.parametrize(("changed", "said"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_input_is_one_line_and_nothing_is_written(
    changed: dict[str, str],
    said: list[str],
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if changed.get("train__device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    write_wrong(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    changed = {name: value.replace("TMP", str(tmp_path)) for name, value in changed.items()}
    words = runs.command(changed.pop("data__source", source), tmp_path / "run", **changed)
    assert pretrain(words[1:]) == 2
    check_refused(capsys.readouterr().err, *(text.replace("TMP", str(tmp_path)) for text in said))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_wrong_input_to_a_process(tmp_path: Path) -> None:
    words = runs.command(f"folder:{tmp_path}/nowhere", tmp_path / "run")
    out, err = runs.finish(words, code=2, cwd=tmp_path, env={})  # its imports included, whose warnings would show
    assert out == ""
    check_refused(err, f"there is no folder {tmp_path}/nowhere")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
