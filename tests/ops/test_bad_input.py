"""Bad input: every error names the argument, what it was and what it must be."""

from __future__ import annotations

import pytest
import torch

import tokred
from cases.bad_input import names_the_argument

attention, bipartite = tokred.biased_attention, tokred.bipartite_soft_matching

A, B = torch.zeros(2, 4, 8), torch.zeros(2, 5, 8)
MATCH = [
    (tokred.match, (A[0], B), {}, "a must have 3 dimensions"),
    (tokred.match, (A, B[0]), {}, "b must have 3 dimensions"),
    (tokred.match, (A.double(), B.double()), {}, "a must be float32, float16 or bfloat16"),
    (tokred.match, (A.int(), B.int()), {}, "a must be float32, float16 or bfloat16"),
    (tokred.match, (A, B.half()), {}, "b must have the dtype of a"),
    (tokred.match, (A, B[:1]), {}, "b must have the batch and channel sizes of a"),
    (tokred.match, (A, B[..., :4]), {}, "b must have the batch and channel sizes of a"),
    (tokred.match, (A[..., ::2], B[..., ::2]), {}, "a must be contiguous in its last dimension"),
    (tokred.match, (A, B), {"mask_a": torch.ones(2, 5, dtype=torch.bool)}, "mask_a must be"),
    (tokred.match, (A, B), {"mask_b": torch.ones(2, 5)}, "mask_b must be bool"),
    (tokred.match, (A, B), {"weight_a": torch.ones(2, 4).double()}, "weight_a must be float32"),
    (tokred.match, (A, B), {"weight_b": torch.ones(2, 4)}, "weight_b must be"),
    (tokred.match, (A, B), {"metric": "manhattan"}, "metric must be one of"),
    (tokred.match, (A, B), {"band": -2}, "band must be"),
    (tokred.match, (A, B), {"k": 0}, "k must be between 1"),
]

M = torch.zeros(2, 6, 8)
ROWS = torch.zeros(3, dtype=torch.int32)
BIPARTITE = [
    (bipartite, (M[0], 1), {}, "metric must"),
    (bipartite, (M, 1), {"sources": ROWS.short(), "destinations": ROWS}, "sources must be int32"),
    (bipartite, (M, 1), {"sources": ROWS, "destinations": ROWS.short()}, "destinations must be"),
    (bipartite, (M, 1), {"sources": ROWS.expand(3, 3), "destinations": ROWS}, "the batch size"),
]

