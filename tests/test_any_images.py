"""Whole runs over whatever people have: every file of the zoo, many channels, mixtures, bad files across a resume."""

import csv
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from mpp.cli import finetune, pretrain
from mpp.data.settings import DecodeOptions
from mpp.data.sources import remote
from mpp.data.sources.names import is_image
from mpp.training.loop import EXIT_REQUEUE
from mpp.weights.opening import open_weights
from tests import runs
from tests.data.sources.file_server import FileServer
from tests.data.zoo import CASES

Zoo = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A folder of all of them that a default run would read, by name what is to become of each, and odd entries."""
    root = tmp_path_factory.mktemp("zoo") / "images"
    expected: dict[str, str] = {}
    for number, case in enumerate(CASES):
        if case.reading != DecodeOptions():
            continue
        folder = root / ("first", "second")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number:03d}-{case.name}"
        path.write_bytes(case.data)
        if is_image(case.name):
            expected[str(path)] = case.kind
    for name in ("README.txt", ".DS_Store", "Thumbs.db", "__MACOSX/x.jpg"):  # no image and no class
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"no image")
    odd = root / "second"
    (odd / "broken.jpg").symlink_to(root / "nowhere.jpg")
    (odd / "circle.jpg").symlink_to(odd / "circle.jpg")
    os.mkfifo(odd / "fifo.jpg")
    good = next(path for path, kind in expected.items() if not kind)
    for name in ("new\nline.jpg", "caf\udce9.jpg", "日本 語.jpg"):
        (odd / name).write_bytes(Path(good).read_bytes())
        expected[str(odd / name)] = ""
    kinds = {"broken.jpg": "missing", "circle.jpg": "unreadable", "fifo.jpg": "not a file"}
    return root, expected | {str(odd / name): kind for name, kind in kinds.items()}


def bad_files(run_dir: Path) -> dict[str, str]:
    with (run_dir / "bad_files.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row["file"]: row["kind"] for row in csv.DictReader(file)}


@pytest.mark.slow
def test_a_run_over_the_zoo(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, expected = zoo
    settings = {"data__max_bad": "100%", "fewshot__data": "", "train__length": "2 epochs", "data__workers": "2"}
    assert pretrain(runs.command(f"folder:{root}", tmp_path / "run", **settings)[1:]) == 0
    out, err = capsys.readouterr()
    assert bad_files(tmp_path / "run") == {path: kind for path, kind in expected.items() if kind}
    assert f"\nimages       {len(expected)} images in 2 classes; " in err
    number = sum(bool(kind) for kind in expected.values())
    assert f"note: {number} images could not be used (" in out


@pytest.mark.slow
def test_bad_files_keep_a_resumed_run_exact(zoo: Zoo, tmp_path: Path) -> None:
    spec = f"folder:{zoo[0]}"
    settings = {"data__max_bad": "100%", "fewshot__data": "", "train__length": "30 steps"}
    assert pretrain(runs.command(spec, tmp_path / "whole", **settings)[1:]) == 0
    process = runs.start(runs.command(spec, tmp_path / "cut", data__workers="2", **settings))
    runs.wait_for_checkpoint(process, tmp_path / "cut", 14)
    runs.kill(process)
    assert pretrain(runs.command(spec, tmp_path / "cut", **settings)[1:]) == 0
    runs.assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert bad_files(tmp_path / "cut") == bad_files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("container", ["npy", "tif"])
def test_many_channels_from_files_to_the_classifier(container: str, tmp_path: Path) -> None:
    """Five bands of 12 bits in 16: the stated range goes with the weights to the fine-tuning."""
    rng = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        bands = rng.integers(0, 4096, (20, 24, 5)).astype(np.uint16)
        bands[..., 0] = 4000 * (number % 2)
        if container == "npy":
            np.save(folder / f"{number}.npy", bands)
        else:
            tifffile.imwrite(folder / f"{number}.tif", np.moveaxis(bands, 2, 0), photometric="minisblack")
    spec, run_dir = f"folder:{tmp_path / 'images'}", tmp_path / "run"
    settings = {"model__in_chans": "5", "fewshot__seeds": "0", "train__length": "20 steps"}
    words = runs.command(spec, run_dir, **settings)[1:]
    assert pretrain([*words, "--data.value-range", "0", "4095"]) == 0
    weights = open_weights(str(run_dir))
    assert weights.reading == DecodeOptions(5, (0.0, 4095.0))
    words = runs.finetune_command(spec, tmp_path / "ft", init=str(run_dir), train__length="30 steps")
    assert finetune(words[1:]) == 0
    assert open_weights(str(tmp_path / "ft")).reading == DecodeOptions(5, (0.0, 4095.0))


@pytest.mark.slow
def test_a_server_that_gives_no_answer_ends_a_run_saved(
    picture_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.001)
    pictures = picture_folder(*(f"{number}.png" for number in range(40)))
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for number in range(40):
            tar.add(pictures / f"{number}.png", f"{number:03d}.png")
    settings = {"fewshot__data": "", "train__length": "20 steps", "optim__ema_decay": "0"}
    with FileServer(tmp_path / "shards") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        secret = f"shards:{server.url.replace('//', '//user:SECRET@')}/0.tar?X-Amz-Signature="
        assert pretrain(runs.command(f"{secret}ONE", tmp_path / "whole", **settings)[1:]) == 0
        # The survey of a fresh run reads 512 images, a step 16.
        asked = len(server.asked)
        server.failing = lambda number: 503 if number > asked + 512 + 5 * 16 else False
        assert pretrain(runs.command(f"{secret}TWO", tmp_path / "run", **settings)[1:]) == EXIT_REQUEUE
        out, err = capfd.readouterr()
        assert "HTTP status 503" in err.splitlines()[-1]
        assert "once it answers, the same command goes on" in err.splitlines()[-1]
        assert "step_000000000.pt" not in err.splitlines()[-1]
        assert not (tmp_path / "run" / "bad_files.csv").exists()
        server.failing = lambda number: 503  # it is away when the run is started again, too
        again = runs.command(f"{secret}TWO", tmp_path / "run", **settings)[1:]
        assert [pretrain(again), pretrain(again)] == [EXIT_REQUEUE, 1]
        assert "3 starts in a row ended so" in capfd.readouterr().err.splitlines()[-1]
        server.failing = lambda number: False
        assert pretrain(runs.command(f"{secret}THREE", tmp_path / "run", **settings)[1:]) == 0
        server.shutdown()
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")
    said = "".join((out, err, *capfd.readouterr(), (tmp_path / "run" / "config.yaml").read_text()))
    assert not any(word in said for word in ("SECRET", "ONE", "TWO", "THREE", "user"))


@pytest.mark.slow
def test_a_mixture_trains_and_weights_are_for_pretraining(
    picture_folder: Callable[..., Path], source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = picture_folder("in/x/1.png", "in/x/2.png", "in/y/3.png") / "in"
    spec = f"3 * folder:{folder} + 1 * {source}"
    assert pretrain(runs.command(spec, tmp_path / "run", fewshot__data="", train__length="9 steps")[1:]) == 0
    assert "3 images, 74.4% of the images drawn" in capsys.readouterr().err
    assert finetune(runs.finetune_command(spec, tmp_path / "ft")[1:]) == 2
    assert "weights say how often images are drawn, which is for pretraining" in capsys.readouterr().err
