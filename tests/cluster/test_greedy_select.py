"""greedy_select: the picks of plain loops, and their rules at ties, masks, weights and edges.

Picks are chaotic in rounding, so they are compared on rows whose scores are exact (small integers)
or well apart, and otherwise judged one by one: each must be as good as the best, up to rounding.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator
from cases.oracle import remember
from tokred.reference.cluster.greedy_select import _Picker
from tokred.reference.cluster.greedy_select import distances as distances_of

RULES = ("kcenter", "maxsum", "mmr", "facility")
METRICS = ("cosine", "l2", "dot")
distances = remember(distances_of)  # several rules use the same rows
CHOICES = [(r, m) for r in RULES for m in METRICS if (r, m) != ("facility", "l2")]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def assert_greedy(
    indices: Tensor,
    x: Tensor,
    rule: str,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    metric: str = "cosine",
    first: str = "rule",
    trade_off: float = 0.5,
) -> None:
    """Every pick has the best score for those before it, in float64, up to rounding."""
    batch, tokens, channels = x.shape
    for b in range(batch):
        here = torch.ones(tokens, dtype=torch.bool) if mask is None else mask[b]
        w = torch.ones(tokens) if weight is None else weight[b]
        rows = torch.where(here[:, None], x[b], 0).double()
        apart = distances(rows, metric)
        picker = _Picker(apart, rows, w.double(), here, rule, metric, trade_off)
        scale = 1.0 if metric == "cosine" else float(rows.square().sum(-1).max()) ** 0.5
        scale *= scale if metric == "dot" or first == "norm" else 1
        slack = 4e-6 * scale * (1 + float(w.abs().max())) * (1 + channels / 32)
        slack *= tokens if rule in ("maxsum", "facility") else 1
        picks = indices[b].tolist()
        count = min(len(picks), int(here.sum()))
        assert all(token >= 0 for token in picks[:count]) and set(picks[count:]) <= {-1}
        assert len(set(picks[:count])) == count
        for i, token in enumerate(picks[:count]):
            scores = picker.scores(first if i == 0 else "rule")
            # The l2 of nearly equal rows is the root of a rounding error.
            error = slack + (2e-3 * scale if metric == "l2" and scores.max() < 0.05 else 0)
            assert scores[token] >= scores.max() - error, (b, i, token)
            picker.pick(token)


@pytest.mark.parametrize(("rule", "metric"), CHOICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_pick_is_the_best(
    backend: Backend, rule: str, metric: str, dtype: torch.dtype
) -> None:
    for shape, k, seed in (((2, 37, 24), 12, 1), ((1, 70, 5), 30, 2)):
        x = randn(*shape, seed=seed).to(dtype)
        weight = torch.rand(shape[:2], generator=generator(seed)) + 0.1
        mask = torch.rand(shape[:2], generator=generator(seed + 1)) < 0.8
        for options in ({}, {"weight": weight}, {"weight": weight, "mask": mask}):
            indices = backend.run("greedy_select", x, k, rule, metric=metric, **options)
            assert indices.dtype == torch.int32 and indices.shape == (shape[0], k)
            assert_greedy(indices, x, rule, metric=metric, **options)


@pytest.mark.parametrize("first", ["rule", "norm", "isolated"])
@pytest.mark.parametrize(("rule", "metric"), CHOICES)
def test_first_picks(backend: Backend, rule: str, metric: str, first: str) -> None:
    x, weight = randn(2, 35, 12), torch.rand(2, 35, generator=generator(1))
    mask = torch.rand(2, 35, generator=generator(2)) < 0.7
    options = {"weight": weight, "mask": mask, "metric": metric, "first": first}
    assert_greedy(backend.run("greedy_select", x, 6, rule, **options), x, rule, **options)


@pytest.mark.parametrize("metric", METRICS)
def test_isolated_among_many(backend: Backend, metric: str) -> None:
    """More tiles than are compared with all others at once, more channels than are multiplied at
    once, and as many as sketches are made of.
    """
    centres = randn(12, 260, seed=4)
    chosen = torch.randint(12, (2, 203), generator=generator(5))
    x = centres[chosen] + 0.5 * randn(2, 203, 260)
    x[:, 150] = 2 * centres[0] + 3 * randn(260, seed=6)  # alone
    weight = torch.rand(2, 203, generator=generator(7))
    weight[0, ::3], weight[1, ::2] = 0, -1
    mask = torch.rand(2, 203, generator=generator(8)) < 0.8
    for options in ({}, {"mask": mask}, {"weight": weight, "mask": mask}):
        options = {"metric": metric, "first": "isolated", **options}
        assert_greedy(
            backend.run("greedy_select", x, 2, "kcenter", **options), x, "kcenter", **options
        )
    alike = x[:, :1].repeat(1, 100, 1)
    picks = backend.run("greedy_select", alike, 1, "kcenter", metric=metric, first="isolated")
    assert picks.tolist() == [[0], [0]]


def test_isolated_where_sketches_say_nothing(backend: Backend) -> None:
    """All tokens are about as far from each other: bounds rule none of them out."""
    x = torch.eye(256)[None, torch.randperm(256, generator=generator(1))[:200]]
    x = x + 0.01 * randn(1, 200, 256)
    options = {"first": "isolated"}
    assert_greedy(backend.run("greedy_select", x, 2, "kcenter", **options), x, "kcenter", **options)


@pytest.mark.parametrize("metric", METRICS)
def test_sums_over_more_than_a_cache(backend: Backend, metric: str) -> None:
    """Distances to tokens that may be next are measured with those to the one picked."""
    x = (randn(9, 1030, seed=4)[torch.arange(261) % 9] + randn(261, 1030))[None]
    weight = torch.rand(1, 261, generator=generator(7)) + 0.5
    mask = torch.rand(1, 261, generator=generator(8)) < 0.9
    for options in ({}, {"weight": weight, "mask": mask}):
        options = {"metric": metric, **options}
        picks = backend.run("greedy_select", x, 14, "maxsum", **options)
        assert_greedy(picks, x, "maxsum", **options)


@pytest.mark.parametrize("rule", RULES)
def test_signed_weights(backend: Backend, rule: str) -> None:
    x, weight = randn(2, 50, 8), randn(2, 50, seed=1)
    for trade_off in (0.0, 0.3, 1.0) if rule == "mmr" else (0.5,):
        indices = backend.run("greedy_select", x, 35, rule, weight, trade_off=trade_off)
        assert_greedy(indices, x, rule, weight, trade_off=trade_off)


def test_all_of_a_line_in_order(backend: Backend) -> None:
    """Exact scores: farthest points of 0 .. 8, ties by the lower index."""
    x = torch.arange(9.0).view(1, 9, 1)
    picks = backend.run("greedy_select", x, 9, "kcenter", metric="l2")
    assert picks.tolist() == [[0, 8, 4, 2, 6, 1, 3, 5, 7]]
    picks = backend.run("greedy_select", x, 4, "maxsum", metric="l2")
    assert picks.tolist() == [[0, 8, 1, 7]]
    picks = backend.run("greedy_select", x, 3, "kcenter", metric="l2", first="norm")
    assert picks.tolist() == [[8, 0, 4]]


def test_adts_and_scope(backend: Backend) -> None:
    """FlashVID's and SCOPE's selections, written out."""
    x, attention = randn(1, 60, 16), torch.rand(1, 60, generator=generator(3)) + 0.05
    unit = x[0].double() / x[0].double().norm(dim=-1, keepdim=True)
    cosine, weight = unit @ unit.T, attention[0].double()

    table = (1 - cosine) * weight  # columns scaled
    picked = [int(table.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(picked) < 15:
        nearest = table[picked].amin(0)
        nearest[picked] = -1
        picked.append(int(nearest.argmax()))
    ours = backend.run("greedy_select", x, 15, "kcenter", attention, first="isolated")
    assert ours.tolist() == [picked]

    covered, picked = torch.zeros(60, dtype=torch.float64), []
    for _ in range(15):
        gain = (cosine - covered[:, None]).clamp(min=0).sum(0) * weight
        gain[picked] = -1
        picked.append(int(gain.argmax()))
        covered = torch.maximum(covered, cosine[picked[-1]])
    assert backend.run("greedy_select", x, 15, "facility", attention).tolist() == [picked]


def test_duplicates_come_last_and_in_order(backend: Backend) -> None:
    """Each of 7 rows stands 5 times: after 7 picks the distances are 0, and ties go by index."""
    x = randn(7, 11).repeat(5, 1)[None]
    for metric in ("cosine", "l2"):
        picks = backend.run("greedy_select", x, 35, "kcenter", metric=metric)[0].tolist()
        assert sorted(p % 7 for p in picks[:7]) == list(range(7)) and max(picks[:7]) < 7
        assert picks[7:] == [i for i in range(35) if i not in picks[:7]]
    for rule in RULES:
        picks = backend.run("greedy_select", x, 35, rule)[0].tolist()
        assert sorted(picks) == list(range(35))


@pytest.mark.parametrize("rule", RULES)
def test_equal_rows_go_by_index(backend: Backend, rule: str) -> None:
    x = torch.ones(2, 19, 4)
    assert backend.run("greedy_select", x, 19, rule).tolist() == [list(range(19))] * 2


@pytest.mark.parametrize("rule", RULES)
def test_budgets_and_masks(backend: Backend, rule: str) -> None:
    x = randn(3, 21, 6)
    mask = torch.zeros(3, 21, dtype=torch.bool)
    mask[1, 13] = mask[2, ::2] = True
    picks = backend.run("greedy_select", x, 15, rule, mask=mask)
    assert picks[0].tolist() == [-1] * 15
    assert picks[1].tolist() == [13] + [-1] * 14
    assert sorted(picks[2].tolist()) == [-1] * 4 + list(range(0, 21, 2))
    assert backend.run("greedy_select", x, 0, rule).shape == (3, 0)
    everything = backend.run("greedy_select", x, 30, rule, first="isolated")
    assert everything[0].sort().values.tolist() == [-1] * 9 + list(range(21))
    for shape in ((0, 5, 3), (2, 0, 3)):
        picks = backend.run("greedy_select", torch.zeros(shape), 4, rule)
        assert picks.tolist() == [[-1] * 4] * shape[0]
    one = backend.run("greedy_select", x[:, :1], 2, rule, first="isolated")
    assert one.tolist() == [[0, -1]] * 3
    assert backend.run("greedy_select", x[..., :0], 3, rule).shape == (3, 3)


@pytest.mark.parametrize("rule", RULES)
def test_start(backend: Backend, rule: str) -> None:
    x = randn(5, 18, 6)
    mask = torch.ones(5, 18, dtype=torch.bool)
    mask[3, 7] = False
    start = torch.tensor([4, -1, 18, 7, 2**31 - 1], dtype=torch.int32)
    picks = backend.run("greedy_select", x, 4, rule, start=start, mask=mask)
    free = backend.run("greedy_select", x, 4, rule, mask=mask)
    assert picks[0, 0] == 4
    assert_bitwise_equal(picks[1:], free[1:])


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_is_left_out(backend: Backend, rule: str) -> None:
    x, weight = randn(2, 20, 6), torch.ones(2, 20)
    x[0, 3, 1], x[0, 5, 0], x[0, 6, 2] = torch.nan, torch.inf, 3e30
    weight[1, 4], weight[1, 9] = torch.nan, -torch.inf
    picks = backend.run("greedy_select", x, 20, rule, weight)
    assert sorted(set(range(20)) - set(picks[0].tolist())) == [3, 5, 6]
    assert sorted(set(range(20)) - set(picks[1].tolist())) == [4, 9]
    assert picks[:, :17].min() >= 0 and (picks[0, 17:] == -1).all()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, [3, 5, 6]] = False
    again = backend.run("greedy_select", x, 20, rule, weight, mask=mask)
    assert_bitwise_equal(picks, again)


def test_zero_rows_are_like_nothing(backend: Backend) -> None:
    x = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 0.1, 0], [-1, 0, 0], [0, 0, 0]])[None]
    picks = backend.run("greedy_select", x, 5, "kcenter")
    assert picks.tolist() == [[0, 3, 1, 4, 2]]


@pytest.mark.parametrize(("rule", "metric"), CHOICES)
def test_batch_strides_and_threads(kernels: Backend, rule: str, metric: str) -> None:
    x, weight = randn(3, 90, 24), torch.rand(3, 90, generator=generator(1))
    mask = torch.rand(3, 90, generator=generator(2)) < 0.9

    def select(x: Tensor, b: slice = slice(None)) -> Tensor:
        options = {"weight": weight[b], "mask": mask[b], "metric": metric, "first": "isolated"}
        k = 12 if rule == "facility" else 40
        return kernels.run("greedy_select", x, k, rule, **options)

    whole = select(x)
    views = {
        "whole": whole,
        "tokens first": select(x.transpose(0, 1).contiguous().transpose(0, 1)),
        "unaligned": select(torch.nn.functional.pad(x, (1, 2))[..., 1:25]),
    }
    assert_one_result(views)
    for b in range(3):
        assert_bitwise_equal(select(x[b : b + 1], slice(b, b + 1)), whole[b : b + 1])


@pytest.mark.parametrize(("rule", "metric"), CHOICES)
def test_threads_share_a_large_item(kernels: Backend, rule: str, metric: str) -> None:
    """Items of 2^18 numbers on the CPU, of 2^17 in parts on a device."""
    if kernels.name == "simt":
        tokens, channels, k = 270, 512, 2
    else:
        tokens, channels, k = 530, 512, 6
    x, weight = randn(1, tokens, channels), randn(1, tokens, seed=1)
    weight = weight if rule != "maxsum" else weight.abs()
    first = kernels.run("greedy_select", x, k, rule, weight, metric=metric)
    assert_greedy(first, x, rule, weight, metric=metric)
    if kernels.name.startswith("cpu"):
        torch.set_num_threads(3)
        again = kernels.run("greedy_select", x, k, rule, weight, metric=metric)
        assert_bitwise_equal(first, again)


def test_many_picks_meet_in_pieces(backend: Backend) -> None:
    """More picks than a tile is compared with at a time; a far tile catches up with all at last."""
    near, far = randn(1, 16, 4, seed=3) * 0.01, randn(1, 240, 4, seed=4)
    x = torch.cat([near, far], 1)
    picks = backend.run("greedy_select", x, 256, "kcenter", metric="l2")
    assert sorted(picks[0].tolist()) == list(range(256))
    assert_greedy(picks[:, :200], x, "kcenter", metric="l2")


def test_wrapper_refuses_nothing_that_requires_grad() -> None:
    x = randn(1, 6, 3).requires_grad_()
    assert not tokred.greedy_select(x, 3).requires_grad
