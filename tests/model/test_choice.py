"""Which attention kernel is taken: by name, by its time, by its memory, and by what a run has had before."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpp.errors import UserError
from mpp.model import attention, choice
from mpp.model.attention import KERNELS
from mpp.model.choice import Task, choose_kernel, settle_kernel, task_of, time_kernels
from mpp.model.encoder import build_encoder
from mpp.model.settings import ModelConfig

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
TASK = Task(8, 17, 6, 64, 12, True, CPU, torch.float32)
UNKNOWN = replace(TASK, batch=0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, in which no timing stands."""
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Kernels take the time that is written in `times`; what was asked for comes back."""
    asked: list[Any] = []

    def pretend(names: tuple[str, ...], shape: tuple[int, ...], *_: object, training: bool) -> dict[str, float]:
        asked.append((names, shape, training))
        return {name: TIMES[name] for name in names}

    monkeypatch.setattr(choice, "time_kernels", pretend)
    yield asked
    TIMES.clear()


TIMES: dict[str, float] = {}


@pytest.mark.parametrize(
    ("name", "device", "installed", "expected"),
    [
        ("auto", CPU, True, "sdpa"),
        ("auto", MPS, True, "sdpa"),
        ("auto", CUDA, True, "xformers"),
        ("auto", CUDA, False, "sdpa"),
        ("xformers", CUDA, True, "xformers"),
        ("sdpa", CPU, False, "sdpa"),
        ("sdpa", CUDA, True, "sdpa"),
        ("explicit", CUDA, True, "explicit"),
        ("explicit", CPU, True, "explicit"),
    ],
)
def test_the_kernel_that_a_name_means_where_no_batch_is_known(
    name: str, device: torch.device, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_gpu(monkeypatch, installed)
    monkeypatch.setattr(attention, "_try_xformers", lambda *_: None)
    assert choose_kernel(name, replace(UNKNOWN, device=device, dtype=torch.bfloat16)) == expected


def a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    installed: bool = True,
    available: bool = True,
    capability: tuple[int, int] = (9, 0),
) -> None:
    """A GPU as far as the choice of a kernel looks, with or without xformers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)


def test_xformers_that_fails_its_trial_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu(monkeypatch)
    monkeypatch.setattr(attention, "_try_xformers", lambda *_: "no kernel for heads of 12")
    task = replace(TASK, device=CUDA, dtype=torch.bfloat16)
    assert choose_kernel("auto", task) == "sdpa"
    with pytest.raises(UserError, match="no kernel for heads of 12; use auto or sdpa"):
        choose_kernel("xformers", task)


