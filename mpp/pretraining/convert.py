"""Converts weights (whatever `open_weights` reads, or a checkpoint) to a timm folder, a Hugging Face folder or ONNX."""

import sys
from dataclasses import replace
from pathlib import Path

from mpp.errors import UserError
from mpp.model.encoder import check_patches
from mpp.pretraining.restore import weights_or_checkpoint
from mpp.pretraining.settings import ConvertRecipe
from mpp.weights.base import build
from mpp.weights.huggingface import write_hf_folder, written_classes
from mpp.weights.onnx import write_onnx
from mpp.weights.timm_folder import HEAD_FILE, write_timm_folder


def convert(config: ConvertRecipe) -> int:
    """Converts as `config` says and prints the result. Returns 0.

    Raises:
        UserError: weights that cannot be read or that the other form cannot hold; nothing is written then.
    """
    form = config.format if config.format != "auto" else ("onnx" if config.out.endswith(".onnx") else "timm")
    out = Path(config.out).expanduser()
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"--out {out} exists; choose another or remove it")
    weights = weights_or_checkpoint(config.init)
    if weights.state is None:
        raise UserError(f"--init {config.init} has no weights to convert")
    if config.img_size:
        image_hw = (config.img_size[0], config.img_size[-1])
        model = build(weights, image_hw=image_hw, attention="sdpa")
        check_patches(model, image_hw, "img_size")
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        weights = replace(weights, state=state, image_hw=image_hw)
    notes: list[str] = []
    classes = weights.classes
    if form == "onnx":
        write_onnx(weights, out)
        example = f"onnxruntime.InferenceSession({str(out)!r})"
    elif form == "hf":
        notes = write_hf_folder(weights, out)
        classes = written_classes(weights)
        example = f"transformers.AutoModel.from_pretrained({str(out)!r})"
    else:
        notes = write_timm_folder(weights, out)
        example = f'timm.create_model("local-dir:{out}", pretrained=True)'
        if weights.numerics.stem_units is not None:  # timm cannot build it
            example = f"mpp.weights.opening.open_weights({str(out)!r})"
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    head = f"{len(classes)} classes" if classes else "no head"
    if classes and weights.representation and form == "timm":
        head += f" (their head in {HEAD_FILE})"
    size = "x".join(map(str, weights.image_hw))
    print(f"{weights.name}, {size} pixels, {head} -> {out}\n{example}")
    return 0
