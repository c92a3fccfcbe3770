"""Which goals of the training step are met."""

from typing import Any

import pytest
import torch
from benchmarks.step_goals import OURS, SUPERVISED, StepRow, verdicts

from tests.benchmarks.tiny import CPU


def _row(side: str, rate: float, mine: float = 100.0, **told: Any) -> StepRow:
    told = {"precision": "fp32", "ceiling": (1e12,) * 3, **told}
    return StepRow("vit_base_patch16_224", side, images_per_second=(rate,) * 3, faster=(mine / rate,) * 3, **told)


def test_the_goals_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        _row(OURS, 100.0, flops=7.9e9, precision="bf16"),
        _row(SUPERVISED, 101.0, flops=8e9),
        _row("one", 90.0),
        _row("one, its defaults", 110.0, default=True),
        StepRow("vit_base_patch16_224", "two", left_out="not here"),
    ]
    monkeypatch.setattr("benchmarks.step_goals.choose_precision", lambda name, device: "bf16")
    found = verdicts(rows, CPU)
    assert [verdict.met for verdict in found] == [True, False, True]
    assert [verdict.figure for verdict in found] == ["1.010 x", "0.79", "1.11 x the best one's images/s"]
    monkeypatch.setattr("benchmarks.step_goals.choose_precision", lambda name, device: "fp32")
    assert [verdict.met for verdict in verdicts(rows, CPU)] == [True, None, None]
    assert str(verdicts([rows[0], _row(SUPERVISED, 110.0)], CPU)[0]).startswith(
        "MISSED      vit_base_patch16_224: step"
    )


@pytest.mark.parametrize(
    ("name", "met"), [("NVIDIA H200", [True, True, False, True]), ("NVIDIA L4", [True] + 3 * [None])]
)
def test_the_goals_on_a_gpu(name: str, met: list[bool | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    rows = [
        _row(OURS, 100.0, flops=5.6e9, precision="bf16"),
        _row(SUPERVISED, 100.0),
        _row("vit-pytorch MPP, its defaults", 20.5, default=True),
        _row("one", 70.0),
        _row("two", 75.0),
    ]
    assert [verdict.met for verdict in verdicts(rows, torch.device("cuda"))] == met
