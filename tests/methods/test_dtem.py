"""DTEM's soft choice against the published recursion, and against the hard one it tends to."""

from __future__ import annotations

import pytest
import torch

from cases.dense_tome import mean_of, tome_groups, tome_links
from cases.groups import groups_of, tokens_of
from tokred.methods.dtem import cosine_scores, hard_plan, soft_choice, soft_merge


def test_the_recursion() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    x, total = score / 1.3, torch.zeros_like(score)
    for _ in range(3):
        p = torch.exp(x * 7)
        p = p / p.sum((1, 2), keepdim=True)
        total += p
        x = x + torch.log((1 - p.sum(2, keepdim=True)).clamp(min=1e-6))
    rows = total.sum(2, keepdim=True)
    expected = total / ((rows - 1).clamp(min=0) + 1)
    torch.testing.assert_close(soft_choice(score, 3, 1.3, 7.0), expected)


def test_soft_merge() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, 2, 4, 3, generator=generator).unbind(0)
    wa, wb = 1 + torch.rand(2, 2, 4, generator=generator)
    choice = torch.rand(2, 4, 4, generator=generator) / 3
    merged, left, weight = soft_merge(a, b, wa, wb, choice)
    for item in range(2):
        for j in range(4):
            given = choice[item, :, j] * wa[item]
            total = wb[item, j] + given.sum()
            expected = (wb[item, j] * b[item, j] + (given[:, None] * a[item]).sum(0)) / total
            torch.testing.assert_close(merged[item, j], expected)
            torch.testing.assert_close(weight[item, j], total)
    torch.testing.assert_close(left, wa * (1 - choice.sum(2)).clamp(0, 1))


def test_a_sharp_choice_is_tome() -> None:
    x = tokens_of(1, 17)
    score, mask = cosine_scores(x.double(), 1)
    choice = soft_choice(score, 4, 1.0, 1e5, mask, eps=1e-12)
    hard = torch.zeros(9, 8, dtype=torch.float64)
    for source, destination in tome_links(x[0], 4, 1):
        hard[source // 2, destination // 2] = 1
    torch.testing.assert_close(choice[0], hard, rtol=0, atol=1e-6)
    ones = torch.ones(1, 9).double(), torch.ones(1, 8).double()
    merged, left, _ = soft_merge(x[:, 0::2].double(), x[:, 1::2].double(), *ones, choice)
    for group in tome_groups(x[0], 4, 1):
        odd = [t for t in group if t % 2]
        if odd:
            expected = mean_of(x[0].double(), group)
            torch.testing.assert_close(merged[0, odd[0] // 2], expected, rtol=0, atol=1e-6)
    assert sorted(left[0].round().tolist()) == [0.0] * 4 + [1.0] * 5


def test_it_learns() -> None:
    embedding = tokens_of(1, 9).double().requires_grad_()
    score, mask = cosine_scores(embedding)
    soft_choice(score, 2, mask=mask).square().sum().backward()
    assert embedding.grad.abs().sum() > 0 and embedding.grad.isfinite().all()


def test_hard_plan() -> None:
    x = tokens_of(1, 17)
    token_map, num_out = hard_plan(x, 4, 1)
    assert num_out == 13
    assert groups_of(token_map[0]) == {frozenset(g) for g in tome_groups(x[0], 4, 1)}
    assert hard_plan(x, 0) is None


def test_refusals() -> None:
    for options in ((1, 0.0), (1, 1.0, 0.0)):
        with pytest.raises(ValueError, match="temperature and sharpness must be above 0"):
            soft_choice(torch.zeros(1, 2, 2), *options)
