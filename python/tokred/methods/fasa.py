"""FASA: score keys on the few rotary frequencies that agree with the whole head.

FASA: Frequency-Aware Sparse Attention (ICLR 2026, arXiv 2602.03152). The paper leaves open what
query heads that share a key head do; here every query head has its own dimensions and its own keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred
from tokred.selection import block_mask

if TYPE_CHECKING:
    from tokred.models.attention import AttentionCall


def chunk_dims(chunks: Tensor, head_dim: int, interleaved: bool = False) -> Tensor:
    """The head dimensions of rotary frequency chunks.

    Args:
        chunks: integers [Hq, F] in [0, head_dim / 2).
        interleaved: chunk i is the dimensions (2i, 2i + 1) instead of (i, i + head_dim / 2).

    Returns:
        i32 [Hq, 2F].
    """
    first, second = (
        (2 * chunks, 2 * chunks + 1) if interleaved else (chunks, chunks + head_dim // 2)
    )
    return torch.cat([first, second], dim=-1).to(torch.int32)


def chunk_agreement(q: Tensor, k: Tensor, top: int = 256, interleaved: bool = False) -> Tensor:
    """How well each chunk alone finds the keys that the whole head finds.

    Args:
        q: [B, Hq, L, D], rotated calibration queries; k: [B, Hkv, N, D], rotated keys.
        top: keys compared: |top keys of the chunk and of the head| / top, averaged over queries.

    Returns:
        f32 [Hq, D / 2]. O(B Hq L N D) time.
    """
    heads, head_dim = q.shape[1], q.shape[3]
    top = min(top, k.shape[2])
    agreement = torch.zeros(heads, head_dim // 2, device=q.device)
    for query in q.unbind(2):
        whole = block_mask(tokred.topk(tokred.qk_score(query, k), top)[1], k.shape[2])
        for chunk in range(head_dim // 2):
            chunks = torch.full((heads, 1), chunk, device=q.device)
            dims = chunk_dims(chunks, head_dim, interleaved)
            alone = tokred.topk(tokred.qk_score(query, k, dims=dims), top)[1]
            shared = whole.gather(-1, alone.long()).sum(-1)
            agreement[:, chunk] += shared.sum(0) / (top * q.shape[0] * q.shape[2])
    return agreement


def dominant_dims(
    q: Tensor, k: Tensor, num_chunks: int = 12, top: int = 256, interleaved: bool = False
) -> Tensor:
    """i32 [Hq, 2 * num_chunks]: the dimensions of the chunks of greatest agreement, per head.

    Calibrated once: the chunks hardly differ from task to task. Arguments as in chunk_agreement;
    num_chunks is 8, 12 or 16 of 64 in the paper.
    """
    agreement = chunk_agreement(q, k, top, interleaved)
    chunks = tokred.topk(agreement, num_chunks, order="position")[1]
    return chunk_dims(chunks, q.shape[3], interleaved)


def fasa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dims: Tensor,
    num_keys: int = 256,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Full attention to the keys that score highest on the dominant dimensions.

    Args:
        q: [B, Hq, 1, D] and k: [B, Hkv, N, D], rotated; v: [B, Hkv, N, Dv].
        dims: i32 [Hq, F] from dominant_dims.
        num_keys: keys each query head attends to.
        mask: bool [B, N], False where a key is padding.

    Returns:
        out [B, Hq, 1, Dv], lse f32 [B, Hq, 1].
    """
    scores = tokred.qk_score(q, k, dims=dims, mask=mask)
    indices = tokred.topk(scores, min(num_keys, k.shape[2]), order="position")[1]
    return tokred.sparse_attention(q, k, v, indices[:, :, None], scale=scale, mask=mask)


class FasaAttention:
    """What tokred.patch calls for every layer; prompts are attended to in full."""

    def __init__(self, options: Fasa) -> None:
        self.options = options

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if call.q.shape[2] > 1:
            return call.dense()
        dims = self.options.dims[call.layer]
        visible = call.visible()
        return fasa_attention(call.q, call.k, call.v, dims, self.options.k, visible, call.scale)


@dataclass(frozen=True)
class Fasa:
    """Options of tokred.patch(model, "fasa", ...).

    dims: i32 [Hq, F] for every layer, from dominant_dims. k: keys a query head attends to.
    """

    dims: Sequence[Tensor]
    k: int = 256

    adapters = ("causal_lm",)
    rotation = "cached"

    def attention(self, num_layers: int) -> FasaAttention:
        if len(self.dims) != num_layers:
            raise ValueError(
                f"dims must have {num_layers} entries, one a layer, got {len(self.dims)}"
            )
        return FasaAttention(self)


OPTIONS = Fasa
