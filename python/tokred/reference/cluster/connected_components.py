"""Connected components of a grid, in plain torch: labels spread until nothing changes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..match import NORM_EPS


def _distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    if metric == "l2":
        return (a - b).norm(dim=-1)
    norms = [t.norm(dim=-1).clamp(min=NORM_EPS) for t in (a, b)]
    return 1 - (a * b).sum(-1) / norms[0] / norms[1]


def connected_components(
    x: Tensor, threshold: float, metric: str = "l2", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See tokred.connected_components."""
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric {metric!r} is not one of tokred.connected_components's")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    batch, height, width, _ = x.shape
    tokens = height * width
    position = torch.arange(tokens, device=x.device).view(height, width).expand(batch, -1, -1)
    taken = torch.ones_like(position, dtype=torch.bool)
    if mask is not None:
        taken = mask.view(batch, height, width)
    right = (_distance(x[:, :, :-1], x[:, :, 1:], metric) < threshold) & taken[:, :, :-1]
    below = (_distance(x[:, :-1], x[:, 1:], metric) < threshold) & taken[:, :-1]
    right, below = right & taken[:, :, 1:], below & taken[:, 1:]

    root = position.clone()
    while True:
        before = root.clone()
        for near, here, there in (
            (right, root[:, :, :-1], root[:, :, 1:]),
            (below, root[:, :-1], root[:, 1:]),
        ):
            here.copy_(torch.where(near, torch.minimum(here, there), here))
            there.copy_(torch.where(near, torch.minimum(here, there), there))
        if torch.equal(before, root):
            break
    first = ((root == position) & taken).flatten(1)
    number = first.cumsum(1) - 1
    labels = number.gather(1, root.flatten(1)).masked_fill(~taken.flatten(1), -1)
    return labels.int(), first.sum(1).int()
