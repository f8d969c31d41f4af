"""HoliTom's windows against all divisions, its groups and folds against loops over tokens."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cases.dense_dpc import dpc_knn
from cases.groups import tokens_of
from tokred.methods.holitom import fold_dropped, merge_video, windows


def saved(still: Tensor, cuts: list[tuple[int, int]]) -> int:
    return sum(int(still[s : e - 1].all(0).sum()) * (e - s - 1) for s, e in cuts if e - s > 1)


def divisions(start: int, end: int) -> list[list[tuple[int, int]]]:
    if start == end:
        return [[]]
    return [
        [(start, cut), *rest] for cut in range(start + 1, end + 1) for rest in divisions(cut, end)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_windows_save_the_most(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    still = torch.rand(6, 5, generator=generator) < 0.3 + 0.08 * seed
    cuts = windows(still)
    assert cuts[0][0] == 0 and cuts[-1][1] == 7
    assert all(a[1] == b[0] for a, b in pairwise(cuts))
    assert saved(still, cuts) == max(saved(still, each) for each in divisions(0, 7))
    short = windows(still, 2)
    assert max(e - s for s, e in short) <= 2
    most = [each for each in divisions(0, 7) if max(e - s for s, e in each) <= 2]
    assert saved(still, short) == max(saved(still, each) for each in most)


def test_windows_of_nothing() -> None:
    assert windows(torch.zeros(3, 4, dtype=torch.bool)) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert windows(torch.zeros(0, 4, dtype=torch.bool)) == [(0, 1)]
    assert windows(torch.ones(3, 4, dtype=torch.bool)) == [(0, 4)]


def video() -> tuple[Tensor, Tensor]:
    """Two scenes of three frames, in which the first tokens stand still; and attention."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(2, 2, 1, 10, 16, generator=generator).expand(-1, -1, 3, -1, -1)
    moving = torch.randn(2, 2, 3, 10, 16, generator=generator)
    still = (torch.arange(10) < 6)[:, None]
    x = torch.where(still, scenes + 0.05 * moving, moving).reshape(2, 6, 10, 16)
    return x.contiguous(), torch.rand(2, 6, 10, generator=generator)


@pytest.mark.parametrize(("ratio", "clustered"), ((0.3, 0.0), (0.4, 0.5), (1.0, 0.0)))
def test_groups(ratio: float, clustered: float) -> None:
    x, attention = video()
    done = merge_video(x, attention, ratio, clustered=clustered)
    for item in range(2):
        pair = functional.cosine_similarity(x[item, :-1], x[item, 1:], dim=-1) > 0.8
        cuts = windows(pair)
        assert cuts == [(0, 3), (3, 6)]
        share = min(1.0, ratio * 60 / (60 - saved(pair, cuts)))
        expected: list[tuple[list[int], Tensor]] = []
        for start, end in cuts:
            alike = pair[start : end - 1].all(0)
            fixed, moving = alike.nonzero()[:, 0].tolist(), (~alike).nonzero()[:, 0].tolist()
            mean = x[item, start:end].mean(0)
            count = round(len(fixed) * share)
            centres, assignment = dpc_knn(mean[fixed], count, min(7, count))
            for number, centre in enumerate(centres):
                members = [i for i in range(len(fixed)) if assignment[i] == number]
                rest = [mean[fixed[i]] for i in members if i != centre]
                row = mean[fixed[centre]]
                row = 0.6 * row + 0.4 * torch.stack(rest).mean(0) if rest else row
                places = [f * 10 + fixed[i] for f in range(start, end) for i in members]
                expected.append((places, row))
            for frame in range(start, end):
                count = math.ceil(len(moving) * share)
                first = round(count * (1 - clustered))
                order = attention[item, frame, moving].argsort(descending=True).tolist()
                for i in order[:first]:
                    expected.append(([frame * 10 + moving[i]], x[item, frame, moving[i]]))
                rest = sorted(moving[i] for i in order[first:])
                count -= first
                centres, assignment = (
                    dpc_knn(x[item, frame, rest], count, min(7, count)) if count else ([], None)
                )
                for number, centre in enumerate(centres):
                    members = [i for i in range(len(rest)) if assignment[i] == number]
                    others = [x[item, frame, rest[i]] for i in members if i != centre]
                    row = x[item, frame, rest[centre]]
                    row = 0.6 * row + 0.4 * torch.stack(others).mean(0) if others else row
                    expected.append(([frame * 10 + rest[i] for i in members], row))
        assert done.lengths[item] == len(expected)
        for places, row in expected:
            slots = done.token_map[item, places]
            assert len(slots.unique()) == 1 and slots[0] >= 0
            torch.testing.assert_close(done.tokens[item, slots[0]], row, rtol=1e-4, atol=1e-5)
        listed = {place for places, _ in expected for place in places}
        assert {t for t in range(60) if done.token_map[item, t] >= 0} == listed
        assert (done.tokens[item, len(expected) :] == 0).all()


@pytest.mark.parametrize("ratio", (0.0, 0.5, 0.9))
def test_folds(ratio: float) -> None:
    h = tokens_of(2, 20)
    scores = torch.rand(2, 20, generator=torch.Generator().manual_seed(1))
    folded, token_map = fold_dropped(h, scores, ratio)
    count = round(20 * (1 - ratio))
    assert folded.shape == (2, count, 16)
    for item in range(2):
        kept = sorted(scores[item].argsort(descending=True)[:count].tolist())
        unit = functional.normalize(h[item], dim=-1)
        rows = h[item].clone()
        for i in range(20):
            if i not in kept:
                j = kept[int((unit[kept] @ unit[i]).argmax())]
                rows[j] = (rows[j] + h[item, i]) / 2
                assert token_map[item, i] == kept.index(j)
        torch.testing.assert_close(folded[item], rows[kept])


def test_one_frame_and_no_video() -> None:
    x, attention = video()
    done = merge_video(x[:, :1], attention[:, :1], 0.5)
    best = attention[:, 0].topk(5).indices.sort(1).values
    assert torch.equal(done.tokens, torch.stack([a[b] for a, b in zip(x[:, 0], best, strict=True)]))
    none = merge_video(x[:0], attention[:0], 0.5)
    assert none.tokens.shape == (0, 0, 16) and none.token_map.shape == (0, 60)


def test_refusals() -> None:
    x, attention = video()
    with pytest.raises(ValueError, match=r"attention must be \[2, 6, 10\], got \[2, 6\]"):
        merge_video(x, attention[..., 0], 0.5)
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\] and clustered in \[0, 1\]"):
        merge_video(x, attention, 0.0)
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        merge_video(x[:, :0], attention[:, :0], 0.5)
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\), got 1"):
        fold_dropped(x[0], attention[0], 1)
