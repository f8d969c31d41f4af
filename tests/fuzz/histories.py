"""Random sequences of calls of a PackedCache, beside the tokens that it should hold."""

from __future__ import annotations

import copy
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from compare import Mismatch
from draw import BF16, F16, F32, Draw
from torch import Tensor

import tokred
from tokred import PackedKV
from tokred.cache import PackedCacheLayer
from tokred.ops.kv_pack import packed_tokens
from tokred.reference.kv_pack import hadamard

LAYERS = 2
_ROUNDING = {F32: 1e-5, F16: 5e-3, BF16: 4e-2}
_SOME_LENGTHS = (1, 1, 1, 2, 3, 7, 16, 33, 64, 100, 0)
_CALLS = {
    "update": 10, "crop": 4, "reorder": 2, "select": 2, "repeat": 1, "reset": 0.4, "save": 2,
    "copy": 2, "refused": 3, "offload": 1, "attend": 3,
}  # fmt: skip


def config(head_dim: int, heads: int) -> Any:
    return transformers.LlamaConfig(
        hidden_size=96, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=head_dim, vocab_size=11,
    )  # fmt: skip


def options(draw: Draw, head_dim: int) -> dict[str, Any]:
    """Options of a PackedCache."""
    scheme = draw.choice(["asymmetric", "asymmetric", "zero_point", "symmetric", "fp8", "codebook"])
    few = {"symmetric": [2, 3, 4, 8], "codebook": [1, 2, 3, 4]}.get(scheme, [1, 2, 3, 4, 8])
    bits = 8 if scheme == "fp8" else draw.choice(few)
    some: dict[str, Any] = {"bits": bits, "scheme": scheme, "rotate": draw.chance()}
    if scheme != "fp8" and draw.chance(0.3):
        some["value_bits"] = draw.choice([2, 3, 4] if scheme == "codebook" else [2, 3, 4, 8])
    axis = draw.choice([None, "channel", "token"]) if scheme != "codebook" else "channel"
    if axis:
        some["key_axis"] = axis
    axis = axis or ("token" if min(bits, some.get("value_bits", bits)) < 4 else "channel")
    divisors = [16 * n for n in (1, 2, 4, 8) if head_dim % (16 * n) == 0]
    if axis == "channel":
        some["window"] = draw.one_of(0, 1, 2, 5, 16, 32)
        if draw.chance(0.4):
            some["group_size"] = draw.choice(divisors)
    elif draw.chance(0.6):
        some["group_size"] = draw.choice(divisors)
        some["window"] = some["group_size"] * draw.one_of(1, 2, 3)
    if draw.chance(0.3):
        some["capacity"] = draw.one_of(1, 10, 50, 100, 300)
    return some


def held(layer: PackedCacheLayer) -> list[Tensor]:
    """Keys and values in a layer [B, H, T, D], out of its codes and windows."""
    return [
        _held(layer, name, side) for name, side in zip(("key", "value"), layer.packed, strict=True)
    ]


def _packed_part(layer: PackedCacheLayer, side: PackedKV) -> PackedKV:
    form = side.format
    count = packed_tokens(form.axis, layer.layout.window, layer.length)
    rows = count // form.group_size if form.axis == "token" else count
    return replace(side, codes=side.codes[:, :, :count], params=side.params[:, :, :rows])


def _held(layer: PackedCacheLayer, name: str, side: PackedKV) -> Tensor:
    part = _packed_part(layer, side)
    tokens = tokred.kv_unpack(part)
    if layer.layout.window:
        window = layer.windows[name]
        rows = torch.arange(part.num_tokens, layer.length) % window.shape[2]
        recent = window[:, :, rows].float()
        tokens = torch.cat([tokens, hadamard(recent) if side.format.rotated else recent], 2)
    mean = layer.key_mean if name == "key" else None
    return tokens if mean is None else tokens + mean.float()


def _allowed_packed(part: PackedKV, want: Tensor) -> float:
    """How far codes may be from what they were made of."""
    if not part.num_tokens:
        return 0.0
    # Of a codebook 4.5 root mean squares, beyond its outer level.
    steps = {"fp8": 18.0, "zero_point": 1.1, "codebook": 144.0}.get(part.format.scheme, 0.51)
    spread = math.sqrt(part.head_dim) if part.format.rotated else 1.0
    return steps * spread * float(part.scale.float().abs().max()) + 3e-3 * float(want.abs().max())


