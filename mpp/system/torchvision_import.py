"""Imports torchvision where its compiled operators cannot load, as beside the CPU build of torch.

The package registry's torchvision is linked against CUDA. Beside a CPU torch its operators are missing and
`import torchvision` (so also `import timm`) dies while registering a fake kernel for `torchvision::nms`. Declaring
the two schemas that it asks for is enough for transforms, datasets and all of timm; box operators and
`torchvision.io` stay out of reach and nothing here uses them. A healthy install is left alone.
"""

import importlib
import sys

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def ensure_torchvision() -> None:
    """Makes `import torchvision` work, also in timm. Raises its own error where it is missing or broken otherwise."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", _SCHEMA)
        importlib.import_module("torchvision")


ensure_torchvision()
