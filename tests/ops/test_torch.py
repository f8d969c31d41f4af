"""The ops inside torch's machinery: torch.compile, torch.export, autocast, vmap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokred
from cases.compare import assert_bitwise_equal
from cases.torch_ops import assert_compiles_once, tokens

OPS = torch.ops.tokred


def reduce_block(x: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """A ToMe block: match, merge, proportional attention, and back to full length."""
    token_map = tokred.bipartite_soft_matching(x, r, 1)
    y, size = tokred.merge(x, token_map, tokred.num_out(x.shape[1], r, 1))
    heads = y.unflatten(2, (2, -1)).transpose(1, 2)
    out, _ = tokred.biased_attention(heads, heads, heads, size.log())
    restored = tokred.unmerge(out.transpose(1, 2).flatten(2), token_map)
    return restored, size, tokred.compose(token_map[:, : y.shape[1]], token_map)


def other_ops(x: Tensor, r: int) -> tuple[Tensor, ...]:
    score, index = tokred.match(x, x, metric="l2", band=4)
    destinations = torch.arange(1, 5, dtype=torch.int32)
    token_map = tokred.bipartite_soft_matching(x, r, destinations=destinations)
    by_threshold, counts = tokred.threshold_matching(x, 0.1)
    return score, index, token_map, by_threshold, counts


def score_choose_attend(x: Tensor, r: int) -> tuple[Tensor, ...]:
    """A sparse attention layer by tokens, and one by blocks."""
    heads = x.unflatten(2, (2, -1)).transpose(1, 2)
    scores = tokred.qk_score(heads, heads, "head_mean")
    _, indices = tokred.topk(scores, 9, order="position", num_sinks=1)
    out, lse = tokred.sparse_attention(heads, heads, heads, indices[:, :, None], causal=True)
    pooled, counts = tokred.block_pool(heads, 4)
    _, best = tokred.topk(tokred.block_score(pooled[:, :, :, 0], pooled, counts), 3)
    blocks = torch.zeros(best.shape[:3] + pooled.shape[2:3], dtype=torch.bool)
    blocks = blocks.scatter(-1, best.long(), True)
    dense, dense_lse = tokred.block_sparse_attention(heads, heads, heads, blocks, 4, 4)
    kept, number = tokred.compact(scores[:, 0], threshold=0.0)
    (chosen,) = tokred.gather_tokens([x], kept)
    return *tokred.combine_states(out, lse, dense, dense_lse), chosen, number


def statistics(x: Tensor, r: int) -> tuple[Tensor, ...]:
    heads = x.unflatten(2, (2, -1)).transpose(1, 2)
    stats = tokred.similarity_stats(x, energy="elu", margin=0.5, exclude_self=True)
    columns = tokred.attention_columns(heads, heads, causal=True)
    picks, count = tokred.inverse_transform_sample(columns.sum(1), r)
    ratio, cosine = tokred.transition_stats(x, x + 1)
    rows = tokred.attention_rows(heads[:, :, -1:], heads)
    ranks = tokred.pagerank(heads, heads, 3)
    return stats.mean, stats.index, stats.energy, columns, picks, count, ratio, cosine, rows, ranks


@pytest.mark.parametrize("function", [reduce_block, other_ops, score_choose_attend, statistics])
def test_compile_without_breaks_or_recompiles(function) -> None:
    assert_compiles_once(function, [(tokens(2, length, 16), 5) for length in (21, 30, 33)])


def test_compiled_gradients_are_the_eager_ones() -> None:
    def gradient(function) -> Tensor:
        x = tokens(2, 21, 16, grad=True)
        restored, size, _ = function(x, 5)
        (restored.square().sum() + size.sum()).backward()
        return x.grad

    compiled = torch.compile(reduce_block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), gradient(reduce_block))


def test_inductor() -> None:
    compiled = torch.compile(reduce_block, fullgraph=True)
    x = tokens(2, 21, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, 5), reduce_block(x, 5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_replay() -> None:
    x = tokens(2, 40, 16).cuda()
    with torch.no_grad():
        reduce_block(x, 5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = reduce_block(x, 5)
        x.copy_(x.flip(1))
        graph.replay()
        for result, expected in zip(captured, reduce_block(x, 5), strict=True):
            assert_bitwise_equal(result.cpu(), expected.cpu())


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_dynamic_length(strict: bool) -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return reduce_block(x, 5)

    length = torch.export.Dim("length", min=16, max=64)
    shapes = {"x": {1: length}}
    program = torch.export.export(
        Block(), (tokens(2, 21, 16),), dynamic_shapes=shapes, strict=strict
    )
    x = tokens(2, 40, 16)
    assert_bitwise_equal(program.module()(x), reduce_block(x, 5))


def test_autocast_casts_queries_keys_and_values() -> None:
    q, k = tokens(2, 4, 5, 8), tokens(2, 2, 7, 8)
    half, bias = (q.bfloat16(), k.bfloat16(), k.bfloat16()), torch.rand(2, 2, 7)
    indices = torch.zeros(2, 1, 5, 3, dtype=torch.int32)
    blocks = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    for function, args in (
        (tokred.biased_attention, (bias, True)),
        (tokred.sparse_attention, (indices, 0.3, bias, True)),
        (tokred.block_sparse_attention, (blocks, 2, 2, True, None, bias)),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = function(q, k, k, *args)
        assert_bitwise_equal(actual, function(*half, *args))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wide = function(q.double(), k.double(), k.double(), *args[:-2])
        assert wide[0].dtype == torch.float64


def test_inference_mode_and_vmap() -> None:
    x = tokens(3, 2, 9, 8)
    with torch.inference_mode():
        expected = torch.stack([tokred.match(item, item)[0] for item in x])
        assert torch.equal(torch.vmap(lambda item: tokred.match(item, item)[0])(x), expected)


def test_an_error_leaves_autograd_on() -> None:
    """The ops switch it off for their kernels."""
    x = torch.randn(1, 4, 8)
    token_map = torch.zeros(1, 5, dtype=torch.int32)
    buffers = {"out": torch.empty(1, 3, 8), "out_size": torch.empty(1, 3)}
    for out in ({}, buffers):
        with pytest.raises(RuntimeError, match="token_map") as raised:
            tokred.merge(x, token_map, 3, **out)
        assert raised.tb is not None  # keeps the frames of the call
        y = x.clone().requires_grad_() * 2
        assert y.requires_grad
        y.sum().backward()
