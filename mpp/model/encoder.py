"""The encoder, a timm VisionTransformer by its timm name, opened at one seam, and a decoder of its kind.

`embed(images)` gives the patch tokens before position embeddings; `encode(tokens)` adds class token and positions and
runs the blocks. What happens in between (the corruption) need not know the inside of the encoder.
This is the only file that knows timm's private names.
"""

import copy
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import mpp.system.timm_import  # noqa: F401

# isort: split
import timm
import torch
from jaxtyping import Float, Int
from timm.layers.attention import Attention as TimmAttention
from timm.layers.drop import DropPath
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn
from torch.nn import functional as F

from mpp.errors import UserError
from mpp.model.attention import Attention, Block, attention_weights, run_blocks, take, use_kernel
from mpp.model.kernel_choice import choose_kernel, task_of
from mpp.model.positions import build_position
from mpp.model.settings import ModelConfig
from mpp.system.meta_device import building_on, on_meta


class Encoder(nn.Module):
    """A timm VisionTransformer with the seam between patch embedding and blocks.

    Attributes:
        vit: the timm model, without head.
        grid: rows and columns of patches.
        patch: height and width in pixels of the image area behind one token.
    """

    def __init__(self, vit: VisionTransformer, position: nn.Module | None = None) -> None:
        super().__init__()
        self.vit: Any = vit  # its blocks and norms are typed as bare modules
        self.position = position
        rows, columns = vit.patch_embed.grid_size
        height, width = vit.patch_embed.img_size
        self.grid: tuple[int, int] = (rows, columns)
        self.image_hw: tuple[int, int] = (height, width)
        self.patch: tuple[int, int] = (height // rows, width // columns)
        self.in_chans: int = vit.in_chans
        self.embed_dim: int = vit.embed_dim
        self.num_prefix_tokens: int = vit.num_prefix_tokens

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches dim"]:
        """Patch tokens of normalised images, before position embeddings, rows first (equation 1 without E_pos)."""
        tokens = self.vit.patch_embed(images)
        return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens

    def encode(
        self,
        tokens: Float[Tensor, "batch patches dim"],
        at: Int[Tensor, "batch k"] | None = None,
        mask_block: int = 0,
        return_all: bool = False,
    ) -> Float[Tensor, "batch tokens dim"]:
        """All tokens after the last block and LayerNorm (equations 1 to 4); `num_prefix_tokens` come first.

        Args:
            tokens: of `embed`.
            at: patches to return, in this order; of the others a plain last block computes keys and values only.
            mask_block: block before which the patches `at` enter, positions included; earlier blocks run without them.
            return_all: return all tokens in spite of `at`, for a decoder. `mask_block` may then be the number of
                blocks: the patches `at` are returned as they entered.

        Raises:
            ValueError: a `mask_block` after which no block is left.
        """
        x, blocks = self._add_positions(tokens), list(self.vit.blocks)
        if mask_block > len(blocks) - (not return_all):
            raise ValueError(f"mask_block {mask_block}: of {len(blocks)} blocks the last must run, but for a decoder")
        indices = None if at is None else at + self.num_prefix_tokens
        if indices is not None and mask_block == len(blocks):
            return self._run_without([*blocks, self.vit.norm], x, indices)
        if indices is not None and mask_block:
            x = self._run_without(blocks[:mask_block], x, indices)
        checkpointing = self.vit.grad_checkpointing
        return self.vit.norm(run_blocks(blocks[mask_block:], x, None if return_all else indices, checkpointing))

    def _run_without(self, blocks: Sequence[nn.Module], x: Tensor, absent: Int[Tensor, "batch k"]) -> Tensor:
        """Runs these blocks on all but the k `absent` tokens (distinct), which stay as they are."""
        batch, count, width = x.shape
        present = torch.ones(batch, count, dtype=torch.int8, device=x.device).scatter(1, absent, 0)
        # Sorted, not nonzero: of a known size, so that nothing waits for the device.
        indices = present.argsort(dim=1, descending=True, stable=True)[:, : count - absent.shape[1]]
        out = run_blocks(blocks, take(x, indices), None, self.vit.grad_checkpointing)
        return x.to(out.dtype).scatter(1, indices[..., None].expand(-1, -1, width), out)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        """`encode(embed(images))`."""
        return self.encode(self.embed(images))

    def attention_maps(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Iterator[Float[Tensor, "batch heads tokens tokens"]]:
        """Attention weights of one block after the other, by the explicit form; rows sum to 1.

        A block runs when its weights are asked for, to save memory: turn gradients off around the loop, not this call.

        Raises:
            UserError: blocks whose attention is not timm's, before anything runs.
        """
        attentions = [getattr(block, "attn", block) for block in self.vit.blocks]
        for attention in attentions:
            if not isinstance(attention, TimmAttention):
                raise UserError(
                    f"the attention of this ViT cannot be shown: its blocks have a {type(attention).__name__}, "
                    "not timm's Attention"
                )
        return self._attention_maps(images)

    def _attention_maps(self, images: Tensor) -> Iterator[Tensor]:
        x = self._add_positions(self.embed(images))
        inputs: list[Tensor] = []
        for block in self.vit.blocks:
            # The input of the attention differs by the kind of block: normalised before, or only after.
            hook = block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
            try:
                x = block(x)
            finally:
                hook.remove()
            attention, tokens = block.attn, inputs.pop()
            joint = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, attention.head_dim))
            q, k, _ = joint.permute(2, 0, 3, 1, 4)
            yield attention_weights(attention.q_norm(q), attention.k_norm(k))

    def _add_positions(self, tokens: Tensor) -> Tensor:
        if self.position is not None:
            tokens = tokens + self.position().to(tokens.dtype)
        if self.vit.dynamic_img_size:
            tokens = tokens.unflatten(1, self.grid)
        return self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(tokens)))


