"""Merging along the trees of a forest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import check_tensor
from ..placements import sharded
from ..registration import choose, not_differentiable
from .maps import merge

_ops = torch.ops.tokred


def forest_roots(parent: Tensor) -> tuple[Tensor, Tensor]:
    """The root of every token's tree, and how many children each token has.

    Args:
        parent: int32 [B, N]; a token whose entry lies outside [0, N), such as -1, is a root.

    Returns:
        root int32 [B, N], a token map onto positions; children int32 [B, N], the number of tokens
        whose parent a token is.

    Raises:
        ValueError: parent is no int32 [B, N]; on the CPU also where it has a cycle, naming item
            and token. On devices, which report nothing back, tokens in a cycle and those that lead
            into one have root -1, so that `merge` drops them.

    Complexity: O(B N) on the CPU, O(B N log depth) on devices.
    """
    return choose(_ops.forest_roots.default, parent)


def forest_merge(
    x: Tensor, parent: Tensor, size: Tensor | None = None, reference_compat: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges every tree of a forest into its root: x [B, N, C] to the same shape.

    y[b, r] is the size-weighted mean over the tree of root r: FlashVID's merging along
    spatio-temporal trees (arXiv:2602.08024), whose tokens point to their match in the frame before.

    Args:
        x: [B, N, C] float32, float16, bfloat16, or float64 on the CPU; channels contiguous.
        parent: int32 [B, N], as in `forest_roots`.
        size: [B, N] float32 (float64 if x is float64): how many tokens each token already stands
            for.
        reference_compat: divide the sum over the tree by 1 + the number of the root's own children,
            as FlashVID's code does, so that trees of depth 2 and more become too long. It takes no
            sizes.

    Returns:
        y [B, N, C] in the dtype of x, 0 where a token is no root; size float32 [B, N], the sizes of
        the trees (with reference_compat the divisors), 0 where a token is no root; root int32
        [B, N], which `unmerge` takes. Differentiable in x and size.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit; cycles
            as in `forest_roots`.
        ValueError: size beside reference_compat.

    Complexity: O(B N C), and that of `forest_roots`.
    """
    check_tensor("x", x)
    root, children = forest_roots(parent)
    if not reference_compat:
        return *merge(x, root, x.shape[1], size, mode="mean"), root
    if size is not None:
        raise ValueError("size must be None with reference_compat, which counts children")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    divisor = 1 + children.to(dtype)
    weight = 1 / divisor.gather(1, root.clamp_min(0).long())
    y, _ = merge(x, root, x.shape[1], None, weight, "sum")
    return y, torch.where(root == _positions(root), divisor, 0), root


def _positions(root: Tensor) -> Tensor:
    return torch.arange(root.shape[1], dtype=torch.int32, device=root.device)


@torch.library.register_fake("tokred::forest_roots")
def _forest_roots_fake(parent: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(parent.dim() == 2, lambda: f"parent must be [B, N], got {parent.dim()}-D")
    return parent.new_empty(parent.shape), parent.new_empty(parent.shape)


not_differentiable("forest_roots")
sharded("forest_roots", "parent bn -> bn, bn")
