"""Grouping of tokens.

components: the patches of a screenshot that are nearly equal, beside torch's distances and scipy's
search for components, which needs the CPU. kmeans: ten rounds from the same start, beside
scikit-learn, which needs the CPU, and torch's distances. select: greedy selection beside loops in
torch, by differences and by products, and torch-fps, from the same first token. kmedoids: three
rounds beside the sums of a masked [B, K, N, N]. local_soft_kmeans, knn_reconstruct: features of 64
by 64 patches to 20 by 20 centroids and back, beside all distances in torch. dpc_knn: beside
torch with the matrix of distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

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


def torch_select(x: Tensor, k: int, products: bool) -> Tensor:
    """Farthest points by l2 from token 0, all items at once."""
    items = torch.arange(len(x), device=x.device)
    picked = torch.zeros(len(x), k, dtype=torch.long, device=x.device)
    nearest = x.new_full(x.shape[:2], torch.inf)
    norm = x.square().sum(-1)
    for i in range(1, k):
        token = picked[:, i - 1]
        row = x[items, token]
        if products:
            dot = torch.bmm(x, row[..., None])[..., 0]
            apart = norm + norm[items, token][:, None] - 2 * dot
        else:
            apart = (x - row[:, None]).square().sum(-1)
        nearest = torch.minimum(nearest, apart)
        picked[:, i] = nearest.argmax(-1)
    return picked


def torch_facility(x: Tensor, k: int) -> Tensor:
    """Facility location with the similarities stored."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    similarity = unit @ unit.mT
    covered = torch.zeros_like(similarity[..., 0])
    items = torch.arange(len(x), device=x.device)
    picked = torch.zeros(len(x), k, dtype=torch.long, device=x.device)
    for i in range(k):
        gain = (similarity - covered[..., None]).clamp_(min=0).sum(1)
        picked[:, i] = gain.scatter_(1, picked[:, :i], -1).argmax(-1)
        covered = torch.maximum(covered, similarity[items, picked[:, i]])
    return picked


