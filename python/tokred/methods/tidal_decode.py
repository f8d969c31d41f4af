"""TidalDecode: one layer chooses the keys, the layers after it attend to its choice.

TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention (ICLR 2025,
arXiv 2410.05076).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

import tokred

if TYPE_CHECKING:
    from tokred.models.attention import AttentionCall


class TidalAttention:
    """The choice of one decode step, carried from layer to layer: `indices` i32 [B, Hq, k]."""

    def __init__(self, options: TidalDecode) -> None:
        self.options = options
        self.indices: Tensor | None = None

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """What tokred.patch calls; prompts are attended to in full."""
        if call.q.shape[2] > 1:
            return call.dense()
        return self.step(call.layer, call.q, call.k, call.v, call.visible(), call.scale)

    def step(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The attention of one layer to the cache, for one new token.

        Args:
            layer: its number, from 0; a step runs the layers in order.
            q: [B, Hq, 1, D]; k: [B, Hkv, N, D]; v: [B, Hkv, N, Dv].
            mask: bool [B | 1, N], False where a key is padding.
            scale: 1 / sqrt(D) where None.

        Returns:
            out [B, Hq, 1, Dv], lse f32 [B, Hq, 1].

        Raises:
            ValueError: a sparse layer before any layer has chosen.
        """
        options = self.options
        key_mask = None if mask is None else mask[:, None, None]
        chooses = layer in (options.sparse_layer_start, options.correction_layer)
        if layer < options.sparse_layer_start or chooses:
            if chooses:
                logits = tokred.qk_score(q, k, scale=scale, mask=mask)
                kept = min(options.k, k.shape[2])
                self.indices = tokred.topk(logits, kept, order="position")[1]
            return tokred.biased_attention(q, k, v, scale=scale, mask=key_mask)
        if self.indices is None:
            raise ValueError(
                f"layer {layer} is sparse, and layer {options.sparse_layer_start}, which chooses "
                "for it, has not run yet"
            )
        chosen = self.indices[:, :, None]
        return tokred.sparse_attention(q, k, v, chosen, scale=scale, mask=key_mask)


@dataclass(frozen=True)
class TidalDecode:
    """Options of tokred.patch(model, "tidal_decode", ...).

    Layers below sparse_layer_start attend to everything. Layer sparse_layer_start and layer
    correction_layer attend to everything too, and keep the k greatest logits of every query head;
    all other layers attend to the keys kept last. The newest token competes like any other.
    """

    k: int = 256
    sparse_layer_start: int = 2
    correction_layer: int = 13

    adapters = ("causal_lm",)
    rotation = "cached"

    def attention(self, num_layers: int) -> TidalAttention:
        return TidalAttention(self)


OPTIONS = TidalDecode
