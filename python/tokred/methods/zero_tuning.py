"""ZeroTuning: scale the attention to the first token, per head, without touching the kernel.

ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training
(arXiv 2505.11739).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._method import Family, Method, Needs


def rescale_first_token(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    first_key: Tensor,
    first_value: Tensor,
    gamma: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Multiplies the probability of the first token by gamma and normalises again.

    With p0 = exp(q . k0 scale - lse): out' = (out + (gamma - 1) p0 v0) / (1 + (gamma - 1) p0). Any
    attention that returns its lse will do, sparse ones included, if it saw the first token.

    Args:
        out: [B, Hq, L, Dv] and lse: f32 [B, Hq, L] of the attention.
        q: [B, Hq, L, D].
        first_key: [B, Hkv, D]; first_value: [B, Hkv, Dv].
        gamma: at least 0, [Hq] or a shape that broadcasts with [B, Hq, L]. The values are the
            caller's; where all of a query's weight lies on the first token, gamma 0 gives NaN.

    Returns:
        [B, Hq, L, Dv] in the dtype of out. A query that saw nothing (lse -inf) keeps its 0.

    Raises:
        ValueError: gamma of a shape that does not broadcast with [B, Hq, L].
    """
    shape = [*(gamma[:, None] if gamma.dim() == 1 else gamma).shape]
    short = list(zip(shape[::-1], [*lse.shape][::-1], strict=False))
    if len(shape) > 3 or any(mine not in (1, theirs) for mine, theirs in short):
        raise ValueError(f"gamma must broadcast with [B, Hq, L] = {[*lse.shape]}, got {shape}")
    group = q.shape[1] // first_key.shape[1]
    key, value = (t.float().repeat_interleave(group, 1) for t in (first_key, first_value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logit = scale * (q.float() * key[:, :, None]).sum(-1)
    probability = torch.where(lse == -torch.inf, 0.0, torch.exp(logit - lse))
    if gamma.dim() == 1:
        gamma = gamma[:, None]
    extra = ((gamma - 1) * probability)[..., None]
    return ((out.float() + extra * value[:, :, None]) / (1 + extra)).to(out.dtype)


METHOD = Method(
    title=(
        "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without "
        "Training"
    ),
    arxiv="2505.11739",
    family=Family.REWEIGHT,
    needs=(Needs.LANGUAGE_MODEL, Needs.CALIBRATION),
    status="exact",
    summary="scale each head's attention to the first token, from the lse alone",
)
