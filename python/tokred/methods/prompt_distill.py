"""PromptDistill: at one layer keep the prompt tokens that the last one attends to most.

PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient Large
Language Model Inference (arXiv 2503.23274).

The release takes padding on the right only; here it may lie on either side. Cutting the caches of
the layers before the selection, which the release leaves off by default, is up to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import tokred

from ._lists import check_minimum
from ._method import Family, Method, Needs


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


def _prompt_end(
    k: Tensor, prompt_end: int | Tensor | None, mask: Tensor | None
) -> tuple[Tensor, int]:
    """Where the last prompt token of each row stands, and the most tokens from there on.

    int64 [B, 1], or [1, 1] for all rows; and an int.

    Raises:
        ValueError: a prompt_end outside [0, N], or of another shape than [B].
    """
    tokens = k.shape[2]
    if prompt_end is None and mask is not None:
        place = torch.arange(tokens, device=k.device)
        ends = torch.where(mask, place, -1)
        return (ends.amax(1, keepdim=True) if tokens else ends.new_full((len(mask), 1), -1)), 1
    if isinstance(prompt_end, Tensor):
        if [*prompt_end.shape] != [k.shape[0]]:
            raise ValueError(f"prompt_end must be [{k.shape[0]}], got {[*prompt_end.shape]}")
        first, last = (int(f(prompt_end)) for f in (torch.amin, torch.amax))
        ends = prompt_end.to(k.device, torch.int64)[:, None]
    else:
        first = last = max(tokens - 1, 0) if prompt_end is None else prompt_end
        ends = torch.full((1, 1), first, device=k.device)
    if not 0 <= first <= last <= tokens:
        raise ValueError(f"prompt_end must be in [0, {tokens}], got {prompt_end}")
    return ends, tokens - first


def prompt_scores(
    q: Tensor,
    k: Tensor,
    prompt_end: int | Tensor | None = None,
    pooling: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The logit of the last prompt token with the tokens before it, averaged over the heads.

    Args:
        q: [B, Hq, 1, D], the query of the last prompt token; k: [B, Hkv, N, D].
        prompt_end: where the last prompt token stands, for all rows or int [B]; tokens from there
            on are not scored. The last visible token of each row where None.
        pooling: smooth with a window of five; what is not scored counts as zeros.
        mask: bool [B, N], False where a token is padding.

    Returns:
        f32 [B, N], -inf for tokens that may not be chosen.

    Raises:
        ValueError: a prompt_end outside [0, N].
    """
    ends, _ = _prompt_end(k, prompt_end, mask)
    options = {"reduce": "head_mean", "scale": scale, "mask": mask}
    logits = tokred.qk_score(q.detach(), k.detach(), **options)[:, 0]
    hidden = torch.arange(k.shape[2], device=k.device) >= ends
    hidden = hidden if mask is None else hidden | ~mask
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
    prompt_end: int | Tensor | None = None,
    pooling: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Distilled:
    """Keeps num_tokens tokens before the last prompt token, and every visible one from it on.

    Args:
        q, k, prompt_end, pooling, mask, scale: as in prompt_scores.
        hidden: [B, N, C]; position_ids: [B, N] or [1, N].
        num_tokens: tokens chosen by score, at least 0: the last prompt token and those behind it
            come on top. A row that has fewer keeps them all; one that is all padding keeps none.

    Raises:
        ValueError: num_tokens below 0, or a prompt_end outside [0, N].

    A prompt_end of each row waits for the device.
    """
    check_minimum(0, num_tokens=num_tokens)
    scores = prompt_scores(q, k, prompt_end, pooling, mask, scale)
    ends, most = _prompt_end(k, prompt_end, mask)
    behind = torch.arange(k.shape[2], device=k.device) >= ends
    behind = behind.expand(k.shape[0], -1) if mask is None else behind & mask
    _, indices, lengths = tokred.topk_with_counts(
        scores,
        min(num_tokens + most, k.shape[2]),
        order="position",
        row_k=(num_tokens + behind.sum(1)).to(torch.int32),
        must_keep=behind.contiguous(),
    )
    positions = position_ids.expand(k.shape[0], -1)
    (positions,) = tokred.gather_tokens([positions], indices)
    if hidden.requires_grad:
        rows = indices.clamp(min=0).long()[..., None].expand(-1, -1, hidden.shape[2])
        hidden = hidden.gather(1, rows).masked_fill(indices[..., None] < 0, 0)
    else:
        (hidden,) = tokred.gather_tokens([hidden], indices)
    return Distilled(indices, hidden, positions, lengths)


METHOD = Method(
    title=(
        "PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient "
        "Large Language Model Inference"
    ),
    arxiv="2503.23274",
    family=Family.PRUNE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="from one layer on keep the prompt tokens that the last one attends to most",
)
