"""In from and out to folders of Hugging Face's ViT, without transformers.

config.json + model.safetensors + preprocessor_config.json <-> timm's VisionTransformer of the same shape
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import torch
from safetensors.torch import save_file
from torch import Tensor

from mpp.errors import UserError
from mpp.system.files import whole_folder
from mpp.system.process import global_draws
from mpp.weights.base import Numerics, Weights, create, load
from mpp.weights.hf_preprocessor import read_preprocessor, write_preprocessor
from mpp.weights.plain_vit import activation, extras
from mpp.weights.timm_folder import read_json, read_tensors

_SHOWN = 5  # names that a complaint lists
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_TIMM_EPS = 1e-6
# Of a block: timm's name, the name in every file that transformers writes, and the name in the modules of 5.x.
_BLOCK = [
    ("norm1", "layernorm_before", "layernorm_before"),
    ("attn.q", "attention.attention.query", "attention.q_proj"),
    ("attn.k", "attention.attention.key", "attention.k_proj"),
    ("attn.v", "attention.attention.value", "attention.v_proj"),
    ("attn.proj", "attention.output.dense", "attention.o_proj"),
    ("norm2", "layernorm_after", "layernorm_after"),
    ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
    ("mlp.fc2", "output.dense", "mlp.fc2"),
]
_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "head": "classifier",
}
_FROM_HF = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_BLOCK_FROM_HF = {name: ours for ours, *theirs in _BLOCK for name in theirs}
_LEFT_OUT = ("pooler.", "decoder.", "embeddings.mask_token")


def read_hf_folder(folder: Path) -> Weights:
    """The ViT of a folder as transformers' `save_pretrained` writes it: config.json with model_type "vit", and weights.

    ViTForImageClassification keeps its head, which reads the class token. ViTModel is headless: its pooler is ignored
    and its class token read, unless `write_hf_folder` noted another pooling. Of ViTForMaskedImageModeling, decoder and
    mask token are ignored, and the patch tokens averaged. Weights may be model.safetensors, pytorch_model.bin
    (tensors only: a pickle that would run code is refused), or either in shards with an index.

    Raises:
        UserError: a file that is missing, broken or of something else; names that are missing or unknown are listed.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind != "vit":
        raise UserError(f"{folder}: model_type {kind!r} in config.json is not 'vit', the only one that is read")
    act = config.get("hidden_act", "gelu")
    if act not in _ACTIVATIONS:
        raise UserError(f"{folder}: hidden_act {act!r} is not one of {', '.join(_ACTIVATIONS)}")
    theirs = {name.removeprefix("vit."): tensor for name, tensor in _tensors(folder).items()}
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
        numerics=Numerics(norm_eps=None if eps == _TIMM_EPS else eps),
        origin=str(folder),
        **settings,
    )


def write_hf_folder(weights: Weights, folder: Path) -> list[str]:
    """Writes a folder that transformers' `from_pretrained` loads, in float32.

    ViTForImageClassification where there is a linear head that reads the class token; else ViTModel, without pooler
    (transformers says so: load it with `add_pooling_layer=False`).

    Returns:
        What was left out, in sentences.

    Raises:
        UserError: a folder that is not empty; a model that Hugging Face's ViT cannot represent, with the reason.
    """
    origin = weights.origin or weights.name
    if weights.state is None:
        raise UserError(f"{origin} has no weights to write; train or open some first")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not empty; move it away or choose another folder")
    classes = written_classes(weights)
    model = None
    if not any(name.startswith("patch_embed.backbone.") for name in weights.state):
        with global_draws():
            model = create(weights, num_classes=len(classes or ()), plain=True)
    obstacle = "it is a hybrid" if model is None else extras(model)
    if model is None or obstacle:
        raise UserError(f"{origin} cannot be written as Hugging Face's ViT: {obstacle}; write a timm folder or ONNX")
    load(model, weights.state, origin, head=classes is not None)
    state = _to_hf(model.state_dict(), "vit." if classes else "")
    preprocessor, notes = write_preprocessor(weights)
    with whole_folder(folder) as temporary:
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, content in (
            ("config.json", _config(weights, model, classes)),
            ("preprocessor_config.json", preprocessor),
        ):
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if weights.classes is None or classes is not None:
        return notes
    linear, reads_token = weights.representation is None, weights.pool == "token"
    reads = "the class token" if reads_token else f"tokens pooled by {weights.pool!r}"
    reads += "" if linear else " and has a hidden layer"
    flags = ([] if reads_token else ["--model.pool token"]) + ([] if linear else ["--model.head linear"])
    return [
        *notes,
        f"the head of {len(weights.classes)} classes was left out: it reads {reads}, "
        "and Hugging Face's ViT has only a linear head on the class token; "
        f"for one that fits, fine-tune with {' '.join(flags)}",
    ]


