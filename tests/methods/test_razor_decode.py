"""Decoding with RazorAttention's heads, in full precision and packed, against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokred
from cases.dense import close, heads
from tokred import PackFormat
from tokred.methods import razor_attention as razor

pytestmark = pytest.mark.usefixtures("one_thread")

SINKS, WINDOW = 4, 20
EIGHT_BITS = PackFormat(8, 16)


def unpacked(x: Tensor) -> Tensor:
    """What is left of x [.., D] in eight bits."""
    packed = tokred.kv_pack(x.reshape(1, 1, -1, x.shape[-1]), 8, 16)
    return tokred.kv_unpack(packed).view(x.shape)


def pack(
    k: Tensor, v: Tensor, retrieval: list[bool], form: PackFormat = EIGHT_BITS
) -> razor.PackedRazorHeads:
    mine = torch.tensor(retrieval)
    others = razor.compress(k[:, ~mine], v[:, ~mine], SINKS, WINDOW)
    return razor.pack_heads(k[:, mine], v[:, mine], mine, others, form, form)


def running_mean(x: Tensor, prompt: int, tokens: int) -> tuple[Tensor, int]:
    """The mean of the tokens [N, D] that have left the window, and how many they are.

    Those of the prompt had not been packed when they left; the later ones join one by one.
    """
    sinks = min(SINKS, prompt)
    first, last = (max(n - WINDOW, sinks) for n in (prompt, tokens))
    mean, count = x[sinks:first].sum(0) / max(first - sinks, 1), first - sinks
    for left in unpacked(x)[first:last]:
        mean, count = (count * mean + left) / (count + 1), count + 1
    return mean, count


def published(
    q: Tensor, k: Tensor, v: Tensor, retrieval: bool, prompt: int
) -> tuple[Tensor, Tensor]:
    """o = (sum e^s v + N e^mean v_mean) / (sum e^s + N e^mean) of a head, q [L, D], k [N, D]."""
    tokens = len(k)
    kept = range(tokens)
    if not retrieval:
        kept = [t for t in kept if t < min(SINKS, prompt) or t >= tokens - WINDOW]
    (mean_k, count), (mean_v, _) = (running_mean(x, prompt, tokens) for x in (k, v))
    keys, values = (unpacked(x)[list(kept)].double() for x in (k, v))
    weights = (q.double() @ keys.T * 32**-0.5).exp()
    total, out = weights.sum(-1), weights @ values
    if not retrieval:
        weight = count * (q.double() @ unpacked(mean_k).double() * 32**-0.5).exp()
        total, out = total + weight, out + weight[:, None] * unpacked(mean_v).double()
    return (out / total[:, None]).float(), total.log().float()


@pytest.mark.parametrize("retrieval", [[False, True, False], [True] * 3, [False] * 3])
@pytest.mark.parametrize("prompt", [2, 9, 60])
@pytest.mark.parametrize("part", [1, 6, 30])
def test_packed_decode(retrieval: list[bool], prompt: int, part: int) -> None:
    """60 later tokens, three windows: one by one, several, and more than a window at a time."""
    q, k, v = heads(queries=2, keys=prompt + 60, groups=(6, 3), dim=32)
    sinks = min(SINKS, prompt)
    packed = pack(k[:, :, :prompt], v[:, :, :prompt], retrieval)
    for start in range(prompt, prompt + 60, part):
        end = start + part
        packed.append(k[:, :, start:end], v[:, :, start:end])
        if (end - prompt) % 6:
            continue
        out, lse = packed.attend(q)
        for b in range(2):
            for h in range(3):
                group = q[b, 2 * h : 2 * h + 2].flatten(0, 1)
                expected = published(group, k[b, h, :end], v[b, h, :end], retrieval[h], prompt)
                # A rounding error may move a number of the compensation token to the next code.
                for actual, one in zip((out, lse), expected, strict=True):
                    torch.testing.assert_close(
                        actual[b, 2 * h : 2 * h + 2].flatten(0, 1), one, rtol=0, atol=1e-3
                    )
    assert packed.length == prompt + 60
    assert torch.equal(
        packed.dropped, torch.full_like(packed.dropped, prompt + 60 - sinks - WINDOW)
    )


@pytest.mark.parametrize("form", [PackFormat(4, 32, rotated=True), PackFormat(8, 32, scheme="fp8")])
def test_packed_formats(form: PackFormat) -> None:
    """Other formats: what is not packed differs by what packing loses."""
    q, k, v = heads(queries=1, keys=90, groups=(6, 3), dim=32)
    retrieval = [False, True, False]
    packed = pack(k[:, :, :40], v[:, :, :40], retrieval, form)
    mine = torch.tensor(retrieval)
    others = razor.compress(k[:, ~mine, :40], v[:, ~mine, :40], SINKS, WINDOW)
    for t in range(40, 90):
        token = [x[:, :, t : t + 1] for x in (k, v)]
        packed.append(*token)
        others.append(*(x[:, ~mine] for x in token))
    expected = razor.razor_attention(q, k[:, mine], v[:, mine], mine, others)
    torch.testing.assert_close(packed.attend(q)[0], expected, rtol=0, atol=0.1)


def test_packed_growth() -> None:
    """The pool moves with the first token, and then whenever retrieval heads need a sixteenth."""
    _, k, v = heads(keys=400, groups=(6, 3), dim=32)
    packed = pack(k[:, :, :300], v[:, :, :300], [True, False, False])
    codes = []
    for t in range(300, 400):
        packed.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        if not codes or packed.k.codes is not codes[-1]:
            codes.append(packed.k.codes)
    assert len(codes) == 5 and packed.lengths.tolist() == [400, 25, 25] * 2
    assert packed.k.num_tokens - 2 * (400 + 25 + 25) <= 2 * 400 // 16


def test_packed_refuses() -> None:
    _, k, v = heads(keys=30, groups=(6, 3), dim=32)
    packed = pack(k, v, [True, False, False])
    before = packed.k.codes.clone()
    k, v = k[:, :, :2], v[:, :, :2]
    for name, token in (("k", k[:1]), ("k", k.double()), ("v", v[:, :, :1]), ("v", v[..., :16])):
        with pytest.raises(ValueError, match=f"{name} must be"):
            packed.append(**{"k": k, "v": v} | {name: token})
    with pytest.raises(ValueError, match="v requires grad"):
        packed.append(k, v.clone().requires_grad_())
    packed.append(k[:, :, :0], v[:, :, :0])
    assert packed.length == 30 and torch.equal(packed.k.codes, before)
    with pytest.raises(ValueError, match="key must have groups along channels"):
        pack(k, v, [True, False, False], PackFormat(8, 2, "token"))


def test_ring() -> None:
    """It is in place once the window is full: three windows give what all tokens at once give."""
    q, k, v = heads(keys=80)
    ring = razor.compress(k[:, :, :21], v[:, :, :21], SINKS, WINDOW)
    for t in range(21, 80):
        before = ring.k.data_ptr(), ring.v.data_ptr()
        ring.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        assert t < 24 or before == (ring.k.data_ptr(), ring.v.data_ptr())
        at_once = razor.compress(k[:, :, : t + 1], v[:, :, : t + 1], SINKS, WINDOW)
        close(ring.attend(q)[0], at_once.attend(q)[0])
    assert ring.oldest == 56 % WINDOW


def test_pack_a_ring() -> None:
    """The oldest token of a ring that has turned is also the first to leave the packed one."""
    q, k, v = heads(keys=80, dim=32)
    ring = razor.compress(k[:, :, :40], v[:, :, :40], SINKS, WINDOW)
    for t in range(40, 47):
        ring.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    none = torch.zeros(2, dtype=torch.bool)
    packed = razor.pack_heads(k[:, :0], v[:, :0], none, ring, EIGHT_BITS, EIGHT_BITS)
    anew = pack(k[:, :, :47], v[:, :, :47], [False, False])
    for each in (packed, anew):
        each.append(k[:, :, 47:60], v[:, :, 47:60])
    torch.testing.assert_close(packed.attend(q)[0], anew.attend(q)[0], rtol=0, atol=1e-3)


def test_ring_refuses() -> None:
    _, k, v = heads(keys=30)
    ring = razor.compress(k, v, SINKS, WINDOW)
    k, v = k[:, :, :1], v[:, :, :1]
    for name, token in (("k", k[:1]), ("k", k.half()), ("v", v[:, :1]), ("v", v[:, :, :0])):
        with pytest.raises(ValueError, match=f"{name} must be"):
            ring.append(**{"k": k, "v": v} | {name: token})
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        razor.compress(k, v, window=0)
