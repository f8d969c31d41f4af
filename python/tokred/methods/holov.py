"""HoloV: share the budget over runs of visual tokens by attention and variety, then by attention.

Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention (arXiv
2510.02912).

The published code gives a run no more than it has tokens, and fills what is left over with rows of
zeros: here with -1, or with redistribute=True other runs get it. Of an image of several crops every
crop keeps as many. Encoders without a class token, which the paper does not have, are ranked by the
mean attention that a token receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred

from ._arguments import check_features, check_scores, features_of, head_mean
from ._budgets import allocate
from ._crops import encoder_attention, select_in_crops
from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import best, close_gaps, in_order, rows_of
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import VisualCall


def runs_of(tokens: int, number: int, device: torch.device | None = None) -> Tensor:
    """i32 [number, ceil(N / number)]: the tokens of runs as even as possible, -1 behind the last.

    The first N % number runs are longer by one.
    """
    size, longer = divmod(tokens, number)
    run = torch.arange(number, dtype=torch.int32, device=device)[:, None]
    place = torch.arange(size + (longer > 0), dtype=torch.int32, device=device)
    first = run * size + run.clamp(max=longer)
    return torch.where(place < size + (run < longer).int(), first + place, -1)


def _in_runs(
    x: Tensor, attention: Tensor, runs: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B * P, n, C], their attention f32 [B * P, n], 0 where there is none, and a mask."""
    batch, (number, width) = x.shape[0], runs.shape
    picks = runs.flatten().expand(batch, -1).contiguous()
    there = ((runs >= 0) & valid[:, runs.clamp(min=0).long()]).flatten(0, 1)
    even = number * width == x.shape[1]
    rows = (x if even else rows_of(x, picks)).view(batch * number, width, -1)
    seen = rows_of(attention[..., None], picks).view(batch * number, width)
    return rows, seen.masked_fill(~there, 0.0), there


def run_scores(x: Tensor, attention: Tensor, runs: Tensor, beta: float, valid: Tensor) -> Tensor:
    """f32 [B, P]: the mean over each run of 1000 attention + beta * scale * variety.

    The variety of a token is the variance of its cosines to the others of its run, its own cosine
    counting as 0 beside their mean; scale = mean |1000 attention| / mean |variety|, of the run. A
    run of one token has its attention alone.
    """
    rows, seen, there = _in_runs(x, attention, runs, valid)
    count = there.sum(1)
    stats = tokred.similarity_stats(rows, exclude_self=True, mask_a=there.contiguous())
    others = (count - 1).clamp(min=1)[:, None]
    variety = (stats.variance + stats.mean.square() / others).masked_fill(~there, 0.0)
    present = count.clamp(min=1)
    strong = 1000 * seen.sum(1) / present
    scale = 1000 * seen.abs().sum(1) / present / (variety.abs().sum(1) / present + 1e-6)
    score = torch.where(
        count > 1, strong + beta * scale * variety.sum(1) / present, seen.sum(1) / present
    )
    return score.view(x.shape[0], -1)


def score_bounds(
    x: Tensor, attention: Tensor, runs: Tensor, beta: float, valid: Tensor, sample: int = 16
) -> tuple[Tensor, Tensor]:
    """f32 [B, P] each: run_scores are from the first to the second, by the first tokens of a run.

    scale * variety, averaged over a run, is 1000 mean |attention| * V / (V + 1e-6) with V the mean
    variety. A part of the varieties, none of which is negative, bounds V from below.

    O(B N sample C) time, where run_scores take O(B N^2 C / P).
    """
    rows, seen, there = _in_runs(x, attention, runs, valid)
    rows, count = rows.float(), there.sum(1)
    first = rows[:, :sample]
    length = torch.linalg.vector_norm(rows, dim=-1).clamp(min=1e-12)
    cosine = first @ rows.mT / (length[:, : first.shape[1], None] * length[:, None])
    cosine.diagonal(dim1=1, dim2=2).zero_()
    cosine = cosine.masked_fill(~there[:, None], 0.0)
    others = (count - 1).clamp(min=1)[:, None]
    mean, square = cosine.sum(2) / others, cosine.square().sum(2) / others
    # Less than rounding may have added.
    variety = ((1 - 1e-4) * square - mean.square()).clamp(min=0)
    present = count.clamp(min=1)
    smallest = 0.9 * variety.masked_fill(~there[:, :sample], 0.0).sum(1) / present
    strong, most = 1000 * seen.sum(1) / present, beta * 1000 * seen.abs().sum(1) / present
    ends = torch.stack([strong + most * smallest / (smallest + 1e-6), strong + most])
    ends = torch.where(count > 1, ends, seen.sum(1) / present).view(2, x.shape[0], -1)
    slack = 1e-5 * ends.abs().amax(0)
    return ends.amin(0) - slack, ends.amax(0) + slack


