"""preprocessor_config.json of a Hugging Face folder: how images become the model's input, in and out."""

import math
from pathlib import Path
from typing import Any

from mpp.errors import UserError
from mpp.weights.base import Weights
from mpp.weights.timm_folder import per_channel, read_json

_FILE = "preprocessor_config.json"
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
_BY_SHORTER_EDGE = ("BitImageProcessor", "CLIPImageProcessor", "CLIPFeatureExtractor")
_CROPPING = (*_BY_SHORTER_EDGE, "DeiTImageProcessor", "DeiTFeatureExtractor")  # unless the file says otherwise


def read_preprocessor(folder: Path, image_hw: tuple[int, int], in_chans: int) -> dict[str, Any]:
    """Mean, standard deviation and framing, for `Weights`, as transformers understands the file.

    ViT's own processor squashes images to its size; those of others resize the shorter edge, and crop. Raises TypeError
    or ValueError for settings of another kind, UserError for no JSON or another number of channels.
    """
    path = folder / _FILE
    if not path.exists():
        return {}
    config = read_json(path)
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "").removesuffix("Fast")
    if not config.get("do_normalize", True):
        mean, std = (0.0,), (1.0,)
    else:
        mean, std = (tuple(map(float, config.get(f"image_{key}") or (0.5,))) for key in ("mean", "std"))
        if {len(mean), len(std)} - {1, in_chans}:
            raise UserError(f"{path}: {len(mean)} means and {len(std)} deviations for {in_chans} channels")
    return {"mean": mean, "std": std} | _framing(config, kind, image_hw)


def _framing(config: dict[str, Any], kind: str, image_hw: tuple[int, int]) -> dict[str, Any]:
    code = (3 if kind in _CROPPING else 2) if config.get("resample") is None else int(config["resample"])
    if not 0 <= code < len(_RESAMPLE):
        raise ValueError(f"resample {code} of {_FILE} is not one of Pillow's 0 to {len(_RESAMPLE) - 1}")
    framing: dict[str, Any] = {"interpolation": _RESAMPLE[code]}
    size = config.get("size")
    if not config.get("do_resize", True) or size is None:
        return framing
    if not isinstance(size, dict):
        size = {"shortest_edge": size} if kind in _BY_SHORTER_EDGE else {"height": size, "width": size}
    resized = int(size.get("shortest_edge") or size.get("height") or 0)
    if not resized:
        raise ValueError(f"size {size} of {_FILE}; expected height and width, or shortest_edge")
    framing["crop_mode"] = "center" if size.get("shortest_edge") else "squash"
    cropped = config.get("do_center_crop")
    if kind in _CROPPING if cropped is None else cropped:
        crop = config.get("crop_size")
        crop = int((crop.get("height") if isinstance(crop, dict) else crop) or image_hw[0])
        share = crop / resized
        while math.floor(crop / share) < resized:  # timm, which rounds down, must come to the same size
            share = math.nextafter(share, 0)
        framing["crop_pct"] = share
    return framing


def write_preprocessor(weights: Weights) -> tuple[dict[str, Any], list[str]]:
    """The file's content, and what it cannot say, in sentences."""
    height, width = weights.image_hw
    scaled_h, scaled_w = (math.floor(side / weights.crop_pct) for side in weights.image_hw)
    kind, size, crop, notes = "ViTImageProcessor", {"height": scaled_h, "width": scaled_w}, {}, []
    if weights.crop_mode == "border" or (weights.crop_mode == "center" and height != width):
        size = {"height": height, "width": width}
        notes.append(
            f"crop_mode {weights.crop_mode} at {height} x {width} pixels is none of Hugging Face's: {_FILE} squashes "
            "images to that size"
        )
    elif weights.crop_mode == "center" or (height, width) != (scaled_h, scaled_w):
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
        "image_mean": list(per_channel(weights.mean, weights.in_chans)),
        "image_std": list(per_channel(weights.std, weights.in_chans)),
    }
    return content, notes
