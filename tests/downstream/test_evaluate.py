"""The few-shot and probe commands: tables, CSV and picture, for several encoders side by side."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpp.cli import fewshot, probe
from tests import runs
from tests.downstream.tuned import read_csv

COMMON = ["--encoder.device", "cpu", "--encoder.workers", "0", "--img-size", "32", "--precision", "fp32"]
SIDES = ["random:test_vit", "random:test_resnet"]
POOLS = ["mean+token", "mean"]
NAMES = ["random:test_vit (mean)", "random:test_vit (token)", "random:test_resnet (mean)"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mpp.downstream.plots._DPI", 50)
    return tmp_path / "cache"


def test_fewshot_tables_and_the_same_from_kept_features(
    source: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--init", *SIDES, "--data", source, "--shots", "1", "5", "10", *COMMON, "--out", str(tmp_path / "out")]
    assert fewshot(words) == 0
    out, err = capsys.readouterr()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"fewshot.csv", "fewshot.png"}
    assert np.asarray(Image.open(tmp_path / "out" / "fewshot.png")).std() > 1
    found = read_csv(tmp_path / "out" / "fewshot.csv")
    names = [*NAMES, f"{SIDES[0]} (chosen by cross-validation on the shots)"]
    assert [(row["model"], row["shots"]) for row in found] == [(name, k) for name in names for k in ("1", "5", "10")]
    ways = [("-1", "mean"), ("-1", "token"), ("-1", "mean"), ("cv", "cv")]
    assert [(row["layer"], row["pool"]) for row in found[::3]] == ways
    assert "1 shot: mean (3 draws), for one image per class leaves nothing to choose by\n5 shots: " in out
    for row in found:
        assert 0.25 < float(row["accuracy"]) <= 1
        assert (row["seeds"], row["l2"]) == ("3", "" if row["layer"] == "cv" else "1024 1024 1024")
        assert float(row["interval95"]) >= float(row["std"]) >= 0
        assert f"{100 * float(row['accuracy']):.1f}%" in out
        assert f"\n{row['model']}\n" in out
    assert "4 classes have fewer images" in out  # 8 of each are not 10
    assert "32 training and 8 test images" in err
    assert "note: " in err
    kept = {path: path.stat().st_ino for path in (cache / "features").iterdir()}
    assert len(kept) == 4  # two encoders, training and test images
    before = (tmp_path / "out" / "fewshot.csv").read_bytes()
    for number in range(2):
        if number:  # without what was kept
            shutil.rmtree(cache)
        assert fewshot(words) == 0
        assert capsys.readouterr().out == out
        assert (tmp_path / "out" / "fewshot.csv").read_bytes() == before
        now = {path: path.stat().st_ino for path in (cache / "features").iterdir()}
        assert now.keys() == kept.keys()
        assert number or now == kept  # a file system may give a new file the number of a removed one


def test_a_pretrained_run_all_layers_and_chosen_l2(
    source: str,
    pretrained: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inits = [str(pretrained), f"random:{pretrained}"]
    told = ["--data", source, "--shots", "1", "4", "--seeds", "0", "--pool", *POOLS, "--encoder.no-cache", *COMMON[:4]]
    told += ["--layers", "all", "--l2", "cv", "--out", str(tmp_path / "out")]
    shown: list[list[str]] = []
    monkeypatch.setattr("mpp.downstream.evaluate.plot_shots", lambda path, results, *_: shown.append(list(results)))
    assert fewshot(["--init", *inits, *told]) == 0
    out, err = capsys.readouterr()
    note = f"note: 8 of the 8 test images are in the pretraining data of {pretrained}, {source}, 8 as the"
    assert err.count(note) == 1
    found = read_csv(tmp_path / "out" / "fewshot.csv")
    last = [f"{name} ({how})" for name in inits for how in POOLS]
    first = [f"{name[:-1]}, layer -2)" for name in last]
    chosen = [f"{name} (chosen by cross-validation on the shots)" for name in inits]
    assert [row["model"] for row in found[::2]] == [*first[:2], *last[:2], *first[2:], *last[2:], *chosen]
    assert [(row["layer"], row["pool"]) for row in found[2:7:2]] == [("-2", "mean"), *(("-1", how) for how in POOLS)]
    # Of many layers the last stands in fewshot.png, all in the other.
    assert shown == [[*last, *(f"{name} (chosen)" for name in inits)]]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"fewshot.csv", "layers.png"}
    assert f"{tmp_path / 'out' / 'layers.png'}\n" in out
    assert "L2" in out
    assert all(row["interval95"] == row["std"] == "" for row in found)  # of one draw
    assert float(found[1]["l2"]) > 0
    assert not (cache / "features").exists()


def test_max_test_and_nothing_written_without_out(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = ["--init", SIDES[1], "--data", source, "--shots", "1", "--max-test", "5", "--encoder.no-cache", *COMMON]
    assert fewshot(told) == 0
    assert " and 5 test images" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_probe_tables(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--init", *SIDES, "--data", source, "--l2", "0.01", "1", *COMMON, "--out", str(tmp_path / "out")]
    assert probe(words) == 0
    out = capsys.readouterr().out
    found = read_csv(tmp_path / "out" / "probe.csv")
    assert [row["model"] for row in found] == NAMES
    for row in found:
        assert (row["kind"], row["labels"], row["setting"], row["top5"]) == ("linear", "100%", "l2", "")
        assert row["chosen"] in ("0.01", "1")
        assert f"top-1 {float(row['top1']):.1%} of 8 test images" in out
        assert float(row["top1"]) > 0.25
        assert row["held_out"] in {f"{right / 4:.6f}" for right in range(5)}
    vit = {"mean": found[0], "token": found[1]}
    best = max(vit, key=lambda pool: float(vit[pool]["held_out"]))
    assert f"{SIDES[0]}: held-out images choose {best}: top-1 {float(vit[best]['top1']):.1%}\n" in out
    assert (out.count("held-out training images"), out.count("held-out images"), out.count("chosen")) == (3, 1, 3)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["probe.csv"]


def test_neighbours_and_a_share_of_the_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = runs.write_images(tmp_path / "images", 120)
    told = ["--init", SIDES[1], "--data", source, "--kind", "knn", "--k", "1", "3", "500", *COMMON]
    assert probe([*told, "--labels", "25%", "--layer", "1", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "24 training and 24 test images" in printed.err
    (row,) = read_csv(tmp_path / "out" / "probe.csv")
    assert (row["model"], row["kind"]) == ("random:test_resnet (mean, layer -4)", "knn")
    assert (row["labels"], row["setting"]) == ("25%", "k")
    assert row["chosen"] in ("1", "3")
    assert "500" not in printed.out  # more than there are


def test_an_attentive_probe_is_the_same_from_kept_tokens(
    source: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--init", SIDES[0], "--data", source, "--kind", "attentive", "--lr", "0.003", "0.01", "--layer", "-2"]
    told += ["--weight-decay", "0.1", "--epochs", "4", *COMMON, "--out", str(tmp_path / "out")]
    written = set()
    for again in range(3):
        if again == 2:  # the encoder runs in each epoch
            monkeypatch.setattr("mpp.downstream.tokens.memory", lambda: 1000)
        assert probe(told) == 0
        out, err = capsys.readouterr()
        where = "more than half of the memory, 1 kB: the encoder runs again in" if again == 2 else "kept in memory"
        assert f"{SIDES[0]}: patch tokens of 40 images, 4 x 64 each, 20.5 kB in float16: {where}" in err
        assert len([*(cache / "features").iterdir()]) == 2
        written.add((tmp_path / "out" / "probe.csv").read_text() + out)
    assert len(written) == 1
    (row,) = read_csv(tmp_path / "out" / "probe.csv")
    assert (row["model"], row["kind"]) == (f"{SIDES[0]} (attentive, layer -2)", "attentive")
    assert (row["setting"], row["chosen"]) in {("lr weight_decay", f"{lr} 0.1") for lr in ("0.003", "0.01")}
    assert f"top-1 {float(row['top1']):.1%} of 8 test images\nlr weight_decay  held-out training images\n" in out


def test_bad_images_are_left_out_and_said(split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shutil.copytree(split.removeprefix("folder:"), tmp_path / "images")
    told = ["--data", f"folder:{root}", "--init", SIDES[1], *COMMON]
    assert fewshot([*told, "--shots", "9", "--seeds", "0"]) == 0
    assert "\n2 images could not be decoded\n" in capsys.readouterr().out
    # The pixels of one more take more than a megabyte, which is another question to the kept features.
    Image.new("RGB", (600, 500), (200, 30, 30)).save(root / "train" / "red" / "0.png")
    for limit, number in (("700", 2), ("1", 3)):
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
    "no class token": (f"{TWO} {DATA} --pool token", "--pool token: random:test_resnet takes mean"),
    "no such layer": (f"{TWO} {DATA} LAYER 5", "layer 5: random:test_resnet has layers 0 to 4, or -5 to -1"),
    "a size that cuts": (f"{TWO} {DATA} --img-size 33", "encoder.img_size 33 is not a mult"),
    "a folder that is a file": (f"{ONE} {DATA} --out TMP/plain.npy", "to --out TMP/plain.npy"),
    "a folder below a file": (f"{ONE} {DATA} --out TMP/plain.npy/x", "cannot write to --out"),
    "fp16 on a CPU": (f"{ONE} {DATA} --encoder.precision fp16", "encoder.precision fp16 needs"),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(("flags", "said"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_nothing_is_written(
    tool: str, flags: str, said: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "plain.npy", np.zeros((8, 32, 32, 3), np.uint8))
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


SETTINGS = [
    ("fewshot --l2 some", "l2 takes a positive number or cv, got 'some'"),
    ("fewshot --shots 0", "shots takes different numbers of at least 1"),
    ("fewshot --kind knn", "no setting '--kind'"),
    ("fewshot --layers -1 -1", "layers takes different numbers or the word all, got -1 -1"),
    ("fewshot --layers all 2", "layers takes different numbers or the word all, got all 2"),
    ("fewshot --pool mean mean", "pool takes different ones of mean, token, mean+token and quarters, got mean mean"),
    ("probe --pool", "pool takes different ones of mean, token, mean+token and quarters, got none"),
    ("probe --l2 0.1 inf", "l2 takes positive, finite numbers, got [0.1, inf]"),
    ("probe --k 0", "k takes numbers of at least 1"),
    ("probe --labels 200%", "labels is above 0% and up to 100%"),
    ("probe --kind knn --labels 1% --k 40 99", "--k 40, 99: there are only 30 training images to be neighbours"),
    ("probe --kind tree", "--kind: takes one of linear, knn, attentive, got 'tree'"),
    ("probe --lr 0.1 0", "lr takes positive, finite numbers, got [0.1, 0.0]"),
    ("probe --weight-decay", "weight_decay takes different numbers, got none"),
    ("probe --queries 0", "queries must be at least 1, got 0"),
    ("probe --kind attentive --pool mean", "--pool mean: an attentive probe pools patch tokens itself; leave it out"),
    (
        f"probe --kind attentive --init {SIDES[1]}",
        "attentive reads the patch tokens of a ViT, which random:test_resnet",
    ),
]


@pytest.mark.parametrize(("words", "said"), SETTINGS)
def test_wrong_settings(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    tool, *flags = words.split()
    assert TOOLS[tool](["--init", SIDES[0], "--data", "demo", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tool}: error: ")
    assert said in line


def test_what_features_cannot_do_is_said_with_the_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = runs.write_images(tmp_path / "images", 8)  # of each class one image is left
    assert probe(["--init", SIDES[1], "--data", source, *COMMON, "--encoder.no-cache"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("probe: error: random:test_resnet (mean): no class has two images")
