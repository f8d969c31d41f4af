"""kmedoids: every round against float64, known clusters, and bit by bit against itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    distribution: str = "randn"

    def inputs(self) -> dict[str, Any]:
        rng = generator(self.tokens + self.channels)
        x = torch.randn(self.batch, self.tokens, self.channels, generator=rng)
        if self.distribution == "duplicates":
            x = x[:, torch.randint(0, 5, (self.tokens,), generator=rng)]
        elif self.distribution == "constant":
            x = torch.ones_like(x)
        start = torch.randint(-1, self.tokens + 1, (self.batch, self.clusters), generator=rng)
        some: dict[str, Any] = {
            "x": x.to(self.dtype),
            "num_clusters": self.clusters,
            "start": start.int(),
            "metric": self.metric,
        }
        if self.masked:
            some["mask"] = torch.rand(self.batch, self.tokens, generator=rng) < 0.7
        return some


SIZES = [
    Case(),
    Case(1, 1, 1, 1),
    Case(1, 150, 3, 2),
    Case(1, 40, 65, 17),
    Case(1, 130, 16, 40),
    Case(2, 5, 8, 12),
    Case(2, 30, 0, 4),
    Case(2, 0, 8, 3),
    Case(2, 30, 8, 0),
    Case(0, 30, 8, 3),
]
OPTIONS = [
    Case(masked=True),
    *(Case(distribution=d, tokens=40) for d in ("duplicates", "constant")),
    Case(tokens=6, clusters=20, masked=True),
]
CASES = [
    *(replace(case, dtype=dtype) for case in SIZES for dtype in FLOATS),
    *OPTIONS,
    *(replace(case, metric="cosine") for case in [*SIZES, *OPTIONS]),
]


def pair_distances(x: Tensor, metric: str) -> Tensor:
    """[B, N, N] in float64."""
    x = x.double()
    if metric == "cosine":
        x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    difference = x[:, :, None] - x[:, None]
    return difference.norm(dim=-1) if metric == "l2" else difference.square().sum(-1) / 2


@pytest.mark.parametrize("case", CASES, ids=label)
def test_every_round_against_float64(backend: Backend, case: Case) -> None:
    """From the results of t rounds follow those of t + 1, whatever rounding decided before."""
    some = case.inputs()
    mask = some.get("mask", torch.ones(case.batch, case.tokens, dtype=torch.bool))
    distance = pair_distances(some["x"], case.metric)
    scale = float(distance.max()) if distance.numel() else 0
    before: Tensor | None = None
    for rounds in range(4):
        medoids, assignment = backend.run("kmedoids", iterations=rounds, **some)
        assert medoids.dtype == assignment.dtype == torch.int32
        if rounds == 0:
            check_start(some, medoids, mask)
        for b in range(case.batch):
            alive = medoids[b][medoids[b] >= 0].long()
            assert (alive.diff() > 0).all() and (medoids[b, len(alive) :] == -1).all()
            assert mask[b][alive].all()
            given = assignment[b] >= 0
            assert torch.equal(given, mask[b] if len(alive) else torch.zeros_like(mask[b]))
            if not len(alive):
                continue
            assert torch.equal(assignment[b][alive].long(), torch.arange(len(alive)))
            to_medoid = distance[b][:, alive]
            chosen = to_medoid.gather(1, assignment[b].clamp(min=0).long()[:, None])[:, 0]
            # Squares of distances are compared, as products, in float32.
            worse = chosen.square() - to_medoid.amin(1).square()
            if case.metric == "cosine":
                worse = chosen - to_medoid.amin(1)
            norms = some["x"][b].double().square().sum(-1).max() if case.metric == "l2" else 1.0
            assert (worse[given] <= 2e-5 * norms).all()
            if before is not None:
                check_moved(distance[b], before[b], medoids[b], scale)
        before = [
            [(assignment[b] == k).nonzero()[:, 0] for k in range(int((medoids[b] >= 0).sum()))]
            for b in range(case.batch)
        ]


def check_start(some: dict, medoids: Tensor, mask: Tensor) -> None:
    """The numbers of usable tokens in the start, each once."""
    for b, start in enumerate(some["start"].tolist()):
        tokens = {i for i in start if 0 <= i < mask.shape[1] and mask[b, i]}
        found = medoids[b][medoids[b] >= 0].tolist()
        assert found == sorted(tokens)


def check_moved(distance: Tensor, members: list[Tensor], medoids: Tensor, scale: float) -> None:
    """One medoid a cluster, whose sum of distances is the smallest, but for rounding."""
    found = medoids[medoids >= 0].long()
    assert len(found) == len(members)
    for member in members:
        here = [i for i in found.tolist() if i in set(member.tolist())]
        assert len(here) == 1
        cost = distance[member][:, member].sum(-1)
        place = member.tolist().index(here[0])
        limit = 1e-5 * scale * len(member)
        assert cost[place] - cost.min() <= limit
        equal = distance[here[0], member[:place]] == 0
        assert not equal.any(), "a duplicate with a lower number has the same sum"


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_clusters_far_apart_are_found(backend: Backend, metric: str) -> None:
    """Where rounding cannot decide, everything is the reference's, KKZ start included."""
    rng = generator(4)
    centres = torch.randn(2, 6, 32, generator=rng) * 8
    group = torch.randint(0, 6, (2, 90), generator=rng)
    group[:, :6] = torch.arange(6)
    noise = torch.randn(2, 90, 32, generator=rng) * 0.1
    x = centres.gather(1, group[..., None].expand(-1, -1, 32)) + noise
    exact = reference.kmedoids(x.double(), 6, metric=metric)
    medoids, assignment = backend.run("kmedoids", x, 6, metric=metric)
    assert torch.equal(medoids, exact[0]) and torch.equal(assignment, exact[1])
    assert torch.equal(group.gather(1, medoids.long()).sort(1).values, torch.arange(6).expand(2, 6))


