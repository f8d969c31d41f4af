"""Prompts of which tokens are dropped: which stay, where they go, and what a cache knows of that.

A row's tokens that stay move together, to the right where the batch is padded on the left (or not
at all), else to the left. What decoding needs to go on from there belongs to the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "tokred_prompt"


@dataclass(frozen=True)
class Kept:
    """source: i64 [B, M], the token of the prompt that each place holds; valid: bool [B, M], False
    for padding; whole: whether no place is padding."""

    source: Tensor
    valid: Tensor
    whole: bool

    def gather(self, x: Tensor, fill: Any = 0, dim: int = -1) -> Tensor:
        """x [..., L, ...], batch first among its last two or at 0, -> [..., M, ...].

        Args:
            dim: of the tokens; that of the batch is 0, or just before where x has planes in front.
            fill: of the padding.
        """
        dim = dim % x.dim()
        batch = dim - 1 if x.dim() == 3 and dim == 2 else 0
        shape = [1] * x.dim()
        shape[batch], shape[dim] = self.source.shape
        size = list(x.shape)
        size[batch], size[dim] = self.source.shape
        if x.shape[batch] != self.source.shape[0]:
            x = x.expand(*(n if i == batch else -1 for i, n in enumerate(size)))
        return x.gather(dim, self.source.view(shape).expand(size)).masked_fill(
            ~self.valid.view(shape), fill
        )

    def last(self, x: Tensor) -> Tensor:
        """x [..., B, M] at the last token of each row: [..., B]."""
        place = torch.arange(x.shape[-1], device=x.device)
        last = (self.valid * place).amax(1, keepdim=True)
        return x.gather(-1, last.expand(*x.shape[:-1], 1))[..., 0]

    def ranks(self) -> Tensor:
        """i64 [B, M]: 0, 1, ... along the tokens of each row."""
        return (self.valid.cumsum(1) - 1).clamp(min=0)


def keep_in_order(keys: Tensor, left_padded: bool) -> Kept:
    """The tokens of each row by their keys.

    Args:
        keys: i64 [B, L], L for tokens that are dropped, else below; ascending along the row that
            comes out.
        left_padded: rows end at the right, else they begin at the left.
    """
    length = keys.shape[1]
    order = keys.argsort(dim=1, stable=True)
    counts = (keys < length).sum(1)
    longest, shortest = (int(x) for x in torch.stack([counts.amax(), counts.amin()]).tolist())
    place = torch.arange(longest, device=keys.device)
    shift = longest - counts[:, None] if left_padded else torch.zeros_like(counts[:, None])
    place = place - shift
    valid = (place >= 0) & (place < counts[:, None])
    source = order.gather(1, place.clamp(min=0))
    return Kept(source, valid, longest == shortest)


def narrow_mask(mask: Tensor | None, kept: Kept) -> Tensor | None:
    """The attention mask of the tokens that stay, of one for the whole prompt.

    Args:
        mask: None where it is causal without padding; bool [B | 1, 1, L, L], True is visible;
            floating-point, added to the logits; or [B, L].

    Padding attends to itself, so that no row of a softmax is empty.
    """
    if mask is None:
        if kept.whole:
            return None
        places = kept.source.shape[1]
        causal = torch.ones(places, places, dtype=torch.bool, device=kept.source.device).tril()
        own = causal.diagonal().diag()
        return causal & kept.valid[:, None, None] | own
    if mask.dim() == 2:
        return kept.valid.to(mask.dtype)
    batch, places = kept.source.shape
    mask = mask.expand(batch, -1, -1, -1)
    rows = kept.source[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    columns = kept.source[:, None, None, :].expand(-1, mask.shape[1], places, -1)
    mask = mask.gather(2, rows).gather(3, columns)
    if kept.whole:
        return mask
    own = torch.eye(places, dtype=torch.bool, device=mask.device)
    seen = kept.valid[:, None, None]
    if mask.dtype == torch.bool:
        return mask & seen | own
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min).masked_fill(own, 0)


def extend_mask(mask: Tensor | None, kept: Kept, length: int, tail: int, queries: int) -> Any:
    """The same for `queries` tokens behind the prompt's `length`, of `tail` that are there now.

    Args:
        mask: [B | 1, 1, queries, length + tail], or as in narrow_mask.
    """
    if mask is None:
        if kept.whole:
            return None
        after = torch.ones(queries, tail, dtype=torch.bool, device=kept.source.device)
        after = after.tril(tail - queries)
        before = kept.valid[:, None, None].expand(-1, -1, queries, -1)
        return torch.cat([before, after.expand(len(before), 1, -1, -1)], -1)
    if mask.dim() == 2:
        return torch.cat([kept.valid.to(mask.dtype), mask[:, length:]], 1)
    mask = mask.expand(len(kept.source), -1, -1, -1)
    columns = kept.source[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    before, after = mask.gather(3, columns), mask[..., length:]
    seen = kept.valid[:, None, None]
    if mask.dtype == torch.bool:
        before = before & seen
    else:
        before = before.masked_fill(~seen, torch.finfo(mask.dtype).min)
    return torch.cat([before, after], -1)


@dataclass
class Stage:
    """Tokens that the layers from `layer` on have not seen: kept are the places of those they have
    among the tokens of the first layer. last: i64 [B], the positions of the rows' last tokens where
    they were numbered anew."""

    layer: int
    kept: Kept
    last: Tensor | None = None


@dataclass
class Prompt:
    """A prompt in a cache, of which tokens were dropped.

    length: as the caller knows it. kept: what the first layer saw of it. last: i64 [B] or
    [planes, B], the positions of the rows' last tokens; None where nothing was dropped there.
    cached: how many tokens the first layer's cache holds now.
    """

    length: int
    kept: Kept
    last: Tensor | None
    cached: int = 0
    stages: list[Stage] = field(default_factory=list)

    @property
    def places(self) -> int:
        """Tokens of the prompt in the first layer, padding included."""
        return self.kept.source.shape[1]


def fold(prompt: Prompt, last: Tensor) -> None:
    """Makes tokens that no layer has seen tokens that the prompt does not have.

    Args:
        last: i64 [B] or [planes, B], the positions of the rows' last tokens before they were
            numbered anew.
    """
    if not prompt.stages or prompt.stages[0].layer > 0:
        return
    first, *later = prompt.stages
    source, valid = first.kept.source, first.kept.valid
    place = torch.arange(source.shape[1], device=source.device).expand_as(source)
    spare = prompt.places
    number = torch.zeros_like(source[:, :1]).repeat(1, spare + 1)
    number.scatter_(1, torch.where(valid, source, spare), place)
    prompt.kept = Kept(prompt.kept.source.gather(1, source), valid, first.kept.whole)
    prompt.last = last if first.last is None else first.last
    prompt.stages = [
        Stage(s.layer, Kept(number.gather(1, s.kept.source), s.kept.valid, s.kept.whole), s.last)
        for s in later
    ]


def remember(cache: Any, prompt: Prompt) -> None:
    """Puts the prompt where decoding with this cache, or with a copy of it, finds it."""
    setattr(cache, _ATTRIBUTE, prompt)


def recall(cache: Any) -> Prompt | None:
    """The prompt in a cache, if tokens of it were dropped.

    A copy of a cache shares it until one of them goes on.

    Raises:
        ValueError: the cache was cut or emptied since.
    """
    prompt = getattr(cache, _ATTRIBUTE, None)
    if prompt is None:
        return None
    now = cache.get_seq_length()
    if now == 0:
        delattr(cache, _ATTRIBUTE)
        return None
    if now != prompt.cached:
        raise ValueError(
            f"the cache has {now} tokens, and had {prompt.cached} after its last forward pass: a "
            "cache of which visual tokens were dropped cannot be cut (as assisted generation does)"
        )
    return prompt
