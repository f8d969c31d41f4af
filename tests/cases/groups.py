"""What the tests of merging methods share: groups of token maps, and reducers in a tiny ViT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokred
from cases.tiny_models import attributes, tiny_timm


def tokens_of(batch: int, tokens: int, channels: int = 16, centres: int = 5) -> Tensor:
    """f32 [B, N, C] around a few centres, so that similarities differ; no two alike."""
    generator = torch.Generator().manual_seed(tokens)
    middle = torch.randn(centres, channels, generator=generator)
    chosen = torch.randint(centres, (batch, tokens), generator=generator)
    return middle[chosen] + 0.6 * torch.randn(batch, tokens, channels, generator=generator)


def groups_of(token_map: Tensor) -> set[frozenset[int]]:
    """The groups of one item's map [N]; what is dropped is in none."""
    groups: dict[int, set[int]] = {}
    for token, slot in enumerate(token_map.tolist()):
        if slot >= 0:
            groups.setdefault(slot, set()).add(token)
    return {frozenset(group) for group in groups.values()}


def in_slots(members: dict[int, set[int]]) -> set[frozenset[int]]:
    return {frozenset(group) for group in members.values()}


@torch.no_grad()
def check_in_a_model(
    method: str,
    nothing: dict[str, Any],
    something: dict[str, Any],
    counts: tuple[int, ...],
    **model_options: Any,
) -> None:
    """A tiny timm ViT of 37 tokens and three layers.

    With options that reduce nothing its bits are the model's own, with others it has the counts,
    an item's result does not depend on the batch, and afterwards the model is as before.
    """
    torch.manual_seed(0)
    model = tiny_timm(**model_options).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    pixels, before = torch.randn(2, 3, 48, 48), attributes(model)
    plain = model.forward_features(pixels)
    with tokred.patch(model, method, **nothing):
        assert torch.equal(model.forward_features(pixels), plain)
    with tokred.patch(model, method, trace_source=True, **something) as handle:
        reduced = model.forward_features(pixels)
        assert handle.counts == counts, handle.counts
        assert reduced.shape == (2, counts[-1], plain.shape[2]) and reduced.isfinite().all()
        assert not torch.equal(handle.unmerge(reduced), plain)
        alone = model.forward_features(pixels[1:])
        torch.testing.assert_close(alone, reduced[1:], rtol=1e-4, atol=1e-4)
    assert attributes(model) == before
    assert torch.equal(model.forward_features(pixels), plain)
