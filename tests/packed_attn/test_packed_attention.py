"""packed_attention against its float64 oracle and against attention on what it stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cases.backends import Backend, move
from cases.compare import assert_bitwise_equal
from cases.inputs import FLOATS, generator, label
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
    check,
    fixed_point_slack,
    pack,
    packing,
    spoil,
)
from tokred.reference.kv_pack import packed_tokens

FORMATS = [
    *(Case(k=f"{bits} token 16", v=f"{bits} channel 16") for bits in (1, 2, 3, 4, 8)),
    *(Case(k=f"{bits} channel 16", v=f"{bits} token 8", tokens=72) for bits in (1, 2, 3, 4, 8)),
    *(
        Case(k=f"{bits} {axis} 16 {scheme}", v=f"{bits} {other} 16 {scheme}")
        for scheme in ("zero_point", "symmetric")
        for bits, axis, other in (
            (2, "token", "channel"),
            (3, "channel", "token"),
            (8, "channel", "channel"),
            (4, "token", "token"),
        )
    ),
    Case(k="8 channel 64 fp8", v="8 channel 32 fp8", tokens=67),
    Case(k="8 token 5 fp8", v="8 token 40 fp8"),
    Case(k="2 token 16", v="8 channel 64 symmetric"),
    Case(k="8 channel 16 zero_point", v="1 token 80"),
    Case(k="3 token 10 symmetric", v="4 channel 32 zero_point"),
    Case(k="4 token 16 asymmetric rotated", v="4 channel 32"),
    Case(k="4 channel 32", v="2 channel 32 asymmetric rotated", window_k=13, window_v=13),
    Case(k="4 channel 32 symmetric rotated", v="3 token 16 symmetric rotated", queries=5),
    *(
        Case(k=f"{bits} channel 64 codebook", v=f"{bits} channel 32 codebook")
        for bits in range(1, 5)
    ),
    Case(k="2 channel 16 codebook", v="4 channel 16 codebook", tokens=72),
    Case(1, 2, 3, 1, 90, 128, 80, "3 channel 128 codebook rotated", "2 channel 80 codebook"),
    Case(k="2 token 16", v="3 channel 64 codebook rotated", window_k=16, window_v=16),
]
SIZES = [
    *(replace(CHANNEL, group=group) for group in (1, 3, 4, 5, 8)),
    *(replace(CHANNEL, tokens=tokens) for tokens in (0, 1, 2, 15, 17, 65)),
    replace(CHANNEL, tokens=4099, heads=1, batch=1),
    Case(1, 1, 3, 1, 4096, k="2 token 32", v="2 channel 32"),
    Case(1, 3, 3, 1, 96, 128, 128, v="4 channel 128"),
    Case(1, 3, 3, 2, 96, 80, 80, "4 token 32", "4 channel 80"),
    Case(1, 1, 2, 1, 48, 256, 256, "3 token 16", "3 channel 64"),
    Case(1, 1, 4, 3, 64, 16, 240, "1 token 64", "1 channel 48"),
    Case(1, 1, 4, 1, 64, 128, 64, "4 token 32 asymmetric rotated", "4 channel 64"),
    Case(1, 1, 2, 1, 50, 48, 80, "2 channel 48 symmetric rotated", "8 channel 16 fp8 rotated"),
    replace(CHANNEL, queries=0),
    replace(CHANNEL, batch=0),
]
RESIDUALS = [
    Case(window_k=16, window_v=16),
    Case(tokens=77, window_k=13, window_v=30),
    Case(tokens=16, k="4 token 16", v="4 channel 32", window_v=16),
    Case(tokens=9, k="4 token 16", window_k=9, window_v=9),
    CACHE,
    RING,
    *(replace(CACHE, tokens=tokens) for tokens in (0, 1, 24, 64, 65, 128)),
    *(replace(RING, tokens=tokens) for tokens in (0, 20, 21, 34)),
    replace(CACHE, lengths=True, batch=7),
    replace(RING, lengths=True, batch=7, group=1),
    replace(RING, window_k=0, window_v=40, k="2 channel 32 asymmetric rotated"),
    PAGES,
    replace(PAGES, batch=7, lengths=True),
    replace(PAGES, window_k=0, window_v=0, lengths=True, k="4 channel 16", v="3 channel 64"),
    replace(PAGES, cache=False, window_k=18, window_v=18),
]
PREFILL = [
    Case(queries=queries, causal=True, group=group) for queries in (2, 9) for group in (1, 4)
]
PREFILL += [
    Case(1, 3, 3, 33, 128, causal=True),
    Case(1, 1, 2, 33, 100, 128, 128, "4 channel 128", "4 channel 64", causal=True),
    replace(CACHE, queries=33, causal=True),
    replace(RING, queries=33, causal=True, lengths=True, batch=7),
    replace(PAGES, queries=20, causal=True, lengths=True),
    replace(CHANNEL, queries=30, tokens=11, causal=True),
    replace(CHANNEL, queries=70, causal=True, mask="full", bias="full"),
    replace(CHANNEL, queries=33, causal=True, mask="heads of numbers"),
    Case(queries=33, k="3 token 16 symmetric rotated", v="2 channel 32", causal=True),
]
OPTIONS = [
    replace(case, mask=mask, bias=bias, queries=queries, causal=queries == 3)
    for case in (Case(), RING)
    for mask, bias in (
        ("tokens", "none"),
        ("padding", "full"),
        ("heads", "shared"),
        ("full", "tokens"),
        ("none", "holes"),
        ("full", "holes"),
        ("full of numbers", "holes"),
    )
    for queries in (1, 3)
]
CASES = [
    *(replace(c, dtype=FLOATS[i % 3]) for i, c in enumerate([*FORMATS, *SIZES, *OPTIONS])),
    *(replace(case, dtype=dtype) for case in RESIDUALS for dtype in FLOATS[: 2 + case.cache]),
    *(replace(case, dtype=dtype) for case in PREFILL for dtype in FLOATS),
    *(Case(magnitude=m, bias="full", dtype=d) for m in (1e-3, 30, 300) for d in FLOATS),
    Case(scale=0.5, queries=4),
    Case(softcap=2.0, magnitude=3, bias="holes", dtype=FLOATS[2]),
    replace(RING, softcap=2.0, magnitude=3, lists="kv"),
    Case(softcap=2.0, magnitude=3, queries=33, causal=True, mask="full", bias="full"),
    Case(scale=0.0),
]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    check(backend, case.inputs())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(queries=3, bias="full", mask="padding"),
        replace(CHANNEL, window_k=13, window_v=13, group=4),
        Case(1, 1, 2, 33, 96, 128, 128, "2 token 32", "2 channel 32", causal=True),
        Case(k="3 channel 64 codebook", v="2 channel 64 codebook", group=4),
    ],
    ids=label,
)
def test_equals_attention_on_unpacked_tensors(
    backend: Backend, case: Case, dtype: torch.dtype
) -> None:
    q, k, v, residual_k, residual_v, scale, _, mask, bias, causal, *_ = replace(
        case, dtype=dtype
    ).inputs()
    sides = []
    for packed, residual in ((k, residual_k), (v, residual_v)):
        parts = [backend.run("kv_unpack", packed)]
        parts += [] if residual is None else [residual.float()]
        sides.append(torch.cat(parts, 2))
    options = {"key_bias": bias, "causal": causal, "scale": scale, "mask": mask}
    out, lse = backend.run("biased_attention", q.float(), *sides, **options)
    packed_out, packed_lse = backend.run(
        "packed_attention", q, k, v, residual_k, residual_v, **options
    )
    slack = max(fixed_point_slack(backend, q, k, scale), 1e-5)
    torch.testing.assert_close(packed_lse, lse, rtol=1e-5, atol=slack)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(packed_out.float(), out, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(k="3 channel 64 codebook", v="2 channel 64 codebook", tokens=150),
        Case(k="1 channel 16 codebook", v="4 channel 64 codebook", queries=12, causal=True),
        replace(PAGES, k="4 channel 32 codebook", v="3 channel 16 codebook", lists="head"),
    ],
    ids=label,
)
def test_levels_of_every_head(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    q, k, v, *rest = replace(case, dtype=dtype).inputs()
    rng = generator(8)
    levels = [
        torch.randint(-128, 128, (heads, 2**side.format.bits), generator=rng).to(torch.int8)
        for heads, side in ((case.heads, k), (1, v))
    ]
    k, v = (replace(side, levels=t) for side, t in zip((k, v), levels, strict=True))
    check(backend, (q, k, v, *rest), values=16.0)
    score = q, k, rest[0], "group_max", rest[2], rest[7], rest[8], None, rest[9]
    out = backend.run("packed_qk_score", *score)
    slack = fixed_point_slack(backend, q, k, rest[2]) + 1e-4
    torch.testing.assert_close(out, reference.packed_qk_score(*score), rtol=1e-4, atol=slack)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("tokens", [96, 1312])
def test_hidden_tokens_may_hold_anything(
    kernels: Backend, tokens: int, queries: int, number: float
) -> None:
    case = Case(tokens=tokens, queries=queries, window_k=16, window_v=32, causal=True)
    q, k, v, residual_k, residual_v, *options = case.inputs()
    mask = torch.rand(2, tokens, generator=generator()) < 0.6
    mask[0, :48], mask[1, 16:32], mask[:, -queries:] = False, False, False
    options[2] = mask
    clean = kernels.run("packed_attention", q, k, v, residual_k, residual_v, *options)
    k, v = (spoil(side, ~mask[:, : side.num_tokens], number) for side in (k, v))
    residuals = [
        rows.masked_fill(~mask[:, None, -rows.shape[2] :, None], number)
        for rows in (residual_k, residual_v)
    ]
    assert clean[0].isfinite().all()
    assert_bitwise_equal(kernels.run("packed_attention", q, k, v, *residuals, *options), clean)


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("case", [CACHE, RING, PAGES], ids=["cache", "ring", "pages"])
def test_room_that_is_not_in_use_may_hold_anything(
    kernels: Backend, case: Case, queries: int
) -> None:
    """Rows of the cache, of its windows and of the pool that hold no token."""
    case = replace(case, lengths=True, batch=3, queries=queries)
    q, k, v, *rest = case.inputs()
    lengths = torch.tensor([70, 19, 0], dtype=torch.int32)
    rest[8], slots = lengths, rest[9]
    clean = kernels.run("packed_attention", q, k, v, *rest)
    for number, packed in enumerate((k, v)):
        window = rest[number]
        held = [packed_tokens(packed.format.axis, window.shape[2], n) for n in lengths.tolist()]
        unused = torch.arange(case.capacity()) >= torch.tensor(held)[:, None]
        if slots is None:
            unused = unused[:, : packed.num_tokens]
        else:
            places = slots[~unused]
            unused = ~torch.isin(torch.arange(packed.num_tokens), places)[None]
        packed = spoil(packed, unused, torch.nan)
        k, v = (packed, v) if number == 0 else (k, packed)
        for item, n in enumerate(lengths.tolist()):
            rows = torch.ones(window.shape[2], dtype=torch.bool)
            rows[torch.arange(held[item], n) % window.shape[2]] = False
            window[item, :, rows] = torch.nan
    assert clean[0][:2].isfinite().all() and not clean[0][2].any()
    assert_bitwise_equal(kernels.run("packed_attention", q, k, v, *rest), clean)


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_visible(backend: Backend, queries: int, dtype: torch.dtype) -> None:
    case = Case(queries=queries, dtype=dtype, window_k=16, window_v=16)
    q, k, v, *residuals = case.inputs()[:5]
    nothing = torch.zeros(2, 80, dtype=torch.bool)
    empty = torch.zeros(2, dtype=torch.int32)
    for options in (
        {"mask": nothing},
        {"key_bias": torch.full((1, 1, 80), -torch.inf)},
        {"length": 70, "lengths": empty},
        {"length": 0},
    ):
        out, lse = backend.run("packed_attention", q, k, v, *residuals, **options)
        assert out.eq(0).all() and lse.eq(-torch.inf).all()
    out, lse = backend.run("packed_attention", q, k, v, *residuals, length=5, causal=True)
    early = max(queries - 5, 0)
    assert out[:, :, :early].eq(0).all() and lse[:, :, :early].eq(-torch.inf).all()
    assert lse[:, :, early:].isfinite().all()


@pytest.mark.parametrize("queries", [1, 10])
def test_strides_do_not_matter(kernels: Backend, queries: int) -> None:
    """Records of 144 bytes; queries, windows, masks and biases that are views."""
    case = Case(2, 2, 2, queries, 85, 128, 128, "4 channel 64", "4 channel 64", 15, 15)
    q, k, v, *residuals = replace(case, dtype=torch.float16).inputs()[:5]
    rng = generator(2)
    mask = (torch.rand(2, 170, generator=rng) < 0.8)[:, ::2]
    bias = torch.rand(85, 2, generator=rng).t()
    copies = {"mask": mask.contiguous(), "key_bias": bias.contiguous(), "causal": True}
    expected = kernels.run("packed_attention", q, k, v, *residuals, **copies)
    records = as_records(k, v)
    assert records[0].codes.stride(1) == 144 and records[0].codes.stride(2) == 288
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, *residuals)]
    options = {"mask": mask, "key_bias": bias, "causal": True}
    actual = kernels.run("packed_attention", views[0], *records, *views[1:], **options)
    assert_bitwise_equal(actual, expected)


BITWISE = [
    Case(3, 2, 2, 1, 1120, bias="full", mask="padding"),
    replace(CACHE, batch=3, lengths=True, group=3),
    replace(RING, batch=3, lengths=True, queries=2, causal=True),
    replace(PAGES, queries=33, causal=True),
    Case(3, 1, 4, 20, 80, k="3 token 16 symmetric rotated", v="8 channel 64 fp8", causal=True),
    Case(3, 1, 4, 1, 320, k="2 channel 16 zero_point", v="1 token 20", lists="head", listed=70),
    Case(3, 2, 4, 2, 320, k="3 channel 64 codebook rotated", v="4 channel 32 codebook", lists="kv"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_batch_does_not_matter(kernels: Backend, case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    assert_alone_as_in_a_batch(kernels, "packed_attention", inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_isa_and_threads_do_not_matter(on_every_cpu, case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    assert_same_on_every_cpu(on_every_cpu, "packed_attention", inputs)


def test_slots_are_a_gather(kernels: Backend) -> None:
    """Tokens that lie in a pool in any order, or in a row."""
    _, k, v, *_ = Case(1, tokens=96, k="4 channel 32").inputs()
    q = torch.randn(3, 4, 1, 64, generator=generator())
    slots = torch.stack([torch.randperm(96, generator=generator(i))[:50] for i in range(3)]).int()
    rows = [
        replace(
            side,
            codes=side.codes[0][:, slots.long()].transpose(0, 1).contiguous(),
            params=side.params[0][:, slots.long()].transpose(0, 1).contiguous(),
        )
        for side in (k, v)
    ]
    expected = kernels.run("packed_attention", q, *rows)
    assert_bitwise_equal(kernels.run("packed_attention", q, k, v, slots=slots), expected)


def test_any_slots_are_safe(kernels: Backend) -> None:
    """Pages that are not in order, and tokens of them that are nowhere: nothing out of bounds."""
    q, k, v, *_ = Case(1, tokens=96, k="4 token 16").inputs()
    q = q.expand(4, -1, -1, -1)
    wild = torch.randint(-(2**31), 2**31 - 1, (4, 70), generator=generator(), dtype=torch.int64)
    near = torch.randint(-40, 140, (4, 70), generator=generator())
    for slots in (wild.int(), near.int()):
        out, lse = kernels.run("packed_attention", q, k, v, slots=slots)
        assert out.isfinite().all() and not lse.isnan().any()


def test_a_cache_step_by_step(backend: Backend) -> None:
    """kv_append and packed_attention together: the tokens of a cache, in their order."""
    rng = generator(3)
    k, v = torch.randn(2, 2, 2, 40, 64, generator=rng)
    q = torch.randn(2, 4, 1, 64, generator=rng)
    sides = []
    for text, rows, x in (("8 token 8", 8, k), ("8 channel 32", 12, v)):
        packed = packing(text).empty(2, 2, 48, 64)
        window = x.new_zeros(2, 2, rows, 64)
        for token in range(40):
            # The window and the cache are written in place, on the device.
            moved = move([packed, window], backend.device)
            one = move(x[:, :, token : token + 1], backend.device)
            backend.function("kv_append")(one, moved[0], token, moved[1])
            packed, window = move(moved, "cpu")
        sides.append((packed, window))
    (keys, window_k), (values, window_v) = sides
    out, lse = backend.run("packed_attention", q, keys, values, window_k, window_v, length=40)
    whole_k, whole_v = k.clone(), v.clone()
    whole_k[:, :, :32] = reference.kv_unpack(pack(k[:, :, :32], keys.format))
    whole_v[:, :, :28] = reference.kv_unpack(pack(v[:, :, :28], values.format))
    expected = reference.biased_attention(q, whole_k, whole_v)
    for actual, wanted in zip((out, lse), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
