"""Positions that models give their layers, for tokens that have merged."""

from __future__ import annotations

from torch import Tensor


def following(table: Tensor, first: Tensor, tokens: int, num_prefix: int) -> Tensor:
    """The rotations of the tokens that are left: each has that of its first member.

    Args:
        table: [T, D], or [1 | B, T, D], of the last T of the original tokens; those before have no
            rotation.
        first: i64 [B, N], the first member of each token.
        tokens: how many there were. num_prefix: so many come first, and stay.

    Returns:
        [B, 1, N', D] where the table is for all heads and items, else [B, N', D].

    Raises:
        ValueError: a token without rotation that may merge; a table of another shape.
    """
    behind = tokens - table.shape[-2]
    if not 0 <= behind <= num_prefix or table.dim() not in (2, 3):
        raise ValueError(
            f"rotations {list(table.shape)} are not those of {tokens} tokens, of which the first "
            f"{num_prefix} have none: num_prefix must be at least the number without"
        )
    rows = first if behind == 0 else (first[:, behind:] - behind).clamp(min=0)
    if table.dim() == 2:
        return table[rows][:, None]
    table = table.expand(rows.shape[0], -1, -1)
    return table.gather(1, rows[..., None].expand(-1, -1, table.shape[2]))
