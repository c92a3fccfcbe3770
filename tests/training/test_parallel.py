"""The choices of device and precision, and what wraps a model."""

import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.parallel import DistributedDataParallel

from mpp import dist
from mpp.dist import World
from mpp.errors import ConfigError, UserError
from mpp.training import parallel
from mpp.training.parallel import choose_device, choose_precision, gradient_sync, prepare, refuse_shared

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[torch.device]]:
    """Makes torch see so many CUDA devices; returns the devices that are made current."""

    def have(cuda: int) -> list[torch.device]:
        current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return have


Machine = Callable[[int], list[torch.device]]


@pytest.mark.parametrize(
    ("name", "cuda", "local_rank", "expected"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 1, 0, "cuda:0"),
        ("auto", 4, 3, "cuda:3"),
        ("cuda", 4, 2, "cuda:2"),
        ("cuda:1", 4, 0, "cuda:1"),
        ("cpu", 4, 0, "cpu"),
        ("cuda", 0, 0, "train.device cuda: this machine has 0 CUDA devices"),
        ("cuda:1", 1, 0, "train.device cuda:1: this machine has 1 CUDA devices"),
        ("auto", 2, 2, "this machine has 2 CUDA devices"),
        ("mps", 0, 0, "train.device 'mps' is not supported"),
        ("", 0, 0, "train.device '' is not a device"),
    ],
)
def test_devices_and_those_that_are_not_there(
    name: str, cuda: int, local_rank: int, expected: str, machine: Machine
) -> None:
    current, world = machine(cuda), World(local_rank, 4, local_rank, 4)
    if " " in expected:
        with pytest.raises(UserError, match=rf"{expected}.* take auto.* cpu"):
            choose_device(name, world)
        return
    device = choose_device(name, world)
    assert str(device) == expected
    assert current == ([device] if device.type == "cuda" else [])


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_ranks_that_would_share_a_gpu_are_refused(name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of two GPUs, and of two ranks each."""
    machine(2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    chosen = [choose_device(name, World(rank, 4, rank % 2, 2)) for rank in range(4)]
    uuids = [f"{rank // 2}{device.index}" for rank, device in enumerate(chosen)]
    monkeypatch.setattr(dist, "gather", lambda own: [own and f"{own[:-1]}{uuid}" for uuid in uuids])
    text = r"train.device: ranks 0 and 1 would share the GPU GPU-01; take auto or cuda"
    with pytest.raises(ConfigError, match=text) if name == "cuda:1" else nullcontext():
        refuse_shared(chosen[0])
    refuse_shared(CPU)


@pytest.mark.parametrize(
    ("name", "device", "hardware", "expected"),
    [
        ("auto", CUDA, True, "bf16"),
        ("auto", CUDA, False, "fp16"),
        ("auto", CPU, {"amx_bf16": True}, "bf16"),
        ("auto", CPU, {"avx512_bf16": True}, "bf16"),
        ("auto", CPU, {"avx2": True, "amx_bf16": False}, "fp32"),
        ("bf16", CPU, {}, "bf16"),
        ("fp32", CUDA, True, "fp32"),
        ("fp16", CUDA, True, "fp16"),
        ("bf16", CUDA, False, "bf16"),
    ],
)
def test_precisions(
    name: str, device: torch.device, hardware: object, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = lambda including_emulation: hardware and not including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: hardware, raising=False)
    assert choose_precision(name, device) == expected
    with pytest.raises(UserError, match="fp16 needs CUDA, not cpu; take bf16 or fp32"):
        choose_precision("fp16", CPU)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The modules that are compiled."""
    calls: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: calls.append(self))
    for cached in (parallel.compile_obstacle, parallel._warn_uncompiled):
        cached.cache_clear()
    yield calls
    monkeypatch.undo()
    for cached in (parallel.compile_obstacle, parallel._warn_uncompiled):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("mode", "device", "does"), [("on", CPU, 1), ("off", CUDA, 0), ("auto", CPU, 0), ("auto", CUDA, 1)]
)
def test_compilation(
    mode: str, device: torch.device, does: int, compiled: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "compile_obstacle", lambda device: None)
    model = nn.Linear(2, 2)
    around = nn.Sequential(model)
    assert prepare(model, device, World(), mode) is model
    assert prepare(model, device, World(), mode, around=around) is around
    assert compiled == [model, around] * does


def broken(function: Any) -> Any:
    raise BackendCompilerFailed("inductor", OSError("Read-only file system: '/root/.triton'\nand more"), None)


@pytest.mark.parametrize(
    ("compilers", "named", "headers", "compiles", "said"),
    [
        ((), None, True, True, "there is no C compiler: install one, such as gcc"),
        (("gcc",), "icc", True, True, "there is no C compiler icc, which CC names: install one, such as gcc"),
        (("gcc",), None, False, True, "there is no Python.h in {}: install Python's headers"),
        (("clang",), None, True, False, "a first trial failed (Read-only file system: '/root/.triton'): see what"),
        (("gcc",), None, True, True, None),
    ],
)
def test_where_triton_cannot_build_auto_goes_without(
    compilers: tuple[str, ...], named: str | None, headers: bool, compiles: bool, said: str | None,
    compiled: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("CC", named or "")
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.setattr(torch, "compile", (lambda function: lambda x: x) if compiles else broken)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    for _ in range(2):
        prepare(nn.Linear(2, 2), CUDA, World(), "auto")
    assert len(compiled) == 2 * (said is None)
    err = capsys.readouterr().err
    if said is None:
        assert not err
        return
    assert err.count("\n") == 1
    assert f"torch.compile does not work here, for {said.format(tmp_path)}" in err
    with pytest.raises(UserError, match=r"train.compile on: .*; or take auto or off"):
        prepare(nn.Linear(2, 2), CUDA, World(), "on")


@pytest.mark.usefixtures("group")
def test_a_world_of_many_averages_gradients_by_ddp_with_the_last_micro_batch_alone() -> None:
    model = nn.Linear(2, 2)
    for around in (None, nn.Sequential(model)):
        wrapped = prepare(model, CPU, World(0, 2), "off", around=around)
        assert isinstance(wrapped, DistributedDataParallel)
        assert wrapped.module is (around or model)
        for on in (True, False):
            with gradient_sync(wrapped, on):
                assert wrapped.require_backward_grad_sync == on
    assert isinstance(gradient_sync(model, on=False), nullcontext)  # one process has nothing to average


def test_torchruns_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert dist.world_from_environment() == World(5, 8, 1, 4)
    assert not dist.world_from_environment().main
