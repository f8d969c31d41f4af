"""Caches in few bits against their formulas in torch: KIVI, ARKV, packed Razor heads, and bits by
importance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from cases.dense import attend, close, heads, logits
from tokred import PackFormat
from tokred.methods import arkv, importance_bits
from tokred.methods import razor_attention as razor
from tokred.methods.kivi import KiviCache

pytestmark = pytest.mark.usefixtures("one_thread")


def in_few_bits(x: Tensor, bits: int, group: int, axis: int) -> Tensor:
    """x with groups along an axis on a grid from their minimum; scale and minimum in float16."""
    groups = x.unflatten(axis, (-1, group))
    low, high = (f(groups, axis + 1, True) for f in (torch.amin, torch.amax))
    scale = (high - low) / (2**bits - 1)
    codes = ((groups - low) / scale).clamp(0, 2**bits - 1).round().nan_to_num(0)
    return (codes * scale.half() + low.half()).flatten(axis, axis + 1)


class Kivi:
    """The published order of updates: append, attend, then quantise."""

    def __init__(self, bits: int, group: int, residual: int) -> None:
        self.bits, self.group, self.residual = bits, group, residual

    def prompt(self, k: Tensor, v: Tensor) -> None:
        keys = k.shape[2] // self.residual * self.residual
        values = max(k.shape[2] - self.residual, 0)
        self.k = in_few_bits(k[:, :, :keys], self.bits, self.group, 2)
        self.v = in_few_bits(v[:, :, :values], self.bits, self.group, 3)
        self.k_left, self.v_left = k[:, :, keys:], v[:, :, values:]

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k_left, self.v_left = torch.cat([self.k_left, k], 2), torch.cat([self.v_left, v], 2)
        keys, values = torch.cat([self.k, self.k_left], 2), torch.cat([self.v, self.v_left], 2)
        out = attend(q, keys, values)
        if self.k_left.shape[2] == self.residual:
            whole = in_few_bits(self.k_left, self.bits, self.group, 2)
            self.k, self.k_left = torch.cat([self.k, whole], 2), self.k_left[:, :, :0]
        if self.v_left.shape[2] > self.residual:
            oldest = in_few_bits(self.v_left[:, :, :1], self.bits, self.group, 3)
            self.v, self.v_left = torch.cat([self.v, oldest], 2), self.v_left[:, :, 1:]
        return out


@pytest.mark.parametrize("prompt", [1, 20, 64, 71])
@pytest.mark.parametrize(("bits", "residual"), [(2, 32), (4, 16)])
def test_kivi(bits: int, residual: int, prompt: int) -> None:
    q, k, v = heads(queries=prompt + 45, keys=prompt + 45, dim=32)
    cache = KiviCache(2, 2, 120, 32, None, bits, 16, residual, torch.float32)
    published = Kivi(bits, 16, residual)
    causal = torch.ones(prompt, prompt, dtype=torch.bool).tril()
    first = [x[:, :, :prompt] for x in (q, k, v)]
    published.prompt(*first[1:])
    close(cache.step(*first), attend(*first, causal))
    for t in range(prompt, prompt + 45):
        token = [x[:, :, t : t + 1] for x in (q, k, v)]
        close(cache.step(*token), published.step(*token))
    assert cache.length == prompt + 45


def test_kivi_prompt_in_parts() -> None:
    """A part sees itself in full precision, and the parts before as they are stored."""
    q, k, v = heads(queries=90, keys=90, dim=32)
    cache = KiviCache(2, 2, 90, 32, None, 4, 16, 32, torch.float32)
    cache.step(*(x[:, :, :50] for x in (q, k, v)))
    out = cache.step(*(x[:, :, 50:] for x in (q, k, v)))
    stored_k = torch.cat([in_few_bits(k[:, :, :32], 4, 16, 2), k[:, :, 32:]], 2)
    stored_v = torch.cat([in_few_bits(v[:, :, :17], 4, 16, 3), v[:, :, 17:]], 2)
    causal = torch.ones(40, 90, dtype=torch.bool).tril(50)
    close(out, attend(q[:, :, 50:], stored_k, stored_v, causal))


def test_kivi_without_room() -> None:
    with pytest.raises(ValueError, match="residual must be a multiple"):
        KiviCache(1, 1, 64, 32, residual=40)
    _, k, v = heads(keys=200, dim=32)
    cache = KiviCache(2, 2, 64, 32, group_size=16, residual=32, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="room for 64"):
        cache.append(k, v)
    fits = {"k": k[:, :, :6], "v": v[:, :, :6]}
    crooked = fits["v"].mT.contiguous().mT
    wrong = (("k", k.half()), ("v", v[:, :, :5]), ("v", v[:1]), ("v", v[:, :1]), ("v", crooked))
    for name, x in wrong:
        with pytest.raises(ValueError, match=f"{name} must "):
            cache.append(**fits | {name: x})
    with pytest.raises(ValueError, match="requires grad"):
        cache.append(fits["k"], fits["v"].clone().requires_grad_())
    for q in (torch.zeros(2, 3, 1, 32), torch.zeros(2, 4, 1, 16), torch.zeros(2, 4, 1, 32).half()):
        with pytest.raises(ValueError, match=r"q must be \[2, a multiple of 2, 1, 32\]"):
            cache.step(q, k[:, :, :1], v[:, :, :1])
    assert cache.length == 0 and not cache.packed_v.codes.any()
    assert not cache.window_k.any() and not cache.window_v.any()
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        KiviCache(1, 1, 64, 32, group_size=0)


@pytest.mark.parametrize(("window", "tokens"), [(8, 60), (2, 3), (8, 9), (8, 8)])
def test_arkv_layers(window: int, tokens: int) -> None:
    """Entropy, variance and kurtosis of the last queries' weights on the keys before them."""
    q, k, _ = heads(queries=window, keys=tokens)
    causal = torch.ones(window, tokens, dtype=torch.bool).tril(tokens - window)
    p = logits(q, k).masked_fill(~causal, -torch.inf).softmax(-1)[..., : tokens - window]
    entropy = -(p * torch.log(p + 1e-10)).sum()
    variance = ((p - p.mean(2, keepdim=True)) ** 2).sum(2).div(window - 1).sum()
    moments = [((p - p.mean(2, keepdim=True)) ** n).mean(2) for n in (2, 4)]
    kurtosis = (moments[1] / moments[0].clamp(min=1e-8) ** 2).sum()
    tau = 7.774380648611771, 5.407015096778621, 5.527702582901318
    parts = zip((entropy, variance, kurtosis), tau, strict=True)
    expected = float(torch.stack([x ** (1 / t) for x, t in parts]).prod())
    assert arkv.layer_score(q, k) == pytest.approx(expected, rel=1e-4)


