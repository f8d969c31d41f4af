"""PAROAttention: reorder the tokens of a video so that attention becomes blocks, then keep a fixed
set of blocks per head.

PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual
Generation Models (arXiv 2506.16054). Skipped blocks are left out of the softmax, which is what the
published kernel does. The release has kernels and no calibration: masks and orders are chosen as
the paper describes. The 8-bit path is not part of this recipe.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from torch import Tensor

import tokred

from ._lists import check_minimum
from ._method import Family, Method, Needs

ORDERS = tuple("".join(order) for order in permutations("FHW"))


def axis_order(
    order: str, frames: int, height: int, width: int, num_text: int = 0
) -> tuple[Tensor, Tensor]:
    """The permutation that lays a [frames, height, width] grid out in another axis order.

    Args:
        order: the axes from the slowest to the fastest, such as "FHW" (no change) or "HWF".
        num_text: tokens in front of the grid, which stay where they are.

    Returns:
        (permutation, inverse), int64 [num_text + frames * height * width]: x[permutation] is in the
        new order, and y[inverse] back in the old one.

    Raises:
        ValueError: an unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    grid = torch.arange(frames * height * width).reshape(frames, height, width)
    grid = grid.permute(*("FHW".index(axis) for axis in order)).flatten()
    permutation = torch.cat([torch.arange(num_text), num_text + grid])
    return permutation, permutation.argsort()


def block_sums(q: Tensor, k: Tensor, block: int, scale: float | None = None) -> Tensor:
    """f32 [B, H, nq, nk]: the attention probability of every block x block rectangle, summed.

    One pass over the attention, of which only column sums of one block of queries exist at a time.

    Raises:
        ValueError: a block below 1.
    """
    check_minimum(1, block=block)
    _, lse = tokred.biased_attention(q, k, k[..., :1], scale=scale)
    tail = -k.shape[2] % block
    rows = []
    for queries, row_lse in zip(q.split(block, dim=2), lse.split(block, dim=2), strict=True):
        columns = tokred.attention_columns(queries, k, row_lse.contiguous(), scale=scale)
        padded = torch.nn.functional.pad(columns, (0, tail))
        rows.append(padded.unflatten(-1, (-1, block)).sum(-1))
    return torch.stack(rows, dim=2)


def calibrate_mask(
    q: Tensor,
    k: Tensor,
    block: int = 64,
    threshold: float = 0.015,
    scale: float | None = None,
    num_text: int = 0,
) -> Tensor:
    """The static mask of one layer: blocks whose summed probability is above the threshold.

    Args:
        q, k: [B, H, N, D] calibration samples, already reordered; a block counts where its mean
            over the batch does.
        num_text: tokens in front of the grid.

    Returns:
        bool [1, H, n, n]. Rows and columns of blocks that hold text, and the last ones, are always
        on.

    Raises:
        ValueError: a block below 1, or num_text below 0.
    """
    check_minimum(0, num_text=num_text)
    mask = block_sums(q, k, block, scale).mean(0, keepdim=True) > threshold
    text = -(-num_text // block)
    mask[:, :, :text] = mask[..., :text] = True
    mask[:, :, -1] = mask[..., -1] = True
    return mask


def order_cost(
    q: Tensor,
    k: Tensor,
    block: int = 64,
    alpha: float = 0.5,
    epsilon: float = 1e-4,
    sigma: float = 0.9,
    scale: float | None = None,
) -> Tensor:
    """How badly an order suits each head: alpha * M_sparse + (1 - alpha) * M_quant, f32 [H].

    M_sparse is the share of blocks that are not sparse (a block is sparse where more than a share
    sigma of its probabilities lie below epsilon), M_quant the mean over the blocks of largest
    probability / mean probability. The lowest cost wins.
    """
    dense_blocks = incoherence = torch.zeros(q.shape[1], device=q.device)
    count = 0
    for queries in q.split(block, dim=2):
        rows = tokred.attention_rows(queries, k, scale=scale)
        for tile in rows.split(block, dim=3):
            low = (tile < epsilon).float().mean((2, 3))
            dense_blocks = dense_blocks + (low <= sigma).float().mean(0)
            peak = tile.amax((2, 3)) / tile.mean((2, 3)).clamp(min=1e-20)
            incoherence = incoherence + peak.mean(0)
            count += 1
    return (alpha * dense_blocks + (1 - alpha) * incoherence) / count


def choose_orders(
    q: Tensor, k: Tensor, frames: int, height: int, width: int, num_text: int = 0, **cost: Any
) -> list[str]:
    """The order of lowest cost for every head, for q, k [B, H, N, D] in "FHW" order."""
    costs = []
    for order in ORDERS:
        permutation, _ = axis_order(order, frames, height, width, num_text)
        permutation = permutation.to(q.device)
        costs.append(order_cost(q[:, :, permutation], k[:, :, permutation], **cost))
    best = torch.stack(costs).argmin(0)
    return [ORDERS[i] for i in best.tolist()]


def paro_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    permutations: Tensor,
    mask: Tensor,
    block: int = 64,
    scale: float | None = None,
) -> Tensor:
    """Block-sparse attention in each head's own token order.

    Args:
        q, k, v: [B, H, N, D] in the model's order.
        permutations: int64 [H, N], axis_order of each head.
        mask: bool [1, H, n, n] from calibrate_mask.

    Returns:
        [B, H, N, D] in the model's order; a row of blocks without any block gives 0.
    """
    index = permutations.to(torch.int32)[None].expand(q.shape[0], -1, -1)
    q, k, v = tokred.gather_tokens([q, k, v], index)
    out, _ = tokred.block_sparse_attention(q, k, v, mask, block, block, scale=scale)
    inverse = permutations.argsort(-1).to(torch.int32)[None].expand(q.shape[0], -1, -1)
    return tokred.gather_tokens([out], inverse)[0]


METHOD = Method(
    title=(
        "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in "
        "Visual Generation Models"
    ),
    arxiv="2506.16054",
    family=Family.PREFILL,
    needs=(Needs.VIDEO_DIFFUSION, Needs.CALIBRATION),
    status="exact",
    summary="reorder a video's tokens so that attention becomes blocks, keep fixed ones",
)
