"""local_soft_kmeans against the published formula in float64, and bit by bit against itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

import tokred
from cases.backends import Backend
from cases.compare import assert_as_accurate, assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label
from cases.oracle import reference


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int = 2
    grid: tuple[int, int] = (9, 11)
    clusters: tuple[int, int] = (3, 4)
    channels: int = 24
    dtype: torch.dtype = torch.float32
    iterations: int = 3
    temperature: float = 0.05
    window: int = 3
    spoiled: bool = False

    def inputs(self) -> dict[str, Any]:
        rng = generator(self.channels)
        tokens = self.grid[0] * self.grid[1]
        x = torch.randn(self.batch, tokens, self.channels, generator=rng)
        if self.spoiled:
            x[0, 3, 1], x[1, 5, 0] = torch.nan, torch.inf
        return {
            "x": x.to(self.dtype),
            "grid": self.grid,
            "clusters": self.clusters,
            "iterations": self.iterations,
            "temperature": self.temperature,
            "window": self.window,
        }


SIZES = [
    Case(),
    Case(1, (1, 1), (1, 1), 1),
    Case(1, (12, 12), (6, 6), 40, window=7),
    Case(1, (8, 5), (8, 5), 130, window=5),
    Case(2, (7, 3), (2, 3), 17, window=1),
    Case(1, (10, 10), (4, 4), 8, iterations=0),
    Case(2, (6, 6), (3, 3), 0),
    Case(2, (0, 5), (0, 2), 8),
    Case(2, (4, 5), (0, 2), 8),
    Case(0, (4, 5), (2, 2), 8),
]
CASES = [
    *(replace(case, dtype=dtype) for case in SIZES for dtype in FLOATS),
    Case(temperature=0.0),
    Case(temperature=3.0),
    Case(spoiled=True),
]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    some = case.inputs()
    centroids, assignment = backend.run("local_soft_kmeans", **some)
    assert centroids.dtype == torch.float32 and assignment.dtype == torch.int32
    exact = reference.local_soft_kmeans(**some | {"x": some["x"].double()})
    plain = reference.local_soft_kmeans(**some | {"x": some["x"].float()})
    assert_as_accurate(centroids, exact[0], plain[0], 2e-6 * (1 + case.temperature))
    if not centroids.numel():
        assert torch.equal(assignment, exact[1])
        return
    usable = some["x"].isfinite().all(-1)
    assert torch.equal(assignment >= 0, usable)
    distance = (some["x"].double()[:, :, None] - centroids.double()[:, None]).square().sum(-1)
    chosen = distance.gather(2, assignment.clamp(min=0).long()[..., None])[..., 0]
    assert (chosen - distance.amin(-1) <= 1e-4)[usable].all()


def published(x: Tensor, grid: tuple, clusters: tuple, steps: int, temperature: float, window: int):
    """Expediting ViT's formula: distance^2 + 1e16 outside the window, softmax over centroids."""
    batch, _, channels = x.shape
    image = x.mT.reshape(batch, channels, *grid)
    centroids = adaptive_avg_pool2d(image, clusters).flatten(2).mT
    place = torch.stack(
        torch.meshgrid(*(torch.arange(n) for n in clusters), indexing="ij")
    ).double()
    cell = interpolate(place[None], size=grid, mode="nearest")[0].flatten(1)
    hidden = ((cell[:, :, None] - place.flatten(1)[:, None]).abs() > window // 2).any(0)
    for _ in range(steps):
        distance = torch.cdist(x, centroids).square() + hidden * 1e16
        weight = (-distance * temperature).softmax(-1)
        centroids = weight.mT @ x / weight.sum(1).clamp(min=1e-16)[..., None]
    return centroids, torch.cdist(x, centroids).argmin(-1)


def test_the_published_formula(backend: Backend) -> None:
    x = torch.randn(2, 120, 16, generator=generator(3))
    shape = ((10, 12), (5, 4))
    expected = published(x.double(), *shape, 5, 0.05, 3)
    centroids, assignment = backend.run("local_soft_kmeans", x, *shape, 5, 0.05, 3)
    torch.testing.assert_close(centroids.double(), expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(assignment.long(), expected[1])


def test_views_equal_their_copies(kernels: Backend) -> None:
    x = torch.randn(40, 2, 24, generator=generator(1)).transpose(0, 1)[..., 3:19]
    options = ((5, 8), (2, 3), 2, 0.1, 3)
    views = kernels.run("local_soft_kmeans", x, *options)
    assert_bitwise_equal(views, kernels.run("local_soft_kmeans", x.contiguous(), *options))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_batch_does_not_matter(kernels: Backend, dtype: torch.dtype) -> None:
    some = Case(3, dtype=dtype).inputs()
    whole = kernels.run("local_soft_kmeans", **some)
    for item in range(3):
        one = slice(item, item + 1)
        alone = kernels.run("local_soft_kmeans", **some | {"x": some["x"][one]})
        assert_bitwise_equal(alone, [t[one] for t in whole], f"item {item} alone")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_isa_and_threads_do_not_matter(on_every_cpu, dtype: torch.dtype) -> None:
    some = Case(2, (20, 13), (5, 5), 70, dtype).inputs()
    assert_one_result(on_every_cpu(lambda: tokred.local_soft_kmeans(**some)))
