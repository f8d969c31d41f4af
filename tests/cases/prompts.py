"""Prompts with images, for methods that prune visual tokens inside a language model."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.patching import PromptCall


def prompt_call(
    layer: int = 3,
    num_layers: int = 6,
    visual: tuple[int, ...] = (24, 17, 0),
    before: int = 3,
    after: int = 7,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PromptCall:
    """One row for each number of visual tokens, `before` and `after` text around them, padded on
    the left; queries of four heads, keys of two, of both layers."""
    generator = torch.Generator().manual_seed(seed)
    length, rows = before + max(visual) + after, len(visual)
    valid = torch.zeros(rows, length, dtype=torch.bool)
    is_visual = valid.clone()
    slots = torch.full((rows, max(visual)), -1, dtype=torch.int32)
    for row, count in enumerate(visual):
        first = length - after - count
        valid[row, first - before :] = True
        is_visual[row, first : first + count] = True
        slots[row, :count] = torch.arange(first, first + count)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    heads = [(random(rows, 4, length, 8), random(rows, 2, length, 8)) for _ in range(2)]
    return PromptCall(
        hidden=random(rows, length, 12),
        layer=layer,
        num_layers=num_layers,
        valid=valid,
        visual=is_visual,
        slots=slots,
        original=torch.tensor(visual, dtype=torch.int32),
        previous=lambda: heads[0],
        following=lambda: heads[1],
        scale=0.35,
    )


def attention_of(call: PromptCall, of: str) -> Tensor:
    """The causal attention matrix f64 [B, 4, L, L] of that layer; rows of padding are 0."""
    q, k = getattr(call, of)()
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * call.scale
    length = logits.shape[-1]
    seen = torch.ones(length, length).tril().bool() & call.valid[:, None, None]
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()


def ranked(scores: list[float], k: int) -> list[int]:
    """The k best places, ascending; the lower one on a tie, NaN never."""
    order = sorted((-s, i) for i, s in enumerate(scores) if s == s)
    return sorted(i for _, i in order[:k])


def picks_of(chosen: Tensor) -> list[list[int]]:
    """Every row of chosen i32 [B, k] without its -1, which must come last."""
    rows = []
    for row in chosen.tolist():
        real = [i for i in row if i >= 0]
        assert row == real + [-1] * (len(row) - len(real))
        rows.append(real)
    return rows


def cut(call: PromptCall, chosen: Tensor) -> PromptCall:
    """The call of the next stage: visual tokens that are not chosen have become padding."""
    places = torch.where(chosen >= 0, call.slots.gather(1, chosen.clamp(min=0).long()), -1)
    visual = torch.zeros_like(call.visual)
    for row, listed in enumerate(places.tolist()):
        visual[row, [place for place in listed if place >= 0]] = True
    valid = call.valid & ~(call.visual & ~visual)
    return PromptCall(
        call.hidden, call.layer, call.num_layers, valid, visual, places.to(torch.int32),
        call.original, call.carried, call.previous, call.following, call.scale,
    )  # fmt: skip
