"""linear_assignment: wrapper and fake kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..placements import sharded
from ..registration import choose, not_differentiable

__all__ = ["LinearAssignment", "linear_assignment"]

_ops = torch.ops.tokred


class LinearAssignment(NamedTuple):
    """What `linear_assignment` returns: index [B, N], row_dual [B, N], column_dual [B, M]."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    row_dual: Tensor
    column_dual: Tensor


def linear_assignment(cost: Tensor, maximize: bool = False, check: bool = True) -> LinearAssignment:
    """Pairs rows and columns one to one at minimum total cost; exact, with dual prices as proof.

    There are min(N, M) pairs: every row of a wide matrix gets a column, every column of a tall one
    a row. The method is that of Jonker and Volgenant (Computing 38, 1987): shortest augmenting
    paths with dual prices. The duals prove the result: u_i + v_j <= c_ij (>= with `maximize`) for
    all pairs, equal for those chosen, and 0 for what is left over, so that their sum is the total
    cost. All this holds up to the rounding of float64, and exactly for integers.

    Where several assignments cost the same, one is returned, the same in any batch and with any
    number of threads; a device may return another than the CPU.

    Args:
        cost: [B, N, M] float32, float16 or bfloat16 (or float64 on the CPU), columns contiguous;
            N and M up to 2^24. inf forbids a pair (-inf with `maximize`). float64 costs are below
            2^960.
        maximize: find the maximum total instead.
        check: on the CPU, raise where a cost is NaN or inf of the other sign, or where the
            forbidden pairs leave no assignment. A CUDA device never raises, because the host would
            have to wait for it: there, and with check=False, all rows of such an item get -1 and
            its duals are NaN.

    Returns:
        LinearAssignment: index int32 [B, N], the column of every row, -1 where there is none;
        row_dual u float64 [B, N] and column_dual v float64 [B, M]. Not differentiable.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit, or the item,
            row and column of a cost, as said under `check`.

    Complexity: O(min(N, M)^2 max(N, M)) at worst. On the CPU mostly two or three passes over the
    costs, because paths look at short lists of every row's cheapest columns.
    """
    return LinearAssignment(*choose(_ops.linear_assignment.default, cost, maximize, check))


@torch.library.register_fake("tokred::linear_assignment")
def _linear_assignment_fake(
    cost: Tensor, maximize: bool = False, check: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(cost.dim() == 3, lambda: f"cost must be [B, N, M], got {cost.dim()}-D")
    batch, rows, columns = cost.shape
    return (
        cost.new_empty((batch, rows), dtype=torch.int32),
        cost.new_empty((batch, rows), dtype=torch.float64),
        cost.new_empty((batch, columns), dtype=torch.float64),
    )


not_differentiable("linear_assignment")
sharded("linear_assignment", "cost bnm -> bn, bn, bm")