def pool(
    tokens: Float[Tensor, "b tokens d"], num_prefix_tokens: int, how: Literal["mean", "token"]
) -> Float[Tensor, "b d"]:
    """Pools all tokens of an image, the `num_prefix_tokens` before the patches included, to one vector.

    mean averages the patch tokens; token takes the [class] token, which masked patch prediction never trains, and
    raises ValueError where there is none.
    """
    if how == "mean":
        return tokens[:, num_prefix_tokens:].mean(dim=1)
    if num_prefix_tokens < 1:
        raise ValueError("pool=token needs a class token, which this encoder has not: take pool=mean")
    return tokens[:, 0]


def quarters(
    tokens: Float[Tensor, "b tokens d"], num_prefix_tokens: int, grid: tuple[int, int]
) -> tuple[Float[Tensor, "b d"], ...]:
    """Means of the patch tokens in each quarter of an image, rows first.

    Where rows or columns are odd, both halves have the one in the middle.
    """
    patches = tokens[:, num_prefix_tokens:].transpose(1, 2).unflatten(2, grid)
    return F.adaptive_avg_pool2d(patches, 2).flatten(2).unbind(2)


class Decoder(nn.Module):
    """New blocks of the encoder's kind and width with a LayerNorm (after MAE, He et al., 2021, section 3).

    Used in pretraining only. It has no position embeddings of its own: the encoder's come with the tokens. Weights are
    drawn as timm draws those of a ViT, from torch's global generator, on the CPU.

    The last `depth` blocks (1 to all) of a new `encoder` are copied, without their stochastic depth.
    """

    def __init__(self, encoder: Encoder, depth: int) -> None:
        super().__init__()
        device = encoder.vit.norm.weight.device
        drawn_on = device if device.type == "meta" else "cpu"
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in encoder.vit.blocks[-depth:]).to(drawn_on)
        self.norm = copy.deepcopy(encoder.vit.norm).to(drawn_on)
        for module in self.blocks.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        self.blocks.apply(init_weights_vit_timm)
        self.to(device)
        self.num_prefix_tokens = encoder.num_prefix_tokens
        self.checkpointing = encoder.vit.grad_checkpointing

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], at: Int[Tensor, "batch k"]
    ) -> Float[Tensor, "batch k dim"]:
        """The tokens of the patches `at` these indices, from all of the encoder's (`encode(..., return_all=True)`)."""
        return self.norm(run_blocks(list(self.blocks), tokens, at + self.num_prefix_tokens, self.checkpointing))


