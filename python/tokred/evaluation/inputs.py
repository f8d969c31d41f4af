"""What a model reads: token numbers or pixels, alone, in a list, or from a loader of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def batches(inputs: Any) -> Iterator[Batch]:
    """Every batch as the keyword arguments of a model: input_ids i64 [B, N], with attention_mask
    where there is padding, or pixel_values [B, C, H, W]; other tensors of a dict are passed on.

    Args:
        inputs: a tensor, a list of token numbers, a dict (also BatchEncoding and BatchFeature); or
            a list or a loader of these. Of tuples, as loaders give them, the first entry is read.

    Raises:
        TypeError: something else. ValueError: a wrong shape or dtype, or nothing at all.
    """
    if isinstance(inputs, str | bytes):
        raise TypeError("inputs must be token numbers or pixels, got text: tokenize it first")
    alone = _is_one(inputs)
    if not alone and not isinstance(inputs, Iterable):
        raise TypeError(
            "inputs must be a tensor, a dict, a list of these or a loader, got "
            f"{type(inputs).__name__}"
        )
    number = -1
    for number, part in enumerate([inputs] if alone else inputs):
        yield _batch(part, "inputs" if alone else f"inputs[{number}]")
    if number < 0:
        raise ValueError("inputs must have at least one batch, got none")


def count(inputs: Any) -> int | None:
    """How many batches there are, None where only reading them tells."""
    if _is_one(inputs):
        return 1
    return len(inputs) if isinstance(inputs, Sized) else None


def _is_one(inputs: Any) -> bool:
    return isinstance(inputs, Tensor | Mapping) or _are_numbers(inputs)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], int)


def _batch(part: Any, name: str) -> Batch:
    if isinstance(part, Mapping):
        named = {key: value for key, value in part.items() if isinstance(value, Tensor)}
        for key in ("input_ids", "pixel_values"):
            if key in named:
                return _with_mask(named | {key: _checked(named[key], f"{name}[{key!r}]")}, name)
        raise ValueError(f"{name} must have tensors input_ids or pixel_values, got {[*part]}")
    if isinstance(part, list | tuple) and part and isinstance(part[0], Tensor):
        part = part[0]
    elif _are_numbers(part):
        part = torch.tensor(part)
    if not isinstance(part, Tensor):
        raise TypeError(f"{name} must be a tensor or a dict of them, got {type(part).__name__}")
    kind = "pixel_values" if part.is_floating_point() else "input_ids"
    return {kind: _checked(part, name)}


def _with_mask(batch: Batch, name: str) -> Batch:
    """The batch, with an attention_mask [B, N] where it has one for token numbers."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None or mask is None:
        return batch
    mask = mask[None] if mask.dim() == 1 else mask
    if mask.shape != ids.shape:
        raise ValueError(
            f"{name}['attention_mask'] must be {list(ids.shape)} as input_ids, got "
            f"{list(mask.shape)}"
        )
    if not mask.any():
        raise ValueError(f"{name}['attention_mask'] must leave a token, and hides all of them")
    return batch | {"attention_mask": mask}


def _checked(x: Tensor, name: str) -> Tensor:
    """Pixels [B, C, H, W] or token numbers [B, N], where a batch of one may be left out."""
    dims, shape = (4, "[B, C, H, W]") if x.is_floating_point() else (2, "[B, N]")
    if x.is_complex() or x.dtype == torch.bool or x.dim() not in (dims - 1, dims) or not x.numel():
        raise ValueError(
            f"{name} must be token numbers [B, N] or pixels [B, C, H, W], and not empty, got "
            f"{x.dtype} {list(x.shape)}"
            if x.dim() < 2 or x.dim() > 4
            else f"{name} must be {shape} and not empty, got {x.dtype} {list(x.shape)}"
        )
    return x if x.dim() == dims else x[None]


def reference_text() -> str:
    """A long English text that every Python has: its own language reference."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def without_padding(batch: Batch) -> Iterator[Tensor]:
    """The token numbers i64 [B, N] of a batch; where it has padding, each row by itself."""
    ids, mask = batch["input_ids"].long(), batch.get("attention_mask")
    if mask is None or bool(mask.all()):
        yield ids
        return
    for row, there in zip(ids, mask.bool(), strict=True):
        if there.any():
            yield row[there][None]
