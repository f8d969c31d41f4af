"""Grouping of tokens.

components: the patches of a screenshot that are nearly equal, beside torch's distances and scipy's
search for components, which needs the CPU. kmeans: ten rounds from the same start, beside
scikit-learn, which needs the CPU, and torch's distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

import tokred

from .harness import Case, tokens
from .machine import Run


def screen(batch: int, height: int, width: int, channels: int, device: str) -> Tensor:
    """Patches of windows of one colour, and some text."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(height // 4 + 1, width // 4 + 1, channels, generator=generator)
    x = colours.repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width]
    text = torch.rand(batch, height, width, 1, generator=generator) < 0.2
    noise = torch.randn(batch, height, width, channels, generator=generator)
    return torch.where(text, noise, x).to(device)


def torch_edges(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    right = (x[:, :, 1:] - x[:, :, :-1]).norm(dim=-1) < threshold
    below = (x[:, 1:] - x[:, :-1]).norm(dim=-1) < threshold
    return right, below


def scipy_components(x: Tensor, threshold: float) -> list[tuple]:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    right, below = (edges.cpu() for edges in torch_edges(x, threshold))
    batch, height, width, _ = x.shape
    position = torch.arange(height * width).view(height, width)
    results = []
    for item in range(batch):
        first = torch.cat([position[:, :-1][right[item]], position[:-1][below[item]]]).numpy()
        second = torch.cat([position[:, 1:][right[item]], position[1:][below[item]]]).numpy()
        graph = coo_array((first >= 0, (first, second)), shape=(height * width, height * width))
        results.append(connected_components(graph, directed=False))
    return results


def components_case(shape: tuple[int, int, int, int], device: str) -> Case:
    def build() -> dict[str, Callable]:
        x = screen(*shape, device)
        candidates = {"torch, distances only": partial(torch_edges, x, 1.0)}
        if find_spec("scipy"):
            candidates["torch + scipy"] = partial(scipy_components, x, 1.0)
        ours = partial(tokred.connected_components, x, 1.0)
        return {"tokred.connected_components": ours, **candidates}

    batch, height, width, channels = shape
    return Case(
        "cluster",
        "components",
        shape,
        "float32",
        build,
        "windows",
        bytes_moved=batch * height * width * (channels + 1) * 4,
        ceiling="read",
        floors=("torch, distances only",),
    )


ROUNDS = 10


def torch_kmeans(x: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of all pairs, and one_hot sums."""
    centroids = start
    for step in range(ROUNDS + 1):
        score = x @ centroids.mT - centroids.square().sum(-1)[:, None] / 2
        assignment = score.argmax(-1)
        if step < ROUNDS:
            index = assignment[..., None].expand_as(x)
            count = torch.zeros_like(start[..., 0]).scatter_add_(
                1, assignment, torch.ones_like(x[..., 0])
            )
            sums = torch.zeros_like(start).scatter_add_(1, index, x)
            mean = sums / count.clamp(min=1)[..., None]
            centroids = torch.where((count > 0)[..., None], mean, centroids)
    return centroids, assignment


def sklearn_kmeans(x: Tensor, start: Tensor) -> list:
    from sklearn.cluster import KMeans

    settings = {"n_init": 1, "max_iter": ROUNDS, "tol": 0, "algorithm": "lloyd"}
    return [
        KMeans(start.shape[1], init=start[b].numpy(), **settings).fit(x[b].numpy()).labels_
        for b in range(len(x))
    ]


def kmeans_case(shape: tuple[int, int, int], clusters: int, distribution: str, device: str) -> Case:
    batch, count, channels = shape

    def build() -> dict[str, Callable]:
        x = tokens(shape, "float32", device, distribution)
        start = x[:, :: count // clusters][:, :clusters].contiguous()
        candidates = {"torch": partial(torch_kmeans, x, start)}
        if device == "cpu" and find_spec("sklearn"):
            candidates["scikit-learn"] = partial(sklearn_kmeans, x, start)
        return {"tokred.kmeans": partial(tokred.kmeans, x, clusters, ROUNDS, start), **candidates}

    return Case(
        "cluster",
        "kmeans",
        (*shape, clusters),
        "float32",
        build,
        distribution,
        bytes_moved=batch * (count + clusters) * channels * 4 * (ROUNDS + 1),
        flops=2 * batch * count * clusters * channels * (ROUNDS + 1),
        ceiling="gemm_float32",
    )


def cases(run: Run) -> Iterator[Case]:
    yield components_case((4, 48, 86, 1176), run.device)
    yield kmeans_case((1, 65536, 64), 256, "randn", run.device)
    yield kmeans_case((16, 1024, 64), 64, "correlated", run.device)
