"""Several processes under torchrun do what one does, whether each has the whole model or its share of it."""

import functools
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpp import cli, dist
from mpp.cli import convert, pretrain
from mpp.system.files import LOCK, claimed
from mpp.training.checkpoint import Checkpoints
from tests import runs

# fp32 without stochastic depth, whose draws depend on the split; and an epsilon well above rounding, or Adam would
# make whole steps of the gradients that are nothing but rounding (those of the keys' biases).
SPLIT = {"model__drop_path": "0", "train__precision": "fp32", "optim__eps": "1e-4"}
SHORT = {**SPLIT, "train__length": "15 steps", "fewshot__shots": "1,5"}


@pytest.fixture(scope="session")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images that no number of processes shares equally, in classes that are hard to tell apart."""
    return runs.write_images(tmp_path_factory.mktemp("noisy"), 43, noise=150)


@pytest.fixture(scope="session")
def one(noisy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process does."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    assert pretrain(runs.command(noisy, run_dir, **SHORT)[1:]) == 0
    return run_dir


def assert_rows_alike(run_dir: Path, reference: Path) -> list[dict[str, Any]]:
    """The same rows to rounding; returns those of the reference."""
    found, expected = runs.figures(run_dir), runs.figures(reference)
    assert [(row["step"], sorted(row)) for row in found] == [(row["step"], sorted(row)) for row in expected]
    for row, other in zip(expected, found, strict=True):
        assert other == pytest.approx(row, rel=1e-4)
    return expected


def assert_weights_alike(found: dict[str, Any], expected: dict[str, Any], part: str) -> None:
    assert found[part].keys() == expected[part].keys()
    for name, value in expected[part].items():
        torch.testing.assert_close(found[part][name], value, rtol=0, atol=1e-5, msg=f"{part}.{name}")


def assert_alike(run_dir: Path, reference: Path) -> None:
    """The same rows, few-shot accuracy included, and the same weights, to rounding."""
    assert 0.2 < max(row.get("fewshot/5", 0.5) for row in assert_rows_alike(run_dir, reference)) < 1
    found, expected = runs.final_state(run_dir), runs.final_state(reference)
    for part in ("model", "ema"):
        assert_weights_alike(found, expected, part)
    assert found["images_seen"] == 240


@pytest.fixture(scope="session")
def by(noisy: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], tuple[Path, str]]:
    """Folder and standard output of a run by so many processes, each made once."""

    @functools.cache
    def run(ranks: int, parallel: str) -> tuple[Path, str]:
        run_dir = tmp_path_factory.mktemp("by") / "run"
        return run_dir, runs.finish(runs.command(noisy, run_dir, train__parallel=parallel, **SHORT), ranks=ranks)[0]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(2, "ddp"), (2, "fsdp"), (4, "fsdp")])
def test_several_processes_do_what_one_does(ranks: int, parallel: str, by: Any, one: Path, tmp_path: Path) -> None:
    run_dir, out = by(ranks, parallel)
    assert out.count("Finished: 15 steps, 240 images.") == 1
    assert_alike(run_dir, one)
    latest = Checkpoints(run_dir / "checkpoints").latest()
    assert convert(["--init", str(latest), "--out", str(tmp_path / "converted")]) == 0
    exported, converted = (folder / "model.safetensors" for folder in (run_dir / "model", tmp_path / "converted"))
    assert converted.read_bytes() == exported.read_bytes()


@pytest.mark.slow
def test_two_processes_learn_the_same_visual_words(noisy: str, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    words = {**SHORT, "objective__words": "1"}
    assert pretrain(runs.command(noisy, alone, **words)[1:]) == 0
    runs.finish(runs.command(noisy, together, train__parallel="fsdp", **words), ranks=2)
    assert_alike(together, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "ranks", "parallel"), [("fsdp", 1, "ddp"), ("ddp", 4, "fsdp")])
def test_a_checkpoint_goes_on_by_any_number_of_processes(
    before: str, ranks: int, parallel: str, noisy: str, one: Path, by: Any, tmp_path: Path
) -> None:
    """From step 7 of 15, where two processes were."""
    run_dir = shutil.copytree(by(2, before)[0], tmp_path / "run")
    checkpoints = Checkpoints(run_dir / "checkpoints")
    assert checkpoints.path(7).is_dir() == (before == "fsdp")
    for path in checkpoints.folder.iterdir():
        if path != checkpoints.path(7):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(run_dir / "model")
    _, err = runs.finish(runs.command(noisy, run_dir, train__parallel=parallel, **SHORT), ranks=ranks)
    assert "at step 7 of 15" in err
    assert_alike(run_dir, one)


# The last moment of writing a checkpoint takes long, so that a run is killed in it.
SLOW = """
import os, sys, time
from mpp.cli import pretrain

