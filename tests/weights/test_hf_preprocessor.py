"""How images become input, against the image processors of transformers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.data.transform import EvalTransform, normalise
from mpp.errors import UserError
from mpp.weights.base import Weights
from mpp.weights.hf_preprocessor import read_preprocessor, write_preprocessor
from tests.weights.test_huggingface import hf

__all__ = ["hf"]  # a fixture

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
PLAIN = Weights("vit_base_patch16_224", {}, None, (48, 48), 3, MEAN, STD)


def assert_same_pixels(processor: Any, weights: Weights) -> None:
    means = []
    # Of sizes whose middle is the same place by their rounding and by timm's.
    for hw in ((100, 150), (150, 100), (48, 48), (30, 40)):
        small = np.random.default_rng(0).integers(0, 256, (hw[0] // 8, hw[1] // 8, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize(hw[::-1], Image.Resampling.BICUBIC)
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        seen = EvalTransform(weights.image_hw, weights.framing)(np.asarray(image))
        ours = normalise(seen[None], weights.mean, weights.std)
        assert theirs.shape == ours.shape
        levels = (theirs - ours).abs() * torch.tensor(weights.std).view(1, -1, 1, 1) * 255
        assert levels.max() <= 2.01
        means.append(float(levels.mean()))
    # By processor, torch's kernels round some values to the next level: 0.18 at most; another interpolation makes 0.87.
    assert np.mean(means) < 0.4


def reread(weights: Weights, hf: Any, folder: Path) -> Any:
    """Their processor, of the file that is written for the weights."""
    content, notes = write_preprocessor(weights)
    assert notes == []
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return getattr(hf, content["image_processor_type"]).from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViTImageProcessor", {"size": {"height": 48, "width": 48}}),
        ("ViTImageProcessor", {"size": {"height": 48, "width": 48}, "resample": 3}),
        ("BitImageProcessor", {"size": {"shortest_edge": 56}, "crop_size": 48}),
        ("BitImageProcessor", {"size": {"shortest_edge": 48}, "crop_size": 48, "resample": 2}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 57}, "crop_size": {"height": 48, "width": 48}}),
        ("DeiTImageProcessor", {"size": {"height": 56, "width": 56}, "crop_size": {"height": 48, "width": 48}}),
    ],
)
def test_their_settings_are_read(kind: str, settings: dict[str, Any], hf: Any, tmp_path: Path) -> None:
    processor = getattr(hf, kind)(image_mean=list(MEAN), image_std=list(STD), **settings)
    processor.save_pretrained(tmp_path)
    weights = replace(PLAIN, **read_preprocessor(tmp_path, (48, 48), 3))
    assert_same_pixels(processor, weights)
    # Back in their own form.
    written = reread(weights, hf, tmp_path)
    back = replace(PLAIN, **read_preprocessor(tmp_path, (48, 48), 3))
    assert back.framing == weights.framing
    assert_same_pixels(written, weights)


@pytest.mark.parametrize("settings", [{}, {"crop_pct": 0.875}, {"crop_pct": 48 / 56, "interpolation": "bilinear"}])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_timms_settings_are_written(settings: dict[str, Any], mode: str, hf: Any, tmp_path: Path) -> None:
    weights = replace(PLAIN, crop_mode=mode, **settings)
    assert_same_pixels(reread(weights, hf, tmp_path), weights)


def test_timm_comes_to_the_size_that_they_state(tmp_path: Path) -> None:
    for size in (*range(224, 260), 292, 448):
        settings = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": size}, "crop_size": 224}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        assert math.floor(224 / read_preprocessor(tmp_path, (224, 224), 3)["crop_pct"]) == size


def test_old_files_and_wrong_ones(tmp_path: Path) -> None:
    def read(**settings: Any) -> dict[str, Any]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        return read_preprocessor(tmp_path, (48, 48), 3)

    assert read_preprocessor(tmp_path, (48, 48), 3) == {}
    old = read(feature_extractor_type="ViTFeatureExtractor", size=48, resample=2, image_mean=[0.5] * 3)
    assert old == {"mean": (0.5,) * 3, "std": (0.5,), "interpolation": "bilinear", "crop_mode": "squash"}
    clip = read(feature_extractor_type="CLIPFeatureExtractor", size=64, crop_size=48)
    assert (clip["crop_mode"], clip["crop_pct"]) == ("center", 0.75)
    assert read(do_normalize=False, do_resize=False)["std"] == (1.0,)
    with pytest.raises(ValueError, match=r"resample 9 of preprocessor_config\.json is not one of Pillow's 0 to 5"):
        read(resample=9)
    with pytest.raises(ValueError, match="expected height and width, or shortest_edge"):
        read(size={"longest_edge": 100})
    with pytest.raises(UserError, match="2 means and 1 deviations for 3 channels"):
        read(image_mean=[0.1, 0.2], image_std=[0.5])


@pytest.mark.parametrize(("mode", "hw"), [("border", (48, 48)), ("center", (48, 96))])
def test_what_they_cannot_say_is_said(mode: str, hw: tuple[int, int]) -> None:
    content, (note,) = write_preprocessor(replace(PLAIN, image_hw=hw, crop_mode=mode))
    assert content["size"] == {"height": hw[0], "width": hw[1]}
    assert f"crop_mode {mode} at 48 x {hw[1]} pixels is none of Hugging Face's" in note
