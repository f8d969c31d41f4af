"""adjacent_runs against its oracle: cosines near, runs exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_as_accurate, assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference

NAMES = ("ids", "start", "length", "count", "cosine")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int = 2
    tokens: int = 60
    channels: int = 24
    threshold: float = 0.5
    dtype: torch.dtype = torch.float32
    second: bool = False
    mask: str = ""
    max_length: int = 0
    num_sinks: int = 0
    num_locals: int = 0

    def inputs(self) -> tuple:
        """Tokens that drift, and jump here and there; no cosine is near the threshold."""
        rng = generator(3)
        shape = self.batch, self.tokens
        jumps = torch.rand(shape, generator=rng) < 0.3
        group = jumps.cumsum(1)
        book = torch.randn(self.batch, self.tokens + 1, self.channels, generator=rng)
        x = book.gather(1, group[..., None].expand(*shape, self.channels))
        x = x + 0.2 * torch.randn(x.shape, generator=rng)
        y = x + 0.2 * torch.randn(x.shape, generator=rng) if self.second else None
        mask = None
        if self.mask:
            mask = torch.rand(shape, generator=rng) > 0.2
            if self.mask == "left":
                mask = torch.arange(self.tokens).expand(shape) >= 7
            elif self.mask == "none left":
                mask = torch.zeros(shape, dtype=torch.bool)
        second = None if y is None else y.to(self.dtype)
        return (x.to(self.dtype), self.threshold, second, mask, self.max_length, self.num_sinks,
                self.num_locals)  # fmt: skip


CASES = [
    *(Case(dtype=dtype, second=s) for dtype in FLOATS for s in (False, True)),
    *(Case(mask=m) for m in ("some", "left", "none left")),
    *(Case(max_length=n) for n in (1, 2, 3, 100)),
    *(Case(num_sinks=a, num_locals=b, mask=m) for a, b in ((4, 5), (60, 0), (0, 60), (40, 40))
      for m in ("", "left")),
    *(Case(threshold=t) for t in (-2.0, 2.0, torch.inf, -torch.inf)),
    *(Case(batch, tokens, channels, max_length=3)
      for batch, tokens, channels in ((0, 5, 4), (2, 0, 4), (2, 5, 0), (1, 1, 1), (1, 2, 300))),
    Case(1, 1300, 8, mask="some", max_length=7, num_sinks=3, num_locals=600),
    Case(1, 1300, 8, threshold=-2.0, max_length=600),
]  # fmt: skip


def run(backend: Backend, inputs: tuple) -> list[Tensor]:
    out = backend.run("adjacent_runs", *inputs)
    return [t.cpu() for t in (out if isinstance(out, tuple) else (getattr(out, n) for n in NAMES))]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    *integers, cosine = run(backend, inputs)
    *expected, exact = reference.adjacent_runs(*widened(inputs))
    if case.channels > 8:
        gap = (exact - case.threshold).abs()[:, 1:]
        assert not gap.numel() or gap.min() > 1e-4, "the case has a cosine at its threshold"
    assert_as_accurate(cosine, exact, reference.adjacent_runs(*inputs)[-1], 1e-6, "cosine")
    for name, actual, wanted in zip(NAMES, integers, expected, strict=False):
        assert actual.dtype == torch.int32 and torch.equal(actual, wanted), name


def test_runs_are_what_the_definition_says(backend: Backend) -> None:
    angle = torch.tensor([0.0, 0.1, 0.2, 2.0, 2.1, 2.2, 2.3, 2.4])
    x = torch.stack([angle.cos(), angle.sin()], -1)[None]
    mask = torch.tensor([[True] * 4 + [False] + [True] * 3])
    ids, start, length, count, cosine = run(backend, (x, 0.9))
    assert ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]] and count.tolist() == [2]
    assert start.tolist() == [[0, 3] + [-1] * 6] and length.tolist() == [[3, 5] + [-1] * 6]
    torch.testing.assert_close(cosine[0, 1:], angle.diff().cos())
    assert cosine[0, 0] == 0
    assert run(backend, (x, 0.9, None, None, 2))[0].tolist() == [[0, 0, 1, 2, 2, 3, 3, 4]]
    ids, *_, cosine = run(backend, (x, 0.9, None, mask))
    assert ids.tolist() == [[0, 0, 0, 1, -1, 2, 2, 2]] and cosine[0, 4:6].tolist() == [0, 0]
    assert run(backend, (x, 0.9, None, mask, 0, 1, 2))[0].tolist() == [[0, 1, 1, 2, -1, 3, 4, 5]]


def test_zero_rows_and_nan_join_nothing(backend: Backend) -> None:
    x = torch.ones(1, 6, 4)
    x[0, 2], x[0, 4, 1] = 0, torch.nan
    ids, *_, cosine = run(backend, (x, 0.5))
    assert ids.tolist() == [[0, 0, 1, 2, 3, 4]]
    assert cosine[0, 2:4].tolist() == [0, 0] and cosine[0, 4:].isnan().all()


def test_heads_fold(kernels: Backend) -> None:
    x = torch.randn(2, 3, 20, 8, generator=generator(5))
    mask = torch.rand(2, 3, 20, generator=generator(6)) > 0.1
    whole = run(kernels, (x, 0.1, None, mask))
    assert [tuple(t.shape) for t in whole] == [(2, 3, 20)] * 3 + [(2, 3), (2, 3, 20)]
    assert_bitwise_equal([t[1, 2] for t in whole], run(kernels, (x[1, 2], 0.1, None, mask[1, 2])))


def test_the_merging_sets_of_kvmerger(kernels: Backend) -> None:
    """Runs, then a pool over them: keys that are alike become one, in every head."""
    keys = Case().inputs()[0]
    ids, _, length, count, _ = run(kernels, (keys, 0.5))
    pooled = kernels.run("segment_pool", keys, ids=ids, num_segments=60)
    for b in range(2):
        runs = int(count[b])
        assert (pooled[b, runs:] == 0).all() and length[b, :runs].sum() == 60
        begin = 0
        for r in range(runs):
            end = begin + int(length[b, r])
            torch.testing.assert_close(pooled[b, r], keys[b, begin:end].mean(0))
            begin = end


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_batch_and_strides_do_not_matter(kernels: Backend, dtype: torch.dtype) -> None:
    x, threshold, y, mask, *_ = Case(5, dtype=dtype, second=True, mask="some").inputs()
    whole = run(kernels, (x, threshold, y, mask, 3, 2, 2))
    one = run(kernels, (x[3:4], threshold, y[3:4], mask[3:4], 3, 2, 2))
    assert_bitwise_equal(one, [t[3:4] for t in whole], "alone")
    odd = torch.empty(60, 5, 29, dtype=dtype).transpose(0, 1)[..., 5:]
    wide = torch.cat([mask, mask], 1)[:, :60]
    strided = (odd.copy_(x), threshold, y, wide, 3, 2, 2)
    assert_bitwise_equal(run(kernels, strided), whole, "views")


def test_isa_and_threads_do_not_matter(on_every_cpu: Any) -> None:
    inputs = Case(3, 300, 77, dtype=torch.bfloat16, mask="some", max_length=4).inputs()
    assert_one_result(on_every_cpu(lambda: run(Backend("cpu"), inputs)))


def test_inputs_that_require_grad_are_refused() -> None:
    with pytest.raises(ValueError, match="adjacent_runs has no gradient, but x requires grad"):
        tokred.adjacent_runs(torch.randn(1, 3, 4, requires_grad=True), 0.5)
