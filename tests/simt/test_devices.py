"""The CUDA kernels on devices whose blocks have less shared memory than those of an H200."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import HERE, SIMT_LIBRARY, Backend, ready
from cases.compare import assert_bitwise_equal, flat

pytestmark = pytest.mark.skipif("simt" not in HERE, reason="without the emulated device")

H200, SMALLER = 227 * 1024, {"A100": 163 * 1024, "RTX": 99 * 1024}


@pytest.fixture
def choose_device() -> Iterator[Callable[[int], None]]:
    """Sets what a block of the emulated device may have; an H200's afterwards."""
    ready("simt")
    choose = ctypes.CDLL(str(SIMT_LIBRARY)).tokred_simt_set_shared_limit
    choose.argtypes = (ctypes.c_int64,)
    yield choose
    choose(H200)


@pytest.fixture(params=[True, False], ids=["truncating", "rounding"])
def tensor_cores(request: pytest.FixtureRequest) -> Iterator[None]:
    """Sets what the emulated tensor cores do with bits that do not fit; hardware truncates."""
    ready("simt")
    truncate = ctypes.CDLL(str(SIMT_LIBRARY)).tokred_simt_set_truncation
    truncate.argtypes = (ctypes.c_bool,)
    truncate(request.param)
    yield
    truncate(True)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def attend(queries: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    q, k, v = draw(1, 2, queries, dim), draw(1, 1, 100, dim), draw(1, 1, 100, dim) / 2
    return "biased_attention", q.to(dtype), k.to(dtype), v.to(dtype), torch.zeros(1, 1, 100)


def attend_lists(dim: int) -> tuple:
    indices = torch.arange(0, 100, 2, dtype=torch.int32).expand(1, 1, 1, -1).contiguous()
    _, q, k, v, _ = attend(40, dim)
    return "sparse_attention", q, k, v, indices, None, None, False, None, 40


def attend_packed(bits: int, dtype: torch.dtype) -> tuple:
    packed = [tokred.kv_pack(draw(1, 1, 100, 256) / n, bits, 16, "channel") for n in (1, 2)]
    return "packed_attention", draw(1, 2, 1, 256).to(dtype), *packed


BF16, F32 = torch.bfloat16, torch.float32
CASES = {  # calls, and whether the device may not change their bits
    "decode in fewer stages": (attend(1, 128), True),
    "decode by fewer warps": (attend(1, 256), False),
    "decode of wide heads": (attend(3, 576), False),
    "decode in f32": (attend(1, 128, F32), False),
    "smaller tiles": (attend(40, 256), False),
    "smaller tiles of lists": (attend_lists(256), False),
    "8 bits": (attend_packed(8, BF16), False),
    "4 bits in f32": (attend_packed(4, F32), False),
    "narrow items": (("bipartite_soft_matching", draw(1, 400, 32), 100), True),
    "items in two launches": (("bipartite_soft_matching", draw(1, 200, 32, dtype=F32), 50), True),
}


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_an_h200(choose_device: Callable[[int], None], name: str) -> None:
    (op, *inputs), same_bits = CASES[name]
    expected = flat(Backend("simt").run(op, *inputs))
    for device, limit in SMALLER.items():
        choose_device(limit)
        results = flat(Backend("simt").run(op, *inputs))
        if same_bits:
            assert_bitwise_equal(results, expected, device)
        else:
            torch.testing.assert_close(results, expected, rtol=2e-2, atol=1e-2)


REFUSED = {
    "decode": (attend(1, 512, F32), 145),
    "the gradient of queries": (attend(40, 256, F32), 150),
}


@pytest.mark.parametrize("kernel", REFUSED)
def test_too_large_is_refused_in_words(choose_device: Callable[[int], None], kernel: str) -> None:
    (op, *inputs), needs = REFUSED[kernel]
    if kernel != "decode":
        out, lse = torch.ops.tokred_simt.biased_attention(*inputs)
        op = f"{op}_backward"
        inputs = [out, lse, *inputs, out, lse, False, None, None, None, None]
    choose_device(SMALLER["RTX"])
    words = (
        f"tokred: {kernel} needs {needs} KB of shared memory a block for these dimensions and "
        "dtype, this GPU has 99 KB: 16-bit inputs or fewer dimensions need less"
    )
    with pytest.raises(RuntimeError, match=words):
        Backend("simt").run(op, *inputs)


def test_f32_on_tensor_cores_is_as_accurate_as_f32(tensor_cores: None) -> None:
    """Sums of one sign, where cut-off bits add up."""
    a, b = draw(1, 64, 1024, dtype=F32).abs(), draw(1, 1, 1024, dtype=F32).abs()
    scores, _ = Backend("simt").run("match", a, b, None, None, None, None, "dot")
    exact = (a.double() @ b.double().mT)[..., 0]
    plain = (a @ b.mT)[..., 0]
    assert (scores - exact).abs().mean() <= 2.5 * (plain - exact).abs().mean()
    q, k = draw(1, 1, 64, 128, dtype=F32).abs(), draw(1, 1, 640, 128, dtype=F32).abs()
    bias = torch.zeros(1, 1, 640)
    out, lse = Backend("simt").run("biased_attention", q, k, k, bias)
    logits = (q.double() @ k.double().mT) * 128**-0.5
    expected = logits.softmax(-1) @ k.double()
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=3e-7, atol=0)
    torch.testing.assert_close(out.double(), expected, rtol=6e-7, atol=0)
