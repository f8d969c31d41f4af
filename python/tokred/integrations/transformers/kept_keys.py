"""The cache of a layer that keeps fewer keys than it has seen tokens.

It stores the keys that a method (a KeyEvictor) has not evicted, in any order, each with its place
in the sequence. Lengths, positions and masks go on counting all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

import tokred
from tokred._library import refuse_grad
from tokred.patching import Eviction, EvictionCall, KeyEvictor, Replacement
from tokred.patching.protocols import name_of

from .kept import Kept, check_like
from .packed_buffer import PackedBuffer
from .token_buffer import TokenBuffer

ADVICE = (
    "keys were evicted from this cache inside tokred.patch(...), and only tokred's attention reads "
    "what is left: go on inside the patch, or begin with a new cache"
)


class KeptKeysLayer(CacheLayerMixin):
    """The cache of one layer, from which a method may evict keys after every forward pass.

    Args:
        evictor: the method.
        number: of this layer among the num_layers of full attention, from 0.
        rotary: the model's rotary embedding, where the method reads it.
        packing: the options of a tokred.PackedCache, by which the keys that the first pass leaves,
            and all later ones, are packed; None: nothing is packed.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self, evictor: KeyEvictor, number: int, num_layers: int, rotary: Any = None,
        packing: Any = None,
    ) -> None:  # fmt: skip
        self.evictor, self.number, self.num_layers = evictor, number, num_layers
        self.rotary, self.packing = rotary, packing
        self.length = 0
        self.kept: Kept | None = None
        self.is_initialized = False

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, M, D], the stored ones; None before the first tokens."""
        kept = self.kept
        return None if kept is None else kept.shown(kept.keys)

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, M, Dv], the stored ones; None before the first tokens."""
        kept = self.kept
        return None if kept is None else kept.shown(kept.values)

    @property
    def position(self) -> Tensor | None:
        """i32 [B, Hkv, M], the places of the stored keys in the sequence, -1 for an empty slot;
        None while no key was evicted."""
        kept = self.kept
        return None if kept is None else kept.shown(kept.position)

    @property
    def bias(self) -> Tensor | None:
        """f32 [B, Hkv, M], added to the logits of the stored keys, -inf for an empty slot; None for
        0, and while no key was evicted."""
        kept = self.kept
        return None if kept is None else kept.shown(kept.bias)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first tokens are kept as they come."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[KeptStates, None]:
        """Appends keys [B, Hkv, L, D] and values [B, Hkv, L, Dv].

        Raises:
            ValueError: tokens of another shape than those in the cache, that cannot be packed, or
                that require grad.
        """
        refuse_grad("a cache that keeps fewer keys", key_states=key_states,
                    value_states=value_states)  # fmt: skip
        slot = None
        if self.kept is None:
            if self.packing is not None:
                self.packing.layout(key_states.shape[3], value_states.shape[3])
            kept = Kept(TokenBuffer.of(key_states), TokenBuffer.of(value_states))
        else:
            check_like("keys", key_states, self.kept.keys)
            check_like("values", value_states, self.kept.values)
            written = self.kept.with_in_free_slot(key_states, value_states, self.length)
            if written is None:
                kept = self.kept.without_free_slot()
                kept = kept.appended(key_states, value_states, self.length)
            else:
                kept, slot = written, self.kept.free
        self.kept, self.length = kept, self.length + key_states.shape[2]
        self.is_initialized, self.device = True, key_states.device
        return KeptStates(self, kept, self.length, key_states, value_states, slot), None

    def shrink(self, kept: Kept, call: EvictionCall, whole: bool) -> None:
        """Lets the method evict, after the queries of a pass have attended to all of `kept`.

        Raises:
            ValueError: with `whole`, a method that evicts something.
        """
        result = self.evictor.evict(call)
        stays = result is None or (
            isinstance(result, Eviction) and result.slots is None and result.dropped is None
        )
        if whole and not stays:
            raise ValueError(
                "attention_mask hides keys from the last query that an earlier one sees, and keys "
                "cannot be evicted under it: pass a mask of padding, [B, N], or a budget that the "
                "prompt does not exceed"
            )
        if isinstance(result, Replacement):
            new = (result.k, result.v, result.position.to(torch.int32), result.bias)
            kept = Kept(*(None if x is None else TokenBuffer.of(x) for x in new), kept.start)
        elif result is not None:
            kept = kept.after(result, call)
        self.hold(kept)

    def hold(self, kept: Kept) -> None:
        """Stores the keys that a pass has left; packs them, unless the method is called after the
        attention module and still has to read them in full precision."""
        self.kept = kept if hasattr(self.evictor, "attended") else self._packed(kept)

    def _packed(self, kept: Kept) -> Kept:
        if self.packing is None or isinstance(kept.keys, PackedBuffer):
            return kept
        layout = self.packing.layout(kept.keys.shape[3], kept.values.shape[3])
        return kept.packed(layout.key, layout.value, layout.center)

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Stores keys [B, Hkv, K, D] and values [B, Hkv, K, Dv] in the place of all. Where K is
        less than before, it is not known which tokens they are: their position is -1."""
        kept = self.kept
        if kept is not None and keys.shape[2] < kept.keys.shape[2]:
            nowhere = torch.full(keys.shape[:3], -1, dtype=torch.int32, device=keys.device)
            kept = Kept(
                TokenBuffer.of(keys),
                TokenBuffer.of(values),
                TokenBuffer.of(nowhere),
                start=kept.start,
            )
        self.kept = None if kept is None else self._packed(kept)

    def call(
        self, states: KeptStates, kept: Kept, q: Tensor, k: Any, v: Any, lse: Tensor,
        scale: float | None, bias: Tensor | None, softcap: float | None,
    ) -> EvictionCall:  # fmt: skip
        """The method's view of the layer after a pass; k and v are tensors, or PackedBuffers."""
        if kept.position is None:
            batch, heads, stored, _ = kept.keys.shape
            place = torch.arange(stored, dtype=torch.int32, device=q.device)
            position = place.expand(batch, heads, -1)
        else:
            position = kept.position.tokens
        state = {name: each.tokens for name, each in kept.state.items()}
        return EvictionCall(
            q, k, v, lse, position, bias, self.length, kept.start, scale, self.number,
            self.num_layers, state, self.rotary, states.new_key, states.slot, softcap,
        )  # fmt: skip

    def get_seq_length(self) -> int:
        """All tokens so far, evicted ones included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length of a mask, which covers all tokens, evicted ones included; and its offset."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of get_max_length in older releases of transformers."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to take tokens back.

        Raises:
            ValueError: a number other than 0.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                "tokens cannot be taken back from a cache that keeps fewer keys, as others have "
                "made room for them: use a method that chooses keys, such as token_select, for "
                "assisted generation"
            )

    def reset(self) -> None:
        """Drops everything."""
        self.kept, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows of the batch in this order, as beam search chooses them."""
        if self.kept is not None:
            self.kept = self.kept.rows(beam_idx.to(self.kept.keys.parts()[0].device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        if self.kept is not None:
            self.reorder_cache(self._numbers().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps these rows of the batch, given by number or by a bool mask."""
        if self.kept is not None:
            self.reorder_cache(self._numbers()[indices])

    def tensors(self) -> list[Tensor]:
        """All memory that it holds."""
        return [] if self.kept is None else self.kept.tensors()

    def _numbers(self) -> Tensor:
        assert self.kept is not None
        codes = self.kept.keys.parts()[0]
        return torch.arange(codes.shape[0], device=codes.device)

    def offload(self) -> None:
        """Moves everything to the CPU until prefetch."""
        self._to("cpu")

    def prefetch(self) -> None:
        """Moves everything back to the device of the tokens."""
        self._to(self.device)

    def _to(self, device: torch.device | str) -> None:
        if self.kept is not None:
            self.kept = self.kept.to(device)


@dataclass(eq=False)
class KeptStates:
    """A layer's stored keys after the tokens of a forward pass were appended.

    It is no tensor; using it as one raises an error that says what to do.

    kept: the stored keys, new ones included. length: all tokens so far.
    new_key: [B, Hkv, L, D] and new_value: [B, Hkv, L, Dv], of this pass, in full precision.
    slot: int32 [B, Hkv, 1], where the new token is stored; None: new tokens are the last.
    """

    layer: KeptKeysLayer
    kept: Kept
    length: int
    new_key: Tensor
    new_value: Tensor
    slot: Tensor | None

    def refuse(self, module: nn.Module, method: Any, s_aux: Any, indices: Any) -> None:
        """Raises where a layer adds to attention, or has another method already.

        Raises:
            ValueError: saying what.
        """
        what = {"attention sinks (s_aux)": s_aux, "lists of keys": indices}
        for name, each in what.items():
            if each is not None:
                raise ValueError(
                    f"{type(module).__name__} has {name}, with which keys cannot be evicted"
                )
        if method is not None:
            raise ValueError(
                f"{name_of(self.layer.evictor)} evicts keys in a layer in which another "
                "patch chooses keys: leave one of the two"
            )

    def attend(
        self, q: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Causal attention to what is stored, out [B, Hq, L, Dv] and lse f32 [B, Hq, L]; then keys
        are evicted. Of packed keys lse leaves out the logit of their mean.

        Args:
            mask: bool [B | 1, 1, 1, N] over all tokens, where padding is hidden; or a mask of every
                query, [B | 1, 1, L, N], as long as every key is there, and either stays or is seen
                by the last query if any query sees it.
            softcap: of the logits, or None.

        Raises:
            ValueError: a mask that does not fit; a softcap where the mean was subtracted from
                packed keys.
        """
        kept, slot, queries = self.kept, self.slot, q.shape[2]
        own = mask is not None and mask.shape[2] > 1
        if mask is not None and (mask.dtype != torch.bool or mask.shape[3] != self.length):
            raise ValueError(
                f"attention_mask must be bool and cover all {self.length} tokens so far, those "
                f"that were evicted included, got {mask.dtype} {list(mask.shape)}"
            )
        if own and kept.position is not None:
            raise ValueError(
                "attention_mask has a row for every query, and some of its keys were evicted: pass "
                f"a mask of padding, [B, N], got {list(mask.shape)}"
            )
        fixed = False  # whether all keys must stay
        if kept.position is None:
            bias = None
            if mask is not None and own:
                fixed = bool((mask & ~mask[:, :, -1:]).any())
            if mask is not None and not fixed:
                visible = mask[:, 0, -1].expand(q.shape[0], -1)
                if kept.start is None:
                    kept = replace(kept, start=visible.int().argmax(1).to(torch.int32))
                bias = torch.zeros(visible.shape, device=q.device).masked_fill(~visible, -torch.inf)
                bias = bias[:, None].expand(-1, kept.keys.shape[1], -1)
        else:
            if mask is not None:
                kept = kept.hidden(mask[:, 0, 0, self.length - self.new_key.shape[2] :], slot)
            bias = None if kept.bias is None else kept.bias.tokens
        keys: Tensor | PackedBuffer
        values: Tensor | PackedBuffer
        if queries == 1 and isinstance(kept.keys, PackedBuffer):
            assert isinstance(kept.values, PackedBuffer)
            keys, values = kept.keys, kept.values
            if softcap is not None and keys.mean is not None:
                raise ValueError(
                    f"softcap = {softcap} needs whole logits, and the cache packs keys without "
                    "their mean: make it with center=False"
                )
            out, lse = tokred.packed_attention(
                q, keys.packed, values.packed, scale=scale, key_bias=bias, softcap=softcap
            )
        else:
            keys = self._whole(kept.keys, self.new_key).to(q.dtype)
            values = self._whole(kept.values, self.new_value).to(q.dtype)
            whole = kept.position is None
            out, lse = tokred.biased_attention(
                q, keys, values, None if whole else bias, causal=queries > 1 and not own,
                scale=scale, mask=mask if whole else None, softcap=softcap,
            )  # fmt: skip
        if queries == 1 and getattr(self.layer.evictor, "prompts_only", False):
            self.layer.hold(kept)
            return out, lse
        call = self.layer.call(self, kept, q, keys, values, lse, scale, bias, softcap)
        call.mask = mask if own else None
        self.layer.shrink(kept, call, fixed)
        return out, lse

    def _whole(self, held: TokenBuffer | PackedBuffer, new: Tensor) -> Tensor:
        """All tokens in full precision; new ones, which are the last, are not read from codes."""
        tokens = held.tokens
        if isinstance(held, PackedBuffer):
            tokens[:, :, -new.shape[2] :] = new
        return tokens

    def __getitem__(self, index: Any) -> NoReturn:
        raise ValueError(f"no slices: {ADVICE}")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"no {name!r}: {ADVICE}")

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        # Not a TypeError: of operators torch would make "unsupported operand" of it.
        raise ValueError(f"{getattr(function, '__name__', function)}: {ADVICE}")
