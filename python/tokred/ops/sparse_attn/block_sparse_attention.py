"""Attention over a mask of blocks: wrapper, fake kernels, gradients, autocast and flop counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..._library import check_tensor
from ..attention import (
    backward_flops,
    broadcast_bias,
    broadcast_mask,
    fake_attention,
    fake_gradients,
    forward_flops,
    incoming,
    wanted,
)
from ..placements import ATTENTION, ATTENTION_GRADS, sharded
from ..registration import (
    call,
    cast_under_autocast,
    differentiable,
    once_differentiable,
)
from ..symbolic import check_dim

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Blocks: TypeAlias = Tensor | tuple[Tensor, Tensor] | BlockMask

_ops = torch.ops.tokred


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Blocks,
    block_q: int | None = None,
    block_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which only chosen rectangles of queries by keys exist; the rest costs nothing.

    Query i sees key j where block_mask[b, h, i // block_q, j // block_k] is True and nothing else
    hides it. The softmax is over the keys that are seen, as in PAROAttention and DHSA: there is no
    compensation for the rest.

    Args:
        q: [B, Hq, L, D] float32, float16 or bfloat16, or float64 on the CPU; any outer strides, the
            last dimension contiguous, D and Dv at most 576; on CUDA 256.
        k: [B, Hkv, N, D], Hq a multiple of Hkv. v: [B, Hkv, N, Dv].
        block_mask: bool [B | 1, Hq | 1, ceil(L / block_q), ceil(N / block_k)]; or the pair
            (kv_num_blocks [B | 1, Hq | 1, nQ], kv_indices [B | 1, Hq | 1, nQ, any]) that
            FlexAttention stores; or its BlockMask of whole blocks: without a mask_mod, or with the
            causal one beside causal=True. A BlockMask with a mask_mod is inspected on the host, so
            inside torch.compile pass the pair.
        block_q, block_k: queries and keys of a block, at least 1, of any size; the last ones may be
            shorter. Those of a BlockMask are its own.
        causal: query i sees the keys j <= i + N - L.
        scale: 1 / sqrt(D) where None.
        key_bias: float32 (float64 if q is float64) [B | 1, Hkv | 1, N], or [B, N].
        mask: [B | 1, Hq | 1, L | 1, N], or [B, N]: bool, True is visible; or numbers that are
            added to the logits, in float32 or the dtype of q, of which -inf hides.
        softcap: where given, logits are softcap * tanh(scale q k^T / softcap) before key_bias and
            masks, as in Gemma 2 (arXiv:2408.00118); positive.

    Returns:
        out [B, Hq, L, Dv] in the dtype of q, and lse float32 [B, Hq, L]; 0 and -inf where a query
        sees no key. Differentiable in q, k, v and key_bias, once, through out and lse. Under
        autocast q, k and v are cast.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: block sizes missing, or other than the BlockMask's; a mask_mod that block_mask
            alone cannot express.

    Complexity: 2 B Hq L N (D + Dv) flops times the share of True blocks.
    """
    if not isinstance(block_mask, Tensor | tuple | list):
        block_mask, block_q, block_k = _from_flex(block_mask, q, k, block_q, block_k, causal)
    if block_q is None or block_k is None:
        raise ValueError("block_q and block_k must be given where block_mask is not a BlockMask")
    if not isinstance(block_mask, Tensor):
        if len(block_mask) != 2:
            raise TypeError(
                "block_mask must be a tensor, (kv_num_blocks, kv_indices), or a BlockMask"
            )
        for name, value in zip(("k", "kv_num_blocks", "kv_indices"), (k, *block_mask), strict=True):
            check_tensor(name, value)
        check_dim("k", k, 4, "[B, Hkv, N, D]")
        if not isinstance(block_k, int | torch.SymInt):
            raise TypeError(f"block_k must be an integer, got {type(block_k).__name__}")
        blocks = (k.shape[2] + block_k - 1) // max(block_k, 1)
        block_mask = _dense_blocks(*block_mask, blocks)
    return call(
        _ops.block_sparse_attention.default,
        q,
        k,
        v,
        block_mask,
        block_q,
        block_k,
        causal,
        scale,
        broadcast_bias(key_bias),
        broadcast_mask(mask),
        softcap,
    )


