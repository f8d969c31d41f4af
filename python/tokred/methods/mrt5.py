"""MrT5: a learned gate hides tokens from attention in training, and deletes them at inference.

MrT5: Dynamic Token Merging for Efficient Byte-level Language Models (arXiv 2410.20771).

The gate's layer is learned, so its logits are an argument; what stands here is what they do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import tokred

from ._method import Family, Method, Needs


def deletion_gate(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """-10 sigmoid(-logits): f32 [B, N] from 0, which keeps a token, to -10, which hides it.

    Args:
        logits: [B, N], of a linear layer on the normalised hidden states.
        mask: bool [B, N]; padding, which is False, gets -10.

    Differentiable.
    """
    gate = -10 * torch.sigmoid(-logits.float())
    return gate if mask is None else gate.masked_fill(~mask, -10.0)


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    add_one: bool = False,
) -> Tensor:
    """Attention with the gate on the logits of every key, in the layers before tokens are deleted.

    Args:
        q: [B, Hq, L, D]. k, v: [B, Hkv, N, D]. gate: f32 [B, N]. mask: as in biased_attention.
        add_one: 1 is added to the sum of the exponentials, so that a query may attend to nothing.

    Returns:
        [B, Hq, L, D]; differentiable in all.
    """
    out, lse = tokred.biased_attention(q, k, v, key_bias=gate, scale=scale, mask=mask)
    return out * torch.sigmoid(lse)[..., None].to(out.dtype) if add_one else out


@dataclass(frozen=True)
class Kept:
    """The tokens that are left.

    h: [B, K, C], zeros behind a row's last. positions: i32 [B, K] in the whole row, -1 behind it.
    lengths: i32 [B]. token_map: i32 [B, N], -1 where a token is deleted.
    """

    h: Tensor
    positions: Tensor
    lengths: Tensor
    token_map: Tensor


def delete(
    h: Tensor,
    gate: Tensor,
    threshold: float = -5.0,
    mask: Tensor | None = None,
    capacity: int | None = None,
) -> Kept:
    """Keeps the tokens whose gate is above the threshold, in their order.

    Args:
        h: [B, N, C]. gate: f32 [B, N], deletion_gate. mask: bool [B, N], False is deleted.
        capacity: K; N where None. int(lengths.max()) of a first call is the smallest that loses
            nothing, at the cost of waiting for the device.

    h is differentiable, zeros where nothing is left.
    """
    keep = gate > threshold if mask is None else (gate > threshold) & mask
    positions, lengths = tokred.compact(keep, capacity=capacity)
    slots = (keep.cumsum(1) - 1).to(torch.int32)
    token_map = torch.where(keep & (slots < positions.shape[1]), slots, -1)
    return Kept(tokred.unmerge(h, positions), positions, lengths, token_map)


def keep_bias(bias: Tensor, positions: Tensor) -> Tensor:
    """The position bias of the tokens that are left, on both axes.

    Args:
        bias: [1 | B, H, N, N]. positions: i32 [B, K].

    Returns:
        [B, H, K, K], 0 where a position is -1.
    """
    batch, kept = positions.shape
    index = positions.clamp(min=0).long()
    heads = bias.expand(batch, -1, -1, -1)
    rows = heads.gather(2, index[:, None, :, None].expand(-1, heads.shape[1], -1, bias.shape[3]))
    both = rows.gather(3, index[:, None, None].expand(-1, heads.shape[1], kept, -1))
    there = positions >= 0
    return both.masked_fill(~(there[:, None, :, None] & there[:, None, None]), 0)


METHOD = Method(
    title="MrT5: Dynamic Token Merging for Efficient Byte-level Language Models",
    arxiv="2410.20771",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="a learned gate on the keys of early layers, then deletion of what it hides",
)
