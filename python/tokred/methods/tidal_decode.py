"""TidalDecode: one layer chooses the keys, the layers after it attend to its choice.

TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention (ICLR 2025,
arXiv 2410.05076).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

import tokred

from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import AttentionCall


class TidalAttention:
    """What tokred.patch calls for every layer; prompts are attended to in full."""

    def __init__(self, options: TidalDecodeOptions) -> None:
        self.options = options

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out [B, Hq, L, Dv], lse f32 [B, Hq, L]) of one layer; see KeySelector."""
        if call.is_prompt or self.options.k >= call.num_keys:
            return call.dense()
        how = call.carried, call.visible(), call.scale, call.softcap
        return self.step(call.layer, call.q, call.k, call.v, *how)

    def step(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        carried: dict[str, Tensor],
        mask: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The attention of one layer to the cache, for one new token.

        Args:
            layer: its number, from 0; a step runs the layers in order.
            q: [B, Hq, 1, D]; k: [B, Hkv, N, D]; v: [B, Hkv, N, Dv].
            carried: a dict for the layers of one step, empty at first; it holds the keys chosen
                last, `indices` i32 [B, Hq, k].
            mask: bool [B | 1, N], False where a key is padding.
            scale: 1 / sqrt(D) where None. softcap: of the logits; see tokred.biased_attention.

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
                logits = tokred.qk_score(q.detach(), k.detach(), scale=scale, mask=mask)
                kept = min(options.k, k.shape[2])
                carried["indices"] = tokred.topk(logits, kept, order="position")[1]
            return tokred.biased_attention(q, k, v, scale=scale, mask=key_mask, softcap=softcap)
        if "indices" not in carried:
            raise ValueError(
                f"layer {layer} is sparse, and layer {options.sparse_layer_start}, which chooses "
                "for it, has not run yet in this forward pass"
            )
        chosen = carried["indices"][:, :, None]
        return tokred.sparse_attention(q, k, v, chosen, scale=scale, mask=key_mask, softcap=softcap)


@dataclass(frozen=True)
class TidalDecodeOptions(Options):
    """Options of tokred.patch(model, "tidal_decode", ...).

    Layers below sparse_layer_start attend to everything. Layer sparse_layer_start and layer
    correction_layer attend to everything too, and keep the k largest logits of every query head;
    all other layers attend to the keys kept last. The newest token competes like any other.

    The layers with full attention count, from 0: of a model in which every sixth layer has it, 2 is
    the third of these. A correction_layer that the model does not have corrects nothing.
    """

    k: int = 256
    sparse_layer_start: int = 2
    correction_layer: int = 13

    adapters = ("causal_lm",)
    rotation = "cached"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        for name in ("sparse_layer_start", "correction_layer"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def attention(self, layers: Sequence[int]) -> TidalAttention:
        """The object that attends for all layers of a model.

        Raises:
            ValueError: sparse_layer_start lies beyond the model's last layer.
        """
        start, count = self.sparse_layer_start, len(layers)
        if start > layers[-1]:
            raise ValueError(
                f"sparse_layer_start must be below {count}, the number of layers with full "
                f"attention, got {start}"
            )
        if start >= count:
            warnings.warn(
                f"tidal_decode changes nothing: sparse_layer_start is {start}, and the model has "
                f"{count} layers with full attention, from 0",
                RuntimeWarning,
                stacklevel=2,
            )
        return TidalAttention(self)


METHOD = Method(
    title="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
    arxiv="2410.05076",
    family=Family.DECODE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="one layer chooses each head's keys, the layers after it attend to its choice",
    options=TidalDecodeOptions,
)
