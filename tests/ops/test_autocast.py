"""What autocast does to every op: attention and its scores are cast, comparisons are widened."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tokred
from cases.compare import assert_bitwise_equal, flat
from cases.torch_ops import tokens
from tokred import PackFormat
from tokred.nn import BlockSparseCore, TopKCore

LISTS = torch.tensor([[[[0, 3, 6]]]], dtype=torch.int32).expand(2, 1, 1, 3)
BLOCKS = torch.ones(1, 1, 3, 4, dtype=torch.bool)


def values(result: object) -> list[Tensor]:
    if isinstance(result, tokred.SimilarityStats):
        return list(vars(result).values())
    return flat(result)


CAST: dict[str, Callable[..., object]] = {
    "biased_attention": lambda q, k: tokred.biased_attention(q, k, k),
    "sparse_attention": lambda q, k: tokred.sparse_attention(q, k, k, LISTS),
    "block_sparse_attention": lambda q, k: tokred.block_sparse_attention(q, k, k, BLOCKS, 2, 2),
    "qk_score": lambda q, k: tokred.qk_score(q, k, "group_mean"),
    "attention_rows": lambda q, k: tokred.attention_rows(q, k),
    "attention_columns": lambda q, k: tokred.attention_columns(q, k, causal=True),
    "pagerank": lambda q, k: tokred.pagerank(q, k[:, :, :5]),
    "TopKCore": lambda q, k: TopKCore(3)(q, k, k),
    "BlockSparseCore": lambda q, k: BlockSparseCore(k=1, block_q=2, block_k=2)(q, k, k),
}


@pytest.mark.parametrize("name", CAST)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float32,) * 2])
def test_attention_and_its_scores_are_cast(name: str, dtypes: tuple) -> None:
    q, k = tokens(2, 4, 5, 16).to(dtypes[0]), tokens(2, 2, 7, 16).to(dtypes[1])
    with torch.autocast("cpu", torch.bfloat16):
        actual = CAST[name](q, k)
    assert_bitwise_equal(values(actual), values(CAST[name](q.bfloat16(), k.bfloat16())))


def packed_calls(q: Tensor, window: Tensor) -> list[Tensor]:
    packed = tokred.kv_pack(tokens(2, 2, 8, 16), 4, 16)
    out, lse = tokred.packed_attention(q, packed, packed, window, window)
    return [out, lse, tokred.packed_qk_score(q, packed, window)]


def test_attention_on_packed_keys_is_cast() -> None:
    q, window = tokens(2, 4, 3, 16), tokens(2, 2, 4, 16)
    for left, right in ((q, window.bfloat16()), (q.bfloat16(), window), (q, window)):
        with torch.autocast("cpu", torch.bfloat16):
            actual = packed_calls(left, right)
        assert_bitwise_equal(actual, packed_calls(q.bfloat16(), window.bfloat16()))


def test_appended_tokens_follow_the_window() -> None:
    x, caches = tokens(2, 2, 9, 16), []
    for autocast in (True, False):
        room = PackFormat(4, 16).empty(2, 2, 16, 16)
        window = torch.zeros(2, 2, 4, 16, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            tokred.kv_append(x if autocast else x.bfloat16(), room, 0, window)
        caches.append((room.codes, room.params, window))
    assert_bitwise_equal(*caches)


WIDENED: dict[str, Callable[..., object]] = {
    "match": lambda a, b: tokred.match(a, b),
    "similarity_stats": lambda a, b: tokred.similarity_stats(a, b, energy="elu"),
    "transition_stats": lambda a, b: tokred.transition_stats(a, b),
    "combine_states": lambda a, b: tokred.combine_states(
        a[:, None], torch.ones(2, 1, 6), b[:, None], torch.ones(2, 1, 6)
    ),
}


@pytest.mark.parametrize("name", WIDENED)
def test_comparisons_are_widened(name: str) -> None:
    a, b = tokens(2, 6, 8), tokens(2, 6, 8).flip(1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise_equal(values(WIDENED[name](a, b)), values(WIDENED[name](a, b.float())))
        assert_bitwise_equal(values(WIDENED[name](b, a)), values(WIDENED[name](b.float(), a)))
        assert_bitwise_equal(values(WIDENED[name](b, b)), values(WIDENED[name](b, b)))
    with pytest.raises(RuntimeError, match="must have the dtype of"):
        WIDENED[name](a, b)


def test_choosing_and_merging_take_what_comes() -> None:
    x = tokens(2, 6, 8)

    def reduce(x: Tensor) -> list[Tensor]:
        token_map = tokred.bipartite_soft_matching(x, 2)
        y, size = tokred.merge(x, token_map, 4)
        values, indices = tokred.topk(x[..., 0].contiguous(), 3)
        return [token_map, y, size, tokred.unmerge(y, token_map), values, indices]

    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", torch.bfloat16):
            actual = reduce(x.to(dtype))
        assert_bitwise_equal(actual, reduce(x.to(dtype)))


def test_gradients_come_back_in_the_dtype_of_the_inputs() -> None:
    q, k = tokens(2, 4, 5, 16, grad=True), tokens(2, 2, 7, 16, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = tokred.biased_attention(q, k, k)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert q.grad.dtype == k.grad.dtype == torch.float32 and k.grad.abs().sum() > 0
