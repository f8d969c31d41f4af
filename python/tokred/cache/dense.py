"""The dense cache of a model: keys and values as they are, in memory that grows in place."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tokred import compat
from tokred._library import refuse_grad
from tokred.integrations.transformers.latent_states import DenseLatentStates
from tokred.integrations.transformers.packed_buffer import SCORE_KEYS, PackedBuffer
from tokred.integrations.transformers.token_buffer import TokenBuffer
from tokred.ops.kv_pack import BITS, PackFormat

from .base import CacheBytes, InPlaceCache, check_capacity, replaced_layers
from .latents import LatentUpdate
from .support import config_of, latent_dims


class DenseCache(InPlaceCache):
    """A cache of keys and values in full precision that appends in place.

        model.generate(**inputs, cache=tokred.DenseCache(model.config))

    (before transformers 5.24 the keyword is `past_key_values`).

    It holds what a DynamicCache holds, and works where that works, with any attention: left
    padding, beams, prompts in several parts, assisted generation, autocast. But a token costs no
    copy of the cache, and removing tokens costs nothing; large layers ask for huge pages. Layers
    with a sliding window, and others that keep no growing cache, stay transformers' own.

    The keys and values that a layer hands out are views of its memory: tokens that are appended
    after a crop overwrite those that it removed. There is no gradient. A call that raises leaves
    the cache as it was.

    Args:
        config: of the model, or the model itself.
        capacity: tokens to make room for at once, and no more; where None, memory grows by an
            eighth whenever it is full.
        score_bits: 1, 2, 3, 4 or 8; keeps a copy of the keys in so many bits (rotated, in groups of
            gcd(head_dim, 64) channels), by which token_select and top_k_attention score the keys
            for a single query. With 4 bits scoring reads an eighth of the bytes of float32 keys,
            and is approximate; attention reads the chosen keys themselves. None: no copy.
        absorb: of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), whose cache holds
            latents that the model expands to keys and values of all heads at every step. With
            absorb the first tokens attend to expanded keys and values; later ones attend to the
            latents, with the weights of the expansion absorbed into queries and outputs. That
            needs model.set_attn_implementation("tokred"), and no method that chooses keys.

    Raises:
        ValueError: a capacity below 1, or other score_bits; a model without full-attention layers;
            absorb with score_bits, or for a model without latents.
    """

    def __init__(
        self,
        config: Any,
        *,
        capacity: int | None = None,
        score_bits: int | None = None,
        absorb: bool = False,
    ) -> None:
        check_capacity(capacity)
        if score_bits is not None and (type(score_bits) is not int or score_bits not in BITS):
            raise ValueError(f"score_bits must be 1, 2, 3, 4, 8 or None, got {score_bits!r}")
        self.capacity, self.score_bits = capacity, score_bits
        config = config_of(config)
        name = type(config).__name__
        refusal = (
            f"DenseCache keeps layers of full attention, and {name} has none: use a "
            "transformers.DynamicCache"
        )
        make: Callable[[], DenseCacheLayer] = partial(DenseCacheLayer, capacity, score_bits)
        if absorb:
            make = partial(DenseLatentLayer, *_absorbed_dims(config, score_bits), capacity)
        super().__init__(layers=replaced_layers(config, make, refusal))


class DenseCacheLayer(DynamicLayer):
    """Keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] of one layer, with room for more.

    `keys` and `values` are views of the tokens. Assigning them replaces the tokens.

    Args:
        capacity: tokens to make room for at once, and no more; where None, memory grows.
        score_bits: see DenseCache. The keys that `update` returns then have an attribute
            `score_keys`, the PackedKV of the same tokens.
    """

    restores_itself = True
    is_dense = True

    def __init__(self, capacity: int | None = None, score_bits: int | None = None) -> None:
        self.capacity, self.score_bits = capacity, score_bits
        self._buffers: dict[str, TokenBuffer] = {}
        self._codes: PackedBuffer | None = None
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, N, D], or None before the first tokens."""
        return self._tokens("keys")

    @keys.setter
    def keys(self, tokens: Tensor | None) -> None:
        self._assign("keys", tokens)

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, N, Dv], or None before the first tokens."""
        return self._tokens("values")

    @values.setter
    def values(self, tokens: Tensor | None) -> None:
        self._assign("values", tokens)

    def _tokens(self, name: str) -> Tensor | None:
        buffer = self._buffers.get(name)
        return None if buffer is None else buffer.tokens

    def _assign(self, name: str, tokens: Tensor | None) -> None:
        others = {key: buffer for key, buffer in self._buffers.items() if key != name}
        if tokens is not None:
            others[name] = TokenBuffer.of(tokens)
        self._buffers = others
        if name == "keys":
            self._codes = None if tokens is None else self._packed(tokens)

    def _packed(self, keys: Tensor) -> PackedBuffer | None:
        """The copy of keys [B, Hkv, N, D] in score_bits; None without score_bits.

        Raises:
            ValueError: a head dimension that cannot be packed.
        """
        if self.score_bits is None:
            return None
        dim = keys.shape[3]
        if dim % 16 != 0 or not 0 < dim <= 256:
            raise ValueError(
                f"score_bits needs a head_dim that is a multiple of 16 up to 256, and it is {dim}: "
                "make the DenseCache without"
            )
        form = PackFormat(self.score_bits, math.gcd(dim, 64), rotated=True)
        return PackedBuffer.of(keys, form)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes room for keys [B, Hkv, L, D] and values [B, Hkv, L, Dv]."""
        codes = self._packed(key_states[:, :, :0])
        room = self.capacity or 0
        keys, values = (TokenBuffer.like(x, room) for x in (key_states, value_states))
        self._hold(keys, values, codes)

    def _hold(self, keys: TokenBuffer, values: TokenBuffer, codes: PackedBuffer | None) -> None:
        self._buffers, self._codes = {"keys": keys, "values": values}, codes
        self.device = keys.memory.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys [B, Hkv, L, D] and values [B, Hkv, L, Dv]; returns all, as views.

        As in a DynamicCache, of several dtypes the widest is kept.

        Raises:
            ValueError: tokens unlike those in the cache, or more than its capacity; keys or values
                that require grad; keys that cannot be packed, where score_bits says so.
            RuntimeError: score_bits under torch.compile.
        """
        if not torch.compiler.is_compiling():
            self._check(key_states, value_states)
        elif self.score_bits is not None:
            raise RuntimeError("score_bits keeps keys in a way that torch.compile does not follow")
        states = (key_states, value_states)
        if self.is_initialized:
            held = tuple(self._buffers.values())
        else:
            held = tuple(TokenBuffer.like(x, self.capacity or 0) for x in states)
        length, count = held[0].length, key_states.shape[2]
        if self.capacity is not None and length + count > self.capacity:
            raise ValueError(
                f"the cache has a capacity of {self.capacity} tokens and holds {length}: there is "
                f"no room for {count} more; nothing was appended"
            )
        keys, values = (
            buffer.appended(_apart(x, buffer), self.capacity)
            for buffer, x in zip(held, states, strict=True)
        )
        views = keys.tokens, values.tokens
        codes = self._codes
        codes = self._packed(key_states) if codes is None else codes.appended(key_states)
        if codes is not None:
            setattr(views[0], SCORE_KEYS, codes.packed)
        self._hold(keys, values, codes)
        return views

    def _check(self, keys: Tensor, values: Tensor) -> None:
        """Whether these tokens fit each other, and those in the cache."""
        for name, x in (("key_states", keys), ("value_states", values)):
            if not isinstance(x, Tensor) or x.dim() != 4:
                got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name} must be [B, Hkv, L, D], got {got}")
        refuse_grad("DenseCache.update", key_states=keys, value_states=values)
        if keys.shape[:3] != values.shape[:3] or keys.device != values.device:
            raise ValueError(
                "key_states and value_states must be of the same tokens on one device, got "
                f"{list(keys.shape)} on {keys.device} and {list(values.shape)} on {values.device}"
            )
        if not self.is_initialized:
            return
        for name, x in (("keys", keys), ("values", values)):
            held = self._buffers[name].memory
            if x.shape[:2] != held.shape[:2] or x.shape[3] != held.shape[3]:
                expected = [*held.shape[:2], x.shape[2], held.shape[3]]
                raise ValueError(
                    f"the cache holds {name} [B, Hkv, L, D] = {expected}, got {list(x.shape)}: "
                    "reset() it before other tokens"
                )
            if x.device != held.device:
                raise ValueError(
                    f"the cache holds {name} on {held.device}, got {x.device}: reset() it before "
                    "tokens on another device"
                )

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self._buffers["keys"].length if self.is_initialized else 0

    def reset(self) -> None:
        """Forgets all tokens, and what shape they had."""
        compat.drop_tokens(self)
        super().reset()

    def get_max_length(self) -> int:
        """The capacity, or -1 where there is none."""
        return -1 if self.capacity is None else self.capacity

    def get_max_cache_shape(self) -> int:
        """The name of get_max_length in older releases of transformers."""
        return self.get_max_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens. No memory is touched.

        Raises:
            ValueError: a positive number, or more tokens than there are.
        """
        tokens_to_remove = operator.index(tokens_to_remove)
        length = self.get_seq_length()
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative one, got "
                f"{tokens_to_remove}"
            )
        if -tokens_to_remove > length:
            raise ValueError(f"the cache holds {length} tokens, {-tokens_to_remove} cannot go")
        self._map(lambda buffer: buffer.cropped(length + tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows of the batch in this order, as beam search chooses them."""
        self._map(lambda buffer: buffer.rows(beam_idx))

    def _map(self, function: Callable[[TokenBuffer], TokenBuffer]) -> None:
        """The function applied to every buffer."""
        buffers = {name: function(buffer) for name, buffer in self._buffers.items()}
        codes = None if self._codes is None else self._codes.map(function)
        self._buffers, self._codes = buffers, codes

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        if self.is_initialized:
            self.reorder_cache(self._numbers().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps these rows of the batch, given by number or by a bool mask."""
        if self.is_initialized:
            self.reorder_cache(self._numbers()[indices])

    def _numbers(self) -> Tensor:
        memory = self._buffers["keys"].memory
        return torch.arange(memory.shape[0], device=memory.device)

    def offload(self) -> None:
        """Moves everything to the CPU until prefetch."""
        self._map(lambda buffer: buffer.to("cpu"))

    def prefetch(self) -> None:
        """Moves everything back to the device of the tokens."""
        self._map(lambda buffer: buffer.to(self.device))

    def nbytes(self) -> CacheBytes:
        """The memory of the layer, in bytes."""
        held = sum(buffer.token_bytes for buffer in self._buffers.values())
        total = sum(buffer.memory.nbytes for buffer in self._buffers.values())
        if self._codes is None:
            return CacheBytes(full_precision=held, slack=total - held)
        sides = (self._codes.codes, self._codes.params)
        codes, params = (side.token_bytes for side in sides)
        slack = total - held + sum(side.memory.nbytes for side in sides) - codes - params
        return CacheBytes(codes, params, full_precision=held, slack=slack)


class DenseLatentLayer(LatentUpdate, DenseCacheLayer):
    """Latents and rotary parts of keys of one layer, side by side in one row a token.

    `keys` are the rows [B, 1, N, rank + R], and `values` are empty. Everything else is as in a
    DenseCacheLayer.

    Args:
        rank: channels of a latent. rotary: channels of the rotary part.
    """

    cache = "DenseCache"
    is_dense = False  # keys and values are not those that methods evict

    def __init__(self, rank: int, rotary: int, capacity: int | None = None) -> None:
        self.rank, self.rotary = rank, rotary
        super().__init__(capacity)

    def _append(self, rows: Tensor) -> DenseLatentStates:
        held, _ = DenseCacheLayer.update(self, rows, rows[..., :0])
        return DenseLatentStates(
            held, None, None, None, held.shape[2], rows, rows[..., :0], rank=self.rank
        )


def _absorbed_dims(config: Any, score_bits: int | None) -> tuple[int, int]:
    """Channels of the latents and rotary parts of a model whose weights are to be absorbed."""
    dims = latent_dims(config)
    if dims is None:
        raise ValueError(
            f"absorb is for multi-head latent attention, and {type(config).__name__} has none: "
            "make the DenseCache without"
        )
    if score_bits is not None:
        raise ValueError(
            "score_bits serves methods that choose keys, and these do not read latents: make the "
            "DenseCache with absorb or with score_bits"
        )
    return dims


def _apart(x: Tensor, held: TokenBuffer) -> Tensor:
    """x, or a copy where it lies in the memory that it will be appended to."""
    if torch.compiler.is_compiling() or held.memory.nbytes == 0:
        return x
    same = x.untyped_storage().data_ptr() == held.memory.untyped_storage().data_ptr()
    return x.clone() if same else x
