"""What a packed cache does to keys and values, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cases.oracle import reference
from cases.tiny_models import transformers  # skips the tests where there are none
from tokred.cache import CacheOptions
from tokred.ops.kv_pack import PackFormat
from tokred.reference.kv_pack import packed_tokens


class Transcribed(transformers.cache_utils.DynamicLayer):
    """All tokens in full precision, and at every update what a packed cache makes of them."""

    def __init__(self, options: CacheOptions) -> None:
        super().__init__()
        self.options = options
        self.mean: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple:
        layout = self.options.layout(key_states.shape[3], value_states.shape[3])
        before, new = self.get_seq_length(), key_states.shape[2]
        sides = super().update(key_states, value_states)
        if self.options.center and before + new >= 16:
            held = [
                packed_tokens(layout.key.axis, layout.window, n) for n in (before, before + new)
            ]
            if held[0] == 0 < held[1]:
                self.mean = sides[0].mean(2, keepdim=True)
        return (
            seen(sides[0], layout.key, layout.window, new, self.mean),
            seen(sides[1], layout.value, layout.window, new),
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.mean = None if self.mean is None else self.mean[beam_idx]


class TranscribedLatents(transformers.cache_utils.DynamicLayer):
    """The same of latents, whose rows have the rotary part of their keys behind them."""

    def __init__(self, options: CacheOptions) -> None:
        super().__init__()
        self.options = options

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple:
        dims = [key_states.shape[3], value_states.shape[3]]
        layout = self.options.layout(sum(dims), 0)
        rows = torch.cat(super().update(key_states, value_states), -1)
        return seen(rows, layout.key, layout.window, key_states.shape[2]).split(dims, -1)


def seen(
    tokens: Tensor, form: PackFormat, window: int, new: int, mean: Tensor | None = None
) -> Tensor:
    """What queries see of the tokens so far, of which `new` have just come."""
    packed = packed_tokens(form.axis, window, tokens.shape[2])
    tokens, raw = tokens.clone(), tokens
    tokens[:, :, :packed] = through_codes(raw[:, :, :packed], form, mean)
    if new > 1:
        tokens[:, :, -new:] = raw[:, :, -new:]
    return tokens


def through_codes(tokens: Tensor, form: PackFormat, mean: Tensor | None = None) -> Tensor:
    """Packed, those of a mean without it, and unpacked."""
    mean = tokens.new_zeros(()) if mean is None else mean
    options = (form.bits, form.group_size, form.axis, form.scheme, form.rotated)
    packed = reference.kv_pack(tokens - mean, *options)
    return reference.kv_unpack(packed, tokens.dtype) + mean