def _dense_blocks(num_blocks: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """The bool mask [.., nQ, blocks] of the first num_blocks[.., nQ] indices of every row."""
    place = torch.arange(indices.shape[-1], device=indices.device)
    listed = (place < num_blocks[..., None]) & (indices >= 0) & (indices < blocks)
    column = torch.where(listed, indices, blocks).long()
    mask = torch.zeros((*indices.shape[:-1], blocks + 1), dtype=torch.bool, device=indices.device)
    return mask.scatter(-1, column, True)[..., :blocks].contiguous()


def _from_flex(
    flex: BlockMask, q: Tensor, k: Tensor, block_q: int | None, block_k: int | None, causal: bool
) -> tuple[Tensor, int, int]:
    """The bool mask and block sizes of a FlexAttention BlockMask."""
    if not hasattr(flex, "kv_num_blocks"):
        raise ValueError(
            "block_mask must be a bool tensor, a pair (kv_num_blocks, kv_indices) or a BlockMask, "
            f"got {type(flex).__name__}"
        )
    sizes = tuple(flex.BLOCK_SIZE)
    given = tuple(s if b is None else b for b, s in zip((block_q, block_k), sizes, strict=True))
    if given != sizes:
        raise ValueError(f"block_q and block_k must be the BlockMask's {sizes}, got {given}")
    if not _only_whole_blocks(flex.mask_mod, q.shape[2], k.shape[2], causal):
        raise ValueError(
            "block_mask has a mask_mod that hides part of its blocks: only whole blocks are "
            "supported, or the causal mask_mod together with causal=True; give what else it hides "
            "as `mask`, and the blocks as (kv_num_blocks, kv_indices)"
        )
    blocks = (k.shape[2] + sizes[1] - 1) // sizes[1]
    mask = _dense_blocks(flex.kv_num_blocks, flex.kv_indices, blocks)
    if flex.full_kv_num_blocks is not None and flex.full_kv_indices is not None:
        mask = mask | _dense_blocks(flex.full_kv_num_blocks, flex.full_kv_indices, blocks)
    return mask, sizes[0], sizes[1]


def _only_whole_blocks(mask_mod: Any, queries: int, keys: int, causal: bool) -> bool:
    """Whether mask_mod hides nothing beyond what `causal` does.

    A mask_mod is any function; this compares it with the causal rule around the diagonal and at
    both ends of every row, on the CPU, so that no device is waited for.
    """
    from torch.nn.attention.flex_attention import noop_mask

    if mask_mod is noop_mask:
        return True
    if not causal or queries == 0 or keys == 0:
        return False
    i = torch.arange(queries).repeat_interleave(5)
    shift = torch.tensor([-1, 0, 1]).repeat(queries)
    diagonal = torch.arange(queries).repeat_interleave(3) + (keys - queries) + shift
    ends = torch.tensor([0, keys - 1]).repeat(queries)
    j = torch.cat([diagonal.view(queries, 3), ends.view(queries, 2)], 1).flatten()
    j = j.clamp(0, keys - 1)
    zero = torch.zeros_like(i)
    try:
        visible = mask_mod(zero, zero, i, j)
    except RuntimeError:
        return False
    return bool((visible == (j <= i + keys - queries)).all())


@torch.library.register_fake("tokred::block_sparse_attention")
def _block_sparse_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_q: int,
    block_k: int,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    torch._check(
        block_mask.dim() == 4,
        lambda: f"block_mask must be [B, H, nQ, nK], got {block_mask.dim()}-D",
    )
    return fake_attention(q, k, v)


@torch.library.register_fake("tokred::block_sparse_attention_backward")
def _block_sparse_attention_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_q: int,
    block_k: int,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
    key_bias: Tensor | None,
    mask: Tensor | None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_gradients(q, k, v, key_bias)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_mask, *sizes, ctx.causal, ctx.scale, key_bias, mask, ctx.softcap = inputs
    ctx.sizes = sizes
    ctx.save_for_backward(q, k, v, block_mask, key_bias, mask, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, block_mask, key_bias, mask, out, lse = ctx.saved_tensors
    grads = call(
        _ops.block_sparse_attention_backward.default,
        *incoming(grad_out, grad_lse),
        q,
        k,
        v,
        block_mask,
        *ctx.sizes,
        out,
        lse,
        ctx.causal,
        ctx.scale,
        key_bias,
        mask,
        ctx.softcap,
    )
    grad_q, grad_k, grad_v, grad_bias = wanted(grads, q, k, v, key_bias)
    return grad_q, grad_k, grad_v, None, None, None, None, None, grad_bias, None, None


differentiable("block_sparse_attention", ("q", "k", "v", "key_bias"), _backward, _setup_context)
once_differentiable("block_sparse_attention_backward", "block_sparse_attention")
cast_under_autocast("block_sparse_attention", "q", "k", "v")
sharded("block_sparse_attention", f"{ATTENTION}, block_mask bhln -> bhle, bhl")
sharded(
    "block_sparse_attention_backward",
    f"{ATTENTION_GRADS}, block_mask bhln -> bhld, bhnd, bhne, bhn",
)


@register_flop_formula(_ops.block_sparse_attention)
def _block_sparse_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Tensors arrive as their shapes, so hidden blocks are counted, as torch counts SDPA."""
    return forward_flops(q, k[2], v)


@register_flop_formula(_ops.block_sparse_attention_backward)
def _block_sparse_backward_flops(
    grad_out: Any, grad_lse: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any
) -> int:
    return backward_flops(q, k[2], v)
