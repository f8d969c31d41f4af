"""HoliTom: merge static tokens over windows of video frames, cluster the others, prune inside.

HoliTom: Holistic Token Merging for Fast Video Large Language Models (arXiv 2505.21334).

Windows are cut so that most tokens can be saved; what is alike in all frames of a window becomes
its mean there, and the rest of every frame keeps what gets most attention. In the language model,
what is dropped is folded into its most similar token one after the other, which weighs the last
ones most: tokred.merge(mode="halving"). Slots are in order of the first place of their centre.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import tokred

from ._lists import check_minimum
from ._maps import identity, map_of_links
from ._method import Family, Method, Needs
from ._video import VideoTokens, check_video, padded_map


def windows(still: Tensor, longest: int = 1024) -> list[tuple[int, int]]:
    """Divides F frames into windows so that the most tokens are saved.

    A window of frames s to e - 1 saves (e - s - 1) times the tokens that are still between all of
    them; a window may be one frame. Of equally good divisions that with the most single frames at
    the end, then with the earliest start of the last window, is taken.

    Args:
        still: bool [F - 1, N], whether each token stays what it is from a frame to the next.
        longest: frames of a window at most.

    Returns:
        [(start, end)], ascending, on the CPU. O(F^2 N) time.
    """
    table = still.cpu().numpy().astype(bool)
    frames = len(table) + 1
    best, start = [0] * (frames + 1), list(range(-1, frames))
    for end in range(1, frames + 1):
        best[end], start[end] = best[end - 1], end - 1
        found: list[tuple[int, int]] = []
        alike = np.ones(table.shape[1], bool)
        for first in range(end - 2, max(end - longest, 0) - 1, -1):
            alike &= table[first]
            count = int(alike.sum())
            if count == 0:
                break
            found.append((best[first] + count * (end - first - 1), first))
        for gain, first in reversed(found):
            if gain > best[end]:
                best[end], start[end] = gain, first
    cuts, end = [], frames
    while end > 0:
        cuts.append((start[end], end))
        end = start[end]
    return cuts[::-1]


def merge_video(
    x: Tensor,
    attention: Tensor,
    ratio: float,
    threshold: float = 0.8,
    clustered: float = 0.0,
    neighbours: int = 7,
    centre_share: float = 0.6,
    longest: int = 1024,
) -> VideoTokens:
    """Merges the tokens of videos before the language model.

    Args:
        x: [B, F, N, C]. attention: f32 [B, F, N], what every token receives in the encoder.
        ratio: of all tokens to keep, in (0, 1].
        threshold: of the cosine between a token's two frames, above which it stands still.
        clustered: of a frame's moving tokens that are kept, the share that density-peak clusters of
            the rest make up; 0, the authors' default, keeps by attention alone.
        neighbours: of density-peak clustering, at most the number of clusters.
        centre_share: what the centre of a cluster weighs in it, the others share the rest.
        longest: as in windows.

    Returns:
        VideoTokens with tokens [B, M, C], M of the video that keeps most, zeros behind lengths.
        Differentiable in x. The windows are found on the CPU.

    Raises:
        ValueError: x is no video, attention does not fit it, or ratio or clustered is out of range.
    """
    batch, frames, tokens, _ = check_video(x)
    if attention.shape != x.shape[:3]:
        raise ValueError(f"attention must be {list(x.shape[:3])}, got {list(attention.shape)}")
    if not 0 < ratio <= 1 or not 0 <= clustered <= 1:
        raise ValueError(
            f"ratio must be in (0, 1] and clustered in [0, 1], got {ratio} and {clustered}"
        )
    check_minimum(1, frames=frames, neighbours=neighbours, longest=longest)
    slots, weights = [], []
    for video, seen in zip(x.detach().float(), attention, strict=True):
        pair = functional.cosine_similarity(video[:-1], video[1:], dim=-1) > threshold
        cuts = windows(pair, longest)
        groups = _groups(video, seen, pair, cuts, ratio, clustered, neighbours)
        slot, weight = _slots(groups, frames * tokens, centre_share)
        slots.append(slot)
        weights.append(weight)
    token_map, lengths = padded_map(slots, frames * tokens, x.device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    share = torch.tensor(np.array(weights), dtype=wide, device=x.device)
    share = share.reshape(batch, frames * tokens)
    rows = x.flatten(1, 2).contiguous()
    kept = int(lengths.max()) if batch else 0
    merged, _ = tokred.merge(rows, token_map, kept, weight=share, mode="sum")
    return VideoTokens(merged, token_map, lengths)


# A slot: its centre, and the tokens that it stands for beside the centre's own.
Group = tuple[list[int], list[list[int]]]


def _groups(
    video: Tensor,
    seen: Tensor,
    pair: Tensor,
    cuts: list[tuple[int, int]],
    ratio: float,
    clustered: float,
    neighbours: int,
) -> Iterator[Group]:
    """The slots of one video [F, N, C]; positions count through all frames."""
    frames, tokens, _ = video.shape
    still = {
        (start, end): pair[start : end - 1].all(0)
        if end - start > 1
        else torch.zeros(tokens, dtype=torch.bool, device=video.device)
        for start, end in cuts
    }
    saved = sum(int(alike.sum()) * (end - start - 1) for (start, end), alike in still.items())
    ratio = min(1.0, ratio * frames * tokens / max(frames * tokens - saved, 1))
    for (start, end), alike in still.items():
        fixed = alike.nonzero()[:, 0].tolist()
        places = {t: [f * tokens + t for f in range(start, end)] for t in fixed}
        mean = video[start:end].mean(0)
        for centre, others in _clusters(mean, fixed, round(len(fixed) * ratio), neighbours):
            yield places[centre], [places[t] for t in others]
        moving = (~alike).nonzero()[:, 0].tolist()
        for frame in range(start, end):
            count = math.ceil(len(moving) * ratio)
            first = round(count * (1 - clustered))
            scores = seen[frame, moving].argsort(descending=True, stable=True).tolist()
            kept = sorted(moving[i] for i in scores[:first])
            rest = sorted(moving[i] for i in scores[first:])
            for t in kept:
                yield [frame * tokens + t], []
            for centre, others in _clusters(video[frame], rest, count - first, neighbours):
                yield [frame * tokens + centre], [[frame * tokens + t] for t in others]


def _clusters(
    x: Tensor, chosen: list[int], count: int, neighbours: int
) -> list[tuple[int, list[int]]]:
    """(centre, other members) of `count` clusters of the chosen rows of x [N, C]."""
    if count <= 0 or not chosen:
        return []
    rows = x[chosen][None].contiguous()
    centres, assignment = tokred.dpc_knn(rows, count, min(neighbours, count))
    numbers, places = assignment[0].tolist(), centres[0].tolist()
    return [
        (chosen[c], [chosen[i] for i, a in enumerate(numbers) if a == number and i != c])
        for number, c in enumerate(places)
        if c >= 0
    ]


def _slots(
    groups: Iterator[Group], total: int, centre_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """The slot and the weight of every token of a video."""
    slot, weight = np.full(total, -1, np.int32), np.zeros(total)
    for number, (centre, others) in enumerate(sorted(groups)):
        slot[centre] = number
        weight[centre] = (centre_share if others else 1) / len(centre)
        for member in others:
            slot[member] = number
            weight[member] = (1 - centre_share) / (len(others) * len(member))
    return slot, weight


def fold_dropped(h: Tensor, scores: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Inside the language model: drops tokens of low score into the most similar that stay.

    Args:
        h: [B, V, C], the hidden states of the video's tokens. scores: f32 [B, V], the attention of
            the last query in the layer before, averaged over heads.
        ratio: the share that is dropped, in [0, 1); round(V * (1 - ratio)) stay.

    Returns:
        ([B, K, C], token_map i32 [B, V]): of each token that stays, h <- (h + h_i) / 2 over those
        dropped into it, in order of position.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}")
    tokens = h.shape[1]
    count = min(max(round(tokens * (1 - ratio)), 1), tokens)
    _, kept = tokred.topk(scores, count, order="position")
    stays = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
    stays = stays.scatter(1, kept.long(), True)
    rows = h.detach().contiguous()
    rows = rows.float() if rows.dtype == torch.float64 else rows
    _, partner = tokred.match(rows, rows, mask_b=stays)
    links = torch.where(stays, identity(h), partner)
    token_map, _ = map_of_links(links)
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    folded, _ = tokred.merge(
        h.contiguous(), token_map, count, weight=stays.to(wide), mode="halving"
    )
    return folded, token_map


METHOD = Method(
    title="HoliTom: Holistic Token Merging for Fast Video Large Language Models",
    arxiv="2505.21334",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="merge static tokens over windows of frames, keep what gets attention, fold inside",
)