X, MAP = torch.zeros(2, 6, 8), torch.zeros(2, 6, dtype=torch.int32)
SIZE, Y = torch.ones(2, 6), torch.zeros(2, 3, 8)
MERGE = [
    (tokred.merge, (X[0], MAP, 3), {}, "x must"),
    (tokred.merge, (X.int(), MAP, 3), {}, "x must be float32, float16 or bfloat16"),
    (tokred.merge, (X[..., ::2], MAP, 3), {}, "x must be contiguous in its last dimension"),
    (tokred.merge, (X, MAP.short(), 3), {}, "token_map must be int32"),
    (tokred.merge, (X, MAP[:, :5], 3), {}, "token_map must be"),
    (tokred.merge, (X, MAP, -1), {}, "num_out must be between 0"),
    (tokred.merge, (X, MAP, 3), {"size": SIZE[:, :5]}, "size must be"),
    (tokred.merge, (X, MAP, 3), {"size": SIZE.half()}, "size must be float32"),
    (tokred.merge, (X.double(), MAP, 3), {"size": SIZE}, "size must be float64"),
    (tokred.merge, (X, MAP, 3), {"weight": SIZE[..., None]}, "weight must"),
    (tokred.merge, (X, MAP, 3), {"mode": "median"}, "mode must be one of"),
    (tokred.merge, (X, MAP, 3), {"out": Y, "out_size": SIZE}, "out_size must be"),
    (
        tokred.merge,
        (X, MAP, 3),
        {"out": Y.half(), "out_size": SIZE[:, :3]},
        "out must have the dtype",
    ),
    (tokred.merge, (X, MAP, 3), {"out": Y[..., :4], "out_size": SIZE[:, :3]}, "out must be"),
    (tokred.unmerge, (Y[0], MAP), {}, "y must"),
    (tokred.unmerge, (Y, MAP[:1]), {}, "token_map must be"),
    (tokred.unmerge, (Y, MAP.short()), {}, "token_map must be int32"),
    (tokred.compose, (MAP.short(), MAP), {}, "second must be int32"),
    (tokred.compose, (MAP, MAP[0]), {}, "first must"),
    (tokred.compose, (MAP, MAP[:1]), {}, "must be"),
]

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
BIAS, MASK = torch.zeros(2, 2, 7), torch.ones(2, 4, 5, 7, dtype=torch.bool)
WIDE = torch.zeros(1, 1, 2, 577)
ATTENTION = [
    (attention, (Q[0], K, K), {}, "q must have 4 dimensions"),
    (attention, (Q, K[0], K), {}, "k must have 4 dimensions"),
    (attention, (Q, K, K[0]), {}, "v must have 4 dimensions"),
    (attention, (Q.int(), K.int(), K.int()), {}, "q must be float32"),
    (attention, (Q, K.half(), K), {}, "k must have the dtype of q"),
    (attention, (Q, K, K[:, :1]), {}, "v must have the batch, heads and keys of k"),
    (attention, (Q, K[..., :4], K), {}, "k must"),
    (attention, (Q[:, :3], K, K), {}, "the heads of q must be a multiple"),
    (
        attention,
        (Q[..., ::2], K[..., ::2], K),
        {},
        "q must be contiguous in its last dimension",
    ),
    (attention, (WIDE, WIDE, WIDE), {}, "the head dimension of q"),
    (attention, (Q, K, K), {"key_bias": BIAS.half()}, "key_bias must be float32"),
    (attention, (Q, K, K), {"key_bias": BIAS[..., :6]}, "key_bias must be"),
    (attention, (Q, K, K), {"key_bias": BIAS[:, None]}, "key_bias must"),
    (attention, (Q, K, K), {"mask": MASK.int()}, "mask must be bool"),
    (attention, (Q, K, K), {"mask": MASK[..., :6]}, "mask must be"),
    (attention, (Q, K, K), {"mask": MASK[0]}, "mask must"),
    (attention, (Q, K, K), {"scale": float("nan")}, "scale must be finite"),
]

PLACE = torch.zeros(1, 5, 1, dtype=torch.int32), torch.zeros(1, 7, 1, dtype=torch.int32)
POSITIONS = [
    (attention, (Q, K, K), {"query_position": PLACE[0]}, "must be given together"),
    (
        attention,
        (Q, K, K),
        {"query_position": PLACE[0].short(), "key_position": PLACE[1]},
        "query_position must be int32",
    ),
    (
        attention,
        (Q, K, K),
        {"query_position": PLACE[0], "key_position": PLACE[0]},
        "key_position must be",
    ),
    (
        attention,
        (Q, K, K),
        {"query_position": PLACE[0], "key_position": PLACE[1].expand(1, 7, 2)},
        "key_position must have the 1 columns|key_position must be contiguous",
    ),
]

LISTS = torch.zeros(2, 2, 5, 3, dtype=torch.int32)
ANGLES = torch.zeros(3, 4)
sparse, blocks = tokred.sparse_attention, tokred.block_sparse_attention
SPARSE = [
    (sparse, (Q, K, K, LISTS.short()), {}, "indices must be int32"),
    (sparse, (Q, K, K, LISTS[0]), {}, "indices must have 4 dimensions"),
    (sparse, (Q, K, K, LISTS[:1]), {}, "indices must be"),
    (sparse, (Q, K, K, LISTS[:, :, :4]), {}, "indices must be"),
    (sparse, (Q, K, K, LISTS.expand(2, 2, 5, 3).repeat(1, 2, 1, 1)[:, :3]), {}, "indices must be"),
    (sparse, (Q, K, K, LISTS[..., ::2]), {}, "indices must be contiguous"),
    (sparse, (Q, K, K, LISTS), {"block_q": 0}, "block_q must be at least 1"),
    (sparse, (Q, K, K, LISTS), {"block_q": 2}, "indices must be"),
    (sparse, (Q[:, :3], K, K, LISTS), {}, "the heads of q must be a multiple"),
    (sparse, (Q, K.half(), K, LISTS), {}, "k must have the dtype of q"),
    (sparse, (Q, K, K, LISTS), {"mask": MASK[..., :6]}, "mask must be"),
    (sparse, (Q, K, K, LISTS), {"key_bias": BIAS.double()}, "key_bias must be float32"),
    (sparse, (Q, K, K, LISTS), {"scale": float("inf")}, "scale must be finite"),
    (sparse, (Q, K, K, LISTS), {"rope_cos": ANGLES}, "must be given together"),
    (sparse, (Q, K, K, LISTS), {"rope_cos": ANGLES[:2], "rope_sin": ANGLES}, "rope_cos must be"),
    (
        sparse,
        (Q, K, K, LISTS),
        {"rope_cos": ANGLES, "rope_sin": ANGLES.double()},
        "rope_sin must be float32",
    ),
    (
        sparse,
        (Q[..., :7].clone(), K[..., :7].clone(), K, LISTS),
        {"rope_cos": ANGLES, "rope_sin": ANGLES},
        "even head dimension",
    ),
]

