"""Cases of greedy_select."""

from __future__ import annotations

import math
from typing import Any

import torch
from case import Case, op_case
from compare import Mismatch
from draw import Draw
from torch import Tensor

_TOKENS = (0, 1, 2, 3, 15, 16, 17, 31, 33, 48, 64, 65, 90)
_CHANNELS = (0, 1, 2, 3, 8, 15, 16, 17, 33, 64, 65, 100)
RULES = ("kcenter", "maxsum", "mmr", "facility")


def _apart(x: Tensor, metric: str) -> Tensor:
    if metric == "dot":
        return -(x @ x.T)
    if metric == "l2":
        return (x[:, None] - x).norm(dim=-1)
    norm = x.norm(dim=-1).clamp(min=1e-12)
    return 1 - (x @ x.T) / norm[:, None] / norm


def _error(x: Tensor, metric: str) -> float:
    """The rounding error of a distance."""
    channels = 2e-6 * (1 + x.shape[1] / 32)
    if metric == "cosine" or not x.numel():
        return channels
    squares = float(x.square().sum(-1).max())
    return channels * squares if metric == "dot" else math.sqrt(channels * squares)


@op_case
def greedy_select(draw: Draw) -> Case:
    batch, tokens = draw.batch(), draw.size(_TOKENS)
    x = draw.floats((batch, tokens, draw.size(_CHANNELS)), draw.dtype())
    if draw.chance(0.2):
        x = draw.spoiled(x)
    rule = draw.choice(RULES)
    some: dict[str, Any] = {
        "x": x,
        "k": draw.choice([0, 1, 2, 5, tokens // 2, tokens, tokens + 3]),
        "rule": rule,
        "metric": draw.choice(["cosine", "dot"] if rule == "facility" else ["cosine", "dot", "l2"]),
        "first": draw.choice(["rule", "rule", "norm", "isolated"]),
        "trade_off": draw.choice([0.0, 0.5, 0.7, 1.0]),
    }
    if draw.chance(0.5):
        weight = draw.floats((batch, tokens))
        some["weight"] = weight if draw.chance(0.3) else weight.abs()
    if draw.chance(0.5):
        some["mask"] = draw.mask((batch, tokens))
    if draw.chance(0.4):
        some["start"] = draw.indices((batch,), tokens)
    batched = ("x", "weight", "mask", "start")
    loose = ("weight", "mask", "start")
    return Case(
        "greedy_select", some, check=lambda out: _check(some, out), batched=batched, loose=loose
    )


def _check(some: dict[str, Any], out: Tensor) -> None:
    x, k, tokens = some["x"], some["k"], some["x"].shape[1]
    here = x.float().square().sum(-1).isfinite()
    here = here & some.get("mask", torch.ones_like(here))
    weights = some.get("weight", torch.ones(x.shape[:2])).double()
    for b, picks in enumerate(out.tolist()):
        # Norms near the largest float round to an infinity or not.
        if not bool((x[b].double().abs() < 1e15).all()) and bool(x[b].isfinite().any()):
            big = x[b].double().square().sum(-1) > 1e37
            if bool(big.any()):
                continue
        count = min(k, int(here[b].sum()))
        if picks[count:] != [-1] * (k - count):
            raise Mismatch(f"item {b} picks {picks}, of {count} tokens")
        chosen = picks[:count]
        if len(set(chosen)) < count or not all(0 <= t < tokens and here[b, t] for t in chosen):
            raise Mismatch(f"item {b} picks {picks}: repeated, masked or out of range")
        _check_item(some, b, chosen, here[b], weights[b])


def _check_item(
    some: dict[str, Any], b: int, picks: list[int], here: Tensor, weight: Tensor
) -> None:
    rule, metric, trade_off = some["rule"], some["metric"], some["trade_off"]
    x = torch.where(here[:, None], some["x"][b], 0).double()
    apart, error = _apart(x, metric), _error(x, metric) * (1 + float(weight.abs().sum() > 0))
    likeness = 1 - apart if metric == "cosine" else -apart
    left, before = here.clone(), []
    largest = float(weight[here].abs().max()) if bool(here.any()) else 0.0
    begin = int(some["start"][b]) if "start" in some else -1
    for i, token in enumerate(picks):
        slack = error * (1 + largest)
        if i == 0 and 0 <= begin < len(here) and bool(here[begin]):
            scores = torch.zeros(len(here), dtype=torch.float64)
            scores[begin] = 1
        elif i == 0 and some["first"] == "norm":
            scores = x.norm(dim=-1)
            slack = 1e-5 * float(scores.max())
        elif i == 0 and some["first"] == "isolated":
            others = ~here | torch.eye(len(here), dtype=torch.bool)
            nearest = apart.masked_fill(others, math.inf).amin(1)
            scores = weight * (nearest if int(here.sum()) > 1 else nearest * 0).nan_to_num(0)
        elif rule == "facility":
            covered = likeness[before].amax(0).clamp(min=0) if before else torch.zeros(len(here))
            gains = (likeness - covered[:, None]).clamp(min=0)
            scores, slack = weight * gains[here].sum(0), slack * len(here)
        elif i == 0:
            scores = weight
        elif rule == "maxsum":
            scores, slack = weight * apart[before].sum(0), slack * len(before)
        elif rule == "kcenter":
            scores = weight * apart[before].amin(0)
        else:
            scores = trade_off * weight - (1 - trade_off) * likeness[before].amax(0)
        best = float(scores[left].max())
        if not float(scores[token]) >= best - slack - 1e-30:
            raise Mismatch(
                f"item {b}: pick {i}, {token}, scores {float(scores[token]):.6g}, the best of "
                f"those left {best:.6g}, allowed {slack:.3g}"
            )
        left[token] = False
        before.append(token)
