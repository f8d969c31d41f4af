"""ActQKV: a probe query that stresses unusual queries retrieves blocks of keys.

Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference (arXiv
2502.13542).

A window's probe is the mean of its queries, weighted by how far each lies from a running mean. A
block of keys is represented by those of its keys that received most attention, and retrieved by the
cosine of that with the probe, over all heads together. While decoding, layers share a budget of
blocks in the ratio of their information density, the normalised entropy of those cosines.

An approximate version: probes, representatives, scores and budgets are those of the release; the
rest of it is not here. There, retrieved blocks are attended to beside the first and the
latest tokens, with the positions of InfLLM, and blocks are loaded from the host; here, attention is
to the retrieved blocks alone, at the positions that the keys have. The release keeps one running
mean for all layers, items and requests, which mixes them; here it belongs to the caller. Identical
queries weigh the same, where the release computes NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

import tokred
from tokred.selection import expand_blocks

from ._lists import check_minimum
from ._method import Family, Method, Needs


@dataclass(frozen=True)
class ActivationStats:
    """Running mean and variance of queries, f32 [B, Hq, 1, D], over `windows` windows.

    limit: windows after which the oldest lose weight. Until one more than these have been seen,
    queries weigh the same, as published.
    """

    mean: Tensor
    variance: Tensor
    windows: int
    limit: int

    @classmethod
    def of(cls, q: Tensor, limit: int = 1000) -> ActivationStats:
        """The statistics of a first window q [B, Hq, L, D].

        Raises:
            ValueError: fewer than two queries, which have no variance, or a limit below 0.
        """
        check_minimum(2, L=q.shape[2])
        check_minimum(0, limit=limit)
        q = q.detach().float()
        return cls(q.mean(2, keepdim=True), q.var(2, keepdim=True), 1, limit)

    def updated(self, q: Tensor) -> ActivationStats:
        """The statistics with one more window q [B, Hq, L, D]."""
        n, share = min(self.windows, max(self.limit, 1)), 1 / q.shape[2]
        q = q.detach().float()
        mean, variance = q.mean(2, keepdim=True), q.var(2, keepdim=True, unbiased=False)
        moved = (mean - self.mean).square() / (1 + 1 / n)
        variance = (self.variance * (n - share) + variance + moved) / (n + 1 - share)
        mean = (self.mean * n + mean) / (n + 1)
        return ActivationStats(mean, variance, self.windows + 1, self.limit)


def activation_weights(q: Tensor, stats: ActivationStats) -> Tensor:
    """f32 [B, L]: the share of each query of q [B, Hq, L, D] in the probe.

    (q - mean)^2 / (variance + 1/100 of its mean over all dimensions), averaged over the
    dimensions of all heads. stats: this window included.
    """
    queries = q.shape[2]
    if stats.windows <= stats.limit + 1:
        return torch.full((q.shape[0], queries), 1 / queries, device=q.device)
    spread = stats.variance + stats.variance.mean((1, 3), keepdim=True) / 100
    bias = ((q.detach().float() - stats.mean).square() / spread).mean((1, 3))
    total = bias.sum(1, keepdim=True)
    return torch.where(total > 0, bias / total, 1 / queries)


def probe_query(q: Tensor, stats: ActivationStats | None = None) -> Tensor:
    """f32 [B, Hq, 1, D]: the weighted mean of a window of queries [B, Hq, L, D].

    stats: running statistics, this window included; the plain mean where None.
    """
    q32 = q.detach().float()
    if stats is None:
        return q32.mean(2, keepdim=True)
    return (activation_weights(q, stats)[:, None, :, None] * q32).sum(2, keepdim=True)


def block_keys(
    k: Tensor,
    received: Tensor,
    block: int = 128,
    num_representatives: int = 4,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A representative of each block: the mean of the keys that received most attention.

    Args:
        k: [B, Hkv, N, D]. received: f32 [B, Hq, N], the attention of each query head to the keys,
            summed over the queries after them.
        block: tokens a block; the tokens of a last one that is not full belong to none.
        num_representatives: keys of the mean, from 1 to block; fewer where padding leaves fewer.
        mask: bool [B, N], False where a key is padding.

    Returns:
        f32 [B, Hq, N // block, D], and bool [B, N // block], which blocks hold a key.

    Raises:
        ValueError: num_representatives outside [1, block].
    """
    if not 1 <= num_representatives <= block:
        raise ValueError(
            f"num_representatives must be from 1 to block = {block}, got {num_representatives}"
        )
    batch, heads_kv, tokens, dim = k.shape
    blocks = tokens // block
    received = received[..., : blocks * block]
    visible = k.new_ones(batch, blocks * block, dtype=torch.bool)
    if mask is not None:
        visible = mask[:, : blocks * block]
        received = received.masked_fill(~visible[:, None], -torch.inf)
    visible = visible.unflatten(1, (blocks, block)).any(2)
    if blocks == 0:
        return k.new_zeros(batch, received.shape[1], 0, dim, dtype=torch.float32), visible
    best = tokred.topk(received.contiguous(), num_representatives, block_size=block)[1]
    count = (best >= 0).sum(3, keepdim=True).clamp(min=1)
    (rows,) = tokred.gather_tokens([k.detach()], best.reshape(batch, heads_kv, -1))
    rows = rows.float().reshape(*best.shape, dim)
    return rows.sum(3) / count, visible


