"""More bits for important tokens: the rest of a cache in 4 bits, the important half in 8.

An approximate version, of two ideas for another purpose. RSQ: Learning from Important Tokens Leads
to Better Quantized LLMs (arXiv 2503.01820) weighs tokens by the attention they receive, when it
quantises weights, and packs caches rotated and symmetric. EdgeQAT: Entropy and Distribution Guided
Quantization-Aware Training for the Acceleration of Lightweight LLMs on the Edge (arXiv 2402.10787)
ranks tokens by their logits on the first one and trains with 4 bits for the least important half of
them and 8 for the others. Here either ranks the tokens of a finished cache.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

import tokred
from tokred import PackedKV, PackFormat

from ._method import Family, Method, Needs


def attention_concentration(
    q: Tensor, k: Tensor, lse: Tensor | None = None, minimum: float = 0.005
) -> Tensor:
    """RSQ's importance, f32 [B, N]: column sums of all heads and queries, in [minimum, 1].

    Args:
        q: [B, Hq, N, D], causal. k: [B, Hkv, N, D]. lse: that of the attention, saves a pass.
    """
    score = tokred.attention_columns(q, k, lse, causal=True).sum(1)
    low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
    return minimum + (1 - minimum) * (score - low) / (high - low).clamp(min=1e-30)


def first_token_logits(q: Tensor, k: Tensor) -> Tensor:
    """EdgeQAT's importance, f32 [B, N]: the logits of q [B, Hq, N, D] on the first key, summed over
    the heads."""
    return tokred.attention_rows(q, k[:, :, :1], softmax=False)[..., 0].sum(1)


@dataclass
class MixedBits:
    """A cache in two precisions: two packed tensors of disjoint tokens, the same of all heads.

    parts: (keys, values) of few and of many bits. indices: their tokens, i32 [B, n], ascending.
    """

    parts: tuple[tuple[PackedKV, PackedKV], tuple[PackedKV, PackedKV]]
    indices: tuple[Tensor, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(side.nbytes for part in self.parts for side in part)

    def attend(
        self, q: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """One softmax over both parts, of q [B, Hq, L, D]: out and lse.

        mask: bool [B, N], True is visible.
        """
        states = []
        for (keys, values), indices in zip(self.parts, self.indices, strict=True):
            visible = None if mask is None else mask.gather(1, indices.long())
            states += tokred.packed_attention(q, keys, values, scale=scale, mask=visible)
        return tokred.combine_states(*states)


def mixed_bits(
    k: Tensor,
    v: Tensor,
    importance: Tensor,
    share: float = 0.5,
    few: PackFormat | None = None,
    many: PackFormat | None = None,
) -> MixedBits:
    """Packs the least important tokens in few bits, the others in many.

    Args:
        k: [B, Hkv, N, D], v: [B, Hkv, N, D]. importance: f32 [B, N].
        share: of the tokens, that get few bits: int(share * N) of them.
        few, many: formats of keys and values along channels; rotated and symmetric with a scale a
            token, in 4 and 8 bits, where None.

    Raises:
        ValueError: a share outside [0, 1].

    Complexity: one read of k and v.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    tokens, dim = k.shape[2:]
    important = tokens - int(share * tokens)
    best = tokred.topk(importance, important, order="position")[1]
    rest = torch.ones_like(importance, dtype=torch.bool).scatter(1, best.long(), False)
    others, _ = tokred.compact(rest, capacity=tokens - important)
    formats = [
        PackFormat(bits, dim, "channel", "symmetric", True) if form is None else form
        for bits, form in ((4, few), (8, many))
    ]
    parts = []
    for rows, form in zip((others, best), formats, strict=True):
        keys, values = tokred.gather_tokens([k, v], rows)
        pack = astuple(form)
        parts.append((tokred.kv_pack(keys, *pack), tokred.kv_pack(values, *pack)))
    return MixedBits((parts[0], parts[1]), (others, best))


METHOD = Method(
    title="RSQ: Learning from Important Tokens Leads to Better Quantized LLMs",
    arxiv="2503.01820",
    family=Family.QUANTIZE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="tokens that receive more attention are packed in more bits",
)
