"""MAELRE: linear attention while tokens are many, softmax attention once merging has left few.

Modality Agnostic Efficient Long Range Encoder (arXiv 2507.19409).

An approximate version, after the abstract: tokens merge from stage to stage (here by ToMe), and
attention costs O(N D^2) where N exceeds the dimension of a head and O(N^2 D) below. The feature map
of the linear attention is elu + 1, as no formula was at hand. The models are trained with it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

import tokred
from tokred.schedule import Amount

from ._method import Family, Method, Needs
from .tome import tome_step


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, most: int | None = None
) -> Tensor:
    """Softmax attention of at most `most` keys, linear attention of more.

    Args:
        q: [B, H, L, D]. k, v: [B, H, N, D].
        size: f32 [B, N], how many tokens each key stands for; both attend in proportion to it.
        most: the dimension of a head where None, at which the two cost the same.

    Returns:
        [B, H, L, D], differentiable.
    """
    if k.shape[2] <= (q.shape[3] if most is None else most):
        bias = None if size is None else size.log()[:, None]
        return tokred.biased_attention(q, k, v, key_bias=bias)[0]
    return linear_attention(q, k, v, size)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None) -> Tensor:
    """f(q) (f(k)^T v) / f(q) sum f(k) with f = elu + 1, over all keys; see attention."""
    features_q, features_k = functional.elu(q) + 1, functional.elu(k) + 1
    if size is not None:
        features_k = features_k * size[:, None, :, None].to(k.dtype)
    state = features_k.transpose(2, 3) @ v
    mass = features_q @ features_k.sum(2, keepdim=True).transpose(2, 3)
    return (features_q @ state) / mass


def merge_stage(x: Tensor, r: Amount, size: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Merges r tokens, or a share, of x [B, N, C]: (x, size f32, token_map), see tome_step."""
    return tome_step(x, x.detach().contiguous(), r, size, order="position")


METHOD = Method(
    title="Modality Agnostic Efficient Long Range Encoder",
    arxiv="2507.19409",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER, Needs.TRAINING),
    status="approximate",
    summary="merge from stage to stage, with linear attention as long as tokens are many",
)
