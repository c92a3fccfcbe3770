"""Which attention kernel is taken: by name, by its time, by its memory, and by the run's earlier choice."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpp.errors import UserError
from mpp.model import attention, kernel_choice
from mpp.model.encoder import build_encoder
from mpp.model.kernel_choice import Task, choose_kernel, settle_kernel, task_of, time_kernels
from tests.model.encoders import TINY, tiny

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
TASK = Task(8, 17, 6, 64, 12, True, CPU, torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, without timings."""
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    """Seconds of the kernels, to be changed; under what was timed stands how often."""
    seconds: dict[Any, float] = {"sdpa": 2.0, "explicit": 1.0}

    def pretend(names: list[str], shape: tuple[int, ...], *_: object, training: bool) -> dict[str, float]:
        seconds[(*names, shape, training)] = seconds.get((*names, shape, training), 0) + 1
        return {name: seconds[name] for name in names}

    monkeypatch.setattr(kernel_choice, "time_kernels", pretend)
    return seconds


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends a GPU, as far as the choice of a kernel looks, with or without xformers."""

    def pretend(
        installed: bool = True, available: bool = True, capability: tuple[int, int] = (9, 0), trial: str | None = None
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
        monkeypatch.setattr(attention, "_try_xformers", lambda *_: trial)

    return pretend


@pytest.mark.parametrize(
    ("device", "dtype", "pretended", "reason"),
    [
        (CPU, torch.bfloat16, {}, "no attention kernel for the device 'cpu'"),
        (MPS, torch.bfloat16, {}, "no attention kernel for the device 'mps'"),
        (CUDA, torch.bfloat16, {"installed": False}, "pip install xformers"),
        (CUDA, torch.bfloat16, {"available": False}, "this torch sees no CUDA device"),
        (CUDA, torch.float32, {}, "in torch.float32 xformers only calls a kernel"),
        (CUDA, torch.float16, {"capability": (7, 5)}, "on this GPU xformers only calls a kernel"),
        (CUDA, torch.bfloat16, {"trial": "no kernel for heads of 12"}, "no kernel for heads of 12"),
    ],
)
def test_xformers_that_cannot_run_is_not_taken_and_by_name_says_why(
    device: torch.device, dtype: torch.dtype, pretended: dict[str, Any], reason: str, gpu: Callable[..., None]
) -> None:
    gpu(**pretended)
    task = replace(TASK, batch=0, device=device, dtype=dtype)
    assert [choose_kernel(name, task) for name in ("auto", "explicit")] == ["sdpa", "explicit"]
    with pytest.raises(UserError, match="use auto or sdpa") as caught:
        choose_kernel("xformers", task)
    assert reason in str(caught.value)


@pytest.mark.parametrize(("other", "faster"), [(2.0, False), (0.96, False), (0.94, True)])
@pytest.mark.parametrize(("device", "names"), [(CPU, ["sdpa", "explicit"]), (CUDA, ["xformers", "sdpa"])])
def test_auto_takes_another_kernel_if_it_is_clearly_faster_and_remembers_which(
    device: torch.device, names: list[str], other: float, faster: bool, times: dict[Any, float], gpu: Any
) -> None:
    gpu()
    times.update({names[0]: 1.0, names[1]: other})
    task = replace(TASK, device=device, dtype=torch.bfloat16)
    assert choose_kernel("auto", replace(task, batch=0)) == names[0]
    for again in (task, task, replace(task, training=False), replace(task, batch=9)):
        assert choose_kernel("auto", again) == names[faster]
    asked = [(*names, (8, 17, 6, 64), True), (*names, (8, 17, 6, 64), False), (*names, (9, 17, 6, 64), True)]
    assert {key: number for key, number in times.items() if isinstance(key, tuple)} == dict.fromkeys(asked, 1)


@pytest.mark.usefixtures("times")
def test_a_cache_that_is_damaged_or_cannot_be_written_is_none(cache: Path) -> None:
    cache.mkdir()
    for text in ("[]", "{", "null"):
        (cache / "attention.json").write_text(text, encoding="utf-8")
        assert choose_kernel("auto", TASK) == "explicit"
    (cache / "attention.json").unlink()
    cache.rmdir()
    cache.write_text("a file in its place", encoding="utf-8")
    assert choose_kernel("auto", TASK) == "explicit"


@pytest.mark.usefixtures("times")
def test_a_kernel_whose_weights_do_not_fit_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 64 * 6 * 17 * 17 * 4  # of a block in fp32: batch, heads, tokens, tokens

    def chosen(bytes_of_memory: int, **changed: Any) -> str:
        monkeypatch.setattr(kernel_choice, "memory", lambda: bytes_of_memory)
        return choose_kernel("auto", replace(TASK, **{"batch": 64, **changed}))

    most = 4 * 15 * weights  # 12 blocks of a quarter of the memory, and three at once in the one that computes
    assert (chosen(most), chosen(most - 4)) == ("explicit", "sdpa")
    assert settle_kernel("auto", "explicit cpu", replace(TASK, batch=64)) == "sdpa cpu"  # of a larger machine
    assert chosen(most - 4, training=False) == chosen(most - 4, dtype=torch.bfloat16) == "explicit"
    assert chosen(most - 4, tokens=18) == chosen(most - 4, blocks=24) == chosen(most - 4, batch=65) == "sdpa"
    of_evaluation = 4 * 3 * 2 * weights  # three at once, of 128 images
    assert (chosen(of_evaluation, batch=1), chosen(of_evaluation - 4, batch=1)) == ("explicit", "sdpa")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert (chosen(2 * most), chosen(2 * most - 4)) == ("explicit", "sdpa")


@pytest.mark.usefixtures("times")
def test_a_timing_takes_at_most_about_four_billion_operations_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    many = replace(TASK, batch=256, tokens=197)
    assert [many.sample, replace(many, training=False).sample] == [(22, 197, 6, 64), (67, 197, 6, 64)]
    assert replace(many, tokens=1025).sample == (1, 1025, 4, 64)
    assert replace(many, device=CUDA).sample == (256, 197, 6, 64)
    monkeypatch.setattr(kernel_choice, "memory", lambda: 2**40)
    assert [choose_kernel("auto", replace(many, tokens=tokens)) for tokens in (1025, 4097)] == ["explicit", "sdpa"]


def test_kernels_are_timed_by_medians_and_leave_the_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.9, 0.8, 0.7, 0.6, 0.01, 0.06, 0.03, 0.04, 0.05, 0.05])  # the first two rounds do not count
    monkeypatch.setattr(kernel_choice, "_seconds", lambda call, device: call() is not None and next(ticks))
    monkeypatch.setattr(kernel_choice, "_ROUNDS", 3)
    monkeypatch.setattr(kernel_choice, "_SECONDS", 10.0)
    state = torch.get_rng_state()
    with torch.no_grad():  # forward and backward all the same
        took = time_kernels(("sdpa", "explicit"), (2, 5, 3, 4), CPU, torch.float32)
    assert took == {"sdpa": 0.03, "explicit": 0.05}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "saved", "expected"),
    [
        ("auto", "", "explicit cpu"),
        ("auto", "sdpa cpu", "sdpa cpu"),
        ("auto", "xformers cpu", "explicit cpu"),  # which this device does not have
        ("auto", "nonsense", "explicit cpu"),
        ("auto", "sdpa cuda", "explicit cpu"),
        ("sdpa", "explicit cpu", "sdpa cpu"),
    ],
)
@pytest.mark.usefixtures("times")
def test_a_resumed_run_goes_on_with_its_kernel(name: Any, saved: str, expected: str) -> None:
    model, average = build_encoder(tiny(attention=name)), build_encoder(tiny(attention=name))
    task = task_of(model, 4, True, CPU, torch.bfloat16)
    assert task == Task(4, 17, 3, 16, 2, True, CPU, torch.bfloat16)
    assert settle_kernel(name, saved, task, model, average, None) == expected
    assert {block.attn.backend for of in (model, average) for block in of.vit.blocks} == {expected.split()[0]}


def test_the_task_of_other_models() -> None:
    assert task_of(nn.Linear(2, 2), 4, True, CPU, torch.float32) is None
    assert settle_kernel("auto", "", None, nn.Linear(2, 2)) == ""
    # Blocks that are computed again keep their weights one at a time.
    encoders = [build_encoder(config) for config in (TINY, tiny(grad_checkpointing=True))]
    tasks = [task_of(encoder, 4, True, CPU, torch.float32) for encoder in encoders]
    assert [task and task.blocks for task in tasks] == [2, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_times_the_kernels_on_the_device() -> None:
    task = Task(64, 197, 12, 64, 12, True, CUDA, torch.bfloat16)
    if attention.xformers_obstacle(CUDA, torch.bfloat16):
        assert choose_kernel("auto", task) == "sdpa"
    took = time_kernels(("sdpa", "explicit"), (64, 197, 12, 64), CUDA, torch.bfloat16)
    assert 0 < took["sdpa"] < took["explicit"]
    assert choose_kernel("auto", task) in ("sdpa", "xformers")
