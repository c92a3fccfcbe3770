"""Whole runs beside those of another checkout: what each side gets, what its log comes to, and what is refused."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from benchmarks import training
from benchmarks.settings import TrainingBench
from benchmarks.training import Side, _side, as_flags, measure, recipe, steady

from mpp.config import overridden
from mpp.errors import UserError
from mpp.pretraining.settings import PretrainConfig
from tests.benchmarks.tiny import call
from tests.runs import ROOT, TINY, write_images


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout that lacks a setting."""
    checkout = tmp_path_factory.mktemp("older")
    for name in ("mpp", "tools"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in checkout.rglob("*.py"):
        text = path.read_text("utf-8")
        if "vflip" in text:
            path.write_text(text.replace("vflip", "upside_down"), "utf-8")
    return checkout


@pytest.mark.parametrize("text", TrainingBench().recipes)
def test_a_recipe_is_what_its_file_sets_without_what_looks_at_the_run(text: str) -> None:
    config = recipe(text, ROOT / "configs")
    assert overridden(PretrainConfig(), [word for flag in as_flags(config) for word in flag]) == config
    assert (config.data.source, config.fewshot.data, config.log.pictures, config.log.to) == ("demo", "", "", ())
    assert config.model.img_size == ((48,) if "48" in text or "demo.yaml" in text else (32,))


@pytest.mark.slow
def test_each_checkout_imports_its_own_package_and_gets_what_it_knows(older: Path) -> None:
    # 300 wide is right only with the later 5 heads.
    flags = [["--model.embed-dim", "300"], ["--data.vflip", "0.5"], ["--model.num-heads", "5"]]
    side = _side("older", older, flags)
    assert (side.flags, side.unknown) == ([flags[0], flags[2]], [flags[1]])
    assert _side("this", ROOT, flags).unknown == []
    (older / "nothing").mkdir()
    with pytest.raises(UserError, match=f"would be imported from {ROOT / 'mpp'}"):
        _side("none", older / "nothing", flags)


def test_the_first_quarter_does_not_count() -> None:
    rows = [
        {"step": step, "images": 10 * step, "time/images_per_second": speed, "time/data_wait": wait}
        for step, speed, wait in ((1, 1.0, 1.0), (2, 100.0, 0.0), (3, 100.0, 0.0), (4, 50.0, 0.5))
    ]
    rows.insert(2, {"step": 2, "images": 20, "fewshot/1shot": 0.5})
    rate, waited, seconds = steady(rows)
    assert (rate, waited, seconds) == pytest.approx((30 / 0.4, 0.1 / 0.4, 10.4))


def test_the_run_that_does_not_count_is_as_long_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter one may not be worth a cache of decoded pixels, which the first that counts would then make."""
    ran: list[list[str]] = []
    row = {"step": 1, "images": 1, "time/images_per_second": 1.0, "time/data_wait": 0.0}
    done = subprocess.CompletedProcess((), 0)
    monkeypatch.setattr(training, "_run", lambda words, *_: (ran.append(words[2:-1]), done)[1])
    monkeypatch.setattr(training, "read_starts", lambda _: [{}])
    monkeypatch.setattr(training, "read_rows", lambda _: [row])
    side = Side("one", ROOT, [["--train.length", "400 steps"]], [])
    measure([side], 2)
    assert (ran, len(side.rounds)) == (3 * [["--train.length", "400 steps", "--run-dir"]], 2)


@pytest.mark.slow
def test_both_sides_are_measured_and_a_failed_run_is_one_line(tmp_path: Path, older: Path) -> None:
    words = TINY | {"data.source": write_images(tmp_path, number=100), "data.vflip": "0.5"}
    flags = shlex.join(word for name, value in words.items() if value for word in (f"--{name}", value))
    path = tmp_path / "tiny.yaml"
    path.write_text("model: {}\n", "utf-8")
    run = ("--precision", "fp32", "--steps", "20", "--repeats", "1", "--device", "cpu", "--recipes", f"{path}: {flags}")
    done = call("training", "--against", str(older), *run)
    assert (done.returncode, done.stderr) == (0, "")
    figures = r"\S+ images/s \(\S+ to \S+\)   \d+% waiting for data, \d+\.\d s besides"
    for name in ("this checkout", "the other"):
        assert re.search(rf"^  {name} +{figures}", done.stdout, re.MULTILINE)
    assert "    does not know --data.vflip 0.5\n" in done.stdout
    assert re.search(r"^  this checkout / the other +\S+ x \(\S+ to \S+\)$", done.stdout, re.MULTILINE)
    failed = call("training", "--recipes", f"{path}: {flags} --data.source array:{tmp_path}/nothing.npy")
    assert failed.returncode == 1
    assert re.fullmatch(r"bench training: error: the run of \S+ failed: .*nothing\.npy.*\n", failed.stderr)