def test_arkv_budgets() -> None:
    """Each layer's share of the largest score, whichever layer has it; halves to even."""
    assert arkv.origin_budgets([2.0, 1.0, 4.0, 3.0], 96, 32, 500) == [32, 16, 64, 48]
    assert arkv.origin_budgets([2.0, 1.0, 4.0, 3.0], 96, 32, 50) == [18, 16, 18, 18]
    assert arkv.origin_budgets([1.0, 2.0, 3.0], 38, 32, 500) == [2, 4, 6]
    assert arkv.origin_budgets([1.0, 3.0, 4.0], 42, 32, 500) == [2, 8, 10]
    assert arkv.origin_budgets([0.0, 0.0], 96, 32, 500) == [64, 64]
    assert arkv.origin_budgets([1.0], 96, 32, 20) == [0]
    assert arkv.origin_budgets([], 96, 32, 500) == []


def test_arkv_refuses_sizes() -> None:
    q, k, v = heads(queries=8, keys=60)
    with pytest.raises(ValueError, match="cache_size must be more than window = 32, got 32"):
        arkv.origin_budgets([1.0], 32, 32, 500)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        arkv.compress_prompt(q, k, v, 8, 30, window=0)
    with pytest.raises(ValueError, match="origin_budget must be at least 0, got -1"):
        arkv.compress_prompt(q, k, v, -1, 30, window=8)
    with pytest.raises(ValueError, match="q must have the last 32 queries, got 8"):
        arkv.compress_prompt(q, k, v, 8, 40)
    with pytest.raises(ValueError, match="q must have from 2 to the 60 tokens of k, got 1"):
        arkv.layer_score(q[:, :, :1], k)


