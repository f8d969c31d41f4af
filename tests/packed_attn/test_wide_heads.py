"""Heads of more than 256 dimensions, among them latents: keys whose first channels are values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tokred
from cases.attention import assert_close_to_exact
from cases.backends import Backend
from cases.compare import assert_bitwise_equal
from cases.inputs import FLOATS, generator, label
from cases.oracle import reference
from cases.packed import (
    CACHE,
    PAGES,
    RING,
    Case,
    assert_alone_as_in_a_batch,
    assert_same_on_every_cpu,
    check,
    packing,
    spoil,
)
from tokred import PackedKV

# Of DeepSeek-V2 and V3: 512 channels of a latent and 64 rotary ones, one key head.
LATENT = Case(1, 1, 16, 1, 70, 576, 576, "4 channel 64", "4 channel 64")
CASES = [
    *(replace(LATENT, k=f"{bits} channel 64", group=group) for bits, group in ((8, 5), (3, 2))),
    replace(LATENT, batch=2, group=33, k="8 channel 576", value_dim=512),
    replace(LATENT, group=128, tokens=20, k="2 channel 64", v="1 channel 32"),
    replace(LATENT, group=3, k="8 token 10", v="2 token 14"),
    replace(LATENT, group=2, k="4 channel 576 codebook", v="8 channel 64 fp8", value_dim=320),
    replace(LATENT, k="4 channel 64 asymmetric rotated", v="2 channel 48 symmetric rotated"),
    replace(LATENT, head_dim=64, value_dim=512, v="4 token 14 symmetric rotated", softcap=2.0),
    replace(RING, head_dim=272, value_dim=304, k="4 channel 16", v="4 channel 16", lengths=True),
    replace(CACHE, tokens=90, head_dim=576, value_dim=64, mask="full", bias="holes"),
    replace(PAGES, head_dim=320, value_dim=576, lists="head", listed=11),
    replace(LATENT, group=3, queries=12, causal=True, k="4 channel 64 zero_point"),
    replace(
        LATENT, group=2, queries=3, causal=True, mask="full of numbers", window_k=7, window_v=7
    ),
]


@pytest.mark.parametrize(
    "case", [replace(c, dtype=FLOATS[i % 3]) for i, c in enumerate(CASES)], ids=label
)
def test_against_float64(backend: Backend, case: Case) -> None:
    check(backend, case.inputs())


@pytest.mark.parametrize("text", ["8 channel 64 symmetric", "4 channel 64", "3 token 14"])
def test_values_are_the_keys(backend: Backend, text: str) -> None:
    """The same tensors twice; and where no offsets follow the scales, a view of the first 512."""
    q, k, *_ = replace(LATENT, k=text, dtype=torch.bfloat16).inputs()
    out, lse = backend.run("packed_attention", q, k, k)
    exact, exact_lse = reference.packed_attention(q.double(), k, k)
    assert_close_to_exact((out, lse), (exact, exact_lse), reference.packed_attention(q, k, k))
    if text.endswith("symmetric"):
        first = PackedKV(k.codes[..., :512], k.params[..., :8], k.format)
        views = backend.run("packed_attention", q, k, first)
        assert_bitwise_equal(views, (out[..., :512], lse))


def test_eight_bits_of_one_sign_do_not_overflow(backend: Backend) -> None:
    """576 products of 2^15 and 255 are more than 31 bits hold."""
    q = torch.full((1, 2, 1, 576), 1.0, dtype=torch.bfloat16)
    k = torch.ones(1, 1, 64, 576)
    k[..., ::64] = 0.0
    packed = reference.kv_pack(k, 8, 576, "channel")
    check(backend, (q, packed, packed, None, None, 0.01), values=1.0)


def test_hidden_tokens_may_hold_anything(kernels: Backend) -> None:
    q, k, v, *rest = replace(LATENT, tokens=200, mask="tokens").inputs()
    clean = kernels.run("packed_attention", q, k, v, *rest)
    spoiled = (spoil(side, ~rest[4], torch.nan) for side in (k, v))
    assert_bitwise_equal(kernels.run("packed_attention", q, *spoiled, *rest), clean)


@pytest.mark.parametrize("text", ["4 channel 64", "8 channel 576", "4 token 25"])
def test_nothing_else_matters(on_every_cpu: Any, text: str) -> None:
    """Instruction sets, threads, and the rest of the batch."""
    case = replace(LATENT, batch=3, tokens=1100, k=text, v=text, dtype=torch.bfloat16)
    assert_same_on_every_cpu(on_every_cpu, "packed_attention", case.inputs())


def test_batch_does_not_matter(kernels: Backend) -> None:
    inputs = replace(LATENT, batch=3, group=2, tokens=150).inputs()
    assert_alone_as_in_a_batch(kernels, "packed_attention", inputs)


@pytest.mark.parametrize(
    "text",
    [
        *("4 channel 64", "3 channel 48 zero_point rotated", "2 channel 576 symmetric"),
        *("8 channel 16 fp8", "1 token 10", "4 token 40 asymmetric rotated"),
        *("3 channel 64 codebook", "8 channel 512"),
    ],
)
def test_packing(backend: Backend, text: str) -> None:
    """The same bytes as the reference, at once and step by step, and back."""
    form, dim = packing(text), 512 if text == "8 channel 512" else 576
    x = torch.randn(1, 2, 40, dim, generator=generator(5))
    x[0, 0, 3, 5], x[0, 1, 7, dim - 1] = torch.nan, torch.inf
    options = (form.bits, form.group_size, form.axis, form.scheme, form.rotated)
    if form.rotated:
        x = x.nan_to_num(0, 0, 0)
    want = reference.kv_pack(x, *options)
    packed = backend.run("kv_pack", x, *options)
    assert_bitwise_equal((packed.codes, packed.params), (want.codes, want.params))
    unpacked = backend.run("kv_unpack", packed, torch.float16)
    assert_bitwise_equal(unpacked, reference.kv_unpack(want, torch.float16))


def test_appending(backend: Backend) -> None:
    """A latent's window, whose tokens are packed as they leave it."""
    x = torch.randn(2, 1, 50, 576, generator=generator(6)).to(torch.float16)
    form = packing("4 channel 64 asymmetric rotated")
    states = []
    for runs in (backend, None):
        packed, window = form.empty(2, 1, 50, 576), x.new_zeros(2, 1, 16, 576)
        append = reference.kv_append
        if runs is not None:
            append = runs.function("kv_append")
        at = 0
        for count in (20, 1, 29):
            append(x[:, :, at : at + count], packed, at, window)
            at += count
        states.append((packed.codes, packed.params, window))
    assert_bitwise_equal(*states)


def test_scores_of_wide_keys(kernels: Backend) -> None:
    q, k, *_ = LATENT.inputs()
    if not kernels.name.startswith("cpu"):
        with pytest.raises((RuntimeError, ValueError), match=r"at most 256 on CUDA.*got 576"):
            kernels.run("packed_qk_score", q, k)
        return
    want = reference.packed_qk_score(q, k)
    torch.testing.assert_close(kernels.run("packed_qk_score", q, k), want, rtol=1e-4, atol=1e-4)


def test_no_wider() -> None:
    with pytest.raises(ValueError, match="multiple of 16 up to 576, got 592"):
        tokred.kv_pack(torch.ones(1, 1, 2, 592), 4, 16, "channel")
