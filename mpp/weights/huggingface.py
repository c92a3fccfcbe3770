"""Folders of Hugging Face's ViT, in and out, without transformers.

config.json + model.safetensors + preprocessor_config.json <-> timm's VisionTransformer of the same shape
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpp.errors import UserError
from mpp.system.files import whole_folder
from mpp.system.process import global_draws
from mpp.weights.base import Weights, build, list_names
from mpp.weights.hf_preprocessor import read_preprocessor, write_preprocessor
from mpp.weights.numerics import Numerics, activation, mlp_ratio
from mpp.weights.timm_folder import read_json, read_tensors

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_TIMM_EPS = 1e-6
_NAMES = {  # timm's name of a layer or parameter: Hugging Face's, in the files that transformers writes
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "head": "classifier",
    "blocks.*.norm1": "encoder.layer.*.layernorm_before",
    "blocks.*.attn.q": "encoder.layer.*.attention.attention.query",
    "blocks.*.attn.k": "encoder.layer.*.attention.attention.key",
    "blocks.*.attn.v": "encoder.layer.*.attention.attention.value",
    "blocks.*.attn.proj": "encoder.layer.*.attention.output.dense",
    "blocks.*.norm2": "encoder.layer.*.layernorm_after",
    "blocks.*.mlp.fc1": "encoder.layer.*.intermediate.dense",
    "blocks.*.mlp.fc2": "encoder.layer.*.output.dense",
}
_FROM_HF = {theirs: ours for ours, theirs in _NAMES.items()}
_LEFT_OUT = ("pooler.", "decoder.", "embeddings.mask_token")


def read_hf_folder(folder: Path) -> Weights:
    """Reads a ViT as transformers' `save_pretrained` writes it: config.json with model_type "vit", and weights.

    ViTForImageClassification keeps its head, which reads the class token. ViTModel is headless: its pooler is ignored
    and its class token read, unless `write_hf_folder` noted another pooling. Of ViTForMaskedImageModeling, decoder and
    mask token are ignored, and the patch tokens averaged. Weights may be model.safetensors or pytorch_model.bin
    (tensors only: a pickle that would run code is refused).

    Raises:
        UserError: a file that is missing, broken or of something else; unknown names are listed.
    """
    config = read_json(folder / "config.json")
    act = config.get("hidden_act", "gelu")
    if act not in _ACTIVATIONS:
        raise UserError(f"{folder}: hidden_act {act!r} is not one of {', '.join(_ACTIVATIONS)}")
    tensors = read_tensors(folder, ("model.safetensors", "pytorch_model.bin"))
    theirs = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    has_decoder = any(name.startswith("decoder.") for name in theirs)
    has_head = "classifier.weight" in theirs
    try:
        args, settings = _settings(config, _ACTIVATIONS[act])
        settings |= read_preprocessor(folder, settings["image_hw"], settings["in_chans"])
        classes = _classes(config, theirs["classifier.weight"].shape[0], folder) if has_head else None
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"{folder}: a setting that cannot be used: {str(error).splitlines()[0]}") from error
    eps = float(config.get("layer_norm_eps", 1e-12))
    return Weights(
        name="vit_base_patch16_224",
        args=args,
        state=_from_hf(theirs, args["depth"], folder),
        pool="token" if has_head else config.get("mpp_pool", "avg" if has_decoder else "token"),
        classes=classes,
        multi_label=config.get("problem_type") == "multi_label_classification",
        numerics=Numerics(norm_eps=None if eps == _TIMM_EPS else eps),
        origin=str(folder),
        **settings,
    )


def write_hf_folder(weights: Weights, folder: Path) -> list[str]:
    """Writes a folder that transformers' `from_pretrained` loads, in float32.

    ViTForImageClassification with a linear head that reads the class token; else ViTModel, without pooler
    (transformers says so: load it with `add_pooling_layer=False`).

    Returns what was left out, in sentences. Raises UserError for a model that Hugging Face's ViT cannot represent.
    """
    classes = written_classes(weights)
    with global_draws():
        model: Any = build(weights, classes=None if classes else (), attention="sdpa").eval()
    state, without_name = _to_hf(model.state_dict(), "vit." if classes else "")
    if without_name:
        raise _refusal(weights, list_names({"weights without a place": without_name}))
    if not model.has_class_token or model.no_embed_class:
        raise _refusal(weights, "it has no class token with a position embedding")
    act = model.blocks[0].mlp.act
    if activation(act) is None:
        raise _refusal(weights, f"its activation is {type(act).__name__}")
    preprocessor, notes = write_preprocessor(weights)
    files = {"config.json": _config(weights, model, classes), "preprocessor_config.json": preprocessor}
    with whole_folder(folder) as temporary:
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _check_same(weights, model, temporary)
    if weights.classes is not None and classes is None:
        reads, flags = "the class token", []
        if weights.pool != "token":
            reads, flags = f"tokens pooled by {weights.pool!r}", ["--model.pool token"]
        if weights.representation is not None:
            reads, flags = f"{reads} and has a hidden layer", [*flags, "--model.head linear"]
        notes.append(
            f"the head of {len(weights.classes)} classes was left out: it reads {reads}, and Hugging Face's ViT has "
            f"only a linear head on the class token; for one that fits, fine-tune with {' '.join(flags)}"
        )
    return notes


def written_classes(weights: Weights) -> tuple[str, ...] | None:
    """Classes of the head that `write_hf_folder` writes: it must be linear and read the class token. None: no head."""
    return weights.classes if weights.representation is None and weights.pool == "token" else None


def _refusal(weights: Weights, reason: str) -> UserError:
    return UserError(f"{weights.label} cannot be written as Hugging Face's ViT: {reason}; write a timm folder or ONNX")


def _check_same(weights: Weights, model: nn.Module, folder: Path) -> None:
    """Reads the folder back and refuses it if the plain ViT that it describes computes something else."""
    images = torch.randn(1, weights.in_chans, *weights.image_hw, generator=torch.Generator().manual_seed(0))
    try:
        with global_draws(), torch.no_grad():
            expected, found = model(images), build(read_hf_folder(folder), attention="sdpa").eval()(images)
    except UserError as error:
        raise _refusal(weights, str(error).partition(": ")[2]) from error
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * max(1.0, float(expected.abs().max()))):
        raise _refusal(weights, "its blocks compute something else than plain ones")


def _settings(config: dict[str, Any], act: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's arguments, and the size of the input."""
    dim, size = int(config.get("hidden_size", 768)), config.get("image_size", 224)
    height, width = size if isinstance(size, list) else (size, size)
    patch = config.get("patch_size", 16)
    args = {
        "act_layer": act,
        "patch_size": patch[0] if isinstance(patch, list) and len({*patch}) == 1 else patch,
        "embed_dim": dim,
        "depth": int(config.get("num_hidden_layers", 12)),
        "num_heads": int(config.get("num_attention_heads", 12)),
        "mlp_ratio": mlp_ratio(dim, int(config.get("intermediate_size", 3072))),
    } | ({} if config.get("qkv_bias", True) else {"qkv_bias": False})
    return args, {"image_hw": (int(height), int(width)), "in_chans": int(config.get("num_channels", 3))}


