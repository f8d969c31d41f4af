"""What the methods share: lists of consecutive keys, lengths, and checks of arguments."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor


def range_list(first: Tensor, end: Tensor, width: int) -> Tensor:
    """The tokens first .. end - 1 of every row, at most `width` of them, -1 behind them.

    Args:
        first, end: integers [...].

    Returns:
        i32 [..., width].
    """
    tokens = first[..., None] + torch.arange(width, device=first.device)
    return torch.where(tokens < end[..., None], tokens, -1).to(torch.int32)


def key_lengths(k: Tensor, lengths: Tensor | None) -> Tensor:
    """i32 [B]: the number of keys of each row; all of k [B, Hkv, N, D] where not given."""
    if lengths is not None:
        return lengths.to(torch.int32)
    return torch.full((k.shape[0],), k.shape[2], dtype=torch.int32, device=k.device)


def check_count(
    name: str,
    count: object,
    minimum: int | None = 0,
    per_row: bool = False,
    optional: bool = False,
) -> None:
    """Raises unless the value is an int of at least `minimum`.

    Args:
        minimum: None where the caller checks the range.
        per_row: integers in a tensor will do. optional: None will do.
    """
    if optional and count is None:
        return
    if per_row and isinstance(count, Tensor):
        if count.is_floating_point() or count.dtype == torch.bool:
            raise ValueError(f"{name} must be an int or a tensor of integers, got {count.dtype}")
        return
    # What is an int need not be looked up among the classes of Integral, which takes microseconds.
    if type(count) is not int and (
        isinstance(count, bool) or not isinstance(count, (Integral, torch.SymInt))
    ):
        wanted = "an int or a tensor of integers" if per_row else "an int"
        raise ValueError(f"{name} must be {wanted}, got {count!r}")
    if minimum is not None and count < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {count}")


def check_minimum(minimum: int, **counts: object) -> None:
    """check_count of each; arguments are given by name."""
    for name, count in counts.items():
        check_count(name, count, minimum)


def check_number(minimum: float, **values: object) -> None:
    """Raises unless each is a number of at least `minimum`; arguments are given by name."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(
            value, (int, float, torch.SymInt, torch.SymFloat)
        ):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_tokens(name: str, x: Tensor, shape: list[int], dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuses tokens [B, H, L, D] that a cache would broadcast or round, or could not pack."""
    if list(x.shape) != shape or x.dtype not in dtypes:
        names = " or ".join(map(str, dtypes))
        tokens = "one token " if shape[2:3] == [1] else ""
        got = f"{list(x.shape)} in {x.dtype}"
        raise ValueError(f"{name} must be {tokens}{shape} in {names}, got {got}")


def check_query(q: Tensor, k: Tensor) -> None:
    """Refuses queries that do not fit the tokens k [B, Hkv, L, D], before a cache takes these."""
    batch, heads, tokens, dim = k.shape
    if (
        q.dim() != 4
        or q.shape[0] != batch
        or q.shape[1] % heads
        or [*q.shape[2:]] != [tokens, dim]
        or q.dtype != k.dtype
    ):
        wanted = f"[{batch}, a multiple of {heads}, {tokens}, {dim}] in {k.dtype}"
        raise ValueError(f"q must be {wanted}, got {[*q.shape]} in {q.dtype}")
