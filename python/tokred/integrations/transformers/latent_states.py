"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) over latents, packed or not.

A token is one row: its latent, from which the model expands keys and values of all heads, and the
rotary part of its key. In the first forward pass tokens attend to each other's expanded keys and
values, as in the model itself. Later passes expand nothing: the weights of the expansion are
absorbed into the queries and the outputs, so that a row is the key of all heads, and its latent
their value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import tokred

from .packed_states import ADVICE, PackedStates, _as


@dataclass(frozen=True, eq=False)
class LatentStates(PackedStates):
    """PackedStates of rows [B, 1, N, rank + R], of which the first `rank` channels are latents.

    value and value_window are those of the keys; new_key is [B, 1, L, rank + R]. `expanded_by`
    makes of them the states that an attention module attends with: new_key and new_value are then
    its expanded keys and values, [B, Hq, L, ...], and its queries need no change.
    """

    rank: int = 0
    weight: Tensor | None = None  # [Hq, Dn + Dv, rank]: for each head the rows of keys, then values

    def tag(self, latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """The new tokens as the module will expand them, tagged with these states."""
        return _tagged(latents, self), _tagged(rotary, self)

    def expanded_by(self, module: nn.Module, key: Tensor, value: Tensor) -> LatentStates:
        """The states with the keys and values that a module has expanded from the new tokens.

        Raises:
            ValueError: the module does not expand latents by one linear layer.
        """
        linear = getattr(module, "kv_b_proj", None)
        if type(linear) is not nn.Linear or linear.bias is not None:
            raise ValueError(
                f"{type(module).__name__} expands latents by {type(linear).__name__}, and weights "
                "can be absorbed only of a torch.nn.Linear without bias: merge adapters and keep "
                "kv_b_proj unquantized, or use a transformers.DynamicCache"
            )
        weight = linear.weight.unflatten(0, (key.shape[1], -1))
        if self.is_first:
            self._check_expansion(module, weight, key, value)
        return replace(self, new_key=key, new_value=value, weight=weight)

    def _check_expansion(
        self, module: nn.Module, weight: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Compares one token's keys and values with what the absorbed weights compute for it."""
        row = self.new_key[:, :, :1].float()
        if row.numel() == 0:
            return
        latent, rotary = row[..., : self.rank], row[..., self.rank :]
        expanded = torch.einsum("bgtr,hdr->bhtd", latent, weight.float())
        dim = key.shape[3] - rotary.shape[3]
        whole = torch.cat((expanded[..., :dim], rotary.expand(-1, key.shape[1], -1, -1)), -1)
        for got, want in ((key, whole), (value, expanded[..., dim:])):
            got = got[:, :, :1].float()
            # Far above the rounding of 16 bits, far below the difference of another formula.
            slack = 0.05 * want.abs().amax() + 1e-6
            if got.shape != want.shape or bool(((got - want).abs() > slack).any()):
                raise ValueError(
                    f"{type(module).__name__} expands latents to other keys and values than its "
                    "kv_b_proj gives, so that its weights cannot be absorbed: use a "
                    "transformers.DynamicCache"
                )

    @property
    def key_dim(self) -> int:
        """Channels of an expanded key without its rotary part."""
        return self.new_key.shape[3] - (self.row_dim - self.rank)

    @property
    def row_dim(self) -> int:
        """rank + R, the channels of a row."""
        return self.key.codes.shape[3] * 8 // self.key.format.bits

    def _from_cache(
        self, q: Tensor, scale: float | None, softcap: float | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.weight is not None
        weight, dim = self.weight.to(q.dtype), self.key_dim
        if scale is None:
            scale = q.shape[3] ** -0.5
        latent = torch.einsum("bhtd,hdr->bhtr", q[..., :dim], weight[:, :dim])
        rows = torch.cat((latent, q[..., dim:]), -1)
        out, lse = self._attend_to_rows(rows, scale, softcap=softcap, **options)
        out = torch.einsum("bhtr,hdr->bhtd", out[..., : self.rank], weight[:, dim:])
        return out, lse

    def _attend_to_rows(self, q: Tensor, scale: float, **options: Any) -> tuple[Tensor, Tensor]:
        """(out, lse) of queries [B, Hq, L, rank + R], whose first `rank` channels of out count."""
        window = _as(self.key_window, q)
        # Keys are passed as values too: the channels of out beyond the latents are not used.
        return tokred.packed_attention(
            q, self.key, self.key, window, window, scale, length=self.length, **options
        )


@dataclass(frozen=True, eq=False)
class DenseLatentStates(LatentStates):
    """LatentStates of a DenseCache: key is the rows themselves, [B, 1, N, rank + R], N the length.

    value is not used, and there are no windows.
    """

    key: Any
    value: Any

    advice: ClassVar[str] = (
        "a tokred.DenseCache with absorb=True holds latents for tokred's attention: call "
        'model.set_attn_implementation("tokred"), without a method that chooses keys, or make the '
        "cache without absorb"
    )

    @property
    def row_dim(self) -> int:
        """rank + R, the channels of a row."""
        return self.key.shape[3]

    def _attend_to_rows(self, q: Tensor, scale: float, **options: Any) -> tuple[Tensor, Tensor]:
        rows = self.key.to(q.dtype)
        return tokred.biased_attention(q, rows, rows[..., : self.rank], scale=scale, **options)


class _TaggedTensor(Tensor):
    """Latents of new tokens, or what a module expands from them, with the states of the cache.

    The older tokens are in `states` only, so no function may read such a tensor but those of the
    expansion, and tokred's attention: others raise an error that says what to do.
    """

    states: LatentStates

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        found = next(_tagged_in((*args, *(kwargs or {}).values())), None)
        if name == "_is_view":  # what Dynamo asks of a tensor that a compiled function is given
            raise RuntimeError("a cache of latents cannot be compiled: call the model itself")
        if found is None or name not in _EXPANDING:
            advice = ADVICE if found is None else found.states.advice
            # Not a TypeError: of operators torch would make "unsupported operand" of it.
            raise ValueError(
                f"{name}: {advice}; a module may only expand latents, by a kv_b_proj that is a "
                "torch.nn.Linear, unquantized and without hooks that compute"
            )
        states = found.states
        with torch._C.DisableTorchFunctionSubclass():
            if name == "linear" and states.new_key.shape[2] == 1 and not states.is_first:
                # A single query reads the cache alone, so its expanded key and value are not used.
                x, weight = args[0], args[1]
                result = x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])
            else:
                result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            return _tagged(result, states)
        if isinstance(result, tuple | list):
            return tuple(_tagged(x, states) if isinstance(x, Tensor) else x for x in result)
        return result


# What modules do with latents before the attention: functions of torch and methods of tensors.
_EXPANDING = {
    *("linear", "split", "split_with_sizes", "chunk", "cat", "concat", "new_empty", "copy_"),
    *("view", "reshape", "unflatten", "flatten", "transpose", "permute", "unsqueeze", "squeeze"),
    *("expand", "contiguous", "__getitem__", "__get__", "size", "stride", "dim", "numel", "type"),
    *("is_contiguous", "is_floating_point", "to", "pad", "_pad"),
}


def _tagged_in(args: Any) -> Any:
    for each in args:
        if isinstance(each, _TaggedTensor):
            yield each
        elif isinstance(each, tuple | list):
            yield from _tagged_in(each)


def _tagged(x: Tensor, states: LatentStates) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        tagged = x.as_subclass(_TaggedTensor)
    tagged.states = states
    return tagged


def plain(x: Tensor) -> Tensor:
    """The same memory as an ordinary tensor, without states."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def states_of(key: Any) -> LatentStates | None:
    """The states that a key expanded from latents is tagged with; None for other keys."""
    return key.states if isinstance(key, _TaggedTensor) else None
