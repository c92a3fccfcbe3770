"""preprocessor_config.json of a Hugging Face folder: how images become the model's input, in and out."""

import math
from pathlib import Path
from typing import Any

from mpp.errors import UserError
from mpp.weights.base import Weights
from mpp.weights.timm_folder import read_json

_FILE = "preprocessor_config.json"
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
_BY_SHORTER_EDGE = ("BitImageProcessor", "CLIPImageProcessor", "CLIPFeatureExtractor", "ConvNextImageProcessor")
_USUAL = {"mean": (0.5,), "std": (0.5,)}
_OF_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_CROPPING = (*_BY_SHORTER_EDGE[:-1], "DeiTImageProcessor", "DeiTFeatureExtractor")


def read_preprocessor(folder: Path, image_hw: tuple[int, int], in_chans: int) -> dict[str, Any]:
    """Mean, standard deviation and framing, for `Weights`; the usual ones where the folder says nothing.

    ViT's own processor squashes images to its size; those of others resize the shorter edge, and crop. What a file
    leaves out is as transformers has it.

    Raises:
        TypeError, ValueError: settings of another kind.
        UserError: a file that is no JSON, or of another number of channels.
    """
    path = folder / _FILE
    if not path.exists():
        return {}
    told = read_json(path)
    kind = str(told.get("image_processor_type") or told.get("feature_extractor_type") or "").removesuffix("Fast")
    return _normalisation(told, kind, path, in_chans) | _framing(told, kind, image_hw)


def _normalisation(told: dict[str, Any], kind: str, path: Path, in_chans: int) -> dict[str, tuple[float, ...]]:
    if not told.get("do_normalize", True):
        return {"mean": (0.0,), "std": (1.0,)}
    # Those of colours; Bit's processor has CLIP's values, too.
    usual = _OF_CLIP if kind in _BY_SHORTER_EDGE[:-1] and in_chans == 3 else _USUAL
    mean, std = (tuple(float(x) for x in told.get(f"image_{name}") or usual[name]) for name in ("mean", "std"))
    if {len(mean), len(std)} - {1, in_chans}:
        raise UserError(f"{path}: {len(mean)} means and {len(std)} deviations for {in_chans} channels")
    return {"mean": mean, "std": std}


def _framing(told: dict[str, Any], kind: str, image_hw: tuple[int, int]) -> dict[str, Any]:
    usual = 3 if kind in (*_BY_SHORTER_EDGE, *_CROPPING) else 2
    code = usual if told.get("resample") is None else int(told["resample"])
    if not 0 <= code < len(_RESAMPLE):
        raise ValueError(f"resample {code} of {_FILE} is not one of Pillow's 0 to {len(_RESAMPLE) - 1}")
    found: dict[str, Any] = {"interpolation": _RESAMPLE[code]}
    size = told.get("size")
    if not told.get("do_resize", True) or size is None:
        return found
    if not isinstance(size, dict):
        size = {"shortest_edge": size} if kind in _BY_SHORTER_EDGE else {"height": size, "width": size}
    resized = int(size.get("shortest_edge") or size.get("height") or 0)
    if not resized:
        raise ValueError(f"size {size} of {_FILE}; expected height and width, or shortest_edge")
    found["crop_mode"] = "center" if size.get("shortest_edge") else "squash"
    cropped = told.get("do_center_crop")
    if kind in _CROPPING if cropped is None else cropped:
        crop = told.get("crop_size")
        found["crop_pct"] = _share(
            int((crop.get("height") if isinstance(crop, dict) else crop) or image_hw[0]), resized
        )
    elif told.get("crop_pct") and image_hw[0] < 384:  # ConvNeXt's, which squashes larger ones
        found["crop_pct"] = float(told["crop_pct"])
    return found


def _share(crop: int, size: int) -> float:
    """`crop_pct` of a crop out of an image of that size, such that timm, which rounds down, comes to the same size."""
    share = crop / size
    while math.floor(crop / share) < size:
        share = math.nextafter(share, 0)
    return share


def write_preprocessor(weights: Weights) -> tuple[dict[str, Any], list[str]]:
    """The file's content, and what it cannot say, in sentences."""
    height, width = weights.image_hw
    scaled_h, scaled_w = (math.floor(side / weights.crop_pct) for side in weights.image_hw)
    mean, std = (
        list(values * weights.in_chans if len(values) == 1 else values) for values in (weights.mean, weights.std)
    )
    exact = (height, width) == (scaled_h, scaled_w)
    kind, size, crop, notes = "ViTImageProcessor", {"height": scaled_h, "width": scaled_w}, {}, []
    if weights.crop_mode == "border" or (weights.crop_mode == "center" and height != width):
        size = {"height": height, "width": width}
        notes.append(
            f"crop_mode {weights.crop_mode} at {height} x {width} pixels is none of Hugging Face's: {_FILE} squashes "
            "images to that size"
        )
    elif weights.crop_mode == "center" or not exact:
        kind = "BitImageProcessor"  # ViT's has no crop
        size = {"shortest_edge": scaled_h} if weights.crop_mode == "center" else size
        crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    content = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": size,
        **crop,
        "resample": _RESAMPLE.index(weights.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    return content, notes
