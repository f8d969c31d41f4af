"""Rectified SpaAttn: attend to the critical blocks, scale that by the share they should have had,
and add the pooled contribution of the blocks left out.

Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation (arXiv 2511.19835).

Text tokens go into blocks as others do; the release's HunyuanVideo variant, which keeps them single
among the pooled scores, is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import tokred
from tokred.selection import block_mask

from ._lists import check_minimum
from ._method import Family, Method, Needs


@dataclass(frozen=True)
class PooledBlocks:
    """Means over blocks of tokens, and mean absolute deviations from them, f32 [B, H, n, D].

    A last block that is not full counts its missing tokens as zeros, as published.
    """

    mean: Tensor
    deviation: Tensor


def pool(x: Tensor, block: int) -> PooledBlocks:
    """The blocks of x [B, H, N, D], the tail filled up with zeros."""
    tail = -x.shape[2] % block
    padded = torch.nn.functional.pad(x, (0, 0, 0, tail)) if tail else x
    pooled, _ = tokred.block_pool(padded, block, "mean_deviation")
    return PooledBlocks(*pooled.unbind(3))


def critical_blocks(probability: Tensor, top_p: float, min_blocks: int) -> Tensor:
    """bool like probability [.., n, n]: the largest blocks of each row until their sum exceeds
    top_p, and at least min_blocks."""
    blocks = probability.shape[-1]
    chosen = tokred.topk(probability, blocks, top_p=top_p, min_k=min_blocks)[1]
    return block_mask(chosen, blocks)


def pooled_is_reliable(q: PooledBlocks, k: PooledBlocks) -> Tensor:
    """bool [B, H, nq, nk]: the pooled logit exceeds the error that pooling may make (GAPR)."""
    gain = (q.mean @ k.mean.transpose(-1, -2)).abs()
    pairs = [torch.stack([x.mean, x.deviation], dim=3) for x in (q, k)]
    error = tokred.block_score(pairs[0], pairs[1], rule="deviation", scale=1.0)
    return gain > error


def rectified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int = 128,
    top_p: float = 0.3,
    drop_rate: float = 0.8,
    always: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Rectified block-sparse attention over all tokens.

    Args:
        q, k, v: [B, H, N, D], the same number of heads, tokens in an order that keeps neighbours
            together (Hilbert order in the paper).
        block: tokens a block.
        top_p, drop_rate: the critical blocks of a row have at least this pooled probability, and
            are at least int((1 - drop_rate) * number of blocks).
        always: bool [.., n, n] blocks that are critical whatever their score: neighbours, text.
        scale: 1 / sqrt(D) where None.

    Returns:
        [B, H, N, D].

    Raises:
        ValueError: a block below 1, or top_p or drop_rate outside [0, 1].
    """
    check_minimum(1, block=block)
    for name, value in (("top_p", top_p), ("drop_rate", drop_rate)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, keys, values = (pool(x, block) for x in (q, k, v))
    blocks = keys.mean.shape[2]
    probability = (scale * queries.mean @ keys.mean.transpose(-1, -2)).softmax(-1)
    critical = critical_blocks(probability, top_p, int((1 - drop_rate) * blocks))
    if always is not None:
        critical = critical | always
    out, _ = tokred.block_sparse_attention(q, k, v, critical, block, block, scale=scale)

    exact = critical | ~pooled_is_reliable(queries, keys)
    share = (probability * exact).sum(-1, keepdim=True)
    pooled = (probability * ~exact) @ values.mean
    share, pooled = (t.repeat_interleave(block, dim=2)[:, :, : q.shape[2]] for t in (share, pooled))
    return (share * out + pooled).to(q.dtype)


METHOD = Method(
    title="Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
    arxiv="2511.19835",
    family=Family.PREFILL,
    needs=(Needs.VIDEO_DIFFUSION,),
    status="exact",
    summary="attend to critical blocks, rescale, add what the skipped blocks pool to",
)
