"""What the tests of methods that select tokens share: rows against a transcription of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokred.patching import EncoderStates, Layout, VisualCall


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def padding(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """bool [B, N]: about a quarter of every row but the first is padding."""
    valid = uniform(batch, tokens, seed=seed + 100) < 0.75
    valid[0] = True
    return valid


def picked(row: Tensor) -> list[int]:
    """The picks of one row without the -1 behind them."""
    listed = row.tolist()
    count = sum(i >= 0 for i in listed)
    assert all(i >= 0 for i in listed[:count]) and len(set(listed[:count])) == count
    return listed[:count]


def check_rows(
    select: Callable[..., Tensor],
    transcription: Callable[..., Sequence[int]],
    inputs: Sequence[Tensor],
    valid: Tensor | None = None,
    **options: Any,
) -> None:
    """Every row has the transcription's picks, in its order, and the same ones alone.

    Args:
        select: called as select(*inputs, valid=..., **options).
        transcription: called with a row of every input, its valid positions as a list, and options.
    """
    found = select(*inputs, valid=valid, **options)
    assert found.dtype == torch.int32
    tokens = inputs[-1].shape[-1]
    for row in range(len(found)):
        here = list(range(tokens)) if valid is None else valid[row].nonzero()[:, 0].tolist()
        expected = transcription(*(x[row] for x in inputs), here, **options)
        assert picked(found[row]) == list(expected), f"row {row}"
        mask = None if valid is None else valid[row : row + 1]
        alone = select(*(x[row : row + 1] for x in inputs), valid=mask, **options)
        assert torch.equal(alone[0], found[row]), f"row {row} alone"


def best_of(scores: Any, k: int, among: Sequence[int]) -> list[int]:
    """The k positions of highest score, best first; the lower one on a tie."""
    return sorted(among, key=lambda i: -float(scores[i]))[:k]


def visual_call(
    batch: int = 2,
    crop_grid: tuple[int, int] = (4, 6),
    tiling: tuple[int, int] | None = None,
    channels: int = 16,
    prefix: int = 1,
    layers: int = 4,
    text: int = 5,
    dtype: torch.dtype = torch.float32,
) -> VisualCall:
    """A call in which everything is known, with random features, text and encoder states."""
    torch.manual_seed(0)
    crops = 1 if tiling is None else 1 + tiling[0] * tiling[1]
    patches, heads, dim = crop_grid[0] * crop_grid[1], 2, 8
    states = torch.randn(layers, 2, batch, crops, heads, prefix + patches, dim, dtype=dtype)
    features = torch.randn(batch, crops, patches, 12, dtype=dtype)
    projection = torch.randn(12, channels, dtype=dtype)
    encoder = EncoderStates(
        num_layers=layers,
        num_prefix=prefix,
        token_of_patch=torch.arange(crops * patches, dtype=torch.int32).view(crops, patches),
        heads={layer: lambda layer=layer: (*states[layer],) for layer in range(layers)},
        scale={layer: 0.5 for layer in range(layers)},
        features=lambda: features,
        project=lambda x: torch.tanh(x.to(dtype) @ projection),
    )
    layout = Layout(
        torch.arange(crops, dtype=torch.int32).repeat_interleave(patches),
        torch.arange(patches, dtype=torch.int32).repeat(crops),
        crop_grid,
        tiling,
    )
    tokens = torch.tanh(features.flatten(1, 2) @ projection)
    words = torch.randn(batch, text, channels, dtype=dtype)
    there = torch.ones(batch, text, dtype=torch.bool)
    pixels = torch.rand(batch, crops, 3, crop_grid[0] * 4, crop_grid[1] * 4)
    return VisualCall(tokens, layout, encoder, words, there, pixels)
