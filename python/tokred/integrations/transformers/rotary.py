"""Rotary embeddings that can be applied later, at other positions than the model's own."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tokred.patching import AttentionCall, Overrides

ADVICE = "use rotation='cached'"


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
            # Another thread may set another length: what is returned is this call's own.
            table = self._table = cos[0], sin[0]
        return table

    def halves(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin f32 [length or more, D / 2], as `sparse_attention` takes them."""
        cos, sin = self.tables(length, device)
        return cos[:, : cos.shape[1] // 2], sin[:, : sin.shape[1] // 2]

    def rotate(self, x: Tensor, positions: Tensor, limit: int) -> Tensor:
        """x [B, H, L, D] rotated to positions [B | 1, L] below the limit, as the model does it."""
        cos, sin = self.tables(limit, x.device)
        cos, sin = (table[positions].to(x.dtype) for table in (cos, sin))
        return self._rotate(x, x, cos, sin)[0]


def unrotated(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The identity in the place of a module's position embeddings."""
    return torch.ones_like(cos), torch.zeros_like(sin)


def find_rotary(model: nn.Module, modules: Sequence[nn.Module]) -> Rotary:
    """The rotary embedding beside attention modules, if it is of the kind the kernels have.

    Every module is run on three tokens, to see that it rotates as expected.

    Raises:
        ValueError: there is none, it changes with the length or the layer, it does not rotate the
            two halves of every head, or a module does not rotate at all.
    """
    module = modules[0]
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
        raise ValueError(f"{name} has no rotary embedding to compact: {ADVICE}")
    if "layer_type" in inspect.signature(embedding.forward).parameters:
        raise ValueError(f"{name}'s rotary embedding differs from layer to layer: {ADVICE}")
    if getattr(embedding, "rope_type", "default") in ("dynamic", "longrope"):
        raise ValueError(
            f"{name}'s rotary embedding changes with the length ({embedding.rope_type}): {ADVICE}"
        )
    rotary = Rotary(embedding, rotate)
    if not _rotates_halves(embedding, rotate):
        raise ValueError(
            f"{name} does not rotate the two halves of every head as Llama does: {ADVICE}"
        )
    for each in modules:
        _check_rotation(each, rotary)
    return rotary


def _rotates_halves(embedding: nn.Module, rotate: Callable) -> bool:
    try:
        angle = embedding(torch.empty(1), torch.tensor([[3, 7, 12]]))[0].shape[-1]
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(1, 1, 3, angle, generator=draw)
        angles = torch.rand(1, 3, angle // 2, generator=draw)
        cos, sin = angles.cos(), angles.sin()
        rotated = rotate(x, x, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))[0]
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):
        return False
    first, second = x.chunk(2, -1)
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.shape == expected.shape and torch.allclose(rotated, expected, atol=1e-5)


class _Seen:
    """Stands for a method, and keeps the queries and keys that a module hands over."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        self.states = call.q, call.k
        return call.dense()


@torch.no_grad()
def _check_rotation(module: nn.Module, rotary: Rotary) -> None:
    from .attention import register

    weight = next(p for p in module.parameters() if p.is_floating_point())
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, module.config.hidden_size, generator=draw)
    hidden = hidden.to(weight.device, weight.dtype)
    positions = torch.tensor([[3, 7, 12]], device=weight.device)
    cos, sin = (table[positions].to(weight.dtype) for table in rotary.tables(13, weight.device))
    forward = getattr(module.forward, "tokred_original", module.forward)
    overrides = Overrides()
    seen = []
    try:
        overrides.assign(module.config, "_attn_implementation_internal", register())
        for embeddings in ((cos, sin), unrotated(cos, sin)):
            seen.append(_Seen())
            forward(hidden, position_embeddings=embeddings, attention_mask=None,
                    tokred_method=seen[-1])  # fmt: skip
        own, plain = (each.states for each in seen)
        ours = [rotary.rotate(x, positions, 13) for x in plain]
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{type(module).__name__} cannot leave its keys without rotation ({error}): {ADVICE}"
        ) from error
    finally:
        overrides.undo()
    for expected, actual in zip(own, ours, strict=True):
        if actual.shape != expected.shape or (actual - expected).norm() > 0.02 * expected.norm():
            raise ValueError(
                f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')} does not "
                f"rotate its queries and keys as its model's rotary embedding does: {ADVICE}"
            )
