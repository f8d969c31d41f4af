"""connected_components against the plain search, on grids whose components are known."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator

SPIRAL = """
#########
........#
#######.#
#.....#.#
#.###.#.#
#.#...#.#
#.#####.#
#.......#
#########
"""


def grid(rows: str) -> Tensor:
    """[1, H, W, 1]: 1 where there is a #."""
    return torch.tensor([[float(c == "#") for c in row] for row in rows.split()])[None, ..., None]


def search(x: Tensor, threshold: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Depth first from every token, by l2."""
    batch, height, width, _ = x.shape
    tokens, x = height * width, x.double()
    taken = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else mask
    position = torch.arange(tokens).view(height, width)
    right = (x[:, :, 1:] - x[:, :, :-1]).norm(dim=-1) < threshold
    below = (x[:, 1:] - x[:, :-1]).norm(dim=-1) < threshold
    labels = [[-1] * tokens for _ in range(batch)]
    counts = [0] * batch
    for b in range(batch):
        near: list[list[int]] = [[] for _ in range(tokens)]
        for joined, here, there in (
            (right[b], position[:, :-1], position[:, 1:]),
            (below[b], position[:-1], position[1:]),
        ):
            for i, j in zip(here[joined].tolist(), there[joined].tolist(), strict=True):
                near[i].append(j)
                near[j].append(i)
        for start in range(tokens):
            if labels[b][start] >= 0 or not taken[b, start]:
                continue
            waiting = [start]
            while waiting:
                at = waiting.pop()
                if labels[b][at] < 0 and taken[b, at]:
                    labels[b][at] = counts[b]
                    waiting += near[at]
            counts[b] += 1
    shape = (batch, tokens)
    return torch.tensor(labels, dtype=torch.int32).view(shape), torch.tensor(counts).int()


def patches(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Few different rows, so that distances are 0 or far from every threshold of the tests."""
    rng = generator(seed)
    kinds = torch.randint(-3, 4, (3, shape[-1]), generator=rng) * 2
    return kinds[torch.randint(0, 3, shape[:-1], generator=rng)].to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [(2, 5, 7, 8), (3, 1, 40, 3), (1, 33, 1, 70), (1, 23, 31, 5), (2, 4, 4, 0)],
    ids=str,
)
def test_labels(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = patches(*shape, dtype=dtype)
    mask = torch.rand(shape[0], shape[1] * shape[2], generator=generator(1)) < 0.8
    for chosen in (None, mask):
        expected = search(x, 0.5, chosen)
        assert_bitwise_equal(backend.run("connected_components", x, 0.5, "l2", chosen), expected)


def test_winding_components(backend: Backend) -> None:
    x = grid(SPIRAL)
    labels, counts = backend.run("connected_components", x, 1.0)
    assert_bitwise_equal((labels, counts), search(x, 1.0))
    assert int(counts) == 2


def test_the_threshold_is_not_joined(backend: Backend) -> None:
    x = torch.tensor([0.0, 1.0, 3.0]).view(1, 1, 3, 1)
    assert backend.run("connected_components", x, 1.0)[0].tolist() == [[0, 1, 2]]
    assert backend.run("connected_components", x, 2.0)[0].tolist() == [[0, 0, 1]]
    assert backend.run("connected_components", x, torch.inf)[0].tolist() == [[0, 0, 0]]
    assert backend.run("connected_components", x, 0.0)[1].tolist() == [3]


def test_cosine(backend: Backend) -> None:
    x = torch.tensor([[1.0, 0], [5, 0.1], [0, 2], [0, 0], [0, 0], [-1, 0]]).view(1, 1, 6, 2)
    assert backend.run("connected_components", x, 0.5, "cosine")[0].tolist() == [[0, 0, 1, 2, 3, 4]]
    assert backend.run("connected_components", x, 1.5, "cosine")[0].tolist() == [[0] * 6]


def test_nan_joins_nothing(backend: Backend) -> None:
    x = torch.zeros(1, 1, 4, 2)
    x[0, 0, 1, 0] = torch.nan
    for metric in ("l2", "cosine"):
        labels, counts = backend.run("connected_components", x, 5.0, metric)
        assert (labels.tolist(), counts.tolist()) == ([[0, 1, 2, 2]], [3])


@pytest.mark.parametrize("shape", [(0, 3, 3, 2), (2, 0, 3, 2), (2, 3, 0, 2), (2, 1, 1, 2)], ids=str)
def test_small_grids(backend: Backend, shape: tuple[int, ...]) -> None:
    labels, counts = backend.run("connected_components", torch.zeros(shape), 1.0)
    assert labels.shape == (shape[0], shape[1] * shape[2])
    assert not labels.any() and bool((counts == int(labels.shape[1] > 0)).all())


def test_all_masked(backend: Backend) -> None:
    mask = torch.zeros(2, 6, dtype=torch.bool)
    labels, counts = backend.run("connected_components", torch.zeros(2, 2, 3, 4), 1.0, "l2", mask)
    assert bool((labels == -1).all()) and not counts.any()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_batch_and_strides(kernels: Backend, metric: str) -> None:
    x = torch.randn(3, 9, 14, 24, generator=generator(3)).half()
    threshold = 6.2 if metric == "l2" else 0.8
    find = partial(kernels.run, "connected_components", threshold=threshold, metric=metric)
    whole = find(x)
    assert int(whole[1].min()) > 3 and int(whole[1].max()) < 100
    views = {
        "whole": x,
        "columns first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "unaligned": torch.nn.functional.pad(x, (1, 2))[..., 1:25],
    }
    assert_one_result({name: find(view) for name, view in views.items()})
    for b in range(3):
        assert_bitwise_equal(find(x[b : b + 1]), [t[b : b + 1] for t in whole])