real = os.replace

def replace(temporary, path):
    if "step_000000014" in str(path):
        time.sleep(60)
    real(temporary, path)

os.replace = replace
sys.exit(pretrain())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(1, "ddp"), (2, "fsdp")])
def test_killed_while_a_checkpoint_is_written_ends_in_the_same_bits(
    ranks: int, parallel: str, source: str, tmp_path: Path
) -> None:
    settings = {"train__length": "24 steps", "train__parallel": parallel}
    (tmp_path / "slow.py").write_text(SLOW)
    run_dir = tmp_path / "run"
    words = [str(tmp_path / "slow.py"), *runs.command(source, run_dir, **settings)[1:]]
    process = runs.start(words) if ranks == 1 else runs.torchrun(words, ranks)
    being_written = run_dir / "checkpoints" / "step_000000014.tmp"
    rows = run_dir / "metrics.jsonl"
    while not (being_written.exists() and '"step": 20' in rows.read_text()):  # and training goes on meanwhile
        assert process.poll() is None
        time.sleep(0.01)
    started = runs.children(process)  # torchrun's are sessions of their own
    for number in (process.pid, *started):
        os.kill(number, signal.SIGKILL)
    process.communicate(timeout=60)
    checkpoints = Checkpoints(run_dir / "checkpoints")
    assert checkpoints.steps() == [0, 7]
    assert being_written.exists()
    _, err = runs.finish(runs.command(source, run_dir, **settings), ranks=ranks)
    assert "at step 7 of 24" in err
    assert not being_written.exists()
    runs.finish(runs.command(source, tmp_path / "other", **settings), ranks=ranks)
    runs.assert_same_run(run_dir, tmp_path / "other")


@pytest.mark.slow
def test_a_batch_that_the_processes_cannot_share_is_refused_in_one_line(source: str, tmp_path: Path) -> None:
    words = runs.command(source, tmp_path / "run", train__batch_size="15")
    _, err = runs.finish(words, code=1, ranks=2)
    assert "train.batch_size 15 is not a multiple of the 2 processes" in err
    assert not (tmp_path / "run").exists()


