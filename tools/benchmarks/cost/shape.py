"""The sizes of a model, which all costs are counted from: of the paper's ViTs from a table, of others by asking timm.

The table is there because loading timm takes seconds, and a plan should not.
"""

from dataclasses import dataclass, replace

from mpp.errors import UserError, command
from mpp.model.settings import ModelConfig
from mpp.objective.settings import ObjectiveConfig

_CELLS, _MOST_CLASSES = 4, 4096  # as mpp/objective/target.py, which needs torch

# size: width, depth, heads, width of the MLP, and timm's names of that size
_SIZES: dict[str, tuple[int, int, int, int, tuple[str, ...]]] = {
    "tiny": (192, 12, 3, 768, ("16_224", "16_384")),
    "small": (384, 12, 6, 1536, ("32_224", "32_384", "16_224", "16_384", "8_224")),
    "base": (768, 12, 12, 3072, ("32_224", "32_384", "16_224", "16_384", "8_224")),
    "large": (1024, 24, 16, 4096, ("32_224", "32_384", "16_224", "16_384", "14_224")),
    "huge": (1280, 32, 16, 5120, ("14_224",)),
    "giant": (1408, 40, 16, 6144, ("14_224",)),
    "gigantic": (1664, 48, 16, 8192, ("14_224",)),
}
NAMES = {f"vit_{size}_patch{ending}": size for size, of in _SIZES.items() for ending in of[4]}
"""timm's names whose sizes are known here."""


