"""EViT's choice and fusion against whole attention matrices, and in a model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tokred
from cases.dropping import Layer, check_dropping, lively_timm
from cases.groups import check_in_a_model, groups_of, in_slots
from cases.tiny_models import heads
from tokred.methods.evit import EvitOptions, evit_map


@pytest.mark.parametrize(("tokens", "num_prefix"), [(12, 1), (9, 0), (20, 3)])
def test_groups(tokens: int, num_prefix: int) -> None:
    scores = torch.rand(2, tokens, generator=torch.Generator().manual_seed(tokens))
    scores[1, num_prefix:] = scores[1, num_prefix:].round(decimals=1)  # ties
    for keep in (0, 3, tokens - num_prefix - 1):
        token_map, num_out = evit_map(scores, keep, num_prefix)
        assert num_out == num_prefix + keep + 1
        for item in range(2):
            row = scores[item].tolist()
            ranked = sorted(range(num_prefix, tokens), key=lambda i: (-row[i], i))
            order = [*range(num_prefix), *ranked[:keep]]
            assert [token_map[item, i].item() for i in order] == list(range(len(order)))
            members = {i: {i} for i in order} | {-1: {*ranked[keep:]}}
            assert groups_of(token_map[item]) == in_slots(members)
    equal = evit_map(torch.full((1, 6), torch.nan), 2, 1)[0]
    assert equal.tolist() == [[0, 1, 2, 3, 3, 3]]


def chosen(layer: Layer) -> Tensor | None:
    """Layers 0 and 2 keep ceil(0.6 M) of M patches, by descending attention."""
    if layer.number == 1:
        return None
    scores = layer.attention[:, :, 0, 1:].mean(1)
    best = scores.topk(math.ceil(0.6 * scores.shape[1])).indices + 1
    return torch.cat([torch.zeros(len(best), 1, dtype=torch.int64), best], 1)


@torch.no_grad()
def test_without_fusion() -> None:
    check_dropping("evit", dict(ratio=0.6, at=[0, 2], fuse=False), chosen)


@torch.no_grad()
def test_with_fusion() -> None:
    """The last layer's: a sum by class attention, between its attention and its MLP."""
    model, pixels = lively_timm(), torch.randn(2, 3, 48, 48)
    seen: list[Tensor] = []
    block = model.blocks[2]
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.forward_features(pixels)
    hook.remove()
    x = seen[0]
    q, k, v = (
        heads(part, block.attn.num_heads) for part in block.attn.qkv(block.norm1(x)).chunk(3, -1)
    )
    attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    x = x + block.attn.proj((attention @ v).transpose(1, 2).flatten(2))
    scores = attention[:, :, 0].mean(1)
    rows = []
    for item in range(2):
        ranked = sorted(range(1, 37), key=lambda i: -scores[item, i].item())
        fused = sum(scores[item, i] * x[item, i] for i in ranked[22:])
        rows.append(torch.cat([x[item, [0, *ranked[:22]]], fused[None]]))
    expected = torch.stack(rows)
    expected = model.norm(expected + block.mlp(block.norm2(expected)))
    with tokred.patch(model, "evit", ratio=0.6, at=[2]) as handle:
        given = model.forward_features(pixels)
        assert handle.counts == (37, 24) and handle.size[0].tolist() == [1.0] * 23 + [14.0]
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)


def test_in_a_model() -> None:
    check_in_a_model("evit", dict(ratio=1.0), dict(ratio=0.7), (37, 28, 21, 16))
    check_in_a_model(
        "evit", dict(ratio=1.0), dict(ratio=0.5, at=[1]), (36, 19), class_token=False,
        global_pool="avg",
    )  # fmt: skip


def test_refusals() -> None:
    for keep in (-1, 8):
        with pytest.raises(ValueError, match=f"keep must be from 0 to 7, got {keep}"):
            evit_map(torch.rand(1, 9), keep)
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got 0"):
        EvitOptions(ratio=0.0)
