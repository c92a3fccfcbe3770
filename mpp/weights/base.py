"""A timm architecture with its weights: every way in ends in one, every way out starts from one.

open_weights(spec) -> Weights          (opening.py: a run, a timm folder or name, a Hugging Face folder, a JAX .npz)
build(weights, classes=("a", "b"))     a module that computes what the original computes: images -> logits
write_timm_folder(weights, folder)     (timm_folder.py, huggingface.py, onnx.py: the ways out)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import timm
import torch
from jaxtyping import Float
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mpp.data.settings import MAX_IMAGE_MB, DecodeOptions, Framing
from mpp.errors import UserError
from mpp.model.attention import Attention, use_kernel
from mpp.model.encoder import is_eva, is_vit, similar_names
from mpp.model.kernel_choice import choose_kernel, task_of
from mpp.model.positions import resample_table
from mpp.system.process import global_draws, without_warnings
from mpp.weights.numerics import Numerics, create_hybrid, use_original_stem

_POOLINGS = ("avg", "avgmax", "max", "token")  # that work on tokens after the last norm


@dataclass(frozen=True, eq=False)
class Weights:
    """A timm architecture, its weights under timm's names, and the input that they are for."""

    name: str
    """timm's name of the architecture, without a tag."""
    args: Mapping[str, Any]
    """For timm.create_model, JSON values only; not num_classes, in_chans, global_pool, img_size or drop rates."""
    state: Mapping[str, Tensor] | None
    """Weights under timm's names, head included if `classes` is given. None: freshly initialised."""
    image_hw: tuple[int, int]
    """Input height and width in pixels."""
    in_chans: int = 3
    mean: tuple[float, ...] = (0.5,)
    """Of the input on a 0 to 1 scale, one number or one per channel."""
    std: tuple[float, ...] = (0.5,)
    pool: str = "avg"
    """timm's global_pool. Of ViTs and Eva: avg (mean of the patches), token (the class token), or timm's others."""
    classes: tuple[str, ...] | None = None
    """Of the head, in its order; None: there is no head."""
    representation: int | None = None
    """Width of the hidden tanh layer of the head (the paper's pre-training head, JAX's pre_logits); None: linear."""
    numerics: Numerics = field(default=Numerics())
    origin: str = ""
    """Where it was opened from."""
    value_range: tuple[float, ...] = ()
    """Of the image files (see `DecodeOptions`)."""
    background: tuple[int, ...] = (255,)
    """Of the image files, too."""
    crop_pct: float = 1.0
    """Of evaluation (see `Framing`)."""
    interpolation: str = "bicubic"
    """Of evaluation, too."""
    crop_mode: str = "center"
    """Of evaluation, too."""
    multi_label: bool = False
    """Whether an image may have several of the classes, or none: each has a sigmoid, there is no softmax."""
    max_image_mb: int = MAX_IMAGE_MB
    """Limit of the images that are read for these weights: a setting of the reader, not of the weights."""

    @property
    def label(self) -> str:
        """The weights' name in error messages."""
        return self.origin or self.name

    def untrained(self) -> "Weights":
        """The same architecture without weights and head, to be initialised afresh."""
        return replace(
            self, state=None, classes=None, multi_label=False, representation=None, origin=f"random:{self.origin}"
        )

    @property
    def reading(self) -> DecodeOptions:
        """How files become the pixels that `mean` and `std` are for."""
        return DecodeOptions(self.in_chans, self.value_range, self.background, self.max_image_mb * 10**6)

    @property
    def framing(self) -> Framing:
        """How images are brought to the input size for evaluation; timm fills borders with the mean."""
        fill = tuple(round(255 * mean) for mean in self.mean) if self.crop_mode == "border" else (0,)
        return Framing(self.crop_pct, self.interpolation, self.crop_mode, fill)


