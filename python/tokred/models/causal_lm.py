"""transformers' language models: methods that choose which cached keys a layer attends to.

The model runs on `tokred.models.attention` inside the patch, and every full-attention layer hands
its attention to the method. A method is a dataclass of options with

    adapters = ("causal_lm",)
    rotation = "cached" or "compact"
    def attention(self, num_layers: int) -> AttentionMethod

whose `attend` is called once a layer and forward pass, in the order of the layers, so what one
layer leaves in the object the next ones find. Layers with a sliding window, and those that bring
lists of keys of their own, are left alone.

With rotation "compact" the queries and keys come without rotation, and are cached so: a cache made
inside the patch then fits only models inside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokred.patching import Overrides, Settings

from . import attention


class Rotary:
    """A model's rotary embedding at any position, for attention modules that rotate by halves."""

    def __init__(self, embedding: nn.Module, rotate: Callable) -> None:
        self._embedding = embedding
        self._rotate = rotate
        self._table: tuple[Tensor, Tensor] | None = None

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin f32 [length or more, D] of the positions from 0."""
        table = self._table
        if table is None or table[0].shape[0] < length or table[0].device != device:
            # Doubling keeps the number of tables that a growing cache asks for small.
            positions = torch.arange(1 << max(length - 1, 63).bit_length(), device=device)
            like = torch.empty(1, dtype=torch.float32, device=device)
            cos, sin = self._embedding(like, positions[None])
            self._table = cos[0], sin[0]
        return self._table

    def halves(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin f32 [length or more, D / 2], as `sparse_attention` takes them."""
        cos, sin = self.tables(length, device)
        return cos[:, : cos.shape[1] // 2], sin[:, : sin.shape[1] // 2]

    def rotate(self, x: Tensor, positions: Tensor, limit: int) -> Tensor:
        """x [B, H, L, D] rotated to positions [B | 1, L] below the limit, as the model does it."""
        cos, sin = self.tables(limit, x.device)
        cos, sin = (table[positions].to(x.dtype) for table in (cos, sin))
        return self._rotate(x, x, cos, sin)[0]


@dataclass
class Bound:
    """The method in one model, as the attention function calls it."""

    method: attention.AttentionMethod
    rotary: Rotary | None
    calls: int = 0

    def attend(self, call: attention.AttentionCall) -> tuple[Tensor, Tensor]:
        self.calls += 1
        call = replace(call, rotary=self.rotary)
        return call.dense() if call.window is not None else self.method.attend(call)


@dataclass(frozen=True)
class Stack:
    """The attention modules of one decoder, its config, and its rotary embedding, if needed."""

    modules: list[nn.Module]
    config: Any
    rotary: Rotary | None

    def install(self, method: Any, settings: Settings, overrides: Overrides) -> Any:
        state = method.attention(len(self.modules))
        bound = Bound(state, self.rotary)
        overrides.assign(self.config, "_attn_implementation", attention.register())
        for module in self.modules:
            overrides.replace(module, "forward", _attention_forward, bound, module)
        return state


def stacks(model: nn.Module, method: Any, settings: Settings) -> Iterator[Stack]:
    """The decoders in the model, one for every config that attention modules share.

    Raises:
        ValueError: options of token merging, or a rotation that the model's modules do not have.
    """
    groups: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if _is_full_attention(module):
            groups.setdefault(id(module.config), []).append(module)
    for modules in groups.values():
        if settings != Settings():
            raise ValueError(
                "prop_attn, trace_source, weighted_pool and num_prefix are for methods that merge "
                f"tokens; {type(method).__name__} chooses keys"
            )
        rotary = None
        if getattr(method, "rotation", "cached") == "compact":
            rotary = _rotary(model, modules[0])
        yield Stack(modules, modules[0].config, rotary)


def _is_full_attention(module: nn.Module) -> bool:
    """Whether it is causal self-attention over the whole cache, through transformers' interface."""
    return (
        getattr(module, "is_causal", False) is True
        and isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "config")
        and hasattr(module, "o_proj")
        and getattr(module, "sliding_window", None) is None
        and not hasattr(module, "indexer")
    )


def _rotary(model: nn.Module, module: nn.Module) -> Rotary:
    """The rotary embedding beside an attention module, if it is of the kind the kernels have."""
    name = type(module).__name__
    code = sys.modules[type(module).__module__]
    rotate = getattr(code, "apply_rotary_pos_emb", None)
    embedding = next(
        (
            m.rotary_emb
            for m in model.modules()
            if isinstance(getattr(m, "rotary_emb", None), nn.Module)
            and getattr(m.rotary_emb, "config", None) is module.config
        ),
        None,
    )
    if rotate is None or embedding is None:
        raise ValueError(f"{name} has no rotary embedding to compact: use rotation='cached'")
    if getattr(embedding, "rope_type", "default") in ("dynamic", "longrope"):
        raise ValueError(
            f"{name}'s rotary embedding changes with the length ({embedding.rope_type}): use "
            "rotation='cached'"
        )
    x = torch.randn(1, 1, 3, module.head_dim, generator=torch.Generator().manual_seed(0))
    angle = torch.rand(1, 3, module.head_dim // 2, generator=torch.Generator().manual_seed(1))
    cos, sin = angle.cos(), angle.sin()
    first, second = x.chunk(2, -1)
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    whole = embedding(x[:, 0], torch.arange(3)[None])[0].shape[-1] == module.head_dim
    rotated = rotate(x, x, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))[0] if whole else None
    if rotated is None or not torch.allclose(rotated, expected, atol=1e-5):
        raise ValueError(
            f"{name} does not rotate the two halves of every head as Llama does: use "
            "rotation='cached'"
        )
    return Rotary(embedding, rotate)


def _attention_forward(
    bound: Bound, module: nn.Module, original: Callable, *args: Any, **kwargs: Any
) -> Any:
    if bound.rotary is not None:
        if kwargs.get("position_embeddings") is None:
            raise ValueError(
                f"{type(module).__name__} was called without position_embeddings as a keyword: use "
                "rotation='cached'"
            )
        cos, sin = kwargs["position_embeddings"]
        # The identity, so that queries and keys come, and are cached, as they are.
        kwargs["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
    calls = bound.calls
    result = original(*args, tokred_method=bound, **kwargs)
    if bound.calls == calls:
        raise RuntimeError(
            f"{type(module).__name__} did not hand its attention to tokred: its attention "
            "implementation was changed inside the patch, or it does not pass its arguments on"
        )
    return result
