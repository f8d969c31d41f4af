"""FlashVID: keep diverse tokens of every frame, merge the others along trees through time.

FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token
Merging (arXiv 2602.08024).

Each tree becomes the mean of all its tokens. The authors' code divides by one plus the children of
the root, however many tokens these carry: reference_compat=True. It also lists the diverse tokens
of segments of one frame twice, which is not followed. How many roots of a segment merge, and how
many clusters each of its frames keeps, is set so that a segment keeps its frames' budget.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import tokred

from ._lists import check_count, check_minimum, check_number
from ._method import Family, Method, Needs
from ._video import VideoTokens, check_video, padded_map


def segments(x: Tensor, threshold: float = 0.9, min_segments: int = 8) -> list[tuple[int, int]]:
    """Cuts a video where the mean tokens of neighbouring frames differ.

    Args:
        x: [F, N, C]. threshold: a cut is where their cosine is below it.
        min_segments: where fewer segments come of it, the frames that differ most are cut too.

    Returns:
        [(start, end)], ascending.
    """
    frames = x.shape[0]
    means = x.detach().float().mean(1)
    cosine = functional.cosine_similarity(means[:-1], means[1:], dim=-1).cpu()
    ranked = cosine.argsort(stable=True).tolist()
    count = max(int((cosine < threshold).sum()), min(min_segments, frames) - 1)
    cuts = [0, *sorted(place + 1 for place in ranked[:count]), frames]
    return [(a, b) for a, b in pairwise(cuts) if b > a]


def diverse_tokens(x: Tensor, attention: Tensor, count: int) -> Tensor:
    """Tokens far from each other, the more attended to the better: i32 [B, count], ascending.

    The first is the one whose distance (1 - cosine) to the nearest other, times its attention, is
    largest; then always the one whose distance to those chosen, times its attention, is.

    Args:
        x: [B, N, C]. attention: f32 [B, N], not negative. count: at most N.
    """
    check_count("count", count)
    rows = x.detach().contiguous()
    rows = rows.float() if rows.dtype == torch.float64 else rows
    chosen = tokred.greedy_select(rows, count, weight=attention.float(), first="isolated")
    return chosen.sort(1).values


def merge_video(
    x: Tensor,
    attention: Tensor,
    ratio: float,
    threshold: float = 0.8,
    expansion: float = 1.25,
    diverse: float = 0.7,
    cut: float = 0.9,
    min_segments: int = 8,
    neighbours: int = 7,
    reference_compat: bool = False,
) -> VideoTokens:
    """Merges the tokens of videos before the language model.

    Args:
        x: [B, F, N, C]. attention: f32 [B, F, N], what every token receives in the encoder.
        ratio: in (0, 1]; a frame keeps ceil(N ratio expansion) tokens, the expansion being what the
            language model prunes later.
        diverse: the share of these that diverse_tokens chooses.
        threshold: a token merges into the most similar one of the frame before above this cosine.
        cut, min_segments: as in segments; trees end there. neighbours: of the density-peak
            clusters that roots of a frame become.

    Returns:
        VideoTokens with tokens [B, M, C], M of the video that keeps most, zeros behind lengths, in
        order of the first place of each. Segments and counts are read from the device.

    Raises:
        ValueError: x is no video, attention does not fit it, or an option is out of range.
    """
    batch, frames, tokens, channels = check_video(x)
    if attention.shape != x.shape[:3]:
        raise ValueError(f"attention must be {list(x.shape[:3])}, got {list(attention.shape)}")
    if not 0 < ratio <= 1 or not 0 <= diverse <= 1:
        raise ValueError(
            f"ratio must be in (0, 1] and diverse in [0, 1], got {ratio} and {diverse}"
        )
    check_minimum(1, frames=frames, neighbours=neighbours, min_segments=min_segments)
    check_number(1, expansion=expansion)
    budget = min(math.ceil(tokens * ratio * expansion), tokens)
    chosen = min(math.ceil(budget * diverse), budget)
    slots, rows, parts = [], [], []
    for video, seen in zip(x, attention, strict=True):
        picked = torch.zeros(frames, tokens + 1, dtype=torch.bool, device=x.device)
        if chosen:
            best = diverse_tokens(video, seen, chosen)
            picked.scatter_(1, torch.where(best >= 0, best, tokens).long(), True)
        picked = picked[:, :tokens].contiguous()
        cuts = segments(video, cut, min_segments)
        parent = _parents(video, picked, cuts, threshold, budget)
        flat = video.reshape(1, -1, channels).contiguous()
        trees, _, root = tokred.forest_merge(
            flat, parent.view(1, -1), reference_compat=reference_compat
        )
        whole = torch.where(picked.view(1, -1, 1), flat, trees)
        kept = _kept(whole[0].view(video.shape), picked, parent < 0, cuts, budget, neighbours)
        rows.append(whole)
        parts.append(kept)
        # Where a root went, its tree went.
        slots.append(kept[root[0].cpu().numpy()])
    token_map, lengths = padded_map(slots, frames * tokens, x.device)
    of_rows, _ = padded_map(parts, frames * tokens, x.device)
    most = int(lengths.max()) if batch else 0
    table = torch.cat(rows) if rows else x.flatten(1, 2)
    merged, _ = tokred.merge(table, of_rows, most, mode="plain_mean")
    return VideoTokens(merged, token_map, lengths)


def _parents(
    video: Tensor, picked: Tensor, cuts: list[tuple[int, int]], threshold: float, budget: int
) -> Tensor:
    """i32 [F, N]: the place of the token in the frame before that each merges into, or -1."""
    frames, tokens, _ = video.shape
    parent = torch.full((frames, tokens), -1, dtype=torch.int32, device=video.device)
    if frames < 2:
        return parent
    rows = video.detach()
    rows = rows.float() if rows.dtype == torch.float64 else rows
    score, partner = tokred.match(
        rows[1:].contiguous(), rows[:-1].contiguous(), ~picked[1:], ~picked[:-1]
    )
    before = torch.arange(frames - 1, dtype=torch.int32, device=video.device)[:, None] * tokens
    for start, end in cuts:
        if end - start < 2:
            continue
        inside = slice(start, end - 1)
        scores = score[inside].flatten()
        most = max((end - start) * (tokens - budget), 0)
        best = scores.argsort(descending=True, stable=True)[:most]
        merges = torch.zeros_like(scores, dtype=torch.bool).scatter(0, best, True)
        merges &= scores > threshold
        place = (partner[inside] + before[inside]).flatten()
        parent[start + 1 : end] = torch.where(merges, place, -1).view(-1, tokens)
    return parent


def _kept(
    whole: Tensor,
    picked: Tensor,
    root: Tensor,
    cuts: list[tuple[int, int]],
    budget: int,
    neighbours: int,
) -> np.ndarray:
    """The slot of every token [F * N] that was picked or is a root; the others have -1."""
    frames, tokens, _ = whole.shape
    roots = root & ~picked
    groups: list[tuple[int, list[int]]] = []
    for place in picked.flatten().nonzero()[:, 0].tolist():
        groups.append((place, [place]))
    rows = whole.detach()
    rows = rows.float() if rows.dtype == torch.float64 else rows
    for start, end in cuts:
        total = int(roots[start:end].sum())
        left = max(budget * (end - start) - int(picked[start:end].sum()), 0)
        share = min(left / max(total, 1), 1.0)
        for frame in range(start, end):
            places = roots[frame].nonzero()[:, 0].tolist()
            # The product may be a little above a whole number that it stands for.
            count = math.ceil(round(len(places) * share, 9))
            if count == 0:
                continue
            centres, assignment = tokred.dpc_knn(
                rows[frame, places][None].contiguous(), count, min(neighbours, count)
            )
            members: dict[int, list[int]] = {}
            for i, number in enumerate(assignment[0].tolist()):
                members.setdefault(number, []).append(frame * tokens + places[i])
            for number, centre in enumerate(centres[0].tolist()):
                if number in members:
                    groups.append((frame * tokens + places[centre], members[number]))
    slots = np.full(frames * tokens, -1, np.int32)
    for slot, (_, group) in enumerate(sorted(groups)):
        slots[group] = slot
    return slots


METHOD = Method(
    title=(
        "FlashVID: Efficient Video Large Language Models via Training-free Tree-based "
        "Spatiotemporal Token Merging"
    ),
    arxiv="2602.08024",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="keep diverse tokens of every frame, merge the rest along trees through time",
)
