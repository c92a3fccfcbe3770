"""Self-attention with a choice of kernel, in the place of timm's own (`attn_layer`).

The three kernels compute the same function, softmax(q k^T / sqrt(E)) v, and agree to rounding. Legend: B batch,
N tokens, H heads, E head width.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable

import mpp.torchvision_import  # noqa: F401  (timm imports torchvision)

# isort: split
import torch
from jaxtyping import Float
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor
from torch.nn import functional as F

from mpp.errors import UserError

HeadsFirst = Float[Tensor, "B H N E"]

# Set by the trial run. An import within the forward pass would break torch.compile's graph in every block.
_memory_efficient_attention: Callable[..., Tensor] | None = None


def xformers_obstacle(device: torch.device, dtype: torch.dtype = torch.float32, width: int = 64) -> str | None:
    """Why xformers' memory-efficient attention cannot run for heads of this type and width, or None where it can."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install xformers)"
    if device.type != "cuda":
        return f"xformers has no attention kernel for the device {device.type!r}"
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    return _try_xformers(device, dtype, width)


@functools.cache
def _try_xformers(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Runs it once, forward and backward: which GPUs, types and widths it has kernels for changes by release."""
    global _memory_efficient_attention
    try:
        # Imported only when needed: it costs a second, and warns of missing CPU kernels that nobody asked for.
        logging.getLogger("xformers").setLevel(logging.ERROR)
        from xformers.ops import memory_efficient_attention

        _memory_efficient_attention = memory_efficient_attention
        x = torch.zeros(1, 8, 1, width, device=device, dtype=dtype, requires_grad=True)
        memory_efficient_attention(x, x, x).sum().backward()
    except Exception as error:  # whatever a foreign build raises
        return f"xformers failed a trial on {device} in {dtype}: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32, width: int = 64) -> str:
    """The kernel that `name` means for heads of this type and width; "auto" is xformers where it runs, else sdpa.

    Raises:
        UserError: a kernel asked for by name that cannot run here, with the reason.
    """
    if name not in ("auto", "xformers"):
        return name
    obstacle = xformers_obstacle(device, dtype, width)
    if name == "auto":
        return "sdpa" if obstacle else "xformers"
    if obstacle:
        raise UserError(f"model.attention xformers cannot run here: {obstacle}; use auto or sdpa")
    return name


def attention_weights(q: HeadsFirst, k: HeadsFirst) -> Float[Tensor, "B H N N"]:
    """softmax(q k^T / sqrt(E)), equation 6 of the paper; each row sums to 1."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


def _explicit(q: HeadsFirst, k: HeadsFirst, v: HeadsFirst, dropout: float) -> HeadsFirst:
    return F.dropout(attention_weights(q, k), dropout) @ v


def _sdpa(q: HeadsFirst, k: HeadsFirst, v: HeadsFirst, dropout: float) -> HeadsFirst:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def _xformers(q: HeadsFirst, k: HeadsFirst, v: HeadsFirst, dropout: float) -> HeadsFirst:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # xformers has tokens before heads
    assert _memory_efficient_attention is not None, "xformers_obstacle comes first"
    return _memory_efficient_attention(q, k, v, p=dropout).transpose(1, 2)


KERNELS = {"xformers": _xformers, "sdpa": _sdpa, "explicit": _explicit}


class Attention(TimmAttention):
    """timm's attention (its parameters and their names), through the kernel named by `backend`."""

    backend: str = "sdpa"

    def heads(self, x: Float[Tensor, "B N D"]) -> tuple[HeadsFirst, HeadsFirst, HeadsFirst]:
        """Queries, keys and values of normalised tokens."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        # Under autocast the norms give fp32, and xformers wants one type.
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def forward(
        self, x: Float[Tensor, "B N D"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "B N D"]:
        if attn_mask is not None or is_causal:
            raise NotImplementedError("masked attention is not part of the encoder")
        q, k, v = self.heads(x)
        out = KERNELS[self.backend](q, k, v, self.attn_drop.p if self.training else 0.0)
        out = self.norm(out.transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))