def written_classes(weights: Weights) -> tuple[str, ...] | None:
    """Classes of the head that `write_hf_folder` writes: it must be linear and read the class token. None: no head."""
    return weights.classes if weights.representation is None and weights.pool == "token" else None


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of the folder, shards put together."""
    files = ("model.safetensors", "pytorch_model.bin")
    index = next((folder / f"{name}.index.json" for name in files if (folder / f"{name}.index.json").is_file()), None)
    if index is None or any((folder / name).is_file() for name in files):
        return read_tensors(folder, files)
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or any(Path(str(name)).name != name for name in shards.values()):
        raise UserError(f"cannot read {index}: its weight_map does not name files of this folder")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        tensors |= read_tensors(folder, (name,))
    return tensors


def _settings(config: dict[str, Any], act: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's arguments, and the size of the input."""
    dim, mlp = int(config.get("hidden_size", 768)), int(config.get("intermediate_size", 3072))
    ratio = mlp / dim
    if int(dim * ratio) != mlp:  # timm rounds down, and so may the division have been
        ratio = (mlp + 0.5) / dim
    patch, size = _pair(config.get("patch_size", 16)), _pair(config.get("image_size", 224))
    args = {
        "act_layer": act,
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "embed_dim": dim,
        "depth": int(config.get("num_hidden_layers", 12)),
        "num_heads": int(config.get("num_attention_heads", 12)),
        "mlp_ratio": ratio,
    }
    if not config.get("qkv_bias", True):
        args["qkv_bias"] = False
    return args, {"image_hw": size, "in_chans": int(config.get("num_channels", 3))}


def _pair(value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, list) else (value, value)
    return int(height), int(width)


def _classes(config: dict[str, Any], count: int, folder: Path) -> tuple[str, ...]:
    told = config.get("id2label")
    if told is None:  # transformers leaves out its own default
        return tuple(f"LABEL_{i}" for i in range(count))
    names = {int(i): str(name) for i, name in told.items()}
    if sorted(names) != list(range(count)):
        raise UserError(f"{folder}: id2label in config.json names {len(names)} classes, the classifier has {count}")
    return tuple(names[i] for i in range(count))


def _from_hf(theirs: dict[str, Tensor], depth: int, folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    unexpected = []
    for name, tensor in theirs.items():
        if name.startswith(_LEFT_OUT):
            continue
        stem, _, leaf = name.rpartition(".")
        if name in _FROM_HF:
            state[_FROM_HF[name]] = tensor
        elif stem in _FROM_HF:
            state[f"{_FROM_HF[stem]}.{leaf}"] = tensor
        elif (found := re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)", stem)) and found[2] in _BLOCK_FROM_HF:
            state[f"blocks.{found[1]}.{_BLOCK_FROM_HF[found[2]]}.{leaf}"] = tensor
        else:
            unexpected.append(name)
    if unexpected:
        shown = ", ".join(unexpected[:_SHOWN]) + (", ..." if len(unexpected) > _SHOWN else "")
        raise UserError(f"{folder}: {len(unexpected)} weights that a ViT does not have: {shown}")
    for i in range(depth):
        for leaf in ("weight", "bias"):
            names = [f"blocks.{i}.attn.{part}.{leaf}" for part in "qkv"]
            if all(name in state for name in names):
                state[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat([state.pop(name) for name in names])
    return {name: tensor.float().contiguous() for name, tensor in state.items()}


def _to_hf(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    in_block = {ours: theirs for ours, theirs, _ in _BLOCK}
    written: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if stem == "head":
            written[f"classifier.{leaf}"] = tensor
        elif name in _OUTSIDE:
            written[prefix + _OUTSIDE[name]] = tensor
        elif stem in _OUTSIDE:
            written[f"{prefix}{_OUTSIDE[stem]}.{leaf}"] = tensor
        else:
            _, i, inside = stem.split(".", 2)
            parts = {f"attn.{x}": t for x, t in zip("qkv", tensor.chunk(3), strict=True)}
            for part, rows in (parts if inside == "attn.qkv" else {inside: tensor}).items():
                written[f"{prefix}encoder.layer.{i}.{in_block[part]}.{leaf}"] = rows
    return {name: tensor.float().cpu().clone() for name, tensor in written.items()}  # safetensors shares no memory


def _config(weights: Weights, model: Any, classes: tuple[str, ...] | None) -> dict[str, Any]:
    block, patch = model.blocks[0], model.patch_embed.patch_size
    height, width = weights.image_hw
    names = dict(enumerate(classes or ()))
    return {
        "architectures": ["ViTForImageClassification" if classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu" if activation(block.mlp.act) == "gelu" else "gelu_pytorch_tanh",
        "layer_norm_eps": weights.numerics.norm_eps or block.norm1.eps,
        "image_size": height if height == width else [height, width],
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "encoder_stride": patch[0],
        "num_channels": weights.in_chans,
        "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "mpp_pool": weights.pool,  # transformers keeps what it does not know
    } | ({"id2label": names, "label2id": {name: i for i, name in names.items()}} if classes else {})
