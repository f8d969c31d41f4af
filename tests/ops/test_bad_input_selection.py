"""Bad input to scoring and choosing: every error names the argument and what it must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tokred
from cases.bad_input import names_the_argument

A, B, X = torch.zeros(2, 4, 8), torch.zeros(2, 5, 8), torch.zeros(2, 6, 8)
Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
MASK = torch.ones(2, 4, 5, 7, dtype=torch.bool)

S, FLAG = torch.zeros(2, 3, 9), torch.ones(2, 3, 9, dtype=torch.bool)
COUNT = torch.ones(2, 3, dtype=torch.int32)
WHERE = torch.zeros(2, 4, dtype=torch.int32)
sample = tokred.inverse_transform_sample
TOPK = [
    (tokred.topk, (S.double(), 2), {}, "scores must be float32"),
    (tokred.topk, (S[..., ::2], 2), {}, "scores must be contiguous"),
    (tokred.topk, (S[None, None], 2), {}, "scores must have 1 to 4 dimensions"),
    (tokred.topk, (S, -1), {}, "k must be between 0"),
    (tokred.topk, (S, 2), {"lengths": COUNT.short()}, "lengths must be int32"),
    (tokred.topk, (S, 2), {"lengths": COUNT[0]}, "lengths must be"),
    (tokred.topk, (S, 2), {"row_k": COUNT[:, :2]}, "row_k must"),
    (tokred.topk, (S, 2), {"order": "random"}, "order must be one of"),
    (tokred.topk, (S, 2), {"num_sinks": -1}, "num_sinks must be"),
    (tokred.topk, (S, 2), {"num_locals": -1}, "num_locals must be"),
    (tokred.topk, (S, 2), {"must_keep": S}, "must_keep must be bool"),
    (tokred.topk, (S, 2), {"must_keep": FLAG[..., :8]}, "must_keep must"),
    (tokred.topk, (S, 2), {"top_p": float("nan")}, "top_p must be finite"),
    (tokred.topk, (S, 2), {"min_k": -1}, "min_k must be"),
    (tokred.topk, (S, 2), {"threshold": float("nan")}, "threshold must not be NaN"),
    (tokred.topk, (S, 2), {"block_size": -1}, "block_size must be"),
    (tokred.compact, (FLAG, 0.5), {}, "threshold must be given"),
    (tokred.compact, (S,), {}, "threshold must be given"),
    (tokred.compact, (S.int(), 0.5), {}, "threshold must be given"),
    (tokred.compact, (S.long(), 0.5), {}, "selected must be float32"),
    (tokred.compact, (FLAG,), {"capacity": -1}, "capacity must be"),
    (tokred.compact, (FLAG,), {"lengths": COUNT.float()}, "lengths must be int32"),
    (tokred.gather_tokens, ([], WHERE), {}, "tensors must be 1 to 16"),
    (tokred.gather_tokens, ([X], WHERE.short()), {}, "indices must be int32"),
    (tokred.gather_tokens, ([X], WHERE[0]), {}, "indices must be"),
    (tokred.gather_tokens, ([X, X[:1]], WHERE), {}, r"tensors\[1\] must have the batch size"),
    (tokred.gather_tokens, ([X], WHERE, [3]), {}, "token_dims must be 1 or 2"),
    (tokred.gather_tokens, ([X], WHERE, [1, 1]), {}, "token_dims must have one entry"),
    (tokred.gather_tokens, ([X[..., ::2]], WHERE), {}, r"tensors\[0\] must be contiguous"),
    (tokred.gather_tokens, ([Q], WHERE[:, None].expand(2, 3, 4)), {}, "the heads of indices"),
    (sample, (S.int(), 2), {}, "scores must be float32"),
    (sample, (S, -1), {}, "num_samples must be"),
    (sample, (S, 2), {"mask": FLAG[..., :8]}, "mask must"),
]

ONES, EDGES = torch.ones(2, 7, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.int32)
POOLED, DIMS = torch.zeros(2, 2, 3, 1, 8), torch.zeros(4, 2, dtype=torch.int32)
score, pool, by_block = tokred.qk_score, tokred.block_pool, tokred.block_score
SCORE = [
    (score, (Q.double(), K.double()), {}, "q must be float32"),
    (score, (Q, K.half()), {}, "k must have the dtype of q"),
    (score, (Q, K[0]), {}, "k must have 4 dimensions"),
    (score, (Q, K[..., :4]), {}, "k must have the head dimension"),
    (score, (Q, K[:1]), {}, "k must have the batch size"),
    (score, (Q[:, :3], K), {}, "the heads of q must be a multiple"),
    (score, (Q[:, :, :0], K), {}, "q must have at least one query"),
    (score, (Q, K, "median"), {}, "reduce must be one of"),
    (score, (Q, K), {"dims": DIMS[:3]}, "dims must be"),
    (score, (Q, K), {"dims": DIMS.short()}, "dims must be int32"),
    (score, (Q, K), {"scale": float("nan")}, "scale must be finite"),
    (score, (Q, K), {"lengths": COUNT[0]}, "lengths must be"),
    (score, (Q, K), {"mask": ONES[:, :6]}, "mask must be"),
    (score, (Q, K), {"slots": WHERE}, "of a pool"),
    (score, (Q, K[:1]), {"slots": WHERE.short()}, "slots must be int32"),
    (pool, (K[0], 2), {}, "x must have 4 dimensions"),
    (pool, (K,), {}, "block_size must be at least 1"),
    (pool, (K, 2), {"boundaries": EDGES}, "block_size must be"),
    (pool, (K, 2, "median"), {}, "statistic must be one of"),
    (pool, (K,), {"boundaries": EDGES.short()}, "boundaries must be int32"),
    (pool, (K,), {"boundaries": EDGES[0]}, "boundaries must have 2 dimensions"),
    (pool, (K, 2), {"lengths": COUNT}, "lengths must"),
    (pool, (K, 2), {"mask": ONES.float()}, "mask must be bool"),
    (by_block, (Q, POOLED[0]), {}, "pooled must"),
    (by_block, (Q, POOLED[..., :4]), {}, "pooled must"),
    (by_block, (Q, POOLED), {"rule": "bounds"}, "pooled must"),
    (by_block, (Q, POOLED), {"rule": "deviation"}, "q must"),
    (by_block, (Q, POOLED), {"rule": "cosine"}, "rule must be one of"),
    (by_block, (Q, POOLED), {"counts": COUNT[:, :2]}, "counts must be"),
    (by_block, (Q[:, :3], POOLED), {}, "the heads of q must be a multiple"),
]

LSE = torch.zeros(2, 4, 5)
rows, columns = tokred.attention_rows, tokred.attention_columns
stats, moved = tokred.similarity_stats, tokred.transition_stats
IMPORTANCE = [
    (rows, (Q, K), {"denominator": (3, 2)}, "the denominator must be a range"),
    (rows, (Q, K), {"denominator": (0, 8)}, "the denominator must be a range"),
    (rows, (Q, K), {"mask": MASK[..., :6]}, "mask must be"),
    (rows, (Q, K), {"mask": MASK.float()}, "mask must be bool"),
    (columns, (Q, K, LSE), {"mask": MASK.float()}, "mask must be bool"),
    (rows, (Q.double(), K.double()), {}, "q must be float32"),
    (columns, (Q, K, LSE[:1]), {}, "lse must be"),
    (columns, (Q, K, LSE.double()), {}, "lse must be float32"),
    (columns, (Q, K, LSE, "median"), {}, "reduce must be one of"),
    (columns, (Q, K, LSE), {"weight": LSE[..., :4]}, "weight must be"),
    (columns, (Q, K[:, :, :, :4], LSE), {}, "k must"),
    (tokred.pagerank, (Q, K, 1), {"lse": LSE}, "tokens of q"),
    (tokred.pagerank, (Q, K[:, :, :5], 0), {}, "iterations must be between 1 and"),
    (tokred.pagerank, (Q, K[:, :, :5], 1, 1.5), {}, "damping must be between"),
    (tokred.pagerank, (Q, K[:, :, :5], 1), {"start": LSE[0]}, "start must"),
    (tokred.pagerank, (Q, K[:, :, :5], 1), {"mask": MASK[..., :5].float()}, "mask must be bool"),
    (stats, (A, B[:1]), {}, "b must have the batch and channel sizes"),
    (stats, (A, B.half()), {}, "b must have the dtype of a"),
    (stats, (A, B, "manhattan"), {}, "metric must be one of"),
    (stats, (A, B), {"energy": "cubic"}, "energy must be one of"),
    (stats, (A, B), {"energy": "gaussian", "margin": 1.0}, "margin must be below 1"),
    (stats, (A, B), {"threshold": float("nan")}, "threshold must not be NaN"),
    (stats, (A, B), {"block_size": -1}, "block_size must be at least 0"),
    (stats, (A, B), {"mask_a": ONES}, "mask_a must be"),
    (stats, (A, B), {"mask_b": torch.ones(2, 5)}, "mask_b must be bool"),
    (moved, (A, B), {}, "after must"),
    (moved, (A, A.half()), {}, "after must have the dtype of before"),
    (moved, (A[..., ::2], A[..., ::2]), {}, "before must be contiguous"),
]

test_bad_input_names_the_argument = names_the_argument([*TOPK, *SCORE, *IMPORTANCE])


def rotated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    lists, angles = torch.zeros(2, 2, 5, 3, dtype=torch.int32), torch.zeros(3, 4)
    tokred.sparse_attention(q, k, v, lists, rope_cos=angles, rope_sin=angles)


def needing(t: torch.Tensor) -> torch.Tensor:
    return t.clone().requires_grad_()


INFERENCE_ONLY = [
    (tokred.gather_tokens, ([X, needing(X)], WHERE), r"tensors\[1\]"),
    (score, (needing(Q), K), "q"),
    (score, (Q, needing(K)), "k"),
    (pool, (needing(K), 2), "x"),
    (by_block, (Q, needing(POOLED)), "pooled"),
    (rows, (Q, needing(K)), "k"),
    (columns, (Q, K, LSE, "sum", needing(LSE)), "weight"),
    (tokred.pagerank, (needing(Q), K[:, :, :5]), "q"),
    (stats, (A, needing(B)), "b"),
    (moved, (A, needing(A)), "after"),
    (tokred.combine_states, (Q, needing(LSE), Q, LSE), "lse_a"),
    (rotated, (Q, K, needing(K)), "v"),
]


@pytest.mark.parametrize(("function", "args", "name"), INFERENCE_ONLY)
def test_inference_only_ops_refuse_what_requires_grad(
    function: Callable, args: tuple, name: str
) -> None:
    with pytest.raises(ValueError, match=f"no gradient, but {name} requires grad"):
        function(*args)
    with torch.no_grad():
        function(*args)


def test_choices_are_detached() -> None:
    x = needing(S)
    chosen = (
        tokred.topk(x, 2),
        tokred.topk_with_counts(x, 2),
        tokred.compact(x, 0.5),
        sample(x, 2),
    )
    assert not any(t.requires_grad for results in chosen for t in results)
