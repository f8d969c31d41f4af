"""FASA: score keys on the few rotary frequencies that agree with the whole head.

FASA: Frequency-Aware Sparse Attention (ICLR 2026, arXiv 2602.03152). The paper leaves open what
query heads that share a key head do. Here every query head has its own dimensions and its own keys,
or, with `DominantKeys`, the heads of a group share both, so that their keys can be kept apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred
from tokred.selection import block_mask

from ._lists import check_minimum
from ._method import Family, Method, Needs, Options

LANES = 16  # rows of whole lanes are read fastest

if TYPE_CHECKING:
    from tokred.patching import AttentionCall


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
        top: keys compared, at least 1 and at most N: |top keys of the chunk and of the head| / top,
            averaged over queries.

    Returns:
        f32 [Hq, D / 2]. O(B Hq L N D) time.

    Raises:
        ValueError: top below 1, or no queries or keys.
    """
    check_minimum(1, top=top, L=q.shape[2], N=k.shape[2])
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
    q: Tensor,
    k: Tensor,
    num_chunks: int = 12,
    top: int = 256,
    interleaved: bool = False,
    shared: bool = False,
) -> Tensor:
    """i32 [Hq, 2 * num_chunks]: the dimensions of the chunks of largest agreement, per head.

    Calibrated once: the chunks hardly differ from task to task. Arguments as in chunk_agreement;
    num_chunks is 8, 12 or 16 of 64 in the paper. With `shared` they are those of each key head,
    [Hkv, 2 * num_chunks], for `DominantKeys`: the agreement is averaged over its query heads.

    Raises:
        ValueError: num_chunks outside [1, D / 2], or as in chunk_agreement.
    """
    if not 1 <= num_chunks <= q.shape[3] // 2:
        raise ValueError(f"num_chunks must be from 1 to {q.shape[3] // 2}, got {num_chunks}")
    agreement = chunk_agreement(q, k, top, interleaved)
    if shared:
        agreement = agreement.unflatten(0, (k.shape[1], -1)).mean(1)
    chunks = tokred.topk(agreement, num_chunks, order="position")[1]
    return chunk_dims(chunks, q.shape[3], interleaved)