def build_encoder(
    config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Encoder:
    """The encoder that `config` describes, freshly initialised, on `device` ("meta" allocates nothing).

    The weights are drawn on the CPU from torch's global generator, so they are the same for every device. `dtype` is
    the type that attention computes in, under autocast.

    Raises:
        UserError: an unknown name, a model that masked patch prediction cannot train, sizes that do not fit, an
            attention kernel that cannot run.
    """
    device = torch.device(device)
    with on_meta():
        timms: Any = _create_vit(config, img_size=None)
    check_vit(timms, f"model.name {config.name!r}")
    if hasattr(timms.patch_embed, "backbone") and config.patch_size:
        raise UserError(f"model.patch_size does not apply to the hybrid {config.name!r}: its stem sets it")
    check_patches(timms, config.image_hw, "model.img_size", stem=True)
    layers: dict[str, Any] = {"attn_layer": Attention}
    if all(type(block) is TimmBlock for block in timms.blocks):
        layers["block_fn"] = Block
    with building_on(device):
        vit = _create_vit(config, **layers)
        position = build_position(config.pos_embed, vit.patch_embed.grid_size, vit.embed_dim)
    return put_on_device(Encoder(vit, position), config, device, dtype)


def put_on_device(encoder: Encoder, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Encoder:
    """Moves the encoder to its device and sets the checkpointing and attention kernel of `config`."""
    encoder.vit.set_grad_checkpointing(config.grad_checkpointing)
    task = task_of(encoder.vit, 0, True, device, dtype)
    if task and device.type != "meta":
        use_kernel(encoder, choose_kernel(config.attention, task))
    return encoder.to(device)


def _create_vit(config: ModelConfig, **overrides: Any) -> VisionTransformer:
    """timm's own model for `config`, without head and with mean-pooled patch tokens; `overrides` go to timm."""
    name = config.name
    if "." in name:
        bare = name.partition(".")[0]
        raise UserError(
            f"model.name {name!r} names weights; take {bare} for new ones, or --init {name} to go on from them"
        )
    if not timm.is_model(name):
        raise UserError(f"timm {timm.__version__} has no model {name!r}; near it: {similar_names(name, 'vit_*')}")
    advice = "which masked patch prediction needs; vit_base_patch16_224 is one, vit_base_r50_s16_224 a hybrid"
    if not is_vit(name):
        raise UserError(f"model.name {name!r} is not a VisionTransformer, {advice}")
    settings = model_args(config) | {
        "img_size": config.image_hw,
        "in_chans": config.in_chans,
        "pos_embed": None if config.pos_embed == "learned" else "none",
        "drop_path_rate": config.drop_path,
    }
    settings |= overrides
    try:
        # fc_norm=False keeps the last LayerNorm where it is for the class token: before the pooling.
        vit = timm.create_model(name, num_classes=0, global_pool="avg", fc_norm=False, **settings)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        shown = {k: v for k, v in settings.items() if v is not None and hasattr(config, k)}
        raise UserError(f"timm cannot build {name!r} with {shown}: {error or type(error).__name__}") from error
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"model.name {name!r} is a {type(vit).__name__}, not a VisionTransformer, {advice}")
    return vit


def named_patch(config: ModelConfig) -> tuple[int, int]:
    """Height and width in pixels of the patches of model.name, or of a hybrid's stem; allocates nothing."""
    with on_meta():
        vit: Any = _create_vit(replace(config, img_size=(224,)), img_size=None)
    rows, columns = vit.patch_embed.feat_ratio(as_scalar=False)
    return rows, columns


def model_args(config: ModelConfig) -> dict[str, Any]:
    """timm's arguments for the architecture, beside name, input size and channels, as JSON values.

    A 2-D position embedding is left out: it is saved as a learned table.
    """
    args = {
        "patch_size": [config.patch_size[0], config.patch_size[-1]] if config.patch_size else None,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "pos_embed": "none" if config.pos_embed == "none" else None,
        "act_layer": None if config.act == "gelu" else config.act,
    }
    return {key: value for key, value in args.items() if value is not None}


def similar_names(name: str, pattern: str = "") -> str:
    """Names of timm's models that are spelt like this one, or "none"."""
    return ", ".join(difflib.get_close_matches(name, timm.list_models(pattern), 3)) or "none"


def is_vit(name: str) -> bool:
    """Whether timm's model of that name is a VisionTransformer, hybrids included."""
    return "vision_transformer" in timm.models.model_entrypoint(name).__module__


def is_eva(name: str) -> bool:
    """Whether timm's model of that name is an Eva, a ViT with rotary positions, such as DINOv3's."""
    return timm.models.model_entrypoint(name).__module__ == "timm.models.eva"


def check_vit(vit: Any, name: str) -> None:
    """Raises UserError for a ViT that masked patch prediction cannot train; error messages call it `name`."""
    if not all(type(getattr(block, "attn", None)) in (TimmAttention, Attention) for block in vit.blocks):
        raise UserError(f"{name} has blocks with an attention of its own; choose another ViT")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in vit.modules()):
        raise UserError(
            f"{name} has batch normalisation, whose statistics differ by process; "
            "choose a ViT or a hybrid without, such as vit_base_r50_s16_224"
        )


def check_patches(model: nn.Module, image_hw: tuple[int, int], setting: str, stem: bool = False) -> None:
    """Raises UserError, naming the `setting`, for a size in pixels that is not a whole number of the ViT's patches.

    It would not see the last rows or columns. The stem of a hybrid pads: only with `stem` it must fit, too.
    """
    embed = getattr(model, "patch_embed", None)
    if isinstance(embed, HybridEmbed):
        sides: Any = embed.feat_ratio(as_scalar=False) if stem else (1, 1)
    else:
        sides = embed.patch_size if isinstance(embed, PatchEmbed) else (1, 1)
    for size, patch in zip(image_hw, sides, strict=True):
        if size % patch:
            low = size // patch * patch
            near = f"{low} or {low + patch}" if low else f"{patch}"
            raise UserError(f"{setting} {size} is not a multiple of the patch size {patch}; take {near}")
