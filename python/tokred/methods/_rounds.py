"""Pruning in rounds: tokens that resemble kept ones go, round after round."""

from __future__ import annotations

import torch
from torch import Tensor

import tokred

from ._picks import positions_of, rows_of


def prune_in_rounds(
    x: Tensor, rest: Tensor, keep: int, step: int = 8, by_similarity: bool = True
) -> Tensor:
    """VisPruner's duplicates: every round drops those of every second token most like the others.

    Of a list of R tokens those at even places are compared with those at odd places, by cosine;
    the min(step, R - keep, even places) with the most similar partner are dropped (the earlier
    place on a tie), until `keep` are left.

    Args:
        x: [B, N, C].
        rest: i32 [B, R], the list of every row, -1 behind the last.
        by_similarity: the list of the next round has the even ones that stay, by descending
            similarity, then the odd ones; False leaves the list in its order.

    Returns:
        i32 [B, min(keep, R)], -1 behind the last.

    Complexity: (R - keep) / step rounds, of R^2 C / 2 flops each on CUDA and under torch.compile.
        On the CPU all tokens are compared once, and again whenever one has none of its 32 most
        similar ones left to be compared with: about 3 R^2 C flops. No R x R matrix.
    """
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")

    def dropped(length: int) -> int:
        return min(step, length - keep, (length + 1) // 2)

    listed = None if x.is_cuda or torch.compiler.is_compiling() else _Nearest(x)
    while (drop := dropped(rest.shape[1])) > 0:
        there = rest >= 0
        length = there.sum(1)
        # Rows that began shorter have fewer rounds.
        row_drop = torch.minimum((length - keep).clamp(0, step), (length + 1) // 2)[:, None]
        score = _to_odd_places(x, rest) if listed is None else listed.to_odd_places(rest)
        descending = score.argsort(dim=1, descending=True, stable=True)
        rank = torch.arange(score.shape[1], device=x.device)
        survives = there[:, ::2].gather(1, descending) & (rank >= row_drop)
        if by_similarity:
            stays = torch.cat([survives, there[:, 1::2]], 1)
            order = torch.cat([rest[:, ::2].gather(1, descending), rest[:, 1::2]], 1)
        else:
            stays, order = there.scatter(1, descending * 2, survives), rest
        places = positions_of(stays, rest.shape[1] - drop)
        left = torch.where(places >= 0, order.gather(1, places.clamp(min=0).long()), -1)
        rest = torch.where(row_drop > 0, left, rest[:, : left.shape[1]]).to(torch.int32)
    return rest.contiguous()


def _to_odd_places(x: Tensor, rest: Tensor) -> Tensor:
    """f32 [B, E]: the largest cosine of each token at an even place of the list to one between."""
    sides = [rest[:, start::2].contiguous() for start in (0, 1)]
    return tokred.match(*(rows_of(x, side) for side in sides), *(side >= 0 for side in sides))[0]


class _Nearest:
    """The most similar tokens of every token of x [B, N, C], among those of a list.

    Lists only get shorter: a list of nearest tokens serves until one has none of them to be
    compared with.
    """

    def __init__(self, x: Tensor, number: int = 32) -> None:
        self.x, self.number = x, number
        self.score: Tensor | None = None  # f32 [B, N, number], descending
        self.index: Tensor | None = None  # i64 [B, N, number]: tokens, N behind the last

    def to_odd_places(self, rest: Tensor) -> Tensor:
        """_to_odd_places of the list."""
        for fresh in (False, True):
            if fresh or self.score is None:
                self._list(rest)
            score, known = self._look_up(rest)
            if known:
                return score
        return _to_odd_places(self.x, rest)

    def _list(self, rest: Tensor) -> None:
        batch, tokens, _ = self.x.shape
        rows, there = rows_of(self.x, rest), rest >= 0
        score, place = tokred.match(rows, rows, there, there, k=self.number)
        place = place.long()
        listed = rest.long()[:, :, None].expand(-1, -1, self.number)
        near = listed.gather(1, place.clamp(min=0))
        near = torch.where(place >= 0, near, tokens)
        at = torch.where(there, rest.long(), tokens)[:, :, None].expand(-1, -1, self.number)
        spare = (batch, tokens + 1, self.number)
        self.score = score.new_full(spare, -torch.inf).scatter_(1, at, score)
        self.index = near.new_full(spare, tokens).scatter_(1, at, near)

    def _look_up(self, rest: Tensor) -> tuple[Tensor, bool]:
        assert self.score is not None and self.index is not None
        batch, tokens, _ = self.x.shape
        place = torch.where(rest >= 0, rest.long(), tokens)
        even, odd = place[:, ::2], place[:, 1::2]
        is_odd = torch.zeros(batch, tokens + 1, dtype=torch.bool).scatter_(1, odd, True)
        is_odd[:, tokens] = False
        row = torch.arange(batch)[:, None]
        near = self.index[row, even]
        usable = is_odd.gather(1, near.flatten(1)).view_as(near)
        score = torch.where(usable, self.score[row, even], -torch.inf).amax(-1)
        # A list that is not full has all candidates.
        return score, not bool(((score == -torch.inf) & (near[..., -1] < tokens)).any())
