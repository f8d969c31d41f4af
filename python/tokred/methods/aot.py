"""AOT: carry dropped tokens to anchors by optimal transport, within frames and between them.

Token Reduction via Local and Global Contexts Optimization for Efficient Video Large Language Models
(arXiv 2603.01400).

Every item of a batch stops its iterations by itself, where the authors' code stops them together;
transport is computed in logarithms, as its exponentials vanish in half precision. As in their code
each anchor receives the mass 1 / M alone, so that transport hardly moves it; a tenth of the result
is the mean of the tokens nearest to each anchor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

import tokred

from ._lists import check_count, check_minimum
from ._method import Family, Method, Needs
from ._video import VideoTokens, check_video


def choose_anchors(
    local_attention: Tensor,
    global_attention: Tensor,
    grid: tuple[int, int] = (27, 27),
    count: int = 126,
    window: int = 9,
    local_share: float = 0.5,
) -> Tensor:
    """Anchors of a frame: the most attended to of every window, then of what is left.

    Args:
        local_attention, global_attention: f32 [B, H * W], what tokens receive in an early and in a
            late layer. grid: (H, W), multiples of window.
        count: anchors. local_share: int(count * local_share) // windows of every window.

    Returns:
        i32 [B, count], ascending.

    Raises:
        ValueError: attention or window that does not fit the grid, more anchors than tokens.
    """
    check_count("count", count, minimum=None)
    (height, width), tokens = grid, grid[0] * grid[1]
    for name, table in (("local", local_attention), ("global", global_attention)):
        if table.dim() != 2 or table.shape[1] != tokens:
            raise ValueError(f"{name}_attention must be [B, {tokens}], got {list(table.shape)}")
    if window < 1 or height % window or width % window:
        raise ValueError(f"window must divide the grid of {height} x {width}, got {window}")
    if not 1 <= count <= tokens or not 0 <= local_share <= 1:
        raise ValueError(
            f"count must be from 1 to {tokens} and local_share in [0, 1], got {count} and "
            f"{local_share}"
        )
    windows = tokens // window**2
    each = min(int(count * local_share) // windows, window**2)
    place = torch.arange(tokens, device=local_attention.device)
    inside = place.view(height // window, window, width // window, window).transpose(1, 2)
    inside = inside.reshape(windows, window**2)
    _, best = tokred.topk(local_attention[:, inside].float().contiguous(), each)
    first = inside.expand(best.shape[0], -1, -1).gather(2, best.clamp(min=0).long()).flatten(1)
    rest = global_attention.float().scatter(1, first, -torch.inf)
    _, second = tokred.topk(rest, count - windows * each)
    return torch.cat([first.to(torch.int32), second], 1).sort(1).values


def aggregate(
    x: Tensor,
    anchors: Tensor,
    grid: tuple[int, int] = (27, 27),
    nearest_share: float = 0.1,
    position_weight: float = 0.5,
    eps: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Carries the other tokens of a frame to its anchors.

    Args:
        x: [B, H * W, C]. anchors: i32 [B, M], choose_anchors. grid: (H, W).
        nearest_share: of the mean of an anchor and the tokens nearest to it in the result.
        position_weight: of the distance on the unit square in the cost, beside 1 - cosine.
        eps: of the entropy.

    Returns:
        ([B, M, C] in the dtype of x, token_map i32 [B, N], the nearest anchor of every token). Not
        differentiable.
    """
    batch, tokens, _ = x.shape
    height, width = grid
    if tokens != height * width:
        raise ValueError(f"x must hold the {height * width} tokens of the grid, got {tokens}")
    is_anchor = torch.zeros(batch, tokens, dtype=torch.bool, device=x.device)
    is_anchor = is_anchor.scatter(1, anchors.long(), True)
    rest, _ = tokred.compact(~is_anchor, capacity=tokens - anchors.shape[1])
    place = torch.arange(tokens, device=x.device)
    y, z = place // width / max(height - 1, 1), place % width / max(width - 1, 1)
    where = torch.stack([y, z], 1)
    rows = x.detach().float()

    def at(index: Tensor, table: Tensor) -> Tensor:
        return table.gather(1, index.long()[..., None].expand(-1, -1, table.shape[2]))

    places = where.expand(batch, -1, -1)
    sources, targets = at(rest, rows), at(anchors, rows)
    plan = tokred.sinkhorn(
        sources, targets, at(rest, places), at(anchors, places),
        position_weight=position_weight, eps=eps,
    )  # fmt: skip
    moved = (targets + plan.aggregation) / (1 + plan.load[..., None])
    _, nearest = tokred.match(sources, targets)
    own = torch.arange(anchors.shape[1], dtype=torch.int32, device=x.device).expand_as(anchors)
    token_map = torch.zeros(batch, tokens, dtype=torch.int32, device=x.device)
    token_map = token_map.scatter(1, rest.long(), nearest).scatter(1, anchors.long(), own)
    mean, _ = tokred.merge(rows, token_map, anchors.shape[1], mode="plain_mean")
    done = nearest_share * mean + (1 - nearest_share) * moved
    return done.to(x.dtype), token_map


