"""qk_score against its float64 oracle, and bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference
from cases.packed import assert_same_on_every_cpu
from cases.score import (
    REDUCTIONS,
    assert_alone_as_in_a_batch,
    case_label,
    check_accuracy,
    grid,
)


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call of qk_score."""

    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    queries: int = 1
    keys: int = 37
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    reduce: str = "none"
    dims: str = "none"
    lengths: bool = False
    mask: str = "none"
    slots: bool = False
    scale: float | None = None
    layout: str = "heads"

    def make_dims(self, rng: torch.Generator) -> Tensor | None:
        if self.dims == "none":
            return None
        count = {"few": 5, "invalid": 7, "all": self.head_dim}[self.dims]
        order = [torch.randperm(self.head_dim, generator=rng) for _ in range(self.heads_q)]
        dims = torch.stack(order)[:, :count].int()
        if self.dims == "invalid":
            dims[:, ::3] = torch.tensor(-1)
            dims[:, 1::3] = torch.tensor(2**31 - 1)
            dims[0] = self.head_dim
        return dims

    def inputs(self) -> tuple:
        rng = generator(3)
        stored = self.keys + 9 if self.slots else self.keys
        batch = 1 if self.slots else self.batch
        q = torch.randn(self.batch, self.heads_q, self.queries, self.head_dim, generator=rng)
        k = torch.randn(batch, self.heads_kv, stored, self.head_dim, generator=rng)
        if self.layout == "tokens":
            q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
        lengths = mask = slots = None
        if self.lengths:
            choices = torch.tensor([self.keys // 2, -3, self.keys + 100, 1])
            lengths = choices.repeat(self.batch)[: self.batch].int()
        if self.mask != "none":
            rows = 1 if self.mask == "shared" else self.batch
            mask = torch.rand(rows, self.keys, generator=rng) < 0.7
            mask &= self.mask != "nothing"
        if self.slots:
            shape = (self.batch, self.keys)
            slots = torch.randint(0, max(stored, 1), shape, generator=rng).int()
            slots[:, ::5] = -1
            slots[:, 1::7] = 2**31 - 1
            slots[:, 2::11] = -(2**31)
            slots[:, 3::13] = stored
        dims = self.make_dims(rng)
        return (
            *(t.to(self.dtype) for t in (q, k)),
            *(self.reduce, dims, self.scale, lengths, mask, slots),
        )


SIZES = [
    Case(),
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 3, 3, 1, 5, 24),
    Case(1, 6, 2, 3, 33, 80),
    Case(3, 8, 1, 1, 21, 128),
    Case(1, 10, 2, 2, 18, 256),
    Case(1, 2, 1, 1, 530, 17),
    Case(1, 2, 2, 1, 1100, 8),
    Case(2, 4, 2, 1, 0, 16),
    Case(0, 4, 2, 1, 7, 16),
]
OPTIONS = [
    Case(lengths=True, batch=4),
    Case(mask="keys"),
    Case(mask="shared", keys=600, head_dim=16),
    Case(mask="nothing"),
    Case(slots=True),
    Case(slots=True, lengths=True, mask="keys", batch=4),
    Case(dims="few"),
    Case(dims="all", heads_q=6, heads_kv=2, head_dim=20),
    Case(dims="invalid", mask="keys", keys=70),
    Case(dims="few", slots=True, lengths=True, batch=4, heads_q=9, heads_kv=3),
    Case(dims="few", queries=3, layout="tokens", keys=530),
    Case(scale=3.0, layout="tokens", keys=53, queries=2),
]


@pytest.mark.parametrize("case", grid([*SIZES, *OPTIONS], "reduce", REDUCTIONS), ids=label)
def test_qk_score_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    exact = reference.qk_score(*widened(inputs))
    logits = reference.qk_score(*widened((*inputs[:2], "none", *inputs[3:])))
    plain = reference.qk_score(*inputs)
    check_accuracy(backend.run("qk_score", *inputs), exact, plain, logits)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_hidden_keys_may_hold_anything(kernels: Backend, reduce: str) -> None:
    case = Case(keys=75, mask="keys", slots=True, lengths=True, batch=4, reduce=reduce)
    q, k, *options = case.inputs()
    slots, mask, lengths = options[5], options[4], options[3]
    seen = mask & (torch.arange(75) < lengths[:, None]) & (slots >= 0) & (slots < k.shape[2])
    k[:, :, ~torch.isin(torch.arange(k.shape[2]), slots[seen])] = torch.nan
    clean = k.nan_to_num(0)
    expected = kernels.run("qk_score", q, clean, *options)
    assert_bitwise_equal(kernels.run("qk_score", q, k, *options), expected)
    hidden = 0 if reduce == "softmax_vote" else -torch.inf
    assert (expected[~seen[:, None].expand_as(expected)] == hidden).all()


def test_dimensions_left_out_may_hold_anything(kernels: Backend) -> None:
    q, k, *options = Case(dims="few", heads_q=2, keys=70).inputs()
    expected = kernels.run("qk_score", q, k, *options)
    unused = torch.ones(2, 64, dtype=torch.bool).scatter(1, options[1].long(), False)
    k.transpose(2, 3)[:, unused] = torch.inf
    q.transpose(2, 3)[:, unused] = torch.nan
    assert_bitwise_equal(kernels.run("qk_score", q, k, *options), expected)


def test_repeated_dimensions_count_every_time(backend: Backend) -> None:
    q, k, *_ = Case().inputs()
    once = backend.run("qk_score", q, k, "none", torch.full((4, 1), 3, dtype=torch.int32))
    twice = backend.run("qk_score", q, k, "none", torch.full((4, 2), 3, dtype=torch.int32))
    torch.testing.assert_close(twice, 2 * once)


def test_slots_are_a_gather(kernels: Backend) -> None:
    q, k, *options = Case(slots=True, keys=40).inputs()
    slots = options[5].clamp(0, k.shape[2] - 1)
    gathered = k[0][:, slots.long()].transpose(0, 1)
    direct = kernels.run("qk_score", q, gathered, *options[:5])
    assert_bitwise_equal(kernels.run("qk_score", q, k, *options[:5], slots), direct)


def test_query_without_a_length(one_thread: None) -> None:
    q, k, *_ = Case().inputs()
    assert_bitwise_equal(tokred.qk_score(q[:, :, 0], k), tokred.qk_score(q, k))


BITWISE: list[tuple[str, Any]] = [
    *(("qk_score", Case(3, 6, 2, 2, 1100, 40, reduce=r, mask="keys")) for r in REDUCTIONS),
    *(("qk_score", Case(3, 6, 2, 1, 70, 40, reduce=r, dims="few")) for r in REDUCTIONS),
    ("qk_score", Case(3, 4, 1, 1, 700, 64, slots=True, lengths=True)),
]


@pytest.mark.parametrize("op, case", BITWISE, ids=case_label)
def test_batch_does_not_matter(kernels: Backend, op: str, case: Any) -> None:
    assert_alone_as_in_a_batch(kernels, op, replace(case, dtype=torch.bfloat16).inputs())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op, case", BITWISE, ids=case_label)
def test_isa_and_threads_do_not_matter(
    on_every_cpu: Any, op: str, case: Any, dtype: torch.dtype
) -> None:
    assert_same_on_every_cpu(on_every_cpu, op, replace(case, dtype=dtype).inputs())


def test_layout_does_not_matter(kernels: Backend) -> None:
    inputs = Case(keys=53, layout="tokens").inputs()
    copies = [t.contiguous() if isinstance(t, Tensor) else t for t in inputs]
    assert_bitwise_equal(kernels.run("qk_score", *inputs), kernels.run("qk_score", *copies))


def test_inputs_that_require_grad_are_refused(one_thread: None) -> None:
    q, k, *_ = Case().inputs()
    needing = k.clone().requires_grad_()
    pooled, _ = tokred.block_pool(k, 8)
    for call in (
        lambda: tokred.qk_score(q, needing),
        lambda: tokred.block_pool(needing, 8),
        lambda: tokred.block_score(q, pooled.requires_grad_()),
    ):
        with pytest.raises(ValueError, match="grad"):
            call()
