"""timm's attention by a choice of kernel, and timm's block, both of which can compute some of their tokens only.

The three kernels compute the same function, softmax(q k^T / sqrt(E)) v, and agree to rounding. Legend: B batch,
N tokens, K queried tokens, H heads, E head width, D token width.
"""

import functools
import importlib.util
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import mpp.system.timm_import  # noqa: F401

# isort: split
import torch
from jaxtyping import Float, Int
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

HeadsFirst = Float[Tensor, "B H N E"]
Queries = Float[Tensor, "B H K E"]
Indices = Int[Tensor, "B K"]

# Set by the trial run: an import within the forward pass would break torch.compile's graph in every block.
_memory_efficient_attention: Callable[..., Tensor] | None = None


def xformers_obstacle(device: torch.device, dtype: torch.dtype = torch.float32, width: int = 64) -> str | None:
    """Why xformers' attention cannot run for heads of this type and width; None if it can."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install xformers)"
    if device.type != "cuda":
        return f"xformers has no attention kernel for the device {device.type!r}"
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    if dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 0):
        # That kernel's backward pass is given a CPU tensor, at which torch.compile fails (xformers 0.0.35).
        where = f"in {dtype}" if dtype == torch.float32 else "on this GPU"
        return f"{where} xformers only calls a kernel that sdpa has as well, and does not compile"
    return _try_xformers(device, dtype, width)


@functools.cache
def _try_xformers(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Runs it once, forward and backward: the GPUs, types and widths it has kernels for change by release."""
    global _memory_efficient_attention
    try:
        # The import costs a second and warns of missing CPU kernels.
        logging.getLogger("xformers").setLevel(logging.ERROR)
        from xformers.ops import memory_efficient_attention

        _memory_efficient_attention = memory_efficient_attention
        x = torch.zeros(1, 8, 1, width, device=device, dtype=dtype, requires_grad=True)
        memory_efficient_attention(x, x, x).sum().backward()
    except Exception as error:  # whatever a foreign build raises
        lines = (str(error) or type(error).__name__).splitlines()
        reasons = [after.strip() for line, after in itertools.pairwise(lines) if line.endswith("because:")]
        return f"xformers failed a trial on {device} in {dtype}: {reasons[-1] if reasons else lines[0]}"
    return None


def take(tokens: Float[Tensor, "B N D"], at: Indices) -> Float[Tensor, "B K D"]:
    """The tokens at K indices of each image."""
    batch, n, _ = tokens.shape
    row = at + n * torch.arange(batch, device=at.device)[:, None]
    return tokens.flatten(0, 1).index_select(0, row.flatten()).unflatten(0, at.shape)  # x 3 faster than gather (CPU)


def attention_weights(q: Float[Tensor, "*H K E"], k: Float[Tensor, "*H N E"]) -> Float[Tensor, "*H K N"]:
    """softmax(q k^T / sqrt(E)), equation 6 of the paper; each row sums to 1."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


def _explicit(q: Queries, k: HeadsFirst, v: HeadsFirst, dropout: float) -> Queries:
    batch = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # one batched product each, of contiguous heads
    return torch.bmm(F.dropout(attention_weights(q, k), dropout), v).unflatten(0, batch)


def _sdpa(q: Queries, k: HeadsFirst, v: HeadsFirst, dropout: float) -> Queries:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def _xformers(q: Queries, k: HeadsFirst, v: HeadsFirst, dropout: float) -> Queries:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # xformers has tokens before heads
    if q.shape != k.shape:
        # By the strides of 3 normed queries a head it would take them for one tensor with keys and values.
        q = q.contiguous()
    assert _memory_efficient_attention is not None, "xformers_obstacle comes first"
    return _memory_efficient_attention(q, k, v, p=dropout).transpose(1, 2)


KERNELS = {"xformers": _xformers, "sdpa": _sdpa, "explicit": _explicit}


class Attention(TimmAttention):
    """timm's attention (its parameters and their names), through the kernel named by `backend`."""

    backend: str = "sdpa"

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        at: Indices | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Attends from all tokens, or only from those `at` these indices, to all tokens."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError("masked attention is not part of the encoder")
        if at is None:
            q, k, v = self._split_heads(self.qkv(x), 3)
        else:
            sizes = [self.attn_dim, 2 * self.attn_dim]
            q_weight, kv_weight = self.qkv.weight.split(sizes)
            q_bias, kv_bias = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
            (q,) = self._split_heads(F.linear(take(x, at), q_weight, q_bias), 1)
            k, v = self._split_heads(F.linear(x, kv_weight, kv_bias), 2)
        # Under autocast the norms give fp32, and xformers wants one type.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out = KERNELS[self.backend](q, k, v, self.attn_drop.p if self.training else 0.0)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x if at is None else take(x, at)).sigmoid()
        return self.proj_drop(self.proj(out))

    def _split_heads(self, joint: Float[Tensor, "B N F"], parts: int) -> tuple[HeadsFirst, ...]:
        """Views by part and head; the backward pass of unbind(2) writes the joint gradient without a copy."""
        cut = joint.unflatten(-1, (parts, self.num_heads, self.head_dim))
        return tuple(part.transpose(1, 2) for part in cut.unbind(2))


class Block(TimmBlock):
    """timm's pre-norm block (its parameters and their names)."""

    def forward(self, x: Float[Tensor, "B N D"], at: Indices | None = None, **masking: Any) -> Float[Tensor, "B K D"]:
        """The block's output for all tokens, or for those `at` these indices only.

        Keys and values are of all tokens; everything else in a block reads one token, so the result is the same.
        """
        if at is None:
            return super().forward(x, **masking)
        attended = self.attn(self.norm1(x), at=at, **masking)
        x = take(x, at) + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def run_blocks(
    blocks: Sequence[nn.Module], x: Float[Tensor, "B N D"], at: Indices | None, checkpointing: bool
) -> Float[Tensor, "B K D"]:
    """Runs one or more blocks in order; the last computes the tokens `at` these indices only (None: all).

    `checkpointing` recomputes the blocks in the backward pass.
    """

    def run(block: nn.Module, x: Tensor, **options: Any) -> Tensor:
        if checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **options)
        return block(x, **options)

    *first, last = blocks
    for block in first:
        x = run(block, x)
    if at is None:
        return run(last, x)
    return run(last, x, at=at) if isinstance(last, Block) else take(run(last, x), at)


def use_kernel(model: nn.Module, backend: str) -> None:
    """Sets the kernel (xformers, sdpa or explicit) of every `Attention` in `model`."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend
