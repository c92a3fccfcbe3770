"""Masked patch prediction: pretraining Vision Transformers without labels.

The public names below are loaded when they are first used, so that `import mpp` costs nothing.
"""

import importlib
from typing import Any

_HOME = {
    "Encoder": "mpp.model.encoder",
    "build_encoder": "mpp.model.encoder",
    "ModelConfig": "mpp.model.settings",
    "save_timm_folder": "mpp.weights.timm_folder",
    "MaskedPatchPrediction": "mpp.objective.objective",
    "build_target": "mpp.objective.target",
    "pick_patches": "mpp.objective.masking",
    "draw_corruption": "mpp.objective.masking",
    "corrupt": "mpp.objective.masking",
    "open_source": "mpp.data.sources.opening",
    "PretrainConfig": "mpp.pretraining.settings",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mpp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
