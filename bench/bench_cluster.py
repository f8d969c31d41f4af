"""Grouping of tokens.

components: the patches of a screenshot that are nearly equal, beside torch's distances and scipy's
search for components, which needs the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

import tokred

from .harness import Case
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


def cases(run: Run) -> Iterator[Case]:
    yield components_case((4, 48, 86, 1176), run.device)