def across_frames(
    x: Tensor,
    group: int = 4,
    keep: float = 0.35,
    time_scale: float = 1.5,
    eps: float = 0.1,
    iterations: int = 100,
) -> VideoTokens:
    """Carries the tokens of every `group` frames to those of the first of them.

    Args:
        x: [B, F, M, C], the anchors of F frames. group: 4 for 32 frames, 8 for 64, as published.
        keep: the quantile of the largest share that a token has in any anchor, below which it stays
            as it is; the others are carried.
        time_scale: tokens of frames this far apart cost 0.39 of their distance more than those of
            one frame. eps, iterations: of the transport.

    Returns:
        VideoTokens with tokens [B, M', C], of every group the tokens of its first frame, these with
        what was carried to them, then the tokens that stay. A token that was carried has the slot
        of the anchor that got most of it. Not differentiable.
    """
    batch, frames, _, _ = check_video(x)
    check_minimum(1, group=group)
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be in [0, 1], got {keep}")
    parts, maps, slots = [], [], 0
    for start in range(0, frames, group):
        part = x[:, start : start + group].detach()
        tokens, token_map = _one_group(part, keep, time_scale, eps, iterations)
        parts.append(tokens)
        maps.append(token_map + slots)
        slots += tokens.shape[1]
    if not parts:
        return VideoTokens(x.flatten(1, 2), torch.zeros(batch, 0, dtype=torch.int32))
    return VideoTokens(torch.cat(parts, 1), torch.cat(maps, 1))


def _one_group(
    x: Tensor, keep: float, time_scale: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor]:
    batch, frames, count, channels = x.shape
    anchors, sources = x[:, 0].float(), x[:, 1:].flatten(1, 2).float()
    own = torch.arange(count, dtype=torch.int32, device=x.device).expand(batch, -1)
    if sources.shape[1] == 0 or count == 0:
        return x[:, 0], own
    times = torch.arange(1, frames, device=x.device).float().repeat_interleave(count)
    best, _ = tokred.match(sources, anchors)
    plan = tokred.sinkhorn(
        sources, anchors, time_x=times.expand(batch, -1).contiguous(),
        time_anchors=torch.zeros(batch, count, device=x.device), offset=1 - best.amax(1),
        time_scale=time_scale, eps=eps, iterations=iterations,
    )  # fmt: skip
    # So many values lie below a quantile between them.
    stays_count = math.ceil(keep * (sources.shape[1] - 1))
    _, stays = tokred.topk(-plan.peak, stays_count, order="position")
    carried = torch.ones_like(plan.peak, dtype=torch.bool).scatter(1, stays.long(), False)
    unit_a, unit_s = (functional.normalize(t, dim=-1) for t in (anchors, sources))
    cost = best.amax(1)[:, None, None] - unit_s @ unit_a.transpose(1, 2)
    cost = cost * (1 - torch.exp(-times.square() / (2 * time_scale**2)))[:, None]
    share = (plan.log_v[:, None] - cost / eps).softmax(-1) * carried[..., None]
    merged = (anchors + share.transpose(1, 2) @ sources) / (1 + share.sum(1)[..., None])
    verbatim = sources.gather(1, stays.long()[..., None].expand(-1, -1, channels))
    tokens = torch.cat([anchors, merged, verbatim], 1).to(x.dtype)
    rank = torch.arange(stays_count, dtype=torch.int32, device=x.device).expand(batch, -1)
    where = (share.argmax(2) + count).to(torch.int32).scatter(1, stays.long(), 2 * count + rank)
    return tokens, torch.cat([own, where], 1)


METHOD = Method(
    title=(
        "Token Reduction via Local and Global Contexts Optimization for Efficient Video Large "
        "Language Models"
    ),
    arxiv="2603.01400",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="carry dropped tokens to anchors by optimal transport, within frames and between them",
)
