"""An exported encoder, read back by timm alone."""

import json
import socket
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

from mpp.errors import UserError
from mpp.model.encoder import Encoder
from mpp.model.settings import ModelConfig
from mpp.weights import base
from mpp.weights.base import Weights
from mpp.weights.numerics import Numerics
from mpp.weights.opening import open_weights
from mpp.weights.timm_folder import read_timm_folder, save_timm_folder, write_timm_folder
from tests.model import encoders
from tests.model.encoders import CASES, TINY
from tests.weights.models import filled, images


def build(config: ModelConfig) -> Encoder:
    return encoders.build(config).float()


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_timm_gives_the_same_features_without_network_and_the_random_numbers_stay(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    encoder, random = build(config), torch.get_rng_state()
    save_timm_folder(encoder, config, tmp_path, (0.5,), (0.5,))
    assert torch.equal(torch.get_rng_state(), random)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, config.in_chans, *config.image_hw)
    with torch.no_grad():
        tokens = encoder(images)
        torch.testing.assert_close(loaded.forward_features(images), tokens, rtol=0, atol=2e-5)
        pooled = tokens[:, encoder.num_prefix_tokens :].mean(dim=1)
        torch.testing.assert_close(loaded(images), pooled, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("channels", "given", "expected"),
    [(3, (0.5,), [0.5] * 3), (3, (0.1, 0.2, 0.3), [0.1, 0.2, 0.3]), (1, (0.25,), [0.25]), (8, (0.5,), [0.5] * 8)],
)
def test_the_folder_describes_its_own_input_and_weights(
    channels: int, given: tuple[float, ...], expected: list[float], tmp_path: Path
) -> None:
    config = replace(TINY, in_chans=channels, img_size=(16, 40))
    save_timm_folder(build(config), config, tmp_path, given, tuple(2 * x for x in given))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=False)
    data = timm.data.resolve_model_data_config(loaded)
    assert data["input_size"] == (channels, 16, 40)
    assert (list(data["mean"]), list(data["std"])) == (expected, [2 * x for x in expected])
    assert set(load_file(tmp_path / "model.safetensors")) == set(loaded.state_dict())
    # Nothing of the entry that timm has under the name, which is of somebody else's weights.
    entry = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert not [entry.get(key) for key in ("license", "hf_hub_id") if entry.get(key)]
    assert "augreg" not in json.dumps(entry)


@pytest.mark.parametrize(
    ("units", "classes", "representation"), [((1, 1), ("a", "b"), None), ((2,), ("a",), 7), (None, ("a", "b"), 7)]
)
def test_a_stem_or_a_head_that_timm_has_no_name_for(
    units: tuple[int, ...] | None, classes: tuple[str, ...], representation: int | None, tmp_path: Path
) -> None:
    numerics = Numerics(norm_eps=1e-5, original_stem=units is not None, stem_units=units)
    args = {"patch_size": 2 if units else 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    name = "vit_base_r50_s16_224" if units else "vit_base_patch16_224"
    weights = Weights(name, args, None, (32, 48), 2, (0.1, 0.2), (0.3,), "token", classes, representation, numerics)
    weights = replace(weights, value_range=(0.0, 4095.0), background=(0,))
    notes = write_timm_folder(weights := filled(weights), tmp_path / "out")
    assert (representation is not None) == ("hidden tanh layer is in head.safetensors" in notes[0])
    if units:
        assert notes[-1] == f"timm has no hybrid with the stem units {list(units)}: only mpp reads this folder"
    else:
        assert "other constants than the original" in notes[-1]
    back = read_timm_folder(tmp_path / "out")
    changed = {"std": (0.3, 0.3), "state": None, "args": {}, "origin": ""}
    assert vars(replace(back, **changed)) == vars(replace(weights, **changed))
    pixels = images(32, 48, 2)
    with torch.no_grad():
        assert torch.equal(base.build(back).eval()(pixels), base.build(weights).eval()(pixels))


FRAMING = {"crop_pct": 0.875, "interpolation": "bilinear", "crop_mode": "squash"}


def test_how_images_are_framed_goes_with_the_weights(tmp_path: Path) -> None:
    model = timm.create_model("test_vit")  # whose own entry says 0.95, bicubic, and another size to test at
    save_for_hf(model, str(tmp_path / "theirs"), data_config=FRAMING, safe_serialization=True)
    weights = read_timm_folder(tmp_path / "theirs")
    write_timm_folder(weights, tmp_path / "ours")
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        assert {key: getattr(read_timm_folder(folder), key) for key in FRAMING} == FRAMING
        data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
        assert {key: data[key] for key in FRAMING} == FRAMING
    # Nothing is left of the entry that timm has under the name.
    told = json.loads((tmp_path / "ours" / "config.json").read_text())["pretrained_cfg"]
    assert not {key for key, value in told.items() if key.startswith("test_") and value}
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for key, wrong, complaint in (
        ("interpolation", "random", "interpolation must be one of bicubic, .*, got 'random'"),
        ("crop_pct", -1, "crop_pct must be positive, got -1"),
        ("crop_pct", "much", ""),
    ):
        told = config | {"pretrained_cfg": config["pretrained_cfg"] | {key: wrong}}
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(told))
        with pytest.raises(UserError, match=rf"config\.json: .*{complaint}"):
            read_timm_folder(tmp_path / "theirs")


