"""One call of biased_attention: its sizes, options and inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cases.attention import (
    random_mask,
    random_qkv,
)
from cases.inputs import generator


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    queries: int = 19
    keys: int = 23
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    bias: str = "none"
    causal: bool = False
    mask: str = "none"
    magnitude: float = 1.0
    scale: float | None = None

    def inputs(self) -> tuple:
        rng = generator(1)
        qkv = random_qkv(self, rng, self.magnitude)
        heads, keys = (self.batch, self.heads_kv), self.keys
        shapes = {"full": (*heads, keys), "shared": (1, 1, keys), "holes": (self.batch, 1, keys)}
        bias = None
        if self.bias != "none":
            bias = torch.rand(shapes[self.bias], generator=rng).mul(5).add(1).log()
            bias[..., ::3] = -torch.inf if self.bias == "holes" else 0.5
            bias = bias.to(torch.promote_types(self.dtype, torch.float32))
        mask = random_mask(self, rng, 0.6)
        if self.mask == "full":
            mask[:, :, :1] = False
        return (*qkv, bias, self.causal, self.scale, mask)


BIASES, MASKS = ("none", "full", "shared", "holes"), ("none", "keys", "heads", "pairs", "full")
