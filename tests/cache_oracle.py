"""What a packed cache does to keys and values, in plain torch."""

from __future__ import annotations

from typing import Any

from tiny_models import transformers  # skips the tests where there are none
from torch import Tensor

from tokred import reference
from tokred.cache import CacheOptions
from tokred.ops.kv_pack import PackFormat
from tokred.reference.kv_pack import packed_tokens


class Transcribed(transformers.cache_utils.DynamicLayer):
    """All tokens in full precision, and at every update what a packed cache makes of them."""

    def __init__(self, options: CacheOptions) -> None:
        super().__init__()
        self.options = options

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any) -> tuple:
        layout = self.options.layout(key_states.shape[3], value_states.shape[3])
        sides = super().update(key_states, value_states)
        new = key_states.shape[2]
        return tuple(
            seen(side, form, layout.window, new)
            for side, form in zip(sides, (layout.key, layout.value), strict=True)
        )


def seen(tokens: Tensor, form: PackFormat, window: int, new: int) -> Tensor:
    """What queries see of the tokens so far, of which `new` have just come."""
    packed = packed_tokens(form.axis, window, tokens.shape[2])
    tokens, raw = tokens.clone(), tokens
    tokens[:, :, :packed] = through_codes(raw[:, :, :packed], form)
    if new > 1:
        tokens[:, :, -new:] = raw[:, :, -new:]
    return tokens


def through_codes(tokens: Tensor, form: PackFormat) -> Tensor:
    options = (form.bits, form.group_size, form.axis, form.scheme, form.rotated)
    return reference.kv_unpack(reference.kv_pack(tokens, *options), tokens.dtype)
