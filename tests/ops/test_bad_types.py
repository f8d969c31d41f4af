"""Arguments of a wrong type: the error names the argument, wherever it is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokred
from tokred import PackFormat

X, MAP = torch.zeros(2, 6, 8), torch.zeros(2, 6, dtype=torch.int32)
Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
WIDE, LISTS = torch.zeros(2, 2, 8, 16), torch.zeros(2, 1, 1, 3, dtype=torch.int32)
QUERY, LSE = torch.zeros(2, 4, 3, 16), torch.zeros(2, 4, 3)
PACKED, BUFFERS = PackFormat(4, 16).empty(2, 2, 8, 16), (torch.zeros(2, 3, 8), torch.zeros(2, 3))
FLAGS = torch.ones(2, dtype=torch.int32)
PAIR = (FLAGS.view(1, 1, 2), LISTS.view(1, 1, 2, 3))

CALLS: list[tuple[Callable, dict[str, Any]]] = [
    (tokred.merge, {"x": X, "token_map": MAP, "num_out": 3, "size": X[..., 0]}),
    (tokred.merge, {"x": X, "token_map": MAP, "num_out": 3, "out": BUFFERS[0],
                    "out_size": BUFFERS[1]}),
    (tokred.unmerge, {"y": X, "token_map": MAP}),
    (tokred.compose, {"second": MAP, "first": MAP}),
    (tokred.match, {"a": X, "b": X, "mask_a": None, "weight_b": None, "metric": "dot", "band": 1}),
    (tokred.bipartite_soft_matching, {"metric": X, "r": 1, "mask": None, "destinations": None}),
    (tokred.threshold_matching, {"metric": X, "threshold": 0.1, "sources": None}),
    (tokred.topk, {"scores": X, "k": 2, "lengths": None, "order": "score", "top_p": None}),
    (tokred.compact, {"selected": X, "threshold": 0.1, "capacity": 3}),
    (tokred.gather_tokens, {"tensors": [X], "indices": MAP}),
    (tokred.eviction_slot, {"position": LISTS[:, 0], "length": 3, "scores": None,
                            "logits": LISTS[:, 0].float(), "lse": LISTS[:, 0, :, 0].float(),
                            "bias": None, "first": 1}),
    (tokred.replace_token, {"slot": LISTS[:, 0, :, :1], "keys": WIDE[:, :1], "values": WIDE[:, 1:],
                            "new_keys": WIDE[:, :1, :1] + 0, "new_values": WIDE[:, :1, :1] + 0,
                            "position": None, "new_position": 0}),
    (tokred.inverse_transform_sample, {"scores": X, "num_samples": 2, "mask": None}),
    (tokred.qk_score, {"q": Q, "k": K, "reduce": "none", "scale": None, "mask": None}),
    (tokred.block_pool, {"x": K, "block_size": 2, "boundaries": None}),
    (tokred.block_score, {"q": Q, "pooled": K[:, :, :, None], "counts": None, "rule": "dot"}),
    (tokred.attention_rows, {"q": Q, "k": K, "denominator": None, "causal": False, "mask": None}),
    (tokred.attention_columns, {"q": Q, "k": K, "lse": None, "weight": None, "mask": None}),
    (tokred.pagerank, {"q": Q, "k": K[:, :, :3], "iterations": 2, "lse": LSE, "start": None}),
    (tokred.similarity_stats, {"a": X, "threshold": 0.1, "energy": "none", "mask_a": None}),
    (tokred.transition_stats, {"before": X, "after": X}),
    (tokred.biased_attention, {"q": Q, "k": K, "v": K, "key_bias": None, "mask": None,
                               "query_position": None}),
    (tokred.combine_states, {"out_a": Q, "lse_a": LSE, "out_b": Q, "lse_b": LSE}),
    (tokred.sparse_attention, {"q": Q, "k": K, "v": K, "indices": LISTS, "key_bias": None}),
    (tokred.block_sparse_attention, {"q": Q, "k": K, "v": K, "block_mask": PAIR, "block_q": 2,
                                     "block_k": 2, "mask": None}),
    (tokred.kv_pack, {"x": WIDE, "bits": 4, "group_size": 16, "scheme": "symmetric"}),
    (tokred.kv_unpack, {"packed": PACKED, "dtype": None, "out": None}),
    (tokred.kv_append, {"x": WIDE, "packed": PACKED, "length": 0, "window": None}),
    (tokred.packed_attention, {"q": QUERY, "packed_k": PACKED, "packed_v": PACKED, "mask": None,
                               "key_bias": None, "length": None}),
    (tokred.packed_qk_score, {"q": QUERY, "packed_k": PACKED, "lengths": None}),
]  # fmt: skip


class Nothing:
    """An object that no argument can be."""


@pytest.mark.parametrize(("function", "kwargs"), CALLS, ids=lambda c: getattr(c, "__name__", ""))
def test_the_argument_is_named(function: Callable, kwargs: dict[str, Any]) -> None:
    function(**kwargs)
    for name in kwargs:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=name):
            function(**{**kwargs, name: Nothing()})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tokred.merge(None, MAP, 3), "x must be a tensor, got None"),
        (lambda: tokred.topk(None, 2), "scores must be a tensor, got None"),
        (lambda: tokred.bipartite_soft_matching(None, 2), "metric must be a tensor, got None"),
        (lambda: tokred.transition_stats(X, None), "after must be a tensor, got None"),
        (lambda: tokred.kv_append(None, PACKED, 0), "x must be a tensor, got None"),
        (lambda: tokred.qk_score([1.0], K), "q must be a tensor, got list"),
        (lambda: tokred.biased_attention(Q, K, K, mask=[True]), "mask must be a tensor, got list"),
        (lambda: tokred.gather_tokens(X, MAP), "tensors must be a sequence of tensors, got Tensor"),
        (lambda: tokred.kv_unpack(WIDE), "packed must be a PackedKV, got Tensor"),
    ],
)
def test_says_what_it_must_be(call: Callable, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_numbers_are_not_rounded() -> None:
    with pytest.raises(RuntimeError, match="k must be of type int, got float"):
        tokred.topk(X, 2.5)
    with pytest.raises(RuntimeError, match="r must be of type int, got str"):
        tokred.bipartite_soft_matching(X, "1")