# The run folder is claimed only once the images are open.
LATE = """
import os, sys
from mpp.pretraining import recipe
from mpp.cli import pretrain

build = recipe.build

def built(config, world, device):
    if world.main:
        os.rename({lock!r}, {there!r})
    return build(config, world, device)

recipe.build = built
sys.exit(pretrain())
"""


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [True, False])
def test_a_folder_in_use_is_refused_in_one_line(fresh: bool, source: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = runs.command(source, run_dir)
    with claimed(run_dir / LOCK):
        if fresh:
            (run_dir / LOCK).rename(tmp_path / LOCK)
            (tmp_path / "late.py").write_text(LATE.format(lock=str(tmp_path / LOCK), there=str(run_dir / LOCK)))
            words[0] = str(tmp_path / "late.py")
        _, err = runs.finish(words, code=1, ranks=2)
        (line,) = [line for line in err.splitlines() if line.startswith("pretrain: error")]
        assert f"--run-dir {run_dir} is in use: process {os.getpid()} on " in line
        assert [path.name for path in run_dir.iterdir()] == [LOCK]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_that_is_asked_to_stop_saves_for_any_number_of_processes(
    parallel: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SPLIT, "train__length": "150 steps", "fewshot__data": "", "train__parallel": parallel}
    run_dir = tmp_path / "run"
    process = runs.torchrun(runs.command(source, run_dir, **settings))
    runs.wait_for_checkpoint(process, run_dir, step=7)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("the same command again goes on") == 1
    stopped = runs.final_state(run_dir)["images_seen"]
    assert 7 * 16 <= stopped < 150 * 16
    assert pretrain(runs.command(source, run_dir, **settings)[1:]) == 0
    assert f"at step {stopped // 16} of 150" in capsys.readouterr().err
    assert runs.final_state(run_dir)["images_seen"] == 150 * 16


@pytest.mark.slow
def test_fine_tuning_by_shares_does_what_one_process_does(source: str, tmp_path: Path) -> None:
    settings = {"model__drop_path": "0", "train__precision": "fp32", "train__length": "12 steps"}
    settings |= {"model__head": "probe"}
    for name, ranks in (("one", 1), ("two", 2)):
        words = runs.finetune_command(source, tmp_path / name, train__parallel="fsdp", **settings)
        runs.finish(words, ranks=ranks)
    assert_rows_alike(tmp_path / "two", tmp_path / "one")
    assert_weights_alike(runs.final_state(tmp_path / "two"), runs.final_state(tmp_path / "one"), "model")
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()
    assert (tmp_path / "two" / "result.json").read_text() == (tmp_path / "one" / "result.json").read_text()


# Each of two machines has its own copy of the images, under the same name; and RANK in a setting is another on each.
MACHINES = """
import os, sys
from mpp import cli

rank = os.environ["RANK"]
os.chdir(sys.argv[2] + rank)
sys.exit(getattr(cli, sys.argv[1])([word.replace("RANK", rank) for word in sys.argv[3:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "changed", "facts"),
    [
        ("pretrain", {}, "images 41 images in 4 classes with fingerprint "),
        ("finetune", {}, "training images 41 images in 4 classes with fingerprint "),
        ("pretrain", {"optim__lr": "1e-RANK"}, "optim.lr 0.1 (elsewhere 1.0); give all ranks"),
        ("finetune", {"log__every": "1RANK steps"}, 'log.every "11 steps" (elsewhere "10 steps"); give all ranks'),
    ],
)
def test_ranks_that_differ_are_refused_in_one_line(
    tool: str, changed: dict[str, str], facts: str, tmp_path: Path
) -> None:
    for rank in (0, 1):
        runs.write_images(tmp_path / f"copy{rank}", 40 + rank)
    (tmp_path / "machines.py").write_text(MACHINES)
    make = runs.command if tool == "pretrain" else runs.finetune_command
    settings = make("array:images.npz", tmp_path / "run", **changed)[1:]
    words = [str(tmp_path / "machines.py"), tool, str(tmp_path / "copy"), *settings]
    _, err = runs.finish(words, code=1, ranks=2)
    line = rf"^{tool}: error: rank 1 on \S+ differs from the other ranks: {re.escape(facts)}"
    assert len(re.findall(line, err, re.MULTILINE)) == 1
    assert not (tmp_path / "run").exists()


EVALUATED = ["--init", "random:test_vit", "--encoder.device", "cpu", "--encoder.workers", "0", "--img-size", "32"]
EVALUATED += ["--encoder.cache", "false"]


TRAINING = {"optim.lr", "train.micro_batch", "checkpoint.every", "newest checkpoint in run_dir", "data.source"}
LABELLED = {"training images", "test images", "labels with fingerprint"}


@pytest.mark.parametrize(
    ("tool", "settings", "facts"),
    [
        ("pretrain", TRAINING, {"images", "precision", "weights to go on from", "few-shot images"}),
        ("finetune", TRAINING, LABELLED | {"precision", "weights"}),
        ("fewshot", {"data", "shots", "init"}, LABELLED),
        ("probe", {"data", "kind", "init"}, LABELLED),
    ],
)
def test_what_ranks_compare_before_they_do_anything(
    tool: str, settings: set[str], facts: set[str], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[dict[str, str]] = []
    monkeypatch.setattr(dist, "agree", lambda facts: compared.append(facts()))
    words = {
        "pretrain": runs.command(source, tmp_path / "run", "--dry-run")[1:],
        "finetune": runs.finetune_command(source, tmp_path / "run", train__length="1 steps")[1:],
        "fewshot": [*EVALUATED, "--data", source, "--shots", "1"],
        "probe": [*EVALUATED, "--data", source, "--kind", "knn"],
    }
    assert getattr(cli, tool)(words[tool]) == 0
    first, *others = compared
    of_the_machine = {"run_dir", "out", "train.device", "encoder.device", "data.workers", "encoder.workers"}
    assert settings <= first.keys() - of_the_machine == first.keys()
    known = {name: text for each in others for name, text in each.items()}
    assert facts <= known.keys()
    assert any(text.startswith("40 images in 4 classes with fingerprint ") for text in known.values())
