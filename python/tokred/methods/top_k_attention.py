"""Top-k attention: every query of every head attends to the k keys of largest logit.

Memory-efficient Transformers via Top-k Attention (arXiv 2106.06899). It chooses with full
knowledge, prompts included, and so shows how few keys a model needs; methods that score for less
are measured against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

import tokred

from ._lists import check_minimum
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import AttentionCall


def top_k_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_keys: int,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk: int = 64,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query to its own num_keys keys.

    Args:
        q: [B, Hq, L, D]; k: [B, Hkv, N, D]; v: [B, Hkv, N, Dv].
        num_keys: keys a query attends to, at least 1; a query that sees fewer attends to them all,
            and one that sees none has out 0 and lse -inf.
        causal: query i sees the keys j <= i + N - L.
        mask: bool [B | 1, Hq | 1, L | 1, N], True is visible.
        chunk: queries whose logits exist at a time, at least 1.
        softcap: of the logits; see tokred.biased_attention.

    Returns:
        out [B, Hq, L, Dv], lse f32 [B, Hq, L]; with num_keys >= N exactly those of
        tokred.biased_attention.

    Raises:
        ValueError: num_keys or chunk below 1.
    """
    check_minimum(1, num_keys=num_keys, chunk=chunk)
    queries, keys = q.shape[2], k.shape[2]
    if num_keys >= keys:
        return tokred.biased_attention(
            q, k, v, causal=causal, scale=scale, mask=mask, softcap=softcap
        )
    parts = []
    for start in range(0, queries, chunk):
        rows = slice(start, min(start + chunk, queries))
        # Only the keys that a causal chunk can see.
        seen = max(keys - queries + rows.stop, 0) if causal else keys
        part_mask = mask
        if mask is not None:
            part_mask = (mask[:, :, rows] if mask.shape[2] > 1 else mask)[..., :seen]
        inputs = (q[:, :, rows], k[:, :, :seen])
        options = {"causal": causal, "scale": scale, "mask": part_mask}
        chooser = (x.detach() for x in inputs)
        logits = tokred.attention_rows(*chooser, softmax=False, **options)
        indices = tokred.topk(logits, min(num_keys, seen), order="position")[1]
        options |= {"block_q": 1, "softcap": softcap}
        part = tokred.sparse_attention(*inputs, v[:, :, :seen], indices, **options)
        parts.append(part)
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


class TopKState:
    """What tokred.patch calls for every layer."""

    reads_packed = True

    def __init__(self, options: TopKAttentionOptions) -> None:
        self.options = options

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out [B, Hq, L, Dv], lse f32 [B, Hq, L]) of one layer; see KeySelector."""
        if call.is_prompt and self.options.prefill == "dense":
            return call.dense()
        if call.is_packed or (call.score_keys is not None and call.q.shape[2] == 1):
            return self._attend_packed(call)
        return top_k_attention(
            call.q,
            call.k,
            call.v,
            self.options.k,
            call.causal,
            call.mask,
            call.scale,
            softcap=call.softcap,
        )

    def _attend_packed(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Query by query, with scores of packed keys; a PackedCache has no others."""
        if self.options.k >= call.num_keys:
            return call.dense()
        queries = call.q.shape[2]
        if queries > 1:
            parts = (self._attend_packed(_query(call, number)) for number in range(queries))
            outs, lses = zip(*parts, strict=True)
            return torch.cat(outs, 2), torch.cat(lses, 2)
        indices = tokred.topk(call.score(), self.options.k, order="position")[1]
        return call.attend_to(indices[:, :, None], block_q=1)


def _query(call: AttentionCall, number: int) -> AttentionCall:
    """The call of one query of several, with a mask in the place of causality."""
    queries, keys = call.q.shape[2], call.num_keys
    mask = call.mask
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, number : number + 1]
    if call.causal:
        earlier = torch.arange(keys, device=call.q.device) <= keys - queries + number
        mask = earlier[None, None, None] if mask is None else mask & earlier
    return replace(call, q=call.q[:, :, number : number + 1], mask=mask, causal=False)


@dataclass(frozen=True)
class TopKAttentionOptions(Options):
    """Options of tokred.patch(model, "top_k_attention", ...).

    k: keys a query attends to. prefill: "select", prompts choose too; or "dense". On a PackedCache
        later parts of a prompt choose among packed keys, one query at a time.
    """

    k: int = 256
    prefill: Literal["select", "dense"] = "select"

    adapters = ("causal_lm",)
    heads_may_be_split = True
    rotation = "cached"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def attention(self, layers: Sequence[int]) -> TopKState:
        return TopKState(self)


METHOD = Method(
    title="Memory-efficient Transformers via Top-k Attention",
    arxiv="2106.06899",
    family=Family.DECODE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="every query of every head attends to the k keys of largest logit",
    options=TopKAttentionOptions,
)
