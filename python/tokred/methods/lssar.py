"""LSSAR: attention by softplus in place of exponentials, sharpened by a power of its weights.

Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models (arXiv
2501.13428).

Models are trained with it. Plain torch over blocks of queries: no matrix of all weights exists, and
each block is computed once; the largest weight of a row is divided out before the power, which the
second normalisation undoes, so that no power overflows. A row in which no key exceeds the mean
gives 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ._lists import check_minimum
from ._method import Family, Method, Needs


def softplus_attention(
    q: Tensor, k: Tensor, v: Tensor, power: float | None = 15.0, block: int = 128
) -> Tensor:
    """Causal attention with weights softplus(log D log n (q . k)), n the number of visible keys.

    q and k are normalised; weights are divided by their sum. With a power they become
    max(0, n w - 1)^power (without the 1 in the first three rows), divided by their sum again.

    Args:
        q: [B, Hq, L, D], the last L of N positions. k: [B, Hkv, N, D], v: [B, Hkv, N, Dv], Hq a
            multiple of Hkv.
        power: of the re-weighting; 15 as published, 3 for models trained on 1024 tokens; None for
            LSSA, without it.
        block: queries at a time.

    Returns:
        [B, Hq, L, Dv] in the dtype of q, computed in float32 at least. Differentiable; the gradient
        keeps what every block computed, O(B Hq L N).

    Raises:
        ValueError: shapes that do not fit, a power that is not above 0, or a block below 1.

    Complexity: 2 B Hq L N (D + Dv) flops, O(B Hq block N) memory.
    """
    check_minimum(1, block=block)
    if power is not None and not power > 0:
        raise ValueError(f"power must be above 0, got {power}")
    groups = q.shape[1] // max(k.shape[1], 1)
    length, keys = q.shape[2], k.shape[2]
    if q.shape[1] != groups * k.shape[1] or q.shape[3] != k.shape[3] or length > keys:
        raise ValueError(
            f"q must be [{k.shape[0]}, a multiple of {k.shape[1]}, at most {keys}, {k.shape[3]}], "
            f"got {list(q.shape)}"
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = (functional.normalize(x.to(wide), dim=-1).unsqueeze(2) for x in (q, k))
    q, k, values = q.view(q.shape[0], -1, groups, *q.shape[3:]), k, v.to(wide).unsqueeze(2)
    rows = []
    for start in range(0, length, block):
        end = min(start + block, length)
        place = torch.arange(start, end, device=q.device) + keys - length
        last = end + keys - length  # no query of the block sees more
        seen = (place[:, None] + 1).to(wide)
        hidden = torch.arange(last, device=q.device) > place[:, None]
        logits = q[:, :, :, start:end] @ k[:, :, :, :last].transpose(-1, -2)
        weight = functional.softplus(logits * (math.log(q.shape[-1]) * seen.log()))
        weight = _normalised(weight.masked_fill(hidden, 0))
        if power is not None:
            above = (weight * seen - (place[:, None] >= 3).to(wide)).clamp(min=0)
            # What is above the mean by rounding alone is not above it.
            above = above.masked_fill(hidden | (above < 16 * torch.finfo(wide).eps), 0)
            weight = _normalised((above / above.amax(-1, keepdim=True).clamp(min=1e-30)) ** power)
        rows.append(weight @ values[:, :, :, :last])
    out = torch.cat(rows, 3) if rows else values.new_zeros(*q.shape[:3], 0, v.shape[3])
    return out.flatten(1, 2).to(v.dtype)


def _normalised(weight: Tensor) -> Tensor:
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total > 0, total, 1)


METHOD = Method(
    title=(
        "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models"
    ),
    arxiv="2501.13428",
    family=Family.REWEIGHT,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="softplus weights with a length scale, sharpened by a power",
)
