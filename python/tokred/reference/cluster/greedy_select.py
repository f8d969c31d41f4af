"""Greedy selection from the whole matrix of distances."""

from __future__ import annotations

import torch
from torch import Tensor

from ..match import NORM_EPS


def distances(x: Tensor, metric: str) -> Tensor:
    """[N, N] of x [N, C]; equal rows have the distance 0 (l2, cosine)."""
    if metric == "dot":
        return -(x @ x.T)
    if metric == "l2":
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    norm = x.norm(dim=-1)
    unit = x / norm.clamp(min=NORM_EPS)[:, None]
    # 1 - cos is half the squared distance of unit rows; what a row lacks of unit length is added.
    apart = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
    lacks = torch.where(norm < NORM_EPS, 0.5 - unit.square().sum(-1) / 2, 0)
    return apart + lacks[:, None] + lacks


def greedy_select(
    x: Tensor,
    k: int,
    rule: str = "kcenter",
    weight: Tensor | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    metric: str = "cosine",
    first: str = "rule",
    trade_off: float = 0.5,
) -> Tensor:
    """See tokred.greedy_select."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, tokens, _ = x.shape
    here = x.float().square().sum(-1).isfinite()
    if mask is not None:
        here = here & mask
    weights = torch.ones(batch, tokens, device=x.device) if weight is None else weight
    indices = torch.full((batch, k), -1, dtype=torch.int32, device=x.device)
    for b in range(batch):
        rows = torch.where(here[b][:, None], x[b], 0).to(dtype)
        apart = distances(rows, metric)
        begin = -1 if start is None else int(start[b])
        if not (0 <= begin < tokens and bool(here[b, begin])):
            begin = -1
        picker = _Picker(apart, rows, weights[b].to(dtype), here[b], rule, metric, trade_off)
        for i in range(min(k, tokens)):
            if i == 0 and begin >= 0:
                token = begin
            else:
                token = _first_of_the_best(picker.scores(first if i == 0 else "rule"))
            if token < 0:
                break
            indices[b, i] = token
            picker.pick(token)
    return indices


def _first_of_the_best(scores: Tensor) -> int:
    scores = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    best = scores.amax()
    return -1 if best == -torch.inf else int((scores == best).nonzero()[0])


class _Picker:
    """The scores of an item's tokens, one pick after another."""

    def __init__(
        self,
        apart: Tensor,
        rows: Tensor,
        weight: Tensor,
        here: Tensor,
        rule: str,
        metric: str,
        trade_off: float,
    ) -> None:
        if rule not in ("kcenter", "maxsum", "mmr", "facility"):
            raise ValueError(f"rule {rule!r} is not one of tokred.greedy_select's")
        self.apart, self.rows, self.weight, self.here = apart, rows, weight, here
        self.rule, self.trade_off = rule, trade_off
        self.similarity = 1 - apart if metric == "cosine" else -apart
        self.left = here.clone()
        self.picked: list[int] = []

    def pick(self, token: int) -> None:
        self.left[token] = False
        self.picked.append(token)

    def scores(self, first: str) -> Tensor:
        """The scores of all tokens, -inf where they cannot be picked."""
        return torch.where(self.left, self._scores(first), -torch.inf)

    def _scores(self, first: str) -> Tensor:
        if first == "norm":
            return self.rows.norm(dim=-1)
        if first == "isolated":
            if int(self.here.sum()) < 2:
                return self.weight * 0
            itself = torch.eye(len(self.here), dtype=torch.bool, device=self.here.device)
            return self.weight * self.apart.masked_fill(~self.here | itself, torch.inf).amin(1)
        if self.rule == "facility":
            covered = self.similarity[self.picked].amax(0).clamp(min=0) if self.picked else 0
            gains = (self.similarity - covered).clamp(min=0)
            return self.weight * torch.where(self.here, gains, 0).sum(1)
        if not self.picked:
            return self.weight
        apart = self.apart[self.picked]
        if self.rule == "maxsum":
            return self.weight * apart.sum(0)
        if self.rule == "kcenter":
            return self.weight * apart.amin(0)
        redundancy = self.similarity[self.picked].amax(0)
        return self.trade_off * self.weight - (1 - self.trade_off) * redundancy
