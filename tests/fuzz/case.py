"""A call of an op with drawn arguments, and what is known of its result."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from draw import F64, Draw
from torch import Tensor

import tokred
from cases.backends import move
from tokred import PackedKV


def namespace() -> Any:
    """torch.ops.tokred, or the emulated device's ops."""
    return _namespaces[-1]


_namespaces = [torch.ops.tokred]


class on_device:
    """Raw ops and wrappers inside call the emulated device."""

    def __init__(self, simt: bool) -> None:
        self.simt = simt

    def __enter__(self) -> None:
        if self.simt:
            _namespaces.append(torch.ops.tokred_simt)
            self._set(torch.ops.tokred_simt)

    def __exit__(self, *_: object) -> None:
        if self.simt:
            _namespaces.pop()
            self._set(torch.ops.tokred)

    @staticmethod
    def _set(ops: Any) -> None:
        for name, module in sys.modules.items():
            if name.startswith("tokred.ops.") and hasattr(module, "_ops"):
                module._ops = ops


@dataclass
class Case:
    """`call` with `arguments`, the wrapper of the op if it is None.

    plain: the same in plain torch at the precision of its inputs, which is given them in float64
        and in the precision of the op's sums; its results must be near those of the op, or what
        `measure` makes of them; see compare.near for slack and where.
    check: looks at the results itself, and raises Mismatch.
    batched: arguments of which every item of the batch has its part.
    loose: arguments whose last dimension may have any stride; dense: that must be contiguous.
    written: arguments that the call writes. refusable: it may refuse with a RuntimeError.
    halves: devices round weights to the half precision of the inputs.
    """

    op: str
    arguments: dict[str, Any]
    plain: Callable[..., Any] | None = None
    slack: float = 2e-6
    where: Any = None
    check: Callable[[Any], None] | None = None
    call: Callable[..., Any] | None = None
    batched: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    measure: Callable[[Any], Any] = lambda out: out
    refusable: bool = False
    halves: bool = False

    def run(self, arguments: dict[str, Any], backend: str = "cpu") -> Any:
        """The result on "cpu", "simt" or "cuda", moved back to the CPU."""
        call = self.call or getattr(tokred, self.op)
        if backend == "cuda":
            return moved(call(**moved(arguments, "cuda")), "cpu")
        with on_device(backend == "simt"):
            return call(**arguments)

    def batch(self) -> int:
        """Items of the batch; 0 where they cannot be taken apart."""
        sizes = {_items(self.arguments.get(name)) for name in self.batched} - {None}
        return max(sizes, default=0)

    def item(self, number: int) -> dict[str, Any]:
        """The arguments of one item of the batch."""
        whole, batch = self.arguments, self.batch()
        return {
            name: _part(value, number, batch) if name in self.batched else clone(value)
            for name, value in whole.items()
        }

    def strided(self, draw: Draw) -> dict[str, Any]:
        """The arguments as views with other strides."""
        return {name: self._strided(draw, name, v) for name, v in self.arguments.items()}

    def _strided(self, draw: Draw, name: str, value: Any) -> Any:
        if name in self.dense:
            return clone(value)
        if isinstance(value, Tensor):
            return draw.strided(value, name in self.loose)
        if isinstance(value, PackedKV):
            codes, params, levels = (
                t if t is None else draw.strided(t, False)
                for t in (value.codes, value.params, value.levels)
            )
            return replace(value, codes=codes, params=params, levels=levels)
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            dims = self.arguments["token_dims"]
            return [_strided_tokens(draw, t, d) for t, d in zip(value, dims, strict=True)]
        return value

    def __str__(self) -> str:
        described = ", ".join(f"{name}={_described(v)}" for name, v in self.arguments.items())
        return f"{self.op}({described})"


def _strided_tokens(draw: Draw, x: Tensor, dim: int) -> Tensor:
    """As Draw.strided, with everything behind the token dimension contiguous."""
    tail = x.shape[dim + 1 :]
    if not x.numel() or not tail:
        return draw.strided(x, True)
    return draw.strided(x.flatten(dim + 1), False).unflatten(dim + 1, tail)


def moved(value: Any, device: str) -> Any:
    """The value with its tensors on a device, strides kept."""
    if isinstance(value, dict):
        return {name: moved(v, device) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return move(value, device)
    if is_dataclass(value):
        parts = {field.name: moved(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **parts)
    return move(value, device)


def clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone(memory_format=torch.contiguous_format)
    if isinstance(value, PackedKV):
        return replace(value, codes=value.codes.clone(), params=value.params.clone())
    if isinstance(value, dict):
        return {name: clone(v) for name, v in value.items()}
    return [clone(v) for v in value] if isinstance(value, list) else value


def _items(value: Any) -> int | None:
    if isinstance(value, list):
        return _items(value[0])
    if isinstance(value, PackedKV):
        value = value.codes
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else None


def _part(value: Any, number: int, batch: int) -> Any:
    """An item of the batch; what all items share stays."""
    if isinstance(value, PackedKV):
        codes, params = (_part(t, number, batch) for t in (value.codes, value.params))
        return replace(value, codes=codes, params=params)
    if isinstance(value, list):
        return [_part(v, number, batch) for v in value]
    if isinstance(value, Tensor) and value.shape[0] == batch:
        return value[number : number + 1].clone()
    return clone(value)


def widened(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with their floats in a dtype."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        return value

    return {name: wide(value) for name, value in arguments.items()}


def precision(arguments: dict[str, Any]) -> torch.dtype:
    """What the op sums in."""
    tensors = [v for v in arguments.values() if isinstance(v, Tensor)]
    return F64 if any(t.dtype == F64 for t in tensors) else torch.float32


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, PackedKV):
        return f"{_described(value.codes)}, {_described(value.params)}, {value.format}"
    if isinstance(value, list):
        return f"[{', '.join(_described(v) for v in value)}]"
    return repr(value)


CASES: dict[str, Callable[[Draw], Case]] = {}


def op_case(make: Callable[[Draw], Case]) -> Callable[[Draw], Case]:
    """Registers what makes cases of an op, under its own name."""
    CASES[make.__name__] = make
    return make
