"""dpc_knn against its oracle, on rows whose distances are exact or well apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator


def whole(*shape: int, seed: int = 0, high: int = 9) -> Tensor:
    """Small integers, whose distances are exact in any order of summation, with many ties."""
    return torch.randint(0, high, shape, generator=generator(seed)).float()


def groups(batch: int, count: int, size: int, channels: int, seed: int = 0) -> Tensor:
    """Groups of tokens, far apart from each other, in turns: token i is of group i % count."""
    rng = generator(seed)
    middle = torch.randn(batch, 1, count, channels, generator=rng) * 20
    x = middle + torch.randn(batch, size, count, channels, generator=rng) * 0.3
    return x.flatten(1, 2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "clusters", "k"),
    [
        ((2, 37, 8), 9, 5),
        ((1, 100, 3), 20, 7),
        ((3, 16, 70), 4, 1),
        ((1, 70, 17), 70, 40),
        ((2, 5, 4), 8, 9),
    ],
    ids=str,
)
def test_equals_the_oracle(
    backend: Backend, shape: tuple[int, ...], clusters: int, k: int, dtype: torch.dtype
) -> None:
    x = whole(*shape).to(dtype)
    mask = torch.rand(shape[:2], generator=generator(1)) < 0.8
    for chosen in (None, mask):
        expected = tokred.reference.dpc_knn(x.double(), clusters, k, chosen)
        actual = backend.run("dpc_knn", x, clusters, k, chosen)
        assert_bitwise_equal(actual[1], tokred.reference.dpc_knn(x, clusters, k, chosen)[1])
        assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("scale", [1, 20])
def test_formula(backend: Backend, scale: float) -> None:
    """As published, on tokens without ties: cdist / sqrt(C), exp(-mean of k squares), arg-max.

    At the larger scale the densities are 0 in float32, but not here.
    """
    x = torch.randn(2, 60, 12, generator=generator(5)) * scale
    distance = torch.cdist(x.double(), x.double()) / 12**0.5
    density = (-distance.topk(5, largest=False).values.square().mean(-1)).exp()
    assert bool((density.float() == 0).any()) == (scale > 1)
    lower = density[:, None] > density[:, :, None]
    furthest = distance.flatten(1).amax(1)[:, None, None]
    delta = torch.where(lower, distance, furthest).amin(-1)
    centers = (density * delta).topk(10).indices
    assignment = distance.gather(1, centers[..., None].expand(-1, -1, 60)).argmin(1)
    assignment.scatter_(1, centers, torch.arange(10).expand(2, -1))
    actual = backend.run("dpc_knn", x, 10)
    assert actual[0].tolist() == centers.tolist()
    assert actual[1].tolist() == assignment.tolist()


def test_finds_groups(backend: Backend) -> None:
    x = groups(2, 5, 9, 24)
    centers, assignment = backend.run("dpc_knn", x, 5)
    for b in range(2):
        assert sorted((centers[b] % 5).tolist()) == list(range(5))
        assert (centers[b, assignment[b].long()] % 5).tolist() == [i % 5 for i in range(45)]


def test_duplicates(backend: Backend) -> None:
    """Equal rows tie everywhere: the first of each is its centre, and the result is the same."""
    rows = whole(6, 10, seed=2)
    x = rows.repeat(4, 1)[None]
    centers, assignment = backend.run("dpc_knn", x, 6, 3)
    assert sorted(centers[0].tolist()) == list(range(6))
    assert (x[0, centers[0, assignment[0].long()].long()] == x[0]).all()
    centers, assignment = backend.run("dpc_knn", torch.ones(1, 20, 4), 5)
    assert centers.tolist() == [[0, 1, 2, 3, 4]]
    assert assignment.tolist() == [[0, 1, 2, 3, 4] + [0] * 15]


def test_edges(backend: Backend) -> None:
    x = whole(3, 20, 6)
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[1, 7] = mask[2, 3:8] = True
    centers, assignment = backend.run("dpc_knn", x, 7, 5, mask)
    assert centers[0].tolist() == [-1] * 7 and (assignment[0] == -1).all()
    assert centers[1].tolist() == [7] + [-1] * 6
    assert assignment[1].tolist() == [-1] * 7 + [0] + [-1] * 12
    assert sorted(centers[2].tolist()) == [-1, -1, *range(3, 8)]
    assert (assignment[2] >= 0).tolist() == mask[2].tolist()
    centers, assignment = backend.run("dpc_knn", x, 0)
    assert centers.shape == (3, 0) and (assignment == -1).all()
    for shape in ((0, 4, 2), (2, 0, 2)):
        centers, assignment = backend.run("dpc_knn", torch.zeros(shape), 3)
        assert centers.tolist() == [[-1] * 3] * shape[0] and assignment.shape == shape[:2]
    assert backend.run("dpc_knn", x[:, :1], 2)[0].tolist() == [[0, -1]] * 3
    assert backend.run("dpc_knn", x[..., :0], 2)[0].tolist() == [[0, 1]] * 3


def test_what_is_not_finite_is_left_out(backend: Backend) -> None:
    x = whole(1, 30, 5)
    x[0, 4, 1], x[0, 11, 0], x[0, 20, 2] = torch.nan, torch.inf, 3e30
    mask = torch.ones(1, 30, dtype=torch.bool)
    mask[0, [4, 11, 20]] = False
    actual = backend.run("dpc_knn", x, 6)
    assert_bitwise_equal(actual, backend.run("dpc_knn", x.nan_to_num(0, 0, 0), 6, 5, mask))


def test_batch_strides_and_threads(kernels: Backend) -> None:
    x = torch.randn(3, 90, 24, generator=generator(6))
    mask = torch.rand(3, 90, generator=generator(7)) < 0.9
    expected = kernels.run("dpc_knn", x, 20, 5, mask)
    views = {
        "whole": x,
        "tokens first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "unaligned": torch.nn.functional.pad(x, (1, 2))[..., 1:25],
    }
    assert_one_result({n: kernels.run("dpc_knn", v, 20, 5, mask) for n, v in views.items()})
    for b in range(3):
        alone = kernels.run("dpc_knn", x[b : b + 1], 20, 5, mask[b : b + 1])
        assert_bitwise_equal(alone, [t[b : b + 1] for t in expected])


def test_threads_share_a_large_item(processors: Backend) -> None:
    x = torch.randn(1, 600, 64, generator=generator(8))
    first = processors.run("dpc_knn", x, 50)
    torch.set_num_threads(3)
    assert_bitwise_equal(processors.run("dpc_knn", x, 50), first)
    expected = tokred.reference.dpc_knn(x.double(), 50)
    assert (first[0] == expected[0]).float().mean() > 0.9
