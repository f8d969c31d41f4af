"""GLOT: pool a sentence over the graph of its similar tokens.

Towards Improved Sentence Representations using Token Graphs (arXiv 2603.03389).

The graph, a layer of graph attention on it and the readout; their weights are learned, and come as
arguments. Edges are counted on the device, which the graph waits for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import tokred

from ._lists import check_minimum
from ._method import Family, Method, Needs


@dataclass(frozen=True)
class TokenGraph:
    """The edges of a batch of sentences, those into one token beside each other.

    offsets: i32 [B * N + 1]; the edges into token n of item b are those from offsets[b * N + n] on.
    sources: i64 [E], the token each edge comes from, as b * N + n. targets: i64 [E].
    """

    offsets: Tensor
    sources: Tensor
    targets: Tensor


def token_graph(
    x: Tensor, threshold: float = 0.3, mask: Tensor | None = None, block: int = 256
) -> TokenGraph:
    """An edge between every two tokens with a cosine above the threshold; each has one to itself.

    Args:
        x: [B, N, C], the hidden states. mask: bool [B, N]; padding, which is False, has no edge.
        block: rows of similarities at a time.

    O(B N^2 C) time, O(B block N + E) memory.
    """
    check_minimum(1, block=block)
    batch, tokens, _ = x.shape
    unit = functional.normalize(x.detach().float(), dim=-1)
    live = torch.ones(batch, tokens, dtype=torch.bool, device=x.device) if mask is None else mask
    rows, columns = [], []
    place = torch.arange(tokens, device=x.device)
    for start in range(0, tokens, block):
        part = unit[:, start : start + block]
        edges = part @ unit.transpose(1, 2) > threshold
        edges |= place[start : start + block, None] == place
        edges &= live[:, start : start + block, None] & live[:, None]
        item, row, column = edges.nonzero(as_tuple=True)
        rows.append(item * tokens + row + start)
        columns.append(item * tokens + column)
    empty = torch.zeros(0, dtype=torch.int64, device=x.device)
    targets, order = torch.cat([empty, *rows]).sort(stable=True)
    sources = torch.cat([empty, *columns])[order]
    degree = torch.bincount(targets, minlength=batch * tokens)
    offsets = torch.cat([empty.new_zeros(1), degree.cumsum(0)]).to(torch.int32)
    return TokenGraph(offsets, sources, targets)


def graph_attention(
    h: Tensor, graph: TokenGraph, weight: Tensor, from_source: Tensor, from_target: Tensor
) -> Tensor:
    """One head of a graph attention layer (GAT) without its activation.

    Every token becomes the mean of W h over its edges, by the softmax of
    leaky_relu(from_source . W h_source + from_target . W h_target, 0.2).

    Args:
        h: [B, N, C]. weight: [D, C]. from_source, from_target: [D].

    Returns:
        [B, N, D], zeros for padding; differentiable.
    """
    values = functional.linear(h, weight).flatten(0, 1)
    logit = (values @ from_source)[graph.sources] + (values @ from_target)[graph.targets]
    logit = functional.leaky_relu(logit, 0.2)
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    pooled = tokred.segment_pool(
        values[graph.sources], offsets=graph.offsets, mode="softmax", weight=logit.to(wide)
    )
    return pooled.view(*h.shape[:2], -1)


def readout(h: Tensor, score: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of a sentence's tokens by the softmax of their scores.

    Args:
        h: [B, N, D], such as the outputs of all layers side by side. score: f32 [B, N], learned.
        mask: bool [B, N], padding is False.

    Returns:
        [B, D]; differentiable. 0 of a sentence without tokens.
    """
    ids = torch.zeros(h.shape[:2], dtype=torch.int32, device=h.device)
    ids = ids if mask is None else ids.masked_fill(~mask, -1)
    return tokred.segment_pool(h, ids=ids, num_segments=1, mode="softmax", weight=score)[:, 0]


METHOD = Method(
    title="Towards Improved Sentence Representations using Token Graphs",
    arxiv="2603.03389",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="pool the tokens of a sentence over the graph of their similarities",
)
