"""ASAP: of a chain of thought, the steps whose first token comes as no surprise are left out.

Pruning the Unsurprising: Efficient Code Reasoning via First-Token Surprisal (arXiv 2508.05988).

An approximate version of the second stage: surprisal is measured once, in the whole chain, and the
least surprising steps go until the rest fits the budget. The first stage, in which a language model
shortens the chain after a direct one, and the training on what is left are not ours to give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import positions_of


def first_token_surprisal(logits: Tensor, ids: Tensor, starts: Tensor) -> Tensor:
    """-log p of the first token of every step, given all before it.

    Args:
        logits: [B, N, V], of a language model on ids: what it expects behind each token.
        ids: integers [B, N], question and chain.
        starts: i32 [B, S], where each step begins; -1 behind a row's last step.

    Returns:
        f32 [B, S]; inf for a step at the very beginning, NaN for none.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.dim() != 3 or logits.shape[:2] != ids.shape or starts.shape[:1] != ids.shape[:1]:
        raise ValueError(
            "logits must be [B, N, V], ids [B, N] and starts [B, S], got "
            f"{list(logits.shape)}, {list(ids.shape)} and {list(starts.shape)}"
        )
    place = starts.long()
    before = (place - 1).clamp(min=0)[..., None].expand(-1, -1, logits.shape[2])
    expected = logits.detach().gather(1, before).float().log_softmax(-1)
    first = ids.long().gather(1, place.clamp(min=0))
    surprisal = -expected.gather(2, first[..., None])[..., 0]
    surprisal = torch.where(place == 0, torch.inf, surprisal)
    return torch.where(place < 0, torch.nan, surprisal)


def prune_steps(surprisal: Tensor, lengths: Tensor, budget: int | Tensor) -> Tensor:
    """The steps that stay when those of lowest surprisal go until the rest fits.

    Args:
        surprisal: f32 [B, S]; NaN goes first, on a tie the later step.
        lengths: integers [B, S], tokens of every step, 0 for none.
        budget: tokens that may stay, an int or integers [B].

    Returns:
        bool [B, S].

    Raises:
        ValueError: a budget below 0.
    """
    check_count("budget", budget, per_row=True)
    ranked = torch.where(surprisal.isnan(), -torch.inf, surprisal.float())
    order = ranked.argsort(dim=1, descending=True, stable=True)
    total = lengths.long().gather(1, order).cumsum(1)
    limit = torch.as_tensor(budget, device=total.device).reshape(-1, 1)
    fits = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, total <= limit)
    return fits & (lengths > 0)


def steps_to_tokens(keep: Tensor, starts: Tensor, tokens: int, end: Tensor) -> Tensor:
    """The tokens that are left: what is before the first step, the kept steps, what is behind.

    Args:
        keep: bool [B, S]. starts: i32 [B, S], ascending, -1 behind the last.
        tokens: N. end: integers [B], where the last step ends.

    Returns:
        i32 [B, N], ascending, -1 behind the last.
    """
    place = torch.arange(tokens, device=keep.device)
    there = starts >= 0
    begins = torch.where(there, starts, tokens).long().contiguous()
    step = torch.searchsorted(begins, place.expand(len(begins), -1).contiguous(), right=True) - 1
    outside = (step < 0) | (place >= end[:, None])
    return positions_of(outside | keep.gather(1, step.clamp(min=0)))


METHOD = Method(
    title="Pruning the Unsurprising: Efficient Code Reasoning via First-Token Surprisal",
    arxiv="2508.05988",
    family=Family.PRUNE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="leave out the steps of a chain of thought whose first token is least surprising",
)
