"""Hugging Face's folders, in and out, against transformers itself."""

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mpp.errors import UserError
from mpp.weights.base import Weights, build
from mpp.weights.huggingface import read_hf_folder, write_hf_folder
from mpp.weights.numerics import Numerics
from tests import runs
from tests.weights.models import ARGS, filled, images, vit

NAMES = ("cat", "dog", "emu", "fox", "gnu")
ATOL = 1e-5


@pytest.fixture(scope="session")
def hf() -> Iterator[Any]:
    """transformers, silent, and away from the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        yield transformers


def hf_model(hf: Any, kind: str, **settings: Any) -> Any:
    """Their model with no weight at its initial value."""
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    config = hf.ViTConfig(**(shape | {"image_size": 32, "patch_size": 8, "encoder_stride": 8} | labels | settings))
    model = getattr(hf, kind)(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


# In: written by transformers.


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias of q, k, v": {"qkv_bias": False},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "new gelu": {"hidden_act": "gelu_new"},
    "large epsilon": {"layer_norm_eps": 1e-2},
    "timm's epsilon": {"layer_norm_eps": 1e-6},
    "one channel": {"num_channels": 1},
    "odd mlp": {"intermediate_size": 41},
}


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_a_classifier_is_read(settings: dict[str, Any], hf: Any, tmp_path: Path) -> None:
    theirs = hf_model(hf, "ViTForImageClassification", **settings)
    theirs.save_pretrained(tmp_path)
    read = read_hf_folder(tmp_path)
    assert (read.classes, read.pool, read.image_hw) == (NAMES, "token", (32, 32))
    x = images(channels=settings.get("num_channels", 3))
    with torch.no_grad():
        torch.testing.assert_close(build(read).eval()(x), theirs(x).logits, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("kind", "pool"), [("ViTModel", "token"), ("ViTForMaskedImageModeling", "avg")])
def test_an_encoder_is_read(kind: str, pool: str, hf: Any, tmp_path: Path) -> None:
    theirs = hf_model(hf, kind)
    theirs.save_pretrained(tmp_path)
    assert read_hf_folder(tmp_path).mean == (0.5,)
    hf.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    read = read_hf_folder(tmp_path)
    assert (read.classes, read.pool, read.mean, read.std) == (None, pool, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    ours: Any = build(read).eval()
    encoder = theirs if kind == "ViTModel" else theirs.vit
    with torch.no_grad():
        expected = encoder(images()).last_hidden_state
        torch.testing.assert_close(ours.forward_features(images()), expected, rtol=0, atol=ATOL)
        pooled = expected[:, 0] if pool == "token" else expected[:, 1:].mean(1)
        torch.testing.assert_close(ours(images()), pooled, rtol=0, atol=ATOL)


# Out: read by transformers.


WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "tanh gelu": ({"act_layer": "gelu_tanh"}, {}),
    "no bias of q, k, v": ({"qkv_bias": False}, {"numerics": Numerics(norm_eps=1e-12)}),
    "odd mlp": ({"mlp_ratio": 1.7}, {"numerics": Numerics(norm_eps=1e-2)}),
    "flat": (
        {"patch_size": [8, 4]},
        {"image_hw": (32, 16), "crop_mode": "squash", "in_chans": 2, "mean": (0.1, 0.2), "std": (0.3, 0.3)},
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_classifier_is_written(case: str, hf: Any, tmp_path: Path) -> None:
    args, fields = WRITTEN[case]
    fields = {"image_hw": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "pool": "token", "classes": NAMES} | fields
    source: Any = filled(Weights("vit_base_patch16_224", ARGS | args, None, **fields))
    assert write_hf_folder(source, tmp_path / "hf") == []
    theirs, info = hf.ViTForImageClassification.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.id2label == dict(enumerate(NAMES))
    assert tuple(hf.ViTImageProcessor.from_pretrained(tmp_path / "hf").image_mean) == fields["mean"]
    pixels = images(*source.image_hw, source.in_chans)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(pixels).logits, build(source).eval()(pixels), rtol=0, atol=ATOL)
    back: Any = read_hf_folder(tmp_path / "hf")
    assert {key: getattr(back, key) for key in fields} == fields
    assert all(torch.equal(back.state[name], source.state[name]) for name in source.state)


@pytest.mark.parametrize(("pool", "classes"), [("avg", None), ("avg", NAMES), ("token", None), ("token", NAMES[:1])])
def test_an_encoder_is_written(pool: str, classes: Any, hf: Any, tmp_path: Path) -> None:
    source = vit(pool, classes)
    notes = write_hf_folder(source, tmp_path / "hf")
    left_out = "the head of 5 classes was left out: it reads tokens pooled by 'avg'"
    assert [left_out in note for note in notes] == ([True] if classes == NAMES else [])
    theirs = hf.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = build(source).eval().forward_features(images())  # pyright: ignore[reportCallIssue]
        torch.testing.assert_close(theirs(images()).last_hidden_state, expected, rtol=0, atol=ATOL)
    assert read_hf_folder(tmp_path / "hf").pool == pool


# Folders that are damaged or of something else.


def changed(folder: Path, **settings: Any) -> Path:
    """A good folder with other settings in its config.json; None takes one out."""
    write_hf_folder(vit(classes=NAMES), folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    "classes": ({"id2label": {"0": "cat"}}, "names 1 classes, the classifier has 5"),
    "width": ({"hidden_size": "wide"}, "a setting that cannot be used: .*wide"),
    "size": ({"image_size": [1, 2, 3]}, "a setting that cannot be used"),
}


@pytest.mark.parametrize(("settings", "reason"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_cannot_be_used_are_named(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}[^\n]*{reason}[^\n]*$"):
        read_hf_folder(changed(tmp_path / "hf", **settings))


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    folder = changed(tmp_path / "hf", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"missing: blocks\.2\.norm1\.weight"):
        build(read_hf_folder(folder))
    tensors = load_file(folder / "model.safetensors") | {"vit.surprise.weight": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"1 weights that a ViT does not have: surprise\.weight"):
        read_hf_folder(folder)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = changed(tmp_path / "hf") / "model.safetensors"
    for content in (path.read_bytes()[:2000], b"not tensors", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_hf_folder(path.parent)
    path.with_name("config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        read_hf_folder(path.parent)


def test_a_pickle_of_tensors_is_read_and_no_code_of_any_is_run(tmp_path: Path) -> None:
    folder = changed(tmp_path / "hf", id2label=None)
    pickled, witness, source = folder / "pytorch_model.bin", tmp_path / "witness", vit(classes=NAMES)
    torch.save(load_file(folder / "model.safetensors"), pickled)
    (folder / "model.safetensors").unlink()
    read: Any = read_hf_folder(folder)
    assert read.classes == tuple(f"LABEL_{i}" for i in range(5))
    runs.assert_same(dict(sorted(read.state.items())), dict(sorted((source.state or {}).items())))

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(witness),)

    for write in (torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap))):
        write({"classifier.weight": Trap()}, pickled)
        with pytest.raises(UserError, match=r"pytorch_model\.bin"):
            read_hf_folder(folder)
    assert not witness.exists()


# Models that their ViT cannot represent.


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no class token": ({"pool": "avg", "class_token": False}, "no class token with a position embedding"),
    "registers": ({"reg_tokens": 2}, "without a place: reg_token"),
    "no position for the class": ({"no_embed_class": True}, "no class token with a position embedding"),
    "no positions": ({"pos_embed": "none"}, "missing: pos_embed"),
    "qk-norm": ({"qk_norm": True}, r"without a place: blocks\.0\.attn\.q_norm\.weight"),
    "layer scale": ({"init_values": 0.1}, r"without a place: blocks\.0\.ls1\.gamma"),
    "norm before the blocks": ({"pre_norm": True}, r"without a place: norm_pre"),
    "further norms": ({"scale_mlp_norm": True}, r"without a place: blocks\.0\.mlp\.norm"),
    "no bias": ({"proj_bias": False}, r"missing: blocks\.0\.attn\.proj\.bias"),
    "another activation": ({"act_layer": "quick_gelu"}, "its activation is QuickGELU"),
    "parallel blocks": ({"name": "vit_small_patch16_18x2_224"}, r"without a place: blocks\.0\.attns"),
    "norms after branches": ({"name": "vit_base_patch16_rpn_224", "class_token": True}, "something else than plain"),
    "norm after the pooling": ({"fc_norm": True}, "without a place: fc_norm"),
    "pooled by attention": ({"pool": "map"}, "without a place: attn_pool"),
    "hybrid": ({"name": "vit_tiny_r_s16_p8_224", "patch_size": 1}, r"without a place: patch_embed\.backbone"),
}


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_their_vit_cannot_represent_is_refused(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    if settings.get("fc_norm"):
        model = timm.create_model("vit_base_patch16_224", img_size=32, global_pool="avg", num_classes=0, **ARGS)
        weights = Weights("vit_base_patch16_224", ARGS, model.state_dict(), (32, 32))
    else:
        weights = vit(classes=None, **settings)
    with pytest.raises(UserError, match=f"cannot be written as Hugging Face's ViT: .*{reason}") as caught:
        write_hf_folder(weights, tmp_path / "hf")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
