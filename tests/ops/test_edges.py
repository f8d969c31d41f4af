"""Sizes of 0, integers of any size and outputs that share memory: the right result or one error."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases.backends import HERE, ready
from cases.compare import assert_bitwise_equal
from cases.inputs import generator
from cases.op_calls import CALLS, FORMAT, Sizes, call

OPS = sorted(CALLS)
GREAT = (2**31, 2**62, 2**63 - 1)
MAP_NORESERVE = 0x4000  # Linux's; mmap names it from Python 3.13 on
SMALL = (-1, -(2**31) - 1, -(2**63))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["cpu", *({"simt"} & set(HERE))])
def library(request: pytest.FixtureRequest, one_thread: None) -> Any:
    """The raw ops. One instruction set stands for all: they share their front ends."""
    ready(request.param)
    return {"cpu": torch.ops.tokred, "simt": torch.ops.tokred_simt}[request.param]


def writes(arg: Any) -> bool:
    """Whether an op may change the argument, so that each call needs its own."""
    return isinstance(arg, Tensor) and arg.is_contiguous()


def outcome(library: Any, op: str, args: tuple) -> list[Tensor] | str:
    """Results, or the text of the refusal."""
    args = tuple(arg.clone() if writes(arg) else arg for arg in args)
    try:
        return call(library, op, args)
    except RuntimeError as error:
        assert str(error).startswith("tokred: ") and "/" not in str(error).replace(" / ", ""), error
        return str(error)


@pytest.mark.parametrize("op", OPS)
def test_sizes_of_zero(library: Any, op: str) -> None:
    """Alone and in an empty batch: a result whose every number is written, or an error."""
    for name in (field.name for field in fields(Sizes)):
        for empty in ({name: 0}, {name: 0, "b": 0}):
            args = CALLS[op](replace(Sizes(), **empty))
            first = outcome(library, op, args)
            if isinstance(first, str):
                assert len(first) > 20
                continue
            # Other garbage in fresh memory.
            garbage = [torch.full((64 * size,), 3.0e38) for size in range(1, 40)]
            del garbage
            second = outcome(library, op, args)
            assert_bitwise_equal(second, first, f"{op} with {empty}")
            if library is torch.ops.tokred_simt:
                other = outcome(torch.ops.tokred, op, args)
                assert not isinstance(other, str)
                for a, b in zip(first, other, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("heads", [(0, 1), (0, 2), (2, 0), (0, 0)])
def test_no_heads_are_refused(library: Any, heads: tuple[int, int]) -> None:
    """Whatever the other sizes are."""
    for op in OPS:
        names = [argument.name for argument in getattr(library, op).default._schema.arguments]
        if "q" not in names:
            continue
        for sizes in ({}, {"q": 0}, {"n": 0}, {"b": 0}):
            sized = replace(Sizes(), hq=heads[0], hk=heads[1], **sizes)
            message = outcome(library, op, CALLS[op](sized))
            assert isinstance(message, str) and "heads of q" in message, op


def integers(op: str) -> list[tuple[int, str]]:
    """The places and names of an op's integer arguments."""
    arguments = getattr(torch.ops.tokred, op).default._schema.arguments
    kinds = ("int", "SymInt", "Optional[int]", "Optional[SymInt]")
    return [(i, a.name) for i, a in enumerate(arguments) if str(a.type) in kinds]


@pytest.mark.parametrize("op", [op for op in OPS if integers(op)])
def test_integers_of_any_size(library: Any, op: str) -> None:
    """Every one is refused by its name, or means what a number just large enough means."""
    args = CALLS[op](Sizes())
    for place, name in integers(op):
        great = [outcome(library, op, (*args[:place], x, *args[place + 1 :])) for x in GREAT]
        small = [outcome(library, op, (*args[:place], x, *args[place + 1 :])) for x in SMALL]
        refusals = [x for x in (*great, *small) if isinstance(x, str)]
        said = "denominator" if op == "attention_rows" and name in ("first", "last") else name
        assert all(said in text for text in refusals), (name, refusals)
        assert len({isinstance(x, str) for x in great}) == 1, name
        assert all(isinstance(x, str) for x in small[1:]), name
        if not isinstance(great[0], str):
            enough = outcome(library, op, (*args[:place], 100, *args[place + 1 :]))
            for result in great:
                assert_bitwise_equal(result, enough, name)


def loose(t: Any) -> Any:
    """The same numbers in rows that start anywhere but at multiples of 16 bytes."""
    if isinstance(t, list):
        return [loose(x) for x in t]
    if not isinstance(t, Tensor) or t.dim() == 0:
        return t
    wide = torch.zeros(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype)
    view = wide[..., 1:-2]
    return view.copy_(t)


@pytest.mark.parametrize("op", OPS)
def test_views_have_the_bits_of_their_copies(library: Any, op: str) -> None:
    """Devices may read unaligned tensors in another order."""
    for sizes in (Sizes(c=32, n=40), Sizes(c=27, n=40)):
        args = CALLS[op](sizes)
        modes = [args]
        if "merge" in op:
            modes = [
                tuple(mode if arg in ("mean", "maxnorm") else arg for arg in args)
                for mode in ("sum", "mean", "amax", "prune", "maxnorm", "halving")
            ]
        for args in modes:
            copies = call(
                library, op, tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
            )
            for i, arg in enumerate(args):
                if not isinstance(arg, Tensor | list):
                    continue
                viewed = tuple(loose(a) if j == i else a for j, a in enumerate(args))
                result = outcome(library, op, viewed)
                if isinstance(result, str):
                    assert "contiguous" in result or "without gaps" in result, result
                else:
                    assert_bitwise_equal(result, copies, f"{op}, argument {i}")


