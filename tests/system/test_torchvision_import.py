"""Importing torchvision beside a torch that it was not built for."""

import importlib
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import torch

from mpp.system.torchvision_import import ensure_torchvision

NO_OPERATORS = RuntimeError("operator torchvision::nms does not exist")


def imports(outcomes: list[Exception | None], calls: list[str]) -> Callable[[str], object]:
    """An `import_module` that raises each outcome in turn."""

    def call(name: str) -> object:
        calls.append(name)
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return types.ModuleType(name)

    return call


@pytest.fixture
def defined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that are declared, without declaring them; and a half-imported torchvision to be cleaned up."""
    names: list[str] = []
    monkeypatch.setattr(torch.library, "define", lambda name, schema: names.append(name))
    monkeypatch.setattr(sys, "modules", {**sys.modules, "torchvision.half": types.ModuleType("torchvision.half")})
    return names


def test_a_healthy_install_is_left_alone(defined: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(importlib, "import_module", imports([None], calls))
    ensure_torchvision()
    assert (calls, defined) == (["torchvision"], [])
    assert "torchvision.half" in sys.modules


def test_missing_operators_are_declared_and_the_import_is_tried_again(
    defined: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(importlib, "import_module", imports([NO_OPERATORS, None], calls))
    ensure_torchvision()
    assert calls == ["torchvision", "torchvision"]
    assert "torchvision::nms" in defined
    assert not [name for name in sys.modules if name.startswith("torchvision.")]


@pytest.mark.parametrize("error", [RuntimeError("another reason"), ImportError("no torchvision")])
def test_other_errors_are_torchvisions_own(
    error: Exception, defined: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib, "import_module", imports([error], []))
    with pytest.raises(type(error), match=str(error)):
        ensure_torchvision()
    assert defined == []


def test_transforms_and_timm_import_in_a_fresh_process_without_a_warning() -> None:
    code = "import mpp.system.torchvision_import, torchvision.transforms.v2, timm; "
    code += "print(timm.is_model('vit_tiny_patch16_224'))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
