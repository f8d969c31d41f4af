"""The ops inside torch's machinery: opcheck, torch.compile, torch.export, flop counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_bitwise_equal, generator
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import tokred

OPS = torch.ops.tokred


def tokens(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=generator()).requires_grad_(grad)


def opcheck_cases() -> dict[str, tuple]:
    x, size = tokens(2, 9, 8), torch.ones(2, 9)
    mask = torch.rand(2, 9, generator=generator()) < 0.7
    outer = tokens(9, 2, 8).transpose(0, 1)
    token_map = torch.tensor([[0, 1, -1, 2, 0, 3, 9, 1, 3]] * 2, dtype=torch.int32)
    rows = torch.tensor([0, 3, -1, 99], dtype=torch.int32)
    q, k, v = tokens(2, 4, 5, 8), tokens(2, 2, 7, 8), tokens(2, 2, 7, 6)
    bias, hidden = torch.rand(2, 2, 7), torch.zeros(1, 1, 1, 7, dtype=torch.bool)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, bias)]
    heads = tokens(2, 5, 4, 8).transpose(1, 2)
    grad = x.clone().requires_grad_()
    out = (tokens(2, 4, 8), torch.zeros(2, 4))
    cases = {
        "match": (OPS.match, (x, outer)),
        "match masked": (OPS.match, (x, x[:, :4], mask, mask[:, :4], size, None, "l2", 2)),
        "bipartite": (OPS.bipartite_soft_matching, (x, 3)),
        "bipartite listed": (
            OPS.bipartite_soft_matching,
            (outer, 2, 1, mask, "position", rows, rows[None].expand(2, 4) + 1),
        ),
        "threshold": (OPS.threshold_matching, (x, 0.1, 1, mask)),
        "unmerge": (OPS.unmerge, (outer, token_map)),
        "unmerge grad": (OPS.unmerge, (grad, token_map)),
        "compose": (OPS.compose, (token_map, token_map)),
        "merge_out": (OPS.merge_out, (x, token_map, size, None, "mean", *out)),
        "attention": (OPS.biased_attention, (q, k, v)),
        "attention grad": (OPS.biased_attention, (*leaves, True)),
        "attention views": (OPS.biased_attention, (heads, k, v, bias[:1, :1], False, 0.3)),
        "attention empty rows": (OPS.biased_attention, (*leaves, False, None, hidden)),
    }
    for mode in ("mean", "amax", "maxnorm"):
        cases[f"merge {mode}"] = (OPS.merge, (outer, token_map, 4, size, size, mode))
        tables = [torch.ones(2, 9).requires_grad_() for _ in range(2)]
        cases[f"merge {mode} grad"] = (OPS.merge, (grad, token_map, 4, *tables, mode))
    cases["merge partial grad"] = (OPS.merge, (grad, token_map, 4, size, None, "sum"))
    return cases


def selection_cases() -> dict[str, tuple]:
    scores = tokens(2, 3, 11)
    lengths, row_k = torch.tensor([[11, 4, 0]], dtype=torch.int32), torch.ones(2, 3).int()
    mask = torch.rand(2, 11, generator=generator()) < 0.6
    indices = torch.tensor([[0, 3, -1, 99]] * 2, dtype=torch.int32)
    x, kv = tokens(2, 9, 8), tokens(2, 9, 3, 4).transpose(1, 2)
    q, k, outer = tokens(2, 4, 5, 8), tokens(2, 2, 7, 8), tokens(2, 7, 2, 8).transpose(1, 2)
    ones, lse = torch.ones(2, 7, dtype=torch.bool), tokens(2, 4, 5)
    pooled, deviation = tokens(2, 2, 3, 1, 8), tokens(2, 2, 3, 2, 8)
    counts = torch.ones(2, 3).int()
    slots, dims = torch.arange(12).view(2, 6).int(), torch.arange(12).view(4, 3).int() % 9
    pool = tokens(1, 2, 10, 8)
    square = tokens(2, 4, 7, 8)
    return {
        "topk": (OPS.topk, (scores, 4)),
        "topk everything": (
            OPS.topk,
            (scores, 6, lengths, "position", row_k, 1, 2, mask[:, None], 0.5, 2, -1.0, 4),
        ),
        "compact": (OPS.compact, (mask,)),
        "compact floats": (OPS.compact, (scores, 0.1, 5, lengths)),
        "gather": (OPS.gather_tokens, ([x, kv, x[..., 0].long()], indices, [1, 2, 1])),
        "gather heads": (OPS.gather_tokens, ([kv], indices[:, None].expand(2, 3, 4), [2])),
        "sample": (OPS.inverse_transform_sample, (scores.abs(), 5, mask[:, None])),
        "qk_score": (OPS.qk_score, (q, outer)),
        "qk_score vote": (OPS.qk_score, (q, k, "softmax_vote", None, 1.0, None, ones)),
        "qk_score pages": (OPS.qk_score, (q, pool, "group_max", dims, None, None, None, slots)),
        "block_pool": (OPS.block_pool, (outer, 3, "min_max", None, None, ones)),
        "block_pool lengths": (
            OPS.block_pool,
            (k, 0, "mean", torch.tensor([[0, 2, 7]]).int(), torch.tensor([7, 3]).int()),
        ),
        "block_score": (OPS.block_score, (q, pooled, counts, "dot", "group_mean")),
        "block_score deviation": (
            OPS.block_score,
            (tokens(2, 4, 5, 2, 8), deviation, None, "deviation"),
        ),
        "attention_rows": (OPS.attention_rows, (q, k, False, 1, 5, True)),
        "attention_columns": (OPS.attention_columns, (q, outer, lse, "variance", lse[:1], True)),
        "pagerank": (OPS.pagerank, (square, k, tokens(2, 4, 7), 3, 0.1)),
        "similarity_stats": (OPS.similarity_stats, (x, x[:, :5], "dot", 0.1, "elu", 0.2, True, 4)),
        "transition_stats": (OPS.transition_stats, (x, x + 1)),
    }


def sparse_cases() -> dict[str, tuple]:
    q, k, v = tokens(2, 4, 5, 8), tokens(2, 2, 7, 8), tokens(2, 2, 7, 6)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, torch.rand(2, 2, 7))]
    indices = torch.randint(-1, 8, (2, 2, 5, 3), generator=generator(), dtype=torch.int32)
    mask = torch.rand(1, 1, 5, 7, generator=generator()) < 0.7
    blocks = torch.rand(2, 4, 3, 3, generator=generator()) < 0.6
    positions = (torch.arange(2, 7).view(1, 5, 1).int(), torch.arange(7).view(1, 7, 1).int())
    angle = tokens(4, 4)
    rotation = (1, angle.cos(), angle.sin())
    out, lse = tokens(2, 4, 5, 8), tokens(2, 4, 5)
    return {
        "attention positions": (
            OPS.biased_attention,
            (*leaves, False, None, None, *positions),
        ),
        "sparse": (OPS.sparse_attention, (q, k, v, indices)),
        "sparse shared": (
            OPS.sparse_attention,
            (q, k, v, indices[:, :1, :1], 0.3, *([None] * 3), 5),
        ),
        "sparse rotated": (
            OPS.sparse_attention,
            (q, k, v, indices, None, None, True, mask, *rotation),
        ),
        "sparse grad": (
            OPS.sparse_attention,
            (*leaves[:3], indices[:, :, :3], None, leaves[3], True, mask, 2),
        ),
        "blocks": (OPS.block_sparse_attention, (q, k, v, blocks[:1, :1], 2, 3)),
        "blocks grad": (
            OPS.block_sparse_attention,
            (*leaves[:3], blocks, 2, 3, True, None, leaves[3], mask),
        ),
        "combine": (OPS.combine_states, (out, lse, out.flip(0), lse.flip(0))),
    }


CASES = opcheck_cases() | selection_cases() | sparse_cases()


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    op, args = CASES[case]
    torch.library.opcheck(op.default, args)


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
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for length in (21, 30, 33):
        x = tokens(2, length, 16)
        with torch.no_grad():
            assert_bitwise_equal(compiled(x, 5), function(x, 5))
        frames.append(counter.frame_count)
    # Tracing may start over within the first call, to step out of a context manager.
    assert frames == frames[:1] * 3


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


def test_flop_counts() -> None:
    q, k = tokens(2, 4, 5, 8, grad=True), tokens(2, 2, 7, 8)
    x, rows = tokens(2, 9, 8), torch.arange(3, dtype=torch.int32)

    def count(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    forward = 2 * 2 * 4 * 5 * 7 * (8 + 8)
    assert count(lambda: tokred.biased_attention(q, k, k)) == forward
    both = count(lambda: tokred.biased_attention(q, k, k)[0].sum().backward())
    assert both == forward + forward * 5 // 2
    assert count(lambda: tokred.match(x, x[:, :4])) == 2 * 2 * 9 * 4 * 8
    assert count(lambda: tokred.bipartite_soft_matching(x, 2, 1)) == 2 * 2 * 4 * 4 * 8
    explicit = (x, 2, 0, None, "tome", rows, rows + 4)
    assert count(lambda: tokred.bipartite_soft_matching(*explicit)) == 2 * 2 * 3 * 3 * 8


def test_flop_counts_of_choosing_and_attending() -> None:
    q, k = tokens(2, 4, 5, 8, grad=True), tokens(2, 2, 7, 8)
    still, x = q.detach(), tokens(2, 9, 8)
    indices = torch.zeros(2, 1, 5, 3, dtype=torch.int32)
    blocks = torch.ones(1, 1, 3, 4, dtype=torch.bool)

    def count(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    pair = 2 * 2 * 4
    for function, forward in (
        (lambda: tokred.sparse_attention(q, k, k, indices)[0], pair * 5 * 3 * 16),
        (lambda: tokred.block_sparse_attention(q, k, k, blocks, 2, 2)[0], pair * 5 * 7 * 16),
    ):
        assert count(function) == forward
        assert count(lambda: function().sum().backward()) == forward * 7 // 2  # noqa: B023
    assert count(lambda: tokred.qk_score(still, k)) == pair * 7 * 8
    assert count(lambda: tokred.qk_score(still, k, dims=indices[0, 0, :4])) == pair * 7 * 3
    assert count(lambda: tokred.block_score(still, k[:, :, :, None])) == pair * 5 * 7 * 8
    assert count(lambda: tokred.attention_rows(still, k)) == pair * 5 * 7 * 8
    assert count(lambda: tokred.attention_columns(still, k, tokens(2, 4, 5))) == pair * 5 * 7 * 8
    square = tokens(2, 4, 7, 8)
    assert count(lambda: tokred.pagerank(square, k, 3, lse=tokens(2, 4, 7))) == pair * 7 * 7 * 24
    assert count(lambda: tokred.similarity_stats(x, block_size=3)) == 2 * 2 * 9 * 3 * 8


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


def test_import_is_light() -> None:
    """Only torch comes with the functional API; models are imported when they are patched."""
    code = (
        "import sys, torch; before = set(sys.modules); import tokred; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(*new & {'timm', 'transformers', 'torchvision', 'diffusers', 'numpy'}); "
        "print(*[n for n in sys.modules if n.startswith(('tokred.methods', 'tokred.models'))])"
    )
    package_root = Path(tokred.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=package_root, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_missing_library_says_what_to_do(tmp_path, monkeypatch) -> None:
    from tokred import _library

    monkeypatch.setattr(_library, "LIBRARY_FOLDER", tmp_path)
    with pytest.raises(ImportError, match="make build"):
        _library.load()
    (tmp_path / "libtokred.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match="does not load"):
        _library.load()


def test_everything_exported_exists() -> None:
    for name in set(tokred.__all__) - {"patch"}:
        assert callable(getattr(tokred, name)) and getattr(tokred, name).__doc__
    with pytest.raises(AttributeError, match="nothing_like_that"):
        tokred.nothing_like_that  # noqa: B018
