"""TCA-Attention, approximate: each head keeps the least redundant tokens of every block.

Training-free Context-adaptive Attention for Efficient Long Context Modeling (arXiv 2512.09238).

As published: the choices of tokens per block, the prior over them, and that redundancy decides
inside a block. Different, or not known to be the same: the redundancy of a key is its mean cosine
similarity to the other keys of its block; every block of a head keeps the same number of tokens,
where a published configuration is the share of blocks that keep 1, 2, 4, .. of them; calibration
takes the smallest number that meets a tolerance of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred

from ._lists import check_minimum, check_number
from ._method import Family, Method, Needs


def budget_prior(block: int, mu: float, sigma: float) -> tuple[Tensor, Tensor]:
    """The choices 1, 2, 4, .. block of tokens per block, and their prior probabilities.

    p(K) is proportional to exp(-(log2 K - mu)^2 / (2 sigma^2)).

    Raises:
        ValueError: block is no power of two, or sigma is not positive.
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"block must be a power of two, got {block}")
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    exponents = torch.arange(block.bit_length())
    return 2**exponents, (-((exponents - mu) ** 2) / (2 * sigma**2)).softmax(0)


def calibrate_budgets(
    q: Tensor, k: Tensor, v: Tensor, block: int = 16, tolerance: float = 0.05
) -> Tensor:
    """i32 [Hkv]: the fewest tokens a block with which a head is close to full attention.

    Args:
        q: [B, Hq, L, D], k: [B, Hkv, N, D], v: [B, Hkv, N, Dv] of one calibration pass.
        tolerance: the largest relative error (Frobenius norm, over the heads of a group).

    Raises:
        ValueError: block is no power of two, or tolerance negative.
    """
    check_number(0, tolerance=tolerance)
    heads = k.shape[1]
    full = tokred.biased_attention(q, k, v)[0].float()
    budgets = torch.full((heads,), block, dtype=torch.int32, device=q.device)
    for choice in reversed(budget_prior(block, 0.0, 1.0)[0].tolist()):
        kept = core_tokens(k, torch.full_like(budgets, choice), block)
        out = tokred.sparse_attention(q, k, v, kept[:, :, None])[0].float()
        error = (out - full).unflatten(1, (heads, -1)).square().sum((0, 2, 3, 4)).sqrt()
        norm = full.unflatten(1, (heads, -1)).square().sum((0, 2, 3, 4)).sqrt()
        budgets = torch.where(error <= tolerance * norm, choice, budgets)
    return budgets


def core_tokens(k: Tensor, budgets: Tensor, block: int = 16) -> Tensor:
    """The tokens that each head keeps.

    Args:
        k: [B, Hkv, N, D]; budgets: i32 [Hkv], tokens kept of every block.

    Returns:
        i32 [B, Hkv, blocks * block] by position, -1 padded behind the tokens of every block. A last
        block with fewer tokens than its budget keeps them all.

    Raises:
        ValueError: a block below 1, or budgets that are not one a key head.
    """
    check_minimum(1, block=block)
    if [*budgets.shape] != [k.shape[1]]:
        raise ValueError(f"budgets must be [{k.shape[1]}], one a key head, got {[*budgets.shape]}")
    stats = tokred.similarity_stats(k.detach().flatten(0, 1), exclude_self=True, block_size=block)
    novelty = -stats.mean.unflatten(0, k.shape[:2])
    per_row = budgets.to(torch.int32)[None]
    return tokred.topk(novelty, block, row_k=per_row, order="position", block_size=block)[
        1
    ].flatten(-2)


def tca_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    budgets: Tensor,
    block: int = 16,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of all queries to core_tokens(k, budgets, block): out, lse.

    A causal query before the first token kept has out 0 and lse -inf.
    """
    kept = core_tokens(k, budgets, block)[:, :, None]
    return tokred.sparse_attention(q, k, v, kept, scale=scale, causal=causal, block_q=q.shape[2])


METHOD = Method(
    title="Training-free Context-adaptive Attention for Efficient Long Context Modeling",
    arxiv="2512.09238",
    family=Family.PREFILL,
    needs=(Needs.LANGUAGE_MODEL, Needs.CALIBRATION),
    status="approximate",
    summary="each head keeps the least redundant tokens of every block",
)