@dataclass
class History:
    """A cache, and the tokens [layer][side] that it should hold; None before the first."""

    draw: Draw
    log: list[str]

    def __post_init__(self) -> None:
        draw = self.draw
        self.head_dim = 16 * draw.one_of(1, 2, 3, 4, 5, 8, 16)
        self.heads = draw.one_of(1, 2, 3)
        self.config = config(self.head_dim, self.heads)
        self.options = options(draw, self.head_dim)
        self.cache = tokred.PackedCache(self.config, **self.options)
        self._start()
        shape = f"{self.heads} heads of {self.head_dim}, {self.dtype}"
        self.log.append(f"PackedCache(**{self.options}), {shape}")

    def _start(self) -> None:
        self.tokens: list[list[Tensor]] | None = None
        self.batch, self.dtype = self.draw.one_of(1, 2, 3), self.draw.dtype()

    @property
    def length(self) -> int:
        return 0 if self.tokens is None else self.tokens[0][0].shape[2]

    def states(self, count: int) -> Tensor:
        shape = (self.batch, self.heads, count, self.head_dim)
        return torch.randn(shape, generator=self.draw.generator()).to(self.dtype)

    def step(self) -> None:
        call = self.draw.choices(list(_CALLS), list(_CALLS.values()))[0]
        if self.tokens is None and call not in ("update", "reset", "save", "copy", "crop"):
            return
        getattr(self, f"_{call}")()
        self._check()

    # The calls. Each does to the tokens what it does to the cache.
    def _update(self) -> None:
        count = self.draw.choice(_SOME_LENGTHS)
        self.log.append(f"update {count}")
        new = [[self.states(count) for _ in range(2)] for _ in range(LAYERS)]
        room = self.options.get("capacity")
        if room is not None and self.length + count > room:
            self._refuses(lambda: self.cache.update(*new[0], 0), "more than the capacity")
            return
        for number, sides in enumerate(new):
            self.cache.update(*sides, number)
        if self.tokens is None:
            self.tokens = [[side.float() for side in sides] for sides in new]
        else:
            self.tokens = [
                [torch.cat([a, b.float()], 2) for a, b in zip(old, sides, strict=True)]
                for old, sides in zip(self.tokens, new, strict=True)
            ]

    def _crop(self) -> None:
        count = self.draw.randrange(self.length + 1)
        self.log.append(f"crop {-count}")
        before = [held(layer) for layer in self.cache.layers] if self.length else []
        for bad in (1, -self.length - 1):
            if self.tokens is not None:
                self._refuses(lambda bad=bad: self.cache.layers[0].crop(bad), f"crop({bad})")
        self.cache.crop(-count)
        if not count:
            return
        left = self.length - count
        for number, layer in enumerate(self.cache.layers):
            after = held(layer)
            for side in range(2):
                old = before[number][side][:, :, :left]
                want = self.tokens[number][side][:, :, :left]
                # What left the window before may come back out of its codes.
                allowed = _ROUNDING[self.dtype] * (1 + float(old.abs().max())) if left else 0.0
                error = torch.minimum((after[side] - old).abs(), (after[side] - want).abs())
                packed = _packed_part(layer, layer.packed[side]).num_tokens
                self._within(error[:, :, packed:], allowed, f"crop: window of layer {number}")
                want = want.clone()
                want[:, :, packed:] = after[side][:, :, packed:]
                self.tokens[number][side] = want

    def _reorder(self) -> None:
        rows = torch.tensor([self.draw.randrange(self.batch) for _ in range(self.batch)])
        self.cache.reorder_cache(rows)
        self._take(rows, "reorder")

    def _select(self) -> None:
        if self.draw.chance(0.4):
            mask = torch.tensor([self.draw.chance(0.7) for _ in range(self.batch)])
            mask[self.draw.randrange(self.batch)] = True
            self.cache.batch_select_indices(mask)
            self._take(mask.nonzero()[:, 0], "select by a mask")
            return
        count = self.draw.one_of(1, 2, 4)
        rows = torch.tensor([self.draw.randrange(self.batch) for _ in range(count)])
        self.cache.batch_select_indices(rows)
        self._take(rows, "select")

    def _repeat(self) -> None:
        if self.batch > 6:
            return
        times = self.draw.one_of(1, 2, 3)
        self.cache.batch_repeat_interleave(times)
        self._take(torch.arange(self.batch).repeat_interleave(times), "repeat")

    def _take(self, rows: Tensor, call: str) -> None:
        self.log.append(f"{call} {rows.tolist()}")
        self.batch = len(rows)
        self.tokens = [[side[rows] for side in sides] for sides in self.tokens]

    def _reset(self) -> None:
        self.log.append("reset")
        self.cache.reset()
        self._start()

    def _save(self) -> None:
        self.log.append("save and load")
        before = _bits(self.cache)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            self.cache.save(path)
            self.cache = tokred.PackedCache.load(path, self.config)
        self._unchanged(before, "save and load")

    def _copy(self) -> None:
        self.log.append("deepcopy, and an update of the other one")
        other, self.cache = self.cache, copy.deepcopy(self.cache)
        if self.tokens is None or self.options.get("capacity"):
            return
        before = _bits(self.cache)
        other.update(self.states(5), self.states(5), 0)
        other.crop(-min(3, self.length))
        self._unchanged(before, "an update of a copy")

    def _refused(self) -> None:
        """Tokens that do not fit, in one way or another."""
        keys, values = self.states(2), self.states(2)
        bad = {
            "float64": (keys.double(), values.double()),
            "float64 values": (keys, values.double()),
            "fewer keys": (keys[:, :, :1], values),
            "another batch": (torch.cat([keys, keys]), torch.cat([values, values])),
            "another head_dim": (keys[..., :-1], values),
            "another head_dim of values": (keys, torch.cat([values, values], 3)),
            "another number of heads": (torch.cat([keys] * 2, 1), torch.cat([values] * 2, 1)),
            "three dimensions": (keys[0], values[0]),
            "whole numbers": (keys.int(), values.int()),
            "values of another batch": (keys, torch.cat([values, values])),
        }
        name = self.draw.choice(list(bad))
        self.log.append(f"refused: {name}")
        self._refuses(lambda: self.cache.update(*bad[name], 0), name)

    def _offload(self) -> None:
        self.log.append("offload and prefetch")
        for layer in self.cache.layers:
            layer.offload()
            layer.prefetch()

    def _attend(self) -> None:
        if not self.length:
            return
        self.log.append("attend")
        layer = self.cache.layers[0]
        shape = self.batch, 2 * self.heads, self.draw.one_of(1, 3), self.head_dim
        q = torch.randn(shape, generator=self.draw.generator()).to(self.dtype)
        windows = layer.windows.get("key"), layer.windows.get("value")
        out, _ = tokred.packed_attention(q, *layer.packed, *windows, length=self.length)
        keys, values = (side.double().repeat_interleave(2, 1) for side in held(layer))
        mean = layer.key_mean
        keys = keys if mean is None else keys - mean.double().repeat_interleave(2, 1)
        exact = torch.nn.functional.scaled_dot_product_attention(q.double(), keys, values)
        largest = float(values.abs().max())
        logit = float(q.double().abs().max() * keys.abs().sum(-1).max()) * self.head_dim**-0.5
        allowed = (2e-5 if self.dtype == F32 else 2e-2) * (1 + largest)
        if self.dtype != F32:
            allowed += 2**-13 * logit * self.head_dim**0.5 * largest
        if allowed < 1:
            self._within((out.double() - exact).abs(), allowed, "attention")

    # What is asked after every call.
    def _check(self) -> None:
        for number, layer in enumerate(self.cache.layers):
            if layer.get_seq_length() != self.length:
                raise Mismatch(
                    f"layer {number} has {layer.get_seq_length()} tokens, not {self.length}"
                )
            if not self.length:
                continue
            for side, (got, want) in enumerate(zip(held(layer), self.tokens[number], strict=True)):
                what = f"layer {number}, {'values' if side else 'keys'}"
                if got.shape != want.shape:
                    raise Mismatch(f"{what} have shape {list(got.shape)}, not {list(want.shape)}")
                part, error = _packed_part(layer, layer.packed[side]), (got - want).abs()
                rounding = _ROUNDING[self.dtype] * (1 + float(want.abs().max()))
                allowed = rounding + _allowed_packed(part, want)
                self._within(error[:, :, part.num_tokens :], rounding, f"{what}: the window")
                self._within(error[:, :, : part.num_tokens], allowed, f"{what}: packed tokens")

    def _within(self, error: Tensor, allowed: float, what: str) -> None:
        if error.numel() and not float(error.max()) <= allowed:
            raise Mismatch(f"{what}: off by {float(error.max()):.3g}, allowed {allowed:.3g}")

    def _refuses(self, call: Any, what: str) -> None:
        before = _bits(self.cache)
        try:
            call()
        except ValueError:
            self._unchanged(before, f"the refusal of {what}")
        else:
            raise Mismatch(f"{what} was accepted")

    def _unchanged(self, before: list[tuple[int, list[Tensor]]], what: str) -> None:
        if not equal(_bits(self.cache), before):
            raise Mismatch(f"{what} changed the cache")