def block_scores(
    probe: Tensor,
    blocks: Tensor,
    visible: Tensor,
    question: Tensor | None = None,
    question_weight: float = 0.5,
) -> Tensor:
    """f32 [B, M]: the cosine of the probe and each block, over all heads as one vector.

    Args:
        probe: [B, Hq, 1, D]. blocks, visible: of block_keys; a block that holds no key gets -inf.
        question: [B, Hq, 1, D], a mean query of the question, whose cosine is added with
            question_weight; the release does so in the prompt and not while decoding.
    """

    def cosine(query: Tensor) -> Tensor:
        query = normalize(query.float().flatten(1), dim=1)
        keys = normalize(blocks.transpose(1, 2).flatten(2), dim=2)
        return (keys @ query[..., None])[..., 0]

    scores = cosine(probe)
    if question is not None:
        scores = scores + question_weight * cosine(question)
    return scores.masked_fill(~visible, -torch.inf)


def information_density(scores: Tensor) -> Tensor:
    """f32 [B]: the entropy of softmax(scores [B, M]) over its maximum, log(number of blocks).

    0 where there are fewer than two blocks.
    """
    p = scores.softmax(-1).nan_to_num(0)
    entropy = -(p * (p + 1e-10).log()).sum(-1)
    count = (scores > -torch.inf).sum(-1)
    return torch.where(count > 1, entropy / count.clamp(min=2).log(), 0.0)


def layer_budget(
    densities: Sequence[float], layer: int, remaining: int, minimum: int = 32, maximum: int = 32
) -> int:
    """How many blocks a layer retrieves, of those left for it and the layers after it.

    Args:
        densities: the mean density of every layer, over the last hundred steps as published.
        remaining: blocks that layers before it have left; at first, the layers times the mean
            number of blocks.
        minimum, maximum: of any layer, published as 32 and twice the mean number of blocks; both
            at most the number of blocks there are.
    """
    total = math.fsum(densities[layer:])
    wanted = round(densities[layer] / total * remaining) if total > 0 else minimum
    return max(min(wanted, maximum), minimum)


def act_qkv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    received: Tensor,
    num_blocks: int = 16,
    block: int = 128,
    num_representatives: int = 4,
    stats: ActivationStats | None = None,
    question: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a window of queries to the num_blocks blocks most like its probe.

    Args:
        q: [B, Hq, L, D]; k: [B, Hkv, N, D]; v: [B, Hkv, N, Dv].
        num_blocks: at least 0; one choice for all heads. stats: as in probe_query; question: as in
            block_scores; the others as in block_keys. Keys of a last block that is not full are
            left to the caller (see `combine_states`).

    Returns:
        out [B, Hq, L, Dv], lse f32 [B, Hq, L]; 0 and -inf where there is no block.

    Raises:
        ValueError: num_blocks below 0, or num_representatives outside [1, block].
    """
    check_minimum(0, num_blocks=num_blocks)
    blocks, visible = block_keys(k, received, block, num_representatives, mask)
    scores = block_scores(probe_query(q, stats), blocks, visible, question)
    chosen = tokred.topk(scores, min(num_blocks, scores.shape[1]), order="position")[1]
    indices = expand_blocks(chosen, block, k.shape[2])[:, None, None]
    return tokred.sparse_attention(q, k, v, indices, scale=scale, mask=mask, block_q=q.shape[2])


METHOD = Method(
    title=(
        "Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs "
        "Inference"
    ),
    arxiv="2502.13542",
    family=Family.DECODE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="a probe query that stresses unusual queries retrieves blocks of keys",
)