def test_a_medoid_is_the_middle_of_its_members(backend: Backend) -> None:
    """Points of a line: 0 1 5 | 20 21 22 30, and the masked one at 22."""
    x = torch.tensor([0.0, 1, 5, 20, 21, 22, 30, 22])[None, :, None]
    mask = torch.tensor([[True] * 7 + [False]])
    start = torch.tensor([[6, 0]]).int()
    medoids, assignment = backend.run("kmedoids", x, 2, 10, start, mask)
    assert medoids.tolist() == [[1, 4]]  # 21 and 22 have the sum 11: the lower number
    assert assignment.tolist() == [[0, 0, 0, 1, 1, 1, 1, -1]]


def published(x: Tensor, start: Tensor, metric: str, iterations: int) -> tuple[Tensor, Tensor]:
    """CenterCLIP's form: negative distances, and sums over all tokens of a masked [K, N, N]."""
    distance = pair_distances(x, metric)
    distance = distance - (distance.amax() + 1) - torch.eye(x.shape[1])
    medoids = start.long()
    for step in range(iterations + 1):
        to_medoid = distance.gather(2, medoids[:, None].expand(-1, x.shape[1], -1))
        assignment = to_medoid.argmin(-1)
        member = torch.nn.functional.one_hot(assignment, medoids.shape[1]).mT.double()
        if step < iterations:
            product = member[..., None] * member[:, :, None] * distance[:, None]
            medoids = product.sum(-2).argmin(-1)
    medoids, order = medoids.sort(-1)
    number = order.argsort(-1)
    return medoids, number.gather(1, assignment)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_published_form_is_the_same(backend: Backend, metric: str) -> None:
    """The arg-min over all tokens of the masked product is the one over the members."""
    x = torch.randn(3, 60, 16, generator=generator(6))
    start = torch.stack([torch.randperm(60, generator=generator(i))[:7] for i in range(3)]).int()
    medoids, assignment = backend.run("kmedoids", x, 7, 5, start, metric=metric)
    expected = published(x, start, metric, 5)
    assert torch.equal(medoids.long(), expected[0])
    assert torch.equal(assignment.long(), expected[1])


