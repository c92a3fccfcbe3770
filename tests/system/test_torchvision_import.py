"""Importing torchvision beside a torch that it was not built for."""

import importlib
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

from mpp.system.torchvision_import import ensure_torchvision

NO_OPERATORS = RuntimeError("operator torchvision::nms does not exist")
OTHER, MISSING = RuntimeError("another reason"), ImportError("no torchvision")


@pytest.mark.parametrize(
    ("outcomes", "declared"),
    [([None], []), ([NO_OPERATORS, None], ["torchvision::nms", "torchvision::qnms"]), ([OTHER], []), ([MISSING], [])],
    ids=["healthy", "no operators", "broken otherwise", "missing"],
)
def test_operators_are_declared_where_they_alone_are_missing(
    outcomes: list[Exception | None], declared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`outcomes` are those of each import; a torchvision that was imported by half is forgotten before the second."""
    names, left = list[str](), list(outcomes)

    def load(_: str) -> Any:
        if error := left.pop(0):
            raise error

    monkeypatch.setattr(torch.library, "define", lambda name, schema: names.append(name))
    monkeypatch.setattr(sys, "modules", {**sys.modules, "torchvision.half": types.ModuleType("torchvision.half")})
    monkeypatch.setattr(importlib, "import_module", load)
    if outcomes[-1]:
        with pytest.raises(type(outcomes[-1]), match=str(outcomes[-1])):
            ensure_torchvision()
    else:
        ensure_torchvision()
    assert (names, left) == (declared, [])
    assert ("torchvision.half" in sys.modules) == (not declared)


@pytest.mark.slow
def test_transforms_and_timm_import_in_a_fresh_process_without_a_warning() -> None:
    code = "import mpp.system.timm_import, sys, torchvision.transforms.v2, timm; print('wandb' in sys.modules, "
    code += "timm.is_model('vit_tiny_patch16_224')); import wandb"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False True\n", "")
