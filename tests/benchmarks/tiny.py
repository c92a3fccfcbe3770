"""A training step to be measured in a test, a model to be counted by hand, and the command."""

import os
import subprocess
import sys

import torch
from benchmarks.cost.shape import Shape
from benchmarks.step_sides import Setting

from mpp.model.settings import ModelConfig
from tests.runs import ROOT

CPU = torch.device("cpu")
TINY = ModelConfig("vit_tiny_patch16_224", (32,), (8,), embed_dim=48, depth=2, num_heads=3)
SETTING = Setting(TINY, 2, CPU, "fp32", "off")
# 4 patches of 2 values and a class token, width 3, two blocks, MLP of 5, 2 corrupted, 7 outputs
HAND = Shape(1, (4, 2), (2, 1), 3, 2, 1, 5, 1, 15, 2, 7)


def call(*argv: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs tools/bench.py as a process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    environment.pop("RANK", None)
    return subprocess.run(
        [sys.executable, *python, str(ROOT / "tools" / "bench.py"), *argv],
        check=False, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
