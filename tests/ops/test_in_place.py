"""The ops that write into their arguments: autograd learns of it, and buffers may not overlap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tokred
from cases.compare import assert_bitwise_equal
from cases.torch_ops import tokens as floats
from tokred import PackFormat

OPS = torch.ops.tokred
FORMAT = PackFormat(4, 16)
MAP = torch.tensor([[0, 1, -1, 2, 0, 2], [2, 1, 0, 9, 0, 1]], dtype=torch.int32)


def in_place_calls() -> dict[str, tuple[Callable, list[Tensor]]]:
    """Calls, and what they write."""
    x, wide = floats(2, 6, 8), floats(2, 2, 8, 16)
    out, out_size, unpacked = floats(2, 3, 8), floats(2, 3), floats(2, 2, 8, 16)
    packed, room, window = (
        tokred.kv_pack(wide, 4, 16),
        FORMAT.empty(2, 2, 8, 16),
        wide[:, :, :4] + 0,
    )
    keys, values, slot = wide + 0, wide + 1, torch.zeros(2, 2, 1, dtype=torch.int32)
    replaced = slot, keys, wide[:, :, :1] + 2, values, wide[:, :, :1] + 2
    return {
        "replace_token": (lambda: tokred.replace_token(*replaced), [keys, values]),
        "replace_token op": (lambda: OPS.replace_token(*replaced), [keys, values]),
        "merge": (lambda: tokred.merge(x, MAP, 3, out=out, out_size=out_size), [out, out_size]),
        "merge op": (
            lambda: OPS.merge_out(x, MAP, None, None, "sum", out, out_size),
            [out, out_size],
        ),
        "kv_unpack": (lambda: tokred.kv_unpack(packed, out=unpacked), [unpacked]),
        "kv_unpack op": (lambda: OPS.kv_unpack_into(*packed.arguments(), unpacked), [unpacked]),
        "kv_append": (
            lambda: tokred.kv_append(wide[:, :, :5], room, 0, window),
            [room.codes, room.params, window],
        ),
        "kv_append op": (
            lambda: OPS.kv_append(
                wide, room.codes, room.params, None, 0, *astuple(FORMAT)
            ),
            [room.codes, room.params],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", in_place_calls())
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_writes_are_counted(case: str, mode: Callable) -> None:
    call, written = in_place_calls()[case]
    versions = [t._version for t in written]
    with mode():
        call()
    assert all(t._version > v for t, v in zip(written, versions, strict=True))
    with torch.inference_mode():
        inference, _ = in_place_calls()[case]
    inference()  # buffers of inference mode have no version


def test_autograd_sees_an_overwritten_tensor() -> None:
    x, leaf = floats(2, 6, 8), floats(2, 3, 8).requires_grad_()
    out, out_size = floats(2, 3, 8), floats(2, 3)
    product = leaf * out
    tokred.merge(x, MAP, 3, out=out, out_size=out_size)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_refused_write_is_not_counted() -> None:
    x, out, out_size = floats(2, 6, 8), floats(2, 3, 8), floats(2, 4)
    for call in (
        lambda: tokred.merge(x, MAP, 3, out=out, out_size=out_size),
        lambda: OPS.merge_out(x, MAP, None, None, "sum", out, out_size),
    ):
        with pytest.raises(RuntimeError, match="out_size"):
            call()
    assert out._version == 0


def test_writes_under_compile() -> None:
    def function(x: Tensor, out: Tensor, out_size: Tensor) -> Tensor:
        tokred.merge(x, MAP, 3, out=out, out_size=out_size)
        return out * 2

    x = floats(2, 6, 8)
    buffers = [(floats(2, 3, 8), floats(2, 3)) for _ in range(2)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    version = buffers[0][0]._version
    assert_bitwise_equal(compiled(x, *buffers[0]), function(x, *buffers[1]))
    assert_bitwise_equal(buffers[0], buffers[1])
    assert buffers[0][0]._version > version


def overlapping_calls() -> dict[str, tuple[str, Callable[[Callable[[Tensor], Tensor]], None]]]:
    """What is refused, and a call whose buffers go through a function first."""
    x, wide = floats(2, 6, 8), floats(2, 2, 8, 16)
    row, size, room = torch.zeros(2, 1, 8), torch.zeros(2, 1), FORMAT.empty(1, 2, 8, 16)

    def merge(prepare: Callable, out: Tensor, out_size: Tensor) -> None:
        OPS.merge_out(*map(prepare, (x, MAP)), None, None, "sum", *map(prepare, (out, out_size)))

    def append(prepare: Callable, codes: Tensor, params: Tensor) -> None:
        OPS.kv_append(*map(prepare, (wide, codes, params)), None, 0, *astuple(FORMAT))

    return {
        "out": ("out", lambda f: merge(f, row.expand(2, 3, 8), torch.zeros(2, 3))),
        "out_size": ("out_size", lambda f: merge(f, torch.zeros(2, 3, 8), size.expand(2, 3))),
        "codes": ("codes", lambda f: append(
            f, room.codes.expand(2, -1, -1, -1), torch.zeros(2, 2, 8, 2, dtype=torch.float16))),
        "params": ("params", lambda f: append(
            f, torch.zeros(2, 2, 8, 8, dtype=torch.uint8), room.params.expand(2, -1, -1, -1))),
    }  # fmt: skip


@pytest.mark.parametrize("case", overlapping_calls())
@pytest.mark.parametrize("fake", [False, True])
def test_buffers_that_overlap_themselves_are_refused(case: str, fake: bool) -> None:
    name, call = overlapping_calls()[case]
    mode = FakeTensorMode()
    with pytest.raises(RuntimeError, match=f"{name} must not overlap itself"):
        call(mode.from_tensor if fake else torch.Tensor.detach)
