"""The machine's ceilings: kernels of tokred._C beside torch's own ways, and what they refuse."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import ceilings, machine

RUN = machine.Run("cpu", "quick", "Test CPU", 1, {"torch": "2.13.0"}, "abc1234", "2026-01-01", 0.05)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ceilings_are_plausible(one_thread):
    """Ours are no slower than torch's own ways, up to noise: each takes the best of many turns."""
    _C = pytest.importorskip("tokred._C")
    size, isa = 1 << 26, _C.cpu_isa()
    measured = [*ceilings.kernel_rows(RUN, size, rounds=15, steps=20_000),
                *ceilings.torch_rows(RUN, size)]
    by_name = {row.case: ceilings.rate(row) for row in measured if row.role == "ours"}
    torch_rates = {row.case: ceilings.rate(row) for row in measured if row.role == "peer"}
    assert {row.candidate for row in measured} == {f"tokred._C, {isa}", "torch sum", "torch copy_"}
    best = ceilings.best_rates(measured)
    for name, theirs in torch_rates.items():
        assert by_name[name] > 0.5 * theirs
        assert best[name] == max(by_name[name], theirs)
    # Rows of 64 bytes are no faster than streams, and products in registers than any memory.
    assert by_name["gather_64_shuffled"] < 1.5 * by_name["read"]
    assert by_name["fma_float32"] > by_name["read"] / 4
    assert all(1e8 < rate < 1e14 for rate in by_name.values())
    a = torch.randn(512, 512)
    gemm = 2 * 512**3 / min(ceilings.timed(lambda: a @ a, 10))
    assert by_name["fma_float32"] > 0.8 * gemm


def test_ceilings_refuse_what_they_cannot_measure():
    _C = pytest.importorskip("tokred._C")
    isa, size = _C.cpu_isa(), 1 << 20
    assert _C.ceiling_read(isa, size, 2, 3)[0] == size
    assert _C.ceiling_copy(isa, size, 2, 3, True)[0] == 2 * size
    work, seconds = _C.ceiling_gather(isa, size, 192, 2, 4, True)
    assert work == size // 192 // 8 * 192 and len(seconds) == 4 and min(seconds) > 0
    for call, message in (
        (lambda: _C.ceiling_read("avx9", size, 1, 1), "isa must be .* got avx9"),
        (lambda: _C.ceiling_read(isa, size, 0, 1), "threads must be at least 1, got 0"),
        (lambda: _C.ceiling_read(isa, size, 1, 0), "rounds must be at least 1, got 0"),
        (lambda: _C.ceiling_copy(isa, 100, 1, 1, False), "bytes must be at least .* got 100"),
        (lambda: _C.ceiling_gather(isa, size, 100, 1, 1, False), "row_bytes must be a multiple"),
        (lambda: _C.ceiling_gather(isa, 64, 64, 1, 1, False), "table_bytes must hold 8 rows"),
        (lambda: _C.ceiling_operations(isa, "dot", 1, 1, 1), "what must be .* got dot"),
        (lambda: _C.ceiling_operations(isa, "dot_int16", 0, 1, 1), "steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_machine_says_how_much_it_keeps():
    assert 1 << 20 <= machine.last_cache_bytes() <= 1 << 34
    assert machine.available_bytes() > 1 << 26
    assert ceilings.array_bytes(32 << 20) <= machine.available_bytes() // 6
    assert ceilings.array_bytes(0) <= 1 << 28