@dataclass(frozen=True)
class Shape:
    """A ViT with the head of masked patch prediction, in numbers."""

    channels: int
    image: tuple[int, int]
    """Height and width in pixels."""
    patch: tuple[int, int]
    """Height and width of a patch in pixels."""
    dim: int
    """Token width."""
    depth: int
    """Blocks."""
    heads: int
    hidden: int
    """Width of the MLP."""
    prefix: int
    """Tokens before those of the patches: the class token."""
    position: int
    """Parameters of the position embedding."""
    picked: int
    """K, corrupted patches of an image: the last block computes its output for these alone."""
    outputs: int
    """Width of the head."""
    pixel_target: bool = False
    detail: bool = False
    """Whether a second head predicts the pixels of a patch."""
    early: int = 0
    """Blocks that run without the corrupted patches."""
    decoder: int = 0
    """Blocks of a decoder behind the encoder's."""

    @property
    def pixels(self) -> int:
        """Values of an image."""
        return self.channels * self.image[0] * self.image[1]

    @property
    def patch_values(self) -> int:
        """Values of a patch."""
        return self.channels * self.patch[0] * self.patch[1]

    @property
    def patches(self) -> int:
        return (self.image[0] // self.patch[0]) * (self.image[1] // self.patch[1])

    @property
    def tokens(self) -> int:
        """Patches and prefix."""
        return self.patches + self.prefix

    @property
    def block_parameters(self) -> int:
        """Of one block: two norms, qkv, projection, MLP."""
        d, m = self.dim, self.hidden
        return 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (2 * d * m + m + d)

    @property
    def blocks(self) -> int:
        """The encoder's and the decoder's."""
        return self.depth + self.decoder

    @property
    def head_parameters(self) -> int:
        """Of the last norm, a decoder's own, and the heads."""
        return 2 * self.dim * (1 + (self.decoder > 0)) + (self.outputs + self.details) * (self.dim + 1)

    @property
    def details(self) -> int:
        """Width of the second head; 0 without one."""
        return self.patch_values * self.detail

    @property
    def root_parameters(self) -> int:
        """Of all but the blocks: patch embedding, prefix tokens, positions, [mask] embedding, last norms and heads."""
        return self.dim * (self.patch_values + 1 + self.prefix + 1) + self.position + self.head_parameters

    @property
    def parameters(self) -> int:
        """Of all."""
        return self.root_parameters + self.blocks * self.block_parameters


def shape_of(model: ModelConfig, objective: ObjectiveConfig) -> Shape:
    """The sizes of the model that these settings build.

    Raises:
        UserError: a model that is not a plain ViT, a name that timm does not know, sizes that do not fit.
    """
    if model.name not in NAMES:
        return _ask_timm(model, objective)
    name, patch = NAMES[model.name], int(model.name.split("patch")[1].split("_")[0])
    width, depth, heads, hidden, _ = _SIZES[name]
    dim = model.embed_dim or width
    sides = (model.patch_size[0], model.patch_size[-1]) if model.patch_size else (patch, patch)
    return _shape(
        model, objective, sides, dim, model.depth or depth, model.num_heads or heads, int(dim * hidden / width), 1
    )


def _ask_timm(model: ModelConfig, objective: ObjectiveConfig) -> Shape:
    """The same by building the model without memory; timm takes seconds to load."""
    from mpp.model.encoder import build_encoder

    encoder = build_encoder(model, "meta")
    vit = encoder.vit
    held = sum(parameter.numel() for parameter in encoder.parameters())
    hidden = getattr(getattr(getattr(vit.blocks[0], "mlp", None), "fc1", None), "out_features", 0)
    heads = vit.blocks[0].attn.num_heads
    shape = _shape(
        model, objective, encoder.patch, vit.embed_dim, len(vit.blocks), heads, hidden, vit.num_prefix_tokens
    )
    own = replace(shape, decoder=0)
    told = own.parameters - own.dim - (own.head_parameters - 2 * own.dim)
    if held != told:  # whatever has other parts has other parameters
        raise UserError(
            f"model.name {model.name!r} is not a plain ViT ({held:,} parameters, not {told:,}), which the formulas are "
            f"for; {command('pretrain')} --dry-run measures any model"
        )
    return shape


def _shape(
    model: ModelConfig,
    objective: ObjectiveConfig,
    patch: tuple[int, int],
    dim: int,
    depth: int,
    heads: int,
    hidden: int,
    prefix: int,
) -> Shape:
    for size, side in zip(model.image_hw, patch, strict=True):
        if size % side:
            raise UserError(f"model.img_size {size} is not a multiple of the patch size {side}")
    if dim % heads:
        raise UserError(f"model.embed_dim {dim} does not divide into {heads} heads; set model.num_heads")
    if objective.mask_enters >= depth + bool(objective.decoder_depth):
        raise UserError(f"objective.mask_enters {objective.mask_enters} is past the last of {depth} blocks; take fewer")
    if objective.decoder_depth > depth:
        raise UserError(
            f"objective.decoder_depth {objective.decoder_depth}: the encoder has {depth} blocks; take fewer"
        )
    rows, columns = model.image_hw[0] // patch[0], model.image_hw[1] // patch[1]
    positions = {"learned": (rows * columns + prefix) * dim, "2d": (rows + columns) * (dim // 2)}
    return Shape(
        channels=model.in_chans,
        image=model.image_hw,
        patch=patch,
        dim=dim,
        depth=depth,
        heads=heads,
        hidden=hidden,
        prefix=prefix,
        position=positions.get(model.pos_embed, 0),
        picked=max(round(objective.ratio * rows * columns), 1),
        outputs=_outputs(objective, model.in_chans, patch),
        pixel_target=objective.target == "pixels",
        detail=objective.detail > 0,
        early=objective.mask_enters,
        decoder=objective.decoder_depth,
    )


def _outputs(objective: ObjectiveConfig, channels: int, patch: tuple[int, int]) -> int:
    """Width of the head for a target, refused as mpp/objective/target.py does."""
    if objective.target == "pixels":
        return channels * patch[0] * patch[1]
    if objective.target == "colour_4x4" and (patch[0] % _CELLS or patch[1] % _CELLS):
        raise UserError(
            f"objective.target colour_4x4 needs patch sides divisible by 4, got {patch[0]}x{patch[1]}; take mean_colour"
        )
    joint = 2 ** (objective.bits * channels)
    colours = joint if joint <= _MOST_CLASSES else channels * 2**objective.bits
    return colours * (_CELLS**2 if objective.target == "colour_4x4" else 1)
