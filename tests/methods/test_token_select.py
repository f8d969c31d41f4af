"""TokenSelect against its formula, in plain torch and token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.compare import assert_bitwise_equal
from cases.inputs import generator
from cases.tiny_models import generated, left_padded, tiny_lm
from tokred.integrations.transformers import attention
from tokred.integrations.transformers.decoder import Rotary
from tokred.methods.token_select import TokenSelectAttention, TokenSelectOptions, vote

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, GROUP, DIM = 6, 3, 8
BASE = 100.0


class Angles(nn.Module):
    """Llama's rotary embedding."""

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        frequency = BASE ** (-torch.arange(0, DIM, 2) / DIM)
        angles = (positions[..., None] * frequency).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotate(x: Tensor) -> Tensor:
        turned = torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1)
        return x * cos[:, None] + turned * sin[:, None]

    return rotate(q), rotate(k)


def turned(x: Tensor, position: int) -> Tensor:
    """x [D] at a position, as complex numbers."""
    frequency = BASE ** (-torch.arange(0, DIM, 2) / DIM)
    value = torch.complex(x[: DIM // 2], x[DIM // 2 :])
    value = value * torch.polar(torch.ones(DIM // 2), position * frequency)
    return torch.cat([value.real, value.imag])


def transcribed(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, options: TokenSelectOptions, compact: bool
) -> Tensor:
    """One chunk, the last queries of the row: q [H, L, D], k and v [Hkv, N, D], real bool [N]."""
    queries, keys = q.shape[1], k.shape[1]
    row = real.nonzero().flatten().tolist()
    own = [t for t in row if t >= keys - queries]
    first, last = row[: options.n_init], row[max(len(row) - options.n_local, 0) :]
    middle = [t for t in row if t not in first and t not in last]
    everything = options.n_init + options.k + options.n_local >= keys
    votes = torch.zeros(len(middle))
    for h in range(HEADS if middle else 0):
        each = []
        for t in own:
            query = q[h, t - (keys - queries)]
            if compact:
                query = turned(query, options.n_local + t - (keys - queries))
            each.append(query)
        mean = torch.stack(each).mean(0)
        votes += (k[h // GROUP, middle] @ mean).softmax(0)
    order = sorted(range(len(middle)), key=lambda i: (-votes[i].item(), i))
    best = middle if everything else [middle[i] for i in order[: options.k]]
    chosen = sorted({*first, *best, *last})
    rank = {t: place for place, t in enumerate(chosen)}
    out = torch.zeros(HEADS, queries, v.shape[2])
    for h in range(HEADS):
        for t in own:
            seen = [j for j in chosen if j <= t]
            query, key = q[h, t - (keys - queries)], k[h // GROUP]
            if compact:
                logits = [turned(key[j], rank[j]) @ turned(query, rank[t]) for j in seen]
            else:
                logits = [key[j] @ query for j in seen]
            weights = (torch.stack(logits) * DIM**-0.5).softmax(0)
            out[h, t - (keys - queries)] = weights @ v[h // GROUP, seen]
    return out


def draw(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    source = generator(5)
    q = torch.randn(2, HEADS, queries, DIM, generator=source)
    k = torch.randn(2, HEADS // GROUP, keys, DIM, generator=source)
    return q, k, torch.randn(2, HEADS // GROUP, keys, 5, generator=source)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 30), (4, 30), (11, 30), (23, 23)])
def test_the_formula(queries: int, keys: int, padded: bool, compact: bool) -> None:
    options = TokenSelectOptions(
        k=5, n_init=2, n_local=4, prefill="select", chunk=4,
        rotation="compact" if compact else "cached",
    )  # fmt: skip
    q, k, v = draw(queries, keys)
    real = torch.ones(2, keys, dtype=torch.bool)
    if padded:
        real[1, :6] = False
    mask = real[:, None, None] if padded else None
    rotary = Rotary(Angles(), rotate_both) if compact else None
    call = attention.AttentionCall(q, k, v, mask, queries > 1, None, layer=0, rotary=rotary)
    state = options.attention([0])
    out, _ = state.attend(call)
    parts = []
    for start in range(0, queries, 4):
        stop = min(start + 4, queries)
        seen = keys - queries + stop
        rows = [
            transcribed(q[b, :, start:stop], k[b, :, :seen], v[b, :, :seen], real[b, :seen],
                        options, compact)
            for b in range(2)
        ]  # fmt: skip
        parts.append(torch.stack(rows))
    torch.testing.assert_close(out, torch.cat(parts, 2), rtol=1e-4, atol=1e-5)


def test_a_static_cache_chooses_what_a_dynamic_one_does() -> None:
    options = TokenSelectOptions(k=5, n_init=2, n_local=4)
    q, k, v = draw(1, 30)
    state = options.attention([0])
    short = attention.AttentionCall(q, k[:, :, :20], v[:, :, :20], None, False, None, 0)
    expected, _ = state.attend(short)
    filled = torch.arange(30).expand(2, 1, 1, 30) < 20
    actual, _ = state.attend(attention.AttentionCall(q, k, v, filled, False, None, 0))
    assert_bitwise_equal(actual, expected)


def test_votes_are_pooled() -> None:
    q, k, _ = draw(1, 12)
    votes = vote(q, k)
    torch.testing.assert_close(votes.sum(-1), torch.full((2, 1), float(HEADS)))
    wide = vote(q, k, pool=3)
    padded = torch.nn.functional.pad(votes, (1, 1), value=-torch.inf)
    assert torch.equal(wide, padded.unfold(2, 3, 1).amax(-1))


EVERYTHING = (
    {},
    {"prefill": "select"},
    {"rotation": "compact"},
    {"rotation": "compact", "prefill": "select", "chunk": 3, "n_local": 9},
)


@pytest.mark.parametrize(("padded", "cache"), [(True, None), (False, "static")])
@pytest.mark.parametrize("options", EVERYTHING, ids=str)
def test_a_budget_for_everything_is_the_dense_model(
    options: dict[str, Any], padded: bool, cache: str | None
) -> None:
    model = tiny_lm("Llama")
    ids, mask = left_padded()
    mask = mask if padded else None
    model.set_attn_implementation("eager")
    expected = generated(model, ids, mask)
    with tokred.patch(model, "token_select", k=1024, **options):
        actual = generated(model, ids, mask, cache_implementation=cache)
    assert torch.equal(actual, expected)
    assert model.config._attn_implementation == "eager"


def test_logits_of_a_budget_for_everything_are_the_kernels() -> None:
    model = tiny_lm("Qwen3")
    ids, mask = left_padded()
    attention.register()
    model.set_attn_implementation("tokred")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with tokred.patch(model, "token_select", k=13, prefill="select"):
            assert_bitwise_equal(model(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("rotation", ["cached", "compact"])
@pytest.mark.parametrize("prefill", ["dense", "select"])
def test_generation_with_a_small_budget(
    rotation: str, prefill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left padding changes nothing, and the lists hold the sinks and the locals."""
    lists = []
    original = TokenSelectAttention._choose

    def choose(*args: Any) -> tuple[Tensor, Tensor]:
        chosen = original(*args)
        lists.append(chosen[0])
        return chosen

    monkeypatch.setattr(TokenSelectAttention, "_choose", choose)
    model = tiny_lm("Llama")
    ids, mask = left_padded(length=24, padding=6)
    options = dict(k=4, n_init=2, n_local=4, chunk=4, rotation=rotation, prefill=prefill)
    with tokred.patch(model, "token_select", **options):
        together = generated(model, ids, mask, min_new_tokens=5)
        indices = lists[-1]
        if prefill == "dense":
            alone = generated(model, ids[1:, 6:], None, min_new_tokens=5)
            assert torch.equal(alone[0, 18:], together[1, 24:])
    length = 24 + 5 - 1
    assert indices.shape == (2, 1, 10)
    for row, start in zip(indices[:, 0].tolist(), (0, 6), strict=True):
        assert row[:2] == [start, start + 1] and row[6:] == list(range(length - 4, length))
        assert row == sorted(set(row))
    dense = generated(model, ids, mask, min_new_tokens=5)
    assert not torch.equal(together, dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "k and n_init"),
        ({"n_local": 0}, "n_local"),
        ({"prefill": "sparse"}, "prefill"),
        ({"rotation": "none"}, "rotation"),
        ({"pool": 2}, "pool"),
        ({"prefill": "select", "chunk": 600}, "chunk"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenSelectOptions(**options)
