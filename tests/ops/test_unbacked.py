"""Sizes that only the run of an exported graph tells: what `item()` and a mask give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import tokred
from cases.torch_ops import tokens
from tokred import PackFormat
from tokred.nn import BlockSparseCore, TopKCore

DESTINATIONS = torch.arange(1, 5, dtype=torch.int32)
WHOLE = tokens(2, 21, 32)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (2, -1)).transpose(1, 2)


def merging(x: Tensor) -> Any:
    token_map = tokred.bipartite_soft_matching(x, 3, destinations=DESTINATIONS)
    by_threshold = tokred.threshold_matching(x, 0.1, destinations=DESTINATIONS)
    y, size = tokred.merge(x, token_map, tokred.num_out(x.shape[1], 3, destinations=DESTINATIONS))
    out, out_size = torch.zeros(2, 5, 32), torch.zeros(2, 5)
    tokred.merge(x, token_map, 5, out=out, out_size=out_size)
    return token_map, by_threshold, y, size, out, tokred.unmerge(y, token_map), tokred.match(x, x)


def attending(x: Tensor) -> Any:
    h, k = heads(x), heads(WHOLE)
    lists = torch.zeros(2, 1, 1, 5, dtype=torch.int32) + torch.arange(5, dtype=torch.int32)
    blocks = torch.ones((1, 1, (x.shape[1] + 3) // 4, 6), dtype=torch.bool)
    rows = x.shape[1]
    return (
        tokred.biased_attention(h, k, k),
        tokred.sparse_attention(h, k, k, lists),
        tokred.sparse_attention(h, k, k, lists.expand(2, 1, rows, 5)),
        tokred.block_sparse_attention(h, k, k, blocks, 4, 4),
        tokred.attention_columns(h, k, causal=True),
    )


def choosing(x: Tensor) -> Any:
    h = heads(x)
    pooled, counts = tokred.block_pool(h, 4)
    scores = tokred.qk_score(h, h, "head_mean")
    return (
        tokred.topk(scores, 3, num_sinks=1),
        tokred.topk(scores, 2, block_size=4),
        tokred.compact(x[..., 0] > 0),
        tokred.block_score(h, pooled, counts),
        tokred.gather_tokens([x, h], torch.zeros(2, 3, dtype=torch.int32)),
    )


def packing(x: Tensor) -> Any:
    h, room = heads(x), PackFormat(4, 16).empty(2, 2, 32, 16)
    packed = tokred.kv_pack(h, 4, 16)
    tokred.kv_append(h, room, 0)
    return (
        tokred.packed_attention(h, packed, packed, causal=True),
        tokred.packed_qk_score(heads(WHOLE), room, length=x.shape[1]),
        tokred.kv_unpack(packed, out=h.new_zeros(2, 2, x.shape[1], 16)),
        room.codes,
    )


def modules(x: Tensor) -> Any:
    h, mask = heads(x), x[..., 1] > -1
    return (
        TopKCore(5, num_locals=2, block_q=4, causal=True)(h, h, h, mask),
        TopKCore(8, scoring="block", block_size=4)(heads(WHOLE), h, h),
        BlockSparseCore(k=2, block_q=4, block_k=4, causal=True)(h, h, h, mask),
    )


@pytest.mark.parametrize("function", [merging, attending, choosing, packing, modules])
def test_export_with_an_unbacked_length(function: Callable[[Tensor], Any]) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, count: Tensor) -> Any:
            length = count.item()
            torch._check(length >= 0)
            torch._check(length <= x.shape[1])
            return function(x.narrow(1, 0, length))

    with torch.no_grad():
        program = torch.export.export(Module(), (WHOLE, torch.tensor(11)), strict=False).module()
        for length in (9, 21):
            expected = tree_leaves(function(WHOLE[:, :length]))
            actual = tree_leaves(program(WHOLE, torch.tensor(length)))
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_a_wrong_number_of_slots_is_found_when_the_graph_runs() -> None:
    def function(x: Tensor, count: Tensor) -> Tensor:
        slots = count.item()
        torch._check(slots >= 0)
        out, out_size = torch.zeros(2, 5, 32), torch.zeros(2, 5)
        token_map = torch.zeros(2, 21, dtype=torch.int32)
        return tokred.merge(x, token_map, slots, out=out, out_size=out_size)[0]

    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert compiled(WHOLE, torch.tensor(5)).shape == (2, 5, 32)
        with pytest.raises((RuntimeError, AssertionError)):
            compiled(WHOLE, torch.tensor(4))
