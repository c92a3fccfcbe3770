"""The measurement of few-shot classification, and what it refuses. The figures themselves are the machine's."""

import re
import sys

import numpy as np
import pytest
from bench import bench as run
from benchmarks import fewshot as bench
from benchmarks.settings import FewshotBench

from mpp.errors import RunError, UserError
from tests.benchmarks.tiny import call

TINY = ("--classes", "12", "--shots", "3", "--dim", "16", "--num-l2", "4", "--num-test", "50", "--repeats", "2")


def test_it_prints_ratios_and_that_both_sides_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fewshot", *TINY]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    for name in ("torch", "NumPy", "scikit-learn", "cores", "load"):
        assert name in lines[0]
    assert lines[1].startswith("12 classes x 3 shots, 16 features, 4 values of L2, 50 test images")
    measured = lines[4:7]
    for line, name in zip(measured, bench._SIDES, strict=True):
        assert re.fullmatch(rf"{name} +\S+ s \(\S+ to \S+\) +\S+ s \(\S+ to \S+\) +\S+ x \(\S+ to \S+\)", line)
    agreed = r"Both predict the same: 0 of 200 predictions differ, the logits by at most \d\.\de-1\d\."
    assert re.fullmatch(agreed, lines[-1])


def test_help_never_loads_torch() -> None:
    done = call("fewshot", "--help", python=("-X", "importtime"))
    assert done.returncode == 0
    for flag in ("--classes INT", "--shots INT", "--dim INT", "--num-l2 INT", "--repeats INT"):
        assert flag in done.stdout
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "benchmarks.settings" in modules
    assert not modules & {"torch", "numpy", "sklearn"}


def test_help_names_the_help_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "bench step --help" in capsys.readouterr().out


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match=r"pip install scikit-learn$"):
        bench.fewshot(FewshotBench())


def test_sides_that_differ_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = bench._scikit_learn()

    class Other(reference):
        def predict(self, X: np.ndarray) -> np.ndarray:
            return super().predict(X) + 1e-3

    monkeypatch.setattr(bench, "_scikit_learn", lambda: Other)
    tiny = FewshotBench(classes=5, shots=2, dim=4, num_l2=2, num_test=10, repeats=1)
    with pytest.raises(RunError, match=r"do not agree, .* 0 of 20 predictions differ, the logits by at most 1.0e-03$"):
        bench.fewshot(tiny)
    assert "ratio" in capsys.readouterr().out
