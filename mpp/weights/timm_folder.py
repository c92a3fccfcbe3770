"""Folders that timm loads: config.json and model.safetensors, in and out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mpp.system.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg
from torch import Tensor

from mpp.data.settings import DecodeOptions, Framing
from mpp.errors import UserError
from mpp.model.encoder import Encoder
from mpp.model.settings import ModelConfig
from mpp.system.files import whole_folder
from mpp.system.process import global_draws
from mpp.weights.base import Numerics, Weights, create, load
from mpp.weights.init_args import parse_init_args

HEAD_FILE = "head.safetensors"
"""A head that timm has no name for lies beside the model, which timm then loads headless."""
_OURS = "mpp"  # what config.json tells beside timm's own keys
_PLAIN = DecodeOptions()
_SET_BY_US = ("num_classes", "in_chans", "global_pool", "img_size", "fc_norm", "drop_path_rate")


def timm_state(encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's weights under timm's names, a 2-D position embedding written out as timm's table."""
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.vit.state_dict().items()}
    if encoder.position is not None:
        table = encoder.position().detach().float().cpu()
        if not encoder.vit.no_embed_class:  # then timm's table has rows for the class and register tokens too
            table = torch.cat([table.new_zeros(encoder.num_prefix_tokens, table.shape[1]), table])
        state["pos_embed"] = table[None].contiguous()
    return state


def encoder_weights(
    encoder: Encoder,
    config: ModelConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    reading: DecodeOptions,
    origin: str = "",
    init_args: Sequence[str] = (),
) -> Weights:
    """A pretrained encoder as weights. It is headless and gives mean-pooled patch tokens, since masked patch
    prediction never trains the class token; `mean` and `std` (0 to 1 scale) are those of its input, which `reading`
    makes of files. `init_args` is what `config` cannot say of the architecture."""
    args, numerics = parse_init_args(init_args)
    return Weights(
        config.name,
        model_args(config) | args,
        timm_state(encoder),
        config.image_hw,
        config.in_chans,
        mean,
        std,
        numerics=numerics,
        origin=origin,
        value_range=reading.value_range,
        background=reading.background,
    )


def model_args(config: ModelConfig) -> dict[str, Any]:
    """What timm must be told beside the name; a 2-D position embedding is a learned table by then."""
    told = {
        "patch_size": [config.patch_size[0], config.patch_size[-1]] if config.patch_size else None,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "pos_embed": "none" if config.pos_embed == "none" else None,
        "act_layer": None if config.act == "gelu" else config.act,
    }
    return {key: value for key, value in told.items() if value is not None}


def save_timm_folder(
    encoder: Encoder,
    config: ModelConfig,
    folder: Path,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    reading: DecodeOptions = _PLAIN,
) -> None:
    """Writes `folder` so that `timm.create_model(f"local-dir:{folder}", pretrained=True)` gives this encoder.

    See `encoder_weights`; the arguments are its.
    """
    write_timm_folder(encoder_weights(encoder, config, mean, std, reading, str(folder)), folder)


def write_timm_folder(weights: Weights, folder: Path) -> list[str]:
    """Writes config.json and model.safetensors; an earlier folder of that name is replaced once all is written.

    Returns:
        What timm alone will not know of these weights, in sentences; mpp reads it back from the same folder.

    Raises:
        UserError: weights that no timm model can hold, or no weights at all.
    """
    notes: list[str] = []
    if weights.state is None:
        raise UserError(f"{weights.origin or weights.name} has no weights to write")
    names = weights.classes if not weights.representation else None
    with global_draws():
        model = create(weights, num_classes=len(names or ()), plain=True)
    state = dict(weights.state)
    head = {name: value for name, value in state.items() if name.startswith("head.")} if weights.representation else {}
    load(
        model, {k: v for k, v in state.items() if k not in head}, weights.origin or str(folder), head=names is not None
    )
    ours: dict[str, Any] = {"numerics": asdict(weights.numerics)}
    if weights.reading.pixel_settings != DecodeOptions(weights.in_chans).pixel_settings:
        ours |= {"value_range": list(weights.value_range), "background": list(weights.background)}
    if weights.representation:
        ours |= {"representation": weights.representation, "classes": list(weights.classes or ())}
        notes.append(f"the head's hidden tanh layer is in {HEAD_FILE}, which timm does not read: it loads headless")
    units = weights.numerics.stem_units
    if units is not None:
        notes.append(f"timm has no hybrid with the stem units {list(units)}: only mpp reads this folder")
    elif weights.numerics != Numerics():
        notes.append(
            f"timm computes with other constants than the original, {weights.numerics}: expect small differences"
        )
    data_config = {
        "input_size": (weights.in_chans, *weights.image_hw),
        "interpolation": weights.interpolation,
        "crop_pct": weights.crop_pct,
        "crop_mode": weights.crop_mode,
        "mean": _per_channel(weights.mean, weights.in_chans),
        "std": _per_channel(weights.std, weights.in_chans),
    }
    told: dict[str, Any] = {_OURS: ours} | ({"label_names": list(names)} if names else {})
    with whole_folder(folder) as temporary:
        if units is not None:
            _save_for_mpp(model, weights, temporary, told | {"pretrained_cfg": data_config})
        else:
            # The name's default entry describes somebody else's weights.
            own = dict.fromkeys(("license", "url", "hf_hub_id", "test_input_size", "test_crop_pct")) | {"tag": "mpp"}
            model.pretrained_cfg = {**model.pretrained_cfg, **own}
            timm.models.save_for_hf(model, str(temporary), told, data_config=data_config, safe_serialization=True)
        if head:
            save_file({name: value.contiguous() for name, value in head.items()}, temporary / HEAD_FILE)
    return notes