@pytest.mark.parametrize("missing", [("mean",), ("std",), ("mean", "std", *FRAMING)])
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_what_a_folder_of_timms_leaves_out_is_as_timm_has_it(
    missing: tuple[str, ...], old: bool, tmp_path: Path
) -> None:
    model = timm.create_model("test_vit", num_classes=2)
    save_for_hf(model, str(tmp_path), {"label_names": ["a", "b"]}, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    told = {key: value for key, value in config.pop("pretrained_cfg").items() if key not in missing}
    if old:
        known = {key: config[key] for key in ("architecture", "num_classes", "num_features")}
        config = known | {"labels": config["label_names"]}
    (tmp_path / "config.json").write_text(json.dumps(config | (told if old else {"pretrained_cfg": told})))
    weights = open_weights(str(tmp_path))
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    assert (weights.in_chans, *weights.image_hw) == tuple(data["input_size"])
    assert (weights.mean, weights.std) == (tuple(data["mean"]), tuple(data["std"]))
    assert {key: getattr(weights, key) for key in FRAMING} == {key: data[key] for key in FRAMING}
    assert weights.classes == ("a", "b")


def test_what_no_folder_says_is_a_half(tmp_path: Path) -> None:
    """Of our own folders, and of other channels, for which timm has no values."""
    for channels, ours in ((3, True), (8, True), (8, False)):
        config = replace(TINY, in_chans=channels)
        save_timm_folder(build(config), config, tmp_path, (0.25,), (0.25,))
        told = json.loads((tmp_path / "config.json").read_text())
        del told["pretrained_cfg"]["mean"], told["pretrained_cfg"]["std"]
        if not ours:
            del told["mpp"]
        (tmp_path / "config.json").write_text(json.dumps(told))
        weights = read_timm_folder(tmp_path)
        assert (weights.mean, weights.std) == ((0.5,), (0.5,))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_timms_names_have_timms_framing(name: str) -> None:
    weights, config = open_weights(f"random:{name}"), timm.get_pretrained_cfg(name).to_dict()
    data = timm.data.resolve_data_config(pretrained_cfg=config)
    assert {key: getattr(weights, key) for key in FRAMING} == {key: data[key] for key in FRAMING}


WITHOUT: dict[str, tuple[str, type[Exception]]] = {
    "begun": ("this run has no model/ yet; it is written when the run ends", OSError),
    "bert": ("a model of type bert cannot be read; of Hugging Face's models only vit can", OSError),
    "test_vit.far": (r"its pretrained weights could not be fetched \(why\); are you online\?", OSError),
    "test_vit.none": (r"timm has no pretrained weights for it \(why\); random:test_vit takes", RuntimeError),
}


@pytest.mark.parametrize("spec", WITHOUT)
def test_what_holds_no_weights_says_why(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, raised = WITHOUT[spec]
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", Mock(side_effect=raised("why\nand more")))
    with pytest.raises(UserError, match=f"^--init {spec}: {said}"):
        open_weights(spec)
