"""What the selecting methods share, against plain Python row by row."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from tokred.methods import _arguments, _budgets, _grids, _picks, _rounds, _thresholds


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_keep_count() -> None:
    assert _budgets.keep_count(100, 64) == 64 and _budgets.keep_count(50, 64) == 50
    assert _budgets.keep_count(576, 64, 0.1112) == 64
    roundings = ("floor", "nearest", "ceil")
    assert [_budgets.keep_count(10, ratio=0.25, rounding=r) for r in roundings] == [2, 2, 3]
    assert _budgets.keep_count(30, ratio=0.1) == 3 and _budgets.keep_count(0, ratio=1.0) == 0
    for words, call in (
        ("ratio must be in", lambda: _budgets.keep_count(9, ratio=1.1)),
        ("keep must be at least 0, got -1", lambda: _budgets.keep_count(9, -1)),
        ("keep must be at least 1, got 0", lambda: _budgets.check_budget(0, None)),
        (r"ratio must be in \(0, 1\], got 0", lambda: _budgets.check_budget(1, 0)),
        ("rounding must be", lambda: _budgets.keep_count(9, ratio=1.0, rounding="up")),
        ('order must be "position" or "score"', lambda: _arguments.check_order("best")),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(
    ("spare", "capped"), product(("lost", "remainder", "weight"), (False, True))
)
def test_allocate(spare: str, capped: bool) -> None:
    weight = torch.rand(6, 5, generator=generator()) * 4
    weight[4, 2:] = 0
    cap = torch.randint(1, 9, (6, 5), generator=generator(1)) if capped else None
    budget = torch.tensor([0, 3, 10, 17, 25, 40])
    given = _budgets.allocate(weight, budget, cap, spare)
    for row in range(6):
        w, k = weight[row].double(), budget[row].item()
        share = [x * k / w.sum().item() for x in w.tolist()]
        expected = [math.floor(x) for x in share]
        key = [x - math.floor(x) for x in share] if spare == "remainder" else w.tolist()
        left = 0 if spare == "lost" else k - sum(expected)
        for group in sorted(range(5), key=lambda g: -key[g])[:left]:
            expected[group] += 1
        if cap is not None:
            expected = [min(x, c) for x, c in zip(expected, cap[row].tolist(), strict=True)]
        assert given[row].tolist() == expected


@pytest.mark.parametrize("spare", ["remainder", "weight"])
def test_allocate_again_what_the_caps_cut_off(spare: str) -> None:
    weight = torch.rand(50, 6, generator=generator()) ** 4
    weight[:5, :3] = 0
    cap = torch.randint(0, 12, (50, 6), generator=generator(1))
    budget = torch.randint(0, 60, (50,), generator=generator(2))
    given = _budgets.allocate(weight, budget, cap, spare, redistribute=True).long()
    assert (given <= cap).all() and (given >= 0).all()
    assert torch.equal(given.sum(1), torch.minimum(budget, cap.sum(1)))
    # In proportion among the groups that are not full.
    for row in range(50):
        loose = ((given[row] < cap[row]) & (weight[row] > 0)).nonzero()[:, 0]
        if len(loose) > 1 and weight[row, loose].min() > 1e-3:
            ratio = given[row, loose].double() / weight[row, loose].double()
            slack = 2 / weight[row, loose].double().min()
            assert ratio.max() - ratio.min() <= slack


def test_allocate_without_weights() -> None:
    for weight in (torch.zeros(1, 4), torch.full((1, 4), torch.nan), -torch.ones(1, 4)):
        assert _budgets.allocate(weight, 8).tolist() == [[2, 2, 2, 2]]
    with pytest.raises(ValueError, match="spare must be"):
        _budgets.allocate(torch.ones(1, 4), 8, spare="kept")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_best(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3, 1, 3, torch.nan, 5, -torch.inf], [1, 1, 1, 1, 1, 1]], dtype=dtype)
    valid = torch.tensor([[True] * 6, [False, True, True, True, False, False]])
    assert _picks.best(scores, 2).tolist() == [[0, 4], [0, 1]]
    assert _picks.best(scores, 3, order="score").tolist() == [[4, 0, 2], [0, 1, 2]]
    assert _picks.best(scores, 4, valid).tolist() == [[0, 1, 2, 4], [1, 2, 3, -1]]
    row_k = torch.tensor([1, 9])
    assert _picks.best(scores, row_k, valid)[:, :4].tolist() == [[4, -1, -1, -1], [1, 2, 3, -1]]
    first = torch.tensor([False, True, False, False, False, True])
    assert _picks.best(scores, 2, valid, must_keep=first).tolist()[1] == [1, 2]
    assert _picks.best(scores, 0).shape == (2, 0)


def test_picks() -> None:
    picks = torch.tensor([[5, 0, 3], [2, -1, -1]], dtype=torch.int32)
    assert _picks.in_order(picks, "position").tolist() == [[0, 3, 5], [2, -1, -1]]
    assert _picks.in_order(picks, "score") is picks
    mask = _picks.mask_of(picks, 6)
    assert mask.nonzero().tolist() == [[0, 0], [0, 3], [0, 5], [1, 2]]
    assert _picks.positions_of(mask, 2).tolist() == [[0, 3], [2, -1]]
    gaps = torch.tensor([[-1, 4, -1, 0, 2]], dtype=torch.int32)
    assert _picks.close_gaps(gaps).tolist() == [[4, 0, 2, -1, -1]]
    assert _picks.close_gaps(gaps, 2).tolist() == [[4, 0]]


def test_ranks_in_groups() -> None:
    group = torch.randint(-2, 6, (3, 20), generator=generator())
    group[2] = -1
    rank, size = _picks.ranks_in_groups(group)
    for row in range(3):
        labels = group[row].clamp(min=-1).tolist()
        for place, label in enumerate(labels):
            assert rank[row, place] == labels[:place].count(label)
            assert size[row, place] == labels.count(label)
    assert _picks.ranks_in_groups(group[:, :0])[0].shape == (3, 0)


def test_spaced_picks() -> None:
    for count, picks in product(range(1, 14), range(0, 14)):
        if picks > count:
            continue
        rank = torch.arange(count)
        found = rank[_picks.spaced_picks(rank, torch.tensor(count), torch.tensor(picks))]
        step = max(picks - 1, 1)
        assert found.tolist() == sorted({i * (count - 1) // step for i in range(picks)})
        assert len(found) == picks


def test_cell_sums() -> None:
    for grid, cells in (((4, 6), (2, 3)), ((5, 7), (2, 3)), ((3, 3), (1, 1))):
        values = torch.rand(2, grid[0] * grid[1], generator=generator())
        expected, counts = torch.zeros(2, *cells), torch.zeros(2, *cells)
        for row, column in product(*map(range, grid)):
            i = min(row // (grid[0] // cells[0]), cells[0] - 1)
            j = min(column // (grid[1] // cells[1]), cells[1] - 1)
            expected[:, i, j] += values[:, row * grid[1] + column]
            counts[:, i, j] += values[:, row * grid[1] + column] > 0.5
        torch.testing.assert_close(_grids.cell_sums(values, grid, cells), expected.flatten(1))
        assert torch.equal(_grids.cell_sums(values > 0.5, grid, cells), counts.flatten(1))
    for cells in ((0, 1), (5, 1)):
        with pytest.raises(ValueError, match="cells must be from 1 x 1 to the grid's 4 x 6"):
            _grids.cell_sums(torch.zeros(1, 24), (4, 6), cells)
    with pytest.raises(ValueError, match="grid must have 23 tokens, got 4 x 6"):
        _grids.cell_sums(torch.zeros(1, 23), (4, 6), (1, 1))


def test_dilate() -> None:
    selected = torch.rand(3, 20, generator=generator()) < 0.15
    image = selected.view(3, 1, 4, 5).float()
    cross = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    expected = functional.conv2d(image, cross, padding=1) > 0
    assert torch.equal(_grids.dilate(selected, (4, 5)), expected.flatten(1))
    with pytest.raises(ValueError, match="grid must have 20 tokens, got 4 x 4"):
        _grids.dilate(selected, (4, 4))


def test_resize() -> None:
    values = torch.rand(2, 12, generator=generator())
    expected = functional.interpolate(values.view(2, 1, 3, 4), (5, 6), mode="bilinear")
    assert torch.equal(_grids.resize(values, (3, 4), (5, 6)), expected.view(2, 30))


@pytest.mark.parametrize("image", [(640, 480), (100, 700), (5, 5), (1000, 90)])
def test_content_mask(image: tuple[int, int]) -> None:
    """Against areas counted point by point."""
    points, grid = 40, (12, 12)
    scale = 12 / max(image)
    axes = []
    for size in image:
        margin = (12 - size * scale) / 2
        place = (torch.arange(12 * points) + 0.5) / points
        axes.append((place > margin) & (place < 12 - margin))
    inside = (axes[1][:, None] & axes[0]).float()
    padding = 1 - functional.avg_pool2d(inside[None, None], points)[0, 0]
    found = _grids.content_mask(image, grid).view(12, 12)
    sure = (padding - 0.5).abs() > 0.05
    assert torch.equal(found[sure], (padding <= 0.5)[sure]) and sure.float().mean() > 0.8
    with pytest.raises(ValueError, match="image must be"):
        _grids.content_mask((0, 5), grid)


def test_percentile() -> None:
    values = torch.randn(4, 9, generator=generator())
    valid = torch.rand(4, 9, generator=generator(1)) < 0.6
    valid[3] = False
    for q in (0, 12.5, 50, 99.5, 100):
        found, masked = _thresholds.percentile(values, q), _thresholds.percentile(values, q, valid)
        for row in range(4):
            assert found[row].item() == pytest.approx(np.percentile(values[row], q), abs=1e-6)
            if valid[row].any():
                expected = np.percentile(values[row][valid[row]], q)
                assert masked[row].item() == pytest.approx(expected, abs=1e-6)
        assert masked[3].isnan()
    with pytest.raises(ValueError, match="q must be in"):
        _thresholds.percentile(values, 101)


def test_elbow() -> None:
    values = torch.rand(4, 12, generator=generator()) ** 3
    valid = torch.rand(4, 12, generator=generator(1)) < 0.7
    found, masked = _thresholds.elbow(values), _thresholds.elbow(values, valid)
    for row in range(4):
        for result, chosen in ((found, values[row]), (masked, values[row][valid[row]])):
            descending = sorted(chosen.tolist(), reverse=True)
            last = len(descending) - 1
            chord = np.array([last, descending[-1] - descending[0]])
            chord = chord / np.linalg.norm(chord)
            away = []
            for rank, value in enumerate(descending):
                point = np.array([rank, value - descending[0]])
                away.append(np.linalg.norm(point - point @ chord * chord))
            assert result[row].item() == pytest.approx(descending[int(np.argmax(away))])
    assert _thresholds.elbow(torch.ones(1, 5)).item() == 1
    assert _thresholds.elbow(values, torch.zeros(4, 12, dtype=torch.bool)).isinf().all()


def test_soft_topk() -> None:
    scores = torch.randn(3, 40, generator=generator()) * 5
    soft = _thresholds.soft_topk(scores, torch.tensor([1, 10, 39]))
    torch.testing.assert_close(soft.sum(1), torch.tensor([1.0, 10, 39]), rtol=1e-5, atol=1e-5)
    assert (soft.gather(1, scores.argsort(1)).diff(dim=1) >= 0).all()


def test_unit_range() -> None:
    values = torch.randn(2, 7, generator=generator())
    valid = torch.tensor([[True] * 7, [False, True, True, True, False, True, True]])
    found = _thresholds.unit_range(values, valid)
    for row in range(2):
        chosen = found[row][valid[row]]
        assert chosen.min() == 0 and chosen.max() == pytest.approx(1)
    assert (_thresholds.unit_range(torch.ones(1, 4)) == 0).all()


def rounds(x: torch.Tensor, rest: list[int], keep: int, step: int, by_similarity: bool) -> list:
    """One row, as published."""
    unit = functional.normalize(x.double(), dim=-1)
    while (drop := min(step, len(rest) - keep, (len(rest) + 1) // 2)) > 0:
        even, odd = rest[::2], rest[1::2]
        best = {i: max((unit[i] @ unit[j]).item() for j in odd) if odd else 0 for i in even}
        descending = sorted(even, key=lambda i: -best[i])
        left = descending[drop:]
        rest = left + odd if by_similarity else [i for i in rest if i in left or i in odd]
    return rest


@pytest.mark.parametrize(
    ("count", "keep", "step", "by_similarity"),
    [(37, 5, 8, True), (37, 5, 8, False), (20, 1, 3, True), (9, 0, 8, False), (6, 6, 8, True)],
)
def test_rounds(count: int, keep: int, step: int, by_similarity: bool) -> None:
    x = tokens_of(3, 40)
    rest = torch.stack([torch.randperm(40, generator=generator(i))[:count] for i in range(3)])
    rest = rest.to(torch.int32)
    rest[1, count - 4 :] = -1
    found = _rounds.prune_in_rounds(x, rest, keep, step, by_similarity)
    assert found.shape == (3, min(keep, count))
    for row in range(3):
        listed = [i for i in rest[row].tolist() if i >= 0]
        expected = rounds(x[row], listed, keep, step, by_similarity)
        assert [i for i in found[row].tolist() if i >= 0] == expected
    with pytest.raises(ValueError, match="step must be at least 1"):
        _rounds.prune_in_rounds(x, rest, 3, 0)


def test_checks() -> None:
    with pytest.raises(ValueError, match=r"x must be \[2, N, C\], got \[3, 4, 5\]"):
        _arguments.check_features("x", torch.zeros(3, 4, 5), 2)
    with pytest.raises(ValueError, match=r"x must be \[B, 0, C\], got \[3, 4, 5\]"):
        _arguments.check_features("x", torch.zeros(3, 4, 5), None, 0)
    with pytest.raises(ValueError, match=r"attention must be \[B, H, N\] or \[B, N\]"):
        _arguments.head_mean(torch.zeros(4))
    attention = torch.rand(2, 3, 5, generator=generator()).to(torch.bfloat16)
    torch.testing.assert_close(_arguments.head_mean(attention), attention.float().mean(1))
