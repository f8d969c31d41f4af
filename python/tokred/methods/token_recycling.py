"""Token Recycling: draft a tree of tokens from an adjacency table, verify it in one forward pass.

Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling
(arXiv 2408.08696). Drafting, verifying and the tree are those of the release. Where a token was
drafted twice the successors of its last node stay, which the release leaves to the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

import tokred

from ._lists import check_minimum
from ._method import Family, Method, Needs


@dataclass(frozen=True)
class Tree:
    """A tree of drafted tokens; node 0 is the last accepted token.

    parent, rank, depth, position: int [nodes]. Node i is the rank[i]-th successor of its parent;
    position i32 [nodes, 2] holds (entry, -exit) of a depth-first walk, so that a node sees exactly
    its ancestors and itself where both columns are less or equal.
    """

    parent: Tensor
    rank: Tensor
    depth: Tensor
    position: Tensor

    @classmethod
    def from_paths(cls, paths: list[tuple[int, ...]]) -> Tree:
        """The tree of the given paths of ranks, in that order behind the root.

        Raises:
            ValueError: a path stands before its parent, or twice.
        """
        number: dict[tuple[int, ...], int] = {(): 0}
        parent, rank = [-1], [0]
        for path in paths:
            if path in number or path[:-1] not in number:
                raise ValueError(f"path {path} stands twice, or before its parent")
            number[path] = len(number)
            parent.append(number[path[:-1]])
            rank.append(path[-1])
        order = sorted(number)
        entry = {path: i for i, path in enumerate(order)}
        exits = {path: max(entry[p] for p in order if p[: len(path)] == path) for path in order}
        columns = [(entry[path], -exits[path]) for path in number]
        depth = [len(path) for path in number]
        return cls(
            torch.tensor(parent),
            torch.tensor(rank),
            torch.tensor(depth),
            torch.tensor(columns, dtype=torch.int32),
        )

    def __len__(self) -> int:
        return len(self.parent)


# A string a level and a digit a node: how many of its successors are tried, from the best on.
PUBLISHED_TREE = (
    "8",
    "84321111",
    "832111112100100101100",
    "5211100010010000001001100",
    "311001000010100",
    "20010000",
)


def default_tree() -> Tree:
    """The published tree of 80 nodes and the root: 8, 21, 25, 15, 8 and 3 nodes a level."""
    level: list[tuple[int, ...]] = [()]
    paths: list[tuple[int, ...]] = []
    for counts in PUBLISHED_TREE:
        nodes = zip(level, map(int, counts), strict=True)
        level = [(*path, rank) for path, count in nodes for rank in range(count)]
        paths += level
    return Tree.from_paths(paths)


def rank_sum_tree(widths: tuple[int, ...], branch: int = 8) -> Tree:
    """A tree with that many nodes a level: of all children, those of smallest sum of ranks.

    Args:
        branch: successors of a node at most.

    Raises:
        ValueError: a number below 1.
    """
    check_minimum(1, branch=branch, widths=min(widths, default=1))
    level: list[tuple[int, ...]] = [()]
    paths: list[tuple[int, ...]] = []
    for width in widths:
        children = [(*path, rank) for path, rank in product(level, range(branch))]
        level = sorted(children, key=lambda path: (sum(path), path))[:width]
        paths += level
    return Tree.from_paths(paths)


def draft(adjacency: Tensor, tree: Tree, last_token: int | Tensor) -> Tensor:
    """int64 [nodes]: the tokens of the tree, each its parent's rank-th successor.

    Args:
        adjacency: int64 [V, branch], the likely successors of every token.
    """
    tokens = torch.empty(len(tree), dtype=torch.int64, device=adjacency.device)
    tokens[0] = last_token
    for level in range(1, int(tree.depth.max()) + 1):
        nodes = (tree.depth == level).nonzero()[:, 0]
        tokens[nodes] = adjacency[tokens[tree.parent[nodes]], tree.rank[nodes]]
    return tokens


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, tree: Tree, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every node to the whole past, its ancestors and itself.

    Args:
        q: [B, Hq, nodes, D]; k, v: [B, Hkv, past + nodes, ..], the nodes last.
    """
    past = k.shape[2] - len(tree)
    position = tree.position.to(q.device)
    before = position.new_full((past, 2), torch.iinfo(torch.int32).min)
    keys = torch.cat([before, position])[None]
    return tokred.biased_attention(
        q, k, v, scale=scale, query_position=position[None], key_position=keys
    )


def verify(tree: Tree, tokens: Tensor, predicted: Tensor) -> Tensor:
    """The nodes of the longest accepted path, from the root; the first in node order wins ties.

    Args:
        tokens: [nodes], the drafted tokens.
        predicted: [nodes], the model's most likely token after each node.

    Returns:
        int64 [accepted], node 0 first. predicted[last of them] is the next token for free.
    """
    parent = tree.parent.tolist()
    accepted = [True]
    for node in range(1, len(tree)):
        right = bool(tokens[node] == predicted[parent[node]])
        accepted.append(accepted[parent[node]] and right)
    depth = torch.where(torch.tensor(accepted), tree.depth, -1)
    node = int(depth.argmax())
    path = []
    while node >= 0:
        path.append(node)
        node = parent[node]
    return torch.tensor(path[::-1])


def keep_path(caches: list[Tensor], past: int, path: Tensor) -> list[Tensor]:
    """Every cache [B, H, past + nodes, D] without the rejected nodes, in one gather."""
    device = caches[0].device
    kept = torch.cat([torch.arange(past, device=device), past + path.to(device)])
    indices = kept.to(torch.int32).expand(caches[0].shape[0], -1)
    return tokred.gather_tokens(caches, indices)


def recycle(adjacency: Tensor, tokens: Tensor, logits: Tensor) -> None:
    """Sets the successors of all drafted tokens [nodes] to the best of logits [nodes, V], in place.

    A token drafted twice gets the successors of its last node.
    """
    best = tokred.topk(logits, adjacency.shape[1])[1].to(adjacency.dtype)
    last = {token: node for node, token in enumerate(tokens.tolist())}
    nodes = torch.tensor(list(last.values()), device=adjacency.device)
    adjacency[tokens[nodes]] = best[nodes]


METHOD = Method(
    title=(
        "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token "
        "Recycling"
    ),
    arxiv="2408.08696",
    family=Family.REUSE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="draft a tree from an adjacency table, verify it in one forward pass",
)
