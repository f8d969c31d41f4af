"""kmeans: every round against float64, known clusters, and bit by bit against itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label
from cases.oracle import reference


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int = 2
    tokens: int = 70
    channels: int = 24
    clusters: int = 9
    dtype: torch.dtype = torch.float32
    metric: str = "l2"
    masked: bool = False
    start: str = "none"
    distribution: str = "randn"

    def inputs(self) -> dict[str, Any]:
        rng = generator(self.tokens + self.channels)
        x = torch.randn(self.batch, self.tokens, self.channels, generator=rng)
        if self.distribution == "duplicates":
            x = x[:, torch.randint(0, 5, (self.tokens,), generator=rng)]
        elif self.distribution == "constant":
            x = torch.ones_like(x)
        elif self.distribution == "zeros":
            x[:, ::3] = 0
        elif self.distribution == "clusters":
            x = x / 20 + x[:, torch.randint(0, 60, (self.tokens,), generator=rng)]
        elif self.distribution == "far":
            x += 100
        elif self.distribution == "tiny":
            x *= 1e-20
        elif self.distribution == "spoiled":
            x[:, ::50, 0] = torch.tensor([torch.nan, torch.inf, 1e30, -1e18]).repeat(2)
        some: dict[str, Any] = {
            "x": x.to(self.dtype),
            "num_clusters": self.clusters,
            "metric": self.metric,
        }
        if self.masked:
            some["mask"] = torch.rand(self.batch, self.tokens, generator=rng) < 0.7
        if self.start == "tokens":
            shape = (self.batch, self.clusters)
            numbers = torch.randint(-1, self.tokens + 1, shape, generator=rng)
            some["start"] = numbers.int()
        elif self.start == "centroids":
            shape = (self.batch, self.clusters, self.channels)
            some["start"] = torch.randn(shape, generator=rng)
        return some


SIZES = [
    Case(),
    Case(1, 1, 1, 1),
    Case(1, 300, 3, 2),
    Case(1, 40, 65, 17),
    Case(1, 130, 16, 70),
    Case(2, 5, 8, 12),
    Case(1, 600, 7, 33),
    Case(2, 30, 0, 4),
    Case(2, 0, 8, 3),
    Case(2, 30, 8, 0),
    Case(0, 30, 8, 3),
]
OPTIONS = [
    Case(masked=True),
    Case(start="tokens", masked=True),
    Case(start="centroids"),
    *(Case(distribution=d, tokens=40) for d in ("duplicates", "constant", "zeros")),
    Case(tokens=6, clusters=20, masked=True),
]
CASES = [
    *(replace(case, dtype=dtype) for case in SIZES for dtype in FLOATS),
    *OPTIONS,
    *(replace(case, metric="cosine") for case in [*SIZES, *OPTIONS]),
]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def check_nearest(some: dict, centroids: Tensor, assignment: Tensor, usable: Tensor) -> None:
    """Nobody is nearer than the centroid chosen, but for rounding.

    Rounding may move x . c - |c|^2 / 2 by (8 + sqrt(C)) units in the last place of its parts.
    """
    x, c = some["x"].double(), centroids.double()
    score = x @ c.mT
    size = x.norm(dim=-1)[..., None] * c.norm(dim=-1)[:, None]
    if some["metric"] == "l2":
        score = score - c.square().sum(-1)[:, None] / 2
        size = size + c.square().sum(-1)[:, None]
    score = score.masked_fill(~usable[:, None], -torch.inf)
    given = assignment >= 0
    taken = torch.ones_like(given) if some.get("mask") is None else some["mask"]
    assert torch.equal(given, taken & usable.any(-1, keepdim=True))
    if not given.any():
        return
    chosen = score.gather(2, assignment.clamp(min=0).long()[..., None])[..., 0]
    unit_size = (8 + x.shape[2] ** 0.5) * 2.0**-24 * size.amax(-1)
    assert (score.amax(-1) - chosen <= 2 * unit_size)[given].all()


def usable_clusters(some: dict) -> Tensor:
    """Which clusters start at a token or a centroid: bool [B, K]."""
    x, start, mask = some["x"], some.get("start"), some.get("mask")
    batch, tokens, _ = x.shape
    mask = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else mask
    if start is None:
        return mask.any(-1)[:, None].expand(batch, some["num_clusters"])
    if start.dim() == 3:
        return torch.ones(start.shape[:2], dtype=torch.bool)
    inside = (start >= 0) & (start < tokens)
    return inside & mask.gather(1, torch.where(inside, start, 0).long())


@pytest.mark.parametrize("case", CASES, ids=label)
def test_every_round_against_float64(backend: Backend, case: Case) -> None:
    """From the results of t rounds follow those of t + 1, whatever rounding decided before."""
    some = case.inputs()
    usable = usable_clusters(some)
    x = some["x"].double()
    rows = unit(x) if case.metric == "cosine" else x
    before = None
    for rounds in range(4):
        centroids, assignment, counts = backend.run("kmeans", iterations=rounds, **some)
        assert centroids.dtype == torch.float32 and assignment.dtype == torch.int32
        assert counts.dtype == torch.int32
        member = torch.nn.functional.one_hot(assignment.long() + 1, case.clusters + 1)[..., 1:]
        assert torch.equal(member.sum(1).int(), counts)
        check_nearest(some, centroids, assignment, usable)
        if before is not None:
            last, member_before, count = before
            sums = member_before.double().mT @ rows
            mean = unit(sums) if case.metric == "cosine" else sums / count.clamp(min=1)[..., None]
            expected = torch.where((count > 0)[..., None], mean, last.double())
            # The sum of tokens may cancel, and its rounding is stretched with it.
            largest = rows.norm(dim=-1).max() if rows.numel() else 0
            norm = sums.norm(dim=-1, keepdim=True).clamp(min=1e-3)
            stretch = count[..., None] / norm if case.metric == "cosine" else 1
            limit = 1e-6 * largest * stretch + 1e-12
            assert ((centroids - expected).abs() <= limit).all()
            empty = count == 0
            assert torch.equal(centroids[empty], last[empty])
        before = centroids, member, counts


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("start", ["none", "tokens", "centroids"])
def test_clusters_far_apart_are_found(backend: Backend, metric: str, start: str) -> None:
    """Where rounding cannot decide, everything is the reference's."""
    rng = generator(4)
    centres = torch.randn(2, 6, 32, generator=rng) * 8
    label = torch.randint(0, 6, (2, 90), generator=rng)
    label[:, :6] = torch.arange(6)
    noise = torch.randn(2, 90, 32, generator=rng) * 0.1
    x = centres.gather(1, label[..., None].expand(-1, -1, 32)) + noise
    given = {
        "none": None,
        "tokens": torch.arange(6).int().expand(2, 6),
        "centroids": centres + 0.5,
    }[start]
    some = {"num_clusters": 6, "start": given, "metric": metric}
    exact = reference.kmeans(x.double(), **some)
    result = backend.run("kmeans", x, **some)
    assert torch.equal(result[1], exact[1]) and torch.equal(result[2], exact[2])
    torch.testing.assert_close(result[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    if start != "none":
        assert torch.equal(result[1], label.int())


def test_exact_arithmetic_equals_the_reference(backend: Backend) -> None:
    """Points of a line whose means are exact: 0 1 | 8 9 10 | 20, and the masked one at 100."""
    x = torch.tensor([0.0, 1, 8, 9, 10, 20, 100])[None, :, None]
    mask = torch.tensor([[True] * 6 + [False]])
    start = torch.tensor([[0, 1, 2]]).int()
    rounds = [
        ([0.0, 1.0, 8.0], [0, 1, 2, 2, 2, 2, -1], [1, 1, 4]),
        ([0.0, 1.0, 11.75], [0, 1, 2, 2, 2, 2, -1], [1, 1, 4]),
    ]
    for iterations, (centroids, assignment, counts) in enumerate(rounds):
        result = backend.run("kmeans", x, 3, iterations, start, mask)
        assert [t.flatten().tolist() for t in result] == [centroids, assignment, counts]
    # Token 1 is as near to 0 as to 2: the lower cluster.
    result = backend.run("kmeans", x[:, :3] - 0, 2, 0, torch.tensor([[0.0], [2.0]])[None])
    assert result[1].tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_equal_centroids_tie_to_the_lowest(kernels: Backend, metric: str) -> None:
    x = torch.randn(1, 60, 33, generator=generator(8))
    start = torch.arange(40)[None].int() // 2
    for dtype in FLOATS:
        _, assignment, counts = kernels.run("kmeans", x.to(dtype), 40, 0, start, metric=metric)
        assert assignment.remainder(2).eq(0).all() and counts[:, 1::2].eq(0).all()


def test_default_start_is_spread_over_the_usable(backend: Backend) -> None:
    x = torch.arange(10.0)[None, :, None].repeat(3, 1, 1)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, 2:8] = False  # 0 1 8 9 are left
    mask[2] = False
    centroids, assignment, counts = backend.run("kmeans", x, 4, 0, None, mask)
    assert centroids[..., 0].tolist() == [[1, 3, 6, 8], [0, 1, 8, 9], [0, 0, 0, 0]]
    assert assignment[2].eq(-1).all() and counts[2].eq(0).all()


def test_an_empty_cluster_stays(backend: Backend) -> None:
    x = torch.tensor([1.0, 2, 3])[None, :, None]
    start = torch.tensor([2.0, 50, 2])[None, :, None]
    centroids, assignment, counts = backend.run("kmeans", x, 3, 5, start)
    assert centroids.flatten().tolist() == [2, 50, 2]
    assert assignment.tolist() == [[0, 0, 0]] and counts.tolist() == [[3, 0, 0]]


def test_numbers_that_are_not_finite_stay_alone(backend: Backend) -> None:
    x = torch.tensor([[0.0, 1], [1, 0], [0, 0], [9, 9], [10, 9]])[None].repeat(4, 1, 1)
    x[0, 2, 1], x[1, 2, 0], x[2, 2, 1] = torch.nan, torch.inf, -torch.inf
    x[3, 2, 0] = 3e38
    start = torch.tensor([[0.5, 0.5], [9, 9]]).repeat(4, 1, 1)
    centroids, assignment, counts = backend.run("kmeans", x, 2, 3, start)
    assert assignment[:3].tolist() == [[0, 0, -1, 1, 1]] * 3
    assert counts[:3].tolist() == [[2, 2]] * 3 and centroids[:3].isfinite().all()


def test_items_stop_by_themselves(backend: Backend) -> None:
    """An item that has settled is not moved by another's rounds, and tolerance ends it early."""
    rng = generator(9)
    slow = torch.randn(1, 200, 4, generator=rng)
    quick = torch.randn(1, 4, 4, generator=rng).repeat_interleave(50, 1)
    x = torch.cat([slow, quick])
    both = backend.run("kmeans", x, 4, 50)
    for item in range(2):
        alone = backend.run("kmeans", x[item : item + 1], 4, 50)
        assert_bitwise_equal(alone, [t[item : item + 1] for t in both])
    one = backend.run("kmeans", slow, 4, 1)
    assert_bitwise_equal(backend.run("kmeans", slow, 4, 50, tolerance=1e6), one)
    assert not torch.equal(one[0], both[0][:1])


def test_views_equal_their_copies(kernels: Backend) -> None:
    x = torch.randn(50, 2, 24, generator=generator(1)).transpose(0, 1)[..., 3:19]
    mask = (torch.rand(2, 100, generator=generator()) < 0.8)[:, ::2]
    start = torch.randint(0, 50, (5, 2), generator=generator(2)).int().T
    views = (x, 5, 4, start, mask)
    copies = [t.contiguous() if isinstance(t, Tensor) else t for t in views]
    assert_bitwise_equal(kernels.run("kmeans", *views), kernels.run("kmeans", *copies))


BITWISE = [
    Case(5, 45, 33, 7),
    Case(3, 290, 20, 3, masked=True),
    Case(4, 60, 40, 18, metric="cosine", start="tokens"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_batch_and_backend_do_not_matter(kernels: Backend, case: Case, dtype: torch.dtype) -> None:
    """The same bits alone, and on every device: sums and ties have one order everywhere."""
    some = replace(case, dtype=dtype).inputs()
    whole = kernels.run("kmeans", iterations=4, **some)
    assert_bitwise_equal(whole, tokred.kmeans(iterations=4, **some), "against the CPU")
    for item in range(case.batch):
        one = slice(item, item + 1)
        part = {n: t[one] if isinstance(t, Tensor) else t for n, t in some.items()}
        alone = kernels.run("kmeans", iterations=4, **part)
        assert_bitwise_equal(alone, [t[one] for t in whole], f"item {item} alone")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", [*BITWISE, Case(1, 1100, 65, 40)], ids=label)
def test_isa_and_threads_do_not_matter(on_every_cpu, case: Case, dtype: torch.dtype) -> None:
    some = replace(case, dtype=dtype).inputs()
    assert_one_result(on_every_cpu(lambda: tokred.kmeans(iterations=4, **some)))


MANY = [
    Case(1, 700, 6, 70),
    Case(2, 400, 20, 300, masked=True),
    Case(1, 500, 70, 50, distribution="clusters"),
    Case(1, 500, 8, 64, distribution="far"),
    Case(1, 300, 5, 90, distribution="duplicates"),
    Case(1, 400, 7, 64, distribution="tiny"),
    Case(1, 400, 7, 64, distribution="spoiled"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", MANY, ids=label)
def test_many_rounds_are_single_rounds(kernels: Backend, case: Case, dtype: torch.dtype) -> None:
    """What bounds pass over in later rounds would not have won: bit by bit the same."""
    if kernels.name == "simt" and dtype != torch.float32:
        pytest.skip("has no bounds")
    some = replace(case, dtype=dtype).inputs()
    many = kernels.run("kmeans", iterations=9, **some)
    single = kernels.run("kmeans", iterations=1, **some)
    for _ in range(8):
        single = kernels.run("kmeans", iterations=1, **some | {"start": single[0]})
    assert_bitwise_equal(many, single)


def test_the_sum_of_squares_falls(backend: Backend) -> None:
    x = torch.randn(1, 400, 6, generator=generator(3))
    inertia = []
    for iterations in (0, 1, 2, 5, 20):
        centroids, assignment, _ = backend.run("kmeans", x, 12, iterations)
        nearest = centroids[0][assignment[0].long()]
        inertia.append(float((x[0] - nearest).square().sum()))
    assert all(a >= b for a, b in pairwise(inertia))


def test_results_never_require_grad() -> None:
    x = torch.randn(1, 9, 4, requires_grad=True)
    assert not any(t.requires_grad for t in tokred.kmeans(x, 3))
