"""PYRA: modulate the tokens that are about to merge by weights that are learned for the task.

PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task Adaptation (arXiv
2403.09192).

What stands between ToMe's matching and its merge: two small learned vectors a layer scale the r
sources, channel by channel and token by token. The means are weighted by size as ToMe's; what the
weights are computed from are the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

import tokred

from ._lists import check_minimum
from ._maps import even_and_odd, identity, link_best, map_of_links
from ._method import Family, Method, Needs


def reactivate(
    source: Tensor,
    destination: Tensor,
    weight_r: Tensor,
    weight_c: Tensor,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """source * (1 + d * e): d a factor of every channel, e of every token.

    With p = norm(source + destination): d = 2 sigmoid(weight_r . p) over the r tokens, and
    e = 2 sigmoid(p . weight_c) - 1 over the channels. Both weights 0 leave the source as it is.

    Args:
        source, destination: [B, r, C], each source's own destination beside it.
        weight_r: [r]. weight_c: [C]. norm: of the last dimension; a plain layer norm where None.

    Returns:
        [B, r, C], differentiable in all of them.

    Raises:
        ValueError: weights of another length.
    """
    r, channels = source.shape[1:]
    if list(weight_r.shape) != [r] or list(weight_c.shape) != [channels]:
        raise ValueError(
            f"weight_r and weight_c must be [{r}] and [{channels}], got {[*weight_r.shape]} and "
            f"{[*weight_c.shape]}"
        )
    both = source + destination
    p = functional.layer_norm(both, [channels]) if norm is None else norm(both)
    by_channel = 2 * torch.sigmoid(torch.einsum("r,brc->bc", weight_r, p))[:, None]
    by_token = 2 * torch.sigmoid(p @ weight_c)[..., None] - 1
    return source + source * by_channel * by_token


def pyra_step(
    x: Tensor,
    metric: Tensor,
    weight_r: Tensor,
    weight_c: Tensor,
    size: Tensor | None = None,
    num_prefix: int = 0,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's merge of r = len(weight_r) tokens.

    Args:
        x: [B, N, C]. metric: [B, N, D], the keys averaged over the heads.
        weight_r: [r], by descending similarity. weight_c, norm: as in reactivate.
        size: f32 [B, N]; 1 where None. num_prefix: the first tokens, which take no part.

    Returns:
        (x [B, N - r, C], size f32 [B, N - r], token_map i32 [B, N]), in order of position.

    Raises:
        ValueError: fewer than r tokens may merge.
    """
    tokens, r = x.shape[1], weight_r.shape[0]
    sources, destinations = even_and_odd(tokens, num_prefix, x.device)
    check_minimum(r, **{"tokens that may merge": min(len(sources), len(destinations))})
    metric = metric.detach()
    score, partner = tokred.match(metric[:, sources], metric[:, destinations])
    partner = destinations[partner.long()]
    token_map, _ = map_of_links(link_best(identity(x), score, partner, sources, r))
    _, order = tokred.topk(score, r)

    def rows(index: Tensor) -> Tensor:
        return index.long()[..., None].expand(-1, -1, x.shape[2])

    chosen = rows(sources[order.long()])
    partners = rows(partner.gather(1, order.long()))
    changed = reactivate(x.gather(1, chosen), x.gather(1, partners), weight_r, weight_c, norm)
    y, new_size = tokred.merge(x.scatter(1, chosen, changed), token_map, tokens - r, size)
    return y, new_size, token_map


METHOD = Method(
    title=(
        "PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task Adaptation"
    ),
    arxiv="2403.09192",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER, Needs.TRAINING),
    status="exact",
    summary="scale the tokens that are about to merge by learned weights",
)
