"""ONNX files against the model that they came from."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpp.errors import UserError, install
from mpp.weights.base import Weights, build
from mpp.weights.onnx import write_onnx
from tests.weights.models import ARGS, HYBRID, filled, images

VIT = Weights("vit_base_patch16_224", ARGS | {"depth": 1}, None, (16, 24), classes=("a", "b", "c"))
CASES = {
    "mean-pooled vit": VIT,
    "hidden layer": replace(VIT, pool="token", representation=8),
    "headless, no class token": replace(VIT, args=ARGS | {"class_token": False}, classes=None, in_chans=2),
    "original hybrid": replace(HYBRID, image_hw=(29, 32), classes=("a", "b")),
    "no vit": Weights("convnext_atto", {"depths": [1, 1, 1, 1]}, None, (32, 32), classes=("a", "b")),
}


@pytest.fixture
def runtime() -> Any:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("weights", CASES.values(), ids=CASES)
def test_onnxruntime_gives_the_same(weights: Weights, runtime: Any, tmp_path: Path) -> None:
    weights, path = filled(weights), tmp_path / "new" / "model.onnx"
    write_onnx(weights, path)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type) == ("images", "tensor(float)")
    assert output.name == ("logits" if weights.classes else "features")
    assert given.shape[1:] == [weights.in_chans, *weights.image_hw]
    model = build(weights, attention="explicit").eval()
    for batch in (1, 3, 5):
        pixels = images(*weights.image_hw, weights.in_chans, batch)
        with torch.no_grad():
            expected = model(pixels)
        ours = torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_bad_folders_and_missing_packages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*below\.onnx"):
        write_onnx(VIT, tmp_path / "file" / "below.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"needs onnx and onnxscript; install with: {re.escape(install('onnx'))}$"):
        write_onnx(VIT, tmp_path / "other.onnx")


class Stubborn(nn.Module):
    """Looks at the values of its input, which no exported graph can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.slow
@pytest.mark.usefixtures("runtime")
def test_what_cannot_be_exported_or_computes_something_else_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpp.weights.onnx._TOLERANCE", -1.0)
    with pytest.raises(UserError, match=r"differs from torch .* nothing was written"):
        write_onnx(filled(VIT), tmp_path / "model.onnx")
    monkeypatch.setattr("mpp.weights.onnx.build", lambda *_, **__: Stubborn())
    with pytest.raises(UserError, match=r"^Stubborn cannot be exported to ONNX[^\n]*$"):
        write_onnx(VIT, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_large_weights_lie_beside_the_file(runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpp.weights.onnx._LIMIT", 0)
    write_onnx(filled(VIT), tmp_path / "model.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": torch.zeros(2, 3, 16, 24).numpy()})[0].shape == (2, 3)