def _classes(config: dict[str, Any], count: int, folder: Path) -> tuple[str, ...]:
    labels = config.get("id2label")
    if labels is None:  # transformers leaves out its own default
        return tuple(f"LABEL_{i}" for i in range(count))
    names = {int(i): str(name) for i, name in labels.items()}
    if sorted(names) != list(range(count)):
        raise UserError(f"{folder}: id2label in config.json names {len(names)} classes, the classifier has {count}")
    return tuple(names[i] for i in range(count))


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    """The other library's name of a parameter; None if it has none."""
    for layer, leaf in ((name, ""), (name.rpartition(".")[0], name.rpartition(".")[2])):
        number = re.search(r"[.](\d+)[.]", layer)
        pattern = re.sub(r"[.]\d+[.]", ".*.", layer, count=1)
        if pattern in names:
            other = names[pattern].replace("*", number[1] if number else "")
            return f"{other}.{leaf}" if leaf else other
    return None


def _from_hf(theirs: dict[str, Tensor], depth: int, folder: Path) -> dict[str, Tensor]:
    wanted = {name: tensor.float() for name, tensor in theirs.items() if not name.startswith(_LEFT_OUT)}
    if unexpected := [name for name in wanted if _renamed(name, _FROM_HF) is None]:
        raise UserError(f"{folder}: {list_names({'weights that a ViT does not have': unexpected})}")
    state = {str(_renamed(name, _FROM_HF)): tensor for name, tensor in wanted.items()}
    for i in range(depth):
        for leaf in ("weight", "bias"):
            names = [f"blocks.{i}.attn.{part}.{leaf}" for part in "qkv"]
            if all(name in state for name in names):
                state[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat([state.pop(name) for name in names])
    return state


def _to_hf(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under Hugging Face's names, and timm's names of those that have none there."""
    written: dict[str, Tensor] = {}
    without_name = []
    for name, tensor in state.items():
        parts = {name: tensor}
        if ".attn.qkv." in name:
            parts = {name.replace(".qkv.", f".{x}."): rows for x, rows in zip("qkv", tensor.chunk(3), strict=True)}
        for ours, rows in parts.items():
            theirs = _renamed(ours, _NAMES)
            if theirs is None:
                without_name.append(name)
            else:
                theirs = theirs if theirs.startswith("classifier.") else prefix + theirs
                written[theirs] = rows.float().cpu().clone()  # safetensors shares no memory
    return written, without_name


def _config(weights: Weights, model: Any, classes: tuple[str, ...] | None) -> dict[str, Any]:
    block, patch = model.blocks[0], model.patch_embed.patch_size
    height, width = weights.image_hw
    names = dict(enumerate(classes or ()))
    head: dict[str, Any] = {"id2label": names, "label2id": {name: i for i, name in names.items()}} if classes else {}
    head |= {"problem_type": "multi_label_classification"} if classes and weights.multi_label else {}
    return {
        "architectures": ["ViTForImageClassification" if classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu" if activation(block.mlp.act) == "gelu" else "gelu_pytorch_tanh",
        "layer_norm_eps": block.norm1.eps,
        "image_size": height if height == width else [height, width],
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "encoder_stride": patch[0],
        "num_channels": weights.in_chans,
        "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "mpp_pool": weights.pool,  # transformers keeps what it does not know
    } | head
