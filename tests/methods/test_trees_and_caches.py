"""Tree drafts, iteration columns, frozen and shared caches, against masks written out in torch."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch

from cases.dense import attend, close, heads
from tokred.methods import token_recycling as recycling
from tokred.methods.cartridges import shared_prefix_attention
from tokred.methods.free_cache import FreeCache, active_tokens
from tokred.methods.tah import duo_causal_attention


def ancestors_or_self(tree: recycling.Tree) -> torch.Tensor:
    visible = torch.eye(len(tree), dtype=torch.bool)
    for node in range(len(tree)):
        parent = int(tree.parent[node])
        if parent >= 0:
            visible[node] |= visible[parent]
    return visible


def test_published_tree() -> None:
    """The tree of 80 nodes, each written as the ranks of its path."""
    published = re.findall(r"\d+", """
        0 1 2 3 4 5 6 7
        00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70
        000 001 002 003 004 005 006 007 010 011 012 020 021 030 040 050 060 070
        100 101 110 200 300 400 500
        0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 3000
        00000 00001 00002 00010 00020 00100 01000 10000
        000000 000001 000100
    """)  # fmt: skip
    tree = recycling.default_tree()
    assert len(tree) == len(published) + 1 == 81
    names = [""]
    for parent, rank in zip(tree.parent[1:].tolist(), tree.rank[1:].tolist(), strict=True):
        names.append(f"{names[parent]}{rank}")
    assert names[1:] == published
    assert tree.depth.tolist() == [len(name) for name in names]


def test_other_trees() -> None:
    tree = recycling.rank_sum_tree((8, 21, 25, 15, 8, 3))
    assert tree.depth.bincount().tolist() == [1, 8, 21, 25, 15, 8, 3]
    assert torch.equal(tree.depth[1:], tree.depth[tree.parent[1:]] + 1)
    siblings = {(int(p), int(r)) for p, r in zip(tree.parent, tree.rank, strict=True)}
    assert len(siblings) == 81
    with pytest.raises(ValueError, match="before its parent"):
        recycling.Tree.from_paths([(0, 1)])
    with pytest.raises(ValueError, match="widths must be at least 1, got 0"):
        recycling.rank_sum_tree((2, 0))


def test_tree_attention() -> None:
    tree = recycling.rank_sum_tree((3, 4, 2), 3)
    past = 30
    q, k, v = heads(queries=len(tree), keys=past + len(tree))
    visible = torch.cat([torch.ones(len(tree), past).bool(), ancestors_or_self(tree)], 1)
    out, _ = recycling.tree_attention(q, k, v, tree)
    close(out, attend(q, k, v, visible))


def test_token_recycling_round() -> None:
    """Draft, verify and recycle with a model that counts upwards."""
    vocabulary = 40
    tree = recycling.rank_sum_tree((3, 4, 2), 3)
    adjacency = torch.zeros(vocabulary, 3, dtype=torch.int64)
    adjacency[:, 1] = (torch.arange(vocabulary) + 1) % vocabulary
    adjacency[:, 2] = 7
    tokens = recycling.draft(adjacency, tree, 11)
    for node in range(1, len(tree)):
        parent = int(tree.parent[node])
        assert tokens[node] == adjacency[tokens[parent], tree.rank[node]]
    path = recycling.verify(tree, tokens, (tokens + 1) % vocabulary)
    assert tokens[path].tolist() == [11, 12, 13, 14][: len(path)] and len(path) > 1
    assert all(int(tree.parent[b]) == int(a) for a, b in pairwise(path))
    nothing = recycling.verify(tree, tokens, torch.full_like(tokens, 39))
    assert nothing.tolist() == [0]

    cache = torch.randn(1, 2, 5 + len(tree), 4)
    kept, _ = recycling.keep_path([cache, cache], 5, path)
    assert torch.equal(kept, cache[:, :, [*range(5), *(5 + path).tolist()]])

    logits = torch.randn(len(tree), vocabulary)
    recycling.recycle(adjacency, tokens, logits)
    last = {int(token): node for node, token in enumerate(tokens)}
    for token, node in last.items():
        assert torch.equal(adjacency[token], logits[node].topk(3).indices)


def test_tah() -> None:
    """Keys of two iterations, stored iteration by iteration; some are not valid."""
    q, k, v = heads(queries=9, keys=15)
    position = torch.tensor([*range(9), 1, 3, 4, 6, 7, 8])
    iteration = torch.tensor([0] * 9 + [1] * 6)
    key_place = torch.stack([position, iteration], -1).int()[None]
    query_iteration = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1, 0])
    query_place = torch.stack([torch.arange(9), query_iteration], -1).int()[None]
    valid = torch.rand(2, 15) < 0.8
    valid[:, 0] = True
    visible = position <= torch.arange(9)[:, None]
    visible = visible & (iteration <= query_iteration[:, None])
    out, _ = duo_causal_attention(q, k, v, query_place, key_place, valid)
    close(out, attend(q, k, v, visible & valid[:, None, None]))


def test_free_cache() -> None:
    q, k, v = heads(queries=6, keys=40)
    cache = FreeCache(k[:, :, :10], v[:, :, :10], capacity=34)
    cache.freeze(k[:, :, 10:34], v[:, :, 10:34])
    mask = torch.rand(2, 40) < 0.7
    out = cache.attend(q, k[:, :, 34:], v[:, :, 34:], mask)
    close(out, attend(q, k, v, mask[:, None, None]))
    with pytest.raises(ValueError, match="room for 34 tokens, not for 35"):
        cache.freeze(k[:, :, :1], v[:, :, :1])
    assert cache.length == 34 and torch.equal(cache.k, k[:, :, :34])
    with pytest.raises(ValueError, match="capacity must be at least"):
        FreeCache(k, v, 39)


def test_active_tokens() -> None:
    finished = torch.tensor([[True, False, True, False], [True, True, True, True]])
    indices, counts = active_tokens(finished)
    assert indices.tolist() == [[1, 3, -1, -1], [-1] * 4]
    assert counts.tolist() == [2, 0]


def test_cartridges() -> None:
    q, k, v = heads(queries=7, keys=7, batch=3)
    _, prefix_k, prefix_v = heads(keys=20, batch=1, seed=1)
    keys, values = (
        torch.cat([a.expand(3, -1, -1, -1), b], 2) for a, b in ((prefix_k, k), (prefix_v, v))
    )
    visible = torch.cat([torch.ones(7, 20), torch.ones(7, 7).tril()], 1).bool()
    out, _ = shared_prefix_attention(q, prefix_k[0], prefix_v[0], k, v)
    close(out, attend(q, keys, values, visible))
