"""kv_unpack of records, of damaged caches, and into buffers; test_kv_pack.py has its numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cases.backends import Backend, move
from cases.compare import assert_bitwise_equal
from cases.inputs import FLOATS, generator
from cases.oracle import reference
from cases.packed import as_records, pack, packing
from tokred import PackFormat


def test_unpack_reads_records(kernels: Backend) -> None:
    """Codes and params of keys and values side by side, 144 bytes a token and head."""
    x = torch.randn(2, 2, 2, 9, 128, generator=generator(7))
    keys, values = reference.kv_pack(x[0], 4, 64), reference.kv_pack(x[1], 4, 64)
    records = as_records(keys, values)
    assert records[0].codes.stride(1) == 144
    for record, packed in zip(records, (keys, values), strict=True):
        assert_bitwise_equal(kernels.run("kv_unpack", record), reference.kv_unpack(packed))


def test_unpack_takes_any_bytes(kernels: Backend) -> None:
    """A damaged cache gives other numbers, nothing worse."""
    params = [0.0, 1.0, -2.0, torch.inf, torch.nan, 6e-8, 65504.0, 3.0]
    packed = PackFormat(8, 16, scheme="fp8").empty(1, 1, 16, 16)
    packed.codes.copy_(torch.arange(256, dtype=torch.uint8).view(packed.codes.shape))
    packed.params.copy_(torch.tensor(2 * params)[:, None])
    for scheme in ("fp8", "symmetric"):
        damaged = replace(packed, format=PackFormat(8, 16, scheme=scheme))
        actual, expected = kernels.run("kv_unpack", damaged), reference.kv_unpack(damaged)
        assert torch.equal(actual.nan_to_num(1e9), expected.nan_to_num(1e9))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("text", ["4 channel 32", "2 token 8", "3 channel 16 symmetric rotated"])
def test_unpacking_into_a_buffer(kernels: Backend, text: str, dtype: torch.dtype) -> None:
    """The same bits, and nothing written beside them."""
    x = torch.randn(2, 3, 24, 32, generator=generator(9))
    packed = pack(x, packing(text))
    expected = kernels.run("kv_unpack", packed, dtype)
    place = (slice(1, 3), slice(2, 8, 2), slice(0, 24))
    for transposed in (False, True):
        buffer = torch.full((9, 4, 30, 32) if transposed else (4, 9, 30, 32), 7.0, dtype=dtype)
        buffer = buffer.transpose(0, 1) if transposed else buffer
        buffer = move(buffer, kernels.device)
        out = kernels.function("kv_unpack")(move(packed, kernels.device), out=buffer[place])
        assert out.data_ptr() == buffer[place].data_ptr()
        assert_bitwise_equal(out.cpu(), expected, "into a buffer")
        buffer[place] = 7.0
        assert buffer.eq(7.0).all()
