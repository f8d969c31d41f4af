"""Arguments that methods which select tokens share: their checks, and what they stand for."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Order: TypeAlias = Literal["position", "score"]


def check_order(order: str) -> None:
    """Raises unless order is "position" or "score"."""
    if order not in ("position", "score"):
        raise ValueError(f'order must be "position" or "score", got {order!r}')


def check_features(
    name: str, x: Tensor, batch: int | None = None, tokens: int | None = None
) -> None:
    """Raises unless x is [B, N, C], with the B and N asked for."""
    wanted = f"[{'B' if batch is None else batch}, {'N' if tokens is None else tokens}, C]"
    fits = isinstance(x, Tensor) and x.dim() == 3
    fits = fits and batch in (None, x.shape[0]) and tokens in (None, x.shape[1])
    if not fits:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be {wanted}, got {got}")


def check_scores(name: str, scores: Tensor, x: Tensor, valid: Tensor | None = None) -> None:
    """Refuses scores that are not [B, N] for the tokens x [B, N, C], and such a mask."""
    wanted = list(x.shape[:2])
    if list(scores.shape) != wanted:
        raise ValueError(f"{name} must be {wanted} for x {list(x.shape)}, got {list(scores.shape)}")
    if valid is not None and (list(valid.shape) != wanted or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool {wanted}, got {valid.dtype} {list(valid.shape)}")


def head_mean(attention: Tensor, name: str = "attention") -> Tensor:
    """f32 [B, N]: attention [B, H, N] averaged over its heads; [B, N] as it is.

    Raises:
        ValueError: another number of dimensions.
    """
    if not isinstance(attention, Tensor) or attention.dim() not in (2, 3):
        got = list(attention.shape) if isinstance(attention, Tensor) else type(attention).__name__
        raise ValueError(f"{name} must be [B, H, N] or [B, N], got {got}")
    attention = attention.detach()
    return attention.float() if attention.dim() == 2 else attention.mean(1, dtype=torch.float32)


def features_of(x: Tensor) -> Tensor:
    """x for the ops that compare tokens: detached, rows in memory, float32 instead of float64."""
    x = x.detach()
    return (x.float() if x.dtype == torch.float64 else x).contiguous()
