"""FTP: in every block a router sends the tokens that matter through it, and the others past it.

FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing (arXiv
2412.11494).

The router, two layers on four factors, is learned, and so is how many tokens each block computes:
scores and sparsities are arguments. An approximate version: which factors there are is published,
their scales, and that the first tokens and the last are always computed, are ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import tokred
from tokred.selection import ends, scatter_back

from ._lists import check_minimum
from ._method import Family, Method, Needs


def router_factors(
    attention: Tensor, sparsity: float | Tensor, valid: Tensor | None = None
) -> Tensor:
    """What the router knows of every token: position, attention, its rank, the block's sparsity.

    Args:
        attention: [B, N], what every token receives, such as the last one's attention to it.
        sparsity: the share of tokens that pass by the block, or [B].
        valid: bool [B, N]; padding has no position and no rank, and 0 everywhere.

    Returns:
        f32 [B, N, 4]: the position and the rank (0 that of the most attention, the lower index on a
        tie, NaN last), both divided by the number of tokens; the attention divided by its largest
        value; the sparsity.
    """
    attention = attention.detach().float()
    batch, tokens = attention.shape
    there = torch.ones_like(attention, dtype=torch.bool) if valid is None else valid
    count = there.sum(1, keepdim=True).clamp(min=1)
    place = there.cumsum(1) - 1
    known = attention.masked_fill(~there | attention.isnan(), -torch.inf)
    order = known.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(tokens, device=order.device).expand(batch, -1)
    )
    largest = known.amax(1, keepdim=True) if tokens else known.new_zeros(batch, 1)
    part = torch.where(known > -torch.inf, attention, 0) / torch.where(largest > 0, largest, 1)
    whole = torch.as_tensor(sparsity, dtype=torch.float32, device=attention.device).reshape(-1, 1)
    factors = torch.stack([place / count, part, rank / count, whole.expand(batch, tokens)], -1)
    return factors.masked_fill(~there[..., None], 0)


def ftp(
    scores: Tensor,
    sparsity: float,
    valid: Tensor | None = None,
    num_sinks: int = 1,
    num_locals: int = 1,
) -> Tensor:
    """The tokens that a block computes: all but floor(sparsity * N), those of highest score.

    Args:
        scores: [B, N], of the router.
        sparsity: the share of a row's tokens that pass by, in [0, 1].
        valid: bool [B, N]; padding is never computed.
        num_sinks, num_locals: the first and the last tokens of a row that are computed in any case,
            within the budget.

    Returns:
        i32 [B, N - floor(sparsity * N)], by position, -1 behind the last.

    Raises:
        ValueError: a sparsity outside [0, 1], or num_sinks or num_locals below 0.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    check_minimum(0, num_sinks=num_sinks, num_locals=num_locals)
    scores = scores.detach().float()
    tokens = scores.shape[1]
    there = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    count = there.sum(1)
    budget = count - (count.double() * sparsity + 1e-9).floor().long()
    forced = ends(there, num_sinks, num_locals)
    # A NaN score is no reason to leave a place of the budget empty.
    scores = scores.nan_to_num(nan=torch.finfo(torch.float32).min)
    return tokred.topk(
        scores.masked_fill(~there, -torch.inf),
        tokens - int(tokens * sparsity + 1e-9),
        order="position",
        row_k=budget.to(torch.int32),
        must_keep=forced,
    )[1]


def route(
    x: Tensor, computed: Tensor, block: Callable[[Tensor], Tensor], gate: Tensor | None = None
) -> Tensor:
    """The tokens behind a block that only some go through: the others stay as they are.

    Args:
        x: [B, N, C]. computed: i32 [B, K], by position, -1 for none.
        block: of tokens [B, K, C], zeros where there is none; returns them with what it adds.
        gate: [B, N], the router's weight of what the block adds; 1 where None.

    Returns:
        [B, N, C]; differentiable in x, in gate and through the block.
    """
    inside = tokred.unmerge(x, computed)
    done = block(inside)
    if gate is not None:
        weight = tokred.unmerge(gate[..., None].to(x.dtype), computed)
        done = inside + weight * (done - inside)
    return scatter_back(x, done, computed)


METHOD = Method(
    title="FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing",
    arxiv="2412.11494",
    family=Family.PRUNE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="approximate",
    summary="in every block a learned router sends some tokens through and the others past it",
)
