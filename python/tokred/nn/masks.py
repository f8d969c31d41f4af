"""Masks of nn.MultiheadAttention and transformers, told apart: padding, causality, or both."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.symbolic import known


def hidden(name: str, mask: Tensor) -> Tensor:
    """Where a mask of nn.MultiheadAttention hides a key: True of a bool mask, -inf of a float one.

    Raises:
        ValueError: another dtype; a float mask that holds other numbers than 0 and -inf.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(f"{name} must be bool or float, got {mask.dtype}")
    # Some models add the lowest finite number of the dtype instead of -inf.
    hides = mask <= torch.finfo(mask.dtype).min
    if torch.compiler.is_compiling():
        raise ValueError(f"{name} must be bool inside torch.compile, got {mask.dtype}")
    if not bool((hides | (mask == 0)).all()):
        raise ValueError(
            f"{name} must hide keys or leave them, with -inf and 0: no other numbers are added to "
            "the logits"
        )
    return hides


def not_padding(name: str, mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """bool [B, N], True where visible, of a key_padding_mask of nn.MultiheadAttention.

    Raises:
        ValueError: another shape than [B, N], or see `hidden`.
    """
    if known(mask.dim() != 2) or known(tuple(mask.shape) != shape):
        raise ValueError(f"{name} must be {list(shape)}, got {list(mask.shape)}")
    return ~hidden(name, mask)


def padding_and_causality(
    name: str, visible: Tensor, shape: tuple[int, int, int], causal: bool
) -> tuple[Tensor | None, bool]:
    """A mask in two parts: bool [B | 1, N], False for padding, or None; and whether it is causal.

    Args:
        visible: bool [B | 1, L | 1, N].
        shape: B, L and N.
        causal: that attention is causal whatever the mask says.

    Raises:
        ValueError: another shape; a mask that hides other keys.
    """
    batch, queries, keys = shape
    items, rows, columns = visible.shape
    if items not in (1, batch) or rows not in (1, queries) or columns != keys:
        raise ValueError(
            f"{name} must be for {batch} items, {queries} queries and {keys} keys, got "
            f"{list(visible.shape)}"
        )
    if rows == 0:
        return None, causal
    last = visible[:, -1]
    if rows > 1:
        if torch.compiler.is_compiling():
            raise ValueError(
                f"whether {name} is causal cannot be seen inside torch.compile: give the padding "
                "alone, and is_causal=True"
            )
        place = torch.arange(keys, device=visible.device)
        earlier = place <= place[keys - queries :, None] if keys >= queries else None
        if earlier is not None and torch.equal(visible, last[:, None] & earlier):
            causal = True
        elif causal or not torch.equal(visible, last[:, None].expand_as(visible)):
            raise ValueError(
                f"{name} must be padding, causality or both: many queries share the keys that are "
                "chosen, merged or packed, so one query cannot have others hidden from it"
            )
    if not torch.compiler.is_compiling() and bool(last.all()):
        return None, causal
    return last, causal


def of_transformers(
    mask: Tensor, shape: tuple[int, int, int], causal: bool
) -> tuple[Tensor | None, bool]:
    """`padding_and_causality` of an attention_mask of transformers.

    Args:
        mask: [B, N], nonzero where visible; or [B | 1, 1, L | 1, N], bool or float.

    Raises:
        ValueError: another shape, or see `padding_and_causality` and `hidden`.
    """
    name = "attention_mask"
    if mask.dim() == 2:
        return padding_and_causality(name, (mask != 0)[:, None], shape, causal)
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(
            f"{name} must be [B, N] or [B, 1, L, N], the same for all heads, got {list(mask.shape)}"
        )
    visible = mask if mask.dtype == torch.bool else ~hidden(name, mask)
    return padding_and_causality(name, visible[:, 0], shape, causal)
