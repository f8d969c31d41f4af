"""The state of one forward pass through layers that merge tokens."""

from __future__ import annotations

import torch

import tokred

from .settings import Settings


class TokenState:
    """One stack of layers: what each of them merges, and the state of the latest forward pass.

    The first layer starts a forward pass afresh, so nothing carries over from one to the next,
    and torch.compile sees only attributes that are written before they are read. One forward pass
    at a time: threads need models of their own.
    """

    def __init__(self, plans: list, num_prefix: int, settings: Settings) -> None:
        self.plans = plans
        self.num_prefix = num_prefix
        self.prop_attn = settings.prop_attn
        self.trace_source = settings.trace_source
        self.ran = False
        self.counts: tuple[int, ...] = ()
        self.size: torch.Tensor | None = None
        self.token_map: torch.Tensor | None = None
        self.ones: torch.Tensor | None = None
        self.metric: torch.Tensor | None = None

    def begin(self, x: torch.Tensor) -> None:
        """Starts a forward pass on x [B, N, C]."""
        self.ran = True
        self.counts = (x.shape[1],)
        self.size = self.token_map = self.metric = None
        # The sizes before any merge: one element, so that an unmerged pass costs nothing.
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.ones = torch.ones(1, 1, dtype=wide, device=x.device).expand(x.shape[0], x.shape[1])

    def key_bias(self) -> torch.Tensor | None:
        """log(size) f32 [B, 1, N], or None where attention needs no bias."""
        if self.size is None or not self.prop_attn:
            return None
        return self.size.log().unsqueeze(1)

    def reduce(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """Merges x [B, N, C] as the layer's plan says, by the metric its attention left here."""
        metric, self.metric = self.metric, None
        if metric.dtype == torch.float64:
            metric = metric.float()
        plan = self.plans[layer](metric, self.num_prefix)
        if plan is None:
            return x
        token_map, num_out = plan
        # SigLIP's tokens come channel-first out of the patch convolution; the op wants rows.
        x, self.size = tokred.merge(x.contiguous(), token_map, num_out, self.size)
        self.counts += (num_out,)
        if self.trace_source:
            earlier = self.token_map
            self.token_map = token_map if earlier is None else tokred.compose(token_map, earlier)
        return x
