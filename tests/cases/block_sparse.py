"""One call of block_sparse_attention: its sizes, options and inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cases.attention import (
    random_bias,
    random_qkv,
)
from cases.inputs import generator


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    block_q: int = 16
    block_k: int = 16
    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    queries: int = 37
    keys: int = 53
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    mask_heads: str = "shared"
    density: float = 0.5
    causal: bool = False
    pairs: bool = False

    def inputs(self) -> tuple:
        rng = generator(2)
        qkv = random_qkv(self, rng)
        heads = {"shared": 1, "group": self.heads_kv, "query": self.heads_q}[self.mask_heads]
        blocks = (-(-self.queries // self.block_q), -(-self.keys // self.block_k))
        block_mask = torch.rand(self.batch, heads, *blocks, generator=rng) < self.density
        if self.mask_heads == "group":
            block_mask = block_mask.repeat_interleave(self.heads_q // self.heads_kv, 1)
        bias = mask = None
        if self.pairs:
            bias = random_bias(self, rng, hidden=7)
            shape = (self.batch, self.heads_q, self.queries, self.keys)
            mask = torch.rand(shape, generator=rng) < 0.7
        return (*qkv, block_mask, self.block_q, self.block_k, self.causal, None, bias, mask)


def as_mask(inputs: tuple) -> tuple:
    """The arguments of biased_attention that say the same."""
    q, k, v, block_mask, block_q, block_k, causal, scale, bias, mask = inputs
    rows = block_mask.repeat_interleave(min(block_q, max(q.shape[2], 1)), 2)[:, :, : q.shape[2]]
    visible = rows.repeat_interleave(min(block_k, max(k.shape[2], 1)), 3)[..., : k.shape[2]]
    return q, k, v, bias, causal, scale, visible if mask is None else visible & mask
