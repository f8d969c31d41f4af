"""TempMe: join the tokens of neighbouring frames, merge across them, then within the clip.

TempMe: Video Temporal Token Merging for Efficient Text-Video Retrieval (arXiv 2409.01156).

Clips grow from frame to video over a few layers of an image encoder. Before the attention of such a
layer `merge_frames` makes one clip of several and merges among them, by the tokens themselves;
after it `merge_within` merges once more, by the mean keys, as ToMe does. Attention is in proportion
to the sizes (tokred.biased_attention with their logarithm). The caller adds the paper's learned
embeddings of time to the tokens first, if there are any.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred
from tokred.schedule import resolve

from ._maps import identity
from ._method import Family, Method, Needs
from ._video import VideoTokens, check_video, frame_maps_in_a_row


def join_frames(x: Tensor, frames: int, num_prefix: int = 1) -> Tensor:
    """[B, F, N, ...] -> [B, F / frames, frames * N, ...], all prefix tokens first.

    Raises:
        ValueError: the frames do not divide into clips of so many.
    """
    if frames < 1 or x.shape[1] % frames:
        raise ValueError(f"frames must divide the {x.shape[1]} frames of x, got {frames}")
    clips = x.unflatten(1, (-1, frames))
    first, rest = clips[:, :, :, :num_prefix], clips[:, :, :, num_prefix:]
    return torch.cat([first.flatten(2, 3), rest.flatten(2, 3)], 2)


def merge_frames(
    x: Tensor,
    frames: int,
    num_prefix: int = 1,
    size: Tensor | None = None,
    share: float = 0.3,
) -> VideoTokens:
    """Joins every `frames` clips to one, and merges the most similar tokens across them.

    Args:
        x: [B, F, N, C], the tokens of F clips, prefix tokens first, which never merge.
        frames: clips to join, a divisor of F.
        num_prefix: prefix tokens of a clip; those of the result are frames * num_prefix.
        size: f32 [B, F, N]; 1 where None.
        share: int(frames * N * share) tokens merge, at most half of those after the prefix.

    Returns:
        VideoTokens with tokens [B, F / frames, M, C] and size f32 [B, F / frames * M].

    Raises:
        ValueError: x is no video, frames do not divide it, or a share outside [0, 1).
    """
    _, count, tokens, _ = check_video(x)
    joined = join_frames(x, frames, num_prefix)
    ones = torch.ones(x.shape[:3], dtype=torch.float32, device=x.device)
    sizes = join_frames(ones if size is None else size, frames, num_prefix)
    done = _merge(joined, joined, frames * num_prefix, sizes, share)
    place = torch.arange(count * tokens, device=x.device).view(1, count, tokens)
    where = join_frames(place, frames, num_prefix).flatten()
    token_map = torch.empty_like(done.token_map)
    token_map[:, where] = done.token_map
    return VideoTokens(done.tokens, token_map, size=done.size)


def merge_within(
    x: Tensor, metric: Tensor, num_prefix: int, size: Tensor, share: float = 0.1
) -> VideoTokens:
    """Merges the most similar tokens of every clip, after its attention.

    Args:
        x: [B, F, N, C], as merge_frames returns them. metric: [B, F, N, D], the keys averaged over
            the heads. num_prefix: of a clip. size: f32 [B, F, N].
        share: int(N * share) tokens merge, at most half of those after the prefix.

    Returns, raises: as merge_frames.
    """
    check_video(x)
    return _merge(x, metric, num_prefix, size, share)


def _merge(x: Tensor, metric: Tensor, num_prefix: int, size: Tensor, share: float) -> VideoTokens:
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}")
    batch, frames, tokens, _ = x.shape
    r = resolve(float(share), tokens, num_prefix)
    rows = x.flatten(0, 1).contiguous()
    keys = metric.detach().flatten(0, 1).contiguous()
    # Sets alternate by position in the whole clip, whatever the number of prefix tokens.
    token_map = tokred.bipartite_soft_matching(keys, r, num_prefix) if r else identity(rows)
    y, sizes = tokred.merge(rows, token_map, tokens - r, size.flatten(0, 1).contiguous())
    return VideoTokens(
        y.unflatten(0, (batch, frames)),
        frame_maps_in_a_row(token_map, tokens - r, frames),
        size=sizes.view(batch, -1),
    )


METHOD = Method(
    title="TempMe: Video Temporal Token Merging for Efficient Text-Video Retrieval",
    arxiv="2409.01156",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER, Needs.TRAINING),
    status="exact",
    summary="join the tokens of neighbouring frames clip by clip, merge across and within them",
)