GRID = torch.ones(2, 4, 3, 3, dtype=torch.bool)
STATE = torch.zeros(2, 4, 5)
BLOCKS = [
    (blocks, (Q, K, K, GRID.float(), 2, 3), {}, "block_mask must be bool"),
    (blocks, (Q, K, K, GRID[0], 2, 3), {}, "block_mask must"),
    (blocks, (Q, K, K, GRID[:, :3], 2, 3), {}, "block_mask must"),
    (blocks, (Q, K, K, GRID[:, :, :2], 2, 3), {}, "block_mask must"),
    (blocks, (Q, K, K, GRID, 2, 2), {}, "block_mask must"),
    (blocks, (Q, K, K, GRID, 0, 3), {}, "block_q must be at least 1"),
    (blocks, (Q, K, K, GRID, 2, -1), {}, "block_k must be at least 1"),
    (blocks, (Q, K, K[:, :1], GRID, 2, 3), {}, "v must have"),
    (blocks, (Q, K, K, GRID, 2, 3), {"mask": MASK.int()}, "mask must be bool"),
    (blocks, (Q, K, K, GRID, 2, 3), {"key_bias": BIAS[..., :6]}, "key_bias must be"),
    (tokred.combine_states, (Q, STATE, Q[..., :4], STATE), {}, "out_b must"),
    (tokred.combine_states, (Q, STATE, Q.half(), STATE), {}, "out_b must have the dtype"),
    (tokred.combine_states, (Q[0], STATE, Q, STATE), {}, "out_a must"),
    (tokred.combine_states, (Q, STATE[:1], Q, STATE), {}, "lse_a must"),
    (tokred.combine_states, (Q, STATE, Q, STATE.double()), {}, "lse_b must be float32"),
    (tokred.combine_states, (Q, STATE, Q, STATE.mT), {}, "lse_b must"),
]

test_bad_input_names_the_argument = names_the_argument(
    [*MATCH, *BIPARTITE, *MERGE, *ATTENTION, *POSITIONS, *SPARSE, *BLOCKS]
)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_mixed_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="b must be on the device of a"):
        tokred.match(A.cuda(), B)
    with pytest.raises(RuntimeError, match="token_map must be on the device of x"):
        tokred.merge(X.cuda(), MAP, 3)
    with pytest.raises(RuntimeError, match="mask must be on the device of q"):
        attention(Q.cuda(), K.cuda(), K.cuda(), mask=MASK)


def test_threshold_must_be_a_number() -> None:
    with pytest.raises(RuntimeError, match="threshold must be a number"):
        tokred.threshold_matching(M, float("nan"))


def test_out_refuses_what_autograd_would_miss() -> None:
    buffers = {"out": Y.clone(), "out_size": SIZE[:, :3].clone()}
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="merge with out has no gradient, but x requires grad"):
        tokred.merge(x, MAP, 3, **buffers)
    with torch.no_grad():
        tokred.merge(x, MAP, 3, **buffers)
    with pytest.raises(ValueError, match="out and out_size"):
        tokred.merge(X, MAP, 3, out=Y)
    with pytest.raises(ValueError, match="num_out = 4"):
        tokred.merge(X, MAP, 4, **buffers)
