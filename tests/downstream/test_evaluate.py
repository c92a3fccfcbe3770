"""The few-shot and probe commands: tables, CSV and picture, for several encoders side by side."""

import csv
import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from mpp.cli import fewshot, pretrain, probe
from tests import runs

COMMON = ["--encoder.device", "cpu", "--encoder.workers", "0", "--img-size", "32", "--precision", "fp32"]
SIDES = ["random:test_vit", "random:test_resnet"]
NAMES = ["random:test_vit (mean)", "random:test_vit (token)", "random:test_resnet (mean)"]


class Done(NamedTuple):
    out: str
    err: str
    folder: Path
    words: list[str]
    cache: Path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run_tool(tool: Callable[[list[str]], int], words: list[str], folder: Path) -> Done:
    """In this process, with features kept in a folder of its own."""
    words = ["--init", *SIDES, *words, *COMMON, "--out", str(folder / "out")]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("MPP_CACHE", str(folder / "cache"))
        assert tool(words) == 0
    return Done(out.getvalue(), err.getvalue(), folder / "out", words, folder / "cache")


@pytest.fixture(scope="module")
def shot(source: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The few-shot tool."""
    return run_tool(fewshot, ["--data", source, "--shots", "1", "5", "10"], tmp_path_factory.mktemp("fewshot"))


@pytest.fixture(scope="module")
def probed(source: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The probe tool."""
    return run_tool(probe, ["--data", source, "--l2", "0.01", "1"], tmp_path_factory.mktemp("probe"))


def test_fewshot_tables(shot: Done) -> None:
    assert {path.name for path in shot.folder.iterdir()} == {"fewshot.csv", "fewshot.png"}
    assert np.asarray(Image.open(shot.folder / "fewshot.png")).std() > 1
    found = rows(shot.folder / "fewshot.csv")
    names = [*NAMES, f"{SIDES[0]} (chosen by cross-validation on the shots)"]
    assert [(row["model"], row["shots"]) for row in found] == [(name, k) for name in names for k in ("1", "5", "10")]
    ways = [("-1", "mean"), ("-1", "token"), ("-1", "mean"), ("cv", "cv")]
    assert [(row["layer"], row["pool"]) for row in found[::3]] == ways
    assert "1 shot: mean (3 draws), for one image per class leaves nothing to choose by\n5 shots: " in shot.out
    for row in found:
        assert 0.25 < float(row["accuracy"]) <= 1
        assert (row["seeds"], row["l2"]) == ("3", "" if row["layer"] == "cv" else "1024 1024 1024")
        assert float(row["interval95"]) >= float(row["std"]) >= 0
        assert f"{100 * float(row['accuracy']):.1f}%" in shot.out
    for name in names:
        assert f"\n{name}\n" in shot.out
    assert "4 classes have fewer images" in shot.out  # 8 of each are not 10
    assert "32 training and 8 test images" in shot.err
    assert "note: " in shot.err
    assert len(list((shot.cache / "features").iterdir())) == 4  # two encoders, training and test images


def test_fewshot_twice_gives_the_same_bits(
    shot: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*shot.words[:-1], str(tmp_path / "out")]
    assert fewshot(words) == 0  # without what the other kept
    fresh = capsys.readouterr().out
    assert (tmp_path / "out" / "fewshot.csv").read_bytes() == (shot.folder / "fewshot.csv").read_bytes()
    assert fresh.replace(str(tmp_path / "out"), str(shot.folder)) == shot.out
    monkeypatch.setenv("MPP_CACHE", str(shot.cache))
    assert fewshot(words) == 0
    assert capsys.readouterr().out == fresh


def test_a_pretrained_run_all_layers_and_chosen_l2(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert pretrain(runs.command(source, run_dir, train__length="2 steps", fewshot__data="")[1:]) == 0
    told = ["--data", source, "--shots", "1", "4", "--seeds", "0", "--pool", "mean+token", "mean", "--encoder.no-cache"]
    quiet = ["--encoder.device", "cpu", "--encoder.workers", "0"]
    init = ["--init", str(run_dir), f"random:{run_dir}"]
    shown: list[list[str]] = []
    monkeypatch.setattr("mpp.downstream.evaluate.plot_shots", lambda path, results: shown.append(list(results)))
    capsys.readouterr()
    assert fewshot([*init, *told, *quiet, "--layers", "all", "--l2", "cv", "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert err.count(f"note: 8 of the 8 test images are in the pretraining data of {run_dir}, {source}, 8 as the") == 1
    found = rows(tmp_path / "out" / "fewshot.csv")
    last = [f"{name} ({how})" for name in init[1:] for how in ("mean+token", "mean")]
    first = [f"{name[:-1]}, layer -2)" for name in last]
    chosen = [f"{name} (chosen by cross-validation on the shots)" for name in init[1:]]
    names = [*first[:2], *last[:2], *first[2:], *last[2:], *chosen]
    assert [row["model"] for row in found[::2]] == names
    assert [(row["layer"], row["pool"]) for row in found[2:7:2]] == [
        ("-2", "mean"),
        ("-1", "mean+token"),
        ("-1", "mean"),
    ]
    assert shown == [
        [*last, *(f"{name} (chosen)" for name in init[1:])]
    ]  # of many layers the last stands in fewshot.png, all in the other
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"fewshot.csv", "layers.png"}
    assert f"{tmp_path / 'out' / 'layers.png'}\n" in out
    assert "L2" in out
    assert all(row["interval95"] == row["std"] == "" for row in found)  # of one draw
    assert float(found[1]["l2"]) > 0
    assert not (tmp_path / "cache" / "features").exists()


def test_max_test_and_nothing_written_without_out(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = ["--init", SIDES[1], "--data", source, "--shots", "1", "--max-test", "5", "--encoder.no-cache", *COMMON]
    assert fewshot(told) == 0
    assert " and 5 test images" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_probe_tables(probed: Done) -> None:
    found = rows(probed.folder / "probe.csv")
    assert [row["model"] for row in found] == NAMES
    for row in found:
        assert (row["kind"], row["labels"], row["setting"], row["top5"]) == ("linear", "100%", "l2", "")
        assert row["chosen"] in ("0.01", "1")
        assert f"top-1 {float(row['top1']):.1%} of 8 test images" in probed.out
        assert float(row["top1"]) > 0.25
        assert row["held_out"] in {f"{right / 4:.6f}" for right in range(5)}
    vit = {"mean": found[0], "token": found[1]}
    best = max(vit, key=lambda pool: float(vit[pool]["held_out"]))
    told = f"{SIDES[0]}: held-out training images choose {best}: top-1 {float(vit[best]['top1']):.1%}\n"
    assert told in probed.out
    assert probed.out.count("held-out training images") == 4
    assert probed.out.count("chosen") == 3
    assert [path.name for path in probed.folder.iterdir()] == ["probe.csv"]


def test_probe_twice_gives_the_same_bits(probed: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPP_CACHE", str(probed.cache))
    assert probe([*probed.words[:-1], str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "probe.csv").read_bytes() == (probed.folder / "probe.csv").read_bytes()


def test_neighbours_and_a_share_of_the_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = runs.write_images(tmp_path / "images", 120)
    told = ["--init", SIDES[1], "--data", source, "--kind", "knn", "--k", "1", "3", "500", *COMMON]
    assert probe([*told, "--labels", "25%", "--layer", "1", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "24 training and 24 test images" in printed.err
    (row,) = rows(tmp_path / "out" / "probe.csv")
    assert (row["model"], row["kind"]) == ("random:test_resnet (mean, layer -4)", "knn")
    assert (row["labels"], row["setting"]) == ("25%", "k")
    assert row["chosen"] in ("1", "3")
    assert "500" not in printed.out  # more than there are


def test_bad_images_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in "ab":
        for number in range(6):
            path = tmp_path / "images" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = (200, 30 + number, 30) if label == "a" else (30, 30 + number, 200)
            Image.new("RGB", (20 + number, 40), colour).save(path)
    (tmp_path / "images" / "a" / "0.png").write_text("no image")
    told = ["--data", f"folder:{tmp_path / 'images'}", "--init", SIDES[1], *COMMON]
    assert probe([*told, "--l2", "1"]) == 0
    assert "images that could not be decoded and are left out: 1" in capsys.readouterr().out
    assert fewshot([*told, "--shots", "5", "--seeds", "0"]) == 0
    assert "1 image" in capsys.readouterr().out
    # The pixels of one more take more than a megabyte, which is another question to the kept features.
    Image.new("RGB", (600, 500), (200, 30, 30)).save(tmp_path / "images" / "a" / "1.png")
    for limit, number in (("700", 1), ("1", 2)):
        assert probe([*told, "--l2", "1", "--max-image-mb", limit]) == 0
        assert f"images that could not be decoded and are left out: {number}" in capsys.readouterr().out


TOOLS = {"fewshot": fewshot, "probe": probe}
ONE, TWO, DATA = f"--init {SIDES[1]}", f"--init {' '.join(SIDES)}", "--data DATA"
WRONG: dict[str, tuple[str, str]] = {
    "no init": (DATA, "no encoder: give --init"),
    "no data": (ONE, "no labelled images: give --data"),
    "missing init": (f"{ONE} TMP/nowhere {DATA}", "--init TMP/nowhere: there is no such file"),
    "empty init": (f"--init TMP/empty {DATA}", "--init TMP/empty: the folder is empty"),
    "missing data": (f"{ONE} --data folder:TMP/nowhere", "there is no folder TMP/nowhere"),
    "empty data": (f"{ONE} --data folder:TMP/empty", "no image in TMP/empty"),
    "no labels": (f"{ONE} --data array:TMP/plain.npy", "array:TMP/plain.npy has no labels"),
    "the same twice": (f"{ONE} {SIDES[1]} {DATA}", "init takes different encoders"),
    "no class token": (f"{TWO} {DATA} --pool token", "--pool token: random:test_resnet has no class token; add mean"),
    "no such layer": (f"{TWO} {DATA} LAYER 5", "layer 5: random:test_resnet has layers 0 to 4, or -5 to -1"),
    "a size that cuts": (f"{TWO} {DATA} --img-size 33", "encoder.img_size 33 is not a mult"),
    "a folder that is a file": (f"{ONE} {DATA} --out TMP/plain.npy", "to --out TMP/plain.npy"),
    "a folder below a file": (f"{ONE} {DATA} --out TMP/plain.npy/x", "cannot write to --out"),
    "fp16 on a CPU": (f"{ONE} {DATA} --encoder.precision fp16", "encoder.precision fp16 needs"),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(("flags", "said"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_nothing_is_written(
    tool: str,
    flags: str,
    said: str,
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "plain.npy", np.zeros((8, 32, 32, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name, value in {"DATA": source, "LAYER": "--layers" if tool == "fewshot" else "--layer"}.items():
        flags = flags.replace(name, value)
    words = [word.replace("TMP", str(tmp_path)) for word in flags.split()]
    plain = [["--encoder.device", "cpu"], ["--encoder.workers", "0"], ["--img-size", "32"]]
    plain += [["--encoder.precision", "fp32"], ["--out", str(tmp_path / "out")]]
    words += [word for flag in plain if flag[0] not in words for word in flag]
    assert TOOLS[tool](words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith(f"{tool}: error: ")
    assert said.replace("TMP", str(tmp_path)) in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("tool", "words", "said"),
    [
        ("fewshot", ["--l2", "some"], "l2 takes a positive number or cv, got 'some'"),
        ("fewshot", ["--l2", "-1"], "l2 takes a positive number or cv"),
        ("fewshot", ["--shots", "0"], "shots takes different numbers of at least 1"),
        ("fewshot", ["--kind", "knn"], "no setting '--kind'"),
        ("fewshot", ["--layers", "-1", "-1"], "layers takes different numbers or the word all, got -1 -1"),
        ("fewshot", ["--layers", "all", "2"], "layers takes different numbers or the word all, got all 2"),
        ("fewshot", ["--pool", "mean", "mean"], "pool takes different ones of mean, token and mean+token, got mean m"),
        ("probe", ["--pool"], "pool takes different ones of mean, token and mean+token, got none"),
        ("probe", ["--l2", "0.1", "inf"], "l2 takes positive, finite numbers, got [0.1, inf]"),
        ("probe", ["--l2", "nan"], "l2 takes positive, finite numbers"),
        ("probe", ["--k", "0"], "k takes numbers of at least 1"),
        ("probe", ["--labels", "200%"], "labels is above 0% and up to 100%"),
        ("probe", ["--kind", "tree"], "--kind: takes one of linear, knn, got 'tree'"),
    ],
)
def test_wrong_settings(tool: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert TOOLS[tool](["--init", SIDES[0], "--data", "demo", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tool}: error: ")
    assert said in line


def test_what_features_cannot_do_is_said_with_the_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = runs.write_images(tmp_path / "images", 8)  # of each class one image is left
    assert probe(["--init", SIDES[1], "--data", source, *COMMON, "--encoder.no-cache"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("probe: error: random:test_resnet (mean): no class has two images")


@pytest.mark.parametrize(("k", "labels", "images"), [(["33", "40"], "100%", 32), (["17"], "50%", 16)])
def test_more_neighbours_than_images_before_anything_is_read(
    k: list[str],
    labels: str,
    images: int,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--init", SIDES[1], "--data", source, *COMMON, "--kind", "knn", "--labels", labels]
    with monkeypatch.context() as changes:
        changes.setattr("mpp.downstream.evaluate.open_weights", None)
        assert probe([*words, "--k", *k]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--k {', '.join(k)}: there are only {images} training images to be neighbours" in line
    assert probe([*words, "--k", *k, "3"]) == 0  # those that are too large are passed over


def test_the_notes_are_those_of_the_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for split, counts in (("train", (8, 3)), ("test", (1, 1))):
        for name, number in zip("ab", counts, strict=True):
            (tmp_path / "x" / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "x" / split / name / f"{i}.png")
    words = ["--init", SIDES[1], "--data", f"folder:{tmp_path / 'x'}", *COMMON, "--kind", "knn", "--k", "1"]
    assert probe(words) == 0
    assert "imbalance: 3 to 8 training images a class" in capsys.readouterr().err
    assert probe([*words, "--labels", "10%"]) == 0
    told = capsys.readouterr().err
    assert "2 training and 2 test images" in told
    assert "imbalance" not in told
