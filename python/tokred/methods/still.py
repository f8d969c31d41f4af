"""STILL: softmax attention to what is near or salient, linear attention to all the rest.

STILL: Selecting Tokens for Intra-Layer Hybrid Attention to Linearize LLMs (arXiv 2602.02180).

The selection and the merge of the two attentions; the feature map's weights and the gate are
learned. Saliency follows the paper; the authors' code overwrites a fixed column of its rolling
window instead of the token's own, so it selects others. Their merge depends on the largest logit of
a row and counts keys that do not exist in the first chunk; tokred.combine_linear does neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred

from ._lists import check_count, check_minimum, range_list
from ._method import Family, Method, Needs


def saliency(
    q: Tensor, k: Tensor, window: int = 64, scale: float | None = None, eps: float = 1e-8
) -> Tensor:
    """How much a token changes the attention to its last `window` tokens, itself among them.

    The divergence of that attention from the one without the token itself, which depends on the
    weight p of the token alone: (1 - p) log(1 - p) + p log((p + eps) / eps).

    Args:
        q, k: [B, H, N, D]. scale: of the logits, 1 / sqrt(D) where None.

    Returns:
        f32 [B, H, N]. O(B H N window D) time.
    """
    check_minimum(1, window=window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.detach(), k.detach()
    end = torch.arange(1, q.shape[2] + 1, dtype=torch.int32, device=q.device)
    keys = range_list((end - window).clamp(min=0), end, window)
    keys = keys.expand(q.shape[0], 1, -1, -1).contiguous()
    _, lse = tokred.sparse_attention(q, k, k[..., :1], keys, scale=scale, block_q=1)
    own = (q.float() * k.float()).sum(-1) * scale
    p = (own - lse).exp().clamp(max=1)
    return torch.special.xlog1py(1 - p, -p) + p * ((p + eps) / eps).log()


def salient_tokens(scores: Tensor, chunk: int = 64, count: int = 4) -> Tensor:
    """The `count` most salient tokens of every chunk: i32 [B, H, ceil(N / chunk), count], or -1."""
    check_minimum(1, chunk=chunk, count=count)
    return tokred.topk(scores, count, order="position", block_size=chunk)[1]


def norm_preserving_map(x: Tensor, weight: Tensor, mirror: Tensor) -> Tensor:
    """The features of the linear attention, which keep the length of x.

    u = W x' / |W x'| * |x| with x' = x mirrored at the plane across `mirror`; the features are
    softmax(u) and softmax(-u), at least 1e-12.

    Args:
        x: [..., D]. weight: [D, D]. mirror: [D], not 0.

    Returns:
        [..., 2 D], differentiable.
    """
    reflected = x - 2 * (x @ mirror)[..., None] * mirror / mirror.square().sum()
    rotated = torch.nn.functional.normalize(reflected @ weight.T, dim=-1)
    u = rotated * x.norm(dim=-1, keepdim=True)
    return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1).clamp(min=1e-12)


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features_q: Tensor,
    features_k: Tensor,
    gate: Tensor | None = None,
    chunk: int = 64,
    count: int = 4,
    scale: float | None = None,
    salient: Tensor | None = None,
) -> Tensor:
    """Causal attention: exact to this chunk, the one before and the salient tokens of all others.

    The other tokens are attended to through their features.

    Args:
        q, k: [B, H, N, D], v: [B, H, N, Dv], as many heads in all of them.
        features_q, features_k: [B, H, N, E], not negative, such as norm_preserving_map.
        gate: [B, H, N, 1 or Dv], on what the features give; 1 where None.
        salient: salient_tokens; of saliency(q, k, chunk) where None.

    Returns:
        [B, H, N, Dv], not differentiable. O(N) memory for states, and 1 / chunk of the lists that N
        queries would need.

    Raises:
        ValueError: other heads in k or v than in q.
    """
    check_count("count", count)
    if k.shape[1] != q.shape[1] or v.shape[1] != q.shape[1]:
        raise ValueError(
            f"k and v must have the {q.shape[1]} heads of q, as each chooses its own tokens, got "
            f"{k.shape[1]} and {v.shape[1]}: repeat them first"
        )
    batch, heads, tokens, _ = q.shape
    if salient is None:
        salient = salient_tokens(saliency(q, k, chunk, scale), chunk, count)
    chunks = salient.shape[2]
    keys = _exact_keys(salient, chunk, tokens)
    out, lse = tokred.sparse_attention(q, k, v, keys, scale=scale, causal=True, block_q=chunk)

    far = torch.ones(batch, heads, tokens + 1, dtype=torch.bool, device=q.device)
    listed = torch.where(salient >= 0, salient, tokens).flatten(2).long()
    far = far.scatter(2, listed, False)[..., :tokens, None]
    padding = (0, 0, 0, chunks * chunk - tokens)
    wide = torch.promote_types(q.dtype, torch.float32)

    def in_chunks(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x.to(wide), padding).unflatten(2, (chunks, chunk))

    rest, values, queries = in_chunks(features_k * far), in_chunks(v), in_chunks(features_q)
    # What the features of chunks up to the one before the last add up to.
    state = _two_before(rest.transpose(3, 4) @ values)
    mass = _two_before(rest.sum(3)[..., None])
    linear = (queries @ state).flatten(2, 3)[:, :, :tokens]
    weight = (queries @ mass).flatten(2, 3)[:, :, :tokens, 0]
    linear = linear if gate is None else linear * gate
    return tokred.combine_linear(out, lse, linear, weight)[0]


def _two_before(x: Tensor) -> Tensor:
    """The sum of x [B, H, chunks, ...] over the chunks before the one before each."""
    total = torch.zeros_like(x)
    total[:, :, 2:] = x[:, :, :-2].cumsum(2)
    return total


def _exact_keys(salient: Tensor, chunk: int, tokens: int) -> Tensor:
    """i32 [B, H, chunks, K]: the keys of each chunk's queries."""
    batch, heads, chunks, _ = salient.shape
    number = torch.arange(chunks, dtype=torch.int32, device=salient.device)
    first = (number - 1).clamp(min=0) * chunk
    near = range_list(first, ((number + 1) * chunk).clamp(max=tokens), 2 * chunk)
    before = number < (number - 1)[:, None]  # chunks before the one before
    far = torch.where(before[..., None], salient[:, :, None], -1).flatten(3)
    return torch.cat([near.expand(batch, heads, -1, -1), far], 3).contiguous()


METHOD = Method(
    title="STILL: Selecting Tokens for Intra-Layer Hybrid Attention to Linearize LLMs",
    arxiv="2602.02180",
    family=Family.REWEIGHT,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="attend exactly to near and salient tokens, linearly to the rest",
)
