"""What a run writes down of where it comes from, each time it starts."""

import json
import shlex
import shutil
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


def test_each_start_adds_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "shards:https://user:pass@host/{0..3}.tar?signature=abc"
    monkeypatch.setattr(sys, "argv", ["tools/pretrain.py", "--data", address, "--train.length", "60 steps"])
    record_start(tmp_path, 0, CPU, {"seed": 3, "data": {"images": 40}})
    gather = dist.gather
    monkeypatch.setattr(dist, "gather", lambda value: [*gather(value), "another"])
    record_start(tmp_path, 25, CPU, {"seed": 3})
    monkeypatch.setattr(dist, "rank_and_size", lambda: (1, 2))
    record_start(tmp_path, 30, CPU, {})  # only rank 0 writes
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert (first["step"], second["step"]) == (0, 25)
    assert (first["seed"], first["data"]) == (3, {"images": 40})
    assert first["versions"]["torch"] == torch.__version__
    assert first["versions"]["timm"] == timm.__version__
    for start, hosts, devices in ((first, 1, ["cpu"]), (second, 2, ["cpu", "another"])):
        assert (start["hardware"]["hosts"], start["hardware"]["devices"]) == (hosts, devices)
    assert first["hardware"]["memory_gib"] > 0.1
    assert first["time"].endswith("+00:00")
    words = shlex.split(first["command"])  # it can be given again, but keeps no passwords
    assert words == ["tools/pretrain.py", "--data", "shards:https://host/{0..3}.tar", "--train.length", "60 steps"]
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


@pytest.mark.parametrize("damaged", ["", "[{", '{"step": 0}', "[1, 2]"])
def test_a_damaged_record_counts_as_none(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(damaged)
    assert read_starts(tmp_path) == []
    record_start(tmp_path, 5, CPU, {})
    assert [start["step"] for start in read_starts(tmp_path)] == [5]


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_commit_of_the_checkout_and_whether_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        return subprocess.check_output(["git", "-C", str(tmp_path), *identity, *words], text=True).strip()

    def make_package(folder: Path) -> None:
        (folder / "training").mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        monkeypatch.setattr(provenance, "__file__", str(folder / "training" / "provenance.py"))

    make_package(tmp_path / "mpp")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    monkeypatch.chdir("/")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    assert commit() == head
    (tmp_path / "mpp" / "__init__.py").write_text("changed = True\n")
    assert commit() == f"{head}-dirty"
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "_GIT_SECONDS", 0)  # git hangs
        assert commit() == ""
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert commit() == ""
    make_package(tmp_path / "venv" / "mpp")  # which only lies in a repository
    assert commit() == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_on_a_gpu_and_its_driver(tmp_path: Path) -> None:
    record_start(tmp_path, 0, torch.device("cuda", 0), {})
    (start,) = read_starts(tmp_path)
    (device,) = start["hardware"]["devices"]
    assert torch.cuda.get_device_name(0) in device
    assert "GiB" in device
    assert start["versions"]["cuda"] == torch.version.cuda


@pytest.mark.slow
def test_runs_tell_of_each_start_but_not_of_dry_ones_nor_of_those_of_a_sweep(source: str, tmp_path: Path) -> None:
    def start(length: str, *flags: str) -> int:
        few = {"train__length": length, "fewshot__data": ""}
        return pretrain(runs.command(source, tmp_path / "run", *flags, **few)[1:])

    assert start("4 steps", "--dry-run") == 0
    assert not (tmp_path / "run" / "environment.json").exists()
    assert start("4 steps") == start("6 steps", "--resume", "force") == 0
    assert start("6 steps", "--resume", "force") == 0  # finished: no start
    first, second = read_starts(tmp_path / "run")
    assert (first["step"], second["step"]) == (0, 4)
    assert first["data"] == {"source": "40 images in 4 classes", "images": 40, "classes": 4}
    assert first["targets"].startswith("targets: ")
    assert "targets" not in second
    assert (first["precision"], first["seed"]) == ("fp32", 0)
    words = runs.finetune_command(source, tmp_path / "tuned", train__length="4 steps", optim__lr="0.05,0.1")
    assert finetune(words[1:]) == 0
    (tuned,) = read_starts(tmp_path / "tuned")
    assert (tuned["data"]["images"], tuned["data"]["test_images"]) == (32, 8)
    assert not list((tmp_path / "tuned" / "sweep").rglob("environment.json"))
