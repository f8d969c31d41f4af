"""FlashVID's segments, selection, trees and clusters against loops over tokens."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cases.dense_dpc import dpc_knn
from tokred.methods.flashvid import diverse_tokens, merge_video, segments


def video() -> tuple[Tensor, Tensor]:
    """Two scenes of three frames each, alike within a scene; and attention."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(2, 2, 1, 12, 16, generator=generator).expand(-1, -1, 3, -1, -1)
    x = scenes + 0.35 * torch.randn(2, 2, 3, 12, 16, generator=generator)
    return x.reshape(2, 6, 12, 16).contiguous(), torch.rand(2, 6, 12, generator=generator)


def test_segments() -> None:
    x, _ = video()
    for item in x:
        means = item.mean(1)
        cosine = functional.cosine_similarity(means[:-1], means[1:], dim=-1)
        for threshold, min_segments in ((0.5, 1), (0.5, 4), (2.0, 1), (-2.0, 1), (-2.0, 99)):
            cuts = {i + 1 for i in range(5) if cosine[i] < threshold}
            for i in cosine.argsort().tolist():
                if len(cuts) + 1 < min(min_segments, 6):
                    cuts.add(i + 1)
            bounds = [0, *sorted(cuts), 6]
            assert segments(item, threshold, min_segments) == list(pairwise(bounds))


def greedy(x: Tensor, attention: Tensor, count: int) -> list[int]:
    unit = functional.normalize(x.double(), dim=-1)
    distance = (1 - unit @ unit.T) * attention.double()
    chosen = [int(distance.sort(0).values[1].argmax())]
    while len(chosen) < count:
        min_segments = distance[chosen].min(0).values
        min_segments[chosen] = -1
        chosen.append(int(min_segments.argmax()))
    return sorted(chosen)


def test_diverse_tokens() -> None:
    x, attention = video()
    for count in (1, 4, 12):
        found = diverse_tokens(x[0], attention[0], count)
        for frame in range(6):
            assert found[frame].tolist() == greedy(x[0, frame], attention[0, frame], count)


def plain(x: Tensor, attention: Tensor, ratio: float, cuts: list, compat: bool) -> list:
    """[(places, row)] of one video: what each slot is made of, and is."""
    frames, tokens, _ = x.shape
    budget = min(math.ceil(tokens * ratio * 1.25), tokens)
    chosen = [greedy(x[f], attention[f], math.ceil(budget * 0.7)) for f in range(frames)]
    unit = functional.normalize(x.double(), dim=-1)
    result = [([f * tokens + t], x[f, t]) for f in range(frames) for t in chosen[f]]
    for start, end in cuts:
        links = []
        for f in range(start + 1, end):
            to = [t for t in range(tokens) if t not in chosen[f - 1]]
            for t in (t for t in range(tokens) if t not in chosen[f]):
                cosine = unit[f - 1, to] @ unit[f, t]
                if cosine.max() > 0.8:
                    links.append((cosine.max().item(), f, t, to[int(cosine.argmax())]))
        links = sorted(links, key=lambda link: -link[0])
        parent = {(f, t): (f - 1, p) for _, f, t, p in links[: (end - start) * (tokens - budget)]}
        trees: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for f in range(start, end):
            for t in (t for t in range(tokens) if t not in chosen[f]):
                root = (f, t)
                while root in parent:
                    root = parent[root]
                trees.setdefault(root, []).append((f, t))
        left = budget * (end - start) - sum(len(chosen[f]) for f in range(start, end))
        share = min(1.0, left / max(len(trees), 1))
        for f in range(start, end):
            roots = sorted(t for g, t in trees if g == f)
            count = math.ceil(round(len(roots) * share, 9))
            if count == 0:
                continue
            rows = []
            for t in roots:
                members = trees[f, t]
                children = sum(p == (f, t) for p in parent.values())
                divisor = 1 + children if compat else len(members)
                rows.append(sum(x[g, u] for g, u in members) / divisor)
            rows = torch.stack(rows)
            _, assignment = dpc_knn(rows, count, min(7, count))
            for number in range(count):
                inside = [i for i in range(len(roots)) if assignment[i] == number]
                places = [g * tokens + u for i in inside for g, u in trees[f, roots[i]]]
                result.append((places, rows[inside].mean(0)))
    return result


@pytest.mark.parametrize("compat", (False, True))
@pytest.mark.parametrize("ratio", (0.2, 0.5, 1.0))
def test_video(ratio: float, compat: bool) -> None:
    x, attention = video()
    done = merge_video(x, attention, ratio, cut=0.6, min_segments=1, reference_compat=compat)
    for item in range(2):
        cuts = segments(x[item], 0.6, 1)
        assert cuts == [(0, 3), (3, 6)]
        expected = plain(x[item], attention[item], ratio, cuts, compat)
        assert done.lengths[item] == len(expected)
        for places, row in expected:
            slots = done.token_map[item, places]
            assert len(slots.unique()) == 1 and slots[0] >= 0
            torch.testing.assert_close(done.tokens[item, slots[0]], row, rtol=1e-4, atol=1e-5)
        listed = {place for places, _ in expected for place in places}
        assert {t for t in range(72) if done.token_map[item, t] >= 0} == listed


def test_segments_of_one_frame_list_nothing_twice() -> None:
    x, attention = video()
    done = merge_video(x, attention, 0.4, min_segments=6)
    assert (done.lengths == 6 * math.ceil(12 * 0.4 * 1.25)).all()


def test_still_pictures_and_no_video() -> None:
    """A video that repeats one frame keeps what is asked for."""
    x, attention = video()
    same = x[:, :1].expand(-1, 6, -1, -1).contiguous()
    done = merge_video(same, attention[:, :1].expand(-1, 6, -1), 0.4, min_segments=1)
    assert (done.lengths >= 6 * 5).all() and done.tokens.isfinite().all()
    none = merge_video(x[:0], attention[:0], 0.5)
    assert none.tokens.shape == (0, 0, 16) and none.token_map.shape == (0, 72)


def test_refusals() -> None:
    x, attention = video()
    with pytest.raises(ValueError, match=r"attention must be \[2, 6, 12\]"):
        merge_video(x, attention[:1], 0.5)
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\] and diverse in \[0, 1\]"):
        merge_video(x, attention, 0.5, diverse=1.1)
    with pytest.raises(ValueError, match=r"expansion must be at least 1, got 0\.5"):
        merge_video(x, attention, 0.5, expansion=0.5)