def far(t: Tensor, dim: int) -> Tensor:
    """The same numbers, over 2^32 elements apart along one dimension, in memory not reserved."""
    strides = list(t.contiguous().stride())
    strides[dim] = (2**32 // (t.shape[dim] - 1) // 16 + 1) * 16
    reach = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, reach * t.element_size(), flags), dtype=t.dtype)
    return memory.as_strided(t.shape, strides).copy_(t)


def with_far_parts(args: tuple) -> Iterator[tuple]:
    """The arguments with one tensor of them, at a time, spread along one dimension."""
    for place, arg in enumerate(args):
        tensors = arg if isinstance(arg, list) else [arg]
        for number, t in enumerate(tensors):
            for dim in range(t.dim() - 1) if isinstance(t, Tensor) else ():
                if t.shape[dim] > 1:
                    spread = [*tensors[:number], far(t, dim), *tensors[number + 1 :]]
                    value = spread if isinstance(arg, list) else spread[0]
                    yield (*args[:place], value, *args[place + 1 :])


@pytest.mark.parametrize("op", OPS)
def test_offsets_of_more_than_32_bits(library: Any, op: str) -> None:
    """Along every dimension of every argument, as in views of a large cache."""
    args, served = CALLS[op](Sizes()), 0
    expected = outcome(library, op, args)
    for spread in with_far_parts(args):
        result = outcome(library, op, spread)
        if isinstance(result, str):
            assert "contiguous" in result or "without gaps" in result, result
        else:
            assert_bitwise_equal(result, expected)
            served += 1
    assert served


def test_results_that_no_memory_holds(library: Any) -> None:
    with pytest.raises(RuntimeError, match=r"^tokred: a result of .* is too large"):
        library.topk(torch.zeros(1).expand(2**31, 2**31, 1), 2**31 - 1)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator())


def test_merge_out_refuses_shared_memory(library: Any) -> None:
    x, token_map = rows(2, 6, 8), torch.zeros(2, 6, dtype=torch.int32)
    out, size = torch.zeros(2, 4, 8), torch.zeros(2, 4)
    memory, numbers = rows(2 * 10 * 8), rows(2, 6)

    def refused(x: Tensor, size_in: Tensor | None, out: Tensor, size: Tensor, text: str) -> None:
        before = out.clone(), size.clone()
        with pytest.raises(RuntimeError, match=text):
            library.merge_out(x, token_map, size_in, None, "mean", out, size)
        assert torch.equal(out, before[0]) and torch.equal(size, before[1])

    refused(x, None, out[:1].expand(2, 4, 8), size, "out must not overlap itself")
    refused(x, None, torch.zeros(200).as_strided((2, 4, 8), (32, 4, 1)), size, "out must not over")
    refused(x, None, out, torch.zeros(2, 1).expand(2, 4), "out_size must not overlap itself")
    refused(x, None, x[:, :4], size, "out must not share memory with x")
    refused(x, None, x.flatten()[8:72].view(2, 4, 8), size, "out must not share memory with x")
    refused(x, None, out, out[0, :1, :8].view(2, 4), "out_size must not share memory with out")
    refused(x, numbers, out, numbers[:, 1:5], "out_size must not share memory with size")
    # Views that lie between each other are no overlap.
    both = memory.view(2, 10, 8)
    expected = library.merge(both[:, 4:].clone(), token_map, 4, None, None, "mean")
    library.merge_out(both[:, 4:], token_map, None, None, "mean", both[:, :4], size)
    assert_bitwise_equal((both[:, :4], size), expected)
    wide = rows(2, 6, 16)
    expected = library.merge(wide[..., 8:].clone(), token_map, 4, None, None, "mean")
    library.merge_out(wide[..., 8:], token_map, None, None, "mean", wide[:, :4, :8], size)
    assert_bitwise_equal((wide[:, :4, :8], size), expected)


def test_cache_writes_refuse_shared_memory(library: Any) -> None:
    codes, params = torch.zeros(2, 2, 8, 8, dtype=torch.uint8), torch.zeros(2, 2, 8, 2).half()
    x, window = rows(2, 2, 3, 16), torch.zeros(2, 2, 4, 16)

    def append(x: Tensor, codes: Tensor, params: Tensor, window: Tensor | None) -> None:
        library.kv_append(x, codes, params, window, 2, *FORMAT, None, None)

    def refused(x: Tensor, codes: Tensor, params: Tensor, window: Tensor, text: str) -> None:
        with pytest.raises(RuntimeError, match=text):
            append(x, codes, params, window)

    def one_head(t: Tensor) -> Tensor:
        return t[:, :1].expand(t.shape)

    refused(x, one_head(codes), params, window, "codes must not overlap itself")
    refused(x, codes, one_head(params), window, "params must not overlap itself")
    refused(x, codes, params, one_head(window), "window must not overlap itself")
    refused(window[:, :, :3], codes, params, window, "window must not share memory with x")
    inside = codes.view(torch.float16)[..., :2]
    refused(x, codes, inside, window, "params must not share memory with codes")
    with pytest.raises(RuntimeError, match="out must not share memory with codes"):
        memory = torch.zeros(2, 2, 8, 64, dtype=torch.uint8)
        library.kv_unpack_into(memory[..., :8], params, *FORMAT, memory.view(torch.float32))
    # Codes and params may take turns in memory.
    slab = torch.zeros(2, 2, 8, 12, dtype=torch.uint8)
    beside = slab[..., :8], slab.view(torch.float16)[..., 4:]
    append(x, *beside, None)
    append(x, codes, params, None)
    assert torch.equal(beside[0], codes) and torch.equal(beside[1], params)
    assert codes.any()