def same_picks(outputs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many first picks agree with the first candidate's; rounding may part them later."""
    expected = next(iter(outputs.values())).long()
    agree = {name: (out.long() == expected).cumprod(1).float() for name, out in outputs.items()}
    if any(float(a[:, :4].min()) < 1 for a in agree.values()):
        raise RuntimeError("the first four picks differ")
    return {name: {"agreeing": float(a.mean())} for name, a in agree.items()}


def select_case(shape: tuple[int, int, int], k: int, rule: str, device: str) -> Case:
    batch, tokens, channels = shape

    def build() -> dict[str, Callable]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        if rule == "facility":
            ours = partial(tokred.greedy_select, x, k, rule)
            return {"tokred.greedy_select": ours, "torch": partial(torch_facility, x, k)}
        candidates: dict[str, Callable] = {
            "tokred.greedy_select": partial(tokred.greedy_select, x, k, metric="l2"),
            "torch loop": partial(torch_select, x, k, False),
            "torch loop, products": partial(torch_select, x, k, True),
        }
        if find_spec("torch_fps"):
            import torch_fps

            everything = torch.ones(batch, tokens, dtype=torch.bool, device=device)
            first = torch.zeros(batch, dtype=torch.long, device=device)
            candidates["torch-fps"] = partial(
                torch_fps.farthest_point_sampling, x, everything, k, start_idx=first
            )
        return candidates

    return Case(
        "cluster",
        f"select {rule}",
        (*shape, k),
        "float32",
        build,
        flops=2 * batch * tokens * k * channels if rule == "kcenter" else 0,
        ceiling="gemm_float32" if rule == "kcenter" else "",
        examine=same_picks,
    )


def masked_product(x: Tensor, start: Tensor, rounds: int) -> Tensor:
    """CenterCLIP's k-medoids: negative distances, and sums over a masked [B, K, N, N]."""
    distance = torch.cdist(x, x)
    distance = distance - (distance.amax() + 1) - torch.eye(x.shape[1], device=x.device)
    medoids = start.long()
    for _ in range(rounds):
        nearest = distance.gather(2, medoids[:, None].expand(-1, x.shape[1], -1)).argmin(-1)
        member = torch.nn.functional.one_hot(nearest, medoids.shape[1]).mT.to(x.dtype)
        product = member[..., None] * member[:, :, None] * distance[:, None]
        medoids = product.sum(-2).argmin(-1)
    return medoids


def kmedoids_case(shape: tuple[int, int, int], clusters: int, device: str) -> Case:
    batch, count, channels = shape
    rounds = 3

    def build() -> dict[str, Callable]:
        x = tokens(shape, "float32", device, "correlated")
        start = torch.arange(clusters, device=device).int().expand(batch, clusters) * 4
        return {
            "tokred.kmedoids": partial(tokred.kmedoids, x, clusters, rounds, start),
            "torch, masked product": partial(masked_product, x, start, rounds),
        }

    return Case(
        "cluster",
        "kmedoids",
        (*shape, clusters),
        "float32",
        build,
        "correlated",
        bytes_moved=batch * count * channels * 4 * (rounds + 1),
        flops=batch * count * channels * (2 * clusters * (rounds + 1) + 3 * count // clusters),
        ceiling="gemm_float32",
    )


def expedite_case(side: int, cells: int, channels: int, device: str) -> Iterator[Case]:
    """Clustering of a grid of features, and their reconstruction, as the release computes them."""
    grid, clusters, count = (side, side), (cells, cells), side * side
    pairs = count * cells * cells

    def visible(x: Tensor) -> Tensor:
        cell = torch.arange(side, device=x.device) * cells // side
        near = (cell[:, None] - torch.arange(cells, device=x.device)).abs() <= 3
        return (near[:, None, :, None] & near[None, :, None, :]).reshape(count, cells * cells)

    def torch_clusters(x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        image = x.mT.reshape(1, channels, *grid)
        centroids = torch.nn.functional.adaptive_avg_pool2d(image, clusters).flatten(2).mT
        for _ in range(5):
            distance = torch.cdist(x, centroids).square() + hidden
            weight = (-0.05 * distance).softmax(-1)
            centroids = weight.mT @ x / weight.sum(1).clamp(min=1e-16)[..., None]
        return centroids, torch.cdist(x, centroids).argmin(-1)

    def torch_reconstruction(deep: Tensor, x: Tensor, centroids: Tensor) -> Tensor:
        weight = (-0.05 * torch.cdist(x, centroids).square()).exp()
        kept = torch.where(weight >= weight.topk(3, dim=-1).values[..., -1:], weight, 0)
        return torch.nn.functional.normalize(kept, dim=2) @ deep

    def build_clusters() -> dict[str, Callable]:
        x = tokens((1, count, channels), "float32", device, "correlated")
        hidden = (~visible(x)).float() * 1e16
        return {
            "tokred.local_soft_kmeans": partial(tokred.local_soft_kmeans, x, grid, clusters),
            "torch": partial(torch_clusters, x, hidden),
        }

    def build_reconstruction() -> dict[str, Callable]:
        x = tokens((1, count, channels), "float32", device, "correlated")
        deep = tokens((1, cells * cells, channels), "float32", device, seed=1)
        centroids, _ = tokred.local_soft_kmeans(x, grid, clusters)
        return {
            "tokred.knn_reconstruct": partial(tokred.knn_reconstruct, deep, x, centroids),
            "torch": partial(torch_reconstruction, deep, x, centroids),
        }

    shape = (1, count, channels, cells * cells)
    for name, build, flops in (
        ("local_soft_kmeans", build_clusters, channels * (5 * 5 * count * 49 + 2 * pairs)),
        ("knn_reconstruct", build_reconstruction, channels * (3 * pairs + 6 * count)),
    ):
        moved = count * channels * (24 if name == "local_soft_kmeans" else 8)
        yield Case(
            "cluster",
            name,
            shape,
            "float32",
            build,
            "correlated",
            bytes_moved=moved,
            flops=flops,
            ceiling="gemm_float32",
        )


def torch_dpc_knn(x: Tensor, clusters: int, k: int) -> tuple[Tensor, Tensor]:
    """As published, with the matrix of distances stored, but without noise."""
    distance = torch.cdist(x, x) / x.shape[2] ** 0.5
    density = (-distance.topk(k, largest=False).values.square().mean(-1)).exp()
    denser = density[:, None] > density[:, :, None]
    furthest = distance.flatten(1).amax(1)[:, None, None]
    delta = torch.where(denser, distance, furthest).amin(-1)
    centers = (density * delta).topk(clusters).indices
    columns = centers[:, None].expand(-1, x.shape[1], -1)
    assignment = distance.gather(2, columns).argmin(2)
    places = torch.arange(clusters, device=x.device).expand(len(x), -1)
    return centers, assignment.scatter_(1, centers, places)


def same_centers(outputs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The share of centres that agree with the first candidate's."""
    expected = next(iter(outputs.values()))[0].long()
    agree = {
        name: float((out[0][..., None] == expected[:, None]).any(2).float().mean())
        for name, out in outputs.items()
    }
    if min(agree.values()) < 0.9:
        raise RuntimeError(f"the centres differ: {agree}")
    return {name: {"agreeing": share} for name, share in agree.items()}


def dpc_knn_case(shape: tuple[int, int, int], clusters: int, device: str) -> Case:
    batch, tokens, channels = shape

    def build() -> dict[str, Callable]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        return {
            "tokred.dpc_knn": partial(tokred.dpc_knn, x, clusters, 5),
            "torch": partial(torch_dpc_knn, x, clusters, 5),
        }

    return Case(
        "cluster",
        "dpc_knn",
        (*shape, clusters),
        "float32",
        build,
        flops=batch * tokens * channels * (tokens + 2 * clusters),
        ceiling="gemm_float32",
        examine=same_centers,
    )


def cases(run: Run) -> Iterator[Case]:
    yield components_case((4, 48, 86, 1176), run.device)
    yield kmeans_case((1, 65536, 64), 256, "randn", run.device)
    yield kmeans_case((16, 1024, 64), 64, "correlated", run.device)
    yield dpc_knn_case((32, 729, 1152), 128, run.device)
    yield select_case((16, 1024, 64), 256, "kcenter", run.device)
    yield select_case((4, 576, 64), 64, "facility", run.device)
    if not run.quick:
        yield select_case((1, 65536, 64), 1024, "kcenter", run.device)
    yield kmedoids_case((4, 588, 512), 49, run.device)
    yield from expedite_case(64, 20, 256, run.device)
