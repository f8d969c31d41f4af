"""Landmark attention: a block is seen through its last token, the landmark.

Landmark Attention: Random-Access Infinite Context Length for Transformers (NeurIPS 2023, arXiv
2305.16300). Models must be trained with landmark tokens. Blocks are counted from the first token
on, so rows must not be padded on the left.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred

from ._lists import check_minimum
from ._method import Family, Method, Needs


def _landmark_logits(q: Tensor, landmarks: Tensor, scale: float | None) -> Tensor:
    """f32 [B, Hq, L, C]: the logits of q [B, Hq, L, D] with landmark keys [B, Hkv, C, D]."""
    return tokred.attention_rows(q, landmarks, softmax=False, scale=scale)


def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, block: int = 51, scale: float | None = None
) -> Tensor:
    """Causal attention with the two-level softmax.

    A query's softmax runs over the earlier tokens of its own block and the landmarks of earlier
    blocks; what a landmark gets is shared out inside its block by a softmax over that block's other
    tokens. Landmarks are never attended to themselves.

    Args:
        q: [B, Hq, N, D]; k: [B, Hkv, N, D]; v: [B, Hkv, N, Dv].
        block: tokens a block, at least 2, of which the last is the landmark; the last block may be
            short. The release has 51 for LLaMA, 64 in its fused kernel.

    Returns:
        [B, Hq, N, Dv]. A query that sees nothing gets 0.

    Raises:
        ValueError: a block below 2, or q of another number of tokens than k.
    """
    check_minimum(2, block=block)
    tokens = k.shape[2]
    if q.shape[2] != tokens:
        raise ValueError(f"q must have the {tokens} tokens of k, got {q.shape[2]}")
    position = torch.arange(tokens, device=q.device)
    landmark = position % block == block - 1
    logits = _landmark_logits(q, k[:, :, landmark], scale)
    outs = []
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        queries = q[:, :, start:end]
        own = ~landmark[start:end]
        out, lse = tokred.biased_attention(
            queries, k[:, :, start:end], v[:, :, start:end], causal=True, scale=scale,
            mask=own[None, None, None],
        )  # fmt: skip
        for earlier in range(start // block):
            inside = slice(earlier * block, (earlier + 1) * block - 1)
            other, _ = tokred.biased_attention(
                queries, k[:, :, inside], v[:, :, inside], scale=scale
            )
            weight = logits[:, :, start:end, earlier].contiguous()
            out, lse = tokred.combine_states(out, lse, other, weight)
        outs.append(out)
    return torch.cat(outs, dim=2)


def retrieve_blocks(
    q: Tensor, landmarks: Tensor, num_blocks: int = 5, scale: float | None = None
) -> Tensor:
    """The blocks of largest landmark logit, per query head.

    Args:
        q: [B, Hq, 1, D]; landmarks: [B, Hkv, C, D], the keys of the landmarks.
        num_blocks: at least 0.

    Returns:
        i32 [B, Hq, num_blocks] by position, -1 padded.

    Raises:
        ValueError: a negative number of blocks.
    """
    check_minimum(0, num_blocks=num_blocks)
    logits = _landmark_logits(q, landmarks, scale)[:, :, 0]
    return tokred.topk(logits, num_blocks, order="position")[1]


def landmark_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int = 51,
    num_blocks: int = 5,
    scale: float | None = None,
) -> Tensor:
    """One decode step over the own block and the num_blocks best earlier blocks.

    Args:
        q: [B, Hq, 1, D], the newest token; k, v: [B, Hkv, N, ..], its own included.
        block, num_blocks: as in landmark_attention and retrieve_blocks.

    Returns:
        [B, Hq, 1, Dv].

    Raises:
        ValueError: a block below 2, a negative number of blocks, or more than one query.
    """
    check_minimum(2, block=block)
    check_minimum(0, num_blocks=num_blocks)
    if q.shape[2] != 1:
        raise ValueError(f"q must have one token, got {q.shape[2]}")
    tokens = k.shape[2]
    start = (tokens - 1) // block * block
    own = torch.arange(start, tokens, device=q.device) % block != block - 1
    out, lse = tokred.biased_attention(
        q, k[:, :, start:], v[:, :, start:], scale=scale, mask=own[None, None, None]
    )
    landmarks = k[:, :, block - 1 : start : block]
    if landmarks.shape[2] == 0:
        return out
    logits = _landmark_logits(q, landmarks, scale)
    chosen = retrieve_blocks(q, landmarks, min(num_blocks, landmarks.shape[2]), scale)
    inside = torch.arange(block - 1, dtype=torch.int32, device=q.device)
    for number in chosen.unbind(-1):
        tokens_of_block = torch.where(
            number[..., None] >= 0, number[..., None] * block + inside, -1
        )
        other, _ = tokred.sparse_attention(q, k, v, tokens_of_block[:, :, None], scale=scale)
        weight = logits[:, :, 0].gather(-1, number.clamp(min=0).long()[..., None])
        weight = weight.masked_fill(number[..., None] < 0, -torch.inf)
        out, lse = tokred.combine_states(out, lse, other, weight)
    return out


METHOD = Method(
    title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    arxiv="2305.16300",
    family=Family.PREFILL,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="see earlier blocks through their landmark token, in a two-level softmax",
)
