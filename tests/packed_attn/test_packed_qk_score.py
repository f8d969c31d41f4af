"""packed_qk_score against its float64 oracle and against qk_score on what the codes stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cases.backends import Backend
from cases.compare import assert_bitwise_equal
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference
from cases.packed import (
    CACHE,
    CHANNEL,
    PAGES,
    RING,
    Case,
    as_records,
    assert_alone_as_in_a_batch,
    assert_same_on_every_cpu,
    fixed_point_slack,
    spoil,
)
from cases.score import REDUCTIONS, check_accuracy

SIZES = [
    Case(),
    CHANNEL,
    *(Case(k=f"{bits} token 16") for bits in (1, 2, 3, 8)),
    *(replace(CHANNEL, k=f"{bits} channel 16") for bits in (1, 2, 3, 8)),
    replace(CHANNEL, k="8 channel 64 fp8"),
    *(replace(CHANNEL, k=f"{bits} channel 64 codebook rotated") for bits in (1, 2, 3, 4)),
    replace(CHANNEL, k="4 channel 16 codebook", window_k=9, window_v=9),
    Case(k="4 token 5 symmetric", group=3),
    Case(k="2 token 40 zero_point"),
    Case(k="4 token 16 asymmetric rotated", window_k=16, window_v=16),
    replace(CHANNEL, k="3 channel 32 symmetric rotated", queries=3),
    *(replace(CHANNEL, tokens=tokens) for tokens in (0, 1, 17, 65)),
    Case(1, 1, 4, 1, 4096, k="2 token 32"),
    Case(1, 3, 3, 1, 96, 128),
    Case(1, 3, 3, 2, 96, 80, k="4 token 32"),
    Case(1, 1, 2, 5, 48, 256, k="3 token 16"),
    Case(1, 1, 2, 1, 32, 16, k="1 channel 16"),
    replace(CHANNEL, batch=0),
]
CACHES = [
    Case(tokens=77, window_k=13, window_v=13, queries=2),
    CACHE,
    RING,
    *(replace(CACHE, tokens=tokens) for tokens in (0, 1, 65)),
    replace(CACHE, lengths=True, batch=7),
    replace(RING, lengths=True, batch=7, mask="tokens"),
    replace(PAGES, batch=7, lengths=True, mask="tokens"),
    replace(PAGES, cache=False, window_k=18, window_v=18),
    replace(CHANNEL, mask="tokens", scale=0.3, queries=4),
]
CASES = [
    replace(case, dtype=FLOATS[(i + j) % 3])
    for i, case in enumerate([*SIZES, *CACHES])
    for j in range(2 if i < 2 else 1)
]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_scores_against_float64(backend: Backend, case: Case, reduce: str) -> None:
    inputs = case.score_inputs(reduce)
    exact = reference.packed_qk_score(*widened(inputs))
    plain = reference.packed_qk_score(*inputs)
    logits = reference.packed_qk_score(*widened(case.score_inputs("none")))
    actual = backend.run("packed_qk_score", *inputs)
    q, k, _, _, scale, *_ = inputs
    check_accuracy(actual, exact, plain, logits, fixed_point_slack(backend, q, k, scale))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(
    "case", [Case(), replace(CHANNEL, window_k=13, window_v=13, queries=3)], ids=label
)
def test_equals_scores_of_unpacked_keys(backend: Backend, case: Case, reduce: str) -> None:
    q, k, residual, *_ = case.score_inputs(reduce)
    keys = [backend.run("kv_unpack", k)] + ([] if residual is None else [residual])
    mask = torch.rand(2, case.tokens, generator=generator()) < 0.7
    expected = backend.run("qk_score", q, torch.cat(keys, 2), reduce, mask=mask)
    actual = backend.run("packed_qk_score", q, k, residual, reduce, mask=mask)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_hidden_tokens_may_hold_anything(kernels: Backend, reduce: str, number: float) -> None:
    q, k, residual, *_ = Case(tokens=96, window_k=16, window_v=16, queries=2).score_inputs(reduce)
    mask = torch.rand(2, 96, generator=generator()) < 0.6
    mask[0, :48], mask[1, 16:32] = False, False
    clean = kernels.run("packed_qk_score", q, k, residual, reduce, mask=mask)
    spoiled = spoil(k, ~mask[:, :80], number)
    residual = residual.masked_fill(~mask[:, None, 80:, None], number)
    actual = kernels.run("packed_qk_score", q, spoiled, residual, reduce, mask=mask)
    assert_bitwise_equal(actual, clean)
    hidden = 0 if reduce == "softmax_vote" else -torch.inf
    assert (clean[~mask[:, None].expand_as(clean)] == hidden).all()
    assert clean[mask[:, None].expand_as(clean)].isfinite().all()


def test_any_slots_and_lengths_are_safe(kernels: Backend) -> None:
    q, k, *_ = Case(1, tokens=96).score_inputs("none")
    q, rng = q.expand(4, -1, -1, -1), generator()
    slots = torch.randint(-(2**31), 2**31 - 1, (4, 70), generator=rng, dtype=torch.int64).int()
    slots[:2] = torch.randint(-40, 140, (2, 70), generator=rng).int()
    lengths = torch.tensor([2**31 - 1, -(2**31), 70, 9], dtype=torch.int32)
    scores = kernels.run("packed_qk_score", q, k, slots=slots, length=70, lengths=lengths)
    assert not scores.isnan().any() and (scores[1] == -torch.inf).all()
    outside = (slots < 0) | (slots >= 96)
    assert (scores[outside[:, None].expand_as(scores)] == -torch.inf).all()


def test_query_without_a_length(kernels: Backend) -> None:
    q, k, *_ = Case().score_inputs("none")
    expected = kernels.run("packed_qk_score", q, k)
    assert_bitwise_equal(kernels.run("packed_qk_score", q[:, :, 0], k), expected)


def test_strides_do_not_matter(kernels: Backend) -> None:
    case = Case(2, 2, 2, 2, 85, 128, 128, "4 channel 64", "4 channel 64", 15, 15)
    q, k, v, residual, *_ = replace(case, dtype=torch.float16).inputs()
    mask = (torch.rand(2, 170, generator=generator()) < 0.8)[:, ::2]
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, residual)]
    records, _ = as_records(k, v)
    actual = kernels.run("packed_qk_score", views[0], records, views[1], mask=mask)
    expected = kernels.run("packed_qk_score", q, k, residual, mask=mask.contiguous())
    assert_bitwise_equal(actual, expected)


BITWISE = [
    Case(3, 2, 2, 1, 1120, mask="tokens"),
    replace(CACHE, batch=3, lengths=True, group=3),
    replace(RING, batch=3, queries=2),
    PAGES,
    Case(3, 1, 4, 2, 80, k="3 token 16 symmetric rotated"),
]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_batch_does_not_matter(kernels: Backend, case: Case, reduce: str) -> None:
    inputs = replace(case, dtype=torch.bfloat16).score_inputs(reduce)
    assert_alone_as_in_a_batch(kernels, "packed_qk_score", inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_isa_and_threads_do_not_matter(
    on_every_cpu, case: Case, reduce: str, dtype: torch.dtype
) -> None:
    inputs = replace(case, dtype=dtype).score_inputs(reduce)
    assert_same_on_every_cpu(on_every_cpu, "packed_qk_score", inputs)
