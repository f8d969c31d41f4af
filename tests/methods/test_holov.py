"""HoloV against loops over runs and tokens, and in the crops of an image."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from cases.selection import best_of, check_rows, padding, picked, uniform, visual_call
from tokred.methods.holov import (
    HolovOptions,
    _decided,
    run_scores,
    runs_of,
    score_bounds,
    select_tokens,
)


def transcription(
    x: torch.Tensor,
    attention: torch.Tensor,
    valid: list[int],
    k: int,
    runs: int = 16,
    order: str = "score",
    beta: float = 0.09,
) -> list[int]:
    unit, a = functional.normalize(x.double(), dim=-1), attention.double().mean(0)
    size, longer = divmod(len(x), runs)
    members, scores, start = [], [], 0
    for run in range(runs):
        end = start + size + (run < longer)
        here = [i for i in range(start, end) if i in valid]
        start = end
        members.append(here)
        if len(here) < 2:
            scores.append(a[here].mean().item() if here else 0.0)
            continue
        cosine = (unit[here] @ unit[here].T).fill_diagonal_(0)
        others = len(here) - 1
        mean = cosine.sum(1) / others
        variety = (cosine - mean[:, None]).square().sum(1) / others
        strong = 1000 * a[here]
        scale = strong.abs().mean() / (variety.abs().mean() + 1e-6)
        scores.append((strong + beta * scale * variety).mean().item())
    total = sum(scores) + 1e-6
    shares = [math.floor(s / total * k) for s in scores]
    for run in sorted(range(runs), key=lambda r: -scores[r])[: k - sum(shares)]:
        shares[run] += 1
    picks = [i for run in range(runs) for i in best_of(a, shares[run], members[run])][:k]
    return sorted(picks) if order == "position" else picks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "runs", "k", "order"),
    [
        *((64, 16, 21, "score"), (61, 7, 20, "position"), (64, 4, 0, "score")),
        *((18, 16, 9, "score"), (270, 4, 50, "score")),
    ],
)
def test_picks(dtype: torch.dtype, tokens: int, runs: int, k: int, order: str) -> None:
    inputs = [tokens_of(3, tokens).to(dtype), uniform(3, 4, tokens).to(dtype)]
    options = dict(k=k, runs=runs, order=order)
    check_rows(select_tokens, transcription, inputs, padding(3, tokens), **options)


def test_bounds_of_the_scores() -> None:
    """They hold, for tokens without any variety too, and are close enough to share by."""
    attention, members = uniform(3, 270), runs_of(270, 4)
    for x, beta in ((tokens_of(3, 270), 0.09), (torch.ones(3, 270, 40), 0.5)):
        for valid in (torch.ones(3, 270, dtype=torch.bool), uniform(3, 270, seed=1) < 0.7):
            scores = run_scores(x, attention, members, beta, valid)
            low, high = score_bounds(x, attention, members, beta, valid)
            assert (low <= scores).all() and (scores <= high).all()
            assert bool(_decided(low, high, 50)) == (beta == 0.09)


def test_weights_that_leave_a_share_open() -> None:
    low = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert _decided(low, low + 1e-4, 16)  # 1.6, 3.2, 4.8 and 6.4, and two left
    assert not _decided(low, low + 0.3, 16)  # the second may get 4
    assert not _decided(low, low + 1e-4, 10)  # the smallest of the bounds do not reach 1
    assert not _decided(torch.ones(1, 4), torch.full((1, 4), 1.0001), 5)  # which of four?
    assert not _decided(low - 2, low, 16) and not _decided(low * torch.nan, low, 16)


def test_what_a_run_cannot_use() -> None:
    x, attention = tokens_of(1, 32), torch.full((1, 32), 1e-4)
    attention[0, :8] = 1.0
    lost = select_tokens(x, attention, 20, runs=4)
    assert len(picked(lost[0])) == 8 and picked(lost[0]) == transcription(
        x[0], attention, [*range(32)], 20, 4
    )
    assert len(picked(select_tokens(x, attention, 20, runs=4, redistribute=True)[0])) == 20


def test_runs() -> None:
    assert runs_of(7, 3).tolist() == [[0, 1, 2], [3, 4, -1], [5, 6, -1]]
    assert select_tokens(torch.ones(2, 0, 3), torch.ones(2, 0), 4).tolist() == [[-1] * 4] * 2
    assert len(picked(select_tokens(tokens_of(1, 5), uniform(1, 5), 9)[0])) == 5


def test_equal_scores_and_nan() -> None:
    x = torch.ones(1, 32, 4)
    assert select_tokens(x, torch.ones(1, 32), 8, runs=4).tolist() == [[0, 1, 8, 9, 16, 17, 24, 25]]
    attention = uniform(1, 32)
    attention[0, 3] = torch.nan
    assert 3 not in picked(select_tokens(tokens_of(1, 32), attention, 32, runs=4)[0])


def test_in_crops() -> None:
    call = visual_call(tiling=(1, 2))
    kept = HolovOptions(keep=21, runs=4).reduce_visual(call)
    attention = call.class_attention(-2)
    for row in range(2):
        expected = []
        for crop in range(3):
            part = slice(crop * 24, crop * 24 + 24)
            inside = call.tokens[row, part], attention[row, :, part]
            expected += [i + crop * 24 for i in transcription(*inside, [*range(24)], 7, 4)]
        assert picked(kept[row]) == expected


def test_refusals() -> None:
    with pytest.raises(ValueError, match="runs must be at least 1, got 0"):
        select_tokens(torch.ones(1, 4, 3), torch.ones(1, 4), 2, runs=0)
    with pytest.raises(ValueError, match="runs must be at least 1, got 0"):
        HolovOptions(runs=0)
    with pytest.raises(ValueError, match="order must be"):
        select_tokens(torch.ones(1, 4, 3), torch.ones(1, 4), 2, order="run")
