"""What a run writes down of where it comes from, each time it starts."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from mpp import dist
from mpp.cli import finetune, pretrain
from mpp.training import provenance
from mpp.training.provenance import commit, read_starts, record_start
from tests import runs

CPU = torch.device("cpu")


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit that holds a package in whose place ours is."""
    root = tmp_path / "checkout"
    (root / "mpp" / "train").mkdir(parents=True)
    (root / "mpp" / "__init__.py").write_text("")
    try:
        git(root, "init", "-q")
    except FileNotFoundError:
        pytest.skip("there is no git")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "one")
    monkeypatch.setattr(provenance, "__file__", str(root / "mpp" / "training" / "provenance.py"))
    return root


def test_each_start_adds_an_entry(tmp_path: Path) -> None:
    record_start(tmp_path, 0, CPU, {"seed": 3, "data": {"images": 40}})
    record_start(tmp_path, 25, CPU, {"seed": 3})
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert (first["step"], second["step"]) == (0, 25)
    assert (first["seed"], first["data"]) == (3, {"images": 40})
    assert first["versions"]["torch"] == torch.__version__
    assert first["versions"]["timm"] == timm.__version__
    assert first["hardware"]["devices"] == ["cpu"]
    assert first["hardware"]["hosts"] == 1
    assert first["hardware"]["memory_gib"] > 0.1
    assert first["time"].endswith("+00:00")
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


def test_only_rank_0_writes_and_it_tells_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "gather", lambda value: [value, "another"])
    monkeypatch.setattr(dist, "rank_and_size", lambda: (1, 2))
    record_start(tmp_path, 0, CPU, {})
    assert not read_starts(tmp_path)
    monkeypatch.setattr(dist, "rank_and_size", lambda: (0, 2))
    record_start(tmp_path, 0, CPU, {})
    (start,) = read_starts(tmp_path)
    assert (start["hardware"]["hosts"], start["hardware"]["devices"]) == (2, ["cpu", "another"])


def test_the_command_can_be_given_again_but_keeps_no_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "shards:https://user:pass@host/{0..3}.tar?signature=abc"
    monkeypatch.setattr(sys, "argv", ["tools/pretrain.py", "--data", address, "--train.length", "60 steps"])
    record_start(tmp_path, 0, CPU, {})
    text = (tmp_path / "environment.json").read_text()
    assert "pass@" not in text
    assert "abc" not in text
    words = shlex.split(read_starts(tmp_path)[0]["command"])
    assert words == ["tools/pretrain.py", "--data", "shards:https://host/{0..3}.tar", "--train.length", "60 steps"]


@pytest.mark.parametrize("damaged", ["", "[{", '{"step": 0}', "[1, 2]"])
def test_a_damaged_record_counts_as_none(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(damaged)
    assert read_starts(tmp_path) == []
    record_start(tmp_path, 5, CPU, {})
    assert [start["step"] for start in read_starts(tmp_path)] == [5]


def test_commit_of_the_checkout_and_whether_it_was_changed(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    monkeypatch.chdir("/")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    assert commit() == head
    (checkout / "mpp" / "__init__.py").write_text("changed = True\n")
    assert commit() == f"{head}-dirty"


def test_no_commit_of_a_repository_that_the_package_only_lies_in(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout / "venv" / "mpp"
    (installed / "train").mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(installed / "training" / "provenance.py"))
    assert commit() == ""


def test_no_commit_without_git_or_where_git_hangs(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_GIT_SECONDS", 0)
    assert commit() == ""
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert commit() == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_on_a_gpu_and_its_driver(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    record_start(tmp_path, 0, device, {})
    (start,) = read_starts(tmp_path)
    assert torch.cuda.get_device_name(0) in start["hardware"]["devices"][0]
    assert "GiB" in start["hardware"]["devices"][0]
    assert start["versions"]["cuda"] == torch.version.cuda


@pytest.mark.slow
def test_a_pretraining_tells_of_each_start_but_not_of_dry_ones(source: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    few = {"train__length": "4 steps", "fewshot__data": ""}
    assert pretrain([*runs.command(source, run_dir, "--dry-run", **few)[1:]]) == 0
    assert not (run_dir / "environment.json").exists()
    assert pretrain(runs.command(source, run_dir, **few)[1:]) == 0
    few["train__length"] = "6 steps"
    assert pretrain(runs.command(source, run_dir, "--resume", "force", **few)[1:]) == 0
    first, second = read_starts(run_dir)
    assert (first["step"], second["step"]) == (0, 4)
    assert first["data"] == {"source": "40 images in 4 classes", "images": 40, "classes": 4}
    assert first["targets"].startswith("targets: ")
    assert "targets" not in second
    assert (first["precision"], first["seed"]) == ("fp32", 0)
    assert pretrain(runs.command(source, run_dir, "--resume", "force", **few)[1:]) == 0  # finished: no start
    assert len(read_starts(run_dir)) == 2


@pytest.mark.slow
def test_a_fine_tuning_tells_of_its_start_but_not_of_those_of_its_sweep(source: str, tmp_path: Path) -> None:
    words = runs.finetune_command(source, tmp_path, train__length="4 steps", optim__lr="0.05,0.1")
    assert finetune(words[1:]) == 0
    (start,) = read_starts(tmp_path)
    assert start["data"]["images"] == 32
    assert start["data"]["test_images"] == 8
    assert not list((tmp_path / "sweep").rglob("environment.json"))
