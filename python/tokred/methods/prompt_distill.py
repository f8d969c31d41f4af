"""PromptDistill: at one layer keep the prompt tokens that the last one attends to most.

PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient Large
Language Model Inference (arXiv 2503.23274).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import tokred


@dataclass(frozen=True)
class Distilled:
    """What later layers run on; rows are left-aligned, `lengths` tokens are real.

    indices i32 [B, M], by position, -1 behind them; hidden [B, M, C], zeros behind them;
    position_ids [B, M], the original ones; lengths i32 [B].
    """

    indices: Tensor
    hidden: Tensor
    position_ids: Tensor
    lengths: Tensor


def prompt_scores(
    q: Tensor,
    k: Tensor,
    prompt_end: int,
    pooling: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The logit of the last prompt token with every prompt token, meaned over the heads.

    Args:
        q: [B, Hq, 1, D], the query of the last prompt token; k: [B, Hkv, N, D].
        prompt_end: tokens from here on are not scored.
        pooling: smooth with a window of five; tokens outside the prompt count as zeros.
        mask: bool [B, N], False where a token is padding.

    Returns:
        f32 [B, N], -inf for tokens that may not be chosen.
    """
    logits = tokred.qk_score(q, k, reduce="head_mean", scale=scale, mask=mask)[:, 0]
    outside = torch.arange(k.shape[2], device=k.device) >= prompt_end
    hidden = outside if mask is None else outside | ~mask
    if pooling:
        zeroed = logits.masked_fill(hidden, 0)
        logits = torch.nn.functional.avg_pool1d(zeroed[:, None], 5, stride=1, padding=2)[:, 0]
    return logits.masked_fill(hidden, -torch.inf)


def prompt_distill(
    q: Tensor,
    k: Tensor,
    hidden: Tensor,
    position_ids: Tensor,
    num_tokens: int = 1024,
    prompt_end: int | None = None,
    pooling: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Distilled:
    """Keeps num_tokens prompt tokens, and every token from prompt_end on.

    Args:
        q, k, pooling, mask, scale: as in prompt_scores.
        hidden: [B, N, C]; position_ids: [B, N] or [1, N].
        prompt_end: N where None.
    """
    tokens = k.shape[2]
    prompt_end = tokens if prompt_end is None else prompt_end
    scores = prompt_scores(q, k, prompt_end, pooling, mask, scale)
    behind = tokens - prompt_end
    _, indices, lengths = tokred.topk_with_counts(
        scores, min(num_tokens, prompt_end) + behind, order="position", num_locals=behind
    )
    positions = position_ids.expand(k.shape[0], -1)
    hidden, positions = tokred.gather_tokens([hidden, positions], indices)
    return Distilled(indices, hidden, positions, lengths)
