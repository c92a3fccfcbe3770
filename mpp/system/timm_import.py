"""Imports timm beside any torchvision, and without wandb.

timm imports wandb where it is installed, for more than a second, and for one function that nothing here calls.
"""

import importlib
import sys

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)


def _import_timm() -> None:
    if "wandb" in sys.modules:
        importlib.import_module("timm")
        return
    sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType]  # as where it is missing
    try:
        importlib.import_module("timm")
    finally:
        del sys.modules["wandb"]


_import_timm()