@pytest.mark.parametrize(
    ("dtype", "capability", "where"),
    [(torch.float32, (9, 0), "in torch.float32"), (torch.float16, (7, 5), "on this GPU")],
)
def test_xformers_is_not_taken_where_it_could_not_be_compiled(
    dtype: torch.dtype, capability: tuple[int, int], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_gpu(monkeypatch, capability=capability)
    monkeypatch.setattr(attention, "_try_xformers", lambda *_: None)
    task = replace(TASK, device=CUDA, dtype=dtype)
    assert choose_kernel("auto", task) == "sdpa"
    with pytest.raises(UserError, match=f"{where} xformers only calls a kernel .* does not compile; use auto or sdpa"):
        choose_kernel("xformers", task)


@pytest.mark.parametrize(
    ("device", "installed", "available", "reason"),
    [
        (CPU, True, True, "no attention kernel for the device 'cpu'"),
        (MPS, True, True, "no attention kernel for the device 'mps'"),
        (CUDA, False, True, "pip install xformers"),
        (CUDA, True, False, "this torch sees no CUDA device"),
    ],
)
def test_xformers_by_name_where_it_cannot_run_says_why_and_what_to_do(
    device: torch.device, installed: bool, available: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_gpu(monkeypatch, installed, available)
    with pytest.raises(UserError, match="use auto or sdpa") as caught:
        choose_kernel("xformers", replace(TASK, device=device))
    assert reason in str(caught.value)


@pytest.mark.parametrize(("other", "faster"), [(2.0, False), (1.0, False), (0.96, False), (0.94, True)])
@pytest.mark.parametrize(("device", "names"), [(CPU, ("sdpa", "explicit")), (CUDA, ("xformers", "sdpa"))])
def test_auto_takes_another_kernel_where_it_is_clearly_faster(
    device: torch.device,
    names: tuple[str, str],
    other: float,
    faster: bool,
    timed: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device is CUDA:
        monkeypatch.setattr(choice, "xformers_obstacle", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    TIMES.update({names[0]: 1.0, names[1]: other})
    task = replace(TASK, device=device)
    assert [choose_kernel("auto", task) for _ in range(2)] == [names[faster]] * 2
    assert timed == [(names, (8, 17, 6, 64), True)]  # once
    TIMES.update({names[0]: other, names[1]: 1.0})  # which a second timing would see, of other shapes or types only
    choose_kernel("auto", task)
    choose_kernel("auto", replace(task, training=False))
    choose_kernel("auto", replace(task, dtype=torch.bfloat16))
    choose_kernel("auto", replace(task, batch=9))
    assert len(timed) == 4


def test_a_cache_that_is_damaged_or_cannot_be_written_only_costs_the_timing(cache: Path, timed: list[Any]) -> None:
    TIMES.update({"sdpa": 2.0, "explicit": 1.0})
    cache.mkdir()
    for text in ("[]", "{", "null"):
        (cache / "attention.json").write_text(text, encoding="utf-8")
        assert choose_kernel("auto", TASK) == "explicit"
    (cache / "attention.json").unlink()
    cache.rmdir()
    cache.write_text("a file in its place", encoding="utf-8")
    assert choose_kernel("auto", TASK) == "explicit"
    assert len(timed) == 4


def test_a_kernel_whose_weights_do_not_fit_is_not_taken(timed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    TIMES.update({"sdpa": 2.0, "explicit": 1.0})
    weights = 64 * 6 * 17 * 17 * 4  # of a block in fp32: batch, heads, tokens, tokens

    def chosen(bytes_of_memory: int, **changed: Any) -> str:
        monkeypatch.setattr(choice, "memory", lambda: bytes_of_memory)
        return choose_kernel("auto", replace(TASK, **{"batch": 64, **changed}))

    most = 4 * 15 * weights  # 12 blocks of a quarter of the memory, and three at once in the one that computes
    assert (chosen(most), chosen(most - 4)) == ("explicit", "sdpa")
    assert chosen(most - 4, training=False) == chosen(most - 4, dtype=torch.bfloat16) == "explicit"
    assert chosen(most - 4, tokens=18) == chosen(most - 4, blocks=24) == chosen(most - 4, batch=65) == "sdpa"
    of_evaluation = 4 * 3 * 2 * weights  # three at once, of 128 images
    assert (chosen(of_evaluation, batch=1), chosen(of_evaluation - 4, batch=1)) == ("explicit", "sdpa")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (chosen(2 * most), chosen(2 * most - 4)) == ("explicit", "sdpa")


@pytest.mark.parametrize(
    ("task", "sample"),
    [
        (TASK, (8, 17, 6, 64)),
        (replace(TASK, batch=4096), (3003, 17, 6, 64)),
        (replace(TASK, batch=16, tokens=197), (16, 197, 6, 64)),
        (replace(TASK, batch=256, tokens=197), (22, 197, 6, 64)),
        (replace(TASK, batch=256, tokens=197, training=False), (67, 197, 6, 64)),
        (replace(TASK, tokens=1025), (1, 1025, 4, 64)),
        (replace(TASK, tokens=4097), None),
    ],
)
def test_what_is_timed_takes_at_most_about_four_billion_operations(
    task: Task, sample: tuple[int, int, int, int] | None, timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "memory", lambda: 2**40)
    assert task.sample == sample
    TIMES.update({"sdpa": 2.0, "explicit": 1.0})
    assert choose_kernel("auto", task) == ("sdpa" if sample is None else "explicit")


def test_kernels_are_timed_in_turns_forward_and_backward_and_by_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def kernel(name: str) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
            assert (q.shape, dropout) == ((2, 3, 5, 4), 0.0)
            done.append(name)
            out = q * k * v
            if torch.is_grad_enabled():
                out.register_hook(lambda _: done.append(f"{name} back"))
            return out

        return run

    for name in ("a", "b"):
        monkeypatch.setitem(KERNELS, name, kernel(name))
    ticks = iter([0.9, 0.8, 0.7, 0.6, 0.01, 0.06, 0.03, 0.04, 0.05, 0.05, 1.0, 1.0, 1.0, 1.0, 0.1, 0.2])

    def clock(work: Callable[[], object], device: torch.device) -> float:
        assert device == CPU
        work()
        return next(ticks)

    monkeypatch.setattr(choice, "_SECONDS", 10.0)
    state = torch.get_rng_state()
    with torch.no_grad():
        took = time_kernels(("a", "b"), (2, 5, 3, 4), CPU, torch.float32, clock, rounds=3)  # two do not count
        assert took == {"a": 0.03, "b": 0.05}
        assert done == ["a", "a back", "b", "b back"] * 5
        done.clear()
        monkeypatch.setattr(choice, "_SECONDS", 1.0)  # is over after the first round
        took = time_kernels(("a", "b"), (2, 5, 3, 4), CPU, torch.float32, clock, training=False)
    assert took == {"a": 0.1, "b": 0.2}
    assert done == ["a", "b"] * 3
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "saved", "expected"),
    [
        ("auto", "", "explicit cpu"),
        ("auto", "sdpa cpu", "sdpa cpu"),
        ("auto", "explicit cpu", "explicit cpu"),
        ("auto", "xformers cpu", "explicit cpu"),  # which this device does not have
        ("auto", "nonsense", "explicit cpu"),
        ("auto", "sdpa cuda", "explicit cpu"),
        ("sdpa", "explicit cpu", "sdpa cpu"),
        ("explicit", "", "explicit cpu"),
    ],
)
def test_a_resumed_run_goes_on_with_its_kernel(name: Any, saved: str, expected: str, timed: list[Any]) -> None:
    TIMES.update({"sdpa": 2.0, "explicit": 1.0})
    config = ModelConfig("vit_tiny_patch16_224", img_size=(32,), patch_size=(8,), depth=2, attention=name)
    model, average = build_encoder(config), build_encoder(config)
    task = task_of(model, 4, True, CPU, torch.bfloat16)
    assert task == Task(4, 17, 3, 64, 2, True, CPU, torch.bfloat16)
    assert settle_kernel(name, saved, task, model, average, None) == expected
    assert {block.attn.backend for of in (model, average) for block in of.vit.blocks} == {expected.split()[0]}
    assert bool(timed) == ((name == "auto" and saved.split()[-1:] != ["cpu"]) or saved == "xformers cpu")


def test_a_model_without_our_attention_has_no_task() -> None:
    assert task_of(nn.Linear(2, 2), 4, True, CPU, torch.float32) is None
    assert settle_kernel("auto", "", None, nn.Linear(2, 2)) == ""


def test_blocks_that_are_computed_again_keep_their_weights_one_at_a_time() -> None:
    config = ModelConfig("vit_tiny_patch16_224", img_size=(32,), patch_size=(8,), depth=2, grad_checkpointing=True)
    task = task_of(build_encoder(config), 4, True, CPU, torch.float32)
    assert task is not None
    assert task.blocks == 1


def test_on_cuda_the_run_s_own_batch_is_timed() -> None:
    assert replace(TASK, batch=256, tokens=4097, device=CUDA).sample == (256, 4097, 6, 64)


def test_a_resumed_run_does_not_go_on_with_what_no_longer_fits(timed: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(choice, "memory", lambda: 0)
    assert settle_kernel("auto", "explicit cpu", TASK) == "sdpa cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_times_the_kernels_on_the_device() -> None:
    task = Task(64, 197, 12, 64, 12, True, CUDA, torch.bfloat16)
    if attention.xformers_obstacle(CUDA, torch.bfloat16):
        assert choose_kernel("auto", task) == "sdpa"
    took = time_kernels(("sdpa", "explicit"), (64, 197, 12, 64), CUDA, torch.bfloat16)
    assert 0 < took["sdpa"] < took["explicit"]
    assert choose_kernel("auto", task) in ("sdpa", "xformers")