def _bits(cache: Any) -> list[tuple[int, list[Tensor]]]:
    """The length and copies of the live tokens of every layer."""
    return [(layer.length, live(layer)) for layer in cache.layers]


def live(layer: PackedCacheLayer) -> list[Tensor]:
    """What of a layer's tensors holds tokens, copied."""
    if not layer.is_initialized:
        return []
    parts = []
    for name, side in zip(("key", "value"), layer.packed, strict=True):
        part = _packed_part(layer, side)
        parts += [part.codes.clone(), part.params.clone()]
        if layer.layout.window:
            window = layer.windows[name]
            rows = torch.arange(part.num_tokens, layer.length) % window.shape[2]
            parts.append(window[:, :, rows])
    return parts


def equal(some: list[tuple[int, list[Tensor]]], others: list[tuple[int, list[Tensor]]]) -> bool:
    """Whether two results of _bits are."""
    for (length, parts), (other_length, other_parts) in zip(some, others, strict=True):
        if length != other_length or (length and len(parts) != len(other_parts)):
            return False
        pairs = zip(parts, other_parts, strict=False)
        if length and not all(torch.equal(a, b) for a, b in pairs):
            return False
    return True


def examine(name: str, seed: int) -> None:
    """One history.

    Raises:
        Mismatch: the cache holds something else, or a call failed.
    """
    draw = Draw(name, seed)
    log: list[str] = []
    with torch.no_grad():
        history = History(draw, log)
        try:
            for _ in range(draw.randrange(3, 14)):
                history.step()
        except Exception as error:
            kind = "" if isinstance(error, Mismatch) else f"{type(error).__name__}: "
            raise Mismatch(f"{kind}{error}\n    " + "; ".join(log)) from error
