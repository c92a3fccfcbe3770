"""Measures the library beside its references: `python tools/bench.py fewshot --help`."""

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.settings import (
    PLAN_ALIASES,
    AttentionBench,
    DataBench,
    FewshotBench,
    GpuBench,
    PlanBench,
    SavingBench,
    StepBench,
    TrainingBench,
)

from mpp.cli import run_tool


def bench(argv: Sequence[str] | None = None) -> int:
    """Measures what the first word names, beside its reference; returns the exit code."""
    known: dict[str, type[Any]] = {
        "step": StepBench,
        "training": TrainingBench,
        "plan": PlanBench,
        "attention": AttentionBench,
        "saving": SavingBench,
        "gpu": GpuBench,
        "data": DataBench,
        "fewshot": FewshotBench,
    }
    what, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if what in ("-h", "--help"):
        print(f"usage: bench {{{','.join(known)}}} [settings]; `bench {next(iter(known))} --help` lists its settings\n")
        print("\n".join(f"  {name:10} {config.__doc__}" for name, config in known.items()))
        return 0
    if what not in known:
        got = repr(what) if what else "nothing"
        print(f"bench: error: the first word names what to measure: {', '.join(known)}; got {got}", file=sys.stderr)
        return 2

    def run(config: object) -> int:
        # Each measurement is the function named like its file.
        return getattr(importlib.import_module(f"benchmarks.{what}"), what)(config)

    return run_tool(f"bench {what}", known[what], rest, run, PLAN_ALIASES if what == "plan" else {})


if __name__ == "__main__":
    sys.exit(bench())