class DominantKeys:
    """The dominant dimensions of a cache's keys in rows of their own, for scoring.

    In a row of the whole cache scattered dimensions cost all its cache lines; here a score reads
    2F numbers a key, as in FASA-M, and the copy takes 2F / D of the keys' memory (2F rounded up to
    a multiple of 16).

    Args:
        k: [B, Hkv, N, D], the keys so far, rotated; N may be 0.
        dims: i32 [Hkv, 2F] from dominant_dims(..., shared=True).
        capacity: keys there is room for; by default N.

    Raises:
        ValueError: for dims that are not [Hkv, 2F] in [0, D), or more keys than the capacity.
    """

    def __init__(self, k: Tensor, dims: Tensor, capacity: int | None = None) -> None:
        batch, heads, tokens, head_dim = k.shape
        if dims.ndim != 2 or dims.shape[0] != heads:
            raise ValueError(f"dims must be [{heads}, 2F], a row a key head, got {[*dims.shape]}")
        if dims.numel() and not 0 <= int(dims.min()) <= int(dims.max()) < head_dim:
            raise ValueError(f"dims must lie in [0, {head_dim}), got {dims.min()} to {dims.max()}")
        self.dims = dims.long()
        width = -(-dims.shape[1] // LANES) * LANES
        self.rows = k.new_zeros(batch, heads, tokens if capacity is None else capacity, width)
        self.length = 0
        self.append(k)

    def append(self, k: Tensor) -> None:
        """Adds keys [B, Hkv, L, D] that follow. O(B Hkv L F) time."""
        end, capacity = self.length + k.shape[2], self.rows.shape[2]
        if end > capacity:
            raise ValueError(f"k must fit into {capacity} keys, got {end} with those here")
        self.rows[:, :, self.length : end, : self.dims.shape[1]] = self._dominant(k)
        self.length = end

    def score(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        """f32 [B, Hkv, N]: the logits of q [B, Hq, 1, D] by the dominant dimensions, averaged over
        each group; -inf where mask, bool [B, N], is False."""
        grouped = q.unflatten(1, (self.dims.shape[0], -1))[..., 0, :]
        dominant = self._dominant(grouped).flatten(1, 2)
        dominant = torch.nn.functional.pad(dominant, (0, self.rows.shape[3] - dominant.shape[2]))
        return tokred.qk_score(dominant, self.rows[:, :, : self.length], reduce="group_mean",
                               scale=q.shape[3] ** -0.5, mask=mask)  # fmt: skip

    def _dominant(self, x: Tensor) -> Tensor:
        """[B, Hkv, L, 2F] of x [B, Hkv, L, D]."""
        batch, heads, tokens, _ = x.shape
        return x.gather(3, self.dims[None, :, None].expand(batch, heads, tokens, -1))


def fasa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dims: Tensor | DominantKeys,
    num_keys: int = 256,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Full attention to the keys that score highest on the dominant dimensions.

    Args:
        q: [B, Hq, 1, D] and k: [B, Hkv, N, D], rotated; v: [B, Hkv, N, Dv].
        dims: i32 [Hq, 2F] from dominant_dims, or the DominantKeys of k.
        num_keys: keys each query head attends to, or, with DominantKeys, each group of them; at
            least 1. A row with fewer visible keys attends to them all.
        mask: bool [B, N], False where a key is padding.
        scale, softcap: of the logits of the chosen keys; see tokred.sparse_attention.

    Returns:
        out [B, Hq, 1, Dv], lse f32 [B, Hq, 1].

    Raises:
        ValueError: for DominantKeys of another number of keys than k's, or num_keys below 1.
    """
    check_minimum(1, num_keys=num_keys)
    if isinstance(dims, DominantKeys):
        if dims.length != k.shape[2]:
            raise ValueError(f"dims must hold the {k.shape[2]} keys of k, got {dims.length}")
        scores = dims.score(q.detach(), mask)
    else:
        scores = tokred.qk_score(q.detach(), k.detach(), dims=dims, mask=mask)
    indices = tokred.topk(scores, min(num_keys, k.shape[2]), order="position")[1]
    return tokred.sparse_attention(
        q, k, v, indices[:, :, None], scale=scale, mask=mask, softcap=softcap
    )


class FasaAttention:
    """What tokred.patch calls for every layer; prompts are attended to in full."""

    def __init__(self, options: FasaOptions) -> None:
        self.options = options
        self._largest = [int(dims.max()) if dims.numel() else -1 for dims in options.dims]

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        heads, head_dim = call.q.shape[1], call.q.shape[3]
        dims, largest = self.options.dims[call.layer], self._largest[call.layer]
        if dims.shape[0] != heads or largest >= head_dim:
            raise ValueError(
                f"dims[{call.layer}] must be those of {heads} query heads below {head_dim}, got "
                f"{dims.shape[0]} heads and dimensions up to {largest}"
            )
        """(out [B, Hq, L, Dv], lse f32 [B, Hq, L]) of one layer; see KeySelector."""
        if call.is_prompt or self.options.k >= call.num_keys:
            return call.dense()
        visible = call.visible()
        how = visible, call.scale, call.softcap
        return fasa_attention(call.q, call.k, call.v, dims, self.options.k, *how)


@dataclass(frozen=True)
class FasaOptions(Options):
    """Options of tokred.patch(model, "fasa", ...).

    dims: i32 [Hq, F] for every layer with full attention, from dominant_dims. k: keys a query head
        attends to.
    """

    dims: Sequence[Tensor]
    k: int = 256

    adapters = ("causal_lm",)
    rotation = "cached"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def attention(self, layers: Sequence[int]) -> FasaAttention:
        """The object that attends for all layers of a model.

        Raises:
            ValueError: not one entry of dims for every layer with full attention, or one that is
                no list of dimensions.
        """
        if len(self.dims) != len(layers):
            raise ValueError(
                f"dims must have {len(layers)} entries, one for every layer with full attention, "
                f"got {len(self.dims)}"
            )
        for layer, dims in enumerate(self.dims):
            if dims.dtype != torch.int32 or dims.dim() != 2 or bool((dims < 0).any()):
                raise ValueError(
                    f"dims[{layer}] must be int32 [Hq, F] of dimensions from 0, got {dims.dtype} "
                    f"{list(dims.shape)}"
                )
        return FasaAttention(self)


METHOD = Method(
    title="FASA: Frequency-Aware Sparse Attention",
    arxiv="2602.03152",
    family=Family.DECODE,
    needs=(Needs.LANGUAGE_MODEL, Needs.CALIBRATION),
    status="exact",
    summary="score keys on the few rotary frequencies that agree with the whole head",
    options=FasaOptions,
)
