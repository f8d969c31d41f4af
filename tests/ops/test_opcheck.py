"""The ops as torch checks them: opcheck on every op, and flop counts."""

from __future__ import annotations

import pytest
import torch

import tokred
from cases.inputs import generator
from cases.op_calls import CALLS, Sizes
from cases.torch_ops import flops, tokens

OPS = torch.ops.tokred


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
        "attention numbers": (OPS.biased_attention, (*leaves, True, None, tokens(1, 4, 5, 7))),
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


@pytest.mark.parametrize("op", CALLS)
def test_opcheck_of_every_op(op: str) -> None:
    torch.library.opcheck(getattr(OPS, op).default, CALLS[op](Sizes()))


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    op, args = CASES[case]
    torch.library.opcheck(op.default, args)


def test_flop_counts() -> None:
    q, k = tokens(2, 4, 5, 8, grad=True), tokens(2, 2, 7, 8)
    x, rows = tokens(2, 9, 8), torch.arange(3, dtype=torch.int32)

    forward = 2 * 2 * 4 * 5 * 7 * (8 + 8)
    assert flops(lambda: tokred.biased_attention(q, k, k)) == forward
    both = flops(lambda: tokred.biased_attention(q, k, k)[0].sum().backward())
    assert both == forward + forward * 5 // 2
    assert flops(lambda: tokred.match(x, x[:, :4])) == 2 * 2 * 9 * 4 * 8
    assert flops(lambda: tokred.bipartite_soft_matching(x, 2, 1)) == 2 * 2 * 4 * 4 * 8
    explicit = (x, 2, 0, None, "tome", rows, rows + 4)
    assert flops(lambda: tokred.bipartite_soft_matching(*explicit)) == 2 * 2 * 3 * 3 * 8


def test_flop_counts_of_choosing_and_attending() -> None:
    q, k = tokens(2, 4, 5, 8, grad=True), tokens(2, 2, 7, 8)
    still, x = q.detach(), tokens(2, 9, 8)
    indices = torch.zeros(2, 1, 5, 3, dtype=torch.int32)
    blocks = torch.ones(1, 1, 3, 4, dtype=torch.bool)

    pair = 2 * 2 * 4
    for function, forward in (
        (lambda: tokred.sparse_attention(q, k, k, indices)[0], pair * 5 * 3 * 16),
        (lambda: tokred.block_sparse_attention(q, k, k, blocks, 2, 2)[0], pair * 5 * 7 * 16),
    ):
        assert flops(function) == forward
        assert flops(lambda: function().sum().backward()) == forward * 7 // 2  # noqa: B023
    assert flops(lambda: tokred.qk_score(still, k)) == pair * 7 * 8
    assert flops(lambda: tokred.qk_score(still, k, dims=indices[0, 0, :4])) == pair * 7 * 3
    assert flops(lambda: tokred.block_score(still, k[:, :, :, None])) == pair * 5 * 7 * 8
    assert flops(lambda: tokred.attention_rows(still, k)) == pair * 5 * 7 * 8
    assert flops(lambda: tokred.attention_columns(still, k, tokens(2, 4, 5))) == pair * 5 * 7 * 8
    square = tokens(2, 4, 7, 8)
    assert flops(lambda: tokred.pagerank(square, k, 3, lse=tokens(2, 4, 7))) == pair * 7 * 7 * 24
    assert flops(lambda: tokred.similarity_stats(x, block_size=3)) == 2 * 2 * 9 * 3 * 8
