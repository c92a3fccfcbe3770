"""Starts the real commands on tiny problems, and reads what they left behind."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpp import cli
from mpp.config import parse
from mpp.pretraining.settings import PretrainConfig
from mpp.training import parallel
from mpp.training.checkpoint import Checkpoints, load_checkpoint
from mpp.training.rows import read_rows
from tests.forked import Forked

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "pretrain.py"

TINY = {
    "model.name": "vit_tiny_patch16_224",
    "model.img_size": "32",
    "model.patch_size": "8",
    "model.embed_dim": "48",
    "model.num_heads": "3",
    "model.depth": "2",
    "model.drop_path": "0.1",
    "train.length": "60 steps",
    "train.batch_size": "16",
    "train.micro_batch": "8",
    "train.device": "cpu",
    "train.precision": "fp32",  # which of the two auto takes is up to the CPU
    "optim.lr": "1e-3",
    "optim.weight_decay": "0.05",
    "optim.ema_decay": "0.9",
    "data.workers": "0",
    "checkpoint.every": "7 steps",
    "checkpoint.keep_last": "3",
    "log.every": "5 steps",
    "log.pictures": "",
    "log.report": "false",
    "fewshot.every": "25 steps",
    "fewshot.shots": "1",
    "fewshot.seeds": "0",
}

FINETUNE = {name: value for name, value in TINY.items() if name.startswith(("model.", "train.", "data."))} | {
    "train.length": "40 steps",
    "optim.lr": "0.05",
    "optim.ema_decay": "0.8",
    "checkpoint.every": "5 steps",
    "checkpoint.keep_last": "3",
    "log.every": "5 steps",
    "log.report": "false",
}


def slow(*values: Any) -> Any:
    """A case of a test's table that only the slow tests take."""
    return pytest.param(*values, marks=pytest.mark.slow)


def write_images(folder: Path, number: int = 40, noise: float = 40, seed: int = 0) -> str:
    """A labelled source of small images: smooth blobs whose colour tells the class, less so with more noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % 4
    hue = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])[labels]
    small = hue[:, None, None] + rng.normal(0, noise, (number, 5, 5, 3))
    images = np.repeat(np.repeat(small, 8, 1), 8, 2).clip(0, 255).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "images.npz", images=images, labels=labels)
    return f"array:{folder / 'images.npz'}"


def write_folder(folder: Path, *names: str) -> str:
    """Small pictures of these names in a folder, each of a colour of its own; its source."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = zlib.crc32(f"{folder.name}/{name}".encode())
        Image.new("RGB", (2, 2), tuple(colour.to_bytes(4)[:3])).save(path)
    return f"folder:{folder}"


def command(source: str, run_dir: Path | None, *flags: str, **changed: str) -> list[str]:
    """The command line of a tiny run; `changed` are settings with `__` for the dot. With `init`, not of a new model."""
    return _words(TOOL, TINY | {"data.source": source, "fewshot.data": source}, run_dir, flags, changed)


def pretrain_config(source: str, **changed: str) -> PretrainConfig:
    """The config of `command` without a folder."""
    return parse(PretrainConfig, command(source, None, **changed)[1:], "pretrain", "", {})


def finetune_command(source: str, run_dir: Path, *flags: str, init: str = "none", **changed: str) -> list[str]:
    """As `command`, for fine-tuning: from scratch, or from `init` without the settings of a new model."""
    return _words(
        ROOT / "tools" / "finetune.py", FINETUNE | {"data.source": source}, run_dir, flags, {"init": init, **changed}
    )


def _words(
    tool: Path, settings: dict[str, str], run_dir: Path | None, flags: tuple[str, ...], changed: dict[str, str]
) -> list[str]:
    if changed.get("init", "none") != "none":  # the weights have the architecture
        settings = {k: v for k, v in settings.items() if not k.startswith("model.") or k == "model.drop_path"}
    settings |= {name.replace("__", "."): value for name, value in changed.items()}
    if run_dir is not None:
        settings["run_dir"] = str(run_dir)
    words = [word for name, value in settings.items() for word in (f"--{name}", *(value.split(",") if value else [""]))]
    quiet = [] if "log.to" in settings else ["--log.to"]  # TensorBoard alone takes a second to import
    return [str(tool), *words, *quiet, *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning:mpp"}


def start(words: list[str], **options: Any) -> "subprocess.Popen[str]":
    """Starts the command without waiting for it; `env` adds to the environment.

    A script without an environment of its own is forked from a warm process, which saves the time of its imports.
    """
    if words[0].endswith(".py") and options.keys() <= {"cwd", "start_new_session"}:
        process: Any = Forked(words, environment(), **options)
        return process
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment() | options.pop("env", {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def torchrun(words: list[str], ranks: int = 2, warm: bool = False) -> "subprocess.Popen[str]":
    """Starts the command on so many processes, which are torchrun's children unless they are forks of a warm one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port)]
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process: Any = Forked([*launcher, *words], environment() | env) if warm else start([*launcher, *words], env=env)
    return process


def children(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that it started: workers, or ranks."""
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to the main process alone: its workers must notice by themselves."""
    started = children(process) if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for_end(started)


def wait_for_end(processes: Iterable[int]) -> None:
    """Waits until these have ended: a minute at most."""
    deadline = time.monotonic() + 60
    for process in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.monotonic() < deadline, "processes outlive their parent"
                time.sleep(0.05)


def finish(words: list[str], code: int = 0, ranks: int = 1, **options: Any) -> tuple[str, str]:
    """Runs the command to its end, which must have the exit status `code`; standard output and error."""
    process = start(words, **options) if ranks == 1 else torchrun(words, ranks, warm=True)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, f"exit status {process.returncode}, not {code}\n{out}\n{err[-3000:]}"
    return out, err


def call(words: list[str], code: int = 0) -> tuple[str, str]:
    """As `finish`, in this process: nothing is imported again, which takes most of the time of a short run."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        found = getattr(cli, Path(words[0]).stem)(words[1:])
    assert found == code, f"exit code {found}, not {code}\n{out.getvalue()}\n{err.getvalue()[-3000:]}"
    return out.getvalue(), err.getvalue()


def compile_obstacle() -> str | None:
    """Why torch.compile does not work on the first GPU; what it warns of in its trial is no error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parallel.compile_obstacle(torch.device("cuda", 0))


def wait_for_checkpoint(process: "subprocess.Popen[str]", run_dir: Path, step: int = 0) -> None:
    """Waits until the run has a checkpoint of `step` or later."""
    checkpoints = Checkpoints(run_dir / "checkpoints")
    while process.poll() is None and not any(s >= step for s in checkpoints.steps()):
        time.sleep(0.005)


def final_state(run_dir: Path) -> dict[str, Any]:
    """The state in the newest checkpoint."""
    latest = Checkpoints(run_dir / "checkpoints").latest()
    assert latest is not None
    return load_checkpoint(latest)


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of the run without times."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def assert_same(first: Any, second: Any, where: str = "state") -> None:
    """Asserts that two nested states are equal to the bit."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for name in first:
            assert_same(first[name], second[name], f"{where}.{name}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, where
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def assert_same_run(first: Path, second: Path) -> None:
    """Asserts that two runs ended with the same weights, optimiser, averages, rows and exported model."""
    assert_same(final_state(first), final_state(second))
    assert figures(first) == figures(second)
    model = Path("model", "model.safetensors")
    assert (first / model).read_bytes() == (second / model).read_bytes()
