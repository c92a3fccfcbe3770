"""The choices of device and precision, and what wraps a model."""

import shutil
import sysconfig
from collections.abc import Iterator
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
from mpp.training.parallel import autocast, choose_device, choose_precision, gradient_sync, prepare, refuse_shared

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Has no accelerator, until told."""
    have(monkeypatch, 0)
    return monkeypatch


def have(patch: pytest.MonkeyPatch, cuda: int) -> list[torch.device]:
    """Makes torch see so many CUDA devices; returns the devices that are made current."""
    current: list[torch.device] = []
    patch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    patch.setattr(torch.cuda, "device_count", lambda: cuda)
    patch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(
    ("name", "cuda", "local_rank", "expected"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 1, 0, "cuda:0"),
        ("auto", 4, 3, "cuda:3"),
        ("cuda", 4, 2, "cuda:2"),
        ("cuda:1", 4, 0, "cuda:1"),
        ("cpu", 4, 0, "cpu"),
    ],
)
def test_devices(name: str, cuda: int, local_rank: int, expected: str, machine: pytest.MonkeyPatch) -> None:
    current = have(machine, cuda)
    device = choose_device(name, World(local_rank, 4, local_rank, 4))
    assert str(device) == expected
    assert current == ([device] if device.type == "cuda" else [])


@pytest.mark.parametrize(
    ("name", "cuda", "local_rank", "reason"),
    [
        ("cuda", 0, 0, "train.device cuda: this machine has 0 CUDA devices"),
        ("cuda:1", 1, 0, "train.device cuda:1: this machine has 1 CUDA devices"),
        ("auto", 2, 2, "this machine has 2 CUDA devices"),
        ("mps", 0, 0, "train.device 'mps' is not supported"),
        ("gpu", 0, 0, "train.device 'gpu' is not a device"),
        ("meta", 0, 0, "train.device 'meta' is not supported"),
        ("", 0, 0, "train.device '' is not a device"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_a_way_out(
    name: str, cuda: int, local_rank: int, reason: str, machine: pytest.MonkeyPatch
) -> None:
    have(machine, cuda)
    with pytest.raises(UserError, match=r"take auto.* cpu") as caught:
        choose_device(name, World(local_rank, 4, local_rank, 4))
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_ranks_that_would_share_a_gpu_are_refused(name: str, machine: pytest.MonkeyPatch) -> None:
    """Two machines of two GPUs, and of two ranks each."""
    have(machine, 2)
    machine.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    chosen = [choose_device(name, World(rank, 4, rank % 2, 2)) for rank in range(4)]
    machine.setattr(
        dist, "gather", lambda own: [f"{own[:-1]}{rank // 2}{device.index}" for rank, device in enumerate(chosen)]
    )
    if name != "cuda:1":
        refuse_shared(chosen[0])
        refuse_shared(CPU)
        return
    with pytest.raises(ConfigError, match=r"train.device: ranks 0 and 1 would share the GPU GPU-01; take auto or cuda"):
        refuse_shared(chosen[0])


@pytest.mark.parametrize(
    ("name", "device", "hardware", "expected"),
    [
        ("auto", CUDA, True, "bf16"),
        ("auto", CUDA, False, "fp16"),
        ("auto", CPU, {"amx_bf16": True}, "bf16"),
        ("auto", CPU, {"avx512_bf16": True}, "bf16"),
        ("auto", CPU, {"avx2": True, "amx_bf16": False}, "fp32"),
        ("auto", CPU, {}, "fp32"),
        ("bf16", CPU, {}, "bf16"),
        ("fp32", CUDA, True, "fp32"),
        ("fp16", CUDA, True, "fp16"),
        ("bf16", CUDA, False, "bf16"),
    ],
)
def test_precisions(
    name: str, device: torch.device, hardware: object, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: hardware and not including_emulation
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: hardware, raising=False)
    assert choose_precision(name, device) == expected
    with pytest.raises(UserError, match="fp16 needs CUDA, not cpu; take bf16 or fp32"):
        choose_precision("fp16", CPU)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_in_the_precision_with_weights_in_fp32(precision: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 2)
    with autocast(precision, CPU):
        assert layer(torch.zeros(1, 2)).dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("mode", "device", "compiled"),
    [("on", CPU, True), ("off", CUDA, False), ("auto", CPU, False), ("auto", CUDA, True)],
)
def test_compilation(mode: str, device: torch.device, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: calls.append(self))
    monkeypatch.setattr(parallel, "compile_obstacle", lambda device: None)
    model = nn.Linear(2, 2)
    assert prepare(model, device, World(), mode) is model
    assert calls == [model] * compiled
    around = nn.Sequential(model)
    assert prepare(model, device, World(), mode, around=around) is around
    assert calls == [model, around] * compiled


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
    compilers: tuple[str, ...],
    named: str | None,
    headers: bool,
    compiles: bool,
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("CC", raising=False)
    if named:
        monkeypatch.setenv("CC", named)
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.setattr(torch, "compile", (lambda function: lambda x: x) if compiles else broken)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    calls: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: calls.append(self))
    parallel.compile_obstacle.cache_clear()
    parallel._warn_uncompiled.cache_clear()
    try:
        for _ in range(2):
            prepare(nn.Linear(2, 2), CUDA, World(), "auto")
        assert len(calls) == 2 * (said is None)
        lines = capsys.readouterr().err.splitlines()
        if said is None:
            assert lines == []
            return
        assert len(lines) == 1
        assert f"torch.compile does not work here, for {said.format(tmp_path)}" in lines[0]
        with pytest.raises(UserError, match=r"train.compile on: .*; or take auto or off"):
            prepare(nn.Linear(2, 2), CUDA, World(), "on")
    finally:
        parallel.compile_obstacle.cache_clear()
        parallel._warn_uncompiled.cache_clear()


@pytest.mark.usefixtures("group")
def test_a_world_of_many_averages_gradients_by_ddp() -> None:
    model = nn.Linear(2, 2)
    for around in (None, nn.Sequential(model)):
        wrapped = prepare(model, CPU, World(0, 2), "off", around=around)
        assert isinstance(wrapped, DistributedDataParallel)
        assert wrapped.module is (around or model)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("on", [True, False])
def test_gradients_are_averaged_with_the_last_micro_batch_alone(on: bool) -> None:
    wrapped = DistributedDataParallel(nn.Linear(2, 2))
    with gradient_sync(wrapped, on):
        assert wrapped.require_backward_grad_sync == on
    assert wrapped.require_backward_grad_sync
    assert isinstance(gradient_sync(nn.Linear(2, 2), on), nullcontext)  # one process has nothing to average


def test_torchruns_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert dist.world_from_environment() == World(5, 8, 1, 4)
    assert not dist.world_from_environment().main