def _save_for_mpp(model: Any, weights: Weights, folder: Path, told: Mapping[str, Any]) -> None:
    """The files of timm's `save_for_hf`, of a model that timm has no name for."""
    config = {
        "architecture": weights.name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": weights.pool,
        "model_args": {**weights.args, "img_size": list(weights.image_hw), "in_chans": weights.in_chans},
        **told,
    }
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_timm_folder(folder: Path) -> Weights:
    """What `write_timm_folder`, or timm itself, wrote.

    Raises:
        UserError: files that are missing, damaged or of another kind.
    """
    config = read_json(folder / "config.json")
    args = dict(config.get("model_args") or {})
    # timm's older folders have all of it in one.
    default: Mapping[str, Any] = (config.get("pretrained_cfg") or {}) if "pretrained_cfg" in config else config
    name = str(config.get("architecture", ""))
    if not timm.is_model(name):
        raise UserError(f"{folder / 'config.json'}: timm {timm.__version__} has no architecture {name!r}")
    size = default.get("input_size") or (3, 224, 224)
    side = args.get("img_size") or size[1:]
    height, width = (side, side) if isinstance(side, int) else side
    ours: Mapping[str, Any] = config.get(_OURS) or {}
    numerics: dict[str, Any] = dict(ours.get("numerics") or {})
    if numerics.get("stem_units") is not None:
        numerics["stem_units"] = tuple(numerics["stem_units"])
    state = read_tensors(folder, ("model.safetensors", "pytorch_model.bin"))
    channels = int(args.get("in_chans") or size[0])
    known = PretrainedCfg()
    # What a folder of timm's leaves out is as timm has it, which has no values but for colours.
    colours = _OURS not in config and channels == len(known.mean)
    usual = (known.mean, known.std) if colours else ((0.5,), (0.5,))
    weights = Weights(
        name,
        {key: value for key, value in args.items() if key not in _SET_BY_US},
        state,
        (int(height), int(width)),
        channels,
        tuple(default.get("mean") or usual[0]),
        tuple(default.get("std") or usual[1]),
        str(config.get("global_pool") or "avg"),
        _class_names(config),
        numerics=Numerics(**numerics),
        origin=str(folder),
        value_range=tuple(ours.get("value_range") or ()),
        background=tuple(ours.get("background") or (255,)),
        **timm_framing(default, folder / "config.json"),
    )
    if ours.get("representation"):
        head = read_tensors(folder, (HEAD_FILE,))
        classes = tuple(ours["classes"])
        weights = replace(weights, state={**state, **head}, classes=classes, representation=ours["representation"])
    return weights


def timm_framing(told: Mapping[str, Any], origin: str | Path) -> dict[str, Any]:
    """What a timm config says of evaluation, for `Weights`, with timm's own defaults.

    Raises:
        UserError: settings that timm has not, either.
    """
    known = PretrainedCfg()
    found = {key: told.get(key) or getattr(known, key) for key in ("crop_pct", "interpolation", "crop_mode")}
    try:
        Framing(**found)
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin}: {error}") from error
    return found


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Of the head; numbers where the folder has no names; None where there is no head."""
    count = int(config.get("num_classes") or 0)
    names = config.get("label_names") or config.get("labels")  # in older ones
    if isinstance(names, dict):
        names = [names.get(str(i), str(i)) for i in range(count)]
    if count and names and len(names) == count:
        return tuple(map(str, names))
    return tuple(map(str, range(count))) if count else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON ({error})"
        raise UserError(f"cannot read {path}: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it holds no object")
    return content


def read_tensors(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors in the first of these files that is there; nothing in them is ever run.

    Raises:
        UserError: none is there, or it is truncated or a pickle of something else than tensors.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds none of {', '.join(names)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise half a dozen kinds, depending on where the bytes end
        raise UserError(f"cannot read the weights {path}: truncated, or no file of plain tensors") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"cannot read the weights {path}: it holds something else than named tensors")
    return content


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values