def in_fp8(x: Tensor) -> Tensor:
    """Rows with a scale each, stored in float16."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale.half()


def test_arkv_prompt() -> None:
    q, k, v = heads(queries=8, keys=60)
    causal = torch.ones(8, 60, dtype=torch.bool).tril(52)
    p = logits(q, k).masked_fill(~causal, -torch.inf).softmax(-1)
    score = (p.mean(2) + 263.8 * p.var(2))[..., :52]
    score = avg_pool1d(score, 5, 1, 2).unflatten(1, (2, 3)).mean(2)
    best = score.topk(22).indices.sort(-1).values
    expected = torch.cat([best, torch.arange(52, 60).expand(2, 2, -1)], 2)
    cache = arkv.compress_prompt(q, k, v, 30, 30, window=8)
    assert torch.equal(cache.position, expected) and cache.packed_k.num_tokens == 0
    assert torch.equal(cache.k, k.gather(2, expected[..., None].expand(-1, -1, -1, 16)))
    short = arkv.compress_prompt(q, k[:, :, :20], v[:, :, :20], 30, 30, window=8)
    assert torch.equal(short.v, v[:, :, :20])


def test_arkv_steps() -> None:
    """Every head's tokens as lists in order, with their state; three shrinks in 40 steps."""
    q, k, v = heads(queries=70, keys=70)
    size, window, budget = 30, 8, 14
    cache = arkv.compress_prompt(q[:, :, 22:30], k[:, :, :30], v[:, :, :30], budget, size, window)
    stored = [[[(t, k[b, h, t], v[b, h, t]) for t in range(30)] for h in (0, 1)] for b in (0, 1)]
    states = [[{t: "whole" for t in range(70)} for _ in (0, 1)] for _ in (0, 1)]
    for t in range(30, 70):
        token = [x[:, :, t : t + 1] for x in (q, k, v)]
        out = cache.step(*token)
        for b in (0, 1):
            for h in (0, 1):
                tokens = stored[b][h]
                tokens.append((t, k[b, h, t], v[b, h, t]))
                keys, values = (torch.stack([x[i] for x in tokens]) for i in (1, 2))
                p = (q[b, 3 * h : 3 * h + 3, t] @ keys.T * 0.25).softmax(-1)
                close(out[b, 3 * h : 3 * h + 3, 0], p @ values)
                if len(tokens) <= size:
                    continue
                past = len(tokens) - window
                score = avg_pool1d(p[None, :, :past], 5, 1, 2)[0].mean(0)
                ranked = score.argsort(descending=True)[: past * 3 // 4].tolist()
                for i in ranked[budget - window :]:
                    state = states[b][h]
                    state[tokens[i][0]] = "fp8"
                    tokens[i] = (tokens[i][0], in_fp8(tokens[i][1]), in_fp8(tokens[i][2]))
                for i in ranked[: budget - window]:
                    states[b][h][tokens[i][0]] = "whole"
                stored[b][h] = [tokens[i] for i in sorted(ranked)] + tokens[past:]
    assert cache.packed_k.num_tokens > 8
    for b in (0, 1):
        for h in (0, 1):
            packed = cache.position[b, h, : cache.packed_k.num_tokens].tolist()
            assert all(states[b][h][t] == "fp8" for t in packed)
            assert sorted(cache.position[b, h].tolist()) == [x[0] for x in stored[b][h]]


def test_arkv_grows_in_place() -> None:
    """New buffers with the first shrink, which leaves less in full precision, and never again."""
    q, k, v = heads(queries=70, keys=70)
    cache = arkv.compress_prompt(q[:, :, 12:20], k[:, :, :20], v[:, :, :20], 14, 30, window=8)
    places, sizes = [], []
    for t in range(20, 70):
        cache.step(*(x[:, :, t : t + 1] for x in (q, k, v)))
        places.append([x.data_ptr() for x in (cache.k, cache.v, cache.position)])
        sizes.append(cache.num_tokens)
    shrinks = [i for i in range(1, 50) if sizes[i] < sizes[i - 1]]
    first = shrinks[0]
    assert len(shrinks) >= 3 and sizes[first - 1] == 30
    assert all(place == places[0] for place in places[:first])
    assert all(place == places[first] for place in places[first:])
    assert cache.k.untyped_storage().nbytes() == 2 * 2 * 16 * 4 * (31 - cache.packed_k.num_tokens)


def test_arkv_refuses_other_tokens() -> None:
    q, k, v = heads(queries=8, keys=20)
    cache = arkv.compress_prompt(q, k, v, 14, 30, window=8)
    q, k, v = (x[:, :, :1] for x in (q, k, v))
    wrong = (("k", k[:1]), ("k", k.half()), ("v", v[:, :1]), ("v", v.expand(2, 2, 2, 16)))
    for name, token in wrong:
        with pytest.raises(ValueError, match=f"{name} must be one token"):
            cache.step(q, **{"k": k, "v": v} | {name: token})
    for query in (q[:1], q[:, :5], q.expand(-1, -1, 2, -1), q[..., :8], q.half()):
        with pytest.raises(ValueError, match="q must be"):
            cache.step(query, k, v)
    with pytest.raises(ValueError, match="requires grad"):
        cache.step(q, k, v.clone().requires_grad_())
    assert cache.num_tokens == 20 and cache.length == 20


@pytest.mark.parametrize("retrieval", [[False, True, False], [True] * 3, [False] * 3])
def test_packed_razor_heads(retrieval: list[bool]) -> None:
    """Heads of two lengths in one pool, as attention on what is stored of each."""
    retrieval = torch.tensor(retrieval)
    q, k, v = heads(queries=3, keys=60, groups=(6, 3), dim=32)
    whole = k[:, retrieval], v[:, retrieval]
    others = razor.compress(k[:, ~retrieval], v[:, ~retrieval], 4, window=20)
    packed = razor.pack_heads(
        *whole, retrieval, others, PackFormat(8, 32), PackFormat(4, 16, "channel")
    )
    assert packed.k.num_tokens == 2 * (60 * int(retrieval.sum()) + 25 * int((~retrieval).sum()))
    others.k, others.v = in_few_bits(others.k, 8, 32, 3), in_few_bits(others.v, 4, 16, 3)
    stored = in_few_bits(whole[0], 8, 32, 3), in_few_bits(whole[1], 4, 16, 3)
    out, lse = packed.attend(q)
    close(out, razor.razor_attention(q, *stored, retrieval, others))
    assert lse.shape == (2, 6, 3)


def test_packed_razor_heads_with_nothing_dropped() -> None:
    q, k, v = heads(keys=12, groups=(4, 2), dim=32)
    retrieval = torch.tensor([True, False])
    others = razor.compress(k[:, 1:], v[:, 1:], 4, window=20)
    form = PackFormat(8, 32)
    packed = razor.pack_heads(k[:, :1], v[:, :1], retrieval, others, form, form)
    close(packed.attend(q)[0], attend(q, *(in_few_bits(x, 8, 32, 3) for x in (k, v))))


def test_importance() -> None:
    q, k, _ = heads(queries=40, keys=40)
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    columns = logits(q, k).masked_fill(~causal, -torch.inf).softmax(-1).sum((1, 2))
    low, high = columns.amin(1, keepdim=True), columns.amax(1, keepdim=True)
    expected = 0.005 + 0.995 * (columns - low) / (high - low)
    close(importance_bits.attention_concentration(q, k), expected.float())
    close(importance_bits.first_token_logits(q, k), logits(q, k)[..., 0].sum(1).float())


def rotated_symmetric(x: Tensor, bits: int) -> Tensor:
    """Rows times a Hadamard matrix, on a grid around 0 with one scale, and back."""
    matrix = torch.ones(1, 1)
    while len(matrix) < x.shape[-1]:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    matrix = matrix * len(matrix) ** -0.5
    rows, half = x @ matrix, 2 ** (bits - 1)
    scale = rows.abs().amax(-1, keepdim=True) / (half - 1)
    return (rows / scale).round().clamp(-half, half - 1) * scale.half() @ matrix


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_importance_bits(share: float) -> None:
    """The least important share in 4 bits, the others in 8, in one softmax."""
    q, k, v = heads(keys=51, dim=64)
    importance = torch.rand(2, 51)
    few = torch.zeros(2, 51, dtype=torch.bool)
    few.scatter_(1, importance.argsort(1)[:, : int(share * 51)], True)
    # A rounding error may move a number to the next code.
    rows = few[:, None, :, None]
    stored = [torch.where(rows, rotated_symmetric(x, 4), rotated_symmetric(x, 8)) for x in (k, v)]
    cache = importance_bits.mixed_bits(k, v, importance, share)
    torch.testing.assert_close(cache.attend(q)[0], attend(q, *stored), rtol=0.02, atol=0.02)
    mask = torch.rand(2, 51) < 0.6
    torch.testing.assert_close(
        cache.attend(q, mask)[0], attend(q, *stored, mask[:, None, None]), rtol=0.02, atol=0.02
    )
    assert cache.nbytes == 2 * 2 * 2 * (51 * 64 - 32 * int(share * 51) + 51 * 2)


def test_importance_bits_with_other_formats() -> None:
    q, k, v = heads(keys=40, dim=32)
    importance = torch.rand(2, 40)
    formats = PackFormat(2, 16), PackFormat(8, 32)
    cache = importance_bits.mixed_bits(k, v, importance, 0.25, *formats)
    few = torch.zeros(2, 40, dtype=torch.bool).scatter(1, importance.argsort(1)[:, :10], True)
    rows = few[:, None, :, None]
    stored = [torch.where(rows, in_few_bits(x, 2, 16, 3), in_few_bits(x, 8, 32, 3)) for x in (k, v)]
    close(cache.attend(q)[0], attend(q, *stored))