def test_numbers_that_are_not_finite_stay_alone(backend: Backend) -> None:
    x = torch.tensor([[0.0, 1], [1, 0], [0, 0], [9, 9], [10, 9]])[None].repeat(3, 1, 1)
    x[0, 2, 1], x[1, 2, 0], x[2, 2, 1] = torch.nan, torch.inf, -torch.inf
    start = torch.tensor([[2, 0, 4]] * 3).int()
    medoids, assignment = backend.run("kmedoids", x, 3, 5, start)
    assert medoids.tolist() == [[0, 3, -1]] * 3
    assert assignment.tolist() == [[0, 0, -1, 1, 1]] * 3


def test_items_stop_by_themselves(backend: Backend) -> None:
    x = torch.randn(3, 120, 4, generator=generator(9))
    x[1] = x[1, :1]
    start = torch.arange(5).int().expand(3, 5)
    both = backend.run("kmedoids", x, 5, 50, start)
    for item in range(3):
        one = slice(item, item + 1)
        alone = backend.run("kmedoids", x[one], 5, 50, start[one])
        assert_bitwise_equal(alone, [t[one] for t in both])
        less = backend.run("kmedoids", x[one], 5, 1, start[one])
        assert torch.equal(less[1], alone[1]) == (item == 1)


def test_views_equal_their_copies(kernels: Backend) -> None:
    x = torch.randn(50, 2, 24, generator=generator(1)).transpose(0, 1)[..., 3:19]
    mask = (torch.rand(2, 100, generator=generator()) < 0.8)[:, ::2]
    start = torch.randint(0, 50, (5, 2), generator=generator(2)).int().T
    views = (x, 5, 4, start, mask)
    copies = [t.contiguous() if isinstance(t, Tensor) else t for t in views]
    assert_bitwise_equal(kernels.run("kmedoids", *views), kernels.run("kmedoids", *copies))


BITWISE = [
    Case(5, 45, 33, 7),
    Case(3, 190, 20, 3, masked=True),
    Case(4, 60, 40, 18, metric="cosine"),
    Case(2, 200, 3, 1, distribution="duplicates"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_batch_and_backend_do_not_matter(kernels: Backend, case: Case, dtype: torch.dtype) -> None:
    """The same choices alone, and on every device: sums and ties have one order everywhere."""
    some = replace(case, dtype=dtype).inputs()
    whole = kernels.run("kmedoids", **some)
    assert_bitwise_equal(whole, tokred.kmedoids(**some), "against the CPU")
    for item in range(case.batch):
        one = slice(item, item + 1)
        part = {n: t[one] if isinstance(t, Tensor) else t for n, t in some.items()}
        alone = kernels.run("kmedoids", **part)
        assert_bitwise_equal(alone, [t[one] for t in whole], f"item {item} alone")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", [*BITWISE, Case(1, 600, 65, 20)], ids=label)
def test_isa_and_threads_do_not_matter(on_every_cpu, case: Case, dtype: torch.dtype) -> None:
    some = replace(case, dtype=dtype).inputs()
    assert_one_result(on_every_cpu(lambda: tokred.kmedoids(**some)))


def test_more_clusters_than_tokens(backend: Backend) -> None:
    """KKZ picks every token once."""
    x = torch.randn(2, 4, 3, generator=generator(2))
    medoids, assignment = backend.run("kmedoids", x, 6)
    assert medoids.tolist() == [[0, 1, 2, 3, -1, -1]] * 2
    assert assignment.tolist() == [[0, 1, 2, 3]] * 2


def test_results_never_require_grad() -> None:
    x = torch.randn(1, 9, 4, requires_grad=True)
    start = torch.arange(3).int()[None]
    assert not any(t.requires_grad for t in tokred.kmedoids(x, 3, start=start))
