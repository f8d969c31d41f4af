"""PYRA's modulation and merge against the published formula, token by token."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import tokred
from cases.dense_tome import tome_links
from cases.groups import tokens_of
from tokred.methods.pyra import pyra_step, reactivate
from tokred.methods.tome import tome_step


@pytest.mark.parametrize(("tokens", "num_prefix"), ((16, 0), (21, 1), (20, 2), (23, 3)))
def test_step(tokens: int, num_prefix: int) -> None:
    r = 4
    x, metric = tokens_of(2, tokens), tokens_of(2, tokens, 8)
    generator = torch.Generator().manual_seed(3)
    weight_r = torch.randn(r, generator=generator)
    weight_c = torch.randn(16, generator=generator)
    size = torch.randint(1, 4, (2, tokens), generator=generator).float()
    y, sizes, token_map = pyra_step(x, metric, weight_r, weight_c, size, num_prefix)
    assert y.shape == (2, tokens - r, 16)
    for item in range(2):
        links = tome_links(metric[item], r, num_prefix)
        p = torch.stack([x[item, s] + x[item, d] for s, d in links])
        p = functional.layer_norm(p, [16])
        channel = 2 * torch.sigmoid(weight_r @ p)
        token = 2 * torch.sigmoid(p @ weight_c) - 1
        sums, total = x[item] * size[item, :, None], size[item].clone()
        for i, (source, destination) in enumerate(links):
            changed = x[item, source] * (1 + channel * token[i])
            sums[destination] += size[item, source] * changed
            total[destination] += size[item, source]
        gone = {source for source, _ in links}
        for t in (t for t in range(tokens) if t not in gone):
            slot = token_map[item, t]
            torch.testing.assert_close(y[item, slot], sums[t] / total[t], rtol=1e-4, atol=1e-5)
            assert sizes[item, slot] == total[t]


def test_weights_of_zero_are_tome() -> None:
    x = tokens_of(2, 18)
    y, _, ours = pyra_step(x, x, torch.zeros(5), torch.zeros(16), num_prefix=1)
    expected, _, theirs = tome_step(x, x, 5, num_prefix=1)
    torch.testing.assert_close(tokred.unmerge(y, ours), tokred.unmerge(expected, theirs))


def test_the_weights_learn() -> None:
    x = tokens_of(1, 12)
    weight_r, weight_c = torch.zeros(3).requires_grad_(), torch.ones(16).requires_grad_()
    pyra_step(x, x, weight_r, weight_c)[0].square().sum().backward()
    assert weight_r.grad.abs().sum() > 0 and weight_c.grad.abs().sum() > 0


def test_refusals() -> None:
    x = tokens_of(1, 12)
    with pytest.raises(ValueError, match="tokens that may merge must be at least 7, got 6"):
        pyra_step(x, x, torch.zeros(7), torch.zeros(16))
    with pytest.raises(ValueError, match=r"must be \[3\] and \[16\], got \[3\] and \[5\]"):
        reactivate(x[:, :3], x[:, :3], torch.zeros(3), torch.zeros(5))
