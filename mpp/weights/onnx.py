"""Out as ONNX: one file that needs no Python, checked against the model that it was written from."""

import importlib.util
import os
import tempfile
from pathlib import Path

import torch

from mpp.errors import UserError, install
from mpp.system.process import without_warnings
from mpp.weights.base import Weights, build

_TOLERANCE = 1e-4  # of the largest output, or of 1 if that is smaller
_LIMIT = 2**31 - 2**24  # bytes of weights in one file: protobuf's 2 GiB, and room for the graph


def write_onnx(weights: Weights, path: Path) -> None:
    """Writes the model with its head as an ONNX file of float32.

    Its input is "images", normalised, (batch, channels, height, width) with any batch size, and its output "logits"
    (batch, classes) with a head, else "features" (batch, width), pooled. If onnxruntime is installed, it must agree
    with torch within 1e-4 on one and on three random images. Weights of more than 2 GiB lie beside the file, in one
    that ends in ".data".

    Raises UserError for a missing package, or a model that cannot be exported or computes something else.
    """
    if absent := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise UserError(f"writing ONNX needs {' and '.join(absent)}; install with: {install('onnx')}")
    model = build(weights, attention="sdpa").eval()
    shape = (weights.in_chans, *weights.image_hw)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own, under its own name: weights beside the file are found by that name.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
            temporary = Path(name) / path.name
            try:
                with without_warnings():  # the exporter's own deprecations
                    torch.onnx.export(
                        model,
                        (torch.zeros(2, *shape),),  # of one image, the batch axis would be taken for a constant
                        str(temporary),
                        input_names=["images"],
                        output_names=["features" if weights.classes is None else "logits"],
                        dynamic_shapes=({0: torch.export.Dim("batch")},),
                        dynamo=True,
                        external_data=sum(tensor.nbytes for tensor in model.state_dict().values()) > _LIMIT,
                        verbose=False,
                    )
            except Exception as error:  # whatever the exporter raises for an operator that it cannot translate
                reason = (str(error) or type(error).__name__).strip().splitlines()[0]
                raise UserError(f"{type(model).__name__} cannot be exported to ONNX: {reason}") from error
            _check(model, shape, temporary)
            # The file itself last: if it exists, all of it does.
            for file in sorted(temporary.parent.iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


def _check(model: torch.nn.Module, shape: tuple[int, ...], file: Path) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        images = torch.randn(batch, *shape, generator=generator)
        with torch.no_grad():
            expected = model(images)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        if found.shape != expected.shape:
            raise UserError(f"onnxruntime gives {tuple(found.shape)} for {tuple(expected.shape)}; nothing was written")
        error, scale = (found - expected).abs().max().item(), max(expected.abs().max().item(), 1.0)
        if not error <= _TOLERANCE * scale:
            raise UserError(f"onnxruntime differs from torch by {error:.1e} at batch size {batch}; nothing was written")
