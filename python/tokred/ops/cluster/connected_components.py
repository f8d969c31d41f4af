"""Connected components of a grid of tokens: wrapper and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..placements import sharded
from ..registration import choose, not_differentiable

_ops = torch.ops.tokred


def connected_components(
    x: Tensor, threshold: float, metric: str = "l2", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Groups neighbouring tokens of a grid that are nearly equal.

    A token is joined to its right and to its lower neighbour where their distance is less than the
    threshold; the groups are the connected components. ShowUI (arXiv:2411.17465) keeps a share of
    the patches of each component of a screenshot.

    Args:
        x: [B, H, W, C] float32, float16 or bfloat16, channels contiguous.
        threshold: not NaN; compared in float32.
        metric: "l2", |a - b|, or "cosine", 1 - cos(a, b), where a row of zeros has cosine 0.
        mask: bool [B, H * W]; False takes a token out.

    Returns:
        labels int32 [B, H * W]: components are numbered by the position of their first member, row
        by row; -1 for masked tokens. counts int32 [B], components. NaN joins nothing. Not
        differentiable.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: two distances a token, and unions that are all but linear in their number.
    """
    return choose(_ops.connected_components.default, x, threshold, metric, mask)


@torch.library.register_fake("tokred::connected_components")
def _connected_components_fake(
    x: Tensor, threshold: float, metric: str = "l2", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 4, lambda: f"x must be [B, H, W, C], got {x.dim()}-D")
    batch, height, width, _ = x.shape
    labels = x.new_empty((batch, height * width), dtype=torch.int32)
    return labels, x.new_empty((batch,), dtype=torch.int32)


not_differentiable("connected_components")
sharded("connected_components", "x byxc, mask bn -> bn, b")
