"""FrugalPrompt: keep the tokens of a prompt that attribution scores highest, in their order.

FrugalPrompt: Reducing Contextual Overhead in Large Language Models via Token Attribution (arXiv
2510.16439).

An approximate version: the scores, which the paper takes from GlobEnc and DecompX, are an argument,
and that the share is rounded down, to at least one token, is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._budgets import check_budget
from ._method import Family, Method, Needs
from ._picks import best


def frugal_keep(
    scores: Tensor,
    ratio: float = 0.8,
    valid: Tensor | None = None,
    must_keep: Tensor | None = None,
) -> Tensor:
    """The tokens of a prompt that stay.

    Args:
        scores: [B, N], how much each token counts; the lower position on a tie, NaN never stays.
        ratio: the share of its valid tokens that a row keeps, rounded down, at least one.
        valid: bool [B, N], False is padding. must_keep: bool [B, N], such as special tokens; they
            count against the share.

    Returns:
        i32 [B, N], ascending, -1 behind the last.

    Raises:
        ValueError: a ratio outside (0, 1].
    """
    check_budget(None, ratio)
    batch, tokens = scores.shape
    if valid is None:
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=scores.device)
    count = valid.sum(1)
    budget = (count.double() * ratio + 1e-9).floor().long()
    budget = torch.minimum(budget.clamp(min=1), count)
    return best(scores, budget, valid, "position", must_keep)


METHOD = Method(
    title=(
        "FrugalPrompt: Reducing Contextual Overhead in Large Language Models via Token Attribution"
    ),
    arxiv="2510.16439",
    family=Family.PRUNE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="keep the tokens of a prompt that are attributed most, in their order",
)
