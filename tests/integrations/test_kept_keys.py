"""The cache of a layer that keeps fewer keys, without a model around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tokred
from cases.eviction import kept_places
from cases.inputs import generator
from cases.tiny_models import tiny_lm
from tokred.integrations.transformers.kept_keys import KeptKeysLayer
from tokred.methods.h2o import H2oOptions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_a_softcap_of_nothing_changes_nothing(reduce: str) -> None:
    """Columns that are added up from a few rows at a time are those of the op."""
    found = []

    class Measures:
        def evict(self, call: Any) -> None:
            found.append(call.received(reduce=reduce))

    draw = generator(0)
    q, k, v = (torch.randn(2, heads, 150, 16, generator=draw) for heads in (4, 2, 2))
    mask = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    mask[1, ..., :70] = False
    for visible in (None, mask):
        for softcap in (None, 1e4):
            states, _ = KeptKeysLayer(Measures(), 0, 1).update(k, v)
            states.attend(q, visible, None, softcap)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[3], found[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attention_of_a_prefix_that_looks_both_ways_counts(softcap: float | None) -> None:
    """A prompt whose first tokens look both ways, beside the weights themselves."""
    found = []

    class Measures:
        def evict(self, call: Any) -> Any:
            found.extend([call.received(), call.received(5)])
            return call.best(found[0], 10)

    draw = generator(0)
    q, k, v = (torch.randn(2, heads, 90, 16, generator=draw) for heads in (4, 2, 2))
    mask = torch.ones(90, 90, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[:, :, :30, :30] = True
    mask[1, ..., :7] = False
    cache = KeptKeysLayer(Measures(), 0, 1)
    cache.update(k, v)[0].attend(q, mask, None, softcap)
    logits = (q @ k.repeat_interleave(2, 1).mT / 4).double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    p = logits.masked_fill(~mask, -torch.inf).softmax(3).nan_to_num(0)
    p[1, :, :7] = 0
    for received, rows in zip(found, (p, p[:, :, -5:]), strict=True):
        expected = rows.sum(2).unflatten(1, (2, 2)).mean(2)
        torch.testing.assert_close(received.double(), expected, rtol=1e-4, atol=1e-5)
    best = (p.sum(2).unflatten(1, (2, 2)).mean(2)).topk(10, dim=2).indices.sort(2).values
    assert torch.equal(cache.position.long(), best)


@pytest.mark.parametrize("center", [False, True])
@torch.no_grad()
def test_packed_keys_are_evicted_like_others(center: bool) -> None:
    """Where 4 bits hold the keys exactly, the same ones stay, and outputs agree."""
    options = tokred.PackedCache(
        tiny_lm("Llama", head_dim=16).config, window=0, rotate=False, center=center
    ).options
    packed = KeptKeysLayer(H2oOptions(budget=9), 0, 1, packing=options)
    dense = KeptKeysLayer(H2oOptions(budget=9), 0, 1)
    draw = generator(0)
    for number, count in enumerate((40, 1, 1, 1, 6, 1, 1)):
        q = torch.randn(2, 4, count, 16, generator=draw)
        k, v = torch.randint(16, (2, 2, 2, count, 16), generator=draw) / 4 - 2
        k[..., 0], k[..., 1], v[..., 0], v[..., 1] = -2, 1.75, -2, 1.75
        mask = torch.ones(2, 1, 1, dense.length + count, dtype=torch.bool)
        mask[1, ..., :5] = False
        outs = [each.update(k, v)[0].attend(q, mask, None)[0] for each in (packed, dense)]
        torch.testing.assert_close(*outs, rtol=2e-2, atol=2e-2)
        assert [kept_places(packed, row) for row in (0, 1)] == [
            kept_places(dense, row) for row in (0, 1)
        ]
        torch.testing.assert_close(packed.keys, dense.keys, rtol=2e-2, atol=0.2 if center else 1e-3)
        if number == 3:
            for each in (packed, dense):
                each.reorder_cache(torch.tensor([1, 0]))


class Ops(TorchDispatchMode):
    """How many ops were called."""

    count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return op(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_token_takes_few_ops() -> None:
    """The new token is written over the evicted one, and no other is moved."""
    cache = KeptKeysLayer(H2oOptions(budget=6), 0, 1)
    draw = generator(0)
    for count in (20, 1, 1):
        q = torch.randn(1, 4, count, 16, generator=draw)
        k, v = q.chunk(2, 1)
        with Ops() as ops:
            cache.update(k, v)[0].attend(q, None, None)
    assert ops.count <= 15
    assert cache.keys.shape == (1, 2, 6, 16) and cache.position.shape == (1, 2, 6)
