"""AOT's anchors and transports against the published iterations on whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cases.groups import tokens_of
from tokred.methods.aot import across_frames, aggregate, choose_anchors


def transport(cost: Tensor, eps: float = 0.1) -> Tensor:
    """The plan of one item [M, N] by the iterations on exp(-cost / eps)."""
    kernel = torch.exp(-cost.double() / eps)
    rows, columns = kernel.shape
    r, c = torch.ones(rows).double(), torch.ones(columns).double()
    for _ in range(100):
        before = r
        r = 1 / rows / (kernel @ c)
        c = 1 / columns / (kernel.T @ r)
        if (r - before).abs().mean() < 1e-2:
            break
    return r[:, None] * kernel * c


def test_anchors() -> None:
    generator = torch.Generator().manual_seed(0)
    early, late = torch.rand(2, 2, 36, generator=generator)
    found = choose_anchors(early, late, (6, 6), 14, 3)
    for item in range(2):
        chosen = []
        for y in (0, 3):
            for x in (0, 3):
                places = [(y + i) * 6 + x + j for i in range(3) for j in range(3)]
                chosen += sorted(places, key=lambda t: -early[item, t].item())[:1]
        rest = sorted(
            (t for t in range(36) if t not in chosen), key=lambda t: -late[item, t].item()
        )
        assert found[item].tolist() == sorted(chosen + rest[:10])


def test_aggregate() -> None:
    x = tokens_of(2, 36)
    anchors = torch.tensor([[0, 7, 20, 33], [1, 2, 3, 35]], dtype=torch.int32)
    done, token_map = aggregate(x, anchors, (6, 6))
    place = torch.arange(36)
    where = torch.stack([place // 6 / 5, place % 6 / 5], 1)
    for item in range(2):
        kept = anchors[item].tolist()
        rest = [t for t in range(36) if t not in kept]
        unit = functional.normalize(x[item], dim=-1)
        cosine = unit[rest] @ unit[kept].T
        plan = transport(1 - cosine + 0.5 * torch.cdist(where[rest], where[kept])).float()
        moved = (x[item, kept] + plan.T @ x[item, rest]) / (1 + plan.sum(0)[:, None])
        nearest = cosine.argmax(1)
        for slot in range(4):
            members = [kept[slot], *(t for t, n in zip(rest, nearest, strict=True) if n == slot)]
            expected = 0.1 * x[item, members].mean(0) + 0.9 * moved[slot]
            torch.testing.assert_close(done[item, slot], expected, rtol=1e-4, atol=1e-5)
            assert (token_map[item, members] == slot).all()


@pytest.mark.parametrize(("frames", "keep"), ((4, 0.35), (6, 0.0), (5, 1.0), (1, 0.4)))
def test_across_frames(frames: int, keep: float) -> None:
    x = tokens_of(2, frames * 6).view(2, frames, 6, 16)
    done = across_frames(x, 4, keep)
    for item in range(2):
        slot = 0
        for start in range(0, frames, 4):
            part = x[item, start : start + 4]
            anchors, sources = part[0], part[1:].flatten(0, 1)
            torch.testing.assert_close(done.tokens[item, slot : slot + 6], anchors)
            first = done.token_map[item, start * 6 : start * 6 + 6]
            assert first.tolist() == list(range(slot, slot + 6))
            slot += 6
            if len(sources) == 0:
                continue
            times = torch.arange(1, len(part)).repeat_interleave(6).float()
            cost = (
                1 - functional.normalize(sources, dim=-1) @ functional.normalize(anchors, dim=-1).T
            )
            cost = (cost - cost.min()) * (1 - torch.exp(-(times**2) / 4.5))[:, None]
            plan = transport(cost)
            share = (plan / plan.sum(1, keepdim=True)).float()
            peak = share.max(1).values
            stays = peak < peak.quantile(keep)
            share = share * ~stays[:, None]
            merged = (anchors + share.T @ sources) / (1 + share.sum(0)[:, None])
            torch.testing.assert_close(
                done.tokens[item, slot : slot + 6], merged, rtol=1e-4, atol=1e-5
            )
            where = done.token_map[item, start * 6 + 6 : (start + 4) * 6]
            best = share.argmax(1)
            assert torch.equal(where[~stays], (best + slot)[~stays].int())
            slot += 6
            kept = int(stays.sum())
            torch.testing.assert_close(done.tokens[item, slot : slot + kept], sources[stays])
            assert where[stays].tolist() == list(range(slot, slot + kept))
            slot += kept
        assert done.tokens.shape[1] == slot


def test_refusals() -> None:
    table = torch.zeros(1, 36)
    with pytest.raises(ValueError, match=r"local_attention must be \[B, 36\], got \[1, 35\]"):
        choose_anchors(table[:, 1:], table, (6, 6), 4, 3)
    with pytest.raises(ValueError, match="window must divide the grid of 6 x 6, got 4"):
        choose_anchors(table, table, (6, 6), 4, 4)
    with pytest.raises(ValueError, match="count must be from 1 to 36"):
        choose_anchors(table, table, (6, 6), 37, 3)
    with pytest.raises(ValueError, match="x must hold the 36 tokens of the grid, got 35"):
        aggregate(torch.zeros(1, 35, 2), torch.zeros(1, 2).int(), (6, 6))
    with pytest.raises(ValueError, match=r"keep must be in \[0, 1\], got 2"):
        across_frames(torch.zeros(1, 2, 3, 4), keep=2)
