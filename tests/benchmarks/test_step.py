"""The measurement of the training step: it times what it says, and its arithmetic holds."""

import functools
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks import peers
from benchmarks import step as bench
from benchmarks.settings import StepBench
from benchmarks.step import OURS, SUPERVISED, StepRow
from benchmarks.step_parts import PARTS, peak_bytes, time_by_part
from benchmarks.step_sides import (
    Setting,
    Side,
    data_wait,
    flops_per_image,
    matrix_product,
    ours,
    plain_side,
    plain_step,
    supervised,
)
from torch import Tensor, nn

import mpp.pretraining.step
from mpp.errors import RunError
from mpp.model.settings import ModelConfig
from mpp.training.timing import timed
from tests import runs
from tests.benchmarks.tiny import CPU, SETTING, TINY

BENCH = StepBench((TINY.name,), (32,), (8,), batch=2, repeats=2, precision="fp32", device="cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step a sample, a small matrix product, a small model."""
    monkeypatch.setattr(bench, "ModelConfig", functools.partial(ModelConfig, embed_dim=48, depth=2, num_heads=3))
    monkeypatch.setattr(bench, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(bench, "matrix_product", lambda device, dtype: matrix_product(device, dtype, 1e-3))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_all_sides_are_measured_and_printed(monkeypatch: pytest.MonkeyPatch, capsys, source: str) -> None:
    def absent(setting: Setting) -> Side:
        raise peers.Missing("not here: pip install it")

    monkeypatch.setattr(bench, "PEERS", {"stand-in": supervised, "absent": absent})
    rows: list[StepRow] = []
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda config: rows.extend(measure(config)) or rows)
    assert bench.step(replace(BENCH, data=source)) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert [row.side for row in rows] == [OURS, SUPERVISED, "stand-in", "absent"]
    first, second, third, missing = rows
    assert missing == StepRow(TINY.name, "absent", left_out="not here: pip install it")
    assert "absent                         left out: not here: pip install it" in printed
    for row in rows[:3]:
        assert re.search(rf"^{re.escape(row.side)} +\S+ \(\S+ to \S+\) +\S+ x \(\S+ to \S+\) .* \d+$", printed, re.M)
        expected = [a / b for a, b in zip(first.images_per_second, row.images_per_second, strict=True)]
        assert row.faster == pytest.approx(expected)
        assert row.step_bytes > 0
    shares = [a * first.flops / b for a, b in zip(first.images_per_second, first.ceiling, strict=True)]
    assert first.shares == pytest.approx(shares)
    assert third.shares == []
    # Weights and two moments of each, and a count for each weight: the head of 1000 classes, no [mask] embedding.
    assert second.state_bytes - first.state_bytes == pytest.approx(3 * 4 * (1000 * 49 - 512 * 49 - 48), abs=64)
    assert [name for name, _ in first.parts] == list(PARTS)
    assert first.waited is not None
    assert 0 <= first.waited <= 1


@pytest.mark.slow
def test_ours_is_the_product_s_own_step_and_knows_how_long_it_waits(source: str) -> None:
    side = ours(SETTING)
    assert side.pretraining is not None
    side.run()
    state = side.pretraining.state
    assert state.images_seen == 2
    assert {"loss", "accuracy_baseline_neighbours", "grad_norm"} <= state.meter.read().keys()
    assert 0 <= data_wait(side.pretraining, source) <= 1
    assert state.images_seen == 2 + 2 * 8
    for data, why in (("", "name images by --data"), ("folder:/nowhere/at/all", "folder:/nowhere/at/all: ")):
        row = bench._with_parts(StepRow(TINY.name, OURS), side, data)
        assert row.waited is None
        assert row.note.startswith(f"not measured: {why}")


def test_the_plain_step_is_the_usual_one() -> None:
    torch.manual_seed(0)
    model, other, x = nn.Linear(5, 3), nn.Linear(5, 3), torch.randn(4, 5)
    other.load_state_dict(model.state_dict())
    run = plain_step(lambda: model(x).square().sum(), SETTING, model, torch.optim.SGD(model.parameters(), lr=0.5), 0.1)
    for _ in range(2):
        run()
        other.zero_grad()
        other(x).square().sum().backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        with torch.no_grad():
            for parameter in other.parameters():
                assert parameter.grad is not None
                parameter -= 0.5 * parameter.grad
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def test_flops_by_hand() -> None:
    mine, plain = flops_per_image(TINY)
    dim, tokens, patches, k = 48, 17, 16, 8
    embedding = 2 * 2 * patches * 8 * 8 * 3 * dim  # no gradient of the pixels
    token, pairs = 3 * 2 * 12 * dim**2, 3 * 2 * 2 * dim
    assert plain == embedding + 2 * (tokens * token + tokens**2 * pairs) + 3 * 2 * dim * 1000
    # The last block has keys and values of all tokens, and everything else of the k corrupted ones.
    last = 3 * 2 * dim**2 * (2 * tokens + 10 * k) + k * tokens * pairs
    assert mine == embedding + tokens * token + tokens**2 * pairs + last + 3 * 2 * k * dim * 512


@pytest.mark.slow
def test_the_parts_are_of_the_right_functions_and_sum_to_the_step() -> None:
    """A nap in the forward and in the backward pass of the head, and one outside of all parts."""

    class Nap(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            time.sleep(0.1)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grad: Tensor) -> Tensor:
            time.sleep(0.2)
            return grad[0]

    class Sleepy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return Nap.apply(super().forward(input))

    side = ours(SETTING)
    assert side.pretraining is not None
    model = side.pretraining.model
    model.head.__class__ = Sleepy
    draw, attention = mpp.pretraining.step.draw, model.encoder.vit.blocks[0].attn
    seconds: list[float] = []
    parts = time_by_part(lambda: seconds.append(timed(lambda: (side.run(), time.sleep(0.15)))[1]), model, CPU)
    assert mpp.pretraining.step.draw is draw  # marked no longer
    assert "forward" not in vars(attention)
    assert tuple(parts) == PARTS
    assert all(value > 0 for value in parts.values())
    assert 0.3 <= parts["head and loss"] < 0.4
    assert parts["rest"] >= 0.15
    assert sum(parts.values()) == pytest.approx(seconds[-1], rel=0.02)


def test_peak_memory_by_hand() -> None:
    layer, x = nn.Linear(1000, 1000), torch.randn(500, 1000)

    def run() -> None:
        hidden = layer(x)
        positive = hidden.relu()
        double = positive * 2
        double.sum().backward()
        layer.zero_grad(set_to_none=True)

    # While the weight's gradient is made: the three, and the gradient of the first; 2 MB each.
    assert peak_bytes(run, CPU) == pytest.approx(4 * 2_000_000 + 4_000_000, abs=20_000)


def test_what_does_not_fit_is_halved() -> None:
    def make(most: int) -> Callable[[Setting], Side]:
        def side(setting: Setting) -> Side:
            def loss() -> Tensor:
                if setting.batch > most:
                    raise torch.OutOfMemoryError
                return model(torch.ones(1, 1)).sum()

            model = nn.Linear(1, 1)
            return plain_side(setting, model, loss)

        return side

    assert bench._fitting(make(2), replace(SETTING, batch=4)).setting.batch == 2
    with pytest.raises(RunError, match="out of memory on cpu with a single image of vit_tiny_patch16_224"):
        bench._fitting(make(0), replace(SETTING, batch=4))


def test_how_a_side_was_measured_is_printed_where_it_differs(capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"images_per_second": (1.0, 1.0), "faster": (1.0, 1.0)}
    mine = StepRow(TINY.name, OURS, batch=4, asked=8, precision="bf16", compiled=True, ceiling=(1.0, 1.0), **rates)
    bench._print([mine, StepRow(TINY.name, "other", batch=8, asked=8, precision="fp32", **rates)], 2)
    printed = capsys.readouterr().out
    assert f"{TINY.name}, batch 4, as 8 does not fit, bf16, compiled; median" in printed
    assert "  (fp32, not compiled, batch 8)\n" in printed
    assert "Our step by part: not measured, an uncompiled step of this batch does not fit" in printed


@pytest.mark.usefixtures("quick")
def test_sides_that_do_not_fit_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "in_turns", rounds)
    with pytest.raises(RunError, match="all sides of vit_tiny_patch16_224: a smaller --batch, or --peers off"):
        bench.measure(replace(BENCH, peers="off"))


MEASURED = """
import json
from dataclasses import asdict, replace
from benchmarks.step import measure
from tests.benchmarks.test_step import BENCH

config = replace(BENCH, device="cuda", precision="auto", batch=8, compile="{}", data="")
print(json.dumps([asdict(row) for row in measure(config)]))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_on_a_gpu(compiled: Any) -> None:
    if compiled == "on" and (obstacle := runs.compile_obstacle()):
        pytest.skip(obstacle)
    # In a process of its own: the type checks of these tests cannot be compiled.
    environment = {"PYTHONPATH": f"{runs.ROOT}:{runs.ROOT / 'tools'}"}
    out, _ = runs.finish(["-c", MEASURED.format(compiled)], cwd=runs.ROOT, env=environment)
    rows = [StepRow(**row) for row in json.loads(out.splitlines()[-1])]
    assert all(row.left_out or min(row.images_per_second) > 0 for row in rows)
    mine = rows[0]
    assert mine.compiled == (compiled == "on")
    assert all(seconds > 0 for name, seconds in mine.parts if name != "rest")
