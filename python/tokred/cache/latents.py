"""Layers of caches that hold the latents of multi-head latent attention."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.integrations.transformers.latent_states import LatentStates

from .layers import PackedCacheLayer
from .storage import CacheOptions


class LatentUpdate:
    """The update of a cache layer that holds latents: rows go in, tagged new tokens come out.

    rank: channels of a latent. rotary: channels of the rotary part.
    """

    rank: int
    rotary: int
    cache: ClassVar[str]  # what errors call it

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Appends latents [B, 1, L, rank] and rotary parts [B, 1, L, R].

        Returns:
            the same two, for the module to expand, tagged with the states of the cache, which
            tokred's attention finds in what the module makes of them.

        Raises:
            ValueError: other tensors; tokens unlike those in the cache, or more than its capacity.
            RuntimeError: under torch.compile.
        """
        rows = latent_rows(self.cache, self.rank, self.rotary, key_states, value_states)
        return self._append(rows).tag(key_states, value_states)

    def _append(self, rows: Tensor) -> LatentStates:
        """The states with these rows [B, 1, L, rank + R], which are stored."""
        raise NotImplementedError


class LatentCacheLayer(LatentUpdate, PackedCacheLayer):
    """Latents and rotary parts of keys of one layer, packed side by side in one row a token.

    A row is a key, and its latent the value, so no values are stored. Everything else is as in a
    PackedCacheLayer.

    Args:
        rank: channels of a latent. rotary: channels of the rotary part.
    """

    cache = "PackedCache"

    def __init__(
        self, rank: int, rotary: int, options: CacheOptions, capacity: int | None = None
    ) -> None:
        self.rank, self.rotary = rank, rotary
        super().__init__(options, capacity)

    def _append(self, rows: Tensor) -> LatentStates:
        packed, _ = PackedCacheLayer.update(self, rows, rows[..., :0])
        own = {each.name: getattr(packed, each.name) for each in fields(packed)}
        return LatentStates(**own, rank=self.rank)


def latent_rows(cache: str, rank: int, rotary: int, latents: Tensor, parts: Tensor) -> Tensor:
    """Latents [B, 1, L, rank] and rotary parts [B, 1, L, rotary] side by side.

    Raises:
        ValueError: other tensors.
        RuntimeError: under torch.compile.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(f"a {cache} of latents cannot be compiled: call the model itself")
    for name, x, dim in (("latents", latents, rank), ("rotary parts", parts, rotary)):
        if not isinstance(x, Tensor) or x.dim() != 4 or (x.shape[1], x.shape[3]) != (1, dim):
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{cache} holds {name} [B, 1, L, {dim}] of a model with this config, got "
                f"{got}: use a transformers.DynamicCache"
            )
    if latents.shape[2] != parts.shape[2] or latents.shape[0] != parts.shape[0]:
        raise ValueError(
            f"latents and rotary parts must be of the same tokens, got {list(latents.shape)} and "
            f"{list(parts.shape)}"
        )
    return torch.cat((latents, parts), -1)
