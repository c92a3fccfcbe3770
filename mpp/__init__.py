"""Masked patch prediction: pretraining Vision Transformers without labels.

These names are the public ones; everything else may change. Each is loaded when it is first used, so that `import mpp`
costs nothing.
"""

import importlib
from typing import Any

_HOME = {
    # the tools
    "pretrain": "mpp.api",
    "finetune": "mpp.api",
    "fewshot": "mpp.api",
    "probe": "mpp.api",
    "predict": "mpp.api",
    "embed": "mpp.api",
    "convert": "mpp.api",
    "visualize": "mpp.api",
    "study": "mpp.api",
    "shard": "mpp.api",
    "check_data": "mpp.api",
    "load": "mpp.api",
    "Result": "mpp.api.results",
    "RunResult": "mpp.api.results",
    # what they raise
    "UserError": "mpp.errors",
    "ConfigError": "mpp.errors",
    "RunError": "mpp.errors",
    "TryLater": "mpp.errors",
    "Stopped": "mpp.errors",
    # images
    "open_source": "mpp.data.sources.opening",
    "Source": "mpp.data.sources.base",
    "ListSource": "mpp.data.sources.in_memory",
    "decode": "mpp.data.decoding",
    "BadImage": "mpp.data.decoding",
    "DecodeOptions": "mpp.data.settings",
    "EvalTransform": "mpp.data.transform",
    "sequential": "mpp.data.loader",
    # the encoder, and weights from and to disk
    "ModelConfig": "mpp.model.settings",
    "Encoder": "mpp.model.encoder",
    "build_encoder": "mpp.model.encoder",
    "read_features": "mpp.downstream.feature_file",
    "Weights": "mpp.weights.base",
    "open_weights": "mpp.weights.opening",
    "save_timm_folder": "mpp.weights.timm_folder",
    # the objective
    "pick_patches": "mpp.objective.masking",
    "draw_corruption": "mpp.objective.masking",
    "corrupt": "mpp.objective.masking",
    "build_target": "mpp.objective.target",
    "MaskedPatchPrediction": "mpp.objective.objective",
    # settings of a run
    "PretrainConfig": "mpp.pretraining.settings",
    "FinetuneConfig": "mpp.downstream.settings",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mpp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
