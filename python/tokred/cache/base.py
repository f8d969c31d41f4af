"""Shared by caches that write in place: calls that fail change nothing, copies share nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tokred import compat
from tokred._library import tensors_in

from .storage import MAX_TOKENS


@dataclass(frozen=True)
class CacheBytes:
    """The memory of a cache, in bytes.

    codes, params: of the packed tokens. window: the latest tokens, still in full precision.
    full_precision: tokens and layers that are not packed. slack: room for more tokens.
    """

    codes: int = 0
    params: int = 0
    window: int = 0
    full_precision: int = 0
    slack: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))

    def __add__(self, other: CacheBytes) -> CacheBytes:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return CacheBytes(*(a + b for a, b in pairs))


class InPlaceCache(Cache):
    """A transformers cache whose layers append in place. A call that raises leaves it as it was.

    Layers of our own have `restores_itself = True` and `nbytes()`; others are transformers'.
    """

    # Tokens that the first layer of our own held before the forward pass under way.
    _held = 0

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        ours = (n for n, layer in enumerate(layers) if getattr(layer, "restores_itself", False))
        self._first = next(ours, 0)

    def __copy__(self) -> Any:
        """A copy with tensors of its own, as appending a token writes in place."""
        return copy.deepcopy(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Appends tokens to a layer; returns what its update returns.

        Raises:
            ValueError: no such layer; a layer without tokens behind one that had some before this
                forward pass, as an earlier pass leaves them that ended in an error between the two.
        """
        if not -len(self.layers) <= layer_idx < len(self.layers):
            raise ValueError(
                f"the cache is for a model of {len(self.layers)} layers, and has no layer "
                f"{layer_idx}: make one for the model that it is passed to"
            )
        layer = self.layers[layer_idx]
        if torch.compiler.is_compiling():
            return layer.update(key_states, value_states, *args, **kwargs)
        if layer_idx == self._first:
            self._held = layer.get_seq_length()
        elif self._held > 0 and layer.get_seq_length() == 0:
            raise ValueError(
                f"layer {layer_idx} of the cache is empty, and layer {self._first} held "
                f"{self._held} tokens before this forward pass, which an earlier one that ended in "
                "an error must have left: reset() the cache, and start with the first token"
            )
        if getattr(layer, "restores_itself", False):
            return layer.update(key_states, value_states, *args, **kwargs)
        with restored_on_failure([layer]):
            return layer.update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens; see the layers' crop."""
        with restored_on_failure(self.layers):
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows of the batch in this order, as beam search chooses them."""
        with restored_on_failure(self.layers):
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        with restored_on_failure(self.layers):
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch, given by number or by a bool mask."""
        with restored_on_failure(self.layers):
            super().batch_select_indices(indices)

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Makes room before the first tokens; see transformers.Cache."""
        with restored_on_failure(self.layers):
            super().early_initialization(*args, **kwargs)

    def reset(self) -> None:
        """Drops all tokens."""
        with restored_on_failure(self.layers):
            for layer in self.layers:
                if isinstance(layer, DynamicLayer):
                    compat.drop_tokens(layer)
            super().reset()
            self._held = 0

    def nbytes(self, layer: int | None = None) -> CacheBytes:
        """The memory of all layers or of one; `.total` is the sum."""
        if layer is None:
            return sum((_nbytes(each) for each in self.layers), CacheBytes())
        return _nbytes(self.layers[layer])


@contextmanager
def restored_on_failure(layers: list[Any]) -> Iterator[None]:
    """Gives layers back what they held where something raises.

    They hold tensors, and numbers, lists and dicts of them, that a call replaces.
    """
    before = [{name: _shallow(value) for name, value in vars(layer).items()} for layer in layers]
    try:
        yield
    except BaseException:
        for layer, attributes in zip(layers, before, strict=True):
            vars(layer).clear()
            vars(layer).update(attributes)
        raise


def _shallow(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list) else value


def _nbytes(layer: Any) -> CacheBytes:
    if hasattr(layer, "nbytes"):
        return layer.nbytes()
    # The storages: what is a view keeps all of its memory.
    tensors = layer.tensors() if hasattr(layer, "tensors") else tensors_in(vars(layer))
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return CacheBytes(full_precision=sum(storages.values()))


def check_capacity(capacity: int | None) -> None:
    """Raises unless it is a number of tokens or None."""
    if capacity is not None and (type(capacity) is not int or not 1 <= capacity <= MAX_TOKENS):
        raise ValueError(f"capacity must be at least 1 and at most {MAX_TOKENS}, got {capacity!r}")


def replaced_layers(config: Any, make: Any, refusal: str) -> list[Any]:
    """transformers' own layers for the config, those of full attention made by `make()`.

    Raises:
        ValueError: the refusal, where there are none.
    """
    layers = DynamicCache(config=config).layers
    if not any(type(layer) is DynamicLayer for layer in layers):
        raise ValueError(refusal)
    return [make() if type(layer) is DynamicLayer else layer for layer in layers]