def _decided(low: Tensor, high: Tensor, k: int) -> Tensor:
    """Whether all weights from low to high f32 [B, P], from 0 on, share k alike: bool.

    Every part rounds down to the same, and those that get what is left have the highest scores.
    """
    low, high = low.double(), high.double()
    smallest = (k * low / (low + high.sum(1, keepdim=True) - high)).floor()
    most = (k * high / (high + low.sum(1, keepdim=True) - low)).floor()
    left = (k - smallest.sum(1, keepdim=True)).nan_to_num(0.0).long().clamp(0, low.shape[1])
    descending, order = low.sort(1, descending=True)
    behind = high.gather(1, order).flip(1).cummax(1).values.flip(1)
    ends = torch.nn.functional.pad(descending, (1, 0), value=torch.inf).gather(1, left)
    starts = torch.nn.functional.pad(behind, (0, 1), value=-torch.inf).gather(1, left)
    return (low >= 0).all() & (smallest == most).all() & (ends > starts).all()


def select_tokens(
    x: Tensor,
    attention: Tensor,
    k: int,
    valid: Tensor | None = None,
    order: str = "score",
    runs: int = 16,
    beta: float = 0.09,
    redistribute: bool = False,
) -> Tensor:
    """Every run of neighbouring tokens gets its part of k by score, and keeps the most attended.

    What rounding leaves goes to the runs of highest score, one each.

    Args:
        x: [B, N, C], the visual tokens. attention: [B, H, N] or [B, N], of the class token.
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "score", as published: run after run, by descending attention in each; or "position".
        runs: how many, at most N.
        beta: how much variety counts.
        redistribute: see the module; a k of N or more keeps all in any case.

    Returns:
        i32 [B, k], -1 behind the last.

    Raises:
        ValueError: another shape or order, or no run.

    O(B N^2 C / runs) time, O(B N C) memory. On the CPU bounds of the scores, in O(B N C), share
    the budget of long runs where they decide it, as they all but always do.
    """
    check_count("k", k)
    check_features("x", x)
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}")
    batch, tokens = x.shape[:2]
    attention = head_mean(attention)
    check_scores("attention", attention, x, valid)
    valid = torch.ones_like(attention, dtype=torch.bool) if valid is None else valid
    if tokens == 0:
        return torch.full((batch, k), -1, dtype=torch.int32, device=x.device)
    sampled = tokens >= 64 * runs and not (x.is_cuda or torch.compiler.is_compiling())
    members = runs_of(tokens, min(runs, tokens), x.device)
    x, attention = features_of(x), attention.contiguous()
    scores = None
    if sampled and not (redistribute or k >= tokens):
        low, high = score_bounds(x, attention, members, beta, valid)
        scores = low if bool(_decided(low, high, k)) else None
    if scores is None:
        scores = run_scores(x, attention, members, beta, valid)
    inside = members.clamp(min=0).long()
    there = (members >= 0) & valid[:, inside]
    shares = allocate(scores, k, there.sum(-1), "weight", redistribute or k >= tokens)
    width = min(k, members.shape[1])
    places = best(attention[:, inside], shares, there, "score", places=width)
    tokens_of_run = members.expand(batch, -1, -1).gather(2, places.clamp(min=0).long())
    picks = torch.where(places >= 0, tokens_of_run, -1).flatten(1)
    picks = torch.nn.functional.pad(picks, (0, max(0, k - picks.shape[1])), value=-1)
    return in_order(close_gaps(picks, k), order)


@dataclass(frozen=True)
class HolovOptions(VisualOptions):
    """Options of tokred.patch(model, "holov", ...).

    keep: visual tokens kept per image. ratio: the share kept instead.
    runs: parts of the row of tokens that share the budget. beta: how much variety counts.
    redistribute: give what a short run cannot use to others. layer: of the encoder, whose attention
    is read. positions, newlines: as VisualOptions has them.
    """

    runs: int = 16
    beta: float = 0.09
    redistribute: bool = False
    layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs < 1:
            raise ValueError(f"runs must be at least 1, got {self.runs}")

    def encoder_layers(self, num_layers: int) -> list[int]:
        """The one that is read."""
        return [self.layer]

    def reduce_visual(self, call: VisualCall) -> Tensor | None:
        """select_tokens in every crop."""

        def select(x: Tensor, attention: Tensor, k: int, valid: Tensor) -> Tensor:
            return select_tokens(
                x,
                attention,
                k,
                valid,
                runs=self.runs,
                beta=self.beta,
                redistribute=self.redistribute,
            )

        attention = encoder_attention(call, self.layer)
        count = self.count(call.tokens.shape[1])
        return select_in_crops(call, count, select, call.features, attention, order="score")


METHOD = Method(
    title=(
        'Don\'t Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context '
        "Retention"
    ),
    arxiv="2510.02912",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="share the budget over runs of visual tokens, of which the most attended are kept",
    options=HolovOptions,
)