class TanhHead(nn.Module):
    """The paper's pre-training head, an MLP with one hidden tanh layer (section 3.1); JAX's `pre_logits` and `head`."""

    def __init__(self, in_features: int, representation: int, num_classes: int) -> None:
        super().__init__()
        self.pre_logits = nn.Linear(in_features, representation)
        self.fc = nn.Linear(representation, num_classes)

    def representation(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b r"]:
        """The input of the last layer."""
        return self.pre_logits(x).tanh()

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        return self.fc(self.representation(x))


def build(
    weights: Weights,
    *,
    classes: tuple[str, ...] | None = None,
    representation: int | None = None,
    pool: str | None = None,
    image_hw: tuple[int, int] | None = None,
    drop_path: float = 0.0,
    attention: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The timm model with the weights in it, in training mode like every new module.

    Its `forward` gives logits (B, K) for normalised images (B, C, H, W) with a head, else pooled features (B, D).
    Fresh weights come from torch's global CPU generator.

    Args:
        classes: of a new head, zero-initialised (appendix B.1.1); None keeps the head of the weights; () drops it.
        representation: width of the new head's hidden tanh layer; 0: the encoder's; None: a linear head.
        pool: instead of the weights' own.
        image_hw: another input size; position embeddings are resampled (section 3.2, "Fine-tuning").
        attention: kernel for ViTs: auto, xformers, sdpa, explicit; see `settle_kernel` for the fastest.
        dtype: type that attention will be computed in.

    Raises:
        UserError: names or shapes that do not fit (they are listed), a size or pooling that the model cannot have.
    """
    keep_head = classes is None and weights.classes is not None
    if classes is None:
        classes, representation = weights.classes or (), weights.representation
    size = image_hw or weights.image_hw
    model = create(weights, num_classes=len(classes), pool=pool, image_hw=size, drop_path=drop_path)
    if classes and representation is not None:
        if not isinstance(model, VisionTransformer):
            raise UserError(f"{weights.name} is not a ViT and takes no hidden layer in its head; leave it out")
        width: int = model.num_features
        model.set_submodule("head", TanhHead(width, representation or width, len(classes)))
    if weights.state is not None:
        if isinstance(model, VisionTransformer):
            load(model, resampled(weights.state, weights, model), weights.label, head=keep_head)
        elif size == weights.image_hw:
            load(model, weights.state, weights.label, head=keep_head)
        else:
            _load_resized(model, weights, size, head=keep_head)
    if classes and not keep_head:
        _zero_head(model)
    device = torch.device(device)
    if task := task_of(model, 0, False, device, dtype):
        use_kernel(model, choose_kernel(attention, task))
    return model.to(device)


def create(
    weights: Weights,
    *,
    num_classes: int = 0,
    pool: str | None = None,
    image_hw: tuple[int, int] | None = None,
    drop_path: float = 0.0,
    plain: bool = False,
) -> Any:
    """The freshly initialised timm model that the weights are for, with a linear head of `num_classes` (0: none).

    It has the numerics of the weights' original, or if `plain`, for writing out, timm's own attention and constants.

    Raises:
        UserError: an unknown name, arguments that timm refuses, a pooling that these weights cannot have.
    """
    name, pool, numerics = weights.name, pool or weights.pool, weights.numerics
    if not timm.is_model(name):
        raise UserError(f"timm {timm.__version__} has no model {name!r}; near it: {similar_names(name)}")
    settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": weights.in_chans, **weights.args}
    if drop_path:
        settings["drop_path_rate"] = drop_path
    vit = is_vit(name)
    if vit or is_eva(name):
        settings["global_pool"] = pool
        norm_after_pooling = weights.state is not None and "fc_norm.weight" in weights.state
        if norm_after_pooling and pool != weights.pool:
            raise UserError(f"{weights.label} has its last norm after pooling by {weights.pool}; keep that")
        if not norm_after_pooling and pool in _POOLINGS and (vit or weights.state is not None):
            # The last norm stays where the class token needs it: before the pooling.
            settings["fc_norm" if vit else "use_fc_norm"] = False
    elif pool != weights.pool:
        raise UserError(f"{name} is not a ViT: it pools by {weights.pool} and cannot by {pool}")
    if vit or timm.get_pretrained_cfg(name).fixed_input_size:  # pyright: ignore[reportOptionalMemberAccess]
        settings["img_size"] = image_hw or weights.image_hw
    if vit and not plain:
        settings["attn_layer"] = Attention
    try:
        if numerics.stem_units is not None:
            model: Any = create_hybrid(name, numerics.stem_units, **settings)
        else:
            try:
                model = timm.create_model(name, **settings)
            except TypeError:  # some ViTs have blocks of their own kind, and keep timm's attention
                if settings.pop("attn_layer", None) is None:
                    raise
                model = timm.create_model(name, **settings)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        shown = {k: v for k, v in settings.items() if k not in ("attn_layer", "fc_norm", "use_fc_norm", "num_classes")}
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"timm cannot build {name!r} with {shown}: {reason}") from error
    if numerics.original_stem and not plain:
        use_original_stem(model)
    if numerics.norm_eps is not None and not plain:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = numerics.norm_eps
    return model


def load(model: nn.Module, state: Mapping[str, Tensor], label: str, *, head: bool) -> None:
    """Copies the weights into the model, without the `head` if it is False; error messages call them `label`.

    Raises:
        UserError: listing the missing and the unexpected names, and the shapes that differ.
    """
    prefixes = classifier_names(model)
    wanted = {k: v for k, v in model.state_dict().items() if head or not k.startswith(prefixes)}
    given = {k: v for k, v in state.items() if head or not k.startswith(prefixes)}
    if problems := list_names(misfits(wanted, given)):
        raise UserError(f"{label}: the weights do not fit {type(model).__name__} ({problems})")
    model.load_state_dict(given, strict=False)


def misfits(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of tensors that are missing, unexpected, and of another shape, by these words."""
    both = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    return {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": [f"{name} {tuple(given[name].shape)} for {tuple(wanted[name].shape)}" for name in both],
    }


def list_names(names: Mapping[str, list[str]]) -> str:
    """Names by their kind of problem, counted and the first five listed; empty if there are none."""
    return "; ".join(
        f"{len(them)} {kind}: {', '.join([*them[:5], '...'] if len(them) > 5 else them)}"
        for kind, them in names.items()
        if them
    )


def _load_resized(model: Any, weights: Weights, image_hw: tuple[int, int], *, head: bool) -> None:
    """Copies the weights into a model of that other size, which is no ViT: as they are, or resampled by timm."""
    state = weights.state or {}
    try:
        return load(model, state, weights.label, head=head)
    except UserError:  # tables of positions, perhaps
        pass
    with global_draws():
        own = create(weights, num_classes=model.num_classes)
    load(own, state, weights.label, head=head)
    settings: dict[str, Any] = {"img_size": image_hw}
    if isinstance(model, SwinTransformer):  # timm would scale the windows, too
        stages: Any = model.layers
        settings["window_size"] = [stage.blocks[0].window_size for stage in stages]
    try:
        with without_warnings(category=UserWarning):  # torch's, about how timm interpolates
            own.set_input_size(**settings)
        return load(model, own.state_dict(), weights.label, head=head)
    except (AssertionError, AttributeError, RuntimeError, TypeError, UserError, ValueError) as error:
        (height, width), (rows, columns) = weights.image_hw, image_hw
        raise UserError(
            f"{weights.label} is for images of {height} x {width} pixels, and timm cannot make {weights.name} take "
            f"{rows} x {columns}: leave out --img-size (in fine-tuning --model.img-size)"
        ) from error


def resampled(state: Mapping[str, Tensor], weights: Weights, vit: Any) -> dict[str, Tensor]:
    """The state with its position embeddings for the grid of the model (section 3.2, "Fine-tuning").

    Raises UserError for a table that is not for the weights' own size.
    """
    table = state.get("pos_embed")
    if table is None or vit.pos_embed is None:
        return dict(state)
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    embed, (rows, columns) = vit.patch_embed, weights.image_hw
    if hasattr(embed, "backbone"):  # its padding decides, as timm finds out, too
        embed.backbone.eval()
        with torch.no_grad():
            maps = embed.backbone(vit.pos_embed.new_zeros(1, vit.in_chans, rows, columns))
        embed.backbone.train()
        rows, columns = (maps[-1] if isinstance(maps, list | tuple) else maps).shape[-2:]
    old, new = (rows // embed.patch_size[0], columns // embed.patch_size[1]), embed.grid_size
    count = table.shape[1] - prefix
    if old[0] * old[1] != count:
        raise UserError(f"{weights.label}: {count} position embeddings are not the {old[0]} x {old[1]} of its patches")
    if old != new:
        table = torch.cat([table[:, :prefix], resample_table(table[:, prefix:], old, new)], dim=1)
    return {**state, "pos_embed": table}


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of the classification head's parameters: `head.`, `fc.`, `head.fc.`."""
    known: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ((known,) if isinstance(known, str) else known))


def _zero_head(model: Any) -> None:
    """Zeroes the last layer of the head, so that a new head says nothing before it has learnt (appendix B.1.1)."""
    modules = dict(model.named_modules())
    if isinstance(modules.get("head"), TanhHead):
        layers = [modules["head.fc"]]
    else:  # by name: a model may have several, and its `get_classifier` gives one of them, or a norm before it
        names = [prefix.removesuffix(".") for prefix in classifier_names(model)]
        layers = [modules[name] for name in names if name in modules]
    for layer in layers or [model.get_classifier()]:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
